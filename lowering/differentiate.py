"""Reverse-mode differentiation of the loss, graph to graph: every op carries its own gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Region, Value, without_dead_ops
from tinygpt.ir.errors import UserError
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.lowering.passes import Pass, register

GRADIENT = "grad:"


@register
@dataclass(frozen=True)
class Differentiate(Pass):
    """Add function `grads`: the loss and its gradient with respect to every weight, as results `grad:NAME`.

    Where the model drops out while it trains, it is the function `training_loss` that is differentiated, and replaced."""

    name = "differentiate"

    def run(self, module: Module, caps: Caps) -> Module:
        functions = dict(module.functions)
        trained = functions.pop("training_loss", functions["loss"])
        return replace(module, functions={**functions, "grads": gradients(module, trained)})


def gradients(module: Module, function: Function) -> Function:
    """The function that returns the first result of `function` and its gradients. Backward ops keep their op's location."""
    g = GraphBuilder()
    g.ops = list(function.body.ops)
    loss = function.body.yields[0]
    weights = {p.value: p for p in module.parameters.values() if p.role == "param"}
    active = set(weights)
    for op in function.body.ops:
        if any(v in active for v in op.operands):
            active.update(r for r in op.results if r.type.dtype == "f32")
    if loss not in active:
        raise UserError("the loss does not depend on any weight", hint="return the loss first, computed from the model's parameters")
    found: dict[Value, Value | None] = {loss: g.constant(1.0)}
    for op in reversed(function.body.ops):
        grads = [found.get(r) for r in op.results]
        if all(x is None for x in grads) or not any(v in active for v in op.operands):
            continue
        g.loc = op.loc
        for operand, grad in zip(op.operands, OPS[op.name].gradient(g, op, grads), strict=True):
            if operand in active:
                found[operand] = g.add(found.get(operand), grad)
    g.loc = None
    results, names = [loss], [function.result_names[0]]
    for value, parameter in weights.items():
        grad = found.get(value)
        if grad is None:
            grad = g("broadcast", g.constant(0.0), shape=value.type.shape)
        results.append(grad)
        names.append(GRADIENT + parameter.name)
    body = Region(function.body.args, tuple(g.ops), tuple(results))
    return without_dead_ops(replace(function, name="grads", body=body, result_names=tuple(names), updates={}))
