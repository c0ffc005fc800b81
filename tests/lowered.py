"""Shared by the tests of the lowering: single ops and small models through the passes, and kernels run side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tinygpt.compiler import module_for
from tinygpt.config import ModelConfig
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Kernel, Module, Op, Region, Value
from tinygpt.ir.interpret import run_region
from tinygpt.ir.interpret_loop import run_loop_kernel
from tinygpt.ir.interpret_tile import run_kernel, unwritten
from tinygpt.ir.ops import GraphBuilder
from tinygpt.ir.plan import grid_points
from tinygpt.ir.registry import Example
from tinygpt.ir.types import NUMPY_DTYPES
from tinygpt.ir.verify import verify, verify_kernel
from tinygpt.lowering import pipeline
from tinygpt.lowering.fuse import Fuse
from tinygpt.lowering.cpu import lower
from tinygpt.lowering.memory import kernel_types
from tinygpt.lowering.passes import Pass
from tinygpt.lowering.tiles import Tile

WIDE = Caps("wide", lanes=16, registers=32, register_tile=(12, 2))
NARROW = Caps("narrow", lanes=4, registers=16, register_tile=(6, 2), left="copied")
PANELS = Caps("panels", lanes=4, registers=16, register_tile=(8, 1), splat="shuffle", left="panels", unroll=2)
SCALAR = Caps("scalar", lanes=1, registers=16, register_tile=(4, 2))
BLOCKS = Caps("blocks", lanes=16, registers=32, register_tile=(12, 2), inner_block=16)
CPU_PROFILES = (WIDE, NARROW, PANELS, SCALAR)


def op_module(name: str, example: Example) -> Module:
    """A module whose function `f` is one op on function inputs x0, x1, …"""
    g = GraphBuilder()
    args = tuple(Value(t, f"x{i}") for i, t in enumerate(example.types))
    op = g.emit(name, *args, **example.attrs)
    names = tuple(f"y{i}" for i in range(len(op.results)))
    return Module(name, functions={"f": Function("f", Region(args, tuple(g.ops), op.results), {}, names)})


def small_model(**fields: Any) -> Module:
    """A captured model of the reference architecture, by default two odd layers."""
    config = dict(vocab_size=37, context_length=33, n_layers=1, n_heads=5, d_model=40, d_mlp=52) | fields
    batch = config.pop("batch", 2)
    return module_for(ModelConfig(**config), batch, None)


def passes_until(name: str) -> list[Pass]:
    """The default pipeline up to and with the last pass of this name."""
    todo = list(pipeline.parse_pipeline(pipeline.DEFAULT))
    last = max(i for i, p in enumerate(todo) if p.name == name)
    return todo[: last + 1]


def tiled(module: Module, caps: Caps) -> Module:
    """The module with its functions fused and tiled (graph passes are the caller's)."""
    for p in (Fuse(), Tile()):
        module = p.run(module, caps)
    verify(module)
    return module


def run_tiled(
    module: Module, name: str, inputs: Mapping[str, np.ndarray], launch: Callable[[Kernel, list[np.ndarray]], None], parameters: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Run a function of tile or loop kernels, each kernel by `launch`: results by name, new contents of parameters under "@NAME"."""
    function, given = module.functions[name], dict(parameters or {})

    def copied(x: np.ndarray, v: Value) -> np.ndarray:
        return np.array(x, NUMPY_DTYPES[v.type.dtype], order="C")

    def evaluate(op: Op, operands: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        if op.name == "buffer":
            return (unwritten(op.result.type.size, NUMPY_DTYPES[op.result.type.dtype]).reshape(op.result.type.shape),)
        kernel = module.kernels[op.attrs["kernel"]]
        parts = zip(operands, op.attrs["offsets"], kernel_types(kernel), strict=True)
        launch(kernel, [x.reshape(-1)[at : at + t.size] for x, at, t in parts])
        return ()

    values = {p: copied(inputs[p.hint], p) for p in function.params} | {module.parameters[n].value: copied(x, module.parameters[n].value) for n, x in given.items()}
    run_region(function.body, values, evaluate)
    found = {n: values[v] for n, v in zip(function.result_names, function.body.yields, strict=True)}
    return found | {f"@{n}": values[module.parameters[n].value] for n in given}


def random_buffers(kernel: Kernel, rng: np.random.Generator, below: int = 4) -> list[np.ndarray]:
    """Contents for a kernel's buffers: positive floats, small integers."""
    found: list[np.ndarray] = []
    for v in kernel.params:
        if v.type.dtype in ("f32", "f16"):
            found.append((np.abs(rng.standard_normal(v.type.size)) + 0.1).astype(NUMPY_DTYPES[v.type.dtype]))
        else:
            found.append(rng.integers(0, below, v.type.size).astype({"i32": np.int32, "u32": np.uint32}[v.type.dtype]))
    return found


def largest_difference(kernel: Kernel, caps: Caps, buffers: Sequence[np.ndarray], run: Callable[..., object] = run_loop_kernel) -> float:
    """How far the kernel's loops, run by `run`, are from its tile program in float64, relative to the largest element of each
    output."""
    loops = lower(kernel, caps)
    verify_kernel(kernel)
    verify_kernel(loops, caps)
    expected, found = ([b.copy() for b in buffers] for _ in range(2))
    run_kernel(kernel, expected, wide=True)
    run(loops, found, 0, grid_points(kernel))
    worst = 0.0
    for access, a, b in zip(kernel.access, expected, found, strict=True):
        if access != "in":
            worst = float(np.maximum(worst, np.abs(a.astype(np.float64) - b).max() / (np.abs(a).max() + 1e-9)))
    return worst
