"""`tinygpt parity`: the same model trained by PyTorch and by a bundle, from the same weights on the same batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinygpt.config import ModelConfig
from tinygpt.ir.errors import UserError
from tinygpt.runtime.data import Corpus, gather
from tinygpt.runtime.session import Session

ZERO_GRADIENT = "k_proj.bias"  # softmax does not see what a key's bias adds: compared absolutely


@dataclass(frozen=True)
class Parity:
    """How far a bundle is from PyTorch: over all steps the losses, at the initial weights the gradients (relative to
    each tensor's largest element), after the last step the weights."""

    config: str
    target: str
    steps: int
    max_loss_diff: float
    max_grad_err: float
    worst_gradient: str
    max_weight_diff: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def require_repeatable(name: str, config: Mapping[str, Any] | None) -> None:
    """Raise UserError for a model that PyTorch cannot follow step by step."""
    if config is None or config.get("dropout"):
        why = "drops out at random" if config else "was captured from a module of its own"
        hint = "compare a preset or a JSON config with dropout 0"
        raise UserError(f"parity: {name} {why}, so PyTorch cannot repeat it", hint=hint)


def parity(session: Session, corpus: Corpus, steps: int) -> Parity:
    """Train both for `steps` steps. Raises UserError for a bundle that PyTorch cannot follow."""
    import torch

    from tinygpt.model import TinyGPT

    manifest, training = session.manifest, session.training
    require_repeatable(manifest.name, manifest.config)
    corpus.require_windows(manifest.context)
    torch.manual_seed(session.seed)
    torch.set_num_threads(session.engine.threads)
    model = TinyGPT(ModelConfig(**(manifest.config or {})))
    named = dict(model.named_parameters())
    session.load_parameters({name: p.detach().numpy() for name, p in named.items()})
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": training["weight_decay"]},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (training["beta1"], training["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=training["lr"], betas=betas, eps=training["eps"])
    worst_gradient, gradient_error, loss_difference = "", 0.0, 0.0
    for step in range(steps):
        offsets = session.windows(step, corpus.train.size - manifest.context)
        tokens, targets = gather(corpus.train, offsets, manifest.context)
        optimizer.zero_grad()
        _, loss = model(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(targets.astype(np.int64)))
        loss.backward()
        if step == 0:
            expected = {name: p.grad.numpy() for name, p in named.items() if p.grad is not None}
            worst_gradient, gradient_error = _worst(session.grads(tokens, targets), expected)
        torch.nn.utils.clip_grad_norm_(list(named.values()), training["clip"])
        optimizer.step()
        found, _ = session.train_step(tokens, targets)
        loss_difference = max(loss_difference, abs(found - float(loss.item())))
    weights = session.parameters()
    weight_difference = max(float(np.abs(weights[name] - p.detach().numpy()).max()) for name, p in named.items())
    return Parity(
        manifest.name, manifest.target_name, steps, loss_difference, gradient_error, worst_gradient, weight_difference
    )


def _worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[str, float]:
    """The tensor that is furthest off, and by how much."""
    errors = {}
    for name, gradient in expected.items():
        size = 1.0 if name.endswith(ZERO_GRADIENT) else max(float(np.abs(gradient).max()), 1e-30)
        errors[name] = float(np.abs(found[name] - gradient).max()) / size
    worst = max(errors, key=lambda name: errors[name])
    return worst, errors[worst]
