"""One folder a target: its profiles, its printer, its build. A new folder is found by listing the package."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel
from tinygpt.ir.errors import UserError
from tinygpt.ir.plan import Plan

if __name__ == "targets":
    raise ImportError("import tinygpt.targets, not targets")

Files = Mapping[str, str | bytes]


@dataclass(frozen=True)
class Target:
    """What the compiler needs to know of a target.

    `choose` picks the profile for `--set` options (it removes the ones it knows, which are called `options`); `emit` turns a plan into the bundle's
    files, given the manifest so far; `record` is manifest["target"]. `source` is a loop kernel as people read it in this
    target's language; `local` are the options that suit the engine which runs the target in this process. `live` names the
    profile that is read from a device: with `profile` that, the option `device` describes one, as JSON."""

    name: str
    choose: Callable[[dict[str, str]], Caps]
    emit: Callable[[Plan, Mapping[str, Any], Caps, bool], Files]
    record: Callable[[Plan, Files, Caps, bool], dict[str, Any]]
    source: Callable[[Kernel, Caps], str]
    options: tuple[str, ...]
    local: Mapping[str, str] = field(default_factory=dict)
    live: str = ""


def targets() -> dict[str, Target]:
    """Every target by name: what the folders of this package export as `TARGETS`."""
    found: dict[str, Target] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.ispkg:
            found.update({t.name: t for t in getattr(importlib.import_module(f"{__name__}.{module.name}"), "TARGETS", ())})
    return found


def target(name: str) -> Target:
    """A target by its name. Raises UserError with the known names."""
    known = targets()
    if name not in known:
        raise UserError(f"there is no target called {name!r}", hint=f"known targets: {', '.join(sorted(known))}")
    return known[name]
