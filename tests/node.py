"""The Node that tests of the JavaScript host use: NODE if it is set, else `node` on the PATH, 22 or later. And wabt, whose
programs run in it, from the PATH.

What is missing or too old fails a test where CI is set, and skips it, with the reason, on a laptop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
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


def wabt(program: str, *arguments: str | Path) -> str:
    """Run a program of the WebAssembly binary toolkit on modules with all that WebAssembly has; its output. Fails where it
    refuses its input, and as `require_node` does where it is not there."""
    require_node()
    found = shutil.which(program)
    if found is None:
        reason = f"there is no {program} on the PATH: npm install wabt has one (tools/node.sh)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


_STEPS = """
import fs from "node:fs";
import { open } from "./host/tinygpt.mjs";
const { threads, seed, batches } = JSON.parse(fs.readFileSync(0));
const session = await open(import.meta.dirname, { threads, seed });
const rows = [];
for (const [tokens, targets] of batches) {
  const { loss, gradNorm } = await session.trainStep(tokens, targets);
  rows.push([loss, gradNorm]);
}
session.close();
console.log(JSON.stringify(rows));
"""


def node_steps(bundle: Path, batches: Sequence[tuple[np.ndarray, np.ndarray]], threads: int, seed: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each training step of a new session in Node, on the batches (integers [batch, context])."""
    (bundle / "steps.mjs").write_text(_STEPS)
    asked = {"threads": threads, "seed": seed, "batches": [[a.ravel().tolist() for a in pair] for pair in batches]}
    done = subprocess.run(
        [require_node(), str(bundle / "steps.mjs")], input=json.dumps(asked), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [(loss, norm) for loss, norm in json.loads(done.stdout)]
