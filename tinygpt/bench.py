"""`tinygpt bench`: whole training steps, ours and the rivals', or products alone, timed in turns in the same minutes,
beside the FMA peak.

Each contestant has a process of its own, so that thread pools do not fight, and waits while the others are timed. What
counts is the best step of all rounds, on a GPU the best group of steps, which overlap with the host as in training: a busy
machine makes steps slower, never faster."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tinygpt import one_kernel, peak
from tinygpt.config import ModelConfig, nearest
from tinygpt.ir.caps import Caps
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.runtime.bundle import Bundle
from tinygpt.runtime.engine import host_files
from tinygpt.targets import Target, target
from tinygpt.targets.cpp import PROFILES
from tinygpt.targets.cpp.build import compile_flags
from tinygpt.targets.cpp.profiles import processor
from tinygpt.toolchain import compiled, find_node

RIVALS = (
    "torch", "torch.compile", "jax", "torch+avx512", "torch.compile+avx512", "torch.cuda", "torch.cuda.compile", "torch.cuda.graph"
)  # fmt: skip
PRELOADED = "+avx512"  # PyTorch with MKL's check of the processor's vendor answered for it

NODE = "node"  # the engine that is no part of this process
HOST = "host/tinygpt.mjs"  # what a bundle brings if Node can run it
OURS = "tinygpt"
_PEAK = "peak"

_PAUSE = 0.25  # seconds between turns: thread pools spin for a while after their last work
_PEAK_SECONDS = 0.2

# MKL of PyTorch's wheels asks these before it takes its AVX-512 path; on processors of other vendors they say no.
_VENDOR_CHECK = (
    'extern "C" int mkl_serv_intel_cpu_true() { return 1; }\nextern "C" int mkl_serv_intel_cpu() { return 1; }\n'
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """A line of `tinygpt bench --json`. `ms` is a training step of ours; `ratios` are rival ms / our ms; `notes` say
    what lacks its fast path; `engine` is "node", or empty for the one of this process."""

    config: str
    target: str
    threads: int
    ms: float
    tokens_per_s: float
    gflops: float
    peak_gflops: float
    rivals: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    engine: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class ProductResult:
    """A line of `tinygpt bench --matmul N --json`: f32[N, N] times f32[N, N], packing included."""

    matmul: int
    target: str
    profile: str
    engine: str
    threads: int
    ms: float
    gflops: float
    peak_gflops: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def require_rivals(names: Sequence[str]) -> None:
    """Raise UserError for a name that is no rival's."""
    for name in names:
        if name not in RIVALS:
            raise UserError(
                f"--against {name}: there is no such rival; the nearest is {nearest(name, RIVALS)!r}",
                hint=f"rivals: {', '.join(RIVALS)}",
            )


def bench(
    bundle: Bundle,
    caps: Caps,
    threads: int,
    against: Sequence[str] = (),
    *,
    engine: str = "",
    rounds: int = 5,
    seconds: float = 1.0,
    say: Say = print,
) -> Result:
    """Time a bundle and its rivals. `engine` "node" runs it in Node instead of in this process's engine; `seconds` is how
    long a turn lasts; `say` hears which rivals cannot run here.

    Raises UserError for a bundle without a config, which nobody else could build, and for what a compiler refuses."""
    manifest = bundle.manifest
    if manifest.config is None:
        raise UserError(
            f"bundle {bundle.folder} was captured from a module of its own", hint="bench a preset or a JSON config"
        )
    spec = {
        "config": dict(manifest.config), "batch": manifest.batch, "context": manifest.context, "threads": threads,
        "training": dict(manifest.training), "bundle": str(bundle.folder.resolve()),
    }  # fmt: skip
    device = target(manifest.target_name)
    with contextlib.ExitStack() as stack:
        ours = _in_engine(OURS, spec, device, engine, stack)
        best, highest = _turns([ours, *_started(against, spec, stack, say)], device, caps, manifest.strict, threads, engine, rounds, seconds, stack)
    ms = best.pop(OURS)
    for name in [name for name, x in best.items() if math.isinf(x)]:
        del best[name]
        say(f"{name} is left out: it ended while it was timed")
    config = ModelConfig(**manifest.config)
    flops = config.flops_per_step(manifest.batch, manifest.context)
    return Result(
        manifest.name, manifest.target_name, threads, round(ms, 4),
        round(manifest.batch * manifest.context / ms * 1e3, 1),
        round(flops / ms / 1e6, 2), round(highest, 2), {n: round(x, 4) for n, x in best.items()},
        {n: round(x / ms, 3) for n, x in best.items()}, tuple(notes(config, caps, manifest.strict, threads)), engine,
    )  # fmt: skip


