"""Runs C++ bundles: compiles their sources with the system's compiler, once, and calls the library through ctypes.

Objects and libraries are cached by content (source, headers, flags, compiler, processor), so that opening a bundle
again costs milliseconds and a changed kernel costs one compiler run. ctypes lets go of the interpreter lock during a
call."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from tinygpt.runtime.errors import UserError
from tinygpt.runtime.manifest import Manifest, Slot

_COMPILERS = ("g++", "clang++", *(f"g++-{n}" for n in range(16, 10, -1)), *(f"clang++-{n}" for n in range(22, 13, -1)))
_OLDEST = {"g++": 11, "clang++": 14}
# Clang defines both families' macros, so it is asked for first.
_VERSION_MACROS = {
    "clang++": ("__clang_major__", "__clang_minor__", "__clang_patchlevel__"),
    "g++": ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__"),
}
_INSTALL = "install one: sudo apt install g++ (or set CXX to a compiler)"
_SHOWN_LINES = 6  # of a compiler's complaint


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command, which of the two families it is, and its full version."""

    command: tuple[str, ...]
    family: str
    version: str

    def __str__(self) -> str:
        return f"{' '.join(self.command)} ({self.version})"


@dataclass(frozen=True)
class BuildRecord:
    """How a bundle is compiled: manifest["target"]["build"], validated."""

    compile: tuple[str, ...]
    link: tuple[str, ...]
    headers: tuple[str, ...]
    sources: tuple[str, ...]


def find_compiler() -> Compiler:
    """The compiler that CXX names, else the first g++ or clang++ that is new enough.

    Raises UserError with the install command if there is none."""
    named = os.environ.get("CXX", "").strip()
    if named:
        compiler = _probe(tuple(shlex.split(named)))
        if compiler is None:
            raise UserError(f"CXX={named}: is not a C++ compiler that runs here", hint=f"unset CXX, or {_INSTALL}")
        if _too_old(compiler):
            raise UserError(
                f"CXX={named}: {compiler.version} is too old, {_wanted()}", hint=f"unset CXX, or {_INSTALL}"
            )
        return compiler
    too_old: list[Compiler] = []
    for compiler in filter(None, (_probe((name,)) for name in _COMPILERS)):
        if not _too_old(compiler):
            return compiler
        too_old.append(compiler)
    if too_old:
        raise UserError(f"the C++ compiler {too_old[0]} is too old, {_wanted()}", hint=_INSTALL)
    raise UserError("no C++ compiler found: neither g++ nor clang++ is on the PATH", hint=_INSTALL)


def build(folder: Path, manifest: Manifest) -> Path:
    """The compiled library of the bundle, from the cache or from the compiler.

    Raises UserError if there is no compiler, if the sources do not compile, or if the cache cannot be written."""
    record = build_record(folder, manifest)
    compiler = find_compiler()
    common = [*compiler.command, compiler.version, *record.compile, _processor(record.compile)]
    headers = [manifest.file(folder, name).read_bytes() for name in record.headers]
    sources = [
        (manifest.file(folder, name), _digest(common, [*headers, (folder / name).read_bytes()]))
        for name in record.sources
    ]
    library = _cache() / f"{_digest([*common, *record.link, *(key for _, key in sources)], [])}.so"
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(lambda source: _object(compiler, record, *source), sources))
        _produce([*compiler.command, *record.compile, *record.link, *map(str, objects)], library)
    except OSError as error:
        raise UserError(
            f"the compiler's cache {library.parent} cannot be written: {error.strerror or error}",
            hint="free some space, or set XDG_CACHE_HOME to a folder you can write to",
        ) from error
    return library


def build_record(folder: Path, manifest: Manifest) -> BuildRecord:
    """manifest["target"]["build"]. Raises UserError if it is malformed."""
    record = manifest.target.get("build")
    fields = {}
    for name in ("compile", "link", "headers", "sources"):
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
            raise UserError(
                f"bundle {folder}: target.build.{name} must be a list of strings", hint="compile the bundle again"
            )
        fields[name] = tuple(value)
    return BuildRecord(**fields)


