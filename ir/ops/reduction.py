"""sum: reduction over leading or trailing axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from tinygpt.ir.core import Op, Value
from tinygpt.ir.registry import Attrs, Axes, Axis, ColumnOp, Example, GraphBuilder, GraphOp, RowOp, named, register
from tinygpt.ir.tile import Position, Readers, TileBuilder
from tinygpt.ir.types import Dim, TensorType


@register
class Sum(GraphOp):
    """Sum over some axes, which disappear. `simplify` turns it into sum_rows and sum_columns, which have programs."""

    name = "sum"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = types
        if any(not 0 <= a < x.rank for a in attrs["axes"]):
            raise ValueError(f"axes {list(attrs['axes'])} are not all axes of {x}")
        return (TensorType(x.dtype, tuple(n for i, n in enumerate(x.shape) if i not in attrs["axes"])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (operands[0].sum(axis=tuple(attrs["axes"]), dtype=np.float64).astype(operands[0].dtype),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        if grads[0] is None:
            return [None]
        shape = op.operands[0].type.shape
        kept = tuple(1 if i in op.attrs["axes"] else n for i, n in enumerate(shape))
        return [g("broadcast", g("reshape", grads[0], shape=kept), shape=shape)]

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        axes = tuple(Axis(f"a{i}") for i in range(types[0].rank))
        return [axes], [tuple(axis for i, axis in enumerate(axes) if i not in attrs["axes"])]

    def examples(self) -> Sequence[Example]:
        x = TensorType("f32", (3, 4, 5))
        return [Example((x,), {"axes": axes}) for axes in ((0,), (2,), (0, 1), (0, 1, 2))]


@register
class SumRows(RowOp):
    """Sum of each row: [..., C] -> [...]."""

    name = "sum_rows"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        if types[0].rank == 0:
            raise ValueError("a scalar has no rows")
        return (TensorType(types[0].dtype, types[0].shape[:-1]),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (operands[0].sum(-1, dtype=np.float64).astype(operands[0].dtype),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        shape = op.operands[0].type.shape
        return [grads[0] and g("broadcast", g("reshape", grads[0], shape=(*shape[:-1], 1)), shape=shape)]

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        lead = tuple(Axis(f"r{i}") for i in range(types[0].rank - 1))
        return [(*lead, Axis("c"))], [lead]

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        c = k.axis("c", read[0].type.shape[-1])
        return [k.reduce("sum", read[0](*lead, c, rows=i, cols=c), 1)]

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", s),)) for s in ((5, 12), (70, 33), (300,))]


@register
class SumParts(RowOp):
    """Sum of a few matrices, one after another: [parts, M, C] -> [M, C]."""

    name = "sum_parts"

    def space(self, op: Op) -> tuple[int, ...]:
        shape: tuple[int, ...] = op.results[0].type.shape
        return shape

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        if types[0].rank != 3:
            raise ValueError(f"{types[0]} is not a few matrices")
        return (TensorType(types[0].dtype, types[0].shape[1:]),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (operands[0].sum(0, dtype=np.float64).astype(operands[0].dtype),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        shape = op.operands[0].type.shape
        return [grads[0] and g("broadcast", g("reshape", grads[0], shape=(1, *shape[1:])), shape=shape)]

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        return [named("p m c")], [named("m c")]

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        parts, _, columns = read[0].type.shape
        c = k.axis("c", columns)
        total = read[0](0, *lead, c, rows=i, cols=c)
        for part in range(1, parts):
            total = k.add(total, read[0](part, *lead, c, rows=i, cols=c))
        return [total]

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", s),)) for s in ((2, 5, 12), (8, 70, 33))]


@register
class SumColumns(ColumnOp):
    """Sum of each column: [M, C] -> [C]; with `parts` [parts, C], the sums of that many equal stretches of rows."""

    name = "sum_columns"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        if types[0].rank != 2:
            raise ValueError(f"{types[0]} has no rows and columns")
        parts = attrs.get("parts", 1)
        if types[0].shape[0] % parts:
            raise ValueError(f"the rows of {types[0]} have no {parts} equal parts")
        return (TensorType(types[0].dtype, (*([parts] if parts > 1 else []), types[0].shape[1])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        (x,) = operands
        parts = attrs.get("parts", 1)
        x = x.reshape(parts, -1, x.shape[1]) if parts > 1 else x
        return (x.sum(-2, dtype=np.float64).astype(x.dtype),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        parts, (rows, columns) = op.attrs.get("parts", 1), op.operands[0].type.shape
        if grads[0] is None:
            return [None]
        each = g("broadcast", g("reshape", grads[0], shape=(parts, 1, columns)), shape=(parts, rows // parts, columns))
        return [g("reshape", each, shape=(rows, columns))]

    def terms(self, types: Sequence[TensorType]) -> int:
        return types[0].shape[0]

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        return ([named("r c")], [named("c")]) if attrs.get("parts", 1) == 1 else ([named("_ c")], [named("_ c")])

    def column(self, k: TileBuilder, op: Op, i: Dim, j: Dim, read: Readers) -> Value:
        return k.reduce("sum", read[0](i, j, rows=i, cols=j), 0)

    def examples(self) -> Sequence[Example]:
        split = Example((TensorType("f32", (30, 12)),), {"parts": 5})
        return [*(Example((TensorType("f32", s),)) for s in ((5, 12), (70, 33), (300, 130))), split]


def matrix_shape(shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, int] | None:
    """[rows, columns] such that summing leading `axes` of a tensor is summing the rows of that matrix."""
    if tuple(axes) != tuple(range(len(axes))):
        return None
    return prod(shape[: len(axes)]), prod(shape[len(axes) :])
