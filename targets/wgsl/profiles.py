"""The devices the WebGPU target writes for: what the specification promises, what features add to it, and what one
device says it has."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import UserError

MIB = 1 << 20

# The default limits of the WebGPU specification (section 3.6.2): every browser and driver has at least these.
DEFAULT = Caps(
    name="webgpu-default", strategy="gpu", lanes=4, registers=0, register_tile=(4, 1), native=frozenset(("exp", "log")),
    address_bits=32, threads=1, workgroup_bytes=16 << 10, workgroup_threads=256, bindings=8, binding_bytes=128 * MIB,
    buffer_bytes=256 * MIB, grid_limit=65535, offset_alignment=256, exclusive_pools=True,
)  # fmt: skip

SMALLEST_SUBGROUP = 4  # lanes, of any device with subgroups
SUBGROUPS = replace(DEFAULT, name="webgpu-subgroups", features=frozenset(("subgroups",)), subgroup=SMALLEST_SUBGROUP)
F16 = replace(DEFAULT, name="webgpu-f16", features=frozenset(("shader-f16",)))

KNOWN_FEATURES = frozenset(("subgroups", "shader-f16"))
# What a device calls its limits, and the fields of a profile that keep to them.
LIMITS = {
    "max-storage-buffers-per-shader-stage": "bindings", "max-storage-buffer-binding-size": "binding_bytes",
    "max-buffer-size": "buffer_bytes", "max-compute-workgroup-storage-size": "workgroup_bytes",
    "max-compute-invocations-per-workgroup": "workgroup_threads", "max-compute-workgroup-size-x": "workgroup_threads",
    "max-compute-workgroups-per-dimension": "grid_limit",
}  # fmt: skip
ADAPTER = "adapter"
_LARGEST = {"binding_bytes": 1 << 33}  # whose elements an i32 counts
_EXACT = (1 << 53) - 1  # larger integers are not the same for every reader of a manifest

PROFILES = {caps.name: caps for caps in (DEFAULT, SUBGROUPS, F16)}


def adapter(description: str) -> Caps:
    """The profile of one device, described as JSON: its `features`, its `limits` by the names of the specification in lower
    case with hyphens, and in `subgroup` how many lanes all its subgroups have at least (4 if it does not say).

    Raises UserError for a description that is none, or of a device below what WebGPU promises."""

    def refuse(problem: str) -> UserError:
        return UserError(f"--set device: {problem}", hint="leave it out to compile for this machine's GPU")

    try:
        device: Any = json.loads(description)
        features, limits = KNOWN_FEATURES & frozenset(device["features"]), dict(device["limits"])
        lanes = device.get("subgroup", SMALLEST_SUBGROUP) if "subgroups" in features else 0
    except (ValueError, TypeError, KeyError) as error:
        raise refuse(f"no description of a device: {error}") from error
    found: dict[str, Any] = {}
    for name, field in LIMITS.items():
        limit = limits.get(name)
        if type(limit) is not int or limit < getattr(DEFAULT, field):
            raise refuse(f"{name} is {limit}, WebGPU promises {getattr(DEFAULT, field):,}")
        found[field] = min(limit, found.get(field, limit), _LARGEST.get(field, _EXACT))
    if "subgroups" in features and (type(lanes) is not int or lanes < SMALLEST_SUBGROUP or lanes & (lanes - 1)):
        raise refuse(f"subgroups of {lanes} lanes; they have a power of two, {SMALLEST_SUBGROUP} at least")
    return replace(DEFAULT, name=ADAPTER, features=features, subgroup=lanes, **found)
