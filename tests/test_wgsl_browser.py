"""WebGPU bundles in headless Chromium: the page trains to the losses of wgpu; the host tests, saves and resumes them, and
says in one sentence what is wrong with a bundle or a device; Tint takes every shader of even and odd models."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chromium import page_result, script_result
from tests.cli import CONFIG
from tests.lowered import passes_until, small_model
from tests.test_cpu_strategy import CASES, op_kernels
from tests.wgsl_device import device
from tinygpt.compiler import compile, module_for
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Module
from tinygpt.lowering.gpu import lower
from tinygpt.runtime.bundle import Bundle
from tinygpt.runtime.data import Corpus
from tinygpt.runtime.sampling import Sampling
from tinygpt.runtime.training import train
from tinygpt.targets.wgsl.printer import print_kernel
from tinygpt.targets.wgsl.profiles import DEFAULT, F16, SUBGROUPS

NARROW = replace(F16, storage="f16")
STEPS = 20
CORPUS = Corpus("text", "", np.random.default_rng(5).integers(97, 123, 2000).astype(np.uint8))

# Everything a session does, in one go; training on from its own checkpoint must repeat the bits.
EVERYTHING = """
    const { open, train } = await import("./tinygpt.mjs");
    const corpus = new TextEncoder().encode(TEXT);
    const rows = [];
    const onRow = ({ tokens_per_s, ...row }) => rows.push(row);
    const session = await open(new URL("..", location), { seed: 5 });
    const checks = await session.selfTest();
    await train(session, corpus, { steps: 3, evalEvery: 3, onRow });
    const saved = new Blob(await Array.fromAsync(session.checkpoint()));
    await train(session, corpus, { steps: 5, onRow });
    await session.load(saved);
    await train(session, corpus, { steps: 5, onRow });
    const sample = [];
    for await (const byte of session.stream("ab", 8, { seed: 3 })) sample.push(byte);
    const url = await new Promise((resolve) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.readAsDataURL(saved);
    });
    return { checks, rows, sample, checkpoint: url.split(",")[1] };
"""

# The same run with a step in flight and without, stopped and taken up again in the middle; in between, one that diverges.
OVERLAP = """
    const { open, sha256, train } = await import("./tinygpt.mjs");
    const corpus = new TextEncoder().encode(TEXT);
    const session = await open(new URL("..", location));
    const { engine } = session, begin = engine.run.bind(engine);
    let flying = 0, most = 0;
    engine.run = async (name, ...rest) => {
        const mine = name === "train_step" ? 1 : 0;
        most = Math.max(most, (flying += mine));
        try {
            return await begin(name, ...rest);
        } finally {
            flying -= mine;
        }
    };
    const run = async (queued, options, rows = []) => {
        [engine.queued, most] = [queued, 0];
        await session.init(5);
        const save = async () => {
            const chunks = await Array.fromAsync(session.checkpoint());
            rows.push({ saved: chunks.map(sha256), flying });
        };
        const given = { steps: STEPS, save, saveEvery: 4, onRow: ({ tokens_per_s, ...row }) => rows.push(row), ...options };
        await train(session, corpus, { ...given, stop: () => session.step === 7 });
        await train(session, corpus, given);
        return { rows, most };
    };
    const overlapped = await run(true, { evalEvery: 3 });
    const rows = [];
    const diverged = await run(true, { lr: 1e30 }, rows).then(() => "nothing", (error) => [error.name, error.message]);
    return { overlapped, diverged, told: rows.length, waiting: await run(false, { evalEvery: 3, lr: LR }) };
"""

# Bundles that are not what they should be: what opening each says, and whether it says it as the user's error.
DAMAGE = """
    const { open, sha256 } = await import("./tinygpt.mjs");
    const fetched = async (name) => new Uint8Array(await (await fetch(`../${name}`)).arrayBuffer());
    const text = new TextDecoder().decode(await fetched("manifest.json"));
    const said = {};
    for (const [name, [change, shader]] of Object.entries(DAMAGED)) {
        const manifest = JSON.parse(text);
        new Function("m", change)(manifest);
        const launch = manifest.target.functions.init?.[0];
        const file = manifest.target.kernels[launch?.kernel]?.file;
        const changed = new TextEncoder().encode(shader);
        if (shader) manifest.files[file] = sha256(changed);
        const files = async (name) => {
            if (name === "manifest.json") return new TextEncoder().encode(JSON.stringify(manifest));
            return shader && name === file ? changed : fetched(name);
        };
        said[name] = await open(files).then(() => "nothing", (error) => [error.name, error.message, error.hint]);
    }
    const session = await open(new URL("..", location));
    session.engine.device.destroy();
    await session.engine.device.lost;
    said.lost = await session.windows(0, 9).then(() => "nothing", (error) => [error.name, error.message, error.hint]);
    return said;
