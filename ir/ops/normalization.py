"""Row programs over the last axis: layer_norm, softmax, cross_entropy and their gradients.

A row program computes tiles from tiles for a block of rows, so programs over the same rows fuse into one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinygpt.ir.core import Op, Value
from tinygpt.ir.registry import Attrs, Example, GraphBuilder, RowOp, register, token_example
from tinygpt.ir.tile import Position, Readers, TileBuilder
from tinygpt.ir.types import Dim, TensorType


@register
class LayerNorm(RowOp):
    """Layer normalization over the last axis (Ba et al. 2016): results y, mean and 1/deviation (biased variance)."""

    name = "layer_norm"
    shared = (1, 2)

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        x, weight, bias = types
        if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
            raise ValueError(f"gain {weight} and bias {bias} do not fit the last axis of {x}")
        row = TensorType(x.dtype, x.shape[:-1])
        return (x, row, row)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        x, weight, bias = operands
        mean = x.mean(-1, dtype=np.float64).astype(x.dtype)
        centred = x - mean[..., None]
        rstd = (1 / np.sqrt((centred * centred).mean(-1) + attrs["eps"])).astype(x.dtype)
        return (centred * rstd[..., None] * weight + bias, mean, rstd)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        dy, (x, weight, bias), (_, mean, rstd) = grads[0], op.operands, op.results
        if dy is None:
            return [None, None, None]
        dx = g("layer_norm_grad", dy, x, weight, mean, rstd)
        column = (*mean.type.shape, 1)
        mean, rstd = g("reshape", mean, shape=column), g("reshape", rstd, shape=column)
        normal = g("mul", g("sub", x, mean), rstd)
        return [dx, g.sum_to(g("mul", dy, normal), weight.type.shape), g.sum_to(dy, bias.type.shape)]

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        x, weight, bias = read
        c = k.axis("c", x.type.shape[-1])
        row = x(*lead, c, rows=i, cols=c)
        mean = k.mul(k.reduce("sum", row, 1), 1.0 / c.size)
        centred = k.sub(row, mean)
        variance = k.mul(k.reduce("sum", k.mul(centred, centred), 1), 1.0 / c.size)
        rstd = k.pointwise("rsqrt", k.add(variance, op.attrs["eps"]))
        y = k.add(k.mul(k.mul(centred, rstd), weight(c, cols=c)), bias(c, cols=c))
        return [y, mean, rstd]

    def examples(self) -> Sequence[Example]:
        shapes = [((m, c), (c,), (c,)) for m, c in ((5, 12), (70, 33), (3, 256))]
        return [Example(tuple(TensorType("f32", s) for s in operands), {"eps": 1e-5}) for operands in shapes]


@register
class LayerNormGrad(RowOp):
    """Gradient of layer_norm with respect to its input, from dy, x, gain, mean and 1/deviation."""

    name = "layer_norm_grad"
    shared = (2,)

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        dy, x, weight, mean, rstd = types
        if dy.shape != x.shape or weight.shape != x.shape[-1:] or mean.shape != x.shape[:-1] or rstd.shape != mean.shape:
            raise ValueError(f"operands do not fit: {', '.join(map(str, types))}")
        return (x,)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        dy, x, weight, mean, rstd = operands
        normal = (x - mean[..., None]) * rstd[..., None]
        g = dy * weight
        return ((g - g.mean(-1, keepdims=True) - normal * (g * normal).mean(-1, keepdims=True)) * rstd[..., None],)

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        dy, x, weight, mean, rstd = read
        c = k.axis("c", x.type.shape[-1])
        scale = rstd(*lead, rows=i)
        normal = k.mul(k.sub(x(*lead, c, rows=i, cols=c), mean(*lead, rows=i)), scale)
        g = k.mul(dy(*lead, c, rows=i, cols=c), weight(c, cols=c))
        average = k.mul(k.reduce("sum", g, 1), 1.0 / c.size)
        along = k.mul(k.reduce("sum", k.mul(g, normal), 1), 1.0 / c.size)
        return [k.mul(k.sub(k.sub(g, average), k.mul(normal, along)), scale)]

    def examples(self) -> Sequence[Example]:
        shapes = [((m, c), (m, c), (c,), (m,), (m,)) for m, c in ((5, 12), (70, 33))]
        return [Example(tuple(TensorType("f32", s) for s in operands)) for operands in shapes]


@register
class Softmax(RowOp):
    """exp(x - max) / sum over the last axis."""

    name = "softmax"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        if types[0].rank == 0:
            raise ValueError("a scalar has no axis to normalize over")
        return (types[0],)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        e = np.exp(operands[0] - operands[0].max(-1, keepdims=True))
        return (e / e.sum(-1, keepdims=True),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        return [None if grads[0] is None else g("softmax_grad", grads[0], op.result)]

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        c = k.axis("c", read[0].type.shape[-1])
        x = read[0](*lead, c, rows=i, cols=c)
        e = k.pointwise("exp", k.sub(x, k.reduce("max", x, 1)))
        return [k.div(e, k.reduce("sum", e, 1))]

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", (5, 12)),)), Example((TensorType("f32", (2, 35, 33)),))]


@register
class SoftmaxGrad(RowOp):
    """Gradient of softmax from dy and y: y * (dy - sum(dy * y))."""

    name = "softmax_grad"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        if types[0].shape != types[1].shape:
            raise ValueError(f"shapes differ: {types[0]}, {types[1]}")
        return (types[0],)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        dy, y = operands
        return (y * (dy - (dy * y).sum(-1, keepdims=True)),)

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        c = k.axis("c", read[0].type.shape[-1])
        dy, y = (r(*lead, c, rows=i, cols=c) for r in read)
        return [k.mul(y, k.sub(dy, k.reduce("sum", k.mul(dy, y), 1)))]

    def examples(self) -> Sequence[Example]:
        return [Example((TensorType("f32", (5, 12)), TensorType("f32", (5, 12))))]


@register
class CrossEntropy(RowOp):
    """Cross-entropy of logits [..., vocabulary] against class indices [...]: losses per row and log-sum-exp per row."""

    name = "cross_entropy"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        logits, targets = types
        if targets.shape != logits.shape[:-1] or targets.dtype != "i32":
            raise ValueError(f"targets {targets} do not fit logits {logits}")
        row = TensorType(logits.dtype, targets.shape)
        return (row, row)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        logits, targets = operands
        top = logits.max(-1)
        lse = top + np.log(np.exp(logits - top[..., None]).sum(-1))
        return (lse - np.take_along_axis(logits, targets[..., None].astype(np.int64), -1)[..., 0], lse)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        if grads[0] is None:
            return [None, None]
        return [g("cross_entropy_grad", *op.operands, op.results[1], grads[0]), None]

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        logits, targets = read
        v = k.axis("c", logits.type.shape[-1])
        x = logits(*lead, v, rows=i, cols=v)
        top = k.reduce("max", x, 1)
        total = k.reduce("sum", k.pointwise("exp", k.sub(x, top)), 1)
        lse = k.add(top, k.pointwise("log", total))
        hit = k.pointwise("eq", k.iota(v, 1), targets(*lead, rows=i))
        picked = k.reduce("sum", k.pointwise("where", hit, x, k.fill(0.0)), 1)
        return [k.sub(lse, picked), lse]

    def examples(self) -> Sequence[Example]:
        found = []
        for m, v in ((5, 12), (70, 33)):
            types = (TensorType("f32", (m, v)), TensorType("i32", (m,)))
            found.append(token_example(types, v))
        return found


@register
class CrossEntropyGrad(RowOp):
    """Gradient of cross_entropy: (softmax(logits) - onehot(targets)) * g, from logits, targets, log-sum-exp and g per row."""

    name = "cross_entropy_grad"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        logits, targets, lse, grad = types
        if not targets.shape == lse.shape == grad.shape == logits.shape[:-1]:
            raise ValueError(f"operands do not fit: {', '.join(map(str, types))}")
        return (logits,)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        logits, targets, lse, grad = operands
        p = np.exp(logits - lse[..., None])
        hit = np.arange(logits.shape[-1]) == targets[..., None]
        return ((p - hit) * grad[..., None],)

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        logits, targets, lse, grad = read
        v = k.axis("c", logits.type.shape[-1])
        p = k.pointwise("exp", k.sub(logits(*lead, v, rows=i, cols=v), lse(*lead, rows=i)))
        hit = k.pointwise("eq", k.iota(v, 1), targets(*lead, rows=i))
        return [k.mul(k.sub(p, k.pointwise("where", hit, k.fill(1.0), k.fill(0.0))), grad(*lead, rows=i))]

    def examples(self) -> Sequence[Example]:
        found = []
        for m, v in ((5, 12), (70, 33)):
            row = TensorType("f32", (m,))
            types = (TensorType("f32", (m, v)), TensorType("i32", (m,)), row, row)
            found.append(token_example(types, v))
        return found
