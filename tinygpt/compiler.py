"""compile: from a config, a preset or a captured module to a bundle.

Capturing is in captures.py, the vectors a bundle tests itself with in golden.py."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.numpy

from tinygpt.captures import capture_config, complete
from tinygpt.checking import StageChecker
from tinygpt.devices import settled
from tinygpt.golden import golden
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Module
from tinygpt.ir.errors import UserError
from tinygpt.ir.plan import Buffer, Plan
from tinygpt.ir.text import print_kernel, print_module
from tinygpt.lowering import pipeline
from tinygpt.lowering.memory import plan as plan_memory
from tinygpt.lowering.passes import Pass
from tinygpt.presets import Preset, find
from tinygpt.runtime import bundle as bundles
from tinygpt.runtime import manifest as manifests
from tinygpt.runtime import trust
from tinygpt.runtime.engine import host_files
from tinygpt.runtime.errors import UserError as BrokenBundleError
from tinygpt.targets import Target, target

GRAPH = "model.tir"


@dataclass(frozen=True)
class Compilation:
    """Everything compiling produced: the captured module, the stages of the pipeline that ran, and the plan; the
    bundle's manifest and files when they are asked for. `seconds` is the time from the captured module to the plan."""

    captured: Module
    stages: tuple[pipeline.Stage, ...]
    plan: Plan
    device: Target
    caps: Caps
    strict: bool
    options: Mapping[str, str]
    seconds: float

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self._assembled[0]

    @property
    def files(self) -> Mapping[str, bytes]:
        """The bundle's files by name, but for the manifest."""
        return self._assembled[1]

    @cached_property
    def _assembled(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        vectors, tolerances = golden(self.captured, self.caps)
        more = {GRAPH: print_module(self.captured).encode(), bundles.GOLDEN: safetensors.numpy.save(vectors)}
        module = self.stages[-1].module
        return assemble(module, self.plan, self.device, self.caps, self.strict, self.options, more, tolerances)


def assemble(
    module: Module, plan: Plan, device: Target, caps: Caps, strict: bool = False,
    options: Mapping[str, str] | None = None, more: Mapping[str, bytes] | None = None,
    tolerances: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[dict[str, Any], dict[str, bytes]]:  # fmt: skip
    """The manifest and the files of a plan: what the target emits, what a host needs, and `more`."""
    manifest = describe(module, plan, strict)
    emitted = device.emit(plan, manifest, caps, strict)
    files = {name: text.encode() if isinstance(text, str) else text for name, text in emitted.items()}
    record = device.record(plan, dict(files), caps, strict)
    files |= host_files(device.name) | dict(more or {})
    manifest["golden"] = dict(tolerances or {})
    manifest["target"] = record | {"options": dict(options or {})}
    manifest["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return manifest, files


def lower(
    module: Module | None, device: Target, caps: Caps, *, strict: bool = False, dump: Path | None = None,
    resume: Path | None = None, passes: str = pipeline.DEFAULT, check: bool = False,
    options: Mapping[str, str] | None = None,
) -> Compilation:  # fmt: skip
    """From a captured module to a plan, and to the files of a bundle.

    `resume` names a dumped stage to start from instead; the captured module is the one dumped beside it. `check` runs
    every stage in the interpreter. `options` are those the profile was chosen with; they are kept for `regen`."""
    started = time.perf_counter()
    caps = replace(caps, fma=False) if strict else caps
    todo: Sequence[Pass] = pipeline.parse_pipeline(passes)
    if resume is not None:
        captured, stage, todo = pipeline.resume(resume, todo)
    elif module is not None:
        captured = stage = pipeline.captured(module)
    else:
        raise TypeError("lower needs a module or a dump to resume from")
    if dump is not None:
        pipeline.dump_stage(dump, captured)
    checker = StageChecker(captured.module, dump) if check else None
    stages = pipeline.run(stage, caps, todo, dump=dump, check=checker)
    plan = plan_memory(stages[-1].module, caps)
    return Compilation(
        captured.module, tuple(stages), plan, device, caps, strict, options or {}, time.perf_counter() - started
    )


def require_dump_of(captured: Module, dump: Path, preset: Preset, batch: int, context: int) -> None:
    """Raise UserError unless a dump is of this model at this shape."""
    wanted = {"config": preset.config.to_dict(), "batch": batch, "context": context}
    for name, value in wanted.items():
        if captured.attrs.get(name) != value:
            what = "of another config" if name == "config" else f"for {name} {captured.attrs.get(name)}, not {value}"
            hint = "give the config, batch and context that it was compiled with"
            raise UserError(f"--from {dump}: was dumped {what}", hint=hint)


def describe(module: Module, plan: Plan, strict: bool) -> dict[str, Any]:
    """The manifest, but for what the target, the golden vectors and the files add to it."""
    attrs = module.attrs
    return {
        "format": manifests.FORMAT, "version": manifests.VERSION, "name": module.name, "strict": strict,
        "config": attrs["config"], "batch": attrs["batch"], "context": attrs["context"], "training": attrs["training"],
        "pools": dict(plan.pools),
        "parameters": [
            {**_slot(name, buffer), "role": p.role, "init": list(p.init), "decay": buffer.type.rank >= 2}
            for name, (p, buffer) in plan.parameters.items()
        ],
        "functions": {
            name: {
                "inputs": [_slot(n, b) for n, b in entry.inputs],
                "outputs": [_slot(n, b) for n, b in entry.outputs],
                "launches": [{"kernel": x.kernel, "barrier": x.barrier, "of": x.of} for x in entry.launches],
            }
            for name, entry in plan.entries.items()
        },
        "kernels": {name: {"hash": kernel_hash(k), "of": k.of} for name, k in plan.kernels.items()},
        "memory": {"work_live": plan.work_live, "work_without_reuse": plan.work_without_reuse},
    }  # fmt: skip


def _slot(name: str, buffer: Buffer) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(buffer.type.shape),
        "dtype": buffer.type.dtype,
        "pool": buffer.pool,
        "offset": buffer.offset,
    }


def kernel_hash(kernel: Kernel) -> str:
    """A short hash of what a kernel does, by which `regen` tells what changed: whatever it is called, and what it is made of."""
    cost = {key: value for key, value in kernel.cost.items() if key != "sides"}
    return hashlib.sha256(print_kernel(replace(kernel, name="kernel", cost=cost)).encode()).hexdigest()[:16]


def write_bundle(folder: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write a bundle into a folder that is new, empty, or holds a bundle: files first, the manifest last.

    A bundle that was half written over does not load: its files are not those of its manifest. Files that only the old
    bundle had are removed, everything else in the folder stays. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / manifests.MANIFEST).exists():
            raise UserError(f"bundle {folder}: the folder has other things in it", hint="name a new or an empty folder")
        for name in _files_of_bundle(folder) - set(files):
            (folder / name).unlink(missing_ok=True)
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        partial = folder / f"{manifests.MANIFEST}.partial"
        text = json.dumps(manifest, indent=1).encode()
        partial.write_bytes(text)
        os.replace(partial, folder / manifests.MANIFEST)
    except OSError as error:
        raise UserError(
            f"bundle {folder}: cannot be written: {error.strerror or error}",
            hint="name a folder on a disk with space, where you may write",
        ) from error
    trust.remember(text)


def _files_of_bundle(folder: Path) -> set[str]:
    """The files that a folder's manifest lists; none if there is no manifest, or it is not valid."""
    with contextlib.suppress(OSError, BrokenBundleError):
        return set(manifests.parse((folder / manifests.MANIFEST).read_bytes()).files)
    return set()


def compile(  # noqa: A001 - the public name
    model: Any, target: str = "cpp", batch: int | None = None, context: int | None = None, strict: bool = False,
    dump: str | Path | None = None, *, resume: str | Path | None = None, options: Mapping[str, str] | None = None,
    check: bool = False, out: str | Path | None = None,
) -> bundles.Bundle:  # fmt: skip
    """Compile a preset name, a JSON path, a dict, a ModelConfig or a captured module into a bundle.

    `batch` and `context` default to the preset's; a captured module has its own. Without `out` the bundle lies in a
    temporary folder until it is saved elsewhere. Raises UserError for a config, target or option that does not fit."""
    options = settled(target, options or {})
    device, caps = device_for(target, options)
    module = module_for(model, batch, context) if resume is None else None
    done = lower(
        module, device, caps, strict=strict, dump=Path(dump) if dump else None, resume=Path(resume) if resume else None,
        check=check, options=options,
    )  # fmt: skip
    if resume is not None and not isinstance(model, Module):
        preset = find(model)
        require_dump_of(done.captured, Path(resume), preset, *preset.shape(batch, context))
    folder = Path(out) if out else Path(tempfile.mkdtemp(prefix="tinygpt-"))
    if out is None:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_bundle(folder, done.manifest, done.files)
    return bundles.load(folder)


def device_for(name: str, options: Mapping[str, str]) -> tuple[Target, Caps]:
    """A target and the profile its options choose. Raises UserError for an option nothing knows."""
    device = target(name)
    left = dict(options)
    caps = device.choose(left)
    if left:
        raise UserError(f"{name} has no option {next(iter(left))!r}", hint="see tinygpt compile --help for --set")
    return device, caps


def module_for(model: Any, batch: int | None = None, context: int | None = None) -> Module:
    """The captured module of a CONFIG argument, at its own or the given batch and context. Raises UserError."""
    if isinstance(model, Module):
        module = complete(model)
        found = (module.attrs["batch"], module.attrs["context"])
        if (batch or found[0], context or found[1]) != found:
            raise UserError(
                f"module {module.name} was captured for batch {found[0]} and context {found[1]}",
                hint="capture it at the shape you want",
            )
        return module
    preset = find(model)
    batch, context = preset.shape(batch, context)
    return capture_config(preset.config, batch, context, replace(preset.training, batch_size=batch))
