"""train, evaluate, generate: what they leave behind, what they refuse, and what Ctrl-C does."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tinygpt.runtime import checkpoint, native

import tinygpt as tg
from tests.cli import CONFIG, SHAPE, CommandLine

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tinygpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    return CommandLine(tmp_path, capsys)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tg.compile(CONFIG, batch=2, context=8, out=tmp_path_factory.mktemp("bundle")).folder


TRAIN = ("--data", "text.txt", "--threads", "1")


def test_training_a_bundle_and_a_config_gives_the_same_bits(tinygpt: CommandLine, bundle: Path) -> None:
    report = tinygpt.works("train", bundle, *TRAIN, "--steps", "6", "--eval-every", "3", "--out", "a.safetensors")
    assert re.search(r"estimate: .*6 steps x .*3 evaluations x .*memory .* MB", report)
    assert "saved to" in report and "validation loss" in report
    tinygpt.works("train", "mini.json", *SHAPE, *TRAIN, "--steps", "6", "--eval-every", "0", "--out", "b.safetensors")
    a, b = checkpoint.load("a.safetensors"), checkpoint.load("b.safetensors")
    assert a.step == 6 and a.arrays.keys() == b.arrays.keys()
    assert all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)


def test_a_resumed_run_is_the_uninterrupted_one_and_goes_on_in_its_file(tinygpt: CommandLine, bundle: Path) -> None:
    run = ("train", bundle, *TRAIN, "--eval-every", "0", "--seed", "7")
    tinygpt.works(*run, "--steps", "5", "--out", "whole.safetensors", "--metrics", "whole.jsonl")
    tinygpt.works(*run, "--steps", "2", "--out", "cut.safetensors", "--metrics", "cut.jsonl")
    resumed = ("train", bundle, *TRAIN, "--eval-every", "0", "--resume", "cut.safetensors", "--steps", "5")
    tinygpt.works(*resumed, "--metrics", "cut.jsonl")
    a, b = checkpoint.load("whole.safetensors"), checkpoint.load("cut.safetensors")
    assert b.step == 5 and all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)
    rows = [[json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()] for name in ("whole", "cut")]
    assert rows[0][0].keys() == {"step", "loss", "grad_norm", "tokens_per_s"}
    assert [[(r["step"], r["loss"]) for r in run] for run in rows][0] == [(r["step"], r["loss"]) for r in rows[1]]
    assert "has seed 7" in tinygpt.refused(*resumed, "--seed", "8")
    assert "5 steps already" in tinygpt.refused(*resumed[:-1], "3")


def test_without_out_a_free_name_is_taken(tinygpt: CommandLine, bundle: Path) -> None:
    Path("mini.safetensors").write_text("mine")
    run = ("train", "mini.json", *SHAPE, *TRAIN, "--eval-every", "0", "--steps", "1")
    assert "mini-2.safetensors" in tinygpt.works(*run)
    assert Path("mini.safetensors").read_text() == "mine"


def test_a_checkpoint_is_evaluated_and_generates_on_either_target(tinygpt: CommandLine, bundle: Path) -> None:
    tinygpt.works("train", bundle, *TRAIN, "--steps", "4", "--eval-every", "0", "--out", "c.safetensors")
    shown = json.loads(tinygpt.works("evaluate", "c.safetensors", "--data", "text.txt", "--threads", "1", "--json"))
    assert shown["step"] == 4 and shown["part"] == "validation" and 0 < shown["loss"] < 6
    line = tinygpt.works("evaluate", "c.safetensors", "--bundle", bundle, "--data", "text.txt", "--threads", "1")
    assert f"{shown['loss']:.4f} nats/byte ({shown['loss'] / math.log(2):.4f} bits)" in line
    sample = ("generate", "c.safetensors", "--prompt", "the ", "--tokens", "12", "--seed", "3", "--threads", "1")
    text = tinygpt.works(*sample)
    assert text.startswith("the ") and text.endswith("\n") and text == tinygpt.works(*sample, "--bundle", bundle)
    pytest.importorskip("wasmtime")
    assert text == tinygpt.works(*sample, "--target", "wasm32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "BUNDLE", "--data", "missing.txt", "--steps", "1"), "no such file"),
        (("train", "BUNDLE", "--data", "short.txt", "--steps", "1"), "context 8 needs at least"),
        (("train", "BUNDLE", *TRAIN, "--steps", "1", "--batch", "3"), "was compiled for 2"),
        (("train", "BUNDLE", *TRAIN, "--steps", "1", "--set", "n_layers=2"), "is a bundle"),
        (("train", "BUNDLE", *TRAIN, "--steps", "1", "--lr", "-1"), "lr -1.0"),
        (("train", "BUNDLE", *TRAIN, "--steps", "1", "--out", "no/where/x.safetensors"), "there is no folder"),
        (("train", "BUNDLE", *TRAIN, "--steps", "1", "--metrics", "text.txt"), "no metrics row"),
        (("train", "BUNDLE", *TRAIN, "--steps", "1", "--resume", "text.txt"), "not a safetensors file"),
        (("train", "nowhere", *TRAIN, "--steps", "1"), "neither a preset nor a file"),
        (("evaluate", "text.txt"), "not a safetensors file"),
        (("generate", "missing.safetensors"), "no such file"),
    ],
)
def test_bad_input_is_a_paragraph_and_status_2(
    tinygpt: CommandLine, bundle: Path, arguments: tuple[str, ...], message: str
) -> None:
    Path("short.txt").write_text("hello")
    assert message in tinygpt.refused(*(bundle if word == "BUNDLE" else word for word in arguments))


def test_a_checkpoint_of_another_model_is_refused(tinygpt: CommandLine, bundle: Path) -> None:
    tinygpt.works("train", bundle, *TRAIN, "--steps", "1", "--eval-every", "0", "--out", "c.safetensors")
    saved = checkpoint.load("c.safetensors")
    arrays = {name: array for name, array in saved.arrays.items() if "ln_final" not in name}
    checkpoint.save("d.safetensors", checkpoint.Checkpoint(arrays, 1, 42, 2, 8, saved.config, saved.training))
    assert "ln_final" in tinygpt.refused("train", bundle, *TRAIN, "--steps", "2", "--resume", "d.safetensors")
    wide = tinygpt.refused("generate", "c.safetensors", "--temperature", "nan")
    assert "temperature" in wide


def test_no_compiler_is_a_paragraph_with_the_install_command(
    tinygpt: CommandLine, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tinygpt.folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_probe", native._probe.__wrapped__)  # what was found before is remembered
    assert "apt install g++" in tinygpt.refused("train", bundle, *TRAIN, "--steps", "1")


def test_ctrl_c_saves_and_says_where(tinygpt: CommandLine, bundle: Path) -> None:
    command = [sys.executable, "-m", "tinygpt", "train", str(bundle), *TRAIN, "--steps", "1000000", "--eval-every", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    arguments = [*command, "--out", "i.safetensors", "--metrics", "i.jsonl"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if Path("i.jsonl").exists() and Path("i.jsonl").read_text().count("\n") > 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and not err
    saved = checkpoint.load("i.safetensors")
    assert f"stopped at step {saved.step}; saved to" in out and "continue with: tinygpt train" in out
