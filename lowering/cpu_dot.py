"""Products in the cpu strategy: a register-blocked nest over packed panels.

The right operand is packed where its load is met, so a load outside a loop is packed once: panels of NV vectors of
columns, k-major, so that the inner loop reads it front to back. The left operand is read in place; with static strides
its rows are constant displacements. A profile may want it turned into panels instead, or copied where its rows are columns
in memory. MR x NV accumulators stay in registers over all of k, or over a block of it as long as the profile says, so that
the part of a panel that a block reads stays in the L1 cache from one block of rows to the next; between two blocks of k
the sums wait in memory, so the order of additions, and with it the bits, is the same. An epilogue runs the ordinary
segment code on each finished block while it is in the L1 cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tinygpt.ir.core import Op, Value
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.types import Dim, ScalarType, VectorType
from tinygpt.lowering.cpu_segment import SegmentLowering, Window
from tinygpt.lowering.cpu_values import Stored

SMALL_BLOCK = 4  # rows of the kernel for what a number of rows unknown at compile time leaves over
COPIED_FOR = 3  # panels of columns that read a left operand, from which on a copy of it pays
COPIED_VECTORS = 4  # copied in one trip
LINE_GAP = 16  # elements between two lines of a copy, so that lines a power of two long do not share sets of the L1 cache


@dataclass(frozen=True)
class Panel:
    """How an operand is packed: `width` elements of the outer axis side by side, the inner (contracted) axis below."""

    inner: Dim
    outer: Dim
    by_inner: int
    by_outer: int
    width: int


@dataclass(frozen=True)
class Operand:
    """Where an operand of a product lies: element (r, c) at pointer + r*rows + c*cols, or in row panels `panel` apart.
    `is_block` says that only the block of the contraction at hand is there."""

    pointer: Value
    rows: int
    cols: int
    panel: int = 0
    is_block: bool = False


@dataclass(frozen=True)
class TurnedRows:
    """A left operand that is packed a block of the contraction at a time: `fill(start, length)` packs one."""

    operand: Operand
    fill: Callable[[Index, Index], None]


@dataclass(frozen=True)
class Span:
    """Blocks of a contraction, each `size` long but for the last: from `first` up to `end`."""

    first: int
    end: int
    size: int


@dataclass(frozen=True)
class Target:
    """Where a block's results go: row pitch, and whether the accumulators start from what is there."""

    pointer: Value
    pitch: int
    resumes: bool
    start: float


