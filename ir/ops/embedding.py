"""embedding: rows of a table picked by tokens, and its gradient, in two forms.

For a small vocabulary the gradient is a product with the tokens' one-hot matrix, which costs tokens * vocabulary * width. For
a large one the positions are sorted by their token, stably and by counting, and each row of the table sums its own stretch of
them. Nothing is scattered: every element of a result belongs to one grid point, and adds up in the order of the positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tinygpt.ir.core import Op, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.registry import Attrs, Axes, Axis, Box, Example, GraphBuilder, GraphOp, RowOp, named, register, token_example
from tinygpt.ir.tile import Position, Readers, TileBuilder, Writers
from tinygpt.ir.types import Dim, TensorType

# Steps of a one-layer model in C++ on two cores, with sums in place of the product: at a vocabulary of 512 they take 0.97 of
# the time (width 256, 512 positions) to 1.02 (width 64, 4096 positions), at 1024 0.93 to 0.95, at 50,304 0.77.
SMALL_VOCABULARY = 512
MOST_POSITIONS = 1 << 24  # that are counted in float32 without rounding


@register
class Embedding(RowOp):
    """table[tokens]: [...] of i32 and [V, C] -> [..., C]. Tokens are checked against V by the host.

    With `first`, the table is a part of a larger one, from row `first` on; tokens that lie elsewhere give rows of zeros."""

    name = "embedding"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        tokens, table = types
        if tokens.dtype != "i32" or table.rank != 2:
            raise ValueError(f"takes i32 tokens and a table with two axes, not {tokens} and {table}")
        return (TensorType(table.dtype, (*tokens.shape, table.shape[1])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        tokens, table = operands
        if "first" not in attrs:
            return (table[tokens],)
        here = tokens - attrs["first"]
        inside = (here >= 0) & (here < len(table))
        return (np.where(inside[..., None], table[np.where(inside, here, 0)], np.zeros((), table.dtype)),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        if grads[0] is None:
            return [None, None]
        tokens, table = op.operands
        count, (vocabulary, width), first = tokens.type.size, table.type.shape, op.attrs.get("first", 0)
        positions, dy = g("reshape", tokens, shape=(count,)), g("reshape", grads[0], shape=(count, width))
        if vocabulary <= SMALL_VOCABULARY:
            return [None, g("embedding_grad", positions, dy, vocabulary=vocabulary, **op.attrs)]
        order = g("inverse_permutation", g("stable_ranks", positions))
        starts = g("segment_starts", positions, vocabulary=first + vocabulary)
        return [None, g("segment_sum", dy, order, starts, first=first, rows=vocabulary)]

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        lead = tuple(Axis(f"r{i}") for i in range(types[0].rank))
        return [lead, named("v c")], [(*lead, Axis("c"))]

    def stretch(self, g: GraphBuilder, op: Op, operands: Sequence[Value | None], box: Box) -> Sequence[Value]:
        return super().stretch(g, replace(op, attrs=_from_row(op, box)), operands, box)

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        tokens, table = read
        (v, width), first, token = table.type.shape, op.attrs.get("first"), tokens(*lead, rows=i)
        c = k.axis("c", width)
        if first is None:
            return [table.gather(token, c)]
        here = k.pointwise("sub", token, k.fill(first, dtype="i32"))
        near = k.pointwise("min", k.pointwise("max", here, k.fill(0, dtype="i32")), k.fill(v - 1, dtype="i32"))
        return [k.pointwise("where", k.pointwise("eq", here, near), table.gather(near, c), k.fill(0.0))]

    def examples(self) -> Sequence[Example]:
        found = []
        for m, v, c in ((5, 12, 6), (70, 33, 20), (9, SMALL_VOCABULARY + 1, 3)):
            types = (TensorType("i32", (m,)), TensorType("f32", (v, c)))
            found += [token_example(types, v), token_example(types, 2 * v, {"first": v // 2})]
        return found


def _from_row(op: Op, box: Box) -> Attrs:
    """An op's attributes when its table is cut to some rows."""
    return {**op.attrs, "first": op.attrs.get("first", 0) + box["v"][0]} if "v" in box else dict(op.attrs)


