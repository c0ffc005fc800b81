"""The verifier finds what breaks its rules, all of it at once, and says it under the offending lines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Region, Value
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.registry import GraphBuilder
from tinygpt.ir.text import parse_kernel, parse_module
from tinygpt.ir.types import TensorType
from tinygpt.ir.verify import verify, verify_kernel

CPU = Caps("avx", lanes=8, registers=32, native=frozenset({"exp"}))

# ------------------------------------------------------------------------------------------- graph functions


GRAPH = """
module tiny {
  param @w : f32[8, 4] {init = ["normal", 0.02]}
  state @m : f32[8, 4]
  fn step(%x: f32[16, 8]) -> (y: f32[16, 4]) {
    %1 = matmul(%x, @w) : f32[16, 4]
    %2 = gelu(%1) : f32[16, 4]
    %3 = add(@m, @w) : f32[8, 4]
    update @m = %3
    return %2
  }
}
"""


def graph(old: str = "", new: str = "") -> Module:
    assert old in GRAPH
    return parse_module(GRAPH.replace(old, new, 1) if old else GRAPH)


def test_a_sound_module_passes() -> None:
    verify(graph())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("%1 = matmul(%x, @w)", "%1 = matmul(@w, %x)", "inner dims differ"),
        ("%1 = matmul(%x, @w)", "%1 = matmull(%x, @w)", "did you mean matmul?"),
        ("= matmul(%x, @w) : f32[16, 4]", "= matmul(%x, @w) : f32[4, 16]", "results are f32[16, 4], not f32[4, 16]"),
        ("gelu(%1)", "reshape(%1)", "lacks the attribute shape"),
        ("gelu(%1)", "gelu(%1, %1)", "takes 1 operands, not 2"),
        ("gelu(%1)", "ge(%1, %1)", "results are bool[16, 4]"),
        ("gelu(%1)", 'cast(%1) {dtype = "f32", to = 3}', "unexpected keyword argument"),
        ("%2 =", '%0 = constant() {value = 1e999, dtype = "f32"} : f32[]\n    %2 =', "value = inf is not finite"),
        ("update @m = %3", "update @m = %2", "updates @m, which is f32[8, 4], by a value of type f32[16, 4]"),
        ("gelu(%1)", 'launch(%1) {kernel = "k1", offsets = [0]}', "there is no kernel 'k1'"),
    ],
)
def test_a_graph_error_is_reported_under_its_line(old: str, new: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        verify(graph(old, new))
    lines = str(caught.value).split("\n")
    (marked,) = [i for i, line in enumerate(lines) if message in line]
    if "^" in lines[marked]:
        assert new.split("(")[0].split("= ")[-1].split("\n")[0] in lines[marked - 1]


def test_an_error_that_a_pass_made_is_a_compiler_bug_that_names_the_pass() -> None:
    with pytest.raises(CompilerBug, match="after pass fuse"):
        verify(graph("gelu(%1)", "gelu(%1, %1)"), after="fuse")


def test_all_errors_of_a_function_are_reported_at_once() -> None:
    swapped = "matmul(@w, %x) : f32[16, 4]\n    %2 = gelu(%1, %1)"
    module = graph("matmul(%x, @w) : f32[16, 4]\n    %2 = gelu(%1)", swapped)
    step = replace(module.functions["step"], result_names=("y", "z"))
    with pytest.raises(UserError) as caught:
        verify(module.with_function(step))
    for message in ("breaks 3 rules", "inner dims differ", "takes 1 operands, not 2", "1 results are called y, z"):
        assert message in str(caught.value)


def test_a_kernel_with_too_few_access_words_is_reported_not_crashed_on() -> None:
    with pytest.raises(CompilerBug, match="3 buffers and 1 access words"):
        verify_kernel(replace(parse_kernel(TILE), access=("in",)))


def test_a_value_is_defined_once_and_before_its_use() -> None:
    x = Value(TensorType("f32", (4,)), "x")
    g = GraphBuilder()
    y = g("gelu", x)
    g("gelu", y)
    first, second = g.ops
    for ops, message in (((second, first), "used where it is not defined"), ((first, first, second), "defined twice")):
        function = Function("f", Region((x,), ops, (y,)), result_names=("y",))
        with pytest.raises(CompilerBug, match=message):
            verify(Module("m", functions={"f": function}), after="simplify")


def test_a_group_sees_its_operands_only() -> None:
    outer = """
      module m {
        fn f(%x: f32[4]) -> (y: f32[4]) {
          %1 = gelu(%x) : f32[4]
          %2 = group(%1) {kind = "pointwise"} do (%a: f32[4]) {
            %3 = add(%a, %SEEN) : f32[4]
            yield %3
          } : f32[4]
          return %2
        }
      }
    """
    verify(parse_module(outer.replace("SEEN", "a")))
    with pytest.raises(UserError, match=r"%x \(f32\[4\]\) is used where it is not defined"):
        verify(parse_module(outer.replace("SEEN", "x")))


LAUNCH = """
module m {
  param @w : f32[8]
  fn f(%x: f32[4]) -> (y: f32[4]) {
    %b = buffer() : f32[4]
    launch(%x, %b) {kernel = "double", offsets = [0, 0]}
    return %b
  }
  kernel double(%x: in f32[4], %y: out f32[4]) {level = "tile"} {
    dim i = <0> : 4 of 4
    %1 = load(%x) {base = <0>, strides = [0, 1]} : f32<_, i>
    %2 = add(%1, %1) : f32<_, i>
    store(%y, %2) {base = <0>, strides = [0, 1]}
  }
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(%x, %b) {", "(%x, %x) {", r"writes %x .* no buffer and no parameter"),
        ("(%x, %b) {", "(%x) {", "takes 2 buffers"),
        ("offsets = [0, 0]", "offsets = [0, 1]", "from element 1 on is no"),
    ],
)
def test_a_launch_gives_its_kernel_memory_that_fits(old: str, new: str, message: str) -> None:
    verify(parse_module(LAUNCH))
    verify(parse_module(LAUNCH.replace("(%x, %b)", "(%x, @w)").replace("offsets = [0, 0]", "offsets = [0, 4]")))
    with pytest.raises(CompilerBug, match=message):
        verify(parse_module(LAUNCH.replace(old, new)), after="tile")


# ------------------------------------------------------------------------------------------- tile kernels


TILE = """
kernel k(%x: in f32[50, 40], %t: in i32[50], %y: out f32[50]) {level = "tile"} {
  grid g0 = 4
  dim i = <g0*16> : 16 of 50
  dim k = <n1*16> : 16 of 40
  %zero = fill() {value = 0.0} : f32<i, _>
  %sum = for(%zero) {var = "n1", lo = <0>, hi = <3>} do (%acc: f32<i, _>) {
    %a = load(%x) {base = <0>, strides = [40, 1]} : f32<i, k>
    %r = reduce(%a) {kind = "sum", axis = 1} : f32<i, _>
    %next = add(%acc, %r) : f32<i, _>
    yield %next
  } : f32<i, _>
  store(%y, %sum) {base = <0>, strides = [1, 0]}
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("strides = [40, 1]} : f32<i, k>", "strides = [41, 1]} : f32<i, k>", "addresses 0..2048 are not all inside"),
        ("base = <0>, strides = [40", "base = <-1>, strides = [40", "addresses -1..1998 are not all inside"),
        ("grid g0 = 4", "grid g0 = 5", "dim i starts in 0..64, outside of 0..49"),
        ("hi = <3>", "hi = <4>", "dim k starts in 0..48, outside of 0..39"),
        ("hi = <3>", "hi = <n1>", "the upper bound depends on n1, not bound here"),
        ("store(%y, %sum)", "store(%x, %sum)", "needs a buffer that is out or inout"),
        ("load(%x)", "load(%y)", "needs a buffer that is in or inout"),
        ("%a = load(%x)", "%a = load(%t)", "a load from i32[50] is i32, not f32"),
        ("value = 0.0", "value = -1e999", "not finite"),
        ("value = 0.0", "value = -1e39", "not a finite f32"),
        ("axis = 1} : f32<i, _>", "axis = 0} : f32<i, _>", "result is f32<_, k>, not f32<i, _>"),
        ("%next = add(%acc, %r)", "%next = add(%acc, %x)", "a buffer is read by load or gather only"),
        ("%next = add(%acc, %r)", "%next = softmax(%r)", "softmax is not an op of the tile level"),
        ("%next = add(%acc, %r)", "%next = lt(%acc, %r)", "result is bool<i, _>, not f32<i, _>"),
        ("%next = add(%acc, %r) : f32<i, _>", "%next = add(%acc, %a) : f32<i, k>", "its yields are f32<i, k>"),
        ("strides = [1, 0]", "strides = [1, 1]", "an axis of extent one has no stride"),
        ("<g0*16>", "<(-g0*12 + 20) // (16)>", "divides -g0*12 + 20 by 16"),
        ("add(%acc, %r)", "dot(%acc, %r, %a)", "inner axes differ"),
    ],
)
def test_a_tile_error_is_found(old: str, new: str, message: str) -> None:
    verify_kernel(parse_kernel(TILE))
    assert old in TILE
    with pytest.raises(CompilerBug) as caught:
        verify_kernel(parse_kernel(TILE.replace(old, new, 1)))
    assert message in str(caught.value)


BOUND = """
kernel k(%x: in f32[8, 6], %t: in i32[9], %y: out f32[8, 6]) {level = "tile"} {
  grid g0 = 8
  dim c = <0> : 6 of 6
  %zero = fill() {value = 0.0} : f32<_, c>
  %low = load(%t) {base = <g0>, strides = [0, 0]} : i32<_, _>
  bind(%low) {var = "s1", lo = 0, hi = 8}
  %high = load(%t) {base = <g0 + 1>, strides = [0, 0]} : i32<_, _>
  bind(%high) {var = "s2", lo = 0, hi = 8}
  %sum = for(%zero) {var = "n1", lo = <s1>, hi = <s2>} do (%acc: f32<_, c>) {
    %p = load(%t) {base = <n1>, strides = [0, 0]} : i32<_, _>
    bind(%p) {var = "s3", lo = 0, hi = 7}
    %a = load(%x) {base = <s3*6>, strides = [0, 1]} : f32<_, c>
    %next = add(%acc, %a) : f32<_, c>
    yield %next
  } : f32<_, c>
  store(%y, %sum) {base = <g0*6>, strides = [0, 1]}
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"s3", lo = 0, hi = 7', '"s3", lo = 0, hi = 8', "addresses 0..53 are not all inside"),
        ('"s2", lo = 0, hi = 8', '"s2", lo = 0, hi = 10', "addresses 0..9 are not all inside"),
        ('"s1", lo = 0, hi = 8', '"s1", lo = 3, hi = 2', "3..2 is no range"),
        ('"s1", lo = 0, hi = 8', '"s1", lo = -1, hi = 8', "index variables are i32 numbers from 0 on"),
        ('"s2", lo', '"s1", lo', "index variable s1 is bound twice"),
        ("base = <g0*6>", "base = <s3*6>", "the base depends on s3, not bound here"),
        ("bind(%low)", "bind(%zero)", "bind takes i32<_, _>, not f32<_, c>"),
        ("%next = add(%acc, %a)", '%r = reduce(%a) {kind = "sum", axis = 1} : f32<_, _>\n    %next = add(%acc, %r)', "reduce in a loop whose bounds are numbers from memory"),
    ],
)  # fmt: skip
def test_numbers_from_memory_are_bound_to_ranges_and_proved_by_them(old: str, new: str, message: str) -> None:
    verify_kernel(parse_kernel(BOUND))
    assert old in BOUND
    with pytest.raises(CompilerBug) as caught:
        verify_kernel(parse_kernel(BOUND.replace(old, new, 1)))
    assert message in str(caught.value)


