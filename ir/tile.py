"""The tile level: one program instance per grid point, working on small static tiles. Target-neutral.

A tile has at most two axes, each a named `Dim` that knows where it ends, so bounds need no masks in the program.
Primitives: load, gather, store, fill, iota, position, pointwise ops (by their registered name), reduce, dot, for, bind.
A load or store addresses element (r, c) of its tile at `base + (start_r + r)*strides[0] + (start_c + c)*strides[1]`;
a transposed operand is a pair of swapped strides, a broadcast is a missing axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index
from tinygpt.ir.registry import OPS, Pointwise
from tinygpt.ir.storage import Strided
from tinygpt.ir.types import FLOATS, Dim, TensorType, TileType

STRUCTURAL = ("load", "gather", "store", "fill", "iota", "position", "reduce", "dot", "for", "bind")
REDUCTIONS: dict[str, Callable[..., Any]] = {"sum": np.sum, "max": np.max}
IDENTITY = {"sum": 0.0, "max": -3.0e38}
MASKED_SCORE = -1.0e30  # finite: an infinity would turn into NaN in m - m

Position = Index | int | Dim


class TileBuilder:
    """Builds one tile kernel. `order` and `cost` are the schedule the program is built for."""

    def __init__(self, name: str, order: Mapping[str, Any], cost: Mapping[str, Any] | None = None, of: str = "") -> None:
        self.name, self.order, self.cost, self.of = name, dict(order), dict(cost or {}), of
        self.buffers: list[Value] = []
        self.access: list[str] = []
        self.extents: dict[str, int] = {}
        self.dims: dict[str, Dim] = {}
        self.loops = self.numbers = 0
        self._ops: list[list[Op]] = [[]]
        self._known: list[dict[Any, Value]] = [{}]

    def buffer(self, hint: str, type: TensorType, access: str) -> Value:
        """A new kernel parameter; access is "in", "out" or "inout"."""
        self.buffers.append(Value(type, hint))
        self.access.append(access)
        return self.buffers[-1]

    def grid(self, extent: int) -> Index:
        """A new grid axis, inside the ones so far; the id of the program instance along it."""
        name = f"g{len(self.extents)}"
        self.extents[name] = extent
        return Index.variable(name) if extent > 1 else Index.of(0)

    def dim(self, name: str, start: Index | int, size: int, limit: int) -> Dim:
        """An axis of a tile. Equal axes are one Dim, so that tiles over them fit together."""
        size = min(size, limit)
        start = Index.of(start)
        unique, n = name, 0
        while unique in self.dims and (self.dims[unique].start, self.dims[unique].size, self.dims[unique].limit) != (start, size, limit):
            n += 1
            unique = f"{name}{n}"
        return self.dims.setdefault(unique, Dim(unique, start, size, limit))

    def axis(self, name: str, extent: int) -> Dim:
        """A whole axis as one tile."""
        return self.dim(name, 0, extent, extent)

    def emit(self, name: str, operands: Sequence[Value], type: TileType | None, attrs: Mapping[str, Any], hint: str = "") -> Value:
        results = (Value(type, hint),) if type else ()
        self._ops[-1].append(Op(name, tuple(operands), results, attrs))
        return results[0] if results else operands[0]

    def pure(self, name: str, operands: Sequence[Value], type: TileType, attrs: Mapping[str, Any]) -> Value:
        """Emit an op without effect, or return the value of the same op emitted before in this or an outer region."""
        key = (name, tuple(operands), type, repr(sorted(attrs.items(), key=lambda item: item[0])))
        for known in self._known:
            if key in known:
                return known[key]
        self._known[-1][key] = self.emit(name, operands, type, attrs)
        return self._known[-1][key]

    def load(self, buffer: Value, base: Index | int, strides: tuple[int, int], rows: Dim | None, cols: Dim | None) -> Value:
        attrs = {"base": Index.of(base), "strides": (strides[0] if rows else 0, strides[1] if cols else 0)}
        return self.pure("load", [buffer], TileType(buffer.type.dtype, rows, cols), attrs)

    def gather(self, buffer: Value, indices: Value, base: Index | int, strides: tuple[int, int], cols: Dim | None) -> Value:
        """Rows of a buffer picked by an i32 tile `<rows, _>`: element (r, c) at base + indices[r]*strides[0] + c*strides[1]."""
        attrs = {"base": Index.of(base), "strides": strides}
        return self.pure("gather", [buffer, indices], TileType(buffer.type.dtype, indices.type.rows, cols), attrs)

    def store(self, buffer: Value, value: Value, base: Index | int, strides: tuple[int, int]) -> None:
        rows, cols = value.type.dims
        attrs = {"base": Index.of(base), "strides": (strides[0] if rows else 0, strides[1] if cols else 0)}
        self.emit("store", [buffer, value], None, attrs)

    def fill(self, value: float | int, rows: Dim | None = None, cols: Dim | None = None, dtype: str = "f32") -> Value:
        number = float(value) if dtype in FLOATS else int(value)
        return self.pure("fill", [], TileType(dtype, rows, cols), {"value": number})

    def iota(self, dim: Dim, axis: int) -> Value:
        """The index along an axis, from its start on, as i32."""
        return self.pure("iota", [], TileType("i32", *((dim, None) if axis == 0 else (None, dim))), {})

    def position(self, at: Index | int) -> Value:
        """An index expression as an i32 number."""
        at = Index.of(at)
        return self.fill(at.constant, dtype="i32") if at.is_constant else self.pure("position", [], TileType("i32", None, None), {"at": at})

    def pointwise(self, name: str, *operands: Value, **attrs: Any) -> Value:
        """A registered pointwise op; missing axes broadcast."""
        definition = OPS[name]
        if not isinstance(definition, Pointwise):
            raise CompilerBug(f"{name} is not pointwise")
        dims: list[Dim | None] = []
        for axis in (0, 1):
            present = [v.type.dims[axis] for v in operands if v.type.dims[axis]]
            if any(d != present[0] for d in present):
                raise CompilerBug(f"{name}: axes {[str(d) for d in present]} do not match in kernel {self.name}")
            dims.append(present[0] if present else None)
        dtype = definition.trace([v.type.dtype for v in operands], attrs).dtype
        return self.pure(name, operands, TileType(dtype, dims[0], dims[1]), attrs)

    def add(self, a: Value, b: Value | float) -> Value:
        return self.pointwise("add", a, self._tile(b))

    def sub(self, a: Value, b: Value | float) -> Value:
        return self.pointwise("sub", a, self._tile(b))

    def mul(self, a: Value, b: Value | float) -> Value:
        return self.pointwise("mul", a, self._tile(b))

    def div(self, a: Value, b: Value | float) -> Value:
        return self.pointwise("div", a, self._tile(b))

    def _tile(self, x: Value | float) -> Value:
        return x if isinstance(x, Value) else self.fill(x)

    def reduce(self, kind: str, x: Value, axis: int) -> Value:
        """Sum or maximum along an axis; the result has extent one there. An axis of extent one is left alone."""
        if x.type.dims[axis] is None:
            return x
        dims = (None, x.type.cols) if axis == 0 else (x.type.rows, None)
        return self.pure("reduce", [x], TileType(x.type.dtype, *dims), {"kind": kind, "axis": axis})

    def dot(self, acc: Value, a: Value, b: Value) -> Value:
        """acc + a @ b, contracting the columns of a with the rows of b."""
        if a.type.cols != b.type.rows or a.type.cols is None:
            raise CompilerBug(f"dot: inner axes {a.type.cols} and {b.type.rows} differ in kernel {self.name}")
        return self.emit("dot", [acc, a, b], TileType("f32", a.type.rows, b.type.cols), {})

    def loop(self, low: Index | int, high: Index | int, carried: Sequence[Value], body: Callable[..., Sequence[Value]]) -> list[Value]:
        """for n in low..high with carried tiles; `body(n, *tiles)` returns their next values. One trip is inlined."""
        low, high = Index.of(low), Index.of(high)
        if high == low + 1:
            return list(body(low, *carried))
        if low.is_constant and high.is_constant and low.constant >= high.constant:
            return list(carried)
        self.loops += 1
        name = f"n{self.loops}"
        args = [Value(v.type, "") for v in carried]
        self._ops.append([])
        self._known.append({})
        yields = list(body(Index.variable(name), *args))
        self._known.pop()
        region = Region(tuple(args), tuple(self._ops.pop()), tuple(yields))
        results = tuple(Value(v.type) for v in yields)
        attrs = {"var": name, "lo": low, "hi": high}
        self._ops[-1].append(Op("for", tuple(carried), results, attrs, (region,)))
        return list(results)

    def bind(self, number: Value, low: int, high: int) -> Index:
        """A number that is known at run time only, an i32 tile `<_, _>`, as an index variable: for the bounds of a loop, a
        base, the start of an axis. One outside of low..high (inclusive) is moved there, so that what is proved holds."""
        self.numbers += 1
        name = f"s{self.numbers}"
        self.emit("bind", [number], None, {"var": name, "lo": low, "hi": high})
        return Index.variable(name)

    def finish(self) -> Kernel:
        used = {d for op in Region(ops=tuple(self._ops[0])).walk() for d in op_dims(op)}
        return Kernel(
            self.name, Region(tuple(self.buffers), tuple(self._ops[0])), tuple(self.access), dict(self.extents),
            tuple(d for d in self.dims.values() if d in used), self.order, self.cost, "tile", self.of,
        )  # fmt: skip


def op_dims(op: Op) -> list[Dim]:
    """The axes an op's operands and results speak of."""
    values = [*op.operands, *op.results, *(a for r in op.regions for a in r.args)]
    return [d for v in values if isinstance(v.type, TileType) for d in v.type.dims if d]


