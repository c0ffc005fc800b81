"""The reference model: names, counts, initial weights, the tied head, and the loss it starts from."""

from __future__ import annotations

import math

import pytest
import torch

from tinygpt.config import ModelConfig
from tinygpt.ir.errors import UserError
from tinygpt.model import TinyGPT
from tinygpt.presets import PRESETS


def expected_names(layers: int) -> set[str]:
    names = {"token_embedding.weight", "position_embedding.weight", "ln_final.weight", "ln_final.bias"}
    parts = ["ln1", "ln2", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc_in", "mlp.fc_out"]
    return names | {f"blocks.{i}.{p}.{kind}" for i in range(layers) for p in parts for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", PRESETS)
def test_model_has_exactly_the_preset_s_parameters(name: str) -> None:
    config = PRESETS[name].config
    with torch.device("meta"):
        model = TinyGPT(config)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == config.parameter_count
    assert set(parameters) == expected_names(config.n_layers)
    assert len(parameters) == 4 + 16 * config.n_layers


def test_head_is_the_token_embedding_when_tied_and_its_own_when_not() -> None:
    tied = TinyGPT(ModelConfig(n_layers=1, d_model=16, n_heads=2))
    assert set(tied.state_dict()) == expected_names(1)
    config = ModelConfig(n_layers=1, d_model=16, n_heads=2, tie_embeddings=False)
    untied = TinyGPT(config)
    assert set(dict(untied.named_parameters())) == expected_names(1) | {"lm_head.weight"}
    assert sum(p.numel() for p in untied.parameters()) == config.parameter_count


def test_initial_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    config = PRESETS["medium"].config
    model = TinyGPT(config)
    initializers = model.initializers()
    assert list(initializers) == [name for name, _ in model.named_parameters()]
    assert initializers["blocks.1.attn.o_proj.weight"] == ("normal", 0.02 / math.sqrt(8))
    assert initializers["blocks.0.mlp.fc_out.weight"] == ("normal", 0.02 / math.sqrt(8))
    assert initializers["position_embedding.weight"] == ("normal", 0.02)
    assert initializers["blocks.0.ln1.weight"] == ("constant", 1.0)
    assert initializers["blocks.0.attn.k_proj.bias"] == ("constant", 0.0)
    for name, parameter in model.named_parameters():
        kind, value = initializers[name]
        if kind == "constant":
            assert bool((parameter == value).all()), name
            continue
        # The sample deviation of n normals is within 5 standard errors, value / sqrt(2n), of the true one.
        assert parameter.std().item() == pytest.approx(value, abs=5 * value / math.sqrt(2 * parameter.numel())), name
        assert parameter.mean().item() == pytest.approx(0.0, abs=5 * value / math.sqrt(parameter.numel())), name


def test_loss_starts_near_that_of_uniform_guessing() -> None:
    torch.manual_seed(0)
    config = PRESETS["tiny"].config
    model = TinyGPT(config)
    tokens = torch.randint(256, (4, config.context_length))
    targets = torch.randint(256, (4, config.context_length))
    logits, loss = model(tokens, targets)
    assert logits.shape == (4, config.context_length, 256)
    assert loss is not None
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    assert model(tokens)[1] is None


def test_a_token_sees_only_its_past() -> None:
    torch.manual_seed(0)
    model = TinyGPT(ModelConfig(n_layers=2, d_model=32, n_heads=4, context_length=16)).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.equal(before[0, 10:], after[0, 10:])


def test_a_window_longer_than_the_context_is_refused() -> None:
    model = TinyGPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, context_length=8))
    with pytest.raises(UserError, match="9 tokens"):
        model(torch.zeros(1, 9, dtype=torch.long))
