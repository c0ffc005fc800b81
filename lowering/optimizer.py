"""From gradients to a training step: parameter pools, the global-norm clip, AdamW, seeded init and batch windows.

All weights lie in one flat array, `@weights`, and so do gradients and the two moments, in the same order: first the
tensors that decay, then the others, each class sorted by how it starts. Clip and AdamW are then a few flat ops.
Where a device cannot bind so much at once, the flat array is cut into pieces, `@weights`, `@weights2`, …"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import gcd, lcm, prod
from typing import Any

import numpy as np

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Parameter, Region, Rewriter, Value, without_dead_ops
from tinygpt.ir.errors import UserError
from tinygpt.ir.ops import GraphBuilder
from tinygpt.ir.types import TensorType
from tinygpt.lowering.differentiate import GRADIENT
from tinygpt.lowering.passes import Pass, register

ROW = 1024  # about as many elements have the rows of the flat arrays, so that sums of them have two stages
TILE, ALIGNED = 64, 64  # elements: the tile of a product that chunks should not cut, and what addresses are aligned to
POOLS = ("weights", "adam.m", "adam.v")  # the flat arrays that live from step to step
INIT_STREAM, WINDOW_STREAM = 1, 2  # second counter word of the random number generator


@dataclass(frozen=True)
class Layout:
    """Where each weight lies in the flat arrays: name -> (offset in elements, shape). `decaying` elements decay.

    `pieces` are the (start, stop) of the arrays that the flat one is cut into. Only a weight that is larger than a piece
    may be is cut, between two of its rows."""

    places: Mapping[str, tuple[int, tuple[int, ...]]]
    decaying: int
    size: int
    pieces: tuple[tuple[int, int], ...]

    @staticmethod
    def of(module: Module) -> Layout:
        """The layout recorded in a module's attributes."""
        record = module.attrs["layout"]
        places = {n: (o, tuple(s)) for n, (o, s) in record["places"].items()}
        return Layout(places, record["decaying"], record["size"], tuple((start, stop) for start, stop in record["pieces"]))

    @property
    def attrs(self) -> dict[str, object]:
        return {"places": {n: (o, s) for n, (o, s) in self.places.items()}, "decaying": self.decaying, "size": self.size, "pieces": self.pieces}

    def names(self, stem: str) -> list[str]:
        """What the pieces of a flat array are called: stem, stem2, …"""
        return [stem if n == 0 else f"{stem}{n + 1}" for n in range(len(self.pieces))]

    def parts(self, name: str) -> list[tuple[int, int, int]]:
        """The pieces a weight lies in: (number of the piece, its first element in the flat array, the one behind its last)."""
        offset, shape = self.places[name]
        end = offset + prod(shape)
        return [(n, max(a, offset), min(b, end)) for n, (a, b) in enumerate(self.pieces) if a < end and offset < b]

    def cut(self, flat: np.ndarray, stem: str) -> dict[str, np.ndarray]:
        """A flat array as its pieces, by their names."""
        return {name: flat[a:b] for name, (a, b) in zip(self.names(stem), self.pieces, strict=True)}

    def joined(self, found: Mapping[str, np.ndarray], stem: str) -> np.ndarray:
        """The flat array of which `found` has all pieces."""
        return np.concatenate([found[name] for name in self.names(stem)])

    def pooled(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Named arrays as one flat array."""
        flat = np.zeros(self.size, np.result_type(*arrays.values()))
        for name, (offset, shape) in self.places.items():
            flat[offset : offset + prod(shape)] = np.asarray(arrays[name]).reshape(-1)
        return flat

    def named(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """One flat array as named arrays (views)."""
        return {name: flat[o : o + prod(s)].reshape(s) for name, (o, s) in self.places.items()}


def layout(parameters: Sequence[Parameter], families: Sequence[Sequence[str]], limit: int = 0) -> Layout:
    """Lay out weights. The members of a family (parameters that are used concatenated) stay together, in its order.

    A piece has at most `limit` elements; 0 is no limit. Raises UserError for a weight that cannot be cut as it must be."""
    by_name = {p.name: p for p in parameters}
    leader = {name: family[0] for family in families for name in family}
    position = {p.name: i for i, p in enumerate(parameters)}
    member = {name: i for family in families for i, name in enumerate(family)}

    def key(p: Parameter) -> tuple[object, ...]:
        first = by_name[leader.get(p.name, p.name)]
        return (first.type.rank < 2, repr(first.init), position[first.name], member.get(p.name, 0))

    places, pieces, at, start, decaying = {}, [], 0, 0, 0
    whole = limit // ROW * ROW
    for _, group in groupby(sorted(parameters, key=key), key=lambda p: leader.get(p.name, p.name)):
        unit = list(group)
        if whole and at > start and at + sum(p.type.size for p in unit) - start > whole:
            at = -(-at // ROW) * ROW
            pieces.append((start, at))
            start = at
        for p in unit:
            for rows in row_chunks(p.type.shape, whole)[:-1] if whole and p.type.size > whole else []:
                width = p.type.size // p.type.shape[0]
                if at + rows.start * width != start or len(rows) * width % ROW:
                    raise UserError(
                        f"weight {p.name} ({p.type}) has {p.type.bytes:,} bytes, a binding of the device holds {4 * whole:,}, and it cannot be cut",
                        hint="take a profile with larger bindings, or a weight whose rows are a multiple of 1024 elements",
                    )
                pieces.append((start, start + len(rows) * width))
                start += len(rows) * width
            places[p.name] = (at, p.type.shape)
            at += p.type.size
            if p.type.rank >= 2:
                decaying = at
    size = at if row_length(at - start) else -(-at // ROW) * ROW
    return Layout(places, decaying, size, (*pieces, (start, size)))


def row_length(size: int) -> int:
    """How long the rows are in which a flat array of `size` elements is summed up; 0 if it must be padded to whole rows."""
    return min((n for n in range(ROW // 2, 2 * ROW, 4) if size % n == 0), key=lambda n: abs(n - ROW), default=0)


def row_chunks(shape: Sequence[int], limit: int) -> list[range]:
    """The rows (the first of two axes) of an array of `shape` in chunks of at most `limit` elements.

    Chunks begin at whole rows of the flat arrays, or at least at aligned addresses, and are equal if that costs little.
    Raises UserError if so few rows do not fit."""
    rows, width = prod(shape[:-1]), shape[-1]
    fits = limit // width
    steps = [n for n in (lcm(ROW // gcd(ROW, width), TILE), ROW // gcd(ROW, width), ALIGNED // gcd(ALIGNED, width)) if n <= fits]
    if rows <= fits:
        return [range(rows)]
    if not steps:
        raise UserError(f"an array of shape {list(shape)} has rows of {width:,} elements, a binding of the device holds {limit:,}", hint="take a profile with larger bindings")
    fewest = -(-rows // (fits // steps[0] * steps[0]))
    even = [rows // n for n in range(fewest, 2 * fewest + 1) if rows % n == 0 and rows // n % steps[0] == 0]
    step = even[0] if even else -(-rows // (fewest * steps[0])) * steps[0]
    return [range(a, min(a + step, rows)) for a in range(0, rows, step)]


def concatenated(function: Function, parameters: Mapping[Value, Parameter]) -> list[list[str]]:
    """Groups of parameters that the function concatenates along their first axis."""
    return [
        [parameters[v].name for v in op.operands]
        for op in function.body.ops
        if op.name == "concat" and op.attrs["axis"] == 0 and all(v in parameters for v in op.operands)
    ]


@register
@dataclass(frozen=True)
class Optimize(Pass):
    """Pool the weights; turn `grads` into train_step, grads and apply; add init and windows.

    Reads the training defaults (betas, eps, weight decay, clip) from the module's attribute `training`."""

    name = "optimize"

    def run(self, module: Module, caps: Caps) -> Module:
        weights = [p for p in module.parameters.values() if p.role == "param"]
        values = {p.value: p for p in weights}
        families = [f for fn in module.functions.values() for f in concatenated(fn, values)]
        unique = list({tuple(f): f for f in families}.values())
        plan = layout(weights, unique, caps.binding_bytes // 4)
        pools = {
            name: Parameter(name, Value(TensorType("f32", (stop - start,)), name), role="state")
            for stem in POOLS for name, (start, stop) in zip(plan.names(stem), plan.pieces, strict=True)
        }  # fmt: skip
        pooled = {name: over_pool(f, values, plan, pools) for name, f in module.functions.items()}
        training = module.attrs["training"]
        grads = packed_gradients(pooled["grads"], plan)
        functions = {
            **pooled,
            "grads": grads,
            "train_step": train_step(grads, plan, pools, training),
            "apply": apply_step(plan, pools, training),
            "init": init(plan, {p.name: p for p in weights}),
            "windows": windows(module.functions["loss"].params[0].type.shape[0]),
        }
        inits = {p.name: p.init for p in weights}
        attrs = {**module.attrs, "layout": plan.attrs, "inits": inits}
        return replace(module, parameters=pools, functions=functions, attrs=attrs)


def over_pool(function: Function, weights: Mapping[Value, Parameter], plan: Layout, pools: Mapping[str, Parameter]) -> Function:
    """The function with every weight read as a part of the flat array: of one of its pieces, but for cut weights."""
    pieces = [pools[name].value for name in plan.names("weights")]
    used = {v for op in function.body.ops for v in op.operands if v in weights}
    g, r = GraphBuilder(), Rewriter()
    for value in (v for v in weights if v in used):
        name, shape = weights[value].name, value.type.shape
        parts = []
        for n, start, stop in plan.parts(name):
            flat = g("slice", pieces[n], axis=0, start=start - plan.pieces[n][0], stop=stop - plan.pieces[n][0])
            parts.append(g("reshape", flat, shape=((stop - start) * shape[0] // prod(shape), *shape[1:]) if shape else ()))
        r.mapping[value] = parts[0] if len(parts) == 1 else g("concat", *parts, axis=0)
    r.ops = g.ops
    for op in function.body.ops:
        r.clone(op)
    body = Region(function.body.args, tuple(r.ops), tuple(r.get(v) for v in function.body.yields))
    return replace(function, body=body)


def packed_gradients(grads: Function, plan: Layout) -> Function:
    """`grads` with its gradients as flat results, one for each piece."""
    g = GraphBuilder()
    g.ops = list(grads.body.ops)
    found = {n.removeprefix(GRADIENT): v for n, v in zip(grads.result_names, grads.body.yields, strict=True) if n.startswith(GRADIENT)}
    packed: list[tuple[list[Value], list[int]]] = [([], []) for _ in plan.pieces]
    for name in sorted(found, key=lambda n: plan.places[n][0]):
        offset, shape = plan.places[name]
        width = prod(shape[1:])
        for n, start, stop in plan.parts(name):
            whole = stop - start == prod(shape)
            rows = found[name] if whole else g("slice", found[name], axis=0, start=(start - offset) // width, stop=(stop - offset) // width)
            packed[n][0].append(rows)
            packed[n][1].append(start - plan.pieces[n][0])
    flat = [g("pack", *v, offsets=tuple(o), size=stop - start) for (v, o), (start, stop) in zip(packed, plan.pieces, strict=True)]
    body = Region(grads.body.args, tuple(g.ops), (grads.body.yields[0], *flat))
    return without_dead_ops(replace(grads, body=body, result_names=(grads.result_names[0], *plan.names("gradients"))))


def _scalar_inputs() -> dict[str, Value]:
    return {name: Value(TensorType("f32", ()), name) for name in ("lr", "bias1", "bias2")}


def train_step(grads: Function, plan: Layout, pools: Mapping[str, Parameter], training: Mapping[str, float]) -> Function:
    """loss and gradient norm; updates weights and moments. Scalars: learning rate, 1 - beta1^t and 1 - beta2^t."""
    scalars = _scalar_inputs()
    g = GraphBuilder()
    g.ops = list(grads.body.ops)
    loss, *packed = grads.body.yields
    norm, updates = clipped_adamw(g, packed, scalars, plan, pools, training)
    params = grads.params[:2] + tuple(scalars.values()) + grads.params[2:]
    return Function("train_step", Region(params, tuple(g.ops), (loss, norm)), updates, ("loss", "grad_norm"))


def apply_step(plan: Layout, pools: Mapping[str, Parameter], training: Mapping[str, float]) -> Function:
    """The second half of a training step: clip the given gradients and take an AdamW step."""
    scalars, g = _scalar_inputs(), GraphBuilder()
    gradients = [Value(TensorType("f32", (b - a,)), name) for name, (a, b) in zip(plan.names("gradients"), plan.pieces, strict=True)]
    whole = [_without_gaps(g, piece, n, plan) for n, piece in enumerate(gradients)]
    norm, updates = clipped_adamw(g, whole, scalars, plan, pools, training)
    return Function("apply", Region((*scalars.values(), *gradients), tuple(g.ops), (norm,)), updates, ("grad_norm",))


def _without_gaps(g: GraphBuilder, piece: Value, number: int, plan: Layout) -> Value:
    """A piece of the gradients that hosts wrote weight by weight: what lies between two weights holds anything until it is
    packed again, and would count in the norm."""
    start, stop = plan.pieces[number]
    parts = sorted((a - start, b - start) for name in plan.places for n, a, b in plan.parts(name) if n == number)
    if parts and all(b == a for (_, b), (a, _) in zip([(0, 0), *parts], [*parts, (stop - start, 0)], strict=True)):
        return piece
    return g("pack", *(g("slice", piece, axis=0, start=a, stop=b) for a, b in parts), offsets=tuple(a for a, _ in parts), size=stop - start)


def clipped_adamw(
    g: GraphBuilder, gradients: Sequence[Value], scalars: Mapping[str, Value], plan: Layout, pools: Mapping[str, Parameter], training: Mapping[str, float]
) -> tuple[Value, dict[str, Value]]:
    """Clip by the global norm (as torch.nn.utils.clip_grad_norm_) and AdamW (Loshchilov & Hutter 2019, as torch.optim.AdamW)."""
    sums = []
    for piece in gradients:
        length = row_length(piece.type.size)
        matrix = g("reshape", piece, shape=(piece.type.size // length, length))
        sums.append(g("sum", g("mul", matrix, matrix), axes=(1,)))
    total = g("sum", g("concat", *sums, axis=0) if len(sums) > 1 else sums[0], axes=(0,))
    norm = g("sqrt", total)
    scale = g("min", g("div", g.constant(training["clip"]), g("add", norm, g.constant(1e-6))), g.constant(1.0))
    updates: dict[str, Value] = {}
    for n, (start, stop) in enumerate(plan.pieces):
        names = [plan.names(stem)[n] for stem in POOLS]
        decaying = min(max(plan.decaying - start, 0), stop - start)
        new = adamw(g, [pools[name].value for name in names], g("mul", gradients[n], scale), scalars, decaying, training)
        updates |= dict(zip(names, new, strict=True))
    return norm, updates


def adamw(
    g: GraphBuilder, state: Sequence[Value], grad: Value, scalars: Mapping[str, Value], decaying: int, training: Mapping[str, float]
) -> tuple[Value, Value, Value]:
    """New weights and moments from flat ones and a clipped gradient; the first `decaying` weights decay."""
    weights, m, v = state
    beta1, beta2 = training["beta1"], training["beta2"]
    new_m = g("add", g("mul", m, g.constant(beta1)), g("mul", grad, g.constant(1 - beta1)))
    new_v = g("add", g("mul", v, g.constant(beta2)), g("mul", g("mul", grad, grad), g.constant(1 - beta2)))
    shrink = g("sub", g.constant(1.0), g("mul", scalars["lr"], g.constant(training["weight_decay"])))
    if 0 < decaying < weights.type.size:
        decays = g("lt", g("iota", axis=0, shape=weights.type.shape), g.constant(decaying, "i32"))
        shrink = g("where", decays, shrink, g.constant(1.0))
    kept = g("mul", weights, shrink) if decaying else weights
    deviation = g("add", g("div", g("sqrt", new_v), g("sqrt", scalars["bias2"])), g.constant(training["eps"]))
    step = g("div", scalars["lr"], scalars["bias1"])
    return g("sub", kept, g("mul", step, g("div", new_m, deviation))), new_m, new_v


def init(plan: Layout, weights: Mapping[str, Parameter]) -> Function:
    """Initial weights from a seed. The counter is the number of the element among all weights, in their order, so that
    the same numbers are drawn at any tiling and wherever the flat array is cut."""
    seed, g = Value(TensorType("u32", (2,)), "seed"), GraphBuilder()
    updates: dict[str, Value] = {}
    runs: list[list[Run]] = [[] for _ in plan.pieces]
    count = 0
    for name, (offset, shape) in plan.places.items():
        rule = weights[name].init
        for n, start, stop in plan.parts(name):
            first = count + start - offset
            if runs[n] and runs[n][-1].goes_on(rule, start, first):
                runs[n][-1] = replace(runs[n][-1], stop=stop)
            else:
                runs[n].append(Run(rule, start, stop, first))
        count += prod(shape)
    for n, (start, stop) in enumerate(plan.pieces):
        packed = g("pack", *(r.drawn(g, seed) for r in runs[n]), offsets=tuple(r.start - start for r in runs[n]), size=stop - start)
        zeros = g("cast", g("mul", g("iota", axis=0, shape=(stop - start,)), g.constant(0, "i32")), dtype="f32")
        updates |= {plan.names(stem)[n]: packed if stem == "weights" else zeros for stem in POOLS}
    return Function("init", Region((seed,), tuple(g.ops)), updates, ())


@dataclass(frozen=True)
class Run:
    """Elements start..stop of the flat array that start by the same rule; `first` is the number of the first one."""

    rule: tuple[Any, ...]
    start: int
    stop: int
    first: int

    def goes_on(self, rule: tuple[Any, ...], start: int, first: int) -> bool:
        """Whether elements that begin at `start` with number `first` can be drawn with these."""
        return self.rule == rule and first - self.first == start - self.start

    def drawn(self, g: GraphBuilder, seed: Value) -> Value:
        count = self.stop - self.start
        if self.rule[0] == "normal":
            bits = random_bits(g, seed, count, g.constant(self.first, "u32"), INIT_STREAM)
            return g("mul", g("bits_to_normal", bits), g.constant(self.rule[1]))
        value = self.rule[1] if self.rule[0] == "constant" else 0.0
        zero = g("cast", g("mul", g("iota", axis=0, shape=(count,)), g.constant(0, "i32")), dtype="f32")
        return g("add", zero, g.constant(value))


def random_bits(g: GraphBuilder, key: Value, count: int, first: Value, stream: int) -> Value:
    """`count` words of random bits for counters first, first + 1, … of one stream; key is u32[2]."""
    words = [g("reshape", g("slice", key, axis=0, start=i, stop=i + 1), shape=()) for i in (0, 1)]
    index = g("cast", g("iota", axis=0, shape=(count,)), dtype="u32")
    return g("random_bits", words[0], words[1], g("add", index, first), g.constant(stream, "u32"))


def windows(batch: int) -> Function:
    """Offsets of the batch of a step: `batch` numbers in [0, count), a function of the seed and the step alone."""
    seed, step, count = Value(TensorType("u32", (2,)), "seed"), Value(TensorType("u32", ()), "step"), Value(TensorType("u32", ()), "count")
    g = GraphBuilder()
    bits = random_bits(g, seed, batch, g("mul", step, g.constant(batch, "u32")), WINDOW_STREAM)
    offsets = g("cast", g("bits_below", bits, count), dtype="i32")
    return Function("windows", Region((seed, step, count), tuple(g.ops), (offsets,)), {}, ("offsets",))


