"""rematerialize: recompute cheap pointwise values in the backward pass instead of keeping them from the forward pass.

The GELU of every layer would be as much memory as all other activations of the layer together; its operand is kept
anyway for its derivative, and the kernel that computes the derivative can compute the value beside it."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Op, Value
from tinygpt.ir.ops import OPS, Pointwise
from tinygpt.lowering.passes import Pass, register


@register
@dataclass(frozen=True)
class Rematerialize(Pass):
    """Clone a pointwise op next to an op that reads the same operands much later, for the users after that op."""

    name = "rematerialize"
    distance: int = 24  # ops between a value and its late use for keeping it to count as waste

    def run(self, module: Module, caps: Caps) -> Module:
        return module.map_functions(self.rematerialized)

    def rematerialized(self, function: Function) -> Function:
        ops = list(function.body.ops)
        position = {op: i for i, op in enumerate(ops)}
        users: dict[Value, list[Op]] = {}
        for op in ops:
            for v in op.operands:
                users.setdefault(v, []).append(op)
        clones: list[tuple[float, Op]] = []
        renamed: dict[tuple[Op, Value], Value] = {}
        for op in ops:
            if not isinstance(OPS[op.name], Pointwise) or op.result.type.rank < 2 or len(op.operands) != 1:
                continue
            early, late = self.split_users(op, users, position)
            sibling = next((s for s in users[op.operands[0]] if position[s] > position[op] + self.distance and s.name.startswith(op.name)), None)
            if not early or not late or sibling is None:
                continue
            clone = replace(op, results=(Value(op.result.type, op.result.hint),))
            clones.append((max(position[u] for u in [sibling, *users.get(sibling.result, [])]) + 0.5, clone))
            for user in late:
                renamed[user, op.result] = clone.result
        if not clones:
            return function
        priority = [(float(position[op]), op) for op in ops] + clones
        rewired = [(p, replace(op, operands=tuple(renamed.get((op, v), v) for v in op.operands))) for p, op in priority]
        return function.with_ops(in_dependency_order(rewired))

    def split_users(self, op: Op, users: dict[Value, list[Op]], position: dict[Op, int]) -> tuple[list[Op], list[Op]]:
        """Users near the op, and users after a long stretch of other work (looking through views)."""
        early: list[Op] = []
        late: list[Op] = []
        for user in users.get(op.result, []):
            reached = [user] if OPS[user.name].kind != "view" else users.get(user.results[0], [])
            far = all(position[u] > position[op] + self.distance for u in reached)
            (late if far and position[user] > position[op] else early).append(user)
        return early, late


def in_dependency_order(priority: list[tuple[float, Op]]) -> list[Op]:
    """Ops sorted by priority as far as dependencies allow."""
    made = {r: op for _, op in priority for r in op.results}
    waiting = {op: len({made[v] for v in op.operands if v in made}) for _, op in priority}
    readers: dict[Op, list[Op]] = {}
    for _, op in priority:
        for source in {made[v] for v in op.operands if v in made}:
            readers.setdefault(source, []).append(op)
    rank = {op: (p, i) for i, (p, op) in enumerate(priority)}
    ready = [(rank[op], op) for _, op in priority if waiting[op] == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, op = heapq.heappop(ready)
        order.append(op)
        for reader in readers.get(op, []):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, (rank[reader], reader))
    return order
