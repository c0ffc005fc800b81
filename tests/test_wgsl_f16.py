"""Activations kept in 16 bits: what the pass makes narrow and what it leaves, on the interpreter; kernels and bundles on a
software Vulkan driver, against the interpreter and PyTorch; and that nothing of it happens unasked, or out of range in silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import pytorch_reference as pytorch
from tests.cli import CONFIG
from tests.lowered import op_module, passes_until, random_buffers, run_tiled, small_model
from tests.test_end_to_end import batches
from tests.wgsl_device import assert_bindings_obey_the_rules, device, launch, refused_by_naga
from tinygpt.compiler import compile, device_for, module_for
from tinygpt.compiler import lower as lower_model
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Kernel, Module, Parameter, Region, Value
from tinygpt.ir.errors import UserError as CompilerUserError
from tinygpt.ir.interpret import evaluate
from tinygpt.ir.interpret_tile import run_kernel
from tinygpt.ir.interpret_workgroup import run_workgroups
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.ir.registry import Example, sample_operands
from tinygpt.ir.text import parse_module, print_module
from tinygpt.ir.types import NUMPY_DTYPES, TensorType
from tinygpt.ir.verify import verify, verify_kernel
from tinygpt.lowering import narrow
from tinygpt.lowering.fuse import Fuse
from tinygpt.lowering.gpu import lower
from tinygpt.lowering.narrow import Narrow
from tinygpt.lowering.optimizer import POOLS, Layout
from tinygpt.lowering.tiles import Tile
from tinygpt.presets import PRESETS, find
from tinygpt.regeneration import regenerate
from tinygpt.runtime import bundle as bundles
from tinygpt.runtime.bundle import Bundle
from tinygpt.runtime.errors import DivergedError, UserError
from tinygpt.targets.wgsl.printer import print_kernel
from tinygpt.targets.wgsl.profiles import DEFAULT, F16, LIMITS

NARROW = replace(F16, storage="f16")
OPTIONS = {"dtype": "f16"}
ROUNDING = 2.0**-11  # of a number that is kept in f16
SMALLER = dict(n_heads=2, d_model=16, d_mlp=20, context_length=70, vocab_size=18, batch=1)
ODD = {"odd": {}, "two heads of eight": SMALLER}

Arrays = dict[str, NDArray[Any]]


def lowered(module: Module, name: str, caps: Caps = NARROW) -> Module:
    for p in passes_until(name):
        module = p.run(module, caps)
    verify(module)
    return module


# -- the pass


def state_of(module: Module, seed: int = 3) -> Arrays:
    """Weights as a model has them after some steps, and no moments, in float64."""
    layout, rng = Layout.of(module), np.random.default_rng(seed)
    weights = {n: (shape == () or len(shape) < 2) + 0.08 * rng.standard_normal(shape) for n, (_, shape) in layout.places.items()}
    flat = layout.pooled(weights)
    return {n: piece for stem, x in zip(POOLS, (flat, 0 * flat, 0 * flat), strict=True) for n, piece in layout.cut(x, stem).items()}


def results(module: Module, name: str) -> Arrays:
    """What a function of a model computes of random tokens, in float64 but for what is kept narrow."""
    shape = module.functions["loss"].params[0].type.shape
    rng = np.random.default_rng(5)
    inputs: Arrays = {n: rng.integers(0, 18, shape).astype(np.int32) for n in ("tokens", "targets")}
    inputs |= {"lr": np.array(1e-3), "bias1": np.array(0.1), "bias2": np.array(0.05)}
    return evaluate(module, name, {p.hint: inputs[p.hint] for p in module.functions[name].params}, state_of(module))


@pytest.mark.parametrize(("name", "fields"), [("loss", {}), ("grads", {}), ("grads", SMALLER), ("train_step", SMALLER)])
def test_narrow_activations_change_results_by_their_rounding_alone(name: str, fields: dict[str, int]) -> None:
    fused = lowered(small_model(**fields), "fuse")
    found, wanted = results(Narrow().run(fused, NARROW), name), results(fused, name)
    for key in ("loss", "grad_norm", "gradients"):
        if key in wanted:
            off = np.abs(found[key] - wanted[key]).max() / np.abs(wanted[key]).max()
            assert 0 < off < 6 * ROUNDING, f"{key} is off by {off:.3g}"


def test_what_is_kept_between_kernels_is_narrow_and_what_hosts_see_is_not() -> None:
    wide = lowered(module_for("tiny"), "fuse")
    module = Narrow().run(wide, NARROW)
    verify(module)
    assert {p.type for p in module.parameters.values()} == {p.type for p in wide.parameters.values()}
    for name, function in module.functions.items():
        before = wide.functions[name]
        assert [v.type for v in (*function.params, *function.body.yields, *function.updates.values())] == [
            v.type for v in (*before.params, *before.body.yields, *before.updates.values())
        ]
    step = module.functions["train_step"]
    groups = [op for op in step.body.ops if op.name == "group"]
    tokens = step.params[0].type.size
    made = [r.type for op in groups for r in op.results]
    narrow_ones = [t for t in made if t.dtype == "f16"]
    assert sum(t.size for t in narrow_ones) > 30 * tokens * 48
    # what is left has no element for each token and channel: sums over tokens, statistics of rows, the optimizer's arrays
    parts = {op.attrs["parts"] for group in groups for op in group.regions[0].ops if "parts" in op.attrs}
    rest = [t for t in made if t.dtype == "f32" and t.size >= tokens * 48]
    assert all(Layout.of(module).size - 1024 <= t.size <= Layout.of(module).size or t.shape[0] in parts for t in rest), rest
    readers = [v.type for op in groups for v in op.operands if v.type.rank > 1 and v.type.shape[0] == tokens and v.type.shape[-1] > 1]
    assert readers and {t.dtype for t in readers} == {"f16"}


def test_nothing_is_narrow_unasked() -> None:
    module = lowered(small_model(), "fuse", DEFAULT)
    for caps in (DEFAULT, F16):
        assert Narrow().run(module, caps) is module
    assert "f16" not in print_module(lowered(small_model(n_heads=2, d_model=8, d_mlp=12), "tile", F16))


def test_a_narrow_module_prints_and_parses_at_every_level() -> None:
    captured = small_model(n_heads=1, d_model=4, d_mlp=4, context_length=4, vocab_size=5)
    for level in ("narrow", "tile", "loops"):
        text = print_module(lowered(captured, level))
        assert "f16" in text and print_module(parse_module(text)) == text


def test_gradients_are_scaled_so_that_those_of_many_tokens_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the share of one of 2240 tokens. Devices may take numbers below 2^-14 for zero, so that is done here."""
    fused = lowered(small_model(**{**SMALLER, "batch": 32}), "fuse")
    wanted = results(fused, "grads")["gradients"]

    def flushed(operands: list[NDArray[Any]], attrs: dict[str, str]) -> tuple[NDArray[Any]]:
        x = operands[0].astype(NUMPY_DTYPES[attrs["dtype"]])
        return (np.where(np.abs(x) < 2.0**-14, x.dtype.type(0), x) if x.dtype == np.float16 else x,)

    def off() -> float:
        found = results(Narrow().run(fused, NARROW), "grads")["gradients"]
        return float(np.abs(found - wanted).max() / np.abs(wanted).max())

    monkeypatch.setattr(OPS["cast"], "evaluate", flushed)
    scaled = off()
    monkeypatch.setattr(narrow, "gradient_scale", lambda function: 1.0)
    assert 10 * scaled < 10 * ROUNDING < off()


