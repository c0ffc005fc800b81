"""embedding: rows of a table picked by tokens, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinygpt.ir.core import Op, Value
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.registry import Attrs, Example, GraphBuilder, GraphOp, RowOp, register, token_example
from tinygpt.ir.tile import Position, Readers, TileBuilder, Writers
from tinygpt.ir.types import Dim, TensorType


@register
class Embedding(RowOp):
    """table[tokens]: [...] of i32 and [V, C] -> [..., C]. Tokens are checked against V by the host."""

    name = "embedding"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        tokens, table = types
        if tokens.dtype != "i32" or table.rank != 2:
            raise ValueError(f"takes i32 tokens and a table with two axes, not {tokens} and {table}")
        return (TensorType(table.dtype, (*tokens.shape, table.shape[1])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (operands[1][operands[0]],)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        if grads[0] is None:
            return [None, None]
        tokens, table = op.operands
        count, width = tokens.type.size, table.type.shape[1]
        flat = g("reshape", tokens, shape=(count,)), g("reshape", grads[0], shape=(count, width))
        return [None, g("embedding_grad", *flat, vocabulary=table.type.shape[0])]

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        tokens, table = read
        c = k.axis("c", table.type.shape[1])
        return [table.gather(tokens(*lead, rows=i), c)]

    def examples(self) -> Sequence[Example]:
        found = []
        for m, v, c in ((5, 12, 6), (70, 33, 20)):
            types = (TensorType("i32", (m,)), TensorType("f32", (v, c)))
            found.append(token_example(types, v))
        return found


@register
class EmbeddingGrad(GraphOp):
    """Gradient of embedding with respect to the table: row v is the sum of the rows of dy whose token is v.

    The tile program is a product with the one-hot matrix of the tokens, which is never stored as a whole."""

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
        parts = attrs.get("parts", 1)
        table = np.zeros((parts, attrs["vocabulary"], dy.shape[1]), np.float64)
        np.add.at(table, (np.repeat(np.arange(parts), len(tokens) // parts), tokens), dy)
        return ((table if parts > 1 else table[0]).astype(dy.dtype),)

    def terms(self, types: Sequence[TensorType]) -> int:
        return types[0].size

    def tiles(self, k: TileBuilder, op: Op, read: Readers, write: Writers) -> None:
        tokens, dy = read
        vocabulary, (inner, columns) = op.attrs["vocabulary"], dy.type.shape
        block_rows, block_columns, block_inner = k.order["tile"]
        parts = op.attrs.get("parts", 1)
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
            hit = k.pointwise("eq", k.iota(i, 0), tokens(m, cols=m))
            return [k.dot(acc, k.pointwise("where", hit, k.fill(1.0), k.fill(0.0)), dy(m, j, rows=m, cols=j))]

        (acc,) = k.loop(0, ceil_div(extent, block_inner), [k.fill(0.0, i, j)], body)
        write[0](acc, *part, i, j, rows=i, cols=j)

    def examples(self) -> Sequence[Example]:
        found = []
        for m, v, c in ((5, 12, 6), (70, 33, 20)):
            types = (TensorType("i32", (m,)), TensorType("f32", (m, c)))
            found.append(token_example(types, v, {"vocabulary": v}))
        split = (TensorType("i32", (12,)), TensorType("f32", (12, 6)))
        return [*found, token_example(split, 9, {"vocabulary": 9, "parts": 2})]