class Reader:
    """Reads a graph value, by logical index, as a tile: `read(b, i, c, rows=i, cols=c)`.

    An index is a Dim (at most one for the rows and one for the columns of the tile) or an expression."""

    def __init__(
        self,
        type: TensorType,
        read: Callable[[tuple[Position, ...], Dim | None, Dim | None], Value],
        gather: Callable[[Value, Dim], Value] | None = None,
    ) -> None:
        self.type, self._read, self._gather = type, read, gather

    def __call__(self, *index: Position, rows: Dim | None = None, cols: Dim | None = None) -> Value:
        if len(index) != self.type.rank:
            raise CompilerBug(f"{len(index)} indices for {self.type}")
        return self._read(index, rows, cols)

    def gather(self, indices: Value, cols: Dim) -> Value:
        """Rows of a stored matrix picked by an i32 tile `<rows, _>`."""
        if self._gather is None:
            raise CompilerBug(f"rows of {self.type} are picked, but it is not stored")
        return self._gather(indices, cols)


class Writer:
    """Writes a graph value, by logical index, from a tile."""

    def __init__(self, type: TensorType, write: Callable[[Value, tuple[Position, ...], Dim | None, Dim | None], None]) -> None:
        self.type, self._write = type, write

    def __call__(self, value: Value, *index: Position, rows: Dim | None = None, cols: Dim | None = None) -> None:
        if len(index) != self.type.rank:
            raise CompilerBug(f"{len(index)} indices for {self.type}")
        self._write(value, index, rows, cols)


