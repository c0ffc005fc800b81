"""The command line in this process, on a model small enough to compile and train in a second."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tinygpt.cli import main

CONFIG: dict[str, Any] = {
    "model_name": "mini", "n_layers": 1, "d_model": 24, "n_heads": 2, "vocab_size": 256, "context_length": 16,
}  # fmt: skip
SHAPE = ("--batch", "2", "--context", "8")


@dataclass(frozen=True)
class Done:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str


class CommandLine:
    """Runs commands in a folder of their own, in which mini.json is CONFIG."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capture = capture
        (folder / "mini.json").write_text(json.dumps(CONFIG))

    def __call__(self, *arguments: object) -> Done:
        self._capture.readouterr()
        status = main([str(argument) for argument in arguments])
        printed = self._capture.readouterr()
        return Done(status, printed.out, printed.err)

    def works(self, *arguments: object) -> str:
        """Run a command that must work; its output."""
        done = self(*arguments)
        assert done.status == 0, done.err
        return done.out

    def refused(self, *arguments: object) -> str:
        """Run a command that must refuse its input; its one paragraph."""
        done = self(*arguments)
        assert done.status == 2, (done.out, done.err)
        assert done.err.startswith("error: ") and "\n  hint: " in done.err and "Traceback" not in done.err
        assert "\n\n" not in done.err
        return done.err
