"""A plan as the files of a WebGPU bundle, a module for each kernel, and the record by which a runtime launches them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinygpt.ir.bounds import unproved_accesses
from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.plan import Buffer, Launch, Plan
from tinygpt.targets.wgsl.names import identifier
from tinygpt.targets.wgsl.printer import grid_size, print_kernel
from tinygpt.targets.wgsl.profiles import LIMITS

_VECTOR_BYTES = 16  # a binding holds whole vectors


def emit(plan: Plan, manifest: Mapping[str, Any], caps: Caps, strict: bool) -> dict[str, str]:
    """The bundle's files by name. Raises UserError if a pool does not fit the profile's buffers."""
    for name, size in plan.pools.items():
        if caps.buffer_bytes and size > caps.buffer_bytes:
            raise UserError(
                f"pool {name} has {size:,} bytes, a buffer of {caps.name} at most {caps.buffer_bytes:,}",
                hint="take a smaller batch, context or model, or a profile with larger buffers",
            )
    files = {file_name(name): print_kernel(kernel, caps) for name, kernel in plan.kernels.items()}
    if len(files) < len(plan.kernels):
        raise CompilerBug(f"two kernels have the same file: {sorted(plan.kernels)}")
    return files


def file_name(kernel: str) -> str:
    return f"kernels/{identifier(kernel)}.wgsl"


def target_record(plan: Plan, caps: Caps) -> dict[str, Any]:
    """manifest["target"]: what the device must have (features, lanes of every subgroup, limits), the kernels' files and access words, and each function's dispatches.

    A kernel is `bounded` if all its accesses are proved to lie inside its bindings: a runtime may leave out its checks.

    A dispatch is a kernel, its workgroups along x, y and z, and its bindings in order: pool, offset and size in bytes."""
    return {
        "name": "wgsl",
        "profile": caps.name,
        "features": sorted(caps.features),
        "subgroup": caps.subgroup,
        "limits": {name: getattr(caps, field) for name, field in LIMITS.items()},
        "kernels": {
            name: {"file": file_name(name), "access": list(kernel.access), "bounded": not unproved_accesses(kernel)} for name, kernel in plan.kernels.items()
        },
        "functions": {name: [dispatch(plan, launch, caps) for launch in entry.launches] for name, entry in plan.entries.items()},
    }


def dispatch(plan: Plan, launch: Launch, caps: Caps) -> dict[str, Any]:
    kernel = plan.kernels[launch.kernel]
    bindings = [binding(plan, launch, b, caps) for b in launch.buffers]
    return {"kernel": launch.kernel, "workgroups": list(grid_size(kernel, caps.grid_limit)), "bindings": bindings}


def binding(plan: Plan, launch: Launch, buffer: Buffer, caps: Caps) -> list[Any]:
    """Where a kernel's buffer lies, rounded up to whole vectors; the pool's end is aligned, so the room is there."""
    if buffer.offset % caps.offset_alignment:
        raise CompilerBug(f"{launch.kernel}: a binding at byte {buffer.offset} is not aligned to {caps.offset_alignment}")
    size = -(-buffer.type.bytes // _VECTOR_BYTES) * _VECTOR_BYTES
    if buffer.offset + size > plan.pools[buffer.pool]:
        raise CompilerBug(f"{launch.kernel}: a binding ends behind pool {buffer.pool}")
    return [buffer.pool, buffer.offset, size]
