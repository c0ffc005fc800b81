"""Which accesses of a loop kernel lie inside their memory, whatever the data: the proof that run-time checks rest on.

Every address is an Index expression, so its least and greatest value follow from the ranges of grid ids, threads and
loop variables. Where that is too wide, the conditions around the access are used: inside `if left < right` the number
right - left - 1 is not negative, so any positive multiple of it may be added to what is to be shown small. An address
that depends on data (a row picked by number) is never proved, unless the number was bound to a range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Atom, Compound, Index, Variable
from tinygpt.ir.types import VectorType

Ranges = Mapping[str, tuple[int, int]]
PIECES = 16  # values of a grid id that are looked at one by one


@dataclass(frozen=True)
class _Access:
    """A load or store: how far into which buffer or piece (None: at a place that depends on data), how many elements that
    has, and what holds there: the ranges of index variables, and numbers that are not negative."""

    op: Op
    memory: Value
    at: Index | None
    size: int
    ranges: Ranges
    spare: Sequence[Index]

    @property
    def lanes(self) -> int:
        moved = self.op.results[0] if self.op.name == "load" else self.op.operands[1]
        return moved.type.lanes if isinstance(moved.type, VectorType) else 1

    @property
    def is_inside(self) -> bool:
        if self.at is None:
            return False
        room = Index.of(self.size - self.lanes) - self.at
        return _is_never_negative(self.at, self.ranges, self.spare) and _is_never_negative(room, self.ranges, self.spare)


def unproved_accesses(kernel: Kernel) -> list[Op]:
    """Loads and stores of a kernel of the gpu strategy that are not shown to stay inside their buffer or piece of
    workgroup memory, for any grid point, thread and trip."""
    return [access.op for access in _of(kernel) if not access.is_inside]


def footprints(kernel: Kernel) -> list[list[tuple[int, int]]]:
    """For each buffer of a kernel of the gpu strategy, runs of elements [first, end), in order and apart, outside of which it
    touches nothing. A buffer of which every other piece is somebody else's has a run for each piece."""
    found: dict[Value, list[tuple[int, int]]] = {v: [] for v in kernel.params}
    for access in _of(kernel):
        if not access.size:
            raise CompilerBug(f"kernel {kernel.name}: nobody knows where {access.op.name} goes")
        if access.memory in found:
            inside = _runs(access, kernel.grid) if access.at is not None else [(0, access.size)]
            found[access.memory] += [(max(0, first), min(end, access.size)) for first, end in inside]
    return [_apart(found[v]) for v in kernel.params]


def read_by_number(kernel: Kernel) -> set[Value]:
    """Buffers of a kernel with an access that is not a vector at a multiple of four."""
    source: dict[Value, Value] = {v: v for v in kernel.params}
    found: set[Value] = set()
    for op in kernel.body.walk():
        if op.name == "advance" and op.operands[0] in source:
            source[op.result] = source[op.operands[0]]
            if not op.attrs["by"].divisible_by(4) or (len(op.operands) > 1 and op.attrs["scale"] % 4):
                found.add(source[op.result])
        if op.name in ("load", "store") and op.operands[0] in source:
            type = op.result.type if op.results else op.operands[1].type
            if not isinstance(type, VectorType) or not op.attrs["at"].divisible_by(4):
                found.add(source[op.operands[0]])
    return found


def _runs(access: _Access, grid: Mapping[str, int]) -> list[tuple[int, int]]:
    """The elements an access may touch, by the values of the grid id that moves it furthest."""
    assert access.at is not None
    steps = {atom.name: c for atom, c in access.at.terms if isinstance(atom, Variable) and grid.get(atom.name, PIECES + 1) <= PIECES}
    furthest = max(steps, key=lambda name: abs(steps[name]), default=None)
    low, high = access.ranges[furthest] if furthest else (0, 0)
    found = []
    for n in range(low, high + 1):
        first, last = access.at.bounds({**access.ranges, furthest: (n, n)} if furthest else access.ranges)
        found.append((first, last + access.lanes))
    return found


