"""Programs of other people that measuring needs: a C++ compiler for small programs of ours (the FMA peak, a library to
preload), compiled once into the cache; and Node, which runs WebAssembly in V8."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from tinygpt.ir.errors import UserError
from tinygpt.runtime.native import find_compiler

OLDEST_NODE = 22


def compiled(source: str, flags: Sequence[str], suffix: str = "") -> Path:
    """The program or library of a source, from the cache or from the system's compiler.

    Raises the runtime's UserError where there is no compiler, UserError where it fails or nothing can be written."""
    compiler = find_compiler()
    key = hashlib.sha256("\0".join([source, *flags, str(compiler)]).encode()).hexdigest()[:32]
    path = platformdirs.user_cache_path("tinygpt") / "measuring" / f"{key}{suffix}"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            (Path(folder) / "program.cpp").write_text(source)
            result = Path(folder) / "program"
            command = [*compiler.command, *flags, str(Path(folder) / "program.cpp"), "-o", str(result)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode:
                raise UserError(
                    f"{compiler} failed: {done.stderr.strip()[:500]}",
                    hint="check that it works, or set CXX to another compiler",
                )
            os.replace(result, path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written: {error.strerror or error}",
            hint="set XDG_CACHE_HOME to a folder you may write to",
        ) from error
    return path


def find_node() -> str:
    """The command that starts Node: NODE if it is set, else `node` on the PATH. Raises UserError without one that is
    recent enough."""
    command = os.environ.get("NODE") or shutil.which("node")
    hint = f"install Node {OLDEST_NODE} or later (npm install node@24 has one), put it on the PATH or set NODE to it"
    if not command or not shutil.which(command):
        raise UserError(f"Node is not installed{f': there is no {command}' if command else ''}", hint=hint)
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    number = version.removeprefix("v").split(".")[0]
    if not version.startswith("v") or not number.isdecimal() or int(number) < OLDEST_NODE:
        raise UserError(f"{command} is {version or 'not Node'}, {OLDEST_NODE} or later is needed", hint=hint)
    return command
