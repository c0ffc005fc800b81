"""The training hyper-parameters, in one place. The compiler writes them into the bundle's manifest, where runtimes read
them; nothing else in the project repeats these numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingDefaults:
    """AdamW (Loshchilov & Hutter 2019) with clipping by the global norm, constant learning rate.

    `weight_decay` applies to parameters of two or more dimensions only. `clip` bounds the L2 norm over all gradients.
    `batch_size` counts windows a step, the intervals count steps; `validation_fraction` is the tail of the corpus
    kept for evaluation."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    batch_size: int = 16
    max_steps: int = 10_000
    eval_interval: int = 100
    sample_interval: int = 500
    checkpoint_interval: int = 500
    validation_fraction: float = 0.1
    seed: int = 42

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for the manifest."""
        return dataclasses.asdict(self)


TRAINING_DEFAULTS = TrainingDefaults()