"""
LAUNCH = "m.target.functions.init[0]"
# name: (what is done to the manifest, the shader of the first kernel of init, what the host says)
DAMAGED = {
    "outside of its pool": (f"{LAUNCH}.bindings[0][1] = 2 ** 30", "", "an offset of {kernel} is 1073741824"),
    "not aligned": (f"{LAUNCH}.bindings[0][1] = 16; {LAUNCH}.bindings[0][2] = 16", "", "the device refuses kernel {kernel} in init"),
    "of no pool": (f"{LAUNCH}.bindings[0][0] = 'toString'", "", 'a pool of {kernel} is "toString"'),
    "too few": (f"{LAUNCH}.bindings.pop()", "", "bindings of {kernel}"),
    "too many workgroups": (f"{LAUNCH}.workgroups = [70000, 1, 1]", "", "workgroups of {kernel} is 70000"),
    "no such kernel": (f"{LAUNCH}.kernel = 'valueOf'", "", 'a kernel of target.functions.init is "valueOf"'),
    "read instead of written": (
        f"m.target.kernels[{LAUNCH}.kernel].access.fill('in')", "", "the device refuses kernel {kernel}: "
    ),
    "no such file": (f"m.target.kernels[{LAUNCH}.kernel].file = 'a.wgsl'", "", 'target.kernels.{kernel}.file is "a.wgsl"'),
    "no such function": ("delete m.target.functions.init", "", "target.functions.init is undefined"),
    "a pool in pieces": ("m.pools.work = 2 ** 41", "", "pools.work is 2199023255552"),
    "a pool too large": ("m.pools.work = 2 ** 39", "", "pool work of 549755813888 bytes cannot be had"),
    "a feature too many": ("m.target.features = ['nonsense']", "", "lacks feature nonsense"),
    "a limit too high": ("m.target.limits['max-buffer-size'] = 2 ** 50", "", "lacks maxBufferSize 1125899906842624"),
    "not what was hashed": (f"m.files[m.target.kernels[{LAUNCH}.kernel].file] = ''", "", "is not the file this bundle was built with"),
    "no program": ("", "fn main( {", "the device refuses kernel {kernel}: "),
    "no entry": ("", "@compute @workgroup_size(1) fn other() {}", "the device refuses kernel {kernel}: "),
}  # fmt: skip
# A shader without the directive that Tint wants for it and naga refuses: the host adds it.
UNDIRECTED = """
    @group(0) @binding({binding}) var<storage, read_write> sum: array<f32>;
    @compute @workgroup_size(1) fn main() {{ sum[0] = subgroupAdd(1.0); }}
"""
# What Tint and the device say of SHADERS: [[name, code, access of each binding]].
TINT = """
    const adapter = await navigator.gpu.requestAdapter();
    const device = await adapter.requestDevice({ requiredFeatures: ["subgroups"] });
    const kind = (a) => ({ type: a === "in" ? "read-only-storage" : "storage" });
    const check = async ([name, code, access]) => {
        device.pushErrorScope("validation");
        const module = device.createShaderModule({ code });
        const entries = access.map((a, n) => ({ binding: n, visibility: GPUShaderStage.COMPUTE, buffer: kind(a) }));
        const layout = device.createPipelineLayout({ bindGroupLayouts: [device.createBindGroupLayout({ entries })] });
        const error = await device.popErrorScope();
        const errors = (await module.getCompilationInfo()).messages.filter((m) => m.type === "error").map((m) => m.message);
        if (error && !errors.length) errors.push(error.message);
        if (!errors.length) {
            await device.createComputePipelineAsync({ layout, compute: { module, entryPoint: "main" } })
                .catch((refusal) => errors.push(refusal.message));
        }
        return [name, errors];
    };
    return (await Promise.all(SHADERS.map(check))).filter(([, errors]) => errors.length);
"""
# Opening a bundle on a device that lacks what it asks for.
OPEN = """
    const { open } = await import("./tinygpt.mjs");
    return open(new URL("..", location)).then(() => "nothing", (error) => [error.name, error.message, error.hint]);
