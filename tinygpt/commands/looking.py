"""ir, passes, repl, presets, devices: what there is, and what a model becomes on its way down."""

from __future__ import annotations

import importlib
import inspect as reflection
import os
import platform
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import fields

from tinygpt.commands import Command
from tinygpt.commands.options import add_shape, add_target, chosen, console, show, table
from tinygpt.inspection import LEVELS, Inspector


def _model_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a preset or a JSON file")
    add_target(parser)
    add_shape(parser)


def _ir_arguments(parser: ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument(
        "--function", metavar="F", help="one function, such as loss or train_step, with the kernels it launches"
    )
    parser.add_argument(
        "--after",
        metavar="PASS",
        help="the module as that pass left it; simplify.2 for its second run (default: as captured)",
    )
    parser.add_argument(
        "--level", choices=LEVELS, help="the last module of that level; plan: pools, buffers, launches and barriers"
    )


def _ir(args: Namespace) -> int:
    from tinygpt.inspection import listing

    sys.stdout.write(listing(_inspected(args), args.level, args.after, args.function))
    return 0


def _inspected(args: Namespace) -> Inspector:
    from tinygpt.inspection import inspect

    choice = chosen(args, args.config)
    return inspect(
        choice.preset, choice.target, choice.batch, choice.context, strict=choice.strict, options=choice.options
    )


def _repl(args: Namespace) -> int:
    from tinygpt.inspection import open_prompt

    open_prompt(_inspected(args))
    return 0


def _no_arguments(parser: ArgumentParser) -> None:
    """The command has none."""


def _passes(args: Namespace) -> int:
    from tinygpt.lowering import pipeline

    out = console()
    out.print("the pipeline, in order:")
    out.print(f"  {pipeline.DEFAULT}\n")
    width = max(map(len, pipeline.PASSES))
    for name, kind in sorted(pipeline.PASSES.items()):
        about = (reflection.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
        options = ", ".join(f"{f.name} = {f.default}" for f in fields(kind))
        out.print(f"  {name:{width}}  {about}" + (f"  {{{options}}}" if options else ""))
    return 0


def _presets(args: Namespace) -> int:
    from tinygpt.presets import PRESETS

    found = table("", "preset", "parameters", "layers", "width", "heads", "context", "batch", "steps", "GFLOP a step")
    for preset in PRESETS.values():
        c = preset.config
        flops = c.flops_per_step(preset.batch_size) / 1e9
        numbers = (c.n_layers, c.d_model, c.n_heads, c.context_length, preset.batch_size, preset.max_steps)
        found.add_row(preset.name, f"{c.parameter_count:,}", *map(str, numbers), f"{flops:,.2f}")
    show(found)
    return 0


def _devices(args: Namespace) -> int:
    from tinygpt.runtime.engine import available
    from tinygpt.targets import targets

    out = console()
    out.print(
        f"processor  {_processor_name()} ({platform.machine()}), "
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} threads usable"
    )
    out.print(f"compiler   {_compiler()}")
    engines = available()
    for name, device in targets().items():
        caps = device.choose(dict(device.local))
        runs = "runs here" if name in engines else "compiles here, runs elsewhere"
        if caps.strategy == "cpu":
            has = [f"{caps.lanes} lanes", "FMA" if caps.fma else "no FMA"]
        else:
            has = [f"{caps.bindings} bindings", f"{caps.workgroup_bytes >> 10} KiB of workgroup memory"]
        out.print(f"target     {name:7} {runs}; profile {caps.name}: {', '.join([*has, *sorted(caps.features)])}")
    for adapter in _adapters():
        out.print(f"gpu        {adapter}")
    return 0


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.processor()
            )
    except OSError:
        return platform.processor() or "unknown"


def _compiler() -> str:
    from tinygpt.runtime.errors import UserError
    from tinygpt.runtime.native import find_compiler

    try:
        return str(find_compiler())
    except UserError as error:
        return str(error).replace("\n  hint:", ";")


def _adapters() -> list[str]:
    """The graphics adapters wgpu finds, if it is installed."""
    os.environ.setdefault(
        "XDG_RUNTIME_DIR", tempfile.gettempdir()
    )  # its absence is reported on the terminal, and harmless
    try:
        wgpu = importlib.import_module("wgpu")
        return [str(adapter.summary) for adapter in wgpu.gpu.enumerate_adapters_sync()]
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        return [f"none found through wgpu ({str(error).splitlines()[0] if str(error) else type(error).__name__})"]


COMMANDS = (
    Command(
        "ir",
        "print a model at any stage of its lowering",
        (
            "tinygpt ir tiny --function loss",
            "tinygpt ir tiny --after fuse --function train_step",
            "tinygpt ir tiny --level tile --function apply",
            "tinygpt ir tiny --level plan",
        ),
        _ir_arguments,
        _ir,
    ),
    Command("passes", "list the passes, and the pipeline they make", ("tinygpt passes",), _no_arguments, _passes),
    Command(
        "repl",
        "open IPython with a compiled model to look around in: m, tg, config",
        ("tinygpt repl tiny",),
        _model_arguments,
        _repl,
    ),
    Command("presets", "list the named configurations", ("tinygpt presets",), _no_arguments, _presets),
    Command("devices", "what this machine can compile for and run on", ("tinygpt devices",), _no_arguments, _devices),
)
