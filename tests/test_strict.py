"""Strict bundles: C++, wasm32 and wasm64 agree to the bit over 50 training steps, in wasmtime and in Node, with one thread
and with two. Bundles that are not strict do so for each profile in both engines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import tinygpt as tg
from tests.cli import CONFIG
from tests.node import node_steps
from tests.pytorch_reference import require_engine
from tinygpt.runtime.bundle import Bundle
from tinygpt.targets.wasm.profiles import ENGINES, PROFILES, profile

STEPS = 50
SEED = 5
Rows = list[tuple[float, float]]


def batches(bundle: Bundle, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random batches, the same for every bundle of a model."""
    rng = np.random.default_rng(11)
    shape = (2, bundle.manifest.batch, bundle.manifest.context)
    return [tuple(rng.integers(0, 64, shape)) for _ in range(steps)]


def trained(bundle: Bundle, threads: int, steps: int) -> tuple[Rows, dict[str, bytes]]:
    """Losses, gradient norms, and the weights afterwards, in this process's engine."""
    with bundle.session(threads=threads, seed=SEED) as session:
        rows = [session.train_step(*batch) for batch in batches(bundle, steps)]
        return rows, {name: array.tobytes() for name, array in session.parameters().items()}


def strict(target: str, **options: str) -> Bundle:
    compiled: Bundle = tg.compile("tiny", target=target, batch=4, strict=True, options=options)
    return compiled


@pytest.fixture(scope="module")
def expected() -> tuple[Rows, dict[str, bytes]]:
    return trained(strict("cpp"), 1, STEPS)


def test_cpp_on_two_threads_and_without_wide_vectors(expected: tuple[Rows, dict[str, bytes]]) -> None:
    assert trained(strict("cpp"), 2, STEPS) == expected
    assert trained(strict("cpp", profile="baseline"), 1, STEPS) == expected


@pytest.mark.parametrize(("target", "engine"), list(itertools.product(("wasm32", "wasm64"), ENGINES)))
def test_fifty_steps_are_those_of_cpp_to_the_bit(target: str, engine: str, expected: tuple[Rows, dict[str, bytes]]) -> None:
    require_engine(target)
    bundle = strict(target, engine=engine)
    for threads in (1, 2):
        assert trained(bundle, threads, STEPS) == expected, threads
        assert node_steps(bundle.folder, batches(bundle, STEPS), threads, SEED) == expected[0], threads


@pytest.mark.parametrize("relaxed", [True, False])
def test_every_profile_runs_in_every_engine_to_the_same_bits(relaxed: bool) -> None:
    """Address width, threads and the engine that a profile is tuned for change speed only."""
    curves: dict[str, Rows] = {}
    for target, engine, threads in itertools.product(("wasm32", "wasm64"), ENGINES, (True, False)):
        require_engine(target)
        flags = {"threads": threads, "relaxed": relaxed}
        caps = profile(target, engine, **flags)
        bundle = tg.compile(CONFIG, target=target, batch=2, options={"engine": engine, **{k: str(v).lower() for k, v in flags.items()}})
        assert bundle.manifest.target["profile"] == caps.name
        curves[f"{caps.name} in wasmtime"] = trained(bundle, caps.threads, 4)[0]
        curves[f"{caps.name} in Node"] = node_steps(bundle.folder, batches(bundle, 4), caps.threads, SEED)
    assert len(curves) == len(PROFILES)  # half of them, in two engines
    first = next(iter(curves.values()))
    assert [name for name, curve in curves.items() if curve != first] == []
