"""Strict bundles: C++, wasm32 and wasm64 agree to the bit over 50 training steps, with one thread and with two."""

from __future__ import annotations

import numpy as np
import pytest

import tinygpt as tg
from tinygpt.runtime.session import Session

pytest.importorskip("wasmtime")

STEPS = 50
VARIANTS = [("cpp", {}, 2), ("cpp", {"profile": "baseline"}, 1), ("wasm32", {}, 2), ("wasm64", {}, 1), ("wasm32", {"engine": "wasmtime"}, 1)]


def losses(session: Session) -> list[tuple[float, float]]:
    """Losses and gradient norms of 50 steps on random batches that are the same for every session."""
    rng = np.random.default_rng(11)
    shape = (session.manifest.batch, session.manifest.context)
    return [session.train_step(rng.integers(0, 64, shape), rng.integers(0, 64, shape)) for _ in range(STEPS)]


def strict_session(target: str, options: dict[str, str], threads: int) -> Session:
    bundle = tg.compile("tiny", target=target, batch=4, strict=True, options=options)
    return bundle.session(threads=threads, seed=5)


def test_fifty_steps_are_equal_to_the_bit_on_every_cpu_target() -> None:
    with strict_session("cpp", {}, 1) as reference:
        expected = losses(reference)
        weights = reference.parameters()
    for target, options, threads in VARIANTS:
        with strict_session(target, options, threads) as session:
            assert losses(session) == expected, (target, options, threads)
            found = session.parameters()
        assert all(np.array_equal(found[name], weights[name]) for name in weights), (target, options, threads)
