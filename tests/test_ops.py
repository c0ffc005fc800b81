"""Every registered op agrees with itself (types, float64, gradient, tile program) and with PyTorch.

The tests are loops over the registry and the examples of its ops."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.errors import UserError
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.interpret import run_region
from tinygpt.ir.interpret_tile import run_kernel, unwritten
from tinygpt.ir.ops import OPS, Example, GraphBuilder, GraphOp, Pointwise
from tinygpt.ir.registry import ColumnOp, RowOp, dtype_name, sample_operands
from tinygpt.ir.storage import Strided
from tinygpt.ir.tile import Position, TileBuilder, stored_reader, stored_writer, transposed
from tinygpt.ir.types import NUMPY_DTYPES, TensorType
from tinygpt.ir.verify import verify_kernel

POSITIVE = ("log", "sqrt", "rsqrt", "div")  # ops that are tested on numbers away from zero
Arrays = Sequence[np.ndarray]


def dropout_examples() -> list[tuple[str, Example]]:
    """The attention ops with their optional operand: a key to drop probabilities by."""
    found = []
    for name in ("attention", "attention_grad_kv", "attention_grad_q"):
        plain = OPS[name].examples()[-1]
        attrs = {**plain.attrs, "dropout": 0.25, "stream": 7}

        def draw(rng: np.random.Generator, plain: Example = plain) -> list[np.ndarray]:
            return [*sample_operands(plain, rng), np.array([11, 13], np.uint32)]

        found.append((name, Example((*plain.types, TensorType("u32", (2,))), attrs, draw)))
    return found


@cache
def registered() -> list[tuple[str, Example]]:
    return [(name, example) for name, op in OPS.items() for example in op.examples()]


def case_id(value: object) -> str:
    if isinstance(value, Example):
        telling = ("axes", "axis", "shape", "perm", "dropout")
        attrs = ",".join(f"{k}={v}" for k, v in value.attrs.items() if k in telling)
        return "-".join([*("x".join(map(str, t.shape)) or "scalar" for t in value.types), *([attrs] if attrs else [])])
    return str(value)


def over(wanted: Callable[[str], bool] = lambda name: True, dropout: bool = True) -> pytest.MarkDecorator:
    """A test for each example of the ops that are wanted, dropout examples of attention among them."""
    cases = registered() + (dropout_examples() if dropout else [])
    return pytest.mark.parametrize(("name", "example"), [c for c in cases if wanted(c[0])], ids=case_id)


def drawn(name: str, example: Example) -> list[np.ndarray]:
    """The same operand values in every run."""
    operands = sample_operands(example, np.random.default_rng(zlib.crc32(name.encode())))
    if name.split("_d")[0] not in POSITIVE or not isinstance(OPS[name], Pointwise):
        return operands
    return [np.abs(x) + np.float32(0.5) for x in operands]


def widened(arrays: Arrays) -> list[np.ndarray]:
    return [x.astype(np.float64) if x.dtype == np.float32 else x for x in arrays]


def is_float(type: TensorType) -> bool:
    return type.dtype == "f32"


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max()) if x.size else 0.0


# ------------------------------------------------------------------------------------------- types and precision


@over()
def test_results_have_the_inferred_types(name: str, example: Example) -> None:
    expected = OPS[name].infer(example.types, example.attrs)
    results = OPS[name].evaluate(drawn(name, example), example.attrs)
    assert [TensorType(dtype_name(r), r.shape) for r in results] == list(expected)


@over(lambda name: any(is_float(t) for e in OPS[name].examples() for t in e.types))
def test_float64_operands_give_float64_results_near_the_float32_ones(name: str, example: Example) -> None:
    operands = drawn(name, example)
    narrow = OPS[name].evaluate(operands, example.attrs)
    wide = OPS[name].evaluate(widened(operands), example.attrs)
    for n, w in zip(narrow, wide, strict=True):
        assert w.dtype == (np.float64 if n.dtype == np.float32 else n.dtype)
        assert largest(w.astype(np.float64) - n) <= 2e-5 * max(1.0, largest(w))


def test_pointwise_formulas_take_scalars_without_axes() -> None:
    for name, op in OPS.items():
        if isinstance(op, Pointwise):
            example = Example(tuple(TensorType(d, ()) for d in op.dtypes), op.examples()[0].attrs)
            assert op.evaluate(drawn(name, example), example.attrs)[0].shape == ()


@pytest.mark.parametrize(
    ("name", "shapes", "attrs", "reason"),
    [
        ("matmul", ((4, 64), (128, 8)), {}, "inner dims differ"),
        ("matmul", ((4,), (4, 8)), {}, "two axes"),
        ("add", ((4, 3), (5,)), {}, "do not broadcast"),
        ("add", ((4, 3),), {}, "takes 2 operands"),
        ("reshape", ((4, 3),), {"shape": (5,)}, "12 elements"),
        ("transpose", ((4, 3),), {"perm": (0, 0)}, "does not name the axes"),
        ("slice", ((4, 3),), {"axis": 0, "start": 2, "stop": 6}, "lies outside"),
        ("concat", ((4, 3), (4, 3, 1)), {"axis": 0}, "shapes differ"),
        ("layer_norm", ((4, 3), (4,), (3,)), {"eps": 1e-5}, "do not fit"),
        ("attention", ((1, 2, 8, 4), (1, 2, 9, 4), (1, 2, 8, 4)), {"causal": True, "scale": 1.0}, "one shape"),
    ],
)
def test_operands_that_do_not_fit_are_refused_with_the_reason(
    name: str, shapes: Any, attrs: dict[str, Any], reason: str
) -> None:
    g = GraphBuilder()
    with pytest.raises(UserError, match=reason):
        g(name, *(Value(TensorType("f32", s)) for s in shapes), **attrs)


# ------------------------------------------------------------------------------------------- gradients


def has_gradient(name: str) -> bool:
    op = OPS[name]
    if isinstance(op, Pointwise):
        return op.differentiable and op.dtypes.count("f32") > 0
    return type(op).gradient is not GraphOp.gradient


def gradients(name: str, example: Example, operands: Arrays, cotangent: np.ndarray) -> list[np.ndarray | None]:
    """Gradients of sum(first result * cotangent) by the op's own rule, evaluated in float64."""
    g = GraphBuilder()
    values = [Value(t) for t in example.types]
    op = g.emit(name, *values, **example.attrs)
    grad = Value(op.results[0].type)
    found = OPS[name].gradient(g, op, [grad, *(None for _ in op.results[1:])])
    arrays = dict(zip([*values, grad], [*operands, cotangent], strict=True))
    run_region(Region(ops=tuple(g.ops)), arrays)
    assert all(v is None or v.type == t for v, t in zip(found, example.types, strict=True))
    return [None if v is None else arrays[v] for v in found]


