"""abreast: launches of a GPU that do not wait for each other become one, their workgroups side by side.

Known as horizontal fusion (Li et al. 2022, "Automatic Horizontal Fusion for GPU Kernels"). A dispatch waits for the one
before it, and few kernels of a small model fill a GPU: the gradient of a weight can be made beside that of its input,
sums over columns beside either. What is needed soon keeps its order; a launch whose results are needed much later waits
for one that leaves room on the device and whose workgroups have as many threads. A workgroup finds by its number whose
work it does, so that barriers stay uniform. No sum changes its order."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from tinygpt.ir.bounds import footprints, read_by_number, unproved_accesses
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Kernel, Location, Module, Op, Region, Rewriter, Value
from tinygpt.ir.index import Index
from tinygpt.ir.plan import grid_points
from tinygpt.ir.types import DTYPE_BYTES, PointerType
from tinygpt.lowering.passes import Pass, register

WIDEST = 4  # launches that run side by side
SOON = 6  # launches within which a result is needed soon
LATEST = 20  # launches that one may be put off
KEPT = 128 << 20  # bytes times launches: what a launch reads stays alive until it runs
ROOM = 48 << 10  # threads of a launch that leaves room beside it; larger ones are joined by what has waited for long
POINT = "g"  # the grid id of launches side by side

Run = tuple[int, int]  # elements [first, end)
Slot = tuple[Value, int | None]  # a binding: a buffer, from where on if others bind it elsewhere


@register
@dataclass(frozen=True)
class Abreast(Pass):
    """On a GPU, run launches that are independent of each other side by side, as one."""

    widest: int = WIDEST
    name = "abreast"
    level = "loop"

    def run(self, module: Module, caps: Caps) -> Module:
        if caps.strategy != "gpu" or self.widest < 2:
            return module
        library = Library(module, caps)
        functions = {name: library.arranged(f, self.widest) for name, f in module.functions.items()}
        launched = {op.attrs["kernel"] for f in functions.values() for op in f.body.ops if op.name == "launch"}
        return replace(module, functions=functions, kernels={name: k for name, k in library.kernels.items() if name in launched})


@dataclass(eq=False)
class Work:
    """One launch: its number, what it touches of each buffer, how long it may wait, and in which step it runs."""

    number: int
    op: Op
    kernel: Kernel
    touched: list[tuple[Value, str, list[Run]]]
    by_number: set[Value]  # buffers that it does not read and write in vectors alone
    patience: int  # launches
    after: set[Work] = field(default_factory=set)  # what it waits for
    before: set[Work] = field(default_factory=set)  # what waits for it
    step: int = -1

    @property
    def threads(self) -> int:
        return grid_points(self.kernel) * int(self.kernel.cost["threads"])

    @property
    def is_needed_soon(self) -> bool:
        return any(v.number - self.number <= SOON for v in self.before)


class Library:
    """The kernels of a module, and those that are made of several."""

    def __init__(self, module: Module, caps: Caps) -> None:
        self.caps = caps
        self.kernels = dict(module.kernels)
        self.weights = {p.value for p in module.parameters.values()}
        self.footprints: dict[str, list[list[Run]]] = {}
        self.by_number: dict[str, set[Value]] = {}
        self.bounded: dict[str, bool] = {}
        self.made: dict[object, str] = {}

    # -- which launches run side by side
    def arranged(self, function: Function, widest: int) -> Function:
        """The function with those of its launches as one that run side by side."""
        launches = [op for op in function.body.ops if op.name == "launch"]
        works = [self.work(n, op) for n, op in enumerate(launches)]
        connect(works)
        steps: list[list[Work]] = []
        waiting: list[Work] = []
        for w in works:
            for v in [v for v in waiting if v in w.after or w.number - v.number > v.patience]:
                if v in waiting:
                    waiting.remove(v)
                    self.run(v, steps, waiting, widest)
            if w.is_needed_soon or not w.patience:
                self.run(w, steps, waiting, widest)
            else:
                waiting.append(w)
        while waiting:
            self.run(waiting.pop(0), steps, waiting, widest)
        others = [op for op in function.body.ops if op.name != "launch"]
        made = [op for op in others if op.name == "buffer"]
        return function.with_ops([*made, *map(self.launch, steps), *(op for op in others if op.name != "buffer")])

    def work(self, number: int, op: Op) -> Work:
        kernel = self.kernels[op.attrs["kernel"]]
        if kernel.name not in self.footprints:
            self.footprints[kernel.name], self.by_number[kernel.name] = footprints(kernel), read_by_number(kernel)
        runs = [[(a + start, b + start) for a, b in found] for found, start in zip(self.footprints[kernel.name], op.attrs["offsets"], strict=True)]
        numbers = {v for v, p in zip(op.operands, kernel.params, strict=True) if p in self.by_number[kernel.name]}
        read = sum(v.type.bytes for v in {v for v, access in zip(op.operands, kernel.access, strict=True) if access == "in"} - self.weights)
        return Work(number, op, kernel, list(zip(op.operands, kernel.access, runs, strict=True)), numbers, min(LATEST, KEPT // max(1, read)))

    def run(self, w: Work, steps: list[list[Work]], waiting: list[Work], widest: int) -> None:
        """Run a launch after all that run already, or beside the last of them, and beside it what has waited for that."""
        last = len(steps) - 1
        if steps and len(steps[-1]) < widest and all(v.step < last for v in w.after) and self.together([*steps[-1], w]):
            group = steps[-1]
        else:
            group, last = [], last + 1
            steps.append(group)
        group.append(w)
        w.step = last
        for v in list(waiting):
            has_room = sum(u.threads for u in group) < ROOM or 2 * (w.number - v.number) > v.patience
            if has_room and len(group) < widest and all(0 <= u.step < last for u in v.after) and self.together([*group, v]):
                waiting.remove(v)
                group.append(v)
                v.step = last

    def together(self, group: Sequence[Work]) -> bool:
        """Whether launches may be one: independent, with workgroups of one size, and within a device's limits."""
        sides = Sides(group, self.weights)
        kernels = [w.kernel for w in group]
        if len({k.cost["threads"] for k in kernels}) > 1 or any(conflict(a, b) for n, a in enumerate(group) for b in group[n + 1 :]):
            return False
        if sum(map(grid_points, kernels)) > (self.caps.grid_limit or 1 << 31) or sides.is_mixed:
            return False
        if self.caps.bindings and len(sides.spans) > self.caps.bindings:
            return False
        most = max(DTYPE_BYTES[v.type.dtype] * (end - start) for (v, _), (start, end) in sides.spans.items())
        if self.caps.binding_bytes and most > self.caps.binding_bytes:
            return False
        if self.caps.workgroup_bytes and shared_bytes(kernels) > self.caps.workgroup_bytes:
            return False
        return len({self.is_bounded(k) for k in kernels}) == 1

    def is_bounded(self, kernel: Kernel) -> bool:
        """Whether all accesses of a kernel are proved: it keeps what a runtime leaves out for such kernels."""
        if kernel.name not in self.bounded:
            self.bounded[kernel.name] = not unproved_accesses(kernel)
        return self.bounded[kernel.name]

    # -- one launch of several
    def launch(self, group: Sequence[Work]) -> Op:
        """The launch of a group. One alone changes where it binds a buffer more than once."""
        sides, op = Sides(group, self.weights), group[0].op
        if len(group) == 1 and not (sides.is_shared and self.together(group)):
            return op
        numbers = {slot: n for n, slot in enumerate(sides.spans)}
        places = tuple(tuple(numbers[slot] for slot in slots) for slots in sides.slots)
        shifts = tuple(
            tuple(offset - sides.spans[slot][0] for slot, offset in zip(slots, w.op.attrs["offsets"], strict=True)) for w, slots in zip(group, sides.slots, strict=True)
        )
        extents = tuple(end - start for start, end in sides.spans.values())
        key = (tuple(w.kernel.name for w in group), places, shifts, extents)
        if key not in self.made:
            words = "_".join(w.kernel.name.partition("_")[2] or w.kernel.name for w in group)
            name = next(name for n in count(len(self.made)) if (name := f"a{n}_{words}") not in self.kernels)
            self.kernels[name] = side_by_side(name, [w.kernel for w in group], sides.access, places, shifts, extents)
            self.made[key] = name
        attrs = {**op.attrs, "kernel": self.made[key], "offsets": tuple(start for start, _ in sides.spans.values())}
        return replace(op, operands=tuple(v for v, _ in sides.spans), attrs=attrs, loc=joined([w.op.loc for w in group]))


