"""The memory plan: buffers get pools and offsets from their live ranges, launches get barriers from their hazards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Kernel, Module, Op, Parameter, Value
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.plan import Buffer, Entry, Launch, Plan
from tinygpt.ir.types import TensorType
from tinygpt.lowering.optimizer import POOLS, Layout

STATE, WORK = "state", "work"  # of more pools of a kind, the next are state2, work2, …
ALWAYS = 1 << 30  # later than any launch
GRADIENTS = "gradients"  # the flat result or input that hosts see as one gradient per weight


@dataclass
class Lifetime:
    """A buffer: alive from launch `start` to launch `end`, both inclusive, and where it is put.

    `tail` are buffers that lie right behind it, because one tensor runs through all; `bytes` counts them."""

    value: Value
    bytes: int
    start: int
    end: int
    pool: str = ""
    offset: int = -1
    tail: tuple[Lifetime, ...] = ()

    @property
    def members(self) -> tuple[Lifetime, ...]:
        """The buffer and those behind it, each with its own place."""
        at, found = self.offset, []
        for x in (self, *self.tail):
            found.append(Lifetime(x.value, x.value.type.bytes, self.start, self.end, self.pool, at))
            at += x.value.type.bytes
        return tuple(found)

    @property
    def buffer(self) -> Buffer:
        return Buffer(self.pool, self.offset, self.value.type)


def plan(module: Module, caps: Caps) -> Plan:
    """Place everything a module needs. Raises UserError if it does not fit the device's memory."""
    apart = conflicts(module) if caps.exclusive_pools else {}
    pools = {STATE: 0, WORK: 0}
    chains = neighbours(module)
    always = [Lifetime(p.value, p.type.bytes, -1, ALWAYS) for p in module.parameters.values()]
    state = place(joined(always, chains, {p.name: p.value for p in module.parameters.values()}), STATE, apart, caps, pools, {})
    entries, live, unshared = {}, 0, 0
    for f in module.functions.values():
        lifetimes = live_ranges(f)
        named = named_values(f)
        blocks = joined(lifetimes, chains, named)
        names = {v: f"buffer {name} of {f.name}" for name, v in named.items()}
        places = place(sorted(blocks, key=lambda x: (-x.bytes, x.start)), WORK, apart, caps, pools, names)
        live = max(live, peak(lifetimes))
        unshared = max(unshared, sum(_aligned(x.bytes, caps.offset_alignment) for x in lifetimes))
        entries[f.name] = entry(f, state | places, module)
    used = {launch.kernel for e in entries.values() for launch in e.launches}
    kernels = {name: k for name, k in module.kernels.items() if name in used}
    result = Plan(pools, _parameters(module, state), entries, kernels, live, unshared)
    if caps.memory_bytes and sum(pools.values()) > caps.memory_bytes:
        raise UserError(
            f"{module.name} needs {sum(pools.values()):,} bytes of memory, {caps.name} has {caps.memory_bytes:,}",
            hint="compile for wasm64 or cpp, or take a smaller batch, context or model",
        )
    return result


def live_ranges(function: Function) -> list[Lifetime]:
    """When each buffer of a function is first and last touched; inputs live from the start, results to the end."""
    found = {v: Lifetime(v, v.type.bytes, -1, -1) for v in function.params}
    buffers = {op.results[0] for op in function.body.ops if op.name == "buffer"}
    at = 0
    for op in function.body.ops:
        if op.name != "launch":
            continue
        for v in op.operands:
            if v in found:
                found[v].end = at
            elif v in buffers:
                found[v] = Lifetime(v, v.type.bytes, at, at)
        at += 1
    shaped = reshaped(function)
    for v in (shaped.get(v, v) for v in function.body.yields):
        found.setdefault(v, Lifetime(v, v.type.bytes, 0, at)).end = at
    return list(found.values())


def neighbours(module: Module) -> list[list[str]]:
    """Names of flat arrays, each list in the order in which they must lie one behind the other: a weight is cut there."""
    layout = Layout.of(module)
    cuts = [[n for n, _, _ in layout.parts(name)] for name in layout.places]
    return [[layout.names(stem)[n] for n in numbers] for numbers in cuts if len(numbers) > 1 for stem in (*POOLS, GRADIENTS)]


