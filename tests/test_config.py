"""ModelConfig, presets and training defaults: exact counts, and bad input answered by a UserError."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tinygpt import presets
from tinygpt.config import ModelConfig
from tinygpt.ir.errors import UserError
from tinygpt.presets import PRESETS
from tinygpt.training_defaults import TRAINING_DEFAULTS

# name: parameters, batch, steps, GFLOP a step (to the digits the reference system publishes)
PUBLISHED: dict[str, tuple[int, int, int, float]] = {
    "tiny": (70_464, 16, 2000, 0.22),
    "small": (366_432, 16, 1500, 2.30),
    "medium": (838_400, 16, 1000, 8.00),
    "large": (2_743_296, 12, 600, 26.3),
    "xl": (6_416_896, 8, 400, 40.7),
    "huge": (9_608_704, 8, 1500, 126),
    "massive": (25_039_872, 4, 1000, 161),
    "mega": (25_138_176, 2, 800, 170),
    "behemoth": (473_244_160, 1, 50, 1499),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_matches_the_published_table(name: str) -> None:
    preset = PRESETS[name]
    parameters, batch, steps, gflop = PUBLISHED[name]
    assert preset.name == name
    assert preset.config.parameter_count == parameters
    assert (preset.batch_size, preset.max_steps) == (batch, steps)
    digits = 3 if gflop < 1000 else 4
    measured = preset.config.flops_per_step(preset.batch_size) / 1e9
    assert float(f"{measured:.{digits}g}") == pytest.approx(gflop, rel=5e-3 if gflop > 1 else 2e-2)


def test_presets_are_the_nine_in_order_of_size() -> None:
    assert list(PRESETS) == list(PUBLISHED)
    counts = [preset.config.parameter_count for preset in PRESETS.values()]
    assert counts == sorted(counts)


def test_default_config_is_the_reference_one() -> None:
    assert ModelConfig().parameter_count == 842_496
    small = ModelConfig(context_length=256, n_layers=6, n_heads=6, d_model=384, d_mlp=1536)
    assert small.parameter_count == 10_844_160


def test_mlp_width_follows_the_model_width_unless_given() -> None:
    assert ModelConfig(d_model=64).d_mlp == 256
    assert ModelConfig(d_model=64, d_mlp=100).d_mlp == 100


def test_untied_head_counts_separately() -> None:
    tied, untied = ModelConfig(), ModelConfig(tie_embeddings=False)
    assert untied.parameter_count - tied.parameter_count == 256 * 128


def test_config_survives_its_dict_and_its_json(tmp_path: Path) -> None:
    config = ModelConfig(model_name="odd-one", n_layers=1, n_heads=5, d_model=35, d_mlp=41, dropout=0.25)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(config.to_dict() | {"_notes": ["ignored"]}))
    assert ModelConfig(**config.to_dict()) == config
    assert ModelConfig.from_json(path) == config
    assert presets.find(str(path)).config == config
    assert dataclasses.replace(config, n_layers=2).n_layers == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_layer": 3}, '"n_layers"'),
        ({"zzz": 3}, '"zzz"'),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_layers": -2}, "n_layers is -2"),
        ({"n_layers": 2**31}, "n_layers is 2147483648"),
        ({"n_layers": 2.0}, "n_layers is 2.0"),
        ({"n_layers": True}, "n_layers is true"),
        ({"n_layers": None}, "n_layers is null"),
        ({"vocab_size": "256"}, 'vocab_size is "256"'),
        ({"d_mlp": None}, "d_mlp is null"),
        ({"d_model": 100, "n_heads": 3}, "d_model 100 does not divide by n_heads 3"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"dropout": "0.1"}, "dropout is"),
        ({"tie_embeddings": 1}, "tie_embeddings is 1"),
        ({"dtype": "float16"}, 'dtype is "float16"'),
        ({"model_name": "../x"}, "model_name is"),
        ({"model_name": ["a"]}, "model_name is a list"),
    ],
)
def test_bad_fields_are_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        ModelConfig(**fields)
    assert said in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff"])
def test_bad_json_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="broken.json"):
        ModelConfig.from_json(path)


def test_bad_field_in_a_file_names_the_file_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text('{"n_head": 4}')
    with pytest.raises(UserError, match=r'model.json.*"n_head".*"n_heads"'):
        ModelConfig.from_json(path)


def test_unknown_preset_names_the_nearest_and_missing_file_the_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='"small"'):
        presets.find("smal")
    with pytest.raises(UserError, match="missing.json"):
        presets.find(tmp_path / "missing.json")


def test_config_is_found_from_fields_and_from_itself() -> None:
    config = ModelConfig(n_layers=1)
    assert presets.find({"n_layers": 1}).config == presets.find(config).config == config
    assert presets.find(config).batch_size == TRAINING_DEFAULTS.batch_size == 16


def test_training_defaults_are_the_reference_ones() -> None:
    record = TRAINING_DEFAULTS.to_dict()
    expected = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0, "seed": 42}
    assert expected.items() <= record.items()
    assert PRESETS["xl"].training.batch_size == 8
