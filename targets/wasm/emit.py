"""A plan as one WebAssembly module: its kernels, a function for each entry that runs its launches, and what threads
need.

Memory (imported as env.memory, sized by the host from the manifest, never grown): a page of words that threads meet
at, then the pools, then scratch memory for each thread (which 64-bit modules have in a 32-bit memory of each
instance's own). Every thread instantiates the module on the same memory and does its share of each launch: thread t
of n the grid points from points * t / n to points * (t + 1) / n.

Exports:
- run(entry, thread, threads): an entry's launches, as one thread of several; returns when all have finished;
- NAME(thread, threads): the same for one entry, without the meeting at its end;
and with threads also
- serve(thread, threads): runs whatever entries are posted, until it is told to stop (the loop of a worker);
- post(entry): lets the workers run an entry, or stop (-1); step(entry, threads): post, and run as thread 0;
- fail(): after a trap in one thread, makes the others trap too instead of waiting for it for ever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.plan import Entry, Launch, Plan, grid_points
from tinygpt.targets.wasm import threads as meeting
from tinygpt.targets.wasm.assembler import (
    PAGE, Export, Function, ImportedMemory, Instruction, MemoryType, Module, Variable, encode_module,
)  # fmt: skip
from tinygpt.targets.wasm.printer import FunctionTable, print_kernel, scratch_bytes
from tinygpt.targets.wasm.profiles import MULTI_MEMORY, THREADS, address_space

MODULE_FILE = "model.wasm"
MAX_THREADS = 64
_ALIGNMENT = 64  # of pools and scratch: a cache line
_HEADER_BYTES = 1024
_THREAD, _THREADS = Variable("thread", "i32"), Variable("threads", "i32")


@dataclass(frozen=True)
class Layout:
    """Where things are in memory, in bytes. `scratch_stride` is one thread's scratch memory, behind the pools; or
    `private` is, in a memory of its own that every instance brings along."""

    pools: Mapping[str, int]
    scratch: int
    scratch_stride: int
    private: int

    def pages(self, threads: int) -> int:
        """Pages of 64 KiB for so many threads."""
        return -(-(self.scratch + threads * self.scratch_stride) // PAGE)


def emit(plan: Plan, manifest: Mapping[str, Any], caps: Caps, strict: bool) -> dict[str, bytes]:
    """The bundle's files by name. Raises UserError for a plan that is larger than the profile's memory."""
    return {MODULE_FILE: encode_module(build_module(plan, caps, str(manifest["name"])))}


def target_record(plan: Plan, caps: Caps, strict: bool) -> dict[str, Any]:
    """manifest["target"]: what a host must provide, and where it finds pools and entries."""
    layout = lay_out(plan, caps)
    return {
        "name": f"wasm{caps.address_bits}",
        "profile": caps.name,
        "features": sorted(caps.features),
        "module": MODULE_FILE,
        "address_bits": caps.address_bits,
        "shared": THREADS in caps.features,
        "max_threads": _max_threads(layout, caps),
        "pools": dict(layout.pools),
        "scratch": layout.scratch,
        "scratch_stride": layout.scratch_stride,
        "entries": list(plan.entries),
    }


def lay_out(plan: Plan, caps: Caps) -> Layout:
    """Place the pools one behind the other, then the threads' scratch memory. Raises UserError if they do not fit."""
    end = _HEADER_BYTES
    pools: dict[str, int] = {}
    for name, size in plan.pools.items():
        pools[name] = end
        end = _aligned(end + size)
    needed = _aligned(max(map(scratch_bytes, plan.kernels.values()), default=0))
    private = address_space(caps, "scratch").memory > 0
    layout = Layout(pools, end, 0 if private else needed, needed if private else 0)
    if layout.pages(1) * PAGE > caps.memory_bytes:
        raise _too_large(layout.pages(1) * PAGE, caps)
    return layout