Readers = Sequence[Reader]
Writers = Sequence[Writer]


def stored_reader(k: TileBuilder, buffer: Value, type: TensorType, storage: Strided) -> Reader:
    """Reads from a buffer in which the value lies as `storage` says."""

    def read(index: tuple[Position, ...], rows: Dim | None, cols: Dim | None) -> Value:
        base, strides, rows, cols = address(storage, index, rows, cols)
        return k.load(buffer, base, strides, rows, cols)

    def gather(indices: Value, cols: Dim) -> Value:
        return k.gather(buffer, indices, storage.offset, (storage.strides[0], storage.strides[1]), cols)

    return Reader(type, read, gather)


def stored_writer(k: TileBuilder, buffer: Value, type: TensorType, storage: Strided) -> Writer:
    """Writes to a buffer in which the value lies as `storage` says."""

    def write(value: Value, index: tuple[Position, ...], rows: Dim | None, cols: Dim | None) -> None:
        base, strides, rows, cols = address(storage, index, rows, cols)
        if value.type.dims != (rows, cols):
            value = k.pointwise("add", value, k.fill(0, rows, cols, value.type.dtype))
        k.store(buffer, value, base, strides)

    return Writer(type, write)


def address(
    storage: Strided, index: tuple[Position, ...], rows: Dim | None, cols: Dim | None
) -> tuple[Index, tuple[int, int], Dim | None, Dim | None]:
    """Base and strides of the tile at an index. A row or column axis that no index names is dropped (broadcast)."""
    base, strides = Index.of(storage.offset), [0, 0]
    for position, stride, extent in zip(index, storage.strides, storage.shape, strict=True):
        if not isinstance(position, Dim):
            base = base + Index.of(position) * (stride if extent > 1 else 0)
        elif position not in (rows, cols):
            raise CompilerBug(f"axis {position} is neither the rows nor the columns of the tile")
        elif extent > 1:
            strides[0 if position == rows else 1] += stride
    named = [p for p, n, s in zip(index, storage.shape, storage.strides, strict=True) if isinstance(p, Dim) and (n > 1 and s != 0 or p.limit == 1)]
    return base, (strides[0], strides[1]), rows if rows in named else None, cols if cols in named else None


def transposed(kernel: Kernel) -> Kernel:
    """The same program on transposed tiles: dot(acc, a, b) becomes dot(acc', b', a'), row reductions column reductions.

    On a CPU this puts the lanes along the other axis; attention wants them along the queries."""
    mapping: dict[Value, Value] = {}

    def turned(value: Value) -> Value:
        if not isinstance(value.type, TileType):
            return value
        if value not in mapping:
            t = value.type
            mapping[value] = Value(TileType(t.dtype, t.cols, t.rows), value.hint)
        return mapping[value]

    def region(r: Region) -> Region:
        return Region(tuple(map(turned, r.args)), tuple(map(op, r.ops)), tuple(map(turned, r.yields)))

    def op(o: Op) -> Op:
        operands, attrs = [turned(v) for v in o.operands], dict(o.attrs)
        if "strides" in attrs:
            attrs["strides"] = attrs["strides"][::-1]
        if o.name == "gather":
            raise CompilerBug("a gather picks rows and cannot be transposed")
        if o.name == "dot":
            operands[1], operands[2] = operands[2], operands[1]
        if o.name == "reduce":
            attrs["axis"] = 1 - attrs["axis"]
        return replace(o, operands=tuple(operands), results=tuple(map(turned, o.results)), attrs=attrs, regions=tuple(map(region, o.regions)))

    return replace(kernel, body=region(kernel.body))
