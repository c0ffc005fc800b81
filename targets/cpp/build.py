"""How a bundle of this target is compiled: the flags, as a record for the manifest and for the bundle's Makefile.

Nothing is compiled here. `make` does it in the bundle's folder; tinygpt.runtime.native does the same into a cache."""

from __future__ import annotations

import platform
from collections.abc import Collection
from typing import Any

from tinygpt.ir.caps import Caps

HEADERS = ("vector.h",)
MAIN = "main.cpp"
LINK = ("-shared", "-pthread")


def compile_flags(caps: Caps, strict: bool) -> list[str]:
    """Flags of every translation unit. `strict` forbids the fused multiply-add: all targets agree to the bit."""
    native = []
    if caps.name == "native":
        # -mcpu is what both compilers know on Arm, -march on x86.
        native = ["-mcpu=native"] if platform.machine() in ("aarch64", "arm64") else ["-march=native"]
    if caps.lanes == 16 and caps.name == "native":
        native.append("-mprefer-vector-width=512")  # else GCC uses half registers on processors it does not know
    return [
        "-std=c++20",
        "-O3",
        *native,
        f"-ffp-contract={'off' if strict else 'fast'}",
        "-fno-math-errno",  # a square root is one instruction
        "-fno-trapping-math",
        "-fwrapv",  # i32 wraps, as in the IR
        "-fno-strict-aliasing",  # pools and scratch hold several element types
        "-fvisibility=hidden",
        "-fPIC",
        "-pthread",
        "-Wno-psabi",  # vectors wider than the processor's registers are passed between inlined functions only
    ]


def target_record(files: Collection[str], caps: Caps, strict: bool) -> dict[str, Any]:
    """manifest["target"]: what a loader must have and do. `files` are the names `emit` returned."""
    return {
        "name": "cpp",
        "profile": caps.name,
        "lanes": caps.lanes,
        "machine": platform.machine() if caps.name == "native" else "",  # "": any
        "isa": sorted(caps.features),
        "build": {
            "compile": compile_flags(caps, strict),
            "link": list(LINK),
            "headers": list(HEADERS),
            "sources": sorted(name for name in files if name.endswith(".cpp") and name != MAIN),
        },
    }
