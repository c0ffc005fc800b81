"""Bundles of one function each, which benchmarks time on any engine: a matrix product, by the passes that every model goes
through, and the multiply-adds on registers alone that it is measured beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinygpt.compiler import assemble, write_bundle
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Kernel, Module, Region, Value
from tinygpt.ir.index import Index
from tinygpt.ir.loop import LoopBuilder
from tinygpt.ir.ops import GraphBuilder
from tinygpt.ir.plan import Buffer, Entry, Launch, Plan
from tinygpt.ir.types import PointerType, TensorType, VectorType
from tinygpt.lowering import pipeline
from tinygpt.lowering.memory import plan as plan_memory
from tinygpt.lowering.optimizer import Layout
from tinygpt.targets import Target

# A manifest is that of a model: no weights, one token, no settings.
_ATTRS = {
    "config": {"vocab_size": 1}, "batch": 1, "context": 1, "training": {},
    "layout": Layout({}, 0, 0, ()).attrs, "inits": {},
}  # fmt: skip

# Of the peak: 12 chains fill two units of four cycles' latency and fit 16 registers; a run lasts about a millisecond.
_CHAINS, _TRIPS, _UNROLLED, _POINTS = 12, 512, 4, 512


@dataclass(frozen=True)
class OneKernel:
    """A bundle's folder, its function, and how many operations a run of it does (a multiply-add is two)."""

    folder: Path
    function: str
    flops: int


def product(folder: Path, size: int, device: Target, caps: Caps) -> OneKernel:
    """f32[size, size] times f32[size, size], packing of the right operand included."""
    g = GraphBuilder()
    x, w = (Value(TensorType("f32", (size, size)), name) for name in ("x", "w"))
    y = g("matmul", x, w)
    function = Function("product", Region((x, w), tuple(g.ops), (y,)), {}, ("y",))
    module = Module("product", functions={"product": function}, attrs=_ATTRS)
    passes = pipeline.parse_pipeline("simplify,fuse,tile,loops")
    lowered = pipeline.run(pipeline.captured(module), caps, passes)[-1].module
    write_bundle(folder, *assemble(lowered, plan_memory(lowered, caps), device, caps))
    return OneKernel(folder, "product", 2 * size**3)


def peak(folder: Path, device: Target, caps: Caps) -> OneKernel:
    """Multiply-adds of whole vectors in chains that do not wait for one another. Their factor and term are read from
    memory and their sum is written, so that nothing can be worked out in advance."""
    source, target = (Value(PointerType("f32", "buffer"), name) for name in ("factors", "sums"))
    b = LoopBuilder()
    b.loop(Index.variable("lo"), Index.variable("hi"), 1, lambda point: _chains(b, source, target, point, caps.lanes), stem="point")
    kernel = Kernel("peak", Region((source, target), b.finish()), ("in", "out"), {"g0": _POINTS}, level="loop", of="fma")
    factors, sums = Buffer("work", 0, TensorType("f32", (2,))), Buffer("work", 64, TensorType("f32", (_POINTS, caps.lanes)))
    entry = Entry("peak", (("factors", factors),), (("sums", sums),), (Launch("peak", (factors, sums), False),))
    plan = Plan({"state": 0, "work": sums.end}, {}, {"peak": entry}, {"peak": kernel})
    write_bundle(folder, *assemble(Module("peak", attrs=_ATTRS), plan, device, caps))
    return OneKernel(folder, "peak", 2 * caps.lanes * _CHAINS * _TRIPS * _UNROLLED * _POINTS)


def _chains(b: LoopBuilder, factors: Value, sums: Value, point: Index, lanes: int) -> None:
    factor, term = (b.splat(b.load(factors, i), lanes) for i in (0, 1))
    starts = [b.const(float(i + 1), VectorType("f32", lanes)) for i in range(_CHAINS)]

    def trip(i: Index, *chains: Value) -> list[Value]:
        for _ in range(_UNROLLED):
            chains = tuple(b.primitive("fma", [c, factor, term]) for c in chains)
        return list(chains)

    total, *others = b.loop(0, _TRIPS, 1, trip, starts)
    for other in others:
        total = b.primitive("add", [total, other])
    b.store(sums, total, point * lanes)
