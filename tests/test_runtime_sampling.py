"""Random numbers, sampling and tokens on the host."""

from __future__ import annotations

import numpy as np
import pytest

from tinygpt.runtime import tokenizer
from tinygpt.runtime.errors import DivergedError, UserError
from tinygpt.runtime.sampling import Sampling, probabilities, sample
from tinygpt.runtime.threefry import purpose_key, seed_words, threefry2x32, uniform, uniforms

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers(
    key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert threefry2x32(key, *counter) == expected
    arrays = threefry2x32(key, *(np.full(3, word, np.uint64) for word in counter))
    assert [word.tolist() for word in arrays] == [[word] * 3 for word in expected]


def test_uniforms_agree_one_by_one_across_the_32_bit_border() -> None:
    key = purpose_key(42, 1)
    first = (1 << 32) - 2
    drawn = uniforms(key, first, 4)
    assert drawn.tolist() == [uniform(key, first + index) for index in range(4)]
    many = uniforms(key, 0, 20_000)
    assert 0 <= many.min() and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.01


def test_a_seed_has_64_bits() -> None:
    assert seed_words(0x0123456789ABCDEF) == (0x89ABCDEF, 0x01234567)
    for seed in (-1, 1 << 64, 1.5, True):
        with pytest.raises(UserError, match="seed"):
            seed_words(seed)  # type: ignore[arg-type]


LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3]))


def test_temperature_zero_is_greedy_and_ties_go_to_the_lower_id() -> None:
    assert sample(LOGITS, Sampling(temperature=0), 0) == 1
    assert sample(np.array([1.0, 2.0, 2.0]), Sampling(temperature=-1), 0) == 1


def test_top_k_keeps_exactly_k_even_among_equals() -> None:
    kept = probabilities(LOGITS, Sampling(temperature=1, top_k=2))
    np.testing.assert_allclose(kept, [0, 4 / 7, 0, 3 / 7])
    assert np.count_nonzero(probabilities(np.zeros(9), Sampling(top_k=4))) == 4
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(temperature=1, top_k=99)), [0.1, 0.4, 0.2, 0.3])


def test_top_p_keeps_the_least_set_that_reaches_p() -> None:
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1, 0, 0.69)), [0, 4 / 7, 0, 3 / 7])
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1, 0, 0.71)), [0, 4 / 9, 2 / 9, 3 / 9])
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(1, 0, 1e-9)), [0, 1, 0, 0])


def test_draws_follow_the_distribution_and_depend_on_seed_and_position_only() -> None:
    sampling = Sampling(temperature=1, top_k=0, seed=7)
    drawn = [sample(LOGITS, sampling, position) for position in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.1, 0.4, 0.2, 0.3], atol=0.03)
    assert drawn[:20] == [sample(LOGITS, sampling, position, sampling.key) for position in range(20)]
    assert drawn[:20] != [sample(LOGITS, Sampling(1, 0, seed=8), position) for position in range(20)]


def test_extreme_logits_do_not_overflow_and_nan_is_divergence() -> None:
    assert sample(np.array([1e30, -1e30, 0]), Sampling(temperature=1e-3), 5) == 0
    assert sample(np.array([-np.inf, 0.0]), Sampling(), 5) == 1
    with pytest.raises(DivergedError):
        sample(np.array([0.0, np.nan]), Sampling(), 0)


@pytest.mark.parametrize(
    "bad", [{"temperature": float("nan")}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


def test_bytes_are_tokens() -> None:
    text = "naïve 🙂\0"
    assert tokenizer.decode(tokenizer.encode(text)).decode() == text
    assert tokenizer.encode(b"\xff\x00").tolist() == [255, 0]
    assert tokenizer.decode_text([0xF0, 0x9F]) == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UserError, match="token 256"):
        tokenizer.decode([65, 256])
    with pytest.raises(UserError, match="byte 195 at offset 2"):
        tokenizer.encode("naïve", vocab_size=128)
