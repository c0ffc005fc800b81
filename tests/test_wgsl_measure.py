"""tools/measure.py where it needs a GPU: what a table says is what the command line measured."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from tests.cli import CONFIG
from tests.pytorch_reference import require_engine
from tests.test_docs import ROOT, tool
from tests.wgsl_device import device


def test_the_curve_is_webgpu_beside_webassembly_on_the_better_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device()
    require_engine("wasm32")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    measure = tool("measure")
    monkeypatch.setattr(measure, "RECORDS", tmp_path)
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda _: range(3))
    (tmp_path / "mini.json").write_text(json.dumps(CONFIG))
    preset = str(tmp_path / "mini.json")
    first, text = measure.curve(argparse.Namespace(presets=[preset, preset], rounds=1, profile="webgpu-default"))
    assert first.count("| mini |") == 1 and text.count("| mini |") == 2
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [(row["target"], row["threads"]) for row in rows[1:3]] == [("wasm32", 2), ("wasm32", 3)]
    assert "wasmtime, on the better of 2 and 3 threads; WebGPU: profile `webgpu-default`; 3 cores" in text
    best = min(rows[1:3], key=lambda row: row["ms"])
    found = re.search(r"\| mini \| ([\d.]+) \| ([\d.]+) \| (\d) \| ([\d.]+)× \|", first)
    assert found is not None
    assert [float(x) for x in found.groups()[:3]] == [pytest.approx(rows[0]["ms"], abs=0.01), pytest.approx(best["ms"], abs=0.01), best["threads"]]
    assert float(found[4]) == pytest.approx(best["ms"] / rows[0]["ms"], abs=0.06)
