"""Fills the tables of docs/ that follow from the code: the ops of the graph, what is captured, the passes, the presets.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `make docs` writes them; a test compares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tinygpt.ir.ops import OPS, GraphOp, Pointwise
from tinygpt.lowering import pipeline
from tinygpt.lowering.aten import supported
from tinygpt.presets import PRESETS
from tinygpt.targets import targets

DOCS = Path(__file__).resolve().parent.parent / "docs"
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_DERIVATIVE = re.compile(r"_d\d$")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def first_paragraph(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def file_of(op: GraphOp) -> str:
    """The file an op is defined in, from the root of the repository."""
    module = op.formula.__module__ if isinstance(op, Pointwise) else type(op).__module__
    return module.removeprefix("tinygpt.").replace(".", "/") + ".py"


def signature(op: GraphOp) -> str:
    """Operand and result types of the op's first example, and its attributes' names."""
    examples = op.examples()
    if not examples:
        return ""
    example = examples[0]
    try:
        results = op.infer(example.types, example.attrs)
    except ValueError as error:
        raise SystemExit(f"the first example of {op.name} does not fit it: {error}") from error
    attrs = f" {{{', '.join(example.attrs)}}}" if example.attrs else ""
    return f"`{', '.join(map(str, example.types))}{attrs} → {', '.join(map(str, results))}`"


def ops() -> str:
    """Every op of the graph level, file by file. Derivatives of pointwise ops are left out: they follow."""
    kept = [op for name, op in OPS.items() if not _DERIVATIVE.search(name)]
    pieces = []
    for file in sorted({file_of(op) for op in kept}):
        rows = [(f"`{op.name}`", op.kind, signature(op), first_paragraph(op)) for op in kept if file_of(op) == file]
        pieces.append(f"**{file}**\n\n{table(('op', 'kind', 'example', 'meaning'), rows)}")
    return "\n".join(pieces)


def captured() -> str:
    """The ATen ops that a captured model may contain."""
    return ", ".join(f"`{name}`" for name in supported()) + "\n"


def passes() -> str:
    """The default pipeline, in order."""
    chosen = pipeline.parse_pipeline(pipeline.DEFAULT)
    rows = [(n, f"`{p}`", p.level, first_paragraph(type(p))) for n, p in enumerate(chosen, 1)]
    return table(("", "pass", "leaves", "what it does"), rows)


def presets() -> str:
    """The named configurations."""
    rows = [
        (p.name, c.n_layers, c.d_model, c.n_heads, c.context_length, p.batch_size, f"{c.parameter_count:,}", f"{c.flops_per_step(p.batch_size) / 1e9:.2f}")
        for p in PRESETS.values()
        for c in (p.config,)
    ]
    return table(("preset", "layers", "width", "heads", "context", "batch", "parameters", "GFLOP a step"), rows)


def profiles() -> str:
    """The profiles of every target that do not depend on the machine."""
    import importlib

    rows = []
    for package in sorted({t.emit.__module__.rsplit(".", 1)[0] for t in targets().values()}):
        for name, caps in importlib.import_module(package).PROFILES.items():
            if name == "native":
                continue
            rows.append((package.rsplit(".", 1)[1], f"`{name}`", caps.strategy, caps.lanes, caps.registers, "×".join(map(str, caps.register_tile)), caps.address_bits))
    return table(("target", "profile", "strategy", "lanes", "registers", "register tile", "address bits"), rows)


TABLES: dict[str, Callable[[], str]] = {"ops": ops, "captured": captured, "passes": passes, "presets": presets, "profiles": profiles}


def filled(text: str) -> str:
    """A page with its tables as they should be. Tables this file does not know stay as they are."""
    return _TABLE.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n{m[3]}" if m[2] in TABLES else m[0], text)


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if filled(text) != text:
            page.write_text(filled(text))
            print(f"wrote {page.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