def test_a_reduction_in_a_loop_inside_one_with_bounds_from_memory_is_refused_too() -> None:
    inner = """%next = for(%acc) {var = "n2", lo = <0>, hi = <n1>} do (%more: f32<_, c>) {
      %r = reduce(%a) {kind = "sum", axis = 1} : f32<_, _>
      %both = add(%more, %r) : f32<_, c>
      yield %both
    }"""
    with pytest.raises(CompilerBug, match="reduce in a loop whose bounds are numbers from memory"):
        verify_kernel(parse_kernel(BOUND.replace("%next = add(%acc, %a)", inner)))


def test_a_dim_of_a_loop_does_not_leave_it() -> None:
    text = TILE.replace("f32<i, _>", "f32<i, k>").replace("%r = reduce(%a) {kind = \"sum\", axis = 1}", "%r = exp(%a)")
    with pytest.raises(CompilerBug, match="the start of k depends on n1, not bound here"):
        verify_kernel(parse_kernel(text))


def test_a_proof_uses_variables_shared_by_base_and_start() -> None:
    """Reading backwards: the base goes down as the rows go up."""
    text = """
      kernel k(%x: in f32[64], %y: out f32[64]) {level = "tile"} {
        grid g0 = 4
        dim i = <g0*16> : 16 of 64
        %a = load(%x) {base = <-g0*32 + 48>, strides = [1, 0]} : f32<i, _>
        store(%y, %a) {base = <0>, strides = [1, 0]}
      }
    """
    verify_kernel(parse_kernel(text))


