"""A bundle on disk: load it, start a session on it, copy it, and test it against its golden vectors."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from tinygpt.runtime import manifest as manifests
from tinygpt.runtime.engine import Engine, open_engine
from tinygpt.runtime.errors import UserError
from tinygpt.runtime.manifest import MANIFEST, FunctionEntry, Manifest, Slot
from tinygpt.runtime.session import Session

GOLDEN = "golden.safetensors"


@dataclass(frozen=True)
class GoldenCheck:
    """One output of one function against its golden vector: the largest absolute difference, and how large it may
    be."""

    function: str
    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return f"{verdict} {self.function}: {self.name} differs by {self.difference:.3g} (allowed {self.tolerance:.3g})"


@dataclass(frozen=True)
class SelftestReport:
    """What `Bundle.selftest` found. Prints a line per check."""

    checks: tuple[GoldenCheck, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


@dataclass(frozen=True)
class Bundle:
    """A validated bundle in a folder."""

    folder: Path
    manifest: Manifest

    def session(self, threads: int | None = None, seed: int = 42) -> Session:
        """A session with the initial weights of `seed`; `threads` None uses every core. Raises UserError if nothing
        here runs the bundle's target."""
        engine = open_engine(self.folder, self.manifest, threads)
        try:
            return Session(self.manifest, engine, seed)
        except BaseException:
            engine.close()
            raise

    def save(self, folder: str | Path) -> Path:
        """Copy the bundle, without what was built in its folder. `folder` must be new, empty, or a bundle to overwrite;
        other files in it stay. Raises UserError if it is something else or cannot be written."""
        destination = Path(folder)
        if destination.resolve() == self.folder.resolve():
            return destination
        _require_replaceable(destination)
        try:
            for name in (*self.manifest.files, MANIFEST):  # the manifest last: a copy that was cut short does not load
                (destination / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, destination / name)
        except OSError as error:
            problem = f"bundle {destination}: cannot be written: {error.strerror or error}"
            raise UserError(problem, hint="name a folder on a disk with space, where you may write") from error
        return destination

    def selftest(self, threads: int | None = None) -> SelftestReport:
        """Run every function that has golden outputs and compare. Each starts from the golden parameters, with zero
        moments where none are given; in a bundle without golden parameters, from those of `init`. Raises UserError if
        the bundle has no golden vectors, or they do not fit its functions."""
        golden = self._golden()
        engine = open_engine(self.folder, self.manifest, threads)
        try:
            names = [name for name in self.manifest.functions if any(key.startswith(f"{name}/out/") for key in golden)]
            return SelftestReport(tuple(check for name in names for check in self._check(engine, name, golden)))
        finally:
            engine.close()

    def _golden(self) -> dict[str, NDArray[Any]]:
        path = self.manifest.file(self.folder, GOLDEN)
        try:
            golden = safetensors.numpy.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
            raise UserError(
                f"bundle {self.folder}: {GOLDEN} cannot be read: {error}", hint="compile the bundle again"
            ) from error
        known = {f"param/{slot.name}" for slot in self.manifest.parameters}
        strange = [key for key in golden if key not in known and key.split("/")[0] not in self.manifest.functions]
        if strange:
            raise _misfit(self.folder, f"{strange[0]!r} belongs to no parameter and no function")
        return golden

    def _check(self, engine: Engine, name: str, golden: Mapping[str, NDArray[Any]]) -> list[GoldenCheck]:
        function = self.manifest.functions[name]
        for parameter in self.manifest.parameters:
            zeros = np.zeros(parameter.shape, parameter.numpy_dtype)
            engine.write(parameter, self._fitting(parameter, golden.get(f"param/{parameter.name}", zeros)))
        if "init" in self.manifest.functions and not any(key.startswith("param/") for key in golden):
            self._run(engine, "init", golden)
        self._run(engine, name, golden)
        prefix = f"{name}/out/"
        outputs = [(key.removeprefix(prefix), expected) for key, expected in golden.items() if key.startswith(prefix)]
        return [self._compare(engine, function, output, expected) for output, expected in outputs]

    def _run(self, engine: Engine, name: str, golden: Mapping[str, NDArray[Any]]) -> None:
        """Run a function on its golden inputs."""
        for slot in self.manifest.functions[name].inputs:
            key = f"{name}/in/{slot.name}"
            if key not in golden:
                raise _misfit(self.folder, f"{key!r} is missing")
            engine.write(slot, self._fitting(slot, golden[key]))
        engine.run(name)

    def _compare(self, engine: Engine, function: FunctionEntry, output: str, expected: NDArray[Any]) -> GoldenCheck:
        """An output of the function, or a parameter as the function left it."""
        slots = {slot.name: slot for slot in (*self.manifest.parameters, *function.outputs)}
        if output not in slots:
            raise _misfit(self.folder, f"{function.name}/out/{output} is no output and no parameter")
        found = engine.read(slots[output]).astype(np.float64)
        wanted = self._fitting(slots[output], expected).astype(np.float64)
        difference = float(np.abs(found - wanted).max()) if not np.array_equal(found, wanted) else 0.0
        tolerance = self.manifest.golden.get(function.name, {}).get(output, 0.0)
        return GoldenCheck(function.name, output, math.inf if math.isnan(difference) else difference, tolerance)

    def _fitting(self, slot: Slot, array: NDArray[Any]) -> NDArray[Any]:
        if array.shape != slot.shape or array.dtype != slot.numpy_dtype:
            raise _misfit(
                self.folder, f"{slot.name} is {array.dtype}{list(array.shape)}, not {slot.dtype}{list(slot.shape)}"
            )
        return np.asarray(array, order="C")


def load(folder: str | Path) -> Bundle:
    """The bundle in `folder`, validated: its manifest, and the hash of every file. Raises UserError if anything is
    wrong."""
    return Bundle(Path(folder), manifests.load(folder))


def _require_replaceable(destination: Path) -> None:
    if destination.is_dir() and any(destination.iterdir()) and not (destination / MANIFEST).is_file():
        raise UserError(
            f"bundle {destination}: the folder has other things in it", hint="name a new or an empty folder"
        )
    if destination.exists() and not destination.is_dir():
        raise UserError(f"bundle {destination}: is a file", hint="name a new folder")


def _misfit(folder: Path, problem: str) -> UserError:
    return UserError(f"bundle {folder}: {GOLDEN} does not fit the manifest: {problem}", hint="compile the bundle again")