@register
class EmbeddingGrad(GraphOp):
    """Gradient of embedding with respect to a small table: row v is the sum of the rows of dy whose token is v.

    With `first`, row v is that of token first + v, and tokens that have no row are in no sum. The tile program is a product with
    the one-hot matrix of the tokens, which is never stored as a whole."""

    name = "embedding_grad"
    pattern = "contraction"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        tokens, dy = types
        if tokens.rank != 1 or dy.rank != 2 or tokens.shape[0] != dy.shape[0]:
            raise ValueError(f"tokens {tokens} do not fit gradients {dy}")
        parts = attrs.get("parts", 1)
        if dy.shape[0] % parts:
            raise ValueError(f"gradients {dy} have no {parts} equal parts")
        return (TensorType(dy.dtype, (*([parts] if parts > 1 else []), attrs["vocabulary"], dy.shape[1])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        tokens, dy = operands
        parts, here = attrs.get("parts", 1), tokens - attrs.get("first", 0)
        inside = (here >= 0) & (here < attrs["vocabulary"])
        table = np.zeros((parts, attrs["vocabulary"], dy.shape[1]), np.float64)
        np.add.at(table, (np.repeat(np.arange(parts), len(tokens) // parts)[inside], here[inside]), dy[inside])
        return ((table if parts > 1 else table[0]).astype(dy.dtype),)

    def terms(self, types: Sequence[TensorType]) -> int:
        return types[0].size

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        return ([named("m"), named("m c")], [named("v c")]) if attrs.get("parts", 1) == 1 else ([(None,), named("_ c")], [named("_ v c")])

    def stretch(self, g: GraphBuilder, op: Op, operands: Sequence[Value | None], box: Box) -> Sequence[Value]:
        start, stop = box.get("v", (0, op.attrs["vocabulary"]))
        return super().stretch(g, replace(op, attrs={**_from_row(op, box), "vocabulary": stop - start}), operands, box)

    def tiles(self, k: TileBuilder, op: Op, read: Readers, write: Writers) -> None:
        tokens, dy = read
        vocabulary, (inner, columns) = op.attrs["vocabulary"], dy.type.shape
        block_rows, block_columns, block_inner = k.order["tile"]
        parts, offset = op.attrs.get("parts", 1), op.attrs.get("first", 0)
        extent = inner // parts
        block_inner = block_inner if extent % block_inner == 0 or parts == 1 else extent  # no block lies in two parts
        part = [k.grid(parts)] if parts > 1 else []
        first = sum((p * extent for p in part), Index.of(0))
        column_block = k.grid(ceil_div(columns, block_columns))
        row_block = k.grid(ceil_div(vocabulary, block_rows))
        i = k.dim("i", row_block * block_rows, block_rows, vocabulary)
        j = k.dim("j", column_block * block_columns, block_columns, columns)

        def body(n: Index, acc: Value) -> list[Value]:
            m = k.dim("k", first + n * block_inner, block_inner, inner)
            row = k.pointwise("add", k.iota(i, 0), k.fill(offset, dtype="i32")) if offset else k.iota(i, 0)
            hit = k.pointwise("eq", row, tokens(m, cols=m))
            return [k.dot(acc, k.pointwise("where", hit, k.fill(1.0), k.fill(0.0)), dy(m, j, rows=m, cols=j))]

        (acc,) = k.loop(0, ceil_div(extent, block_inner), [k.fill(0.0, i, j)], body)
        write[0](acc, *part, i, j, rows=i, cols=j)

    def examples(self) -> Sequence[Example]:
        found = []
        for m, v, c in ((5, 12, 6), (70, 33, 20)):
            types = (TensorType("i32", (m,)), TensorType("f32", (m, c)))
            found += [token_example(types, v, {"vocabulary": v}), token_example(types, 2 * v, {"vocabulary": v, "first": v // 2})]
        split = (TensorType("i32", (12,)), TensorType("f32", (12, 6)))
        return [*found, token_example(split, 9, {"vocabulary": 9, "parts": 2})]


class Counting(GraphOp):
    """An op whose element i is a count over all positions; `term` is what position c adds to it, 0 or a whole number."""

    pattern = "counting"

    def term(self, k: TileBuilder, i: Dim, c: Dim, read: Readers) -> Value:
        """The terms of elements i from positions c, an f32 tile <i, c>."""
        raise CompilerBug(f"{self.name} does not say what it counts")

    def tiles(self, k: TileBuilder, op: Op, read: Readers, write: Writers) -> None:
        positions, (count,) = read[0].type.size, write[0].type.shape
        block_rows, block_columns = k.order["tile"]
        i = k.dim("i", k.grid(ceil_div(count, block_rows)) * block_rows, block_rows, count)

        def body(n: Index, total: Value) -> list[Value]:
            c = k.dim("c", n * block_columns, block_columns, positions)
            return [k.add(total, k.reduce("sum", self.term(k, i, c, read), 1))]

        (total,) = k.loop(0, ceil_div(positions, block_columns), [k.fill(0.0, i)], body)
        write[0](k.pointwise("cast", total, dtype="i32"), i, rows=i)


def one_of_positions(type: TensorType, what: str) -> int:
    """How many positions an i32 vector holds. Raises ValueError if it is none, or too long to be counted in float32."""
    if type.dtype != "i32" or type.rank != 1 or type.size > MOST_POSITIONS:
        raise ValueError(f"takes {what} of at most {MOST_POSITIONS} positions, i32, not {type}")
    return type.size


@register
class StableRanks(Counting):
    """Where each position comes when they are sorted by token, equal tokens in the order of their positions: [M] -> [M]."""

    name = "stable_ranks"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        return (TensorType("i32", (one_of_positions(types[0], "tokens"),)),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (np.argsort(np.argsort(operands[0], kind="stable")).astype(np.int32),)

    def term(self, k: TileBuilder, i: Dim, c: Dim, read: Readers) -> Value:
        """Whether c comes before i: it has a smaller token, or the same one and is an earlier position."""
        own, other = read[0](i, rows=i), read[0](c, cols=c)
        earlier = k.pointwise("lt", k.iota(c, 1), k.iota(i, 0))
        least = k.pointwise("where", earlier, k.add(own, k.fill(1, dtype="i32")), own)
        return k.pointwise("where", k.pointwise("lt", other, least), k.fill(1.0), k.fill(0.0))

    def examples(self) -> Sequence[Example]:
        return [token_example([TensorType("i32", (m,))], v) for m, v in ((5, 12), (70, 7), (33, 1))]


@register
class InversePermutation(Counting):
    """The element i that has number r, for each r: [M] -> [M]. Of ranks, which position has which rank."""

    name = "inverse_permutation"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        return (TensorType("i32", (one_of_positions(types[0], "a permutation"),)),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (np.argsort(operands[0], kind="stable").astype(np.int32),)

    def term(self, k: TileBuilder, i: Dim, c: Dim, read: Readers) -> Value:
        """c itself, where it has number i."""
        hit = k.pointwise("eq", read[0](c, cols=c), k.iota(i, 0))
        return k.pointwise("where", hit, k.pointwise("cast", k.iota(c, 1), dtype="f32"), k.fill(0.0))

    def examples(self) -> Sequence[Example]:
        def drawn(m: int) -> Example:
            return Example((TensorType("i32", (m,)),), {}, lambda rng: [rng.permutation(m).astype(np.int32)])

        return [drawn(5), drawn(70)]


@register
class SegmentStarts(Counting):
    """Where in the sorted order each token's positions start, and behind the last one end: [M] -> [vocabulary + 1]."""

    name = "segment_starts"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        one_of_positions(types[0], "tokens")
        return (TensorType("i32", (attrs["vocabulary"] + 1,)),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (np.searchsorted(np.sort(operands[0]), np.arange(attrs["vocabulary"] + 1)).astype(np.int32),)

    def term(self, k: TileBuilder, i: Dim, c: Dim, read: Readers) -> Value:
        """Whether the token at c is smaller than i."""
        return k.pointwise("where", k.pointwise("lt", read[0](c, cols=c), k.iota(i, 0)), k.fill(1.0), k.fill(0.0))

    def examples(self) -> Sequence[Example]:
        return [token_example([TensorType("i32", (m,))], v, {"vocabulary": v}) for m, v in ((5, 12), (70, 33))]


@register
class SegmentSum(GraphOp):
    """Row v, of token first + v, is the sum of dy[order[r]] for r from starts[first + v] to starts[first + v + 1], in that order.

    One sort so serves any pieces of a vocabulary: order is [M], starts [vocabulary + 1], dy [M, C], the result [rows, C]."""

    name = "segment_sum"
    pattern = "segments"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        dy, order, starts = types
        if dy.rank != 2 or order != TensorType("i32", dy.shape[:1]) or starts.dtype != "i32" or starts.rank != 1:
            raise ValueError(f"order {order} and starts {starts} do not fit rows {dy}")
        first, rows = attrs["first"], attrs["rows"]
        if first < 0 or rows < 1 or first + rows >= starts.size:
            raise ValueError(f"tokens {first} to {first + rows} are not all among {starts.size - 1}")
        return (TensorType(dy.dtype, (rows, dy.shape[1])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        dy, order, starts = operands
        ends = starts[attrs["first"] : attrs["first"] + attrs["rows"] + 1]
        table = np.zeros((attrs["rows"], dy.shape[1]), np.float64)
        np.add.at(table, np.repeat(np.arange(attrs["rows"]), np.diff(ends)), dy[order[ends[0] : ends[-1]]])
        return (table.astype(dy.dtype),)

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        return [named("_ c"), named("_"), named("_")], [named("v c")]

    def stretch(self, g: GraphBuilder, op: Op, operands: Sequence[Value | None], box: Box) -> Sequence[Value]:
        start, stop = box.get("v", (0, op.attrs["rows"]))
        return super().stretch(g, replace(op, attrs={**_from_row(op, box), "rows": stop - start}), operands, box)

    def tiles(self, k: TileBuilder, op: Op, read: Readers, write: Writers) -> None:
        dy, order, starts = read
        (count, columns), first = dy.type.shape, op.attrs["first"]
        block = k.order["tile"][1]
        j = k.dim("j", k.grid(ceil_div(columns, block)) * block, block, columns)
        row = k.grid(op.attrs["rows"])
        low, high = (k.bind(starts(row + first + n), 0, count) for n in (0, 1))

        def body(r: Index, total: Value) -> list[Value]:
            return [k.add(total, dy(k.bind(order(r), 0, count - 1), j, cols=j))]

        (total,) = k.loop(low, high, [k.fill(0.0, None, j)], body)
        write[0](total, row, j, cols=j)

    def examples(self) -> Sequence[Example]:
        """Tokens that occur often and never, the whole vocabulary and a piece of it."""

        def drawn(m: int, v: int, c: int, first: int, rows: int) -> Example:
            def inputs(rng: np.random.Generator) -> list[np.ndarray]:
                tokens = rng.integers(0, max(1, v - 2), m)
                order, starts = np.argsort(tokens, kind="stable"), np.searchsorted(np.sort(tokens), np.arange(v + 1))
                return [rng.standard_normal((m, c)).astype(np.float32), order.astype(np.int32), starts.astype(np.int32)]

            types = (TensorType("f32", (m, c)), TensorType("i32", (m,)), TensorType("i32", (v + 1,)))
            return Example(types, {"first": first, "rows": rows}, inputs)

        return [drawn(5, 12, 6, 0, 12), drawn(70, 33, 20, 0, 33), drawn(70, 9, 8, 3, 5), drawn(40, 1, 7, 0, 1)]
