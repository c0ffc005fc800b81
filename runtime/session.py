"""A model in memory: its weights, its optimizer, and the functions of its bundle as Python calls.

Tokens may have any integer type; they are checked (shape, range) before compiled code sees them. A call costs a few
writes to places computed once, in the constructor: below 0.1 ms on top of the function itself.

Where the engine computes beside the host (a GPU), `begin_step` and `begin_windows` return while it does, with a function
that waits for their result; elsewhere they return when it is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinygpt.runtime import checkpoint, data, tokenizer
from tinygpt.runtime.checkpoint import Checkpoint
from tinygpt.runtime.engine import Engine, Overlapping
from tinygpt.runtime.errors import DivergedError, UserError
from tinygpt.runtime.manifest import Manifest, Slot
from tinygpt.runtime.sampling import Sampling, sample
from tinygpt.runtime.threefry import DROPOUT, purpose_key, seed_words, threefry2x32

# What the host must supply to a function, and what it reads back. A bundle may lack a function; a `key` input is there
# only if the model has dropout. "grad:" stands for one tensor per parameter.
_SIGNATURES: dict[str, tuple[set[str], set[str]]] = {
    "train_step": ({"tokens", "targets", "lr", "bias1", "bias2", "key"}, {"loss", "grad_norm"}),
    "loss": ({"tokens", "targets", "key"}, {"loss", "row_losses"}),
    "grads": ({"tokens", "targets", "key"}, {"loss", "grad:"}),
    "apply": ({"lr", "bias1", "bias2", "grad:"}, {"grad_norm"}),
    "logits": ({"tokens"}, {"logits"}),
    "init": ({"seed"}, set()),
    "windows": ({"seed", "step", "count"}, {"offsets"}),
}


@dataclass(frozen=True)
class _Function:
    """A function's slots by name."""

    inputs: Mapping[str, Slot]
    outputs: Mapping[str, Slot]


