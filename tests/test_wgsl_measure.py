"""tools/measure.py where it needs a GPU: what a table says is what the command line measured."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import pytest

from tests.cli import CONFIG
from tests.pytorch_reference import require_engine
from tests.test_docs import ROOT, tool
from tests.wgsl_device import device


def test_the_curve_is_webgpu_beside_webassembly_on_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device()
    require_engine("wasm32")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    measure = tool("measure")
    monkeypatch.setattr(measure, "RECORDS", tmp_path)
    (tmp_path / "mini.json").write_text(json.dumps(CONFIG))
    text = measure.curve(argparse.Namespace(presets=[str(tmp_path / "mini.json")], rounds=1))
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    threads = min(len(os.sched_getaffinity(0)), 16)
    assert [(row["target"], row["engine"]) for row in rows] == [("wgsl", ""), ("wasm32", "")]
    assert rows[1]["threads"] == threads and f"wasmtime, {threads} threads on" in text
    found = re.search(r"\| mini \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)× \|", text)
    assert found is not None
    assert [float(x) for x in found.groups()[:2]] == [pytest.approx(row["ms"], abs=0.01) for row in rows]
    assert float(found[3]) == pytest.approx(rows[1]["ms"] / rows[0]["ms"], abs=0.06)
