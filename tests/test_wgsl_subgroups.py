"""Row reductions by subgroup operations: right at every size of a subgroup, the same bits where the profile relies on the
same lanes, and refused where a device has fewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli import CONFIG
from tests.subgroup_programs import kernels
from tests.wgsl_device import device
from tinygpt.compiler import compile, device_for
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.errors import UserError as CompilerUserError
from tinygpt.ir.interpret_tile import run_kernel
from tinygpt.ir.interpret_workgroup import run_workgroups
from tinygpt.ir.text import parse_kernel
from tinygpt.ir.verify import verify_kernel
from tinygpt.lowering.gpu import lower
from tinygpt.runtime import bundle as bundles
from tinygpt.runtime.errors import UserError
from tinygpt.targets.wgsl.profiles import DEFAULT, LIMITS, SUBGROUPS

ROOT = Path(__file__).resolve().parent.parent


@cache
def found(lanes: int) -> dict[str, Any]:
    """What tests/subgroup_programs.py measures where the driver's subgroups have so many lanes, by how many are relied on."""
    device(SUBGROUPS.features)
    told = {"LP_NATIVE_VECTOR_WIDTH": str(32 * lanes), "MESA_SHADER_CACHE_DISABLE": "true"}  # the cache does not know the width
    command = [sys.executable, "-m", "tests.subgroup_programs", *sorted({"4", str(lanes)})]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **told}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    if result["lanes"] != lanes:
        assert not os.environ.get("CI"), result
        pytest.skip("this driver's subgroups have lanes of their own")
    by_lanes: dict[str, Any] = result["relying on"]
    return by_lanes


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_row_reductions_are_right_and_the_same_from_run_to_run(lanes: int) -> None:
    for result in found(lanes).values():
        assert result["folds"] > 10 and result["worst"] < 1e-6
        first, second = result["bits"]
        assert first == second


@pytest.mark.parametrize("lanes", [4, 32])
def test_no_thread_races_another_and_the_interpreter_agrees(lanes: int) -> None:
    caps = replace(SUBGROUPS, subgroup=lanes)
    for kernel, buffers in kernels(caps):
        expected = [b.astype(np.float64) if b.dtype == np.float32 else b.copy() for b in buffers]
        run_kernel(kernel, expected, wide=True)
        run_workgroups(lower(kernel, caps), buffers)
        for a, b in zip(expected, buffers, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), kernel.name


def test_bits_depend_on_the_lanes_relied_on_and_not_on_those_there_are() -> None:
    assert found(4)["4"]["bits"] == found(8)["4"]["bits"] == found(16)["4"]["bits"]


def test_a_bundle_with_subgroups_agrees_with_the_interpreter_and_repeats_its_bits(tmp_path: Path) -> None:
    device(SUBGROUPS.features)
    bundle = compile(CONFIG, "wgsl", 2, 8, out=tmp_path / "b", options={"profile": "webgpu-subgroups"})
    texts = [path.read_text() for path in Path(bundle.folder).glob("kernels/*.wgsl")]
    assert any("subgroupShuffleXor" in text for text in texts)
    assert bundle.manifest.target["subgroup"] == 4 and bundle.selftest().passed
    losses = []
    for _ in range(2):
        with bundle.session(seed=3) as session:
            tokens = [[n % 7 + row for n in range(8)] for row in range(2)]
            losses.append([session.train_step(tokens, tokens, lr=1e-3)[0] for _ in range(5)])
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]

    path = Path(bundle.folder) / "manifest.json"
    document = json.loads(path.read_text())
    document["target"]["subgroup"] = 1024
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="lacks subgroups of 1024 lanes"):
        bundles.load(bundle.folder).session()


def test_a_description_says_how_many_lanes_may_be_relied_on() -> None:
    limits = {name: getattr(DEFAULT, field) for name, field in LIMITS.items()}

    def lanes(features: list[str], **more: object) -> int:
        described = json.dumps({"features": features, "limits": limits, **more})
        return device_for("wgsl", {"profile": "adapter", "device": described})[1].subgroup

    assert lanes(["subgroups"], subgroup=32) == 32 and lanes(["subgroups"]) == 4 and lanes([], subgroup=32) == 0
    for wrong in (0, 24, "32"):
        with pytest.raises(CompilerUserError, match="subgroups of .* lanes; they have a power of two"):
            lanes(["subgroups"], subgroup=wrong)


KERNEL = """
kernel k(%x: in ptr<f32, buffer>, %y: out ptr<f32, buffer>) {level = "loop", cost = {extents = [64, 64], threads = 32}} {
  grid g0 = 2
  %a = load(%x) {at = <thread + g0*32>} : f32
  for() {var = "n1", lo = <0>, hi = <g0 + 1>, step = 1} do {
    %b = subgroup_fold(%a) {kind = "sum", width = 4} : f32
    barrier()
    store(%y, %b) {at = <thread + g0*32>}
  }
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width = 4", "width = 3", "threads fold in groups of a power of two, not of 3"),
        ("width = 4", "width = 8", "subgroups of webgpu-subgroups are sure to have 4 lanes, not 8"),
        ('"sum"', '"mean"', "subgroup_fold is a sum or max, not mean"),
    ],
)
def test_the_verifier_knows_what_subgroups_can_do(old: str, new: str, message: str) -> None:
    verify_kernel(parse_kernel(KERNEL), SUBGROUPS)
    assert old in KERNEL
    with pytest.raises(CompilerBug, match=message):
        verify_kernel(parse_kernel(KERNEL.replace(old, new, 1)), SUBGROUPS)


def test_a_profile_without_subgroups_takes_no_fold() -> None:
    with pytest.raises(CompilerBug, match="subgroups of none are sure to have 0 lanes, not 4"):
        verify_kernel(parse_kernel(KERNEL), replace(SUBGROUPS, name="none", subgroup=0))
