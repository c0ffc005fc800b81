"""Where text comes from, how it is split, and how windows cover it."""

from __future__ import annotations

import hashlib
import io
import math
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.runtime import data, tales
from tinygpt.runtime.data import Corpus, bytes_needed, evaluation_batches, gather
from tinygpt.runtime.errors import UserError

FAKE_SHAKESPEARE = b"To be, or not to be: " * 50


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, no TINYGPT_DATA, no network, and a stand-in for TinyShakespeare."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.delenv(data.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(data, "TINYSHAKESPEARE_BYTES", len(FAKE_SHAKESPEARE))
    monkeypatch.setattr(data, "TINYSHAKESPEARE_SHA256", hashlib.sha256(FAKE_SHAKESPEARE).hexdigest())
    offline(monkeypatch)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def online(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *arguments, **options: io.BytesIO(content))


def test_without_a_network_the_tales_are_used_and_said_so() -> None:
    corpus = data.load()
    assert corpus.name == "tales" and "could not be downloaded" in corpus.source and "Name or service" in corpus.source
    assert corpus.data.size >= 1_000_000 and corpus.floor is not None
    assert data.load("tales").data.tobytes() == corpus.data.tobytes()
    with pytest.raises(UserError, match="could not be downloaded"):
        data.load("tinyshakespeare")


def test_a_download_is_checked_kept_and_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online(monkeypatch, FAKE_SHAKESPEARE)
    assert data.load().source.startswith("TinyShakespeare, downloaded to")
    offline(monkeypatch)
    again = data.load("tinyshakespeare")
    assert again.data.tobytes() == FAKE_SHAKESPEARE and "from" in again.source
    cached = tmp_path / "cache" / "tinygpt" / "tinyshakespeare.txt"
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    cached.write_bytes(b"damaged")
    assert data.load().name == "tales"


@pytest.mark.parametrize("content", [b"<html>sign in</html>", FAKE_SHAKESPEARE + b"more", FAKE_SHAKESPEARE[:-1] + b"!"])
def test_a_download_with_another_hash_is_not_used(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    online(monkeypatch, content)
    corpus = data.load()
    assert corpus.name == "tales" and "sha256 differs" in corpus.source


def test_the_named_folder_comes_first_and_must_be_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path))
    assert data.load().name == "tales"  # not in the folder: looked for elsewhere
    (tmp_path / "tinyshakespeare.txt").write_bytes(FAKE_SHAKESPEARE)
    assert str(tmp_path) in data.load().source
    (tmp_path / "tinyshakespeare.txt").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not TinyShakespeare"):
        data.load()
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="TINYGPT_DATA"):
        data.load()


def test_any_file_works_and_bad_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff any bytes")
    assert data.load(tmp_path / "text").data.tobytes() == b"\xff any bytes"
    (tmp_path / "empty").touch()
    for name, problem in (("none", "no such file"), ("", "is a folder"), ("empty", "is empty")):
        with pytest.raises(UserError, match=problem):
            data.load(tmp_path / name)
    (tmp_path / "huge").touch()
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(UserError, match="at most"):
        data.load(tmp_path / "huge")


def corpus_of(size: int) -> Corpus:
    return Corpus("test", "test", np.arange(size).astype(np.uint8))


def test_the_split_is_contiguous_90_to_10() -> None:
    corpus = Corpus("s", "s", np.zeros(1_115_394, np.uint8))
    assert (corpus.train.size, corpus.validation.size) == (1_003_854, 111_540)
    assert corpus_of(19).train.tolist() == list(range(17)) and corpus_of(19).validation.tolist() == [17, 18]


@given(context=st.integers(1, 300))
def test_the_bytes_a_short_corpus_is_told_to_need_are_exactly_enough(context: int) -> None:
    needed = bytes_needed(context)
    corpus_of(needed).require_windows(context)
    with pytest.raises(UserError, match=f"needs at least {needed}"):
        corpus_of(needed - 1).require_windows(context)


