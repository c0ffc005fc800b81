"""bench, parity, profile, and the peak they stand beside."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tinygpt.targets.cpp import PROFILES
from tinygpt.targets.cpp.build import compile_flags

from tests.cli import CONFIG, SHAPE, CommandLine
from tests.node import require_node
from tinygpt import bench, compiler, one_kernel, peak, rivals
from tinygpt.config import ModelConfig
from tinygpt.profiling import flops_by_hash
from tinygpt.regeneration import product_flops, regenerate
from tinygpt.runtime.bundle import load
from tinygpt.runtime.engine import open_engine


@pytest.fixture
def tinygpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    return CommandLine(tmp_path, capsys)


SHORT = ("--rounds", "1", "--seconds", "0.02", "--threads", "1")


def test_bench_prints_the_json_object_of_the_contract(tinygpt: CommandLine) -> None:
    done = tinygpt("bench", "mini.json", *SHAPE, *SHORT, "--against", "torch", "--json")
    assert done.status == 0, done.err
    (line,) = done.out.splitlines()
    row = json.loads(line)
    assert (row["config"], row["target"], row["threads"]) == ("mini", "cpp", 1)
    assert row["tokens_per_s"] == pytest.approx(16 / row["ms"] * 1e3, rel=5e-3)  # ms is rounded
    flops = ModelConfig(**CONFIG).flops_per_step(2, 8)
    assert row["gflops"] == pytest.approx(flops / row["ms"] / 1e6, rel=0.05, abs=0.01)
    assert row["gflops"] > 0 and row["peak_gflops"] > 0
    assert row["ratios"]["torch"] == pytest.approx(row["rivals"]["torch"] / row["ms"], rel=0.01)


def test_bench_leaves_out_what_is_not_installed_and_says_so(
    tinygpt: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tinygpt.folder / "jax.py").write_text("raise ImportError('no jax here')\n")
    monkeypatch.syspath_prepend(str(tinygpt.folder))
    done = tinygpt("bench", "mini.json", *SHAPE, *SHORT, "--against", "jax", "--json")
    assert "jax is left out: JAX cannot be imported" in done.err
    row = json.loads(done.out)
    assert row["rivals"] == row["ratios"] == {} and row["ms"] > 0


def test_bench_notes_name_what_lacks_its_fast_path() -> None:
    native = PROFILES["native"]
    ragged = ModelConfig(**{**CONFIG, "d_model": 50, "n_heads": 5, "vocab_size": 99})
    notes = " ".join(bench.notes(ragged, native, strict=True, threads=1))
    assert "d_model 50" in notes and "vocab_size 99" in notes and "head width 10" in notes and "--strict" in notes
    slow = " ".join(bench.notes(ragged, PROFILES["baseline"], strict=False, threads=1))
    assert "no fused multiply-add" in slow and ("profile baseline" in slow) is (native.lanes > 4)
    even = ModelConfig(d_model=128, n_heads=2)
    assert not list(bench.notes(even, native, strict=False, threads=1)) or not native.fma


class Device:
    """A clock, and a device that takes `step(number)` seconds for a step the host begins in `host` seconds. It has
    waited for the host `idle` seconds in all; `read` are the numbers of the steps whose loss was read."""

    def __init__(self, host: float, step: Callable[[int], float]) -> None:
        self.host, self.step = host, step
        self.now = self.free = self.idle = 0.0
        self.begun = 0
        self.read: list[int] = []

    def perf_counter(self) -> float:
        return self.now

    def begin(self) -> Callable[[], float]:
        number, self.begun = self.begun, self.begun + 1
        self.now += self.host
        self.idle += max(0.0, self.now - self.free)
        self.free = done = max(self.now, self.free) + self.step(number)

        def wait() -> float:
            self.now = max(self.now, done)
            self.read.append(number)
            return 0.0

        return wait


def test_steps_in_flight_are_timed_by_the_slower_of_host_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, step, expected in ((0.0003, 0.0006, 0.6), (0.0009, 0.0006, 0.9)):
        device = Device(host, lambda number: step)
        monkeypatch.setattr(rivals, "time", device)
        found = rivals.timed(rivals.Steps(device.begin, overlap=True), 0.5)
        assert found == pytest.approx([expected] * len(found), rel=0.02) and 9 <= len(found) <= 10  # groups of 50 ms
        assert device.read == list(range(device.begun))  # every loss, in order


def test_steps_in_flight_that_finish_in_bunches_are_not_taken_for_fast_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0.0001, lambda number: 0.0011 if number % 2 else 0.0001)
    monkeypatch.setattr(rivals, "time", device)
    found = rivals.timed(rivals.Steps(device.begin, overlap=True), 0.5)
    assert found == pytest.approx([0.6] * len(found), rel=0.03)


@pytest.mark.parametrize(("ms", "every"), [(0.6, 371), (5.0, 37), (15.0, 37), (60.0, 37)])
def test_a_host_that_is_held_up_makes_no_step_faster(ms: float, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is read late leaves less to wait for at the next one."""
    device = Device(0.0003, lambda number: ms / 1e3)
    monkeypatch.setattr(rivals, "time", device)

    def begin() -> Callable[[], float]:
        wait = device.begin()

        def late() -> float:
            if device.begun % every == 5:
                device.now += 0.02
            return wait()

        return late

    found = rivals.timed(rivals.Steps(begin, overlap=True), 5.0)
    assert min(found) >= ms and min(found) == pytest.approx(ms, rel=0.03)


