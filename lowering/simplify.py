"""simplify: algebraic identities on the graph, each a rule under the fact it uses. Runs to a fixed point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Op, Value
from tinygpt.ir.ops import OPS, Pointwise, RowOp
from tinygpt.ir.ops.reduction import matrix_shape
from tinygpt.lowering.passes import Pass, register
from tinygpt.lowering.rewrite import Rewrite, Rule, rewrite

Found = Sequence[Value] | None


def reshape_of_reshape(b: Rewrite, op: Op) -> Found:
    """reshape(reshape(x)) = reshape(x), and a reshape to its own shape is x."""
    if op.name != "reshape":
        return None
    x, shape = op.operands[0], tuple(op.attrs["shape"])
    inner = b.maker(x, "reshape")
    x = inner.operands[0] if inner else x
    if x.type.shape == shape:
        return [x]
    return [b("reshape", x, shape=shape)] if inner else None


def transpose_of_transpose(b: Rewrite, op: Op) -> Found:
    """transpose(transpose(x, p), q) = transpose(x, p[q]); the identity permutation is x."""
    if op.name != "transpose":
        return None
    x, perm = op.operands[0], tuple(op.attrs["perm"])
    inner = b.maker(x, "transpose")
    if inner:
        x, perm = inner.operands[0], tuple(inner.attrs["perm"][a] for a in perm)
    if perm == tuple(range(len(perm))):
        return [x]
    return [b("transpose", x, perm=perm)] if inner else None


def transpose_of_product(b: Rewrite, op: Op) -> Found:
    """(a @ b)^T = b^T @ a^T: a weight's gradient is computed as it is stored."""
    product = b.maker(op.operands[0], "matmul") if op.name == "transpose" else None
    if not product or op.result.type.rank != 2 or tuple(op.attrs["perm"]) != (1, 0):
        return None
    left, right = (b("transpose", v, perm=(1, 0)) for v in product.operands)
    return [b("matmul", right, left)]


def whole_or_nested_slice(b: Rewrite, op: Op) -> Found:
    """x[0:n] = x; a slice of a concat that is one of its pieces is that piece."""
    if op.name != "slice":
        return None
    x, axis, start, stop = op.operands[0], op.attrs["axis"], op.attrs["start"], op.attrs["stop"]
    if stop - start == x.type.shape[axis]:
        return [x]
    pieces = b.maker(x, "concat")
    if pieces and pieces.attrs["axis"] == axis:
        at = 0
        for piece in pieces.operands:
            if at == start and piece.type.shape[axis] == stop - start:
                return [piece]
            at += piece.type.shape[axis]
    return None


def trivial_broadcast(b: Rewrite, op: Op) -> Found:
    """broadcast to its own shape is x; broadcast of a broadcast is one broadcast."""
    if op.name != "broadcast":
        return None
    x, shape = op.operands[0], tuple(op.attrs["shape"])
    if x.type.shape == shape:
        return [x]
    inner = b.maker(x, "broadcast")
    return [b("broadcast", inner.operands[0], shape=shape)] if inner else None


def adjacent_pieces(b: Rewrite, op: Op) -> Found:
    """concat(x[a:b], x[b:c]) = x[a:c], also when each piece is reshaped from a flat x; a concat of one piece is it."""
    if op.name != "concat":
        return None
    if len(op.operands) == 1:
        return [op.operands[0]]
    sources = [_flat_slice(b, v) for v in op.operands]
    if op.attrs["axis"] == 0 and all(sources):
        first = sources[0]
        assert first is not None
        at = first[1]
        for piece in sources:
            if piece is None or piece[0] is not first[0] or piece[1] != at:
                return None
            at = piece[2]
        flat = b("slice", first[0], axis=0, start=first[1], stop=at)
        shape = (sum(v.type.shape[0] for v in op.operands), *op.operands[0].type.shape[1:])
        return [flat if flat.type.shape == shape else b("reshape", flat, shape=shape)]
    return None