def test_targets_are_the_tokens_shifted_by_one() -> None:
    tokens, targets = gather(np.arange(20, dtype=np.uint8), np.array([0, 15], np.int32), 4)
    assert tokens.tolist() == [[0, 1, 2, 3], [15, 16, 17, 18]]
    assert targets.tolist() == [[1, 2, 3, 4], [16, 17, 18, 19]]


@settings(deadline=None)
@given(size=st.integers(2, 200), batch=st.integers(1, 5), context=st.integers(1, 20))
def test_evaluation_predicts_every_byte_but_the_first_once(size: int, batch: int, context: int) -> None:
    text = np.arange(size).astype(np.uint8)
    predicted = []
    for tokens, targets, mask in evaluation_batches(text, batch, context):
        assert tokens.shape == targets.shape == mask.shape == (batch, context)
        assert (targets[mask] == tokens[mask] + 1).all()
        predicted += targets[mask].tolist()
    assert predicted == text[1:].tolist()


def test_the_grammar_is_unambiguous() -> None:
    assert tales.conflicts() == []
    broken = {**tales.RULES, "mood": (tales.Alternative("sad"), tales.Alternative("sadly"))}
    assert tales.conflicts(broken) == ["rule mood: 'sad' begins 'sadly'"]


def test_the_tales_are_the_same_everywhere_and_differ_by_seed() -> None:
    text = tales.generate()
    assert len(text) >= 1_000_000 and text.isascii()
    assert hashlib.sha256(text).hexdigest() == TALES_SHA256
    assert tales.generate(1000, seed=2) != tales.generate(1000, seed=3)


def read_tale(text: str) -> tuple[float, str]:
    """Read one tale from the front of `text`, left to right, as the docstring of tales.py says it can be done: the
    information of its choices in nats, and the rest of the text."""
    forms: dict[str, str] = {}
    information = 0.0
    stack = ["{tale}"]
    while stack:
        literal, symbol, rest = (*tales._SYMBOL.split(stack.pop(), maxsplit=1), "", "")[:3]
        assert text.startswith(literal)
        text = text[len(literal) :]
        if not symbol:
            continue
        stack.append(rest)
        if symbol in forms:
            stack.append(forms[symbol])
        elif symbol in tales.RULES:
            rule = tales.RULES[symbol]
            (chosen,) = [a for a in rule if text.startswith(a.head)] if len(rule) > 1 else rule
            information -= math.log(chosen.weight / sum(a.weight for a in rule))
            stack.append(chosen.template)
        else:
            choices = tales.CAST[tales._FORM_OF[symbol]]
            assert symbol == next(iter(choices[0])), "a first mention must tell the choices apart"
            (chosen_forms,) = [c for c in choices if text.startswith(c[symbol])]
            information += math.log(len(choices))
            forms |= chosen_forms
            stack.append(forms[symbol])
    return information, text


def test_reading_the_tales_back_measures_the_entropy_that_was_computed() -> None:
    text = tales.generate(400_000).decode()
    size, information, count = len(text), 0.0, 0
    position = 0
    while position < size:
        told, rest = read_tale(text[position : position + 20_000])
        position += len(text[position : position + 20_000]) - len(rest)
        information += told
        count += 1
    assert information / size == pytest.approx(tales.entropy_per_byte(), rel=0.01)
    assert size / count == pytest.approx(tales.expected_bytes(), rel=0.05)


def test_the_entropy_of_a_coin_is_one_bit_per_toss() -> None:
    coin = {"tale": (tales.Alternative("h{tale}"), tales.Alternative("t{tale}"), tales.Alternative("."))}
    casting = sum(math.log(len(members)) for members in tales.CAST.values())
    assert tales.expected_bytes(coin) == pytest.approx(3)
    assert tales.entropy_per_byte(coin) == pytest.approx((3 * math.log(3) + casting) / 3)


TALES_SHA256 = "dd99841b0c29e2847c8dabd323ad91304bb7449a98a6d23c65e262e4a9687e17"
