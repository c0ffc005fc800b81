"""The JavaScript host in Node: the same numbers and the same checkpoints as Python, with threads and without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.node import node
from tests.wasm_bundle import VOCABULARY, write_bundle
from tinygpt.runtime import bundle as bundles
from tinygpt.runtime.data import Corpus
from tinygpt.runtime.sampling import Sampling
from tinygpt.runtime.training import train
from tinygpt.runtime.wasm import host_files
from tinygpt.targets.wasm.profiles import PROFILES

PROFILE = "wasm32-threads-relaxed-v8"
STEPS = 12
CORPUS = np.random.default_rng(5).integers(0, VOCABULARY, 3000).astype(np.uint8)


def made(folder: Path, profile: str = PROFILE) -> Path:
    """A bundle with its host, and a corpus beside it."""
    write_bundle(folder / "bundle", PROFILES[profile])
    (folder / "bundle" / "host").mkdir()
    for name, content in host_files().items():
        (folder / "bundle" / name).write_bytes(content)
    (folder / "corpus.txt").write_bytes(CORPUS.tobytes())
    return folder


def trained(folder: Path, *more: str | Path) -> list[dict[str, float]]:
    """Train in Node; the rows of its metrics."""
    arguments = ("--steps", STEPS, "--tokens", 0, "--metrics", folder / "rows.jsonl", *more)
    node(folder / "bundle/host/train.mjs", folder / "corpus.txt", *map(str, arguments))
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def without_speed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def test_a_checkpoint_whose_arrays_lie_behind_4_gib_resumes_in_node(tmp_path: Path) -> None:
    folder, saved = made(tmp_path), tmp_path / "saved.safetensors"
    trained(folder, "--out", saved)
    small = saved.read_bytes()
    length = int.from_bytes(small[:8], "little")
    header = json.loads(small[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [at + (1 << 32) for at in entry["data_offsets"]]
    text = json.dumps(header).encode()
    with (tmp_path / "far.safetensors").open("wb") as far:  # a hole takes no room on the disk
        far.write(len(text).to_bytes(8, "little") + text)
        far.seek(1 << 32, 1)
        far.write(small[8 + length :])
    rows = [trained(folder, "--resume", path, "--steps", str(STEPS + 1))[-1:] for path in (saved, tmp_path / "far.safetensors")]
    assert rows[0][0]["step"] == STEPS + 1
    assert without_speed(rows[0]) == without_speed(rows[1])


@pytest.mark.parametrize("profile", ["wasm32-threads-relaxed-v8", "wasm64-threads-relaxed-v8", "wasm64-v8"])
def test_node_and_python_train_alike_and_share_checkpoints(profile: str, tmp_path: Path) -> None:
    folder = made(tmp_path, profile)
    rows = trained(folder, "--eval-every", "5", "--out", folder / "node.safetensors")
    expected: list[dict[str, float]] = []
    with bundles.load(folder / "bundle").session() as session:
        corpus = Corpus("corpus.txt", "", CORPUS)
        train(
            session,
            corpus,
            STEPS,
            eval_every=5,
            out=folder / "python.safetensors",
            on_row=lambda row: expected.append(dict(row)),
        )
        assert without_speed(rows) == without_speed(expected)
        wanted = session.state()
        session.load(folder / "node.safetensors")
        assert (session.step, session.seed, session.data) == (STEPS, 42, corpus.fingerprint)
        assert all(np.array_equal(array, wanted[name]) for name, array in session.state().items())
    resumed = trained(
        folder, "--resume", folder / "python.safetensors", "--steps", "14", "--out", folder / "on.safetensors"
    )
    assert [row["step"] for row in resumed[-2:]] == [13, 14]


def test_threads_and_a_free_main_thread_change_no_bit(tmp_path: Path) -> None:
    folder = made(tmp_path)
    script = folder / "check.mjs"
    script.write_text(
        """
        import fs from "node:fs";
        import { open, train } from "./bundle/host/tinygpt.mjs";
        const corpus = new Uint8Array(fs.readFileSync(new URL("corpus.txt", import.meta.url)));
        const curves = [];
        for (const threads of [1, 2, 3]) for (const blocking of [true, false]) {
          const session = await open(new URL("bundle", import.meta.url).pathname, { threads, blocking, seed: 3 });
          const losses = [];
          await train(session, corpus, { steps: 6, onRow: (row) => losses.push(row.loss) });
          curves.push(String(losses));
          session.close();
        }
        console.log(new Set(curves).size, curves[0].split(",").length);
        """
    )
    assert node(script) == "1 6\n"


def test_runs_that_share_their_inputs_follow_each_other(tmp_path: Path) -> None:
    """Steps do not overlap where the next one's inputs would be written over those that workers read. A run that is stopped
    has reported all it did and goes on as if it had not been; one that diverges says after how many steps, and nothing more."""
    folder = made(tmp_path)
    script = folder / "check.mjs"
    script.write_text(
        """
        import fs from "node:fs";
        import { open, train } from "./bundle/host/tinygpt.mjs";
        const corpus = new Uint8Array(fs.readFileSync(new URL("corpus.txt", import.meta.url)));
        const found = [];
        for (const blocking of [true, false]) {
          const session = await open(new URL("bundle", import.meta.url).pathname, { threads: 2, blocking });
          const { engine } = session, begin = engine.run.bind(engine), rows = [];
          let flying = 0, most = 0;
          engine.run = (...given) => {
            most = Math.max(most, ++flying);
            return begin(...given).finally(() => flying--);
          };
          const onRow = ({ tokens_per_s, ...row }) => rows.push(row);
          await train(session, corpus, { steps: 12, evalEvery: 5, onRow, stop: () => rows.length === 7 });
          const stopped = session.step;
          await train(session, corpus, { steps: 12, evalEvery: 5, onRow });
          const diverged = [];
          const ruined = { steps: 20, lr: 1e30, onRow: ({ step }) => diverged.push(step) };
          const { message } = await train(session, corpus, ruined).catch((error) => error);
          found.push({ rows, most, stopped, diverged, message });
          session.close();
        }
        console.log(JSON.stringify(found));
        """
    )
    wanted = without_speed(trained(folder, "--eval-every", "5"))
    for found in json.loads(node(script)):
        assert found["rows"] == wanted
        assert (found["most"], found["stopped"]) == (1, 5)
        assert found["message"].startswith(f"the loss became Infinity after {found['diverged'][-1]} steps")
        assert found["diverged"] == list(range(STEPS + 1, found["diverged"][-1] + 1))


def test_a_page_without_shared_memory_runs_one_thread(tmp_path: Path) -> None:
    """As in a page that is not cross-origin isolated: no Node, the module made unshared, hashes computed here."""
    folder = made(tmp_path)
    rows = trained(folder, "--threads", "1", "--out", folder / "node.safetensors")
    script = folder / "check.mjs"
    script.write_text(
        """
        import fs from "node:fs";
        const read = async (name) => new Uint8Array(fs.readFileSync(new URL(`bundle/${name}`, import.meta.url)));
        const corpus = new Uint8Array(fs.readFileSync(new URL("corpus.txt", import.meta.url)));
        const saved = fs.readFileSync(new URL("node.safetensors", import.meta.url));
        const { log } = console;
        delete globalThis.process;
        globalThis.window = globalThis;
        const { open, sha256, train } = await import("./bundle/host/tinygpt.mjs");
        const session = await open(read, { threads: 2 });
        const losses = [];
        await train(session, corpus, { steps: 12, onRow: (row) => losses.push(row.loss) });
        session.data = { name: "corpus.txt", bytes: corpus.length, sha256: sha256(corpus) };
        const same = Buffer.concat(await Array.fromAsync(session.checkpoint())).equals(saved);
        const wrong = (await session.selfTest()).filter((check) => !check.passed);
        log(JSON.stringify({ same, wrong, losses }));
        """
    )
    warning, answer = node(script).splitlines()
    assert "one thread instead of 2" in warning
    assert json.loads(answer) == {"same": True, "wrong": [], "losses": [row["loss"] for row in rows]}


def test_samples_are_those_of_python(tmp_path: Path) -> None:
    folder = made(tmp_path)
    options = [Sampling(0.8, 40, 1.0, 1), Sampling(1.5, 0, 0.7, 2**63 + 5), Sampling(0.0, 0, 1.0, 0)]
    with bundles.load(folder / "bundle").session() as session:
        wanted = [list(session.stream(prompt, 30, o)) for o in options for prompt in ("ab", "")]
    script = folder / "check.mjs"
    script.write_text(
        """ import { open } from "./bundle/host/tinygpt.mjs"; const session = await open(new URL("bundle",
        import.meta.url).pathname, { threads: 1 }); const samples = []; for (const [temperature, topK,
        topP, seed] of [[0.8, 40, 1, 1], [1.5, 0, 0.7, 2n ** 63n + 5n], [0, 0, 1, 0]]) { for (const prompt
        of ["ab", ""]) { samples.push([]); for await (const byte of session.stream(prompt, 30, {
        temperature, topK, topP, seed })) samples.at(-1).push(byte); } }
        console.log(JSON.stringify(samples));"""
    )
    assert json.loads(node(script)) == wanted


def test_the_selftest_passes(tmp_path: Path) -> None:
    assert node(made(tmp_path) / "bundle/host/train.mjs", "--selftest").count("ok ") == 3


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("pools", {"state": 1024, "work": 2048}, "target.pools.work"),
        ("scratch", 64, "target.scratch"),
        ("max_threads", 1 << 40, "target.max_threads"),
        ("entries", [], "the entry of"),
        ("address_bits", 16, "target.address_bits"),
    ],
)
def test_a_damaged_manifest_is_refused(key: str, value: object, complaint: str, tmp_path: Path) -> None:
    folder = made(tmp_path)
    path = folder / "bundle/manifest.json"
    document = json.loads(path.read_text())
    document["target"][key] = value
    path.write_text(json.dumps(document))
    said = node(folder / "bundle/host/train.mjs", folder / "corpus.txt", status=2)
    assert said.startswith(f"error: manifest.json: {complaint}") and "hint:" in said


@pytest.mark.parametrize("name", ["model.wasm", "corpus", "checkpoint"])
def test_damaged_and_missing_files_are_refused(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path)
    program, corpus = folder / "bundle/host/train.mjs", folder / "corpus.txt"
    if name == "model.wasm":
        content = bytearray((folder / "bundle/model.wasm").read_bytes())
        content[-1] ^= 1
        (folder / "bundle/model.wasm").write_bytes(content)
        assert "is not the file this bundle was built with" in node(program, corpus, status=2)
    elif name == "corpus":
        assert "cannot be read" in node(program, folder / "missing.txt", status=2)
        corpus.write_bytes(b"abc")
        assert "the corpus has 3 bytes" in node(program, corpus, status=2)
    else:
        trained(folder, "--out", folder / "a.safetensors")
        content = bytearray((folder / "a.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "a.safetensors").write_bytes(content)
        assert "was damaged or edited" in node(program, corpus, "--resume", folder / "a.safetensors", status=2)
        (folder / "a.safetensors").write_bytes(content[:-9])
        assert "is truncated" in node(program, corpus, "--resume", folder / "a.safetensors", status=2)


def test_the_host_is_small() -> None:
    assert len(host_files()["host/tinygpt.mjs"]) <= 40 * 1024
