"""The interpreters below the graph level: what they compute, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tinygpt.ir.core import Kernel, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index
from tinygpt.ir.interpret import evaluate
from tinygpt.ir.interpret_loop import run_loop_kernel, scratch_elements
from tinygpt.ir.interpret_tile import run_kernel
from tinygpt.ir.loop import LoopBuilder
from tinygpt.ir.text import parse_kernel, parse_module
from tinygpt.ir.types import PointerType, ScalarType, VectorType
from tinygpt.ir.verify import verify, verify_kernel

F32 = ScalarType("f32")
Body = Callable[[LoopBuilder, Value, Value], None]

# ------------------------------------------------------------------------------------------- modules with launches

LOWERED = """
module m {
  param @w : f32[3, 4]
  fn step(%x: f32[4]) -> (y: f32[2, 2]) {
    %b = buffer() : f32[2, 2]
    launch(%x, @w, %b) {kernel = "k0", offsets = [0, 4, 0]}
    launch(@w) {kernel = "k1", offsets = [8]}
    return %b
  }
  kernel k0(%x: in f32[4], %w: in f32[4], %y: out f32[4]) {level = "tile"} {
    dim i = <0> : 4 of 4
    %1 = load(%x) {base = <0>, strides = [0, 1]} : f32<_, i>
    %2 = load(%w) {base = <0>, strides = [0, 1]} : f32<_, i>
    %3 = add(%1, %2) : f32<_, i>
    store(%y, %3) {base = <0>, strides = [0, 1]}
  }
  kernel k1(%w: inout f32[4]) {level = "LEVEL"} {
    BODY
  }
}
"""
DOUBLED_TILE = """
    dim i = <0> : 4 of 4
    %1 = load(%w) {base = <0>, strides = [0, 1]} : f32<_, i>
    %2 = add(%1, %1) : f32<_, i>
    store(%w, %2) {base = <0>, strides = [0, 1]}
"""
DOUBLED_LOOP = """
    %1 = load(%w) {at = <0>} : f32x4
    %2 = add(%1, %1) : f32x4
    store(%w, %2) {at = <0>}
