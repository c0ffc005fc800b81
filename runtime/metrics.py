"""The metrics of a run as JSON lines: {"step", "loss", "grad_norm", "tokens_per_s"} for each step and
{"step", "train_loss", "val_loss"} for each evaluation."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinygpt.runtime.errors import UserError


class MetricsLog:
    """A metrics file open for appending. Opening it for a run that resumes at a step drops the rows after that step (a
    run that was killed logs further than it saves); a run from the start begins the file anew."""

    def __init__(self, path: str | Path, resume_step: int) -> None:
        """Raises UserError if the file cannot be written, or is no metrics file: then it is left as it is."""
        self._path = Path(path)
        try:
            kept = [line for line, step in _rows(self._path) if resume_step and step <= resume_step]
            self._begin(kept)
            self._file = self._path.open("a", buffering=1, encoding="utf-8")
        except OSError as error:
            raise self._refusal(error) from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row at once. Raises UserError if the system does not take it (no space)."""
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Close the file; every row was written already."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _refusal(self, error: OSError) -> UserError:
        problem = f"metrics {self._path}: cannot be written: {error.strerror or error}"
        return UserError(problem, hint="name a file in a folder you can write to, on a disk with space")

    def _begin(self, lines: list[str]) -> None:
        is_device = self._path.exists() and not self._path.is_file()
        if is_device:  # a pipe, or /dev/null: nothing to keep, nothing to replace
            return
        partial = self._path.with_name(f".{self._path.name}.partial")
        try:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            os.replace(partial, self._path)
        finally:
            partial.unlink(missing_ok=True)


def _rows(path: Path) -> list[tuple[str, int]]:
    """The file's lines with their steps. A last line that was cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: list[tuple[str, int]] = []
    for number, line in enumerate(lines, 1):
        step = _step_of(line)
        if step is None and number < len(lines):
            raise _not_metrics(path, number)
        if step is not None:
            rows.append((line, step))
    if lines and not rows:
        raise _not_metrics(path, 1)
    return rows


def _step_of(line: str) -> int | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


def _not_metrics(path: Path, line: int) -> UserError:
    return UserError(
        f"metrics {path}: line {line} is no metrics row, so the file is left alone", hint="name a new file"
    )
