"""The smallest preset through the public API on every target: what it computes, that it repeats to the bit, what it
keeps on disk, and how much memory it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import tinygpt as tg
from tests import pytorch_reference as pytorch
from tests.pytorch_reference import TARGETS, Batch
from tinygpt.presets import PRESETS
from tinygpt.runtime import data
from tinygpt.runtime.bundle import Bundle
from tinygpt.runtime.session import Session
from tinygpt.runtime.training import train

TINY = PRESETS["tiny"].config
LR = 3e-4
CORPUS = data.load("tales")


@pytest.fixture(scope="module", params=TARGETS)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    pytorch.require_engine(request.param)
    compiled: Bundle = tg.compile("tiny", target=request.param)
    return compiled


@pytest.fixture
def session(bundle: Bundle) -> Iterator[Session]:
    with bundle.session(threads=2, seed=42) as opened:
        yield opened


def batches(session: Session, count: int) -> list[Batch]:
    """The batches of a run's first steps."""
    text, context = CORPUS.train, session.manifest.context
    return [data.gather(text, session.windows(step, text.size - context), context) for step in range(count)]


def run(bundle: Bundle, threads: int, steps: int = 12) -> tuple[list[tuple[float, float]], dict[str, bytes]]:
    """Losses and norms of a fresh run, and every bit of its weights and moments."""
    with bundle.session(threads=threads, seed=7) as session:
        rows = [session.train_step(*batch, lr=LR) for batch in batches(session, steps)]
        return rows, {name: array.tobytes() for name, array in session.state().items()}


def test_gradients_match_pytorch(session: Session) -> None:
    tokens, targets = batches(session, 1)[0]
    for weights in (session.parameters(), pytorch.spread_weights(session, 3)):
        loss, wanted = pytorch.gradients(pytorch.model(TINY, weights, torch.float64), tokens, targets)
        session.load_parameters(weights)
        assert session.loss(tokens, targets) == pytest.approx(loss, abs=1e-5)
        pytorch.assert_gradients_agree(session.grads(tokens, targets), wanted)


def test_fifty_steps_match_pytorch(session: Session) -> None:
    steps = batches(session, 50)
    wanted = pytorch.train(pytorch.model(TINY, session.parameters()), steps, LR)
    found = [session.train_step(*batch, lr=LR) for batch in steps]
    differences = np.abs(np.array(found) - np.array(wanted)).max(axis=0)
    assert differences[0] <= 1e-5, f"loss differs by {differences[0]:.3g}"
    assert differences[1] <= 1e-4, f"gradient norm differs by {differences[1]:.3g}"


def test_a_run_repeats_to_the_bit_on_any_number_of_threads(bundle: Bundle) -> None:
    first = run(bundle, threads=1)
    for threads in (2, 3, 2):
        again = run(bundle, threads)
        assert again[0] == first[0]
        assert [name for name in first[1] if again[1][name] != first[1][name]] == []


def test_gradients_applied_are_a_training_step(bundle: Bundle, session: Session) -> None:
    steps = batches(session, 3)
    with bundle.session(threads=2, seed=42) as halves:
        for tokens, targets in steps:
            _, norm = session.train_step(tokens, targets, lr=LR)
            assert halves.apply(halves.grads(tokens, targets), lr=LR) == norm
        assert {n: a.tobytes() for n, a in halves.state().items()} == {n: a.tobytes() for n, a in session.state().items()}


def test_a_resumed_run_matches_an_uninterrupted_one_to_the_bit(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with bundle.session(threads=2, seed=5) as whole, bundle.session(threads=2, seed=5) as begun:
        for batch in batches(whole, 10):
            whole.train_step(*batch, lr=LR)
        for batch in batches(begun, 4):
            begun.train_step(*batch, lr=LR)
        begun.save(path)
        with bundle.session(threads=1, seed=0) as resumed:
            resumed.load(path)
            assert resumed.step == 4
            for batch in batches(resumed, 10)[4:]:
                resumed.train_step(*batch, lr=LR)
            assert {n: a.tobytes() for n, a in resumed.state().items()} == {n: a.tobytes() for n, a in whole.state().items()}


def test_training_learns_and_samples(session: Session) -> None:
    before = session.evaluate(CORPUS.validation[:20_000])
    result = train(session, CORPUS, 150, lr=3e-3)
    assert result.step == 150
    assert before == pytest.approx(np.log(256), abs=0.1)
    assert session.evaluate(CORPUS.validation[:20_000]) < 2.5
    sample = session.generate(b"The ", 60, temperature=0.8, top_k=40, seed=1)
    assert len(sample) == 60
    assert sample == session.generate(b"The ", 60, temperature=0.8, top_k=40, seed=1)
    assert sample.isascii()


def test_logits_are_those_of_the_loss(session: Session) -> None:
    weights = pytorch.spread_weights(session, 4)
    tokens = CORPUS.validation[: TINY.context_length]
    with torch.no_grad():
        wanted, _ = pytorch.model(TINY, weights, torch.float64)(torch.from_numpy(tokens.astype(np.int64))[None])
    assert np.abs(session.logits(tokens) - wanted[0].numpy()).max() <= 2e-5


def test_selftest_passes(bundle: Bundle) -> None:
    report = bundle.selftest(threads=2)
    assert report.checks
    assert report.passed, str(report)


def test_a_saved_bundle_loads_and_a_tampered_one_does_not(bundle: Bundle, tmp_path: Path) -> None:
    copy = bundle.save(tmp_path / "copy")
    assert tg.load(copy).manifest == bundle.manifest
    for name in bundle.manifest.files:
        changed = bundle.save(tmp_path / f"changed-{name.replace('/', '-')}") / name
        content = bytearray(changed.read_bytes())
        content[len(content) // 2] ^= 1
        changed.write_bytes(content)
        root = next(p for p in changed.parents if (p / "manifest.json").exists())
        with pytest.raises(Exception, match=name) as refusal:
            tg.load(root)
        assert hasattr(refusal.value, "hint")


def test_work_memory_is_close_to_the_peak_of_live_bytes(bundle: Bundle) -> None:
    document = json.loads((bundle.folder / "manifest.json").read_text())
    memory, work = document["memory"], document["pools"]["work"]
    assert work <= 1.1 * memory["work_live"]
    assert work < memory["work_without_reuse"]


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "cpp"])
def test_a_checkpoint_of_one_target_resumes_on_another(target: str, tmp_path: Path) -> None:
    pytorch.require_engine("cpp")
    pytorch.require_engine(target)
    path = tmp_path / "run.safetensors"
    with tg.compile("tiny", target="cpp").session(threads=2, seed=11) as native, tg.compile("tiny", target=target).session(seed=11) as other:
        for name, array in native.parameters().items():
            assert np.abs(array - other.parameters()[name]).max() <= 1e-7, f"the initial {name} differs"
        steps = batches(native, 6)
        for (tokens, targets), (same_tokens, same_targets) in zip(steps, batches(other, 6), strict=True):
            assert np.array_equal(tokens, same_tokens)
            assert np.array_equal(targets, same_targets)
        for batch in steps[:3]:
            native.train_step(*batch, lr=LR)
        native.save(path)
        other.load(path)
        for batch in steps[3:]:
            expected, found = native.train_step(*batch, lr=LR), other.train_step(*batch, lr=LR)
            assert found == pytest.approx(expected, abs=2e-5)