@pytest.mark.parametrize(("tokens", "scale"), [(1, 8), (2, 16), (512, 4096), (513, 8192)])
def test_the_scale_is_a_power_of_two_for_the_number_of_tokens(tokens: int, scale: int) -> None:
    function = Function("f", Region((Value(TensorType("i32", (1, tokens)), "tokens"),)))
    assert narrow.gradient_scale(function) == scale


def test_every_stage_of_a_narrow_compilation_is_checked() -> None:
    captured = small_model(n_heads=2, d_model=32, d_mlp=32, context_length=8, vocab_size=12, batch=1)
    done = lower_model(captured, device_for("wgsl", OPTIONS)[0], NARROW, check=True)
    assert [stage.name for stage in done.stages][-4:] == ["narrow", "tile", "loops", "abreast"]


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_step_takes_one_dispatch_more_than_in_f32(name: str) -> None:
    preset = PRESETS[name]
    module = module_for(preset.config, preset.batch_size, None)

    def launches(caps: Caps) -> int:
        return sum(op.name == "launch" for op in lowered(module, "tile", caps).functions["train_step"].body.ops)

    pieces = len(Layout.of(lowered(module, "optimize")).pieces)
    assert launches(NARROW) == launches(DEFAULT) + pieces


# -- kernels


def difference(kernel: Kernel, buffers: list[NDArray[Any]], run: Callable[[Kernel, list[NDArray[Any]]], None]) -> float:
    """How far a kernel is from its tile program in float64, relative to the largest element, beyond one rounding to f16."""
    expected = [b.astype(np.float64) if b.dtype == np.float32 else b.copy() for b in buffers]
    found = [b.copy() for b in buffers]
    run_kernel(kernel, expected, wide=True)
    run(kernel, found)
    worst = 0.0
    for access, a, b in zip(kernel.access, expected, found, strict=True):
        if access != "in":
            with np.errstate(invalid="ignore"):
                off = np.where(a == b, 0, np.abs(a.astype(np.float64) - b))  # both may be infinite
            size = np.abs(a[np.isfinite(a)].astype(np.float64))
            allowed = 2 * ROUNDING * np.abs(a.astype(np.float64)) if b.dtype == np.float16 else 0
            worst = float(np.maximum(worst, (off - allowed).max() / size.max()))
    return worst


