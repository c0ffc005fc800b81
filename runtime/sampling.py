"""From logits to the next token: temperature, top-k, top-p (nucleus sampling, Holtzman et al. 2020), and a seed.

All arithmetic is float64 on the host, and the draw is a function of (seed, position) alone, so a seed gives the same
sample on every target, up to logits that differ in their last bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinygpt.runtime.errors import DivergedError, UserError
from tinygpt.runtime.threefry import SAMPLING, Key, purpose_key, seed_words, uniform


@dataclass(frozen=True)
class Sampling:
    """How to choose. temperature <= 0 takes the most likely token; top_k = 0 and top_p = 1 keep the whole vocabulary.
    Raises UserError for a value out of range."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature):
            raise UserError(
                f"temperature {self.temperature}: must be a finite number", hint="0 is greedy, 0.8 is usual"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, (int, np.integer)) or self.top_k < 0:
            raise UserError(f"top_k {self.top_k!r}: must be an integer, not negative", hint="0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1", hint="1 keeps every token")
        seed_words(self.seed)

    @property
    def key(self) -> Key:
        return purpose_key(self.seed, SAMPLING)


def probabilities(logits: ArrayLike, sampling: Sampling) -> NDArray[Any]:
    """float64[V]: the distribution the next token is drawn from. Among equal logits the lower id goes first, so top-k
    keeps exactly k. Raises DivergedError if a logit is NaN or +inf."""
    scores = np.asarray(logits, dtype=np.float64)
    peak = scores.max()
    if not np.isfinite(peak):
        raise DivergedError(
            "the model's logits are not finite numbers", hint="use an earlier checkpoint, or train with a lower lr"
        )
    if sampling.temperature <= 0:
        certain = np.zeros(scores.size)
        certain[np.argmax(scores)] = 1.0
        return certain
    weights: NDArray[Any] = np.exp((scores - peak) / sampling.temperature)
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0.0
    weights /= weights.sum()
    if sampling.top_p < 1:
        kept = 1 + int(np.searchsorted(np.cumsum(weights[order]), sampling.top_p, side="left"))
        weights[order[kept:]] = 0.0
        weights /= weights.sum()
    return weights


def sample(logits: ArrayLike, sampling: Sampling, position: int, key: Key | None = None) -> int:
    """Draw the token at `position` of the sequence from logits f32[V]. `key` is `sampling.key`, if already computed."""
    weights = probabilities(logits, sampling)
    cumulated = np.cumsum(weights)
    draw = uniform(key or sampling.key, position) * cumulated[-1]
    # The first id whose cumulated weight exceeds the draw; an id of weight 0 never does so first.
    return min(int(np.searchsorted(cumulated, draw, side="right")), int(np.flatnonzero(weights)[-1]))
