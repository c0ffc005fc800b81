"""Causal attention by FlashAttention-2 (Dao 2023): forward, and backward from the saved log-sum-exp. No T x T buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import ClassVar

import numpy as np

from tinygpt.ir.core import Op, Value
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.registry import Attrs, Axes, Axis, Example, GraphBuilder, GraphOp, register
from tinygpt.ir.tile import MASKED_SCORE, Position, Reader, Readers, TileBuilder, Writers
from tinygpt.ir.types import Dim, TensorType


def _scores(q: np.ndarray, k: np.ndarray, attrs: Attrs) -> np.ndarray:
    s: np.ndarray = q @ k.swapaxes(-1, -2) * attrs["scale"]
    if attrs["causal"]:
        s = np.where(np.tril(np.ones(s.shape[-2:], bool)), s, MASKED_SCORE)
    return s


def _checked(types: Sequence[TensorType]) -> TensorType:
    q, k, v = types[:3]
    if q.rank != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(f"takes q, k, v of one shape [batch, heads, context, width], not {q}, {k}, {v}")
    return q


class AttentionOp(GraphOp):
    """What the three attention kernels share: one program per block of one axis of the score matrix of one head."""

    pattern = "attention"

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        """Batch and heads, without dropout: what is dropped depends on their numbers."""
        results = self.infer(types, attrs)
        if "dropout" in attrs:
            return super().axes(types, attrs)

        def heads(t: TensorType) -> Axes:
            return (Axis("b"), Axis("h"), *(None,) * (t.rank - 2))

        return [heads(t) for t in types], [heads(t) for t in results]

    def keep(self, k: TileBuilder, op: Op, key: Reader | None, lead: tuple[Index, Index], rows: Dim, cols: Dim, queries: int) -> Value | None:
        """The dropout multiplier of a tile of probabilities: a function of the logical index (b, h, query, key)."""
        if key is None:
            return None
        b, h = lead
        _, heads, context, _ = op.operands[0].type.shape
        i, j = (k.iota(rows, 0), k.iota(cols, 1)) if queries == 0 else (k.iota(cols, 1), k.iota(rows, 0))
        head = k.position((b * heads + h) * context)
        row = k.pointwise("add", head, i)
        index = k.pointwise("add", k.pointwise("mul", row, k.fill(context, dtype="i32")), j)
        counter = k.pointwise("cast", index, dtype="u32")
        bits = k.pointwise("random_bits", key(0), key(1), counter, k.fill(op.attrs["stream"], dtype="u32"))
        return k.pointwise("bits_keep", bits, k.fill(op.attrs["dropout"]))


def _keep_mask(q: np.ndarray, key: Sequence[np.ndarray], attrs: Attrs) -> np.ndarray | float:
    """The dropout multipliers [B, H, T, T] of the interpreter; 1 without dropout."""
    if not key:
        return 1.0
    from tinygpt.ir.ops import OPS

    b, h, t, _ = q.shape
    index = np.arange(b * h * t * t, dtype=np.uint32).reshape(b, h, t, t)
    (bits,) = OPS["random_bits"].evaluate([key[0][0], key[0][1], index, np.asarray(attrs["stream"], np.uint32)], {})
    return OPS["bits_keep"].evaluate([bits, np.asarray(attrs["dropout"], np.float32)], {})[0]


@register
class Attention(AttentionOp):
    """softmax(q kᵀ * scale, causal) v for q, k, v [B, H, T, D]: out [B, H, T, D] and log-sum-exp [B, H, T].

    With a fourth operand, a u32[2] key, probabilities are dropped out (attributes dropout, stream)."""

    name = "attention"

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        q = _checked(types)
        return (q, TensorType(q.dtype, q.shape[:3]))

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        q, k, v, *key = operands
        s = _scores(q, k, attrs)
        top = s.max(-1)
        lse = top + np.log(np.exp(s - top[..., None]).sum(-1))
        p = np.exp(s - lse[..., None]) * _keep_mask(q, key, attrs)
        return ((p @ v).astype(q.dtype), lse)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        if grads[0] is None:
            return [None] * len(op.operands)
        (q, k, v, *key), (out, lse), dout = op.operands, op.results, grads[0]
        if key:  # which takes the buffer that delta would be left in
            delta = g("sum_rows", g("mul", dout, out))
            dq = g("attention_grad_q", q, k, v, dout, lse, delta, *key, **op.attrs)
        else:
            dq, delta = g.emit("attention_grad_q", q, k, v, dout, lse, out, **op.attrs).results
        dk, dv = g.emit("attention_grad_kv", q, k, v, dout, lse, delta, *key, **op.attrs).results
        return [dq, dk, dv, *(None for _ in key)]

    def tiles(self, k: TileBuilder, op: Op, read: Readers, write: Writers) -> None:
        (q, key, value, *drop), (batch, heads, context, width) = read, read[0].type.shape
        block_q, block_k = k.order["tile"]
        b, h = k.grid(batch), k.grid(heads)
        blocks = ceil_div(context, block_q)
        first = (blocks - 1 - k.grid(blocks)) * block_q  # long rows first, so that threads end together
        i, d = k.dim("i", first, block_q, context), k.axis("d", width)
        queries = q(b, h, i, d, rows=i, cols=d)

        def block(masked: bool) -> Callable[..., list[Value]]:
            def body(n: Index, top: Value, total: Value, acc: Value) -> list[Value]:
                j = k.dim("j", n * block_k, block_k, context)
                s = k.mul(k.dot(k.fill(0.0, i, j), queries, key(b, h, j, d, rows=d, cols=j)), op.attrs["scale"])
                if masked:
                    s = k.pointwise("where", k.pointwise("ge", k.iota(i, 0), k.iota(j, 1)), s, k.fill(MASKED_SCORE))
                higher = k.pointwise("max", top, k.reduce("max", s, 1))
                shrink = k.pointwise("exp", k.sub(top, higher))
                p = k.pointwise("exp", k.sub(s, higher))
                total = k.add(k.mul(total, shrink), k.reduce("sum", p, 1))
                keep = self.keep(k, op, drop[0] if drop else None, (b, h), i, j, 0)
                if keep is not None:
                    p = k.mul(p, keep)
                return [higher, total, k.dot(k.mul(acc, shrink), p, value(b, h, j, d, rows=j, cols=d))]

            return body

        carried = [k.fill(MASKED_SCORE, i, None), k.fill(0.0, i, None), k.fill(0.0, i, d)]
        if op.attrs["causal"]:
            diagonal = first // block_k  # blocks of keys before this one lie wholly under the diagonal
            last = (Index.minimum(first + block_q, context) + (block_k - 1)) // block_k
            carried = k.loop(0, diagonal, carried, block(False))
            carried = k.loop(diagonal, last, carried, block(True))
        else:
            carried = k.loop(0, ceil_div(context, block_k), carried, block(False))
        top, total, acc = carried
        write[0](k.div(acc, total), b, h, i, d, rows=i, cols=d)
        write[1](k.add(top, k.pointwise("log", total)), b, h, i, rows=i)

    def examples(self) -> Sequence[Example]:
        found = []
        for shape in ((2, 3, 32, 16), (1, 2, 101, 8), (1, 1, 1, 4), (1, 2, 70, 48)):
            q = TensorType("f32", shape)
            found.append(Example((q, q, q), {"causal": True, "scale": shape[3] ** -0.5}))
        return found


class AttentionGrad(AttentionOp):
    """What both backward kernels compute from: q, k, v, dout [B, H, T, D], log-sum-exp [B, H, T], one operand more, and a
    dropout key."""

    forms: ClassVar[tuple[bool, ...]]  # that operand is delta [B, H, T] (True) or the attention's result (False)

    def scores_and_gradients(
        self, operands: Sequence[np.ndarray], delta: np.ndarray, key: Sequence[np.ndarray], attrs: Attrs
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities as they multiply v, and the gradients of the scores, [B, H, T, T] each; delta [B, H, T]."""
        q, k, v, dout, lse = operands
        p = np.exp(_scores(q, k, attrs) - lse[..., None])
        keep = _keep_mask(q, key, attrs)
        return p * keep, p * ((dout @ v.swapaxes(-1, -2)) * keep - delta[..., None]) * attrs["scale"]

    def examples(self) -> Sequence[Example]:
        found = []
        for shape, delta in product(((2, 3, 32, 16), (1, 2, 101, 8), (1, 2, 70, 48)), self.forms):
            q, row = TensorType("f32", shape), TensorType("f32", shape[:3])
            types = (q, q, q, q, row, row if delta else q)
            found.append(Example(types, {"causal": True, "scale": shape[3] ** -0.5}, _saved(shape, delta)))
        return found