def on_device(kernel: Kernel, buffers: list[NDArray[Any]]) -> None:
    launch(kernel, buffers, NARROW)


def in_interpreter(kernel: Kernel, buffers: list[NDArray[Any]]) -> None:
    loops = lower(kernel, NARROW)
    verify_kernel(loops, NARROW)
    run_workgroups(loops, buffers)


def kernels_of(fields: dict[str, int]) -> list[Kernel]:
    found = [k for k in lowered(small_model(**fields), "tile").kernels.values() if any(v.type.dtype == "f16" for v in k.params)]
    assert len(found) > 30
    return found


def test_shaders_with_narrow_buffers_compute_their_tile_programs() -> None:
    """One of each kind: a driver in software takes a second for each."""
    kinds = {k.name.split("_", 1)[1]: k for k in kernels_of({})}
    assert {"matmul", "attention", "attention_grad_kv", "layer_norm", "layer_norm_grad", "embedding", "embedding_grad", "sum_columns", "cross_entropy"} <= kinds.keys()
    for kernel in kinds.values():
        assert difference(kernel, random_buffers(kernel, np.random.default_rng(0)), on_device) < 3e-5, kernel.name


@pytest.mark.parametrize("fields", ODD.values(), ids=ODD)
def test_threads_of_every_kernel_with_narrow_buffers_compute_its_tile_program(fields: dict[str, int]) -> None:
    for kernel in kernels_of(fields):
        assert difference(kernel, random_buffers(kernel, np.random.default_rng(0)), in_interpreter) < 3e-5, kernel.name


# Every op with a program of its own (a sum is made of others).
READING = [(name, i) for name, op in sorted(OPS.items()) if op.kind in ("root", "rows", "columns") and op.pattern for i, _ in enumerate(op.examples())]


def module_over_narrow_operands(name: str, example: Example) -> Module:
    """An op on parameters of the module, of whose matrices narrow copies are read, in a function `f`."""
    alone = op_module(name, example)
    function = alone.functions["f"]
    matrices = {p: Parameter(p.hint, p, "state") for p in function.params if p.type.dtype == "f32"}
    body = replace(function.body, args=tuple(p for p in function.params if p not in matrices))
    module = replace(alone, functions={"f": replace(function, body=body)}, parameters={p.name: p for p in matrices.values()})
    for p in (Fuse(), Narrow(), Tile()):
        module = p.run(module, NARROW)
    verify(module)
    return module


@pytest.mark.parametrize(("name", "number"), READING, ids=[f"{name}-{i}" for name, i in READING])
def test_an_op_reads_narrow_operands(name: str, number: int) -> None:
    example = OPS[name].examples()[number]
    module = module_over_narrow_operands(name, example)
    assert any(v.type.dtype == "f16" for k in module.kernels.values() for v in k.params) == any(t.dtype == "f32" and t.rank > 1 for t in example.types)
    drawn = {f"x{n}": x for n, x in enumerate(sample_operands(example, np.random.default_rng(number)))}
    copies = {n: x.astype(np.float16).astype(np.float64) if x.dtype == np.float32 and x.ndim > 1 else x for n, x in drawn.items()}
    wanted = evaluate(op_module(name, example), "f", {n: x.astype(np.float64) if x.dtype.kind == "f" else x for n, x in copies.items()})
    parameters = {n: x for n, x in drawn.items() if n in module.parameters}
    inputs = {n: x for n, x in drawn.items() if n not in parameters}
    found = run_tiled(module, "f", inputs, on_device if number == 0 else in_interpreter, parameters)
    for key, x in wanted.items():
        assert np.abs(found[key].reshape(x.shape) - x).max() <= 1e-5 * np.abs(x).max() + 1e-9, key


