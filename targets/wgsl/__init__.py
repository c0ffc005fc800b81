"""WGSL for WebGPU: browsers, and wgpu or Dawn outside them.

profiles.py: what is written for. printer.py: a kernel as a module. emit.py: a plan as the bundle's files and launches."""

from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import UserError
from tinygpt.targets import Target
from tinygpt.targets.wgsl.emit import emit, target_record
from tinygpt.targets.wgsl.printer import print_kernel
from tinygpt.targets.wgsl.profiles import ADAPTER, PROFILES, adapter


def choose(options: dict[str, str]) -> Caps:
    """The profile named by `--set profile=...`; the default is what every WebGPU device has, `adapter` that of the device
    which the option `device` describes."""
    name = options.pop("profile", "webgpu-default")
    if name == ADAPTER and "device" in options:
        return adapter(options.pop("device"))
    if name not in PROFILES:
        raise UserError(f"wgsl has no profile {name!r}", hint=f"its profiles: {', '.join((*PROFILES, ADAPTER))}")
    return PROFILES[name]


TARGETS = (Target("wgsl", choose, emit, lambda plan, files, caps, strict: target_record(plan, caps), print_kernel, ("profile", "device"), live=ADAPTER),)

__all__ = ["PROFILES", "TARGETS", "emit", "print_kernel", "target_record"]
