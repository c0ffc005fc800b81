"""WebAssembly bundles in wasmtime: a hand-written model trains, the same on 32 and 64 bits and with 1, 2 and 3
threads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.wasm_bundle import BATCH, CONTEXT, VOCABULARY, expected_step, write_bundle
from tinygpt.runtime import bundle as bundles
from tinygpt.runtime.engine import available
from tinygpt.runtime.errors import UserError
from tinygpt.targets.wasm.profiles import PROFILES


def batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (2, BATCH, CONTEXT))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_runs_a_bundle(profile: str, tmp_path: Path) -> None:
    bundle = bundles.load(write_bundle(tmp_path, PROFILES[profile]))
    assert bundle.selftest().passed
    with bundle.session(seed=3) as session:
        assert session.engine.threads == (2 if "threads" in profile else 1)
        loss, table = expected_step(session, *batch(0), lr=0.5)
        found, _ = session.train_step(*batch(0), lr=0.5)
        assert found == pytest.approx(loss, rel=1e-6)
        np.testing.assert_allclose(session.parameters()["table.weight"], table, rtol=1e-5)
        assert session.state()["table.weight.m"][0, 0] == np.float32(1 - 0.9)


def losses(folder: Path, threads: int) -> list[float]:
    with bundles.load(folder).session(threads=threads) as session:
        return [session.train_step(*batch(i), lr=0.1)[0] for i in range(30)]


def test_threads_and_address_width_do_not_change_a_bit(tmp_path: Path) -> None:
    folders = [
        write_bundle(tmp_path / name, PROFILES[name])
        for name in ("wasm32-threads-relaxed-v8", "wasm64-threads-relaxed-wasmtime")
    ]
    curves = [losses(folder, threads) for folder in folders for threads in (1, 2, 3)]
    assert all(curve == curves[0] for curve in curves)


def test_tensors_beyond_four_gibibytes_are_reached(tmp_path: Path) -> None:
    small = write_bundle(tmp_path / "small", PROFILES["wasm64-threads-relaxed-v8"])
    large = write_bundle(tmp_path / "large", PROFILES["wasm64-threads-relaxed-v8"], reserved=5 << 30)
    assert losses(large, 2) == losses(small, 2)


def test_a_session_after_another_starts_from_fresh_memory(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, PROFILES["wasm32-threads-relaxed-v8"])
    assert losses(folder, 2) == losses(folder, 2)


def edited(folder: Path, key: str, value: object) -> Path:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    document["target"][key] = value
    path.write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("address_bits", 48, "address_bits"),
        ("pools", {"state": 1024}, "pools"),
        ("pools", {"state": 1024, "work": 2048}, "inside another pool"),
        ("pools", {"state": 1024, "work": 1 << 40}, "pools.work"),
        ("scratch", 1024, "pools end"),
        ("scratch_stride", 1 << 31, "do not fit"),
        ("max_threads", 0, "max_threads"),
        ("entries", ["init"], "entries"),
        ("shared", 1, "shared"),
        ("shared", False, "cannot be loaded"),
        ("module", "other.wasm", "no file"),
    ],
)
def test_a_damaged_record_is_refused(key: str, value: object, complaint: str, tmp_path: Path) -> None:
    folder = edited(write_bundle(tmp_path, PROFILES["wasm32-threads-relaxed-v8"]), key, value)
    with pytest.raises(UserError, match=complaint):
        bundles.load(folder).session(threads=2)


def test_more_threads_than_the_profile_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one thread"):
        bundles.load(write_bundle(tmp_path, PROFILES["wasm32-relaxed-v8"])).session(threads=2)


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    session = bundles.load(write_bundle(tmp_path, PROFILES["wasm32-threads-relaxed-v8"])).session(threads=2)
    session.close()
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.engine.run("init")


def test_a_trap_in_a_kernel_ends_every_thread(tmp_path: Path) -> None:
    """A token far outside the table, which a session would refuse, makes a thread read outside the memory."""
    session = bundles.load(write_bundle(tmp_path, PROFILES["wasm32-threads-relaxed-v8"])).session(threads=2)
    slots = {slot.name: slot for slot in session.manifest.functions["loss"].inputs}
    tokens = np.zeros((BATCH, CONTEXT), np.int32)
    for at in ((0, 0), (BATCH - 1, CONTEXT - 1)):
        tokens[at] = 3 << 20
    session.engine.write(slots["tokens"], tokens)
    with pytest.raises(RuntimeError, match="loss failed"):
        session.engine.run("loss")


def test_engines_are_found_by_target() -> None:
    assert {"wasm32", "wasm64"} <= available().keys()
