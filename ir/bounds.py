"""Which accesses of a loop kernel lie inside their memory, whatever the data: the proof that run-time checks rest on.

Every address is an Index expression, so its least and greatest value follow from the ranges of grid ids, threads and
loop variables. Where that is too wide, the conditions around the access are used: inside `if left < right` the number
right - left - 1 is not negative, so any positive multiple of it may be added to what is to be shown small. An address
that depends on data (a row picked by number) is never proved, unless the number was bound to a range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd

from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.index import Atom, Compound, Index, Variable
from tinygpt.ir.types import VectorType

Ranges = Mapping[str, tuple[int, int]]


def unproved_accesses(kernel: Kernel) -> list[Op]:
    """Loads and stores of a kernel of the gpu strategy that are not shown to stay inside their buffer or piece of
    workgroup memory, for any grid point, thread and trip."""
    ranges = {name: (0, extent - 1) for name, extent in kernel.grid.items()}
    ranges["thread"] = (0, kernel.cost["threads"] - 1)
    places = {v: (Index.of(0), int(size)) for v, size in zip(kernel.params, kernel.cost["extents"], strict=True)}
    return list(_unproved(kernel.body, ranges, [], places))


def _unproved(region: Region, ranges: Ranges, spare: Sequence[Index], places: dict[Value, tuple[Index, int]]) -> Iterator[Op]:
    """`spare` are numbers that are not negative here; `places` are pointers: where in which number of elements."""
    for op in region.ops:
        match op.name:
            case "shared":
                places[op.result] = (Index.of(0), op.attrs["size"])
            case "advance":
                if len(op.operands) == 1 and op.operands[0] in places:
                    start, size = places[op.operands[0]]
                    places[op.result] = (start + op.attrs["by"], size)
            case "load" | "store":
                if not _is_inside(op, ranges, spare, places):
                    yield op
            case "bind":
                ranges = {**ranges, op.attrs["var"]: (op.attrs["lo"], op.attrs["hi"])}
            case "for":
                low, high = Index.of(op.attrs["lo"]), Index.of(op.attrs["hi"])
                variable = Index.variable(op.attrs["var"])
                first, last = low.bounds(ranges)[0], high.bounds(ranges)[1] - 1
                if low.is_constant:
                    last -= (last - first) % op.attrs["step"]
                trips = {**ranges, op.attrs["var"]: (first, max(first, last))}
                yield from _unproved(op.regions[0], trips, [*spare, *_least(high - 1 - variable)], places)
            case "if":
                left, right = Index.of(op.attrs["left"]), Index.of(op.attrs["right"])
                holds = _least(right - 1 - left) if op.attrs["compare"] == "lt" else []
                yield from _unproved(op.regions[0], _narrowed(ranges, holds), [*spare, *holds], places)
                for inner in op.regions[1:]:
                    yield from _unproved(inner, ranges, spare, places)
            case _:
                for inner in op.regions:
                    yield from _unproved(inner, ranges, spare, places)


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
    """The ranges of variables, where `holds` are not negative: constant - variable >= 0 ends a range at the constant."""
    found = dict(ranges)
    for number in holds:
        match number.terms:
            case ((Variable(name), -1),):
                low, high = found[name]
                found[name] = (low, max(low, min(high, number.constant)))
    return found


def _is_inside(op: Op, ranges: Ranges, spare: Sequence[Index], places: Mapping[Value, tuple[Index, int]]) -> bool:
    if op.operands[0] not in places:
        return False
    start, size = places[op.operands[0]]
    moved = op.results[0] if op.name == "load" else op.operands[1]
    lanes = moved.type.lanes if isinstance(moved.type, VectorType) else 1
    at = start + op.attrs["at"]
    room = Index.of(size - lanes) - at
    return _is_never_negative(at, ranges, spare) and _is_never_negative(room, ranges, spare)


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

