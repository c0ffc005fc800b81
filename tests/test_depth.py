"""How many layers fit: the number is what planning it and the next one says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.cli import CONFIG
from tinygpt import depth
from tinygpt.compiler import device_for, lower, module_for
from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import UserError
from tinygpt.presets import Preset, find

DEVICE, PROFILE = device_for("wasm64", {})
BATCH, CONTEXT = 2, 8


def heap_that_holds(layers: int) -> Caps:
    """The profile with just the memory that so many layers need, in pages of a WebAssembly memory."""
    done = lower(module_for(deep(layers), BATCH, CONTEXT), DEVICE, PROFILE)
    needed = int(DEVICE.record(done.plan, {}, done.caps, False)["scratch"])
    return replace(PROFILE, memory_bytes=-(-needed // 65536) * 65536)


def deep(layers: int) -> Preset:
    return find({**CONFIG, "n_layers": layers})


def test_the_number_of_layers_is_the_largest_that_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    caps = heap_that_holds(5)
    found = depth.deepest(deep(3), BATCH, CONTEXT, DEVICE, caps)
    assert found.planned
    assert found.layers >= 5
    assert lower(module_for(deep(found.layers), BATCH, CONTEXT), DEVICE, caps).plan.pools
    with pytest.raises(UserError, match="bytes"):
        done = lower(module_for(deep(found.layers + 1), BATCH, CONTEXT), DEVICE, caps)
        DEVICE.record(done.plan, {}, caps, False)
    monkeypatch.setattr(depth, "MOST_PLANNED", 0)
    guessed = depth.deepest(deep(1), BATCH, CONTEXT, DEVICE, caps)
    assert not guessed.planned
    assert abs(found.layers - guessed.layers) <= 1


def test_a_profile_without_a_limit_is_refused() -> None:
    with pytest.raises(UserError, match="no limit"):
        depth.deepest(deep(1), BATCH, CONTEXT, *device_for("cpp", {}))
