"""Every command that takes a bundle, on wasm32 and wasm64, as on C++."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli import SHAPE, CommandLine
from tests.pytorch_reference import require_engine

TRAIN = ("--data", "text.txt", "--threads", "2", "--eval-every", "0")


@pytest.fixture
def tinygpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    return CommandLine(tmp_path, capsys)


@pytest.mark.parametrize("target", ["wasm32", "wasm64"])
def test_a_bundle_is_compiled_checked_trained_and_timed(tinygpt: CommandLine, target: str) -> None:
    require_engine(target)
    tinygpt.works("compile", "mini.json", *SHAPE, "--target", target, "--out", "b")
    tinygpt.works("verify", "b")
    assert "train_step" in tinygpt.works("selftest", "b")
    assert "0 changed, 0 new, 0 removed" in tinygpt.works("regen", "b")
    tinygpt.works("train", "b", *TRAIN, "--steps", "3", "--out", "c.safetensors", "--metrics", "rows.jsonl")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    tinygpt.works("train", "b", *TRAIN, "--steps", "4", "--resume", "c.safetensors")
    sample = ("generate", "c.safetensors", "--prompt", "the ", "--tokens", "8", "--seed", "1", "--threads", "1")
    assert tinygpt.works(*sample, "--target", target) == tinygpt.works(*sample)
    quick = ("--rounds", "1", "--seconds", "0.02", "--threads", "2", "--against", "none", "--json")
    row = json.loads(tinygpt.works("bench", "mini.json", *SHAPE, "--target", target, *quick))
    assert (row["target"], row["threads"]) == (target, 2)
