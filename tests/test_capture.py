"""Capture of GPT-like modules: a zoo of attention, MLP, norm and embedding styles against eager PyTorch; errors."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt.captures import complete
from tinygpt.config import ModelConfig
from tinygpt.ir.core import Function, Module, Region
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.interpret import evaluate
from tinygpt.ir.ops import OPS
from tinygpt.ir.text import parse_module, print_module
from tinygpt.ir.verify import verify
from tinygpt.lowering.aten_builder import AtenBuilder
from tinygpt.lowering.capture import capture, check_gradients
from tinygpt.lowering.differentiate import gradients
from tinygpt.model import TinyGPT

BATCH, CONTEXT, WIDTH, HEADS, VOCAB = 3, 7, 24, 3, 11
D = WIDTH // HEADS


def split_heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], HEADS, D).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[2], WIDTH)


class FusedFlash(nn.Module):
    """nanoGPT: one projection for q, k and v, split, then the fused attention of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("bias", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        return self.c_proj(merge_heads(self.mix(split_heads(q), split_heads(k), split_heads(v))))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)


class FusedTrilBuffer(FusedFlash):
    """nanoGPT without flash: masked_fill by a tril buffer."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, : q.size(2), : q.size(2)] == 0, float("-inf"))
        return F.softmax(att, dim=-1) @ v


class WhereMask(FusedFlash):
    """Hugging Face's GPT-2: where(bias, weights, finfo.min), scaled by division."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.matmul(q, k.transpose(-1, -2)) / (v.size(-1) ** 0.5)
        causal = self.bias[:, :, :CONTEXT, :CONTEXT].bool()
        weights = torch.where(causal, weights, torch.full([], torch.finfo(weights.dtype).min))
        return torch.matmul(nn.functional.softmax(weights, dim=-1), v)


class AdditiveMask(FusedFlash):
    """A triangle of -inf added to scores whose scale was put on the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1), persistent=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * D**-0.5) @ k.mT + self.mask).softmax(-1) @ v


class ArangeMask(FusedFlash):
    """The mask from comparing positions, filled with a large negative number, written in place."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.size(2))
        scores = q @ k.permute(0, 1, 3, 2)
        scores.masked_fill_(position[None, :] > position[:, None], -1e9)
        scores = scores / math.sqrt(D)
        return torch.softmax(scores, -1) @ v


class Einsum(nn.Module):
    """Heads kept behind the context, products by einsum, one packed projection indexed on its own axis."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, D).unbind(2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        weights = scores.masked_fill(~keep, float("-inf")).softmax(dim=-1)
        return self.proj(torch.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape))


class PackedPermute(nn.Module):
    """timm style: reshape to [3, B, H, T, D] and index; a boolean mask handed to the fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("keep", torch.ones(CONTEXT, CONTEXT).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, HEADS, D).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.keep[:t, :t], scale=0.3)
        return y.transpose(1, 2).reshape(b, t, c)


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, D, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)))

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        wei = self.query(x) @ self.key(x).transpose(-2, -1) * D**-0.5
        wei = F.softmax(wei.masked_fill(self.tril[:t, :t] == 0, float("-inf")), dim=-1)
        return wei @ self.value(x)


class HeadByHead(nn.Module):
    """A module a head, concatenated: attention over [B, T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(OneHead() for _ in range(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)


class MergedBatch(FusedFlash):
    """Batch and heads in one axis, products by bmm."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.reshape(-1, CONTEXT, D) for x in (q, k, v))
        future = torch.full((CONTEXT, CONTEXT), -1e10).triu(1)
        scores = torch.bmm(q, k.transpose(1, 2)).div(math.sqrt(D)) + future
        return torch.bmm(scores.softmax(2), v).view(-1, HEADS, CONTEXT, D)


class GroupedQueries(nn.Module):
    """One key head for all query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (part.unsqueeze(1) for part in self.kv(x).chunk(2, dim=-1))
        q = split_heads(self.q(x))
        return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


class TanhFormula(nn.Module):
    """minGPT's GELU, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Gated(nn.Module):
    """SwiGLU over the halves of the hidden vector."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.cat([F.silu(gate) * up, gate.sigmoid() * up], -1)


class ManualRMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


class ManualNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


class Conv1D(nn.Module):
    """GPT-2's linear layer, stored [in, out] and applied by addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], WIDTH)


