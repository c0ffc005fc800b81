"""Ops that move no arithmetic: reshape, transpose, slice, concat, broadcast, and the sources constant and iota.

A view op says how its result lies in its operand's storage (`view`) and, for outputs, how its operand would lie in
storage already chosen for the result (`place`), so that the plan turns it into an address instead of a copy."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from tinygpt.ir.core import Op, Value
from tinygpt.ir.registry import Attrs, Axes, Axis, Box, Example, GraphBuilder, GraphOp, broadcast_axes, register
from tinygpt.ir.storage import Strided, reshape_strides
from tinygpt.ir.types import NUMPY_DTYPES, TensorType


class ViewOp(GraphOp):
    """An op whose results are its operand's elements under other indices."""

    kind = "view"

    def view(self, storage: Strided, attrs: Attrs) -> Strided | None:
        """The result's place in its operand's storage; None when no strides describe it (a copy is needed)."""
        return None

    def place(self, storage: Strided, types: Sequence[TensorType], attrs: Attrs) -> list[Strided] | None:
        """Each operand's place in storage chosen for the result; None when there is none."""
        return None


class ShapedOp(GraphOp):
    """An op whose attribute `shape` is the shape of its result."""

    def stretch(self, g: GraphBuilder, op: Op, operands: Sequence[Value | None], box: Box) -> Sequence[Value]:
        _, (axes,) = self.axes([v.type for v in op.operands], dict(op.attrs))
        shape = list(op.attrs["shape"])
        for i, axis in enumerate(axes):
            if axis is not None and axis.range in box:
                start, stop = box[axis.range]
                shape[i] = stop - start
        return g.emit(self.name, *(v for v in operands if v is not None), **{**op.attrs, "shape": tuple(shape)}).results


