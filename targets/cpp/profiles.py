"""The processors the C++ target writes for. Kernels are portable text; a profile sets the vector width and the register
tile they are lowered with, and the compiler flags (build.py)."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from pathlib import Path

from tinygpt.ir.caps import Caps

# 12x2 of 512 bits: 24 accumulators, 2 columns and a splat in 32 registers. Measured at 512^3 on Zen 5 with g++ 12; 14x2
# and 8x3 were slower by up to 15 %.
_TILE_32 = (12, 2)
_TILE_16 = (6, 2)

# Steps of a contraction between which sums wait in memory, by the maker in /proc/cpuinfo. On Intel (Granite Rapids) the L2
# cache feeds the multipliers too slowly, and panels of 32 KiB, which stay in the L1 cache, took a step of `medium` from 43.1
# to 34.6 ms. On AMD (Zen 4 and 5) one trip is faster.
_INNER_BLOCKS = {"GenuineIntel": 256}

_NEEDED_512 = ("avx2", "fma", "avx512f")
_NEEDED_256 = ("avx2", "fma")

BASELINE = Caps(name="baseline", lanes=4, registers=16, register_tile=_TILE_16, fma=False, threads=os.cpu_count() or 1)


def native(machine: str, features: Collection[str], maker: str = "") -> Caps:
    """The profile of a processor, by its architecture (`platform.machine()`), what /proc/cpuinfo says it has, and who it says
    made it."""
    threads = os.cpu_count() or 1
    if machine in ("aarch64", "arm64"):
        return Caps(name="native", lanes=4, registers=32, register_tile=_TILE_32, threads=threads)
    for lanes, registers, tile, needed in ((16, 32, _TILE_32, _NEEDED_512), (8, 16, _TILE_16, _NEEDED_256)):
        if machine == "x86_64" and set(needed) <= set(features):
            return Caps(
                name="native",
                lanes=lanes,
                registers=registers,
                register_tile=tile,
                inner_block=_INNER_BLOCKS.get(maker, 0),
                threads=threads,
                features=frozenset(needed),
            )
    return Caps(name="native", lanes=4, registers=16, register_tile=_TILE_16, fma=False, threads=threads)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[frozenset[str], str]:
    """The features the kernel lists for the first processor, and its maker; nothing where there is no such file."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset(), ""

    def first(*names: str) -> list[str]:
        return next((line.partition(":")[2].split() for line in lines if line.startswith(names)), [])

    return frozenset(first("flags", "Features")), " ".join(first("vendor_id"))


PROFILES: dict[str, Caps] = {"native": native(platform.machine(), *processor()), "baseline": BASELINE}