class Sides:
    """The bindings of launches side by side: what of which buffer, and how it is accessed.

    A buffer is bound once, as a device does not bind what it writes twice. Weights that are only read are bound where each
    launch reads them: how far they lie apart is not the same for all layers, and layers share kernels."""

    def __init__(self, group: Sequence[Work], weights: Container[Value]) -> None:
        self.spans: dict[Slot, Run] = {}
        self.slots: list[list[Slot]] = []  # of the operands of each launch
        words: dict[Slot, set[str]] = {}
        forms: dict[Slot, set[bool]] = {}
        for w in group:
            self.slots.append([])
            for v, access, offset, size in zip(w.op.operands, w.kernel.access, w.op.attrs["offsets"], w.kernel.cost["extents"], strict=True):
                slot = (v, offset) if access == "in" and v in weights else (v, None)
                start, end = self.spans.get(slot, (offset, offset))
                self.spans[slot] = (min(start, offset), max(end, offset + size))
                words.setdefault(slot, set()).add(access)
                forms.setdefault(slot, set()).add(v in w.by_number)
                self.slots[-1].append(slot)
        self.access = tuple("inout" if "inout" in found else next(iter(found)) for found in words.values())
        read = {v for (v, _), found in words.items() if "in" in found}
        # What a device forbids: a buffer that is read and written; and what it makes slow: vectors bound as numbers.
        self.is_mixed = any(v in read and found != {"in"} for (v, _), found in words.items()) or any(len(found) > 1 for found in forms.values())

    @property
    def is_shared(self) -> bool:
        """Whether a binding serves several operands."""
        return len(self.spans) < sum(map(len, self.slots))


