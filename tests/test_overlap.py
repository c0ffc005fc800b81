"""Training steps that overlap with the host: on a device that queues, the next one is submitted before the loss of the last
is read, and all that is reported is what it would be one after the other. In Node, on a GPU that is a fake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine import document, write_bundle
from tests.node import node
from tinygpt.runtime.gpu import host_files

STEPS = 8
FUNCTIONS = ("init", "windows", "train_step", "loss")
# What the tests' own scripts find before them, and how what they return is told.
SCRIPT = """
    import fs from "node:fs";
    import { FakeGpu } from "./fake_gpu.mjs";
    import { gather, open, sha256, split, train } from "./bundle/host/tinygpt.mjs";
    const folder = new URL("bundle", import.meta.url).pathname;
    const corpus = Uint8Array.from({ length: 400 }, (_, i) => (i * i) % 251);
    const manifest = JSON.parse(fs.readFileSync(`${folder}/manifest.json`));
    const context = manifest.context, count = split(corpus).train.length - context;
    const started = async (setting = {}) => {
        navigator.gpu = Object.assign(new FakeGpu(manifest), setting);
        return [await open(folder, { seed: 5 }), navigator.gpu];
    };
    const saved = async (session) => sha256(Buffer.concat(await Array.fromAsync(session.checkpoint())));
    const said = ({ name, message, hint }) => [name, message, hint];
    /** Rows of `train`, without its speed, and hashes of its checkpoints. */
    const overlapped = async (session, options, rows = []) => {
        const onRow = ({ tokens_per_s, ...row }) => rows.push(row);
        await train(session, corpus, { onRow, save: async () => rows.push(await saved(session)), ...options });
        return rows;
    };
    /** The same, waiting for everything. */
    const oneByOne = async (session, { steps, evalEvery, saveEvery }) => {
        const rows = [], { train, validation } = split(corpus);
        const save = async () => rows.push(await saved(session));
        const evaluate = async () => {
            const train_loss = await session.evaluate(train.subarray(0, validation.length));
            rows.push({ step: session.step, train_loss, val_loss: await session.evaluate(validation) });
        };
        if (evalEvery) await evaluate();
        for (let step = 1; step <= steps; step++) {
            const batch = gather(train, await session.windows(step - 1, count), context);
            const { loss, gradNorm } = await session.trainStep(...batch);
            rows.push({ step, loss, grad_norm: gradNorm });
            if (evalEvery && (step % evalEvery === 0 || step === steps)) await evaluate();
            if (saveEvery && step % saveEvery === 0 && step < steps) await save();
        }
        await save();
        return rows;
    };
    console.log(JSON.stringify(await (async () => { BODY })()));
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle for a device, with its host, whose functions are one launch each; and the device."""
    kernels = {name: {"file": f"{name}.wgsl", "access": []} for name in FUNCTIONS}
    manifest = document(dropout=True)
    manifest["functions"] = {name: manifest["functions"][name] for name in FUNCTIONS}
    launches = {name: [{"kernel": name, "workgroups": [1, 1, 1], "bindings": []}] for name in FUNCTIONS}
    manifest["target"] = {
        "name": "wgsl", "profile": "fake", "features": [], "subgroup": 0, "limits": {}, "kernels": kernels, "functions": launches,
    }  # fmt: skip
    del manifest["files"]
    write_bundle(tmp_path / "bundle", {f"{name}.wgsl": b"" for name in FUNCTIONS} | host_files(), **manifest)
    shutil.copy(Path(__file__).with_name("fake_gpu.mjs"), tmp_path)
    return tmp_path


def found(folder: Path, body: str) -> Any:
    """What the body of an asynchronous function returns in Node, beside the session's helpers in SCRIPT."""
    (folder / "check.mjs").write_text(SCRIPT.replace("BODY", body))
    return json.loads(node(folder / "check.mjs"))


def test_the_next_step_is_submitted_before_the_loss_of_the_last_is_read(folder: Path) -> None:
    log = found(
        folder,
        f"""
        const [session, gpu] = await started();
        gpu.log.length = 0;
        await train(session, corpus, {{ steps: {STEPS}, onRow: ({{ step }}) => gpu.log.push(`row ${{step}}`) }});
        return gpu.log;
        """,
    )
    steps = {event: [n for n, found in enumerate(log) if found == f"{event} train_step"] for event in ("submit", "done")}
    rows = [log.index(f"row {step}") for step in range(1, STEPS + 1)]
    assert rows == sorted(rows) and len(steps["submit"]) == len(steps["done"]) == STEPS
    for step in range(STEPS - 1):
        assert steps["submit"][step + 1] < steps["done"][step] < rows[step], log
        assert step + 2 >= STEPS or steps["submit"][step + 2] > rows[step], log  # one in flight, no more
    submitted = [event for event in log if event.startswith("submit")]
    assert submitted == ["submit windows", *["submit windows", "submit train_step"] * (STEPS - 1), "submit train_step"]