@over(has_gradient)
def test_gradient_agrees_with_numeric_differentiation(name: str, example: Example) -> None:
    rng = np.random.default_rng(1)
    operands = widened(drawn(name, example))
    value = OPS[name].evaluate(operands, example.attrs)[0]
    cotangent = rng.standard_normal(value.shape)
    found = gradients(name, example, operands, cotangent)
    for i, x in enumerate(operands):
        if x.dtype != np.float64:
            assert found[i] is None
            continue
        direction, step = rng.standard_normal(x.shape), 1e-5
        after, before = (
            OPS[name].evaluate([*operands[:i], x + s * direction, *operands[i + 1 :]], example.attrs)[0]
            for s in (step, -step)
        )
        numeric = float(((after - before) * cotangent).sum() / (2 * step))
        gradient = found[i]
        exact = 0.0 if gradient is None else float((gradient * direction).sum())
        assert abs(numeric - exact) <= 1e-6 * max(1.0, abs(numeric), float(np.abs(cotangent).sum()) * 1e-2)


# ------------------------------------------------------------------------------------------- PyTorch

TORCH: dict[str, Callable[..., Any]] = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "matmul": lambda a, b, parts=1: (
        torch.matmul(a, b) if parts == 1 else torch.stack([x @ y for x, y in zip(a.chunk(parts, 1), b.chunk(parts, 0), strict=True)])
    ),
    "sum": lambda x, axes: x.sum(dim=axes),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, perm: x.permute(perm),
    "slice": lambda x, axis, start, stop: x.narrow(axis, start, stop - start),
    "concat": lambda *xs, axis: torch.cat(xs, axis),
    "broadcast": lambda x, shape: x.broadcast_to(shape),
    "softmax": lambda x: torch.softmax(x, -1),
    "layer_norm": lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps),
    "cross_entropy": lambda x, t: F.cross_entropy(x, t.long(), reduction="none"),
    "embedding": lambda t, table, first=0: F.embedding(t.long(), F.pad(table, (0, 0, first, 2 * len(table)))),
    "attention": lambda q, k, v, causal, scale: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale),
}


