"""Steps that are begun and waited for later: on every engine they are the steps that would have been made one by one, and
training that keeps one in flight writes what it would have written."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from tests.cli import CONFIG
from tests.cpp_toolchain import compiler
from tests.fake_engine import FakeEngine, LateEngine, manifest
from tests.piped_engine import PipedEngine, build_driver
from tests.pytorch_reference import TARGETS, require_engine
from tinygpt.compiler import compile
from tinygpt.runtime import checkpoint
from tinygpt.runtime.bundle import Bundle
from tinygpt.runtime.data import Corpus, gather
from tinygpt.runtime.errors import DivergedError
from tinygpt.runtime.session import Session
from tinygpt.runtime.training import train

CORPUS = Corpus("cats", "cats and dogs", np.frombuffer(b"the cat sat on the mat and the dog sat on the log. " * 30, np.uint8))
LR = 0.02

Open = Callable[[], Session]


def _fake(engine: type[FakeEngine], dropout: bool) -> Session:
    shape = manifest(dropout=dropout)
    return Session(shape, engine(None, shape))


def _compiled(folder: Path, target: str, dropout: bool) -> Bundle:
    require_engine(target)
    return compile({**CONFIG, "dropout": 0.2 if dropout else 0.0}, target, 2, 8, out=folder)


@pytest.fixture(scope="module", params=[f"{engine}{kind}" for engine in ("fake", "late", "piped", *TARGETS) for kind in ("", "-dropout")])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens a fresh session on an engine."""
    engine, _, kind = request.param.partition("-")
    folder, dropout = tmp_path_factory.mktemp("bundle") / "b", kind == "dropout"
    if engine == "fake":
        return lambda: _fake(FakeEngine, dropout)
    if engine == "late":
        return lambda: _fake(LateEngine, dropout)
    if engine == "piped":
        bundle = _compiled(folder, "cpp", dropout)
        program = build_driver(folder, bundle.manifest, folder.parent / "driver", compiler("g++"))
        return lambda: Session(bundle.manifest, PipedEngine([str(program)], bundle.manifest, 2))
    return _compiled(folder, engine, dropout).session


def batches(session: Session, count: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    context = session.manifest.context
    return [gather(CORPUS.train, session.windows(step, CORPUS.train.size - context), context) for step in range(count)]


def bits(session: Session) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.state().items()}


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def losses(rows: list[Any]) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def test_begun_steps_are_those_made_one_after_the_other(opened: Open) -> None:
    with opened() as slow, opened() as session:
        given = batches(slow, 8)
        wanted = [slow.train_step(*batch, lr=LR) for batch in given]
        waits = [session.begin_step(*batch, lr=LR) for batch in given]
        assert session.step == 8
        found = {number: waits[number]() for number in (3, 0, 7, 1, 2, 6, 5, 4)}
        assert [found[number] for number in range(8)] == wanted
        assert waits[3]() == wanted[3]
        assert bits(session) == bits(slow)


def test_what_runs_between_begun_steps_finds_the_weights_as_they_leave_them(opened: Open, tmp_path: Path) -> None:
    text = CORPUS.validation[:60]
    with opened() as slow, opened() as session:
        given = batches(slow, 6)
        wanted = [(slow.train_step(*batch, lr=LR), slow.evaluate(text)) for batch in given]
        found, waits, windows = [], [], []
        for number, batch in enumerate(given):
            windows.append(session.begin_windows(number, 999))
            waits.append(session.begin_step(*batch, lr=LR))
            found.append(session.evaluate(text))
            if number == 3:
                session.load(session.save(tmp_path / "c"))
        assert [(wait(), evaluated) for wait, evaluated in zip(waits, found, strict=True)] == wanted
        assert all(np.array_equal(window(), slow.windows(number, 999)) for number, window in enumerate(windows))
        assert bits(session) == bits(slow)
        assert checkpoint.load(tmp_path / "c").step == 4


def test_training_makes_the_steps_of_a_plain_loop_and_no_others(opened: Open, tmp_path: Path) -> None:
    with opened() as slow, opened() as session:
        wanted = [(number, *slow.train_step(*batch, lr=LR)) for number, batch in enumerate(batches(slow, 12), 1)]
        rows: list[Any] = []
        metrics = tmp_path / "m.jsonl"
        result = train(session, CORPUS, 12, lr=LR, eval_every=5, save_every=4, out=tmp_path / "c", metrics=metrics, on_row=rows.append, console=quiet())
        assert losses(rows) == wanted and (result.step, result.loss) == (12, wanted[-1][1])
        order = [(row["step"], "val_loss" in row) for row in rows]
        assert order == sorted(order) and [step for step, is_evaluation in order if is_evaluation] == [0, 5, 10, 12]
        assert [json.loads(line) for line in metrics.read_text().splitlines()] == rows
        assert all(row["tokens_per_s"] > 0 for row in rows if "loss" in row)
        assert bits(session) == bits(slow) == {name: array.tobytes() for name, array in checkpoint.load(tmp_path / "c").arrays.items()}


def test_an_interrupt_loses_no_row_and_what_was_begun_is_saved(opened: Open, tmp_path: Path) -> None:
    rows: list[Any] = []

    def interrupt(row: Any) -> None:
        rows.append(row)
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with opened() as slow, opened() as session:
        result = train(session, CORPUS, 50, lr=LR, out=tmp_path / "c", on_row=interrupt, console=quiet())
        assert result.interrupted and result.step == (6 if session.overlaps else 5)
        wanted = [(number, *slow.train_step(*batch, lr=LR)) for number, batch in enumerate(batches(slow, result.step), 1)]
        assert losses(rows) == wanted and checkpoint.load(tmp_path / "c").step == result.step
        assert bits(session) == bits(slow)


def test_divergence_names_its_step_though_the_next_has_begun(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = []
    with opened() as session:
        begin, ruined = session.begin_step, {name: np.full_like(array, np.nan) for name, array in session.parameters().items()}

        def begin_ruined(*batch: Any) -> Any:
            if session.step == 7:
                session.load_parameters(ruined)
            return begin(*batch)

        monkeypatch.setattr(session, "begin_step", begin_ruined)
        with pytest.raises(DivergedError, match="the loss became nan after 7 steps.*the last good checkpoint is .*, of step 5"):
            train(session, CORPUS, 50, lr=LR, save_every=5, out=tmp_path / "c", on_row=rows.append, console=quiet())
        assert [step for step, _, _ in losses(rows)] == list(range(1, 8))
        assert session.step == (9 if session.overlaps else 8)  # each has changed the weights
        assert checkpoint.load(tmp_path / "c").step == 5


def test_a_session_may_be_closed_with_a_step_in_flight(opened: Open) -> None:
    with opened() as session:
        given = batches(session, 2)
        read, unread = (session.begin_step(*batch) for batch in given)
        wanted = read()
    assert read() == wanted
    if session.overlaps:
        with pytest.raises(RuntimeError, match="the engine is closed"):
            session.begin_step(*given[0])
    del unread, read
    with opened() as session:
        assert session.train_step(*given[0]) == wanted


def test_no_more_is_begun_than_training_needs() -> None:
    session = _fake(LateEngine, False)
    engine = session.engine
    assert isinstance(engine, LateEngine)
    train(session, CORPUS, 6, console=quiet())
    assert engine.begun == ["init", "windows", "windows", *["windows", "train_step"] * 4, "train_step", "train_step"]
