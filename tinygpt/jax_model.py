"""The reference model and its training step in JAX, for benchmarks: the formulas of model.py, a dictionary of arrays.

Imports JAX, which TinyGPT itself does not need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tinygpt.config import ModelConfig

Arrays = dict[str, Any]
State = tuple[Arrays, Arrays, Arrays, Any]  # weights, first and second moments, steps done


def initial_state(config: ModelConfig) -> State:
    """Weights as model.py draws them (from another generator), zero moments."""
    c, m = config.d_model, config.d_mlp
    shapes: dict[str, tuple[int, ...]] = {"tokens": (config.vocab_size, c), "positions": (config.context_length, c)}
    if not config.tie_embeddings:
        shapes["head"] = (config.vocab_size, c)
    for i in range(config.n_layers):
        shapes |= {f"{i}.{name}": (c, c) for name in "qkvo"} | {f"{i}.in": (c, m), f"{i}.out": (m, c)}
    weights: Arrays = {}
    for key, (name, shape) in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes.items(), strict=True):
        std = 0.02 / math.sqrt(2 * config.n_layers) if name.endswith((".o", ".out")) else 0.02
        weights[name] = std * jax.random.normal(key, shape)
    for i in range(config.n_layers):
        weights |= {
            f"{i}.{name}.bias": jnp.zeros(shapes[f"{i}.{name}"][1]) for name in ("q", "k", "v", "o", "in", "out")
        }
    for norm in ["final", *(f"{i}.{name}" for i in range(config.n_layers) for name in ("ln1", "ln2"))]:
        weights |= {f"{norm}.gain": jnp.ones(c), f"{norm}.shift": jnp.zeros(c)}
    zeros = {name: jnp.zeros_like(w) for name, w in weights.items()}
    return weights, zeros, {name: jnp.zeros_like(w) for name, w in weights.items()}, jnp.zeros((), jnp.int32)


def loss(weights: Arrays, tokens: Any, targets: Any, config: ModelConfig) -> Any:
    """Mean cross-entropy of targets i32[B, T]."""
    (rows, context), heads = tokens.shape, config.n_heads

    def linear(x: Any, name: str) -> Any:
        return x @ weights[name] + weights[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.gain"]
            + weights[f"{name}.shift"]
        )

    def attention(x: Any, i: int) -> Any:
        q, k, v = (linear(x, f"{i}.{name}").reshape(rows, context, heads, -1).transpose(0, 2, 1, 3) for name in "qkv")
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(config.head_width)
        causal = jnp.tril(jnp.ones((context, context), bool))
        mixed = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1) @ v
        return linear(mixed.transpose(0, 2, 1, 3).reshape(rows, context, -1), f"{i}.o")

    x = weights["tokens"][tokens] + weights["positions"][:context]
    for i in range(config.n_layers):
        x = x + attention(norm(x, f"{i}.ln1"), i)
        x = x + linear(jax.nn.gelu(linear(norm(x, f"{i}.ln2"), f"{i}.in"), approximate=False), f"{i}.out")
    logits = norm(x, "final") @ weights["tokens" if config.tie_embeddings else "head"].T
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


def train_step(
    state: State, tokens: Any, targets: Any, config: ModelConfig, training: Mapping[str, float]
) -> tuple[State, Any]:
    """One step of AdamW on gradients clipped by their global norm; the loss before it."""
    weights, first, second, step = state
    value, grads = jax.value_and_grad(loss)(weights, tokens, targets, config)
    norm = jnp.sqrt(sum((g**2).sum() for g in grads.values()))
    scale = jnp.minimum(1.0, training["clip"] / (norm + 1e-6))
    beta1, beta2, lr = training["beta1"], training["beta2"], training["lr"]
    step = step + 1
    first = {n: beta1 * first[n] + (1 - beta1) * scale * g for n, g in grads.items()}
    second = {n: beta2 * second[n] + (1 - beta2) * (scale * g) ** 2 for n, g in grads.items()}
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step

    def updated(name: str, weight: Any) -> Any:
        decay = lr * training["weight_decay"] if weight.ndim >= 2 else 0.0
        return weight * (1 - decay) - lr / bias1 * first[name] / (jnp.sqrt(second[name] / bias2) + training["eps"])

    return ({n: updated(n, w) for n, w in weights.items()}, first, second, step), value
