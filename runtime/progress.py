"""What a person sees of a training run: a live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_REFRESH_SECONDS = 0.25
_PLAIN_LINES = 20

Row = Mapping[str, Any]


class Reporter(Protocol):
    """Told of everything that happens in a run. Rows are those of the metrics file."""

    def step(self, row: Row) -> None: ...

    def evaluation(self, row: Row) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def reporter(console: Console, start: int, steps: int) -> Reporter:
    """The reporter that suits the console, for a run from step `start` to step `steps`."""
    return TerminalReporter(console, start, steps) if console.is_terminal else PlainReporter(console, start, steps)


class PlainReporter:
    """About twenty lines a run, with loss, tokens/s and time left; evaluations and notes as they come."""

    def __init__(self, console: Console, start: int, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._every = max(1, (steps - start) // _PLAIN_LINES)
        self._start = start
        self._began = time.monotonic()

    def step(self, row: Row) -> None:
        done = row["step"] - self._start
        if done % self._every and row["step"] != self._steps:
            return
        left = (time.monotonic() - self._began) / done * (self._steps - row["step"])
        self.note(
            f"step {row['step']}/{self._steps}  loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s  "
            f"{_duration(left)} left"
        )

    def evaluation(self, row: Row) -> None:
        self.note(evaluation_line(row))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class TerminalReporter:
    """A progress bar, redrawn four times a second from the training loop: a refreshing thread would take a core's time
    from kernels that wait for one another."""

    def __init__(self, console: Console, start: int, steps: int) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("training", total=steps, completed=start, loss="-", speed="-")
        self._drawn = 0.0
        self._last = steps
        self._progress.start()

    def step(self, row: Row) -> None:
        now = time.monotonic()
        if now - self._drawn < _REFRESH_SECONDS and row["step"] != self._last:
            return
        self._drawn = now
        loss, speed = f"{row['loss']:.4f}", f"{row['tokens_per_s']:,.0f}"
        self._progress.update(self._task, completed=row["step"], loss=loss, speed=speed, refresh=True)

    def evaluation(self, row: Row) -> None:
        self.note(evaluation_line(row))

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def evaluation_line(row: Row) -> str:
    return f"step {row['step']}  evaluation: train loss {row['train_loss']:.4f}  validation loss {row['val_loss']:.4f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