class GPT(nn.Module):
    """What the zoo shares: embeddings, one block, a head and the loss."""

    def __init__(
        self,
        attention: Callable[[], nn.Module] = FusedFlash,
        activation: Callable[[], nn.Module] = nn.GELU,
        norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(WIDTH),
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT + 2, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.ln_1, self.attn, self.ln_2 = norm(), attention(), norm()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 40), activation(), nn.Linear(40, WIDTH), nn.Dropout(dropout))
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.wte.weight = self.lm_head.weight

    def embed(self, idx: Tensor) -> Tensor:
        return self.wte(idx) + self.wpe(torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.drop(self.embed(idx))
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return self.finish(self.lm_head(x), targets)

    def finish(self, logits: Tensor, targets: Tensor | None) -> Any:
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class PositionParameter(GPT):
    """A position table that is a parameter, sliced; residual additions in place; flat logits, as in the lecture."""

    def __init__(self) -> None:
        super().__init__()
        self.wpe = None
        self.pos_emb = nn.Parameter(torch.randn(1, CONTEXT + 3, WIDTH) * 0.1)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.wte(idx)
        x += self.pos_emb[:, : idx.size(1), :]
        x += self.mlp(x * 1.5)
        logits = self.lm_head(x).view(-1, VOCAB)
        return logits, F.cross_entropy(logits, targets.view(-1))


class PositionBuffer(GPT):
    """Positions from a registered buffer, expanded over the batch; a dict of results; classes on axis 1."""

    def __init__(self) -> None:
        super().__init__(tied=True)
        self.register_buffer("position_ids", torch.arange(CONTEXT + 2).expand((1, -1)))

    def embed(self, idx: Tensor) -> Tensor:
        return self.wte(idx) + self.wpe(self.position_ids[:, : idx.shape[-1]].expand_as(idx))

    def finish(self, logits: Tensor, targets: Tensor | None) -> Any:
        return {"logits": logits, "loss": F.cross_entropy(logits.transpose(1, 2), targets)}


class LossOnly(GPT):
    def finish(self, logits: Tensor, targets: Tensor | None) -> Any:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / targets.numel()


ATTENTIONS = [
    FusedFlash, FusedTrilBuffer, WhereMask, AdditiveMask, ArangeMask,
    Einsum, PackedPermute, HeadByHead, MergedBatch, GroupedQueries,
]  # fmt: skip
ZOO: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: lambda cls=cls: GPT(cls, tied=True) for cls in ATTENTIONS},
    "tanh GELU": lambda: GPT(activation=lambda: nn.GELU(approximate="tanh")),
    "tanh GELU formula": lambda: GPT(activation=TanhFormula),
    "ReLU in place": lambda: GPT(activation=lambda: nn.ReLU(inplace=True)),
    "SwiGLU": lambda: GPT(activation=Gated),
    "LayerNorm without bias": lambda: GPT(norm=lambda: nn.LayerNorm(WIDTH, bias=False)),
    "LayerNorm without weights": lambda: GPT(norm=lambda: nn.LayerNorm(WIDTH, elementwise_affine=False)),
    "RMSNorm": lambda: GPT(norm=lambda: nn.RMSNorm(WIDTH, eps=1e-6)),
    "RMSNorm by hand": lambda: GPT(norm=ManualRMS),
    "LayerNorm by hand": lambda: GPT(norm=ManualNorm),
    "addmm": lambda: GPT(attention=Conv1D),
    "dropout off": lambda: GPT(dropout=0.3).eval(),
    **{cls.__name__: cls for cls in (PositionParameter, PositionBuffer, LossOnly)},
    "reference": lambda: TinyGPT(reference_config()),
    "reference untied": lambda: TinyGPT(reference_config(tie_embeddings=False)),
}


def reference_config(**changes: Any) -> ModelConfig:
    shape = {"vocab_size": VOCAB, "context_length": CONTEXT, "d_model": WIDTH, "n_heads": HEADS, "d_mlp": 40}
    return ModelConfig(n_layers=2, **shape, **changes)


def example_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (BATCH, CONTEXT), generator=generator)
    return tokens, torch.randint(VOCAB, (BATCH, CONTEXT), generator=generator)


