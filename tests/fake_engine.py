"""A bundle small enough to read, and an engine that runs it in numpy: what the runtime is tested with.

The model is a bigram table plus a bias per position: logits[b, t] = table[tokens[b, t]] + position[t]. It is causal,
trains, and keeps its tensors in byte pools at the manifest's offsets, as a real engine does."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from tinygpt.runtime import manifest as manifests
from tinygpt.runtime.manifest import Manifest, Slot
from tinygpt.runtime.threefry import threefry2x32, uniforms

TRAINING = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0, "batch_size": 4}


def document(batch: int = 4, context: int = 8, vocab: int = 256, dropout: bool = False) -> dict[str, Any]:
    """The manifest as JSON, without files."""
    ends = {"state": 0, "work": 0}

    def slot(pool: str, name: str, shape: tuple[int, ...], dtype: str = "f32", **more: Any) -> dict[str, Any]:
        offset = ends[pool]
        ends[pool] += -(-4 * int(np.prod(shape, dtype=np.int64)) // 64) * 64
        return {"name": name, "shape": list(shape), "dtype": dtype, "pool": pool, "offset": offset, **more}

    weights = {"table.weight": (vocab, vocab), "position.bias": (context, vocab)}
    parameters = [
        slot("state", n, s, role="param", init=["normal", 0.02], decay=len(s) > 1) for n, s in weights.items()
    ]
    for moment in "mv":
        for name, shape in weights.items():
            parameters.append(slot("state", f"{name}.{moment}", shape, role="state", init=["zeros"], decay=False))

    batch_inputs = [slot("work", name, (batch, context), "i32") for name in ("tokens", "targets")]
    rates = [slot("work", name, ()) for name in ("lr", "bias1", "bias2")]
    key = [slot("work", "key", (2,), "u32")] if dropout else []
    loss, norm = slot("work", "loss", ()), slot("work", "grad_norm", ())
    grads = [slot("work", f"grad:{name}", shape) for name, shape in weights.items()]
    seed = slot("work", "seed", (2,), "u32")
    functions = {
        "train_step": ([*batch_inputs, *rates, *key], [loss, norm]),
        "loss": (batch_inputs, [loss, slot("work", "row_losses", (batch, context))]),
        "grads": ([*batch_inputs, *key], [loss, *grads]),
        "apply": ([*rates, *grads], [norm]),
        "logits": ([slot("work", "tokens", (1, context), "i32")], [slot("work", "logits", (1, context, vocab))]),
        "init": ([seed], []),
        "windows": (
            [seed, slot("work", "step", (), "u32"), slot("work", "count", (), "u32")],
            [slot("work", "offsets", (batch,), "i32")],
        ),
    }  # fmt: skip
    content = {
        "format": "tinygpt-bundle", "version": 1, "name": "fake", "strict": False,
        "config": {"vocab_size": vocab, "context_length": context}, "batch": batch, "context": context,
        "training": dict(TRAINING), "target": {"name": "fake", "profile": "numpy"}, "pools": ends,
        "parameters": parameters,
        "functions": {name: {"inputs": i, "outputs": o, "launches": []} for name, (i, o) in functions.items()},
        "kernels": {}, "files": {}, "golden": {},
    }  # fmt: skip
    copy: dict[str, Any] = json.loads(json.dumps(content))  # no two entries share an object
    return copy


def manifest(**options: Any) -> Manifest:
    return manifests.parse(json.dumps(document(**options)))


def write_bundle(folder: Path, contents: dict[str, bytes] | None = None, **changes: Any) -> Path:
    """A bundle folder with a source file and `contents`, and the hashes of both in its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"model.src": b"the kernels\n", **(contents or {})}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (folder / manifests.MANIFEST).write_text(json.dumps({**document(), "files": hashes, **changes}))
    return folder


