"""Unique identifiers in generated text, whatever the language: hints become identifiers, equal ones get numbers."""

from __future__ import annotations

import re
from collections.abc import Callable


def identifier(text: str, is_reserved: Callable[[str], bool]) -> str:
    """`text` as an identifier of letters, digits and underscores that is not reserved: `blocks.0.w` is `blocks_0_w`."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    if not name or name[0].isdigit():
        name = f"v{name}"
    return f"{name}_" if is_reserved(name) else name


class UniqueNames:
    """Hands out identifiers, each once: `x`, `x_1`, `x_2`, …"""

    def __init__(self, identifier: Callable[[str], str]) -> None:
        self._identifier = identifier
        self._taken: set[str] = set()
        self._counts: dict[str, int] = {}

    def new(self, hint: str) -> str:
        base = name = self._identifier(hint)
        while name in self._taken:
            self._counts[base] = self._counts.get(base, 0) + 1
            name = f"{base.rstrip('_')}_{self._counts[base]}"
        self._taken.add(name)
        return name
