"""WebGPU bundles in headless Chromium: the page trains to the losses of wgpu, and the host does there what it does for
WebAssembly; Tint takes every shader of even and odd models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.chromium import page_result
from tests.wgsl_device import device
from tinygpt.compiler import compile
from tinygpt.runtime.bundle import Bundle
from tinygpt.runtime.data import Corpus
from tinygpt.runtime.training import train

STEPS = 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile("tiny", "wgsl", out=tmp_path_factory.mktemp("tiny"))


def test_a_page_trains_to_the_losses_of_wgpu(bundle: Bundle, tmp_path: Path) -> None:
    device()
    found = page_result(bundle, f"steps={STEPS}", tmp_path / "profile")
    assert found["error"] is None
    assert found["runsOn"]
    wanted: list[float] = []
    with bundle.session() as session:
        train(session, Corpus("text", "", np.array(found["corpus"], np.uint8)), STEPS, eval_every=0, on_row=lambda row: wanted.append(row["loss"]))
    assert len(wanted) == STEPS
    assert np.abs(np.array(found["losses"]) - wanted).max() <= 1e-5
    assert wanted[-1] < wanted[0]
