"""The documents are current: tables that follow from the code, files and links they name, commands and targets of make."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FOLDERS = "ir|lowering|targets|runtime|tinygpt|tests|tools|examples|docs"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_tables_are_what_the_code_says(page: Path) -> None:
    text = page.read_text()
    assert tool("doc_tables").filled(text) == text, "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text))
    linked = {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", text)}
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert missing == []
    assert [path for path in linked if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_commands_that_are_named_exist(page: Path) -> None:
    from tinygpt.commands import commands

    text = re.sub(r"<!-- table: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)  # a model's samples name what they like
    code = " ".join([*re.findall(r"`([^`\n]+)`", text), *re.findall(r"```\n(.*?)```", text, re.DOTALL)])
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {name for name in re.findall(r"\bmake ([a-z]+)", code)} <= targets
    assert {name for name in re.findall(r"(?:^|\s)tinygpt ([a-z]+)\b", code)} <= {command.name for command in commands()}


def test_measured_tables_name_their_tool() -> None:
    names = set(re.findall(r"<!-- table: ([\w-]+) -->", "".join(page.read_text() for page in PAGES)))
    assert {"ops", "captured", "passes", "presets", "profiles", "speed-cpp-2", "parity", "memory", "capacity", "matmul", "curve", "learning", "learning-huge-wgsl", "gpu-steps", "gpu-kernels", "summary"} <= names
