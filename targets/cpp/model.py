"""A plan as the files of a C++ bundle: a file per kernel, model.cpp (memory, threads, the launches of each function,
the interface that runtime/native.py calls), main.cpp (a program that trains without Python) and a Makefile.

A file per kernel, because compilers run side by side and a cache keyed by content compiles only what changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import jinja2

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.interpret_loop import scratch_elements
from tinygpt.ir.plan import Entry, Launch, Plan, grid_points
from tinygpt.targets.cpp.build import LINK, MAIN, compile_flags
from tinygpt.targets.cpp.names import Names, identifier
from tinygpt.targets.cpp.printer import VECTOR_WIDTHS, declaration, one_line, parameter_names, print_kernel

_MAIN_FUNCTIONS = ("init", "windows", "train_step", "loss", "logits")
_FEATURE_MACROS = {
    "avx2": "__AVX2__", "fma": "__FMA__", "avx512f": "__AVX512F__", "avx512bw": "__AVX512BW__",
    "avx512dq": "__AVX512DQ__", "avx512vl": "__AVX512VL__",
}  # fmt: skip


def emit(plan: Plan, manifest: Mapping[str, Any], caps: Caps, strict: bool) -> dict[str, str]:
    """The bundle's files by name. `manifest` is the manifest so far: name, pools, parameters, functions (in the plan's
    order), batch, context, training."""
    overlapping = {
        launch.kernel for entry in plan.entries.values() for launch in entry.launches if _overlaps(plan, launch)
    }
    names = _kernel_names(plan)
    files = {"vector.h": _template("vector.h", widths=VECTOR_WIDTHS)}
    for key, kernel in plan.kernels.items():
        files[f"kernels/{names[key]}.cpp"] = _kernel_file(kernel, caps, restrict=key not in overlapping)
    files["model.cpp"] = print_model(plan, manifest, caps, strict)
    has_main = all(function in plan.entries for function in _MAIN_FUNCTIONS)
    if has_main:
        files[MAIN] = _main(plan, manifest)
    flags = compile_flags(caps, strict)
    objects = [name.removesuffix(".cpp") + ".o" for name in files if name.endswith(".cpp") and name != MAIN]
    files["Makefile"] = _template(
        "Makefile", name=_title(manifest), flags=flags, link=LINK, objects=objects, has_main=has_main
    )
    return files


def print_model(plan: Plan, manifest: Mapping[str, Any], caps: Caps, strict: bool) -> str:
    """model.cpp."""
    functions = Names()
    return _template(
        "model.cpp",
        name=_title(manifest),
        strict=strict,
        features=sorted(caps.features),
        macros=_FEATURE_MACROS,
        layout=layout_id(manifest),
        declarations=[declaration(kernel) for kernel in plan.kernels.values()],
        pools=dict(plan.pools),
        scratch_bytes=4 * max(map(scratch_elements, plan.kernels.values()), default=0),
        entries=[(functions.new(name), _signature(entry), _body(plan, entry)) for name, entry in plan.entries.items()],
    )


def layout_id(manifest: Mapping[str, Any]) -> str:
    """What host and compiled code must agree on: the pools, the functions in order, how many launches each has, and
    where every tensor lies."""

    def slots(items: list[Mapping[str, Any]]) -> list[list[Any]]:
        return [[s["name"], s["dtype"], list(s["shape"]), s["pool"], s["offset"]] for s in items]

    functions = [
        [name, slots(f["inputs"]), slots(f["outputs"]), len(f["launches"])] for name, f in manifest["functions"].items()
    ]
    layout = [list(manifest["pools"].items()), slots(manifest["parameters"]), functions]
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


def _template(file: str, /, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tinygpt.targets.cpp"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["quoted"] = json.dumps
    return environment.get_template(f"{file}.j2").render(**values)


def _title(manifest: Mapping[str, Any]) -> str:
    """The model's name, fit for comments and string literals."""
    return re.sub(r"[^\w.+-]+", "_", str(manifest["name"]), flags=re.ASCII)


def _kernel_names(plan: Plan) -> dict[str, str]:
    names = {key: identifier(kernel.name) for key, kernel in plan.kernels.items()}
    if len(set(names.values())) < len(names):
        raise CompilerBug(f"two kernels have the same C++ name: {sorted(names.values())}")
    return names


def _kernel_file(kernel: Kernel, caps: Caps, restrict: bool) -> str:
    text = print_kernel(kernel, caps, restrict=restrict)
    return f'#include "../vector.h"\n\nnamespace kernels {{\n\n{text}\n}}  // namespace kernels\n'


def _overlaps(plan: Plan, launch: Launch) -> bool:
    """Whether a buffer the launch writes shares bytes with another of its buffers."""
    pairs = combinations(zip(launch.buffers, plan.kernels[launch.kernel].access, strict=True), 2)
    return any(
        (a_access, b_access) != ("in", "in") and a.pool == b.pool and a.offset < b.end and b.offset < a.end
        for (a, a_access), (b, b_access) in pairs
    )


def _signature(entry: Entry) -> str:
    inputs, outputs = (", ".join(name for name, _ in slots) for slots in (entry.inputs, entry.outputs))
    count = f"{len(entry.launches)} launch{'es' * (len(entry.launches) != 1)}"
    return one_line(f"{entry.name}({inputs}) -> {outputs or 'nothing'}; {count}")


def _body(plan: Plan, entry: Entry) -> list[str]:
    """The statements that run an entry's launches as one thread of several."""
    lines: list[str] = []
    for number, launch in enumerate(entry.launches):
        if launch.barrier:
            lines.append(f"m.meet(), clock.lap({len(entry.launches)});")
        kernel = plan.kernels[launch.kernel]
        arguments = [
            f"{_pool_variable(plan, buffer.pool)} + {buffer.offset} /* {name} */"
            for buffer, name in zip(launch.buffers, parameter_names(kernel), strict=True)
        ]
        casts = [
            f"({'const ' if access == 'in' else ''}{value.type.dtype}*)({argument})"
            for argument, value, access in zip(arguments, kernel.params, kernel.access, strict=True)
        ]
        comment = f"  // {one_line(launch.of)}" if launch.of else ""
        lines.append(f"if (auto [lo, hi] = m.share(thread, {grid_points(kernel)}); lo < hi){comment}")
        lines.append(f"  kernels::{identifier(kernel.name)}({', '.join([*casts, 'scratch', 'lo', 'hi'])});")
        lines.append(f"clock.lap({number});")
    return lines


def _pool_variable(plan: Plan, pool: str) -> str:
    return f"pool{list(plan.pools).index(pool)}"


def _main(plan: Plan, manifest: Mapping[str, Any]) -> str:
    pools = list(plan.pools)
    functions = {
        name: {
            "entry": number,
            "slots": {
                slot["name"]: (pools.index(slot["pool"]), slot["offset"])
                for slot in (*manifest["functions"][name]["inputs"], *manifest["functions"][name]["outputs"])
            },
        }
        for number, name in enumerate(plan.entries)
        if name in _MAIN_FUNCTIONS
    }
    return _template(
        MAIN,
        name=_title(manifest),
        batch=manifest["batch"],
        context=manifest["context"],
        vocabulary=manifest["functions"]["logits"]["outputs"][0]["shape"][-1],
        training=manifest["training"],
        functions=functions,
    )
