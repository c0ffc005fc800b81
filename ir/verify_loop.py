"""The verifier of loop kernels: known ops, types of primitives, pointers and their spaces, a profile's limits.

The rules are those at the head of ir/verify.py."""

from __future__ import annotations

from collections.abc import Callable

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.findings import Findings, listed, named, number_error, primitive_error
from tinygpt.ir.index import Index
from tinygpt.ir.loop import LOOP_OPS
from tinygpt.ir.scalar import COMPARISONS, CONVERSIONS, PRIMITIVES, TRANSCENDENTAL
from tinygpt.ir.types import DTYPE_BYTES, PointerType, ScalarType, TensorType, VectorType
from tinygpt.ir.verify_tile import buffer_rules, carried_types

SPACES = ("buffer", "scratch", "shared")
_ELEMENT_BYTES = 4  # of scratch and shared memory
_WORKGROUP_OPS = ("shared", "barrier", "subgroup_fold")
_GPU_LANES = (2, 4)
_WORDS = {"i32": "32-bit numbers", "u32": "32-bit numbers", "f32": "32-bit numbers"}
# op -> number of operands, number of results, attributes
_FORMS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "const": (0, 1, ("value",)), "index": (0, 1, ("at",)), "lanes": (0, 1, ()), "splat": (1, 1, ()),
    "scratch": (0, 1, ("offset", "size")), "shared": (0, 1, ("offset", "size", "lanes")),
    "load": (1, 1, ("at",)), "store": (2, 0, ("at",)), "extract": (1, 1, ("lane",)),
    "broadcast_lane": (1, 1, ("lane",)), "interleave": (2, 1, ("half",)), "fold": (1, 1, ("kind",)),
    "subgroup_fold": (1, 1, ("kind", "width")),
    "bind": (1, 0, ("var", "lo", "hi")), "note": (0, 0, ("text",)), "barrier": (0, 0, ()), "if": (0, 0, ("left", "compare", "right")),
}  # fmt: skip
_OTHER_ATTRIBUTES = {"join": (), "advance": ("by", "scale"), "for": ("var", "lo", "hi", "step"), "outline": ("name", "indices")}


