"""The devices the WebGPU target writes for: what the specification promises, and what features add to it."""

from __future__ import annotations

from dataclasses import replace

from tinygpt.ir.caps import Caps

MIB = 1 << 20

# The default limits of the WebGPU specification (section 3.6.2): every browser and driver has at least these.
DEFAULT = Caps(
    name="webgpu-default", strategy="gpu", lanes=4, registers=0, register_tile=(4, 1), native=frozenset(("exp", "log")),
    address_bits=32, threads=1, workgroup_bytes=16 << 10, workgroup_threads=256, bindings=8, binding_bytes=128 * MIB,
    buffer_bytes=256 * MIB, grid_limit=65535, offset_alignment=256, exclusive_pools=True,
)  # fmt: skip

SUBGROUPS = replace(DEFAULT, name="webgpu-subgroups", features=frozenset(("subgroups",)))
F16 = replace(DEFAULT, name="webgpu-f16", features=frozenset(("shader-f16",)))

PROFILES = {caps.name: caps for caps in (DEFAULT, SUBGROUPS, F16)}