def test_steps_on_a_processor_are_timed_one_by_one_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0.0003, lambda number: 0.0006 + 0.0001 * (number % 2))
    monkeypatch.setattr(rivals, "time", device)
    found = rivals.timed(rivals.Steps(device.begin), 0.01)
    assert found == pytest.approx([0.9, 1.0] * 5 + [0.9], rel=1e-6) or found == pytest.approx([0.9, 1.0] * 5 + [0.9, 1.0])
    assert device.read == list(range(device.begun))


def test_unknown_rivals_are_refused(tinygpt: CommandLine) -> None:
    assert "nearest is 'torch'" in tinygpt.refused("bench", "mini.json", "--against", "tonch")


def test_jax_computes_the_same_loss_as_pytorch() -> None:
    jax = pytest.importorskip("jax")
    import torch

    from tinygpt.jax_model import initial_state, loss, train_step
    from tinygpt.model import TinyGPT

    config = ModelConfig(**CONFIG)
    state = initial_state(config)
    model = TinyGPT(config)
    names = {
        "q": "attn.q_proj",
        "k": "attn.k_proj",
        "v": "attn.v_proj",
        "o": "attn.o_proj",
        "in": "mlp.fc_in",
        "out": "mlp.fc_out",
    }
    weights = {"token_embedding.weight": state[0]["tokens"], "position_embedding.weight": state[0]["positions"]}
    for short, long in names.items():
        weights |= {
            f"blocks.0.{long}.weight": state[0][f"0.{short}"].T,
            f"blocks.0.{long}.bias": state[0][f"0.{short}.bias"],
        }
    for short, long in {"0.ln1": "blocks.0.ln1", "0.ln2": "blocks.0.ln2", "final": "ln_final"}.items():
        weights |= {f"{long}.weight": state[0][f"{short}.gain"], f"{long}.bias": state[0][f"{short}.shift"]}
    model.load_state_dict({name: torch.tensor(np.asarray(w)) for name, w in weights.items()})
    tokens = np.arange(16).reshape(2, 8)
    _, expected = model(torch.tensor(tokens), torch.tensor(tokens))
    assert float(loss(state[0], tokens, tokens, config)) == pytest.approx(float(expected), abs=1e-5)
    training = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0}
    later, value = jax.jit(lambda s: train_step(s, tokens, tokens, config, training))(state)
    assert float(value) == pytest.approx(float(expected), abs=1e-5)
    assert float(loss(later[0], tokens, tokens, config)) < float(value)


def test_parity_with_pytorch_is_close_and_prints_the_contract(tinygpt: CommandLine) -> None:
    arguments = ("parity", "mini.json", *SHAPE, "--data", "text.txt", "--threads", "1", "--steps", "5")
    row = json.loads(tinygpt.works(*arguments, "--json"))
    assert row["max_loss_diff"] <= 1e-5 and row["max_grad_err"] <= 1e-5
    assert (row["config"], row["target"], row["steps"]) == ("mini", "cpp", 5)
    assert "drops out at random" in tinygpt.refused(*arguments, "--set", "dropout=0.1")


def test_profile_names_kernels_with_their_share_and_speed(tinygpt: CommandLine) -> None:
    tinygpt.works("compile", "mini.json", "--out", "b", *SHAPE)
    text = tinygpt.works("profile", "b", "--threads", "1", "--runs", "3")
    assert " ms on 1 thread" in text
    assert "GFLOP/s" in text and "k2_matmul" in text and "matmul add" in text and "waiting" in text
    done = regenerate(tinygpt.folder / "b")
    flops = flops_by_hash(done)
    step = done.compilation.plan.entries["train_step"]
    hashes = {name: record["hash"] for name, record in done.compilation.manifest["kernels"].items()}
    counted = sum(flops[hashes[launch.kernel]] for launch in step.launches)
    config = ModelConfig(**CONFIG)
    assert config.flops_per_step(2, 8) <= counted <= 2 * config.flops_per_step(2, 8)


