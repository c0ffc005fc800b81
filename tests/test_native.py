"""C++ bundles end to end, on a small hand-written plan: built, cached, run on threads, refused where they must be."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import small_plan
from tests.cpp_toolchain import COMPILERS, compiler, require
from tests.piped_engine import PipedEngine, aarch64_engine, build_driver
from tinygpt.runtime import manifest as manifests
from tinygpt.runtime import native
from tinygpt.runtime.engine import Engine, Profiler, open_engine
from tinygpt.runtime.errors import UserError
from tinygpt.runtime.manifest import Manifest
from tinygpt.runtime.sampling import Sampling
from tinygpt.runtime.session import Session
from tinygpt.targets.cpp import PROFILES
from tinygpt.targets.cpp.model import emit, layout_id


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def isolated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_plan.write_bundle(tmp_path / "bundle", PROFILES["native"])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle in which `make` has run."""
    folder = small_plan.write_bundle(tmp_path_factory.mktemp("program"), PROFILES["native"])
    subprocess.run([require(["make"], "make"), "-s", "-j2", "-C", str(folder)], check=True)
    return folder


def mirrored(x: NDArray[Any]) -> NDArray[Any]:
    return 2 * x[::-1] + x


def run_mirror(engine: Engine, manifest: Manifest, x: NDArray[Any]) -> NDArray[Any]:
    function = manifest.functions["mirror"]
    engine.write(function.inputs[0], x)
    engine.run("mirror")
    return engine.read(function.outputs[0])


def numbers(seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(small_plan.MIRRORED).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("family", COMPILERS)
def test_launches_run_in_order_on_any_number_of_threads(
    bundle: Path, family: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(family))
    manifest = manifests.load(bundle)
    engine = open_engine(bundle, manifest, threads)
    assert engine.threads == threads
    for seed in range(300):
        x = numbers(seed)
        assert np.array_equal(run_mirror(engine, manifest, x), mirrored(x))
    engine.close()
    engine.close()


def test_threads_that_have_gone_to_sleep_wake_up(bundle: Path) -> None:
    manifest = manifests.load(bundle)
    engine = open_engine(bundle, manifest, 2)
    for seed in range(5):
        time.sleep(0.02)
        x = numbers(seed)
        assert np.array_equal(run_mirror(engine, manifest, x), mirrored(x))
    engine.close()


def test_a_profile_times_every_launch_of_every_thread_and_then_stops(bundle: Path) -> None:
    manifest = manifests.load(bundle)
    engine = open_engine(bundle, manifest, 2)
    assert isinstance(engine, Profiler)
    launches = len(manifest.functions["mirror"].launches)
    seconds = engine.profile("mirror", 3)
    assert seconds.shape == (3, 2, launches + 1) and (seconds >= 0).all() and (seconds.sum(axis=2) > 0).all()
    kept = seconds.copy()
    engine.run("mirror")
    assert np.array_equal(kept, seconds)
    engine.close()


def test_a_session_trains_evaluates_and_generates(bundle: Path) -> None:
    manifest = manifests.load(bundle)
    tokens = np.arange(16, dtype=np.uint8).reshape(2, 8)
    with Session(manifest, open_engine(bundle, manifest, 2), seed=300) as session:
        table = session.parameters()["table"]
        assert np.array_equal(table, np.arange(small_plan.VOCAB) + 300 % 256)
        assert session.train_step(tokens, tokens + 2) == (32.0, 1024.0)
        bias = np.float32(np.float32(1.0 - 0.9) + np.float32(1.0 - 0.95))
        assert np.array_equal(session.parameters()["table"], table + np.float32(0.5) * bias)
        assert session.evaluate(bytes(range(0, 100, 2))) == 4.0
        assert np.array_equal(session.windows(1, 100), [3, 4])
        assert len(session.generate("ab", 20)) == 20


def test_a_call_costs_less_than_a_tenth_of_a_millisecond(bundle: Path) -> None:
    manifest = manifests.load(bundle)
    engine = open_engine(bundle, manifest, 1)
    function = manifest.functions["windows"]
    step = np.array(1, np.uint32)

    def call() -> float:
        began = time.perf_counter()
        for slot in (*function.inputs[1:], *function.inputs[1:]):
            engine.write(slot, step)
        engine.run("windows")
        engine.read(function.outputs[0])
        return time.perf_counter() - began

    assert min(call() for _ in range(200)) < 1e-4
    engine.close()


def test_a_second_build_comes_from_the_cache_and_a_changed_kernel_is_compiled_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = small_plan.write_bundle(tmp_path / "bundle", PROFILES["native"])
    commands: list[str] = []
    produce = native._produce
    monkeypatch.setattr(
        native, "_produce", lambda command, path: (commands.append(" ".join(command)), produce(command, path))
    )
    library = native.build(bundle, manifests.load(bundle))
    assert len(commands) == 1 + len(list(bundle.glob("kernels/*.cpp"))) + 1
    assert native.build(bundle, manifests.load(bundle)) == library
    assert len(commands) == 10

    change(bundle, "kernels/reverse.cpp", lambda text: text + "// changed\n")
    assert native.build(bundle, manifests.load(bundle)) != library
    assert len(commands) == 12 and "kernels/reverse.cpp" in commands[10]
    assert not list((tmp_path / "cache").rglob("*.partial"))


def change(bundle: Path, name: str, edit: Any) -> None:
    """Edit a file of the bundle, and its hash in the manifest."""
    (bundle / name).write_text(edit((bundle / name).read_text()))
    document = json.loads((bundle / "manifest.json").read_text())
    document["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(document))


def edited(bundle: Path, **target: Any) -> Manifest:
    """The bundle's manifest with another target record."""
    document = json.loads((bundle / "manifest.json").read_text())
    document["target"] |= target
    return manifests.parse(json.dumps(document))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"machine": "vax"}, "was compiled for vax"),
        ({"isa": ["avx2", "amx_future"]}, "amx_future"),
        ({"build": {"compile": "-O3"}}, "target.build.compile must be a list of strings"),
        (
            {"build": {"compile": [], "link": [], "headers": [], "sources": ["../evil.cpp"]}},
            "lists no file '../evil.cpp'",
        ),
    ],
)
def test_a_bundle_for_another_machine_or_with_a_malformed_record_is_refused(
    bundle: Path, target: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_engine(bundle, edited(bundle, **target), 1)


def test_a_library_that_needs_what_the_processor_lacks_is_refused(bundle: Path) -> None:
    change(bundle, "model.cpp", lambda text: text.replace('  return "";', '  return "avx1024";'))
    with pytest.raises(UserError, match="avx1024.*lacks"):
        open_engine(bundle, manifests.load(bundle), 1)


def move_an_output(document: dict[str, Any]) -> None:
    document["functions"]["mirror"]["outputs"][0]["offset"] += 64
    document["pools"]["work"] += 64


def forget_a_launch(document: dict[str, Any]) -> None:
    """The profiler would get too little room for its seconds."""
    document["functions"]["mirror"]["launches"].pop()


@pytest.mark.parametrize("edit", [move_an_output, forget_a_launch])
def test_an_edited_layout_is_refused(bundle: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    edit(document)
    with pytest.raises(UserError, match="disagree on where the tensors lie or what a function launches"):
        open_engine(bundle, manifests.parse(json.dumps(document)), 1)


def test_host_and_target_agree_on_the_layout_id(bundle: Path) -> None:
    document = json.loads((bundle / "manifest.json").read_text())
    assert layout_id(document) == native.layout_id(manifests.load(bundle))


def test_memory_that_cannot_be_had_is_a_user_error(tmp_path: Path) -> None:
    built = small_plan.plan()
    document = small_plan.document(built)
    huge = 1 << 43
    document["pools"]["work"] = huge
    folder = small_plan.write_bundle(tmp_path / "bundle", PROFILES["native"], pools=document["pools"])
    change(
        folder,
        "model.cpp",
        lambda text: text.replace(str(built.pools["work"]), str(huge)).replace(
            layout_id(small_plan.document(built)), layout_id(document)
        ),
    )
    with pytest.raises(UserError, match="8388608 MiB of memory"):
        open_engine(folder, manifests.load(folder), 1)


def fake_compiler(folder: Path, script: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    native._probe.cache_clear()
    return str(path)


def test_without_a_compiler_the_message_says_how_to_install_one(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native._probe.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"(?s)no C\+\+ compiler found.*sudo apt install g\+\+"):
        native.build(bundle, manifests.load(bundle))
    native._probe.cache_clear()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            'printf "#define __GNUC__ 9\\n#define __GNUC_MINOR__ 4\\n#define __GNUC_PATCHLEVEL__ 0\\n"',
            "9.4.0 is too old",
        ),
        ("exit 1", "is not a C.. compiler that runs here"),
        ("echo nothing", "is not a C.. compiler that runs here"),
    ],
)
def test_a_compiler_that_will_not_do_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, script))
    with pytest.raises(UserError, match=message):
        native.find_compiler()


