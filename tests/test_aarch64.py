"""The smallest preset on a 64-bit Arm processor, cross-compiled and emulated: the C++ is portable, no x86 in it."""

from __future__ import annotations

from pathlib import Path

import pytest

import tinygpt as tg
from tests.piped_engine import PipedEngine, aarch64_engine
from tinygpt.runtime.manifest import Manifest


def test_tiny_passes_its_selftest_on_aarch64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tg.compile("tiny", batch=2, options={"profile": "baseline"}, out=tmp_path / "bundle")

    def emulated(folder: Path, manifest: Manifest, threads: int | None = None) -> PipedEngine:
        return aarch64_engine(folder, manifest, tmp_path / "driver", threads or 1)

    monkeypatch.setattr("tinygpt.runtime.bundle.open_engine", emulated)
    report = bundle.selftest(2)
    assert report.passed, str(report)
    assert {check.function for check in report.checks} >= {"loss", "train_step"}
