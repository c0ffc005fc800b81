"""The polynomials against float64: each within the bound its docstring states."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinygpt.ir.polynomials import DEFINITIONS
from tinygpt.ir.scalar import argument, evaluate, expand

RANGES = {"exp": (-87.0, 88.0, np.exp), "log": (1e-30, 1e30, np.log), "tanh": (-12.0, 12.0, np.tanh), "erf": (-6.0, 6.0, np.vectorize(math.erf))}
BOUNDS = {"exp": 2e-7, "log": 2e-7, "tanh": 4e-7, "erf": 4e-7}


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_polynomial_is_within_its_stated_bound(name: str) -> None:
    low, high, exact = RANGES[name]
    x = np.linspace(low, high, 200_001) if name != "log" else np.exp(np.linspace(math.log(low), math.log(high), 200_001))
    x = np.unique(np.concatenate([x, np.linspace(-2, 2, 100_001)[100_001 // 2 + 1 if name == "log" else 0 :]]).astype(np.float32))
    found = evaluate(expand(DEFINITIONS[name](argument(0, "f32")), DEFINITIONS), [x]).astype(np.float64)
    wanted = exact(x.astype(np.float64))
    scale = np.maximum(np.abs(wanted), 1.0 if name == "log" else 1e-30)
    error = np.abs(found - wanted) / scale
    assert error.max() <= BOUNDS[name] * 1.5, x[error.argmax()]


def test_clamped_ends_stay_finite_and_ordered() -> None:
    x = np.array([-1e30, -100.0, 0.0, 100.0, 1e30], np.float32)
    values = evaluate(expand(DEFINITIONS["exp"](argument(0, "f32")), DEFINITIONS), [x])
    assert np.isfinite(values).all()
    assert values[0] == values[1] == 0  # a product of a tiny number would be denormal
    assert values[2] == 1
