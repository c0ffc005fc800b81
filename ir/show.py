"""How the IR looks at a prompt: `summary` is one line, `show` the text itself, coloured where it goes to a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable

from tinygpt.ir.core import Function, Kernel, Module, Op, Value
from tinygpt.ir.text import print_function, print_kernel, print_op
from tinygpt.ir.types import NUMPY_DTYPES

Thing = Module | Function | Kernel | Op | Value

_COLORS = {
    "loc": "2", "string": "32", "parameter": "33", "value": "36", "keyword": "1;34", "type": "35", "op": "1",
}  # fmt: skip
_PIECES = re.compile(
    r"(?P<loc>    loc\(.*\)$)"
    r'|(?P<string>"(?:[^"\\]|\\.)*")'
    r"|(?P<parameter>@[\w.:-]+)"
    r"|(?P<value>%[\w.]+)"
    r"|(?P<keyword>\b(?:module|param|state|fn|kernel|grid|dim|do|yield|update|return)\b)"
    rf"|(?P<type>\b(?:ptr<.*?>|(?:{'|'.join(NUMPY_DTYPES)})(?:x\d+\b|\[.*?\]|<.*?>|\b)))"
    r"|(?P<op>[A-Za-z_][\w.]*(?=\())",
    re.MULTILINE,
)
_LISTED = 8


def show(thing: Thing, color: bool = True, *, module: Module | None = None) -> str:
    """The listing of a function, kernel or op; of a module or a value the summary.

    `module` names the parameters a function reads (else they go by their hints). Colours are left out where standard
    output is not a terminal or NO_COLOR is set."""
    match thing:
        case Function():
            text = print_function(module or Module(""), thing)
        case Kernel():
            text = print_kernel(thing)
        case Op():
            text = print_op(thing)
        case _:
            text = summary(thing)
    text = text.rstrip("\n")
    return _coloured(text) if color and sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def summary(thing: Thing) -> str:
    """One line: what the thing is called and what it is made of."""
    match thing:
        case Module():
            return _module_summary(thing)
        case Function():
            params = ", ".join(map(summary, thing.params))
            return f"fn {thing.name}({params}) -> ({', '.join(thing.result_names)}): {_op_counts(thing.body.walk())}"
        case Kernel():
            grid = " × ".join(map(str, thing.grid.values())) or "1"
            of = f" of {thing.of}" if thing.of else ""
            return f"kernel {thing.name}{of}, {thing.level} level, grid {grid}: {_op_counts(thing.body.walk())}"
        case Op():
            return print_op(thing).split("\n", 1)[0]
        case Value():
            return f"%{thing.hint or '_'}: {thing.type}"


def _module_summary(module: Module) -> str:
    parts = []
    for role, plural in (("param", "params"), ("state", "states")):
        sizes = [p.type.size for p in module.parameters.values() if p.role == role]
        if sizes:
            parts.append(f"{len(sizes):,} {role if len(sizes) == 1 else plural} ({sum(sizes):,} elements)")
    if module.functions:
        parts.append(f"functions {_listed(list(module.functions))}")
    if module.kernels:
        parts.append(f"kernels {_listed(list(module.kernels))}")
    return f"module {module.name}: {'; '.join(parts) or 'empty'}"


def _op_counts(ops: Iterable[Op]) -> str:
    counts = Counter(op.name for op in ops)
    kinds = [name if count == 1 else f"{name} ×{count}" for name, count in counts.most_common()]
    total = counts.total()
    return f"{total:,} op{'' if total == 1 else 's'}" + (f" ({_listed(kinds)})" if kinds else "")


def _listed(names: list[str]) -> str:
    """The first few names; how many more there are."""
    more = f", … {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _coloured(text: str) -> str:
    return _PIECES.sub(lambda piece: f"\x1b[{_COLORS[piece.lastgroup or 'op']}m{piece.group()}\x1b[0m", text)
