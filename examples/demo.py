"""Compile a GPT to C++, train it on text, compare its speed with PyTorch's on the same cores, and read a sample.

    make demo                                           or, in the environment that makes:
    python examples/demo.py --preset medium --steps 400 --data my.txt"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import torch

import tinygpt as tg
from tinygpt.model import TinyGPT
from tinygpt.runtime import data
from tinygpt.runtime.session import Session
from tinygpt.runtime.training import train

ROUNDS, STEPS_A_ROUND = 5, 20  # of timing: ours and PyTorch's in turn, so that both meet the same disturbances


def main() -> None:
    options = arguments()
    preset = tg.PRESETS[options.preset]
    corpus = data.load(options.data)
    print(f"text:      {corpus.source}")

    began = time.perf_counter()
    bundle = tg.compile(preset.name, target="cpp")
    compiled = time.perf_counter()
    session = bundle.session(threads=options.threads, seed=42)
    built = time.perf_counter()
    kernels = len(bundle.manifest.kernels)
    print(f"compiled:  {preset.name}, {preset.config.parameter_count:,} parameters, to {kernels} kernels in {compiled - began:.1f} s")
    print(f"built:     by the system's C++ compiler in {built - compiled:.1f} s (nothing, if it was built before)")
    print(f"training:  {options.steps} steps of {preset.batch_size} x {preset.config.context_length} bytes on {options.threads} threads\n")

    train(session, corpus, options.steps, lr=options.lr, eval_every=max(1, options.steps // 4))
    if corpus.floor is not None:
        print(f"The text's own entropy is {corpus.floor:.3f} nats a byte: no model gets below.")

    ours, theirs = compare(session, preset.config, corpus, options.threads)
    print(f"\na training step of {preset.name} on {options.threads} threads, best of {ROUNDS * STEPS_A_ROUND}:")
    print(f"  PyTorch {torch.__version__} (eager, fused AdamW)   {theirs * 1e3:8.2f} ms")
    print(f"  TinyGPT                               {ours * 1e3:8.2f} ms   {theirs / ours:.2f} times as fast")

    prompt = b"ROMEO:\n" if corpus.name == "tinyshakespeare" else bytes(corpus.validation[:16])
    sample = session.generate(prompt, 400, temperature=0.8, top_k=40, seed=1)
    print(f"\na sample after {options.steps} steps:\n{'-' * 60}\n{(prompt + sample).decode(errors='replace')}\n{'-' * 60}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile, train, compare, sample.")
    parser.add_argument("--preset", default="small", choices=list(tg.PRESETS))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--data", help="a text file; TinyShakespeare if left out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def compare(session: Session, config: tg.ModelConfig, corpus: data.Corpus, threads: int) -> tuple[float, float]:
    """Seconds of a training step, ours and PyTorch's, in turns on the same batch: the best, since a busy machine makes
    steps slower, never faster."""
    context = config.context_length
    offsets = session.windows(session.step, corpus.train.size - context)
    tokens, targets = data.gather(corpus.train, offsets, context)
    step = pytorch_step(config, tokens, targets, threads)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(ROUNDS):
        ours += seconds(lambda: session.train_step(tokens, targets, lr=0.0))
        theirs += seconds(step)
    return min(ours), min(theirs)


def pytorch_step(config: tg.ModelConfig, tokens: np.ndarray, targets: np.ndarray, threads: int) -> Callable[[], object]:
    """The same step in PyTorch: forward, backward, clip, AdamW, as fast as stock eager PyTorch does it."""
    torch.set_num_threads(threads)
    model = TinyGPT(config)
    groups = [{"params": [p for p in model.parameters() if (p.dim() >= 2) is decays], "weight_decay": 0.1 * decays} for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    x, y = (torch.from_numpy(array.astype(np.int64)) for array in (tokens, targets))

    def step() -> float:
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss.item()  # as ours does

    return step


def seconds(step: Callable[[], object]) -> list[float]:
    """How long each of a round of steps took, after three to warm up."""
    times = []
    for number in range(3 + STEPS_A_ROUND):
        began = time.perf_counter()
        step()
        if number >= 3:
            times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
