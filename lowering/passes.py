"""What a pass is, and the registry of passes. A pass is a frozen dataclass with a name, options and `run`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Module
from tinygpt.ir.errors import CompilerBug, UserError


@dataclass(frozen=True)
class Pass:
    """A transformation of a module for a device. It never changes its input."""

    name: ClassVar[str]
    level: ClassVar[str] = "graph"  # the level of the module it leaves behind

    def run(self, module: Module, caps: Caps) -> Module:
        raise CompilerBug(f"pass {self.name} does nothing")

    def __str__(self) -> str:
        options = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return self.name + (f"{{{','.join(options)}}}" if options else "")


PASSES: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass known by its name."""
    PASSES[cls.name] = cls
    return cls


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """`simplify,fuse{max_buffers=8},tile` as passes. Raises UserError naming an unknown pass or option."""
    found = []
    for piece in _split(text):
        name, _, options = piece.partition("{")
        if name not in PASSES:
            raise UserError(f"there is no pass called {name!r}", hint=f"known passes: {', '.join(sorted(PASSES))}")
        known = {f.name: f for f in fields(PASSES[name])}
        given: dict[str, Any] = {}
        for option in filter(None, options.rstrip("}").split(",")):
            key, _, value = option.partition("=")
            if key not in known:
                raise UserError(f"pass {name} has no option {key!r}", hint=f"its options: {', '.join(known) or 'none'}")
            kind: type[Any] = type(known[key].default)
            given[key] = kind(_number(value))
        found.append(PASSES[name](**given))
    return tuple(found)


def _split(text: str) -> list[str]:
    pieces, depth = [""], 0
    for letter in text.replace(" ", ""):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [p for p in pieces if p]


def _number(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        return text
