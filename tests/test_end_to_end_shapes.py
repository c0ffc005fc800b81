"""Models of odd shapes against PyTorch, dropout included, and memory that grows with the context, not with its square."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import tinygpt as tg
from tests import pytorch_reference as pytorch
from tests.pytorch_reference import TARGETS, Batch
from tinygpt.config import ModelConfig
from tinygpt.ir.ops import OPS
from tinygpt.ir.text import parse_module
from tinygpt.runtime.threefry import DROPOUT, purpose_key, threefry2x32

# One example compiles a model and its C++: seconds, where other properties take a millisecond.
EXAMPLES = settings.default.max_examples // 25

# Each in one dimension a tile and a bit, over two tiles, or below one lane; heads from 8 to 128 channels.
SHAPES: dict[str, dict[str, Any]] = {
    "one token": dict(batch=1, context_length=1, n_heads=1, head_width=8, d_mlp=9, vocab_size=5),
    "below a lane": dict(batch=1, context_length=7, n_heads=2, head_width=8, d_mlp=3, vocab_size=13, n_layers=2),
    "a tile and a bit": dict(batch=3, context_length=65, n_heads=3, head_width=13, d_mlp=70, vocab_size=67),
    "over two tiles": dict(batch=1, context_length=261, n_heads=1, head_width=128, d_mlp=259, vocab_size=517),
    "untied": dict(batch=2, context_length=33, n_heads=2, head_width=20, d_mlp=50, vocab_size=258, tie_embeddings=False),
    "a large vocabulary": dict(batch=3, context_length=21, n_heads=2, head_width=13, d_mlp=30, vocab_size=5003),
    "a large vocabulary, untied": dict(batch=1, context_length=40, n_heads=2, head_width=12, d_mlp=30, vocab_size=1025, tie_embeddings=False),
}


def tokens_for(config: ModelConfig, batch: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens, targets = (rng.integers(0, config.vocab_size, (batch, config.context_length)) for _ in range(2))
    return tokens, targets


def config_of(head_width: int, n_heads: int, n_layers: int = 1, **fields: Any) -> ModelConfig:
    return ModelConfig(model_name="odd", n_layers=n_layers, n_heads=n_heads, d_model=n_heads * head_width, **fields)


def check_against_pytorch(target: str, config: ModelConfig, batch: int) -> None:
    """Loss, gradients, and a training step that repeats on another number of threads."""
    pytorch.require_engine(target)
    tokens, targets = tokens_for(config, batch)
    bundle = tg.compile(config, target=target, batch=batch)
    with bundle.session(threads=2, seed=1) as session, bundle.session(threads=1, seed=1) as single:
        weights = pytorch.spread_weights(session, 2)
        single.load_parameters(weights)
        loss, wanted = pytorch.gradients(pytorch.model(config, weights, torch.float64), tokens, targets)
        assert session.loss(tokens, targets) == pytest.approx(loss, abs=1e-5)
        pytorch.assert_gradients_agree(session.grads(tokens, targets), wanted)
        assert session.train_step(tokens, targets, lr=1e-3) == single.train_step(tokens, targets, lr=1e-3)
        assert {n: a.tobytes() for n, a in session.state().items()} == {n: a.tobytes() for n, a in single.state().items()}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_an_odd_shape_matches_pytorch(target: str, name: str) -> None:
    fields = dict(SHAPES[name])
    batch = fields.pop("batch")
    check_against_pytorch(target, config_of(**fields), batch)


@pytest.mark.parametrize("target", TARGETS)
def test_training_with_a_large_vocabulary_matches_pytorch(target: str) -> None:
    """Tokens as in a text: some in every line, most in none. PyTorch computes in float64: its norm of a gradient with this
    many elements, most of them tiny, is off by 1e-4 in float32."""
    pytorch.require_engine(target)
    config = config_of(head_width=16, n_heads=2, d_mlp=64, context_length=32, vocab_size=5003)
    rng = np.random.default_rng(0)
    text = (rng.zipf(1.3, (15, 4, config.context_length + 1)) - 1) % config.vocab_size
    batches = [(lines[:, :-1], lines[:, 1:]) for lines in text]
    with tg.compile(config, target=target, batch=4).session(threads=2, seed=1) as session:
        wanted = pytorch.train(pytorch.model(config, session.parameters(), torch.float64), batches, 1e-3)
        found = [session.train_step(*batch, lr=1e-3) for batch in batches]
    differences = np.abs(np.array(found) - np.array(wanted)).max(axis=0)
    assert differences[0] <= 1e-5, f"loss differs by {differences[0]:.3g}"
    assert differences[1] <= 1e-4, f"gradient norm differs by {differences[1]:.3g}"


@st.composite
def odd_models(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A small model none of whose extents need divide any tile, and a batch size."""
    head_width = draw(st.integers(8, 128), label="head width")
    config = config_of(
        head_width=head_width,
        n_heads=draw(st.integers(1, max(1, 160 // head_width)), label="heads"),
        n_layers=draw(st.integers(1, 2), label="layers"),
        d_mlp=draw(st.integers(1, 300), label="d_mlp"),
        context_length=draw(st.integers(1, 150), label="context"),
        vocab_size=draw(st.integers(2, 400), label="vocabulary"),
        tie_embeddings=draw(st.booleans(), label="tied"),
    )
    return config, draw(st.integers(1, 3), label="batch")


@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.reuse, Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(odd_models())
@example((config_of(head_width=9, n_heads=7, d_mlp=1, context_length=129, vocab_size=3), 1))
def test_models_of_any_shape_match_pytorch(drawn: tuple[ModelConfig, int]) -> None:
    check_against_pytorch("cpp", *drawn)


def replayed(key: tuple[int, int], shape: tuple[int, ...], p: float, stream: int) -> Tensor:
    """What dropout multiplies by, from its definition: bits from the key, the element's index and the stream."""
    index = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    words = [np.asarray(word, np.uint32) for word in (*key, stream)]
    (bits,) = OPS["random_bits"].evaluate([words[0], words[1], index, words[2]], {})
    return torch.from_numpy(np.array(OPS["bits_keep"].evaluate([bits, np.asarray(p, np.float32)], {})[0], np.float64))


@pytest.mark.parametrize("target", TARGETS)
def test_dropout_matches_pytorch_with_our_masks_replayed(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytorch.require_engine(target)
    config = config_of(head_width=11, n_heads=2, n_layers=2, d_mlp=45, context_length=37, vocab_size=50, dropout=0.3)
    tokens, targets = tokens_for(config, 2)
    key, streams = threefry2x32(purpose_key(9, DROPOUT), 0, 0), itertools.count()

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * replayed(key, tuple(x.shape), p, next(streams)) if training and p else x

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
        future = torch.full((q.shape[-2],) * 2, float("-inf"), dtype=q.dtype).triu(1)
        return dropout((q @ k.mT * q.shape[-1] ** -0.5 + future).softmax(-1), dropout_p) @ v

    with tg.compile(config, target=target, batch=2).session(threads=2, seed=9) as session:
        weights = pytorch.spread_weights(session, 2)
        evaluated, _ = pytorch.gradients(pytorch.model(config, weights, torch.float64).eval(), tokens, targets)
        with monkeypatch.context() as patched:
            patched.setattr(F, "dropout", dropout)
            patched.setattr(F, "scaled_dot_product_attention", attention)
            trained, wanted = pytorch.gradients(pytorch.model(config, weights, torch.float64).train(), tokens, targets)
        assert abs(trained - evaluated) > 1e-2
        assert session.loss(tokens, targets) == pytest.approx(evaluated, abs=1e-5), "evaluation drops nothing"
        loss, _ = session.train_step(tokens, targets)
        assert loss == pytest.approx(trained, abs=1e-5)
        session.load_parameters(weights)
        session.step = 0  # the masks are those of the step
        pytorch.assert_gradients_agree(session.grads(tokens, targets), wanted)


CONTEXTS = (64, 128, 256, 512)


def narrow(context: int) -> ModelConfig:
    return config_of(head_width=16, n_heads=2, d_mlp=64, context_length=context, vocab_size=64)


@pytest.mark.parametrize("target", TARGETS)
def test_work_memory_grows_linearly_with_the_context(target: str) -> None:
    pools = [tg.compile(narrow(context), target=target, batch=2).manifest.pools for context in CONTEXTS]
    work = [sum(size for name, size in each.items() if name != "state") for each in pools]
    # Gradients may be made in more parts for more tokens, up to a fixed number of them, and on a GPU other launches may run
    # side by side, whose buffers must lie apart; a square would grow by four.
    for shorter, longer in itertools.pairwise(work):
        assert longer <= (2.25 if target == "wgsl" else 2.02) * shorter, dict(zip(CONTEXTS, work, strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_no_buffer_holds_a_square_of_the_context(target: str, tmp_path: Path) -> None:
    context = 331  # a prime, so that only a square of it divides by its square
    tg.compile(narrow(context), target=target, batch=2, dump=tmp_path)
    lowered = parse_module(max(tmp_path.glob("*.tir")).read_text())
    buffers = [op.results[0].type for f in lowered.functions.values() for op in f.body.ops if op.name == "buffer"]
    assert buffers
    assert [str(t) for t in buffers if t.size % context**2 == 0] == []


@pytest.mark.parametrize("target", TARGETS)
def test_compiling_twice_gives_the_same_bytes(target: str) -> None:
    """Whatever order a set of objects has today."""
    config = config_of(head_width=12, n_heads=2, n_layers=1, d_mlp=20, context_length=9, vocab_size=30)
    assert len({tg.compile(config, target=target, batch=2).manifest.digest for _ in range(3)}) == 1