def _flat_slice(b: Rewrite, value: Value) -> tuple[Value, int, int] | None:
    """(x, start, stop) when value is the elements start..stop of a one-dimensional x."""
    inner = b.maker(value, "reshape")
    op = b.maker(inner.operands[0] if inner else value, "slice")
    if op and op.operands[0].type.rank == 1:
        return op.operands[0], op.attrs["start"], op.attrs["stop"]
    return None


def sum_of_padded_pieces(b: Rewrite, op: Op) -> Found:
    """(a | 0) + (0 | c) = (a | c): gradients of slices add up to one concat."""
    if op.name != "add":
        return None
    left, right = (b.maker(v, "concat") for v in op.operands)
    if not left or not right or left.attrs["axis"] != right.attrs["axis"] or op.operands[0].type != op.operands[1].type:
        return None
    axis = left.attrs["axis"]
    pieces = [p for side in (left, right) for p in _nonzero_pieces(b, side)]
    pieces.sort(key=lambda p: p[0])
    extent, at, parts = op.operands[0].type.shape[axis], 0, []
    shape = op.operands[0].type.shape
    for start, value in pieces:
        if start < at:
            return None
        if start > at:
            parts.append(b("broadcast", b.constant(0.0), shape=(*shape[:axis], start - at, *shape[axis + 1 :])))
        parts.append(value)
        at = start + value.type.shape[axis]
    if at < extent:
        parts.append(b("broadcast", b.constant(0.0), shape=(*shape[:axis], extent - at, *shape[axis + 1 :])))
    return [b("concat", *parts, axis=axis)]


def _nonzero_pieces(b: Rewrite, concat: Op) -> list[tuple[int, Value]]:
    at, found = 0, []
    for piece in concat.operands:
        if b.constant_value(piece) != 0:
            found.append((at, piece))
        at += piece.type.shape[concat.attrs["axis"]]
    return found


def constants(b: Rewrite, op: Op) -> Found:
    """A pointwise op of constants is a constant; x * 1, x + 0 and x / 1 are x."""
    definition = OPS[op.name]
    if not isinstance(definition, Pointwise):
        return None
    values = [b.constant_value(v) for v in op.operands]
    if all(v is not None for v in values) and op.result.type.rank == 0 and op.result.type.dtype == "f32":
        arrays = [np.asarray(v, np.float64) for v in values]
        if all(v.type.dtype == "f32" for v in op.operands):
            return [b.constant(float(definition.evaluate(arrays, dict(op.attrs))[0]))]
    for position, neutral in {"mul": ((0, 1), (1, 1)), "add": ((0, 0), (1, 0)), "div": ((1, 1),), "sub": ((1, 0),)}.get(op.name, ()):
        other = op.operands[1 - position] if len(op.operands) == 2 else None
        if other is not None and values[position] == neutral and other.type == op.result.type:
            return [other]
    return None


def scalar_constant_operand(b: Rewrite, op: Op) -> Found:
    """A pointwise op takes a constant as a scalar: its broadcast is the op's own."""
    if not isinstance(OPS[op.name], Pointwise):
        return None
    operands = []
    for v in op.operands:
        value = b.constant_value(v)
        operands.append(b.constant(value, v.type.dtype) if value is not None and v.type.rank else v)
    shape = np.broadcast_shapes(*(v.type.shape for v in operands))
    if tuple(operands) == tuple(op.operands) or shape != op.result.type.shape:
        return None
    return [b(op.name, *operands, **op.attrs)]


