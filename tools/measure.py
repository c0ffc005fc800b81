"""Measures, and writes what it measured into the tables of docs/performance.md: when, where, and beside which peak.

    python tools/measure.py speed tiny small --threads 2        training steps beside PyTorch's and JAX's
    python tools/measure.py speed tiny small --target wasm32 --engine node
    python tools/measure.py matmul 512 1024                     products alone, on every CPU target and engine
    python tools/measure.py parity tiny small medium            losses and gradients beside PyTorch's
    python tools/measure.py memory                              what each preset takes, planned and measured
    python tools/measure.py capacity                            the largest model in WebAssembly, saved and resumed; xl in a browser
    python tools/measure.py gpu small medium                    WebGPU beside PyTorch on CUDA: steps, then kernels
    python tools/measure.py curve small medium large xl         WebGPU beside our own WebAssembly on the same host
    python tools/measure.py learning                            1500 steps of small on TinyShakespeare
    python tools/measure.py learning huge --target wgsl --steps 5000

Everything is measured through the command line or the public API, in processes of their own. Keep the machine quiet."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import doc_tables

from tinygpt.presets import PRESETS, find
from tinygpt.runtime import bundle as bundles
from tinygpt.toolchain import find_node

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
RECORDS = ROOT / "build" / "measured"
GPT2 = ROOT / "examples" / "gpt2-124m.json"  # measured at batch 4
CUDA_RIVALS = ("torch.cuda", "torch.cuda.compile", "torch.cuda.graph")
RIVALS = ("torch", "torch.compile", "torch+avx512", "torch.compile+avx512", "jax")
MIB = 1 << 20
MOST_OF_PEAK = 1.05  # the peak is measured too
GB = 10**9
MOST_THREADS = 16  # of WebAssembly in `curve`
LARGEST, IN_BROWSER, BROWSER_STEPS = "behemoth", "xl", 20  # what `capacity` trains

# Run with a bundle's folder: bytes that a session and two training steps add to a process that has loaded the bundle.
_SESSION_BYTES = """
import resource, sys
import numpy as np
import tinygpt as tg
bundle = tg.load(sys.argv[1])
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
session = bundle.session(threads=2)
shape = (bundle.manifest.batch, bundle.manifest.context)
for _ in range(2):
    session.train_step(np.zeros(shape, np.uint8), np.ones(shape, np.uint8))
