"""compile, regen, verify, selftest: making bundles, and trusting them."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinygpt.commands import Command
from tinygpt.commands.options import Choice, add_shape, add_target, add_threads, chosen, console
from tinygpt.ir.errors import UserError


def _compile_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help="a preset's name (see `tinygpt presets`) or a JSON file of model fields"
    )
    add_target(parser)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="the bundle's folder: new, empty, or a bundle to write over"
    )
    add_shape(parser)
    parser.add_argument("--dump", metavar="DIR", type=Path, help="write the module after every pass that changed it")
    parser.add_argument(
        "--from",
        dest="resume",
        metavar="FILE",
        type=Path,
        help="start from a file that --dump wrote, as it is or edited",
    )
    parser.add_argument(
        "--check", choices=("each",), help="run the module after every pass in the interpreter and compare results"
    )
    parser.add_argument("--plan-only", action="store_true", help="print what it would take, and write no bundle")


def _compile(args: Namespace) -> int:
    from tinygpt import compiler
    from tinygpt.targets import target

    if args.out is None and not args.plan_only:
        raise UserError("compile: where should the bundle go?", hint="give --out DIR, or --plan-only to see its plan")
    choice = chosen(args, args.config)
    started = time.perf_counter()
    module = None if args.resume else compiler.module_for(choice.preset, choice.batch, choice.context)
    captured = time.perf_counter() - started
    done = compiler.lower(
        module, target(choice.target), choice.caps, strict=choice.strict, dump=args.dump, resume=args.resume,
        check=args.check == "each", options=choice.options,
    )  # fmt: skip
    if args.resume:
        compiler.require_dump_of(done.captured, args.resume, choice.preset, choice.batch, choice.context)
    if not args.plan_only:
        compiler.write_bundle(args.out, done.manifest, done.files)
    seconds = time.perf_counter() - started - captured
    for line in _report(choice, done):
        console().print(line)
    if args.plan_only and not args.resume and choice.caps.memory_bytes:
        console().print(f"  {_depth(choice)}")
    verb, end = "read" if args.resume else "captured", "planned" if args.plan_only else "written"
    console().print(f"  {verb} in {captured:.1f} s, lowered in {done.seconds:.1f} s, {end} after {seconds:.1f} s")
    if args.check:
        console().print(f"  checked: all {len(done.stages)} stages compute the same")
    if args.out and not args.plan_only:
        console().print(f"wrote {args.out}; next: tinygpt train {args.out} --data FILE")
    return 0


def _report(choice: Choice, done: Any) -> Iterator[str]:
    from tinygpt.listing import memory_line

    config, plan, caps = choice.preset.config, done.plan, choice.caps
    yield f"{config.model_name} for {choice.target} ({caps.name}): batch {choice.batch}, context {choice.context}"
    launches = plan.entries["train_step"].launches
    flops, barriers = config.flops_per_step(choice.batch, choice.context), sum(x.barrier for x in launches)
    yield f"  {config.parameter_count:,} parameters, {flops / 1e9:.3g} GFLOP a step"
    yield f"  {len(plan.kernels)} kernels; a step is {len(launches)} launches and {barriers} barriers"
    pools = ", ".join(f"{name} {size:,}" for name, size in plan.pools.items())
    yield f"  memory {sum(plan.pools.values()):,} bytes ({pools})"
    yield f"  {memory_line(plan)}"


def _depth(choice: Choice) -> str:
    """How deep a model of this width fits the memory that the profile's addresses reach."""
    from tinygpt.depth import deepest
    from tinygpt.targets import target

    found = deepest(choice.preset, choice.batch, choice.context, target(choice.target), choice.caps, choice.strict)
    how = f"planned; {found.layers + 1} do not fit" if found.planned else "from the memory of small models"
    heap = f"{choice.caps.memory_bytes / (1 << 30):g} GiB"
    return f"{heap} train up to {found.layers:,} layers of this width, context and batch ({how})"


def _bundle_argument(parser: ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the folder that `tinygpt compile --out DIR` wrote")


def _regen_arguments(parser: ArgumentParser) -> None:
    _bundle_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="list what would change, and write nothing")


def _regen(args: Namespace) -> int:
    from tinygpt.regeneration import regenerate

    done = regenerate(args.bundle)
    out = console()
    if done.graph_was_edited:
        out.print(
            "note: model.tir is not the one this bundle was compiled from; the new bundle will be of the edited one"
        )
    for kind in ("changed", "new", "removed"):
        for name in done.kernels[kind]:
            out.print(f"{kind:10}{name}")
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in done.kernels.items())
    out.print(f"kernels: {counts}")
    others = [name for name in done.files if not name.startswith("kernels/")]
    out.print(f"files that differ: {len(done.files)}{f' ({chr(44).join(others)})' if others else ''}")
    if args.dry_run:
        out.print("nothing written")
    else:
        done.write()
        out.print(f"wrote {args.bundle}")
    return 0


def _verify(args: Namespace) -> int:
    from tinygpt.compiler import GRAPH
    from tinygpt.ir.show import summary
    from tinygpt.ir.text import parse_module
    from tinygpt.ir.verify import verify
    from tinygpt.runtime.bundle import load

    bundle = load(args.bundle)
    module = parse_module((bundle.folder / GRAPH).read_text(encoding="utf-8"), source=GRAPH)
    verify(module)
    manifest = bundle.manifest
    out = console()
    out.print(f"{args.bundle}: {len(manifest.files)} files match their hashes; {GRAPH} verifies")
    out.print(f"  {summary(module)}")
    out.print(
        f"  target {manifest.target_name} ({manifest.target.get('profile')}), "
        f"batch {manifest.batch}, context {manifest.context}"
    )
    return 0


def _selftest_arguments(parser: ArgumentParser) -> None:
    _bundle_argument(parser)
    add_threads(parser)


def _selftest(args: Namespace) -> int:
    from tinygpt.runtime.bundle import load

    report = load(args.bundle).selftest(args.threads)
    console().print(str(report))
    console().print(f"{args.bundle}: {'passed' if report.passed else 'FAILED'}")
    return 0 if report.passed else 1


COMMANDS = (
    Command(
        "compile",
        "compile a model config to a bundle",
        (
            "tinygpt compile small --out small.bundle",
            "tinygpt compile config.json --target wasm32 --out web --batch 8",
            "tinygpt compile tiny --plan-only --set n_layers=4",
            "tinygpt compile tiny --out t --dump stages && tinygpt compile tiny --out t --from stages/10-fuse.tir",
            "tinygpt compile tiny --plan-only --batch 2 --context 8 --check each",
        ),
        _compile_arguments,
        _compile,
    ),
    Command(
        "regen",
        "lower a bundle's graph again with the passes as they are now; list which kernels changed",
        ("tinygpt regen small.bundle --dry-run", "tinygpt regen small.bundle"),
        _regen_arguments,
        _regen,
    ),
    Command(
        "verify",
        "check that a bundle is whole and its graph is sound",
        ("tinygpt verify small.bundle",),
        _bundle_argument,
        _verify,
    ),
    Command(
        "selftest",
        "run a bundle on the vectors it brings, and compare",
        ("tinygpt selftest small.bundle", "tinygpt selftest small.bundle --threads 1"),
        _selftest_arguments,
        _selftest,
    ),
)
