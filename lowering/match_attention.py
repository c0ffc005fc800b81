"""Attention spelled out (scores, mask, softmax, product with v), recognised while a model is captured.

`lowering.aten` calls `match` where it meets `softmax(...) @ v`. Masks are known then as concrete tensors, whatever
made them (a tril buffer, arange comparisons, additive -inf), so that "is it causal" is a comparison, not a pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tinygpt.ir.core import Op, Value

if TYPE_CHECKING:
    from tinygpt.lowering.aten_builder import AtenBuilder

# Scores at or below this count as masked out: GPT-2 ports fill with -1e4, others with -1e9, -1e10 or -inf.
MASKED = -1e4


@dataclass(frozen=True)
class Chain:
    """What lies between a product q kᵀ and the softmax of it: `source` is the value reached so far, going back."""

    source: Value
    scale: float = 1.0
    allowed: torch.Tensor | None = None

    def scaled(self, source: Value, factor: float) -> Chain:
        return replace(self, source=source, scale=self.scale * factor)

    def masked(self, source: Value, allowed: torch.Tensor) -> Chain:
        return replace(self, source=source, allowed=allowed if self.allowed is None else self.allowed & allowed)


def match(g: AtenBuilder, probabilities: Value, v: Value) -> Value | None:
    """`attention(q, k, v)` equal to probabilities @ v, or None if what is behind them is something else."""
    key: tuple[Value, ...] = ()
    attrs: dict[str, Any] = {}
    if probabilities in g.dropped:
        probabilities, drop, stream = g.dropped[probabilities]
        key, attrs = (g.random_key,), {"dropout": drop, "stream": stream}
    softmax = g.producer.get(probabilities)
    if softmax is None or softmax.name != "softmax":
        return None
    chain = Chain(softmax.operands[0])
    while (op := g.producer.get(chain.source)) is not None and op.name != "matmul":
        found = _through_scale(g, chain, op) or _through_mask(g, chain, op)
        if found is None:
            return None
        chain = found
    if op is None:
        return None
    q, before = _unscaled(g, op.operands[0])
    k, behind = _unscaled(g, g.swap_last_axes(op.operands[1]))
    causal = is_causal(chain.allowed, q.type.shape[-2])
    if causal is None or not q.type.shape == k.type.shape == v.type.shape:
        return None
    return attention(g, (q, k, v), key, causal=causal, scale=chain.scale * before * behind, **attrs)


def attention(g: AtenBuilder, qkv: tuple[Value, Value, Value], key: tuple[Value, ...], **attrs: Any) -> Value:
    """The op over q, k, v [..., T, D] of one shape; it wants exactly two axes, batch and head, in front."""
    shape = qkv[0].type.shape
    folded = shape if len(shape) == 4 else (math.prod(shape[:-2]), 1, *shape[-2:])
    return g.reshape(g("attention", *(g.reshape(x, folded) for x in qkv), *key, **attrs), shape)


def is_causal(allowed: torch.Tensor | None, context: int) -> bool | None:
    """Whether a mask (True: may look) is the causal one (True) or no mask at all (False); None if it is neither."""
    if allowed is None or bool(allowed.all()):
        return False
    if tuple(allowed.shape[-2:]) != (context, context):
        return None
    causal = torch.ones(context, context, dtype=torch.bool).tril()
    return True if bool((allowed == causal).all()) else None


def allowed_by(mask: torch.Tensor) -> torch.Tensor | None:
    """Which scores a mask lets through: a boolean one itself, an additive one where it is 0 (elsewhere: MASKED)."""
    if mask.dtype == torch.bool:
        return mask
    return mask == 0 if bool(((mask == 0) | (mask <= MASKED)).all()) else None


def _unscaled(g: AtenBuilder, x: Value) -> tuple[Value, float]:
    """x without the numbers it was multiplied by, and their product."""
    chain = Chain(x)
    while (op := g.producer.get(chain.source)) is not None and (found := _through_scale(g, chain, op)) is not None:
        chain = found
    return chain.source, chain.scale


def _through_scale(g: AtenBuilder, chain: Chain, op: Op) -> Chain | None:
    """Past a product with, or a quotient by, a positive number."""
    if op.name == "mul":
        for source, factor in (op.operands, op.operands[::-1]):
            number = g.number(factor)
            if number is not None and number > 0:
                return chain.scaled(source, number)
    if op.name == "div":
        number = g.number(op.operands[1])
        if number is not None and number > 0:
            return chain.scaled(op.operands[0], 1 / number)
    return None


def _through_mask(g: AtenBuilder, chain: Chain, op: Op) -> Chain | None:
    """Past a fill where a known condition holds, or the addition (subtraction) of a known mask."""
    if op.name == "where" and op.operands[0] in g.known:
        condition = g.known[op.operands[0]]
        _, inside, outside = op.operands
        for fill, source, allowed in ((inside, outside, ~condition), (outside, inside, condition)):
            number = g.number(fill)
            if number is not None and number <= MASKED:
                return chain.masked(source, allowed)
    if op.name in ("add", "sub"):
        for source, addend in (op.operands, op.operands[::-1])[: 1 if op.name == "sub" else 2]:
            mask = g.known.get(addend)
            let_through = None if mask is None else allowed_by(mask if op.name == "add" else -mask)
            if let_through is not None:
                return chain.masked(source, let_through)
    return None
