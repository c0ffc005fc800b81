"""Golden vectors: inputs and expected outputs for `selftest`, from the interpreter in float64 on the graph.

They depend on the captured module alone, so a bundle is the same bytes from whichever stage it was lowered. Small
models bring their parameters; a large one starts from its own initial weights, whose losses are known well enough."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Module
from tinygpt.ir.interpret import evaluate
from tinygpt.ir.types import NUMPY_DTYPES
from tinygpt.lowering import pipeline
from tinygpt.lowering.optimizer import POOLS, Layout

SEED = np.array([42, 0], np.uint32)
LARGEST_PARAMETERS = 16 << 20  # bytes; the vectors of a larger model would dwarf its code
MOST_FLOPS = 20e9  # of a training step; more would take the interpreter longer than compiling
LR = 3e-4

# How far results may be from float64 here, by the type that activations are kept in; and how far the loss of random weights
# may be from ln(vocabulary). An f16 is off by 2^-11 = 4.9e-4 of itself at most. Such errors are independent, so a row's loss
# and the norm stay below that, a mean over rows far below: of models of 5 to 1024 rows, 1 to 6 layers, the loss was off by
# 7e-6, a row's by 4e-4 of 6, the norm by 1.2e-4.
TOLERANCES = {
    "f32": {"loss": 2e-5, "row_losses": 1e-4, "grad_norm": 2e-5},
    "f16": {"loss": 1e-4, "row_losses": 5e-4, "grad_norm": 5e-4},
}
TOLERANCE_AT_INIT = 0.5
_TOLERANCE_OF_UPDATE = 2e-6
_CLEAR_GRADIENT = 1e-5  # where every gradient is larger, rounding cannot turn AdamW's first step round;
_CLEAR_ROUNDINGS = 8  # and larger than so many roundings of the largest one

Vectors = dict[str, np.ndarray]
Tolerances = dict[str, dict[str, float]]


def golden(captured: Module, caps: Caps) -> tuple[Vectors, Tolerances]:
    """Arrays named `param/NAME`, `FUNCTION/in/NAME` and `FUNCTION/out/NAME`; and how far off outputs may be."""
    optimized = up_to_optimizer(captured, caps)
    batch, context = captured.functions["loss"].params[0].type.shape
    count = sum(p.type.size for p in captured.parameters.values())
    if 4 * count > LARGEST_PARAMETERS or 6 * count * batch * context > MOST_FLOPS:
        return _for_large_model(captured, optimized)
    return _for_small_model(captured, optimized, caps.storage)


def up_to_optimizer(captured: Module, caps: Caps) -> Module:
    """The captured module with its training step as a graph, before anything is made fast."""
    module = captured
    for p in pipeline.parse_pipeline("differentiate,optimize"):
        module = p.run(module, caps)
    return module


def _for_small_model(captured: Module, optimized: Module, storage: str) -> tuple[Vectors, Tolerances]:
    rng = np.random.default_rng(7)
    parameters = {name: _drawn(p.init, p.type.shape, rng) for name, p in captured.parameters.items()}
    batch = _batch(captured, rng)
    wide = {name: array.astype(np.float64) for name, array in parameters.items()}
    vectors: Vectors = {f"param/{name}": array for name, array in parameters.items()}
    tolerances: Tolerances = {}
    layout = Layout.of(optimized)
    weights = layout.pooled(wide)
    flat = dict(zip(POOLS, (weights, np.zeros_like(weights), np.zeros_like(weights)), strict=True))
    state = {name: piece for stem, array in flat.items() for name, piece in layout.cut(array, stem).items()}
    for name in ("loss", "train_step"):
        given = {p.hint: (batch | _step_inputs())[p.hint] for p in optimized.functions[name].params}
        found = evaluate(optimized, name, given, state)
        expected = {n: a for n, a in found.items() if n in TOLERANCES[storage]}
        vectors |= {f"{name}/in/{n}": a for n, a in given.items()}
        vectors |= {f"{name}/out/{n}": a for n, a in expected.items()}
        tolerances[name] = {n: TOLERANCES[storage][n] * max(1.0, float(np.abs(a).max())) for n, a in expected.items()}
    updated = _clear_updates(layout, found, float(np.finfo(NUMPY_DTYPES[storage]).eps))
    vectors |= {f"train_step/out/{n}": a for n, a in updated.items()}
    tolerances["train_step"] |= dict.fromkeys(updated, _TOLERANCE_OF_UPDATE)
    return _stored(vectors | _windows(optimized)), tolerances | {"windows": {"offsets": 0.0}}


def _for_large_model(captured: Module, optimized: Module) -> tuple[Vectors, Tolerances]:
    """Exact batch offsets; and that `init` gives weights whose loss is that of random guessing."""
    batch = _batch(captured, np.random.default_rng(7))
    vectors: Vectors = {"init/in/seed": SEED}
    tolerances: Tolerances = {"windows": {"offsets": 0.0}}
    for name in ("loss", "train_step"):
        vectors |= {f"{name}/in/{p.hint}": (batch | _step_inputs())[p.hint] for p in optimized.functions[name].params}
        vectors[f"{name}/out/loss"] = np.array(math.log(_vocabulary(captured)), np.float32)
        tolerances[name] = {"loss": TOLERANCE_AT_INIT}
    return _stored(vectors | _windows(optimized)), tolerances


def _clear_updates(layout: Layout, step: Mapping[str, np.ndarray], rounding: float) -> Vectors:
    """The vectors among the new weights whose direction no rounding changes: AdamW's first step is a sign."""

    def is_clear(m: np.ndarray) -> bool:
        return bool(np.abs(m).min() > max(_CLEAR_GRADIENT, _CLEAR_ROUNDINGS * rounding * np.abs(m).max()))

    moments, weights = (layout.named(layout.joined(step, f"@{stem}")) for stem in ("adam.m", "weights"))
    return {n: weights[n] for n, m in moments.items() if m.ndim == 1 and is_clear(m)}