def interpreted(module: Module, model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    inputs = {"tokens": tokens.numpy().astype(np.int32), "targets": targets.numpy().astype(np.int32)}
    return evaluate(module, "loss", inputs, weights)


def op_counts(module: Module) -> Counter[str]:
    return Counter(op.name for op in module.functions["loss"].body.walk())


def loss_of(outputs: Any) -> float:
    if isinstance(outputs, dict):
        return float(outputs["loss"].detach())
    return float((outputs[1] if isinstance(outputs, tuple) else outputs).detach())


@pytest.mark.parametrize("name", ZOO)
def test_captured_module_matches_eager_and_survives_its_text(name: str) -> None:
    torch.manual_seed(0)
    model = ZOO[name]()
    tokens, targets = example_batch()
    module = capture(model, (tokens, targets), name="zoo")  # compares the gradients itself
    found = interpreted(module, model, tokens, targets)
    assert float(found["loss"]) == pytest.approx(loss_of(model(tokens, targets)), abs=1e-5)
    assert found["logits"].shape == (BATCH, CONTEXT, VOCAB)
    verify(module)
    assert print_module(parse_module(print_module(module))) == print_module(module)
    assert module.functions["loss"].result_names == ("loss", "logits")


@pytest.mark.parametrize("cls", ATTENTIONS)
def test_every_way_to_write_causal_attention_becomes_the_op(cls: type[nn.Module]) -> None:
    module = capture(GPT(cls), example_batch(), check=False)
    counts = op_counts(module)
    assert counts["attention"] == (HEADS if cls is HeadByHead else 1)
    assert counts["softmax"] == counts["where"] == counts["iota"] == 0
    attention = next(op for op in module.functions["loss"].body.ops if op.name == "attention")
    assert attention.attrs["causal"] is True
    assert attention.attrs["scale"] == pytest.approx(0.3 if cls is PackedPermute else D**-0.5)


SMALL_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "stack": lambda x: torch.stack([x, 2 * x, x.neg()], -2).sum(dim=1).sum(dim=-2)[:, None] + x,
    "narrow and select": lambda x: x.narrow(-1, 3, 20).repeat_interleave(2, dim=-1) * x.select(1, 2)[:, None, :],
    "clamp": lambda x: torch.clamp(x, -0.1, 0.2) + x.clamp(max=0.1) + x.clamp_min(0.05) + x.abs() + x.relu(),
    "powers": lambda x: x.pow(2) - x**3 + (x * x + 1) ** 0.5 + (x.square() + 1) ** -0.5 + (x.exp() + 1).pow(-1),
    "numbers": lambda x: (1 - x) / 3 + 2 / (x * x + 1) + x.mul(True) + torch.rsub(x, 2, alpha=3) + (x.exp() + 1).log(),
    "alpha": lambda x: torch.add(x, x, alpha=0.5) - torch.sub(x, 1, alpha=2) + (x * x + 1).reciprocal(),
    "deviation": lambda x: x / (x.std(-1, keepdim=True) + x.var() + x.var(dim=-1, correction=0, keepdim=True)),
    "softmax over the context": lambda x: x.softmax(dim=1) * torch.tanh(x) + torch.sigmoid(x) + torch.erf(x),
    "comparisons": lambda x: torch.where(x > 0.1, x, 0.5 * x) + (x <= 0) * x + torch.maximum(x, x * x),
    "ramp": lambda x: x * torch.arange(40) * 0.1 + x * (torch.arange(5, 5 + 40) / 1).neg(),
    "lower triangle": lambda x: x @ torch.ones(40, 40).tril(-3) + x @ torch.full((40, 40), 0.5).triu(2),
    "products": lambda x: torch.einsum("bti,bsi->bts", x, x) @ x + torch.einsum("ij,btj->bti", x[0].T @ x[1], x),
    "views": lambda x: x.unflatten(-1, (5, 8)).movedim((0, 3), (2, 1)).permute(2, 0, 1, 3).flatten(-2)[None].clone()[0],
    "unequal batches": lambda x: x @ (x[:1].mT @ x) + (x[0] @ x.mT) @ x,
}


class Small(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.f = SMALL_OPS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


@pytest.mark.parametrize("name", SMALL_OPS)
def test_small_ops_match_eager(name: str) -> None:
    torch.manual_seed(0)
    model = GPT(activation=lambda: Small(name))
    tokens, targets = example_batch()
    module = capture(model, (tokens, targets))
    found = interpreted(module, model, tokens, targets)
    assert float(found["loss"]) == pytest.approx(loss_of(model(tokens, targets)), abs=1e-5)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5), torch.zeros(2, 3), torch.ones(4, dtype=torch.bool), torch.arange(5), torch.arange(7, 1, -2),
        torch.arange(6.0).expand(2, 6), torch.arange(3)[:, None].expand(3, 4), torch.ones(4, 4).tril(),
        torch.ones(5, 5).tril(2), torch.ones(5, 5).tril(-2), torch.ones(5, 5, dtype=torch.bool).triu(1)[None],
        torch.full((4, 4), -1e9).triu(1), torch.full((3, 6), 2.0).triu(2),
    ],
)  # fmt: skip
def test_fixed_tensors_become_ops_that_make_them(tensor: Tensor) -> None:
    g = AtenBuilder()
    value = g.known_tensor(tensor)
    function = Function("f", Region((), tuple(g.ops), (value,)), result_names=("y",))
    found = evaluate(Module("m", {}, {"f": function}), "f", {})["y"]
    assert found.shape == tuple(tensor.shape)
    assert np.array_equal(found, tensor.numpy())


