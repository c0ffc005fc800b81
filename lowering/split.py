"""split: long sums that end up in one array are made in parts, which one launch adds up.

A weight's gradient is a small matrix with a long contraction: too few tiles to fill a GPU, each with many steps that
wait for memory. In parts there are that many times as many tiles. The parts of all gradients lie side by side,
[parts, size], so that one sum over columns is the second stage of them all; where they would take too much memory, a
small one has a second stage of its own. The order of every sum is fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Op, Value, uses
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.lowering.passes import Pass, register
from tinygpt.lowering.schedule import gpu_parts

SMALL = range(1 << 12, 1 << 19)  # elements of a matrix that has too few tiles of its own
FEWEST = 4  # parts that all gradients are made in together; in fewer, only the small ones are


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
        self.alone: set[Value] = set()  # what has a second stage of its own
        self.partial: dict[Value, Value] = {}
        self.mapping: dict[Value, Value] = {}
        self.g = GraphBuilder()

    def split(self) -> Function:
        packs = {op: self.choose(op) for op in self.function.body.ops if op.name == "pack"}
        for op in self.function.body.ops:
            self.g.loc = op.loc
            operands = [self.mapping.get(v, v) for v in op.operands]
            if op.results and op.results[0] in self.parts:
                self.emit_partial(op)
            elif packs.get(op):
                self.mapping[op.result] = self.packed(op)
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

    def choose(self, pack: Op) -> bool:
        """Decide what of a pack is made in parts; whether anything is."""
        found: Mapping[Value, list[int]] = {v: terms for v in pack.operands if (terms := self.terms(v))}
        if not found:
            return False
        longest = max(n for terms in found.values() for n in terms)
        together = gpu_parts(longest, pack.result.type.size, self.caps)
        for value, terms in found.items():
            alone = together < FEWEST
            parts = gpu_parts(max(terms), value.type.size, self.caps) if alone else together
            if parts > 1 and not any(n % parts for n in terms) and (not alone or value.type.size in SMALL):
                self.mark(value, parts)
                if alone:
                    self.alone.add(value)
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
        if value in self.alone:
            self.mapping[value] = self.g("reshape", self.total(parts, [value]), shape=value.type.shape)

    def packed(self, op: Op) -> Value:
        """The pack, with one sum for each run of neighbours that are made in the same number of parts."""
        runs: list[tuple[int, int, list[Value]]] = []  # offset, parts, values
        end = -1
        for offset, value in zip(op.attrs["offsets"], op.operands, strict=True):
            parts = 1 if value in self.alone else self.parts.get(value, 1)
            if parts > 1 and runs and runs[-1][1] == parts and offset == end:
                runs[-1][2].append(value)
            else:
                runs.append((offset, parts, [value]))
            end = offset + value.type.size
        pieces = [self.total(parts, values) if parts > 1 else self.mapping.get(values[0], values[0]) for _, parts, values in runs]
        return self.g("pack", *pieces, offsets=tuple(offset for offset, _, _ in runs), size=op.attrs["size"])

    def total(self, parts: int, values: list[Value]) -> Value:
        flat = [self.g("reshape", self.partial[v], shape=(parts, v.type.size)) for v in values]
        return self.g("sum_columns", self.g("concat", *flat, axis=1) if len(flat) > 1 else flat[0])