def test_pieces_of_two_scales_are_not_put_together() -> None:
    """A concat of an activation and a gradient stays as it is, and so do its pieces; a constant between goes along."""
    g = GraphBuilder()
    tokens, targets = (Value(TensorType("i32", (4, 8)), n) for n in ("tokens", "targets"))
    table = Parameter("table", Value(TensorType("f32", (9, 8)), "table"))

    def picked(which: Value) -> Value:
        return g("reshape", g("embedding", which, table.value), shape=(32, 8))

    zeros = g("broadcast", g.constant(0.0), shape=(32, 8))
    forward, backward = (picked(x) for x in (tokens, targets))
    padded, mixed = g("concat", forward, zeros, axis=1), g("concat", picked(tokens), backward, axis=1)
    loss, rest = (g("sum_rows", g("reshape", g("matmul", g("transpose", x, perm=(1, 0)), x), shape=(256,))) for x in (padded, mixed))
    function = Function("f", Region((tokens, targets), tuple(g.ops), (loss, rest)), {}, ("loss", "rest"))
    module = Module("two", functions={"f": function}, parameters={"table": table})
    module = Narrow().run(Fuse().run(module, NARROW), NARROW)
    verify(module)
    joined = [op.result.type.dtype for op in module.functions["f"].body.ops if op.name == "concat"]
    assert sorted(joined) == ["f16", "f32"]


# -- bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    device(NARROW.features)
    yield compile("tiny", "wgsl", out=tmp_path_factory.mktemp("tiny"), options=OPTIONS)


def test_naga_takes_every_shader(bundle: Bundle, tmp_path: Path) -> None:
    for kernel in lowered(small_model(), "loops").kernels.values():
        (tmp_path / f"{kernel.name}.wgsl").write_text(print_kernel(kernel, NARROW))
    shaders = [*Path(bundle.folder).glob("kernels/*.wgsl"), *tmp_path.glob("*.wgsl")]
    assert sum("enable f16;" in s.read_text() for s in shaders) > 60
    assert refused_by_naga(shaders, NARROW.features) == ""


def test_a_bundle_agrees_with_the_interpreter_and_is_lowered_again_as_it_was(bundle: Bundle) -> None:
    assert bundle.selftest().passed
    target = bundle.manifest.target
    assert target["features"] == ["shader-f16"] and target["options"] == OPTIONS
    assert regenerate(bundle.folder).files == []


def test_bindings_are_aligned_in_bytes(bundle: Bundle) -> None:
    assert_bindings_obey_the_rules(bundle.manifest.target)


def test_fifty_clipped_steps_match_pytorch(bundle: Bundle) -> None:
    """From weights far enough from their start that every gradient is clipped; PyTorch computes in float32."""
    with bundle.session(seed=5) as session:
        found, wanted = pytorch.trained_side_by_side(session, find("tiny").config, batches(session, 50), 3e-4)
    assert (wanted[:, 1] > 1).all()
    worst = np.abs(found - wanted).max(axis=0)
    assert 1e-6 < worst[0] <= 2e-4 and worst[1] <= 1e-3


def test_gradients_are_those_of_pytorch_but_for_rounding(bundle: Bundle) -> None:
    with bundle.session(seed=5) as session:
        weights, ((tokens, targets),) = pytorch.spread_weights(session, 3), batches(session, 1)
        _, wanted = pytorch.gradients(pytorch.model(find("tiny").config, weights), tokens, targets)
        found = session.grads(tokens, targets)
    pytorch.assert_gradients_agree(found, wanted, 4 * ROUNDING)


