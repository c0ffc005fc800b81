"""The interpreter of the graph level: the oracle for every lowering. numpy, in float64 where the inputs are float64.

Launches of kernels run at tile level (see ir/interpret_tile.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinygpt.ir.core import Function, Module, Op, Region, Value
from tinygpt.ir.interpret_tile import launch_evaluator
from tinygpt.ir.ops import OPS

Evaluator = Callable[[Op, list[np.ndarray]], tuple[np.ndarray, ...]]


def evaluate(
    module: Module, function: str, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Run a function. `inputs` by parameter hint, `parameters` by module name; results by result name.

    New values of module parameters come back under "@NAME"; nothing given is changed. Computes in float64 if anything
    given is float64."""
    f = module.functions[function]
    given = {p: np.asarray(inputs[p.hint]) for p in f.params}
    known = module.parameters.items()
    given |= {p.value: np.asarray(parameters[name]) for name, p in known if parameters and name in parameters}
    wide = any(x.dtype == np.float64 for x in given.values())
    values: dict[Value, np.ndarray] = {}
    for value, x in given.items():
        values[value] = np.array(x, np.float64 if wide and x.dtype == np.float32 else x.dtype, order="C")
    run_region(f.body, values, launch_evaluator(module, wide), wide)
    found = {name: values[v] for name, v in zip(f.result_names, f.body.yields, strict=True)}
    updates = {name: module.parameters[name].value for name in overwritten(module, f)} | dict(f.updates)
    return found | {f"@{name}": values[v] for name, v in updates.items()}


def overwritten(module: Module, function: Function) -> list[str]:
    """The module parameters that launches of the function store to."""
    parameters = module.parameter_of()
    stored: list[str] = []
    for op in function.body.ops:
        access = module.kernels[op.attrs["kernel"]].access if op.name == "launch" else ()
        stored += [parameters[v].name for v, word in zip(op.operands, access) if word != "in" and v in parameters]
    return list(dict.fromkeys(stored))


def run_region(
    region: Region, values: dict[Value, np.ndarray], launch: Evaluator | None = None, wide: bool = False
) -> None:
    """Evaluate the ops of a region in place. `launch` evaluates kernel launches and their buffers, when there are any.

    `wide` keeps constants and what is cast to f32 in float64, which rounding to float32 would leave with seven digits."""
    for op in region.ops:
        operands = [values[v] for v in op.operands]
        if op.name == "group":
            (body,) = op.regions
            inner = dict(zip(body.args, operands, strict=True))
            run_region(body, inner, launch, wide)
            results: tuple[Any, ...] = tuple(inner[v] for v in body.yields)
        elif op.name in ("buffer", "launch") and launch is not None:
            results = launch(op, operands)
        elif op.name == "constant" and wide and op.attrs["dtype"] == "f32":
            results = (np.asarray(op.attrs["value"], np.float64),)
        elif op.name == "cast" and wide and op.attrs["dtype"] == "f32":
            results = (operands[0].astype(np.float64),)
        else:
            results = OPS[op.name].evaluate(operands, dict(op.attrs))
        values.update(zip(op.results, results, strict=True))


def input_names(function: Function) -> list[str]:
    return [p.hint for p in function.params]
