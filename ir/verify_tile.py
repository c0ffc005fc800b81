"""The verifier of tile kernels: their types, and a proof that every access lies inside its buffer.

The rules are those at the head of ir/verify.py."""

from __future__ import annotations

from collections.abc import Callable

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.findings import Findings, formula_error, listed, named, number_error
from tinygpt.ir.index import Compound, Index
from tinygpt.ir.ops import OPS, Pointwise
from tinygpt.ir.tile import REDUCTIONS
from tinygpt.ir.types import Dim, TensorType, TileType

Range = tuple[int, int]  # inclusive

_LARGEST_I32 = 2**31 - 1
_ATTRIBUTES = {
    "load": ("base", "strides"), "gather": ("base", "strides"), "store": ("base", "strides"), "fill": ("value",),
    "position": ("at",), "reduce": ("kind", "axis"), "for": ("var", "lo", "hi"), "bind": ("var", "lo", "hi"),
}  # fmt: skip
_OPERANDS = {"load": 1, "gather": 2, "store": 2, "fill": 0, "iota": 0, "position": 0, "reduce": 1, "dot": 3, "bind": 1}


class TileFindings(Findings):
    """The check of one tile kernel."""

    def __init__(self, kernel: Kernel, caps: Caps | None) -> None:
        super().__init__()
        self.kernel, self.caps = kernel, caps
        self.access = dict(zip(kernel.params, kernel.access))
        self.ranges: dict[str, Range] = {name: (0, extent - 1) for name, extent in kernel.grid.items()}
        self.scope = set(kernel.grid)  # index variables that are bound here
        self.numbers: set[str] = set()  # those of them that are numbers from memory
        self.reachable = True
        self.declared: dict[str, Dim] = {}
        self.proved: set[Dim] = set()
        self.rules: dict[str, Callable[[Op], None]] = {
            "load": self.load, "gather": self.gather, "store": self.store, "fill": self.fill, "iota": self.iota,
            "position": self.position, "reduce": self.reduce, "dot": self.dot, "for": self.loop,
            "bind": self.bind,
        }  # fmt: skip

    def check(self) -> None:
        self.header()
        self.define(None, self.kernel.params)
        self.region(self.kernel.body)
        if self.kernel.body.yields:
            self.report(None, "a kernel yields nothing: results go through stores")

    def header(self) -> None:
        kernel = self.kernel
        buffer_rules(self, kernel, self.caps)
        for parameter in kernel.params:
            if not isinstance(parameter.type, TensorType):
                self.report(None, f"{named(parameter)} is not a tensor")
        for name, extent in kernel.grid.items():
            if extent < 1:
                self.report(None, f"grid axis {name} has extent {extent}")
            limit = self.caps.grid_limit if self.caps else 0
            if self.caps and limit and extent > limit:
                self.report(None, f"grid axis {name} has extent {extent}; {self.caps.name} allows {limit}")
        for dim in kernel.dims:
            if dim.name in self.declared:
                self.report(None, f"dim {dim.name} is declared twice")
            self.declared[dim.name] = dim
            if not 1 <= dim.size <= dim.limit:
                self.report(None, f"dim {dim.name} has size {dim.size} and limit {dim.limit}: a size lies in 1..limit")

    # -- walking

    def region(self, region: Region) -> None:
        for op in region.ops:
            defined = self.use(op, op.operands)
            self.finite(op)
            if defined and self.well_formed(op):
                self.rules.get(op.name, self.pointwise)(op)
            self.define(op, op.results)
            for result in op.results:
                self.axes(op, result.type)

    def well_formed(self, op: Op) -> bool:
        """Whether the op has the operands, results and attributes that its rule looks at."""
        missing = [key for key in _ATTRIBUTES.get(op.name, ()) if key not in op.attrs]
        if missing:
            self.report(op, f"{op.name} lacks {listed(missing)}")
        wanted = _OPERANDS.get(op.name)
        if wanted is not None and len(op.operands) != wanted:
            self.report(op, f"{op.name} takes {wanted} operands, not {len(op.operands)}")
            return False
        results = len(op.operands) if op.name == "for" else 0 if op.name in ("store", "bind") else 1
        if len(op.results) != results:
            self.report(op, f"{op.name} has {results} results, not {len(op.results)}")
            return False
        tiles = [v for v in (*op.operands, *op.results) if v not in self.access]
        untiled = [v for v in tiles if not isinstance(v.type, TileType)]
        if untiled:
            self.report(op, f"{named(untiled[0])} is not a tile")
        stray = op.operands[1:] if op.name in ("load", "gather", "store") else op.operands
        if any(v in self.access for v in stray):
            self.report(op, "a buffer is read by load or gather only")
            return False
        return not missing and not untiled

    def axes(self, op: Op, type: object) -> None:
        """The axes of a tile are declared, in scope, and start inside their limits."""
        for dim in type.dims if isinstance(type, TileType) else ():
            if dim is None:
                continue
            if self.declared.get(dim.name) != dim:
                self.report(op, f"dim {dim.name} is not declared as it is used here")
            if self.index(op, dim.start, f"the start of {dim.name}") and dim not in self.proved and self.reachable:
                self.proved.add(dim)
                low, high = dim.start.bounds(self.ranges)
                if low < 0 or high >= dim.limit:
                    self.report(op, f"dim {dim.name} starts in {low}..{high}, outside of 0..{dim.limit - 1}")

    def index(self, op: Op, index: Index, what: str) -> bool:
        """Whether an index expression is over variables in scope; its divisions must mean the same on every target."""
        unknown = index.variables() - self.scope
        if unknown:
            self.report(op, f"{what} depends on {listed(sorted(unknown))}, not bound here")
            return False
        for left, right in divisions(index) if self.reachable else ():
            if left.bounds(self.ranges)[0] < 0 or not right.is_constant or right.constant < 1:
                rule = "targets divide numbers from 0 on by positive constants"
                self.report(op, f"{what} divides {left} by {right}: {rule}")
        return True

    # -- memory

    def buffer(self, op: Op, allowed: tuple[str, str]) -> TensorType | None:
        """The type of the buffer an op accesses, if it may."""
        buffer = op.operands[0]
        if buffer not in self.access or not isinstance(buffer.type, TensorType):
            self.report(op, f"{named(buffer)} is not a buffer of the kernel")
            return None
        if self.access[buffer] not in allowed:
            found = f"{named(buffer)} is {self.access[buffer]}"
            self.report(op, f"{op.name} needs a buffer that is {' or '.join(allowed)}; {found}")
        return buffer.type

    def inside(self, op: Op, dims: tuple[Dim | None, Dim | None], strides: tuple[int, int]) -> None:
        """Prove that base + rows*strides[0] + cols*strides[1] lies inside the buffer for all live rows and columns."""
        base = op.attrs["base"]
        if any(stride and dim is None for dim, stride in zip(dims, strides)):
            self.report(op, "an axis of extent one has no stride")
        known = self.index(op, base, "the base") and not any(d.start.variables() - self.scope for d in dims if d)
        if not known or not self.reachable:
            return
        low, high = addresses(base, [(d, s) for d, s in zip(dims, strides) if d], self.ranges)
        size = op.operands[0].type.size
        if low < 0 or high >= size:
            where = f"{named(op.operands[0])}, which has {size} elements"
            self.report(op, f"addresses {low}..{high} are not all inside {where}")

    def load(self, op: Op) -> None:
        buffer = self.buffer(op, ("in", "inout"))
        if buffer is None:
            return
        if buffer.dtype != op.result.type.dtype:
            self.report(op, f"a load from {buffer} is {buffer.dtype}, not {op.result.type.dtype}")
        self.inside(op, op.result.type.dims, op.attrs["strides"])

    def gather(self, op: Op) -> None:
        """Rows are picked at run time from tokens the host has checked; that each row is whole is proved here."""
        buffer, indices = self.buffer(op, ("in", "inout")), op.operands[1].type
        if buffer is None:
            return
        rows, cols = op.result.type.dims
        if indices.dtype != "i32" or indices.dims != (rows, None):
            self.report(op, f"a gather of {op.result.type} takes i32<{rows or '_'}, _> indices, not {indices}")
        if buffer.dtype != op.result.type.dtype:
            self.report(op, f"a gather from {buffer} is {buffer.dtype}, not {op.result.type.dtype}")
        self.inside(op, (None, cols), (0, op.attrs["strides"][1]))

    def store(self, op: Op) -> None:
        buffer, value = self.buffer(op, ("out", "inout")), op.operands[1].type
        if buffer is None:
            return
        if buffer.dtype != value.dtype:
            self.report(op, f"a store to {buffer} is {buffer.dtype}, not {value.dtype}")
        self.inside(op, value.dims, op.attrs["strides"])

    # -- values

    def fill(self, op: Op) -> None:
        reason = number_error(op.attrs["value"], op.result.type.dtype)
        if reason:
            self.report(op, reason)

    def iota(self, op: Op) -> None:
        type = op.result.type
        if type.dtype != "i32" or (type.rows is None) == (type.cols is None):
            self.report(op, f"iota is i32 along one axis, not {type}")

    def position(self, op: Op) -> None:
        if op.result.type != TileType("i32", None, None):
            self.report(op, f"position is i32<_, _>, not {op.result.type}")
        if self.index(op, op.attrs["at"], "position") and self.reachable:
            low, high = op.attrs["at"].bounds(self.ranges)
            if low < -_LARGEST_I32 or high > _LARGEST_I32:
                self.report(op, f"position {low}..{high} does not fit i32")

    def pointwise(self, op: Op) -> None:
        definition = OPS.get(op.name)
        if not isinstance(definition, Pointwise):
            self.report(op, f"{op.name} is not an op of the tile level")
            return
        dtypes = [v.type.dtype for v in op.operands]
        try:
            reason = formula_error(definition, dtypes, op.attrs)
        except TypeError as error:
            reason = f"attributes do not fit: {error}"
        if reason:
            self.report(op, reason)
            return
        dims: list[Dim | None] = []
        for axis in (0, 1):
            present = {v.type.dims[axis] for v in op.operands} - {None}
            if len(present) > 1:
                self.report(op, f"axes {listed(sorted(map(str, present)))} do not match")
            dims.append(present.pop() if present else None)
        expected = TileType(definition.trace(dtypes, dict(op.attrs)).dtype, dims[0], dims[1])
        if op.result.type != expected:
            self.report(op, f"result is {expected}, not {op.result.type}")

    def reduce(self, op: Op) -> None:
        kind, axis, x = op.attrs["kind"], op.attrs["axis"], op.operands[0].type
        if kind not in REDUCTIONS or axis not in (0, 1):
            self.report(op, f"reductions are {listed(REDUCTIONS)} along axis 0 or 1, not {kind} along {axis}")
            return
        if x.dtype != "f32":
            self.report(op, f"reduce takes f32, not {x.dtype}")
        expected = TileType(x.dtype, *((None, x.cols) if axis == 0 else (x.rows, None)))
        if op.result.type != expected:
            self.report(op, f"result is {expected}, not {op.result.type}")

    def dot(self, op: Op) -> None:
        acc, a, b = (v.type for v in op.operands)
        if a.cols is None or a.cols != b.rows:
            self.report(op, f"inner axes differ: {a} and {b}")
        if {acc.dtype, a.dtype, b.dtype} != {"f32"}:
            self.report(op, f"dot takes f32, not {acc}, {a}, {b}")
        expected = TileType("f32", a.rows, b.cols)
        if acc != expected or op.result.type != expected:
            self.report(op, f"accumulator and result are {expected}, not {acc} and {op.result.type}")

    def bind(self, op: Op) -> None:
        name, low, high, number = op.attrs["var"], op.attrs["lo"], op.attrs["hi"], op.operands[0].type
        if number != TileType("i32", None, None):
            self.report(op, f"bind takes i32<_, _>, not {number}")
        if not 0 <= low <= high <= _LARGEST_I32:
            self.report(op, f"{low}..{high} is no range: index variables are i32 numbers from 0 on")
        if name in self.ranges:
            self.report(op, f"index variable {name} is bound twice")
        self.ranges[name] = (low, high)
        self.scope.add(name)
        self.numbers.add(name)

    def loop(self, op: Op) -> None:
        if len(op.regions) != 1:
            self.report(op, f"for has one region, not {len(op.regions)}")
            return
        name, low, high, (body,) = op.attrs["var"], op.attrs["lo"], op.attrs["hi"], op.regions
        carried_types(self, op, body)
        bounded = self.index(op, low, "the lower bound") and self.index(op, high, "the upper bound")
        if name in self.ranges:
            self.report(op, f"index variable {name} is bound twice")
        if not bounded:
            return
        meeting = [inner.name for inner in body.walk() if inner.name in ("dot", "reduce")]
        if meeting and (low.variables() | high.variables()) & self.numbers:
            self.report(op, f"{listed(dict.fromkeys(meeting))} in a loop whose bounds are numbers from memory: threads meet there, and may not all come")
        reachable, visible, scope = self.reachable, set(self.visible), set(self.scope)
        self.ranges[name] = (low.bounds(self.ranges)[0], high.bounds(self.ranges)[1] - 1)
        self.reachable = reachable and self.ranges[name][0] <= self.ranges[name][1]
        self.scope.add(name)
        self.define(op, body.args)
        for arg in body.args:
            self.axes(op, arg.type)
        self.region(body)
        self.use(op, body.yields)
        self.reachable, self.visible, self.scope = reachable, visible, scope


