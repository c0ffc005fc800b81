"""What a training run will take, told before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from tinygpt.runtime.data import Corpus
from tinygpt.runtime.session import Session

_FORWARD_SHARE = 3  # a step is about three times its forward pass: the backward pass has two products for each of its
_TRIALS = 3


@dataclass(frozen=True)
class Estimate:
    """Seconds for steps and evaluations; bytes for weights with their moments, and for everything else."""

    steps: int
    step_seconds: float
    evaluations: int
    evaluation_seconds: float
    state_bytes: int
    work_bytes: int

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds + self.evaluations * self.evaluation_seconds

    def __str__(self) -> str:
        evaluating = (
            f" + {self.evaluations} evaluations x {_duration(self.evaluation_seconds)}" if self.evaluations else ""
        )
        total = self.state_bytes + self.work_bytes
        return (
            f"estimate: {_duration(self.seconds)} ({self.steps:,} steps x {_duration(self.step_seconds)}{evaluating}), "
            f"memory {_size(total)} ({_size(self.state_bytes)} weights and optimizer, "
            f"{_size(self.work_bytes)} activations and gradients)"
        )


def estimate(session: Session, corpus: Corpus, steps: int, eval_every: int) -> Estimate:
    """Time the forward pass on this machine, which changes nothing of the session, and count."""
    manifest = session.manifest
    tokens = np.zeros((manifest.batch, manifest.context), np.uint8)
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        session.loss(tokens, tokens)
        times.append(time.perf_counter() - start)
    forward = min(times)
    left = max(0, steps - session.step)
    evaluations = 0
    if eval_every and left:
        due = steps // eval_every - session.step // eval_every
        evaluations = due + (steps % eval_every != 0) + (session.step == 0)
    passes = 2 * -(-corpus.validation.size // tokens.size)
    pools = dict(manifest.pools)
    state = pools.pop("state", 0)
    return Estimate(left, _FORWARD_SHARE * forward, evaluations, passes * forward, state, sum(pools.values()))


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"
