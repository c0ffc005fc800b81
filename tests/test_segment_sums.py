"""The gradient of an embedding with a large vocabulary: sorted positions and sums of their stretches, against PyTorch and
float64, down the levels of both strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from tests.lowered import CPU_PROFILES, run_tiled, tiled
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Kernel, Module, Region, Value
from tinygpt.ir.interpret import evaluate
from tinygpt.ir.interpret_loop import run_loop_kernel
from tinygpt.ir.interpret_tile import run_kernel
from tinygpt.ir.interpret_workgroup import run_workgroups
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.ir.ops.embedding import SMALL_VOCABULARY
from tinygpt.ir.plan import grid_points
from tinygpt.ir.types import TensorType
from tinygpt.lowering import cpu, gpu
from tinygpt.lowering.simplify import Simplify
from tinygpt.targets.wgsl.profiles import DEFAULT

Arrays = Mapping[str, np.ndarray]
WIDTH = 9


def gradient(count: int, vocabulary: int, pieces: int = 1) -> Module:
    """`f(tokens, table, dy)`: the gradient of the table, as the op gives it, or summed in pieces of the vocabulary."""
    g = GraphBuilder()
    types = {"tokens": TensorType("i32", (count,)), "table": TensorType("f32", (vocabulary, WIDTH)), "dy": TensorType("f32", (count, WIDTH))}
    args = {name: Value(type, name) for name, type in types.items()}
    op = g.emit("embedding", args["tokens"], args["table"])
    _, whole = OPS["embedding"].gradient(g, op, [args["dy"]])
    assert whole is not None
    results, names = [whole], ["grad"]
    if pieces > 1:
        made = next(o for o in g.ops if o.name == "segment_sum")
        ends = np.linspace(0, vocabulary, pieces + 1).astype(int)
        results = [g("segment_sum", *made.operands, first=int(a), rows=int(b - a)) for a, b in zip(ends, ends[1:])]
        names = [f"grad{n}" for n in range(pieces)]
    # Kept: what the results are made of, without the forward pass and what nobody reads.
    needed, ops = set(results), []
    for o in reversed(g.ops):
        if needed & set(o.results):
            needed |= set(o.operands)
            ops.append(o)
    body = Region(tuple(args.values()), tuple(reversed(ops)), tuple(results))
    return Module("embedding", functions={"f": Function("f", body, {}, tuple(names))})


def drawn(kind: str, count: int = 70, vocabulary: int = SMALL_VOCABULARY + 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(kind))
    tokens = {
        "each at most a few times": rng.integers(0, vocabulary, count),
        "all equal": np.full(count, 17),
        "three of them, the first and the last": rng.choice([0, 400, vocabulary - 1], count),
        "in falling order": np.arange(count)[::-1],
    }[kind]
    dy = rng.standard_normal((count, WIDTH)).astype(np.float32)
    return {"tokens": tokens.astype(np.int32), "table": np.zeros((vocabulary, WIDTH), np.float32), "dy": dy}


KINDS = ["each at most a few times", "all equal", "three of them, the first and the last", "in falling order"]


def of_pytorch(inputs: Arrays, dtype: torch.dtype) -> np.ndarray:
    table = torch.nn.Embedding(*inputs["table"].shape, dtype=dtype)
    table(torch.from_numpy(inputs["tokens"].astype(np.int64))).backward(torch.from_numpy(inputs["dy"]).to(dtype))
    assert table.weight.grad is not None
    return table.weight.grad.numpy()


def launcher(caps: Caps) -> Callable[[Kernel, list[np.ndarray]], None]:
    """Runs the loops of a kernel, those of a cpu in two stretches of the grid."""

    def launch(kernel: Kernel, buffers: list[np.ndarray]) -> None:
        if caps.strategy == "gpu":
            run_workgroups(gpu.lower(kernel, caps), buffers)
            return
        loops, points = cpu.lower(kernel, caps), grid_points(kernel)
        for low, high in ((points // 3, points), (0, points // 3)):
            run_loop_kernel(loops, buffers, low, high)

    return launch


def added_in_order(inputs: Arrays) -> np.ndarray:
    """The rows of dy added to their tokens' rows one after another, in float32."""
    table = np.zeros_like(inputs["table"])
    for token, row in zip(inputs["tokens"], inputs["dy"], strict=True):
        table[token] += row
    return table


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_pytorchs_gradient(kind: str) -> None:
    inputs = drawn(kind)
    module = gradient(70, inputs["table"].shape[0])
    assert [op.name for op in module.functions["f"].body.ops if op.name not in ("reshape",)] == [
        "stable_ranks", "inverse_permutation", "segment_starts", "segment_sum",
    ]  # fmt: skip
    wide = {n: x.astype(np.float64) if x.dtype == np.float32 else x for n, x in inputs.items()}
    np.testing.assert_allclose(evaluate(module, "f", wide)["grad"], of_pytorch(inputs, torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("caps", [*CPU_PROFILES, DEFAULT], ids=lambda c: c.name)
@pytest.mark.parametrize("kind", KINDS)
def test_loops_add_the_rows_of_a_token_in_the_order_of_their_positions(kind: str, caps: Caps) -> None:
    """To the bit; and rows of tokens that do not occur are exactly 0."""
    inputs = drawn(kind)
    lowered = tiled(Simplify().run(gradient(70, inputs["table"].shape[0]), caps), caps)
    found = run_tiled(lowered, "f", inputs, launcher(caps))["grad"]
    assert found.tobytes() == added_in_order(inputs).tobytes()
    exact = of_pytorch(inputs, torch.float64)
    assert np.abs(found - exact).max() <= 2 * np.abs(of_pytorch(inputs, torch.float32) - exact).max() + 1e-6
    assert not found[np.setdiff1d(np.arange(len(found)), inputs["tokens"])].any()


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_the_vocabulary_share_one_sort_and_are_the_whole(kind: str) -> None:
    inputs = drawn(kind)
    caps = CPU_PROFILES[0]
    module = gradient(70, inputs["table"].shape[0], pieces=3)
    names = [op.name for op in module.functions["f"].body.ops]
    assert names.count("segment_sum") == 3 and names.count("stable_ranks") == names.count("segment_starts") == 1
    lowered = tiled(Simplify().run(module, caps), caps)
    pieces = run_tiled(lowered, "f", inputs, launcher(caps))
    assert np.concatenate(list(pieces.values())).tobytes() == added_in_order(inputs).tobytes()


def test_a_small_vocabulary_keeps_the_product() -> None:
    assert "embedding_grad" in [op.name for op in gradient(8, SMALL_VOCABULARY).functions["f"].body.ops]


def test_ranks_that_are_no_permutation_read_no_other_memory() -> None:
    """Numbers come from memory: whatever they are, they are moved into their ranges."""
    dy, order, starts = np.ones((4, 3), np.float32), np.array([-5, 99, 2, 0], np.int32), np.array([-9, 2, 99, -1], np.int32)
    g = GraphBuilder()
    args = [Value(TensorType(d, s), n) for n, d, s in (("dy", "f32", (4, 3)), ("order", "i32", (4,)), ("starts", "i32", (4,)))]
    made = g("segment_sum", *args, first=0, rows=3)
    module = Module("m", functions={"f": Function("f", Region(tuple(args), tuple(g.ops), (made,)), {}, ("y",))})
    for caps in (CPU_PROFILES[1], DEFAULT):
        lowered = tiled(module, caps)
        inputs = {"dy": dy, "order": order, "starts": starts}
        expected = run_tiled(lowered, "f", inputs, lambda kernel, buffers: run_kernel(kernel, buffers))
        assert run_tiled(lowered, "f", inputs, launcher(caps))["y"].tolist() == expected["y"].tolist() == [[2] * 3, [2] * 3, [0] * 3]