class DotLowering(SegmentLowering):
    """Lowers products."""

    def pack(self, op: Op) -> None:
        """Copy an operand of a product: the right one into panels by columns, the left one as the device wants it."""
        value = op.results[0]
        rows, cols = value.type.dims
        by_row, by_col = op.attrs["strides"]
        if self.is_operand(value, 2):
            self.panels[value] = self.panel_copy(op, Panel(rows, cols, by_row, by_col, self.panel_width))
        if self.is_moved(op) and self.caps.left == "panels":
            self.row_panels[value] = self.panel_copy(op, Panel(cols, rows, by_col, by_row, self.caps.register_tile[0]))
        elif self.is_moved(op):
            self.copied[value] = self.copied_rows(op)

    def is_moved(self, op: Op) -> bool:
        """Whether a load is a left operand that is read from scratch: always where the device wants panels, or as a copy where
        its rows are columns in memory and panels of columns enough read it."""
        if not self.is_operand(op.result, 1) or self.caps.left == "in place":
            return False
        columns = max(u.result.type.cols.size for u in self.readers[op.result] if u.name == "dot")
        return self.caps.left == "panels" or (op.attrs["strides"][1] != 1 == op.attrs["strides"][0] and columns >= COPIED_FOR * self.panel_width)

    def copied_rows(self, op: Op) -> Stored:
        """A left operand as it lies in memory, but with the rows of one step of the contraction right behind those of the last."""
        w = self.lanes
        rows, inner = op.results[0].type.dims
        pitch = ceil_div(rows.size, w) * w + LINE_GAP
        home = self.b.scratch(inner.size * pitch, hint="rows")
        source = self.b.advance(self.buffers[op.operands[0]], self.first_element(op), hint=op.operands[0].hint)
        n = self.live(rows)

        def line(k: Index) -> None:
            target, start = self.b.advance(home, k * pitch), self.b.advance(source, k * op.attrs["strides"][1])

            def copied(r: Index, vectors: int, width: int) -> None:
                for v in range(vectors):
                    self.b.store(target, self.b.load(start, r + v * width, width), r + v * width)

            at = Index.of(0)
            for vectors, width in ((COPIED_VECTORS, w), (1, w), (1, 1)):
                upto = n // (vectors * width) * (vectors * width)
                self.b.loop(at, upto, vectors * width, lambda r, v=vectors, x=width: copied(r, v, x), stem="r")
                at = upto

        self.b.loop(0, self.live(inner), 1, line, stem="k")
        return Stored(home, 1, pitch)

    def is_operand(self, value: Value, position: int) -> bool:
        return any(u.name == "dot" and u.operands[position] is value for u in self.readers.get(value, []))

    def panel_copy(self, op: Op, p: Panel) -> Value:
        """All of an operand in panels: [outer / width][inner][width]."""
        home = self.b.scratch(ceil_div(p.outer.size, p.width) * p.inner.size * p.width, hint="panel")
        self.fill_panels(op, p, home, p.inner.size * p.width, Index.of(0), self.live(p.inner))
        return home

    def fill_panels(self, op: Op, p: Panel, home: Value, pitch: int, start: Index, k: Index) -> None:
        """Copy elements start, …, start + k - 1 of the contracted axis into panels `pitch` apart, the last panel padded
        with zeros. Elements that are contiguous along `inner` are transposed in registers, squares of lanes x lanes at a
        time. Panels narrower than a vector need a vector's room behind them."""
        w, width = self.lanes, p.width
        first = self.b.advance(self.buffers[op.operands[0]], self.first_element(op), hint=op.operands[0].hint)
        source = self.b.advance(first, start * p.by_inner)
        n = self.live(p.outer)
        zero = self.b.const(0.0, VectorType("f32", w) if w > 1 else ScalarType("f32"))

        def clear(panel: Index) -> None:
            start = self.b.advance(home, panel * pitch)
            self.b.loop(0, pitch, w, lambda z: self.b.store(start, zero, z), stem="z")

        def clear_last() -> None:
            if not (p.outer.exact and p.outer.size % width == 0):
                self.b.loop(n // width, (n + (width - 1)) // width, 1, clear, stem="p")

        def place(c: Index) -> Value:
            """The top of outer element c in its panel."""
            return self.b.advance(home, c // width * pitch + c % width)

        def copied(v: Index) -> None:
            target, corner = place(v * w), self.b.advance(source, v * w)
            self.b.loop(0, k, 1, lambda r: self.b.store(target, self.b.load(corner, r * p.by_inner, w), r * width), stem="k")

        def turned(v: Index) -> None:
            target, whole = place(v * w), k // w * w
            corner = self.b.advance(source, v * (w * p.by_outer))

            def square(r: Index) -> None:
                rows = [self.b.load(corner, r + n * p.by_outer, w) for n in range(w)]
                for n, vector in enumerate(self.transposed_square(rows)):
                    self.b.store(target, vector, (r + n) * width)

            def line(r: Index) -> None:
                for n in range(w):
                    self.b.store(target, self.b.load(corner, r + n * p.by_outer), r * width + n)

            self.b.loop(0, whole, w, square, stem="k")
            self.b.loop(whole, k, 1, line, stem="k")

        def line(r: Index, panels: Index) -> None:
            """One step of the contraction in so many whole panels. What a store leaves behind its place, the next overwrites."""
            target, corner = self.b.advance(home, r * width), self.b.advance(source, r * p.by_inner)
            self.b.loop(0, panels, 1, lambda c: self.b.store(target, self.b.load(corner, c * width, w), c * pitch), stem="p")

        def end_of_line(c: Index) -> None:
            """The last line of a panel, element by element: a vector might leave the buffer."""
            target, corner = place(c), self.b.advance(source, c * p.by_outer)
            self.b.store(target, self.b.load(corner, (k - 1) * p.by_inner), (k - 1) * width)

        def single(c: Index) -> None:
            target, corner = place(c), self.b.advance(source, c * p.by_outer)
            self.b.loop(0, k, 1, lambda r: self.b.store(target, self.b.load(corner, r * p.by_inner), r * width), stem="k")

        if w > 1 and width < w and p.by_outer == 1:
            full = n // width * width
            self.b.loop(0, k - 1, 1, lambda r: line(r, n // width), stem="k")
            line(k - 1, Index.maximum(0, n // width - 1))
            self.b.loop(Index.maximum(0, full - width), full, 1, end_of_line, stem="c")
            clear_last()
        elif w > 1 and width % w == 0 and (p.by_outer == 1 or p.by_inner == 1):
            full = n // w * w
            clear_last()
            self.b.loop(0, n // w, 1, copied if p.by_outer == 1 else turned, stem="v")
        else:
            full = Index.of(0)
            clear_last()
        self.b.loop(full, n, 1, single, stem="c")

    def start_value(self, acc: Value) -> float | None:
        """The number an accumulator starts from, if it is one everywhere."""
        maker = self.makers.get(acc)
        return float(maker.attrs["value"]) if maker is not None and maker.name == "fill" else None

    @property
    def panel_width(self) -> int:
        return self.caps.register_tile[1] * self.lanes

    def dot(self, op: Op, epilogue: Sequence[Op]) -> None:
        """acc + a @ b, block by block; the epilogue's ops run on each block."""
        acc, a, b = op.operands
        rows, inner = a.type.dims
        cols = b.type.cols
        left = self.left_operand(a)
        right = self.right_operand(b, inner)
        spans = self.spans(inner)
        target = self.target_of(op, acc, epilogue, rows, cols, tall=len(spans) > 1)
        xi, xj = self.live(rows), self.live(cols)
        width = self.panel_width
        in_block = target.pointer in self.blocks
        whole = cols.size // width if cols.exact else None

        def panels(body: Callable[[Index, int, bool], None]) -> None:
            """For every panel of columns: its number, its vectors, and whether it is known to lie inside the tile."""
            most = self.caps.register_tile[1]
            if whole is None:
                self.b.loop(0, (xj + (width - 1)) // width, 1, lambda n: body(n, most, False), stem="j")
                return
            self.b.loop(0, whole, 1, lambda n: body(n, most, True), stem="j")
            if cols.size % width:
                body(Index.of(whole), ceil_div(cols.size % width, self.lanes), False)

        def stretches(span: Span, body: Callable[[Index, Index], None]) -> None:
            """For every block of a span: where in the contraction it begins, and how long it is."""
            if span.end - span.first > span.size:
                self.b.loop(span.first, span.end, span.size, lambda k: body(k, Index.of(span.size)), stem="k")
            else:
                body(Index.of(span.first), Index.of(span.end - span.first) if len(spans) > 1 else self.live(inner))

        def panel(n: Index, vectors: int, is_whole: bool, span: Span, k: Index, trips: Index, left: Operand) -> None:
            """All rows of a panel of columns, over one block of the contraction."""
            b_pointer = self.b.advance(right.pointer, n * right.rows + k * right.cols)
            goal = replace(target, resumes=target.resumes or span.first > 0)

            def block(i: Index, mr: int) -> None:
                mr_full = self.caps.register_tile[0]
                a_at = i // mr_full * left.panel + i % mr_full if left.panel else i * left.rows
                a_pointer = self.b.advance(left.pointer, a_at + (0 if left.is_block else k * left.cols))
                c_at = (i * width if len(spans) > 1 else 0) if in_block else i * target.pitch + n * width
                c_pointer = self.b.advance(target.pointer, c_at)
                self.micro(mr, vectors, c_pointer, goal, a_pointer, left, b_pointer, right.cols, trips)
                if in_block and span is spans[-1]:
                    self.stored[op.result] = self.block_storage(c_pointer, width, i, n * width)
                    end = n * width + width if is_whole else Index.minimum(n * width + width, xj)
                    self.segment(epilogue, Window((i, i + mr), (n * width, end)))

            for mr, low, high in self.row_parts(xi):
                self.b.loop(low, high, mr, lambda i, mr=mr: block(i, mr), stem="i")

        if in_block:

            def all_spans(n: Index, vectors: int, is_whole: bool) -> None:
                for span in spans:
                    stretches(span, partial(panel, n, vectors, is_whole, span, left=left))

            panels(all_spans)
            return
        turned = self.turned_rows(a, left, cols, spans)
        for span in spans:

            def stretch(k: Index, trips: Index, span: Span = span) -> None:
                if turned is not None:
                    turned.fill(k, trips)
                used = turned.operand if turned is not None else left
                panels(lambda n, vectors, is_whole: panel(n, vectors, is_whole, span, k, trips, used))

            stretches(span, stretch)

    def spans(self, inner: Dim) -> list[Span]:
        """The contraction in blocks of nearly equal length: the first, those between, the last. One where it is short."""
        most = self.caps.inner_block
        if not most or not inner.exact or inner.size <= most + most // 2:
            return [Span(0, inner.size, inner.size)]
        count = ceil_div(inner.size, most)
        size = ceil_div(ceil_div(inner.size, count), 16) * 16
        last = (ceil_div(inner.size, size) - 1) * size
        between = [Span(size, last, size)] if last > size else []
        return [Span(0, size, size), *between, Span(last, inner.size, size)]

    def turned_rows(self, a: Value, left: Operand, cols: Dim, spans: list[Span]) -> TurnedRows | None:
        """Row panels for one block of a left operand whose rows are columns in memory: read in place, an element of the
        contraction would cost a cache line for each block of rows. Not for a single panel of columns, which reads them once."""
        if len(spans) == 1 or left.cols == 1 or left.panel or a in self.stored or cols.size <= self.panel_width:
            return None
        op = self.makers[a]
        height, size = self.caps.register_tile[0], spans[0].size
        rows, inner = a.type.dims
        by_row, by_col = op.attrs["strides"]
        pitch = size * height + (self.lanes if height < self.lanes else 0)
        home = self.b.scratch(ceil_div(rows.size, height) * pitch, hint="rows")
        panel = Panel(inner, rows, by_col, by_row, height)
        return TurnedRows(Operand(home, 1, height, pitch, is_block=True), lambda k, trips: self.fill_panels(op, panel, home, pitch, k, trips))

    def row_parts(self, rows: Index) -> list[tuple[int, Index, Index]]:
        """(rows a block, from, to): whole blocks, then smaller ones for what is left."""
        mr = self.caps.register_tile[0]
        full = rows // mr * mr
        parts = [(mr, Index.of(0), full)]
        if rows.is_constant:
            rest = rows.constant % mr
            return parts + ([(rest, full, rows)] if rest else [])
        small = min(SMALL_BLOCK, mr)
        middle = full + (rows - full) // small * small
        return [*parts, (small, full, middle), (1, middle, rows)]

    def left_operand(self, a: Value) -> Operand:
        if a in self.row_panels:
            height = self.caps.register_tile[0]
            return Operand(self.row_panels[a], 1, height, a.type.cols.size * height)
        home = self.stored.get(a) or self.copied.get(a)
        if home is not None:
            return Operand(home.pointer, home.rows, home.cols)
        op = self.makers[a]
        pointer = self.b.advance(self.buffers[op.operands[0]], self.first_element(op), hint=op.operands[0].hint)
        return Operand(pointer, *op.attrs["strides"])

    def right_operand(self, b: Value, inner: Dim) -> Operand:
        """Panels: `rows` is the distance between panels, `cols` the distance from one k to the next."""
        if b in self.panels:
            return Operand(self.panels[b], inner.size * self.panel_width, self.panel_width)
        home = self.stored[b]
        return Operand(home.pointer, self.panel_width, home.rows)

    def target_of(self, op: Op, acc: Value, epilogue: Sequence[Op], rows: Dim, cols: Dim, tall: bool) -> Target:
        """Straight to memory when the epilogue is one store of whole vectors, else a block in scratch for the epilogue (or
        a column of blocks, where all wait for the next block of the contraction), else the value's own place in scratch."""
        starts_from = self.start_value(acc)
        if epilogue and starts_from is not None:
            if len(epilogue) == 1 and epilogue[0].operands[1] is op.result and cols.exact and cols.size % self.lanes == 0:
                store = epilogue[0]
                pointer = self.b.advance(self.buffers[store.operands[0]], self.first_element(store), hint=store.operands[0].hint)
                return Target(pointer, store.attrs["strides"][0], False, starts_from)
            height = self.caps.register_tile[0]
            block = self.b.scratch((ceil_div(rows.size, height) * height if tall else height) * self.panel_width, hint="block")
            self.blocks.add(block)
            return Target(block, self.panel_width, False, starts_from)
        home = self.wanted.get(op.result)
        if home is None:
            home = self.stored[acc] if starts_from is None and acc in self.stored and len(self.readers[acc]) == 1 else self.new_storage(op.result.type, "product")
        if starts_from is None and self.stored.get(acc) != home:
            self.copies([(acc, home)])
        self.stored[op.result] = home
        return Target(home.pointer, home.rows, starts_from is None, starts_from or 0.0)

    def micro(
        self, mr: int, vectors: int, c: Value, target: Target, a: Value, left: Operand, b: Value, b_step: int, trips: Index
    ) -> None:
        """The innermost kernel: mr x vectors accumulators over all of k."""
        w = self.lanes
        type = VectorType("f32", w) if w > 1 else ScalarType("f32")

        def body(c: Value, a: Value, b: Value) -> None:
            starts = [
                self.b.load(c, r * target.pitch + v * w, w, hint=f"c{r}_{v}") if target.resumes else Value(type, f"c{r}_{v}")
                for r in range(mr)
                for v in range(vectors)
            ]
            if not target.resumes:
                zero = self.b.const(target.start, type)
                starts = [zero for _ in starts]

            def steps(unroll: int) -> Callable[..., list[Value]]:
                def step(_: Index, *carried: Value) -> list[Value]:
                    *sums, pa, pb = carried
                    for u in range(unroll):
                        columns = [self.b.load(pb, u * b_step + v * w, w) for v in range(vectors)]
                        for r, x in enumerate(self.row_splats(pa, left, mr, u)):
                            for v in range(vectors):
                                slot = r * vectors + v
                                sums[slot] = self.b.primitive("fma", [x, columns[v], sums[slot]])
                    return [*sums, self.b.advance(pa, unroll * left.cols), self.b.advance(pb, unroll * b_step)]

                return step

            unroll = self.caps.unroll
            whole = trips // unroll * unroll
            results = self.b.loop(0, whole, unroll, steps(unroll), [*starts, a, b], stem="k")
            results = self.b.loop(whole, trips, 1, steps(1), results, stem="k")
            for r in range(mr):
                for v in range(vectors):
                    self.b.store(c, results[r * vectors + v], r * target.pitch + v * w)

        self.b.outline("micro", [c, a, b], sorted(trips.variables()), body)

    def row_splats(self, pa: Value, left: Operand, mr: int, u: int) -> Iterator[Value]:
        """Element u of each of mr rows in all lanes: loaded one by one, or from row panels a vector at a time."""
        w = self.lanes
        by_vector = bool(left.panel) and self.caps.splat == "shuffle" and mr % w == 0
        for r in range(mr):
            if not by_vector:
                yield self.b.splat(self.b.load(pa, r * left.rows + u * left.cols), w)
                continue
            if r % w == 0:
                rows = self.b.load(pa, r + u * left.cols, w)
            yield self.b.pure("broadcast_lane", [rows], VectorType("f32", w), lane=r % w)