@register
class Reshape(ShapedOp, ViewOp):
    """The same elements in row-major order under another shape."""

    name = "reshape"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = types
        if prod(attrs["shape"]) != x.size:
            raise ValueError(f"{x} has {x.size} elements, shape {list(attrs['shape'])} has {prod(attrs['shape'])}")
        return (TensorType(x.dtype, tuple(attrs["shape"])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (np.reshape(operands[0], attrs["shape"]),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        return [grads[0] and g("reshape", grads[0], shape=op.operands[0].type.shape)]

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        """Axes that stay as they are: with as many indices, and as many elements before them."""
        before, after = types[0].shape, tuple(attrs["shape"])
        same = {(prod(before[:i]), n) for i, n in enumerate(before)} & {(prod(after[:i]), n) for i, n in enumerate(after)}

        def kept(shape: tuple[int, ...]) -> Axes:
            places = [(prod(shape[:i]), n) for i, n in enumerate(shape)]
            return tuple(Axis(f"a{place[0]}") if place[1] > 1 and place in same else None for place in places)

        return [kept(before)], [kept(after)]

    def view(self, storage: Strided, attrs: Attrs) -> Strided | None:
        return reshape_strides(storage, tuple(attrs["shape"]))

    def place(self, storage: Strided, types: Sequence[TensorType], attrs: Attrs) -> list[Strided] | None:
        placed = reshape_strides(storage, types[0].shape)
        return [placed] if placed else None

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", (4, 6)),), {"shape": (2, 2, 6)}), Example((TensorType("f32", (5,)),), {"shape": (1, 5)})]


@register
class Transpose(ViewOp):
    """Axes in another order: result axis i is operand axis perm[i]."""

    name = "transpose"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = types
        if sorted(attrs["perm"]) != list(range(x.rank)):
            raise ValueError(f"perm {list(attrs['perm'])} does not name the axes of {x}")
        return (TensorType(x.dtype, tuple(x.shape[a] for a in attrs["perm"])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (np.transpose(operands[0], attrs["perm"]),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        return [grads[0] and g("transpose", grads[0], perm=_inverse(op.attrs["perm"]))]

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        axes = tuple(Axis(f"a{i}") for i in range(types[0].rank))
        return [axes], [tuple(axes[i] for i in attrs["perm"])]

    def view(self, storage: Strided, attrs: Attrs) -> Strided | None:
        perm = attrs["perm"]
        return Strided(storage.offset, tuple(storage.shape[a] for a in perm), tuple(storage.strides[a] for a in perm))

    def place(self, storage: Strided, types: Sequence[TensorType], attrs: Attrs) -> list[Strided] | None:
        inverted = self.view(storage, {"perm": _inverse(attrs["perm"])})
        return [inverted] if inverted else None

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", (4, 6)),), {"perm": (1, 0)}), Example((TensorType("f32", (2, 3, 4)),), {"perm": (1, 0, 2)})]


def _inverse(perm: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(perm)), key=lambda i: perm[i]))


@register
class Slice(ViewOp):
    """Elements start..stop of one axis."""

    name = "slice"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = types
        axis, start, stop = attrs["axis"], attrs["start"], attrs["stop"]
        if not (0 <= axis < x.rank and 0 <= start < stop <= x.shape[axis]):
            raise ValueError(f"slice {start}:{stop} of axis {axis} lies outside {x}")
        return (TensorType(x.dtype, (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        index = (slice(None),) * attrs["axis"] + (slice(attrs["start"], attrs["stop"]),)
        return (operands[0][index],)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        if grads[0] is None:
            return [None]
        axis, shape = op.attrs["axis"], op.operands[0].type.shape
        pieces = [grads[0]]
        for count, before in ((op.attrs["start"], True), (shape[axis] - op.attrs["stop"], False)):
            if count:
                zeros = g("broadcast", g.constant(0.0), shape=(*shape[:axis], count, *shape[axis + 1 :]))
                pieces = [zeros, *pieces] if before else [*pieces, zeros]
        return [g("concat", *pieces, axis=axis) if len(pieces) > 1 else pieces[0]]

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        rank = types[0].rank
        return [tuple(Axis(f"a{i}") for i in range(rank))], [tuple(Axis(f"a{i}", attrs["start"] if i == attrs["axis"] else 0) for i in range(rank))]

    def stretch(self, g: GraphBuilder, op: Op, operands: Sequence[Value | None], box: Box) -> Sequence[Value]:
        cut = f"a{op.attrs['axis']}" in box  # then nothing but the stretch is left of the operand
        return [v for v in operands if v is not None] if cut else super().stretch(g, op, operands, box)

    def view(self, storage: Strided, attrs: Attrs) -> Strided | None:
        axis, start, stop = attrs["axis"], attrs["start"], attrs["stop"]
        shape = (*storage.shape[:axis], stop - start, *storage.shape[axis + 1 :])
        return Strided(storage.offset + start * storage.strides[axis], shape, storage.strides)

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", (4, 6)),), {"axis": 1, "start": 2, "stop": 5})]


@register
class Concat(ViewOp):
    """Tensors one after another along an axis."""

    name = "concat"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        axis, first = attrs["axis"], types[0]
        for t in types:
            if t.rank != first.rank or any(a != b for i, (a, b) in enumerate(zip(t.shape, first.shape)) if i != axis):
                raise ValueError(f"shapes differ outside axis {axis}: {', '.join(map(str, types))}")
        return (TensorType(first.dtype, (*first.shape[:axis], sum(t.shape[axis] for t in types), *first.shape[axis + 1 :])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (np.concatenate(operands, axis=attrs["axis"]),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        if grads[0] is None:
            return [None] * len(op.operands)
        found, start, axis = [], 0, op.attrs["axis"]
        for operand in op.operands:
            stop = start + operand.type.shape[axis]
            found.append(g("slice", grads[0], axis=axis, start=start, stop=stop))
            start = stop
        return found

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        rank, start = types[0].rank, 0
        operands: list[Axes] = []
        for t in types:
            operands.append(tuple(Axis(f"a{i}", start if i == attrs["axis"] else 0) for i in range(rank)))
            start += t.shape[attrs["axis"]]
        return operands, [tuple(Axis(f"a{i}") for i in range(rank))]

    def stretch(self, g: GraphBuilder, op: Op, operands: Sequence[Value | None], box: Box) -> Sequence[Value]:
        left = [v for v in operands if v is not None]
        return left if len(left) == 1 else super().stretch(g, op, left, box)

    def place(self, storage: Strided, types: Sequence[TensorType], attrs: Attrs) -> list[Strided] | None:
        axis, start, placed = attrs["axis"], 0, []
        for t in types:
            placed.append(Strided(storage.offset + start * storage.strides[axis], t.shape, storage.strides))
            start += t.shape[axis]
        return placed

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", (4, 6)), TensorType("f32", (4, 3))), {"axis": 1})]


@register
class Broadcast(ShapedOp, ViewOp):
    """Repeat along missing axes and axes of extent one (numpy's rules)."""

    name = "broadcast"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = types
        shape = tuple(attrs["shape"])
        padded = (1,) * (len(shape) - x.rank) + x.shape
        if len(padded) != len(shape) or any(a not in (1, b) for a, b in zip(padded, shape, strict=True)):
            raise ValueError(f"{x} does not broadcast to {list(shape)}")
        return (TensorType(x.dtype, shape),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (np.broadcast_to(operands[0], attrs["shape"]),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        return [g.sum_to(grads[0], op.operands[0].type.shape)]

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        (result,) = self.infer(types, attrs)
        return [broadcast_axes(types[0], result)], [broadcast_axes(result, result)]

    def view(self, storage: Strided, attrs: Attrs) -> Strided | None:
        shape = tuple(attrs["shape"])
        extra = len(shape) - len(storage.shape)
        strides = (0,) * extra + tuple(0 if n == 1 else s for n, s in zip(storage.shape, storage.strides, strict=True))
        return Strided(storage.offset, shape, strides)

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", (4, 1)),), {"shape": (3, 4, 5)})]


class Source(GraphOp):
    """An op without operands, whose value is known from its attributes and index alone."""

    kind = "pointwise"


@register
class Constant(Source):
    """A scalar known when the model is compiled."""

    name = "constant"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        return (TensorType(attrs["dtype"], ()),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        return (np.asarray(attrs["value"], NUMPY_DTYPES[attrs["dtype"]]),)

    def examples(self) -> Sequence[Example]:
        return [Example((), {"value": 1.5, "dtype": "f32"})]


@register
class Iota(ShapedOp, Source):
    """The index along one axis, as i32."""

    name = "iota"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        if not 0 <= attrs["axis"] < len(attrs["shape"]):
            raise ValueError(f"axis {attrs['axis']} is not one of shape {list(attrs['shape'])}")
        return (TensorType("i32", tuple(attrs["shape"])),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        shape, axis = tuple(attrs["shape"]), attrs["axis"]
        index = np.arange(shape[axis], dtype=np.int32).reshape((-1,) + (1,) * (len(shape) - axis - 1))
        return (np.broadcast_to(index, shape),)

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        return [], [tuple(Axis(f"a{i}") for i in range(len(attrs["shape"])))]

    def stretch(self, g: GraphBuilder, op: Op, operands: Sequence[Value | None], box: Box) -> Sequence[Value]:
        found = super().stretch(g, op, operands, box)
        first, _ = box.get(f"a{op.attrs['axis']}", (0, 0))
        return [g("add", found[0], g.constant(first, "i32"))] if first else found

    def examples(self) -> Sequence[Example]:
        return [Example((), {"axis": 1, "shape": (3, 4)})]


@register
class Pack(ViewOp):
    """Tensors laid flat into one array of `size` elements at `offsets`; zero between them."""

    name = "pack"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        offsets = attrs["offsets"]
        ends = [o + t.size for o, t in zip(offsets, types, strict=True)]
        if any(end > start for end, start in zip(ends, [*offsets[1:], attrs["size"]], strict=True)):
            raise ValueError("pieces overlap or do not fit")
        return (TensorType(types[0].dtype, (attrs["size"],)),)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        flat = np.zeros(attrs["size"], operands[0].dtype)
        for offset, x in zip(attrs["offsets"], operands, strict=True):
            flat[offset : offset + x.size] = x.reshape(-1)
        return (flat,)

    def place(self, storage: Strided, types: Sequence[TensorType], attrs: Attrs) -> list[Strided] | None:
        if not storage.is_dense:
            return None
        return [Strided.dense(t.shape, storage.offset + o) for o, t in zip(attrs["offsets"], types, strict=True)]

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", (2, 3)), TensorType("f32", (4,))), {"offsets": (0, 8), "size": 16})]
