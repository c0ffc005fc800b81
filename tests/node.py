"""The Node that tests of the JavaScript host use: NODE if it is set, else `node` on the PATH, 22 or later.

One that is missing or too old fails a test where CI is set, and skips it, with the reason, on a laptop."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

OLDEST = 22


@functools.cache
def _found() -> tuple[str, str]:
    """The command, and what is wrong with it."""
    command = os.environ.get("NODE") or shutil.which("node")
    if not command:
        return "", "node is not installed: npm install node@24, and set NODE to its node_modules/.bin/node"
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    old = not version.startswith("v") or int(version[1:].split(".")[0]) < OLDEST
    return command, f"{command} is {version or 'not Node'}, {OLDEST} or later is needed: set NODE to one" if old else ""


def node(*arguments: str | Path, status: int = 0, timeout: float = 60) -> str:
    """Run Node; its output, standard error included. Fails unless it exits with `status`."""
    command, problem = _found()
    if problem and os.environ.get("CI"):
        pytest.fail(problem)
    if problem:
        pytest.skip(problem)
    done = subprocess.run(
        [command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout
