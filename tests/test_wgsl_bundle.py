"""WebGPU bundles: tiny trains like PyTorch on a software Vulkan driver, naga takes every shader, launches obey the rules."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import pytorch_reference as pytorch
from tests.cli import CONFIG
from tests.test_end_to_end import CORPUS, batches
from tests.wgsl_device import assert_bindings_obey_the_rules, device, refused_by_naga
from tinygpt.cli import main
from tinygpt.compiler import compile, device_for
from tinygpt.ir.errors import UserError as CompilerUserError
from tinygpt.presets import find
from tinygpt.profiling import profile
from tinygpt.regeneration import regenerate
from tinygpt.runtime import bundle as bundles
from tinygpt.runtime import gpu
from tinygpt.runtime.bundle import Bundle
from tinygpt.runtime.engine import local_device
from tinygpt.runtime.errors import UserError
from tinygpt.runtime.training import train
from tinygpt.targets.wgsl.profiles import DEFAULT, LIMITS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    device()
    yield compile("tiny", "wgsl", out=tmp_path_factory.mktemp("tiny"))


def test_naga_takes_every_shader(bundle: Bundle) -> None:
    shaders = list(Path(bundle.folder).glob("kernels/*.wgsl"))
    assert len(shaders) == len(bundle.manifest.target["kernels"])
    assert refused_by_naga(shaders) == ""


def test_a_bundle_agrees_with_the_interpreter(bundle: Bundle) -> None:
    assert bundle.selftest().passed


def test_no_launch_reads_and_writes_a_pool_and_bindings_are_aligned(bundle: Bundle) -> None:
    assert_bindings_obey_the_rules(bundle.manifest.target)


def test_fifty_clipped_steps_match_pytorch(bundle: Bundle) -> None:
    """From weights far enough from their start that every gradient is clipped."""
    with bundle.session(seed=5) as session:
        found, wanted = pytorch.trained_side_by_side(session, find("tiny").config, batches(session, 50), 3e-4)
    assert (wanted[:, 1] > 1).all()
    assert np.abs(found - wanted).max(axis=0)[0] <= 1e-5
    assert (np.abs(found - wanted) / wanted).max() <= 1e-5


def test_one_batch_is_learned_by_heart(bundle: Bundle) -> None:
    with bundle.session(seed=1) as session:
        ((tokens, targets),) = batches(session, 1)
        losses = [session.train_step(tokens, targets, lr=3e-3)[0] for _ in range(150)]
        assert losses[0] == pytest.approx(np.log(256), abs=0.1)
        assert session.loss(tokens, targets) < 0.05


def test_batches_and_the_validation_loss_are_those_of_cpp(bundle: Bundle) -> None:
    pytorch.require_engine("cpp")
    text = CORPUS.validation[:5001]  # no whole number of windows
    with bundle.session(seed=9) as session, compile("tiny", "cpp").session(seed=9) as native:
        for (tokens, targets), (same_tokens, same_targets) in zip(batches(session, 50), batches(native, 50), strict=True):
            assert np.array_equal(tokens, same_tokens) and np.array_equal(targets, same_targets)
        native.load_parameters(pytorch.spread_weights(session, 4))
        for batch in batches(session, 10):
            session.train_step(*batch, lr=1e-3)
            native.train_step(*batch, lr=1e-3)
        assert session.evaluate(text) == pytest.approx(native.evaluate(text), abs=1e-5)


def test_two_runs_give_the_same_bits(bundle: Bundle) -> None:
    def curve() -> list[float]:
        rng = np.random.default_rng(2)
        shape = (bundle.manifest.batch, bundle.manifest.context)
        with bundle.session(seed=1) as session:
            return [session.train_step(rng.integers(0, 256, shape), rng.integers(0, 256, shape), lr=1e-3)[0] for _ in range(3)]

    assert curve() == curve()


def test_waiting_for_a_run_does_not_wait_for_later_ones(bundle: Bundle) -> None:
    with bundle.session(seed=1) as session:
        ((tokens, targets),) = batches(session, 1)
        session.train_step(tokens, targets)
        waits = [session.begin_step(tokens, targets) for _ in range(20)]
        began = time.perf_counter()
        waits[0]()
        first = time.perf_counter() - began
        waits[-1]()
        assert first < (time.perf_counter() - began) / 2


def test_a_training_step_is_one_submission_with_its_windows(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    with bundle.session(seed=1) as session:
        queue = session.engine._queue
        submit = queue.submit
        monkeypatch.setattr(queue, "submit", lambda commands: made.append(commands.label) or submit(commands))
        train(session, CORPUS, 10)
    step = "windows and train_step"  # the first two steps need theirs before, the last two none
    assert made == ["windows", "windows", *[step] * 8, "train_step", "train_step"]


def test_a_write_where_a_held_run_reads_comes_after_it(bundle: Bundle) -> None:
    with bundle.session(seed=1) as session:
        wanted = [session.windows(step, 1000) for step in range(3)]
        assert not np.array_equal(wanted[0], wanted[1])
        waits = [session.begin_windows(step, 1000) for step in range(3)]
        assert all(np.array_equal(wait(), offsets) for wait, offsets in zip(waits, wanted, strict=True))
        held = session.begin_windows(1, 1000)
        step = next(slot for slot in bundle.manifest.functions["windows"].inputs if slot.name == "step")
        session.engine.write(step, np.array(2, np.uint32))
        assert session.engine.read(step) == 2
        assert np.array_equal(held(), wanted[1])


def test_a_function_may_be_begun_together_with_itself(bundle: Bundle) -> None:
    loss = next(slot for slot in bundle.manifest.functions["train_step"].outputs if slot.name == "loss")
    with bundle.session(seed=1) as session, bundle.session(seed=1) as other:
        for opened in (session, other):
            opened.train_step(*batches(opened, 1)[0])
        wanted = []
        for _ in range(2):  # the same batch again
            other.engine.run("train_step")
            wanted.append(other.engine.read(loss))
        waits = [session.engine.begin_with_next("train_step"), session.engine.begin("train_step")]
        assert [wait(loss) for wait in waits] == wanted and wanted[0] != wanted[1]


def test_results_that_nobody_reads_take_no_memory(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    readable = gpu.GpuEngine._readable

    def counted(engine: gpu.GpuEngine, label: str, size: int) -> Any:
        made.append(label)
        return readable(engine, label, size)

    monkeypatch.setattr(gpu.GpuEngine, "_readable", counted)
    with bundle.session(seed=1) as session:
        ((tokens, targets),) = batches(session, 1)
        for number in range(300):
            session.begin_windows(number, 100)
            session.engine.run("windows")
            if number % 20 == 0:
                session.begin_step(tokens, targets)
            if number % 50 == 0:
                assert session.begin_windows(number, 100)().max() < 100
        assert np.isfinite(session.train_step(tokens, targets)).all()
    assert max(Counter(made).values()) <= 3  # the last run's, the next one's, and one that is still held


class Interrupted:
    """A device on which Ctrl-C is pressed as soon as something waits for it."""

    def __init__(self, device: Any) -> None:
        self._device = device

    @property
    def _internal(self) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return self._device._internal


def test_ctrl_c_while_a_result_is_awaited_leaves_the_engine_whole(bundle: Bundle) -> None:
    with bundle.session(seed=1) as session, bundle.session(seed=1) as other:
        given = batches(other, 3)
        wanted = [other.train_step(*batch) for batch in given]
        queue = session.engine._queue
        first = session.begin_step(*given[0])
        device, queue._device = queue._device, Interrupted(queue._device)
        with pytest.raises(KeyboardInterrupt):
            first()
        queue._device = device
        assert first() == wanted[0]
        assert [session.train_step(*batch) for batch in given[1:]] == wanted[1:]


def test_ctrl_c_that_comes_while_the_device_works_is_ctrl_c(bundle: Bundle) -> None:
    """Not while Python runs, as above: the first Python code behind the wait is the callback of the mapping."""
    with bundle.session(seed=1) as session:
        ((tokens, targets),) = batches(session, 1)
        took = min(timed(lambda: session.train_step(tokens, targets)) for _ in range(3))
        for part in (0.4, 0.7):
            timer = threading.Timer(part * took, os.kill, (os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                timer.start()
                session.train_step(tokens, targets)
                timer.join()
        assert np.isfinite(session.train_step(tokens, targets)).all()


def timed(act: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def test_a_write_that_the_device_refuses_is_an_error(bundle: Bundle) -> None:
    with bundle.session(seed=1) as session:
        slot = session.manifest.functions["train_step"].inputs[0]
        behind = replace(slot, offset=session.manifest.pools[slot.pool])
        with pytest.raises(UserError, match=f"cannot write {slot.name}"):
            session.engine.write(behind, np.zeros(slot.shape, slot.numpy_dtype))


def test_what_could_not_be_begun_has_no_result(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with bundle.session(seed=1) as session:
        ((tokens, targets),) = batches(session, 1)
        wait = session.begin_windows(1, 100)
        monkeypatch.setattr(session.engine._queue, "submit", lambda commands: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            session.begin_step(tokens, targets)
        monkeypatch.undo()
        with pytest.raises(UserError, match="could not be begun"):
            wait()


def test_a_lost_device_is_an_error_and_not_the_end_of_the_process(bundle: Bundle) -> None:
    with bundle.session(seed=1) as session:
        ((tokens, targets),) = batches(session, 1)
        wait = session.begin_step(tokens, targets)
        session.engine._device.destroy()
        with pytest.raises(UserError, match="the GPU's driver stopped"):
            wait()


@pytest.mark.parametrize("act", ["step", "windows", "weights"])
def test_whatever_is_asked_of_a_lost_device_is_refused_in_words(bundle: Bundle, act: str) -> None:
    with bundle.session(seed=5) as session:
        ((tokens, targets),) = batches(session, 1)
        session.train_step(tokens, targets)
        session.engine._device.destroy()
        with pytest.raises(UserError, match="GPU's driver"):
            {"step": lambda: session.train_step(tokens, targets), "windows": lambda: session.windows(1, 100), "weights": session.parameters}[act]()


def test_a_profile_times_every_launch_on_the_device(bundle: Bundle) -> None:
    with bundle.session() as session:
        found = profile(session, {}, runs=3)
        launches = len(bundle.manifest.functions["train_step"].launches)
        seconds = session.engine.profile("train_step", 2)
    assert sum(row.launches for row in found.rows) == launches and seconds.shape == (2, 1, launches + 1)
    assert found.where == session.engine.where() and found.total_ms > 0
    assert (seconds[..., :-1] >= 0).all() and (seconds.sum(axis=2) > 0).all()


def test_launches_of_several_query_sets_are_all_timed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_TIMED_LAUNCHES", 16)  # of two queries: offsets of readings are multiples of 256
    with bundle.session() as session:
        seconds = session.engine.profile("train_step", 1)
    assert np.count_nonzero(seconds[0, 0, :-1]) > seconds.shape[-1] // 2


def test_a_device_without_a_clock_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_CLOCK", "a-clock-nobody-has")
    with bundle.session() as session, pytest.raises(UserError, match="cannot time single kernels: its driver has no a-clock"):
        profile(session, {}, runs=1)


def test_the_command_names_the_gpu_and_its_kernels(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(bundle.folder), "--runs", "1"]) == 0
    text = capsys.readouterr().out
    assert " ms on " in text and " thread" not in text.splitlines()[0]
    assert "matmul gelu_d0 mul gelu" in text and "GFLOP/s" in text


def damaged(bundle: Bundle, to: Path, damage: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the bundle in which what the target says is damaged."""
    shutil.copytree(bundle.folder, to)
    path = to / "manifest.json"
    document = json.loads(path.read_text())
    damage(document["target"])
    path.write_text(json.dumps(document))
    return to


