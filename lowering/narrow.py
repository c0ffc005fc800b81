"""narrow: on a device that asks for it, what kernels hand on to each other is kept in 16 bits, and all arithmetic stays in 32.

A group converts a value it leaves for others where it makes it, and each reader converts it back while it reads, so the
module says in casts what is rounded and what is not; a group itself goes on with the number it has in registers. Kept
narrow are the activations, their gradients, and a working copy of the matrices among the weights, made once for each run
of a function. Not narrow are the weights themselves, their gradients and what adds up to them, the optimizer's state,
vectors (biases, gains), statistics of rows (means, log-sum-exps), and everything that hosts see.

A gradient of an activation is the share of one token in a mean over all of them: it is multiplied by a power of two for
each of them, and by HEADROOM, before it is rounded, and divided by that where it is read. In exact arithmetic this
changes nothing. What is too large for 16 bits becomes infinite, and so does the gradient norm, which stops a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Op, Region, Value
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.lowering.passes import Pass, register

WIDE = "f32"
LARGEST = 65504.0  # f16
# The gradient of a logit is at most one token's share. Layers make it smaller far more often than larger: 13 binary orders
# are left for those that make it larger, and 17 between it and the smallest number that a device need not flush to zero.
HEADROOM = 8


@register
@dataclass(frozen=True)
class Narrow(Pass):
    """Keep what groups hand on to each other in the type the device asks for: casts at the ends of each group."""

    name = "narrow"

    def run(self, module: Module, caps: Caps) -> Module:
        if caps.storage == WIDE:
            return module
        parameters = set(module.parameter_of())
        return module.map_functions(lambda f: Narrowing(f, parameters, caps.storage).narrowed())


class Narrowing:
    """The rewriting of one function."""

    def __init__(self, function: Function, parameters: set[Value], dtype: str) -> None:
        self.function, self.parameters, self.dtype = function, parameters, dtype
        self.made = {r: op for op in function.body.ops for r in op.results}
        self.exact = exact_values(function)
        self.scale = gradient_scale(function)
        self.gradients = gradient_values(function)
        self.chosen = self.choose()
        self.g = GraphBuilder()
        self.wides: dict[Value, Value] = {}
        self.narrows: dict[tuple[Value, float], Value] = {}  # by what they are multiplied by

    # -- what is kept narrow
    def choose(self) -> set[Value]:
        """The results of groups that are kept narrow: of pieces that views put together, all in one scale, or none."""
        results = [r for op in self.function.body.ops if op.name == "group" for r in op.results]
        chosen = {r for r in results if r.type.dtype == WIDE and r.type.rank > 1 and r not in self.exact}
        before = -1
        while len(chosen) != before:
            before = len(chosen)
            for op in self.function.body.ops:
                if op.name == "group" or len(op.operands) < 2:
                    continue
                pieces = [s for v in op.operands for s in self.sources(v)]
                rest = [s for s in pieces if not self.fits(s)]
                if not chosen.issuperset(rest) or len({s in self.gradients for s in rest}) > 1:
                    chosen.difference_update(pieces)
        return chosen

    def sources(self, value: Value) -> list[Value]:
        """The values behind a value's views."""
        op = self.made.get(value)
        if op is None or op.name == "group" or OPS[op.name].kind != "view":
            return [value]
        return [s for v in op.operands for s in self.sources(v)]

    def fits(self, value: Value) -> bool:
        """Whether a value is a number that can be written down in 16 bits, whatever it is multiplied by."""
        op = self.made.get(value)
        return op is not None and op.name == "constant" and op.attrs["dtype"] == WIDE and abs(op.attrs["value"]) * self.scale <= LARGEST

    def is_narrow(self, value: Value) -> bool:
        """Whether a group reads a value from 16 bits: what was chosen, and matrices among the weights."""
        pieces = [s for s in self.sources(value) if not self.fits(s)]
        if not pieces or value.type.dtype != WIDE:
            return False
        if self.parameters.issuperset(pieces):
            return value.type.rank > 1 and value not in self.exact
        return self.chosen.issuperset(pieces)

    def scale_of(self, value: Value) -> float:
        """What a value is multiplied by before it is made narrow."""
        return self.scale if any(s in self.gradients for s in self.sources(value)) else 1.0

    # -- the new function
    def narrowed(self) -> Function:
        for op in self.function.body.ops:
            if op.name == "group":
                self.group(op)
        yields = tuple(map(self.wide, self.function.body.yields))
        updates = {name: self.wide(v) for name, v in self.function.updates.items()}
        body = replace(self.function.body, ops=tuple(self.g.ops), yields=yields)
        return replace(self.function, body=body, updates=updates)

    def wide(self, value: Value) -> Value:
        """A value as it was, with the views that lead to it."""
        op = self.made.get(value)
        if op is None or op.name == "group":
            return value
        if value not in self.wides:
            self.wides[value] = self.view(op, [self.wide(v) for v in op.operands])
        return self.wides[value]

    def narrow(self, value: Value, scale: float) -> Value:
        """A value in 16 bits, multiplied by `scale`: the same views of what is kept narrow, a copy of the weights, a constant."""
        if (value, scale) not in self.narrows:
            op = self.made.get(value)
            if op is None:
                found = self.working_copy(value)
            elif op.name == "constant":
                found = self.g("constant", value=op.attrs["value"] * scale, dtype=self.dtype)
            else:
                found = self.view(op, [self.narrow(v, scale) for v in op.operands])
            self.narrows[value, scale] = found
        return self.narrows[value, scale]

    def view(self, op: Op, operands: list[Value]) -> Value:
        self.g.loc = op.loc
        return self.g(op.name, *operands, hint=op.result.hint, **op.attrs)

    def working_copy(self, weights: Value) -> Value:
        """A narrow copy of a flat array of weights, made by a group of its own."""
        inner, arg = GraphBuilder(), Value(weights.type, weights.hint)
        copied = inner("cast", arg, dtype=self.dtype)
        result = Value(copied.type)
        region = Region((arg,), tuple(inner.ops), (copied,))
        self.g.ops.append(Op("group", (weights,), (result,), {"kind": "pointwise"}, (region,)))
        return result

    def group(self, op: Op) -> None:
        """A group that reads narrow operands and leaves narrow results."""
        (body,) = op.regions
        inner, operands, args = GraphBuilder(), [], []
        inner.loc = op.loc
        known: dict[Value, Value] = {}
        for arg, value in zip(body.args, op.operands, strict=True):
            if not self.is_narrow(value):
                operands.append(self.wide(value))
                args.append(arg)
                continue
            scale = self.scale_of(value)
            operands.append(self.narrow(value, scale))
            args.append(Value(operands[-1].type, arg.hint))
            known[arg] = scaled(inner, inner("cast", args[-1], dtype=WIDE), 1 / scale)
        inner.ops += [replace(o, operands=tuple(known.get(v, v) for v in o.operands)) for o in body.ops]
        yields, results = [], []
        for value, result in zip(body.yields, op.results, strict=True):
            if result in self.chosen:
                scale = self.scale_of(result)
                value = inner("cast", scaled(inner, value, scale), dtype=self.dtype)
                self.narrows[result, scale] = Value(value.type, result.hint)
                result = self.narrows[result, scale]
            yields.append(value)
            results.append(result)
        region = Region(tuple(args), tuple(inner.ops), tuple(yields))
        self.g.ops.append(replace(op, operands=tuple(operands), results=tuple(results), regions=(region,)))