def test_product_flops_count_a_matmul_exactly() -> None:
    done = compiler.lower(compiler.module_for(CONFIG, 2, 8), *compiler.device_for("cpp", {}))
    tiles = next(stage for stage in done.stages if stage.level == "tile").module.kernels
    kernel = next(k for k in tiles.values() if k.of == "matmul add gelu" and k.params[0].type.size == 16 * 24)
    assert product_flops(kernel) == 2 * 16 * 24 * 96
    assert product_flops(next(k for k in tiles.values() if k.of == "layer_norm")) == 0


def test_the_peak_is_that_of_the_profile() -> None:
    native = PROFILES["native"]
    wide = peak.measure(peak.program(native.lanes, compile_flags(native, False)), 1, 0.05)
    narrow = peak.measure(peak.program(4, compile_flags(PROFILES["baseline"], True)), 1, 0.05)
    assert wide > 0 and narrow > 0


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="MKL runs on x86-64 only")
def test_the_vendor_check_is_a_library_that_says_yes() -> None:
    import ctypes

    library = ctypes.CDLL(str(bench.compiled(bench._VENDOR_CHECK, ["-shared", "-fPIC", "-O1"], ".so")))
    assert library.mkl_serv_intel_cpu_true() == 1 and library.mkl_serv_intel_cpu() == 1


@pytest.mark.parametrize(("target", "engine"), [("cpp", ()), ("wasm32", ()), ("wasm64", ("--engine", "node"))])
def test_a_product_alone_is_timed_beside_the_peak(tinygpt: CommandLine, target: str, engine: tuple[str, ...]) -> None:
    if engine:
        require_node()
    done = tinygpt.works("bench", "--matmul", "40,64", "--target", target, *engine, *SHORT, "--json")
    rows = [json.loads(line) for line in done.splitlines()]
    assert [(row["matmul"], row["target"], row["threads"]) for row in rows] == [(40, target, 1), (64, target, 1)]
    for row in rows:
        assert row["engine"] == "".join(engine[1:])
        assert row["gflops"] == pytest.approx(2 * row["matmul"] ** 3 / row["ms"] / 1e6, rel=0.05)
        assert row["peak_gflops"] > 0


def test_a_product_alone_is_not_timed_on_a_gpu(tinygpt: CommandLine) -> None:
    assert "not timed on target wgsl" in tinygpt.refused("bench", "--matmul", "64", "--target", "wgsl")


@pytest.mark.parametrize("target", ["cpp", "wasm32", "wasm64"])
def test_the_product_and_the_peak_compute_what_they_say(target: str, tmp_path: Path) -> None:
    device, caps = compiler.device_for(target, {})
    made = one_kernel.product(tmp_path / "product", 40, device, caps)
    x, w = np.random.default_rng(0).random((2, 40, 40)).astype(np.float32)
    np.testing.assert_allclose(result(made, x, w), x @ w, rtol=1e-5)
    chains = result(one_kernel.peak(tmp_path / "peak", device, caps), np.array([0.0, 0.25], np.float32))
    assert (chains == 12 * 0.25).all()  # the term of each of the 12, all else having vanished


def result(made: one_kernel.OneKernel, *inputs: np.ndarray) -> np.ndarray:
    """What a bundle of one function computes on two threads."""
    manifest = load(made.folder).manifest
    engine = open_engine(made.folder, manifest, 2)
    entry = manifest.functions[made.function]
    for slot, array in zip(entry.inputs, inputs, strict=True):
        engine.write(slot, array)
    engine.run(entry.name)
    found: np.ndarray = engine.read(entry.outputs[0])
    engine.close()
    return found


def test_bench_times_a_bundle_in_node(tinygpt: CommandLine) -> None:
    require_node()
    done = tinygpt("bench", "mini.json", *SHAPE, *SHORT, "--target", "wasm32", "--engine", "node", "--against", "none", "--json")
    assert done.status == 0, done.err
    row = json.loads(done.out)
    assert (row["target"], row["engine"], row["threads"]) == ("wasm32", "node", 1)
    assert row["ms"] > 0 and "tuned for another engine" not in done.err


def test_bench_without_node_says_where_to_get_it(tinygpt: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE", str(tinygpt.folder / "no-node"))
    error = tinygpt.refused("bench", "--matmul", "40", *SHORT, "--target", "wasm32", "--engine", "node")
    assert "no-node" in error and "npm install node" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "what should be timed"),
        (("mini.json", "--matmul", "64"), "what should be timed"),
        (("--matmul", "64,x"), "not a list of whole numbers"),
        (("mini.json", "--engine", "node"), "does not run target cpp"),
    ],
)
def test_bench_refuses_what_it_cannot_time(tinygpt: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    assert message in tinygpt.refused("bench", *arguments)