def torch_function(name: str) -> Callable[..., Any] | None:
    """PyTorch's meaning of an op: from the table, or the ATen op it is captured from."""
    if name in TORCH:
        return TORCH[name]
    for aten in OPS[name].aten:
        _, op, overload = aten.split(".")
        if overload != "Scalar":
            return getattr(getattr(torch.ops.aten, op), overload)  # type: ignore[no-any-return]
    return None


@over(lambda name: torch_function(name) is not None, dropout=False)
def test_op_and_gradient_match_pytorch_in_float64(name: str, example: Example) -> None:
    operands = widened(drawn(name, example))
    tensors = [torch.tensor(x, requires_grad=x.dtype == np.float64) for x in operands]
    function = torch_function(name)
    assert function is not None
    expected = function(*tensors, **example.attrs)
    result = OPS[name].evaluate(operands, example.attrs)[0]
    np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-11, atol=1e-11)
    if not expected.requires_grad:
        return
    cotangent = np.random.default_rng(2).standard_normal(result.shape)
    expected.backward(torch.tensor(cotangent))
    for found, tensor in zip(gradients(name, example, operands, cotangent), tensors, strict=True):
        if tensor.grad is not None:
            np.testing.assert_allclose(0.0 if found is None else found, tensor.grad.numpy(), rtol=1e-10, atol=1e-10)


def test_attention_with_dropout_matches_pytorch_with_the_same_mask() -> None:
    name, example = dropout_examples()[0]
    q, k, v, key = (torch.tensor(x) for x in widened(drawn(name, example)))
    batch, heads, context, _ = q.shape
    counter = np.arange(batch * heads * context * context, dtype=np.uint32).reshape(batch, heads, context, context)
    (bits,) = OPS["random_bits"].evaluate([*key.numpy(), counter, np.asarray(example.attrs["stream"], np.uint32)], {})
    (keep,) = OPS["bits_keep"].evaluate([bits, np.asarray(example.attrs["dropout"], np.float32)], {})
    later = torch.ones(context, context, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * example.attrs["scale"]).masked_fill(later, -torch.inf)
    expected = (torch.softmax(scores, -1) * torch.tensor(keep)) @ v
    result = OPS[name].evaluate([x.numpy() for x in (q, k, v, key)], example.attrs)[0]
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------- tile programs


class Program:
    """A tile kernel for one op over operands and results that lie densely, each in a buffer of its own."""

    def __init__(self, name: str, example: Example, order: dict[str, Any]) -> None:
        self.op, self.example = OPS[name], example
        self.types = self.op.infer(example.types, example.attrs)
        self.k = TileBuilder(name, order)
        self.node = Op(name, tuple(map(Value, example.types)), tuple(map(Value, self.types)), example.attrs)
        operands = [(self.k.buffer(f"x{i}", t, "in"), t) for i, t in enumerate(example.types)]
        results = [(self.k.buffer(f"y{i}", t, "out"), t) for i, t in enumerate(self.types)]
        self.read = [stored_reader(self.k, b, t, Strided.dense(t.shape)) for b, t in operands]
        self.write = [stored_writer(self.k, b, t, Strided.dense(t.shape)) for b, t in results]

    def blocks(self, extents: Sequence[int], sizes: Sequence[int]) -> list[Any]:
        """One block of each axis, for a grid that covers them all."""
        blocks = zip(extents, sizes, strict=True)
        return [self.k.dim(f"b{n}", self.k.grid(ceil_div(n, size)) * size, size, n) for n, size in blocks]