def test_a_damaged_launch_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    def far(target: dict[str, Any]) -> None:
        target["functions"]["init"][0]["bindings"][0][1] = 1 << 40

    with pytest.raises(UserError, match="functions.init is malformed: binding"):
        bundles.load(damaged(bundle, tmp_path / "far", far)).session()
    with pytest.raises(UserError, match="functions.init has 0 launches, the manifest"):
        bundles.load(damaged(bundle, tmp_path / "none", lambda target: target["functions"]["init"].clear())).session()


@pytest.mark.parametrize("access", [[1], [{}], [["in"]], ["out of"], "in", None])
def test_access_words_that_are_none_are_refused(bundle: Bundle, tmp_path: Path, access: Any) -> None:
    def damage(target: dict[str, Any]) -> None:
        next(iter(target["kernels"].values()))["access"] = access

    with pytest.raises(UserError, match="has no file or no access words"):
        bundles.load(damaged(bundle, tmp_path / "b", damage)).session()


def test_a_limit_that_no_device_knows_is_lacking(bundle: Bundle, tmp_path: Path) -> None:
    device()
    with pytest.raises(UserError, match="lacks max-of-nothing 3"):
        bundles.load(damaged(bundle, tmp_path / "b", lambda target: target["limits"].update({"max-of-nothing": 3}))).session()


