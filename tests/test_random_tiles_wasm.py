"""Random tile programs as WebAssembly, in wasmtime, for every profile: against the tile interpreter in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from tests.lowered import random_buffers
from tests.test_random_tiles import THOROUGH
from tests.tile_programs import tile_programs
from tests.wasm_kernels import WasmKernels
from tinygpt.ir.core import Kernel
from tinygpt.ir.interpret_tile import run_kernel
from tinygpt.ir.plan import grid_points
from tinygpt.ir.text import print_kernel
from tinygpt.lowering.cpu import lower
from tinygpt.targets.wasm.profiles import PROFILES

CHOSEN = [name for name in PROFILES if "threads" not in name]  # those with threads have the same kernels


@pytest.mark.parametrize("name", CHOSEN)
@THOROUGH
@given(kernel=tile_programs())
def test_modules_compute_the_tile_program(name: str, kernel: Kernel) -> None:
    caps = PROFILES[name]
    buffers = random_buffers(kernel, np.random.default_rng(0))
    expected, found = ([b.copy() for b in buffers] for _ in range(2))
    run_kernel(kernel, expected, wide=True)
    loops = lower(kernel, caps)
    WasmKernels([loops], caps, pages=32).run(loops, found, 0, grid_points(kernel))
    for access, a, b in zip(kernel.access, expected, found, strict=True):
        if access != "in":
            assert np.abs(a - b).max() < 3e-5, print_kernel(kernel)