def scaled(g: GraphBuilder, value: Value, factor: float) -> Value:
    return value if factor == 1 else g("mul", value, g.constant(factor))


def flat_ops(function: Function) -> Iterator[tuple[Op, list[Value], list[Value]]]:
    """All ops that compute, those inside groups too, with operands and results as values of the function: what a group
    yields goes by the name of its result."""
    for op in function.body.ops:
        if op.name != "group":
            yield op, list(op.operands), list(op.results)
            continue
        (body,) = op.regions
        names = dict(zip(body.args, op.operands, strict=True)) | dict(zip(body.yields, op.results, strict=True))
        for inner in body.ops:
            yield inner, [names.get(v, v) for v in inner.operands], [names.get(v, v) for v in inner.results]


def exact_values(function: Function) -> set[Value]:
    """Values that stay as they are: sums over tokens and what is made of them, statistics of rows, and whatever reaches
    a result or new state without being summed on the way."""
    ops = list(flat_ops(function))
    found: set[Value] = set()
    for op, operands, results in ops:
        definition = OPS[op.name]
        if definition.kind in ("view", "pointwise"):
            rest = [v for v in operands if v.type.rank]
            if rest and (any if definition.kind == "view" else all)(v in found for v in rest):
                found.update(results)
            continue
        widest = max(v.type.rank for v in (*operands, *results))
        is_sum = definition.kind == "columns" or op.attrs.get("parts", 1) > 1
        found.update(r for r in results if is_sum or r.type.rank < widest)
    found.update(function.body.yields, function.updates.values())
    for op, operands, results in reversed(ops):
        if op.name == "pack" or (OPS[op.name].kind in ("view", "pointwise") and any(r in found for r in results)):
            found.update(operands)
    return found


def gradient_values(function: Function) -> set[Value]:
    """Gradients of activations and what else follows from the targets on the way back: what depends on the second input,
    and does not reach the first result, which is the loss."""
    found = set(function.params[1:2])
    loss = set(function.body.yields[:1])
    ops = list(flat_ops(function))
    for _, operands, results in ops:
        if any(v in found for v in operands):
            found.update(results)
    for _, operands, results in reversed(ops):
        if any(r in loss for r in results):
            loss.update(operands)
    return found - loss


def gradient_scale(function: Function) -> float:
    """A power of two: HEADROOM for each token, rounded up."""
    tokens = function.params[0].type.size if function.params else 1
    return float(HEADROOM << (tokens - 1).bit_length())
