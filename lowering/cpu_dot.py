"""Products in the cpu strategy: a register-blocked nest over packed panels.

The right operand is packed where its load is met, so a load outside a loop is packed once: panels of NV vectors of
columns, k-major, so that the inner loop reads it front to back. The left operand is read in place; with static strides
its rows are constant displacements. MR x NV accumulators stay in registers over all of k. An epilogue runs the
ordinary segment code on each finished block while it is in the L1 cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinygpt.ir.core import Op, Value
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.types import Dim, ScalarType, VectorType
from tinygpt.lowering.cpu_segment import Window

if TYPE_CHECKING:
    from tinygpt.lowering.cpu import CpuLowering

SMALL_BLOCK = 4  # rows of the kernel for what a number of rows unknown at compile time leaves over


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
    """Where an operand of a product lies: element (r, c) at pointer + r*rows + c*cols, or in row panels `panel` apart."""

    pointer: Value
    rows: int
    cols: int
    panel: int = 0


@dataclass(frozen=True)
class Target:
    """Where a block's results go: row pitch, and whether the accumulators start from what is there."""

    pointer: Value
    pitch: int
    resumes: bool
    start: float


class DotLowering:
    """Lowers products; mixed into the strategy, whose state it uses."""

    def pack(self: CpuLowering, op: Op) -> None:
        """Copy an operand of a product into panels: the right one by columns, the left one by rows where the device
        wants that."""
        value = op.results[0]
        rows, cols = value.type.dims
        by_row, by_col = op.attrs["strides"]
        if self.is_operand(value, 2):
            self.panels[value] = self.panel_copy(op, Panel(rows, cols, by_row, by_col, self.panel_width))
        if self.caps.panel_rows and self.is_operand(value, 1):
            self.row_panels[value] = self.panel_copy(op, Panel(cols, rows, by_col, by_row, self.caps.register_tile[0]))

    def is_operand(self: CpuLowering, value: Value, position: int) -> bool:
        return any(u.name == "dot" and u.operands[position] is value for u in self.readers.get(value, []))

    def panel_copy(self: CpuLowering, op: Op, p: Panel) -> Value:
        """[outer / width][inner][width], the last panel padded with zeros. Elements that are contiguous along `inner` are
        transposed in registers, squares of lanes x lanes at a time."""
        w, width = self.lanes, p.width
        home = self.b.scratch(ceil_div(p.outer.size, width) * p.inner.size * width, hint="panel")
        source = self.b.advance(self.buffers[op.operands[0]], self.first_element(op), hint=op.operands[0].hint)
        k, n = self.live(p.inner), self.live(p.outer)
        pitch = p.inner.size * width
        zero = self.b.const(0.0, VectorType("f32", w) if w > 1 else ScalarType("f32"))

        def clear(panel: Index) -> None:
            start = self.b.advance(home, panel * pitch)
            self.b.loop(0, pitch, w, lambda z: self.b.store(start, zero, z), stem="z")

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

        def single(c: Index) -> None:
            target, corner = place(c), self.b.advance(source, c * p.by_outer)
            self.b.loop(0, k, 1, lambda r: self.b.store(target, self.b.load(corner, r * p.by_inner), r * width), stem="k")

        vectors = w > 1 and width % w == 0 and (p.by_outer == 1 or p.by_inner == 1)
        full = n // w * w if vectors else Index.of(0)
        if vectors:
            self.b.loop(0, n // w, 1, copied if p.by_outer == 1 else turned, stem="v")
        self.b.loop(full, n, 1, single, stem="c")
        return home

    def start_value(self: CpuLowering, acc: Value) -> float | None:
        """The number an accumulator starts from, if it is one everywhere."""
        maker = self.makers.get(acc)
        return float(maker.attrs["value"]) if maker is not None and maker.name == "fill" else None

    @property
    def panel_width(self: CpuLowering) -> int:
        return self.caps.register_tile[1] * self.lanes

    def dot(self: CpuLowering, op: Op, epilogue: Sequence[Op]) -> None:
        """acc + a @ b, block by block; the epilogue's ops run on each block."""
        acc, a, b = op.operands
        rows, inner = a.type.dims
        cols = b.type.cols
        left = self.left_operand(a)
        right = self.right_operand(b, inner)
        target = self.target_of(op, acc, epilogue, rows, cols)
        xi, xj = self.live(rows), self.live(cols)
        width = self.panel_width
        plain = bool(epilogue) and target.pointer not in self.blocks
        whole = cols.size // width if cols.exact else None

        def panel(n: Index, vectors: int, is_whole: bool) -> None:
            b_pointer = self.b.advance(right.pointer, n * right.rows)
            for mr, low, high in self.row_parts(xi):
                self.b.loop(low, high, mr, lambda i, mr=mr: block(i, n, mr, vectors, b_pointer, is_whole), stem="i")  # type: ignore[misc]

        def block(i: Index, n: Index, mr: int, vectors: int, b_pointer: Value, n_is_whole: bool) -> None:
            mr_full = self.caps.register_tile[0]
            a_at = i // mr_full * left.panel + i % mr_full if left.panel else i * left.rows
            a_pointer = self.b.advance(left.pointer, a_at)
            in_block = target.pointer in self.blocks
            c_pointer = target.pointer if in_block else self.b.advance(target.pointer, i * target.pitch + n * width)
            self.micro(mr, vectors, c_pointer, target, a_pointer, left, b_pointer, right.cols, self.live(inner))
            if epilogue and not plain:
                self.stored[op.result] = self.block_storage(target.pointer, width, i, n * width)
                end = n * width + width if n_is_whole else Index.minimum(n * width + width, xj)
                self.segment(epilogue, Window((i, i + mr), (n * width, end)))

        if whole is None:
            self.b.loop(0, (xj + (width - 1)) // width, 1, lambda n: panel(n, self.caps.register_tile[1], False), stem="j")
            return
        self.b.loop(0, whole, 1, lambda n: panel(n, self.caps.register_tile[1], True), stem="j")
        if cols.size % width:
            panel(Index.of(whole), ceil_div(cols.size % width, self.lanes), False)

    def row_parts(self: CpuLowering, rows: Index) -> list[tuple[int, Index, Index]]:
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

    def left_operand(self: CpuLowering, a: Value) -> Operand:
        if a in self.row_panels:
            height = self.caps.register_tile[0]
            return Operand(self.row_panels[a], 1, height, a.type.cols.size * height)
        if a in self.stored:
            home = self.stored[a]
            return Operand(home.pointer, home.rows, home.cols)
        op = self.makers[a]
        pointer = self.b.advance(self.buffers[op.operands[0]], self.first_element(op), hint=op.operands[0].hint)
        return Operand(pointer, *op.attrs["strides"])

    def right_operand(self: CpuLowering, b: Value, inner: Dim) -> Operand:
        """Panels: `rows` is the distance between panels, `cols` the distance from one k to the next."""
        if b in self.panels:
            return Operand(self.panels[b], inner.size * self.panel_width, self.panel_width)
        home = self.stored[b]
        return Operand(home.pointer, self.panel_width, home.rows)

    def target_of(self: CpuLowering, op: Op, acc: Value, epilogue: Sequence[Op], rows: Dim, cols: Dim) -> Target:
        """Straight to memory when the epilogue is one store of whole vectors, else a block in scratch for the epilogue,
        else the value's own place in scratch."""
        starts_from = self.start_value(acc)
        if epilogue and starts_from is not None:
            if len(epilogue) == 1 and epilogue[0].operands[1] is op.result and cols.exact and cols.size % self.lanes == 0:
                store = epilogue[0]
                pointer = self.b.advance(self.buffers[store.operands[0]], self.first_element(store), hint=store.operands[0].hint)
                return Target(pointer, store.attrs["strides"][0], False, starts_from)
            block = self.b.scratch(self.caps.register_tile[0] * self.panel_width, hint="block")
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
        self: CpuLowering, mr: int, vectors: int, c: Value, target: Target, a: Value, left: Operand, b: Value, b_step: int, trips: Index
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

    def row_splats(self: CpuLowering, pa: Value, left: Operand, mr: int, u: int) -> Iterator[Value]:
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