def test_a_shader_that_is_no_text_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    device()
    folder = tmp_path / "b"
    shutil.copytree(bundle.folder, folder)
    document = json.loads((folder / "manifest.json").read_text())
    name = next(iter(document["target"]["kernels"].values()))["file"]
    (folder / name).write_bytes(b"\xff\xfe")
    document["files"][name] = hashlib.sha256(b"\xff\xfe").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(document))
    with bundles.load(folder).session() as session, pytest.raises(UserError, match=f"{name} is no text"):
        for function in document["functions"]:
            session.engine.run(function)


def test_a_profile_is_read_from_the_adapter_and_kept_in_the_bundle(tmp_path: Path) -> None:
    device()
    found = compile(CONFIG, "wgsl", 2, 8, out=tmp_path / "b", options={"profile": "adapter"})
    described = gpu.local_device()
    target = found.manifest.target
    assert target["profile"] == "adapter" and json.loads(target["options"]["device"]) == json.loads(json.dumps(described))
    assert set(target["features"]) == {"subgroups", "shader-f16"} & set(described["features"])
    assert target["limits"] == {name: min(described["limits"][name], limit) for name, limit in target["limits"].items()}
    assert target["limits"]["max-compute-workgroup-storage-size"] == described["limits"]["max-compute-workgroup-storage-size"]
    again = regenerate(tmp_path / "b").compilation
    assert again.manifest["target"] == target
    assert found.selftest().passed