"""
TRIED = {"init", "windows", "train_step", "loss", "logits"}  # functions of tiny that run in Chromium here
Shader = tuple[str, str, list[str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile("tiny", "wgsl", out=tmp_path_factory.mktemp("tiny"))


def rows_of(bundle: Bundle, corpus: Corpus, steps: int, seed: int, eval_every: int = 0) -> list[dict[str, Any]]:
    """What wgpu reports of a run, but for its speed."""
    rows: list[dict[str, Any]] = []
    with bundle.session(seed=seed) as session:
        train(session, corpus, steps, eval_every=eval_every, on_row=lambda row: rows.append(dict(row)))
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]


def test_a_page_trains_to_the_losses_of_wgpu(bundle: Bundle, tmp_path: Path) -> None:
    device()
    found = page_result(bundle, f"steps={STEPS}", tmp_path / "profile")
    assert found["error"] is None
    assert found["where"]
    corpus = Corpus("text", "", np.array(found["corpus"], np.uint8))
    wanted = [row["loss"] for row in rows_of(bundle, corpus, STEPS, seed=42)]
    assert len(wanted) == STEPS
    assert np.abs(np.array(found["losses"]) - wanted).max() <= 1e-5
    assert wanted[-1] < wanted[0]


def test_the_host_tests_trains_saves_resumes_and_samples(bundle: Bundle, tmp_path: Path) -> None:
    device()
    text = CORPUS.data.tobytes().decode()
    found = script_result(bundle, EVERYTHING.replace("TEXT", json.dumps(text)), tmp_path / "profile")
    assert {check["function"] for check in found["checks"]} == set(bundle.manifest.golden)
    assert [check for check in found["checks"] if not check["passed"]] == []
    rows = found["rows"]
    assert rows[-2:] == rows[-4:-2]
    *wanted, last = rows_of(bundle, CORPUS, 5, seed=5, eval_every=3)
    assert "val_loss" in last  # at the end of the whole run, which the browser's two halves do not have
    for row, other in zip(rows[:-2], wanted, strict=True):
        assert row == pytest.approx(other, abs=1e-5)
    path = tmp_path / "browser.safetensors"
    path.write_bytes(base64.b64decode(found["checkpoint"]))
    with bundle.session() as session:
        session.load(path)
        assert (session.step, session.seed) == (3, 5)
        again: list[dict[str, Any]] = []
        train(session, CORPUS, 5, eval_every=0, on_row=lambda row: again.append(dict(row)))
        assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows[-2:]], abs=1e-5)
        assert list(session.stream("ab", 8, Sampling(seed=3))) == found["sample"]


def test_steps_that_overlap_report_and_save_the_bits_of_one_after_the_other(tmp_path: Path) -> None:
    device()
    dropping = compile({**CONFIG, "dropout": 0.1}, "wgsl", 2, 8, out=tmp_path / "b")
    values = {"TEXT": json.dumps(CORPUS.data.tobytes().decode()), "STEPS": str(STEPS), "LR": str(dropping.manifest.training["lr"])}
    script = OVERLAP
    for name, value in values.items():
        script = script.replace(name, value)
    found = script_result(dropping, script, tmp_path / "profile")
    assert found["overlapped"]["rows"] == found["waiting"]["rows"]
    assert [found[kind]["most"] for kind in ("overlapped", "waiting")] == [2, 1]
    rows = found["waiting"]["rows"]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, *range(3, STEPS, 3), STEPS]
    saved = [step for step in range(1, STEPS + 1) if step % 4 == 0 or step == 7]
    assert [row["flying"] for row in rows if "saved" in row] == [0] * len(saved)
    kind, message = found["diverged"]
    assert kind == "UserError" and f"after {found['told']} steps" in message and found["told"] < 4


def test_a_damaged_bundle_and_a_lost_device_are_named(bundle: Bundle, tmp_path: Path) -> None:
    kernel = bundle.manifest.target["functions"]["init"][0]["kernel"]
    written = bundle.manifest.target["kernels"][kernel]["access"].index("out")
    cases = {name: (change, shader) for name, (change, shader, _) in DAMAGED.items()}
    cases["subgroups"] = ("m.target.features = ['subgroups']", UNDIRECTED.format(binding=written))
    said = script_result(bundle, DAMAGE.replace("DAMAGED", json.dumps(cases)), tmp_path / "profile")
    wanted = {name: message.format(kernel=kernel) for name, (_, _, message) in DAMAGED.items()} | {"lost": "the GPU was lost"}
    for name, message in wanted.items():
        kind, text, hint = said[name]
        assert (kind, message in text, "\n" in text, bool(hint)) == ("UserError", True, False, True), (name, said[name])
    assert said["subgroups"] == "nothing"


def shaders(module: Module, caps: Caps = DEFAULT) -> list[Shader]:
    """The kernels of a captured model, with the directive that the host writes before them."""
    for p in passes_until("loops"):
        module = p.run(module, caps)
    directives = "enable subgroups; " if "subgroups" in caps.features else ""
    return [(k.name, directives + print_kernel(k, caps), list(k.access)) for k in module.kernels.values()]


def refused(bundle: Bundle, found: list[Shader], profile: Path) -> dict[str, list[str]]:
    """What Tint and the device have against shaders, each looked at once."""
    once = {code: (name, code, access) for name, code, access in found}
    return dict(script_result(bundle, TINT.replace("SHADERS", json.dumps(list(once.values()))), profile))


def op_shaders() -> list[Shader]:
    """The kernels of every op of the registry, alone."""
    kernels = [kernel for case in CASES for kernel, _ in op_kernels(*case.values, DEFAULT)]
    return [(k.name, print_kernel(lower(k, DEFAULT), DEFAULT), list(k.access)) for k in kernels]


def untried_shaders(bundle: Bundle) -> list[Shader]:
    """The kernels of tiny that the tests above do not run."""
    target = bundle.manifest.target
    tried = {launch["kernel"] for name, launches in target["functions"].items() if name in TRIED for launch in launches}
    return [
        (name, (bundle.folder / kernel["file"]).read_text(), kernel["access"])
        for name, kernel in target["kernels"].items()
        if name not in tried
    ]


def read_as_f32(found: list[Shader]) -> list[Shader]:
    """Shaders with every f16 an f32: what this browser's device, which has none, can be asked about."""
    return [(name, code.replace("enable f16;", "").replace("f16", "f32"), access) for name, code, access in found]