def _drawn(init: tuple[Any, ...], shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights near those a parameter starts with, none of them exactly constant."""
    scale = float(init[1]) if init[0] == "normal" else 0.02
    centre = float(init[1]) if init[0] == "constant" else 0.0
    return (centre + scale * rng.standard_normal(shape)).astype(np.float32)


def _batch(captured: Module, rng: np.random.Generator) -> Vectors:
    loss = captured.functions["loss"]
    shape, vocabulary = loss.params[0].type.shape, _vocabulary(captured)
    return {name: rng.integers(0, vocabulary, shape).astype(np.int32) for name in ("tokens", "targets")}


def _step_inputs() -> Vectors:
    """What the first step of training gets beside its batch; `key` where the model drops out."""
    training = {"lr": LR, "bias1": 0.1, "bias2": 0.05}
    return {n: np.asarray(v, np.float32) for n, v in training.items()} | {"key": np.array([1, 2], np.uint32)}


def _vocabulary(captured: Module) -> int:
    """How many tokens the model's cross-entropy knows."""
    losses = [op for op in captured.functions["loss"].body.ops if op.name == "cross_entropy"]
    return int(losses[-1].operands[0].type.shape[-1]) if losses else 2


def _windows(module: Module) -> Vectors:
    inputs = {"seed": SEED, "step": np.array(3, np.uint32), "count": np.array(1_000_000, np.uint32)}
    offsets = evaluate(module, "windows", inputs)["offsets"]
    return {f"windows/in/{n}": a for n, a in inputs.items()} | {"windows/out/offsets": offsets}


def _stored(vectors: Vectors) -> Vectors:
    """As the bundle's pools hold them: float32 for every real number."""
    return {
        name: np.array(a, np.float32 if a.dtype == np.float64 else a.dtype, order="C") for name, a in vectors.items()
    }