@pytest.mark.parametrize("options", [{}, {"evalEvery": 3}, {"saveEvery": 2}, {"evalEvery": 2, "saveEvery": 3}, {"evalEvery": 1}])
def test_a_run_reports_and_saves_the_bits_of_one_step_after_the_other(options: dict[str, int], folder: Path) -> None:
    given = json.dumps({"steps": STEPS, **options})
    overlapped, one_by_one = found(
        folder,
        f"""
        const [overlapping] = await started();
        const rows = await overlapped(overlapping, {given});
        const [waiting] = await started();
        return [rows, await oneByOne(waiting, {given})];
        """,
    )
    assert overlapped == one_by_one
    losses = [row["loss"] for row in one_by_one if "loss" in row]
    assert len(losses) == len(set(losses)) == STEPS


def test_a_stopped_run_has_reported_every_step_it_began_and_resumes(folder: Path) -> None:
    whole, stopped, step, begun, resumed = found(
        folder,
        f"""
        const [waiting] = await started();
        const whole = await oneByOne(waiting, {{ steps: {STEPS} }});
        const [session, gpu] = await started();
        const rows = [];
        await overlapped(session, {{ steps: {STEPS}, stop: () => rows.length === 3 }}, rows);
        const [stopped, step, begun] = [rows.slice(), session.step, gpu.steps];
        return [whole, stopped, step, begun, await overlapped(session, {{ steps: {STEPS} }})];
        """,
    )
    *rows, checkpoint = stopped
    assert len(rows) == step == begun == 4  # one was in flight
    assert isinstance(checkpoint, str)
    assert rows + resumed == whole


@pytest.mark.parametrize(("options", "others"), [({}, 1), ({"saveEvery": 4}, 0), ({"evalEvery": 5}, 1)])
def test_divergence_names_its_own_step_and_ends_the_rows(options: dict[str, int], others: int, folder: Path) -> None:
    """`others`: steps that were in flight then, which nothing is told of."""
    error, rows, begun = found(
        folder,
        f"""
        const [session, gpu] = await started({{ divergesAt: 3 }});
        const rows = [];
        const error = await overlapped(session, {json.dumps({"steps": STEPS, **options})}, rows).catch(said);
        await new Promise((resolve) => setTimeout(resolve, 50));
        session.close();
        return [error, rows.filter((row) => "loss" in row).map(({{ step }}) => step), gpu.steps];
        """,
    )
    assert error[0] == "UserError" and error[1].startswith("the loss became NaN after 3 steps")
    assert rows == [1, 2, 3]
    assert begun == 4 + others


def test_what_is_called_while_a_function_is_made_ready_keeps_its_order(folder: Path) -> None:
    at_once, in_turn, log = found(
        folder,
        """
        const calls = (session, batch) => [
            () => session.trainStep(...batch), () => session.windows(3, count), () => session.loss(...batch),
            () => session.trainStep(...batch), () => session.windows(4, count), () => saved(session),
        ];
        const batch = gather(corpus, [1, 2, 3, 4], context);
        const [held, gpu] = await started();
        await held.windows(0, count); // ready: it would overtake the step, and write over its inputs
        gpu.log.length = 0;
        const at_once = await Promise.all(calls(held, batch).map((call) => call()));
        const [waiting] = await started();
        const in_turn = [];
        for (const call of calls(waiting, batch)) in_turn.push(await call());
        return [at_once, in_turn, gpu.log.filter((event) => event.startsWith("submit"))];
        """,
    )
    assert at_once == in_turn
    assert log[:5] == [f"submit {name}" for name in ("train_step", "windows", "loss", "train_step", "windows")]


def test_a_refused_kernel_is_named_and_holds_up_nothing_else(folder: Path) -> None:
    refused, windows, again, wanted, steps = found(
        folder,
        """
        const [session, gpu] = await started({ refuses: "train_step" });
        const batch = gather(corpus, [1, 2, 3, 4], context);
        const [refused, windows] = await Promise.allSettled([session.trainStep(...batch), session.windows(3, count)]);
        const again = await session.trainStep(...batch).catch(said);
        return [said(refused.reason), windows, again, await session.windows(3, count), session.step];
        """,
    )
    assert refused == again and steps == 0  # none was done
    assert refused[0] == "UserError" and "the device refuses kernel train_step: no such instruction" in refused[1]
    assert windows == {"status": "fulfilled", "value": wanted}


def test_a_closed_session_ends_what_waits_for_its_turn(folder: Path) -> None:
    said = found(
        folder,
        """
        const [session] = await started();
        const batch = gather(corpus, [1, 2, 3, 4], context);
        const waiting = [session.trainStep(...batch), session.windows(3, count)].map((call) => call.catch(said));
        session.close();
        return Promise.all(waiting);
        """,
    )
    assert [(kind, "the session is closed" in message) for kind, message, _ in said] == [("UserError", True)] * 2
