"""From gradients to a training step: parameter pools, the global-norm clip, AdamW, seeded init and batch windows.

All weights lie in one flat array, `@weights`, and so do gradients and the two moments, in the same order: first the
tensors that decay, then the others, each class sorted by how it starts. Clip and AdamW are then a few flat ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Parameter, Region, Rewriter, Value, without_dead_ops
from tinygpt.ir.ops import GraphBuilder
from tinygpt.ir.types import TensorType
from tinygpt.lowering.differentiate import GRADIENT
from tinygpt.lowering.passes import Pass, register

ROW = 1024  # the flat arrays are padded to whole rows of this many elements, so that sums of them have two stages
INIT_STREAM, WINDOW_STREAM = 1, 2  # second counter word of the random number generator


@dataclass(frozen=True)
class Layout:
    """Where each weight lies in the flat arrays: name -> (offset in elements, shape). `decaying` elements decay."""

    places: Mapping[str, tuple[int, tuple[int, ...]]]
    decaying: int
    size: int

    @staticmethod
    def of(module: Module) -> Layout:
        """The layout recorded in a module's attributes."""
        record = module.attrs["layout"]
        return Layout({n: (o, tuple(s)) for n, (o, s) in record["places"].items()}, record["decaying"], record["size"])

    @property
    def attrs(self) -> dict[str, object]:
        return {"places": {n: (o, s) for n, (o, s) in self.places.items()}, "decaying": self.decaying, "size": self.size}

    def pooled(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Named arrays as one flat array."""
        flat = np.zeros(self.size, np.result_type(*arrays.values()))
        for name, (offset, shape) in self.places.items():
            flat[offset : offset + prod(shape)] = np.asarray(arrays[name]).reshape(-1)
        return flat

    def named(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """One flat array as named arrays (views)."""
        return {name: flat[o : o + prod(s)].reshape(s) for name, (o, s) in self.places.items()}


def layout(parameters: Sequence[Parameter], families: Sequence[Sequence[str]]) -> Layout:
    """Lay out weights. The members of a family (parameters that are used concatenated) stay together, in its order."""
    by_name = {p.name: p for p in parameters}
    leader = {name: family[0] for family in families for name in family}
    position = {p.name: i for i, p in enumerate(parameters)}
    member = {name: i for family in families for i, name in enumerate(family)}

    def key(p: Parameter) -> tuple[object, ...]:
        first = by_name[leader.get(p.name, p.name)]
        return (first.type.rank < 2, repr(first.init), position[first.name], member.get(p.name, 0))

    places, at, decaying = {}, 0, 0
    for p in sorted(parameters, key=key):
        places[p.name] = (at, p.type.shape)
        at += p.type.size
        if p.type.rank >= 2:
            decaying = at
    return Layout(places, decaying, -(-at // ROW) * ROW)


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
        plan = layout(weights, unique)
        flat = TensorType("f32", (plan.size,))
        pools = {n: Parameter(n, Value(flat, n), role="state") for n in ("weights", "adam.m", "adam.v")}
        pooled = {name: over_pool(f, values, plan, pools["weights"].value) for name, f in module.functions.items()}
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


def over_pool(function: Function, weights: Mapping[Value, Parameter], plan: Layout, pool: Value) -> Function:
    """The function with every weight read as a part of the pool."""
    used = {v for op in function.body.ops for v in op.operands if v in weights}
    g, r = GraphBuilder(), Rewriter()
    for value in (v for v in weights if v in used):
        offset, shape = plan.places[weights[value].name]
        part = g("slice", pool, axis=0, start=offset, stop=offset + prod(shape))
        r.mapping[value] = g("reshape", part, shape=shape)
    r.ops = g.ops
    for op in function.body.ops:
        r.clone(op)
    body = Region(function.body.args, tuple(r.ops), tuple(r.get(v) for v in function.body.yields))
    return replace(function, body=body)


def packed_gradients(grads: Function, plan: Layout) -> Function:
    """`grads` with its gradients as one flat result."""
    g = GraphBuilder()
    g.ops = list(grads.body.ops)
    found = {n.removeprefix(GRADIENT): v for n, v in zip(grads.result_names, grads.body.yields, strict=True) if n.startswith(GRADIENT)}
    order = sorted(found, key=lambda n: plan.places[n][0])
    packed = g("pack", *(found[n] for n in order), offsets=tuple(plan.places[n][0] for n in order), size=plan.size)
    body = Region(grads.body.args, tuple(g.ops), (grads.body.yields[0], packed))
    return without_dead_ops(replace(grads, body=body, result_names=(grads.result_names[0], "gradients")))


def _scalar_inputs() -> dict[str, Value]:
    return {name: Value(TensorType("f32", ()), name) for name in ("lr", "bias1", "bias2")}


def train_step(grads: Function, plan: Layout, pools: Mapping[str, Parameter], training: Mapping[str, float]) -> Function:
    """loss and gradient norm; updates weights and moments. Scalars: learning rate, 1 - beta1^t and 1 - beta2^t."""
    scalars = _scalar_inputs()
    g = GraphBuilder()
    g.ops = list(grads.body.ops)
    loss, packed = grads.body.yields
    norm, updates = clipped_adamw(g, packed, scalars, plan, pools, training)
    params = grads.params[:2] + tuple(scalars.values()) + grads.params[2:]
    return Function("train_step", Region(params, tuple(g.ops), (loss, norm)), updates, ("loss", "grad_norm"))


def apply_step(plan: Layout, pools: Mapping[str, Parameter], training: Mapping[str, float]) -> Function:
    """The second half of a training step: clip the given gradients and take an AdamW step."""
    scalars, g = _scalar_inputs(), GraphBuilder()
    gradients = Value(TensorType("f32", (plan.size,)), "gradients")
    norm, updates = clipped_adamw(g, gradients, scalars, plan, pools, training)
    return Function("apply", Region((*scalars.values(), gradients), tuple(g.ops), (norm,)), updates, ("grad_norm",))


def clipped_adamw(
    g: GraphBuilder, gradients: Value, scalars: Mapping[str, Value], plan: Layout, pools: Mapping[str, Parameter], training: Mapping[str, float]
) -> tuple[Value, dict[str, Value]]:
    """Clip by the global norm (as torch.nn.utils.clip_grad_norm_) and AdamW (Loshchilov & Hutter 2019, as torch.optim.AdamW)."""
    matrix = g("reshape", gradients, shape=(plan.size // ROW, ROW))
    total = g("sum", g("sum", g("mul", matrix, matrix), axes=(1,)), axes=(0,))
    norm = g("sqrt", total)
    scale = g("min", g("div", g.constant(training["clip"]), g("add", norm, g.constant(1e-6))), g.constant(1.0))
    grad = g("mul", gradients, scale)
    weights, m, v = (pools[n].value for n in ("weights", "adam.m", "adam.v"))
    beta1, beta2 = training["beta1"], training["beta2"]
    new_m = g("add", g("mul", m, g.constant(beta1)), g("mul", grad, g.constant(1 - beta1)))
    new_v = g("add", g("mul", v, g.constant(beta2)), g("mul", g("mul", grad, grad), g.constant(1 - beta2)))
    decays = g("lt", g("iota", axis=0, shape=(plan.size,)), g.constant(plan.decaying, "i32"))
    shrink = g("sub", g.constant(1.0), g("mul", scalars["lr"], g.constant(training["weight_decay"])))
    kept = g("mul", weights, g("where", decays, shrink, g.constant(1.0)))
    deviation = g("add", g("div", g("sqrt", new_v), g("sqrt", scalars["bias2"])), g.constant(training["eps"]))
    step = g("div", scalars["lr"], scalars["bias1"])
    new_weights = g("sub", kept, g("mul", step, g("div", new_m, deviation)))
    return norm, {"weights": new_weights, "adam.m": new_m, "adam.v": new_v}


def init(plan: Layout, weights: Mapping[str, Parameter]) -> Function:
    """Initial weights from a seed: the element's index in the pool is the counter, so any tiling draws the same numbers."""
    seed, g = Value(TensorType("u32", (2,)), "seed"), GraphBuilder()
    ranges: list[tuple[tuple[Any, ...], int, int]] = []  # runs of equal initializers: (init, start, stop)
    for name, (offset, shape) in plan.places.items():
        rule = weights[name].init
        if ranges and ranges[-1][0] == rule:
            ranges[-1] = (rule, ranges[-1][1], offset + prod(shape))
        else:
            ranges.append((rule, offset, offset + prod(shape)))
    pieces = []
    for rule, start, stop in ranges:
        if rule[0] == "normal":
            bits = random_bits(g, seed, stop - start, g.constant(start, "u32"), INIT_STREAM)
            pieces.append(g("mul", g("bits_to_normal", bits), g.constant(rule[1])))
        else:
            value = rule[1] if rule[0] == "constant" else 0.0
            zero = g("cast", g("mul", g("iota", axis=0, shape=(stop - start,)), g.constant(0, "i32")), dtype="f32")
            pieces.append(g("add", zero, g.constant(value)))
    packed = g("pack", *pieces, offsets=tuple(r[1] for r in ranges), size=plan.size)
    zeros = g("cast", g("mul", g("iota", axis=0, shape=(plan.size,)), g.constant(0, "i32")), dtype="f32")
    updates = {"weights": packed, "adam.m": zeros, "adam.v": zeros}
    return Function("init", Region((seed,), tuple(g.ops)), updates, ())


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


