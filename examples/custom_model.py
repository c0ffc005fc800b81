"""Compile a GPT of your own: a PyTorch module is captured as it is, with its names, and trained.

The model below is written as nanoGPT writes it: one projection for q, k and v, a mask kept in a buffer, LayerNorm
without bias, GELU by tanh. Change it; what cannot be compiled is refused with the line it stands on.

    python examples/custom_model.py --steps 300"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinygpt as tg
from tinygpt.runtime import data
from tinygpt.runtime.training import train

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 256, 48, 64, 4, 2, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        q, k, v = (part.view(batch, context, HEADS, width // HEADS).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // HEADS)
        scores = scores.masked_fill(self.mask[:, :, :context, :context] == 0, float("-inf"))
        mixed = F.softmax(scores, dim=-1) @ v
        return self.c_proj(mixed.transpose(1, 2).contiguous().view(batch, context, width))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Capture, compile and train a PyTorch module.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--data", default="tales", help='a text file, "tinyshakespeare" or "tales" (generated)')
    options = parser.parse_args()

    torch.manual_seed(0)
    model = GPT()
    batch = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    module = tg.capture(model, (batch, batch), name="nanogpt")
    print(tg.show(module))

    session = tg.compile(module, target="cpp").session()
    session.load_parameters({name: p.detach().numpy() for name, p in model.named_parameters()})
    train(session, data.load(options.data), options.steps, lr=1e-3)

    # The trained weights go back under the names they came with.
    model.load_state_dict({name: torch.from_numpy(array) for name, array in session.parameters().items()}, strict=False)
    text = data.load(options.data).validation[: BATCH * CONTEXT + 1]
    tokens, targets = (torch.from_numpy(part.astype("int64")).view(BATCH, CONTEXT) for part in (text[:-1], text[1:]))
    with torch.no_grad():
        loss = model(tokens, targets)[1].item()
    print(f"validation loss of a batch: {session.loss(tokens, targets):.6f} compiled, {loss:.6f} in PyTorch")
    print((b"The " + session.generate(b"The ", 120, seed=1)).decode(errors="replace"))


if __name__ == "__main__":
    main()
