"""A bundle on disk, the engines that run it, and the rule that it needs no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from tests.fake_engine import FakeEngine, golden_vectors, manifest, write_bundle
from tinygpt.runtime import bundle, engine
from tinygpt.runtime.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fake_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that exports an engine is all a target needs."""
    module = ModuleType("tinygpt.runtime.fake")
    module.ENGINES = {"fake": FakeEngine}  # type: ignore[attr-defined]
    found = engine._modules
    monkeypatch.setattr(engine, "_modules", lambda failures: iter([*found(failures), module]))


def test_a_loaded_bundle_trains(tmp_path: Path) -> None:
    loaded = bundle.load(write_bundle(tmp_path / "b"))
    with loaded.session(threads=3, seed=5) as session:
        assert session.engine.threads == 3 and session.seed == 5
        tokens = np.zeros((4, 8), np.uint8)
        assert session.train_step(tokens, tokens)[0] > session.train_step(tokens, tokens)[0]
    assert session.engine.closed  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="seed -1"):
        loaded.session(seed=-1)
    with pytest.raises(UserError, match="threads 0"):
        loaded.session(threads=0)


def test_a_target_without_an_engine_is_named(tmp_path: Path) -> None:
    loaded = bundle.load(write_bundle(tmp_path / "b", target={"name": "abacus"}))
    with pytest.raises(UserError, match="no engine here runs target 'abacus' .*fake"):
        loaded.session()
    assert engine.available()["fake"] == "tinygpt.runtime.fake"


def test_a_bundle_is_copied_without_what_was_built(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", {"host/page.html": b"<p>"})
    (folder / "model.o").touch()
    loaded = bundle.load(folder)
    copy = loaded.save(tmp_path / "deep" / "copy")
    assert bundle.load(copy).manifest == loaded.manifest and not (copy / "model.o").exists()
    assert loaded.save(folder) == folder and (folder / "model.o").exists()
    (copy / "run.safetensors").touch()
    (copy / "model.src").write_text("changed")
    assert bundle.load(loaded.save(copy))  # a bundle is overwritten, what else is there stays
    assert (copy / "run.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    for place, problem in ((tmp_path / "mine", "other things"), (tmp_path / "mine" / "notes", "is a file")):
        with pytest.raises(UserError, match=problem):
            loaded.save(place)
    assert (tmp_path / "mine" / "notes").exists()


TOLERANCES = {"loss": {"loss": 1e-6, "row_losses": 1e-6}, "train_step": {"loss": 1e-6, "grad_norm": 1e-6}}


def test_selftest_compares_every_golden_output(tmp_path: Path) -> None:
    golden = golden_vectors(manifest())
    report = bundle.load(write_bundle(tmp_path / "b", {bundle.GOLDEN: golden}, golden=TOLERANCES)).selftest()
    assert report.passed and len(report.checks) == 5
    vectors = safetensors.numpy.load(golden)
    vectors["loss/out/row_losses"][2, 3] += 0.5
    vectors["train_step/out/table.weight"][0, 0] = np.nan
    folder = write_bundle(tmp_path / "c", {bundle.GOLDEN: safetensors.numpy.save(vectors)}, golden=TOLERANCES)
    report = bundle.load(folder).selftest()
    assert {(check.function, check.name) for check in report.checks if not check.passed} == {
        ("loss", "row_losses"),
        ("train_step", "table.weight"),
    }
    assert "FAIL loss: row_losses differs by 0.5 (allowed 1e-06)" in str(report)


def test_golden_vectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    vectors = safetensors.numpy.load(golden_vectors(manifest()))
    wrong: dict[str, tuple[str, NDArray[Any]]] = {
        "strange/in/x": ("strange/in/x", np.zeros(1, np.float32)),
        "loss/out/nothing": ("loss/out/nothing", np.zeros(1, np.float32)),
        "loss/in/tokens": ("tokens is int64", np.zeros((4, 8), np.int64)),
    }
    for number, (key, (problem, array)) in enumerate(wrong.items()):
        content = safetensors.numpy.save({**vectors, key: array})
        loaded = bundle.load(write_bundle(tmp_path / str(number), {bundle.GOLDEN: content}))
        with pytest.raises(UserError, match=problem):
            loaded.selftest()
    with pytest.raises(UserError, match="cannot be read"):
        bundle.load(write_bundle(tmp_path / "cut", {bundle.GOLDEN: golden_vectors(manifest())[:500]})).selftest()
    with pytest.raises(UserError, match="lists no file 'golden"):
        bundle.load(write_bundle(tmp_path / "none")).selftest()


def test_the_runtime_imports_nothing_of_the_compiler() -> None:
    program = (
        "import pkgutil, importlib, sys, tinygpt.runtime as r\n"
        "from tinygpt.runtime import bundle, training\n"
        "heavy = ('torch', 'tinygpt.ir', 'tinygpt.lowering', 'tinygpt.targets', 'lark', 'jinja2')\n"
        "print([m for m in sys.modules if m.startswith(heavy)])"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