def buffer_rules(findings: Findings, kernel: Kernel, caps: Caps | None) -> None:
    """What holds for the buffers of a kernel at either level."""
    if len(kernel.access) != len(kernel.params):
        findings.report(None, f"{len(kernel.params)} buffers and {len(kernel.access)} access words")
    for word in set(kernel.access) - {"in", "out", "inout"}:
        findings.report(None, f"access is in, out or inout, not {word}")
    if caps is None:
        return
    if caps.bindings and len(kernel.params) > caps.bindings:
        findings.report(None, f"{len(kernel.params)} buffers; {caps.name} binds {caps.bindings}")
    for parameter in kernel.params:
        size = parameter.type.bytes if isinstance(parameter.type, TensorType) else 0
        if caps.binding_bytes and size > caps.binding_bytes:
            limit = f"a binding of {caps.name} has at most {caps.binding_bytes}"
            findings.report(None, f"{named(parameter)} has {size} bytes; {limit}")


def carried_types(findings: Findings, op: Op, body: Region) -> None:
    """What a loop carries keeps its type: start, argument, yield and result agree."""
    started = [v.type for v in op.operands]
    for part, values in (("arguments", body.args), ("yields", body.yields), ("results", op.results)):
        types = [v.type for v in values]
        if types != started:
            carried = listed(started) or "nothing"
            findings.report(op, f"carries {carried}, but its {part} are {listed(types) or 'nothing'}")


