"""FlashAttention-2 on a software Vulkan driver, forward and backward, against PyTorch in float64: no further from it than
twice what PyTorch's own attention in float32 is, and a floor of eight units in the last place: of the largest element, or
of an eighth of the sums that cancel in a gradient.

A driver in software compiles a shader of attention for seconds, so most shapes run in the interpreter of workgroups;
`make fuzz` draws more of them, and runs some on the device."""

from __future__ import annotations


from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.lowered import run_tiled, tiled
from tests.wgsl_device import launch
from tinygpt.ir.core import Function, Kernel, Module, Region, Value
from tinygpt.ir.interpret_workgroup import run_workgroups
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.ir.types import TensorType
from tinygpt.ir.verify import verify_kernel
from tinygpt.lowering.gpu import lower
from tinygpt.targets.wgsl.profiles import DEFAULT

Shape = tuple[int, int, int, int]  # batch, heads, context, width

FLOOR = 8 * np.finfo(np.float32).eps
NAMES = ("out", "dq", "dk", "dv")


def module_of(shape: Shape) -> Module:
    """Causal attention and its gradient by q, k and v [batch, heads, context, width], as a training step computes them."""
    g = GraphBuilder()
    q, k, v, dout = (Value(TensorType("f32", shape), name) for name in ("q", "k", "v", "dout"))
    attrs = {"causal": True, "scale": shape[3] ** -0.5}
    attention = g.emit("attention", q, k, v, **attrs)
    grads = OPS["attention"].gradient(g, attention, [dout, None])
    body = Region((q, k, v, dout), tuple(g.ops), (attention.results[0], *(x for x in grads if x is not None)))
    return tiled(Module("attention", functions={"f": Function("f", body, {}, NAMES)}), DEFAULT)


def pytorch(inputs: dict[str, NDArray[np.float32]], dtype: torch.dtype) -> dict[str, NDArray[np.float64]]:
    """The same by PyTorch's autograd."""
    q, k, v = (torch.from_numpy(inputs[name]).to(dtype).requires_grad_() for name in ("q", "k", "v"))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.backward(torch.from_numpy(inputs["dout"]).to(dtype))
    found = (out.detach(), q.grad, k.grad, v.grad)
    return {name: x.double().numpy() for name, x in zip(NAMES, found, strict=True) if x is not None}


def assert_as_close_as_pytorch(shape: Shape, spread: float, run: Callable[[Kernel, list[NDArray[Any]]], None]) -> None:
    rng = np.random.default_rng(shape[2] * 1000 + shape[3])
    inputs = {name: (spread * rng.standard_normal(shape)).astype(np.float32) for name in ("q", "k", "v", "dout")}
    exact, single = pytorch(inputs, torch.float64), pytorch(inputs, torch.float32)
    found = run_tiled(module_of(shape), "f", inputs, run)
    for name, wanted in exact.items():
        largest = np.abs(wanted).max()
        if name in ("dq", "dk"):  # two sums cancel in it, all of them where a query sees one key: their rounding stays
            sums = np.abs(inputs["dout"] * inputs["v"]).sum(-1).max() * shape[3] ** -0.5
            largest = max(largest, sums * max(np.abs(inputs[n]).max() for n in "qk") / 8)
        ours, theirs = (np.abs(x[name] - wanted).max() / largest for x in (found, single))
        assert ours <= 2 * theirs + FLOOR, f"{name}: {ours:.3g} of its largest element off, PyTorch {theirs:.3g}"


def in_interpreter(kernel: Kernel, buffers: list[NDArray[Any]]) -> None:
    loops = lower(kernel, DEFAULT)
    verify_kernel(loops, DEFAULT)
    run_workgroups(loops, buffers)


CORNERS = [(1, 1, context, width) for context in (1, 300) for width in (8, 128)]
BETWEEN = [(1, 2, 2, 16), (1, 2, 31, 32), (1, 2, 33, 65), (2, 1, 100, 80), (1, 3, 101, 48)]
WIDE = [(1, 1, 40, 200), (1, 1, 33, 512)]


@pytest.mark.parametrize("shape", CORNERS + BETWEEN, ids=lambda s: f"{s[2]}x{s[3]}")
def test_attention_is_as_close_to_float64_as_pytorch(shape: Shape) -> None:
    assert_as_close_as_pytorch(shape, 1.0, launch)


@pytest.mark.parametrize("shape", [(1, 1, context, width) for context in (31, 32, 33, 63, 64, 65, 299) for width in (8, 63, 127, 128)] + WIDE, ids=lambda s: f"{s[2]}x{s[3]}")
def test_workgroups_of_attention_are_as_close_to_float64_as_pytorch(shape: Shape) -> None:
    assert_as_close_as_pytorch(shape, 1.0, in_interpreter)


IS_FUZZING = not settings.default.derandomize
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 300), st.integers(8, 128))


@settings(max_examples=300 if IS_FUZZING else 8, suppress_health_check=list(HealthCheck))
@given(shape=SHAPES, spread=st.sampled_from((0.1, 1.0, 3.0)))
def test_attention_of_any_shape_is_as_close_to_float64_as_pytorch(shape: Shape, spread: float) -> None:
    assert_as_close_as_pytorch(shape, spread, in_interpreter)


@settings(max_examples=30 if IS_FUZZING else 1, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))
@given(shape=SHAPES, spread=st.sampled_from((0.1, 1.0, 3.0)))
def test_attention_of_any_shape_on_the_device_is_as_close_to_float64_as_pytorch(shape: Shape, spread: float) -> None:
    assert_as_close_as_pytorch(shape, spread, launch)
