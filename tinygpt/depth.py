"""How many layers of a model's width a device's memory can train, for `tinygpt compile --plan-only`.

Layers share kernels, and each adds the same to the memory but for a few kilobytes of padding. So two small models tell
how many fit; that number and the next one are then planned as compiling would, unless that took minutes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from tinygpt.compiler import Compilation, lower, module_for
from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import UserError
from tinygpt.presets import Preset
from tinygpt.targets import Target

MOST_PLANNED = 64  # layers; planning so many takes about half a minute on one core of a Zen 4
_FEW, _MORE = 2, 6


@dataclass(frozen=True)
class Depth:
    """The most layers that fit. `planned`: these were planned, and one more was refused; otherwise they follow from the
    memory of small models."""

    layers: int
    planned: bool


def deepest(preset: Preset, batch: int, context: int, device: Target, caps: Caps, strict: bool = False) -> Depth:
    """The largest n_layers at the preset's width, and at this batch and context, that a target's memory can train.

    Raises UserError for a profile without a limit (`caps.memory_bytes` is 0)."""
    if not caps.memory_bytes:
        raise UserError(f"{caps.name} has no limit of memory of its own", hint="ask for a profile of wasm32 or wasm64")

    def planned(layers: int, caps: Caps) -> Compilation:
        config = replace(preset.config, n_layers=layers)
        return lower(module_for(replace(preset, config=config), batch, context), device, caps, strict=strict)

    @functools.cache
    def fits(layers: int) -> bool:
        try:
            done = planned(layers, caps)
            device.record(done.plan, {}, done.caps, strict)  # where a target lays out what it needs beside the plan
        except UserError:
            return False
        return True

    few, more = (sum(planned(layers, replace(caps, memory_bytes=0)).plan.pools.values()) for layers in (_FEW, _MORE))
    each = (more - few) // (_MORE - _FEW)
    layers = max(0, _FEW + (caps.memory_bytes - few) // each)
    if layers >= MOST_PLANNED:
        return Depth(layers, planned=False)
    while layers and not fits(layers):
        layers -= 1
    while fits(layers + 1):
        layers += 1
    return Depth(layers, planned=True)
