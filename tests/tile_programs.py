"""Random tile programs, drawn by Hypothesis: products with computed operands, chains of pointwise ops, reductions along
either axis, loops with carried tiles, loops and addresses by numbers from memory, ragged blocks, transposed and broadcast
operands, several outputs."""

from __future__ import annotations

from hypothesis import strategies as st

from tinygpt.ir.core import Kernel, Value
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.tile import TileBuilder
from tinygpt.ir.types import Dim, TensorType

UNARY = ("tanh", "gelu", "sigmoid", "neg", "relu", "abs", "erf")
BINARY = ("add", "sub", "mul", "min", "max")


@st.composite
def tile_programs(draw: st.DrawFn) -> Kernel:
    """A verified-by-construction kernel: every value stays of moderate size, every output element is written once."""
    rows, cols, inner = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 24))
    block_rows, block_cols, block_inner = (draw(st.integers(1, n)) for n in (rows, cols, inner))
    k = TileBuilder("fuzz", {"lanes": 16}, {}, "random")
    a, b, c = (k.buffer(n, TensorType("f32", (size,)), "in") for n, size in (("a", rows * inner), ("b", inner * cols), ("c", rows * cols)))
    row, col = k.buffer("row", TensorType("f32", (rows,)), "in"), k.buffer("col", TensorType("f32", (cols,)), "in")
    numbers = k.buffer("numbers", TensorType("i32", (rows + 8,)), "in")
    reduces = draw(st.sampled_from(("", "rows", "columns")))
    if reduces == "rows":
        block_cols = cols  # a row reduction sees whole rows
    if reduces == "columns":
        block_rows = rows
    j = k.dim("j", k.grid(ceil_div(cols, block_cols)) * block_cols, block_cols, cols)
    i = k.dim("i", k.grid(ceil_div(rows, block_rows)) * block_rows, block_rows, rows)
    pool = [
        k.load(c, 0, draw(st.sampled_from(((cols, 1), (1, rows)))), i, j),
        k.load(row, 0, (1, 0), i, None),
        k.load(col, 0, (0, 1), None, j),
        k.fill(draw(st.floats(-1, 1, width=32))),
    ]
    if draw(st.booleans()):
        pool.append(product(draw, k, a, b, numbers, i, j, (rows, cols, inner), block_inner))
    if draw(st.booleans()):
        pool.append(segments(draw, k, c, numbers, i, j, (rows, cols)))
    for _ in range(draw(st.integers(1, 6))):
        pool.append(pointwise(draw, k, pool))
    if reduces:
        axis = 1 if reduces == "rows" else 0
        full = k.add(k.pointwise("tanh", pool[-1]), pool[0])
        total = k.reduce(draw(st.sampled_from(("sum", "max"))), full, axis)
        pool.append(k.pointwise("tanh", k.mul(total, 0.1)))
        for _ in range(draw(st.integers(1, 3))):
            pool.append(pointwise(draw, k, pool))
    for n in range(draw(st.integers(1, 2))):
        value = k.add(pool[-1 - n], k.mul(pool[0], 0.5))
        out = k.buffer(f"out{n}", TensorType("f32", (rows * cols,)), "out")
        k.store(out, value, 0, draw(st.sampled_from(((cols, 1), (1, rows)))))
    return k.finish()


def product(draw: st.DrawFn, k: TileBuilder, a: Value, b: Value, numbers: Value, i: Dim, j: Dim, shape: tuple[int, int, int], block: int) -> Value:
    """A product over the inner axis in blocks, its operands transposed or computed at random, scaled to stay moderate."""
    rows, cols, inner = shape
    turned = draw(st.booleans()), draw(st.booleans())
    computed = draw(st.booleans()), draw(st.booleans())
    begins = draw(st.integers(0, 3)) == 0  # whether the inner axis begins where a number from memory says
    if begins:
        first, block = k.bind(k.load(numbers, 0, (0, 0), None, None), 0, inner - 1), inner

    def body(n: Index, acc: Value) -> list[Value]:
        d = k.dim("k", first, inner, inner) if begins else k.dim("k", n * block, block, inner)
        left = k.load(a, 0, (1, rows) if turned[0] else (inner, 1), i, d)
        right = k.load(b, 0, (1, inner) if turned[1] else (cols, 1), d, j)
        if computed[0]:
            left = k.pointwise("tanh", left)
        if computed[1]:
            right = k.mul(right, 0.5)
        return [k.dot(acc, left, right)]

    (acc,) = k.loop(0, ceil_div(inner, block), [k.fill(0.0, i, j)], body)
    return k.pointwise("tanh", k.mul(acc, 1.0 / inner))


def segments(draw: st.DrawFn, k: TileBuilder, matrix: Value, numbers: Value, i: Dim, j: Dim, shape: tuple[int, int]) -> Value:
    """A sum over some rows of a matrix, picked by numbers from memory, as many as numbers from memory say. Numbers may lie
    outside of the range they are bound to, and there may be no trip. The bounds may be the same for all grid points."""
    rows, cols = shape
    at = draw(st.sampled_from((i.start, Index.of(0))))

    def number(base: Index | int, low: int, high: int) -> Index:
        found = k.load(numbers, base, (0, 0), None, None)
        if draw(st.booleans()):
            found = k.pointwise("add", found, k.fill(1, dtype="i32"))
        return k.bind(found, low, high)

    low, high = number(at, 0, draw(st.integers(0, 2))), number(at + draw(st.integers(1, 2)), 0, 4)

    def body(n: Index, acc: Value) -> list[Value]:
        row = number(n, 0, draw(st.integers(0, rows - 1)))
        part = k.load(matrix, row * cols, (0, 1), None, j)
        return [k.add(k.mul(acc, 0.5), part)]

    (acc,) = k.loop(low, high + draw(st.integers(0, 1)), [k.fill(0.25, i, j)], body)
    return k.pointwise("tanh", acc)


def pointwise(draw: st.DrawFn, k: TileBuilder, pool: list[Value]) -> Value:
    """One more pointwise op over values there are, kept within [-2, 2] or so."""
    x = draw(st.sampled_from(pool))
    if draw(st.booleans()):
        return k.pointwise(draw(st.sampled_from(UNARY)), x)
    y = draw(st.sampled_from(pool))
    if draw(st.integers(0, 4)) == 0:
        return k.pointwise("where", k.pointwise("lt", x, y), x, k.mul(y, 0.5))
    return k.pointwise("tanh", k.pointwise(draw(st.sampled_from(BINARY)), x, y))