print(resident() - before)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "matmul", "parity", "memory", "capacity", "learning", "gpu", "curve"))
    parser.add_argument("presets", nargs="*", metavar="PRESET|N", help="presets; for matmul, sizes (512 1024 if left out)")
    parser.add_argument("--target", default="cpp")
    parser.add_argument("--engine", choices=("node", "wasmtime"), help="of speed: what runs WebAssembly (default: wasmtime)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500, help="of learning")
    parser.add_argument("--rounds", type=int, default=2, help="of gpu and curve: turns that each contestant gets")
    parser.add_argument("--profile", default="adapter", help="of gpu and curve: what to compile for")
    parser.add_argument("--against", help="of speed and gpu: the rivals, with commas (default: beside C++ all on a processor, beside WebAssembly none, on a GPU all on CUDA)")
    parser.add_argument("--data", help="a text; TinyShakespeare if left out")
    options = parser.parse_args()
    if options.what in ("gpu", "curve"):  # each row once it is measured: time on a GPU may end before the last
        for table in (gpu_steps if options.what == "gpu" else curve)(options):
            write("gpu-steps" if options.what == "gpu" else "curve", table, where=graphics())
        if options.what == "gpu":
            write("gpu-kernels", gpu_kernels(), where=graphics())
        return
    measured: dict[str, Callable[[argparse.Namespace], str]] = {
        "speed": speed, "matmul": matmul, "parity": parity, "memory": memory, "capacity": capacity, "learning": learning,
    }  # fmt: skip
    suffix = f"-{options.target}{f'-{options.engine}' if options.engine else ''}-{options.threads}" if options.what == "speed" else ""
    suffix += f"-{options.presets[0]}-{options.target}" if options.what == "learning" and options.presets else ""
    write(options.what + suffix, measured[options.what](options))


def speed(options: argparse.Namespace) -> str:
    """A row for each preset: ours, each rival, the ratios, and the share of the FMA peak."""
    against = options.against or (",".join(RIVALS) if options.target == "cpp" else "none")
    command = ["bench", "--target", options.target, "--threads", str(options.threads), "--against", against, "--json"]
    command += ["--engine", options.engine] if options.engine else []
    rows = list(records("speed", [[*command, preset] for preset in options.presets or ("tiny", "small")]))
    shown = [name for name in RIVALS if any(name in row["rivals"] for row in rows)]
    heads = ("preset", "ms", "tokens/s", "GFLOP/s", "of the peak", *(f"{name}, ms" for name in shown), *(f"× {name}" for name in shown))
    cells = [
        (
            row["config"], f"{row['ms']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['gflops']:.0f}",
            share_of_peak(row),
            *(f"{row['rivals'][name]:.2f}" if name in row["rivals"] else "" for name in shown),
            *(f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in shown),
        )
        for row in rows
    ]  # fmt: skip
    if options.target == "cpp":
        write("summary", summary(rows, options.threads), README)
    notes = "".join(f"- {row['config']}: {note}\n" for row in rows for note in row.get("notes", ()))
    return doc_tables.table(heads, cells) + (f"\n{notes}" if notes else "")


def share_of_peak(row: dict[str, Any]) -> str:
    """The share of the measured peak. Ends the program where more than that was reached: a core was busy while it was measured."""
    if row["gflops"] > MOST_OF_PEAK * row["peak_gflops"]:
        raise SystemExit(f"{row['gflops']} GFLOP/s beside a peak of {row['peak_gflops']}: the machine was busy, measure again")
    return f"{row['gflops'] / row['peak_gflops']:.0%} of {row['peak_gflops']:.0f}"


def summary(rows: Sequence[dict[str, Any]], threads: int) -> str:
    """The ratios that a newcomer asks for: to the best of each family of rivals."""
    families = {"PyTorch": ("torch", "torch.compile"), "PyTorch, AVX-512 enabled": ("torch+avx512", "torch.compile+avx512"), "JAX": ("jax",)}
    shown = {head: names for head, names in families.items() if any(name in row["rivals"] for row in rows for name in names)}
    cells = []
    for row in rows:
        best = [min((row["ratios"][name] for name in names if name in row["ratios"]), default=0.0) for names in shown.values()]
        cells.append((row["config"], f"{row['ms']:.2f} ms", f"{row['gflops'] / row['peak_gflops']:.0%}", *(f"{ratio:.2f}×" if ratio else "" for ratio in best)))
    heads = ("preset", f"a training step on {threads} threads", "of the FMA peak", *(f"faster than {head}" for head in shown))
    return doc_tables.table(heads, cells)


def matmul(options: argparse.Namespace) -> str:
    """A row for each CPU target, engine, number of threads and size: one product, packing included, beside the peak."""
    sizes = ",".join(options.presets) or "512,1024"
    contestants = [("cpp", ())] + [(target, ("--engine", engine)) for target in ("wasm32", "wasm64") for engine in ("node", "wasmtime")]
    cells = []
    for (target, engine), threads in itertools.product(contestants, (1, 2)):
        command = ["bench", "--matmul", sizes, "--target", target, *engine, "--threads", str(threads), "--json"]
        for row in map(json.loads, printed("matmul", command)):
            cells.append((target, "".join(engine[1:]), threads, f"{row['matmul']}³", f"{row['ms']:.2f}", f"{row['gflops']:.0f}", share_of_peak(row)))
    return doc_tables.table(("target", "engine", "threads", "size", "ms", "GFLOP/s", "of the peak"), cells)


def parity(options: argparse.Namespace) -> str:
    """A row for each preset: the largest differences over 50 steps."""
    data = ["--data", options.data] if options.data else []
    command = ["parity", "--target", options.target, "--threads", str(options.threads), "--json", *data]
    presets = options.presets or ("tiny", "small", "medium")
    rows = records("parity", [[*command, preset] for preset in presets])
    cells = [(preset, options.target, f"{row['max_loss_diff']:.1e}", f"{row['max_grad_err']:.1e}") for preset, row in zip(presets, rows, strict=True)]
    return doc_tables.table(("preset", "target", "largest difference of a loss", "largest relative error of a gradient"), cells)


def memory(options: argparse.Namespace) -> str:
    """A row for each preset: planned pools, and what a session adds to a process. The largest models must fit here."""
    cells = []
    for name in options.presets or PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            tinygpt("compile", name, "--target", options.target, "--out", folder)
            manifest = json.loads((Path(folder) / "manifest.json").read_text())
            pools, plan = manifest["pools"], manifest["memory"]
            total = sum(pools.values())
            measured = "more than there is here" if total > 0.9 * available_bytes() else f"{session_bytes(folder) / MIB:,.0f}"
        sizes = (pools["state"], total - pools["state"], plan["work_live"], plan["work_without_reuse"], total)
        cells.append((name, *(f"{size / MIB:,.1f}" for size in sizes), measured))
        print(*cells[-1], sep="\t", flush=True)
    heads = ("preset", "weights and moments", "work", "alive at the peak", "work without reuse", "in all", "measured")
    return "Mebibytes.\n\n" + doc_tables.table(heads, cells)


def capacity(options: argparse.Namespace) -> str:
    """The largest preset on wasm64, an engine at a time; its refusal on wasm32; xl in a browser beside Node. Ends the
    program where a loss does not fall, where resuming or another engine changes a bit, or where memory is short."""
    rows, curves = [], []
    RECORDS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=RECORDS) as folder:  # checkpoints of several GB: not where /tmp may be memory
        for engine in ("node", "wasmtime"):
            steps, cells = trained_and_resumed(Path(folder), engine, options.threads)
            rows.append(cells)
            curves.append(steps)
            print(*cells, sep="\t", flush=True)
        if curves[0] != curves[1]:
            raise SystemExit(f"{LARGEST} has other losses in Node than in wasmtime: {curves}")
        page = browser_losses(Path(folder), options.threads)
    heads = ("engine", "loss of the three steps", "seconds a step", "checkpoint, GB", "step 3 after saving and resuming")
    trained = f"{LARGEST} on wasm64, {options.threads} threads, one fixed batch, learning rate 1e-4; the losses of both engines are equal to the bit:"
    browser = (
        f"{IN_BROWSER} on wasm64 in headless Chromium, {options.threads} threads: {BROWSER_STEPS} steps, loss {page[0]:.4f} to {page[-1]:.4f}, "
        "every one equal to Node's to the bit."
    )
    return f"{trained}\n\n{doc_tables.table(heads, rows)}\nCompiled for wasm32: *{refusal()}*\n\n{browser}\n"


