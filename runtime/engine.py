"""What executes a bundle's functions: the protocol of an engine, and the registry that finds one for a target.

A module of this package that exports `ENGINES`, a mapping from target name to factory, is an engine: adding a target
adds one file. A factory gets (folder, manifest, threads) and returns an `Engine`; it loads lazily what only it needs,
so that a missing optional package is an error of the target that wants it and of no other."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

import tinygpt.runtime
from tinygpt.runtime.errors import UserError
from tinygpt.runtime.manifest import Manifest, Slot


class Engine(Protocol):
    """A loaded bundle: its pools in memory, zeroed, and its functions ready to run.

    Callers (Session) guarantee that a slot comes from the manifest the engine was made with. An engine is used from one
    Python thread at a time."""

    @property
    def threads(self) -> int:
        """How many threads `run` computes with (1 for a device that is not a CPU)."""

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        """Copy `array` into the slot. It is C-contiguous, of exactly the slot's shape and dtype."""

    def read(self, slot: Slot) -> NDArray[Any]:
        """A fresh copy of the slot's tensor, of the slot's shape and dtype."""

    def run(self, function: str) -> None:
        """Run one function to its end. It allocates nothing, and may not be interrupted half-way."""

    def close(self) -> None:
        """Free the pools and end the threads. May be called twice."""


@runtime_checkable
class Profiler(Protocol):
    """What an engine may offer beside: how long each launch of a function takes."""

    def profile(self, function: str, runs: int) -> NDArray[np.float64]:
        """Run a function so often, on inputs written before. Seconds [runs, threads, launches + 1]: what each thread
        spent on each launch, in the order of the manifest, and last on waiting for the others. Raises UserError if the
        device has no clock for that."""

    def where(self) -> str:
        """What computes: how many threads, or which GPU."""


@runtime_checkable
class Overlapping(Protocol):
    """What an engine offers whose device computes beside the host: runs that are begun, and waited for one by one.

    A run comes after all that was begun and written before; what is written later, later runs read. The function that
    is returned waits for this run, not for later ones, and gives a copy of one of its small outputs (up to some KiB, or
    one number a sequence of the batch), as this run left it. It may be called for several outputs, at any time, or never."""

    def begin(self, function: str) -> Callable[[Slot], NDArray[Any]]:
        """Begin to run one function."""

    def begin_with_next(self, function: str) -> Callable[[Slot], NDArray[Any]]:
        """Begin to run one function together with the one that is begun next, which costs the host less than two; by
        itself if its result is asked for before. Its result may come with that of the other."""


EngineFactory = Callable[[Path, Manifest, int | None], Engine]


def open_engine(folder: Path, manifest: Manifest, threads: int | None = None) -> Engine:
    """The engine for the manifest's target; `threads` None leaves the number to the engine.

    Raises UserError for a target no module serves, naming the modules that could not be imported."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise UserError(
            f"threads {threads!r}: must be an integer from 1 to 1024", hint="leave it out to use every core"
        )
    known: list[str] = []
    failures: list[str] = []
    for module in _modules(failures):
        engines = _exported(module)
        if manifest.target_name in engines:
            return engines[manifest.target_name](folder, manifest, threads)
        known.extend(engines)
    because = f"; not importable: {', '.join(failures)}" if failures else ""
    raise UserError(
        f"bundle {folder}: no engine here runs target {manifest.target_name!r} "
        f"(known: {', '.join(known) or 'none'}{because})",
        hint="install what the target needs, or compile the model for a known target",
    )


def available() -> dict[str, str]:
    """Every target that can be run here, with the module that runs it."""
    return {target: module.__name__ for module in _modules([]) for target in _exported(module)}


def host_files(target: str) -> dict[str, bytes]:
    """What a bundle of the target brings to run without Python, beside what its target writes: the `host_files()` of
    the module that runs it here."""
    for module in _modules([]):
        if target in _exported(module) and hasattr(module, "host_files"):
            return dict(module.host_files())
    return {}


def web_files(*names: str) -> dict[str, bytes]:
    """Files of the JavaScript host, under the names they have in a bundle."""
    folder = Path(__file__).parent / "web"
    return {f"host/{name}": (folder / name).read_bytes() for name in names}


def local_device(target: str) -> dict[str, Any]:
    """What this machine's device for a target is and has: the `local_device()` of the module that runs it here.

    Raises UserError if none says."""
    for module in _modules([]):
        if target in _exported(module) and hasattr(module, "local_device"):
            return dict(module.local_device())
    raise UserError(f"nothing here knows a device for target {target!r}", hint="name a profile instead: --set profile=NAME")


def _modules(failures: list[str]) -> Iterator[ModuleType]:
    """This package's modules one by one, so that a search stops before it imports more than it needs."""
    for info in pkgutil.iter_modules(tinygpt.runtime.__path__, "tinygpt.runtime."):
        try:
            yield importlib.import_module(info.name)
        except ImportError as error:
            failures.append(f"{info.name} ({error})")


def _exported(module: ModuleType) -> Mapping[str, EngineFactory]:
    engines: Mapping[str, EngineFactory] = getattr(module, "ENGINES", {})
    return engines
