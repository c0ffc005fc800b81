"""A session: what goes in is checked, what comes out is the bundle's, and nothing is slow in between."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fake_engine import FakeEngine, document, manifest
from tinygpt.runtime import manifest as manifests
from tinygpt.runtime.errors import DivergedError, UserError
from tinygpt.runtime.manifest import Slot
from tinygpt.runtime.sampling import Sampling
from tinygpt.runtime.session import Session

TEXT = np.frombuffer(b"The quick brown fox jumps over the lazy dog. " * 40, np.uint8)


def open_session(seed: int = 42, **options: Any) -> Session:
    shape = manifest(**options)
    return Session(shape, FakeEngine(None, shape), seed)


def batch(session: Session, seed: int = 0, dtype: Any = np.int64) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    shape = (session.manifest.batch, session.manifest.context)
    generator = np.random.default_rng(seed)
    high = session.manifest.vocab_size
    return generator.integers(0, high, shape).astype(dtype), generator.integers(0, high, shape).astype(dtype)


def bits(arrays: dict[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def test_the_same_seed_gives_the_same_start() -> None:
    assert bits(open_session(1).state()) == bits(open_session(1).state())
    assert bits(open_session(1).state()) != bits(open_session(1 << 40).state())


def test_parameters_have_the_models_names_and_are_copies() -> None:
    session = open_session()
    parameters = session.parameters()
    assert {name: array.shape for name, array in parameters.items()} == {
        "table.weight": (256, 256),
        "position.bias": (8, 256),
    }
    parameters["table.weight"] += 1
    assert not np.array_equal(parameters["table.weight"], session.parameters()["table.weight"])
    session.load_parameters({name: array.astype(np.float64) for name, array in parameters.items()})
    assert bits(session.parameters()) == bits(parameters)


def test_parameters_that_do_not_fit_change_nothing() -> None:
    session = open_session()
    before = bits(session.parameters())
    good = session.parameters()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"table.weight": good["table.weight"] + 1}, r"position\.bias is missing"),
        ({**good, "tabel.weight": good["table.weight"]}, r"did you mean 'table\.weight'"),
        ({**good, "position.bias": np.zeros((256, 8))}, r"position\.bias has shape \(256, 8\)"),
        ({**good, "position.bias": np.full((8, 256), "x")}, r"position\.bias"),
    ]
    for parameters, problem in bad:
        with pytest.raises(UserError, match=problem):
            session.load_parameters(parameters)
    assert bits(session.parameters()) == before


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_tokens_may_have_any_integer_type(dtype: Any) -> None:
    session, other = open_session(), open_session()
    assert session.train_step(*batch(session, dtype=dtype)) == other.train_step(*batch(other))
    assert session.loss(batch(session)[0].tolist(), batch(session)[1].tolist()) > 0


def test_tokens_that_do_not_fit_never_reach_the_engine() -> None:
    session = open_session()
    tokens, targets = batch(session)
    calls = len(session.engine.calls)  # type: ignore[attr-defined]
    for bad, problem in (
        (tokens[:2], r"shape \(2, 8\).*compiled for \(4, 8\)"),
        (tokens + 256, "vocabulary is 0 to 255"),
        (tokens - 300, "id -"),
        (tokens.astype(np.uint64) + (1 << 63), "vocabulary"),
        (tokens.astype(float), "float64, not an integer"),
        (tokens > 3, "bool"),
    ):
        with pytest.raises(UserError, match=f"tokens have .*{problem}"):
            session.train_step(bad, targets)
        with pytest.raises(UserError, match=f"targets have .*{problem}"):
            session.loss(tokens, bad)
    with pytest.raises(UserError, match="lr nan"):
        session.train_step(tokens, targets, lr=float("nan"))
    small = open_session(vocab=100)
    with pytest.raises(UserError, match="id 200, the vocabulary is 0 to 99"):
        small.loss(np.full((4, 8), 200, np.uint8), np.zeros((4, 8), np.uint8))
    assert len(session.engine.calls) == calls  # type: ignore[attr-defined]


def test_grads_and_apply_are_train_step_cut_in_two() -> None:
    whole, cut = open_session(), open_session()
    for step in range(3):
        tokens, targets = batch(whole, step)
        loss, norm = whole.train_step(tokens, targets, lr=0.02)
        assert cut.loss(tokens, targets) == loss
        assert cut.apply(cut.grads(tokens, targets), lr=0.02) == norm
    assert bits(whole.state()) == bits(cut.state()) and whole.step == cut.step == 3
    with pytest.raises(UserError, match=r"gradient of position\.bias is missing"):
        cut.apply({"table.weight": np.zeros((256, 256))})


def test_a_step_from_a_checkpoint_is_the_step_that_would_have_followed(tmp_path: Path) -> None:
    session = open_session(seed=7)
    for step in range(20):
        session.train_step(*batch(session, step))
    session.training["lr"] = 0.5
    session.save(tmp_path / "c")
    other = open_session(seed=1)
    other.load(tmp_path / "c")
    assert (other.step, other.seed, other.training["lr"]) == (20, 7, 0.5)
    assert session.train_step(*batch(session, 21)) == other.train_step(*batch(session, 21))
    assert bits(session.state()) == bits(other.state())
    assert np.array_equal(session.windows(5, 1000), other.windows(5, 1000))


def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    open_session(context=4).save(tmp_path / "c")
    session = open_session()
    session.train_step(*batch(session))
    before = bits(session.state())
    with pytest.raises(UserError, match="another model"):
        session.load(tmp_path / "c")
    assert bits(session.state()) == before and session.step == 1


def test_bias_correction_is_by_repeated_multiplication_and_ends(tmp_path: Path) -> None:
    session = open_session()
    power = 1.0
    for _ in range(50):
        session.train_step(*batch(session))
        power *= 0.95
    assert session._power2 == power
    session._set_step(50)
    assert session._power2 == power
    session._set_step((1 << 32) - 1)  # must not take four billion multiplications
    assert session._power1 < 1e-300


def test_a_loss_that_is_not_finite_is_divergence() -> None:
    session = open_session()
    weights = session.parameters()
    weights["table.weight"][3, 3] = np.nan
    session.load_parameters(weights)
    tokens = np.full((4, 8), 3)
    for call in (session.train_step, session.loss, session.grads):
        with pytest.raises(DivergedError, match="the loss became nan"):
            call(tokens, tokens)
    with pytest.raises(DivergedError):
        session.evaluate(bytes([3, 3]))


def test_evaluation_weighs_every_byte_alike_and_disturbs_nothing() -> None:
    session = open_session()
    before = bits(session.state())
    parameters = session.parameters()
    table, position = (parameters[name].astype(np.float64) for name in ("table.weight", "position.bias"))
    for size in (2, 9, 33, 34, 100):
        text = TEXT[:size]
        scores = table[text[:-1]] + position[np.arange(size - 1) % 8]
        expected = (np.log(np.exp(scores).sum(-1)) - scores[np.arange(size - 1), text[1:]]).mean()
        assert session.evaluate(text.tobytes()) == pytest.approx(expected, abs=1e-6)
    assert bits(session.state()) == before and session.step == 0
    with pytest.raises(UserError, match="at least 2"):
        session.evaluate(b"x")


def test_logits_of_a_short_sequence_are_those_of_its_tokens() -> None:
    session = open_session()
    full = session.logits(TEXT[:8])
    assert full.shape == (8, 256)
    assert np.array_equal(session.logits(TEXT[None, :3]), full[None, :3])
    for bad in (TEXT[:9], TEXT[:0], TEXT[:8].reshape(2, 4)):
        with pytest.raises(UserError, match="logits"):
            session.logits(bad)


def trained() -> Session:
    session = open_session()
    for step in range(60):
        offsets = session.windows(step, TEXT.size - 8)
        windows = TEXT[offsets[:, None] + np.arange(9)]
        session.train_step(windows[:, :-1], windows[:, 1:], lr=0.1)
    return session


def test_generation_is_seeded_slides_and_continues() -> None:
    session = trained()
    sample = session.generate(b"The ", 30, temperature=0.8, top_k=5, seed=1)
    assert len(sample) == 30 and b"o" in sample
    assert session.generate("The ", 30, temperature=0.8, top_k=5, seed=1) == sample
    assert session.generate(b"The ", 30, temperature=0.8, top_k=5, seed=2) != sample
    assert session.generate(b"The " + sample[:12], 18, temperature=0.8, top_k=5, seed=1) == sample[12:]
    assert session.generate(b"q", 3, temperature=0) == b"uic"
    assert bytes(session.stream(b"The ", 30, Sampling(0.8, 5, 1.0, 1))) == sample
    assert len(session.generate(b"", 2)) == 2 and session.generate(b"x", 0) == b""
    with pytest.raises(UserError, match="tokens is -1"):
        session.generate(b"x", -1)


def test_only_bytes_are_generated_whatever_the_vocabulary() -> None:
    large = open_session(vocab=300)
    assert len(large.generate(b"x", 40, temperature=100.0, top_k=0)) == 40
    small = open_session(vocab=100)
    with pytest.raises(UserError, match="byte 120"):
        small.generate(b"x", 1)
    assert max(small.generate(b"A", 20)) < 100


def test_dropout_keys_are_a_function_of_seed_step_and_micro_batch() -> None:
    session = open_session(dropout=True)
    tokens, targets = batch(session)
    session.train_step(tokens, targets)
    gradients = session.grads(tokens, targets)
    session.grads(tokens, targets)
    session.apply(gradients)
    session.grads(tokens, targets)
    keys = session.engine.keys  # type: ignore[attr-defined]
    assert len(set(keys)) == 4
    again = open_session(dropout=True)
    again._set_step(1)
    again.grads(tokens, targets)
    assert again.engine.keys == [keys[1]]  # type: ignore[attr-defined]


def test_a_bundle_that_asks_for_something_unknown_is_refused() -> None:
    text = document()
    text["functions"]["loss"]["inputs"][1]["name"] = "labels"
    with pytest.raises(UserError, match="function loss lacks input 'targets'"):
        _open(text)
    text = document()
    text["functions"]["logits"]["inputs"].append({**text["functions"]["init"]["inputs"][0], "name": "phase"})
    with pytest.raises(UserError, match="function logits wants an unknown input 'phase'"):
        _open(text)
    text = document()
    text["functions"]["train_step"]["inputs"][0]["dtype"] = "u32"
    with pytest.raises(UserError, match=r"'tokens' of train_step is u32\[4, 8\], expected i32\[4, 8\]"):
        _open(text)


def test_a_function_the_bundle_lacks_is_named_when_it_is_called() -> None:
    text = document()
    del text["functions"]["grads"], text["functions"]["init"]
    session = _open(text)
    assert not session.parameters()["table.weight"].any()
    with pytest.raises(UserError, match="no function grads"):
        session.grads(*batch(session))


def _open(text: dict[str, Any]) -> Session:
    shape = manifests.parse(json.dumps(text))
    return Session(shape, FakeEngine(None, shape))


class IdleEngine(FakeEngine):
    """Costs next to nothing itself, so that what is timed is the session."""

    def read(self, slot: Slot) -> Any:
        return self._one

    def run(self, function: str) -> None:
        pass

    _one = np.float32(1)


def test_a_train_step_adds_less_than_a_tenth_of_a_millisecond() -> None:
    shape = manifest(batch=16, context=64, dropout=True)
    session = Session(shape, IdleEngine(None, shape))
    tokens, targets = batch(session)
    fastest = float("inf")
    for _ in range(200):
        began = time.perf_counter()
        session.train_step(tokens, targets)
        fastest = min(fastest, time.perf_counter() - began)
    assert fastest < 1e-4
