"""An engine in another process: a C++ bundle compiled around native_driver.cpp, for another processor (under an
emulator) or with other flags. It is used like any engine, so the tests of bundles run on it unchanged."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cpp_toolchain import require
from tinygpt.runtime.manifest import Manifest, Slot
from tinygpt.runtime.native import build_record, layout_id

_DRIVER = Path(__file__).parent / "native_driver.cpp"


class PipedEngine:
    """`program` is the driver's command. Pools, functions and tensors are those of `manifest`."""

    def __init__(self, program: Sequence[str], manifest: Manifest, threads: int = 1) -> None:
        self.threads = threads
        self._pools = {name: number for number, name in enumerate(manifest.pools)}
        self._entries = {name: number for number, name in enumerate(manifest.functions)}
        self._process = subprocess.Popen([*program, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._answer(64).decode() == layout_id(manifest)

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        self._send(b"w", self._pools[slot.pool], slot.offset, slot.nbytes, content=array.tobytes())

    def read(self, slot: Slot) -> NDArray[Any]:
        self._send(b"r", self._pools[slot.pool], slot.offset, slot.nbytes)
        return np.frombuffer(self._answer(slot.nbytes), slot.numpy_dtype).reshape(slot.shape).copy()

    def run(self, function: str) -> None:
        self._send(b"x", self._entries[function])
        assert self._number() == 0

    def allocations(self) -> int:
        """How often runs have allocated so far."""
        self._send(b"a")
        return self._number()

    def counted_allocations(self) -> int:
        """How many allocations the process has made at all, one more each time: whether it counts."""
        self._send(b"t")
        return self._number()

    def close(self) -> None:
        self._process.communicate(timeout=60)

    @property
    def status(self) -> int | None:
        """The driver's exit status, once it has ended."""
        return self._process.poll()

    def _send(self, command: bytes, *numbers: int, content: bytes = b"") -> None:
        assert self._process.stdin
        self._process.stdin.write(command + struct.pack(f"={len(numbers)}q", *numbers) + content)
        self._process.stdin.flush()

    def _number(self) -> int:
        (value,) = struct.unpack("=q", self._answer(8))
        return int(value)

    def _answer(self, size: int) -> bytes:
        assert self._process.stdout
        content = self._process.stdout.read(size)
        assert len(content) == size, f"the driver ended with status {self._process.wait()}"
        return content


def build_driver(folder: Path, manifest: Manifest, program: Path, compiler: str, more: Sequence[str] = ()) -> Path:
    """Compile the bundle and the driver into `program`, with the bundle's flags and `more`."""
    record = build_record(folder, manifest)
    sources = [str(folder / name) for name in record.sources]
    command = [compiler, *record.compile, *more, *sources, str(_DRIVER), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def aarch64_engine(folder: Path, manifest: Manifest, program: Path, threads: int = 1) -> PipedEngine:
    """The bundle on a 64-bit Arm processor, emulated. It must be one of the baseline profile: -march=native means this
    machine. Skips or fails the test where the cross-compiler or the emulator is missing."""
    compiler = require(["aarch64-linux-gnu-g++"], "g++-aarch64-linux-gnu")
    emulator = require(["qemu-aarch64", "qemu-aarch64-static"], "qemu-user")
    build_driver(folder, manifest, program, compiler, more=["-static"])
    return PipedEngine([emulator, str(program)], manifest, threads)
