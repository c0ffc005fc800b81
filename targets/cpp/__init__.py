"""C++20 with vector extensions, compiled by the system's g++ or clang++.

profiles.py: what is written for. printer.py: a kernel as a function. model.py: a plan as the bundle's files. build.py:
the flags."""

from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import UserError
from tinygpt.targets import Target
from tinygpt.targets.cpp.build import target_record
from tinygpt.targets.cpp.model import emit
from tinygpt.targets.cpp.printer import print_kernel
from tinygpt.targets.cpp.profiles import PROFILES


def choose(options: dict[str, str]) -> Caps:
    """The profile named by `--set profile=...`: native, or baseline for any processor of the architecture."""
    name = options.pop("profile", "native")
    if name not in PROFILES:
        raise UserError(f"cpp has no profile {name!r}", hint=f"its profiles: {', '.join(PROFILES)}")
    return PROFILES[name]


TARGETS = (Target("cpp", choose, emit, lambda plan, files, caps, strict: target_record(files, caps, strict), print_kernel, ("profile",)),)

__all__ = ["PROFILES", "TARGETS", "emit", "print_kernel", "target_record"]
