"""`--check each`: after every pass, what the module computes is compared with what the captured module computes.

The reference is worked out once, in float64, from the captured loss alone: gradients are checked against differences
of the loss along random directions, and a training step against AdamW written out in numpy. From then on every stage
must agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.ir.core import Function, Module
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.interpret import evaluate
from tinygpt.lowering.differentiate import GRADIENT
from tinygpt.lowering.optimizer import POOLS, Layout
from tinygpt.lowering.pipeline import Stage

MOST_FLOPS = 1.5e9  # of a training step: the interpreter needs about 0.1 µs for each at the loop level
LR, STEP = 3e-3, 1e-4

# Largest difference that passes, relative to the largest element of the reference. Loops run in float32, the rest in
# float64, but for constants that a pass has rounded to float32 (the scale behind dropout).
TOLERANCE = 2e-7
LOOP_TOLERANCE = 2e-4
# Where activations are kept in f16: gradients are sums of numbers that are off by 2^-11 each. Of small models, the one that
# was furthest off by 7e-3 was that of a key's bias, which is zero but for rounding.
NARROW_TOLERANCE = 2e-2
_DIFFERENCE_TOLERANCE = 1e-5  # of a directional derivative by central differences

Arrays = dict[str, np.ndarray]


class StageChecker:
    """Call it with every stage. Raises CompilerBug that names the first pass which changed a result, and its dump."""

    def __init__(self, captured: Module, dump: Path | None = None) -> None:
        """Raises UserError for a module that is too large to be interpreted."""
        loss = captured.functions["loss"]
        batch, context = loss.params[0].type.shape
        flops = 6 * sum(p.type.size for p in captured.parameters.values()) * batch * context
        if flops > MOST_FLOPS:
            raise UserError(
                f"--check each: a step of {captured.name} at batch {batch} and context {context} is {flops / 1e9:.1f} "
                f"billion operations, too much for the interpreter (at most {MOST_FLOPS / 1e9:g})",
                hint="check the same model at a smaller shape: --batch 1 --context 8",
            )
        self.dump = dump
        rng = np.random.default_rng(11)
        self.directions = rng
        vocabulary = [op.operands[0].type.shape[-1] for op in loss.body.ops if op.name == "cross_entropy"] or [2]
        self.inputs: Arrays = {
            n: rng.integers(0, vocabulary[-1], (batch, context)).astype(np.int32) for n in ("tokens", "targets")
        }
        self.inputs["key"] = np.array([3, 5], np.uint32)
        self.inputs |= {n: np.array(x) for n, x in (("lr", LR), ("bias1", 0.19), ("bias2", 0.0975))}
        self.weights = {n: _drawn(p.init, p.type.shape, rng) for n, p in captured.parameters.items()}
        self.moments = tuple(
            {n: 1e-3 * draw(w.shape) for n, w in self.weights.items()} for draw in (rng.standard_normal, rng.random)
        )
        self.captured = captured
        self.reference: dict[str, Arrays] = {}
        self.before = "captured"
        self(Stage(self.before, captured))

    def __call__(self, stage: Stage) -> None:
        for name in ("loss", "grads", "train_step"):
            if name in stage.module.functions:
                self._compare(stage, name, self._results(stage, name))
        self.before = stage.file

    def _results(self, stage: Stage, name: str) -> Arrays:
        """What a function of a stage computes, by the captured module's names whatever the stage keeps its state in."""
        module, function = stage.module, stage.module.functions[name]
        real = np.float32 if stage.level == "loop" else np.float64
        given = {p.hint: _as(self.inputs[p.hint], real) for p in function.params}
        if "layout" not in module.attrs:
            return evaluate(module, name, given, {n: _as(w, real) for n, w in self.weights.items()})
        layout = Layout.of(module)
        pools = {
            name: _as(piece, real)
            for stem, arrays in zip(POOLS, (self.weights, *self.moments), strict=True)
            for name, piece in layout.cut(layout.pooled(arrays), stem).items()
        }
        return _by_name(layout, evaluate(module, name, given, pools))

    def _compare(self, stage: Stage, name: str, found: Arrays) -> None:
        if name not in self.reference:
            self._trust(stage, name, found)
            self.reference[name] = found
        rounded = any(r.type.dtype == "f16" for op in stage.module.functions[name].body.ops for r in op.results)
        limit = NARROW_TOLERANCE if rounded else LOOP_TOLERANCE if stage.level == "loop" else TOLERANCE
        for result, expected in self.reference[name].items():
            if result not in found:
                continue
            size = max(float(np.abs(expected).max()), 1e-3)
            difference = float(np.abs(found[result] - expected).max())
            if not difference <= limit * size:
                raise self._bug(
                    stage,
                    f"{name} now gives another {result}: off by {difference:.3g}, its largest element is {size:.3g}",
                )

    def _trust(self, stage: Stage, name: str, found: Arrays) -> None:
        """Check results that no earlier stage has against what defines them."""
        if name == "grads":
            self._check_derivative(stage, found)
        if name == "train_step":
            self._check_adamw(stage, found)

    def _check_derivative(self, stage: Stage, found: Arrays) -> None:
        """Gradients against central differences of the captured loss along a random direction."""
        function = self.captured.functions.get("training_loss", self.captured.functions["loss"])
        direction = {n: self.directions.standard_normal(w.shape) for n, w in self.weights.items()}
        ends = [
            self._loss_at(function, {n: w + sign * STEP * direction[n] for n, w in self.weights.items()})
            for sign in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / (2 * STEP)
        slope = sum(float((found[GRADIENT + n] * d).sum()) for n, d in direction.items())
        scale = max(float(np.sqrt(sum((found[GRADIENT + n] ** 2).sum() for n in direction))), abs(expected))
        if not abs(slope - expected) <= _DIFFERENCE_TOLERANCE * scale:
            raise self._bug(
                stage,
                f"the gradient along a random direction is {slope:.9g}, differences of the loss give {expected:.9g}",
            )

    def _loss_at(self, function: Function, weights: Mapping[str, np.ndarray]) -> float:
        given = {p.hint: self.inputs[p.hint] for p in function.params}
        return float(evaluate(self.captured, function.name, given, weights)["loss"])

    def _check_adamw(self, stage: Stage, found: Arrays) -> None:
        """The step against torch.optim.AdamW's formula on the gradients of the stages before."""
        gradients = {n: self.reference["grads"][GRADIENT + n] for n in self.weights}
        training = self.captured.attrs["training"]
        norm = float(np.sqrt(sum((g**2).sum() for g in gradients.values())))
        scale = min(1.0, training["clip"] / (norm + 1e-6))
        for name, weight in self.weights.items():
            gradient = gradients[name] * scale
            m = training["beta1"] * self.moments[0][name] + (1 - training["beta1"]) * gradient
            v = training["beta2"] * self.moments[1][name] + (1 - training["beta2"]) * gradient**2
            decay = training["weight_decay"] if weight.ndim >= 2 else 0.0
            deviation = np.sqrt(v) / np.sqrt(self.inputs["bias2"]) + training["eps"]
            expected = weight * (1 - LR * decay) - LR / self.inputs["bias1"] * m / deviation
            difference = float(np.abs(found[name] - expected).max())
            if not difference <= TOLERANCE:
                raise self._bug(stage, f"AdamW gives another {name}: largest difference {difference:.3g}")

    def _bug(self, stage: Stage, problem: str) -> CompilerBug:
        if self.dump is None:
            dumps = "run again with --dump DIR to see the module before and after it"
        else:
            dumps = f"the dump behind it is {self.dump / stage.file}, the stage before it was {self.before}"
        return CompilerBug(f"{self.captured.name}: {problem}\n  {dumps}", after=f"{stage.name} (stage {stage.number})")


def _drawn(init: tuple[Any, ...], shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights large enough that every path of the model carries a visible part of the gradient."""
    centre = float(init[1]) if init[0] == "constant" else 0.0
    return centre + 0.1 * rng.standard_normal(shape)


def _as(array: np.ndarray, real: type[np.floating[Any]]) -> np.ndarray:
    return np.asarray(array, real) if np.asarray(array).dtype.kind == "f" else np.asarray(array)


def _by_name(layout: Layout, found: Mapping[str, np.ndarray]) -> Arrays:
    """Flat results as one array for each weight: grad:NAME; new weights and moments as NAME, NAME.m, NAME.v."""
    named: Arrays = {}
    prefixes = {"gradients": (GRADIENT, ""), "@weights": ("", ""), "@adam.m": ("", ".m"), "@adam.v": ("", ".v")}
    for stem, (before, behind) in prefixes.items():
        if stem in found:
            named |= {f"{before}{n}{behind}": part for n, part in layout.named(layout.joined(found, stem)).items()}
    pieces = {name for stem in prefixes for name in layout.names(stem)}
    return named | {result: array for result, array in found.items() if result not in pieces}
