"""The commands of `tinygpt`, a few to a room: compiling, training, measuring, looking. Each room exports COMMANDS.

A command is a record: its name, what it is for, examples, its arguments and what it does."""

from __future__ import annotations

import importlib
import pkgutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """`run` returns the exit status; it raises UserError for what a user can mend, CompilerBug for what only we can."""

    name: str
    summary: str
    examples: tuple[str, ...]
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


def commands() -> list[Command]:
    """Every command, in the order in which help lists them."""
    rooms = [importlib.import_module(f"{__name__}.{room.name}") for room in pkgutil.iter_modules(__path__)]
    found = {command.name: command for room in rooms for command in getattr(room, "COMMANDS", ())}
    return [found.pop(name) for name in _ORDER if name in found] + list(found.values())


_ORDER = (
    "compile", "train", "evaluate", "generate", "serve", "bench", "parity", "profile", "ir", "passes", "repl", "regen",
    "verify", "selftest", "presets", "devices",
)  # fmt: skip
