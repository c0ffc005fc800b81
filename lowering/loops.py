"""loops: every tile kernel is lowered to loops, by the strategy of the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Module
from tinygpt.lowering import cpu, gpu
from tinygpt.lowering.passes import Pass, register

STRATEGIES: dict[str, Callable[[Kernel, Caps], Kernel]] = {"cpu": cpu.lower, "gpu": gpu.lower}


@register
@dataclass(frozen=True)
class Loops(Pass):
    """Lower every tile kernel to loops."""

    name = "loops"
    level = "loop"

    def run(self, module: Module, caps: Caps) -> Module:
        lower = STRATEGIES[caps.strategy]
        return replace(module, kernels={name: lower(k, caps) for name, k in module.kernels.items()})