class Session:
    """Weights, optimizer and step count of one model, on one engine.

    A fresh session holds the initial weights of `seed`; the same seed gives the same weights and batches on every
    target. `step` counts the optimizer steps done, those begun included; `training` are the settings, from the
    manifest, with the learning rate of a loaded checkpoint; `data` is the fingerprint of the corpus the weights were
    trained on, if one is known."""

    def __init__(self, manifest: Manifest, engine: Engine, seed: int = 42) -> None:
        """Raises UserError if the bundle asks for an input this runtime does not know."""
        self.manifest = manifest
        self.engine = engine
        self._overlapping = engine if isinstance(engine, Overlapping) else None
        self.seed = seed
        self.step = 0
        self.training: dict[str, Any] = dict(manifest.training)
        self.data: Mapping[str, Any] | None = None
        self._functions = {name: _signature(manifest, name) for name in _SIGNATURES if name in manifest.functions}
        self._parameters = {slot.name: slot for slot in manifest.parameters if slot.role == "param"}
        self._tokens_shape = (manifest.batch, manifest.context)
        self._scalar = np.zeros((), np.float32)
        self._seed_array = np.array(seed_words(seed), np.uint32)
        self._init_powers()
        self.init()

    def init(self) -> None:
        """Write the initial weights of `self.seed`, zero the moments, and start at step 0."""
        if "init" in self._functions:
            self._seed_array = np.array(seed_words(self.seed), np.uint32)
            self.engine.write(self._functions["init"].inputs["seed"], self._seed_array)
            self.engine.run("init")
        self._set_step(0)

    @property
    def overlaps(self) -> bool:
        """Whether the engine computes what is begun while the host goes on."""
        return self._overlapping is not None

    def close(self) -> None:
        """Free the engine's memory and threads."""
        self.engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Weights and checkpoints

    def parameters(self) -> dict[str, NDArray[Any]]:
        """Copies of the weights, in PyTorch's names and shapes (a tied weight once)."""
        return {name: self.engine.read(slot) for name, slot in self._parameters.items()}

    def load_parameters(self, parameters: Mapping[str, ArrayLike]) -> None:
        """Set all weights; moments and step stay as they are. Raises UserError, and changes nothing, if a name is
        missing or unknown or a shape differs."""
        arrays = {name: np.asarray(array) for name, array in parameters.items()}
        missing = [name for name in self._parameters if name not in arrays]
        if missing:
            raise UserError(
                f"load_parameters: {missing[0]} is missing", hint="give every name that session.parameters() lists"
            )
        for name, array in arrays.items():
            slot = self._parameters.get(name)
            if slot is None:
                close = get_close_matches(name, self._parameters, 1)
                raise UserError(
                    f"load_parameters: the model has no parameter {name!r}",
                    hint=f"did you mean {close[0]!r}?"
                    if close
                    else "give exactly the names session.parameters() lists",
                )
            if array.shape != slot.shape or array.dtype.kind not in "fiu":
                raise UserError(
                    f"load_parameters: {name} has shape {array.shape} and type {array.dtype}, "
                    f"the model wants {slot.shape} and {slot.dtype}",
                    hint="weights have PyTorch's shapes: a Linear's weight is [out, in]",
                )
        for name, slot in self._parameters.items():
            self._write_array(slot, arrays[name])

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of the weights and of the optimizer's moments (NAME.m, NAME.v): what a checkpoint holds."""
        return {slot.name: self.engine.read(slot) for slot in self.manifest.parameters}

    def snapshot(self) -> Checkpoint:
        """The session's whole state, as `save` writes it."""
        return Checkpoint(
            arrays=self.state(),
            step=self.step,
            seed=self.seed,
            batch=self.manifest.batch,
            context=self.manifest.context,
            config=self.manifest.config,
            training=self.training,
            data=self.data,
        )

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint, whole or not at all. Raises UserError if it cannot be written."""
        return checkpoint.save(path, self.snapshot())

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint of this model, of whatever target: weights, moments, step, seed and settings.
        Raises UserError, and changes nothing, if the file is damaged or belongs to another model."""
        loaded = checkpoint.load(path)
        checkpoint.require_fit(loaded, self.manifest, path)
        for slot in self.manifest.parameters:
            self._write_array(slot, loaded.arrays[slot.name])
        self.seed = loaded.seed
        self._seed_array = np.array(seed_words(self.seed), np.uint32)
        # The other settings are compiled into the bundle.
        self.training = {**self.manifest.training, "lr": loaded.training.get("lr", self.manifest.training.get("lr"))}
        self.data = loaded.data
        self._set_step(loaded.step)

    # Training

    def train_step(self, tokens: ArrayLike, targets: ArrayLike, lr: float | None = None) -> tuple[float, float]:
        """One step of AdamW on a batch (integers [batch, context]): the batch's loss before the update, in nats per
        token, and the norm of its gradient before clipping. `lr` None takes the setting.

        Raises DivergedError if either is not finite, UserError if the arrays do not fit. Either way `step` counts the
        updates of the weights: a diverged step has made one."""
        return self.begin_step(tokens, targets, lr)()

    def begin_step(self, tokens: ArrayLike, targets: ArrayLike, lr: float | None = None) -> Callable[[], tuple[float, float]]:
        """Begin what `train_step` does. The returned function waits for this step, not for later ones, and gives its loss
        and norm; it raises what `train_step` raises of them. Whatever is called meanwhile finds the weights as the step leaves them."""
        function = self._function("train_step")
        self._write_batch(function.inputs, tokens, targets)
        self._write_rates(function.inputs, lr)
        result = self._overlapping.begin("train_step") if self._overlapping else self._run("train_step")
        before = self.step
        self._advance()

        def wait() -> tuple[float, float]:
            loss = self._finite(result(function.outputs["loss"]), "the loss", before)
            return loss, self._finite(result(function.outputs["grad_norm"]), "the gradient norm", before)

        return wait

    def loss(self, tokens: ArrayLike, targets: ArrayLike) -> float:
        """Mean cross-entropy of a batch, nats per token. Raises DivergedError if it is not finite."""
        self._write_batch(self._function("loss").inputs, tokens, targets)
        self.engine.run("loss")
        return self._finite(self.engine.read(self._functions["loss"].outputs["loss"]), "the loss", self.step)

    def grads(self, tokens: ArrayLike, targets: ArrayLike) -> dict[str, NDArray[Any]]:
        """The gradient of the batch's loss by every parameter, unclipped. Raises DivergedError if the loss is not
        finite."""
        self._write_batch(self._function("grads").inputs, tokens, targets)
        self.engine.run("grads")
        self._micro_batch += 1
        outputs = self._functions["grads"].outputs
        self._finite(self.engine.read(outputs["loss"]), "the loss", self.step)
        return {name: self.engine.read(outputs[f"grad:{name}"]) for name in self._parameters}

    def apply(self, grads: Mapping[str, ArrayLike], lr: float | None = None) -> float:
        """Clip `grads` (as from `grads`, perhaps averaged over several batches or machines) and take one step of AdamW.
        Returns their norm before clipping. Raises DivergedError if it is not finite."""
        inputs = self._function("apply").inputs
        for name, slot in self._parameters.items():
            if name not in grads or np.shape(grads[name]) != slot.shape:
                what = f"has shape {np.shape(grads[name])}, not {slot.shape}" if name in grads else "is missing"
                raise UserError(f"apply: the gradient of {name} {what}", hint="give what session.grads returned")
        for name in self._parameters:
            self._write_array(inputs[f"grad:{name}"], np.asarray(grads[name]))
        self._write_rates(inputs, lr)
        self.engine.run("apply")
        before = self.step
        self._advance()
        return self._finite(self.engine.read(self._functions["apply"].outputs["grad_norm"]), "the gradient norm", before)

    def windows(self, step: int, count: int) -> NDArray[Any]:
        """i32[batch] starts, each in [0, count), of the windows of the batch for `step` (steps done before it). A
        function of (seed, step, count) alone, computed by the bundle, so every target draws the same."""
        return self.begin_windows(step, count)()

    def begin_windows(self, step: int, count: int) -> Callable[[], NDArray[Any]]:
        """Begin what `windows` does, together with the step that is begun next; the returned function waits for both, or for
        the windows alone if no step was begun."""
        function = self._function("windows")
        self.engine.write(function.inputs["seed"], self._seed_array)
        self.engine.write(function.inputs["step"], np.array(step, np.uint32))
        self.engine.write(function.inputs["count"], np.array(count, np.uint32))
        result = self._overlapping.begin_with_next("windows") if self._overlapping else self._run("windows")
        return lambda: result(function.outputs["offsets"])

    # Evaluation and generation

    def evaluate(self, text: bytes | NDArray[np.uint8]) -> float:
        """Mean cross-entropy over every byte of `text` but the first, nats per byte, in windows that do not overlap;
        each byte weighs the same. Disturbs neither the weights nor the batches of a run.

        Raises UserError for a text below 2 bytes, DivergedError if the loss is not finite."""
        tokens = np.frombuffer(text, np.uint8) if isinstance(text, bytes) else text
        tokenizer.require_vocabulary(tokens, self.manifest.vocab_size, "the text to evaluate")
        if tokens.size < 2:
            raise UserError(
                f"evaluate: the text has {tokens.size} bytes, at least 2 are needed", hint="give a longer text"
            )
        function = self._function("loss")
        total = 0.0
        for inputs, targets, mask in data.evaluation_batches(tokens, *self._tokens_shape):
            self._write_batch(function.inputs, inputs, targets)
            self.engine.run("loss")
            total += float(self.engine.read(function.outputs["row_losses"])[mask].sum(dtype=np.float64))
        if not math.isfinite(total):
            raise self._diverged("the evaluation loss", total, self.step)
        return total / (tokens.size - 1)

    def logits(self, tokens: ArrayLike) -> NDArray[Any]:
        """f32[..., n, vocab] for tokens [n] or [1, n], 1 <= n <= context: the scores of the token after each."""
        array = np.asarray(tokens)
        flat = array[0] if array.ndim == 2 and array.shape[0] == 1 else array
        if flat.ndim != 1 or not 1 <= flat.size <= self.manifest.context:
            raise UserError(
                f"logits: tokens have shape {array.shape}, wanted [n] or [1, n], n from 1 to {self.manifest.context}",
                hint="give one sequence, no longer than the context",
            )
        scores = self._logits(self._tokens(flat, flat.shape, "tokens"))
        return scores[: flat.size].reshape(*array.shape, -1)

    def generate(
        self,
        prompt: bytes | str,
        tokens: int,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 1.0,
        seed: int = 42,
    ) -> bytes:
        """`tokens` new bytes after `prompt` (the prompt itself is not returned). temperature <= 0 is greedy; top_k = 0
        and top_p = 1 keep every byte. Raises UserError for a value out of range."""
        return bytes(self.stream(prompt, tokens, Sampling(temperature, top_k, top_p, seed)))

    def stream(self, prompt: bytes | str, tokens: int, sampling: Sampling) -> Iterator[int]:
        """The bytes of `generate`, one by one. The model sees the last `context` of what there is so far; an empty
        prompt stands for a newline. The draw depends on the position in the sequence, so prompt + half a sample
        continues as the whole would have."""
        if isinstance(tokens, bool) or not isinstance(tokens, (int, np.integer)) or tokens < 0:
            raise UserError(f"generate: tokens is {tokens!r}", hint="give how many bytes to generate")
        given = tokenizer.encode(prompt, self.manifest.vocab_size)
        sequence = given.tolist() or [ord("\n")]
        key = sampling.key
        for position in range(given.size, given.size + tokens):
            window = np.array(sequence[-self.manifest.context :], dtype=np.int32)
            scores = self._logits(window)[window.size - 1, : tokenizer.BYTES]
            sequence.append(sample(scores, sampling, position, key))
            yield sequence[-1]

    def _logits(self, tokens: NDArray[Any]) -> NDArray[Any]:
        """f32[context, vocab]; the tokens are padded behind, which causal attention keeps from mattering."""
        function = self._function("logits")
        slot = function.inputs["tokens"]
        padded = np.zeros(slot.shape, slot.numpy_dtype)
        padded[0, : tokens.size] = tokens
        self.engine.write(slot, padded)
        self.engine.run("logits")
        scores: NDArray[Any] = self.engine.read(function.outputs["logits"])[0]
        return scores

    # Between Python values and slots

    def _run(self, name: str) -> Callable[[Slot], NDArray[Any]]:
        """Run a function; its results by slot, as it left them, whatever runs before they are asked for."""
        self.engine.run(name)
        return {slot: self.engine.read(slot) for slot in self._functions[name].outputs.values()}.__getitem__

    def _function(self, name: str) -> _Function:
        function = self._functions.get(name)
        if function is None:
            raise UserError(
                f"bundle {self.manifest.name!r} has no function {name}", hint="compile it with that function"
            )
        return function

    def _tokens(self, tokens: ArrayLike, shape: tuple[int, ...], what: str) -> NDArray[np.int32]:
        array = np.asarray(tokens)
        if array.dtype.kind not in "iu":
            raise UserError(
                f"{what} have type {array.dtype}, not an integer type", hint="tokens are ids, such as uint8 or int64"
            )
        if array.shape != shape:
            raise UserError(
                f"{what} have shape {array.shape}, this bundle was compiled for {shape}",
                hint="compile with --batch and --context as wanted",
            )
        vocab_size = self.manifest.vocab_size
        if array.dtype != np.uint8 or vocab_size < tokenizer.BYTES:
            low, high = int(array.min()), int(array.max())
            if low < 0 or high >= vocab_size:
                raise UserError(
                    f"{what} have id {low if low < 0 else high}, the vocabulary is 0 to {vocab_size - 1}",
                    hint="encode the text with the tokenizer the model was trained with",
                )
        return np.asarray(array, dtype=np.int32, order="C")

    def _write_batch(self, inputs: Mapping[str, Slot], tokens: ArrayLike, targets: ArrayLike) -> None:
        checked = self._tokens(tokens, self._tokens_shape, "tokens")
        self.engine.write(inputs["targets"], self._tokens(targets, self._tokens_shape, "targets"))
        self.engine.write(inputs["tokens"], checked)
        if "key" in inputs:
            key = threefry2x32(purpose_key(self.seed, DROPOUT), self.step, self._micro_batch)
            self.engine.write(inputs["key"], np.array(key, np.uint32))

    def _write_rates(self, inputs: Mapping[str, Slot], lr: float | None) -> None:
        rate = self.training["lr"] if lr is None else lr
        require_rate(rate)
        beta1, beta2 = self._betas
        for name, value in (("lr", rate), ("bias1", 1.0 - self._power1 * beta1), ("bias2", 1.0 - self._power2 * beta2)):
            self._scalar[...] = value
            self.engine.write(inputs[name], self._scalar)

    def _write_array(self, slot: Slot, array: NDArray[Any]) -> None:
        self.engine.write(slot, np.asarray(array, dtype=slot.numpy_dtype, order="C"))

    def _finite(self, array: NDArray[Any], what: str, step: int) -> float:
        value = float(array)
        if not math.isfinite(value):
            raise self._diverged(what, value, step)
        return value

    def _diverged(self, what: str, value: float, step: int) -> DivergedError:
        return DivergedError(
            f"{what} became {value} after {step} steps: training has diverged",
            hint="load an earlier checkpoint and train with a lower lr",
        )

    # The step count, and the powers of the betas behind AdamW's bias correction

    def _init_powers(self) -> None:
        settings = self.manifest.training
        self._betas = (float(settings.get("beta1", 0.0)), float(settings.get("beta2", 0.0)))
        self._power1 = self._power2 = 1.0
        self._micro_batch = 0

    def _advance(self) -> None:
        self.step += 1
        self._micro_batch = 0
        self._power1 *= self._betas[0]
        self._power2 *= self._betas[1]

    def _set_step(self, step: int) -> None:
        """Powers by repeated multiplication, as a run from the start would have them: resuming changes no bit."""
        self._init_powers()
        self.step = step
        self._power1 = _power(self._betas[0], step)
        self._power2 = _power(self._betas[1], step)


