"""The compilers and emulators that tests of generated C++ use, and kernels compiled straight into callable functions.

A program that is missing fails a test where CI is set, and skips it, with the reason, on a laptop."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel
from tinygpt.ir.interpret_loop import scratch_elements
from tinygpt.targets.cpp import model
from tinygpt.targets.cpp.build import compile_flags
from tinygpt.targets.cpp.names import identifier
from tinygpt.targets.cpp.printer import VECTOR_WIDTHS, print_kernel

COMPILERS = {
    "g++": (("g++",), "g++"),
    "clang++": (("clang++", *(f"clang++-{n}" for n in range(22, 13, -1))), "clang"),
}


def require(programs: Sequence[str], package: str) -> str:
    """The path of the first of these programs that is installed; else fail or skip."""
    found = next((path for program in programs if (path := shutil.which(program))), None)
    if found:
        return found
    reason = f"{programs[0]} is not installed: sudo apt install {package}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def compiler(family: str) -> str:
    return require(*COMPILERS[family])


def header() -> str:
    return model._template("vector.h", widths=VECTOR_WIDTHS)


class CompiledKernels:
    """Kernels compiled into one library; call one with its flat buffers."""

    def __init__(
        self,
        kernels: Sequence[Kernel],
        caps: Caps,
        folder: Path,
        command: str,
        strict: bool = True,
        more: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vector.h").write_text(header())
        source = folder / "kernels.cpp"
        source.write_text(
            '#include "vector.h"\n' + "\n".join(print_kernel(kernel, caps) + _entry(kernel) for kernel in kernels)
        )
        library = folder / "kernels.so"
        flags = [*compile_flags(caps, strict), *more, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        done = subprocess.run(
            [command, *flags, "-shared", str(source), "-o", str(library)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        self._library = ctypes.CDLL(str(library))

    def run(self, kernel: Kernel, buffers: Sequence[NDArray[Any]], lo: int, hi: int) -> None:
        """Run grid points lo..hi-1, changing the buffers in place. Scratch is aligned as the engine's is."""
        scratch = Fenced(np.full(scratch_elements(kernel), np.nan, np.float32), 64)
        fenced = [Fenced(array, array.itemsize) for array in buffers]
        addresses = (ctypes.c_void_p * len(buffers))(*(each.array.ctypes.data for each in fenced))
        function = self._library[f"run_{identifier(kernel.name)}"]
        function(addresses, ctypes.c_void_p(scratch.array.ctypes.data), ctypes.c_long(lo), ctypes.c_long(hi))
        assert scratch.whole(), f"{kernel.name} wrote beside its scratch memory"
        for number, each in enumerate(fenced):
            assert each.whole(), f"{kernel.name} wrote beside its buffer {number}"
        for array, each in zip(buffers, fenced, strict=True):
            array[...] = each.array


class Fenced:
    """A copy of an array in memory where a write beside it is seen. A read a vector long, as pools allow, is none."""

    _FENCE, _FILL = 4096, 0xA5

    def __init__(self, array: NDArray[Any], alignment: int) -> None:
        space = np.full(array.nbytes + 2 * self._FENCE + alignment, self._FILL, np.uint8)
        start = self._FENCE + -(space.ctypes.data + self._FENCE) % alignment
        self._fences = space[:start], space[start + array.nbytes :]
        self.array = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    def whole(self) -> bool:
        return all(bool((fence == self._FILL).all()) for fence in self._fences)


def _entry(kernel: Kernel) -> str:
    arguments = [f"({value.type.dtype}*)buffers[{i}]" for i, value in enumerate(kernel.params)]
    return (
        'extern "C" __attribute__((visibility("default"))) '
        f"void run_{identifier(kernel.name)}(void** buffers, f32* scratch, long lo, long hi) {{\n"
        f"  {identifier(kernel.name)}({', '.join([*arguments, 'scratch', 'lo', 'hi'])});\n}}\n"
    )
