"""matmul: the product the whole model is made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinygpt.ir.core import Op, Value
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.registry import Attrs, Axes, Example, GraphBuilder, GraphOp, named, register
from tinygpt.ir.tile import Position, Readers, TileBuilder, Writers
from tinygpt.ir.types import TensorType


@register
class Matmul(GraphOp):
    """a @ b over the last two axes: [..., m, k] @ [k, n] or [..., m, k] @ [..., k, n] with equal leading axes.

    With `parts`, matrices give [parts, m, n]: the products over that many equal stretches of k, which add up to a @ b."""

    name = "matmul"
    pattern = "contraction"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        a, b = types
        if a.rank < 2 or b.rank < 2:
            raise ValueError(f"operands need two axes, {a} @ {b}")
        if a.shape[-1] != b.shape[-2]:
            raise ValueError(f"inner dims differ, {a} @ {b}")
        if b.rank > 2 and a.shape[:-2] != b.shape[:-2]:
            raise ValueError(f"leading axes differ, {a} @ {b}")
        parts = attrs.get("parts", 1)
        if parts > 1:
            if a.rank != 2 or b.rank != 2 or a.shape[-1] % parts:
                raise ValueError(f"{a} @ {b} has no {parts} equal parts")
            return (TensorType(a.dtype, (parts, a.shape[0], b.shape[1])),)
        return (TensorType(a.dtype, (*a.shape[:-1], b.shape[-1])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        a, b = operands
        parts = attrs.get("parts", 1)
        if parts > 1:
            a, b = a.reshape(a.shape[0], parts, -1).swapaxes(0, 1), b.reshape(parts, -1, b.shape[1])
        return (a @ b,)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        grad, (a, b) = grads[0], op.operands
        if grad is None:
            return [None, None]
        parts = op.attrs.get("parts", 1)
        if parts > 1:
            (m, k), n = a.type.shape, b.type.shape[1]
            a = g("transpose", g("reshape", a, shape=(m, parts, k // parts)), perm=(1, 0, 2))
            b = g("reshape", b, shape=(parts, k // parts, n))
            da, db = g("matmul", grad, _swapped(g, b)), g("matmul", _swapped(g, a), grad)
            return [g("reshape", g("transpose", da, perm=(1, 0, 2)), shape=(m, k)), g("reshape", db, shape=(k, n))]
        da = g("matmul", grad, _swapped(g, b))
        if b.type.rank == 2 and a.type.rank > 2:
            k, n = b.type.shape
            a = g("reshape", a, shape=(a.type.size // k, k))
            grad = g("reshape", grad, shape=(grad.type.size // n, n))
        return [da, g("matmul", _swapped(g, a), grad)]

    def terms(self, types: Sequence[TensorType]) -> int:
        a, b = types
        return a.shape[-1] if a.rank == 2 and b.rank == 2 else 0

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        if attrs.get("parts", 1) > 1:
            return super().axes(types, attrs)
        a, b = types
        lead = " ".join(f"b{i}" for i in range(a.rank - 2))
        return [named(f"{lead} m k"), named(f"{lead if b.rank > 2 else ''} k n")], [named(f"{lead} m n")]

    def tiles(self, k: TileBuilder, op: Op, read: Readers, write: Writers) -> None:
        a, b = read
        *batch, rows, inner = a.type.shape
        columns = b.type.shape[-1]
        block_rows, block_columns, block_inner = k.order["tile"]
        parts = op.attrs.get("parts", 1)
        extent = inner // parts
        block_inner = block_inner if extent % block_inner == 0 or parts == 1 else extent  # no block lies in two parts
        part = [k.grid(parts)] if parts > 1 else []
        first = sum((p * extent for p in part), Index.of(0))
        lead: list[Position] = [k.grid(n) for n in batch]
        column_block = k.grid(ceil_div(columns, block_columns))
        row_block = k.grid(ceil_div(rows, block_rows))
        i = k.dim("i", row_block * block_rows, block_rows, rows)
        j = k.dim("j", column_block * block_columns, block_columns, columns)
        lead_b = lead if len(b.type.shape) > 2 else []

        def body(n: Index, acc: Value) -> list[Value]:
            d = k.dim("k", first + n * block_inner, block_inner, inner)
            return [k.dot(acc, a(*lead, i, d, rows=i, cols=d), b(*lead_b, d, j, rows=d, cols=j))]

        (acc,) = k.loop(0, ceil_div(extent, block_inner), [k.fill(0.0, i, j)], body)
        write[0](acc, *part, *lead, i, j, rows=i, cols=j)

    def examples(self) -> Sequence[Example]:
        shapes = [((5, 7), (7, 9)), ((130, 70), (70, 65)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5))]
        split = Example((TensorType("f32", (5, 12)), TensorType("f32", (12, 7))), {"parts": 3})
        return [*(Example((TensorType("f32", a), TensorType("f32", b))) for a, b in shapes), split]


def _swapped(g: GraphBuilder, x: Value) -> Value:
    rank = x.type.rank
    return g("transpose", x, perm=(*range(rank - 2), rank - 1, rank - 2))
