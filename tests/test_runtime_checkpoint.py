"""A checkpoint is saved whole or not at all, and what is loaded is what was saved."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tests.fake_engine import manifest
from tinygpt.runtime import checkpoint
from tinygpt.runtime.checkpoint import Checkpoint
from tinygpt.runtime.errors import UserError

ROOT = Path(__file__).parents[1]


def make(step: int = 3) -> Checkpoint:
    arrays = {slot.name: np.full(slot.shape, step, np.float32) for slot in manifest().parameters}
    config = {"vocab_size": 256, "context_length": 8}
    return Checkpoint(arrays, step, 42, 4, 8, config, {"lr": 0.01}, {"name": "tales", "sha256": "00"})


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    saved = replace(make(), arrays={**make().arrays, "table.weight": random})
    path = checkpoint.save(tmp_path / "run.safetensors", saved)
    loaded = checkpoint.load(path)
    assert loaded.settings == saved.settings
    assert {n: a.tobytes() for n, a in loaded.arrays.items()} == {n: a.tobytes() for n, a in saved.arrays.items()}
    assert safetensors.numpy.load_file(path).keys() == saved.arrays.keys()
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_scalars_and_strided_arrays_keep_their_shapes(tmp_path: Path) -> None:
    arrays = {"scalar": np.float32(3.5) * np.ones((), np.float32), "strided": np.arange(12.0).reshape(3, 4).T}
    loaded = checkpoint.load(checkpoint.save(tmp_path / "c", replace(make(), arrays=arrays)))
    assert all(np.array_equal(loaded.arrays[name], array) for name, array in arrays.items())
    assert loaded.arrays["scalar"].shape == ()


def test_a_link_keeps_pointing_to_the_new_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    checkpoint.save(tmp_path / "link", make())
    assert (tmp_path / "link").is_symlink() and checkpoint.load(tmp_path / "real").step == 3


@pytest.mark.parametrize("keep", [0, 4, 100, 500, 5000, -4, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = checkpoint.save(tmp_path / "c", make())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="truncated"):
        checkpoint.load(path)


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "c", make())
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"\1" + whole[-2:])
    with pytest.raises(UserError, match="damaged or edited"):
        checkpoint.load(path)
    path.write_bytes(whole.replace(b'\\"step\\": 3', b'\\"step\\": 4'))
    with pytest.raises(UserError, match="damaged or edited"):
        checkpoint.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "weights")
    (tmp_path / "text").write_text("hello" * 100)
    cases = {
        "none": "no such file",
        "": "is not a file",
        "weights": "no TinyGPT checkpoint",
        "text": "not a safetensors",
    }
    for name, problem in cases.items():
        with pytest.raises(UserError, match=problem) as refusal:
            checkpoint.load(tmp_path / name)
        assert "hint:" in str(refusal.value)


@pytest.mark.parametrize("change", [{"step": -1}, {"step": 1 << 32}, {"seed": "x"}, {"training": None}, {"config": []}])
def test_settings_that_make_no_sense_are_refused_though_their_hash_is_right(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = checkpoint.save(tmp_path / "c", replace(make(), **change))
    with pytest.raises(UserError, match="settings are malformed"):
        checkpoint.load(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    metadata = {"format": checkpoint.FORMAT, "version": "9", "settings": "{}"}
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "c", metadata)
    with pytest.raises(UserError, match="version 9"):
        checkpoint.load(tmp_path / "c")


def test_a_checkpoint_of_another_model_is_refused_with_what_differs() -> None:
    fitting = make()
    checkpoint.require_fit(fitting, manifest(), "c")
    other = replace(fitting, arrays={**fitting.arrays, "table.weight": np.zeros((100, 100), np.float32)}, config=None)
    with pytest.raises(UserError, match=r"table\.weight is f32\[100, 100\], the model has f32\[256, 256\]"):
        checkpoint.require_fit(other, manifest(), "c")
    less = replace(fitting, arrays={n: a for n, a in fitting.arrays.items() if n != "table.weight.v"})
    with pytest.raises(UserError, match=r"table\.weight\.v is missing"):
        checkpoint.require_fit(less, manifest(), "c")
    more = replace(fitting, arrays={**fitting.arrays, "head.weight": np.zeros(1)})
    with pytest.raises(UserError, match=r"head\.weight is not in the model"):
        checkpoint.require_fit(more, manifest(), "c")
    with pytest.raises(UserError, match="context_length is 8 in the checkpoint and 16 in the model"):
        checkpoint.require_fit(fitting, manifest(context=16), "c")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_no_space_is_found_before_writing_and_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.save(tmp_path / "c", make(step=1))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1 << 30, 1 << 30, 1000))
    with pytest.raises(UserError, match="needs .* MiB, the disk has"):
        checkpoint.save(path, make(step=2))
    assert checkpoint.load(path).step == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_meanwhile_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = checkpoint.save(tmp_path / "c", make(step=1))

    def fill_up(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(safetensors.numpy, "save_file", fill_up)
    with pytest.raises(UserError, match="No space left on device; the previous checkpoint is untouched") as refusal:
        checkpoint.save(path, make(step=2))
    assert "free some space" in str(refusal.value)
    assert checkpoint.load(path).step == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_places_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        checkpoint.save(tmp_path / "none" / "c", make())
    with pytest.raises(UserError, match="not a regular file"):
        checkpoint.save(tmp_path, make())
    with pytest.raises(UserError, match="not a regular file"):
        checkpoint.save("/dev/null", make())
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(UserError, match="Permission denied"):
        checkpoint.save(tmp_path / "c", make())
    assert list(tmp_path.iterdir()) == []


# The child saves step 1, then step 2 with one call replaced by one that stops for ever at the worst moment.
CHILD = """
import sys, time
import tests.test_runtime_checkpoint as here
import os, safetensors.numpy
path = sys.argv[2]
here.checkpoint.save(path, here.make(step=1))

def stop(*arguments):
    print("saving", flush=True)
    time.sleep(60)

def write_half_and_stop(arrays, file, metadata):
    with open(file, "wb") as half:
        half.write(safetensors.numpy.save(arrays, metadata)[:1000])
    stop()

if sys.argv[1] == "rename":
    os.replace = stop
else:
    safetensors.numpy.save_file = write_half_and_stop
here.checkpoint.save(path, here.make(step=2))
"""


@pytest.mark.parametrize("moment", ["rename", "write"])
def test_a_kill_during_a_save_leaves_the_previous_checkpoint_whole(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "c"
    command = [sys.executable, "-c", CHILD, moment, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "saving\n"
        child.send_signal(signal.SIGKILL)
    loaded = checkpoint.load(path)
    assert loaded.step == 1 and all((array == 1).all() for array in loaded.arrays.values())
    assert len(list(tmp_path.iterdir())) == 2  # what the kill left behind …
    checkpoint.save(path, make(step=3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]  # … goes with the next save
    assert checkpoint.load(path).step == 3


def test_numbers_that_json_cannot_hold_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path / "c", replace(make(), training={"lr": float("nan")}))
    assert json.dumps(make().settings)
    assert list(tmp_path.iterdir()) == []
