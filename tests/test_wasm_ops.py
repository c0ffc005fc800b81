"""Every op of the registry as WebAssembly, in wasmtime, for every profile: its kernels against their tile programs in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from tests.lowered import largest_difference
from tests.test_cpu_strategy import CASES, op_kernels
from tests.test_random_tiles_wasm import CHOSEN
from tests.wasm_kernels import WasmKernels
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel
from tinygpt.targets.wasm.profiles import PROFILES


def run(loops: Kernel, buffers: list[np.ndarray], lo: int, hi: int, caps: Caps) -> None:
    WasmKernels([loops], caps, pages=32).run(loops, buffers, lo, hi)


@pytest.mark.parametrize("profile", CHOSEN)
@pytest.mark.parametrize(("name", "number"), CASES)
def test_an_op_in_wasmtime_is_its_tile_program(name: str, number: int, profile: str) -> None:
    caps = PROFILES[profile]
    for kernel, buffers in op_kernels(name, number, caps):
        assert largest_difference(kernel, caps, buffers, partial(run, caps=caps)) < 2e-5, kernel.name