def require_processor(folder: Path, manifest: Manifest) -> None:
    """Raise UserError if the bundle was compiled for a processor that has what this one lacks."""
    machine, isa = manifest.target.get("machine"), manifest.target.get("isa") or []
    if machine and machine != platform.machine():
        raise _wrong_processor(folder, f"{machine}, this is {platform.machine()}")
    features = _processor_features()
    missing = [feature for feature in isa if feature not in features]
    if features and missing:
        raise _wrong_processor(
            folder, f"a processor with {', '.join(map(str, isa))}, this one lacks {', '.join(map(str, missing))}"
        )


class NativeEngine:
    """A loaded library, with a numpy view of every tensor the host may touch."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None) -> None:
        """`threads` None means one for each processor this process may use. Raises UserError for what `build` does, for
        a library that does not fit its manifest or this processor, and if there is not enough memory."""
        require_processor(folder, manifest)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._library = _load(build(folder, manifest), folder)
        self._check(folder, manifest)
        self._model: int | None = self._library.tinygpt_open(self._threads)
        if not self._model:
            total = sum(manifest.pools.values()) / 2**20
            raise UserError(
                f"bundle {folder}: {total:.0f} MiB of memory with {self._threads} threads cannot be had",
                hint="compile with a smaller --batch or --context, or give fewer --threads",
            )
        pools = {
            name: _bytes_at(self._library.tinygpt_pool(self._model, i), size)
            for i, (name, size) in enumerate(manifest.pools.items())
        }
        self._views = {slot: _view(pools[slot.pool], slot) for slot in _slots(manifest)}
        self._entries = {name: number for number, name in enumerate(manifest.functions)}
        self._launches = {name: len(function.launches) for name, function in manifest.functions.items()}

    @property
    def threads(self) -> int:
        return self._threads

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        np.copyto(self._views[slot], array, casting="no")

    def read(self, slot: Slot) -> NDArray[Any]:
        return self._views[slot].copy()

    def run(self, function: str) -> None:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        self._library.tinygpt_run(self._model, self._entries[function])

    def where(self) -> str:
        return f"{self._threads} thread{'s' * (self._threads > 1)}"

    def profile(self, function: str, runs: int) -> NDArray[np.float64]:
        """Run a function so often; seconds [runs, threads, launches + 1], the last for waiting."""
        launches = self._launches[function]
        laps = np.zeros((runs, self._threads, launches + 1))
        try:
            for run in laps:
                self._library.tinygpt_profile(self._model, run.ctypes.data_as(ctypes.POINTER(ctypes.c_double)), launches + 1)
                self.run(function)
        finally:
            self._library.tinygpt_profile(self._model, None, 0)
        return laps

    def close(self) -> None:
        model, self._model = self._model, None
        self._views = {}
        if model is not None:
            self._library.tinygpt_close(model)

    def _check(self, folder: Path, manifest: Manifest) -> None:
        """Refuse a library that needs another processor, or whose tensors lie elsewhere than the manifest says."""
        missing = self._library.tinygpt_missing().decode()
        if missing:
            raise _wrong_processor(folder, f"a processor with {missing}, which this one lacks")
        if self._library.tinygpt_build().decode() != layout_id(manifest):
            raise UserError(
                f"bundle {folder}: model.cpp and manifest.json disagree on where the tensors lie or what a function launches",
                hint="one of them was edited: compile the bundle again",
            )


ENGINES = {"cpp": NativeEngine}


def layout_id(manifest: Manifest) -> str:
    """What the library must agree on: pools, functions in order, how many launches each has, where every tensor lies."""

    def slots(items: Iterable[Slot]) -> list[list[Any]]:
        return [[s.name, s.dtype, list(s.shape), s.pool, s.offset] for s in items]

    functions = [[name, slots(f.inputs), slots(f.outputs), len(f.launches)] for name, f in manifest.functions.items()]
    layout = [list(manifest.pools.items()), slots(manifest.parameters), functions]
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


def _slots(manifest: Manifest) -> Iterable[Slot]:
    yield from manifest.parameters
    for function in manifest.functions.values():
        yield from (*function.inputs, *function.outputs)


def _bytes_at(address: int, size: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _view(pool: NDArray[np.uint8], slot: Slot) -> NDArray[Any]:
    return pool[slot.offset : slot.end].view(slot.numpy_dtype).reshape(slot.shape)


def _wrong_processor(folder: Path, wants: str) -> UserError:
    return UserError(
        f"bundle {folder}: was compiled for {wants}",
        hint="compile it again on this machine, or with the baseline profile",
    )


def _load(library: Path, folder: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(library))
        signatures: Mapping[str, tuple[Any, list[Any]]] = {
            "tinygpt_open": (ctypes.c_void_p, [ctypes.c_int]),
            "tinygpt_pool": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int]),
            "tinygpt_run": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int]),
            "tinygpt_close": (None, [ctypes.c_void_p]),
            "tinygpt_profile": (None, [ctypes.c_void_p, ctypes.POINTER(ctypes.c_double), ctypes.c_int]),
            "tinygpt_missing": (ctypes.c_char_p, []),
            "tinygpt_build": (ctypes.c_char_p, []),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise UserError(
            f"bundle {folder}: the compiled library {library} cannot be used: {error}",
            hint="delete it; it is built again",
        ) from error
    return loaded


def _cache() -> Path:
    return platformdirs.user_cache_path("tinygpt") / "native"


def _digest(words: Sequence[str], contents: Sequence[bytes]) -> str:
    """A key that no other words and contents have."""
    state = hashlib.sha256(json.dumps(words).encode())
    for content in contents:
        state.update(hashlib.sha256(content).digest())
    return state.hexdigest()[:40]


def _object(compiler: Compiler, record: BuildRecord, source: Path, key: str) -> Path:
    """The object file of one source, compiled unless it is cached."""
    path = _cache() / f"{key}.o"
    if not path.is_file():
        _produce([*compiler.command, *record.compile, "-c", str(source)], path)
    return path


def _produce(command: Sequence[str], path: Path) -> None:
    """Run a compiler that writes `path`, which appears whole or not at all."""
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", partial], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            complaint = (
                "\n    ".join(done.stderr.strip().splitlines()[:_SHOWN_LINES]) or f"exit status {done.returncode}"
            )
            full = "No space left" in done.stderr
            raise UserError(
                f"{command[0]} failed:\n    {complaint}",
                hint="free some space on the disk"
                if full
                else f"check that {command[0]} works, or set CXX to another compiler",
            )
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


@functools.cache
def _probe(command: tuple[str, ...]) -> Compiler | None:
    """The compiler behind a command, asked for its predefined macros; None if it does not run."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", "/dev/null"],
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    macros = dict(re.findall(r"^#define (\w+) (.*)$", done.stdout, re.MULTILINE))
    for family, names in _VERSION_MACROS.items():
        if names[0] in macros:
            return Compiler(command, family, ".".join(macros[name] for name in names))
    return None


def _too_old(compiler: Compiler) -> bool:
    return int(compiler.version.partition(".")[0]) < _OLDEST[compiler.family]


def _wanted() -> str:
    return "TinyGPT needs " + " or ".join(f"{family} {version}" for family, version in _OLDEST.items())


def _processor(flags: Sequence[str]) -> str:
    """What flags such as -march=native stand for here: part of the key, for caches that several machines share."""
    native = any(flag.endswith("=native") for flag in flags)
    return f"{platform.machine()} {' '.join(sorted(_processor_features()))}" if native else platform.machine()


@functools.cache
def _processor_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))),
        frozenset(),
    )
