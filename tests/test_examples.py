"""The examples run, as a newcomer runs them, and show what they say they show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Arguments that keep each run short, and a line its output must have.
EXAMPLES = {
    "demo.py": (["--preset", "tiny", "--steps", "20", "--data", "tales", "--threads", "2"], "times as fast"),
    "inspect_ir.py": (["--preset", "tiny", "--kernel", "layer_norm"], "after tile: ["),
    "custom_model.py": (["--steps", "10"], "validation loss of a batch"),
}


def test_every_example_is_tested() -> None:
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str) -> None:
    arguments, shown = EXAMPLES[name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
