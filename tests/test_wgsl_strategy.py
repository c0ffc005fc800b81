"""The gpu loop strategy and its WGSL on a software Vulkan driver against the tile interpreter in float64: every kernel of
odd models, rows too long for registers, products of any shape."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.lowered import op_module, passes_until, random_buffers, small_model, tiled
from tests.wgsl_device import difference
from tinygpt.compiler import module_for
from tinygpt.ir.core import Kernel
from tinygpt.ir.errors import UserError
from tinygpt.ir.ops import OPS
from tinygpt.ir.registry import Example, sample_operands
from tinygpt.ir.types import TensorType
from tinygpt.lowering.gpu import lower
from tinygpt.lowering.simplify import Simplify
from tinygpt.presets import PRESETS
from tinygpt.targets.wgsl.profiles import DEFAULT


@pytest.mark.parametrize(
    "fields", [{}, dict(n_heads=2, d_model=16, d_mlp=20, context_length=70, vocab_size=18, batch=1)], ids=["odd", "two heads of eight"]
)
def test_every_shader_of_a_model_computes_its_tile_program(fields: dict[str, int]) -> None:
    module = small_model(**fields)
    for p in passes_until("tile"):
        module = p.run(module, DEFAULT)
    rng = np.random.default_rng(3)
    for kernel in module.kernels.values():
        assert difference(kernel, random_buffers(kernel, rng)) < 3e-5, kernel.name


def only_kernel(name: str, shapes: list[TensorType], **attrs: Any) -> Kernel:
    (kernel,) = tiled(Simplify().run(op_module(name, Example(tuple(shapes), attrs)), DEFAULT), DEFAULT).kernels.values()
    return kernel


def f32(*shape: int) -> TensorType:
    return TensorType("f32", shape)


@pytest.mark.parametrize("columns", [9000, 9001, 50257])
def test_rows_longer_than_registers_are_read_again_in_each_pass(columns: int) -> None:
    logits, targets = f32(3, columns), TensorType("i32", (3,))
    kernel = only_kernel("cross_entropy", [logits, targets])
    rng = np.random.default_rng(0)
    x = (3 * rng.standard_normal(logits.size)).astype(np.float32)
    buffers = [x, np.array([0, 5, columns - 1], np.int32), *(np.zeros(v.type.size, np.float32) for v in kernel.params[2:])]
    assert difference(kernel, buffers) < 1e-6


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (5, 3, 7), (65, 17, 66), (130, 70, 65), (257, 100, 36), (640, 33, 640)])
def test_products_of_any_shape(rows: int, inner: int, columns: int) -> None:
    kernel = only_kernel("matmul", [f32(rows, inner), f32(inner, columns)])
    example = Example((f32(rows, inner), f32(inner, columns)))
    operands = [x.reshape(-1) for x in sample_operands(example, np.random.default_rng(rows))]
    assert difference(kernel, [*operands, np.zeros(rows * columns, np.float32)]) < 1e-6


def test_any_number_of_threads_computes_a_tile_program() -> None:
    kernel = only_kernel("attention", [f32(1, 1, 50, 24)] * 3, causal=True, scale=0.2)
    buffers = random_buffers(kernel, np.random.default_rng(1))
    for threads in ((4, 8), (8, 4), (16, 8), (3, 5)):
        assert difference(replace(kernel, order={**kernel.order, "threads": threads}), buffers) < 5e-6


ATTENTION = [f32(2, 3, 130, 32)] * 3


def attention_kernels(shape: list[TensorType]) -> list[Kernel]:
    q, row = shape[0], f32(*shape[0].shape[:3])
    attrs = {"causal": True, "scale": 0.2}
    backward = [only_kernel(name, [q, q, q, q, row, row], **attrs) for name in ("attention_grad_q", "attention_grad_kv")]
    return [only_kernel("attention", shape, **attrs), *backward]


@pytest.mark.parametrize("number", range(3))
def test_workgroups_with_the_longest_loops_begin_first(number: int) -> None:
    kernel = lower(attention_kernels(ATTENTION)[number], DEFAULT)
    loops = [op for op in kernel.body.ops if op.name == "for"]
    points = [dict(zip(kernel.grid, at, strict=True)) for at in product(*map(range, kernel.grid.values()))]
    trips = [sum(max(0, op.attrs["hi"].evaluate(at) - op.attrs["lo"].evaluate(at)) for op in loops) for at in points]
    assert trips == sorted(trips, reverse=True) and trips[0] > trips[-1]


@pytest.mark.parametrize("context", [32, 65, 130, 132, 257, 512])
@pytest.mark.parametrize("number", range(3))
def test_threads_that_hand_over_a_result_write_to_different_banks(number: int, context: int) -> None:
    kernel = lower(attention_kernels([f32(1, 1, context, 32)] * 3)[number], DEFAULT)
    ops = list(kernel.body.walk())
    shared = {op.result: op.attrs["lanes"] for op in ops if op.name == "shared" and op.result.hint == "left"}
    stores = [(shared[op.operands[0]], op.attrs["at"]) for op in ops if op.name == "store" and op.operands[0] in shared]
    assert stores
    for lanes, at in stores:
        together = 32 // lanes  # threads whose vectors memory of 32 banks of a word takes at once
        others = dict.fromkeys(at.variables(), 0)
        words = [at.evaluate({**others, "thread": thread}) for thread in range(together)]
        assert len({word // lanes % together for word in words}) == together, str(at)


@pytest.mark.parametrize("width", [4, 33, 64, 68, 96, 97, 128, 132, 192, 256, 512])
def test_attention_of_any_width_fits_the_memory_of_every_device(width: int) -> None:
    for context in (1, 63, 64, 128, 130, 257):
        for kernel in attention_kernels([f32(1, 1, context, width)] * 3):
            lower(kernel, DEFAULT)


def test_what_does_not_fit_names_the_kernel_and_the_limit() -> None:
    kernel = only_kernel("matmul", [f32(300, 30), f32(30, 300)])
    with pytest.raises(UserError, match="buffer y0 has 360,000 bytes, a binding of small at most 100,000"):
        lower(kernel, replace(DEFAULT, name="small", binding_bytes=100_000))
    with pytest.raises(UserError, match="bytes of workgroup memory, small has 1,000"):
        lower(kernel, replace(DEFAULT, name="small", workgroup_bytes=1000))
    with pytest.raises(UserError, match="3 buffers, small binds 2"):
        lower(kernel, replace(DEFAULT, name="small", bindings=2))
    with pytest.raises(UserError, match="threads, small has 8"):
        lower(kernel, replace(DEFAULT, name="small", workgroup_threads=8))


FIXED, OF_A_LAYER = 12, 24  # dispatches of a training step of a preset, at most


@pytest.mark.parametrize("name", ["tiny", "small", "medium", "xl", "massive"])
def test_a_training_step_takes_few_dispatches(name: str) -> None:
    preset = PRESETS[name]
    module = module_for(preset.config, preset.batch_size, None)
    for p in passes_until("tile"):
        module = p.run(module, DEFAULT)
    launches = sum(op.name == "launch" for op in module.functions["train_step"].body.ops)
    assert launches <= FIXED + OF_A_LAYER * preset.config.n_layers