def joined(locations: Sequence[Location | None]) -> Location | None:
    """Where launches side by side come from: the first place, and the others behind it."""
    found = list(dict.fromkeys(x for x in locations if x))
    return replace(found[0], text=" | ".join([found[0].text, *map(str, found[1:])])) if found else None


def connect(works: Sequence[Work]) -> None:
    """Find out which launches wait for which."""
    touching: dict[Value, list[Work]] = {}
    for w in works:
        for v, _, _ in w.touched:
            for earlier in touching.setdefault(v, []):
                if earlier is not w and conflict(earlier, w):
                    w.after.add(earlier)
                    earlier.before.add(w)
            touching[v].append(w)


def conflict(a: Work, b: Work) -> bool:
    """Whether one of two launches writes what the other touches."""
    return any(
        v is u and (how != "in" or too != "in") and any(s < q and p < e for s, e in runs for p, q in others)
        for v, how, runs in a.touched
        for u, too, others in b.touched
    )


def shared_bytes(kernels: Sequence[Kernel]) -> int:
    """Workgroup memory that kernels side by side need: pieces of the same lanes lie over each other."""
    most: dict[int, int] = {}
    for kernel in kernels:
        for op in kernel.body.walk():
            if op.name == "shared":
                most[op.attrs["lanes"]] = max(most.get(op.attrs["lanes"], 0), op.attrs["offset"] + op.attrs["size"])
    return 4 * sum(most.values())


def side_by_side(
    name: str, kernels: Sequence[Kernel], access: Sequence[str], places: Sequence[Sequence[int]], shifts: Sequence[Sequence[int]], extents: Sequence[int]
) -> Kernel:
    """One kernel of several: the first workgroups do the work of the first, the next that of the second, and so on.

    `places` says for each kernel which buffer each of its parameters is, `shifts` how many elements into it."""
    hints = {i: p.hint for k, at in zip(kernels, places, strict=True) for i, p in zip(at, k.params, strict=True)}
    types = {i: p.type for k, at in zip(kernels, places, strict=True) for i, p in zip(at, k.params, strict=True)}
    params = [Value(types[i], hints[i]) for i in range(len(access))]
    first, bodies = 0, []
    for number, (kernel, at, by) in enumerate(zip(kernels, places, shifts, strict=True)):
        bodies.append((first, section(number, kernel, first, [params[i] for i in at], by)))
        first += grid_points(kernel)
    ops: tuple[Op, ...] = bodies[-1][1]
    for (_, own), (start, _) in zip(reversed(bodies[:-1]), reversed(bodies[1:]), strict=True):
        below = {"left": Index.variable(POINT), "compare": "lt", "right": Index.of(start)}
        ops = (Op("if", (), (), below, (Region((), own), Region((), ops))),)
    threads = kernels[0].cost["threads"]
    cost = {"threads": threads, "extents": tuple(extents), "sides": tuple(k.name for k in kernels)}
    return Kernel(name, Region(tuple(params), ops), tuple(access), {POINT: first}, cost=cost, level="loop", of=" | ".join(k.of for k in kernels))


def section(number: int, kernel: Kernel, first: int, params: Sequence[Value], shifts: Sequence[int]) -> tuple[Op, ...]:
    """A copy of a kernel's program as part of another: its grid ids follow from the workgroup's number, less `first`."""
    names = {op.attrs["var"]: f"{op.attrs['var']}_{number}" for op in kernel.body.walk() if "var" in op.attrs}
    indices: dict[str, Index] = {old: Index.variable(new) for old, new in names.items()}
    point, inner = Index.variable(POINT) - first, 1
    for name, extent in reversed(list(kernel.grid.items())):
        indices[name] = point // inner % extent if inner * extent < grid_points(kernel) else point // inner
        inner *= extent

    def renamed(op: Op) -> Op:
        attrs = {k: v.substitute(indices) if isinstance(v, Index) else names[v] if k == "var" else v for k, v in op.attrs.items()}
        return replace(op, attrs=attrs, regions=tuple(replace(r, ops=tuple(map(renamed, r.ops))) for r in op.regions))

    copy = Rewriter()
    for old, new, shift in zip(kernel.params, params, shifts, strict=True):
        copy.mapping[old] = new
        if shift:
            moved = Value(PointerType(new.type.dtype, "buffer"), new.hint)
            copy.ops.append(Op("advance", (new,), (moved,), {"by": Index.of(shift), "scale": 1}))
            copy.mapping[old] = moved
    for op in kernel.body.ops:
        copy.clone(renamed(op))
    return tuple(copy.ops)