def test_a_checkpoint_has_the_weights_in_full_and_goes_on_in_f32(bundle: Bundle, tmp_path: Path) -> None:
    whole = compile("tiny", "wgsl", out=tmp_path / "f32")
    with bundle.session(seed=6) as session, whole.session(seed=0) as other:
        steps = batches(session, 4)
        for batch in steps[:2]:
            session.train_step(*batch, lr=1e-3)
        session.save(tmp_path / "half.safetensors")
        other.load(tmp_path / "half.safetensors")
        mine, theirs = session.parameters(), other.parameters()
        assert all(x.dtype == np.float32 and np.array_equal(x, theirs[n]) for n, x in mine.items())
        assert any((x.astype(np.float16) != x).any() for x in mine.values())
        for batch in steps[2:]:
            assert session.train_step(*batch, lr=1e-3)[0] == pytest.approx(other.train_step(*batch, lr=1e-3)[0], abs=2e-4)


def test_two_runs_give_the_same_bits(bundle: Bundle) -> None:
    def curve() -> list[tuple[float, float]]:
        with bundle.session(seed=1) as session:
            return [session.train_step(*batch, lr=1e-3) for batch in batches(session, 3)]

    assert curve() == curve()


# Weights with which f32 trains, and what of them is too large for 16 bits.
TOO_LARGE: dict[str, tuple[str, float]] = {
    "a gradient": ("ln_final.weight", 1e4), "an activation": ("blocks.0.mlp.fc_in.bias", 7e4), "a weight": ("blocks.0.mlp.fc_in.weight", 1e5),
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_does_not_fit_16_bits_stops_the_run(bundle: Bundle, what: str) -> None:
    name, size = TOO_LARGE[what]
    with bundle.session(seed=5) as session:
        weights = session.parameters()
        session.load_parameters({**weights, name: np.full_like(weights[name], size)})
        with pytest.raises(DivergedError, match="the gradient norm became" if what == "a gradient" else "the loss became"):
            session.train_step(*batches(session, 1)[0], lr=3e-4)


# -- asking for it


def test_a_device_without_the_feature_is_refused_by_its_name() -> None:
    limits = {name: getattr(DEFAULT, field) for name, field in LIMITS.items()}

    def described(*features: str) -> dict[str, str]:
        return {"profile": "adapter", "device": json.dumps({"features": features, "limits": limits})}

    for options, profile in (({"profile": "webgpu-default"}, "webgpu-default"), ({"profile": "webgpu-subgroups"}, "webgpu-subgroups"), (described("subgroups"), "adapter")):
        with pytest.raises(CompilerUserError, match=f"dtype=f16: profile {profile} has no shader-f16"):
            device_for("wgsl", {**options, **OPTIONS})
        assert device_for("wgsl", {**options, "dtype": "f32"})[1].storage == "f32"
    assert device_for("wgsl", {**described("shader-f16", "subgroups"), **OPTIONS})[1].storage == "f16"
    assert device_for("wgsl", OPTIONS)[1] == NARROW and device_for("wgsl", {})[1] == DEFAULT


def test_a_bundle_for_the_adapter_at_hand_uses_all_that_it_has(tmp_path: Path) -> None:
    device(NARROW.features)
    found = compile(CONFIG, "wgsl", 2, 8, out=tmp_path / "b", options={"profile": "adapter", **OPTIONS})
    assert "shader-f16" in found.manifest.target["features"] and found.selftest().passed


@pytest.mark.parametrize("target", ["cpp", "wasm32", "wasm64"])
def test_cpu_targets_have_no_such_option(target: str) -> None:
    with pytest.raises(CompilerUserError, match=f"{target} has no option 'dtype'"):
        compile(CONFIG, target, 1, 8, options=OPTIONS)


@pytest.mark.parametrize("dtype", ["f64", "float16", ""])
def test_other_types_are_refused(dtype: str) -> None:
    with pytest.raises(CompilerUserError, match="wgsl keeps activations in f32 or in f16"):
        device_for("wgsl", {"dtype": dtype})


def test_a_device_at_hand_without_the_feature_is_refused_by_its_name(tmp_path: Path) -> None:
    bundle = compile(CONFIG, "wgsl", 1, 8, out=tmp_path / "b", options=OPTIONS)
    path = tmp_path / "b" / "manifest.json"
    path.write_text(path.read_text().replace('"shader-f16"', '"shader-f12"'))
    with pytest.raises(UserError, match="lacks feature shader-f12"):
        bundles.load(bundle.folder).session()
