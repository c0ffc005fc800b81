"""What the threads of a workgroup may not do is found: races, barriers that some miss, reads of what nobody stored. The
kernels of the gpu strategy do none of it, and each of their barriers is there because something breaks without it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from tests.lowered import op_module, passes_until, random_buffers, small_model, tiled
from tests.test_random_tiles import THOROUGH
from tests.tile_programs import tile_programs
from tinygpt.compiler import module_for
from tinygpt.ir.core import Kernel, Module, Op, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.interpret_tile import run_kernel
from tinygpt.ir.interpret_workgroup import run_workgroups
from tinygpt.ir.plan import grid_points
from tinygpt.ir.registry import Example
from tinygpt.ir.text import parse_kernel, print_kernel
from tinygpt.ir.types import TensorType
from tinygpt.ir.verify import verify_kernel
from tinygpt.lowering import schedule
from tinygpt.lowering.gpu import lower
from tinygpt.lowering.schedule import FEW_TILES, GPU_PRODUCTS, GpuProduct
from tinygpt.lowering.simplify import Simplify
from tinygpt.presets import PRESETS
from tinygpt.targets.wgsl.profiles import DEFAULT

SUBGROUPS = replace(DEFAULT, subgroup=4)

# Each thread hands its number to the next one, twice.
SOUND = """
kernel k(%x: in ptr<f32, buffer>, %y: out ptr<f32, buffer>) {level = "loop", cost = {threads = 8}} {
  grid g0 = 3
  %m = shared() {lanes = 1, offset = 0, size = 8} : ptr<f32, shared>
  for() {var = "n", lo = <0>, hi = <2>, step = 1} do {
    %a = load(%x) {at = <g0*16 + n*8 + thread>} : f32
    store(%m, %a) {at = <thread>}
    barrier()
    %b = load(%m) {at = <(thread + 1) % 8>} : f32
    store(%y, %b) {at = <g0*16 + n*8 + thread>}
    barrier()
  }
}
"""


def buffers() -> list[np.ndarray]:
    return [np.arange(48, dtype=np.float32), np.zeros(48, np.float32)]


def changed(*edits: tuple[str, str]) -> Kernel:
    text = SOUND
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    return parse_kernel(text)


def test_threads_exchange_values_between_barriers() -> None:
    x, y = buffers()
    verify_kernel(changed(), DEFAULT)
    run_workgroups(changed(), [x, y])
    assert y.reshape(6, 8).tolist() == np.roll(x.reshape(6, 8), -1, axis=1).tolist()


def test_chosen_grid_points_run_alone() -> None:
    x, y = buffers()
    run_workgroups(changed(), [x, y], points=[1])
    assert np.flatnonzero(y).tolist() == list(range(16, 32))


BARRIER_BEHIND = ("g0*16 + n*8 + thread>}\n    barrier()", "g0*16 + n*8 + thread>}")


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([("barrier()", "note() {text = \"\"}")], "an element of %m, which another thread stored since the last barrier"),
        ([BARRIER_BEHIND], "stores to an element of %m, which another thread read since the last barrier"),
        ([("store(%m, %a) {at = <thread>}", "store(%m, %a) {at = <thread // 2>}")], "stores to an element of %m, which another thread stored"),
        ([("store(%m, %a) {at = <thread>}", "note() {text = \"\"}")], "loads an element of %m, which nobody stored"),
        ([("size = 8", "size = 7")], "of elements 0..7 of an array of 7"),
        ([("load(%x) {at = <g0*16", "load(%x) {at = <g0*17")], "of elements 8..49 of an array of 48"),
        ([("store(%y, %b) {at = <g0*16 + n*8 + thread>}", "store(%y, %b) {at = <g0*16 + n*8>}")], "stores to an element of %y, which another thread stores"),
        ([("store(%y, %b) {at = <g0*16 + n*8 + thread>}", "store(%y, %b) {at = <n*8 + thread>}")], "stores to an element of %y, which another thread stores"),
        ([("%y: out", "%y: inout"), ("%a = load(%x) {at = <g0*16 + n*8 + thread>}", "%a = load(%y) {at = <g0*16 + n*8 + 7 - thread>}")], "which another thread reads"),
        ([("lanes = 1", "lanes = 4"), ("size = 8", "size = 32")], "workgroup memory of 4 lanes is accessed as a whole"),
    ],
)  # fmt: skip
def test_what_threads_do_to_each_other_is_found(edits: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(CompilerBug) as caught:
        run_workgroups(changed(*edits), buffers())
    assert message in str(caught.value)


def test_a_piece_that_was_given_back_holds_nothing_for_the_next() -> None:
    second = '%q = shared() {lanes = 1, offset = 0, size = 8} : ptr<f32, shared>\n    %b = load(%q)'
    with pytest.raises(CompilerBug, match="loads an element of %q, which nobody stored"):
        run_workgroups(changed(("%b = load(%m)", second)), buffers())


IN_A_BRANCH = ("barrier()", 'if() {left = <thread>, compare = "lt", right = <4>} do {\n      barrier()\n    }')
IN_SOME_TRIPS = ("barrier()", 'for() {var = "p", lo = <0>, hi = <thread>, step = 1} do {\n      barrier()\n    }')
# The inner loop has bounds that depend on the thread by way of the outer one's variable.
INDIRECTLY = (
    "barrier()",
    'for() {var = "p", lo = <thread>, hi = <thread + 1>, step = 1} do {\n'
    '      for() {var = "q", lo = <0>, hi = <p>, step = 1} do {\n        barrier()\n      }\n    }',
)


# Bounds from memory may differ between threads, and here do.
FROM_MEMORY = (
    "barrier()",
    '%i = index() {at = <thread>} : i32\n    bind(%i) {var = "s", lo = 0, hi = 7}\n'
    '    for() {var = "p", lo = <0>, hi = <s>, step = 1} do {\n      barrier()\n    }',
)


@pytest.mark.parametrize("edit", [IN_A_BRANCH, IN_SOME_TRIPS, INDIRECTLY, FROM_MEMORY], ids=["branch", "trips", "indirectly", "from memory"])
def test_a_barrier_that_some_threads_miss_is_refused_and_found(edit: tuple[str, str]) -> None:
    with pytest.raises(CompilerBug, match="only some threads may reach a barrier here"):
        verify_kernel(changed(edit), DEFAULT)
    with pytest.raises(CompilerBug, match="only some threads of a workgroup reach a barrier"):
        run_workgroups(changed(edit), buffers())


def test_a_subgroup_operation_in_a_branch_of_some_threads_is_refused() -> None:
    fold = 'subgroup_fold(%b) {kind = "sum", width = 4} : f32'
    whole = ("store(%y, %b)", f"%c = {fold}\n    store(%y, %c)")
    verify_kernel(changed(whole), SUBGROUPS)
    x, y = buffers()
    run_workgroups(changed(whole), [x, y])
    assert y.tolist() == np.roll(x.reshape(6, 8), -1, axis=1).reshape(12, 4).sum(1).repeat(4).tolist()
    part = ("store(%y, %b)", 'if() {left = <thread>, compare = "lt", right = <4>} do {\n      %c = ' + fold + "\n    }\n    store(%y, %b)")
    with pytest.raises(CompilerBug, match="only some threads may reach a subgroup_fold here: the if around it depends on the thread"):
        verify_kernel(changed(part), SUBGROUPS)
    with pytest.raises(CompilerBug, match="only some threads of a workgroup reach a subgroup_fold"):
        run_workgroups(changed(part), buffers())


def test_workgroups_may_go_different_ways() -> None:
    """Uniform flow is a matter of each workgroup."""
    kernel = changed(("hi = <2>", "hi = <g0>"), ("barrier()", 'if() {left = <g0>, compare = "gt", right = <1>} do {\n      barrier()\n    }'))
    verify_kernel(kernel, DEFAULT)
    with pytest.raises(CompilerBug, match="which another thread stored since the last barrier"):
        run_workgroups(kernel, buffers())
    x, y = buffers()
    run_workgroups(changed(("hi = <2>", "hi = <g0>")), [x, y])
    rolled = np.roll(x.reshape(3, 2, 8), -1, axis=2)
    rolled[0], rolled[1, 1] = 0, 0
    assert y.tolist() == rolled.reshape(-1).tolist()


# ------------------------------------------------------------------------------------------- kernels of the strategy


def kernels_of_a_step(module: Module) -> list[Kernel]:
    """The tile kernels of a training step."""
    for p in passes_until("tile"):
        module = p.run(module, DEFAULT)
    names = {op.attrs["kernel"]: None for op in module.functions["train_step"].body.ops if op.name == "launch"}
    return [module.kernels[name] for name in names]


def assert_sound(kernel: Kernel) -> None:
    """Its workgroups break no rule, and compute the tile program."""
    loops = lower(kernel, DEFAULT)
    verify_kernel(loops, DEFAULT)
    given = random_buffers(kernel, np.random.default_rng(0))
    found = [b.copy() for b in given]
    run_workgroups(loops, found)
    run_kernel(kernel, given, wide=True)
    for access, a, b in zip(kernel.access, given, found, strict=True):
        if access != "in":
            assert np.abs(a.astype(np.float64) - b).max() <= 3e-5 * np.abs(a).max() + 1e-9, print_kernel(kernel)


@pytest.mark.parametrize("name", ["tiny", "small", "xl"])
def test_kernels_of_a_step_break_no_rule(name: str) -> None:
    """At every grid point of tiny, at the first, a middle and the last one of the others."""
    preset = PRESETS[name]
    for kernel in kernels_of_a_step(module_for(preset.config, preset.batch_size, None)):
        last = grid_points(kernel) - 1
        points = range(last + 1) if name == "tiny" else sorted({0, last // 2, last})
        run_workgroups(lower(kernel, DEFAULT), random_buffers(kernel, np.random.default_rng(0)), points)


def product(rows: int, inner: int, columns: int) -> Kernel:
    """The tile kernel of a product of matrices."""
    shapes = (TensorType("f32", (rows, inner)), TensorType("f32", (inner, columns)))
    (kernel,) = tiled(Simplify().run(op_module("matmul", Example(shapes)), DEFAULT), DEFAULT).kernels.values()
    return kernel


@pytest.mark.parametrize("chosen", [*GPU_PRODUCTS, FEW_TILES], ids=lambda p: f"{p.tile}x{p.groups}")
def test_every_schedule_of_products_breaks_no_rule_at_its_edges(chosen: GpuProduct, monkeypatch: pytest.MonkeyPatch) -> None:
    height, width = chosen.tile
    edges = [(height, 64, width), (height + 3, 17, width + 4), (2 * height - 1, 96, width)]
    if not chosen.in_fours:
        edges += [(height - 5, 9, width - 1), (3, 5, 2)]
    monkeypatch.setattr(schedule, "GPU_PRODUCTS", [chosen])
    monkeypatch.setattr(GpuProduct, "suits", lambda self, extents: True)
    for rows, inner, columns in edges:
        kernel = product(rows, inner, columns)
        assert kernel.order["tile"][:2] == chosen.tile and kernel.order["groups"] == chosen.groups
        assert_sound(kernel)


@pytest.mark.parametrize("columns", [2048, 2050, 2057, 6000])
def test_products_of_any_height_fit_a_workgroup(columns: int) -> None:
    for rows in (1, 20, 33, 50, 52, 55, 56, 57, 63, 64, 65, 100, 127, 129):
        lower(product(rows, 96, columns), DEFAULT)


def test_groups_of_threads_refuse_what_is_not_one_product() -> None:
    kernel = product(64, 64, 64)
    (dot,) = (op for op in kernel.body.walk() if op.name == "dot")
    twice = Op("dot", (dot.result, *dot.operands[1:]), (Value(dot.result.type),))
    ops = tuple(o for op in kernel.body.ops for o in ((op, twice) if op is dot else (op,)))
    with pytest.raises(CompilerBug, match="groups of threads share one product"):
        lower(replace(kernel, body=replace(kernel.body, ops=ops), order={**kernel.order, "groups": 2}), DEFAULT)


@THOROUGH
@given(kernel=tile_programs())
def test_workgroups_of_random_tile_programs_break_no_rule(kernel: Kernel) -> None:
    assert_sound(kernel)


def without(region: Region, dropped: Op) -> Region:
    """The region without one of its ops."""
    kept = [op for op in region.ops if op is not dropped]
    return replace(region, ops=tuple(replace(op, regions=tuple(without(r, dropped) for r in op.regions)) for op in kept))


def needless_barriers(kernel: Kernel) -> tuple[int, int]:
    """How many barriers a kernel has without which its workgroups break no rule, and how many it has."""
    loops = lower(kernel, DEFAULT)
    barriers = [op for op in loops.body.walk() if op.name == "barrier"]
    given, needless = random_buffers(kernel, np.random.default_rng(0)), 0
    for barrier in barriers:
        try:
            run_workgroups(replace(loops, body=without(loops.body, barrier)), [b.copy() for b in given])
            needless += 1
        except CompilerBug:
            continue
    return needless, len(barriers)


def test_no_barrier_can_be_left_out_unnoticed() -> None:
    """But for one at the head of a loop over blocks, where memory of a trip before may still be in use."""
    module = small_model(n_heads=3, d_model=48, d_mlp=100, context_length=70, vocab_size=150)
    total = 0
    for kernel in kernels_of_a_step(module):
        needless, barriers = needless_barriers(kernel)
        total += barriers
        dots = sum(op.name == "dot" for op in kernel.body.walk())
        assert needless <= (dots if any(op.name == "for" for op in kernel.body.ops) and dots > 1 else 0), print_kernel(kernel)
    assert total > 80
