"""TinyGPT: a compiler for small GPT models. The public API.

    import tinygpt as tg
    bundle = tg.compile("small", target="cpp")
    session = bundle.session(threads=2, seed=42)"""

from __future__ import annotations

import os as _os
from typing import Any

_root = _os.path.dirname(_os.path.dirname(__file__))
if _os.path.isfile(_os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)

__version__ = "0.1.0"

_PUBLIC = {
    "capture": "tinygpt.lowering.capture", "compile": "tinygpt.compiler", "load": "tinygpt.runtime.bundle",
    "ModelConfig": "tinygpt.config", "show": "tinygpt.ir.show", "UserError": "tinygpt.ir.errors",
    "CompilerBug": "tinygpt.ir.errors", "PRESETS": "tinygpt.presets", "inspect": "tinygpt.inspection",
}  # fmt: skip
_RENAMED = {"parse": ("tinygpt.ir.text", "parse_module")}

__all__ = ["__version__", *_PUBLIC, *_RENAMED]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Names are loaded when they are first used: importing tinygpt does not import torch."""
    import importlib

    module, attribute = (_PUBLIC[name], name) if name in _PUBLIC else _RENAMED.get(name, ("", ""))
    if not module:
        raise AttributeError(f"module 'tinygpt' has no attribute {name!r}")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