def test_a_loop_that_never_runs_needs_no_proof() -> None:
    verify_kernel(parse_kernel(TILE.replace("lo = <0>, hi = <3>", "lo = <3>, hi = <3>")))


def test_a_kernel_respects_the_limits_of_a_device() -> None:
    kernel = parse_kernel(TILE)
    with pytest.raises(CompilerBug) as caught:
        verify_kernel(kernel, Caps("small", bindings=2, binding_bytes=4096, grid_limit=3))
    for message in ("3 buffers; small binds 2", "a binding of small has at most 4096", "extent 4; small allows 3"):
        assert message in str(caught.value)


# ------------------------------------------------------------------------------------------- loop kernels


LOOP = """
kernel k(%x: in ptr<f32, buffer>, %y: out ptr<f32, buffer>) {level = "loop"} {
  grid g0 = 4
  %tile = scratch() {offset = 0, size = 8} : ptr<f32, scratch>
  %one = const() {value = 1.0} : f32
  %ones = splat(%one) : f32x8
  for() {var = "p", lo = <lo>, hi = <hi>, step = 1} do {
    %row = advance(%x) {by = <p*8>, scale = 1} : ptr<f32, buffer>
    %v = load(%row) {at = <0>} : f32x8
    %e = exp(%v) : f32x8
    %s = add(%e, %ones) : f32x8
    store(%tile, %s) {at = <0>}
    outline(%tile, %y) {name = "micro1", indices = ["p"]} do (%from: ptr<f32, scratch>, %to: ptr<f32, buffer>) {
      %w = load(%from) {at = <0>} : f32x8
      store(%to, %w) {at = <p*8>}
    }
  }
}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("%e = exp(%v)", "%e = tanh(%v)", "avx has no tanh of its own"),
        ("%e = exp(%v)", "%e = gelu(%v)", "gelu is not an op of the loop level"),
        ("add(%e, %ones)", "add(%e, %one)", "splat the scalars"),
        ("add(%e, %ones)", "add(%e)", "add takes 2 operands, not 1"),
        ("add(%e, %ones) : f32x8", "lt(%e, %ones) : f32x8", "result is boolx8"),
        ("add(%e, %ones)", "xor(%e, %ones)", "xor takes whole numbers, not f32"),
        ("load(%row) {at = <0>} : f32x8", "load(%row) {at = <0>} : f32x4", "lanes, not 4"),
        ("load(%row) {at = <0>} : f32x8", "load(%row) {at = <0>} : i32x8", "a load of f32 elements is not i32x8"),
        ("store(%tile, %s)", "store(%row, %s)", "a buffer that is only read"),
        ("by = <p*8>", "by = <q*8>", "index variables q are not bound here"),
        ('indices = ["p"]', "indices = []", "index variables p are not bound here"),
        ("store(%to, %w)", "store(%to, %s)", "used where it is not defined"),
        ("scratch() {offset = 0", "shared() {offset = 0", "shared is for workgroups"),
        ("value = 1.0", "value = 1e999", "not a finite f32"),
        ("offset = 0, size = 8", "offset = 0", "scratch lacks size"),
    ],
)
def test_a_loop_error_is_found(old: str, new: str, message: str) -> None:
    verify_kernel(parse_kernel(LOOP), CPU)
    assert old in LOOP
    with pytest.raises(CompilerBug) as caught:
        verify_kernel(parse_kernel(LOOP.replace(old, new, 1)), CPU)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ('bind(%n) {var = "p", lo = 0, hi = 1}', "index variable p is bound twice"),
        ('bind(%n) {var = "q", lo = 2, hi = 1}', "2..1 is no range"),
        ('bind(%one) {var = "q", lo = 0, hi = 1}', "bind takes an i32, not f32"),
    ],
)
def test_a_number_is_bound_once_to_a_range(bind: str, message: str) -> None:
    def kernel(bind: str) -> Kernel:
        return parse_kernel(LOOP.replace("%v = load", f"%n = index() {{at = <p>}} : i32\n    {bind}\n    %v = load", 1))

    verify_kernel(kernel('bind(%n) {var = "q", lo = 0, hi = 1}'), CPU)
    with pytest.raises(CompilerBug, match=message):
        verify_kernel(kernel(bind), CPU)


def test_a_bound_number_is_known_in_its_region_only() -> None:
    bound = LOOP.replace("by = <p*8>", "by = <p*8 + q>").replace("%row =", '%n = index() {at = <p>} : i32\n    bind(%n) {var = "q", lo = 0, hi = 0}\n    %row =')
    verify_kernel(parse_kernel(bound), CPU)
    inner = 'for() {var = "r", lo = <0>, hi = <2>, step = 1} do {\n      bind(%n) {var = "q", lo = 0, hi = 0}\n    }'
    with pytest.raises(CompilerBug, match="index variables q are not bound here"):
        verify_kernel(parse_kernel(bound.replace('bind(%n) {var = "q", lo = 0, hi = 0}', inner)), CPU)


def test_an_index_variable_is_bound_once() -> None:
    inner = 'for() {var = "p", lo = <0>, hi = <2>, step = 1} do {\n    }\n    %v = load'
    with pytest.raises(CompilerBug, match="index variable p is bound twice"):
        verify_kernel(parse_kernel(LOOP.replace("%v = load", inner, 1)), CPU)