def bench_product(
    size: int, device: Target, caps: Caps, threads: int, *, engine: str = "", rounds: int = 5, seconds: float = 1.0
) -> ProductResult:
    """Time one product of two square matrices, lowered by the passes that every model goes through. Raises UserError for a
    GPU, where a run of one kernel is mostly waiting for it."""
    if caps.strategy != "cpu":
        raise UserError(f"--matmul: a product alone is not timed on target {device.name}", hint="tinygpt profile BUNDLE times the kernels of a model there")
    with contextlib.ExitStack() as stack:
        made = one_kernel.product(_folder(stack) / "product", size, device, caps)
        ours = _in_engine(OURS, _kernel_spec(made, threads), device, engine, stack)
        best, highest = _turns([ours], device, caps, False, threads, engine, rounds, seconds, stack)
    ms = best[OURS]
    rate = made.flops / ms / 1e6
    return ProductResult(size, device.name, caps.name, engine, threads, round(ms, 4), round(rate, 2), round(highest, 2))


def _turns(
    contestants: Sequence[Contestant], device: Target, caps: Caps, strict: bool, threads: int, engine: str,
    rounds: int, seconds: float, stack: contextlib.ExitStack,
) -> tuple[dict[str, float], float]:  # fmt: skip
    """The best milliseconds of each contestant, and the peak in GFLOP/s: the highest that was measured between the turns,
    by native code and, where another engine runs the bundle, by a module in it (which may fall short of the machine)."""
    program = peak.program(*_peak_settings(caps, strict))
    module, inside = None, None
    if caps.strategy == "cpu" and HOST in host_files(device.name):
        module = one_kernel.peak(_folder(stack) / "peak", device, replace(caps, fma=caps.fma and not strict))
        inside = _in_engine(_PEAK, _kernel_spec(module, threads), device, engine, stack)
    best: dict[str, float] = {}
    highest = 0.0
    for _ in range(rounds):
        highest = max(highest, peak.measure(program, threads, _PEAK_SECONDS))
        if module and inside:
            highest = max(highest, module.flops / inside.turn(_PEAK_SECONDS) / 1e6)
        for contestant in contestants:
            time.sleep(_PAUSE)
            best[contestant.name] = min(contestant.turn(seconds), best.get(contestant.name, float("inf")))
    return best, highest


def _kernel_spec(made: one_kernel.OneKernel, threads: int) -> dict[str, Any]:
    return {"bundle": str(made.folder.resolve()), "function": made.function, "threads": threads}


