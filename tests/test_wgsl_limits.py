"""Models that do not fit the limits of a WebGPU device as they are: cut until they do, and the results stay the same.

Limits are shrunk until a small model exceeds them as a large one does the specification's; then it is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.wgsl_device import device
from tinygpt.compiler import Compilation, device_for, lower, module_for, write_bundle
from tinygpt.config import ModelConfig
from tinygpt.ir.caps import Caps
from tinygpt.runtime import bundle as bundles
from tinygpt.targets.wgsl.profiles import DEFAULT

KIB = 1 << 10
SMALL = {"vocab_size": 256, "context_length": 32, "n_layers": 2, "n_heads": 3, "d_model": 48}


def compiled(fields: dict[str, int], caps: Caps, batch: int = 2) -> Compilation:
    module = module_for(ModelConfig(**fields), batch, fields["context_length"])
    return lower(module, device_for("wgsl", {})[0], caps)


def requires_fit(done: Compilation) -> None:
    """Every launch and every pool keeps the limits; nothing relies on the compiler's own checks."""
    caps, plan = done.caps, done.plan
    assert max(plan.pools.values()) <= caps.buffer_bytes
    target = done.device.record(plan, {}, caps, False)
    for launches in target["functions"].values():
        for launch in launches:
            assert len(launch["bindings"]) <= caps.bindings
            assert max(launch["workgroups"]) <= caps.grid_limit
            assert max(size for _, _, size in launch["bindings"]) <= caps.binding_bytes
            access = target["kernels"][launch["kernel"]]["access"]
            read = {pool for (pool, _, _), a in zip(launch["bindings"], access, strict=True) if a == "in"}
            assert not read & {pool for (pool, _, _), a in zip(launch["bindings"], access, strict=True) if a != "in"}


def trained(done: Compilation, folder: Path) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Losses and norms of three steps, and the gradients after them."""
    write_bundle(folder, done.manifest, done.files)
    bundle = bundles.load(folder)
    assert bundle.selftest().passed
    rng = np.random.default_rng(3)
    shape, vocabulary = (bundle.manifest.batch, bundle.manifest.context), bundle.manifest.vocab_size
    batches = [(rng.integers(0, vocabulary, shape), rng.integers(0, vocabulary, shape)) for _ in range(3)]
    with bundle.session(seed=4) as session:
        curve = [session.train_step(*b, lr=1e-3) for b in batches]
        gradients = session.grads(*batches[0])
    return curve, gradients if isinstance(gradients, dict) else gradients[-1]


@pytest.mark.parametrize(
    ("fields", "binding", "buffer"),
    [(SMALL, 64 * KIB, 128 * KIB)],
    ids=["weights"],
)
def test_a_model_that_is_cut_trains_like_the_whole_one(fields: dict[str, int], binding: int, buffer: int, tmp_path: Path) -> None:
    device()
    cut = compiled(fields, replace(DEFAULT, binding_bytes=binding, buffer_bytes=buffer))
    requires_fit(cut)
    found, expected = trained(cut, tmp_path / "cut"), trained(compiled(fields, DEFAULT), tmp_path / "whole")
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    largest = max(float(np.abs(g).max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(found[1][name], gradient, rtol=1e-4, atol=1e-6 * largest, err_msg=name)


@pytest.mark.parametrize("preset", ["behemoth"])
def test_large_models_fit_the_default_limits(preset: str) -> None:
    done = lower(module_for(preset), device_for("wgsl", {})[0], DEFAULT)
    requires_fit(done)
