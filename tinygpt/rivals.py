"""What a benchmark times, each in a process of its own: our session, PyTorch on the processor and on CUDA, JAX, all on
one batch.

    python -m tinygpt.rivals < requests        (started by tinygpt.bench; one JSON object a line, both ways)

The first request says what to build ({"name", "config", "batch", "context", "threads", "training", "bundle"}) and is
answered by {"ready": true} or {"unavailable": why}; then {"seconds": S} by {"ms": [each step]}. For {"name": "function",
"function", "bundle", "threads"} a step is a run of that function of the bundle. rival.mjs does the same in Node."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tinygpt.config import ModelConfig

Step = Callable[[], float]  # one training step; returns the loss, so that nothing can be left undone
Build = Callable[[Mapping[str, Any]], Step]

_WARM_UP = 3
_FEWEST_STEPS = 3


class UnavailableError(Exception):
    """The rival cannot run here; the message says why."""


def batch(spec: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and targets, the same for everybody: int64 [batch, context]."""
    rng = np.random.default_rng(0)
    shape = (spec["batch"], spec["context"])
    tokens, targets = (rng.integers(0, spec["config"]["vocab_size"], shape) for _ in range(2))
    return tokens, targets


def ours(spec: Mapping[str, Any]) -> Step:
    """`session.train_step` on a compiled bundle: checks, copies and the Python call included."""
    from tinygpt.runtime.bundle import load

    session = load(spec["bundle"]).session(threads=spec["threads"])
    tokens, targets = batch(spec)
    return lambda: session.train_step(tokens, targets)[0]


def function(spec: Mapping[str, Any]) -> Step:
    """One function of a bundle by itself, its inputs written once: halves, with which nothing grows or vanishes."""
    from tinygpt.runtime.bundle import load
    from tinygpt.runtime.engine import open_engine

    bundle = load(spec["bundle"])
    engine = open_engine(bundle.folder, bundle.manifest, spec["threads"])
    entry = bundle.manifest.functions[spec["function"]]
    for slot in entry.inputs:
        engine.write(slot, np.full(slot.shape, 0.5, slot.numpy_dtype))

    def step() -> float:
        engine.run(entry.name)
        return 0.0

    return step


def torch_step(spec: Mapping[str, Any], compile: bool = False, device: str = "cpu", graph: bool = False) -> Step:
    """The reference model with what PyTorch has that is fast: fused AdamW, foreach clipping. On CUDA, float32 is
    computed without TF32, and `graph` makes the whole step one CUDA graph, which has no launch cost."""
    try:
        import torch

        from tinygpt.model import TinyGPT
    except ImportError as error:
        raise UnavailableError(f"PyTorch cannot be imported: {error}") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("PyTorch finds no CUDA device")
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    training = spec["training"]
    model = TinyGPT(ModelConfig(**spec["config"])).to(device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training["weight_decay"]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (training["beta1"], training["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=training["lr"], betas=betas, eps=training["eps"], fused=True, capturable=graph)
    tokens, targets = (torch.from_numpy(x).to(device) for x in batch(spec))
    forward: Any = torch.compile(model) if compile else model

    def work() -> Any:
        optimizer.zero_grad(set_to_none=True)
        _, loss = forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training["clip"], foreach=True)
        optimizer.step()
        return loss

    if not graph:
        return lambda: float(work().item())
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # a graph is captured behind a few runs on a stream of their own
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        loss = work()

    def replay() -> float:
        captured.replay()
        return float(loss.item())

    return replay


def jax_step(spec: Mapping[str, Any]) -> Step:
    """The same model as one jitted function of JAX, state donated; as many processors as threads."""
    if hasattr(os, "sched_setaffinity"):  # XLA has no other way to be told
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax
    except ImportError as error:
        raise UnavailableError(f"JAX cannot be imported: {error}") from error
    from tinygpt.jax_model import initial_state, train_step

    config, training = ModelConfig(**spec["config"]), spec["training"]
    tokens, targets = (jax.numpy.asarray(x, dtype="int32") for x in batch(spec))
    step_function = jax.jit(lambda state: train_step(state, tokens, targets, config, training), donate_argnums=0)
    state = initial_state(config)

    def step() -> float:
        nonlocal state
        state, loss = step_function(state)
        return float(loss)

    return step


BUILDERS: dict[str, Build] = {
    "tinygpt": ours,
    "function": function,
    "torch": torch_step,
    "torch.compile": lambda spec: torch_step(spec, compile=True),
    "torch.cuda": lambda spec: torch_step(spec, device="cuda"),
    "torch.cuda.compile": lambda spec: torch_step(spec, compile=True, device="cuda"),
    "torch.cuda.graph": lambda spec: torch_step(spec, device="cuda", graph=True),
    "jax": jax_step,
}


def timed(step: Step, seconds: float) -> list[float]:
    """Milliseconds of each of as many steps as fit, at least a few."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < _FEWEST_STEPS or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def main() -> None:
    requests = (json.loads(line) for line in sys.stdin)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    spec = next(requests)
    try:
        step = BUILDERS[spec["name"]](spec)
        for _ in range(_WARM_UP):
            step()
    except UnavailableError as reason:
        answers.write(json.dumps({"unavailable": str(reason)}) + "\n")
        return
    answers.write(json.dumps({"ready": True}) + "\n")
    for request in requests:
        answers.write(json.dumps({"ms": timed(step, request["seconds"])}) + "\n")


if __name__ == "__main__":
    main()