def _saved(shape: tuple[int, ...], delta: bool) -> Callable[[np.random.Generator], Sequence[np.ndarray]]:
    """Operands as a forward pass leaves them, last its result or delta: probabilities from an arbitrary log-sum-exp could
    overflow."""

    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        q, k, v, dout = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
        out, lse = Attention().evaluate([q, k, v], {"causal": True, "scale": shape[3] ** -0.5})
        return [q, k, v, dout, lse.astype(np.float32), ((dout * out).sum(-1) if delta else out).astype(np.float32)]

    return draw


@register
class AttentionGradKeysValues(AttentionGrad):
    """dk and dv, from delta [B, H, T] besides: one program per block of keys, over the blocks of queries that see it. Scores
    are computed transposed."""

    name = "attention_grad_kv"
    forms = (True,)

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        q = _checked(types)
        return (q, q)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        q, _, _, dout, _, delta, *key = operands
        p, ds = self.scores_and_gradients(operands[:5], delta, key, attrs)
        return ((ds.swapaxes(-1, -2) @ q).astype(q.dtype), (p.swapaxes(-1, -2) @ dout).astype(q.dtype))

    def tiles(self, k: TileBuilder, op: Op, read: Readers, write: Writers) -> None:
        (q, key, value, dout, lse, delta, *drop), (batch, heads, context, width) = read, read[0].type.shape
        block_k, block_q = k.order["tile"]
        b, h = k.grid(batch), k.grid(heads)
        first = k.grid(ceil_div(context, block_k)) * block_k
        j, d = k.dim("j", first, block_k, context), k.axis("d", width)
        keys, values = key(b, h, j, d, rows=j, cols=d), value(b, h, j, d, rows=j, cols=d)
        scale = op.attrs["scale"]

        def block(masked: bool) -> Callable[..., list[Value]]:
            def body(n: Index, dk: Value, dv: Value) -> list[Value]:
                i = k.dim("i", n * block_q, block_q, context)
                s = k.mul(k.dot(k.fill(0.0, j, i), keys, q(b, h, i, d, rows=d, cols=i)), scale)
                s = k.sub(s, lse(b, h, i, cols=i))
                if masked:
                    s = k.pointwise("where", k.pointwise("ge", k.iota(i, 1), k.iota(j, 0)), s, k.fill(MASKED_SCORE))
                p = k.pointwise("exp", s)
                keep = self.keep(k, op, drop[0] if drop else None, (b, h), j, i, 1)
                dropped = p if keep is None else k.mul(p, keep)
                dv = k.dot(dv, dropped, dout(b, h, i, d, rows=i, cols=d))
                dp = k.dot(k.fill(0.0, j, i), values, dout(b, h, i, d, rows=d, cols=i))
                dp = dp if keep is None else k.mul(dp, keep)
                ds = k.mul(k.mul(p, k.sub(dp, delta(b, h, i, cols=i))), scale)
                return [k.dot(dk, ds, q(b, h, i, d, rows=i, cols=d)), dv]

            return body

        carried = [k.fill(0.0, j, d), k.fill(0.0, j, d)]
        blocks = ceil_div(context, block_q)
        if op.attrs["causal"]:
            clear = Index.minimum((first + (block_k + block_q - 1)) // block_q, blocks)  # from here on no query is masked
            carried = k.loop(first // block_q, clear, carried, block(True))
            carried = k.loop(clear, blocks, carried, block(False))
        else:
            carried = k.loop(0, blocks, carried, block(False))
        for result, out in zip(carried, write, strict=True):
            out(result, b, h, j, d, rows=j, cols=d)


@register
class AttentionGradQueries(AttentionGrad):
    """dq: one program per block of queries, over the blocks of keys it sees. Made from the attention's result, delta
    [B, H, T] comes with it, the row sums of dout * out (FlashAttention-2, algorithm 2, line 4); it may be given instead."""

    name = "attention_grad_q"
    forms = (False, True)

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        q = _checked(types)
        return (q, TensorType(q.dtype, q.shape[:3])) if types[5].rank == 4 else (q,)

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        q, k, _, dout, _, last, *key = operands
        delta = (dout * last).sum(-1) if last.ndim == 4 else last
        _, ds = self.scores_and_gradients(operands[:5], delta, key, attrs)
        return ((ds @ k).astype(q.dtype), delta)[: 1 + (last.ndim == 4)]

    def tiles(self, k: TileBuilder, op: Op, read: Readers, write: Writers) -> None:
        (q, key, value, dout, lse, last, *drop), (batch, heads, context, width) = read, read[0].type.shape
        block_q, block_k = k.order["tile"]
        b, h = k.grid(batch), k.grid(heads)
        blocks = ceil_div(context, block_q)
        first = (blocks - 1 - k.grid(blocks)) * block_q
        i, d = k.dim("i", first, block_q, context), k.axis("d", width)
        queries, dout_i = q(b, h, i, d, rows=i, cols=d), dout(b, h, i, d, rows=i, cols=d)
        lse_i = lse(b, h, i, rows=i)
        if last.type.rank == 3:
            delta = last(b, h, i, rows=i)
        else:
            delta = k.reduce("sum", k.mul(dout_i, last(b, h, i, d, rows=i, cols=d)), 1)
        scale = op.attrs["scale"]

        def block(masked: bool) -> Callable[..., list[Value]]:
            def body(n: Index, dq: Value) -> list[Value]:
                j = k.dim("j", n * block_k, block_k, context)
                s = k.sub(k.mul(k.dot(k.fill(0.0, i, j), queries, key(b, h, j, d, rows=d, cols=j)), scale), lse_i)
                if masked:
                    s = k.pointwise("where", k.pointwise("ge", k.iota(i, 0), k.iota(j, 1)), s, k.fill(MASKED_SCORE))
                dp = k.dot(k.fill(0.0, i, j), dout_i, value(b, h, j, d, rows=d, cols=j))
                keep = self.keep(k, op, drop[0] if drop else None, (b, h), i, j, 0)
                dp = dp if keep is None else k.mul(dp, keep)
                ds = k.mul(k.mul(k.pointwise("exp", s), k.sub(dp, delta)), scale)
                return [k.dot(dq, ds, key(b, h, j, d, rows=j, cols=d))]

            return body

        carried = [k.fill(0.0, i, d)]
        if op.attrs["causal"]:
            diagonal = first // block_k
            last = (Index.minimum(first + block_q, context) + (block_k - 1)) // block_k
            carried = k.loop(0, diagonal, carried, block(False))
            carried = k.loop(diagonal, last, carried, block(True))
        else:
            carried = k.loop(0, ceil_div(context, block_k), carried, block(False))
        write[0](carried[0], b, h, i, d, rows=i, cols=d)
        if len(write) > 1:
            write[1](delta, b, h, i, rows=i)
