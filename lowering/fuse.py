"""fuse: gather ops into groups, each of which becomes one kernel.

A group has at most one product or attention as its root, pointwise ops before it (computed operands) and behind it
(epilogue); or row programs over the same rows with the pointwise ops around them; or column sums over matrices of one
shape; or pointwise ops alone. Views stay outside: they are addresses. Groups are numbered in the order in which they will run,
and an op may join a group only if everything else it reads comes from groups before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Op, Region, Rewriter, Value
from tinygpt.ir.ops import OPS, RowOp
from tinygpt.lowering.passes import Pass, register


RECENT = 4  # groups: an epilogue joins one of the last few, a value needed much later is computed much later


@dataclass(eq=False)
class Group:
    """A group being built. `space` is the index space its pointwise ops run over; `kind` its root's kind."""

    kind: str
    space: tuple[int, ...]
    ops: list[Op] = field(default_factory=list)
    order: float = 0.0


@register
@dataclass(frozen=True)
class Fuse(Pass):
    """Replace the ops of every function by `group` ops with a region, in the order in which kernels will run."""

    name = "fuse"
    max_buffers: int = 16  # that a group may read and write: a binding each on a GPU, which may allow fewer

    def run(self, module: Module, caps: Caps) -> Module:
        buffers = min(self.max_buffers, caps.bindings or self.max_buffers)
        states = {p.name: p.value for p in module.parameters.values()}
        return module.map_functions(lambda f: Fusion(f, buffers, states).fused())