def _apart(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs in order, those that meet as one."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(runs):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return found


def _of(kernel: Kernel) -> Iterator[_Access]:
    ranges = {name: (0, extent - 1) for name, extent in kernel.grid.items()}
    ranges["thread"] = (0, kernel.cost["threads"] - 1)
    places = {v: (v, Index.of(0), int(size)) for v, size in zip(kernel.params, kernel.cost["extents"], strict=True)}
    return _accesses(kernel.body, ranges, [], dict(places))


def _accesses(region: Region, ranges: Ranges, spare: Sequence[Index], places: dict[Value, tuple[Value, Index | None, int]]) -> Iterator[_Access]:
    """`places` are pointers: how far into which buffer or piece, and its size."""
    for op in region.ops:
        match op.name:
            case "shared":
                places[op.result] = (op.result, Index.of(0), op.attrs["size"])
            case "advance":
                memory, start, size = places.get(op.operands[0], (op.operands[0], None, 0))
                is_known = start is not None and len(op.operands) == 1
                places[op.result] = (memory, start + op.attrs["by"] if start is not None and is_known else None, size)
            case "load" | "store":
                memory, start, size = places.get(op.operands[0], (op.operands[0], None, 0))
                yield _Access(op, memory, start + op.attrs["at"] if start is not None else None, size, ranges, spare)
            case "bind":
                ranges = {**ranges, op.attrs["var"]: (op.attrs["lo"], op.attrs["hi"])}
            case "for":
                low, high = Index.of(op.attrs["lo"]), Index.of(op.attrs["hi"])
                variable = Index.variable(op.attrs["var"])
                first, last = low.bounds(ranges)[0], high.bounds(ranges)[1] - 1
                if low.is_constant:
                    last -= (last - first) % op.attrs["step"]
                trips = {**ranges, op.attrs["var"]: (first, max(first, last))}
                yield from _accesses(op.regions[0], trips, [*spare, *_least(high - 1 - variable)], places)
            case "if":
                left, right = Index.of(op.attrs["left"]), Index.of(op.attrs["right"])
                is_below = op.attrs["compare"] == "lt"
                for inner, holds in zip(op.regions, (right - 1 - left, left - right), strict=False):
                    known = _least(holds) if is_below else []
                    yield from _accesses(inner, _narrowed(ranges, known), [*spare, *known], places)
            case _:
                for inner in op.regions:
                    yield from _accesses(inner, ranges, spare, places)


def _least(index: Index) -> list[Index]:
    """Numbers that are not negative if `index` is not: a minimum is at most each of its sides, and where all terms are
    multiples of a number, so is what they reach."""
    for atom, coefficient in index.terms:
        if isinstance(atom, Compound) and atom.op == "min" and coefficient > 0:
            rest = index - Index(((atom, coefficient),), 0)
            return [found for side in (atom.left, atom.right) for found in _least(rest + side * coefficient)]
    step = gcd(*(coefficient for _, coefficient in index.terms)) or 1
    return [index - index.constant % step]


def _narrowed(ranges: Ranges, holds: Sequence[Index]) -> Ranges:
    """The ranges of variables, where `holds` are not negative: constant - variable >= 0 ends a range at the constant, and
    variable - constant >= 0 begins it there."""
    found = dict(ranges)
    for number in holds:
        match number.terms:
            case ((Variable(name), -1),):
                low, high = found[name]
                found[name] = (low, max(low, min(high, number.constant)))
            case ((Variable(name), 1),):
                low, high = found[name]
                found[name] = (min(high, max(low, -number.constant)), high)
    return found


def _is_never_negative(index: Index, ranges: Ranges, spare: Sequence[Index]) -> bool:
    """Whether index >= 0 follows: from the ranges, or because index - c * n >= 0 for n >= 0 that are spare here."""
    low = index.bounds(ranges)[0]
    for number in spare:
        if low >= 0:
            return True
        own: dict[Atom, int] = dict(number.terms)
        factors = {c // own[atom] for atom, c in index.terms if atom in own and c % own[atom] == 0 and c // own[atom] > 0}
        for less in (index - number * factor for factor in sorted(factors)):
            if less.bounds(ranges)[0] > low:
                index, low = less, less.bounds(ranges)[0]
    return low >= 0

