"""Arguments that several commands take, and what they mean: a config, its shape, a target, its options, threads."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tinygpt.config import ModelConfig, nearest
from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import UserError
from tinygpt.presets import PRESETS, Preset, find
from tinygpt.runtime import bundle as bundles
from tinygpt.runtime.manifest import MANIFEST

FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


@dataclass(frozen=True)
class Choice:
    """What a command line asks to be compiled. `options` are those of the target."""

    preset: Preset
    target: str
    caps: Caps
    options: dict[str, str]
    batch: int
    context: int
    strict: bool


def console(*, stderr: bool = False) -> Console:
    """A console that leaves text alone: no markup, no wrapping where nobody looks."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False)


def table(title: str, *columns: str) -> Table:
    """An empty table: the first column and those that end in a space to the left, numbers to the right."""
    made = Table(title=title or None, box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        made.add_column(
            name.strip(),
            justify="left" if number == 0 or name.endswith(" ") else "right",
            no_wrap=not name.endswith(" "),
        )
    return made


def show(shown: Table) -> None:
    """Print a table, wide enough for all of it where it goes to a file."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(shown)


def whole(low: int = 1) -> Any:
    """An argument type: an integer, at least `low`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < low:
            raise argparse.ArgumentTypeError(f"{number} is less than {low}")
        return number

    return parse


def setting(text: str) -> tuple[str, str]:
    """An argument type: KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def add_target(parser: ArgumentParser, default: str | None = "cpp") -> None:
    parser.add_argument(
        "--target", metavar="T", default=default, help="what to compile for: cpp, wasm32, wasm64, … (default: cpp)"
    )
    parser.add_argument(
        "--set", dest="settings", metavar="KEY=VALUE", type=setting, action="append", default=[],
        help="a field of the config (n_layers=3) or an option of the target (profile=baseline); may be repeated",
    )  # fmt: skip


def add_shape(parser: ArgumentParser) -> None:
    parser.add_argument("--batch", metavar="B", type=whole(), help="windows a step (default: the preset's, or 16)")
    parser.add_argument(
        "--context", metavar="N", type=whole(), help="tokens a window (default: the config's context_length)"
    )
    parser.add_argument("--strict", action="store_true", help="results that agree to the bit on every CPU-like target")


def add_threads(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--threads", metavar="K", type=whole(), help="threads to compute with (default: one a processor)"
    )


def chosen(args: Namespace, config: str, *, local: bool = False) -> Choice:
    """What to compile of a CONFIG argument and the options beside it; `local` prefers what this process runs fastest.

    Raises UserError for a config, target, field or option that does not exist or does not fit."""
    caps, given, fields = profile(args, local=local)
    preset = with_fields(find(config), fields)
    return Choice(preset, args.target, caps, given, *preset.shape(args.batch, args.context), args.strict)


def profile(args: Namespace, *, local: bool = False) -> tuple[Caps, dict[str, str], dict[str, Any]]:
    """The profile that --target and --set choose, the target's options, and the fields of a config among the settings.

    Raises UserError for a target, field or option that does not exist."""
    from tinygpt.devices import settled
    from tinygpt.targets import target

    device = target(args.target)
    fields, options = _split(args.settings, device.options)
    given = settled(args.target, dict(device.local) | options if local else options)
    left = dict(given)
    caps = device.choose(left)
    if left:
        key = next(iter(left))
        raise UserError(
            f"--set {key}: neither a field of the config nor an option of {args.target}; "
            f"the nearest field is {nearest(key, FIELDS)!r}",
            hint=f"fields: {', '.join(FIELDS)}; options of {args.target}: {', '.join(device.options)}",
        )
    return caps, given, fields


def _split(settings: list[tuple[str, str]], known: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings by what they are: fields of the config, as JSON values, and options of the target, which knows some."""
    fields = {key: _value(value) for key, value in settings if key in FIELDS and key not in known}
    return fields, {key: value for key, value in settings if key not in fields}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def with_fields(preset: Preset, fields: Mapping[str, Any]) -> Preset:
    """A preset with some fields changed; d_mlp stays four times the width where it was that. Raises UserError."""
    if not fields:
        return preset
    before = preset.config.to_dict()
    if before["d_mlp"] == 4 * before["d_model"] and "d_mlp" not in fields:
        del before["d_mlp"]
    return replace(preset, config=ModelConfig(**{**before, **fields}))


def compiled(choice: Choice, out: Path | None = None, model: Any = None, **how: Any) -> bundles.Bundle:
    """The bundle of a choice, in `out` or in a folder that goes when the process ends. Raises UserError."""
    from tinygpt import compiler

    return compiler.compile(
        choice.preset if model is None else model, choice.target, choice.batch, choice.context, choice.strict,
        options=choice.options, out=out, **how,
    )  # fmt: skip


def is_bundle(name: str) -> bool:
    """Whether a BUNDLE | CONFIG argument is a bundle's folder; one called like a preset must have a manifest."""
    return (Path(name) / MANIFEST).exists() or (name not in PRESETS and Path(name).is_dir())
