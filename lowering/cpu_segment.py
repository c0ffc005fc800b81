"""Segments of the cpu strategy: pointwise chains, reductions and stores between two dots, fused into loops.

A segment without reductions, or with row reductions, runs row by row with its lanes along the columns; one with column
reductions runs over vectors of columns with the rows inside, so that nothing is ever added across lanes. The *level* of
a value is the number of reductions behind it; each level is one pass over the inner axis. A reduction keeps `lanes`
partial results whatever the width of the device's vectors, and adds what is left over one by one: its bits depend on
the schedule alone."""

from __future__ import annotations

from collections.abc import Collection, Callable, Sequence
from dataclasses import dataclass, field

from tinygpt.ir.core import Op, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index
from tinygpt.ir.ops import OPS, Pointwise
from tinygpt.ir.polynomials import definitions
from tinygpt.ir.scalar import TRANSCENDENTAL, expand
from tinygpt.ir.tile import IDENTITY, STRUCTURAL
from tinygpt.ir.types import Dim, ScalarType, VectorType
from tinygpt.lowering.cpu_values import CpuValues, Stored

COMBINE = {"sum": "add", "max": "max"}
UNROLLED = 2  # trips of a loop over columns that are written out
COLUMN_VECTORS = 4  # vectors of columns worked on at once under a column reduction, to hide the latency of its adds


@dataclass(frozen=True)
class Window:
    """Part of a tile: rows and columns, relative to its first element."""

    rows: tuple[Index, Index]
    cols: tuple[Index, Index]


@dataclass(eq=False)
class Item:
    """Something a segment must leave behind: a store, a reduction, or a value kept in scratch."""

    kind: str  # store, reduce or keep
    value: Value
    op: Op | None = None
    home: Stored | None = None


@dataclass(eq=False)
class Point:
    """A place in the loops of a segment. `outer` remembers what does not vary along the inner axis, `inner` what does."""

    inner_axis: int
    row: Index
    col: Index
    width: int
    level: int
    outer: dict[object, Value] = field(default_factory=dict)
    inner: dict[object, Value] = field(default_factory=dict)