def named_values(function: Function) -> dict[str, Value]:
    """The buffers that hosts see, by the names they see."""
    shaped = reshaped(function)
    results = {n: shaped.get(v, v) for n, v in zip(function.result_names, function.body.yields, strict=True)}
    return {v.hint: v for v in function.params} | results


def joined(lifetimes: Sequence[Lifetime], chains: Sequence[Sequence[str]], names: Mapping[str, Value]) -> list[Lifetime]:
    """The lifetimes, those of a chain as one; a chain may go on where another ends."""
    found = {x.value: x for x in lifetimes}
    for first, *others in ([names[n] for n in chain] for chain in chains if all(n in names for n in chain)):
        head = next(x for x in found.values() if first in (x.value, *(t.value for t in x.tail)))
        tail = [found.pop(v) for v in others]
        block = [head, *tail]
        found[head.value] = replace(
            head, bytes=sum(x.bytes for x in block), start=min(x.start for x in block), end=max(x.end for x in block), tail=(*head.tail, *tail)
        )
    return list(found.values())


def reshaped(function: Function) -> dict[Value, Value]:
    """Results that are a buffer under another shape, and that buffer."""
    return {op.results[0]: op.operands[0] for op in function.body.ops if op.name == "reshape"}


def conflicts(module: Module) -> dict[Value, set[Value]]:
    """For each buffer, those that must be in other pools: a launch reads the one and writes the other."""
    found: dict[Value, set[Value]] = {}
    for function in module.functions.values():
        for op in function.body.ops:
            if op.name != "launch":
                continue
            access = module.kernels[op.attrs["kernel"]].access
            read = {v for v, a in zip(op.operands, access, strict=True) if a == "in"}
            written = {v for v, a in zip(op.operands, access, strict=True) if a != "in"}
            if read & written:
                raise CompilerBug(f"{op.attrs['kernel']} reads a part of a buffer while it writes another: the device binds it for one or the other")
            for v in read:
                found.setdefault(v, set()).update(written)
            for v in written:
                found.setdefault(v, set()).update(read)
    return found


def place(
    lifetimes: Sequence[Lifetime], stem: str, apart: Mapping[Value, set[Value]], caps: Caps, pools: dict[str, int], names: Mapping[Value, str]
) -> dict[Value, Buffer]:
    """Greedy in the order given (largest first is Pisarchyk & Lee 2020, section 5.2): each buffer at the lowest gap that
    is free for as long as it lives, in the first pool that may hold it. Notes in `pools` how large each has to be.

    Raises UserError for a buffer that no pool may hold, by its name if hosts know it by one."""
    placed: dict[str, list[Lifetime]] = {stem: []}
    for x in lifetimes:
        if caps.buffer_bytes and x.bytes > caps.buffer_bytes:
            what = names.get(x.value, f"buffer {x.value.hint}" if x.value.hint else "an activation")
            raise UserError(
                f"{what} ({x.value.type}) has {x.bytes:,} bytes, a buffer of {caps.name} at most {caps.buffer_bytes:,}",
                hint="take a smaller batch, context or model, or a profile with larger buffers",
            )
        hostile = set().union(*(apart.get(m.value, ()) for m in x.members))
        if any(m.value in hostile for m in x.members):
            raise CompilerBug(f"{x.value.hint} and what must lie behind it are in one pool, and a launch reads the one while it writes the other")
        for number in range(len(placed) + 1):
            x.pool = stem if number == 0 else f"{stem}{number + 1}"
            members = placed.setdefault(x.pool, [])
            x.offset = lowest_gap(x, members, caps.offset_alignment)
            fits = not caps.buffer_bytes or x.offset + x.bytes <= caps.buffer_bytes
            if fits and not any(m.value in hostile for m in members):
                break
        members += x.members
        pools[x.pool] = max(pools.get(x.pool, 0), _aligned(x.offset + x.bytes, caps.offset_alignment))
    return {m.value: m.buffer for members in placed.values() for m in members}


def lowest_gap(x: Lifetime, members: Sequence[Lifetime], align: int) -> int:
    """The first offset at which x overlaps no buffer that lives at the same time."""
    offset = 0
    for other in sorted((p for p in members if p.start <= x.end and x.start <= p.end), key=lambda p: p.offset):
        if offset + x.bytes <= other.offset:
            break
        offset = max(offset, _aligned(other.offset + other.bytes, align))
    return offset


