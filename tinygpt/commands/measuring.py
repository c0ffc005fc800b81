"""bench, parity, profile: how fast, how close to PyTorch, and where the time goes."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from tinygpt.commands import Command
from tinygpt.commands.options import (
    add_shape,
    add_target,
    add_threads,
    chosen,
    compiled,
    console,
    is_bundle,
    profile,
    show,
    table,
    whole,
)
from tinygpt.ir.errors import UserError


def _bench_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("configs", metavar="CONFIG", nargs="*", help="presets or JSON files")
    add_target(parser)
    add_shape(parser)
    add_threads(parser)
    parser.add_argument(
        "--against",
        metavar="RIVALS",
        default="torch",
        help="of torch, torch.compile, jax, torch+avx512, torch.compile+avx512, torch.cuda, torch.cuda.compile, torch.cuda.graph; "
        "with commas (default: torch)",
    )
    parser.add_argument(
        "--engine", choices=("node", "wasmtime"), help="what runs a WebAssembly bundle (default: wasmtime, in this process)"
    )
    parser.add_argument(
        "--matmul", metavar="N,…", default="", help="time products of N x N matrices alone, packing included, and no model"
    )
    parser.add_argument("--rounds", metavar="N", type=whole(), default=5, help="turns for each contestant (default: 5)")
    parser.add_argument("--seconds", metavar="S", type=float, default=1.0, help="how long a turn lasts (default: 1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")


def _bench(args: Namespace) -> int:
    from tinygpt.bench import NODE, bench, require_rivals

    against = [name for name in args.against.split(",") if name and name != "none"]
    require_rivals(against)
    if bool(args.configs) == bool(args.matmul):
        raise UserError("bench: what should be timed?", hint="name a preset or a JSON file, or give --matmul 512,1024")
    if args.engine and not args.target.startswith("wasm"):
        raise UserError(f"--engine {args.engine}: does not run target {args.target}", hint="leave it out, or give --target wasm32 or wasm64")
    engine = NODE if args.engine == NODE else ""
    threads = args.threads or len(os.sched_getaffinity(0))
    if args.matmul:
        return _bench_products(args, engine, threads)
    choices = [chosen(args, config, local=not engine) for config in args.configs]
    results = table(
        "",
        "config",
        "target",
        "threads",
        "ms",
        "tokens/s",
        "GFLOP/s",
        "of peak",
        *(f"{name} ms (ratio)" for name in against),
    )
    for choice in choices:
        say = console(stderr=True).print
        runs, tuned = "v8" if engine else "wasmtime", choice.options.get("engine", "v8")
        if choice.target.startswith("wasm") and tuned != runs:
            say(f"note: {choice.caps.name} is tuned for another engine than {runs}, which runs it here")
        result = bench(
            compiled(choice), choice.caps, threads, against, engine=engine, rounds=args.rounds, seconds=args.seconds, say=say
        )
        if args.json:
            print(result.to_json(), flush=True)
            continue
        rivals = [
            f"{result.rivals[name]:.2f} ({result.ratios[name]:.2f}x)" if name in result.rivals else "-"
            for name in against
        ]
        results.add_row(
            result.config, result.target, str(threads), f"{result.ms:.2f}", f"{result.tokens_per_s:,.0f}",
            f"{result.gflops:.0f}", f"{result.gflops / result.peak_gflops:.0%} of {result.peak_gflops:.0f}", *rivals,
        )  # fmt: skip
        for note in result.notes:
            say(f"note: {result.config}: {note}")
    if not args.json:
        show(results)
    return 0


def _bench_products(args: Namespace, engine: str, threads: int) -> int:
    from tinygpt.bench import bench_product
    from tinygpt.targets import target

    caps = profile(args, local=not engine)[0]
    results = table("", "product", "target", "profile ", "threads", "ms", "GFLOP/s", "of peak")
    for size in _sizes(args.matmul):
        found = bench_product(
            size, target(args.target), caps, threads, engine=engine, rounds=args.rounds, seconds=args.seconds
        )  # fmt: skip
        if args.json:
            print(found.to_json(), flush=True)
        share = f"{found.gflops / found.peak_gflops:.0%} of {found.peak_gflops:.0f}"
        results.add_row(f"{size}³", found.target, found.profile, str(threads), f"{found.ms:.2f}", f"{found.gflops:.0f}", share)
    if not args.json:
        show(results)
    return 0


def _sizes(text: str) -> list[int]:
    """The numbers of --matmul. Raises UserError."""
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= 8192 for part in parts):
        raise UserError(f"--matmul {text}: not a list of whole numbers from 1 to 8192", hint="write --matmul 512,1024")
    return [int(part) for part in parts]


def _parity_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a preset or a JSON file")
    add_target(parser)
    add_shape(parser)
    add_threads(parser)
    parser.add_argument(
        "--steps", metavar="N", type=whole(), default=50, help="training steps to compare (default: 50)"
    )
    parser.add_argument("--data", metavar="FILE", help="the text batches are taken from (default: TinyShakespeare)")
    parser.add_argument("--seed", metavar="S", type=int, default=42, help="of weights and batches (default: 42)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _parity(args: Namespace) -> int:
    from tinygpt.parity import parity, require_repeatable
    from tinygpt.runtime import data

    choice = chosen(args, args.config, local=True)
    require_repeatable(choice.preset.name, choice.preset.config.to_dict())
    corpus = data.load(args.data)
    with compiled(choice).session(args.threads, args.seed) as session:
        found = parity(session, corpus, args.steps)
    if args.json:
        print(found.to_json())
        return 0
    out = console()
    out.print(f"{found.config} on {found.target} against PyTorch, {found.steps} steps on {corpus.name}:")
    out.print(f"  largest difference of a loss       {found.max_loss_diff:.2e}")
    out.print(f"  largest relative gradient error    {found.max_grad_err:.2e}  ({found.worst_gradient})")
    out.print(f"  largest difference of a weight     {found.max_weight_diff:.2e}  after the last step")
    return 0


def _profile_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder")
    add_threads(parser)
    parser.add_argument(
        "--runs", metavar="N", type=whole(), default=15, help="steps to time; the median one is shown (default: 15)"
    )


def _profile(args: Namespace) -> int:
    from tinygpt import profiling
    from tinygpt.regeneration import regenerate
    from tinygpt.runtime.bundle import load

    if not is_bundle(args.bundle):
        raise UserError(
            f"profile: {args.bundle} is not a bundle's folder",
            hint=f"compile it first: tinygpt compile {args.bundle} --out DIR",
        )
    bundle = load(args.bundle)
    with bundle.session(args.threads) as session:
        found = profiling.profile(session, profiling.flops_by_hash(regenerate(Path(args.bundle))), args.runs)
    title = f"{bundle.manifest.name}: a training step of {found.total_ms:.2f} ms on {found.where}"
    kernels = table(title, "kernel", "of ", "launches", "ms", "%", "GFLOP/s")
    for row in found.rows:
        rate = f"{row.gflops:.1f}" if row.gflops is not None else ""
        kernels.add_row(row.kernel, row.of, str(row.launches), f"{row.ms:.3f}", f"{row.ms / found.total_ms:.1%}", rate)
    kernels.add_row(
        "waiting",
        "barriers, and the clock itself",
        "",
        f"{found.waiting_ms:.3f}",
        f"{found.waiting_ms / found.total_ms:.1%}",
        "",
    )
    show(kernels)
    return 0


COMMANDS = (
    Command(
        "bench",
        "time training steps (on a GPU: with one in flight) beside PyTorch's and JAX's, in turns, beside the FMA peak",
        (
            "tinygpt bench tiny small medium --threads 2 --against torch,torch.compile",
            "tinygpt bench small --against torch+avx512,jax --json",
            "tinygpt bench small --target wasm32 --threads 2 --engine node --json",
            "tinygpt bench --matmul 512,1024 --target wasm64 --threads 1",
        ),
        _bench_arguments,
        _bench,
    ),
    Command(
        "parity",
        "train beside PyTorch from the same weights on the same batches; print how far apart they are",
        ("tinygpt parity tiny", "tinygpt parity medium --target cpp --steps 50 --json"),
        _parity_arguments,
        _parity,
    ),
    Command(
        "profile",
        "where the time of a training step goes, kernel by kernel",
        ("tinygpt profile small.bundle --threads 2",),
        _profile_arguments,
        _profile,
    ),
)
