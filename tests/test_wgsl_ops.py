"""Every op of the registry on a software Vulkan driver, through the passes, against its meaning in float64; and random
tile programs against the tile interpreter. `make fuzz` draws many more of those."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from tests.lowered import random_buffers, run_tiled, tiled
from tests.test_random_tiles import THOROUGH
from tests.tile_programs import tile_programs
from tests.wgsl_device import launch
from tinygpt.ir.core import Function, Kernel, Module, Region, Value
from tinygpt.ir.interpret import evaluate
from tinygpt.ir.interpret_tile import run_kernel
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.ir.registry import Example, sample_operands
from tinygpt.ir.text import print_kernel
from tinygpt.ir.types import TensorType
from tinygpt.lowering.simplify import Simplify
from tinygpt.targets.wgsl.profiles import DEFAULT

CASES = [pytest.param(name, i, id=f"{name}-{i}") for name, op in sorted(OPS.items()) for i, _ in enumerate(op.examples())]


NEEDS_POSITIVE = ("log",)  # what it gives for other numbers differs from target to target


def module_of(name: str, example: Example) -> Module:
    """One op as a function. No buffer holds truth values: those come from whole numbers and go out as 0 and 1. What an
    op makes of nothing is added to an operand."""
    g = GraphBuilder()
    inputs = [Value(TensorType("i32", t.shape) if t.dtype == "bool" else t, f"x{n}") for n, t in enumerate(example.types)]
    zero = g.constant(0, "i32") if any(t.dtype == "bool" for t in example.types) else None
    operands = [g("ne", x, zero) if t.dtype == "bool" else x for x, t in zip(inputs, example.types, strict=True)]
    results = list(g.emit(name, *operands, **example.attrs).results)
    for n, value in enumerate(results):
        if value.type.dtype == "bool":
            results[n] = g("where", value, g.constant(1.0), g.constant(0.0))
    if not inputs:
        inputs = [Value(value.type, "x0") for value in results]
        results = [g("add", inputs[0], results[0])]
    names = tuple(f"y{n}" for n in range(len(results)))
    return Module(name, functions={"f": Function("f", Region(tuple(inputs), tuple(g.ops), tuple(results)), {}, names)})


def operands_of(module: Module, example: Example, seed: int, is_positive: bool) -> dict[str, np.ndarray]:
    types = tuple(p.type for p in module.functions["f"].params)
    drawn = sample_operands(example if example.types else Example(types), np.random.default_rng(seed))
    if is_positive:
        drawn = [np.abs(x) + np.float32(0.1) if x.dtype == np.float32 else x for x in drawn]
    return {f"x{n}": x.astype(np.int32) if x.dtype == bool else x for n, x in enumerate(drawn)}


def meaning(module: Module, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with np.errstate(all="ignore"):
        return evaluate(module, "f", {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in inputs.items()})


@pytest.mark.parametrize(("name", "number"), CASES)
def test_an_op_on_the_device_is_its_meaning(name: str, number: int) -> None:
    example = OPS[name].examples()[number]
    module = module_of(name, example)
    inputs = operands_of(module, example, number, is_positive=name in NEEDS_POSITIVE)
    if not all(np.isfinite(y).all() for y in meaning(module, inputs).values()):
        inputs = operands_of(module, example, number, is_positive=True)
    expected = meaning(module, inputs)
    found = run_tiled(tiled(Simplify().run(module, DEFAULT), DEFAULT), "f", inputs, launch)
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        if wanted.dtype.kind in "iu":
            assert np.array_equal(found[key], wanted), key
        else:
            assert np.abs(found[key] - wanted).max() <= 1e-5 * np.abs(wanted).max() + 1e-9, key


@THOROUGH
@given(kernel=tile_programs())
def test_shaders_compute_random_tile_programs(kernel: Kernel) -> None:
    given_buffers = random_buffers(kernel, np.random.default_rng(0))
    expected, found = ([b.copy() for b in given_buffers] for _ in range(2))
    run_kernel(kernel, expected, wide=True)
    launch(kernel, found)
    for access, a, b in zip(kernel.access, expected, found, strict=True):
        if access != "in":
            assert np.abs(a - b).max() < 3e-5, print_kernel(kernel)
