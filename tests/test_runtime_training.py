"""The training loop: what it writes, and what no interruption may change."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.fake_engine import FakeEngine, manifest
from tinygpt.runtime import checkpoint
from tinygpt.runtime.data import Corpus
from tinygpt.runtime.errors import DivergedError, UserError
from tinygpt.runtime.session import Session
from tinygpt.runtime.training import train

TEXT = b"the cat sat on the mat and the dog sat on the log. " * 30
CORPUS = Corpus("cats", "cats and dogs", np.frombuffer(TEXT, np.uint8))


class Engine(FakeEngine):
    """A fake engine that calls `on_run(function, number)` before each function."""

    on_run: Any = None
    count = 0

    def run(self, function: str) -> None:
        self.count += function == "train_step"
        if self.on_run:
            self.on_run(function, self.count)
        super().run(function)


def open_session(seed: int = 42) -> Session:
    shape = manifest()
    return Session(shape, Engine(None, shape), seed)


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows(path)]


def bits(session: Session) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.state().items()}


def test_training_learns_and_reports(tmp_path: Path) -> None:
    session, console = open_session(), quiet()
    seen: list[Any] = []
    options: dict[str, Any] = {"out": tmp_path / "c", "metrics": tmp_path / "m.jsonl", "on_row": seen.append}
    result = train(session, CORPUS, 150, lr=0.1, eval_every=40, console=console, **options)
    written = rows(tmp_path / "m.jsonl")
    assert written == seen
    steps = [row for row in written if "loss" in row]
    evaluations = [row for row in written if "val_loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 151))
    assert [row["step"] for row in evaluations] == [0, 40, 80, 120, 150]
    assert set(steps[0]) == {"step", "loss", "grad_norm", "tokens_per_s"}
    assert set(evaluations[0]) == {"step", "train_loss", "val_loss"}
    assert evaluations[0]["val_loss"] > 5 and evaluations[-1]["val_loss"] < 2
    assert result.val_loss == evaluations[-1]["val_loss"] and result.checkpoint == tmp_path / "c"
    saved = checkpoint.load(tmp_path / "c")
    assert (saved.step, saved.training["lr"], saved.data) == (150, 0.1, CORPUS.fingerprint)
    text = said(console)
    assert "corpus: cats and dogs" in text and "step 150/150  loss" in text and "tokens/s" in text and "left" in text
    assert f"saved to {tmp_path / 'c'}" in text


def test_evaluation_and_saving_do_not_change_a_bit_of_the_run(tmp_path: Path) -> None:
    plain, busy = open_session(), open_session()
    train(plain, CORPUS, 30, console=quiet())
    train(busy, CORPUS, 30, eval_every=7, save_every=5, out=tmp_path / "c", console=quiet())
    assert bits(plain) == bits(busy)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    whole = open_session(seed=9)
    train(whole, CORPUS, 40, eval_every=10, lr=0.05, metrics=tmp_path / "whole.jsonl", console=quiet())
    first = open_session(seed=9)
    options: dict[str, Any] = {"eval_every": 10, "metrics": tmp_path / "parts.jsonl", "out": tmp_path / "c"}
    train(first, CORPUS, 20, lr=0.05, console=quiet(), **options)
    with (tmp_path / "parts.jsonl").open("a") as log:  # rows past the checkpoint, the last one cut by a kill
        log.write('{"step": 21, "loss": 9.0, "grad_norm": 1.0, "tokens_per_s": 1.0}\n{"step": 22, "lo')
    second = open_session(seed=1)
    second.load(tmp_path / "c")
    train(second, CORPUS, 40, console=quiet(), **options)
    assert bits(whole) == bits(second)
    assert timeless(tmp_path / "whole.jsonl") == timeless(tmp_path / "parts.jsonl")


def test_a_new_run_begins_its_metrics_anew_but_spares_other_files(tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    for _ in range(2):
        train(open_session(), CORPUS, 3, metrics=metrics, console=quiet())
    assert [row["step"] for row in rows(metrics)] == [1, 2, 3]
    for content in ("dear diary\n", '{"step": 1}\nmy notes\n{"step": 2}\n', '{"name": "x"}'):
        metrics.write_text(content)
        with pytest.raises(UserError, match="no metrics row"):
            train(open_session(), CORPUS, 3, metrics=metrics, console=quiet())
        assert metrics.read_text() == content
    with pytest.raises(UserError, match="cannot be written"):
        train(open_session(), CORPUS, 3, metrics=tmp_path / "none" / "m", console=quiet())


def test_metrics_may_go_to_a_device() -> None:
    train(open_session(), CORPUS, 3, metrics="/dev/null", console=quiet())
    assert Path("/dev/null").is_char_device()


def test_ctrl_c_finishes_the_step_saves_and_says_where(tmp_path: Path) -> None:
    session, console = open_session(), quiet()

    def interrupt(function: str, count: int) -> None:
        if function == "train_step" and count == 8:
            os.kill(os.getpid(), signal.SIGINT)

    session.engine.on_run = interrupt  # type: ignore[attr-defined]
    before = signal.getsignal(signal.SIGINT)
    result = train(session, CORPUS, 50, out=tmp_path / "c", console=console)
    assert signal.getsignal(signal.SIGINT) is before
    assert result.interrupted and result.step == 8
    assert f"stopped at step 8; saved to {tmp_path / 'c'}" in said(console)
    resumed, whole = open_session(), open_session()
    resumed.load(tmp_path / "c")
    train(resumed, CORPUS, 12, console=quiet())
    train(whole, CORPUS, 12, console=quiet())
    assert bits(resumed) == bits(whole)


def test_ctrl_c_during_an_evaluation_stops_at_once_and_a_run_without_a_checkpoint_says_so() -> None:
    session, console = open_session(), quiet()

    def interrupt(function: str, count: int) -> None:
        if function == "loss" and count == 5:
            os.kill(os.getpid(), signal.SIGINT)

    session.engine.on_run = interrupt  # type: ignore[attr-defined]
    result = train(session, CORPUS, 50, eval_every=5, console=console)
    assert result.interrupted and result.step == 5
    assert session.engine.calls.count("loss") < 20  # type: ignore[attr-defined]
    assert "nothing saved" in said(console)


def ruin(session: Session, at: int, value: float) -> None:
    """Let the update of step `at` break a weight, as a too large step does; only the next loss shows it."""

    def spoil(function: str, count: int) -> None:
        if function == "windows" and count == at:
            weights = session.parameters()
            weights["table.weight"][:] = value
            session.load_parameters(weights)

    session.engine.on_run = spoil  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("at", [17, 20])  # between two saves, and just before one
def test_divergence_stops_with_the_last_good_checkpoint(tmp_path: Path, at: int, value: float) -> None:
    session = open_session()
    ruin(session, at, value)
    metrics = tmp_path / "m.jsonl"
    with pytest.raises(DivergedError, match="diverged; the last good checkpoint is .*c, of step 10") as stopped:
        train(session, CORPUS, 100, save_every=10, out=tmp_path / "c", metrics=metrics, console=quiet())
    assert "lower learning rate than 0.01" in str(stopped.value)
    assert checkpoint.load(tmp_path / "c").step == 10
    assert [row["step"] for row in rows(metrics)] == list(range(1, at + 1))


def test_divergence_in_the_last_step_is_found_before_the_last_save(tmp_path: Path) -> None:
    session = open_session()
    ruin(session, 20, np.nan)
    with pytest.raises(DivergedError, match="of step 10"):
        train(session, CORPUS, 20, save_every=10, out=tmp_path / "c", console=quiet())
    assert checkpoint.load(tmp_path / "c").step == 10


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path) -> None:
    session = open_session()
    short = Corpus("short", "short", np.zeros(9, np.uint8))
    with pytest.raises(UserError, match="corpus short: has 9 bytes, context 8 needs at least 11"):
        train(session, short, 5, console=quiet())
    with pytest.raises(UserError, match="there is no folder"):
        train(session, CORPUS, 5, out=tmp_path / "none" / "c", console=quiet())
    with pytest.raises(UserError, match="steps -1"):
        train(session, CORPUS, -1, console=quiet())
    with pytest.raises(UserError, match="lr -1"):
        train(session, CORPUS, 5, lr=-1, console=quiet())
    session.step = 9
    with pytest.raises(UserError, match="has done 9 steps already, 5 were asked for"):
        train(session, CORPUS, 5, console=quiet())
    assert "train_step" not in session.engine.calls  # type: ignore[attr-defined]


def test_another_corpus_than_the_checkpoints_is_remarked(tmp_path: Path) -> None:
    train(open_session(), CORPUS, 2, out=tmp_path / "c", console=quiet())
    session, console = open_session(), quiet()
    session.load(tmp_path / "c")
    train(session, Corpus("dogs", "dogs", np.frombuffer(TEXT[::-1], np.uint8)), 3, console=console)
    assert "the checkpoint was trained on cats, which is another text" in said(console)


def test_a_terminal_gets_a_progress_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    train(open_session(), CORPUS, 5, eval_every=5, console=console)
    assert "5/5" in said(console) and "tokens/s" in said(console) and "validation loss" in said(console)