def test_a_description_of_a_device_makes_its_profile() -> None:
    limits = {name: 2 * getattr(DEFAULT, field) for name, field in LIMITS.items()} | {"max-buffer-size": 1 << 63}
    options = {"profile": "adapter", "device": json.dumps({"features": ["subgroups", "depth-clip-control"], "limits": limits})}
    _, caps = device_for("wgsl", options)
    assert device_for("wgsl", {"device": options["device"]})[1] == caps
    assert caps.features == {"subgroups"} and caps.bindings == 16 and caps.grid_limit == 131070
    assert caps.buffer_bytes == (1 << 53) - 1
    for device, problem in (
        ("[]", "no description of a device"), ("{}", "no description of a device: 'features'"),
        (json.dumps({"features": [], "limits": limits | {"max-buffer-size": 9}}), "max-buffer-size is 9, WebGPU promises 268,435,456"),
    ):  # fmt: skip
        with pytest.raises(CompilerUserError, match=problem):
            device_for("wgsl", {"profile": "adapter", "device": device})


def test_a_target_without_a_device_of_its_own_has_no_such_profile() -> None:
    with pytest.raises(CompilerUserError, match="cpp has no profile 'adapter'"):
        compile("tiny", "cpp", options={"profile": "adapter"})
    with pytest.raises(UserError, match="nothing here knows a device for target 'cpp'"):
        local_device("cpp")


def test_only_a_bundle_compiled_here_runs_without_the_drivers_checks(bundle: Bundle) -> None:
    """A forged manifest can claim what it likes of its kernels."""
    own = gpu.device_record(bundle.folder, bundle.manifest)
    assert any(kernel.bounded for kernel in own.kernels.values())
    forged = replace(bundle.manifest, digest="0" * 64)
    assert not any(kernel.bounded for kernel in gpu.device_record(bundle.folder, forged).kernels.values())
