"""The pipeline: which passes run for a device, and the runner that verifies, dumps and resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Module
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.text import parse_module, print_module
from tinygpt.ir.verify import verify
from tinygpt.lowering import abreast, chunk, differentiate, fuse, loops, narrow, optimizer, rematerialize, simplify, split, tiles
from tinygpt.lowering.passes import PASSES, Pass, parse_pipeline

ROOMS = (abreast, chunk, differentiate, fuse, loops, narrow, optimizer, rematerialize, simplify, split, tiles)  # importing them registers their passes
DEFAULT = "simplify,merge-products,simplify,differentiate,optimize,simplify,chunk,rematerialize,split,fuse,narrow,tile,loops,abreast"
CAPTURED = "captured"


@dataclass(frozen=True)
class Stage:
    """The module as a pass left it; `number` counts passes, 0 is the module as captured."""

    name: str
    module: Module
    number: int = 0
    seconds: float = 0.0

    @property
    def level(self) -> str:
        """graph, tile or loop: how far the module has been lowered."""
        return next((kernel.level for kernel in self.module.kernels.values()), "graph")

    @property
    def file(self) -> str:
        """What a dump of this stage is called."""
        return f"{self.number:02}-{self.name}.tir"


def captured(module: Module) -> Stage:
    """The stage that a pipeline starts from."""
    return Stage(CAPTURED, module)


def run(start: Stage, caps: Caps, passes: Sequence[Pass], *, dump: Path | None = None, check: Callable[[Stage], None] | None = None) -> list[Stage]:
    """Run passes in order, verifying after each; the stages, `start` first.

    Dumps are written only where the text changed. `check` may compare what a stage computes with what it should, and
    raise; the stage is dumped by then."""
    stages = [start]
    text = dump_stage(dump, start) if dump is not None else ""
    for number, p in enumerate(passes, start.number + 1):
        started = time.perf_counter()
        after = p.run(stages[-1].module, caps)
        verify(after, caps if p.level == "loop" else None, after=p.name)
        stages.append(Stage(p.name, after, number, time.perf_counter() - started))
        if dump is not None:
            text = dump_stage(dump, stages[-1], unless=text)
        if check is not None:
            check(stages[-1])
    return stages


def dump_stage(folder: Path, stage: Stage, unless: str = "") -> str:
    """Write a stage into a folder of dumps, unless its text is the given one; its text. Raises UserError."""
    text = print_module(stage.module)
    if text == unless:
        return text
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / stage.file).write_text(text)
    except OSError as error:
        raise UserError(f"--dump {folder}: cannot be written: {error.strerror}", hint="name a folder on a disk with space, where you may write") from error
    return text


def resume(path: Path, passes: Sequence[Pass]) -> tuple[Stage, Stage, Sequence[Pass]]:
    """From one file of a folder of dumps: the captured stage beside it, the stage itself, and the passes still to run.

    Raises UserError for a file that is no dump of this pipeline, or does not parse or verify."""
    number, _, name = path.stem.partition("-")
    if path.suffix != ".tir" or not number.isdecimal() or int(number) > len(passes):
        raise UserError(f"--from {path}: not the name of a dump", hint="pass a file that --dump wrote, such as 08-rematerialize.tir")
    expected = CAPTURED if int(number) == 0 else passes[int(number) - 1].name
    if name != expected:
        raise UserError(f"--from {path}: stage {number} of this pipeline is {expected}, not {name}", hint="use the dumps of the same pipeline")
    stage = Stage(name, _parsed(path), int(number))
    if stage.number == 0:
        return stage, stage, passes
    return captured(_parsed(path.with_name(captured(stage.module).file))), stage, passes[stage.number :]


def _parsed(path: Path) -> Module:
    """A dump as a module that verifies."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"--from {path}: cannot be read: {reason}", hint="pass a file that --dump wrote, in the folder with the others") from error
    module = parse_module(text, source=str(path))
    try:
        verify(module)
    except (UserError, CompilerBug) as error:  # whoever wrote the file broke the rule, not a pass
        raise UserError(f"--from {path}: {error}", hint="mend the file, or write it again with --dump") from error
    return module


__all__ = ["CAPTURED", "DEFAULT", "PASSES", "Stage", "captured", "dump_stage", "parse_pipeline", "resume", "run"]