def build_module(plan: Plan, caps: Caps, name: str) -> Module:
    """The module of a plan; `wat.print_module` shows it, `assembler.encode_module` makes it bytes."""
    layout = lay_out(plan, caps)
    table = FunctionTable()
    used = dict.fromkeys(launch.kernel for entry in plan.entries.values() for launch in entry.launches)
    kernels = {key: print_kernel(plan.kernels[key], caps, table) for key in used}
    shared = THREADS in caps.features
    address = f"i{caps.address_bits}"
    barrier = table.add(meeting.barrier(address)) if shared else None
    share = table.add(_share(caps))
    entries = [table.add(_entry(plan, e, kernels, layout, caps, barrier, share)) for e in plan.entries.values()]
    run = table.add(_run(entries, barrier))
    exports = {"run": run, **dict(zip(plan.entries, entries, strict=True))}
    if shared:
        post = table.add(meeting.post(address))
        exports |= {"post": post, "step": table.add(meeting.step(post, run))}
        exports |= {"serve": table.add(meeting.serve(address, run)), "fail": table.add(meeting.fail(address))}
    if len(exports) < len(entries) + (5 if shared else 1):
        raise CompilerBug(f"wasm: an entry has the name of one of the module's own exports: {sorted(plan.entries)}")
    most = layout.pages(_max_threads(layout, caps) if shared else 1)
    memory = MemoryType(layout.pages(1), most, shared, address)
    pages = -(-layout.private // PAGE)
    return Module(
        name=name,
        imports=(ImportedMemory("env", "memory", memory),),
        memories=(MemoryType(pages, pages, False, "i32"),) if MULTI_MEMORY in caps.features else (),
        functions=tuple(table.functions),
        exports=tuple(Export(exported, function) for exported, function in exports.items()),
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _max_threads(layout: Layout, caps: Caps) -> int:
    """How many threads' scratch memory has room, or 1 without threads."""
    if THREADS not in caps.features:
        return 1
    room = caps.memory_bytes - layout.scratch
    return max(1, min(MAX_THREADS, room // layout.scratch_stride if layout.scratch_stride else MAX_THREADS))


def _too_large(needed: int, caps: Caps) -> UserError:
    limit = f"{needed:,} bytes, {caps.name} addresses at most {caps.memory_bytes:,}"
    if caps.address_bits == 32:
        return UserError(f"the model needs {limit}", hint="compile it with --target wasm64, or with a smaller --batch")
    return UserError(f"the model needs {limit}", hint="compile it with --target cpp, or with a smaller --batch")


def _share(caps: Caps) -> Function:
    """share(points, part, parts) -> points * part / parts, without overflow."""
    wide: list[Instruction] = []
    for local in range(3):
        wide += [("local.get", local), ("i64.extend_i32_u",)]
        wide += [("i64.mul",)] if local == 1 else []
    narrow: list[Instruction] = [("i32.wrap_i64",)] if caps.address_bits == 32 else []
    parameters = (Variable("points", "i32"), Variable("part", "i32"), Variable("parts", "i32"))
    body = (*wide, ("i64.div_u",), *narrow)
    return Function("share", parameters, (f"i{caps.address_bits}",), (), body, "first grid point of a thread's part")


def _entry(
    plan: Plan, entry: Entry, kernels: Mapping[str, int], layout: Layout, caps: Caps, barrier: int | None, share: int
) -> Function:
    """One entry's launches, in order, as thread `thread` of `threads`."""
    space = address_space(caps, "scratch")
    body: list[Instruction] = []
    if not space.memory:
        widen: list[Instruction] = [("i64.extend_i32_u",)] if space.type == "i64" else []
        body += [("local.get", 0), *widen, (f"{space.type}.const", layout.scratch_stride), (f"{space.type}.mul",)]
        body += [(f"{space.type}.const", _as_signed(layout.scratch, caps)), (f"{space.type}.add",), ("local.set", 2)]
    for launch in entry.launches:
        if launch.barrier and barrier is not None:
            body += [("local.get", 1), ("call", barrier)]
        body += _launch(plan, launch, layout, caps, share)
        body.append(("call", kernels[launch.kernel]))
    signature = (
        f"{entry.name}: {', '.join(name for name, _ in entry.inputs)} -> {', '.join(name for name, _ in entry.outputs)}"
    )
    return Function(
        f"entry.{entry.name}", (_THREAD, _THREADS), (), (Variable("scratch", space.type),), tuple(body), signature
    )


def _launch(plan: Plan, launch: Launch, layout: Layout, caps: Caps, share: int) -> list[Instruction]:
    """The arguments of a kernel: the addresses of its buffers, scratch memory, and the thread's share of the grid."""
    points = grid_points(plan.kernels[launch.kernel])
    if points >= 1 << 31:
        raise CompilerBug(f"wasm: a launch of {launch.kernel} has {points} grid points, which no 32-bit number counts")
    address = f"i{caps.address_bits}"
    body: list[Instruction] = [("note", launch.of)] if launch.of else []
    for buffer in launch.buffers:
        body.append((f"{address}.const", _as_signed(layout.pools[buffer.pool] + buffer.offset, caps)))
    body.append(("local.get", 2))
    for part in ((), (("i32.const", 1), ("i32.add",))):
        body += [("i32.const", points), ("local.get", 0), *part, ("local.get", 1), ("call", share)]
    return body


def _as_signed(value: int, caps: Caps) -> int:
    """An address as the signed number a constant wants."""
    half = 1 << (caps.address_bits - 1)
    return value - 2 * half if value >= half else value


def _run(entries: list[int], barrier: int | None) -> Function:
    """run(entry, thread, threads): the entry by its number, then the meeting that ends it."""
    body: list[Instruction] = [("block",)] * (len(entries) + 2)
    body += [("local.get", 0), ("br_table", tuple(range(len(entries))), len(entries)), ("end",)]
    for number, entry in enumerate(entries):
        body += [("local.get", 1), ("local.get", 2), ("call", entry), ("br", len(entries) - number), ("end",)]
    body += [("unreachable",), ("end",)]
    body += [("local.get", 2), ("call", barrier)] if barrier is not None else []
    return Function("run", (Variable("entry", "i32"), _THREAD, _THREADS), (), (), tuple(body))
