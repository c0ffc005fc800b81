"""abreast: launches that run side by side compute what they computed one after the other, to the bit, on buffers that only
one of them writes; and they stay within what a device can hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.lowered import passes_until, random_buffers, run_tiled, small_model
from tests.test_random_tiles import THOROUGH
from tests.tile_programs import tile_programs
from tinygpt.compiler import compile, kernel_hash, module_for
from tinygpt.compiler import lower as compiled
from tinygpt.ir.bounds import footprints, unproved_accesses
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Kernel, Module, Op, Parameter, Region, Value
from tinygpt.ir.interpret_workgroup import run_workgroups
from tinygpt.ir.text import parse_kernel, parse_module, print_module
from tinygpt.ir.types import NUMPY_DTYPES, TensorType
from tinygpt.ir.verify import verify
from tinygpt.lowering import gpu
from tinygpt.lowering.abreast import WIDEST, Abreast, shared_bytes
from tinygpt.lowering.memory import plan
from tinygpt.presets import PRESETS
from tinygpt.profiling import flops_by_hash
from tinygpt.regeneration import product_flops, regenerate
from tinygpt.targets import target
from tinygpt.targets.wgsl.profiles import DEFAULT, F16

ROOMY = replace(DEFAULT, name="roomy", bindings=16, workgroup_bytes=48 << 10, subgroup=8)
PROFILES = (DEFAULT, ROOMY)


def looped(module: Module, caps: Caps) -> Module:
    for p in passes_until("loops"):
        module = p.run(module, caps)
    return module


def launches(module: Module, name: str) -> list[Op]:
    return [op for op in module.functions[name].body.ops if op.name == "launch"]


def outcome(module: Module, name: str) -> dict[str, np.ndarray]:
    """What a function gives and leaves behind, each launch run by the workgroup interpreter, on fixed random contents."""
    rng = np.random.default_rng(7)

    def contents(v: Value) -> np.ndarray:
        if v.type.dtype == "f32":
            return (0.05 * rng.standard_normal(v.type.shape)).astype(np.float32) ** 2  # moments may not be negative
        return rng.integers(0, 30, v.type.shape).astype(NUMPY_DTYPES[v.type.dtype])

    inputs = {v.hint: contents(v) for v in module.functions[name].params}
    return run_tiled(module, name, inputs, run_workgroups, {p.name: contents(p.value) for p in module.parameters.values()})


@pytest.mark.parametrize("caps", PROFILES, ids=lambda c: c.name)
@pytest.mark.parametrize("fields", [{"n_layers": 2}, {"dropout": 0.2, "n_layers": 1}, {"vocab_size": 64, "d_model": 64, "n_heads": 2, "n_layers": 3}], ids=str)
def test_a_model_computes_the_same_bits(fields: dict[str, Any], caps: Caps) -> None:
    apart = looped(small_model(**fields), caps)
    together = Abreast().run(apart, caps)
    verify(together, caps)
    for name in apart.functions:
        assert len(launches(together, name)) <= len(launches(apart, name))
    assert len(launches(together, "train_step")) < 0.9 * len(launches(apart, "train_step"))
    for name in ("train_step", "init"):
        expected, found = outcome(apart, name), outcome(together, name)
        assert expected.keys() == found.keys()
        for key in expected:
            assert np.isfinite(expected[key]).all()
            np.testing.assert_array_equal(found[key], expected[key], err_msg=f"{name}: {key}")


@pytest.mark.parametrize("caps", [DEFAULT, ROOMY, replace(F16, storage="f16")], ids=lambda c: c.name)
@pytest.mark.parametrize("preset", ["tiny", "medium", "xl"])
def test_every_launch_is_done_once_within_the_limits(preset: str, caps: Caps) -> None:
    apart = looped(module_for(preset), caps)
    together = Abreast().run(apart, caps)
    for name in apart.functions:
        done = Counter(part for op in launches(together, name) for part in together.kernels[op.attrs["kernel"]].of.split(" | "))
        assert done == Counter(apart.kernels[op.attrs["kernel"]].of for op in launches(apart, name))
    for kernel in together.kernels.values():
        assert len(kernel.params) <= caps.bindings and shared_bytes([kernel]) <= caps.workgroup_bytes
        assert len(kernel.of.split(" | ")) <= WIDEST
    assert {op.attrs["kernel"] for name in together.functions for op in launches(together, name)} == set(together.kernels)
    for name in apart.functions:
        before, after = (sum(len(unproved_accesses(m.kernels[op.attrs["kernel"]])) for op in launches(m, name)) for m in (apart, together))
        assert after == before, "a proof was lost where launches became one"
        before, after = (sum(not unproved_accesses(m.kernels[op.attrs["kernel"]]) for op in launches(m, name)) for m in (apart, together))
        assert len(launches(together, name)) - after <= len(launches(apart, name)) - before, "a proved kernel joined one that is not"


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.config.n_layers <= 12])
def test_a_step_needs_fewer_dispatches(preset: str) -> None:
    """What is off the chain from the tokens to the last gradient, two or three launches a layer, costs none of its own."""
    layers = PRESETS[preset].config.n_layers
    few, many, apart = dispatches(preset, "abreast", ROOMY), dispatches(preset, "abreast", DEFAULT), dispatches(preset, "loops", DEFAULT)
    assert few <= many <= apart - 2 * layers, (few, many, apart)


@pytest.mark.parametrize("preset", ["tiny", "small", "medium", "large"])
def test_what_runs_side_by_side_takes_little_more_memory(preset: str) -> None:
    """More buffers are read beside one that is written, and may not share its pool."""
    apart = looped(module_for(preset), DEFAULT)
    before, after = (sum(plan(m, DEFAULT).pools.values()) for m in (apart, Abreast().run(apart, DEFAULT)))
    assert after <= 1.25 * before


def test_a_launch_of_several_says_where_all_of_them_come_from() -> None:
    done = compiled(module_for("tiny"), target("wgsl"), DEFAULT)
    joined = [x for x in done.plan.entries["train_step"].launches if len(done.plan.kernels[x.kernel].cost.get("sides", ())) > 1]
    assert any(x.of.count("model.py:") > 1 for x in joined) and all("model.py:" in x.of or not x.of for x in joined)


def test_made_kernels_take_no_name_that_there_is() -> None:
    b = [Value(TensorType("f32", (256,)), f"b{n}") for n in range(4)]
    kernels = {"a0_move_move": replace(MOVES["k0_move"], name="a0_move_move"), "plain": replace(MOVES["k1_move"], name="plain"), "k0_move": MOVES["k0_move"]}
    wanted = [("k0_move", (b[0], b[1])), ("plain", (b[0], b[2])), ("a0_move_move", (b[1], b[3]))]
    ops = [Op("launch", operands, (), {"kernel": k, "offsets": (0, 0)}) for k, operands in wanted]
    module = Module("names", {v.hint: Parameter(v.hint, v) for v in b}, {"f": Function("f", Region((), tuple(ops)))}, kernels)
    together = Abreast().run(module, DEFAULT)
    given = {v.hint: np.linspace(-1, n + 1, 256, dtype=np.float32) for n, v in enumerate(b)}
    expected, found = (run_tiled(m, "f", {}, run_workgroups, given) for m in (module, together))
    assert len(launches(together, "f")) == 2 and together.kernels["a0_move_move"] is kernels["a0_move_move"]
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def dispatches(preset: str, last: str, caps: Caps) -> int:
    module = module_for(preset)
    for p in passes_until(last):
        module = p.run(module, caps)
    return len(launches(module, "train_step"))


def test_one_side_by_side_is_the_module_as_it_was() -> None:
    module = looped(small_model(), DEFAULT)
    assert Abreast(widest=1).run(module, DEFAULT) is module


def test_a_module_with_launches_side_by_side_prints_and_parses() -> None:
    module = Abreast().run(looped(small_model(), DEFAULT), DEFAULT)
    text = print_module(module)
    assert print_module(parse_module(text)) == text


# ------------------------------------------------------------------------------------------- random programs and orders


@THOROUGH
@given(first=tile_programs(), second=tile_programs())
def test_two_random_programs_side_by_side_compute_what_they_do_apart(first: Kernel, second: Kernel) -> None:
    caps = replace(DEFAULT, bindings=0, workgroup_bytes=0)
    kernels = [replace(gpu.lower(k, caps), name=f"k{n}_fuzz") for n, k in enumerate((first, second))]
    values = [[Value(TensorType(p.type.dtype, (n,)), f"{p.hint}{k}") for p, n in zip(kernel.params, kernel.cost["extents"], strict=True)] for k, kernel in enumerate(kernels)]
    ops = [Op("launch", tuple(own), (), {"kernel": k.name, "offsets": (0,) * len(own)}) for k, own in zip(kernels, values, strict=True)]
    parameters = {v.hint: Parameter(v.hint, v) for own in values for v in own}
    module = Module("two", parameters, {"f": Function("f", Region((), tuple(ops)))}, {k.name: k for k in kernels})
    together = Abreast().run(module, caps)
    verify(together, caps)
    alike = all(len({f(k) for k in kernels}) == 1 for f in (lambda k: k.cost["threads"], lambda k: not unproved_accesses(k)))
    assert len(launches(together, "f")) == (1 if alike else 2)
    rng = np.random.default_rng(0)
    given = {v.hint: x for kernel, own in zip((first, second), values, strict=True) for v, x in zip(own, random_buffers(kernel, rng), strict=True)}
    expected, found = (run_tiled(m, "f", {}, run_workgroups, given) for m in (module, together))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


# Reads 128 elements and writes as many, changing them by a number of its own; or changes 128 elements in place.
MOVES = {
    f"k{n}_move": parse_kernel(
        f"""
