"""Rewriting a graph function op by op: rules see an op over already rewritten operands and may replace it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tinygpt.ir.core import Function, Op, Region, Value, without_dead_ops
from tinygpt.ir.ops import OPS, GraphBuilder

Rule = Callable[["Rewrite", Op], "Sequence[Value] | None"]


class Rewrite(GraphBuilder):
    """A builder that knows which op made each value and emits equal ops once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[Value, Op] = {}
        self._known: dict[object, Op] = {}

    def emit(self, name: str, *operands: Value, hint: str = "", **attrs: object) -> Op:
        key = (name, operands, tuple(sorted((k, repr(v)) for k, v in attrs.items())))
        if key not in self._known:
            op = super().emit(name, *operands, hint=hint, **attrs)
            self._known[key] = op
            self.made.update((r, op) for r in op.results)
        return self._known[key]

    def maker(self, value: Value, name: str) -> Op | None:
        """The op that made a value, if it is a `name`."""
        op = self.made.get(value)
        return op if op is not None and op.name == name else None

    def constant_value(self, value: Value) -> float | None:
        """The number a value is everywhere, looking through views, if it is a constant."""
        op = self.made.get(value)
        while op is not None and OPS[op.name].kind == "view" and op.name != "concat":
            op = self.made.get(op.operands[0])
        return op.attrs["value"] if op is not None and op.name == "constant" else None


def rewrite(function: Function, rules: Sequence[Rule]) -> Function:
    """Apply the first rule that fits to each op, in order; drop what became unused."""
    b = Rewrite()
    mapping: dict[Value, Value] = {}
    for op in function.body.ops:
        b.loc = op.loc
        operands = tuple(mapping.get(v, v) for v in op.operands)
        current = replace(op, operands=operands)
        results: Sequence[Value] | None = None
        for rule in rules:
            results = rule(b, current)
            if results is not None:
                break
        if results is None:
            results = b.emit(op.name, *operands, hint=op.results[0].hint, **op.attrs).results
        mapping.update(zip(op.results, results, strict=True))
    yields = tuple(mapping.get(v, v) for v in function.body.yields)
    updates = {name: mapping.get(v, v) for name, v in function.updates.items()}
    body = Region(function.body.args, tuple(b.ops), yields)
    return without_dead_ops(replace(function, body=body, updates=updates))
