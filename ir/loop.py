"""The loop level: scalar and vector statements with explicit memory, made for one profile. Printers are one to one from here.

Ops (operands -> result {attributes}); an address is `at` elements from a pointer, an Index expression:
  const -> T {value}                      a number in every lane
  index -> i32 {at}                       the value of an index expression
  lanes -> i32xW                          0, 1, 2, …
  scratch -> ptr {offset, size}           part of the thread's own memory, in elements of four bytes
  shared -> ptr {offset, size, lanes}     part of the workgroup's memory; every access moves `lanes` elements, and pieces of
                                          different lanes lie in memories of their own
  advance(ptr[, i32]) -> ptr {by, scale}  ptr + by + value * scale elements
  load(ptr) -> T {at}    store(ptr, x) {at}      one element, or as many consecutive ones as T has lanes
  splat(x) -> vector     extract(v) {lane}       broadcast_lane(v) {lane}       join(x, …) -> vector of the operands
  interleave(a, b) {half}                 a0 b0 a1 b1 … of the lower (0) or upper (1) halves
  fold(v) -> scalar {kind}                sum or max of the lanes, as a tree: lane i with lane i + W/2, then W/4, …
  the primitives of `ir.scalar` on scalars or vectors, elementwise
  for(carried) -> carried {var, lo, hi, step}    if {left, compare, right} (one or two regions, no results)
  outline(operands) {name, indices}       its region, as a function of its own where that helps the engine's register
                                          allocation; `indices` are the index variables it uses
  bind(x) {var, lo, hi}                   the index variable `var`, from here to the end of the region, is the i32 number x,
                                          or lo or hi (numbers, inclusive) where it lies outside of them
  note {text}                             a comment
  barrier                                 (workgroup targets) all threads have written before any goes on to read
  subgroup_fold(x) {kind, width}          (workgroup targets) sum or max over the `width` threads with the same thread // width,
                                          as a tree: with the one half a group away, then a quarter, …; the same bits in each
A kernel of the cpu strategy runs the flattened grid points `lo` (inclusive) to `hi` (exclusive), both index variables.
A kernel of the gpu strategy runs one grid point on a workgroup: the grid ids and `thread`, the number of the thread in
its workgroup, are index variables; the cost field `threads` says how many there are; of one that is several side by side, `sides` names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tinygpt.ir.core import Op, Region, Value
from tinygpt.ir.index import Index
from tinygpt.ir.scalar import BITWISE, COMPARISONS, PRIMITIVES, TRANSCENDENTAL, Scalar
from tinygpt.ir.types import NUMPY_DTYPES, PointerType, ScalarType, VectorType

MEMORY = ("scratch", "shared", "advance", "load", "store")
VECTOR = ("const", "index", "lanes", "splat", "extract", "join", "broadcast_lane", "interleave", "fold", "subgroup_fold")
CONTROL = ("for", "if", "outline", "bind", "note", "barrier")
LOOP_OPS = (*MEMORY, *VECTOR, *CONTROL, *PRIMITIVES, *TRANSCENDENTAL)

Register = ScalarType | VectorType


class LoopBuilder:
    """Emits loop-level ops. Pure ops are shared within the innermost region and those around it."""

    def __init__(self) -> None:
        self._ops: list[list[Op]] = [[]]
        self._known: list[dict[Any, Value]] = [{}]
        self._names: dict[str, int] = {}
        self.scratch_elements = 0

    def emit(self, name: str, operands: Sequence[Value], type: Any, regions: tuple[Region, ...] = (), hint: str = "", **attrs: Any) -> Value | None:
        results = (Value(type, hint),) if type is not None else ()
        self._ops[-1].append(Op(name, tuple(operands), results, attrs, regions))
        return results[0] if results else None

    def pure(self, name: str, operands: Sequence[Value], type: Any, hint: str = "", **attrs: Any) -> Value:
        key = (name, tuple(operands), type, tuple(sorted((k, repr(v)) for k, v in attrs.items())))
        for known in self._known:
            if key in known:
                return known[key]
        value = self.emit(name, operands, type, hint=hint, **attrs)
        assert value is not None
        self._known[-1][key] = value
        return value

    # -- values
    def const(self, value: float | int, type: Register) -> Value:
        return self.pure("const", [], type, value=value)

    def index(self, at: Index | int) -> Value:
        at = Index.of(at)
        i32 = ScalarType("i32")
        return self.const(at.constant, i32) if at.is_constant else self.pure("index", [], i32, at=at)

    def lanes(self, width: int) -> Value:
        return self.pure("lanes", [], VectorType("i32", width))

    def splat(self, x: Value, width: int) -> Value:
        """x in every lane; a vector stays as it is, width 1 means scalar."""
        if width == 1 or isinstance(x.type, VectorType):
            return x
        return self.pure("splat", [x], VectorType(x.type.dtype, width))

    def primitive(self, name: str, operands: Sequence[Value], dtype: str = "") -> Value:
        """A scalar primitive or native transcendental; scalars beside vectors are splat. `dtype` for conversions."""
        width = max((v.type.lanes for v in operands if isinstance(v.type, VectorType)), default=1)
        operands = [self.splat(v, width) for v in operands]
        kind = "bool" if name in COMPARISONS else dtype or operands[-1].type.dtype
        return self.pure(name, operands, VectorType(kind, width) if width > 1 else ScalarType(kind))

    def extract(self, v: Value, lane: int) -> Value:
        """One lane of a vector; a scalar is the same in every lane."""
        return self.pure("extract", [v], ScalarType(v.type.dtype), lane=lane) if isinstance(v.type, VectorType) else v

    def join(self, lanes: Sequence[Value]) -> Value:
        """Scalars as the lanes of a vector."""
        return self.pure("join", lanes, VectorType(lanes[0].type.dtype, len(lanes)))

    def fold(self, v: Value, kind: str) -> Value:
        """The sum or maximum of a vector's lanes."""
        return self.pure("fold", [v], ScalarType(v.type.dtype), kind=kind) if isinstance(v.type, VectorType) else v

    def formula(self, expression: Scalar, operands: Sequence[Value]) -> Value:
        """A scalar expression over the operands' values."""
        memo: dict[Scalar, Value] = {}

        def emitted(x: Scalar) -> Value:
            if x.op == "arg":
                operand: Value = operands[x.value]
                return operand
            if x not in memo:
                if x.op == "const":
                    memo[x] = self.const(x.value, ScalarType(x.dtype))
                else:
                    memo[x] = self.primitive(x.op, [emitted(a) for a in x.args], x.dtype)
            return memo[x]

        return emitted(expression)

    # -- memory
    def shared(self, offset: int, size: int, lanes: int, hint: str = "") -> Value:
        """A piece of the workgroup's memory, in elements of f32."""
        return self.pure("shared", [], PointerType("f32", "shared"), hint=hint, offset=offset, size=size, lanes=lanes)

    def subgroup_fold(self, x: Value, kind: str, width: int) -> Value:
        """The sum or maximum over groups of `width` threads; all of them must get here."""
        return self.pure("subgroup_fold", [x], x.type, kind=kind, width=width)

    def barrier(self) -> None:
        self.emit("barrier", [], None)

    def scratch(self, elements: int, dtype: str = "f32", hint: str = "") -> Value:
        """A new piece of the thread's memory, aligned to 16 elements, with a vector's room behind it."""
        offset = self.scratch_elements
        self.scratch_elements += -(-(elements + 16) // 16) * 16
        return self.pure("scratch", [], PointerType(dtype, "scratch"), hint=hint, offset=offset, size=elements)

    def advance(self, pointer: Value, by: Index | int, value: Value | None = None, scale: int = 1, hint: str = "") -> Value:
        by = Index.of(by)
        if value is None and by == Index.of(0):
            return pointer
        return self.pure("advance", [pointer] if value is None else [pointer, value], pointer.type, hint=hint, by=by, scale=scale)

    def load(self, pointer: Value, at: Index | int, lanes: int = 1, hint: str = "") -> Value:
        dtype = pointer.type.dtype
        type = VectorType(dtype, lanes) if lanes > 1 else ScalarType(dtype)
        value = self.emit("load", [pointer], type, hint=hint, at=Index.of(at))
        assert value is not None
        return value

    def store(self, pointer: Value, value: Value, at: Index | int) -> None:
        self.emit("store", [pointer, value], None, at=Index.of(at))

    def note(self, text: str) -> None:
        self.emit("note", [], None, text=text)

    # -- control
    def name(self, stem: str) -> str:
        """A new index variable."""
        self._names[stem] = self._names.get(stem, 0) + 1
        name = f"{stem}{self._names[stem]}"
        return self.name(stem) if name in NUMPY_DTYPES else name  # i32 is a type

    def enter(self) -> None:
        self._ops.append([])
        self._known.append({})

    def leave(self, args: Sequence[Value] = (), yields: Sequence[Value] = ()) -> Region:
        self._known.pop()
        return Region(tuple(args), tuple(self._ops.pop()), tuple(yields))

    def loop(
        self, low: Index | int, high: Index | int, step: int, body: Callable[..., Sequence[Value] | None], carried: Sequence[Value] = (), stem: str = "i"
    ) -> list[Value]:
        """for v in low, low + step, … below high. No trip: the carried values; one trip: inlined."""
        low, high = Index.of(low), Index.of(high)
        trip = high - low
        if trip.is_constant and trip.constant <= 0:
            return list(carried)
        if trip.is_constant and trip.constant <= step:
            return list(body(low, *carried) or ())
        name = self.name(stem)
        args = [Value(v.type, v.hint) for v in carried]
        self.enter()
        yields = list(body(Index.variable(name), *args) or ())
        region = self.leave(args, yields)
        results = tuple(Value(v.type, v.hint) for v in carried)
        self._ops[-1].append(Op("for", tuple(carried), results, {"var": name, "lo": low, "hi": high, "step": step}, (region,)))
        return list(results)

    def bind(self, number: Value, low: int, high: int, stem: str = "s") -> Index:
        """A number that is known at run time only as an index variable; one outside of low..high is moved there."""
        name = self.name(stem)
        self.emit("bind", [number], None, var=name, lo=low, hi=high)
        return Index.variable(name)

    def when(self, left: Index, compare: str, right: Index | int, body: Callable[[], None]) -> None:
        """if left `compare` right: body. `compare` is one of lt, le, gt, ge, eq, ne."""
        right = Index.of(right)
        self.enter()
        body()
        self.emit("if", [], None, (self.leave(),), left=left, compare=compare, right=right)

    def outline(self, stem: str, operands: Sequence[Value], indices: Sequence[str], body: Callable[..., None]) -> None:
        """A region that may become a function: it sees its operands and the named index variables only."""
        args = [Value(v.type, v.hint) for v in operands]
        self._ops.append([])
        kept, self._known = self._known, [{}]
        body(*args)
        region = Region(tuple(args), tuple(self._ops.pop()))
        self._known = kept
        attrs = {"name": self.name(stem), "indices": tuple(indices)}
        self._ops[-1].append(Op("outline", tuple(operands), (), attrs, (region,)))

    def finish(self) -> tuple[Op, ...]:
        return tuple(self._ops[0])


__all__ = ["BITWISE", "LOOP_OPS", "LoopBuilder", "Register"]
