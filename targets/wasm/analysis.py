"""What the printer wants to know of a region before it prints: what is used, how often, for how long, and which sums
of index variables occur more than once. Nothing here makes instructions.

A *sum* is the part of an address that changes: a pointer (or none) and terms `coefficient * atom`, in bytes for a
pointer, ordered so that what is known first comes first. A prefix of a sum is a sum too; that is what engines would
call common subexpressions, and they find few of them on their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tinygpt.ir.core import Op, Region, Value
from tinygpt.ir.index import Atom, Compound, Index, Variable
from tinygpt.ir.types import DTYPE_BYTES, PointerType, ScalarType, VectorType
from tinygpt.targets.wasm.primitives import LANES, lane_bits

Terms = tuple[tuple[Atom, int], ...]
Sum = tuple[Value | None, Terms]
Request = Sum | Compound

EFFECTS = frozenset({"store", "for", "if", "outline", "bind", "note"})
_SCRATCH_ELEMENT_BYTES = 4


class Analysis:
    """Facts about one function's region. `scratch` stands for the base of the thread's memory; `indices` are the
    variables the function is entered with."""

    def __init__(self, region: Region, indices: tuple[str, ...]) -> None:
        self.scratch = Value(PointerType("f32", "scratch"), "scratch")
        self.depth: dict[str, int] = dict.fromkeys(indices, 0)
        self.aliases: dict[Value, tuple[Value, int]] = {}
        self.scalar_constants: dict[Value, tuple[Any, str]] = {}
        self.vector_constants: dict[Value, bytes] = {}
        self.splats: dict[Value, Value] = {}
        self.home: dict[Value, Region] = {self.scratch: region}
        self.uses: Counter[Value] = Counter()
        self.escaping: set[Value] = set()  # used in a region inside the one that defines them
        self.dead: set[Op] = set()
        self.last: dict[Region, dict[Value, int]] = {}
        self.requests: dict[Region, Counter[Request]] = {}  # of a region and those inside, parts included
        self.roots: dict[Region, dict[Sum, None]] = {}  # the sums asked for, without their parts
        self._collect(region, 0)
        self._count(region)
        self._index(region)

    # What an operand really is

    def resolve(self, value: Value) -> tuple[Value, int]:
        """A pointer as another pointer plus a constant number of bytes; any other value as itself."""
        return self.aliases.get(value, (value, 0))

    def operands(self, op: Op, constants: bool = False) -> list[Value]:
        """The operands whose registers the op reads, through aliases; scalar constants only if asked for. A vector
        shifted by the same amount in every lane reads the amount as a scalar."""
        values = [self.resolve(v)[0] for v in op.operands]
        if op.name in ("shl", "shr") and isinstance(op.operands[1].type, VectorType):
            amount = self.uniform_amount(op)
            if amount is not None:
                values[1:] = [] if isinstance(amount, int) else [amount]
        return values if constants else [v for v in values if v not in self.scalar_constants]

    def uniform_amount(self, op: Op) -> int | Value | None:
        """By how much a shift shifts every lane of a vector: a number, a scalar, or None where lanes may differ."""
        amount = op.operands[1]
        bits = self.vector_constants.get(amount)
        if bits is not None and bits == bits[:4] * LANES:
            return int.from_bytes(bits[:4], "little")
        return self.splats.get(amount)

    def address(self, pointer: Value, at: Index) -> tuple[Sum, int]:
        """The place `at` elements from a pointer: a sum, and a constant number of bytes."""
        base, displacement = self.resolve(pointer)
        size = DTYPE_BYTES[pointer.type.dtype]
        return (base, self._ordered(at, size)), at.constant * size + displacement

    def sum(self, at: Index) -> Sum:
        return (None, self._ordered(at, 1))

    def _ordered(self, at: Index, scale: int) -> Terms:
        terms = [(atom, coefficient * scale) for atom, coefficient in at.terms]
        return tuple(sorted(terms, key=lambda term: self._depth_of(term[0]))) if len(terms) > 1 else tuple(terms)

    def _depth_of(self, atom: Atom) -> int:
        names = (atom.name,) if isinstance(atom, Variable) else atom.left.variables() | atom.right.variables()
        return max((self.depth.get(name, 0) for name in names), default=0)

    # One walk for definitions, one backwards for uses, one for sums

    def _collect(self, region: Region, depth: int) -> None:
        self.home.update(dict.fromkeys(region.args, region))
        for op in region.ops:
            self.home.update(dict.fromkeys(op.results, region))
            if op.name in ("for", "bind"):
                self.depth[op.attrs["var"]] = depth + (op.name == "for")
            if op.name != "outline":
                for inner in op.regions:
                    self._collect(inner, depth + 1)
            self._define(op)

    def _define(self, op: Op) -> None:
        match op.name:
            case "scratch":
                self.aliases[op.result] = (self.scratch, op.attrs["offset"] * _SCRATCH_ELEMENT_BYTES)
            case "advance" if len(op.operands) == 1 and op.attrs["by"].is_constant:
                base, displacement = self.resolve(op.operands[0])
                by = op.attrs["by"].constant * DTYPE_BYTES[op.result.type.dtype]
                self.aliases[op.result] = (base, displacement + by)
            case "const" if isinstance(op.result.type, ScalarType):
                self.scalar_constants[op.result] = (op.attrs["value"], op.result.type.dtype)
            case "const":
                self.vector_constants[op.result] = lane_bits(op.attrs["value"], op.result.type.dtype) * LANES
            case "lanes":
                self.vector_constants[op.result] = b"".join(lane_bits(lane, "i32") for lane in range(LANES))
            case "splat" if op.operands[0] in self.scalar_constants:
                value, dtype = self.scalar_constants[op.operands[0]]
                self.vector_constants[op.result] = lane_bits(value, dtype) * LANES
            case "splat":
                self.splats[op.result] = op.operands[0]

    def _count(self, region: Region) -> list[Value]:
        """Uses and last uses of values, walking from the end. Returns what the region reads, in an order that depends on the
        region alone, because locals are given back in it."""
        last: dict[Value, int] = {}

        def read(value: Value, position: int) -> None:
            self.uses[value] += 1
            last.setdefault(value, position)
            if self.home[value] is not region:
                self.escaping.add(value)

        for value in (self.resolve(v)[0] for v in region.yields):
            if value not in self.scalar_constants:
                read(value, len(region.ops))
        for position in range(len(region.ops) - 1, -1, -1):
            op = region.ops[position]
            if op.name not in EFFECTS and not self.uses[op.result]:
                self.dead.add(op)
                continue
            for value in self.operands(op):
                read(value, position)
            for inner in op.regions if op.name != "outline" else ():
                for value in self._count(inner):
                    last.setdefault(value, position)
        self.last[region] = last
        return list(last)

    def _index(self, region: Region) -> None:
        counter: Counter[Request] = Counter()
        roots: dict[Sum, None] = {}
        for op in region.ops:
            if op in self.dead:
                continue
            for root in self._sums(op):
                roots[root] = None
                self._request(counter, root)
            for inner in op.regions if op.name != "outline" else ():
                self._index(inner)
                roots.update(self.roots[inner])
                counter.update(self.requests[inner])
        self.requests[region] = counter
        self.roots[region] = roots

    def _sums(self, op: Op) -> Iterator[Sum]:
        match op.name:
            case "load" | "store":
                yield self.address(op.operands[0], op.attrs["at"])[0]
            case "advance" if op.result not in self.aliases:
                yield self.address(op.operands[0], op.attrs["by"])[0]
            case "index":
                yield self.sum(op.attrs["at"])
            case "for":
                yield self.sum(op.attrs["lo"])
                yield self.sum(op.attrs["hi"])
            case "if":
                yield self.sum(op.attrs["left"])
                yield self.sum(Index.of(op.attrs["right"]))

    def _request(self, counter: Counter[Request], request: Request) -> None:
        """Count a need of `request`; its parts are needed once, however often it is needed itself."""
        if not isinstance(request, Compound) and is_trivial(request):
            return
        counter[request] += 1
        if counter[request] > 1:
            return
        for part in self.parts(request):
            self._request(counter, part)

    def parts(self, request: Request) -> list[Request]:
        """What a sum or an atom is computed from."""
        if isinstance(request, Compound):
            return [self.sum(request.left), self.sum(request.right)]
        base, terms = request
        parts: list[Request] = [(base, terms[:-1])]
        if isinstance(terms[-1][0], Compound):
            parts.append(terms[-1][0])
        return parts


def is_trivial(sum: Sum) -> bool:
    """Whether a sum needs no instruction but the reading of a register: a pointer, a variable, or nothing."""
    base, terms = sum
    if base is not None:
        return not terms
    return not terms or (len(terms) == 1 and terms[0][1] == 1 and isinstance(terms[0][0], Variable))


def is_total(atom: Compound) -> bool:
    """Whether an atom may be computed where its value might not be needed: no division by what could be zero."""
    if atom.op in ("//", "%") and not atom.right.is_constant:
        return False
    return all(is_total(a) for side in (atom.left, atom.right) for a, _ in side.terms if isinstance(a, Compound))
