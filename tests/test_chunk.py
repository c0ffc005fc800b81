"""chunk: what a device cannot bind at once is computed in stretches. Ops say the truth about how they can be cut; the
pass changes no result; a stretch dies before the next one is made. Models that run are in test_wgsl_limits.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.test_ops import drawn, over, widened
from tinygpt.compiler import device_for, lower, module_for
from tinygpt.config import ModelConfig
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Op, Region, Value
from tinygpt.ir.errors import UserError
from tinygpt.ir.interpret import evaluate, run_region
from tinygpt.ir.ops import OPS, Example, GraphBuilder
from tinygpt.ir.registry import Axes
from tinygpt.ir.types import TensorType
from tinygpt.ir.verify import verify
from tinygpt.lowering import pipeline
from tinygpt.lowering.chunk import Chunk
from tinygpt.lowering.optimizer import POOLS, Layout
from tinygpt.lowering.split import Split
from tinygpt.targets.wgsl.profiles import DEFAULT

KIB = 1 << 10
UP_TO_CHUNK = pipeline.DEFAULT[: pipeline.DEFAULT.index("chunk") - 1]


# ------------------------------------------------------------------------------------------- what an op says of itself


def ranges_of(types: Sequence[TensorType], axes: Sequence[Axes]) -> dict[str, int]:
    """The index ranges behind these axes: where each ends."""
    found: dict[str, int] = {}
    for t, own in zip(types, axes, strict=True):
        assert len(own) == t.rank
        for n, axis in zip(t.shape, own, strict=True):
            if axis is not None:
                found[axis.range] = max(found.get(axis.range, 0), axis.first + n)
    return found


def inside(types: TensorType, axes: Axes, name: str, box: tuple[int, int]) -> tuple[slice, ...]:
    """The part of an array that lies in a stretch of an index range."""
    found = []
    for n, axis in zip(types.shape, axes, strict=True):
        here = axis is not None and axis.range == name
        found.append(slice(*(min(max(b - axis.first, 0), n) for b in box)) if here and axis else slice(None))
    return tuple(found)


def computed(name: str, example: Example, arrays: Sequence[np.ndarray], stretch: str, box: tuple[int, int]) -> list[np.ndarray]:
    """The op over a stretch of one of its index ranges, in float64."""
    axes, _ = OPS[name].axes(example.types, example.attrs)
    op = Op(name, tuple(map(Value, example.types)), tuple(map(Value, OPS[name].infer(example.types, example.attrs))), example.attrs)
    values: dict[Value, np.ndarray] = {}
    operands: list[Value | None] = []
    for x, t, own in zip(arrays, example.types, axes, strict=True):
        part = x[inside(t, own, stretch, box)]
        operands.append(Value(TensorType(t.dtype, part.shape)) if part.size else None)
        values.update({v: part for v in operands[-1:] if v is not None})
    g = GraphBuilder()
    results = OPS[name].stretch(g, op, operands, {stretch: box})
    run_region(Region((), tuple(g.ops), tuple(results)), values, wide=True)
    return [values[v] for v in results]


@over()
def test_an_op_in_stretches_of_an_index_range_is_the_whole_op(name: str, example: Example) -> None:
    types = OPS[name].infer(example.types, example.attrs)
    operand_axes, result_axes = OPS[name].axes(example.types, example.attrs)
    arrays = widened(drawn(name, example))
    whole = OPS[name].evaluate(arrays, example.attrs)
    for stretch, end in ranges_of([*example.types, *types], [*operand_axes, *result_axes]).items():
        own = [next((i for i, a in enumerate(axes) if a and a.range == stretch), None) for axes in result_axes]
        spans = [(a.first, a.first + n) for axes, t in zip(result_axes, types, strict=True) for a, n in zip(axes, t.shape, strict=True) if a and a.range == stretch]
        first, last = max((a for a, _ in spans), default=0), min((b for _, b in spans), default=end)
        bounds = sorted({first, first + (last - first) // 3, first + 2 * (last - first) // 3, last})
        parts = [computed(name, example, arrays, stretch, box) for box in pairwise(bounds)]
        for r, axis in enumerate(own):
            found = np.concatenate([p[r] for p in parts], axis) if axis is not None else sum(p[r] for p in parts)
            np.testing.assert_allclose(found, whole[r], rtol=1e-9, atol=1e-9, err_msg=f"{stretch}, result {r}")


def test_every_op_that_a_large_head_meets_can_be_cut_by_rows() -> None:
    rows = ("cross_entropy", "cross_entropy_grad", "softmax", "softmax_grad", "layer_norm", "layer_norm_grad", "embedding")
    for name in ("matmul", "sum_rows", "sum_columns", *rows):
        example = OPS[name].examples()[0]
        axes, _ = OPS[name].axes(example.types, example.attrs)
        assert axes[0][0] is not None, name


# ------------------------------------------------------------------------------------------- the pass alone


def tight(binding: int, buffer: int = 0) -> Caps:
    return replace(DEFAULT, name="tight", binding_bytes=binding, buffer_bytes=buffer or 64 * binding)


@cache
def optimized(batch: int, binding: int, **fields: Any) -> Module:
    """A model up to the pass; weights are cut by then."""
    module = module_for(ModelConfig(**fields), batch)
    return pipeline.run(pipeline.captured(module), tight(binding), pipeline.parse_pipeline(UP_TO_CHUNK))[-1].module


def inputs_of(function: Function, vocabulary: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for p in function.params:
        floats, whole = p.type.dtype == "f32", {"i32": np.int32, "u32": np.uint32}.get(p.type.dtype, np.int32)
        found[p.hint] = rng.random(p.type.shape) + 0.5 if floats else rng.integers(0, vocabulary, p.type.shape).astype(whole)
    return found


def state_of(module: Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    layout = Layout.of(module)
    found: dict[str, np.ndarray] = {}
    for stem in POOLS:
        found |= layout.cut(np.abs(rng.standard_normal(layout.size)) * 0.05 if stem == "adam.v" else rng.standard_normal(layout.size) * 0.05, stem)
    return found


def require_same_results(before: Module, after: Module, vocabulary: int) -> None:
    rng = np.random.default_rng(5)
    state = state_of(before, rng)
    for name, function in before.functions.items():
        given = inputs_of(function, vocabulary, rng)
        expected, found = (evaluate(m, name, given, state if name != "init" else None) for m in (before, after))
        assert expected.keys() == found.keys()
        for key, wanted in expected.items():
            np.testing.assert_allclose(found[key], wanted, rtol=1e-9, atol=1e-12, err_msg=f"{name} {key}")


def require_bindable(module: Module, caps: Caps) -> None:
    """Nothing that a kernel might write is larger than a binding."""
    for function in module.functions.values():
        for op in function.body.ops:
            for r in op.results:
                assert OPS[op.name].kind == "view" or r.type.bytes <= caps.binding_bytes, f"{function.name}: {op.name} {r.type}"


MODELS = {
    "tied": dict(batch=2, binding=64 * KIB, vocab_size=1000, context_length=24, n_layers=1, n_heads=2, d_model=32),
    "untied-odd": dict(batch=3, binding=64 * KIB, vocab_size=1001, context_length=23, n_layers=1, n_heads=2, d_model=32, tie_embeddings=False),
    "rows": dict(batch=8, binding=32 * KIB, vocab_size=50, context_length=64, n_layers=2, n_heads=2, d_model=16),
    "dropout": dict(batch=4, binding=48 * KIB, vocab_size=333, context_length=32, n_layers=1, n_heads=2, d_model=16, dropout=0.1),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_pass_changes_no_result(name: str) -> None:
    caps = tight(MODELS[name]["binding"])
    before = optimized(**MODELS[name])  # type: ignore[arg-type]
    after = Chunk().run(before, caps)
    verify(after, after="chunk")
    assert any(r.type.bytes > caps.binding_bytes for f in before.functions.values() for op in f.body.ops for r in op.results)
    require_bindable(after, caps)
    require_same_results(before, after, MODELS[name]["vocab_size"])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    vocabulary=st.integers(2, 700), context=st.integers(1, 40), batch=st.integers(1, 4), width=st.sampled_from((8, 16, 32)),
    tied=st.booleans(), binding=st.integers(24, 200),
)  # fmt: skip
@example(vocabulary=601, context=33, batch=3, width=16, tied=True, binding=24)
def test_models_of_any_shape_keep_their_results_under_any_limit(
    vocabulary: int, context: int, batch: int, width: int, tied: bool, binding: int
) -> None:
    fields = dict(vocab_size=vocabulary, context_length=context, n_layers=1, n_heads=2, d_model=width, tie_embeddings=tied)
    caps = tight(binding * KIB)
    try:
        before = optimized(batch, caps.binding_bytes, **fields)
    except UserError as error:  # a weight's rows are no whole rows of the flat array: the layout refuses
        assert "cannot be cut" in str(error)
        return
    after = Chunk().run(before, caps)
    verify(after, after="chunk")
    require_bindable(after, caps)
    require_same_results(before, after, vocabulary)


def test_terms_of_a_gradient_are_made_in_parts_that_are_added_up_once() -> None:
    """The pass `split` finds the products of stretches, each of which it makes in as many parts."""
    fields = dict(vocab_size=300, context_length=64, n_layers=1, n_heads=2, d_model=32)
    caps = tight(320 * KIB)
    before = optimized(8, caps.binding_bytes, **fields)
    after = before
    for p in (Chunk(), Split()):
        after = p.run(after, caps)
        verify(after, after=p.name)
    ops = after.functions["grads"].body.ops
    partial = {op.result for op in ops if op.name == "matmul" and op.attrs.get("parts", 1) > 1}
    added = [op for op in ops if op.name == "add" and set(op.operands) <= partial]
    assert [op.result.type.shape[1:] for op in added] == [(300, 32)]
    require_same_results(before, after, 300)


def test_every_stage_of_a_model_that_is_cut_computes_the_same() -> None:
    fields = dict(vocab_size=293, context_length=12, n_layers=1, n_heads=2, d_model=32, d_mlp=11)
    lower(module_for(ModelConfig(**fields), 3), device_for("wgsl", {})[0], tight(20 * KIB), check=True)


def test_without_a_limit_and_where_everything_fits_nothing_changes() -> None:
    before = optimized(**MODELS["tied"])  # type: ignore[arg-type]
    assert Chunk().run(before, replace(DEFAULT, binding_bytes=0)) is before
    after = Chunk().run(before, DEFAULT)
    assert all(after.functions[n] is f for n, f in before.functions.items())


def graph(build: Any, *types: TensorType) -> Module:
    g = GraphBuilder()
    args = tuple(Value(t, f"x{i}") for i, t in enumerate(types))
    results = build(g, *args)
    return Module("m", functions={"f": Function("f", Region(args, tuple(g.ops), tuple(results)), {}, tuple(f"y{i}" for i in range(len(results))))})


def test_masks_and_indices_are_cut_with_what_they_belong_to() -> None:
    def build(g: GraphBuilder, x: Value, w: Value) -> list[Value]:
        product = g("matmul", x, w)
        columns, rows = (g("iota", axis=a, shape=product.type.shape) for a in (1, 0))
        below = g("le", g("iota", axis=0, shape=(x.type.shape[0], 1)), g.constant(70, "i32"))
        elsewhere = g("broadcast", g.constant(-3.0), shape=product.type.shape)
        masked = g("where", g("ge", rows, columns), g("where", below, product, g.constant(0.5)), elsewhere)
        y = g("softmax", masked)
        return [g("matmul", y, g("transpose", w, perm=(1, 0))), g("sum_columns", y), g("sum_rows", y)]

    before = graph(build, TensorType("f32", (150, 8)), TensorType("f32", (8, 200)))
    caps = tight(16 * KIB)
    after = Chunk().run(before, caps)
    verify(after, after="chunk")
    require_bindable(after, caps)
    rng = np.random.default_rng(0)
    given = {"x0": rng.standard_normal((150, 8)), "x1": rng.standard_normal((8, 200))}
    expected, found = evaluate(before, "f", given), evaluate(after, "f", given)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-11, err_msg=name)


def test_a_value_that_is_read_whole_along_every_axis_is_refused_by_name() -> None:
    def build(g: GraphBuilder, x: Value) -> list[Value]:
        square = g("mul", x, x)
        return [g("sum_rows", g("softmax", square)), g("sum_columns", g("softmax", g("transpose", square, perm=(1, 0))))]

    module = graph(build, TensorType("f32", (100, 100)))
    message = r"the result of mul \(f32\[100, 100\]\) has 40,000 bytes, a binding of tight holds 32,768, and \w+ needs it in one"
    with pytest.raises(UserError, match=message):
        Chunk().run(module, tight(32 * KIB))


def test_a_row_that_no_binding_holds_is_refused() -> None:
    module = graph(lambda g, x, w: [g("sum_rows", g("softmax", g("matmul", x, w)))], TensorType("f32", (4, 2)), TensorType("f32", (2, 3000)))
    with pytest.raises(UserError, match=r"the result of matmul \(f32\[4, 3000\]\) has 48,000 bytes, a binding of tight holds 8,192"):
        Chunk().run(module, tight(8 * KIB))


def test_a_stretch_of_the_logits_is_read_for_the_last_time_before_the_next_is_made() -> None:
    before = optimized(**MODELS["tied"])  # type: ignore[arg-type]
    function = Chunk().run(before, tight(64 * KIB)).functions["train_step"]
    order = [op for op in function.body.ops if OPS[op.name].kind != "view"]
    made = {r: op for op in function.body.ops for r in op.results}

    def behind(value: Value) -> set[Op]:
        op = made.get(value)
        if op is None or OPS[op.name].kind != "view":
            return {op} if op is not None else set()
        return {s for v in op.operands for s in behind(v)}

    losses = [op for op in order if op.name == "cross_entropy"]
    assert len(losses) > 1
    for loss, following in pairwise(losses):
        gradient = next(op for op in order if op.name == "cross_entropy_grad" and op.operands[0] is loss.operands[0])
        last = max(i for i, op in enumerate(order) if any({loss, gradient} & behind(v) for v in op.operands if v.type.bytes > KIB))
        assert last < min(order.index(op) for op in behind(following.operands[0]))