def test_a_failing_compiler_is_quoted(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    macros = 'printf "#define __GNUC__ 13\\n#define __GNUC_MINOR__ 4\\n#define __GNUC_PATCHLEVEL__ 0\\n"'
    script = f'case "$*" in *-dM*) {macros};; *) echo "cc1plus: No space left on device" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path / "bin", script))
    with pytest.raises(UserError, match=r"(?s)No space left on device.*free some space"):
        native.build(bundle, manifests.load(bundle))


def test_a_cache_that_cannot_be_written_is_a_user_error(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written.*\n.*XDG_CACHE_HOME"):
        native.build(bundle, manifests.load(bundle))


def test_running_allocates_nothing(bundle: Path, tmp_path: Path) -> None:
    manifest = manifests.load(bundle)
    engine = PipedEngine(
        [str(build_driver(bundle, manifest, tmp_path / "driver", compiler("g++"), more=["-DCOUNT_ALLOCATIONS"]))],
        manifest,
        2,
    )
    for seed in range(20):
        time.sleep(0.001 * (seed % 3))
        x = numbers(seed)
        assert np.array_equal(run_mirror(engine, manifest, x), mirrored(x))
    assert engine.allocations() == 0
    assert 0 < engine.counted_allocations() < engine.counted_allocations()
    engine.close()


def test_threads_share_nothing_that_a_race_detector_objects_to(bundle: Path, tmp_path: Path) -> None:
    manifest = manifests.load(bundle)
    program = build_driver(bundle, manifest, tmp_path / "driver", compiler("g++"), more=["-fsanitize=thread", "-g"])
    # The detector wants addresses where it expects them; some kernels have to be asked.
    asked = (
        ["setarch", "-R"]
        if subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode == 0
        else []
    )
    if subprocess.run([*asked, program], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    engine = PipedEngine([*asked, str(program)], manifest, 3)
    for seed in range(20):
        x = numbers(seed)
        assert np.array_equal(run_mirror(engine, manifest, x), mirrored(x))
    engine.close()
    assert engine.status == 0


def test_a_baseline_bundle_computes_the_same_on_aarch64(tmp_path: Path) -> None:
    folder = small_plan.write_bundle(tmp_path / "bundle", PROFILES["baseline"], strict=True)
    manifest = manifests.load(folder)
    with Session(manifest, open_engine(folder, manifest, 1)) as here:
        with Session(manifest, aarch64_engine(folder, manifest, tmp_path / "driver", threads=2)) as there:
            tokens = np.arange(16).reshape(2, 8)
            assert here.train_step(tokens, tokens + 1) == there.train_step(tokens, tokens + 1)
            assert here.parameters()["table"].tobytes() == there.parameters()["table"].tobytes()
            assert here.generate("ab", 12) == there.generate("ab", 12)


def test_make_builds_a_program_that_trains_and_samples_as_a_session_does(program: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(bytes(range(0, 250, 2)) * 2)
    done = subprocess.run(
        [program / "tinygpt-train", corpus, "--seed", "7", "--threads", "2"], capture_output=True, check=True
    )
    lines = done.stdout.decode("latin-1")
    assert "step 3/3" in lines and "step 2: training loss 4.0000, validation loss 4.0000 nats/byte" in lines
    manifest = manifests.load(program)
    with Session(manifest, open_engine(program, manifest, 1), seed=7) as session:
        sample = bytes(list(session.stream(b"", 300, Sampling(seed=7))))
    assert done.stdout.partition(b"sample:\n")[2] == sample + b"\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "nowhere.txt: cannot be read: No such file"),
        ([], "no corpus given"),
        (["short.txt"], "has 5 bytes, too few for context 8"),
        (["short.txt", "--steps", "many"], "--steps many: must be an integer"),
        (["short.txt", "--speed"], "unknown argument --speed"),
    ],
)
def test_the_native_program_answers_bad_input(
    program: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "short.txt").write_text("short")
    done = subprocess.run(
        [program / "tinygpt-train", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and message in done.stderr and "hint:" in done.stderr


def test_model_cpp_reads_as_a_list_of_launches() -> None:
    built = small_plan.plan()
    text = emit(built, small_plan.document(built), PROFILES["baseline"], strict=False)["model.cpp"]
    launches = """\
// mirror(x) -> y; 2 launches
void mirror([[maybe_unused]] Model& m, [[maybe_unused]] int thread) {
  [[maybe_unused]] Clock clock(m, thread);
  [[maybe_unused]] char* const pool0 = m.pools[0].data();  // state
  [[maybe_unused]] char* const pool1 = m.pools[1].data();  // work
  [[maybe_unused]] f32* const scratch = (f32*)m.scratch_of(thread);
  if (auto [lo, hi] = m.share(thread, 8); lo < hi)
    kernels::double_((const f32*)(pool1 + 9024 /* x */), (f32*)(pool1 + 9280 /* t */), scratch, lo, hi);
  clock.lap(0);
  m.meet(), clock.lap(2);
  if (auto [lo, hi] = m.share(thread, 8); lo < hi)  // %2 reverse
    kernels::reverse((const f32*)(pool1 + 9024 /* x */), (const f32*)(pool1 + 9280 /* t */), \
(f32*)(pool1 + 9536 /* y */), scratch, lo, hi);
  clock.lap(1);
}
"""
    assert launches in text
