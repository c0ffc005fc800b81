"""The text form: print -> parse -> print is a fixed point over generated modules, and errors show the place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.ir.core import Function, Kernel, Location, Module, Op, Parameter, Region, Value
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.index import Index
from tinygpt.ir.show import show, summary
from tinygpt.ir.text import parse_kernel, parse_module, print_function, print_kernel, print_module, print_op
from tinygpt.ir.types import Dim, PointerType, ScalarType, TensorType, TileType, Type, VectorType

# ------------------------------------------------------------------------------------------- structural equality


def plain(value: object) -> object:
    """An attribute as something comparable: numbers keep their kind, and nan equals itself."""
    match value:
        case tuple() | list():
            return tuple(plain(item) for item in value)
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
        case bool() | int() | float():
            return (type(value).__name__, repr(value))
    return value


class Shape:
    """Numbers values by first sight, so that two functions with the same structure become equal data."""

    def __init__(self, parameters: Mapping[Value, str]) -> None:
        self.seen: dict[Value, object] = dict(parameters)

    def value(self, value: Value) -> object:
        return self.seen.setdefault(value, (len(self.seen), value.type))

    def values(self, values: tuple[Value, ...]) -> list[object]:
        return [self.value(v) for v in values]

    def region(self, region: Region) -> object:
        return self.values(region.args), [self.op(op) for op in region.ops], self.values(region.yields)

    def op(self, op: Op) -> object:
        operands, regions = self.values(op.operands), [self.region(r) for r in op.regions]
        return op.name, operands, regions, self.values(op.results), plain(op.attrs), op.loc


def structure(thing: Module | Kernel) -> object:
    if isinstance(thing, Kernel):
        return (
            thing.name, Shape({}).region(thing.body), thing.access, list(thing.grid.items()), thing.dims,
            plain(thing.order), plain(thing.cost), thing.level, thing.of,
        )  # fmt: skip
    names = {p.value: f"@{p.name}" for p in thing.parameters.values()}
    parameters = [(key, p.name, p.type, p.role, plain(p.init)) for key, p in thing.parameters.items()]
    functions = []
    for key, function in thing.functions.items():
        shape = Shape(names)
        updates = [(name, shape.value(v)) for name, v in function.updates.items()]
        functions.append((key, function.name, shape.region(function.body), updates, function.result_names))
    kernels = [(key, structure(k)) for key, k in thing.kernels.items()]
    return thing.name, parameters, functions, kernels, plain(thing.attrs)


# ------------------------------------------------------------------------------------------- generated modules

SYMBOLS = st.from_regex(r"[A-Za-z0-9_.:-]{1,8}", fullmatch=True)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True).filter(lambda name: name not in ("min", "max"))
# Few distinct hints, so that they collide, also with the numbered copies of one another.
HINTS = st.sampled_from(["", "", "x", "x_1", "x.1", "x.1.1", "acc", "12", "a-b", "a_b", "h.0.w", "fn", "é"])
OP_NAMES = st.sampled_from(["add", "dot", "for", "load", "yields", "update", "grid", "fn", "a.b", "location", "done"])
DTYPES = st.sampled_from(["f32", "f64", "f16", "i32", "u32", "bool"])
LOCATIONS = st.none() | st.builds(Location, st.text(max_size=8), st.integers(-1, 999), st.text(max_size=12))
VARIABLES = st.sampled_from(["g0", "g1", "n1", "tid", "minimum"]).map(Index.variable)
DIVISORS = st.integers(1, 64)


def compound_indices(inner: st.SearchStrategy[Index]) -> st.SearchStrategy[Index]:
    return st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, n: a * n, inner, st.integers(-99, 99)),
        st.builds(lambda a, n: a // n, inner, DIVISORS),
        st.builds(lambda a, n: a % n, inner, DIVISORS),
        st.builds(Index.minimum, inner, inner),
        st.builds(Index.maximum, inner, inner),
    )


INDICES = st.recursive(VARIABLES | st.integers(-99, 9999).map(Index.of), compound_indices, max_leaves=6)
NUMBERS = st.integers() | st.floats() | st.sampled_from([-0.0, 1e-05, 1e16, 5e-324])
LEAVES = st.none() | st.booleans() | NUMBERS | st.text() | INDICES
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["eps", "lo", "axis", "fn", "param", "none", "inf", "do", "two words", ""]) | NAMES
ATTRS = st.dictionaries(KEYS, VALUES, max_size=3)
TENSORS = st.builds(TensorType, DTYPES, st.lists(st.integers(0, 512), max_size=3).map(tuple))
LOOP_TYPES = st.one_of(
    TENSORS,
    st.builds(ScalarType, DTYPES),
    st.builds(VectorType, DTYPES, st.sampled_from([4, 16])),
    st.builds(PointerType, DTYPES, st.sampled_from(["buffer", "scratch", "shared"])),
)


@st.composite
def regions(
    draw: st.DrawFn, types: st.SearchStrategy[Type], outer: tuple[Value, ...], args: tuple[Value, ...], depth: int
) -> Region:
    """Random ops over what is visible; some hold regions of their own."""
    values = st.builds(Value, types, HINTS)
    visible, ops = [*outer, *args], []
    for _ in range(draw(st.integers(0, 4))):
        operands = tuple(draw(st.lists(st.sampled_from(visible), max_size=3))) if visible else ()
        inner = []
        for _ in range(draw(st.integers(0, 2)) if depth and draw(st.booleans()) else 0):
            inner_args = tuple(draw(st.lists(values, max_size=2)))
            inner.append(draw(regions(types, tuple(visible), inner_args, depth - 1)))
        results = tuple(draw(st.lists(values, max_size=3)))
        ops.append(Op(draw(OP_NAMES), operands, results, draw(ATTRS), tuple(inner), draw(LOCATIONS)))
        visible += results
    yields = tuple(draw(st.lists(st.sampled_from(visible), max_size=2))) if visible else ()
    return Region(args, tuple(ops), yields)


@st.composite
def kernels(draw: st.DrawFn) -> Kernel:
    names = draw(st.lists(NAMES.filter(lambda name: name != "_"), max_size=3, unique=True))
    dims = tuple(Dim(name, draw(INDICES), draw(st.integers(1, 64)), draw(st.integers(1, 512))) for name in names)
    axes = st.none() | st.sampled_from(dims) if dims else st.none()
    types = LOOP_TYPES | st.builds(TileType, DTYPES, axes, axes)
    args = tuple(draw(st.lists(st.builds(Value, TENSORS, HINTS), max_size=3)))
    body = draw(regions(types, (), args, 2))
    return Kernel(
        draw(SYMBOLS),
        Region(args, body.ops),
        tuple(draw(st.sampled_from(["in", "out", "inout"])) for _ in args),
        draw(st.dictionaries(NAMES, st.integers(1, 99), max_size=3)),
        dims,
        draw(ATTRS),
        draw(ATTRS),
        draw(st.sampled_from(["tile", "loop"])),
        draw(st.text(max_size=6)),
    )


@st.composite
def modules(draw: st.DrawFn) -> Module:
    parameters = {}
    for name in draw(st.lists(SYMBOLS, max_size=3, unique=True)):
        init = draw(st.sampled_from([("normal", 0.02), ("constant", 0.0), ("data",)]))
        value = Value(draw(TENSORS), draw(HINTS))
        parameters[name] = Parameter(name, value, draw(st.sampled_from(["param", "state"])), init)
    outer = tuple(p.value for p in parameters.values())
    functions = {}
    for name in draw(st.lists(SYMBOLS, max_size=2, unique=True)):
        args = tuple(draw(st.lists(st.builds(Value, TENSORS, HINTS), max_size=3)))
        body = draw(regions(LOOP_TYPES, outer, args, 1))
        local = [*outer, *args, *(result for op in body.ops for result in op.results)]
        updated = draw(st.lists(st.sampled_from(sorted(parameters)), unique=True)) if parameters else []
        updates = {name: draw(st.sampled_from(local)) for name in updated}
        size = len(body.yields)
        result_names = draw(st.lists(NAMES | st.just("grad of x"), min_size=size, max_size=size, unique=True))
        functions[name] = Function(name, body, updates, tuple(result_names))
    found = draw(st.lists(kernels(), max_size=2, unique_by=lambda kernel: kernel.name))
    return Module(draw(SYMBOLS), parameters, functions, {k.name: k for k in found}, draw(ATTRS))


@settings(max_examples=150, deadline=None)
@given(modules())
def test_a_printed_module_parses_back_to_the_same_module_and_text(module: Module) -> None:
    text = print_module(module)
    parsed = parse_module(text)
    assert print_module(parsed) == text
    assert structure(parsed) == structure(module)


@settings(max_examples=100, deadline=None)
@given(kernels())
def test_a_printed_kernel_parses_back_to_the_same_kernel_and_text(kernel: Kernel) -> None:
    text = print_kernel(kernel)
    parsed = parse_kernel(text)
    assert print_kernel(parsed) == text
    assert structure(parsed) == structure(kernel)


# ------------------------------------------------------------------------------------------- one module by hand

EXAMPLE = """\
module tiny {batch = 16, config = {n_layers = 2, name = "a \\"quoted\\" name"}} {
  param @token_embedding.weight : f32[256, 48] {init = ["normal", 0.02]}
  param @norm.weight : f32[48] {init = ["constant", 1.0]}
  state @adam.m : f32[512, 48] {init = ["constant", 0.0]}
  fn loss(%tokens: i32[16, 32]) -> (mean: f32[512], hidden: f32[512, 48]) {
    %1 = embedding(%tokens, @token_embedding.weight) : f32[512, 48]    loc("model.py", 88, "self.tok(x)")
    %y, %mean, %rstd = layer_norm(%1, @norm.weight) {eps = 1e-05} : f32[512, 48], f32[512], f32[512]
    update @adam.m = %y
    return %mean, %y
  }
  kernel k7(%a: in f32[9], %out: out f32[7]) {level = "tile", of = "matmul", order = {lanes = 16}, cost = {reg = 6}} {
    grid g0 = 8, g1 = 3
    dim i = <g0*64> : 64 of 512
    dim k = <n1*16> : 16 of 48
    %zero = fill() {value = 0.0} : f32<i, _>
    %acc = for(%zero) {var = "n1", lo = <0>, hi = <min(3, g1)>} do (%sum: f32<i, _>) {
      %x = load(%a) {base = <0>, strides = [48, 1]} : f32<i, k>
      %d = dot(%sum, %x) : f32<i, _>
      yield %d
    } : f32<i, _>
    if() {when = <g0 - 1>} do {
      store(%out, %acc) {base = <0>, strides = [192, 1], mask = none, exact = true}
    } do {
    }
  }
}
"""


def test_the_example_is_its_own_printed_form() -> None:
    assert print_module(parse_module(EXAMPLE)) == EXAMPLE


def test_parsing_gives_the_attributes_names_and_locations_that_were_written() -> None:
    module = parse_module(EXAMPLE)
    embedding, norm = module.functions["loss"].body.ops
    assert embedding.loc == Location("model.py", 88, "self.tok(x)")
    assert embedding.operands[1] is module.parameters["token_embedding.weight"].value
    assert [r.hint for r in norm.results] == ["y", "mean", "rstd"] and embedding.result.hint == ""
    assert module.functions["loss"].updates == {"adam.m": norm.results[0]}
    kernel = module.kernels["k7"]
    assert (kernel.grid, kernel.order, kernel.access) == ({"g0": 8, "g1": 3}, {"lanes": 16}, ("in", "out"))
    loop = kernel.body.ops[1]
    assert loop.attrs["hi"] == Index.minimum(3, Index.variable("g1"))
    assert loop.regions[0].ops[0].result.type == TileType("f32", kernel.dims[0], kernel.dims[1])
    assert kernel.body.ops[2].regions[0].ops[0].attrs["strides"] == (192, 1)


def test_parts_print_alone_as_they_print_within_the_module() -> None:
    module = parse_module(EXAMPLE)
    inner = re.sub(r"^  ", "", EXAMPLE, flags=re.MULTILINE)
    assert print_function(module, module.functions["loss"]) in inner
    assert print_kernel(module.kernels["k7"]) in inner
    assert print_op(module.kernels["k7"].body.ops[0]) == "%zero = fill() {value = 0.0} : f32<i, _>"


def test_line_ends_comments_and_spaces_do_not_matter() -> None:
    spread = EXAMPLE.replace(" = ", '\t=\r\n # a "comment" with {\n').replace("embedding(", "embedding (", 1)
    assert print_module(parse_module(spread)) == EXAMPLE
    flat = " ".join(line.strip() for line in EXAMPLE.splitlines())
    assert print_module(parse_module(flat)) == EXAMPLE


def test_values_with_one_hint_get_numbered_names_that_stay() -> None:
    args = tuple(Value(ScalarType("f32"), hint) for hint in ("x", "x", "x_1", "", "7", "x", "y.3"))
    text = print_kernel(Kernel("k", Region(args), ("in",) * 7, {}))
    assert re.findall(r"%([\w.]+)", text) == ["x", "x.1", "x_1", "1", "2", "x.2", "y_3"]
    read = parse_kernel(text)
    assert [v.hint for v in read.params] == ["x", "x", "x_1", "", "", "x", "y_3"]
    assert print_kernel(read) == text


def test_numpy_floats_print_as_floats_and_other_objects_are_refused() -> None:
    np = pytest.importorskip("numpy")
    assert print_op(Op("fill", (), (), {"value": np.float64(1.0)})) == "fill() {value = 1.0}"
    with pytest.raises(CompilerBug, match="not plain data"):
        print_op(Op("fill", (), (), {"value": np.float32(1.0)}))


# ------------------------------------------------------------------------------------------- errors

BROKEN = [
    # (what to replace in the example, by what, the place the error names, what it says)
    ("= embedding(", "= embedding", "6:10", "an op with its operands"),
    ("%tokens, @token", "%tokens @token", "6:28", 'unexpected `@token_embedding.weight`: expected ")" or ","'),
    ("yield %d", "yield %d %x", "19:16", 'expected "," or "}"'),
    ("{eps = 1e-05}", "{eps = }", "7:60", "a number, a quoted string"),
    ("{eps = 1e-05}", "{eps = 1, eps = 2}", "7:63", "attribute eps is given twice"),
    ("return %mean", "return %meen", "9:12", "%meen is not defined"),
    ("store(%out, %acc)", "store(%out, %d)", "22:19", "%d is not defined"),
    ("%x = load", "%sum = load", "17:7", "%sum is defined twice"),
    ("return %mean, %y", "return %mean", "9:12", "declares 2 results and returns 1"),
    ("return %mean, %y", "return %y, %y", "9:12", "%y is f32[512, 48], result mean is f32[512]"),
    ("%y, %mean, %rstd =", "%y, %mean =", "7:17", "layer_norm has 2 results and 3 result types"),
    ("f32[512], f32[512]\n", "f33[512], f32[512]\n", "7:83", "unknown type f33[512]"),
    ("f32<i, k>", "f32<i, q>", "17:55", "dim q of f32<i, q> is not declared"),
    ("f32<i, k>", "f32<i>", "17:55", "does not have two axes"),
    ("f32[256, 48]", "f32[a]", "2:35", "not a number"),
    ("f32[256, 48]", "f32<_, _>", "2:35", "a param is a tensor"),
    ("<g0*64>", "<g0*>", "13:17", "the index expression ends too early"),
    ("<g0*64>", "<g0 g1>", "13:17", "unexpected `g1`"),
    ("<g0*64>", "<g0*g1>", "13:13", "linear"),
    ("<g0*64>", "<g0 // 0>", "13:13", "zero"),
    ("param @norm.weight", "param @token_embedding.weight", "3:9", "given twice"),
    (", @norm.weight", ", @norm.wait", "7:39", "no parameter @norm.wait"),
    ("update @adam.m", "update @adam.v", "8:12", "no parameter @adam.v"),
    ('level = "tile"', 'levl = "tile"', "11:10", "unknown attribute levl"),
    ("order = {lanes = 16}", "order = 16", "11:10", "attribute order of k7 is a dict"),
    ("g0 = 8, g1", "g0 = 8, g0", "12:18", "grid id g0 is given twice"),
    ("dim k =", "dim i =", "14:9", "dim i is given twice"),
    ("%a: in f32", "%a: f32", "11:17", 'expected "in", "out" or "inout"'),
    ('\\"quoted', "\\quoted", "1:57", "unknown escape"),
    ("fill()", "fill(^)", "15:18", "unexpected `^`"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "place", "message"), BROKEN)
def test_a_mistake_is_reported_with_its_line_and_column(old: str, new: str, place: str, message: str) -> None:
    assert old in EXAMPLE
    text = EXAMPLE.replace(old, new, 1)
    with pytest.raises(UserError) as caught:
        parse_module(text, "broken.tir")
    first, excerpt, caret, *_ = str(caught.value).split("\n")
    assert first.startswith(f"broken.tir:{place}: ") and message in first
    line, column = map(int, place.split(":"))
    assert text.split("\n")[line - 1][column - 1 :].startswith(excerpt[len(caret) - 1 :])


@pytest.mark.parametrize("length", range(0, len(EXAMPLE) - 2, 7))
def test_a_truncated_text_is_a_user_error(length: int) -> None:
    with pytest.raises(UserError):
        parse_module(EXAMPLE[:length])


def test_an_error_far_to_the_right_shows_that_part_of_the_line() -> None:
    params = ", ".join(f"%p{i}: i32[1]" for i in range(100))
    with pytest.raises(UserError) as caught:
        parse_module(f"module m {{ fn f({params}, %p7: i32[1]) {{ }} }}")
    _, excerpt, caret, *_ = str(caught.value).split("\n")
    assert len(excerpt) < 130 and excerpt[len(caret) - 1 :].startswith("%p7")


def test_hostile_text_is_a_user_error() -> None:
    deep = "do_it() do { " * 3000 + "} " * 3000
    digits = "9" * 5000
    for body in (deep, f"f() {{x = {digits}}}", f"%x = f() : f32[{digits}]", f"%x = f() : f32x{digits}"):
        with pytest.raises(UserError):
            parse_kernel(f"kernel k() {{ {body} }}")


def test_a_name_that_would_not_parse_back_is_refused_when_printed() -> None:
    with pytest.raises(CompilerBug, match="cannot be printed as a name"):
        print_kernel(Kernel("two words", Region(), (), {}))


# ------------------------------------------------------------------------------------------- size, and the prompt


def test_a_loop_level_kernel_of_twenty_thousand_lines_goes_round() -> None:
    pairs = (
        f"  %v{i + 1} = fma(%v{i}, %v0) : f32x16\n"
        f"  %w{i} = load(%a) {{base = <g0*64 + {i % 300 + 1}>, strides = [48, 1]}} : f32x16\n"
        for i in range(10_000)
    )
    head = 'kernel k(%a: in f32[512, 48]) {level = "loop"} {\n  grid g0 = 3\n  %v0 = zero() : f32x16\n'
    text = f"{head}{''.join(pairs)}}}\n"
    assert print_kernel(parse_kernel(text)) == text


def test_show_gives_plain_text_where_there_is_no_terminal() -> None:
    module = parse_module(EXAMPLE)
    function, kernel = module.functions["loss"], module.kernels["k7"]
    assert show(kernel) == print_kernel(kernel).rstrip()
    assert show(function, module=module) == print_function(module, function).rstrip()
    assert show(function.params[0]) == "%tokens: i32[16, 32]"
    assert show(module) == summary(module)


def test_show_colours_a_terminal_without_changing_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Any = parse_module(EXAMPLE).kernels["k7"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = show(kernel)
    assert "\x1b[" in coloured and re.sub(r"\x1b\[[0-9;]*m", "", coloured) == show(kernel, color=False)


def test_summaries_are_one_line_and_count_what_is_there() -> None:
    module = parse_module(EXAMPLE)
    expected = "module tiny: 2 params (12,336 elements); 1 state (24,576 elements); functions loss; kernels k7"
    assert summary(module) == expected
    kernel = module.kernels["k7"]
    assert summary(kernel) == "kernel k7 of matmul, tile level, grid 8 × 3: 6 ops (fill, for, load, dot, if, store)"
    assert "2 ops (embedding, layer_norm)" in summary(module.functions["loss"])
    assert all("\n" not in summary(op) for op in kernel.body.walk())