class Fusion:
    """The state of fusing one function."""

    def __init__(self, function: Function, max_buffers: int, states: Mapping[str, Value]) -> None:
        self.function, self.max_buffers = function, max_buffers
        self.overwrites = {update: states[name] for name, update in function.updates.items()}
        self.made = {r: op for op in function.body.ops for r in op.results}
        self.users: dict[Value, list[Op]] = {}
        for op in function.body.ops:
            for v in op.operands:
                self.users.setdefault(v, []).append(op)
        self.kept = {*function.body.yields, *function.updates.values()}
        self.group_of: dict[Value, Group] = {}
        self.groups: list[Group] = []
        self.pending: dict[Value, Op] = {}  # pointwise ops that wait to be computed where they are read

    def fused(self) -> Function:
        for op in self.function.body.ops:
            kind = OPS[op.name].kind
            if kind == "view" or is_source(op):
                continue
            if kind == "pointwise":
                self.place_pointwise(op, op.result in self.kept)
            else:
                self.place_root(op, kind)
        for op in list(self.pending.values()):
            self.materialize(op)
        return self.emit()

    # -- where a value comes from
    def origin(self, value: Value) -> Value:
        """The value behind a chain of views (a concat or pack stays: it has several origins)."""
        op = self.made.get(value)
        while op is not None and OPS[op.name].kind == "view" and len(op.operands) == 1:
            value = op.operands[0]
            op = self.made.get(value)
        return value

    def sources(self, value: Value) -> list[Value]:
        """All values behind a value's views."""
        value = self.origin(value)
        op = self.made.get(value)
        if op is not None and OPS[op.name].kind == "view":
            return [s for v in op.operands for s in self.sources(v)]
        return [value]

    def settle(self, op: Op) -> None:
        """Give every waiting value that an op reads through a view a group of its own; direct operands are computed in place."""
        for v in op.operands:
            if v in self.pending:
                self.settle(self.pending[v])
                continue
            for source in self.sources(v):
                if source in self.pending:
                    self.materialize(self.pending[source])

    def latest(self, op: Op, without: Group | None = None) -> float:
        """The order of the last group an op reads from, itself or through operands that wait to be computed in it."""
        last = -1.0
        for source in (s for v in op.operands for s in self.sources(v)):
            if source in self.pending:
                last = max(last, self.latest(self.pending[source], without))
            elif source in self.group_of and self.group_of[source] is not without:
                last = max(last, self.group_of[source].order)
        return last

    def fits(self, ops: Sequence[Op]) -> bool:
        """Whether a group of these ops and what waits to be computed in it reads and writes few enough buffers."""
        whole = list(ops)
        for op in whole:
            whole += [self.pending[v] for v in op.operands if v in self.pending and self.pending[v] not in whole]
        made = {r for op in whole for r in op.results}
        read = {v for op in whole for v in op.operands if v not in made and not constant_source(self.made, v)}
        written = [r for r in made if r in self.kept or r not in self.users or any(u not in whole for u in self.users[r])]
        return len(read) + sum(self.overwrites.get(r) not in read for r in written) <= self.max_buffers

    # -- placing ops
    def add(self, group: Group, op: Op) -> None:
        for v in op.operands:
            if v in self.pending:  # computed here
                inner = self.pending.pop(v)
                self.add(group, inner)
        group.ops.append(op)
        self.group_of.update((r, group) for r in op.results)

    def materialize(self, op: Op) -> None:
        """A pointwise op becomes a group of its own."""
        self.pending.pop(op.result, None)
        self.settle(op)
        self.new_group("pointwise", op.result.type.shape, op)

    def new_group(self, kind: str, space: tuple[int, ...], op: Op) -> Group:
        group = Group(kind, space, order=float(len(self.groups)))
        self.groups.append(group)
        self.add(group, op)
        return group

    def place_pointwise(self, op: Op, is_result: bool) -> None:
        host = self.host_for(op)
        computable = not is_result and self.is_computed_operand(op)
        summed = computable and OPS[self.users[op.result][0].name].kind == "columns"
        if host is not None and not summed:
            self.add(host, op)
            return
        if computable:
            self.pending[op.result] = op
            return
        self.settle(op)
        self.new_group("pointwise", op.result.type.shape, op)

    def host_for(self, op: Op) -> Group | None:
        """The group whose epilogue can compute the op: the last one it reads from, or one that reads the same operands."""
        shape = op.result.type.shape
        if any(s in self.pending for v in op.operands if v not in self.pending for s in self.sources(v)):
            return None
        direct = [self.group_of[v] for v in self.read_through(op) if v in self.group_of]
        siblings = [
            g for g in reversed(self.groups[-8:]) if op.operands and any(op.operands[0] in o.operands and OPS[o.name].kind == "pointwise" for o in g.ops)
        ]
        for group in sorted(set(direct), key=lambda g: -g.order) + siblings:
            belongs = not self.is_stale(group) and self.runs_over(group, shape, op) and self.latest(op, without=group) < group.order
            if belongs and self.fits([*group.ops, op]):
                return group
        return None

    def read_through(self, op: Op) -> list[Value]:
        """The operands of an op and of the waiting ops among them."""
        found = []
        for v in op.operands:
            found += self.read_through(self.pending[v]) if v in self.pending else [v]
        return found

    def is_stale(self, group: Group) -> bool:
        """Whether so much ran since a group that what is computed there now would have to be kept for long."""
        return group.order < len(self.groups) - RECENT

    def runs_over(self, group: Group, shape: tuple[int, ...], op: Op) -> bool:
        """Whether an op of this shape can be computed beside the ops of a group, from their values in registers."""
        if group.kind == "columns":
            return False
        produced = {r for o in group.ops for r in o.results}
        through_view = any(v not in produced and any(s in produced for s in self.sources(v)) for v in self.read_through(op))
        if through_view:
            return False
        if group.kind == "rows":
            return shape in (group.space, group.space[:-1])
        return shape == group.space

    def is_computed_operand(self, op: Op) -> bool:
        """Whether every reader can compute the op for itself while it reads: row programs, column sums and pointwise ops."""
        readers = self.users.get(op.result, [])
        computed = len(readers) == 1 and OPS[readers[0].name].kind in ("rows", "columns", "pointwise") and self.reads_plainly(op, readers[0])
        return computed and self.fits([op, readers[0]])

    def reads_plainly(self, op: Op, reader: Op) -> bool:
        if OPS[reader.name].kind == "pointwise":
            return bool(op.result.type.shape in ((), reader.result.type.shape))
        return bool(op.result.type.shape == reader.operands[0].type.shape)

    def place_root(self, op: Op, kind: str) -> None:
        self.settle(op)
        if isinstance(definition := OPS[op.name], RowOp):
            space = definition.space(op)
            before = [self.group_of[v] for v in op.operands if v in self.group_of]
            for group in sorted(set(before), key=lambda g: -g.order):
                joined = [*group.ops, op]
                if group.kind == "rows" and group.space == space and self.latest(op, without=group) < group.order and self.fits(joined):
                    self.add(group, op)
                    return
            self.new_group("rows", space, op)
        elif kind == "columns":
            self.place_column_sum(op)
        else:
            self.new_group(kind, op.results[0].type.shape, op)

    def place_column_sum(self, op: Op) -> None:
        """Column sums of matrices of one shape, in as many parts, share a kernel if all they read is there in time."""
        for group in self.groups[-6:]:
            if group.kind != "columns" or group.space != op.operands[0].type.shape:
                continue
            if any(o.attrs.get("parts", 1) != op.attrs.get("parts", 1) for o in group.ops if OPS[o.name].kind == "columns"):
                continue
            if self.latest(op) < group.order and self.fits([*group.ops, op]):
                self.add(group, op)
                return
        self.new_group("columns", op.operands[0].type.shape, op)

    # -- the fused function
    def emit(self) -> Function:
        r = Rewriter()
        emitted: set[Op] = set()

        def need(value: Value) -> None:
            op = self.made.get(value)
            if op is None or op in emitted or value in self.group_of:
                return
            emitted.add(op)
            for v in op.operands:
                need(v)
            r.clone(op)

        for group in sorted(self.groups, key=lambda g: g.order):
            self.emit_group(r, group, need)
        for v in self.kept:
            need(v)
        body = replace(self.function.body, ops=tuple(r.ops), yields=tuple(r.get(v) for v in self.function.body.yields))
        return replace(self.function, body=body, updates={n: r.get(v) for n, v in self.function.updates.items()})

    def emit_group(self, r: Rewriter, group: Group, need: object) -> None:
        assert callable(need)
        inner, operands = Rewriter(), []
        args: list[Value] = []

        def enter(value: Value) -> None:
            """Bring an outside value in: a constant as a copy of what makes it, anything else as an argument."""
            if value in inner.mapping:
                return
            op = self.made.get(value)
            if op is not None and constant_source(self.made, value):
                for v in op.operands:
                    enter(v)
                inner.clone(op)
                return
            need(value)
            arg = Value(value.type, value.hint)
            inner.mapping[value] = arg
            args.append(arg)
            operands.append(r.get(value))

        for op in group.ops:
            for v in op.operands:
                enter(v)
            inner.clone(op)
        used_outside = [v for op in group.ops for v in op.results if v in self.kept or any(u not in group.ops for u in self.users.get(v, []))]
        yields = tuple(inner.get(v) for v in used_outside)
        region = Region(tuple(args), tuple(inner.ops), yields)
        new = tuple(Value(v.type, v.hint) for v in used_outside)
        root = next((op for op in group.ops if OPS[op.name].kind != "pointwise"), group.ops[0])
        r.ops.append(Op("group", tuple(operands), new, {"kind": group.kind}, (region,), root.loc))
        r.mapping.update(zip(used_outside, new, strict=True))


def is_source(op: Op) -> bool:
    return OPS[op.name].kind == "pointwise" and not op.operands


def constant_source(made: dict[Value, Op], value: Value) -> bool:
    """Whether a value follows from constants and indices alone through views and sources."""
    op = made.get(value)
    if op is None:
        return False
    return is_source(op) or (OPS[op.name].kind == "view" and all(constant_source(made, v) for v in op.operands))
