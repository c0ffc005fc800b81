"""PyTorch's side of the end-to-end tests: the reference model with given weights, its gradients, its training run; and
which targets can be compared with it here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tinygpt.config import ModelConfig
from tinygpt.model import TinyGPT
from tinygpt.runtime.engine import available
from tinygpt.runtime.session import Session
from tinygpt.targets import targets

Array = NDArray[np.generic]
Batch = tuple[Array, Array]

TARGETS = tuple(sorted(targets()))
GRADIENT_TOLERANCE = 1e-5  # of a tensor's largest element
# Softmax does not change when all scores of a query move together, so the true gradient of the key bias is 0.
ZERO_GRADIENT = "k_proj.bias"


def require_engine(target: str) -> None:
    """Fail where CI is set, else skip, unless bundles of the target run here."""
    if target in available():
        return
    reason = f"nothing here runs {target}: pip install '.[wasm,gpu]'"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def spread_weights(session: Session, seed: int) -> dict[str, Array]:
    """The session's weights moved by N(0, 0.05), and set so: no bias is 0, no gain 1, so that none hides a mistake."""
    rng = np.random.default_rng(seed)
    weights = {n: (a + 0.05 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in session.parameters().items()}
    session.load_parameters(weights)
    return weights


def model(config: ModelConfig, weights: Mapping[str, Array], dtype: torch.dtype = torch.float32) -> TinyGPT:
    """The reference model with these weights."""
    made = TinyGPT(config).to(dtype)
    made.load_state_dict({name: torch.from_numpy(np.array(a)).to(dtype) for name, a in weights.items()})
    return made


def gradients(reference: TinyGPT, tokens: Array, targets: Array) -> tuple[float, dict[str, Array]]:
    """The loss of a batch and its gradient by every weight, unclipped."""
    _, loss = reference(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(targets.astype(np.int64)))
    reference.zero_grad()
    loss.backward()
    return loss.item(), {n: p.grad.numpy() for n, p in reference.named_parameters() if p.grad is not None}


def train(reference: TinyGPT, batches: Iterable[Batch], lr: float) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, with stock AdamW (one tensor at a time) and clipping at 1."""
    decaying = [p for p in reference.parameters() if p.dim() >= 2]
    others = [p for p in reference.parameters() if p.dim() < 2]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    rows = []
    for tokens, targets in batches:
        _, loss = reference(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(targets.astype(np.int64)))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        rows.append((loss.item(), norm.item()))
    return rows


def trained_side_by_side(session: Session, config: ModelConfig, batches: Sequence[Batch], lr: float) -> tuple[Array, Array]:
    """Loss and gradient norm of each step, of the session and of the reference model, both from spread weights."""
    weights = spread_weights(session, 3)
    wanted = np.array(train(model(config, weights), batches, lr))
    return np.array([session.train_step(*batch, lr=lr) for batch in batches]), wanted


def assert_gradients_agree(found: Mapping[str, Array], wanted: Mapping[str, Array], tolerance: float = GRADIENT_TOLERANCE) -> None:
    """Every tensor within `tolerance` of its largest element; the key bias within `tolerance` of 0.

    No gradient of 0 comes out as 0 (with one token to look at, those of queries and keys): a tensor whose elements are
    all below what f64 rounds off the largest gradient is compared with that."""
    assert found.keys() == wanted.keys()
    rounding = float(np.finfo(np.float64).eps) * max(float(np.abs(gradient).max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = 1.0 if name.endswith(ZERO_GRADIENT) else float(np.abs(gradient).max())
        if scale <= rounding:
            scale = rounding / tolerance
        error = float(np.abs(found[name].astype(np.float64) - gradient).max())
        assert error <= tolerance * scale, f"{name}: off by {error:.3g}, against {scale:.3g}"
