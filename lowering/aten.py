"""From ATen to the graph: what each PyTorch op that a captured model may contain becomes.

A pointwise op maps through the `aten` names of the registry; every other one has a function here, found by its name
without the overload. `lowering.capture` walks the exported graph and calls them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from tinygpt.ir.core import Value
from tinygpt.ir.errors import UserError
from tinygpt.ir.ops import OPS
from tinygpt.lowering import match_attention
from tinygpt.lowering.aten_builder import AtenBuilder, Operand

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}

H = TypeVar("H", bound=Handler)


def aten(*names: str) -> Callable[[H], H]:
    """Register the function that maps these ATen ops. It takes the builder, then ATen's own arguments."""

    def registered(handler: H) -> H:
        HANDLERS.update((f"aten.{name}", handler) for name in names)
        return handler

    return registered


def packet(target: object) -> str:
    """`aten.add.Tensor` without its overload: `aten.add`."""
    return ".".join(str(target).split(".")[:2])


POINTWISE = {packet(name): op.name for op in OPS.values() if op.kind == "pointwise" for name in op.aten}


def supported() -> list[str]:
    """The ATen ops that can be captured, as PyTorch names them."""
    return sorted(name.removeprefix("aten.") for name in {*HANDLERS, *POINTWISE})


def convert(g: AtenBuilder, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Build what the ATen op `name` (without overload) becomes: a value, or a sequence of them."""
    if name in HANDLERS:
        return HANDLERS[name](g, *args, **kwargs)
    if name not in POINTWISE:
        hint = f"supported are {', '.join(supported())}"
        raise UserError(f"capture: PyTorch op {g.aten} is not supported\n  {g.loc}", hint=hint)
    if kwargs.keys() - {"alpha"}:
        raise g.refuse(f"with {', '.join(f'{key} = {value!r}' for key, value in kwargs.items())}")
    if "alpha" in kwargs:
        args = (args[0], g.pointwise("mul", args[1], kwargs["alpha"]))
    return g.pointwise(POINTWISE[name], *args)


# Views.


@aten("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze")
def reshape(g: AtenBuilder, x: Value, *_: Any, **__: Any) -> Value:
    return g.reshape(x, g.expected.shape)


@aten("expand", "expand_as", "broadcast_to")
def expand(g: AtenBuilder, x: Value, *_: Any, **__: Any) -> Value:
    return g.broadcast(x, g.expected.shape)


@aten("contiguous", "clone", "alias", "lift_fresh_copy", "positive")
def same(g: AtenBuilder, x: Value, *_: Any, **__: Any) -> Value:
    return x


@aten("to", "_to_copy", "type_as")
def to(g: AtenBuilder, x: Value, *_: Any, **__: Any) -> Value:
    return g.cast(x, g.expected.dtype)


@aten("permute")
def permute(g: AtenBuilder, x: Value, dims: Sequence[int]) -> Value:
    return g.transpose(x, [axis % x.type.rank for axis in dims])


@aten("transpose", "swapaxes", "swapdims")
def transpose(g: AtenBuilder, x: Value, first: int, second: int) -> Value:
    perm = list(range(x.type.rank))
    perm[first], perm[second] = perm[second], perm[first]
    return g.transpose(x, perm)


@aten("movedim", "moveaxis")
def movedim(g: AtenBuilder, x: Value, source: int | Sequence[int], destination: int | Sequence[int]) -> Value:
    moved, places = ([axis % x.type.rank for axis in _axes(axes)] for axes in (source, destination))
    rest = iter(axis for axis in range(x.type.rank) if axis not in moved)
    return g.transpose(x, [moved[places.index(a)] if a in places else next(rest) for a in range(x.type.rank)])


@aten("t", "numpy_T")
def reverse_axes(g: AtenBuilder, x: Value) -> Value:
    return g.transpose(x, list(reversed(range(x.type.rank))))


@aten("mT")
def matrix_transpose(g: AtenBuilder, x: Value) -> Value:
    return g.swap_last_axes(x)


@aten("slice")
def slice_(
    g: AtenBuilder, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    if step != 1:
        raise g.refuse(f"a step of {step}")
    axis = dim % x.type.rank
    begin, stop, _ = slice(start, end).indices(x.type.shape[axis])
    return g.slice(x, axis, begin, stop)


@aten("narrow")
def narrow(g: AtenBuilder, x: Value, dim: int, start: int, length: int) -> Value:
    axis = dim % x.type.rank
    start %= x.type.shape[axis]
    return g.slice(x, axis, start, start + length)


@aten("select")
def select(g: AtenBuilder, x: Value, dim: int, index: int) -> Value:
    axis = dim % x.type.rank
    index %= x.type.shape[axis]
    return g.reshape(g.slice(x, axis, index, index + 1), g.expected.shape)


@aten("split_with_sizes")
def split_with_sizes(g: AtenBuilder, x: Value, sizes: Sequence[int], dim: int = 0) -> list[Value]:
    ends = np.cumsum(sizes).tolist()
    return [g.slice(x, dim % x.type.rank, stop - size, stop) for size, stop in zip(sizes, ends, strict=True)]


@aten("split")
def split(g: AtenBuilder, x: Value, size: int | Sequence[int], dim: int = 0) -> list[Value]:
    extent = x.type.shape[dim]
    sizes = [min(size, extent - start) for start in range(0, extent, size)] if isinstance(size, int) else size
    return split_with_sizes(g, x, sizes, dim)


@aten("chunk")
def chunk(g: AtenBuilder, x: Value, chunks: int, dim: int = 0) -> list[Value]:
    return split(g, x, -(-x.type.shape[dim] // chunks), dim)


@aten("unbind")
def unbind(g: AtenBuilder, x: Value, dim: int = 0) -> list[Value]:
    axis = dim % x.type.rank
    shape = [*x.type.shape[:axis], *x.type.shape[axis + 1 :]]
    return [g.reshape(part, shape) for part in split(g, x, 1, axis)]


@aten("cat", "concat")
def cat(g: AtenBuilder, tensors: Sequence[Value], dim: int = 0) -> Value:
    return g("concat", *tensors, axis=dim % tensors[0].type.rank) if len(tensors) > 1 else tensors[0]


@aten("stack")
def stack(g: AtenBuilder, tensors: Sequence[Value], dim: int = 0) -> Value:
    axis = dim % (tensors[0].type.rank + 1)
    shape = tensors[0].type.shape
    return cat(g, [g.reshape(x, (*shape[:axis], 1, *shape[axis:])) for x in tensors], axis)


@aten("repeat_interleave")
def repeat_interleave(g: AtenBuilder, x: Value, repeats: int, dim: int | None = None, **_: Any) -> Value:
    if not isinstance(repeats, int) or dim is None:
        raise g.refuse("repeats has to be a number, along one axis")
    axis = dim % x.type.rank
    before, after = x.type.shape[: axis + 1], x.type.shape[axis + 1 :]
    repeated = g.broadcast(g.reshape(x, (*before, 1, *after)), (*before, repeats, *after))
    return g.reshape(repeated, g.expected.shape)


@aten("detach")
def detach(g: AtenBuilder, x: Value) -> Value:
    raise g.refuse("stopping the gradient is not supported", "leave out detach(), or make the tensor a buffer")


# Arithmetic whose arguments are not plain operands.


@aten("rsub")
def rsub(g: AtenBuilder, x: Value, other: Operand, alpha: float = 1) -> Value:
    return g.pointwise("sub", other, x if alpha == 1 else g.pointwise("mul", x, alpha))


@aten("masked_fill")
def masked_fill(g: AtenBuilder, x: Value, mask: Value, fill: Operand) -> Value:
    return g.pointwise("where", mask, fill, x)


@aten("gelu")
def gelu(g: AtenBuilder, x: Value, approximate: str = "none") -> Value:
    return g("gelu_tanh" if approximate == "tanh" else "gelu", x)


@aten("square")
def square(g: AtenBuilder, x: Value) -> Value:
    return g("mul", x, x)


@aten("reciprocal")
def reciprocal(g: AtenBuilder, x: Value) -> Value:
    return g.pointwise("div", 1.0, x)


@aten("pow")
def power(g: AtenBuilder, x: Value, exponent: Operand) -> Value:
    number = g.number(exponent) if isinstance(exponent, Value) else exponent
    if not isinstance(x, Value) or number not in (-1, -0.5, 0.5, 1, 2, 3, 4):
        shown = "that is a tensor" if number is None else number
        raise g.refuse(f"exponent {shown}", "exponents are -1, -0.5, 0.5, 1, 2, 3 and 4")
    x = g.cast(x, g.expected.dtype)
    match number:
        case 0.5 | -0.5:
            return g("sqrt" if number > 0 else "rsqrt", x)
        case -1:
            return g.pointwise("div", 1.0, x)
        case 1:
            return x
    squared = g("mul", x, x)
    return squared if number == 2 else g("mul", squared, x if number == 3 else squared)


@aten("clamp")
def clamp(g: AtenBuilder, x: Value, min: Operand | None = None, max: Operand | None = None) -> Value:
    x = x if min is None else g.pointwise("max", x, min)
    return x if max is None else g.pointwise("min", x, max)


@aten("clamp_min")
def clamp_min(g: AtenBuilder, x: Value, min: Operand) -> Value:
    return clamp(g, x, min)


@aten("clamp_max")
def clamp_max(g: AtenBuilder, x: Value, max: Operand) -> Value:
    return clamp(g, x, None, max)


# Reductions and normalizations.


@aten("sum")
def sum_(g: AtenBuilder, x: Value, dim: Any = (), keepdim: bool = False, **_: Any) -> Value:
    return g.sum(g.cast(x, g.expected.dtype), _axes(dim), keepdim)


@aten("mean")
def mean(g: AtenBuilder, x: Value, dim: Any = (), keepdim: bool = False, **_: Any) -> Value:
    return g.mean(g.cast(x, "f32"), _axes(dim), keepdim)


@aten("var")
def variance(
    g: AtenBuilder, x: Value, dim: Any = (), unbiased: bool = True, keepdim: bool = False,
    correction: float | None = None,
) -> Value:  # fmt: skip
    if isinstance(dim, bool):  # var(x, unbiased)
        dim, unbiased = (), dim
    removed = correction if correction is not None else float(unbiased)
    centred = g("sub", x, g.mean(x, _axes(dim), True))
    total = g.sum(g("mul", centred, centred), _axes(dim), keepdim)
    return g("mul", total, g.constant(1 / (x.type.size / total.type.size - removed)))


@aten("std")
def deviation(g: AtenBuilder, x: Value, *args: Any, **kwargs: Any) -> Value:
    return g("sqrt", variance(g, x, *args, **kwargs))


@aten("softmax", "_softmax")
def softmax(g: AtenBuilder, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    x = g.cast(x, "f32")
    order = list(range(x.type.rank))
    order[dim], order[-1] = order[-1], order[dim]
    return g.transpose(g("softmax", g.transpose(x, order)), order)


@aten("layer_norm")
def layer_norm(
    g: AtenBuilder, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, *_: Any,
) -> Value:  # fmt: skip
    if len(shape) != 1:
        raise g.refuse(f"over {len(shape)} axes", "normalize over the last axis only")
    gain = weight or g.broadcast(g.constant(1.0), tuple(shape))
    return g("layer_norm", x, gain, bias or g.broadcast(g.constant(0.0), tuple(shape)), eps=eps)


@aten("native_layer_norm")
def native_layer_norm(
    g: AtenBuilder, x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> list[Value]:
    return [layer_norm(g, x, shape, weight, bias, eps)]


@aten("rms_norm")
def rms_norm(
    g: AtenBuilder, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    if len(shape) != 1:
        raise g.refuse(f"over {len(shape)} axes", "normalize over the last axis only")
    floor = g.constant(torch.finfo(torch.float32).eps if eps is None else eps)
    normal = g("mul", x, g("rsqrt", g("add", g.mean(g("mul", x, x), [-1], True), floor)))
    return g("mul", normal, weight) if weight else normal


# Products, attention, embedding, loss, dropout.


@aten("matmul", "mm", "bmm")
def matmul(g: AtenBuilder, a: Value, b: Value) -> Value:
    if a.type.rank < 2 or b.type.rank < 2:
        raise g.refuse(f"a vector operand, {a.type} @ {b.type}", "give both operands at least two axes")
    if b.type.rank > 2:
        lead = np.broadcast_shapes(a.type.shape[:-2], b.type.shape[:-2])
        a, b = (g.broadcast(x, (*lead, *x.type.shape[-2:])) for x in (a, b))
    return match_attention.match(g, a, b) or g("matmul", a, b)


@aten("linear")
def linear(g: AtenBuilder, x: Value, weight: Value, bias: Value | None = None) -> Value:
    product = matmul(g, x, g.swap_last_axes(weight))
    return g("add", product, bias) if bias else product


@aten("addmm")
def addmm(g: AtenBuilder, bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    if beta != 1 or alpha != 1:
        raise g.refuse(f"with alpha = {alpha}, beta = {beta}")
    return g("add", matmul(g, a, b), bias)


@aten("einsum")
def einsum(g: AtenBuilder, equation: str, operands: Sequence[Value], **_: Any) -> Value:
    """Two operands, every label once in each: transpose both to [batch, rows, inner] @ [batch, inner, columns]."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    distinct = all(len(set(part)) == len(part) and part.isalpha() for part in (*labels, output))
    count = Counter("".join([*labels, output]))
    if not arrow or len(operands) != 2 or not distinct or 1 in count.values():
        raise g.refuse(f'"{equation}"', "write it with matmul, or as two operands whose labels are all distinct")
    extents = {c: n for part, x in zip(labels, operands, strict=True) for c, n in zip(part, x.type.shape, strict=True)}
    batch, rows = ([c for c in output if c in labels[0] and (c in labels[1]) == shared] for shared in (True, False))
    columns = [c for c in output if c not in labels[0]]
    inner = [c for c in labels[0] if c not in output]

    def arranged(x: Value, part: str, *groups: list[str]) -> Value:
        x = g.transpose(x, [part.index(c) for c in (*batch, *groups[0], *groups[1])])
        sizes = [math.prod(extents[c] for c in group) for group in groups]
        return g.reshape(x, [*(extents[c] for c in batch), *sizes])

    left = arranged(operands[0], labels[0], rows, inner)
    product = matmul(g, left, arranged(operands[1], labels[1], inner, columns))
    made = [*batch, *rows, *columns]
    return g.transpose(g.reshape(product, [extents[c] for c in made]), [made.index(c) for c in output])


@aten("scaled_dot_product_attention")
def scaled_dot_product_attention(
    g: AtenBuilder, q: Value, k: Value, v: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    if enable_gqa:
        k, v = (_repeat_heads(g, x, q.type.shape[-3]) for x in (k, v))
    mask = g.known.get(attn_mask) if attn_mask else None
    allowed = None if mask is None else match_attention.allowed_by(mask)
    causal = is_causal or match_attention.is_causal(allowed, q.type.shape[-2])
    if (attn_mask and allowed is None) or causal is None:
        raise g.refuse("a mask that is not causal", "pass is_causal=True, a lower-triangular mask, or no mask")
    if not q.type.shape == k.type.shape == v.type.shape:
        hint = "use the same heads, context and head width for all three (enable_gqa repeats heads)"
        raise g.refuse(f"q {q.type}, k {k.type} and v {v.type} differ in shape", hint)
    factor = q.type.shape[-1] ** -0.5 if scale is None else scale
    if dropout_p == 0.0:
        return match_attention.attention(g, (q, k, v), (), causal=causal, scale=factor)
    drop = {"dropout": dropout_p, "stream": g.stream()}
    return match_attention.attention(g, (q, k, v), (g.random_key,), causal=causal, scale=factor, **drop)


def _repeat_heads(g: AtenBuilder, x: Value, heads: int) -> Value:
    """[..., G, T, D] -> [..., H, T, D]: each of the G key heads serves H / G neighbouring query heads."""
    *lead, groups, context, width = x.type.shape
    single = g.reshape(x, (*lead, groups, 1, context, width))
    repeated = g.broadcast(single, (*lead, groups, heads // groups, context, width))
    return g.reshape(repeated, (*lead, heads, context, width))


@aten("embedding")
def embedding(
    g: AtenBuilder, table: Value, tokens: Value, padding_idx: int = -1, scale_grad_by_freq: bool = False, *_: Any
) -> Value:
    """Rows picked by a known range (learned positions) are a slice of the table."""
    if padding_idx >= 0 or scale_grad_by_freq:
        raise g.refuse("padding_idx and scale_grad_by_freq change the gradient", "build the Embedding without them")
    known = g.known.get(tokens)
    if known is None or known.dim() == 0:
        return g("embedding", tokens, table)
    line = known.reshape(-1, known.shape[-1])[0]
    first, stop = int(line[0]), int(line[0]) + line.numel()
    if not torch.equal(known, torch.arange(first, stop).expand_as(known)):
        return g("embedding", tokens, table)
    rows = g.slice(table, 0, first, stop)
    return g.broadcast(g.reshape(rows, (*(1 for _ in known.shape[1:]), *rows.type.shape)), g.expected.shape)


@aten("index_select")
def index_select(g: AtenBuilder, x: Value, dim: int, index: Value) -> Value:
    if dim or x.type.rank != 2:
        raise g.refuse(f"axis {dim} of {x.type}", "select rows of a matrix, or slice")
    return embedding(g, x, index)


@aten("index")
def index(g: AtenBuilder, x: Value, indices: Sequence[Value | None]) -> Value:
    if len(indices) != 1 or indices[0] is None or indices[0].type.dtype != "i32" or x.type.rank != 2:
        raise g.refuse("indexing by a tensor", "index the rows of a matrix by one tensor of integers, or slice")
    return embedding(g, x, indices[0])


@aten("cross_entropy_loss")
def cross_entropy(
    g: AtenBuilder, logits: Value, targets: Value, weight: Value | None = None, reduction: int = 1,
    ignore_index: int = -100, label_smoothing: float = 0.0,
) -> Value:  # fmt: skip
    """PyTorch's class axis is the second one. A negative ignore_index never meets a token, so it changes nothing."""
    if weight is not None or label_smoothing or ignore_index >= 0 or targets.type.dtype != "i32":
        raise g.refuse("only plain cross-entropy of token targets is supported", "use F.cross_entropy(logits, targets)")
    rank = logits.type.rank
    if rank > 2:
        logits = g.transpose(logits, [0, *range(2, rank), 1])
    g.logits = logits
    rows = g("cross_entropy", logits, targets)
    return (rows, g.mean(rows, (), False), g.sum(rows, (), False))[reduction]


@aten("dropout", "feature_dropout")
def dropout(g: AtenBuilder, x: Value, p: float, train: bool) -> Value:
    """A product with multipliers drawn from the key, so that the gradient sees the same ones."""
    if not train or p == 0:
        return x
    if p == 1:
        raise g.refuse("a dropout of 1 leaves nothing")
    stream = g.stream()
    kept = g("mul", x, g.keep(x.type.shape, p, stream))
    g.dropped[kept] = (x, p, stream)
    return kept


@aten("native_dropout")
def native_dropout(g: AtenBuilder, x: Value, p: float, train: bool | None) -> list[Value]:
    return [dropout(g, x, p, train is not False)]


def _axes(dim: Any) -> Sequence[int]:
    return (dim,) if isinstance(dim, int) else tuple(dim or ())
