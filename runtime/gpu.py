"""Runs WebGPU bundles on the system's GPU through wgpu: one buffer a pool, one submit a step.

A function is recorded into one command encoder with one compute pass; pipelines and bind groups are made when it runs
for the first time. Dispatches of a pass see each other's writes in order, so the launch list needs no barriers. A
function that runs again and again is recorded anew while the device is busy with it. The small results of a run are
copied into a buffer of its own, so that they can be read while the device is busy with later runs. A profile gives each
launch a pass of its own, with the device's clock read at both ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.runtime import trust
from tinygpt.runtime.engine import web_files
from tinygpt.runtime.errors import UserError
from tinygpt.runtime.gpu_native import Command, Queue, record, trusted_module
from tinygpt.runtime.manifest import Manifest, Slot

_INSTALL = "pip install wgpu, and a Vulkan, Metal or D3D12 driver (in software: sudo apt install mesa-vulkan-drivers)"
_AGAIN = "compile the bundle again: tinygpt compile CONFIG --target wgsl --out DIR"
_FEATURES = {"subgroups": "subgroup"}  # features whose name in wgpu is not the specification's
_ADAPTERS = ("DiscreteGPU", "IntegratedGPU", "VirtualGPU", "CPU", "Unknown")  # best first
_BACKENDS = ("Vulkan", "Metal", "D3D12", "OpenGL")
_EVERYWHERE = "webgpu-default, and with dtype f32"  # what every device has
_SMALLEST_SUBGROUP = 4  # lanes, by the specification
_SUBGROUP_LANES = {0x10DE: 32, 0x1002: 32, 0x106B: 32, 0x8086: 8}  # by PCI vendor: NVIDIA, AMD (32 or 64), Apple, Intel (8 to 32)
_VECTOR_BYTES = 16
_GRID = "max-compute-workgroups-per-dimension"
_MOST_WORKGROUPS = 65535  # where a bundle does not ask for more
_CLOCK = "timestamp-query"  # asked for where the device has it: it costs nothing until a profile is taken
_TIMED_LAUNCHES = 2048  # of a set of queries: two each, and a set has at most 4096
_WARM_UP = 0.5  # seconds of work before launches are timed
_SMALL_RESULT = 64 << 10  # bytes; results up to here are copied where the host reads them: losses of rows, scores of a small model


@dataclass(frozen=True)
class KernelRecord:
    """A kernel: its file, for each binding whether it is only read, and whether the compiler on this
    machine proved all its accesses to lie inside."""

    file: str
    read_only: tuple[bool, ...]
    bounded: bool


@dataclass(frozen=True)
class Dispatch:
    """A launch: the kernel, its workgroups, and its bindings as (pool, offset, size) in bytes."""

    kernel: str
    workgroups: tuple[int, int, int]
    bindings: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class DeviceRecord:
    """manifest["target"] of a WebGPU bundle, validated."""

    features: tuple[str, ...]
    subgroup: int
    limits: Mapping[str, int]
    kernels: Mapping[str, KernelRecord]
    functions: Mapping[str, tuple[Dispatch, ...]]


def device_record(folder: Path, manifest: Manifest) -> DeviceRecord:
    """manifest["target"]. Raises UserError if it is malformed or a binding leaves its pool."""
    target = manifest.target

    def refuse(problem: str) -> UserError:
        return UserError(f"bundle {folder}: manifest.json: target.{problem}", hint=_AGAIN)

    def mapping(name: str) -> Mapping[str, Any]:
        value = target.get(name)
        if not isinstance(value, dict):
            raise refuse(f"{name} is not an object")
        return value

    features = target.get("features")
    if not isinstance(features, list) or not all(isinstance(f, str) for f in features):
        raise refuse("features is not a list of names")
    subgroup = target.get("subgroup")
    if type(subgroup) is not int or subgroup < 0:
        raise refuse("subgroup is not a number of lanes")
    limits = mapping("limits")
    if not all(type(n) is int and 0 < n < 1 << 53 for n in limits.values()):
        raise refuse("limits are not positive integers")
    kernels = {}
    is_own = trust.is_own(manifest.digest)
    for name, entry in mapping("kernels").items():
        access, file = (entry.get("access"), entry.get("file")) if isinstance(entry, dict) else (None, None)
        if not isinstance(access, list) or not all(a in ("in", "out", "inout") for a in access) or not isinstance(file, str) or file not in manifest.files:
            raise refuse(f"kernels.{name} has no file or no access words")
        kernels[name] = KernelRecord(file, tuple(a == "in" for a in access), entry.get("bounded") is True and is_own)
    functions = {}
    for name in manifest.functions:
        entries = mapping("functions").get(name)
        if not isinstance(entries, list):
            raise refuse(f"functions.{name} is not a list")
        try:
            functions[name] = tuple(_dispatch(entry, kernels, manifest.pools, limits.get(_GRID, _MOST_WORKGROUPS)) for entry in entries)
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(f"functions.{name} is malformed: {error}") from error
        if len(entries) != len(manifest.functions[name].launches):
            raise refuse(f"functions.{name} has {len(entries)} launches, the manifest {len(manifest.functions[name].launches)}")
    return DeviceRecord(tuple(features), subgroup, dict(limits), kernels, functions)


def _dispatch(entry: Any, kernels: Mapping[str, KernelRecord], pools: Mapping[str, int], most: int) -> Dispatch:
    """One launch. Raises KeyError, TypeError or ValueError, saying what is wrong."""
    kernel = kernels[entry["kernel"]]
    workgroups = tuple(entry["workgroups"])
    if len(workgroups) != 3 or not all(type(n) is int and 1 <= n <= most for n in workgroups):
        raise ValueError(f"workgroups {workgroups}")
    bindings = tuple((str(pool), offset, size) for pool, offset, size in entry["bindings"])
    if len(bindings) != len(kernel.read_only):
        raise ValueError(f"{entry['kernel']} has {len(kernel.read_only)} bindings, not {len(bindings)}")
    for pool, offset, size in bindings:
        if type(offset) is not int or type(size) is not int or offset < 0 or size <= 0 or size % _VECTOR_BYTES or offset + size > pools[pool]:
            raise ValueError(f"binding {offset} + {size} of pool {pool}")
    return Dispatch(entry["kernel"], (workgroups[0], workgroups[1], workgroups[2]), bindings)


class GpuEngine:
    """A device with the bundle's pools in its memory."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None) -> None:
        """`threads` has no meaning here. Raises UserError if wgpu or a driver is missing, if the device has less than the
        bundle needs, or if the record is damaged."""
        self._folder, self._manifest = folder, manifest
        self._record = device_record(folder, manifest)
        self._wgpu = _wgpu(f"running bundle {folder}")
        self._device = _device(self._wgpu, folder, self._record)
        usage = self._wgpu.BufferUsage
        flags = usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
        self._pools: dict[str, Any] = {}
        for name, size in manifest.pools.items():
            try:
                self._pools[name] = self._device.create_buffer(label=name, size=max(size, _VECTOR_BYTES), usage=flags)
            except self._wgpu.GPUError as error:
                self._device.destroy()
                raise UserError(
                    f"bundle {folder}: pool {name} of {size:,} bytes cannot be had: {error}",
                    hint="compile with a smaller --batch or --context",
                ) from error
        self._pipelines: dict[str, tuple[Any, Any]] = {}
        self._ready: dict[str, list[Command]] = {}
        self._queue = Queue(self._device)
        self._sequences: dict[tuple[str, ...], _Sequence] = {}
        self._held: _Submission | None = None  # of a run that waits for the next one
        self._touched: dict[str, Mapping[str, list[tuple[int, int]]]] = {}  # by pool, what a held function reads or writes
        self._last: tuple[_Submission, str] | None = None  # the last run, until the pools may hold something else

    @property
    def threads(self) -> int:
        return 1

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        self._last = None
        self._require_open()
        if self._held and any(start < slot.end and slot.offset < end for start, end in self._touched[self._held.functions[0]][slot.pool]):
            self._submit_held()  # else the write would come before it
        with self._in_words(f"write {slot.name}"):
            self._queue.write(self._pools[slot.pool], slot.offset, array)

    def read(self, slot: Slot) -> NDArray[Any]:
        if self._last and self._last[0].has(self._last[1], slot):
            return self._last[0].result(self._last[1], slot)
        self._submit_held()
        return np.frombuffer(self._content(self._pools[slot.pool], slot.offset, slot.nbytes), slot.numpy_dtype).reshape(slot.shape)

    def run(self, function: str) -> None:
        self._last = self._begin(function), function

    def begin(self, function: str) -> Callable[[Slot], NDArray[Any]]:
        return partial(self._begin(function).result, function)

    def begin_with_next(self, function: str) -> Callable[[Slot], NDArray[Any]]:
        self._last = None
        self._submit_held()
        self._launches(function)
        if function not in self._touched:
            self._touched[function] = self._touched_by(function)
        self._held = _Submission(self, (function,))
        return partial(self._held.result, function)

    def _touched_by(self, function: str) -> Mapping[str, list[tuple[int, int]]]:
        """By pool, the bytes [start, end) that a function reads or writes."""
        bindings = [binding for dispatch in self._record.functions[function] for binding in dispatch.bindings]
        return {pool: [(start, start + size) for place, start, size in bindings if place == pool] for pool in self._pools}

    def _begin(self, function: str) -> _Submission:
        self._last = None
        self._launches(function)
        if self._held and function in self._held.functions:
            self._submit_held()  # the results of both would have one place
        submission, self._held = self._held or _Submission(self, ()), None
        submission.functions += (function,)
        self._submit(submission)
        return submission

    def _submit_held(self) -> None:
        self._require_open()
        submission, self._held = self._held, None
        if submission:
            self._submit(submission)

    def _submit(self, submission: _Submission) -> None:
        functions = submission.functions
        is_first = functions not in self._sequences
        if is_first:
            self._sequences[functions] = self._sequence(functions)
        sequence = self._sequences[functions]
        with self._in_words(f"run {' and '.join(functions)}"):
            commands, results = sequence.ahead or self._recorded(functions, sequence)
            sequence.ahead = None
            submission.submitted(self._queue, self._queue.submit(commands), results, sequence)
            if not is_first:
                sequence.ahead = self._recorded(functions, sequence)

    @contextmanager
    def _in_words(self, act: str) -> Iterator[None]:
        """What wgpu raises becomes an error that says what was to be done."""
        try:
            yield
        except self._wgpu.GPUError as error:
            what = f"bundle {self._folder}: the GPU's driver cannot {act}: {error}"
            raise UserError(what, hint="start again, or go on from the last checkpoint") from error

    def _sequence(self, functions: tuple[str, ...]) -> _Sequence:
        most = max(_SMALL_RESULT, 4 * self._manifest.batch)  # where batches begin fits, whatever the batch
        small = [(name, slot) for name in functions for slot in self._manifest.functions[name].outputs if slot.nbytes <= most]
        *starts, end = accumulate((-(-slot.nbytes // _VECTOR_BYTES) * _VECTOR_BYTES for _, slot in small), initial=0)
        return _Sequence(dict(zip(small, starts, strict=True)), max(end, _VECTOR_BYTES))

    def _recorded(self, functions: tuple[str, ...], sequence: _Sequence) -> tuple[Any, Any]:
        """The commands of one submission, for each function its launches and the copies of its small results; and the buffer
        these go to. It is not mapped while they wait: only what was filled is read, and only then it is filled again."""
        label = " and ".join(functions)
        results = sequence.unused.pop() if sequence.unused else self._readable(f"results of {label}", sequence.nbytes)
        encoder = self._device.create_command_encoder(label=label)
        for function in functions:
            work = encoder.begin_compute_pass(label=function)
            record(work, self._ready[function])
            work.end()
            for (name, slot), place in sequence.places.items():
                if name == function:
                    encoder.copy_buffer_to_buffer(self._pools[slot.pool], slot.offset, results, place, slot.nbytes)
        return encoder.finish(label=label), results

    def _readable(self, label: str, size: int) -> Any:
        """A buffer that the host can map."""
        usage = self._wgpu.BufferUsage.MAP_READ | self._wgpu.BufferUsage.COPY_DST
        return self._device.create_buffer(label=label, size=size, usage=usage)

    def _content(self, buffer: Any, offset: int, size: int) -> bytearray:
        """A part of a buffer, after all that was begun."""
        with self._in_words("read its memory"):
            copy = self._readable("copy", size)
            encoder = self._device.create_command_encoder(label="copy")
            encoder.copy_buffer_to_buffer(buffer, offset, copy, 0, size)
            content = self._queue.content(copy, self._queue.submit(encoder.finish()))
            copy.destroy()
        return content

    def where(self) -> str:
        return str(self._device.adapter.info["device"])

    def profile(self, function: str, runs: int) -> NDArray[np.float64]:
        """Run a function so often, each launch in a pass of its own; seconds [runs, 1, launches + 1], the last between
        passes: less than 0 where the device runs launches side by side. Raises UserError where it has no clock."""
        if _CLOCK not in self._device.features:
            raise UserError(
                f"bundle {self._folder}: {self.where()} cannot time single kernels: its driver has no {_CLOCK}",
                hint="profile it on another driver, or time whole steps: tinygpt bench CONFIG --target wgsl",
            )
        launches = self._launches(function)
        self._warm_up(function)
        counts = [2 * min(_TIMED_LAUNCHES, len(launches) - first) for first in range(0, len(launches), _TIMED_LAUNCHES)]
        clocks = [self._device.create_query_set(type="timestamp", count=count) for count in counts]
        usage = self._wgpu.BufferUsage.QUERY_RESOLVE | self._wgpu.BufferUsage.COPY_SRC
        readings = self._device.create_buffer(label="timestamps", size=16 * len(launches), usage=usage)
        laps = np.zeros((runs, 1, len(launches) + 1))
        for lap in laps[:, 0]:
            encoder = self._device.create_command_encoder(label=function)
            for number, launch in enumerate(launches):
                clock, begin = clocks[number // _TIMED_LAUNCHES], 2 * (number % _TIMED_LAUNCHES)
                times = {"query_set": clock, "beginning_of_pass_write_index": begin, "end_of_pass_write_index": begin + 1}
                work = encoder.begin_compute_pass(label=function, timestamp_writes=times)
                record(work, [launch])
                work.end()
            for number, clock in enumerate(clocks):
                encoder.resolve_query_set(clock, 0, clock.count, readings, 16 * _TIMED_LAUNCHES * number)
            self._queue.submit(encoder.finish())
            ticks = np.frombuffer(self._content(readings, 0, readings.size), np.int64).reshape(-1, 2)
            lap[:-1] = ticks[:, 1] - ticks[:, 0]
            lap[-1] = ticks.max() - ticks.min() - lap[:-1].sum()
        readings.destroy()
        return laps * _seconds_per_tick(self._device)

    def _warm_up(self, function: str) -> None:
        """Keep the device busy until its clock is up: an idle card runs at a fraction of it."""
        began = time.perf_counter()
        while time.perf_counter() - began < _WARM_UP:
            self.run(function)
            self.read(self._manifest.functions[function].outputs[0])

    def close(self) -> None:
        pools, self._pools = self._pools, {}
        self._ready, self._pipelines, self._sequences, self._held, self._last = {}, {}, {}, None, None
        self._queue.close()
        for pool in pools.values():
            pool.destroy()
        self._device.destroy()

    def _require_open(self) -> None:
        if not self._pools:
            raise RuntimeError("the engine is closed")

    def _launches(self, function: str) -> list[Command]:
        """A function's launches, prepared when it is asked for first. Raises UserError naming a kernel."""
        self._require_open()
        if function not in self._ready:
            self._ready[function] = [self._prepared(d) for d in self._record.functions[function]]
        return self._ready[function]

    def _prepared(self, dispatch: Dispatch) -> Command:
        """The pipeline and the bind group of a launch. Raises UserError naming the kernel."""
        try:
            pipeline, layout = self._pipeline(dispatch.kernel)
            entries = [
                {"binding": n, "resource": {"buffer": self._pools[pool], "offset": offset, "size": size}}
                for n, (pool, offset, size) in enumerate(dispatch.bindings)
            ]
            group = self._device.create_bind_group(label=dispatch.kernel, layout=layout, entries=entries)
        except self._wgpu.GPUError as error:
            raise UserError(f"bundle {self._folder}: the driver refuses kernel {dispatch.kernel}: {error}", hint=_AGAIN) from error
        return pipeline, group, dispatch.workgroups

    def _pipeline(self, name: str) -> tuple[Any, Any]:
        if name not in self._pipelines:
            kernel = self._record.kernels[name]
            try:
                code = self._manifest.file(self._folder, kernel.file).read_text()
            except UnicodeDecodeError as error:
                raise UserError(f"bundle {self._folder}: {kernel.file} is no text", hint=_AGAIN) from error
            module = trusted_module(self._device, name, code) if kernel.bounded else self._device.create_shader_module(label=name, code=code)
            entries = [
                {"binding": n, "visibility": self._wgpu.ShaderStage.COMPUTE, "buffer": {"type": "read-only-storage" if read_only else "storage"}}
                for n, read_only in enumerate(kernel.read_only)
            ]
            layout = self._device.create_bind_group_layout(label=name, entries=entries)
            pipeline = self._device.create_compute_pipeline(
                label=name,
                layout=self._device.create_pipeline_layout(label=name, bind_group_layouts=[layout]),
                compute={"module": module, "entry_point": "main"},
            )
            self._pipelines[name] = (pipeline, layout)
        return self._pipelines[name]


@dataclass
class _Sequence:
    """Functions that run in one submission, one after another: where a buffer of results has the small results of each, such
    buffers that nothing uses, and the next submission with its buffer, recorded."""

    places: Mapping[tuple[str, Slot], int]
    nbytes: int
    unused: list[Any] = field(default_factory=list)
    ahead: tuple[Any, Any] | None = None


class _Submission:
    """Runs that are submitted together, now or later, and the buffer that gets their small results. The buffer is free for
    others once it was read, or nobody can read it any more."""

    def __init__(self, engine: GpuEngine, functions: tuple[str, ...]) -> None:
        self.functions = functions
        self._engine: GpuEngine | None = engine  # until it is submitted
        self._queue: Queue | None = None
        self._sequence = _Sequence({}, 0)
        self._index: Any = None
        self._results: Any = None
        self._content: bytearray | None = None

    def submitted(self, queue: Queue, index: Any, results: Any, sequence: _Sequence) -> None:
        self._engine, self._queue, self._index, self._results, self._sequence = None, queue, index, results, sequence

    def has(self, function: str, slot: Slot) -> bool:
        """Whether the slot is a small result of the function."""
        return (function, slot) in self._sequence.places

    def result(self, function: str, slot: Slot) -> NDArray[Any]:
        """Wait for the runs; a copy of a small result."""
        if self._engine:
            self._engine._submit_held()
        if self._queue is None:
            raise UserError(f"{' and '.join(self.functions)} could not be begun, so there is no result", hint="start again, or go on from the last checkpoint")
        if self._content is None:
            self._content = self._queue.content(self._results, self._index)
            self._release()
        place = self._sequence.places[function, slot]
        return np.frombuffer(self._content, slot.numpy_dtype, math.prod(slot.shape), place).reshape(slot.shape).copy()

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        results, self._results = self._results, None
        if results is not None:
            self._sequence.unused.append(results)


ENGINES = {"wgsl": GpuEngine}


def host_files() -> dict[str, bytes]:
    """The JavaScript host, as files of a bundle: with them, a browser with WebGPU trains it without Python."""
    return web_files("tinygpt.mjs", "webgpu.mjs", "index.html")


def wgpu_features(features: Iterable[str]) -> list[str]:
    """Features of the specification by the names wgpu has for them."""
    return sorted(_FEATURES.get(name, name) for name in features)


def local_device() -> dict[str, Any]:
    """The GPU a bundle would run on here: its `name`, and its `features` and `limits` as the specification calls them, and
    how many lanes all its subgroups have at least, `subgroup`.

    Raises UserError if wgpu or a driver is missing."""
    wanted = "reading what this machine's GPU has"
    adapter = adapters(_wgpu(wanted), wanted)[0]
    names = {theirs: ours for ours, theirs in _FEATURES.items()}
    return {
        "name": adapter.info["device"],
        "features": sorted(names.get(name, name) for name in adapter.features),
        "limits": dict(adapter.limits),
        "subgroup": _subgroup_lanes(adapter),
    }


def _wgpu(wanted: str) -> Any:
    try:
        import wgpu
    except ImportError as error:
        raise UserError(f"{wanted} in Python needs the package wgpu", hint=_INSTALL) from error
    return wgpu


def _device(wgpu: Any, folder: Path, record: DeviceRecord) -> Any:
    """A device of the best adapter that has what the bundle needs."""
    found = adapters(wgpu, f"bundle {folder}")
    features = wgpu_features(record.features)
    reasons = []
    for adapter in found:
        missing = [f"feature {name}" for name in features if name not in adapter.features]
        missing += [f"subgroups of {record.subgroup} lanes"] if record.subgroup > _subgroup_lanes(adapter) else []
        missing += [f"{name} {n:,}" for name, n in record.limits.items() if adapter.limits.get(name, 0) < n]
        if missing:
            reasons.append(f"{adapter.info['device']} lacks {', '.join(missing)}")
            continue
        try:
            wanted = [*features, *({_CLOCK} & set(adapter.features))]
            return adapter.request_device_sync(required_features=wanted, required_limits=dict(record.limits))
        except (wgpu.GPUError, RuntimeError) as error:
            reasons.append(f"{adapter.info['device']}: {error}")
    raise UserError(f"bundle {folder}: no device has what it needs: {'; '.join(reasons)}", hint=f"compile for the profile {_EVERYWHERE}")


def _subgroup_lanes(adapter: Any) -> int:
    """How many lanes all subgroups of a GPU have at least. wgpu does not say; the makers of some chips do."""
    if _FEATURES["subgroups"] not in adapter.features:
        return 0
    return _SUBGROUP_LANES.get(adapter.info["vendor_id"], _SMALLEST_SUBGROUP)


def adapters(wgpu: Any, wanted: str) -> list[Any]:
    """This machine's GPUs, best first. Raises UserError if there is none."""
    found = sorted(wgpu.gpu.enumerate_adapters_sync(), key=_preference)
    if not found:
        raise UserError(f"{wanted}: no GPU driver found", hint=_INSTALL)
    return found


def _seconds_per_tick(device: Any) -> float:
    """wgpu hands timestamps on as the device counts them; its C interface knows the length of a tick in nanoseconds."""
    from wgpu.backends.wgpu_native import lib

    return 1e-9 * float(lib.wgpuQueueGetTimestampPeriod(device.queue._internal))


def _preference(adapter: Any) -> tuple[int, int]:
    """Real GPUs first, and of one GPU's drivers the native one."""
    kind, backend = adapter.info["adapter_type"], adapter.info["backend_type"]
    return (
        _ADAPTERS.index(kind) if kind in _ADAPTERS else len(_ADAPTERS),
        _BACKENDS.index(backend) if backend in _BACKENDS else len(_BACKENDS),
    )
