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

# A panel of 32 columns then has 32 KiB in the L1 cache.
_INNER_BLOCK = 256

_NEEDED_512 = ("avx2", "fma", "avx512f")
_NEEDED_256 = ("avx2", "fma")

BASELINE = Caps(name="baseline", lanes=4, registers=16, register_tile=_TILE_16, fma=False, threads=os.cpu_count() or 1)


def native(machine: str, features: Collection[str]) -> Caps:
    """The profile of a processor, by its architecture (`platform.machine()`) and what /proc/cpuinfo says it has."""
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
                inner_block=_INNER_BLOCK,
                threads=threads,
                features=frozenset(needed),
            )
    return Caps(name="native", lanes=4, registers=16, register_tile=_TILE_16, fma=False, threads=threads)


def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The features the kernel lists for the first processor; none where there is no such file."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))),
        frozenset(),
    )


PROFILES: dict[str, Caps] = {"native": native(platform.machine(), processor_features()), "baseline": BASELINE}
