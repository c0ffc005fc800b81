"""The cpu loop strategy against the tile interpreter: every op of the registry and every kernel of odd models, for
vectors of 16, 4 and 1 lanes, with and without row panels. Bits depend on order fields only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.lowered import (
    BLOCKS, CPU_PROFILES, NARROW, PANELS, WIDE, largest_difference, op_module, passes_until, random_buffers, small_model, tiled,
)  # fmt: skip
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel
from tinygpt.ir.interpret_loop import run_loop_kernel
from tinygpt.ir.ops import OPS
from tinygpt.ir.plan import grid_points
from tinygpt.ir.registry import sample_operands
from tinygpt.lowering.cpu import lower
from tinygpt.lowering.simplify import Simplify



def stored(name: str, number: int) -> bool:
    """Whether an example reads and writes no truth values: they stay inside kernels, no buffer holds them."""
    example = OPS[name].examples()[number]
    return all(t.dtype != "bool" for t in (*example.types, *OPS[name].infer(example.types, example.attrs)))


CASES = [
    pytest.param(name, i, id=f"{name}-{i}")
    for name, op in sorted(OPS.items())
    for i, _ in enumerate(op.examples())
    if op.kind != "view" and not name.endswith(("_d0", "_d1", "_d2")) and op.examples()[i].types and stored(name, i)
]


def op_kernels(name: str, number: int, caps: Caps) -> list[tuple[Kernel, list[np.ndarray]]]:
    """The kernels of one op's example with buffer contents: the example's own operands where it says what they may be."""
    example = OPS[name].examples()[number]
    module = tiled(Simplify().run(op_module(name, example), caps), caps)
    operands = sample_operands(example, np.random.default_rng(number)) if example.inputs else []
    found = []
    for kernel in module.kernels.values():
        buffers = random_buffers(kernel, np.random.default_rng(number))
        for i, (v, x) in enumerate(zip(kernel.params, operands, strict=False)):
            if v.type.size == x.size and kernel.access[i] == "in":
                buffers[i] = np.ascontiguousarray(x).reshape(-1)
        found.append((kernel, buffers))
    return found


@pytest.mark.parametrize("caps", CPU_PROFILES[:2], ids=lambda c: c.name)
@pytest.mark.parametrize(("name", "number"), CASES)
def test_loops_of_an_op_compute_its_tile_program(name: str, number: int, caps: Caps) -> None:
    for kernel, buffers in op_kernels(name, number, caps):
        assert largest_difference(kernel, caps, buffers) < 2e-5, kernel.name


MODELS = [
    dict(),
    dict(n_heads=2, d_model=16, d_mlp=20, context_length=70, vocab_size=18, batch=1),
]


@pytest.mark.parametrize("caps", CPU_PROFILES, ids=lambda c: c.name)
@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_every_kernel_of_a_model_computes_its_tile_program(fields: dict[str, int], caps: Caps) -> None:
    module = small_model(**fields)
    for p in passes_until("tile"):
        module = p.run(module, caps)
    rng = np.random.default_rng(3)
    for kernel in module.kernels.values():
        assert largest_difference(kernel, caps, random_buffers(kernel, rng)) < 3e-5, kernel.name


def outputs(kernel: Kernel, caps: Caps, buffers: list[np.ndarray], parts: int = 1) -> list[bytes]:
    """The bits of a kernel's outputs, its grid run in some parts."""
    copies = [b.copy() for b in buffers]
    loops, points = lower(kernel, caps), grid_points(kernel)
    for n in range(parts):
        run_loop_kernel(loops, copies, points * n // parts, points * (n + 1) // parts)
    return [b.tobytes() for b, access in zip(copies, kernel.access, strict=True) if access != "in"]


def test_bits_depend_on_the_schedule_not_on_vectors_panels_or_parts() -> None:
    module = small_model(n_heads=3, d_model=48, d_mlp=80, context_length=37)
    for p in passes_until("tile"):
        module = p.run(module, WIDE)
    rng = np.random.default_rng(5)
    for kernel in module.kernels.values():
        buffers = random_buffers(kernel, rng)
        expected = outputs(kernel, WIDE, buffers)
        assert outputs(kernel, NARROW, buffers) == expected, kernel.name
        assert outputs(kernel, PANELS, buffers) == expected, kernel.name
        assert outputs(kernel, replace(WIDE, register_tile=(8, 3)), buffers, parts=3) == expected, kernel.name
        assert outputs(kernel, BLOCKS, buffers) == expected, kernel.name
