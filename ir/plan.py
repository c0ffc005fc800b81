"""The plan: a flat list of pools, buffers and launches. It knows nothing of ops; it becomes the bundle's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from tinygpt.ir.core import Kernel, Parameter
from tinygpt.ir.types import TensorType


@dataclass(frozen=True)
class Buffer:
    """A tensor's place: `offset` bytes into a pool."""

    pool: str
    offset: int
    type: TensorType

    @property
    def end(self) -> int:
        return self.offset + self.type.bytes


@dataclass(frozen=True)
class Launch:
    """Run a kernel once for each point of its grid. `barrier`: every thread must have finished what came before."""

    kernel: str
    buffers: tuple[Buffer, ...]
    barrier: bool
    of: str = ""


@dataclass(frozen=True)
class Entry:
    """A function a host can call: write the inputs, run the launches in order, read the outputs."""

    name: str
    inputs: tuple[tuple[str, Buffer], ...]
    outputs: tuple[tuple[str, Buffer], ...]
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a host needs. `kernels` are at loop level; `work_live` is the peak of live bytes in the work pool."""

    pools: Mapping[str, int]
    parameters: Mapping[str, tuple[Parameter, Buffer]]
    entries: Mapping[str, Entry]
    kernels: Mapping[str, Kernel]
    work_live: int = 0
    work_without_reuse: int = 0
    attrs: Mapping[str, object] = field(default_factory=dict)


def grid_points(kernel: Kernel) -> int:
    """How many program instances a launch of the kernel runs."""
    return prod(kernel.grid.values())