def own_program(name: str, example: Example, tile: Sequence[int]) -> Kernel:
    p = Program(name, example, {"tile": tuple(tile)})
    p.op.tiles(p.k, p.node, p.read, p.write)
    return p.k.finish()


def row_program(name: str, example: Example, rows: int) -> Kernel:
    """A row op on its own: a grid over leading axes and blocks of rows."""
    p = Program(name, example, {"rows": rows})
    assert isinstance(p.op, RowOp)
    space = p.op.space(p.node)
    lead: list[Position] = [p.k.grid(n) for n in space[:-2]]
    i = p.blocks(space[-2:-1], [rows])[0] if len(space) > 1 else None
    lead += [i] if i is not None else []
    tiles = p.op.rows(p.k, p.node, lead, i, p.read)
    for tile, write, type in zip(tiles, p.write, p.types, strict=True):
        c = p.k.axis("c", type.shape[-1]) if type.rank > len(lead) else None
        write(tile, *lead, *([c] if c else []), rows=i, cols=c)
    return p.k.finish()


def column_program(name: str, example: Example, tile: Sequence[int]) -> Kernel:
    """A column op on its own: stripes of columns, over blocks of rows."""
    p = Program(name, example, {"tile": tuple(tile)})
    rows, columns = example.types[0].shape
    parts = example.attrs.get("parts", 1)
    extent = rows // parts
    block = tile[0] if parts == 1 else min(extent, 3)
    part = [p.k.grid(parts)] if parts > 1 else []
    first = sum((n * extent for n in part), Index.of(0))
    (j,) = p.blocks([columns], tile[1:])
    assert isinstance(p.op, ColumnOp)
    column = p.op.column

    def body(n: Index, total: Value) -> list[Value]:
        return [p.k.add(total, column(p.k, p.node, p.k.dim("i", first + n * block, block, rows), j, p.read))]

    (total,) = p.k.loop(0, ceil_div(extent, block), [p.k.fill(0.0, None, j)], body)
    p.write[0](total, *part, j, cols=j)
    return p.k.finish()


def pointwise_program(name: str, example: Example, tile: Sequence[int]) -> Kernel:
    p = Program(name, example, {"tile": tuple(tile)})
    i, j = p.blocks(p.types[0].shape, tile)
    operands = [r(*(i, j)[2 - r.type.rank :], rows=i if r.type.rank == 2 else None, cols=j) for r in p.read]
    p.write[0](p.k.pointwise(name, *operands, **example.attrs), i, j, rows=i, cols=j)
    return p.k.finish()


def check(kernel: Kernel, example: Example, operands: Arrays, wide: bool, tolerance: float) -> None:
    """The kernel verifies, stores every result element, and agrees with the op's own numpy meaning."""
    verify_kernel(kernel)
    name = kernel.name
    given = widened(operands) if wide else list(operands)
    types = OPS[name].infer(example.types, example.attrs)
    expected = OPS[name].evaluate(widened(operands), example.attrs)
    floats = np.float64 if wide else np.float32
    results = [unwritten(t.size, floats if is_float(t) else NUMPY_DTYPES[t.dtype]) for t in types]
    run_kernel(kernel, [*(np.ravel(x) for x in given), *results], wide=wide)
    for found, wanted in zip(results, expected, strict=True):
        found = found.reshape(wanted.shape)
        if wanted.dtype.kind == "f":
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * max(1.0, largest(wanted)))
        else:
            assert (found == wanted).all()


def has_tiles(name: str) -> bool:
    return type(OPS[name]).tiles is not GraphOp.tiles


@pytest.mark.parametrize("tile", [(16, 16, 16), (24, 16, 40), (10, 48, 7), (128, 128, 128)], ids=str)
@over(has_tiles)
def test_tile_program_matches_the_op_at_any_tiling(name: str, example: Example, tile: tuple[int, ...]) -> None:
    sizes = tile if OPS[name].pattern == "contraction" else tile[:2]
    tolerance = 1e-6 if "dropout" in example.attrs else 1e-11  # the mask is 1 / (1 - p) in float32 in one of them
    check(own_program(name, example, sizes), example, drawn(name, example), True, tolerance)


