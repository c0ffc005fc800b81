"""Follow a model through the compiler: what each pass does, and one layer from PyTorch line to C++ loop.

    python examples/inspect_ir.py
    python examples/inspect_ir.py --preset small --kernel layer_norm
    python examples/inspect_ir.py --dump DIR            every stage as text, to read, to compare, or to resume from"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import tinygpt as tg
from tinygpt.compiler import Compilation, device_for, lower, module_for
from tinygpt.ir.core import Module
from tinygpt.ir.interpret import evaluate

LINES = 24  # of a listing are shown


def main() -> None:
    options = arguments()
    device, caps = device_for("cpp", {})
    module = module_for(options.preset)
    done = lower(module, device, caps, dump=options.dump)

    heading(f"1. What was captured from PyTorch: {tg.show(done.captured)}")
    listing(tg.show(done.captured.functions["loss"], module=done.captured))

    heading("2. What each pass did")
    for stage in done.stages:
        print(f"{stage.number:02} {stage.name:16} {stage.seconds * 1e3:7.0f} ms   {tg.show(stage.module)}")

    heading("3. A function before it is cut into kernels: one group of ops becomes one kernel")
    fused = stage_after(done, "fuse")
    groups = [op for op in fused.functions["loss"].body.ops if op.name == "group"]
    chosen = next((g for g in groups if options.kernel in {op.name for op in g.regions[0].ops}), None)
    if chosen is None:
        raise SystemExit(f"no group of loss has an op called {options.kernel}; there are {sorted({op.name for g in groups for op in g.regions[0].ops})}")
    listing(tg.show(chosen))

    name = next(n for n, k in done.plan.kernels.items() if options.kernel in k.of.split())
    heading(f"4. Its kernel {name} at the tile level: one program for each point of a grid, the same for every target")
    listing(tg.show(stage_after(done, "tile").kernels[name]))
    heading("5. At the loop level: vectors and memory, for this processor")
    listing(tg.show(stage_after(done, "loops").kernels[name]))
    heading("6. As C++")
    listing(next(text.decode() for file, text in done.files.items() if Path(file).stem == name))

    heading("7. Memory")
    pools = {pool: f"{size:,} bytes" for pool, size in done.plan.pools.items()}
    print(f"pools {pools}; most bytes alive at once {done.plan.work_live:,}; without reuse {done.plan.work_without_reuse:,}")

    heading("8. Any stage runs in the interpreter: the same batch offsets, from the graph and from the tile kernels")
    inputs = {"seed": np.array([42, 0], np.uint32), "step": np.uint32(0), "count": np.uint32(1000)}
    for stage in ("optimize", "tile"):
        print(f"after {stage}: {evaluate(stage_after(done, stage), 'windows', inputs)['offsets']}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Follow a model through the compiler.")
    parser.add_argument("--preset", default="tiny", choices=list(tg.PRESETS))
    parser.add_argument("--kernel", default="gelu", help="a graph op: the first kernel that computes it is shown")
    parser.add_argument("--dump", type=Path, help="a folder for the text of every stage")
    return parser.parse_args()


def stage_after(done: Compilation, name: str) -> Module:
    """The module as the last pass of this name left it."""
    return next(stage.module for stage in reversed(done.stages) if stage.name == name)


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * min(len(text), 100)}")


def listing(text: str) -> None:
    """The first lines of a listing."""
    lines = text.splitlines()
    print("\n".join(line[:160] for line in lines[:LINES]))
    if len(lines) > LINES:
        print(f"… {len(lines) - LINES} more lines")


if __name__ == "__main__":
    main()