class LoopFindings(Findings):
    """The check of one loop kernel."""

    def __init__(self, kernel: Kernel, caps: Caps | None) -> None:
        super().__init__()
        self.kernel, self.caps = kernel, caps
        self.strategy = caps.strategy if caps else ""
        self.scope = {"lo", "hi"} if self.strategy == "cpu" else {"lo", "hi", "thread", *kernel.grid}
        self.bound = {"lo", "hi"} if self.strategy != "gpu" else set(self.scope)
        self.read_only = {p for p, access in zip(kernel.params, kernel.access) if access == "in"}
        self.varying = {"thread"}  # index variables that may differ between the threads of a workgroup
        self.split: list[Op] = []  # the branches and loops around an op that threads may go through differently
        self.rules: dict[str, Callable[[Op], None]] = {
            "const": self.const, "index": self.index_value, "lanes": self.lanes, "splat": self.splat,
            "scratch": self.piece, "shared": self.piece, "advance": self.advance, "load": self.load,
            "store": self.store, "extract": self.lane, "join": self.join, "broadcast_lane": self.lane, "interleave": self.interleave,
            "fold": self.fold, "subgroup_fold": self.subgroup_fold, "for": self.loop, "if": self.branch,
            "outline": self.outline, "bind": self.bind, "note": self.nothing, "barrier": self.uniform,
        }  # fmt: skip

    def check(self) -> None:
        buffer_rules(self, self.kernel, self.caps)
        for parameter in self.kernel.params:
            elsewhere = isinstance(parameter.type, PointerType) and parameter.type.space != "buffer"
            if element(parameter) is None or elsewhere:
                self.report(None, f"{named(parameter)} is not a buffer")
        self.define(None, self.kernel.params)
        self.region(self.kernel.body)

    def region(self, region: Region) -> None:
        for op in region.ops:
            if op.name not in LOOP_OPS:
                self.report(op, f"{op.name} is not an op of the loop level")
            elif self.use(op, op.operands) and self.well_formed(op):
                self.finite(op)
                self.rules.get(op.name, self.primitive)(op)
            self.define(op, op.results)
            for result in op.results:
                self.width(op, result)

    def well_formed(self, op: Op) -> bool:
        found = (len(op.operands), len(op.results))
        operands, results, attributes = _FORMS.get(op.name, (*found, _OTHER_ATTRIBUTES.get(op.name, ())))
        missing = [key for key in attributes if key not in op.attrs]
        if missing:
            self.report(op, f"{op.name} lacks {listed(missing)}")
        if found != (operands, results):
            self.report(op, f"{op.name} has {operands} operands and {results} results, not {found[0]} and {found[1]}")
            return False
        if self.caps and self.strategy == "cpu" and op.name in _WORKGROUP_OPS:
            self.report(op, f"{op.name} is for workgroups; {self.caps.name} has none")
        return not missing

    def width(self, op: Op, value: Value) -> None:
        """Vectors have the profile's lanes."""
        if not isinstance(value.type, VectorType) or self.caps is None:
            return
        allowed = (self.caps.lanes,) if self.strategy == "cpu" else _GPU_LANES
        if value.type.lanes not in allowed:
            self.report(op, f"vectors of {self.caps.name} have {listed(allowed)} lanes, not {value.type.lanes}")

    def index(self, op: Op, *indices: Index | int) -> None:
        unknown = {name for index in indices for name in Index.of(index).variables()} - self.scope
        if unknown:
            self.report(op, f"index variables {listed(sorted(unknown))} are not bound here")

    def expect(self, op: Op, type: object) -> None:
        if op.results and op.result.type != type:
            self.report(op, f"result is {type}, not {op.result.type}")

    def nothing(self, op: Op) -> None:
        """Ops that are right whenever their form is."""

    # -- values

    def const(self, op: Op) -> None:
        type = op.result.type
        is_number = isinstance(type, ScalarType | VectorType)
        reason = number_error(op.attrs["value"], type.dtype) if is_number else f"a constant is no {type}"
        if reason:
            self.report(op, reason)

    def index_value(self, op: Op) -> None:
        self.index(op, op.attrs["at"])
        self.expect(op, ScalarType("i32"))

    def lanes(self, op: Op) -> None:
        type = op.result.type
        if not isinstance(type, VectorType) or type.dtype != "i32":
            self.report(op, f"lanes is a vector of i32, not {type}")

    def splat(self, op: Op) -> None:
        x, type = op.operands[0].type, op.result.type
        if not isinstance(x, ScalarType) or not isinstance(type, VectorType) or x.dtype != type.dtype:
            self.report(op, f"splat makes a vector of a number, not {type} of {x}")

    def lane(self, op: Op) -> None:
        x = op.operands[0].type
        if not isinstance(x, VectorType) or not 0 <= op.attrs["lane"] < x.lanes:
            self.report(op, f"{x} has no lane {op.attrs['lane']}")
            return
        self.expect(op, ScalarType(x.dtype) if op.name == "extract" else x)

    def join(self, op: Op) -> None:
        types = [v.type for v in op.operands]
        if len(types) < 2 or len(set(types)) != 1 or not isinstance(types[0], ScalarType):
            self.report(op, f"join takes numbers of one type, not {listed(types) or 'nothing'}")
            return
        self.expect(op, VectorType(types[0].dtype, len(types)))

    def interleave(self, op: Op) -> None:
        a, b = (v.type for v in op.operands)
        if not isinstance(a, VectorType) or a != b or op.attrs["half"] not in (0, 1):
            given = f"{a}, {b}, {op.attrs['half']}"
            self.report(op, f"interleave takes two vectors of one type and half 0 or 1, not {given}")
        self.expect(op, a)

    def fold(self, op: Op) -> None:
        x = op.operands[0].type
        if op.attrs["kind"] not in ("sum", "max"):
            self.report(op, f"{op.name} is a sum or max, not {op.attrs['kind']}")
        if op.name == "fold" and not isinstance(x, VectorType):
            self.report(op, f"fold takes a vector, not {x}")
        elif isinstance(x, VectorType) and x.lanes & (x.lanes - 1):
            self.report(op, f"fold halves the lanes again and again; {x.lanes} is no power of two")
        self.expect(op, ScalarType(x.dtype) if op.name == "fold" else x)

    def subgroup_fold(self, op: Op) -> None:
        self.fold(op)
        self.uniform(op)
        width = op.attrs["width"]
        if width < 2 or width & (width - 1):
            self.report(op, f"threads fold in groups of a power of two, not of {width}")
        elif self.caps and width > self.caps.subgroup:
            self.report(op, f"subgroups of {self.caps.name} are sure to have {self.caps.subgroup} lanes, not {width}")

    def primitive(self, op: Op) -> None:
        types = [v.type for v in op.operands]
        known = op.name in PRIMITIVES or op.name in TRANSCENDENTAL
        if not known or not types or any(not isinstance(t, ScalarType | VectorType) for t in types):
            self.report(op, f"{op.name} takes numbers, not {listed(types) or 'nothing'}")
            return
        widths = {t.lanes if isinstance(t, VectorType) else 1 for t in types}
        reason = primitive_error(op.name, [t.dtype for t in types])
        if len(widths) != 1:
            reason = f"operands have one width, not {listed(types)}: splat the scalars"
        elif op.name in TRANSCENDENTAL and self.caps and op.name not in self.caps.native:
            reason = f"{self.caps.name} has no {op.name} of its own: expand it into its polynomial"
        if reason:
            self.report(op, reason)
            return
        result = op.result.type
        dtype = "bool" if op.name in COMPARISONS else result.dtype if op.name in CONVERSIONS else types[-1].dtype
        (width,) = widths
        self.expect(op, VectorType(dtype, width) if width > 1 else ScalarType(dtype))
        if op.name == "bitcast" and not {types[0].dtype, result.dtype} <= _WORDS.keys():
            self.report(op, f"bitcast keeps the bits of 32-bit numbers, not {types[0]} to {result}")

    # -- memory

    def piece(self, op: Op) -> None:
        type, offset, size = op.result.type, op.attrs["offset"], op.attrs["size"]
        if not isinstance(type, PointerType) or type.space != op.name:
            self.report(op, f"{op.name} is a pointer to {op.name} memory, not {type}")
        elif DTYPE_BYTES[type.dtype] != _ELEMENT_BYTES:
            self.report(op, f"{op.name} memory holds elements of {_ELEMENT_BYTES} bytes, not {type.dtype}")
        if offset < 0 or size < 1:
            self.report(op, f"{size} elements at {offset} are no piece of memory")
        limit = self.caps.workgroup_bytes if self.caps else 0
        if op.name == "shared" and limit and (offset + size) * _ELEMENT_BYTES > limit:
            self.report(op, f"ends at byte {(offset + size) * _ELEMENT_BYTES}; a workgroup has {limit}")

    def advance(self, op: Op) -> None:
        self.index(op, op.attrs["by"])
        if not 1 <= len(op.operands) <= 2 or len(op.results) != 1:
            self.report(op, "advance takes a pointer and at most one number, and gives a pointer")
            return
        if len(op.operands) == 2 and op.operands[1].type != ScalarType("i32"):
            self.report(op, f"advance goes on by an i32, not {op.operands[1].type}")
        pointer = op.operands[0]
        dtype = self.pointer(op)
        space = pointer.type.space if isinstance(pointer.type, PointerType) else "buffer"
        if dtype and op.result.type not in (pointer.type, PointerType(dtype, space)):
            self.report(op, f"result is {PointerType(dtype, space)}, not {op.result.type}")
        if pointer in self.read_only:
            self.read_only.add(op.result)

    def pointer(self, op: Op) -> str | None:
        """The element type of what the first operand points to."""
        pointer = op.operands[0]
        dtype = element(pointer)
        if dtype is None:
            self.report(op, f"{named(pointer)} is not a pointer")
        elif isinstance(pointer.type, PointerType) and pointer.type.space not in SPACES:
            self.report(op, f"memory is {listed(SPACES)}, not {pointer.type.space}")
        return dtype

    def load(self, op: Op) -> None:
        self.index(op, op.attrs["at"])
        dtype = self.pointer(op)
        if dtype and getattr(op.result.type, "dtype", None) != dtype:
            self.report(op, f"a load of {dtype} elements is not {op.result.type}")

    def store(self, op: Op) -> None:
        self.index(op, op.attrs["at"])
        dtype, value = self.pointer(op), op.operands[1].type
        if dtype and (not isinstance(value, ScalarType | VectorType) or value.dtype != dtype):
            self.report(op, f"{value} is stored where elements are {dtype}")
        if op.operands[0] in self.read_only:
            self.report(op, f"stores to {named(op.operands[0])}, a buffer that is only read")

    # -- control

    def uniform(self, op: Op) -> None:
        """All threads of a workgroup reach the op, or none: no branch or loop around it depends on the thread."""
        if self.split:
            self.report(op, f"only some threads may reach a {op.name} here: the {self.split[-1].name} around it depends on the thread or on a number from memory")

    def varies(self, *indices: Index | int) -> bool:
        return any(self.varying & Index.of(index).variables() for index in indices)

    def loop(self, op: Op) -> None:
        name, step = op.attrs["var"], op.attrs["step"]
        self.index(op, op.attrs["lo"], op.attrs["hi"])
        if step < 1 or len(op.regions) != 1:
            self.report(op, f"for has a positive step and one region, not step {step} and {len(op.regions)} regions")
            return
        (body,) = op.regions
        carried_types(self, op, body)
        self.same_memory(op, body)
        if name in self.bound:
            self.report(op, f"index variable {name} is bound twice")
        self.bound.add(name)
        scope, visible = set(self.scope), set(self.visible)
        self.scope.add(name)
        varies = self.varies(op.attrs["lo"], op.attrs["hi"])
        self.varying |= {name} if varies else set()
        self.inner(op, body, varies)
        self.scope, self.visible = scope, visible

    def bind(self, op: Op) -> None:
        """A number from memory: the verifier does not know that all threads of a workgroup read the same."""
        name, low, high, number = op.attrs["var"], op.attrs["lo"], op.attrs["hi"], op.operands[0].type
        if number != ScalarType("i32"):
            self.report(op, f"bind takes an i32, not {number}")
        if not 0 <= low <= high:
            self.report(op, f"{low}..{high} is no range: index variables are never negative")
        if name in self.bound:
            self.report(op, f"index variable {name} is bound twice")
        self.bound.add(name)
        self.scope.add(name)
        self.varying.add(name)

    def branch(self, op: Op) -> None:
        self.index(op, op.attrs["left"], op.attrs["right"])
        if op.attrs["compare"] not in COMPARISONS or not 1 <= len(op.regions) <= 2:
            self.report(op, f"if compares by {listed(COMPARISONS)} and has one or two regions")
        varies = self.varies(op.attrs["left"], op.attrs["right"])
        for region in op.regions:
            scope, visible = set(self.scope), set(self.visible)
            self.inner(op, region, varies)
            self.scope, self.visible = scope, visible

    def outline(self, op: Op) -> None:
        """The region sees its operands and the index variables it names, nothing else."""
        if len(op.regions) != 1 or op.results:
            self.report(op, "outline has one region and no results")
            return
        (body,) = op.regions
        indices = op.attrs["indices"]
        self.index(op, *map(Index.variable, indices))
        arguments, operands = [v.type for v in body.args], [v.type for v in op.operands]
        if arguments != operands:
            self.report(op, f"arguments are {listed(arguments)}, operands {listed(operands)}")
        self.same_memory(op, body)
        scope, visible = self.scope, self.visible
        self.scope, self.visible = set(indices), set()
        self.inner(op, body)
        self.scope, self.visible = scope, visible

    def inner(self, op: Op, body: Region, varies: bool = False) -> None:
        """The region of an op; `varies` if threads may go through it differently."""
        self.define(op, body.args)
        around = self.split
        self.split = [*around, op] if varies else around
        self.region(body)
        self.split = around
        self.use(op, body.yields)

    def same_memory(self, op: Op, body: Region) -> None:
        """A pointer that enters a region still points to memory that is only read, if it did."""
        self.read_only |= {arg for arg, v in zip(body.args, op.operands) if v in self.read_only}


def element(value: Value) -> str | None:
    """The element type of a pointer or buffer."""
    return value.type.dtype if isinstance(value.type, PointerType | TensorType) else None