class SegmentLowering(CpuValues):
    """Lowers segments."""

    inside: Collection[Op]  # the ops of the segment being lowered
    levels: dict[Value, int]
    crossing: dict[Value, Stored]  # what is computed at one level and read at a later one

    def segment(self, ops: Sequence[Op], window: Window | None = None) -> None:
        """Lower a run of pointwise ops, reductions and stores."""
        if not ops:
            return
        inside = dict.fromkeys(ops)  # in program order: a set's would differ from run to run
        items: list[Item] = []
        turned: list[tuple[Op, Stored]] = []
        for op in ops:
            if op.name == "store":
                value = op.operands[1]
                if value.type.cols is not None and op.attrs["strides"][1] != 1:
                    home = self.new_storage(value.type, "turned")
                    turned.append((op, home))
                    items.append(Item("keep", value, None, home))
                else:
                    items.append(Item("store", value, op))
                continue
            if op.name == "reduce":
                items.append(Item("reduce", op.results[0], op))
            for r in op.results:
                if not self.is_lazy(r) and any(u not in inside for u in self.readers.get(r, [])):
                    items.append(Item("keep", r, None, self.wanted.get(r) or self.new_storage(r.type)))
        self.run_items(items, inside, window)
        for item in items:
            if item.kind == "keep" and item.home is not None:
                self.stored.setdefault(item.value, item.home) if any(item.home is h for _, h in turned) else self.stored.update({item.value: item.home})
        for op, home in turned:
            self.turned_store(op, home)

    def copies(self, pairs: Sequence[tuple[Value, Stored]]) -> None:
        """Write values to homes in scratch."""
        self.run_items([Item("keep", value, None, home) for value, home in pairs], (), None)

    def number(self, value: Value) -> Value:
        """A tile without axes, as a number, between two segments."""
        self.inside, self.levels, self.crossing = (), {}, {}
        return self.value(value, Point(1, Index.of(0), Index.of(0), 1, 0))

    def run_items(self, items: list[Item], inside: Collection[Op], window: Window | None) -> None:
        if not items:
            return
        self.inside = inside
        self.levels = {}
        axes = {op.attrs["axis"] for op in inside if op.name == "reduce"}
        if len(axes) > 1:
            raise CompilerBug(f"{self.kernel.name}: a segment reduces along both axes")
        inner_axis = 0 if axes == {0} else 1
        self.crossing = {v: self.new_storage(v.type, "row") for v in self.values_crossing_levels(items)}
        items = items + [Item("keep", v, None, home) for v, home in self.crossing.items()]
        turned = [value for value in self.leaves(items) if self.is_turned(value)]
        for value in turned:
            self.materialize_turned(value)
        groups: dict[Dim | None, list[Item]] = {}
        for item in items:
            groups.setdefault(self.domain(item)[1 - inner_axis], []).append(item)
        for dim, group in groups.items():
            (self.over_rows if inner_axis == 1 else self.over_columns)(dim, group, window)
        for value in turned:  # the copy was made where this segment runs, and is not there for another
            del self.stored[value]

    # -- facts about a segment
    def domain(self, item: Item) -> tuple[Dim | None, Dim | None]:
        """The axes an item runs over."""
        source = item.op.operands[0] if item.kind == "reduce" and item.op else item.value
        dims: tuple[Dim | None, Dim | None] = source.type.dims
        return dims

    def level_of(self, value: Value) -> int:
        if value not in self.levels:
            op = self.makers.get(value)
            if op is None or op not in self.inside:
                self.levels[value] = 0
            else:
                below = max((self.level_of(v) for v in op.operands if v not in self.buffers), default=0)
                self.levels[value] = below + (op.name == "reduce")
        return self.levels[value]

    def item_level(self, item: Item) -> int:
        return self.level_of(item.value) - (item.kind == "reduce")

    def is_expression(self, value: Value) -> bool:
        """Whether a value is computed where it is read (and not read from memory)."""
        op = self.makers.get(value)
        return op is not None and value not in self.stored and (op in self.inside or self.is_lazy(value))

    def values_crossing_levels(self, items: list[Item]) -> list[Value]:
        """Values with a transcendental in them that are needed again behind a reduction: computed once, kept."""
        found = []
        for op in self.inside:
            if op.name in STRUCTURAL or None in op.results[0].type.dims or not self.is_costly(op.results[0]):
                continue  # what lies along one axis only belongs to no pass of the loops over the other
            value = op.results[0]
            later = [u for u in self.readers.get(value, []) if u in self.inside and self.use_level(u) > self.level_of(value)]
            if later and not any(i.kind == "keep" and i.value is value for i in items):
                found.append(value)
        return found

    def use_level(self, user: Op) -> int:
        if user.name == "store":
            return self.level_of(user.operands[1])
        return self.level_of(user.results[0]) - (user.name == "reduce")

    def is_costly(self, value: Value) -> bool:
        """Whether the op itself evaluates a transcendental."""
        op = self.makers[value]
        definition = OPS[op.name]
        assert isinstance(definition, Pointwise)
        expression = definition.trace([v.type.dtype for v in op.operands], dict(op.attrs))
        return any(x.op in TRANSCENDENTAL for x in expression.walk())

    def leaves(self, items: list[Item]) -> list[Value]:
        """Loads that the items read element by element."""
        found: dict[Value, None] = {}
        seen: set[Value] = set()

        def visit(value: Value) -> None:
            if value in seen or not self.is_expression(value):
                return
            seen.add(value)
            op = self.makers[value]
            if op.name == "load":
                found[value] = None
            for v in op.operands:
                if v not in self.buffers:
                    visit(v)

        for item in items:
            visit(item.op.operands[0] if item.kind == "reduce" and item.op else item.value)
        return list(found)

    # -- loops
    def over_rows(self, rows: Dim | None, items: list[Item], window: Window | None) -> None:
        """Rows outside, vectors of columns inside."""
        low, high = window.rows if window and rows is not None else (Index.of(0), self.live(rows))
        pointers: dict[object, Value] = {}
        for item in items:
            self.prepare_pointers(item, pointers)

        def row(r: Index) -> None:
            outer: dict[object, Value] = dict(pointers)
            point = Point(1, r, Index.of(0), 1, 0, outer)
            self.preload(items, point, axis=1)
            last = max(self.item_level(i) for i in items)
            for level in range(last + 1):
                groups: dict[Dim, list[Item]] = {}
                for item in items:
                    cols = self.domain(item)[1]
                    if cols is not None and self.item_level(item) == level:
                        groups.setdefault(cols, []).append(item)
                for cols, group in groups.items():
                    self.column_loop(cols, group, point, level, window)
            point.level = last + 1
            for item in items:
                if self.domain(item)[1] is None:
                    self.leave(item, point)

        self.b.loop(low, high, 1, lambda r: row(r), stem="r")

    def column_loop(self, cols: Dim, items: list[Item], at: Point, level: int, window: Window | None) -> None:
        """One pass over the columns of a row: whole vectors, then what is left one by one."""
        low, high = window.cols if window else (Index.of(0), self.live(cols))
        at.level = level
        for item in items:
            self.prepare_item(item, at)
        reductions = [i for i in items if i.kind == "reduce"]
        step = self.logical_lanes if reductions else self.lanes
        count = step // self.lanes
        middle = low + (high - low) // step * step
        kinds = [i.op.attrs["kind"] for i in reductions if i.op]

        def pass_over(width: int, vectors: int) -> Callable[..., list[Value]]:
            def body(c: Index, *partial: Value) -> list[Value]:
                totals = list(partial)
                for n in range(vectors):
                    point = Point(1, at.row, c + n * width, width, level, at.outer)
                    for k, item in enumerate(reductions):
                        assert item.op is not None
                        x = self.b.splat(self.value(item.op.operands[0], point), width)
                        totals[k * vectors + n] = self.b.primitive(COMBINE[kinds[k]], [totals[k * vectors + n], x])
                    for item in items:
                        if item.kind != "reduce":
                            self.leave(item, point)
                return totals

            return body

        vector = VectorType("f32", self.lanes) if self.lanes > 1 else ScalarType("f32")
        starts = [self.b.const(IDENTITY[kind], vector) for kind in kinds for _ in range(count)]
        partial = self.unrolled(low, middle, step, pass_over(self.lanes, count), starts)
        rest = high - middle
        has_rest = not (rest.is_constant and rest.constant == 0)
        tails = [self.b.const(IDENTITY[kind], ScalarType("f32")) for kind in kinds]
        if has_rest:
            tails = self.b.loop(middle, high, 1, pass_over(1, 1), tails, stem="c")
        for k, item in enumerate(reductions):
            total = self.folded(partial[k * count : (k + 1) * count], kinds[k])
            if has_rest:
                total = self.b.primitive(COMBINE[kinds[k]], [total, tails[k]])
            at.outer[item.value] = total

    def unrolled(self, low: Index, high: Index, step: int, body: Callable[..., list[Value]], carried: list[Value]) -> list[Value]:
        """A loop over columns; a few trips are written out, so that what they share leaves the loop over rows."""
        trips = (high - low).constant // step if (high - low).is_constant else UNROLLED + 1
        if trips > UNROLLED:
            return self.b.loop(low, high, step, body, carried, stem="c")
        for n in range(trips):
            carried = body(low + n * step, *carried)
        return carried

    def folded(self, vectors: list[Value], kind: str) -> Value:
        """All lanes of the partial results as one number: lane i with lane i + half, until one is left."""
        while len(vectors) > 1:
            half = len(vectors) // 2
            vectors = [self.b.primitive(COMBINE[kind], [a, b]) for a, b in zip(vectors[:half], vectors[half:], strict=True)]
        (v,) = vectors
        return self.b.pure("fold", [v], ScalarType(v.type.dtype), kind=kind) if isinstance(v.type, VectorType) else v

    def over_columns(self, cols: Dim | None, items: list[Item], window: Window | None) -> None:
        """Vectors of columns outside, rows inside: reductions are vertical."""
        high = self.live(cols)
        pointers: dict[object, Value] = {}
        for item in items:
            self.prepare_pointers(item, pointers)

        def columns(c: Index, width: int, vectors: int) -> None:
            points = [Point(0, Index.of(0), c + n * width, width, 0, dict(pointers)) for n in range(vectors)]
            for point in points:
                self.preload(items, point, axis=0)
            last = max(self.item_level(i) for i in items)
            for level in range(last + 1):
                groups: dict[Dim, list[Item]] = {}
                for item in items:
                    rows = self.domain(item)[0]
                    if rows is not None and self.item_level(item) == level:
                        groups.setdefault(rows, []).append(item)
                for rows, group in groups.items():
                    self.row_loop(rows, group, points, level)
            for point in points:
                point.level = last + 1
                for item in items:
                    if self.domain(item)[0] is None:
                        self.leave(item, point)

        if cols is None:
            columns(Index.of(0), 1, 1)
            return
        wide = self.lanes * COLUMN_VECTORS
        at = Index.of(0)
        for step, vectors in ((wide, COLUMN_VECTORS), (self.lanes, 1)):
            upto = high // step * step
            self.b.loop(at, upto, step, lambda c, n=vectors: columns(c, self.lanes, n), stem="c")
            at = upto
        if self.lanes > 1:
            self.b.loop(at, high, 1, lambda c: columns(c, 1, 1), stem="c")

    def row_loop(self, rows: Dim, items: list[Item], points: list[Point], level: int) -> None:
        """One pass over the rows for some vectors of columns."""
        for point in points:
            point.level = level
            for item in items:
                self.prepare_item(item, point)
        reductions = [i for i in items if i.kind == "reduce"]
        kinds = [i.op.attrs["kind"] for i in reductions if i.op]
        width = points[0].width
        type = VectorType("f32", width) if width > 1 else ScalarType("f32")
        starts = [self.b.const(IDENTITY[kind], type) for kind in kinds for _ in points]

        def body(r: Index, *partial: Value) -> list[Value]:
            totals = list(partial)
            for n, column in enumerate(points):
                point = Point(0, r, column.col, width, level, column.outer)
                for k, item in enumerate(reductions):
                    assert item.op is not None
                    x = self.b.splat(self.value(item.op.operands[0], point), width)
                    slot = k * len(points) + n
                    totals[slot] = self.b.primitive(COMBINE[kinds[k]], [totals[slot], x])
                for item in items:
                    if item.kind != "reduce":
                        self.leave(item, point)
            return totals

        totals = self.b.loop(0, self.live(rows), 1, body, starts, stem="r")
        for k, item in enumerate(reductions):
            for n, point in enumerate(points):
                point.outer[item.value] = totals[k * len(points) + n]

    # -- values
    def preload(self, items: list[Item], point: Point, axis: int) -> None:
        """Read what does not vary along the inner axis from memory before anything is written over it."""
        for op in self.inside:
            for v in op.operands:
                if v in self.stored and v.type.dims[axis] is None and v.type.dims[1 - axis] is not None:
                    if any(self.domain(i)[1 - axis] == v.type.dims[1 - axis] for i in items):
                        self.value(v, point)

    def prepare_item(self, item: Item, point: Point) -> None:
        """Evaluate what an item needs from outside the inner loop: parts of its expression, and where it is written."""
        self.prepare(item.op.operands[0] if item.kind == "reduce" and item.op else item.value, point)
        if item.kind == "store" and item.op is not None:
            self.element_pointer(item.op, point)
        elif item.kind == "keep" and item.home is not None:
            self.stored_pointer(item.home, point)

    def prepare(self, value: Value, point: Point) -> None:
        """Evaluate, outside the inner loop, every part of an expression that does not vary along the inner axis."""
        if value in self.buffers:
            return
        if value.type.dims[point.inner_axis] is None:
            self.value(value, point)
            return
        if self.reads_crossing(value, point) or not self.is_expression(value):
            self.stored_pointer(self.crossing[value] if self.reads_crossing(value, point) else self.stored[value], point)
            return
        op = self.makers[value]
        if op.name in ("load", "gather"):
            self.element_pointer(op, point)
        for v in op.operands:
            self.prepare(v, point)

    def reads_crossing(self, value: Value, point: Point) -> bool:
        return value in self.crossing and point.level > self.level_of(value)

    def value(self, value: Value, point: Point) -> Value:
        """A tile value at a point: a scalar, or a vector along the columns."""
        memo = point.outer if value.type.dims[point.inner_axis] is None else point.inner
        if value not in memo:
            memo[value] = self.evaluated(value, point)
        return memo[value]

    def evaluated(self, value: Value, point: Point) -> Value:
        width = point.width if value.type.cols is not None else 1
        if self.reads_crossing(value, point):
            return self.read_stored(self.crossing[value], point, width)
        if not self.is_expression(value):
            if value not in self.stored:
                raise CompilerBug(f"{self.kernel.name}: a value is read before it is computed ({self.makers[value].name})")
            return self.read_stored(self.stored[value], point, width)
        op = self.makers[value]
        match op.name:
            case "fill":
                return self.b.const(op.attrs["value"], ScalarType(value.type.dtype))
            case "position":
                return self.b.index(self.at(op.attrs["at"]))
            case "iota":
                if value.type.rows is not None:
                    return self.b.index(self.at(value.type.rows.start) + point.row)
                first = self.b.index(self.at(value.type.cols.start) + point.col)
                return first if width == 1 else self.b.primitive("add", [self.b.splat(first, width), self.b.lanes(width)])
            case "load" | "gather":
                return self.b.load(self.element_pointer(op, point), self.inner_offset(op.attrs["strides"], point), width)
            case "reduce":
                raise CompilerBug(f"{self.kernel.name}: a reduction is read before its loop")
        operands = [self.value(v, point) for v in op.operands]
        definition = OPS[op.name]
        assert isinstance(definition, Pointwise)
        expression = expand(definition.trace([v.type.dtype for v in op.operands], dict(op.attrs)), definitions(self.caps.native))
        return self.b.formula(expression, operands)

    def leave(self, item: Item, point: Point) -> None:
        """Write a store's or a kept value's elements at a point."""
        if item.kind == "reduce":
            return
        width = point.width if item.value.type.cols is not None else 1
        x = self.b.splat(self.value(item.value, point), width)
        if item.kind == "store":
            assert item.op is not None
            self.b.store(self.element_pointer(item.op, point), x, self.inner_offset(item.op.attrs["strides"], point))
        else:
            assert item.home is not None
            if x.type.dtype == "bool":
                raise CompilerBug(f"{self.kernel.name}: a truth value is kept in memory")
            self.b.store(self.stored_pointer(item.home, point), x, self.stored_offset(item.home, point))

    # -- addresses: a pointer that moves with the outer loop, an offset with the inner one
    def prepare_pointers(self, item: Item, pointers: dict[object, Value]) -> None:
        """Take the part of each address that no loop of the segment changes out of its loops."""
        seen: set[Value] = set()

        def visit(value: Value) -> None:
            if value in seen or value in self.buffers or not self.is_expression(value):
                return
            seen.add(value)
            op = self.makers[value]
            if op.name == "load":
                self.tile_pointer(op, pointers)
            for v in op.operands:
                visit(v)

        visit(item.op.operands[0] if item.kind == "reduce" and item.op else item.value)
        if item.kind == "store" and item.op is not None:
            self.tile_pointer(item.op, pointers)

    def tile_pointer(self, op: Op, pointers: dict[object, Value]) -> Value:
        """The address of the first element of a load's or store's tile."""
        key = (op, "tile")
        if key not in pointers:
            pointers[key] = self.b.advance(self.buffers[op.operands[0]], self.first_element(op), hint=op.operands[0].hint)
        return pointers[key]

    def first_element(self, op: Op) -> Index:
        rows, cols = (op.results[0] if op.results else op.operands[1]).type.dims
        base = self.at(op.attrs["base"])
        for dim, stride in zip((rows, cols), op.attrs["strides"], strict=True):
            if dim is not None:
                base = base + self.at(dim.start) * stride
        return base

    def element_pointer(self, op: Op, point: Point) -> Value:
        """The address of a load's, gather's or store's element at the outer loop's position."""
        key = (op, "outer")
        if key not in point.outer:
            rows, cols = op.attrs["strides"]
            if op.name == "gather":
                row = self.value(op.operands[1], point)
                columns = op.results[0].type.cols
                base = self.at(op.attrs["base"]) + (self.at(columns.start) * cols if columns else 0)
                point.outer[key] = self.b.advance(self.buffers[op.operands[0]], base, row, rows, hint="row")
            else:
                step = point.row * rows if point.inner_axis == 1 else point.col * cols
                point.outer[key] = self.b.advance(self.tile_pointer(op, point.outer), step)
        return point.outer[key]

    def inner_offset(self, strides: tuple[int, int], point: Point) -> Index:
        return point.col * strides[1] if point.inner_axis == 1 else point.row * strides[0]

    def stored_pointer(self, home: Stored, point: Point) -> Value:
        key = (home, "outer")
        if key not in point.outer:
            step = (point.row - home.first_row) * home.rows if point.inner_axis == 1 else (point.col - home.first_col) * home.cols
            point.outer[key] = self.b.advance(home.pointer, step)
        return point.outer[key]

    def stored_offset(self, home: Stored, point: Point) -> Index:
        if point.inner_axis == 1:
            return (point.col - home.first_col) * home.cols
        return (point.row - home.first_row) * home.rows

    def read_stored(self, home: Stored, point: Point, width: int) -> Value:
        return self.b.load(self.stored_pointer(home, point), self.stored_offset(home, point), width)

    # -- tiles whose columns are not contiguous: turned through scratch
    def is_turned(self, value: Value) -> bool:
        """Whether a value is a load whose columns are strided."""
        op = self.makers.get(value)
        return op is not None and op.name == "load" and value.type.cols is not None and op.attrs["strides"][1] != 1

    def materialize_turned(self, value: Value) -> None:
        """Copy a load whose columns are strided into scratch, so that vectors can be read along them."""
        op = self.makers[value]
        rows, cols = value.type.dims
        home = self.new_storage(value.type, "turned")
        source = self.b.advance(self.buffers[op.operands[0]], self.first_element(op), hint=op.operands[0].hint)
        self.turn(source, op.attrs["strides"], home.pointer, (home.rows, home.cols), self.live(rows), self.live(cols))
        self.stored[value] = home

    def turned_store(self, op: Op, home: Stored) -> None:
        rows, cols = op.operands[1].type.dims
        target = self.b.advance(self.buffers[op.operands[0]], self.first_element(op), hint=op.operands[0].hint)
        strides = op.attrs["strides"]
        self.turn(home.pointer, (home.cols, home.rows), target, (strides[1], strides[0]), self.live(cols), self.live(rows))

    def turn(self, source: Value, source_strides: tuple[int, int], target: Value, target_strides: tuple[int, int], rows: Index, cols: Index) -> None:
        """target[r, c] = source[r, c] where the source is contiguous along r and the target along c: squares of
        lanes x lanes elements are transposed in registers, the rest is copied one by one."""
        w = self.lanes
        square = w > 1 and source_strides[0] == 1 and target_strides[1] == 1
        full_rows, full_cols = (rows // w * w, cols // w * w) if square else (Index.of(0), Index.of(0))

        def one(r: Index, c: Index) -> None:
            x = self.b.load(source, r * source_strides[0] + c * source_strides[1])
            self.b.store(target, x, r * target_strides[0] + c * target_strides[1])

        def block(r: Index, c: Index) -> None:
            vectors = [self.b.load(source, r + (c + n) * source_strides[1], w) for n in range(w)]
            for n, v in enumerate(self.transposed_square(vectors)):
                self.b.store(target, v, (r + n) * target_strides[0] + c)

        if square:
            self.b.loop(0, full_cols, w, lambda c: self.b.loop(0, full_rows, w, lambda r: block(r, c), stem="r") and None, stem="c")
        self.b.loop(0, full_cols, 1, lambda c: self.b.loop(full_rows, rows, 1, lambda r: one(r, c), stem="r") and None, stem="c")
        self.b.loop(full_cols, cols, 1, lambda c: self.b.loop(0, rows, 1, lambda r: one(r, c), stem="r") and None, stem="c")

    def transposed_square(self, vectors: list[Value]) -> list[Value]:
        """A square of lanes x lanes elements, transposed by log2(lanes) rounds of interleaving."""
        half, done = self.lanes // 2, 1
        while done < self.lanes:
            vectors = [
                self.b.pure("interleave", [vectors[n // 2], vectors[n // 2 + half]], vectors[0].type, half=n % 2) for n in range(self.lanes)
            ]
            done *= 2
        return vectors
