"""Models that do not fit the limits of a WebGPU device as they are: cut until they do, or refused.

Limits are shrunk until a small model exceeds them as a large one does the specification's; then it is trained beside
PyTorch. Large models are lowered for the specification's own limits, and every launch is held against them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import pytorch_reference as pytorch
from tests.wgsl_device import device
from tinygpt.compiler import Compilation, device_for, lower, module_for, write_bundle
from tinygpt.config import ModelConfig
from tinygpt.ir.errors import UserError
from tinygpt.presets import PRESETS
from tinygpt.runtime import bundle as bundles
from tinygpt.targets.wgsl.profiles import DEFAULT

KIB = 1 << 10
# One with a table of tokens that is cut and read by both ends of the model; one whose head, table and hidden layer are.
SMALL: dict[str, dict[str, Any]] = {
    "tied head, odd vocabulary": dict(vocab_size=1003, context_length=37, n_layers=1, n_heads=2, d_model=32),
    "untied head": dict(vocab_size=1000, context_length=33, n_layers=1, n_heads=2, d_model=32, d_mlp=260, tie_embeddings=False),
}
BINDING = 64 * KIB
LR = 1e-3


def requires_fit(done: Compilation) -> None:
    """Every launch and every pool keeps the limits; nothing relies on the compiler's own checks."""
    caps, plan = done.caps, done.plan
    assert max(plan.pools.values()) <= caps.buffer_bytes
    target = done.device.record(plan, {}, caps, False)
    assert set(target["functions"]) == {"loss", "logits", "grads", "train_step", "apply", "init", "windows"}
    for launches in target["functions"].values():
        for launch in launches:
            assert len(launch["bindings"]) <= caps.bindings
            assert max(launch["workgroups"]) <= caps.grid_limit
            assert max(size for _, _, size in launch["bindings"]) <= caps.binding_bytes
            access = target["kernels"][launch["kernel"]]["access"]
            read = {pool for (pool, _, _), a in zip(launch["bindings"], access, strict=True) if a == "in"}
            assert not read & {pool for (pool, _, _), a in zip(launch["bindings"], access, strict=True) if a != "in"}


@pytest.mark.parametrize("name", SMALL)
def test_a_model_that_is_cut_trains_like_pytorch(name: str, tmp_path: Path) -> None:
    device()
    config = ModelConfig(**SMALL[name])
    done = lower(module_for(config, 2), device_for("wgsl", {})[0], replace(DEFAULT, binding_bytes=BINDING, buffer_bytes=4 * BINDING))
    requires_fit(done)
    write_bundle(tmp_path, done.manifest, done.files)
    bundle = bundles.load(tmp_path)
    assert bundle.selftest().passed
    rng = np.random.default_rng(3)
    batches = [tuple(rng.integers(0, config.vocab_size, (2, config.context_length)) for _ in range(2)) for _ in range(12)]
    with bundle.session(seed=4) as session:
        wanted_curve = pytorch.train(pytorch.model(config, session.parameters()), batches, LR)  # type: ignore[arg-type]
        curve = [session.train_step(*batch, lr=LR) for batch in batches]
        differences = np.abs(np.array(curve) - np.array(wanted_curve)).max(axis=0)
        assert differences[0] <= 1e-5, f"loss differs by {differences[0]:.3g}"
        assert differences[1] <= 1e-4, f"gradient norm differs by {differences[1]:.3g}"
        weights = pytorch.spread_weights(session, 5)
        reference = pytorch.model(config, weights, torch.float64)
        loss, wanted = pytorch.gradients(reference, *batches[0])
        assert session.loss(*batches[0]) == pytest.approx(loss, abs=1e-5)
        pytorch.assert_gradients_agree(session.grads(*batches[0]), wanted)
        with torch.no_grad():
            logits, _ = reference(torch.from_numpy(batches[0][0][:1].astype(np.int64)))
        assert np.abs(session.logits(batches[0][0][0]) - logits[0].numpy()).max() <= 2e-5
        assert session.apply(session.grads(*batches[1]), lr=LR) > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_the_default_limits(preset: str) -> None:
    requires_fit(lower(module_for(preset), device_for("wgsl", {})[0], DEFAULT))


def gpt2(vocabulary: int, **fields: int) -> ModelConfig:
    """GPT-2 with 124 million parameters (Radford et al. 2019), or a variant of it."""
    return ModelConfig(vocab_size=vocabulary, **(dict(context_length=1024, n_layers=12, n_heads=12, d_model=768) | fields))


@cache
def gpt2_compiled(vocabulary: int, batch: int) -> Compilation:
    return lower(module_for(gpt2(vocabulary), batch), device_for("wgsl", {})[0], DEFAULT)


@pytest.mark.parametrize("vocabulary", [50_257, 50_304])
@pytest.mark.parametrize("batch", [4, 1])
def test_gpt2_fits_the_default_limits(vocabulary: int, batch: int) -> None:
    done = gpt2_compiled(vocabulary, batch)
    requires_fit(done)
    assert done.seconds < 60


def test_the_logits_of_gpt2_take_the_memory_of_a_few_stretches() -> None:
    """824 MB at batch 4, and as much for their gradient; what is alive at once is a stretch of each, and the gradient of the head twice."""
    assert gpt2_compiled(50_304, 4).plan.work_live - gpt2_compiled(256, 4).plan.work_live < 300e6


def test_logits_that_exceed_a_buffer_are_refused_by_name() -> None:
    config = gpt2(50_304, context_length=2048, n_layers=1)
    sizes = "has 412,090,368 bytes, a buffer of webgpu-default at most 268,435,456"
    with pytest.raises(UserError, match=rf"buffer logits of logits \(f32\[1, 2048, 50304\]\) {sizes}"):
        lower(module_for(config, 1), device_for("wgsl", {})[0], DEFAULT)


def test_activations_that_no_cut_makes_small_enough_are_refused_by_name() -> None:
    config = gpt2(1_000, n_layers=1)
    with pytest.raises(UserError, match=r"a binding of webgpu-default holds 134,217,728, and \w+ needs it in one\n  model.py:\d+"):
        lower(module_for(config, 64), device_for("wgsl", {})[0], DEFAULT)
