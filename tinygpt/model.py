"""The reference model in PyTorch: what the compiler captures by default, and what its numbers are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt.config import ModelConfig
from tinygpt.ir.errors import UserError

# How a parameter starts: ("normal", standard deviation) or ("constant", value).
Initializer = tuple[str, float]

INIT_STD = 0.02


class Attention(nn.Module):
    """Causal self-attention. The four projections are separate so that each has a name of its own."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.dropout = cfg.dropout
        self.q_proj = nn.Linear(cfg.d_model, cfg.d_model)
        self.k_proj = nn.Linear(cfg.d_model, cfg.d_model)
        self.v_proj = nn.Linear(cfg.d_model, cfg.d_model)
        self.o_proj = nn.Linear(cfg.d_model, cfg.d_model)

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, H, T, C / H]"""
        batch, context, width = x.shape
        return x.view(batch, context, self.n_heads, width // self.n_heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(x.shape))
        return projected


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.fc_out = nn.Linear(cfg.d_mlp, cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.fc_out(F.gelu(self.fc_in(x)))
        return projected


class Block(nn.Module):
    """x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(cfg.d_model, eps=1e-5)
        self.attn = Attention(cfg)
        self.ln2 = nn.LayerNorm(cfg.d_model, eps=1e-5)
        self.mlp = MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.ln1(x)))
        x = x + self.drop(self.mlp(self.ln2(x)))
        return x


class TinyGPT(nn.Module):
    """A pre-LayerNorm GPT over `cfg.vocab_size` tokens with learned positions and, by default, a tied head.

    Built on the current default device; under `torch.device("meta")` it costs no memory and can still be captured."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position_embedding = nn.Embedding(cfg.context_length, cfg.d_model)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = nn.LayerNorm(cfg.d_model, eps=1e-5)
        # No module when tied, so that the state dict holds each weight once.
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.reset_parameters()

    def initializers(self) -> dict[str, Initializer]:
        """How each parameter starts, by name: N(0, 0.02) for matrices, with 0.02 / sqrt(2 L) for the two that write
        into the residual stream (GPT-2, Radford et al. 2019, section 2.3); 1 for LayerNorm gains, 0 for biases."""
        residual_std = INIT_STD / math.sqrt(2 * self.cfg.n_layers)
        chosen: dict[str, Initializer] = {}
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "fc_out.weight")):
                chosen[name] = ("normal", residual_std)
            elif parameter.dim() >= 2:
                chosen[name] = ("normal", INIT_STD)
            else:
                chosen[name] = ("constant", 1.0 if name.endswith(".weight") else 0.0)
        return chosen

    def reset_parameters(self) -> None:
        """Draw fresh weights from PyTorch's global generator."""
        initializers = self.initializers()
        for name, parameter in self.named_parameters():
            kind, value = initializers[name]
            if kind == "normal":
                nn.init.normal_(parameter, 0.0, value)
            else:
                nn.init.constant_(parameter, value)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits f32[B, T, V] of tokens i64[B, T], and with targets i64[B, T] the mean cross-entropy in nats.

        Raises UserError if T exceeds the context length."""
        context = tokens.shape[1]
        if context > self.cfg.context_length:
            raise UserError(
                f"{context} tokens do not fit the model's context of {self.cfg.context_length}",
                hint="pass a shorter window, or a config with a larger context_length",
            )
        positions = torch.arange(context, device=tokens.device)
        x = self.drop(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        head = self.token_embedding if self.lm_head is None else self.lm_head
        logits = F.linear(self.ln_final(x), head.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