class FakeEngine:
    """Runs the functions of `document` in numpy. `calls` lists the functions run; `keys` the dropout keys received."""

    def __init__(self, folder: Path | None, manifest: Manifest, threads: int | None = None) -> None:
        self._manifest = manifest
        self._threads = threads or 1
        self._pools = {name: np.zeros(size, np.uint8) for name, size in manifest.pools.items()}
        self.calls: list[str] = []
        self.keys: list[tuple[int, int]] = []
        self.closed = False

    @property
    def threads(self) -> int:
        return self._threads

    def _view(self, slot: Slot) -> NDArray[Any]:
        return self._pools[slot.pool][slot.offset : slot.end].view(slot.numpy_dtype).reshape(slot.shape)

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        assert (array.shape, array.dtype) == (slot.shape, slot.numpy_dtype) and array.flags.c_contiguous
        self._view(slot)[...] = array

    def read(self, slot: Slot) -> NDArray[Any]:
        return self._view(slot).copy()

    def run(self, function: str) -> None:
        entry = self._manifest.functions[function]
        self.calls.append(function)
        inputs = {slot.name: self._view(slot) for slot in entry.inputs}
        outputs = {slot.name: self._view(slot) for slot in entry.outputs}
        if "key" in inputs:
            self.keys.append(tuple(inputs["key"].tolist()))
        getattr(self, f"_{function}")(inputs, outputs)

    def close(self) -> None:
        self.closed = True

    @property
    def _parameters(self) -> dict[str, NDArray[Any]]:
        return {slot.name: self._view(slot) for slot in self._manifest.parameters}

    def _init(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
        for number, (name, array) in enumerate(self._parameters.items()):
            key = threefry2x32(tuple(inputs["seed"].tolist()), number, 77)
            moment = name.endswith((".m", ".v"))
            array[...] = 0 if moment else 0.04 * uniforms(key, 0, array.size).reshape(array.shape) - 0.02

    def _windows(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
        key = threefry2x32(tuple(inputs["seed"].tolist()), int(inputs["step"]), 78)
        offsets = outputs["offsets"]
        offsets[...] = (uniforms(key, 0, offsets.size) * int(inputs["count"])).astype(np.int32)

    def _scores(self, tokens: NDArray[Any]) -> NDArray[Any]:
        parameters = self._parameters
        scores: NDArray[Any] = parameters["table.weight"][tokens] + parameters["position.bias"][: tokens.shape[1]]
        return scores

    def _logits(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
        outputs["logits"][...] = self._scores(inputs["tokens"])

    def _losses(self, inputs: dict[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
        scores = self._scores(inputs["tokens"])
        with np.errstate(invalid="ignore"):  # tests of divergence put infinities here
            weights = np.exp(scores - scores.max(-1, keepdims=True))
        probabilities = weights / weights.sum(-1, keepdims=True)
        chosen = np.take_along_axis(probabilities, inputs["targets"][..., None], -1)[..., 0]
        return -np.log(chosen), probabilities

    def _loss(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
        outputs["row_losses"][...] = self._losses(inputs)[0]
        outputs["loss"][...] = outputs["row_losses"].mean(dtype=np.float64)

    def _gradients(self, inputs: dict[str, NDArray[Any]]) -> tuple[float, dict[str, NDArray[Any]]]:
        losses, scores = self._losses(inputs)
        scores[(*np.indices(losses.shape), inputs["targets"])] -= 1
        scores /= losses.size
        table = np.zeros_like(self._parameters["table.weight"])
        np.add.at(table, inputs["tokens"], scores)
        return float(losses.mean(dtype=np.float64)), {"table.weight": table, "position.bias": scores.sum(0)}

    def _grads(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
        outputs["loss"][...], gradients = self._gradients(inputs)
        for name, gradient in gradients.items():
            outputs[f"grad:{name}"][...] = gradient

    def _apply(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
        gradients = {name[5:]: array for name, array in inputs.items() if name.startswith("grad:")}
        self._update(gradients, inputs, outputs)

    def _train_step(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> None:
        outputs["loss"][...], gradients = self._gradients(inputs)
        self._update(gradients, inputs, outputs)

    def _update(
        self, gradients: dict[str, NDArray[Any]], inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]
    ) -> None:
        settings, parameters = self._manifest.training, self._parameters
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
        outputs["grad_norm"][...] = norm
        scale = np.float32(min(1.0, settings["clip"] / (norm + 1e-6)))
        lr, bias1, bias2 = (inputs[name] for name in ("lr", "bias1", "bias2"))
        for slot in self._manifest.parameters:
            if slot.role != "param":
                continue
            weight, m, v = (parameters[slot.name + suffix] for suffix in ("", ".m", ".v"))
            gradient = gradients[slot.name] * scale
            m[...] = settings["beta1"] * m + (1 - settings["beta1"]) * gradient
            v[...] = settings["beta2"] * v + (1 - settings["beta2"]) * gradient**2
            decay = settings["weight_decay"] if slot.decay else 0.0
            weight[...] = weight * (1 - lr * decay) - lr * (m / bias1) / (np.sqrt(v / bias2) + settings["eps"])


class LateEngine(FakeEngine):
    """A fake engine that computes beside the host, as late as it may: what was written and begun waits in a queue until
    something is read. `begun` lists the functions in the order in which they were begun."""

    def __init__(self, folder: Path | None, manifest: Manifest, threads: int | None = None) -> None:
        super().__init__(folder, manifest, threads)
        self.begun: list[str] = []
        self._queue: deque[Callable[[], None]] = deque()

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        self._require_open()
        self._queue.append(partial(super().write, slot, array.copy()))

    def begin(self, function: str) -> Callable[[Slot], NDArray[Any]]:
        self._require_open()
        self.begun.append(function)
        results: dict[Slot, NDArray[Any]] = {}

        def compute() -> None:
            FakeEngine.run(self, function)
            results.update({slot: FakeEngine.read(self, slot) for slot in self._manifest.functions[function].outputs})

        def result(slot: Slot) -> NDArray[Any]:
            while slot not in results:
                self._queue.popleft()()
            return results[slot].copy()

        self._queue.append(compute)
        return result

    begin_with_next = begin

    def run(self, function: str) -> None:
        self.begin(function)
        self._catch_up()

    def read(self, slot: Slot) -> NDArray[Any]:
        self._catch_up()
        return super().read(slot)

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError("the engine is closed")

    def _catch_up(self) -> None:
        while self._queue:
            self._queue.popleft()()


def golden_vectors(manifest: Manifest) -> bytes:
    """Golden vectors for `loss` and `train_step`, made by the fake engine itself: a safetensors file."""
    engine = FakeEngine(None, manifest)
    generator = np.random.default_rng(0)
    vectors: dict[str, NDArray[Any]] = {}
    for parameter in manifest.parameters:
        if parameter.role == "param":
            vectors[f"param/{parameter.name}"] = generator.normal(0, 0.1, parameter.shape).astype(np.float32)
    for name in ("loss", "train_step"):
        for parameter in manifest.parameters:
            engine.write(parameter, vectors.get(f"param/{parameter.name}", np.zeros(parameter.shape, np.float32)))
        for slot in manifest.functions[name].inputs:
            drawn = generator.integers(0, 100, slot.shape) if slot.dtype == "i32" else np.full(slot.shape, 0.1)
            vectors[f"{name}/in/{slot.name}"] = np.asarray(drawn, slot.numpy_dtype)
            engine.write(slot, vectors[f"{name}/in/{slot.name}"])
        engine.run(name)
        for slot in manifest.functions[name].outputs:
            vectors[f"{name}/out/{slot.name}"] = engine.read(slot)
    vectors["train_step/out/table.weight"] = engine.read(manifest.parameters[0])
    return safetensors.numpy.save(vectors)
