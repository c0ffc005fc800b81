"""What all levels share: values, ops, regions, functions, kernels and modules. Immutable once built; a pass makes new ones.

A Value is known by identity. An Op names its definition (in `ir.ops`, `ir.tile` or `ir.loop`); attributes are plain
data (numbers, strings, booleans, Index expressions, tuples, dicts), so that everything prints and parses back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tinygpt.ir.types import Dim, TensorType, Type


@dataclass(frozen=True, slots=True)
class Location:
    """Where in the user's model an op comes from. Prints as `loc("model.py", 42, "self.c_attn(x)")`."""

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f": {self.text}" if self.text else "")


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One result of one op, or one parameter. `hint` is a name for reading; identity is what counts."""

    type: Any  # one of ir.types.Type; each level knows which
    hint: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    name: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    regions: tuple[Region, ...] = ()
    loc: Location | None = None

    @property
    def result(self) -> Value:
        """The only result."""
        (value,) = self.results
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Ops in order; `args` are the values it is entered with, `yields` those it leaves with."""

    args: tuple[Value, ...] = ()
    ops: tuple[Op, ...] = ()
    yields: tuple[Value, ...] = ()

    def walk(self) -> Iterator[Op]:
        """Every op, outer before inner, in order."""
        for op in self.ops:
            yield op
            for region in op.regions:
                yield from region.walk()


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """A named array of the module that lives from step to step: a weight, or optimizer state.

    `init` says how it starts: ("normal", std), ("constant", c), or ("data",) for values the bundle carries.
    `role` is "param" (a weight of the model) or "state" (everything else)."""

    name: str
    value: Value
    role: str = "param"
    init: tuple[Any, ...] = ("constant", 0.0)

    @property
    def type(self) -> TensorType:
        found: TensorType = self.value.type
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A function over whole tensors. `updates` are the new values of module parameters, written when it returns.

    `result_names` are parallel to `body.yields`."""

    name: str
    body: Region
    updates: Mapping[str, Value] = field(default_factory=dict)
    result_names: tuple[str, ...] = ()

    @property
    def params(self) -> tuple[Value, ...]:
        return self.body.args

    def with_ops(self, ops: Iterable[Op]) -> Function:
        return replace(self, body=replace(self.body, ops=tuple(ops)))


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """One program per grid point, over buffers. The same record at tile level and at loop level.

    `access` says for each buffer "in", "out" or "inout". `order` fields decide the bits of the result, `cost` fields
    only its speed. `grid` maps grid ids to extents, outermost first."""

    name: str
    body: Region
    access: tuple[str, ...]
    grid: Mapping[str, int]
    dims: tuple[Dim, ...] = ()
    order: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    level: str = "tile"
    of: str = ""

    @property
    def params(self) -> tuple[Value, ...]:
        return self.body.args


@dataclass(frozen=True, slots=True, eq=False)
class Module:
    """Parameters, functions over them, and (from the tile level on) kernels. `attrs` carry the config and defaults."""

    name: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    functions: Mapping[str, Function] = field(default_factory=dict)
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def with_function(self, function: Function) -> Module:
        return replace(self, functions={**self.functions, function.name: function})

    def map_functions(self, transform: Callable[[Function], Function]) -> Module:
        return replace(self, functions={name: transform(f) for name, f in self.functions.items()})

    def parameter_of(self) -> dict[Value, Parameter]:
        """The parameter behind each module-scope value."""
        return {p.value: p for p in self.parameters.values()}


class Rewriter:
    """Rebuilds a region op by op while mapping old values to new ones. The one way passes copy code."""

    def __init__(self) -> None:
        self.mapping: dict[Value, Value] = {}
        self.ops: list[Op] = []

    def get(self, value: Value) -> Value:
        return self.mapping.get(value, value)

    def clone(self, op: Op, **changes: Any) -> Op:
        """Append a copy of `op` over the mapped operands, with fresh results."""
        results = tuple(Value(r.type, r.hint) for r in op.results)
        copied = replace(
            op,
            operands=tuple(self.get(v) for v in op.operands),
            results=results,
            regions=tuple(self.clone_region(r) for r in op.regions),
            **changes,
        )
        self.ops.append(copied)
        self.mapping.update(zip(op.results, results, strict=True))
        return copied

    def clone_region(self, region: Region) -> Region:
        inner = Rewriter()
        inner.mapping = dict(self.mapping)
        args = tuple(Value(a.type, a.hint) for a in region.args)
        inner.mapping.update(zip(region.args, args, strict=True))
        for op in region.ops:
            inner.clone(op)
        return Region(args, tuple(inner.ops), tuple(inner.get(v) for v in region.yields))


def uses(region: Region) -> dict[Value, list[Op]]:
    """The ops (at any depth) that read each value."""
    found: dict[Value, list[Op]] = {}
    for op in region.walk():
        for value in op.operands:
            found.setdefault(value, []).append(op)
        for inner in op.regions:
            for value in inner.yields:
                found.setdefault(value, []).append(op)
    return found


def without_dead_ops(function: Function) -> Function:
    """The function without ops whose results nobody reads."""
    needed = set(function.body.yields) | set(function.updates.values())
    kept: list[Op] = []
    for op in reversed(function.body.ops):
        if any(r in needed for r in op.results):
            kept.append(op)
            needed.update(op.operands)
            for region in op.regions:
                needed.update(v for inner in region.walk() for v in inner.operands)
                needed.update(region.yields)
    return function.with_ops(reversed(kept))


__all__ = [
    "Dim", "Function", "Kernel", "Location", "Module", "Op", "Parameter", "Region", "Rewriter", "Type", "Value",
    "uses", "without_dead_ops",
]  # fmt: skip