def require_rate(lr: object) -> None:
    """Raise UserError unless `lr` can be a learning rate: a finite number, not negative."""
    if isinstance(lr, bool) or not isinstance(lr, (int, float, np.number)) or not 0 <= lr <= 1e30:
        raise UserError(f"lr {lr!r}: must be a finite number, not negative", hint="3e-4 is a usual learning rate")


def _power(base: float, exponent: int) -> float:
    power = 1.0
    for _ in range(exponent):
        following = power * base
        if (
            following == power
        ):  # reached zero, or the smallest number that rounding gives back: all later ones are equal
            break
        power = following
    return power


def _signature(manifest: Manifest, name: str) -> _Function:
    """The slots of a known function, checked against what the host supplies: names, types, shapes."""
    entry = manifest.functions[name]
    known_inputs, known_outputs = _SIGNATURES[name]
    weights = {f"grad:{slot.name}": slot.shape for slot in manifest.parameters if slot.role == "param"}
    batch = (manifest.batch, manifest.context)
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (1, manifest.context) if name == "logits" else batch,
        "targets": batch,
        "row_losses": batch,
        "offsets": batch[:1],
        "seed": (2,),
        "key": (2,),
        "logits": (1, manifest.context, manifest.vocab_size),
        **weights,
    }
    dtypes = {"tokens": "i32", "targets": "i32", "offsets": "i32"} | dict.fromkeys(
        ("seed", "key", "step", "count"), "u32"
    )
    for slots, known, what in ((entry.inputs, known_inputs, "input"), (entry.outputs, known_outputs, "output")):
        expected = known - {"grad:"} | (weights.keys() if "grad:" in known else set())
        found = {slot.name: slot for slot in slots}
        missing = expected - found.keys() - {"key"}
        strange = found.keys() - expected
        if missing or (strange and what == "input"):
            problem = f"lacks {what} {min(missing)!r}" if missing else f"wants an unknown input {min(strange)!r}"
            raise UserError(
                f"bundle {manifest.name!r}: function {name} {problem}", hint="compile it with this version of tinygpt"
            )
        for slot in slots:
            wanted = (dtypes.get(slot.name, "f32"), shapes.get(slot.name, ()))
            if slot.name in expected and (slot.dtype, slot.shape) != wanted:
                raise UserError(
                    f"bundle {manifest.name!r}: {what} {slot.name!r} of {name} is {slot.dtype}{list(slot.shape)}, "
                    f"expected {wanted[0]}{list(wanted[1])}",
                    hint="compile it with this version of tinygpt",
                )
    return _Function({slot.name: slot for slot in entry.inputs}, {slot.name: slot for slot in entry.outputs})