class SlidingWindow(FusedFlash):
    """Softmax attention with a mask that is not causal: every token sees two of its past."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(CONTEXT)
        scores = (q @ k.transpose(-2, -1)) * 0.25
        scores = scores.masked_fill(position[None, :] > position[:, None], float("-inf"))
        return (F.softmax(scores, dim=-1) * torch.ones(CONTEXT, CONTEXT).triu(-2)) @ v


def test_softmax_that_is_not_attention_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = GPT(SlidingWindow)
    tokens, targets = example_batch()
    module = capture(model, (tokens, targets))
    assert op_counts(module)["softmax"] == 1
    assert op_counts(module)["attention"] == 0
    found = interpreted(module, model, tokens, targets)
    assert float(found["loss"]) == pytest.approx(loss_of(model(tokens, targets)), abs=1e-5)


def test_a_wrong_graph_fails_the_gradient_check() -> None:
    torch.manual_seed(0)
    model, batch = TinyGPT(reference_config()), example_batch()
    module = capture(model, batch)
    function = module.functions["loss"]
    blind = {"attention": {"causal": False}}
    ops = [replace(op, attrs={**op.attrs, **blind.get(op.name, {})}) for op in function.body.ops]
    with pytest.raises(CompilerBug, match="differs from eager autograd"):
        check_gradients(module.with_function(function.with_ops(ops)), model, batch)


def test_tied_weight_appears_once_under_its_first_name() -> None:
    module = capture(GPT(tied=True), example_batch(), check=False)
    assert "wte.weight" in module.parameters
    assert "lm_head.weight" not in module.parameters
    assert "lm_head.weight" in capture(GPT(), example_batch(), check=False).parameters


def test_parameters_keep_pytorch_s_order_shapes_and_starts() -> None:
    model = TinyGPT(reference_config())
    module = capture(model, example_batch(), check=False)
    expected = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert [(name, p.type.shape) for name, p in module.parameters.items()] == expected
    assert {name: p.init for name, p in module.parameters.items()} == model.initializers()
    assert {p.role for p in module.parameters.values()} == {"param"}


def test_a_module_without_initializers_starts_as_its_weights_look() -> None:
    model = GPT()
    nn.init.normal_(model.wte.weight, 0.0, 0.5)
    module = capture(model, example_batch(), check=False)
    assert module.parameters["ln_1.weight"].init == ("constant", 1.0)
    assert module.parameters["ln_1.bias"].init == ("constant", 0.0)
    kind, std = module.parameters["wte.weight"].init
    assert kind == "normal"
    assert std == pytest.approx(0.5, rel=0.2)


def test_ops_know_the_line_of_the_user_s_model() -> None:
    module = capture(GPT(PackedPermute), example_batch(), check=False)
    first = {op.name: op.loc for op in reversed(module.functions["loss"].body.ops) if op.loc}
    assert {loc.file for loc in first.values()} == {"test_capture.py"}
    assert first["attention"].text.startswith("y = F.scaled_dot_product_attention(q, k, v, attn_mask=")
    assert first["matmul"].text == "qkv = self.qkv(x).reshape(b, t, 3, HEADS, D).permute(2, 0, 3, 1, 4)"
    assert first["layer_norm"].text == "x = x + self.attn(self.ln_1(x))"


def test_one_tensor_object_as_both_inputs_stays_two_inputs() -> None:
    tokens = torch.zeros(2, CONTEXT, dtype=torch.long)
    module = capture(GPT(), (tokens, tokens), check=False)
    assert [p.hint for p in module.functions["loss"].params] == ["tokens", "targets"]


def test_model_on_the_meta_device_is_captured_without_memory() -> None:
    with torch.device("meta"):
        model = TinyGPT(reference_config())
    module = capture(model, example_batch())
    assert op_counts(module) == op_counts(capture(TinyGPT(reference_config()), example_batch(), check=False))


def test_capture_leaves_the_model_as_it_was() -> None:
    model = GPT(dropout=0.2)
    model.attn.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    capture(model, example_batch())
    assert model.training
    assert not model.attn.training
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


class DroppedScores(FusedTrilBuffer):
    """Dropout on explicit attention probabilities, as nanoGPT has it."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, : q.size(2), : q.size(2)] == 0, float("-inf"))
        return F.dropout(F.softmax(att, dim=-1), 0.2, self.training) @ v