def _folder(stack: contextlib.ExitStack) -> Path:
    """A folder that goes with the context."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory()))


def _in_engine(name: str, spec: Mapping[str, Any], device: Target, engine: str, stack: contextlib.ExitStack) -> Contestant:
    """Our contestant, a session or one function, built and warmed up in this process's engine or in Node.

    Raises UserError where Node is wanted and missing, or does not run the target."""
    command = None
    if engine == NODE:
        if HOST not in host_files(device.name):
            raise UserError(f"Node does not run target {device.name}", hint="--engine node is for wasm32 and wasm64")
        command = [find_node(), str(Path(__file__).with_name("rival.mjs"))]
    contestant = stack.enter_context(Contestant(name, os.environ, command))
    contestant.build({**spec, "name": "function" if "function" in spec else OURS})
    return contestant


def notes(config: ModelConfig, caps: Caps, strict: bool, threads: int) -> Iterator[str]:
    """What keeps this model on this profile from its fast path, for a person to read."""
    best = PROFILES["native"]
    if caps.strategy != "cpu":
        yield "peak_gflops is the processor's, not the graphics adapter's"
    if caps.strategy == "cpu" and caps.name == "baseline" and caps.lanes < best.lanes:
        yield f"profile baseline has {caps.lanes} lanes, this processor {best.lanes}; --set profile=native is faster"
    if strict:
        yield "--strict: no fused multiply-add, so at most half of an FMA peak"
    elif not caps.fma:
        yield f"profile {caps.name} has no fused multiply-add"
    if caps.strategy == "cpu" and threads > caps.threads:
        yield f"{threads} threads on a profile made for {caps.threads}"
    widths = {
        "d_model": config.d_model,
        "d_mlp": config.d_mlp,
        "vocab_size": config.vocab_size,
        "head width": config.head_width,
    }
    for name, width in widths.items():
        if caps.strategy == "cpu" and width % caps.lanes:
            rest = width % caps.lanes
            yield f"{name} {width} is not a multiple of {caps.lanes} lanes: the last {rest} are computed one by one"


def _peak_settings(caps: Caps, strict: bool) -> tuple[int, list[str]]:
    """Lanes and flags of the peak: a C++ profile's own; for other CPU-like targets their lanes on this processor."""
    native = PROFILES["native"]
    if caps.strategy != "cpu":
        return native.lanes, compile_flags(native, strict)
    if caps.name in PROFILES:
        return caps.lanes, compile_flags(caps, strict)
    return caps.lanes, compile_flags(replace(native, lanes=caps.lanes), strict or not caps.fma)


def _started(
    names: Sequence[str], spec: Mapping[str, Any], stack: contextlib.ExitStack, say: Say
) -> Iterator[Contestant]:
    """The contestants that can run here, built and warmed up."""
    for name in names:
        environment = dict(os.environ)
        if name.endswith(PRELOADED):
            reason = _cannot_preload()
            if reason:
                say(f"{name} is left out: {reason}")
                continue
            library = compiled(_VENDOR_CHECK, ["-shared", "-fPIC", "-O1"], ".so")
            environment["LD_PRELOAD"] = f"{library}:{environment.get('LD_PRELOAD', '')}".rstrip(":")
        contestant = stack.enter_context(Contestant(name, environment))
        reason = contestant.build({**spec, "name": name.removesuffix(PRELOADED)})
        if reason:
            say(f"{name} is left out: {reason}")
        else:
            yield contestant


def _cannot_preload() -> str:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "MKL's AVX-512 path exists on Linux on x86-64 only"
    return "" if "avx512f" in processor()[0] else "this processor has no AVX-512"


class Contestant:
    """A process of rivals.py, or of another program that speaks like it. Ends when the context does."""

    def __init__(self, name: str, environment: Mapping[str, str], command: Sequence[str] | None = None) -> None:
        self.name = name
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            command or [sys.executable, "-m", "tinygpt.rivals"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={
                **environment,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)]),
            },
        )

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def build(self, spec: Mapping[str, Any]) -> str:
        """Build and warm up. Returns why the rival cannot run here, or nothing."""
        return str(self._ask(spec).get("unavailable", ""))

    def turn(self, seconds: float) -> float:
        """Time steps for so long; milliseconds of the best one, on a GPU those a step of the best group."""
        return float(min(self._ask({"seconds": seconds})["ms"]))

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.communicate()
        self._complaints.seek(0)
        complaint = self._complaints.read().strip().splitlines()
        last = complaint[-1] if complaint else f"exit status {self._process.returncode}"
        if self.name in (OURS, _PEAK):
            raise CompilerBug(f"the timed session ended: {last}")
        return {"unavailable": f"it ended with: {last}"} if "name" in request else {"ms": [float("inf")]}