kernel k{n}_move(%x: in ptr<f32, buffer>, %y: out ptr<f32, buffer>) {{level = "loop", cost = {{extents = [128, 128], threads = 8}}}} {{
  grid g0 = 4
  %a = load(%x) {{at = <g0*32 + thread*4>}} : f32x4
  %c = const() {{value = {n}.5}} : f32x4
  %b = fma(%a, %c, %c) : f32x4
  store(%y, %b) {{at = <g0*32 + thread*4>}}
}}
"""
    )
    for n in range(2)
}
CHANGES = {
    "k2_change": parse_kernel(
        """
kernel k2_change(%x: inout ptr<f32, buffer>) {level = "loop", cost = {extents = [128], threads = 8}} {
  grid g0 = 4
  %a = load(%x) {at = <g0*32 + thread*4>} : f32x4
  %b = mul(%a, %a) : f32x4
  store(%x, %b) {at = <g0*32 + thread*4>}
}
"""
    )
}
PLACES = st.tuples(st.integers(0, 3), st.sampled_from((0, 64, 128)))  # a buffer, and from where on


@st.composite
def orders(draw: st.DrawFn) -> list[tuple[str, list[tuple[int, int]]]]:
    """Launches of small kernels on parts of four buffers, none of which reads and writes one buffer."""
    found = []
    for _ in range(draw(st.integers(2, 14))):
        kernel = draw(st.sampled_from([*MOVES, *CHANGES]))
        places = [draw(PLACES)]
        if kernel in MOVES:
            places.append(draw(PLACES.filter(lambda p: p[0] != places[0][0])))
        found.append((kernel, places))
    return found


@THOROUGH
@given(order=orders())
@example(order=[("k0_move", [(0, 0), (1, 0)]), ("k1_move", [(2, 0), (1, 128)]), ("k2_change", [(1, 64)]), ("k2_change", [(3, 0)])])
def test_launches_in_any_order_do_what_they_did_one_after_the_other(order: list[tuple[str, list[tuple[int, int]]]]) -> None:
    buffers = [Value(TensorType("f32", (256,)), f"b{n}") for n in range(4)]
    ops = [Op("launch", tuple(buffers[b] for b, _ in places), (), {"kernel": k, "offsets": tuple(at for _, at in places)}) for k, places in order]
    parameters = {v.hint: Parameter(v.hint, v) for v in buffers}
    module = Module("order", parameters, {"f": Function("f", Region((), tuple(ops)))}, {**MOVES, **CHANGES})
    together = Abreast().run(module, DEFAULT)
    verify(together, DEFAULT)
    given = {v.hint: np.linspace(-1, n + 1, 256, dtype=np.float32) for n, v in enumerate(buffers)}
    with np.errstate(all="ignore"):
        expected, found = (run_tiled(m, "f", {}, run_workgroups, given) for m in (module, together))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_the_example_above_runs_side_by_side() -> None:
    """What is independent joins: two that write parts of one buffer, and one that touches another."""
    b = [Value(TensorType("f32", (256,)), f"b{n}") for n in range(4)]
    wanted = [("k0_move", (b[0], b[1]), (0, 0)), ("k1_move", (b[2], b[1]), (0, 128)), ("k2_change", (b[1],), (64,)), ("k2_change", (b[3],), (0,))]
    ops = [Op("launch", operands, (), {"kernel": k, "offsets": offsets}) for k, operands, offsets in wanted]
    module = Module("order", {v.hint: Parameter(v.hint, v) for v in b}, {"f": Function("f", Region((), tuple(ops)))}, {**MOVES, **CHANGES})
    together = Abreast().run(module, DEFAULT)
    assert [op.attrs["kernel"] for op in launches(together, "f")] == ["a0_move_move", "a1_change_change"]


# ------------------------------------------------------------------------------------------- what a kernel touches


@THOROUGH
@given(kernel=tile_programs())
def test_a_kernel_touches_nothing_outside_of_its_footprint(kernel: Kernel) -> None:
    """Elements outside of what is said to be touched may hold anything, and keep it."""
    loops = gpu.lower(kernel, replace(DEFAULT, bindings=0))
    before = random_buffers(kernel, np.random.default_rng(1))
    plain, poisoned = [x.copy() for x in before], [x.copy() for x in before]
    outside = []
    for x, runs in zip(poisoned, footprints(loops), strict=True):
        mask = np.full(x.size, True)
        for first, end in runs:
            mask[first:end] = False
        x[mask] = -77
        outside.append(mask)
    run_workgroups(loops, plain)
    run_workgroups(loops, poisoned)
    for x, y, mask in zip(plain, poisoned, outside, strict=True):
        assert (y[mask] == -77).all()
        np.testing.assert_array_equal(x[~mask], y[~mask])


def test_parts_that_lie_between_each_other_do_not_meet() -> None:
    """Gradients in parts lie as [parts, size of all]: what one kernel writes has a run for each part."""
    module = looped(module_for("small"), DEFAULT)
    runs = [found for kernel in module.kernels.values() for found, access in zip(footprints(kernel), kernel.access, strict=True) if access == "out"]
    assert any(len(found) == 8 for found in runs)
    assert all(a[1] < b[0] for found in runs for a, b in zip(found, found[1:], strict=False))


def test_a_bundle_says_what_runs_side_by_side() -> None:
    device = target("wgsl")
    done = compiled(module_for("tiny"), device, DEFAULT)
    joined = [k for k in done.plan.kernels.values() if " | " in k.of]
    assert joined and all(f"of      {k.of}" in device.emit(done.plan, {}, DEFAULT, False)[f"kernels/{k.name}.wgsl"] for k in joined)
    for kernel in joined:
        renamed = replace(kernel, cost={**kernel.cost, "sides": tuple(f"k9{name}" for name in kernel.cost["sides"])})
        assert kernel_hash(renamed) == kernel_hash(kernel)


def test_the_operations_of_a_step_are_those_of_its_launches_apart(tmp_path: Path) -> None:
    """`tinygpt profile` knows how many operations a launch does, also of several kernels."""
    compile("tiny", "wgsl", out=tmp_path)
    regenerated = regenerate(tmp_path)
    known, done = flops_by_hash(regenerated), regenerated.compilation
    apart = next(stage.module for stage in done.stages if stage.name == "loops")
    tiles = next(stage.module.kernels for stage in done.stages if stage.level == "tile")
    expected = sum(product_flops(tiles[op.attrs["kernel"]]) for op in launches(apart, "train_step"))
    assert sum(known[kernel_hash(done.plan.kernels[launch.kernel])] for launch in done.plan.entries["train_step"].launches) == expected > 0