def trained_and_resumed(folder: Path, engine: str, threads: int) -> tuple[list[tuple[float, float]], tuple[str, ...]]:
    """Three steps in one run; two, a checkpoint, and the third of a run that resumes it. Loss and norm of the three
    steps, and a row of the table."""
    bundle, saved = folder / engine, folder / f"{engine}.safetensors"
    tinygpt("compile", LARGEST, "--target", "wasm64", "--set", f"engine={'v8' if engine == 'node' else engine}", "--out", str(bundle))
    pools = json.loads((bundle / "manifest.json").read_text())["pools"]
    batch, context = find(LARGEST).shape(None, None)
    corpus = folder / "corpus.txt"
    corpus.write_bytes(one_window(context))

    def run(*more: str) -> list[dict[str, Any]]:
        copies = 2 if engine == "wasmtime" else 0  # of the state, while Python saves it; Node streams
        require_memory(sum(pools.values()) + copies * pools["state"] + GB)
        metrics = folder / "metrics.jsonl"
        train(engine, bundle, corpus, "--lr", "1e-4", "--threads", str(threads), "--metrics", str(metrics), *more)
        return [json.loads(line) for line in metrics.read_text().splitlines()]

    whole = run("--steps", "3", "--out", str(folder / "unused.safetensors"))
    (folder / "unused.safetensors").unlink()
    run("--steps", "2", "--out", str(saved))
    size = saved.stat().st_size
    resumed = run("--steps", "3", "--resume", str(saved), "--out", str(saved))
    saved.unlink()
    steps = [(row["loss"], row["grad_norm"]) for row in whole]
    if not steps[0][0] > steps[1][0] > steps[2][0]:
        raise SystemExit(f"{LARGEST} in {engine}: the loss does not fall: {steps}")
    if (resumed[-1]["step"], resumed[-1]["loss"], resumed[-1]["grad_norm"]) != (3, *steps[2]):
        raise SystemExit(f"{LARGEST} in {engine}: step 3 is {steps[2]}, after resuming {resumed[-1]}")
    seconds = min(batch * context / row["tokens_per_s"] for row in whole)
    losses = ", ".join(f"{loss:.4f}" for loss, _ in steps)
    return steps, (engine_version(engine), losses, f"{seconds:.1f}", f"{size / GB:.2f}", "the same bits")


