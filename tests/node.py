"""The Node that tests of the JavaScript host use: NODE if it is set, else `node` on the PATH, 22 or later.

One that is missing or too old fails a test where CI is set, and skips it, with the reason, on a laptop."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tinygpt.ir.errors import UserError
from tinygpt.toolchain import find_node


def require_node() -> str:
    """The command that starts Node. Skips or fails the test where there is none."""
    try:
        return find_node()
    except UserError as problem:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(problem))


def node(*arguments: str | Path, status: int = 0, timeout: float = 60) -> str:
    """Run Node; its output, standard error included. Fails unless it exits with `status`."""
    done = subprocess.run(
        [require_node(), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout
