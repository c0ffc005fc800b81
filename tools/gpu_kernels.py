"""Times single generated kernels on a WebGPU device: products in the three forms of a training step, and FlashAttention-2.

    python tools/gpu_kernels.py            (started by tools/measure.py gpu; one JSON object a line)

A time is a slope, of many launches in one submit against few, so that neither submit nor read-back counts. Where PyTorch
has CUDA, what it takes for the same stands beside it, in float32 without TF32."""

from __future__ import annotations

import contextlib
import json
import operator
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tinygpt.ir.core import Function, Module, Op, Region, Value
from tinygpt.ir.ops import OPS, GraphBuilder
from tinygpt.ir.types import TensorType
from tinygpt.lowering import pipeline
from tinygpt.lowering.memory import plan as plan_memory
from tinygpt.runtime import trust
from tinygpt.runtime.gpu import GpuEngine
from tinygpt.runtime.manifest import FunctionEntry, Manifest, Slot
from tinygpt.targets.wgsl import PROFILES, emit, target_record

PROFILE = PROFILES["webgpu-default"]
PASSES = "simplify,fuse,tile,loops"
SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 3072, 768), (1024, 1024, 256))  # rows, columns, contraction
FORMS = ("x @ w", "x @ w.T", "x.T @ y")
ATTENTION = (4, 12, 1024, 64)  # batch, heads, context, width of a head
FEW, TURNS, SECONDS, WARM_UP = 4, 5, 0.02, 0.5


def f32(*shape: int) -> TensorType:
    return TensorType("f32", shape)


def product(form: str, rows: int, columns: int, inner: int) -> Module:
    """One product as a module with the function f."""
    g = GraphBuilder()
    a = Value(f32(inner, rows) if form == "x.T @ y" else f32(rows, inner), "a")
    b = Value(f32(columns, inner) if form == "x @ w.T" else f32(inner, columns), "b")
    left = g("transpose", a, perm=(1, 0)) if form == "x.T @ y" else a
    right = g("transpose", b, perm=(1, 0)) if form == "x @ w.T" else b
    return module(g, (a, b), (g("matmul", left, right),))


def attention(backward: bool) -> Module:
    """Causal attention, with its gradients if asked for."""
    g = GraphBuilder()
    q, k, v, grad = args = tuple(Value(f32(*ATTENTION), name) for name in ("q", "k", "v", "grad"))
    op: Op = g.emit("attention", q, k, v, causal=True, scale=ATTENTION[-1] ** -0.5)
    if not backward:
        return module(g, args[:3], op.results)
    found = OPS["attention"].gradient(g, op, [grad, None])
    return module(g, args, (op.results[0], *(x for x in found if x is not None)))


def module(g: GraphBuilder, args: tuple[Value, ...], results: tuple[Value, ...]) -> Module:
    function = Function("f", Region(args, tuple(g.ops), results), {}, tuple(f"y{n}" for n in range(len(results))))
    return Module("kernels", functions={"f": function}, attrs={"layout": {"places": {}, "decaying": 0, "size": 0, "pieces": ()}})


def slope(few: Callable[[], float], many: Callable[[], float], launches: int) -> float:
    """Seconds of one of the `launches` that `many` has more than `few`."""
    return (min(many() for _ in range(TURNS)) - min(few() for _ in range(TURNS))) / launches


def ours(made: Module) -> float:
    """Seconds of a run of the module's function on the best adapter."""
    stages = pipeline.run(pipeline.captured(made), PROFILE, pipeline.parse_pipeline(PASSES))
    plan = plan_memory(stages[-1].module, PROFILE)
    files = emit(plan, {}, PROFILE, False)
    record = target_record(plan, PROFILE)
    launches = record["functions"]["f"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        (Path(folder) / "kernels").mkdir()
        for name, text in files.items():
            (Path(folder) / name).write_text(text)

        def repeated(times: int) -> Callable[[], float]:
            return repetition(opened, Path(folder), record, plan.pools, files, launches * times)

        few = repeated(FEW)
        count = max(FEW, int(SECONDS / max(few() / FEW, 1e-6)))
        many = repeated(FEW + count)
        began = time.perf_counter()
        while time.perf_counter() - began < WARM_UP:
            many()
        return slope(few, many, count)


def repetition(
    opened: contextlib.ExitStack, folder: Path, record: dict[str, Any], pools: dict[str, int], files: dict[str, str], launches: list[Any]
) -> Callable[[], float]:
    """A function that runs the launches in one submit, and returns the seconds until they are done; its engine is open as
    long as `opened`."""
    probe = Slot("probe", (1,), "f32", next(pool for pool, size in pools.items() if size), 0)
    own = json.dumps(record).encode()
    trust.remember(own)
    manifest = Manifest(
        name="kernels", strict=False, config=None, batch=1, context=1, vocab_size=1, training={}, pools=pools, parameters=(), kernels={}, golden={},
        target={**record, "functions": {"f": launches}}, functions={"f": FunctionEntry("f", (), (probe,), tuple(launches))}, files=dict.fromkeys(files, ""), digest=trust.digest(own),
    )  # fmt: skip
    engine = GpuEngine(folder, manifest, None)
    opened.callback(engine.close)

    def run() -> float:
        began = time.perf_counter()
        engine.run("f")
        engine.read(probe)
        return time.perf_counter() - began

    for _ in range(3):  # the first run makes pipelines, the third is the first that was recorded ahead
        run()
    return run


def rival(step: Callable[[], object]) -> float:
    """Seconds of a step of PyTorch on CUDA."""
    import torch

    def repeat(times: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            step()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    count = max(FEW, int(SECONDS / max(repeat(FEW) / FEW, 1e-6)))
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_UP:
        repeat(count)
    return slope(lambda: repeat(FEW), lambda: repeat(FEW + count), count)


def cuda() -> Any:
    """PyTorch, if it has a CUDA device."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def products(torch: Any) -> Iterator[dict[str, Any]]:
    for rows, columns, inner in SHAPES:
        for form in FORMS:
            row = {"what": form, "shape": [rows, columns, inner], "flops": 2 * rows * columns * inner, "seconds": ours(product(form, rows, columns, inner))}
            if torch:
                a, b = (torch.randn(*s, device="cuda") for s in ((rows, inner), (inner, columns)))
                left = a.T.contiguous().T if form == "x.T @ y" else a
                right = b.T.contiguous().T if form == "x @ w.T" else b
                row["rival"] = rival(partial(operator.matmul, left, right))
            yield row


def attentions(torch: Any) -> Iterator[dict[str, Any]]:
    for backward in (False, True):
        row: dict[str, Any] = {"what": "forward and backward" if backward else "forward", "shape": list(ATTENTION), "seconds": ours(attention(backward))}
        if torch:
            q, k, v = (torch.randn(*ATTENTION, device="cuda", requires_grad=backward) for _ in range(3))
            grad = torch.randn(*ATTENTION, device="cuda")

            def step(q: Any = q, k: Any = k, v: Any = v, grad: Any = grad, backward: bool = backward) -> None:
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                if backward:
                    torch.autograd.grad(out, (q, k, v), grad)

            row["rival"] = rival(step)
        yield row


def main() -> None:
    torch = cuda()
    for rows in (products(torch), attentions(torch)):
        for row in rows:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
