"""WGSL for WebGPU: browsers, and wgpu or Dawn outside them.

profiles.py: what is written for. printer.py: a kernel as a module. emit.py: a plan as the bundle's files and launches."""

from dataclasses import replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import UserError
from tinygpt.targets import Target
from tinygpt.targets.wgsl.emit import emit, target_record
from tinygpt.targets.wgsl.printer import print_kernel
from tinygpt.targets.wgsl.profiles import ADAPTER, PROFILES, adapter

F16_FEATURE = "shader-f16"


def choose(options: dict[str, str]) -> Caps:
    """The profile that `--set` options choose, keeping activations in the type named by `dtype`: f32, or f16 on devices
    that have it. Raises UserError."""
    dtype = options.pop("dtype", "f32")
    if dtype not in ("f32", "f16"):
        raise UserError(f"--set dtype={dtype}: wgsl keeps activations in f32 or in f16", hint="write --set dtype=f16, or leave it out")
    caps = profile(options, PROFILES["webgpu-f16" if dtype == "f16" else "webgpu-default"])
    if dtype == "f16" and F16_FEATURE not in caps.features:
        raise UserError(f"--set dtype=f16: profile {caps.name} has no {F16_FEATURE}", hint="take --set profile=webgpu-f16, or a device with that feature")
    return replace(caps, storage=dtype)


def profile(options: dict[str, str], default: Caps) -> Caps:
    """The profile named by `--set profile=...`; `adapter` is that of the device which the option `device` describes, and what
    that option is for."""
    name = options.pop("profile", ADAPTER if "device" in options else default.name)
    if name == ADAPTER and "device" in options:
        return adapter(options.pop("device"))
    if name not in PROFILES:
        raise UserError(f"wgsl has no profile {name!r}", hint=f"its profiles: {', '.join((*PROFILES, ADAPTER))}")
    return PROFILES[name]


TARGETS = (
    Target("wgsl", choose, emit, lambda plan, files, caps, strict: target_record(plan, caps), print_kernel, ("profile", "device", "dtype"), live=ADAPTER),
)

__all__ = ["PROFILES", "TARGETS", "emit", "print_kernel", "target_record"]
