"""The rules of the house: which folder may import which, what each level may know, how files begin and are named."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinygpt.ir.loop import LOOP_OPS
from tinygpt.ir.ops import OPS
from tinygpt.ir.scalar import BITWISE, COMPARISONS, PRIMITIVES, TRANSCENDENTAL
from tinygpt.ir.tile import REDUCTIONS, STRUCTURAL

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Downwards only: what each folder may import of ours, besides itself.
MAY_IMPORT = {
    "ir": set(),
    "runtime": set(),
    "targets": {"ir"},
    "lowering": {"ir"},
    "tinygpt": {"ir", "lowering", "runtime", "targets"},
}
PACKAGES = tuple(sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py")))
PYTHON = tuple(sorted({*PACKAGES, *(p for folder in ("tests", "tools", "examples") for p in (ROOT / folder).rglob("*.py"))}))

# Words that the tile and loop levels define for themselves; every other op exists at the graph level alone.
LEVEL_WORDS = {*STRUCTURAL, *REDUCTIONS, *LOOP_OPS, *PRIMITIVES, *TRANSCENDENTAL, *COMPARISONS, *BITWISE}
GRAPH_WORDS = OPS.keys() - LEVEL_WORDS


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The modules a file imports, wherever in it, with their lines; a relative import is reported by its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            if module == "tinygpt":
                yield from ((node.lineno, f"tinygpt.{alias.name}") for alias in node.names)


def folder_of(module: str) -> str:
    """The folder of ours a module lies in; the empty string for anything else."""
    first, _, rest = module.partition(".")
    if first != "tinygpt":
        return ""
    return rest.partition(".")[0] if rest.partition(".")[0] in MAY_IMPORT else "tinygpt"


@pytest.mark.parametrize("path", PACKAGES, ids=short)
def test_imports_run_downwards(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[here] | {here, ""}
    for line, module in imported(ast.parse(path.read_text())):
        assert not module.startswith("."), f"{short(path)}:{line}: imports are absolute"
        assert folder_of(module) in allowed, f"{short(path)}:{line}: {here}/ may not import {module}"


def levels_below_the_graph() -> list[Path]:
    """The loop strategies and the targets: what lies below the tile level."""
    strategies = [p for p in (ROOT / "lowering").glob("*.py") if re.match(r"(cpu|gpu)(_|\.)", p.name)]
    return sorted([*strategies, *(ROOT / "targets").rglob("*.py")])


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """String literals that may name an op: neither docstrings, parts of f-strings, nor the fields of a schedule."""
    passed_over: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=docstring):
                passed_over.add(id(docstring))
            case ast.JoinedStr(values=parts):
                passed_over |= set(map(id, parts))
            case ast.Subscript(value=ast.Attribute(attr="order" | "cost"), slice=field):
                passed_over.add(id(field))
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="order" | "cost"), attr="get"), args=[field, *_]):
                passed_over.add(id(field))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed_over:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", levels_below_the_graph(), ids=short)
def test_no_graph_op_is_named_below_the_tile_level(path: Path) -> None:
    for line, text in literals(ast.parse(path.read_text())):
        assert text not in GRAPH_WORDS, f"{short(path)}:{line}: {text!r} is an op of the graph level"


def test_the_graph_level_has_ops_of_its_own() -> None:
    assert {"matmul", "attention", "layer_norm", "cross_entropy", "embedding", "gelu"} <= GRAPH_WORDS


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_a_file_opens_by_saying_what_lives_in_it(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{short(path)} has no docstring"


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_a_file_is_named_for_what_it_holds(path: Path) -> None:
    assert not set(re.split(r"[_.]", path.name)) & {"utils", "util", "helpers", "helper", "misc", "common", "manager"}


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_no_file_leaves_work_to_be_done(path: Path) -> None:
    if path == Path(__file__):
        return
    found = re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", path.read_text())
    assert not found, f"{short(path)}: {found and found.group()}"


def test_the_package_list_is_the_folders() -> None:
    folders = sorted(p.parent.relative_to(ROOT) for name in MAY_IMPORT for p in (ROOT / name).rglob("__init__.py"))
    names = [".".join(f.parts if f.parts[0] == "tinygpt" else ("tinygpt", *f.parts)) for f in folders]
    setuptools = PROJECT["tool"]["setuptools"]
    assert sorted(names) == sorted(setuptools["packages"])
    assert setuptools["package-dir"] == {f"tinygpt.{name}": name for name in MAY_IMPORT if name != "tinygpt"}


def test_every_data_file_is_packaged() -> None:
    listed = {
        path
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / Path(*package.split(".")[1:] or ["tinygpt"])).glob(pattern)
    }
    files = {p for name in MAY_IMPORT for p in (ROOT / name).rglob("*") if p.is_file()}
    data = {p for p in files if p.suffix not in (".py", ".pyc") and not re.search(r"/\.", f"/{short(p)}")}
    assert data == listed, sorted(map(short, data ^ listed))


def test_everything_the_packages_import_is_a_dependency() -> None:
    project = PROJECT["project"]
    declared = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    known = {re.split(r"[^A-Za-z0-9_.-]", d)[0].lower() for d in declared} | set(sys.stdlib_module_names) | {"tinygpt"}
    for path in PACKAGES:
        for line, module in imported(ast.parse(path.read_text())):
            assert module.partition(".")[0].lower() in known, f"{short(path)}:{line}: {module} is no dependency"
