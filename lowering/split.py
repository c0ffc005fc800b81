"""split: long sums that end up in one array are made in parts, which few launches add up.

A weight's gradient is a small matrix with a long contraction: too few tiles to fill a GPU, each with many steps that
wait for memory. In parts there are that many times as many tiles. The parts of neighbouring gradients lie side by side,
[parts, size], so that one sum is the second stage of them all. Where those of all gradients would take too much memory,
only vectors are made in parts. The order of every sum is fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Op, Value, uses
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.lowering.passes import Pass, register
from tinygpt.lowering.schedule import gpu_binds, gpu_parts

VECTORS = 1 << 12  # elements of a gradient that is made in parts whatever the others are: theirs take no room
FEWEST = 4  # parts that pay for their second stage


@register
@dataclass(frozen=True)
class Split(Pass):
    """On a GPU, make the long sums that a `pack` collects in parts, and add up the parts of all of them in one launch."""

    name = "split"

    def run(self, module: Module, caps: Caps) -> Module:
        return module.map_functions(lambda f: Splitting(f, caps).split()) if caps.strategy == "gpu" else module


class Splitting:
    """The rewriting of one function."""

    def __init__(self, function: Function, caps: Caps) -> None:
        self.function, self.caps = function, caps
        self.made = {r: op for op in function.body.ops for r in op.results}
        self.users = uses(function.body)
        self.kept = {*function.body.yields, *function.updates.values()}
        self.parts: dict[Value, int] = {}  # what is made in parts, and in how many
        self.partial: dict[Value, Value] = {}
        self.rows: dict[Value, Value] = {}  # flat arrays whose second stage made them row by row, and those rows
        self.mapping: dict[Value, Value] = {}
        self.g = GraphBuilder()

    def split(self) -> Function:
        flat = [op for op in self.function.body.ops if op.name == "pack"]
        packs = {op: self.choose(op, sum(p.result.type.size for p in flat)) for op in flat}
        for op in self.function.body.ops:
            self.g.loc = op.loc
            operands = [self.mapping.get(v, v) for v in op.operands]
            if op.results and op.results[0] in self.parts:
                self.emit_partial(op)
            elif packs.get(op):
                self.mapping[op.result] = self.packed(op)
            elif op.name == "reshape" and op.operands[0] in self.rows and self.rows[op.operands[0]].type == op.result.type:
                self.mapping[op.result] = self.rows[op.operands[0]]
            else:
                made = self.g.emit(op.name, *operands, hint=op.results[0].hint, **op.attrs)
                self.mapping.update(zip(op.results, made.results, strict=True))
        body = replace(self.function.body, ops=tuple(self.g.ops), yields=tuple(self.mapping.get(v, v) for v in self.function.body.yields))
        return replace(self.function, body=body, updates={n: self.mapping.get(v, v) for n, v in self.function.updates.items()})

    # -- what is made in parts
    def terms(self, value: Value) -> list[int] | None:
        """How many terms each sum behind a value has, if it is such sums, added up or reshaped, and nobody else reads them."""
        op = self.made.get(value)
        if op is None or value in self.kept or len(self.users[value]) != 1:
            return None
        if op.name == "reshape":
            return self.terms(op.operands[0])
        if op.name == "add":
            sides = [self.terms(v) if v.type == value.type else None for v in op.operands]
            return [n for side in sides if side for n in side] if all(sides) else None
        count = OPS[op.name].terms([v.type for v in op.operands])
        return [count] if count else None

    def choose(self, pack: Op, size: int) -> bool:
        """Decide what of a pack is made in parts; whether anything is. All packs have `size` elements."""
        found: Mapping[Value, list[int]] = {v: terms for v in pack.operands if (terms := self.terms(v))}
        if not found:
            return False
        longest = max(n for terms in found.values() for n in terms)
        together = gpu_parts(longest, size)
        for value, terms in found.items():
            parts = together if together >= FEWEST else gpu_parts(max(terms), value.type.size) if value.type.size <= VECTORS else 1
            if parts > 1 and gpu_binds(parts * value.type.size, self.caps) and not any(n % parts for n in terms):
                self.mark(value, parts)
        return any(v in self.parts for v in pack.operands)

    def mark(self, value: Value, parts: int) -> None:
        op = self.made[value]
        self.parts[value] = parts
        if op.name in ("reshape", "add"):
            for v in op.operands:
                self.mark(v, parts)

    # -- the new function
    def emit_partial(self, op: Op) -> None:
        """The op's result in parts: along a new first axis."""
        value, parts = op.result, self.parts[op.result]
        if op.name == "reshape":
            self.partial[value] = self.g("reshape", self.partial[op.operands[0]], shape=(parts, *value.type.shape))
        elif op.name == "add":
            self.partial[value] = self.g("add", *(self.partial[v] for v in op.operands))
        else:
            self.partial[value] = self.g(op.name, *(self.mapping.get(v, v) for v in op.operands), **op.attrs, parts=parts)

    def packed(self, op: Op) -> Value:
        """The pack, with one sum for each run of neighbours that are made in the same number of parts, if a binding holds them."""
        runs: list[tuple[int, int, list[Value]]] = []  # offset, parts, values
        for offset, value in zip(op.attrs["offsets"], op.operands, strict=True):
            parts = self.parts.get(value, 1)
            if parts > 1 and runs and runs[-1][1] == parts:
                start, _, values = runs[-1]
                size = sum(v.type.size for v in values)
                if offset == start + size and gpu_binds(parts * (size + value.type.size), self.caps):
                    values.append(value)
                    continue
            runs.append((offset, parts, [value]))
        if len(runs) == 1 and runs[0][1] > 1 and (matrix := self.matrix_of(op)):
            return self.summed_by_rows(op, runs[0][1], matrix)
        pieces = [self.total(parts, values) if parts > 1 else self.mapping.get(values[0], values[0]) for _, parts, values in runs]
        return self.g("pack", *pieces, offsets=tuple(offset for offset, _, _ in runs), size=op.attrs["size"])

    def matrix_of(self, pack: Op) -> tuple[int, ...] | None:
        """The matrix as which somebody reads a pack without gaps."""
        whole = sum(v.type.size for v in pack.operands) == pack.attrs["size"]
        shapes = [u.result.type.shape for u in self.users.get(pack.result, []) if u.name == "reshape" and u.result.type.rank == 2]
        return shapes[0] if whole and shapes else None

    def summed_by_rows(self, pack: Op, parts: int, matrix: tuple[int, ...]) -> Value:
        """The second stage row by row, so that what reads the rows next is computed with them."""
        rows = self.g("sum_parts", self.g("reshape", self.side_by_side(parts, pack.operands), shape=(parts, *matrix)))
        self.rows[pack.result] = rows
        return self.g("reshape", rows, shape=pack.result.type.shape)

    def total(self, parts: int, values: Sequence[Value]) -> Value:
        return self.g("sum_columns", self.side_by_side(parts, values))

    def side_by_side(self, parts: int, values: Sequence[Value]) -> Value:
        """The parts of some gradients as [parts, size]."""
        flat = [self.g("reshape", self.partial[v], shape=(parts, v.type.size)) for v in values]
        return self.g("concat", *flat, axis=1) if len(flat) > 1 else flat[0]
