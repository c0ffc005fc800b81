"""Runs WebAssembly bundles in wasmtime: one instance a thread, all on one memory that is as large as the manifest
says.

Workers stay inside the module's `serve`, where they wait for work, so that a call costs this thread one foreign call
and no lock of Python's. Compiled modules are cached by wasmtime, in the user's cache folder."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.runtime.engine import web_files
from tinygpt.runtime.errors import UserError
from tinygpt.runtime.manifest import Manifest, Slot

if TYPE_CHECKING:
    import wasmtime

_PAGE = 65536
_MAX_PAGES = {32: 1 << 16, 64: 1 << 26}
_MAX_THREADS = 64
_INSTALL = "pip install wasmtime, or run the bundle in Node: node host/train.mjs CORPUS"
_AGAIN = "compile the bundle again: tinygpt compile CONFIG --target T --out DIR"


@dataclass(frozen=True)
class ModuleRecord:
    """manifest["target"] of a WebAssembly bundle, validated. Addresses and sizes are bytes of the module's memory."""

    module: str
    address_bits: int
    shared: bool
    max_threads: int
    pools: dict[str, int]
    scratch: int
    scratch_stride: int
    entries: dict[str, int]

    def pages(self, threads: int) -> int:
        """Pages of 64 KiB that so many threads need."""
        return -(-(self.scratch + threads * self.scratch_stride) // _PAGE)


def module_record(folder: Path, manifest: Manifest) -> ModuleRecord:
    """manifest["target"]. Raises UserError if a field is malformed, a pool would leave the memory or meet another, or a
    function has no entry."""

    def refuse(problem: str) -> UserError:
        return UserError(f"bundle {folder}: manifest.json: target.{problem}", hint=_AGAIN)

    target = manifest.target

    def integer(value: Any, name: str, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise refuse(f"{name} is {value!r}, not an integer from {low} to {high}")
        return value

    bits = integer(target.get("address_bits"), "address_bits", 32, 64)
    if bits not in _MAX_PAGES:
        raise refuse(f"address_bits is {bits}, neither 32 nor 64")
    limit = _MAX_PAGES[bits] * _PAGE
    scratch = integer(target.get("scratch"), "scratch", 0, limit)
    stride = integer(target.get("scratch_stride"), "scratch_stride", 0, limit)
    places = target.get("pools")
    if not isinstance(places, dict) or places.keys() != manifest.pools.keys():
        raise refuse(f"pools must place exactly {', '.join(manifest.pools)}")
    end = 0
    for name in sorted(places, key=lambda name: integer(places[name], f"pools.{name}", 0, limit)):
        if places[name] < end or places[name] % 8:
            raise refuse(f"pools.{name} is {places[name]}, which is not aligned to 8 bytes or inside another pool")
        end = places[name] + manifest.pools[name]
    if end > scratch:
        raise refuse(f"scratch is {scratch}, but the pools end at {end}")
    entries = target.get("entries")
    if not isinstance(entries, list) or set(manifest.functions) - {e for e in entries if isinstance(e, str)}:
        raise refuse("entries must list every function")
    shared = target.get("shared")
    if not isinstance(shared, bool):
        raise refuse(f"shared is {shared!r}, neither true nor false")
    most = integer(target.get("max_threads"), "max_threads", 1, _MAX_THREADS)
    numbers = {name: number for number, name in enumerate(entries)}
    record = ModuleRecord(str(target.get("module")), bits, shared, most, dict(places), scratch, stride, numbers)
    if record.pages(most) > _MAX_PAGES[bits]:
        raise refuse(f"scratch_stride is {stride}: {most} threads do not fit {bits}-bit addresses")
    return record


_OPEN: weakref.WeakSet[WasmEngine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End the threads of engines that nobody closed: they must not run while the interpreter takes itself apart."""
    for engine in list(_OPEN):
        engine.close()


class WasmEngine:
    """A module in wasmtime, with a numpy view of every tensor the host may touch."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None) -> None:
        """`threads` None means one for each processor this process may use, if the module has threads. Raises
        UserError if wasmtime is missing, the record or the module is damaged, or the memory cannot be had."""
        record = module_record(folder, manifest)
        self._threads = _thread_count(folder, record, threads)
        wasmtime = _wasmtime(folder)
        self._entries = record.entries
        engine = wasmtime.Engine(_configuration(wasmtime))
        try:
            module = wasmtime.Module(engine, manifest.file(folder, record.module).read_bytes())
            pages = record.pages(self._threads)
            limits = wasmtime.Limits(pages, pages)
            kind = wasmtime.MemoryType(limits, is_64=record.address_bits == 64, shared=record.shared)
            store = wasmtime.Store(engine)
            memory = _shared_memory(wasmtime, engine, kind) if record.shared else wasmtime.Memory(store, kind)
            self._main: _Instance | None = _Instance(wasmtime, store, module, memory)
        except wasmtime.WasmtimeError as error:
            raise UserError(f"bundle {folder}: {record.module} cannot be loaded: {error}", hint=_AGAIN) from error
        content = _bytes_at(memory.data_ptr() if record.shared else memory.data_ptr(store), pages * _PAGE)
        self._views = {slot: _view(content[record.pools[slot.pool] :], slot) for slot in _slots(manifest)}
        self._memory = memory  # the views do not keep it alive
        self._failures: list[BaseException] = []
        self._workers = [
            threading.Thread(
                target=self._serve, args=(wasmtime, engine, module, memory, t), name=f"tinygpt-{t}", daemon=True
            )
            for t in range(1, self._threads)
        ]
        for worker in self._workers:
            worker.start()
        _OPEN.add(self)

    @property
    def threads(self) -> int:
        return self._threads

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        np.copyto(self._views[slot], array, casting="no")

    def read(self, slot: Slot) -> NDArray[Any]:
        return self._views[slot].copy()

    def run(self, function: str) -> None:
        if self._main is None:
            raise RuntimeError("the engine is closed")
        entry = self._entries[function]
        try:
            if self._threads == 1:
                self._main.call("run", entry, 0, 1)
            else:
                self._main.call("step", entry, self._threads)
        except RuntimeError:
            self._stop("fail")
            cause = self._failures[0] if self._failures else None
            raise RuntimeError(f"{function} failed: {cause}" if cause else f"{function} failed") from cause

    def close(self) -> None:
        if self._main is not None:
            self._stop("post", -1)

    def _stop(self, export: str, *arguments: int) -> None:
        """End the workers by a call of the module's, and let go of the memory."""
        main, self._main = self._main, None
        self._views = {}
        if main is not None and self._workers:
            main.call(export, *arguments)
        for worker in self._workers:
            worker.join()
        self._memory = None

    def _serve(self, wasmtime: Any, engine: Any, module: Any, memory: Any, thread: int) -> None:
        """A worker's whole life. wasmtime's stores belong to one thread each."""
        instance = _Instance(wasmtime, wasmtime.Store(engine), module, memory)
        try:
            instance.call("serve", thread, self._threads)
        except RuntimeError as error:
            self._failures.append(error)
            instance.call("fail")


ENGINES = {"wasm32": WasmEngine, "wasm64": WasmEngine}


def host_files() -> dict[str, bytes]:
    """The JavaScript host, as files of a bundle: with them, `node host/train.mjs CORPUS` or a browser trains it without
    Python."""
    return web_files("tinygpt.mjs", "train.mjs", "index.html")


class _Instance:
    """An instance and its exports, called without the checks and conversions that cost wasmtime-py 28 µs a call."""

    _SLOT = 16  # bytes of an argument

    def __init__(self, wasmtime: Any, store: wasmtime.Store, module: wasmtime.Module, memory: Any) -> None:
        from wasmtime import _ffi as ffi

        self._wasmtime, self._ffi, self._store = wasmtime, ffi, store
        self._instance = wasmtime.Instance(store, module, [memory])
        exports = self._instance.exports(store)
        self._functions = {name: exports[name] for name in exports}
        self._call = ffi.dll.wasmtime_func_call_unchecked
        self._call.restype = ctypes.c_void_p
        self._call.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t, ctypes.c_void_p]
        self._context = ctypes.cast(store._context(), ctypes.c_void_p)
        self._arguments = (ctypes.c_uint8 * (self._SLOT * 4))()
        self._trap = ctypes.c_void_p()

    def call(self, name: str, *arguments: int) -> None:
        """Call an export whose parameters are i32 and which returns nothing. Raises RuntimeError for a trap."""
        for number, argument in enumerate(arguments):
            ctypes.c_int32.from_buffer(self._arguments, self._SLOT * number).value = argument
        function = ctypes.addressof(self._functions[name]._func)
        error = self._call(self._context, function, self._arguments, 4, ctypes.addressof(self._trap))
        if error or self._trap.value:
            raise self._failure(error)

    def _failure(self, error: int | None) -> RuntimeError:
        if error:
            raised = ctypes.cast(error, ctypes.POINTER(self._ffi.wasmtime_error_t))
            return RuntimeError(str(self._wasmtime.WasmtimeError._from_ptr(raised)))
        trap = ctypes.cast(self._trap.value or 0, ctypes.POINTER(self._ffi.wasm_trap_t))
        self._trap.value = None
        return RuntimeError(str(self._wasmtime.Trap._from_ptr(trap)))


def _wasmtime(folder: Path) -> Any:
    try:
        import wasmtime
    except ImportError as error:
        raise UserError(f"bundle {folder}: running it in Python needs the package wasmtime", hint=_INSTALL) from error
    return wasmtime


def _thread_count(folder: Path, record: ModuleRecord, wanted: int | None) -> int:
    if wanted is None:
        return min(len(os.sched_getaffinity(0)), record.max_threads)
    if wanted > record.max_threads:
        what = f"at most {record.max_threads} threads" if record.shared else "one thread, because its profile has none"
        raise UserError(f"bundle {folder}: runs {what}, not {wanted}", hint=f"give --threads {record.max_threads}")
    return wanted


def _configuration(wasmtime: Any) -> Any:
    configuration = wasmtime.Config()
    configuration.shared_memory = True
    configuration.cranelift_opt_level = "speed"
    # A mitigation against code that spies on its own process costs 64-bit memories a move for each access; this module
    # is the bundle's own.
    configuration.cranelift_flag_set("enable_heap_access_spectre_mitigation", "false")
    with contextlib.suppress(wasmtime.WasmtimeError):  # no folder to cache in: the module is compiled each time
        configuration.cache = True
    return configuration


def _shared_memory(wasmtime: Any, engine: Any, kind: Any) -> Any:
    """A shared memory. wasmtime-py 50 passes a pointer to the pointer where an instance imports one."""
    from wasmtime import _ffi as ffi

    class Memory(wasmtime.SharedMemory):  # type: ignore[misc]
        def _as_extern(self) -> Any:
            return ffi.wasmtime_extern_t(
                ffi.WASMTIME_EXTERN_SHAREDMEMORY, ffi.wasmtime_extern_union(sharedmemory=self.ptr())
            )

    return Memory(engine, kind)


def _bytes_at(pointer: Any, size: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(ctypes.addressof(pointer.contents)))


def _view(pool: NDArray[np.uint8], slot: Slot) -> NDArray[Any]:
    return pool[slot.offset : slot.end].view(slot.numpy_dtype).reshape(slot.shape)


def _slots(manifest: Manifest) -> Iterable[Slot]:
    yield from manifest.parameters
    for function in manifest.functions.values():
        yield from (*function.inputs, *function.outputs)
