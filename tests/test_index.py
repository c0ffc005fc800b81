"""Index expressions agree with plain integer arithmetic, for every value of their variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.verify_tile import divisions

RANGES = {"a": (0, 4), "b": (2, 5), "c": (0, 3)}
GRID = product(*(range(low, high + 1) for low, high in RANGES.values()))
POINTS = [dict(zip(RANGES, values, strict=True)) for values in GRID]

Plain = Callable[[Mapping[str, int]], int]


@dataclass
class Pair:
    """The same expression twice: as an Index, and as what Python computes."""

    index: Index
    plain: Plain


def joined(f: Callable[[int, int], int], index: Index, x: Pair, y: Pair) -> Pair:
    return Pair(index, lambda v: f(x.plain(v), y.plain(v)))


def lifted(x: Pair) -> Pair:
    """x and a constant that keeps it from being negative, as what is divided in a program is."""
    low = min(x.plain(point) for point in POINTS)
    return Pair(x.index - low, lambda v: x.plain(v) - low) if low < 0 else x


def pairs() -> st.SearchStrategy[Pair]:
    leaves = st.one_of(
        st.sampled_from(sorted(RANGES)).map(lambda name: Pair(Index.variable(name), lambda v: v[name])),
        st.integers(-40, 40).map(lambda n: Pair(Index.of(n), lambda v: n)),
    )

    def grown(inner: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
        two = st.tuples(inner, inner)
        scaled = st.tuples(inner, st.integers(-24, 24))
        split = st.tuples(inner, st.sampled_from((1, 2, 3, 8, 16)))
        return st.one_of(
            two.map(lambda p: joined(lambda x, y: x + y, p[0].index + p[1].index, *p)),
            two.map(lambda p: joined(lambda x, y: x - y, p[0].index - p[1].index, *p)),
            two.map(lambda p: joined(min, Index.minimum(p[0].index, p[1].index), *p)),
            two.map(lambda p: joined(max, Index.maximum(p[0].index, p[1].index), *p)),
            scaled.map(lambda p: Pair(p[0].index * p[1], lambda v: p[0].plain(v) * p[1])),
            split.map(lambda p: Pair(p[0].index // p[1], lambda v: p[0].plain(v) // p[1])),
            split.map(lambda p: Pair(p[0].index % p[1], lambda v: p[0].plain(v) % p[1])),
        )

    return st.recursive(leaves, grown, max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_value_bounds_and_text_agree_with_integer_arithmetic(pair: Pair) -> None:
    values = [pair.plain(point) for point in POINTS]
    assert [pair.index.evaluate(point) for point in POINTS] == values
    low, high = pair.index.bounds(RANGES)
    assert low <= min(values) and max(values) <= high
    for point, value in zip(POINTS[::7], values[::7], strict=True):
        assert eval(str(pair.index), {"__builtins__": {}, "min": min, "max": max}, point) == value


@settings(max_examples=100, deadline=None)
@given(pairs(), st.integers(1, 32))
def test_divisible_by_is_true_of_every_value(pair: Pair, n: int) -> None:
    if pair.index.divisible_by(n):
        assert all(pair.plain(point) % n == 0 for point in POINTS)


@settings(max_examples=100, deadline=None)
@given(pairs(), pairs())
def test_substitution_is_evaluation_in_two_steps(pair: Pair, inner: Pair) -> None:
    replaced = pair.index.substitute({"a": inner.index, "b": 3})
    for point in POINTS[::5]:
        assert replaced.evaluate(point) == pair.plain({**point, "a": inner.plain(point), "b": 3})


def linear(coefficients: tuple[int, ...]) -> Pair:
    index = sum((Index.variable(name) * c for name, c in zip(RANGES, coefficients, strict=True)), Index.of(0))
    return lifted(Pair(index, lambda v: sum(v[name] * c for name, c in zip(RANGES, coefficients, strict=True))))


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.integers(-24, 24)] * 3), st.integers(0, 40), st.sampled_from((2, 3, 8, 16)))
def test_canonical_form_divides_no_negative_number_that_was_not_written(
    coefficients: tuple[int, ...], more: int, divisor: int
) -> None:
    written = linear(coefficients).index + more
    for index in (written // divisor, written % divisor, Index.minimum(written, 50) // divisor):
        assert all(left.evaluate(point) >= 0 for left, _ in divisions(index) for point in POINTS)


@given(pairs(), pairs())
@settings(max_examples=50, deadline=None)
def test_the_order_of_terms_does_not_matter(x: Pair, y: Pair) -> None:
    assert x.index + y.index == y.index + x.index
    assert hash(x.index + y.index) == hash(y.index + x.index)
    assert x.index - x.index == Index.of(0)


def test_divisions_split_into_whole_multiples_and_a_rest() -> None:
    a, b = Index.variable("a"), Index.variable("b")
    assert (a * 16 + 35) // 16 == a + 2
    assert (a * 16 + b + 3) // 16 == a + (b + 3) // 16
    assert (a * 16 + b) % 16 == b % 16
    assert (a * 16) % 8 == Index.of(0)


def test_a_falling_numerator_keeps_its_constant() -> None:
    """(72 - 24a) // 16 is not 4 + (8 - 24a) // 16 to a target that truncates."""
    index = (72 - Index.variable("a") * 24) // 16
    assert [(left.evaluate({"a": 3}), right.constant) for left, right in divisions(index)] == [(0, 16)]


def test_divisibility_is_seen_through_minimum_and_remainder() -> None:
    a = Index.variable("a")
    assert Index.minimum(a * 8, 24).divisible_by(8)
    assert not Index.minimum(a * 8, 20).divisible_by(8)
    assert ((a * 12) % 8).divisible_by(4)


def test_a_product_of_two_variables_is_refused() -> None:
    with pytest.raises(ValueError, match="linear"):
        Index.variable("a") * Index.variable("b")


def test_ceil_div_rounds_up() -> None:
    assert [ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
