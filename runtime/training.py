"""The training loop: batches, evaluation, metrics, checkpoints, and what happens when it is stopped or diverges.

The batch of a step depends on (seed, steps done before it) alone, so evaluating, saving, stopping and resuming leave
every later bit as it would have been.

On a GPU one step is in flight: step n - 1 is reported and the batch of step n + 1 is gathered while step n runs. The
windows of that batch came with step n - 1: the device is given those of step n + 2 together with step n."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from tinygpt.runtime import checkpoint, tokenizer
from tinygpt.runtime.data import Corpus, gather
from tinygpt.runtime.errors import DivergedError, UserError
from tinygpt.runtime.metrics import MetricsLog
from tinygpt.runtime.progress import Reporter, reporter
from tinygpt.runtime.session import Session, require_rate

_DEFAULT_SAVE_EVERY = 100


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: the steps done in all, the last losses in nats per byte (None where there was none), whether
    Ctrl-C ended it, and the checkpoint it left."""

    step: int
    loss: float | None
    val_loss: float | None
    interrupted: bool
    checkpoint: Path | None


def train(
    session: Session,
    corpus: Corpus,
    steps: int,
    *,
    lr: float | None = None,
    eval_every: int = 0,
    save_every: int | None = None,
    out: str | Path | None = None,
    metrics: str | Path | None = None,
    on_row: Callable[[Mapping[str, Any]], None] | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Train until `steps` optimizer steps are done in all (a session loaded from a checkpoint has done some already).

    `lr` None keeps the session's. Every `eval_every` steps, and at the first and last, the whole validation part and
    as much of the training part are evaluated (0: never). `out` is saved every `save_every` steps (None: with each
    evaluation, else every 100), at the end and on Ctrl-C; `metrics` gets the JSON lines; `on_row` is called with each
    of them.

    Raises UserError before the first step if something cannot work, DivergedError if a loss is not finite, with the
    last good checkpoint in place."""
    if save_every is None:
        save_every = eval_every or _DEFAULT_SAVE_EVERY
    destination = Path(out) if out is not None else None
    run = _Run(session, corpus, steps, lr, eval_every, save_every, destination, on_row)
    run.check()
    log = MetricsLog(metrics, session.step) if metrics is not None else None
    view = reporter(console or Console(), session.step, steps)
    try:
        return run.run(log, view)
    finally:
        view.close()
        if log:
            log.close()


class _Interrupts:
    """Ctrl-C asks a run to stop between two steps. Only where nothing is being changed (an evaluation) does it stop at
    once; a second Ctrl-C always does. Outside the main thread signals cannot be caught, and Ctrl-C keeps its usual
    meaning."""

    def __init__(self) -> None:
        self.requested = False
        self.may_stop_now = False
        self._previous: Any = None

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self.may_stop_now:
            raise KeyboardInterrupt
        self.requested = True


class _Run:
    """One call of `train`, and what it has to remember."""

    def __init__(
        self,
        session: Session,
        corpus: Corpus,
        steps: int,
        lr: float | None,
        eval_every: int,
        save_every: int,
        out: Path | None,
        on_row: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self.session = session
        self.corpus = corpus
        self.steps = steps
        self.lr = lr
        self.eval_every = eval_every
        self.save_every = save_every
        self.out = out
        self.on_row = on_row
        self.loss: float | None = None
        self.val_loss: float | None = None
        self.saved_step: int | None = None
        self.in_flight: deque[tuple[int, Callable[[], tuple[float, float]]]] = deque()  # steps begun and not reported
        self.reported = 0.0  # when the last one was, by time.perf_counter

    def check(self) -> None:
        """Find out before the first step what would fail after hours."""
        session = self.session
        for name, value in (("steps", self.steps), ("eval_every", self.eval_every), ("save_every", self.save_every)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
                raise UserError(f"{name} {value!r}: must be an integer, not negative", hint="give a number of steps")
        require_rate(session.training["lr"] if self.lr is None else self.lr)
        if session.step > self.steps:
            raise UserError(
                f"the checkpoint has done {session.step} steps already, {self.steps} were asked for",
                hint=f"--steps counts all steps of a run: give more than {session.step}",
            )
        self.corpus.require_windows(session.manifest.context)
        tokenizer.require_vocabulary(self.corpus.data, session.manifest.vocab_size, f"corpus {self.corpus.name}")
        if self.out:
            checkpoint.require_writable(self.out, sum(slot.nbytes for slot in session.manifest.parameters))

    def run(self, log: MetricsLog | None, view: Reporter) -> TrainingResult:
        self.log = log
        self.view = view
        self._announce()
        with _Interrupts() as interrupts:
            try:
                self._loop(interrupts)
            except KeyboardInterrupt:
                if not interrupts.may_stop_now:
                    raise
                interrupts.requested = True
            except DivergedError as error:
                raise self._diverged(error) from error
            interrupts.may_stop_now = False
            saved = self._finish(interrupts.requested)
        return TrainingResult(self.session.step, self.loss, self.val_loss, interrupts.requested, saved)

    def _announce(self) -> None:
        before, now = self.session.data, self.corpus.fingerprint
        self.view.note(f"corpus: {self.corpus.source}")
        if before and before.get("sha256") != now["sha256"]:
            self.view.note(f"note: the checkpoint was trained on {before.get('name')}, which is another text")
        self.session.data = now
        if self.lr is not None:
            self.session.training["lr"] = self.lr

    def _loop(self, interrupts: _Interrupts) -> None:
        session, train = self.session, self.corpus.train
        context = session.manifest.context
        count = train.size - context
        if self.eval_every and not session.step:
            self._evaluate(interrupts)
        self.reported = time.perf_counter()
        windows: deque[Callable[[], NDArray[Any]]] = deque()  # of the next steps, as far as they are begun
        while session.step < self.steps and not interrupts.requested:
            starts = (windows.popleft() if windows else session.begin_windows(session.step, count))()
            tokens, targets = gather(train, starts, context)
            while session.overlaps and len(windows) < 2 and session.step + 1 + len(windows) < self.steps:
                windows.append(session.begin_windows(session.step + 1 + len(windows), count))
            wait = session.begin_step(tokens, targets)
            self.in_flight.append((session.step, wait))
            is_last = session.step == self.steps
            self._report(most=1 if session.overlaps else 0)
            if self._due(self.eval_every) or (self.eval_every and is_last):
                self._report()
                self._evaluate(interrupts)
                self.reported = time.perf_counter()
            if self.out and self._due(self.save_every) and not is_last:
                self._report()
                self._save()
                self.reported = time.perf_counter()
        self._report()

    def _report(self, most: int = 0) -> None:
        """Wait for steps, the first one first, until at most so many are in flight; record and show each."""
        manifest = self.session.manifest
        while len(self.in_flight) > most:
            step, wait = self.in_flight.popleft()
            self.loss, grad_norm = wait()
            now = time.perf_counter()
            speed = round(manifest.batch * manifest.context / max(now - self.reported, 1e-9), 1)
            self.reported = now
            row = {"step": step, "loss": self.loss, "grad_norm": grad_norm, "tokens_per_s": speed}
            self._record(row)
            self.view.step(row)

    def _due(self, every: int) -> bool:
        return bool(every) and self.session.step % every == 0

    def _evaluate(self, interrupts: _Interrupts) -> None:
        validation = self.corpus.validation
        interrupts.may_stop_now = True
        if interrupts.requested:
            raise KeyboardInterrupt
        train_loss = self.session.evaluate(self.corpus.train[: validation.size])
        self.val_loss = self.session.evaluate(validation)
        interrupts.may_stop_now = False
        row = {"step": self.session.step, "train_loss": train_loss, "val_loss": self.val_loss}
        self._record(row)
        self.view.evaluation(row)

    def _record(self, row: Mapping[str, Any]) -> None:
        if self.log:
            self.log.append(row)
        if self.on_row:
            self.on_row(row)

    def _save(self) -> Path:
        """Save, unless what would be saved has diverged already: an update made with a finite loss can ruin the
        weights, and only the next loss would show it."""
        assert self.out is not None
        session = self.session
        count = self.corpus.train.size - session.manifest.context
        session.loss(*gather(self.corpus.train, session.windows(session.step, count), session.manifest.context))
        snapshot = session.snapshot()
        ruined = next((name for name, array in snapshot.arrays.items() if not np.isfinite(array).all()), None)
        if ruined:
            raise DivergedError(
                f"{ruined} holds numbers that are not finite after {session.step} steps: training has diverged"
            )
        path = checkpoint.save(self.out, snapshot)
        self.saved_step = session.step
        return path

    def _finish(self, interrupted: bool) -> Path | None:
        stopped = f"stopped at step {self.session.step}" if interrupted else f"done: {self.session.step} steps"
        if not self.out:
            self.view.note(f"{stopped}; nothing saved, because no checkpoint was named" if interrupted else stopped)
            return None
        try:
            path = self._save()
        except DivergedError as error:
            raise self._diverged(error) from error
        self.view.note(f"{stopped}; saved to {path}")
        return path

    def _diverged(self, error: DivergedError) -> DivergedError:
        message = error.args[0]
        if self.saved_step is not None:
            message += f"; the last good checkpoint is {self.out}, of step {self.saved_step}"
        elif self.out and self.out.exists():
            message += f"; {self.out} was not touched"
        lr = self.session.training.get("lr")
        return DivergedError(message, hint=f"train again, or resume, with a lower learning rate than {lr}")