def one_window(context: int) -> bytes:
    """A corpus whose training part, nine tenths, has room for one window: every batch is that window. The bytes count up:
    of random bytes or of prose, AdamW's first steps, which are as large as lr lets them be, overshoot at this width."""
    return bytes(i % 256 for i in range(-(-10 * (context + 1) // 9)))


def train(engine: str, bundle: Path, corpus: Path, *more: str) -> None:
    """Train a bundle without evaluations, in Node by its own program or in wasmtime by ours."""
    if engine == "wasmtime":
        tinygpt("train", str(bundle), "--data", str(corpus), "--eval-every", "0", *more)
        return
    done = subprocess.run([find_node(), str(bundle / "host" / "train.mjs"), str(corpus), "--tokens", "0", *more], check=False)
    if done.returncode:
        raise SystemExit(f"training {bundle.name} in Node ended with status {done.returncode}")


def engine_version(engine: str) -> str:
    from importlib.metadata import version

    if engine == "wasmtime":
        return f"wasmtime {version('wasmtime')}"
    return f"Node {subprocess.run([find_node(), '--version'], capture_output=True, text=True, check=True).stdout.strip()}"


def require_memory(needed: int) -> None:
    if available_bytes() < needed:
        raise SystemExit(f"the run needs {needed / GB:.1f} GB of memory, {available_bytes() / GB:.1f} are free: end other programs first")


def refusal() -> str:
    """What compiling the largest preset for wasm32 says: how many bytes it needs, and a target that has them."""
    done = subprocess.run(
        [sys.executable, "-m", "tinygpt", "compile", LARGEST, "--target", "wasm32", "--plan-only"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = " ".join(done.stderr.split())
    if done.returncode != 2 or not re.search(r"needs [\d,]+ bytes", said) or "wasm64" not in said:
        raise SystemExit(f"{LARGEST} for wasm32 ended with status {done.returncode}: {said}")
    return said


def browser_losses(folder: Path, threads: int) -> list[float]:
    """The losses of a page that trains in headless Chromium, which must be those of Node on the same text."""
    sys.path.append(str(ROOT))
    from tests.chromium import page_result

    bundle, metrics = folder / IN_BROWSER, folder / "metrics.jsonl"
    tinygpt("compile", IN_BROWSER, "--target", "wasm64", "--out", str(bundle))
    page = page_result(bundles.load(bundle), f"steps={BROWSER_STEPS}&threads={threads}", folder / "profile", timeout=600)
    if page["error"] or page["threads"] != threads:
        raise SystemExit(f"{IN_BROWSER} in Chromium: {page['error'] or page['threads']}")
    corpus = folder / "page.txt"
    corpus.write_bytes(bytes(page["corpus"]))
    train("node", bundle, corpus, "--steps", str(BROWSER_STEPS), "--threads", str(threads), "--metrics", str(metrics))
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    if page["losses"] != losses or len(losses) != BROWSER_STEPS:
        raise SystemExit(f"{IN_BROWSER}: Chromium's losses are {page['losses']}, Node's {losses}")
    return losses


def gpu_steps(options: argparse.Namespace) -> Iterator[str]:
    """A row for each preset: a whole training step on WebGPU, and PyTorch's on CUDA in the same minutes. Gives the table
    again with each row."""
    command = ["bench", "--target", "wgsl", "--set", f"profile={options.profile}", "--against", options.against or ",".join(CUDA_RIVALS), "--rounds", str(options.rounds), "--json"]
    contestants = options.presets or ("tiny", "small", "medium", "large", "xl", "huge", "massive", "mega", str(GPT2))
    rows: list[dict[str, Any]] = []
    for row in records("gpu", [[*command, *(("--batch", "4") if Path(name).resolve() == GPT2 else ()), name] for name in contestants]):
        rows.append(row)
        shown = [name for name in CUDA_RIVALS if any(name in row["rivals"] for row in rows)]
        cells = [
            (Path(name).stem, f"{row['ms']:.3f}", f"{row['gflops'] / 1e3:.2f}", *(f"{row['rivals'][n]:.3f} ({row['ratios'][n]:.2f}×)" if n in row["rivals"] else "" for n in shown))
            for name, row in zip(contestants, rows, strict=False)
        ]  # fmt: skip
        heads = ("preset", "WebGPU, ms", "TFLOP/s", *(f"{n}, ms (its time over ours)" for n in shown))
        yield f"Profile `{options.profile}`.\n\n" + doc_tables.table(heads, cells)


def curve(options: argparse.Namespace) -> Iterator[str]:
    """A row for each preset: a training step on WebGPU, one in WebAssembly on the processor of the same machine, the ratio.
    WebAssembly runs on half of the cores and on all, the faster counts. Gives the table again with each row."""
    cores = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    counts = sorted({-(-cores // 2), cores})
    command = ["bench", "--against", "none", "--rounds", str(options.rounds), "--json"]
    cells = []
    for preset in options.presets or ("small", "medium", "large", "xl"):
        places = [["--target", "wgsl", "--set", f"profile={options.profile}"], *(["--target", "wasm32", "--threads", str(n)] for n in counts)]
        gpu, *found = records("curve", [[*command, *place, preset] for place in places])
        wasm = min(found, key=lambda row: float(row["ms"]))
        cells.append((gpu["config"], f"{gpu['ms']:.2f}", f"{wasm['ms']:.2f}", wasm["threads"], f"{wasm['ms'] / gpu['ms']:.1f}×"))
        table = doc_tables.table(("preset", "WebGPU, ms", "WebAssembly, ms", "its threads", "faster by"), cells)
        yield f"WebAssembly: wasm32 in wasmtime, on the better of {' and '.join(map(str, counts))} threads; WebGPU: profile `{options.profile}`; {processor()}.\n\n{table}"


def gpu_kernels() -> str:
    """A row for each product and each attention, by slope, and PyTorch's time for the same where it has CUDA."""
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "gpu_kernels.py")], stdout=subprocess.PIPE, text=True, env=surroundings(), check=True)
    cells = []
    for row in map(json.loads, done.stdout.splitlines()):
        rate = f"{row['flops'] / row['seconds'] / 1e12:.1f}" if "flops" in row else ""
        rival = (f"{row['rival'] * 1e6:.1f}", f"{row['rival'] / row['seconds']:.0%}") if "rival" in row else ("", "")
        cells.append((row["what"], "×".join(map(str, row["shape"])), f"{row['seconds'] * 1e6:.1f}", rate, *rival))
    return doc_tables.table(("what", "shape", "WebGPU, µs", "TFLOP/s", "PyTorch on CUDA, µs", "our speed over its"), cells)


def learning(options: argparse.Namespace) -> str:
    """The losses of a run at the default settings, how long it took, and what the model writes afterwards."""
    preset, steps = (options.presets or ["small"])[0], options.steps
    with tempfile.TemporaryDirectory() as folder:
        metrics, checkpoint = Path(folder) / "metrics.jsonl", f"{folder}/{preset}.safetensors"
        data = ["--data", options.data] if options.data else []
        place = ["--target", options.target] + (["--threads", str(options.threads)] if options.target != "wgsl" else [])
        began = time.perf_counter()
        tinygpt("train", preset, *place, "--steps", str(steps), "--eval-every", str(steps // 6), "--out", checkpoint, "--metrics", str(metrics), *data)
        took = time.perf_counter() - began
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        samples = [tinygpt("generate", checkpoint, *place, "--prompt", "ROMEO:", "--tokens", "240", "--seed", str(seed)) for seed in range(1, 4)]
    cells = [(row["step"], f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}") for row in rows if "val_loss" in row]
    shown = "".join(f"\n```\n{sample.strip()}\n```\n" for sample in samples)
    table = doc_tables.table(("step", "training", "validation"), cells)
    return f"{took:.0f} seconds in all, compiling and evaluating included.\n\n{table}\n\nThree samples, seeds 1 to 3:\n{shown}"


def records(what: str, commands: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    """The JSON object that each command prints last."""
    for command in commands:
        yield json.loads(printed(what, command)[-1])


def printed(what: str, command: Sequence[str]) -> list[str]:
    """The lines that a command prints; kept in build/measured as well."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    lines = tinygpt(*command).strip().splitlines()
    print(*lines, sep="\n", flush=True)
    with (RECORDS / f"{what}.jsonl").open("a") as kept:
        kept.writelines(f"{line}\n" for line in lines)
    return lines


def tinygpt(*arguments: str) -> str:
    """Run the command line; its standard output. Ends the program where it fails."""
    done = subprocess.run([sys.executable, "-m", "tinygpt", *arguments], stdout=subprocess.PIPE, text=True, env=surroundings(), check=False)
    if done.returncode:
        raise SystemExit(f"tinygpt {' '.join(arguments)} ended with status {done.returncode}")
    return done.stdout


def surroundings() -> dict[str, str]:
    """The environment in which this checkout's package is the one that is imported."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


def session_bytes(folder: str) -> int:
    done = subprocess.run([sys.executable, "-c", _SESSION_BYTES, folder], stdout=subprocess.PIPE, text=True, env=surroundings(), check=True)
    return int(done.stdout)


def available_bytes() -> int:
    """Memory that programs can still have, by what Linux says."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def write(name: str, content: str, page: Path = PAGE, where: str = "") -> None:
    """Put a table into its place on a page, under a line that says when and where it was measured."""
    text = page.read_text()
    start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
    if start not in text:
        text = text.rstrip() + f"\n\n## {name}\n\n{start}{end}\n"
    before, _, after = text.partition(start)
    _, _, after = after.partition(end)
    page.write_text(f"{before}{start}\n{where or circumstances()}\n\n{content}\n{end}{after}")
    print(f"wrote {name} into {page.relative_to(ROOT)}")


def graphics() -> str:
    """As `circumstances`, of the graphics adapter."""
    from importlib.metadata import version

    import wgpu

    from tinygpt.runtime.gpu import adapters

    info = adapters(wgpu, "measure")[0].info
    return f"*{datetime.date.today()}, {info['device']}, {info['backend_type']} driver {info['description']}, wgpu {version('wgpu')}, PyTorch {version('torch')}*"


def circumstances() -> str:
    """When, on what, by what: the first line above a table."""
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()
    compiler = subprocess.run([os.environ.get("CXX", "g++"), "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
    return f"*{datetime.date.today()}, commit {commit}, {processor()}, g++ {compiler}, PyTorch {version('torch')}*"


def processor() -> str:
    """How many cores of what this process may use."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo)
    return f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else platform.processor() or platform.machine()}"


if __name__ == "__main__":
    main()