def sum_as_matrix(b: Rewrite, op: Op) -> Found:
    """A sum over leading axes sums the rows of a matrix; over trailing axes, each row; over some of both, both in turn."""
    if op.name != "sum":
        return None
    x, axes = op.operands[0], sorted(op.attrs["axes"])
    shape, rank = x.type.shape, x.type.rank
    if not axes:
        return [x]
    leading = [a for i, a in enumerate(axes) if a == i]
    trailing = [a for a in axes if a not in leading]
    if trailing and trailing != list(range(rank - len(trailing), rank)):
        return None
    if len(leading) == rank:
        leading, trailing = [], list(range(rank))
    if trailing:
        rows = prod(shape[: rank - len(trailing)])
        kept = shape[: rank - len(trailing)]
        flat = b("reshape", x, shape=(rows, x.type.size // rows)) if kept else b("reshape", x, shape=(x.type.size,))
        x = b("reshape", b("sum_rows", flat), shape=kept)
        shape = kept
    if leading:
        matrix = matrix_shape(shape, leading)
        assert matrix is not None
        x = b("sum_columns", b("reshape", x, shape=matrix))
    return [x if x.type == op.result.type else b("reshape", x, shape=op.result.type.shape)]


def consecutive_rows(b: Rewrite, op: Op) -> Found:
    """embedding(0, 1, 2, …) is the first rows of the table."""
    if op.name != "embedding":
        return None
    tokens, table = op.operands
    iota = b.maker(tokens, "iota")
    if not iota or tokens.type.rank != 1 or "first" in op.attrs:
        return None
    return [b("slice", table, axis=0, start=0, stop=tokens.type.shape[0])]


def product_of_matrices(b: Rewrite, op: Op) -> Found:
    """[..., m, k] @ [k, n] is one product of matrices."""
    if op.name != "matmul" or op.operands[0].type.rank == 2 or op.operands[1].type.rank != 2:
        return None
    a, w = op.operands
    flat = b("matmul", b("reshape", a, shape=(-(-a.type.size // a.type.shape[-1]), a.type.shape[-1])), w)
    return [b("reshape", flat, shape=op.result.type.shape)]


def rows_of_a_matrix(b: Rewrite, op: Op) -> Found:
    """A row program over [a, b, c] is one over [a*b, c]."""
    definition = OPS[op.name]
    if not isinstance(definition, RowOp) or op.operands[0].type.rank != 3 or definition.space(op) != op.operands[0].type.shape:
        return None
    lead = op.operands[0].type.shape[:-1]
    flat = []
    for v in op.operands:
        t = v.type
        if t.shape[:2] == lead and t.rank == 3:
            v = b("reshape", v, shape=(prod(lead), t.shape[-1]))
        elif t.shape == lead:
            v = b("reshape", v, shape=(prod(lead),))
        flat.append(v)
    results = b.emit(op.name, *flat, **op.attrs).results
    return [b("reshape", r, shape=old.type.shape) for r, old in zip(results, op.results, strict=True)]


def pointwise_on_a_matrix(b: Rewrite, op: Op) -> Found:
    """f(reshape(x), reshape(y), v) = reshape(f(x, y, v)) when x and y are matrices with the same last axis."""
    if not isinstance(OPS[op.name], Pointwise) or op.result.type.rank != 3:
        return None
    shape = op.result.type.shape
    flat_shape = (shape[0] * shape[1], shape[2])
    if not any((inner := b.maker(v, "reshape")) and inner.operands[0].type.shape == flat_shape for v in op.operands):
        return None
    operands = []
    for v in op.operands:
        if v.type.shape == shape:
            v = b("reshape", v, shape=flat_shape)
            inner = b.maker(v, "reshape")
            again = inner and b.maker(inner.operands[0], "reshape")
            if again and again.operands[0].type.shape == flat_shape:
                v = again.operands[0]
        elif v.type.shape not in ((), (1,), shape[2:]):
            return None
        operands.append(v)
    return [b("reshape", b(op.name, *operands, **op.attrs), shape=shape)]


def packed_slices(b: Rewrite, op: Op) -> Found:
    """pack(x[a:b], x[b:c], …) at adjacent offsets = pack(x, …)."""
    if op.name != "pack":
        return None
    groups: list[tuple[int, Value]] = []
    pieces = list(zip(op.attrs["offsets"], op.operands, strict=True))
    at = 0
    while at < len(pieces):
        offset, value = pieces[at]
        first = b.maker(value, "slice")
        taken = 1
        if first and first.attrs["axis"] == 0 and first.attrs["start"] == 0:
            source, stop = first.operands[0], first.attrs["stop"]
            row = prod(source.type.shape[1:])
            while at + taken < len(pieces) and stop < source.type.shape[0]:
                nxt = b.maker(pieces[at + taken][1], "slice")
                if not nxt or nxt.operands[0] is not source or nxt.attrs["start"] != stop or pieces[at + taken][0] != offset + stop * row:
                    break
                stop, taken = nxt.attrs["stop"], taken + 1
            if stop == source.type.shape[0]:
                groups.append((offset, source))
                at += taken
                continue
        groups.append((offset, value))
        at += 1
    if len(groups) == len(pieces):
        return None
    return [b("pack", *(v for _, v in groups), offsets=tuple(o for o, _ in groups), size=op.attrs["size"])]


RULES: tuple[Rule, ...] = (
    reshape_of_reshape, transpose_of_transpose, transpose_of_product, whole_or_nested_slice, trivial_broadcast, adjacent_pieces,
    sum_of_padded_pieces, constants, scalar_constant_operand, sum_as_matrix, consecutive_rows, product_of_matrices,
    rows_of_a_matrix, pointwise_on_a_matrix, packed_slices,
)  # fmt: skip


@register
@dataclass(frozen=True)
class Simplify(Pass):
    """Apply the identities of this file until nothing changes; equal ops become one."""

    name = "simplify"
    rounds: int = 12

    def run(self, module: Module, caps: Caps) -> Module:
        return module.map_functions(self.simplified)

    def simplified(self, function: Function) -> Function:
        before = -1
        for _ in range(self.rounds):
            signature = hash(tuple((op.name, tuple(r.type for r in op.results)) for op in function.body.ops))
            if signature == before:
                break
            before = signature
            function = rewrite(function, RULES)
        return function


@register
@dataclass(frozen=True)
class MergeProducts(Pass):
    """Products of one value with several parameters become one product with their concatenation (q, k and v)."""

    name = "merge-products"

    def run(self, module: Module, caps: Caps) -> Module:
        parameters = module.parameter_of()
        return module.map_functions(lambda f: self.merged(f, set(parameters)))

    def merged(self, function: Function, parameters: set[Value]) -> Function:
        made = {r: op for op in function.body.ops for r in op.results}
        users: dict[Value, list[Op]] = {}
        for op in function.body.ops:
            for v in op.operands:
                users.setdefault(v, []).append(op)
        families: dict[Value, list[tuple[Op, Value, Op | None, Value | None]]] = {}
        for op in function.body.ops:
            if op.name != "matmul":
                continue
            turned = made.get(op.operands[1])
            if not turned or turned.name != "transpose" or turned.operands[0] not in parameters or turned.operands[0].type.rank != 2:
                continue
            adds = users.get(op.result, [])
            add = adds[0] if len(adds) == 1 and adds[0].name == "add" and adds[0].operands[0] is op.result else None
            bias = add.operands[1] if add and add.operands[1] in parameters and add.operands[1].type.rank == 1 else None
            families.setdefault(op.operands[0], []).append((op, turned.operands[0], add if bias else None, bias))
        together: dict[Value, list[tuple[Op, Value, Op | None, Value | None]]] = {}
        for members in families.values():
            biased = [m for m in members if m[3] is not None]
            for group in (biased, [m for m in members if m[3] is None]):
                if len(group) > 1 and len({id(m[1]) for m in group}) == len(group):
                    together.update((m[0].result, group) for m in group)
        if not together:
            return function
        done: set[int] = set()
        replaced: dict[Value, Value] = {}

        def merge(b: Rewrite, op: Op) -> Found:
            original = next((r for r in op.results if r in together or r in replaced), None)
            if original is None:
                return None
            if original in replaced:
                return [replaced[original]]
            group = together[original]
            if id(group) in done:
                return None
            done.add(id(group))
            weight = b("concat", *(m[1] for m in group), axis=0)
            x = op.operands[0]
            y = b("matmul", x, b("transpose", weight, perm=(1, 0)))
            if group[0][3] is not None:
                y = b("add", y, b("concat", *(m[3] for m in group if m[3] is not None), axis=0))
            axis, start = y.type.rank - 1, 0
            for product, w, add, _ in group:
                stop = start + w.type.shape[0]
                piece = b("slice", y, axis=axis, start=start, stop=stop)
                replaced[product.result] = piece
                if add is not None:
                    replaced[add.result] = piece
                start = stop
            return [replaced[original]]

        return rewrite(function, (merge,))


