"""chunk: where a device cannot bind a value at once, the value is made and read in stretches of one of its axes.

The logits of a large vocabulary are made for some rows at a time, and with them what is made of these rows: losses, the
gradient of the logits, a stretch of the gradient of the rows, a term of the gradient of the head. A weight that the
layout cut is read part by part. How an op can be computed in stretches is the op's own to say (`GraphOp.axes`); here it
is decided which axis of which value is cut, where, and in which order the stretches are made: one after the other with
all that follows from them, so that the next one may lie where the last one did. The order of every sum is fixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Op, Value, uses, without_dead_ops
from tinygpt.ir.errors import UserError
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.ir.registry import Axes
from tinygpt.lowering.passes import Pass, register
from tinygpt.lowering.schedule import even_blocks

TILE = 64  # indices: a stretch of a multiple of them begins at an aligned address, and at the edge of a product's tile
Bounds = tuple[int, ...]  # ascending: a stretch lies between two neighbours


@register
@dataclass(frozen=True)
class Chunk(Pass):
    """Where bindings are limited, make values that are too large for one in stretches, with what reads them."""

    name = "chunk"

    def run(self, module: Module, caps: Caps) -> Module:
        return module.map_functions(lambda f: Chunking(f, caps).chunked()) if caps.binding_bytes else module


@dataclass(frozen=True)
class Pieces:
    """A value as its stretches along an axis. `family` numbers the cut they come from; -1: parts of weights, which live on."""

    axis: int
    bounds: Bounds
    values: tuple[Value, ...]
    family: int


@dataclass(frozen=True)
class Cut:
    """Where one of the index ranges of an op is cut, and for the sake of which family."""

    bounds: Bounds
    family: int


class Chunking:
    """The rewriting of one function."""

    def __init__(self, function: Function, caps: Caps) -> None:
        self.function, self.caps = function, caps
        self.made = {r: op for op in function.body.ops for r in op.results}
        self.users = uses(function.body)
        self.results = {*function.body.yields, *function.updates.values()}
        self.axes = {op: OPS[op.name].axes([v.type for v in op.operands], dict(op.attrs)) for op in function.body.ops}
        self.g = GraphBuilder()
        self.mapping: dict[Value, Value] = {}  # values as a whole, by the old ones
        self.pieces: dict[Value, Pieces] = {}  # values in stretches, by the old ones
        self.parts: dict[object, Value] = {}  # parts of values that were cut out already
        self.known_edges: dict[tuple[Value, int], set[int]] = {}
        self.families = 0
        self.stage: tuple[int, int] | None = None  # the family whose stretch is being made, and its number
        self.stages: dict[Op, tuple[int, int]] = {}

    def chunked(self) -> Function:
        if not any(self.large(v) for v in self.made):
            return self.function
        for op in self.function.body.ops:
            self.g.loc = op.loc
            if not any(self.large(v) for v in (*op.operands, *op.results)):
                self.clone(op)
            elif is_unstored(op):
                self.view(op)
            else:
                self.cut(op)
        yields = tuple(self.whole(v) for v in self.function.body.yields)
        updates = {n: self.whole(v) for n, v in self.function.updates.items()}
        ops = in_stages(self.g.ops, self.stages, [*yields, *updates.values()])
        body = replace(self.function.body, ops=tuple(ops), yields=yields)
        return without_dead_ops(replace(self.function, body=body, updates=updates))

    def large(self, value: Value) -> bool:
        return bool(value.type.bytes > self.caps.binding_bytes)

    # -- one op
    def clone(self, op: Op) -> None:
        made = self.g.emit(op.name, *map(self.whole, op.operands), hint=op.results[0].hint, **op.attrs)
        self.mapping.update(zip(op.results, made.results, strict=True))

    def view(self, op: Op) -> None:
        """A view of pieces is pieces, and so is what pieces are put together to. Any other view is left to its readers."""
        operands, (axes,) = self.axes[op]
        (result,) = op.results
        cuts = self.imposed(op)
        for i, axis in enumerate(axes):
            if axis is None:
                continue
            edges = {e for v, own in zip(op.operands, operands, strict=True) for e in edges_of(v, own, axis.range)}
            cut = cuts.get(axis.range, Cut((), -1))
            inside = within(sorted({*edges, *cut.bounds}), axis.first, axis.first + result.type.shape[i])
            if axis.range in cuts or len(inside) > 2:
                values = tuple(self.stretch(op, {axis.range: box})[0] for box in pairwise(inside))
                self.pieces[result] = Pieces(i, tuple(b - axis.first for b in inside), values, cut.family)
                return
        if not self.large(result):
            self.clone(op)

    def cut(self, op: Op) -> None:
        """An op whose operands or results are in pieces, stretch by stretch of its index ranges."""
        cuts = self.imposed(op)
        _, results = self.axes[op]
        kept: list[int | None] = []
        for r, axes in zip(op.results, results, strict=True):
            kept.append(self.choose(op, r, axes, cuts) if self.large(r) else next((i for i, a in enumerate(axes) if a and a.range in cuts), None))
        if not cuts:
            self.clone(op)
            return
        leading = next((name for name, cut in cuts.items() if cut.family >= 0), "")
        order = sorted(cuts, key=lambda name: name != leading)
        found = self.stretches(op, cuts, order, kept, {}, leading)
        for r, axes, axis, values in zip(op.results, results, kept, found, strict=True):
            if axis is None:
                (self.mapping[r],) = values
                continue
            own = axes[axis]
            assert own is not None, "a result is kept along an axis that has a name"
            name, first = own.range, own.first
            bounds = within(cuts[name].bounds, first, first + r.type.shape[axis])
            self.pieces[r] = Pieces(axis, tuple(b - first for b in bounds), tuple(values), cuts[name].family)

    def imposed(self, op: Op) -> dict[str, Cut]:
        """The cuts of an op's index ranges that follow from operands which are there in pieces only."""
        cuts: dict[str, Cut] = {}
        for v, axes in zip(op.operands, self.axes[op][0], strict=True):
            p = self.pieces.get(v)
            if p is None or not self.large(v):
                continue
            axis = axes[p.axis]
            if axis is not None:
                known = cuts.get(axis.range, Cut((), -1))
                bounds = {*known.bounds, *(axis.first + b for b in p.bounds)}
                cuts[axis.range] = Cut(tuple(sorted(bounds)), max(known.family, p.family))
            elif OPS[op.name].kind != "view":
                raise self.refused(v, op)
        return cuts

    def stretches(
        self, op: Op, cuts: Mapping[str, Cut], order: Sequence[str], kept: Sequence[int | None], box: Mapping[str, tuple[int, int]], leading: str
    ) -> list[list[Value]]:  # fmt: skip
        """Each result of the op in a box of its index ranges, cut along the ranges `order`: its pieces along the axis in which it is
        kept; along other axes put together, along other ranges added up, in order."""
        if not order:
            return [[v] for v in self.stretch(op, box)]
        name, rest = order[0], order[1:]
        found: list[list[list[Value]]] = [[] for _ in op.results]
        totals: list[list[Value]] = [[] for _ in op.results]
        for number, bounds in enumerate(pairwise(cuts[name].bounds)):
            if name == leading:
                self.stage = (cuts[name].family, number)
            made = self.stretches(op, cuts, rest, kept, {**box, name: bounds}, leading)
            for r, pieces in enumerate(made):
                if any(a and a.range == name for a in self.axes[op][1][r]):
                    found[r].append(pieces)
                else:
                    totals[r] = [self.emit("add", a, b) for a, b in zip(totals[r], pieces, strict=True)] if totals[r] else pieces
        results = []
        for r, axes in enumerate(self.axes[op][1]):
            along = next((i for i, a in enumerate(axes) if a and a.range == name), None)
            if along is None:
                results.append(totals[r])
            elif along == kept[r]:
                results.append([v for pieces in found[r] for v in pieces])
            else:
                results.append([self.g("concat", *pieces, axis=along) for pieces in zip(*found[r], strict=True)])
        if name == leading:
            self.stage = None
        return results

    def stretch(self, op: Op, box: Mapping[str, tuple[int, int]]) -> Sequence[Value]:
        """The op over a box of its index ranges."""
        operands = []
        for v, axes in zip(op.operands, self.axes[op][0], strict=True):
            wanted = {}
            for i, axis in enumerate(axes):
                if axis is not None and axis.range in box:
                    start, stop = (min(max(b - axis.first, 0), v.type.shape[i]) for b in box[axis.range])
                    wanted[i] = (start, stop)
            operands.append(None if any(a == b for a, b in wanted.values()) else self.part(v, wanted))
        before = len(self.g.ops)
        results = OPS[op.name].stretch(self.g, op, operands, box)
        self.note(self.g.ops[before:])
        return results

    def emit(self, name: str, *operands: Value) -> Value:
        result = self.g(name, *operands)
        self.note(self.g.ops[-1:])
        return result

    def note(self, ops: Iterable[Op]) -> None:
        if self.stage is not None:
            self.stages.update((op, self.stage) for op in ops)

    # -- values, whole and in part
    def whole(self, value: Value) -> Value:
        if value in self.mapping:
            return self.mapping[value]
        if value in self.pieces:
            p = self.pieces[value]
            self.mapping[value] = self.g("concat", *p.values, axis=p.axis) if len(p.values) > 1 else p.values[0]
        elif value in self.made:
            self.clone(self.made[value])  # a view that was left to its readers
        return self.mapping.get(value, value)

    def part(self, value: Value, wanted: Mapping[int, tuple[int, int]]) -> Value:
        """Stretches of some axes of a value."""
        wanted = {i: box for i, box in wanted.items() if box != (0, value.type.shape[i])}
        if not wanted:
            return self.whole(value)
        key = (value, tuple(wanted.items()))
        if key not in self.parts:
            self.parts[key] = self.cut_out(value, wanted)
        return self.parts[key]

    def cut_out(self, value: Value, wanted: Mapping[int, tuple[int, int]]) -> Value:
        p = self.pieces.get(value)
        if p is not None and (p.axis in wanted or self.large(value)):
            start, stop = wanted.get(p.axis, (0, value.type.shape[p.axis]))
            rest = {i: box for i, box in wanted.items() if i != p.axis}
            found = []
            for (a, b), piece in zip(pairwise(p.bounds), p.values, strict=True):
                if a < stop and start < b:
                    found.append(self.sliced(piece, {p.axis: (max(start - a, 0), min(stop, b) - a), **rest}))
            return self.g("concat", *found, axis=p.axis) if len(found) > 1 else found[0]
        op = self.made.get(value)
        if op is not None and is_unstored(op):
            axes = self.axes[op][1][0]
            names = {i: axis for i in wanted if (axis := axes[i]) is not None}
            if len(names) == len(wanted):
                return self.stretch(op, {axis.range: (axis.first + wanted[i][0], axis.first + wanted[i][1]) for i, axis in names.items()})[0]
        return self.sliced(self.whole(value), wanted)

    def sliced(self, value: Value, wanted: Mapping[int, tuple[int, int]]) -> Value:
        for axis, (start, stop) in wanted.items():
            if (start, stop) != (0, value.type.shape[axis]):
                key = (value, axis, start, stop)
                if key not in self.parts:
                    self.parts[key] = self.g("slice", value, axis=axis, start=start, stop=stop)
                value = self.parts[key]
        return value

    # -- which axis of a large value is cut, and where
    def choose(self, op: Op, value: Value, axes: Axes, cuts: dict[str, Cut]) -> int:
        """The axis that a result is kept in pieces of: one that is cut already, else one that readers cut, else the first that
        all readers can be computed in stretches of. Notes its cut in `cuts`. Raises UserError if there is none."""
        able = {i: axis for i, axis in enumerate(axes) if axis is not None and self.blocker(value, i) is None}
        for i, axis in able.items():
            if axis.range in cuts and self.fits(value, i, within(cuts[axis.range].bounds, axis.first, axis.first + value.type.shape[i])):
                return i
        wishes = {i: (0, *sorted(self.edges(value, i)), value.type.shape[i]) for i in able}
        for i in sorted(able, key=lambda i: not self.fits(value, i, wishes[i])):
            name, first = able[i].range, able[i].first
            known = [b - first for b in cuts[name].bounds] if name in cuts else []
            bounds = self.refined(value, i, tuple(sorted({*wishes[i], *known})))
            if bounds is not None:
                family = cuts[name].family if name in cuts else -1
                if family < 0:
                    family, self.families = self.families, self.families + 1
                cuts[name] = Cut(tuple(first + b for b in bounds), family)
                return i
        reader = next((found for i in range(value.type.rank) if (found := self.blocker(value, i)) is not None), op)
        raise self.refused(value, reader)

    def fits(self, value: Value, axis: int, bounds: Sequence[int]) -> bool:
        """Whether stretches between these bounds can be bound, wherever they begin."""
        return max(b - a for a, b in pairwise(bounds)) * self.index_bytes(value, axis) <= self.room

    def index_bytes(self, value: Value, axis: int) -> int:
        found: int = value.type.bytes // value.type.shape[axis]
        return found

    @property
    def room(self) -> int:
        """Bytes of a stretch that begins anywhere: a binding begins at an aligned address before it."""
        return self.caps.binding_bytes - self.caps.offset_alignment

    def refined(self, value: Value, axis: int, bounds: Bounds) -> Bounds | None:
        """The bounds, and more of them where a stretch is too large; None if a single index is."""
        most = self.room // self.index_bytes(value, axis)
        if not most:
            return None
        multiple = TILE if most >= TILE else 1
        found = {0}
        for a, b in pairwise(bounds):
            step = even_blocks(b - a, most // multiple * multiple, multiple)
            found |= {*range(a, b, step), b}
        return tuple(sorted(found))

    def blocker(self, value: Value, axis: int) -> Op | None:
        """An op that reads the value and needs this axis of it whole, or reads it through a view that does not keep the axis.

        A value that leaves the function is put together: its stretches lie one behind the other along its first axis only."""
        if value in self.results and value.type.size > value.type.shape[axis] * prod(value.type.shape[axis + 1 :]):
            return self.made[value]
        for user in self.users.get(value, []):
            operands, results = self.axes[user]
            for v, axes in zip(user.operands, operands, strict=True):
                if v is not value:
                    continue
                own = axes[axis]
                if own is None:
                    return user
                for r, after in zip(user.results, results, strict=True):
                    place = next((i for i, a in enumerate(after) if a and a.range == own.range), None)
                    if OPS[user.name].kind == "view" and self.large(r):
                        found = user if place is None else self.blocker(r, place)
                        if found is not None:
                            return found
        return None

    def edges(self, value: Value, axis: int) -> set[int]:
        """Where readers cut the axis anyway, themselves or through other large values of the same indices."""
        if (value, axis) in self.known_edges:
            return self.known_edges[value, axis]
        found: set[int] = set()
        for user in self.users.get(value, []):
            operands, results = self.axes[user]
            for v, axes in zip(user.operands, operands, strict=True):
                own = axes[axis] if v is value else None
                if own is None:
                    continue
                for r, after in zip(user.results, results, strict=True):
                    found |= {e - own.first for e in edges_of(r, after, own.range)}
                    if self.large(r) and OPS[user.name].kind in ("pointwise", "view"):
                        same = next(((i, a) for i, a in enumerate(after) if a and a.range == own.range), None)
                        if same is not None:
                            place, there = same
                            found |= {e + there.first - own.first for e in self.edges(r, place)}
        self.known_edges[value, axis] = {e for e in found if 0 < e < value.type.shape[axis]}
        return self.known_edges[value, axis]

    def refused(self, value: Value, reader: Op) -> UserError:
        what = f"buffer {value.hint}" if value.hint else f"the result of {self.made[value].name}" if value in self.made else "an input"
        where = f"\n  {reader.loc}" if reader.loc else ""
        return UserError(
            f"{what} ({value.type}) has {value.type.bytes:,} bytes, a binding of {self.caps.name} holds {self.caps.binding_bytes:,}, "
            f"and {reader.name} needs it in one{where}",
            hint="take a smaller batch, context or model, or a profile with larger bindings",
        )


def is_unstored(op: Op) -> bool:
    """Whether an op's result has no memory of its own: parts of it are made anew."""
    return OPS[op.name].kind == "view" or not op.operands or (OPS[op.name].kind == "pointwise" and op.result.type.dtype == "bool")


def edges_of(value: Value, axes: Axes, name: str) -> set[int]:
    """The first index of a range that a value has, and the one behind its last."""
    return {e for n, axis in zip(value.type.shape, axes, strict=True) if axis and axis.range == name for e in (axis.first, axis.first + n)}


def within(bounds: Sequence[int], start: int, stop: int) -> Bounds:
    """Bounds cut to start..stop."""
    return (start, *(b for b in bounds if start < b < stop), stop)


def in_stages(ops: Sequence[Op], stages: Mapping[Op, tuple[int, int]], results: Iterable[Value]) -> list[Op]:
    """The ops in their order, but what is made for one stretch of a family before the next stretch.

    Views are put where they are first read. A family that needs of others what follows from itself, such as the backward
    pass of what the forward pass keeps, is done in as many rounds."""
    made = {r: op for op in ops for r in op.results}
    turns = rounds(ops, stages, made)
    members: dict[tuple[int, int], list[Op]] = {}
    for op in sorted(stages, key=lambda op: stages[op][1]):
        members.setdefault(turns[op], []).append(op)
    order: list[Op] = []
    done: set[Op] = set()
    begun: set[tuple[int, int]] = set()

    def need(wanted: Op) -> None:
        waiting = [wanted]
        while waiting:
            op = waiting[-1]
            turn = turns.get(op)
            if turn is not None and turn not in begun:
                begun.add(turn)
                waiting += reversed(members[turn])
                continue
            missing = [] if op in done else [made[v] for v in op.operands if v in made and made[v] not in done]
            if missing:
                waiting += reversed(missing)
                continue
            waiting.pop()
            if op not in done:
                done.add(op)
                order.append(op)

    for op in ops:
        if OPS[op.name].kind != "view":
            need(op)
    for v in results:
        if v in made:
            need(made[v])
    return order


def rounds(ops: Sequence[Op], stages: Mapping[Op, tuple[int, int]], made: Mapping[Value, Op]) -> dict[Op, tuple[int, int]]:
    """For each op of a family, the family and how often what it needs has left the family and come back to it."""
    found: dict[Op, tuple[int, int]] = {}
    reach: dict[Op, dict[int, int]] = {}  # for each family an op follows from: 2 * round + 1 inside, 2 * (the next round) outside
    for op in ops:
        after: dict[int, int] = {}
        for source in {made[v] for v in op.operands if v in made}:
            for family, number in reach[source].items():
                after[family] = max(after.get(family, 0), number)
        own = stages[op][0] if op in stages else None
        if OPS[op.name].kind != "view":
            after = {family: number if family == own else (number + 1) // 2 * 2 for family, number in after.items()}
        if own is not None:
            found[op] = (own, after.get(own, 0) // 2)
            after[own] = 2 * found[op][1] + 1
        reach[op] = after
    return found
