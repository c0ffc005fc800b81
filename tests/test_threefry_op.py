"""random_bits is the first word of Threefry-2x32 with 20 rounds, and the numbers made from it fit their ranges."""

from __future__ import annotations

import numpy as np
import pytest

from tinygpt.ir.ops import OPS

ONES = 0xFFFFFFFF


def evaluate(name: str, *operands: np.ndarray | np.generic) -> np.ndarray:
    (result,) = OPS[name].evaluate([np.asarray(x) for x in operands], {})
    return result


# The vectors published with the reference implementation of Random123 (kat_vectors, threefry2x32 20).
@pytest.mark.parametrize(
    ("key", "counter", "word"),
    [
        ((0, 0), (0, 0), 0x6B200159),
        ((ONES, ONES), (ONES, ONES), 0x1CB996FC),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), 0xC4923A9C),
    ],
)
def test_random_bits_matches_the_known_answers(key: tuple[int, int], counter: tuple[int, int], word: int) -> None:
    assert int(evaluate("random_bits", *(np.uint32(x) for x in (*key, *counter)))) == word


def stream(count: int) -> np.ndarray:
    return evaluate("random_bits", np.uint32(1), np.uint32(2), np.arange(count, dtype=np.uint32), np.uint32(3))


def test_uniform_numbers_lie_strictly_between_0_and_1() -> None:
    extremes = evaluate("bits_to_uniform", np.array([0, ONES], np.uint32))
    assert extremes.dtype == np.float32 and 0 < extremes[0] < 1e-6 and 1 - 1e-6 < extremes[1] < 1
    sample = evaluate("bits_to_uniform", stream(50_000))
    assert abs(sample.mean() - 0.5) < 0.005 and abs(sample.var() - 1 / 12) < 0.002


def test_normal_numbers_have_the_moments_of_a_standard_normal() -> None:
    sample = evaluate("bits_to_normal", stream(50_000)).astype(np.float64)
    assert np.isfinite(evaluate("bits_to_normal", np.array([0, ONES], np.uint32))).all()
    moments = [np.mean(sample**n) for n in (1, 2, 3, 4)]
    assert np.abs(np.subtract(moments, (0, 1, 0, 3))).max() < 0.06


@pytest.mark.parametrize("count", [1, 3, 256, 1_115_138, 2**31 - 1])
def test_bits_below_is_the_high_word_of_the_product(count: int) -> None:
    bits = np.concatenate([stream(1000), np.array([0, ONES], np.uint32)])
    expected = (bits.astype(np.uint64) * count) >> 32
    assert (evaluate("bits_below", bits, np.uint32(count)) == expected).all()


def test_bits_keep_drops_the_asked_share_and_keeps_the_mean() -> None:
    kept = evaluate("bits_keep", stream(50_000), np.float32(0.2))
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1.25)}
    assert abs(kept.mean() - 1) < 0.01