def addresses(base: Index, axes: list[tuple[Dim, int]], ranges: dict[str, Range]) -> Range:
    """An interval that holds base + sum(position * stride) for all live positions along the axes.

    It is the intersection of two: positions as intervals that end at the axis' limit; and the linear form over the
    starts, in which variables shared with the base cancel."""
    low, high = base.bounds(ranges)
    joint, first, last = base, 0, 0
    for dim, stride in axes:
        start = dim.start.bounds(ranges)
        ends = (start[0] * stride, (min(start[1] + dim.size, dim.limit) - 1) * stride)
        low, high = low + min(ends), high + max(ends)
        joint = joint + dim.start * stride
        first, last = first + min(0, (dim.size - 1) * stride), last + max(0, (dim.size - 1) * stride)
    joint_low, joint_high = joint.bounds(ranges)
    return max(low, joint_low + first), min(high, joint_high + last)


def divisions(index: Index) -> list[tuple[Index, Index]]:
    """Every floor division and remainder inside an index expression: left and right sides."""
    found: list[tuple[Index, Index]] = []
    for atom, _ in index.terms:
        if isinstance(atom, Compound):
            found += [(atom.left, atom.right)] if atom.op in ("//", "%") else []
            found += divisions(atom.left) + divisions(atom.right)
    return found