@over(has_tiles)
def test_transposed_tile_program_matches_the_op_in_float32(name: str, example: Example) -> None:
    sizes = (32, 24, 16) if OPS[name].pattern == "contraction" else (32, 24)
    check(transposed(own_program(name, example, sizes)), example, drawn(name, example), False, 1e-5)


@pytest.mark.parametrize("rows", [1, 4, 64])
@over(lambda name: isinstance(OPS[name], RowOp))
def test_row_program_matches_the_op_for_any_block_of_rows(name: str, example: Example, rows: int) -> None:
    check(row_program(name, example, rows), example, drawn(name, example), rows != 4, 2e-5 if rows == 4 else 1e-10)


@pytest.mark.parametrize("tile", [(1, 16), (7, 5), (512, 256)], ids=str)
@over(lambda name: OPS[name].kind == "columns")
def test_column_program_matches_the_op_for_any_stripe(name: str, example: Example, tile: tuple[int, int]) -> None:
    check(column_program(name, example, tile), example, drawn(name, example), True, 1e-11)


@over(lambda name: isinstance(OPS[name], Pointwise))
def test_pointwise_tile_program_matches_the_op(name: str, example: Example) -> None:
    check(pointwise_program(name, example, (2, 3)), example, drawn(name, example), False, 2e-5)


def test_tile_program_reads_operands_wherever_they_lie() -> None:
    """A matmul over a transposed left operand inside a larger buffer, and a result with gaps between its rows."""
    a, b, y = (TensorType("f32", s) for s in ((20, 30), (30, 10), (20, 10)))
    k = TileBuilder("matmul", {"tile": (8, 8, 8)})
    sizes = (("a", 650, "in"), ("b", 300, "in"), ("y", 380, "out"))
    buffers = [k.buffer(hint, TensorType("f32", (n,)), access) for hint, n, access in sizes]
    stored = [Strided(50, a.shape, (1, 20)), Strided.dense(b.shape), Strided(0, y.shape, (19, 1))]
    read = [stored_reader(k, buffer, t, s) for buffer, t, s in zip(buffers[:2], (a, b), stored[:2], strict=True)]
    op = Op("matmul", (Value(a), Value(b)), (Value(y),))
    OPS["matmul"].tiles(k, op, read, [stored_writer(k, buffers[2], y, stored[2])])
    kernel = k.finish()
    verify_kernel(kernel)
    rng = np.random.default_rng(3)
    left, right, result = rng.standard_normal(650), rng.standard_normal(300), unwritten(380, np.float64)
    run_kernel(kernel, [left, right, result], wide=True)
    strided = np.lib.stride_tricks.as_strided(result, (20, 10), (19 * 8, 8))
    np.testing.assert_allclose(strided, left[50:].reshape(30, 20).T @ right.reshape(30, 10), rtol=1e-12)
    assert np.isnan(result).sum() == 380 - 20 * 10


def test_only_sampled_grid_points_are_run() -> None:
    example = OPS["matmul"].examples()[1]
    kernel = own_program("matmul", example, (64, 64, 64))
    operands = drawn("matmul", example)
    (full,) = OPS["matmul"].evaluate(widened(operands), {})
    result = unwritten(full.size, np.float64)
    run_kernel(kernel, [*(np.ravel(x) for x in widened(operands)), result], points=[(0, 0), (1, 2)], wide=True)
    stored = ~np.isnan(result.reshape(full.shape))
    assert stored[:64, :64].all() and stored[128:, 64:].all() and stored.sum() == 64 * 64 + 2 * 1
    np.testing.assert_allclose(result.reshape(full.shape)[stored], full[stored], rtol=1e-11)


def test_every_op_is_reached() -> None:
    """Ops without an example escape every loop above."""
    assert [name for name, op in OPS.items() if not op.examples()] == []
