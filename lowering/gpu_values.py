"""Values of the gpu strategy: which elements of a tile a thread holds, and how an element is computed anywhere.

The threads of a workgroup form a grid, THREADS_Y x THREADS_X, or several such groups. A tile's rows are dealt to the threads along y and its
columns, in groups of up to four consecutive ones, to those along x; a thread's elements are its register block. All
tiles of a kernel share these two maps, so pointwise ops never leave a thread, a column vector <i, _> is the same along
x and a row vector <_, j> the same along y.

A value is *free* if it is made of loads, indices and constants alone: any thread can compute any element of it. All
others are *placed*: each element is known to the threads that own it. Tiles have no masks: addresses are clamped to
the axis where they could leave it, and what lies beyond its end is replaced only where it would be added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Op, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.loop import LoopBuilder
from tinygpt.ir.ops import OPS, Pointwise
from tinygpt.ir.polynomials import definitions
from tinygpt.ir.scalar import expand
from tinygpt.ir.tile import STRUCTURAL
from tinygpt.ir.types import Dim, PointerType, ScalarType, TileType

DEFAULT_THREADS = (8, 8)
WIDTH = 4  # lanes of a vector: WGSL has vec4
FREE = ("load", "gather", "fill", "iota", "position")
LONGEST_ROW = 8  # vectors of columns a thread holds in registers; of longer rows, values are computed again in each pass

Key = tuple[int | None, int | Index | None]  # which row and vector of columns of its register block


@dataclass(frozen=True)
class Layout:
    """How tiles are dealt to the threads of a workgroup. With several `groups` of threads each has all of every tile: they
    share the contraction of a product."""

    threads_y: int
    threads_x: int
    groups: int = 1

    @property
    def in_group(self) -> int:
        return self.threads_y * self.threads_x

    @property
    def threads(self) -> int:
        return self.in_group * self.groups

    @property
    def group(self) -> Index:
        return Index.variable("thread") // self.in_group

    @property
    def y(self) -> Index:
        line = Index.variable("thread") // self.threads_x
        return line if self.groups == 1 else line % self.threads_y

    @property
    def x(self) -> Index:
        return Index.variable("thread") % self.threads_x

    def width(self, dim: Dim | None) -> int:
        """How many consecutive elements along an axis one vector holds: no vector lies across the end of the axis."""
        if dim is None or dim.limit % WIDTH or dim.size % WIDTH or not dim.start.divisible_by(WIDTH):
            return 1
        return WIDTH

    def rows(self, dim: Dim) -> int:
        """Rows a thread holds."""
        return ceil_div(dim.size, self.threads_y)

    def vectors(self, dim: Dim) -> int:
        """Vectors of columns a thread holds."""
        return ceil_div(dim.size, self.threads_x * self.width(dim))

    def grouped(self, dim: Dim) -> bool:
        """Whether a thread's rows are runs of four, which lie in one vector of an operand in workgroup memory."""
        return self.rows(dim) % WIDTH == 0

    def row(self, dim: Dim, r: int) -> Index:
        """Where in the tile row r of the register block is."""
        if self.grouped(dim):
            return self.y * WIDTH + (r // WIDTH * WIDTH * self.threads_y + r % WIDTH)
        return self.y + r * self.threads_y

    def col(self, dim: Dim, v: int | Index) -> Index:
        """Where in the tile the first column of vector v of the register block is."""
        width = self.width(dim)
        return self.x * width + v * (width * self.threads_x)

    def padded_rows(self, dim: Dim) -> int:
        return self.rows(dim) * self.threads_y

    def padded_cols(self, dim: Dim) -> int:
        return self.vectors(dim) * self.threads_x * self.width(dim)


@dataclass(eq=False)
class Point:
    """Some elements of a tile: `width` consecutive ones along an axis, from (row, col) on, counted from its start."""

    row: Index
    col: Index
    axis: int = 1
    width: int = 1
    memo: dict[Value, Value] = field(default_factory=dict)


class ValueLowering:
    """Computes elements, and knows which of them a thread has in registers."""

    def __init__(self, kernel: Kernel, caps: Caps) -> None:
        self.kernel, self.caps = kernel, caps
        threads_y, threads_x = kernel.order.get("threads", DEFAULT_THREADS)
        self.layout = Layout(threads_y, threads_x, kernel.order.get("groups", 1))
        self.b = LoopBuilder()
        self.indices: dict[str, Index] = {}  # what tile-level loop variables are called here
        self.ranges = {"thread": (0, self.layout.threads - 1), **{name: (0, n - 1) for name, n in kernel.grid.items()}}
        self.makers = {r: op for op in kernel.body.walk() for r in op.results}
        self.buffers = {v: Value(PointerType(v.type.dtype, "buffer"), v.hint) for v in kernel.params}
        self.placed: dict[Value, bool] = {}
        self.resident: dict[Value, bool] = {}
        self.registers: dict[Value, dict[Key, Value]] = {}
        self.scopes: list[dict[tuple[Value, int | None, int | Index | None], Value]] = [{}]

    def at(self, index: Index | int) -> Index:
        """A tile-level index expression in terms of the loop level's variables."""
        return Index.of(index).substitute(self.indices)

    def is_placed(self, value: Value) -> bool:
        """Whether the value's elements are known only to the threads that own them."""
        if value not in self.placed:
            op = self.makers.get(value)
            if op is None or op.name in ("dot", "reduce", "for"):
                self.placed[value] = True
            elif op.name in FREE:
                self.placed[value] = False
            else:
                self.placed[value] = any(self.is_placed(v) for v in op.operands)
        return self.placed[value]

    def is_long(self, value: Value) -> bool:
        """Whether a thread's part of a row is too long for registers, so that each pass computes it again."""
        cols = value.type.cols
        return cols is not None and self.layout.vectors(cols) > LONGEST_ROW and not self.is_made_of_registers(value)

    def is_made_of_registers(self, value: Value) -> bool:
        """Whether a value's columns come from what a thread has in registers however long it is: the result of a product,
        of a loop, of a reduction of rows."""
        if value not in self.resident:
            op = self.makers.get(value)
            if op is None or op.name in ("dot", "reduce", "for"):
                self.resident[value] = True
            else:
                self.resident[value] = any(v.type.cols is not None and self.is_made_of_registers(v) for v in op.operands if v not in self.buffers)
        return self.resident[value]

    def keys(self, type: TileType) -> list[Key]:
        """The elements of a tile that a thread holds."""
        rows: Sequence[int | None] = range(self.layout.rows(type.rows)) if type.rows else [None]
        vectors: Sequence[int | None] = range(self.layout.vectors(type.cols)) if type.cols else [None]
        return [(r, v) for r in rows for v in vectors]

    # -- elements a thread owns
    def element(self, value: Value, key: Key) -> Value:
        """The thread's elements of a value at a row and a vector of columns of its register block."""
        rows, cols = value.type.dims
        r, v = (key[0] if rows else None), (key[1] if cols else None)
        if value in self.registers:
            return self.registers[value][r, v]
        for scope in self.scopes:
            if (value, r, v) in scope:
                return scope[value, r, v]
        if value not in self.makers or self.makers[value].name in ("dot", "reduce", "for"):
            raise CompilerBug(f"{self.kernel.name}: a value is read before it is computed")
        point = Point(
            self.layout.row(rows, r) if r is not None else Index.of(0),
            self.layout.col(cols, v) if v is not None else Index.of(0),
            width=self.layout.width(cols),
        )
        x = self.computed(value, point, lambda operand: self.element(operand, key))
        self.scopes[-1][value, r, v] = x
        return x

    def vector(self, value: Value, key: Key) -> Value:
        """As `element`, with a number in every lane where the value has columns."""
        return self.b.splat(self.element(value, key), self.layout.width(value.type.cols))

    # -- elements anywhere, of free values
    def free(self, value: Value, point: Point) -> Value:
        """Elements of a free value at any point."""
        if value not in point.memo:
            point.memo[value] = self.computed(value, point, lambda operand: self.free(operand, point))
        return point.memo[value]

    def free_vector(self, value: Value, row: Index, col: Index, axis: int, width: int) -> Value:
        """`width` elements of a free value along an axis; one by one where no vector of them can be read."""
        dim = value.type.dims[axis]
        if width == 1 or (self.layout.width(dim) == width and not (axis == 0 and self.picks_rows(value))):
            return self.b.splat(self.free(value, Point(row, col, axis, width)), width)
        steps = [(n, 0) if axis == 0 else (0, n) for n in range(width)]
        return self.b.join([self.free(value, Point(row + dr, col + dc)) for dr, dc in steps])

    def picks_rows(self, value: Value) -> bool:
        """Whether a free value reads rows by number."""
        op = self.makers[value]
        if op.name == "gather":
            return True
        return op.name not in STRUCTURAL and any(self.picks_rows(v) for v in op.operands)

    def contiguous_axis(self, value: Value) -> int:
        """The axis along which most of a free value's elements lie one after another."""
        votes = [0, 0]

        def visit(v: Value) -> None:
            op = self.makers[v]
            if op.name in ("load", "gather"):
                for axis in (0, 1):
                    votes[axis] += v.type.dims[axis] is not None and op.attrs["strides"][axis] == 1
            elif op.name not in STRUCTURAL:
                for operand in op.operands:
                    visit(operand)

        visit(value)
        return 0 if votes[0] > votes[1] else 1

    # -- one op
    def computed(self, value: Value, point: Point, get: Callable[[Value], Value]) -> Value:
        """The elements at a point, from those of the operands."""
        op = self.makers[value]
        match op.name:
            case "fill":
                return self.b.const(op.attrs["value"], ScalarType(value.type.dtype))
            case "position":
                return self.b.index(self.at(op.attrs["at"]))
            case "iota":
                return self.iota(value.type, point)
            case "load":
                return self.load(op, point)
            case "gather":
                row = self.b.extract(get(op.operands[1]), 0)
                return self.load(op, point, row)
        definition = OPS[op.name]
        assert isinstance(definition, Pointwise)
        expression = expand(definition.trace([v.type.dtype for v in op.operands], dict(op.attrs)), definitions(self.caps.native))
        return self.b.formula(expression, [get(v) for v in op.operands])

    def iota(self, type: TileType, point: Point) -> Value:
        axis = 0 if type.rows is not None else 1
        dim = type.dims[axis]
        assert dim is not None
        first = self.b.index(self.at(dim.start) + (point.row if axis == 0 else point.col))
        if axis != point.axis or point.width == 1:
            return first
        return self.b.primitive("add", [first, self.b.lanes(point.width)])

    def load(self, op: Op, point: Point, picked: Value | None = None) -> Value:
        """The elements of a load, or of a gather whose row is `picked`."""
        pointer, address = self.buffers[op.operands[0]], self.at(op.attrs["base"])
        lanes, step = 1, 0
        for axis, (dim, stride, local) in enumerate(zip(op.result.type.dims, op.attrs["strides"], (point.row, point.col), strict=True)):
            if dim is None:
                continue
            if axis == 0 and picked is not None:
                pointer = self.b.advance(pointer, 0, picked, stride, hint="row")
                continue
            width = point.width if axis == point.axis else 1
            if width > 1:
                lanes, step = width, stride
            address = address + self.inside(dim, local, width) * stride
        if lanes == 1 or step == 0:
            return self.b.load(pointer, address, hint=op.operands[0].hint)
        if step == 1:
            return self.b.load(pointer, address, lanes, hint=op.operands[0].hint)
        return self.b.join([self.b.load(pointer, address + n * step, hint=op.operands[0].hint) for n in range(lanes)])

    # -- where axes end
    def largest(self, index: Index) -> int:
        return index.bounds(self.ranges)[1]

    def inside(self, dim: Dim, local: Index, width: int = 1) -> Index:
        """The position along an axis, moved back inside it where it could lie beyond its end."""
        at = self.at(dim.start) + local
        return at if self.largest(at) + width <= dim.limit else Index.minimum(at, dim.limit - width)

    def may_be_outside(self, dim: Dim, local: Index, width: int = 1) -> bool:
        """Whether elements from `local` on may lie beyond the tile or the axis. No vector lies across either end."""
        return self.largest(local) + width > dim.size or self.largest(self.at(dim.start) + local) + width > dim.limit

    def live(self, dim: Dim) -> Index:
        """How many elements of the tile lie inside the axis."""
        return self.at(dim.live)

    def or_else(self, x: Value, dim: Dim, local: Index, width: int, other: float) -> Value:
        """x, or a number where `local` is beyond the end of the tile or of its axis."""
        if not self.may_be_outside(dim, local, width):
            return x
        inside = self.b.primitive("lt", [self.b.index(local), self.b.index(self.live(dim))])
        return self.b.primitive("select", [inside, x, self.b.const(other, ScalarType(x.type.dtype))])