SOURCES: dict[str, Callable[[Bundle], list[Shader]]] = {
    "presets": lambda bundle: [*untried_shaders(bundle), *shaders(module_for("small"))],
    "odd": lambda bundle: shaders(small_model()),
    "subgroups": lambda bundle: shaders(small_model(), SUBGROUPS),
    "f16": lambda bundle: read_as_f32(shaders(small_model(), NARROW)),
    "ops": lambda bundle: op_shaders(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_tint_takes_every_shader(bundle: Bundle, source: str, tmp_path: Path) -> None:
    found = SOURCES[source](bundle)
    assert len(found) > 50
    assert refused(bundle, found, tmp_path / "profile") == {}


def test_tint_reads_shaders_with_f16_and_misses_the_feature_alone(bundle: Bundle, tmp_path: Path) -> None:
    found = [shader for shader in shaders(small_model(), NARROW) if "enable f16;" in shader[1]]
    said = refused(bundle, found, tmp_path / "profile")
    assert len(found) > 30 and said.keys() == {name for name, _, _ in found}
    assert {message for errors in said.values() for message in errors} == {"extension 'f16' is not allowed in the current environment"}


def test_a_bundle_with_f16_is_refused_where_there_is_none(tmp_path: Path) -> None:
    narrow = compile(CONFIG, "wgsl", 1, 8, out=tmp_path / "b", options={"dtype": "f16"})
    kind, message, hint = script_result(narrow, OPEN, tmp_path / "profile")
    assert kind == "UserError" and "lacks feature shader-f16" in message and "dtype f32" in hint


def test_tint_refuses_what_it_should(bundle: Bundle, tmp_path: Path) -> None:
    """Barriers that not all threads reach, more workgroup memory than there is, other bindings than the manifest's."""
    head = "@group(0) @binding(0) var<storage, read_write> x: array<f32>; var<workgroup> m: array<f32, {}>;"
    head += " @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) i: u32) {{ {} x[i] = m[i]; }}"
    found: list[Shader] = [
        ("barrier", head.format(64, "if (i < 3) { workgroupBarrier(); }"), ["out"]),
        ("memory", head.format(1 << 14, ""), ["out"]),
        ("bindings", head.format(64, " "), ["in"]),
        ("fine", head.format(64, "m[i] = 1.0; workgroupBarrier();"), ["out"]),
    ]
    said = refused(bundle, found, tmp_path / "profile")
    assert said.keys() == {"barrier", "memory", "bindings"}
    assert "uniform control flow" in said["barrier"][0]
