"""Products in the gpu strategy: operands go through workgroup memory in slices of the contraction.

Both operands lie there k-major: the left one as [k][row], the right one as [k][column], so that a thread reads vectors
of four consecutive rows and columns and adds their outer product to its register block. A free operand is computed
while it is staged, slice by slice; where its elements lie one after another along k in memory, neighbouring threads
read along k, and squares of four by four are transposed in registers. Their columns go to the same few banks of
workgroup memory, so lines are rotated, each four of k further than the four before. A placed operand, a product's
result say, is written whole by the threads that hold it, on the left side to lines that are rotated or padded. Rows and
columns of outputs beyond their axis may hold anything, as they are never stored; beyond the end of the contraction
operands are zero.

Where tiles are few, groups of threads share the contraction: each has the whole register block and multiplies its share
of every slice. Behind the last slice two groups exchange halves, so that each goes on with half of the rows; of more, or
where rows do not halve, the first gets all sums and goes on alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import gcd

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Op, Value
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.types import Dim, ScalarType, VectorType
from tinygpt.lowering.gpu_memory import Piece, WorkgroupLowering
from tinygpt.lowering.gpu_values import WIDTH, Key

SLICE = 16  # of the contraction, staged at a time
UNROLL = 16  # of the contraction loop
BANKS = 8  # vectors of four that workgroup memory moves at once
FETCHED_AHEAD = 8  # vectors of the next slice a thread holds while it works on this one
UNROLLED_COPIES = 4  # vectors of a slice a thread copies without a loop


@dataclass(frozen=True)
class Operand:
    """How an operand lies in workgroup memory, in vectors of `lanes`: element (k, x) at k*pitch + x, but for lines that are
    rotated, by `turn` vectors more for each `every` of k. `whole`: all of the contraction, not a slice."""

    value: Value
    pitch: int
    lanes: int
    dim: Dim  # the axis that is not contracted
    axis: int  # which axis of the operand that is
    whole: bool
    turn: int
    every: int

    def at(self, k: Index, x: Index) -> Index:
        """Where element (k, x) lies."""
        if not self.turn:
            return k * self.pitch + x
        return k * self.pitch + (x // WIDTH + k // self.every * self.turn) % (self.pitch // WIDTH) * WIDTH


@dataclass(frozen=True)
class Staged(Operand):
    """An operand that has memory."""

    piece: Piece


@dataclass(frozen=True)
class Copy:
    """How a slice reaches workgroup memory: in units of one vector along the output, `across` of them side by side, or,
    `turned`, of squares of four vectors, `along` of them one after another along the contraction."""

    turned: bool
    across: int
    along: int

    @property
    def units(self) -> int:
        return self.across * self.along

    def place(self, unit: Index) -> tuple[Index, Index]:
        """Which unit along the contraction and which along the output: neighbours lie side by side in memory."""
        return (unit % self.along, unit // self.along) if self.turned else (unit // self.across, unit % self.across)


class DotLowering(WorkgroupLowering):
    """Lowers products."""

    def __init__(self, kernel: Kernel, caps: Caps) -> None:
        super().__init__(kernel, caps)
        self.early: dict[tuple[Op, int], list[Value]] = {}  # by product and operand: a first slice that is fetched already

    def dot(self, op: Op, then: Op | None = None) -> None:
        """acc + a @ b into the register block of the result. While threads work on it, what the product that comes `then`
        needs first is on its way from memory."""
        acc, a, b = op.operands
        (rows, inner), cols = a.type.dims, b.type.cols
        depth = self.depth(inner)
        slices = ceil_div(inner.size, depth)
        left = self.operand(a, 0, rows, depth, slices)
        right = self.operand(b, 1, cols, depth, slices)
        for operand in (left, right):
            if operand.whole:
                self.write_whole(operand, inner, depth * slices)
        keys = self.keys(op.result.type)
        starts = [self.vector(acc, key) for key in keys]
        streamed = [operand for operand in (left, right) if not operand.whole]
        early = {operand.axis: self.early.pop((op, operand.axis)) for operand in streamed if (op, operand.axis) in self.early}
        ahead = [operand for operand in streamed if self.can_fetch_ahead(operand, depth)]
        firsts = [x for operand in ahead for x in early.get(operand.axis) or self.fetch(operand, inner, Index.of(0), depth)]
        if then is not None:
            self.fetch_early(then)

        def one(s: Index, *carried: Value) -> Sequence[Value]:
            sums, mine = carried[: len(keys)], list(carried[len(keys) :])
            for operand in streamed:
                if operand in ahead:
                    mine = self.commit(operand, depth, mine)
                else:
                    self.stage(operand, inner, s * depth, depth)
            self.will_read(left.piece, right.piece)
            following = [x for operand in ahead for x in self.fetch(operand, inner, Index.minimum(s + 1, slices - 1) * depth, depth)] if slices > 1 else firsts
            begins = [s * depth if operand.whole else Index.of(0) for operand in (left, right)]
            return [*self.products(left, right, begins, depth, sums), *following]

        results = self.loop(0, slices, 1, one, [*starts, *firsts], stem="s")
        self.release(left.piece, right.piece)
        sums = dict(zip(keys, results, strict=False))
        if self.layout.groups == 2 and self.layout.rows(rows) % (2 * WIDTH) == 0:
            self.registers[op.result] = self.by_halves(sums)
        else:
            self.registers[op.result] = dict(zip(keys, self.across_groups(list(sums.values())), strict=True))

    def depth(self, inner: Dim) -> int:
        """How much of a contraction is staged at a time: a multiple of four where it is longer than that."""
        wanted = self.kernel.order.get("slice", self.kernel.cost.get("slice", SLICE))
        return min(int(wanted), -(-inner.size // WIDTH) * WIDTH)

    def fetch_early(self, op: Op) -> None:
        """Fetch the first slices of a product's operands from memory, if they fit registers until it is its turn."""
        _, a, b = op.operands
        (rows, inner), cols = a.type.dims, b.type.cols
        depth = self.depth(inner)
        for axis, (value, dim) in enumerate(((a, rows), (b, cols))):
            operand = self.described(value, axis, dim, depth)
            if not operand.whole and self.can_fetch_ahead(operand, depth):
                self.early[op, axis] = self.fetch(operand, inner, Index.of(0), depth)

    def described(self, value: Value, axis: int, dim: Dim, depth: int) -> Operand:
        """How an operand whose axis `dim` is not contracted is to lie in workgroup memory."""
        whole = self.is_placed(value)
        if axis == 0:
            pitch, lanes = self.layout.padded_rows(dim), WIDTH if self.layout.grouped(dim) else 1
        else:
            pitch, lanes = self.layout.padded_cols(dim), self.layout.width(dim)
        if not whole:
            turn = max(1, BANKS * WIDTH // depth) if self.is_turned(value, lanes, axis, depth) else 0
            return Operand(value, pitch, lanes, dim, axis, whole, turn, WIDTH)
        if axis == 0 and lanes == 1:  # neighbours along x write lines that are to lie in other banks
            return Operand(value, pitch + 1, lanes, dim, axis, whole, 0, WIDTH)
        return Operand(value, pitch, lanes, dim, axis, whole, 1 - axis, self.layout.width(value.type.dims[1 - axis]))

    def operand(self, value: Value, axis: int, dim: Dim, depth: int, slices: int) -> Staged:
        """Take workgroup memory for an operand."""
        found = self.described(value, axis, dim, depth)
        piece = self.piece(depth * (slices if found.whole else 1) * found.pitch, found.lanes, "left" if axis == 0 else "right")
        return Staged(**{field.name: getattr(found, field.name) for field in fields(found)}, piece=piece)

    def by_halves(self, sums: Mapping[Key, Value]) -> dict[Key, Value]:
        """The sums of both groups, half of the rows in each: the groups exchange the other half. From here on they are one
        group of twice as many threads along y, whose rows are those that each has kept."""
        layout = self.layout
        self.layout = replace(layout, threads_y=2 * layout.threads_y, groups=1)
        self.scopes = [{}]  # what was computed before is at the rows of the old layout
        first = self.b.primitive("lt", [self.b.index(layout.group), self.b.index(1)])
        kept: dict[Key, Value] = {}
        given: list[Value] = []
        for (r, v), x in sums.items():
            assert r is not None
            if r // WIDTH % 2 == 0:
                other = sums[r + WIDTH, v]
                kept[r // (2 * WIDTH) * WIDTH + r % WIDTH, v] = self.b.primitive("select", [first, x, other])
                given.append(self.b.primitive("select", [first, other, x]))
        taken = self.exchanged(given, 2, layout.group, 1 - layout.group, layout.in_group)
        return {key: self.b.primitive("add", [x, other]) for (key, x), other in zip(kept.items(), taken, strict=True)}

    def across_groups(self, sums: list[Value]) -> list[Value]:
        """The first group's sums plus those of the others, of which half hand theirs over at a time."""
        share, group = self.layout.groups // 2, self.layout.group
        while share:
            givers = [(Index.of(share - 1) - group, Index.of(0)), (group, Index.of(2 * share))]
            others = self.exchanged(sums, share, group - share, group % share, self.layout.in_group, givers)
            sums = [self.b.primitive("add", [x, other]) for x, other in zip(sums, others, strict=True)]
            share //= 2
        return sums

    def exchanged(
        self, given: Sequence[Value], slots: int, to: Index, of: Index, threads: int, givers: Sequence[tuple[Index, Index]] = ()
    ) -> list[Value]:
        """What another group of threads gives, thread for thread: the givers write into slot `to`, all read from slot `of`."""
        width = WIDTH if isinstance(given[0].type, VectorType) else 1
        piece = self.piece(slots * len(given) * threads * width, width, "partial")

        def place(slot: Index, n: int) -> Index:
            return ((slot * len(given) + n) * threads + Index.variable("thread") % threads) * width

        def hand_over() -> None:
            for n, x in enumerate(given):
                self.b.store(piece.pointer, x, place(to, n))

        self.will_write(piece)
        self.when(list(givers), hand_over)
        self.will_read(piece)
        found = [self.b.load(piece.pointer, place(of, n), width) for n in range(len(given))]
        self.release(piece)
        return found

    # -- a placed operand
    def write_whole(self, to: Staged, inner: Dim, extent: int) -> None:
        """Write what each thread holds of a placed operand, `extent` elements of the contraction: zeros behind its end."""
        for key in self.keys(to.value.type):
            self.vector(to.value, key)
        self.will_write(to.piece)
        if to.axis == 0:
            self.write_left(to, inner, extent)
        else:
            self.write_right(to, inner, extent)

    def write_left(self, to: Staged, inner: Dim, extent: int) -> None:
        lanes = to.lanes
        width = self.layout.width(inner)
        for v in range(ceil_div(extent, self.layout.threads_x * width)):
            k = self.layout.col(inner, v)
            conditions = [(k, Index.of(extent))] if self.largest(k) + width > extent else []

            def part(r: int, v: int = v, k: Index = k) -> Value:
                return self.or_else(self.vector(to.value, (r, v)), inner, k, width, 0.0) if v < self.layout.vectors(inner) else self.zero(width)

            def write(k: Index = k, part: Callable[[int], Value] = part) -> None:
                for r in range(0, self.layout.rows(to.dim), lanes):
                    parts = [part(r + n) for n in range(lanes)]
                    for u in range(width):
                        column = [self.b.extract(x, u) for x in parts]
                        self.b.store(to.piece.pointer, self.b.join(column) if lanes > 1 else column[0], to.at(k + u, self.layout.row(to.dim, r)))

            self.when(conditions, write)

    def write_right(self, to: Staged, inner: Dim, extent: int) -> None:
        for r in range(ceil_div(extent, self.layout.threads_y)):
            k = self.layout.row(inner, r)
            conditions = [(k, Index.of(extent))] if self.largest(k) + 1 > extent else []

            def write(r: int = r, k: Index = k) -> None:
                for v in range(self.layout.vectors(to.dim)):
                    inside = r < self.layout.rows(inner)
                    x = self.or_else(self.vector(to.value, (r, v)), inner, k, 1, 0.0) if inside else self.zero(self.layout.width(to.dim))
                    self.b.store(to.piece.pointer, x, k * to.pitch + self.layout.col(to.dim, v))

            self.when(conditions, write)

    def zero(self, width: int) -> Value:
        return self.b.splat(self.b.const(0.0, ScalarType("f32")), width)

    # -- a free operand
    def is_turned(self, value: Value, lanes: int, axis: int, depth: int) -> bool:
        """Whether an operand's elements lie one after another along the contraction, and can be read so."""
        inner = value.type.dims[1 - axis]
        return lanes == WIDTH and self.contiguous_axis(value) != axis and self.layout.width(inner) == WIDTH and depth % WIDTH == 0

    def copy(self, to: Operand, depth: int) -> Copy:
        """How a slice is dealt to the threads."""
        return Copy(to.turn > 0, to.pitch // to.lanes, depth // WIDTH if to.turn else depth)

    def units(self, copy: Copy) -> list[tuple[Index, bool]]:
        """The units of a slice that a thread copies, and for each whether some threads have none."""
        threads = self.layout.threads
        return [(Index.variable("thread") + first, copy.units - first < threads) for first in range(0, copy.units, threads)]

    def can_fetch_ahead(self, to: Operand, depth: int) -> bool:
        """Whether a thread's part of the next slice fits registers while it works on this one."""
        copy = self.copy(to, depth)
        return len(self.units(copy)) * (WIDTH if copy.turned else 1) <= FETCHED_AHEAD

    def fetch(self, to: Operand, inner: Dim, first: Index, depth: int) -> list[Value]:
        """Compute the thread's part of a slice: elements `first` to `first + depth` of the contraction."""
        copy = self.copy(to, depth)
        return [x for unit, _ in self.units(copy) for x in self.unit_elements(to, copy, inner, first, unit)]

    def commit(self, to: Staged, depth: int, fetched: list[Value]) -> list[Value]:
        """Write what was fetched to workgroup memory; returns what is left of it, for the other operand."""
        copy = self.copy(to, depth)
        self.will_write(to.piece)
        for unit, is_partial in self.units(copy):
            count = WIDTH if copy.turned else 1
            mine, fetched = fetched[:count], fetched[count:]
            conditions = [(unit, Index.of(copy.units))] if is_partial else []
            self.when(conditions, partial(self.write_unit, to, copy, unit, mine))
        return fetched

    def stage(self, to: Staged, inner: Dim, first: Index, depth: int) -> None:
        """Compute a slice of a free operand straight into workgroup memory."""
        self.will_write(to.piece)
        copy = self.copy(to, depth)

        def move(unit: Index) -> None:
            self.write_unit(to, copy, unit, self.unit_elements(to, copy, inner, first, unit))

        threads = self.layout.threads
        whole, rest = divmod(copy.units, threads)
        if whole <= UNROLLED_COPIES:
            for n in range(whole):
                move(Index.variable("thread") + n * threads)
        else:
            self.loop(0, whole, 1, lambda n: move(Index.variable("thread") + n * threads), stem="c")
        if rest:
            unit = Index.variable("thread") + whole * threads
            self.when([(unit, Index.of(copy.units))], lambda: self.limited(rest - 1, lambda: move(unit)))

    def unit_elements(self, to: Operand, copy: Copy, inner: Dim, first: Index, unit: Index) -> list[Value]:
        """One vector of a slice, or the four along the contraction of a square."""
        lanes, (line, column) = to.lanes, copy.place(unit)
        x, k = column * lanes, line * (WIDTH if copy.turned else 1)
        axis, width = (1 - to.axis, WIDTH) if copy.turned else (to.axis, lanes)
        found = []
        for n in range(WIDTH if copy.turned else 1):
            row, col = (x + n, first + k) if to.axis == 0 else (first + k, x + n)
            elements = self.free_vector(to.value, row, col, axis, width)
            found.append(self.or_else(elements, inner, first + k, WIDTH if copy.turned else 1, 0.0))
        return found

    def write_unit(self, to: Staged, copy: Copy, unit: Index, elements: Sequence[Value]) -> None:
        line, column = copy.place(unit)
        x = column * to.lanes
        if not copy.turned:
            self.b.store(to.piece.pointer, elements[0], to.at(line, x))
            return
        for u in range(WIDTH):
            self.b.store(to.piece.pointer, self.b.join([self.b.extract(v, u) for v in elements]), to.at(line * WIDTH + u, x))

    def limited(self, last: int, body: Callable[[], None]) -> None:
        """Lower `body` knowing that only the threads up to `last` run it."""
        saved = self.ranges["thread"]
        self.ranges["thread"] = (0, last)
        body()
        self.ranges["thread"] = saved

    # -- the products
    def products(
        self, left: Staged, right: Staged, firsts: Sequence[Index], depth: int, sums: Sequence[Value]
    ) -> list[Value]:
        """Add the outer products of a slice, or of the group's share of it, to the register block."""
        rows, vectors = self.layout.rows(left.dim), self.layout.vectors(right.dim)
        share = depth // self.layout.groups
        firsts = [first + self.layout.group * share if self.layout.groups > 1 else first for first in firsts]
        unroll = gcd(UNROLL, share)

        def step(trip: Index, *totals: Value) -> list[Value]:
            now = list(totals)
            for k in (trip * unroll + u for u in range(unroll)):
                column = self.left_column(left, firsts[0] + k, rows)
                row = [
                    self.b.load(right.piece.pointer, right.at(firsts[1] + k, self.layout.col(right.dim, v)), right.lanes, hint="y")
                    for v in range(vectors)
                ]
                now = [self.b.primitive("fma", [column[n // vectors], row[n % vectors], total]) for n, total in enumerate(now)]
            return now

        return self.loop(0, share // unroll, 1, step, sums, stem="k")

    def left_column(self, left: Staged, k: Index, rows: int) -> list[Value]:
        """The thread's rows of the left operand at one k."""
        lanes = left.lanes
        found: list[Value] = []
        for r in range(0, rows, lanes):
            x = self.b.load(left.piece.pointer, left.at(k, self.layout.row(left.dim, r)), lanes, hint="x")
            found += [self.b.extract(x, n) for n in range(lanes)]
        return found
