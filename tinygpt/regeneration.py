"""`tinygpt regen`: a bundle's graph, lowered again with the passes as they are now, and which kernels that changed.

`profile` uses it too, for what only the tile level knows: how many operations a kernel does."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from tinygpt import compiler
from tinygpt.ir.core import Kernel, Op, Region
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.text import parse_module
from tinygpt.ir.types import Dim
from tinygpt.ir.verify import verify
from tinygpt.runtime import manifest as manifests
from tinygpt.runtime.manifest import Manifest


@dataclass(frozen=True)
class Regenerated:
    """A bundle and what its graph compiles to now. A kernel is known by what it does: its number may change freely."""

    folder: Path
    before: Manifest
    compilation: compiler.Compilation
    graph_was_edited: bool

    @cached_property
    def kernels(self) -> dict[str, list[str]]:
        """Names by what became of them: unchanged, changed, new (names as they are), removed (names as they were)."""
        now = {name: str(record["hash"]) for name, record in self.compilation.manifest["kernels"].items()}
        then = {name: str(record["hash"]) for name, record in self.before.kernels.items()}
        of_now = {name: str(record["of"]) for name, record in self.compilation.manifest["kernels"].items()}
        of_then = {name: str(record["of"]) for name, record in self.before.kernels.items()}
        left = [name for name in then if then[name] not in set(now.values())]
        found: dict[str, list[str]] = {"unchanged": [], "changed": [], "new": [], "removed": []}
        for name, digest in now.items():
            if digest in then.values():
                found["unchanged"].append(name)
                continue
            same = name if name in left else next((old for old in left if of_then[old] == of_now[name]), None)
            found["new" if same is None else "changed"].append(name)
            if same is not None:
                left.remove(same)
        found["removed"] = left
        return found

    @cached_property
    def files(self) -> list[str]:
        """Files of the bundle that are other bytes now, new or gone."""
        now = self.compilation.manifest["files"]
        return sorted(name for name in {*now, *self.before.files} if now.get(name) != self.before.files.get(name))

    def write(self) -> None:
        """Write the bundle in place. Raises UserError if that fails."""
        compiler.write_bundle(self.folder, self.compilation.manifest, self.compilation.files)


def regenerate(folder: Path) -> Regenerated:
    """Lower a bundle's model.tir again, for the target and options it was compiled for. Writes nothing.

    Its other files need not be whole. Raises UserError for a folder without a manifest, or a graph that does not parse
    or verify."""
    try:
        before = manifests.parse((folder / manifests.MANIFEST).read_bytes(), str(folder / manifests.MANIFEST))
        text = (folder / compiler.GRAPH).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"bundle {folder}: cannot be read: {reason}", hint="give the folder that `tinygpt compile --out DIR` wrote"
        ) from error
    module = parse_module(text, source=str(folder / compiler.GRAPH))
    try:
        verify(module)
    except CompilerBug as error:
        raise UserError(
            f"{folder / compiler.GRAPH}: {error}", hint="restore the file, or compile the bundle again"
        ) from error
    options = before.target.get("options") or {}
    device, caps = compiler.device_for(before.target_name, {str(k): str(v) for k, v in options.items()})
    edited = before.files.get(compiler.GRAPH) != hashlib.sha256(text.encode()).hexdigest()
    return Regenerated(
        folder, before, compiler.lower(module, device, caps, strict=before.strict, options=options), edited
    )


def product_flops(kernel: Kernel) -> int:
    """Operations of a tile kernel's products, a multiply-add as two, over all its grid points; 0 if it has none."""
    if not any(op.name == "dot" for op in kernel.body.walk()):
        return 0
    total = 0
    for point in np.ndindex(*kernel.grid.values()):
        total += _flops(kernel.body, dict(zip(kernel.grid, map(int, point), strict=True)))
    return total


def _flops(region: Region, indices: Mapping[str, int]) -> int:
    total = 0
    for op in region.ops:
        if op.name == "dot":
            total += _dot_flops(op, indices)
        elif op.name == "for" and any(inner.name == "dot" for inner in op.regions[0].walk()):
            trips = range(op.attrs["lo"].evaluate(indices), op.attrs["hi"].evaluate(indices))
            total += sum(_flops(op.regions[0], {**indices, op.attrs["var"]: trip}) for trip in trips)
    return total


def _dot_flops(op: Op, indices: Mapping[str, int]) -> int:
    _, a, b = op.operands

    def live(dim: Dim | None) -> int:
        return dim.live.evaluate(indices) if dim else 1

    return 2 * prod(map(live, (a.type.rows, a.type.cols, b.type.cols)))
