"""What a benchmark times, each in a process of its own: our session, PyTorch on the processor and on CUDA, JAX, all on
one batch.

    python -m tinygpt.rivals < requests        (started by tinygpt.bench; one JSON object a line, both ways)

The first request says what to build ({"name", "config", "batch", "context", "threads", "training", "bundle"}) and is
answered by {"ready": true} or {"unavailable": why}; then {"seconds": S} by {"ms": [each step]}. For {"name": "function",
"function", "bundle", "threads"} a step is a run of that function of the bundle. rival.mjs does the same in Node.

On a processor a step is timed from its call to its loss. On a GPU, steps are timed as training runs them: one is in flight
while the next is begun, and the loss of each is read, one step late. There "each step" is the mean of a group of steps,
long enough for what differs from one to the next to even out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygpt.config import ModelConfig

Wait = Callable[[], float]


@dataclass(frozen=True)
class Steps:
    """What a contestant does again and again: `begin` begins a training step, and what it returns waits for that step's
    loss, so that nothing can be left undone. `overlap` says that a step runs beside the host, which may begin the next."""

    begin: Callable[[], Wait]
    overlap: bool = False


Build = Callable[[Mapping[str, Any]], Steps]

_WARM_UP = 3
_FEWEST_SAMPLES = 3
_GROUP = 0.05  # seconds of a group of steps in flight, at least: what its first step waits for the host counts little
_FEWEST_STEPS = 3  # of such a group
_PLACES = 4  # for losses on their way to the host; two steps are in flight at most


class UnavailableError(Exception):
    """The rival cannot run here; the message says why."""


def batch(spec: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and targets, the same for everybody: int64 [batch, context]."""
    rng = np.random.default_rng(0)
    shape = (spec["batch"], spec["context"])
    tokens, targets = (rng.integers(0, spec["config"]["vocab_size"], shape) for _ in range(2))
    return tokens, targets


def ours(spec: Mapping[str, Any]) -> Steps:
    """`session.begin_step` on a compiled bundle: checks, copies and the Python call included."""
    from tinygpt.runtime.bundle import load

    session = load(spec["bundle"]).session(threads=spec["threads"])
    tokens, targets = batch(spec)

    def begin() -> Wait:
        wait = session.begin_step(tokens, targets)
        return lambda: wait()[0]

    return Steps(begin, session.overlaps)


def function(spec: Mapping[str, Any]) -> Steps:
    """One function of a bundle by itself, its inputs written once: halves, with which nothing grows or vanishes. The
    engine is one whose runs end before `run` returns."""
    from tinygpt.runtime.bundle import load
    from tinygpt.runtime.engine import open_engine

    bundle = load(spec["bundle"])
    engine = open_engine(bundle.folder, bundle.manifest, spec["threads"])
    entry = bundle.manifest.functions[spec["function"]]
    for slot in entry.inputs:
        engine.write(slot, np.full(slot.shape, 0.5, slot.numpy_dtype))

    def begin() -> Wait:
        engine.run(entry.name)
        return lambda: 0.0

    return Steps(begin)


def torch_step(spec: Mapping[str, Any], compile: bool = False, device: str = "cpu", graph: bool = False) -> Steps:
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

    if device != "cuda":
        return Steps(lambda: work().item)

    places = deque((torch.empty((), pin_memory=True), torch.cuda.Event()) for _ in range(_PLACES))  # type: ignore[no-untyped-call]

    def begin(launch: Callable[[], Any]) -> Wait:
        """The loss goes to the host behind the step, before a later one overwrites it; `item()` would wait for that too."""
        loss = launch()
        kept, done = places[0]
        places.rotate()
        kept.copy_(loss.detach(), non_blocking=True)
        done.record()

        def wait() -> float:
            done.synchronize()
            return float(kept)

        return wait

    if not graph:
        return Steps(lambda: begin(work), overlap=True)
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # a graph is captured behind a few runs on a stream of their own
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        loss = work()

    def replay() -> Any:
        captured.replay()
        return loss

    return Steps(lambda: begin(replay), overlap=True)


def jax_step(spec: Mapping[str, Any]) -> Steps:
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

    def begin() -> Wait:
        nonlocal state
        state, loss = step_function(state)
        return lambda: float(loss)

    return Steps(begin)


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


def timed(steps: Steps, seconds: float) -> list[float]:
    """Milliseconds a step, of each step or of each group of steps in flight: as many as fit, at least a few."""
    return _in_flight(steps.begin, seconds) if steps.overlap else _one_by_one(steps.begin, seconds)


def _one_by_one(begin: Callable[[], Wait], seconds: float) -> list[float]:
    """Milliseconds of each step, from its call to its loss."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < _FEWEST_SAMPLES or time.perf_counter() < end:
        start = time.perf_counter()
        begin()()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def _in_flight(begin: Callable[[], Wait], seconds: float) -> list[float]:
    """Mean milliseconds a step of groups of steps, each step begun before the loss of the last one is read. A group begins
    and ends with nothing in flight: no part of it is done outside of its time, whatever holds the host up."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < _FEWEST_SAMPLES or time.perf_counter() < end:
        start, count = time.perf_counter(), 1
        waits = deque([begin()])
        while count < _FEWEST_STEPS or time.perf_counter() - start < _GROUP:
            waits.append(begin())
            waits.popleft()()
            count += 1
        waits.popleft()()
        found.append((time.perf_counter() - start) / count * 1e3)
    return found


def main() -> None:
    requests = (json.loads(line) for line in sys.stdin)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    spec = next(requests)
    try:
        steps = BUILDERS[spec["name"]](spec)
        for _ in range(_WARM_UP):
            steps.begin()()
    except UnavailableError as reason:
        answers.write(json.dumps({"unavailable": str(reason)}) + "\n")
        return
    answers.write(json.dumps({"ready": True}) + "\n")
    for request in requests:
        answers.write(json.dumps({"ms": timed(steps, request["seconds"])}) + "\n")


if __name__ == "__main__":
    main()