def peak(lifetimes: Sequence[Lifetime]) -> int:
    """The most bytes that are alive at once."""
    return max((sum(x.bytes for x in lifetimes if x.start <= t <= x.end) for t in {x.start for x in lifetimes}), default=0)


def entry(function: Function, places: dict[Value, Buffer], module: Module) -> Entry:
    """The launches of a function, with a barrier before each one that touches what ran since the last barrier."""
    launches: list[Launch] = []
    written: list[tuple[str, int, int]] = []
    read: list[tuple[str, int, int]] = []
    for op in function.body.ops:
        if op.name != "launch":
            continue
        kernel = module.kernels[op.attrs["kernel"]]
        buffers = launch_buffers(op, kernel, places)
        spans = [(b.pool, b.offset, b.end) for b in buffers]
        reads = [s for s, a in zip(spans, kernel.access, strict=True) if a != "out"]
        writes = [s for s, a in zip(spans, kernel.access, strict=True) if a != "in"]
        barrier = _overlap(reads, written) or _overlap(writes, written) or _overlap(writes, read)
        if barrier:
            written, read = [], []
        written += writes
        read += reads
        launches.append(Launch(kernel.name, tuple(buffers), barrier, str(op.loc or "")))
    inputs = [slot for v in function.params for slot in _slots(v.hint, places[v], module)]
    shaped = reshaped(function)
    results = [replace(places[shaped.get(v, v)], type=v.type) for v in function.body.yields]
    outputs = [slot for n, b in zip(function.result_names, results, strict=True) for slot in _slots(n, b, module)]
    return Entry(function.name, tuple(inputs), tuple(outputs), tuple(launches))


def launch_buffers(op: Op, kernel: Kernel, places: dict[Value, Buffer]) -> list[Buffer]:
    """What each parameter of the kernel is: the part of a buffer from the launch's offset on, as long as the kernel reads."""
    found = []
    for v, offset, type in zip(op.operands, op.attrs["offsets"], kernel_types(kernel), strict=True):
        whole = places[v]
        found.append(Buffer(whole.pool, whole.offset + offset * (whole.type.bytes // max(1, whole.type.size)), type))
    return found


def kernel_types(kernel: Kernel) -> list[TensorType]:
    """How many elements of each buffer a kernel may touch."""
    sizes = kernel.cost["extents"] if kernel.level == "loop" else [v.type.size for v in kernel.params]
    return [TensorType(v.type.dtype, (n,)) for v, n in zip(kernel.params, sizes, strict=True)]


def _overlap(a: Sequence[tuple[str, int, int]], b: Sequence[tuple[str, int, int]]) -> bool:
    return any(p == q and s < v and u < t for p, s, t in a for q, u, v in b)


def _slots(name: str, buffer: Buffer, module: Module) -> list[tuple[str, Buffer]]:
    """A function's result or input as hosts see it: flat gradients as one slot for each weight."""
    layout = Layout.of(module)
    if name not in layout.names(GRADIENTS):
        return [(name, buffer)]
    start, stop = layout.pieces[layout.names(GRADIENTS).index(name)]
    inside = {n: (o - start, s) for n, (o, s) in layout.places.items() if start <= o < stop}
    return [(f"grad:{n}", Buffer(buffer.pool, buffer.offset + 4 * o, TensorType("f32", s))) for n, (o, s) in inside.items()]


def _parameters(module: Module, state: dict[Value, Buffer]) -> dict[str, tuple[Parameter, Buffer]]:
    """Weights by their PyTorch names, then their moments."""
    found, layout = {}, Layout.of(module)
    pools = {p.name: state[p.value] for p in module.parameters.values()}
    for pool, suffix, role in (("weights", "", "param"), ("adam.m", ".m", "state"), ("adam.v", ".v", "state")):
        for name, (offset, shape) in layout.places.items():
            type = TensorType("f32", shape)
            init = tuple(module.attrs["inits"][name]) if role == "param" else ("constant", 0.0)
            piece = layout.parts(name)[0][0]
            flat = pools[layout.names(pool)[piece]]
            buffer = Buffer(flat.pool, flat.offset + 4 * (offset - layout.pieces[piece][0]), type)
            found[name + suffix] = (Parameter(name + suffix, Value(type, name), role, init), buffer)
    return found


def _aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align