"""


@pytest.mark.parametrize(("level", "body"), [("tile", DOUBLED_TILE), ("loop", DOUBLED_LOOP)])
def test_launches_read_and_write_buffers_and_parameters_at_their_offsets(level: str, body: str) -> None:
    module = parse_module(LOWERED.replace("LEVEL", level).replace("BODY", body))
    verify(module)
    x, w = np.arange(4, dtype=np.float32), np.arange(12, dtype=np.float32).reshape(3, 4)
    found = evaluate(module, "step", {"x": x}, {"w": w})
    assert found["y"].tolist() == (x + w[1]).reshape(2, 2).tolist()
    assert found["@w"].tolist() == [*w[:2].tolist(), (2 * w[2]).tolist()]
    assert w[2].tolist() == [8, 9, 10, 11], "the caller's arrays stay as they were"


def test_a_lowered_module_computes_in_float64_when_asked() -> None:
    module = parse_module(LOWERED.replace("LEVEL", "tile").replace("BODY", DOUBLED_TILE))
    x, w = np.full(4, 1 / 3), np.full((3, 4), 1 / 7, np.float32)
    found = evaluate(module, "step", {"x": x}, {"w": w})
    assert found["y"].dtype == found["@w"].dtype == np.float64
    assert found["y"][0, 0] == 1 / 3 + float(np.float32(1 / 7))


# ------------------------------------------------------------------------------------------- tile level


def copy_kernel(base: str = "0", target: str = "0", access: tuple[str, str] = ("in", "out")) -> Kernel:
    """Rows of four, from g0*4 + base of %x to g0*4 + target of %y."""
    kernel = parse_kernel(f"""
      kernel copy(%x: {access[0]} f32[10], %y: {access[1]} f32[10]) {{level = "tile"}} {{
        grid g0 = 3
        dim i = <g0*4> : 4 of 10
        %1 = load(%x) {{base = <{base}>, strides = [0, 1]}} : f32<_, i>
        store(%y, %1) {{base = <{target}>, strides = [0, 1]}}
      }}
    """)
    return kernel


def test_the_last_tile_of_a_ragged_axis_touches_live_elements_only() -> None:
    x, y = np.arange(10, dtype=np.float32), np.full(12, -1, np.float32)
    run_kernel(copy_kernel(), [x, y])
    assert y.tolist() == [*range(10), -1, -1]


@pytest.mark.parametrize("base", ["1", "-1", "g0*2"])
def test_an_address_outside_a_buffer_is_refused_with_kernel_op_and_address(base: str) -> None:
    x, y = np.zeros(10, np.float32), np.zeros(10, np.float32)
    with pytest.raises(CompilerBug, match=r"kernel copy at g0 = \d: load at addresses -?\d+..\d+ of a buffer of 10"):
        run_kernel(copy_kernel(base), [x, y])


def test_two_grid_points_that_store_one_element_are_refused() -> None:
    with pytest.raises(CompilerBug, match="store to address 0, which another grid point stores"):
        run_kernel(copy_kernel(target="-g0*4"), [np.zeros(10, np.float32), np.zeros(10, np.float32)])


def test_a_grid_point_that_reads_what_another_one_stores_is_refused() -> None:
    kernel = parse_kernel("""
      kernel shift(%x: inout f32[12]) {level = "tile"} {
        grid g0 = 2
        dim i = <g0*4> : 4 of 8
        %1 = load(%x) {base = <4>, strides = [0, 1]} : f32<_, i>
        store(%x, %1) {base = <0>, strides = [0, 1]}
      }
    """)
    verify_kernel(kernel)
    with pytest.raises(CompilerBug, match="which another grid point stores or reads"):
        run_kernel(kernel, [np.zeros(12, np.float32)])


def test_dead_elements_take_no_part_in_reductions_and_dots() -> None:
    """exp(0) = 1 in the dead columns would add to the sum and to the product."""
    kernel = parse_kernel("""
      kernel k(%x: in f32[2, 5], %y: out f32[2], %z: out f32[2, 2]) {level = "tile"} {
        dim i = <0> : 2 of 2
        dim j = <n1*4> : 4 of 5
        dim l = <0> : 2 of 2
        %zero = fill() {value = 0.0} : f32<i, _>
        %zeros = fill() {value = 0.0} : f32<i, l>
        %s, %p = for(%zero, %zeros) {var = "n1", lo = <0>, hi = <2>} do (%sum: f32<i, _>, %acc: f32<i, l>) {
          %1 = load(%x) {base = <0>, strides = [5, 1]} : f32<i, j>
          %2 = exp(%1) : f32<i, j>
          %3 = reduce(%2) {kind = "sum", axis = 1} : f32<i, _>
          %4 = add(%sum, %3) : f32<i, _>
          %5 = load(%x) {base = <0>, strides = [1, 5]} : f32<j, l>
          %6 = exp(%5) : f32<j, l>
          %7 = dot(%acc, %2, %6) : f32<i, l>
          yield %4, %7
        } : f32<i, _>, f32<i, l>
        store(%y, %s) {base = <0>, strides = [1, 0]}
        store(%z, %p) {base = <0>, strides = [2, 1]}
      }
    """)
    verify_kernel(kernel)
    x, y, z = np.random.default_rng(0).standard_normal((2, 5)), np.zeros(2), np.zeros(4)
    run_kernel(kernel, [x.ravel(), y, z], wide=True)
    np.testing.assert_allclose(y, np.exp(x).sum(1), rtol=1e-14)
    np.testing.assert_allclose(z.reshape(2, 2), np.exp(x) @ np.exp(x).T, rtol=1e-14)


def test_gathered_rows_are_checked() -> None:
    kernel = parse_kernel("""
      kernel pick(%t: in i32[3], %x: in f32[4, 2], %y: out f32[3, 2]) {level = "tile"} {
        dim i = <0> : 3 of 3
        dim c = <0> : 2 of 2
        %1 = load(%t) {base = <0>, strides = [1, 0]} : i32<i, _>
        %2 = gather(%x, %1) {base = <0>, strides = [2, 1]} : f32<i, c>
        store(%y, %2) {base = <0>, strides = [2, 1]}
      }
    """)
    verify_kernel(kernel)
    x, y = np.arange(8, dtype=np.float32), np.zeros(6, np.float32)
    run_kernel(kernel, [np.array([3, 0, 3], np.int32), x, y])
    assert y.tolist() == [6, 7, 0, 1, 6, 7]
    with pytest.raises(CompilerBug, match=r"gather at addresses 0\.\.9 of a buffer of 8 elements"):
        run_kernel(kernel, [np.array([3, 0, 4], np.int32), x, y])


def test_numbers_from_memory_bound_loops_and_addresses_inside_their_ranges() -> None:
    kernel = parse_kernel("""
      kernel k(%t: in i32[4], %x: in f32[5], %y: out f32[3]) {level = "tile"} {
        grid g0 = 3
        %zero = fill() {value = 0.0} : f32<_, _>
        %low = load(%t) {base = <g0>, strides = [0, 0]} : i32<_, _>
        bind(%low) {var = "s1", lo = 0, hi = 5}
        %high = load(%t) {base = <g0 + 1>, strides = [0, 0]} : i32<_, _>
        bind(%high) {var = "s2", lo = 1, hi = 5}
        %sum = for(%zero) {var = "n1", lo = <s1>, hi = <s2>} do (%acc: f32<_, _>) {
          %a = load(%x) {base = <n1>, strides = [0, 0]} : f32<_, _>
          %next = add(%acc, %a) : f32<_, _>
          yield %next
        } : f32<_, _>
        store(%y, %sum) {base = <g0>, strides = [0, 0]}
      }
    """)
    verify_kernel(kernel)
    x = np.array([1, 10, 100, 1000, 10000], np.float32)
    for bounds, sums in (([0, 2, 2, 5], [11, 0, 11100]), ([-9, -3, 1, 99], [1, 11 - 10, 11110]), ([4, 3, 5, 0], [0, 11000, 0])):
        y = np.zeros(3, np.float32)
        run_kernel(kernel, [np.array(bounds, np.int32), x, y])
        assert y.tolist() == sums


# ------------------------------------------------------------------------------------------- loop level


def loop_kernel(body: Body) -> Kernel:
    """A kernel of two buffers, %x that is read and %y that is written."""
    x, y = (Value(PointerType("f32", "buffer"), hint) for hint in "xy")
    k = LoopBuilder()
    body(k, x, y)
    kernel = Kernel("k", Region((x, y), k.finish()), ("in", "out"), {"g0": 8}, level="loop")
    verify_kernel(kernel)
    return kernel


def run(body: Body, x: list[float], size: int, lo: int = 0, hi: int = 1, fused: bool = False) -> list[float]:
    y = np.zeros(size, np.float32)
    run_loop_kernel(loop_kernel(body), [np.array(x, np.float32), y], lo, hi, fused)
    return y.tolist()


def test_grid_points_from_lo_to_hi_are_run() -> None:
    def body(k: LoopBuilder, x: Value, y: Value) -> None:
        def point(p: Index) -> None:
            row = k.advance(x, p * 2)
            k.store(k.advance(y, p * 2), k.primitive("add", [k.load(row, 0, 2), k.const(1.0, F32)]), 0)

        k.loop(Index.variable("lo"), Index.variable("hi"), 1, point)

    assert run(body, [0, 1, 2, 3, 4, 5], 6, 1, 3) == [0, 0, 3, 4, 5, 6]


def test_carried_values_and_steps() -> None:
    def body(k: LoopBuilder, x: Value, y: Value) -> None:
        zero = k.const(0.0, F32)
        fib = k.loop(0, 12, 2, lambda n, a, b: [b, k.primitive("add", [a, b])], [zero, k.const(1.0, F32)])
        k.store(y, fib[0], 0)
        last = k.loop(0, 9, 4, lambda n, _: [k.primitive("cast", [k.index(n)], "f32")], [zero])
        k.store(y, last[0], 1)

    assert run(body, [], 2) == [8, 8]


def test_vector_ops() -> None:
    def body(k: LoopBuilder, x: Value, y: Value) -> None:
        a, b = k.load(x, 0, 4), k.load(x, 4, 4)
        wide = VectorType("f32", 4)
        for half in (0, 1):
            k.store(y, k.pure("interleave", [a, b], wide, half=half), 4 * half)
        k.store(y, k.pure("fold", [a], F32, kind="sum"), 8)
        k.store(y, k.pure("fold", [b], F32, kind="max"), 9)
        k.store(y, k.pure("extract", [a], F32, lane=2), 10)
        k.store(y, k.pure("broadcast_lane", [b], wide, lane=1), 11)
        k.store(y, k.primitive("cast", [k.lanes(4)], "f32"), 15)

    assert run(body, [1, 2, 3, 4, 50, 60, 70, 80], 19) == [1, 50, 2, 60, 3, 70, 4, 80, 10, 80, 3, *[60] * 4, *range(4)]


def test_conditions_and_outlined_regions() -> None:
    def body(k: LoopBuilder, x: Value, y: Value) -> None:
        def point(n: Index) -> None:
            k.when(n % 2, "eq", 0, lambda: k.outline("even", [x, y], ["i1"], lambda a, b: k.store(b, k.load(a, n), n)))

        k.loop(0, 4, 1, point)

    assert run(body, [1, 2, 3, 4], 4) == [1, 0, 3, 0]


def test_each_primitive_rounds_to_float32_and_fma_once_if_fused() -> None:
    def body(k: LoopBuilder, x: Value, y: Value) -> None:
        a, b, c = (k.load(x, n) for n in range(3))
        k.store(y, k.primitive("fma", [a, b, c]), 0)

    a = 1 + 2.0**-12
    assert run(body, [a, a, -1 - 2.0**-11], 1) == [0]
    assert run(body, [a, a, -1 - 2.0**-11], 1, fused=True) == [2.0**-24]


def test_integers_wrap_and_bits_are_reinterpreted() -> None:
    u32 = ScalarType("u32")
    x, y = Value(PointerType("u32", "buffer")), Value(PointerType("f32", "buffer"))
    k = LoopBuilder()
    total = k.primitive("add", [k.load(x, 0), k.const(0xFFFFFFFF, u32)])
    shifted = k.primitive("or", [k.primitive("shr", [total, k.const(1, u32)]), k.const(0x3F800000, u32)])
    k.store(y, k.primitive("bitcast", [shifted], "f32"), 0)
    found = np.zeros(1, np.float32)
    kernel = Kernel("k", Region((x, y), k.finish()), ("in", "out"), {}, level="loop")
    run_loop_kernel(kernel, [np.array([3], np.uint32), found], 0, 1)
    assert found.view(np.uint32).tolist() == [0x3F800001]


def test_scratch_keeps_what_was_stored_and_is_nan_elsewhere() -> None:
    def body(k: LoopBuilder, x: Value, y: Value) -> None:
        first, second = k.scratch(2, hint="first"), k.scratch(20, hint="second")
        k.store(first, k.load(x, 0, 2), 0)
        k.store(y, k.load(first, 0, 2), 0)
        k.store(y, k.load(second, 19), 2)

    assert scratch_elements(loop_kernel(body)) == 32 + 48
    found = run(body, [1, 2], 3)
    assert found[:2] == [1, 2] and np.isnan(found[2])


@pytest.mark.parametrize("at", [-1, 3, 4])
def test_an_access_outside_a_buffer_is_refused(at: int) -> None:
    with pytest.raises(CompilerBug, match=rf"kernel k: load of elements {at}..{at + 1} of an array of 4"):
        run(lambda k, x, y: k.store(y, k.load(x, at, 2), 0), [1, 2, 3, 4], 4)


def test_what_needs_a_workgroup_is_refused() -> None:
    def body(k: LoopBuilder, x: Value, y: Value) -> None:
        k.emit("barrier", [], None)

    with pytest.raises(CompilerBug, match="barrier needs the workgroup interpreter"):
        run(body, [], 1)


def test_a_kernel_of_the_other_level_is_refused() -> None:
    with pytest.raises(CompilerBug, match="is at tile level, not at loop level"):
        run_loop_kernel(copy_kernel(), [np.zeros(10, np.float32)] * 2, 0, 1)
    with pytest.raises(CompilerBug, match="is at loop level, not at tile level"):
        run_kernel(loop_kernel(lambda k, x, y: None), [np.zeros(1, np.float32)] * 2)