KEY = np.array([17, 99], np.uint32)


def replayed_multipliers(shape: tuple[int, ...], p: float, stream: int) -> Tensor:
    """What dropout multiplies by, from its definition: bits from the key, the element's index and the stream."""
    index = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    (bits,) = OPS["random_bits"].evaluate([KEY[0], KEY[1], index, np.uint32(stream)], {})
    return torch.from_numpy(np.array(OPS["bits_keep"].evaluate([bits, np.float32(p)], {})[0], np.float32))


@pytest.mark.parametrize("kind", ["reference", "explicit"])
def test_dropout_matches_eager_with_our_masks_replayed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    explicit = kind == "explicit"
    model = GPT(DroppedScores, dropout=0.3) if explicit else TinyGPT(reference_config(dropout=0.3))
    tokens, targets = example_batch()
    module = capture(model, (tokens, targets))
    function = module.functions["loss"]
    assert [(p.hint, str(p.type)) for p in function.params][2:] == [("key", "u32[2]")]
    assert op_counts(module)["attention"] == (1 if explicit else 2)
    streams = itertools.count()

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * replayed_multipliers(tuple(x.shape), p, next(streams)) if training and p else x

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool) -> Tensor:
        future = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)
        return dropout((q @ k.mT * D**-0.5 + future).softmax(-1), dropout_p) @ v

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    loss = model(tokens, targets)[1]
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    inputs = {"tokens": tokens.numpy().astype(np.int32), "targets": targets.numpy().astype(np.int32), "key": KEY}
    found = evaluate(module.with_function(gradients(module, function)), "grads", inputs, weights)
    assert float(found["loss"]) == pytest.approx(float(loss.detach()), abs=1e-5)
    assert next(streams) == (3 if explicit else 7)
    for name, p in model.named_parameters():
        (expected,) = torch.autograd.grad(loss, p, retain_graph=True)
        assert np.allclose(found[f"grad:{name}"], expected.numpy(), atol=1e-5), name


def test_a_module_that_drops_out_is_no_way_to_evaluate() -> None:
    module = capture(GPT(dropout=0.3), example_batch(), check=False)
    with pytest.raises(UserError, match=r"captured in training mode.*\n.*eval\(\)"):
        complete(module)



def test_dropout_needs_no_key_in_evaluation_mode() -> None:
    module = capture(GPT(DroppedScores, dropout=0.3).eval(), example_batch(), check=False)
    assert [p.hint for p in module.functions["loss"].params] == ["tokens", "targets"]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(40)


class OddBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, 40) ** 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table


class Stopped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.detach()


class HalfPrecision(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.half() * 2).float()


@pytest.mark.parametrize(
    ("activation", "said"),
    [
        (Sine, ["aten.sin.default is not supported", "return torch.sin(x)", "test_capture.py", "layer_norm, "]),
        (Branches, ["could not trace", "branches"]),
        (Counts, ["writes to", "seen"]),
        (Noisy, ["random numbers", "torch.randn(40)"]),
        (OddBuffer, ["constant tensor f32[40]", "return x * self.table"]),
        (Stopped, ["gradient", "x.detach()"]),
        (HalfPrecision, ["torch.float16", "model.float()"]),
    ],
)
def test_what_cannot_be_captured_is_named_with_its_line(activation: type[nn.Module], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        capture(GPT(activation=activation), example_batch())
    for piece in said:
        assert piece in str(caught.value)


def test_inputs_and_parameters_that_do_not_fit_are_refused() -> None:
    tokens, targets = example_batch()
    odd = [(), (tokens, targets, targets), (tokens.float(), targets), (tokens[0], targets[0]), (tokens, targets[:1])]
    for inputs in odd:
        with pytest.raises(UserError, match="example"):
            capture(GPT(), inputs)
    frozen = GPT()
    frozen.wpe.weight.requires_grad_(False)
    with pytest.raises(UserError, match="wpe.weight is frozen"):
        capture(frozen, (tokens, targets))
    with pytest.raises(UserError, match="returns no scalar loss"):
        capture(nn.Embedding(VOCAB, 4), (tokens,))
    with pytest.raises(UserError, match="torch.float64"):
        capture(GPT().double(), (tokens, targets))
