"""What a verifier finds in one function or kernel: errors, each shown under the line it is about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from tinygpt.ir.core import Op, Value
from tinygpt.ir.registry import Pointwise
from tinygpt.ir.scalar import ARITHMETIC, BITWISE, CONVERSIONS, TRANSCENDENTAL
from tinygpt.ir.text import NOTE_MARK
from tinygpt.ir.types import FLOATS, NUMPY_DTYPES

_NEIGHBOURS = 2  # lines shown before and after one with an error
_FLOAT_ONLY = ("div", "sqrt", "fma", *TRANSCENDENTAL)


class Findings:
    """Errors by op (`notes`) or about the whole (`general`), and the values that are visible so far."""

    def __init__(self) -> None:
        self.notes: dict[Op, list[str]] = {}
        self.general: list[str] = []
        self.visible: set[Value] = set()
        self.taken: set[Value] = set()

    def report(self, op: Op | None, message: str) -> None:
        if op is None:
            self.general.append(message)
        else:
            self.notes.setdefault(op, []).append(message)

    def define(self, op: Op | None, values: Iterable[Value]) -> None:
        """The values exist from here on; each is defined once."""
        for value in values:
            if value in self.taken:
                self.report(op, f"{named(value)} is defined twice")
            self.taken.add(value)
            self.visible.add(value)

    def use(self, op: Op | None, values: Iterable[Value]) -> bool:
        """Whether all the values are visible here."""
        hidden = [value for value in values if value not in self.visible]
        for value in hidden:
            self.report(op, f"{named(value)} is used where it is not defined")
        return not hidden

    def finite(self, op: Op) -> None:
        """Numbers in attributes are finite: an infinity turns into NaN in m - m."""
        for key, value in op.attrs.items():
            if isinstance(value, float) and not math.isfinite(value):
                self.report(op, f"{key} = {value} is not finite")

    @property
    def count(self) -> int:
        return len(self.general) + sum(map(len, self.notes.values()))


def named(value: Value) -> str:
    return f"%{value.hint} ({value.type})" if value.hint else f"a value of type {value.type}"


def listed(things: Iterable[Any]) -> str:
    return ", ".join(map(str, things))


def excerpt(text: str) -> str:
    """The first line, and the lines with errors among their neighbours."""
    lines = text.rstrip("\n").split("\n")
    marked = [i for i, line in enumerate(lines) if line.lstrip(" ").startswith(NOTE_MARK.lstrip(" "))]
    shown = {0} | {i for at in marked for i in range(at - _NEIGHBOURS - 1, at + _NEIGHBOURS + 1) if 0 <= i < len(lines)}
    pieces: list[str] = []
    for i in sorted(shown):
        if i and i - 1 not in shown:
            pieces.append("  …")
        pieces.append(lines[i])
    if len(lines) - 1 not in shown:
        pieces.append("  …")
    return "\n".join(pieces)


def formula_error(op: Pointwise, dtypes: Iterable[str], attrs: Mapping[str, Any]) -> str | None:
    """Why the formula cannot be applied to operands of these dtypes; None if it can."""
    return _formula_error(op, tuple(dtypes), tuple(sorted(attrs.items())))


@lru_cache(maxsize=None)
def _formula_error(op: Pointwise, dtypes: tuple[str, ...], attrs: tuple[tuple[str, Any], ...]) -> str | None:
    if len(dtypes) != op.arity:
        return f"takes {op.arity} operands, not {len(dtypes)}"
    pending, seen = [op.trace(dtypes, dict(attrs))], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        reason = primitive_error(node.op, [a.dtype for a in node.args]) if node.args else None
        if reason:
            return f"{reason} (operands {listed(dtypes)})"
        pending.extend(node.args)
    return None


def primitive_error(name: str, dtypes: list[str]) -> str | None:
    """Why a primitive cannot take operands of these dtypes; None if it can."""
    if name == "select":
        if len(dtypes) != 3 or dtypes[0] != "bool" or dtypes[1] != dtypes[2]:
            return f"select takes a bool and two of one type, not {listed(dtypes)}"
        return None
    if name in CONVERSIONS:
        return None if len(dtypes) == 1 else f"{name} takes one operand"
    if len(set(dtypes)) != 1:
        return f"{name} takes operands of one type, not {listed(dtypes)}"
    if name in _FLOAT_ONLY and dtypes[0] not in FLOATS:
        return f"{name} takes floats, not {dtypes[0]}"
    if name in BITWISE and dtypes[0] not in (("i32", "u32") if name in ("shl", "shr") else ("bool", "i32", "u32")):
        return f"{name} takes whole numbers, not {dtypes[0]}"
    if name in ARITHMETIC and dtypes[0] == "bool":
        return f"{name} takes numbers, not bool"
    arity = _ARITY.get(name, 2)
    return None if len(dtypes) == arity else f"{name} takes {arity} operands, not {len(dtypes)}"


_ARITY = {**dict.fromkeys(("neg", "abs", "sqrt", *TRANSCENDENTAL), 1), "fma": 3}


def number_error(value: object, dtype: str) -> str | None:
    """Why a constant does not fit an element type; None if it does."""
    if dtype not in NUMPY_DTYPES:
        return f"unknown element type {dtype}"
    if not isinstance(value, (bool, int, float)):
        return f"value {value!r} is not a number"
    if dtype in ("i32", "u32"):
        low, high = (-(2**31), 2**31 - 1) if dtype == "i32" else (0, 2**32 - 1)
        return None if isinstance(value, int) and low <= value <= high else f"value {value!r} is no {dtype}"
    if dtype != "bool" and not abs(float(value)) <= (65504.0 if dtype == "f16" else 3.4028235e38):
        return f"value {value!r} is not a finite {dtype}"
    return None


