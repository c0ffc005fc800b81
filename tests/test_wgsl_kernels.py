"""The kernels a model is made of on a software Vulkan driver, against their meaning in float64, at odd shapes and at shapes
of several tiles: products of three forms with each epilogue, rows, embeddings, and the clipped optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tests.lowered import passes_until, run_tiled, small_model, tiled
from tests.test_segment_sums import KINDS, added_in_order, drawn, gradient
from tests.wgsl_device import launch
from tinygpt.ir.core import Function, Module, Region, Value
from tinygpt.ir.interpret import evaluate
from tinygpt.ir.ops import GraphBuilder
from tinygpt.ir.types import TensorType
from tinygpt.lowering.simplify import Simplify
from tinygpt.targets.wgsl.profiles import DEFAULT

TOLERANCE = 2e-6  # of a result's largest element

Arrays = Mapping[str, np.ndarray]
Program = Callable[..., Any]  # of a builder and the operands


def module_of(program: Program, operands: Arrays) -> Module:
    """A function `f` of the operands, one argument each."""
    g = GraphBuilder()
    types = {name: TensorType("i32" if x.dtype == np.int32 else "f32", x.shape) for name, x in operands.items()}
    args = {name: Value(type, name) for name, type in types.items()}
    made = program(g, **args)
    results = made if isinstance(made, tuple) else (made,)
    body = Region(tuple(args.values()), tuple(g.ops), results)
    return Module("kernels", functions={"f": Function("f", body, {}, tuple(f"y{n}" for n in range(len(results))))})


def wide(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: x.astype(np.float64) if x.dtype == np.float32 else x for name, x in arrays.items()}


def assert_agree(found: Arrays, expected: Arrays) -> None:
    for name, wanted in expected.items():
        off = np.abs(found[name].reshape(wanted.shape) - wanted).max()
        assert off <= TOLERANCE * np.abs(wanted).max(), f"{name} is off by {off:.3g}, its largest element is {np.abs(wanted).max():.3g}"


def assert_is_its_meaning(program: Program, operands: Arrays) -> None:
    """The program is one kernel, which computes it."""
    module = module_of(program, operands)
    lowered = tiled(Simplify().run(module, DEFAULT), DEFAULT)
    assert len(lowered.kernels) == 1, ", ".join(k.of for k in lowered.kernels.values())
    assert_agree(run_tiled(lowered, "f", operands, launch), evaluate(module, "f", wide(operands)))


def normal(seed: int, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


# What a model does with a product y [rows, columns]: forward, and on the way back through a GELU.
EPILOGUES: dict[str, tuple[tuple[str, ...], Program]] = {
    "alone": ((), lambda g, y: y),
    "bias": (("columns",), lambda g, y, bias: g("add", y, bias)),
    "bias, gelu": (("columns",), lambda g, y, bias: g("gelu", g("add", y, bias))),
    "bias, residual": (("columns", "all"), lambda g, y, bias, rest: g("add", g("add", y, bias), rest)),
    "gelu backward": (("all",), lambda g, y, h: g("mul", y, g("gelu_d0", h))),
}
# In memory x is [rows, inner] and w [inner, columns], or turned.
FORMS = {"x w": (False, False), "x w^T": (False, True), "x^T y": (True, False)}


@pytest.mark.parametrize("shape", [(131, 70, 67), (128, 64, 192)], ids=["odd", "even"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("form", FORMS)
def test_a_product_with_an_epilogue_is_one_kernel(form: str, epilogue: str, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    turned, (reads, finish) = FORMS[form], EPILOGUES[epilogue]
    sizes = {"columns": (columns,), "all": (rows, columns)}
    operands = normal(
        rows, x=(inner, rows) if turned[0] else (rows, inner), w=(columns, inner) if turned[1] else (inner, columns),
        **{f"e{n}": sizes[read] for n, read in enumerate(reads)},
    )  # fmt: skip

    def program(g: GraphBuilder, x: Value, w: Value, **rest: Value) -> Value:
        left, right = (g("transpose", v, perm=(1, 0)) if is_turned else v for v, is_turned in zip((x, w), turned, strict=True))
        return finish(g, g("matmul", left, right), *rest.values())

    assert_is_its_meaning(program, operands)


@pytest.mark.parametrize("shape", [(2, 65, 132), (3, 67, 33), (5, 1, 1023), (1, 9, 1)], ids=str)
def test_layer_norm_forward_and_backward(shape: tuple[int, ...]) -> None:
    c = shape[-1:]

    def forward(g: GraphBuilder, x: Value, gain: Value, bias: Value) -> tuple[Value, ...]:
        return tuple(g.emit("layer_norm", x, gain, bias, eps=1e-5).results)

    operands = normal(shape[1], x=shape, gain=c, bias=c)
    assert_is_its_meaning(forward, operands)
    _, mean, scale = evaluate(module_of(forward, operands), "f", operands).values()
    saved = {"dy": normal(1, dy=shape)["dy"], "x": operands["x"], "gain": operands["gain"], "mean": mean, "scale": scale}
    if c == (1,):
        return  # of one column there is no gradient but rounding
    assert_is_its_meaning(lambda g, *_, **v: g("layer_norm_grad", *v.values()), saved)


@pytest.mark.parametrize(("rows", "classes"), [(70, 257), (33, 128), (3, 5000)])
def test_cross_entropy_forward_and_backward_in_one_kernel(rows: int, classes: int) -> None:
    def program(g: GraphBuilder, logits: Value, targets: Value, grad: Value) -> tuple[Value, ...]:
        loss, lse = g.emit("cross_entropy", logits, targets).results
        return loss, g("cross_entropy_grad", logits, targets, lse, grad)

    targets = np.random.default_rng(rows).integers(0, classes, rows).astype(np.int32)
    drawn = normal(classes, logits=(rows, classes), grad=(rows,))
    assert_is_its_meaning(program, {"logits": 4 * drawn["logits"], "targets": targets, "grad": drawn["grad"]})


@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(70, 133, 65), (256, 257, 64), (1, 2, 3)])
def test_embedding_forward_and_backward(tokens: int, vocabulary: int, width: int) -> None:
    rng = np.random.default_rng(tokens)
    picked = rng.integers(0, vocabulary, tokens).astype(np.int32)
    drawn = normal(width, table=(vocabulary, width), dy=(tokens, width))
    assert_is_its_meaning(lambda g, tokens, table: g("embedding", tokens, table), {"tokens": picked, "table": drawn["table"]})
    assert_is_its_meaning(lambda g, tokens, dy: g("embedding_grad", tokens, dy, vocabulary=vocabulary), {"tokens": picked, "dy": drawn["dy"]})


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_large_table_adds_up_in_the_order_of_positions(kind: str) -> None:
    inputs = drawn(kind)
    module = gradient(*inputs["tokens"].shape, inputs["table"].shape[0])
    found = run_tiled(tiled(Simplify().run(module, DEFAULT), DEFAULT), "f", inputs, launch)["grad"]
    assert found.tobytes() == added_in_order(inputs).tobytes()


@pytest.mark.parametrize(("rows", "columns"), [(700, 133), (65, 64), (3, 1)])
def test_sums_of_rows_and_columns(rows: int, columns: int) -> None:
    for op in ("sum_rows", "sum_columns"):
        assert_is_its_meaning(lambda g, x, op=op: g(op, x), {"x": np.abs(normal(rows, x=(rows, columns))["x"])})


@pytest.mark.parametrize("size", [1e-3, 1e3], ids=["small gradients", "clipped gradients"])
def test_the_norm_and_adamw_of_all_weights(size: float) -> None:
    """The function `apply` as it is lowered, against the same graph in float64."""
    module = small_model()
    for p in passes_until("optimize"):
        module = p.run(module, DEFAULT)
    graph = module
    for p in passes_until("tile")[len(passes_until("optimize")) :]:
        module = p.run(module, DEFAULT)
    rng = np.random.default_rng(7)
    inputs = {p.hint: (size * rng.standard_normal(p.type.shape)).astype(np.float32) for p in graph.functions["apply"].params}
    inputs |= {"lr": np.float32(3e-4), "bias1": np.float32(0.271), "bias2": np.float32(0.0975)}
    state = {name: np.abs(rng.standard_normal(p.type.shape)).astype(np.float32) for name, p in graph.parameters.items()}
    expected = evaluate(graph, "apply", wide(inputs), wide(state))
    found = run_tiled(module, "apply", inputs, launch, state)
    assert len(expected) == 4  # the norm, the weights, two moments
    assert_agree(found, expected)
