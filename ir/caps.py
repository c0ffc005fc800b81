"""Capability records: what a device or an engine can do. The verifier and the strategies read them; nothing guesses."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Caps:
    """A profile of one target.

    `lanes` is the width of a vector register in f32, `registers` how many there are, `native` the transcendentals the
    target computes itself, `fma` whether multiply-add is fused. The rest are limits; 0 means that there is none."""

    name: str
    strategy: str = "cpu"  # cpu or gpu: which loop strategy lowers its kernels
    lanes: int = 4
    registers: int = 16
    register_tile: tuple[int, int] = (6, 2)  # rows, vectors of columns of a dot's accumulators
    unroll: int = 1  # of the contraction loop
    inner_block: int = 0  # steps of a contraction after which sums wait in memory while a panel's part is reused; 0: never
    splat: str = "load"  # how a scalar of the left operand reaches all lanes: "load", or "shuffle" of a vector of four
    left: str = "in place"  # how a dot reads its left operand: "in place", "copied" if its rows are columns there, in k-major "panels"
    fma: bool = True
    native: frozenset[str] = frozenset()
    address_bits: int = 64
    memory_bytes: int = 0
    threads: int = 2
    features: frozenset[str] = field(default_factory=frozenset)
    workgroup_bytes: int = 0
    workgroup_threads: int = 0
    bindings: int = 0
    binding_bytes: int = 0
    buffer_bytes: int = 0
    grid_limit: int = 0
    offset_alignment: int = 64
    # Kernels see bindings of pools: they begin at multiples of `offset_alignment`, writable ones do not overlap, and no
    # launch both reads and writes a pool, but for buffers it changes in place.
    exclusive_pools: bool = False
    storage: str = "f32"  # the type in which kernels hand on activations and read matrices of weights; they compute in f32
    subgroup: int = 0  # lanes that every subgroup has at least, a power of two; 0: no subgroup operations

    def __post_init__(self) -> None:
        rows, vectors = self.register_tile
        if self.strategy == "cpu" and rows * vectors + vectors + 1 > self.registers:
            raise ValueError(f"{self.name}: a {rows}x{vectors} register tile does not fit {self.registers} registers")
