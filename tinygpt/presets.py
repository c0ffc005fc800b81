"""The nine named configurations, and how a CONFIG argument (preset name, JSON file, fields) becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.config import ModelConfig, nearest
from tinygpt.ir.errors import UserError
from tinygpt.training_defaults import TRAINING_DEFAULTS, TrainingDefaults


@dataclass(frozen=True)
class Preset:
    """A model and how it is usually trained: windows per step and number of steps."""

    config: ModelConfig
    batch_size: int = TRAINING_DEFAULTS.batch_size
    max_steps: int = TRAINING_DEFAULTS.max_steps

    @property
    def name(self) -> str:
        return self.config.model_name

    @property
    def training(self) -> TrainingDefaults:
        """The training defaults with this preset's batch and steps."""
        return TrainingDefaults(batch_size=self.batch_size, max_steps=self.max_steps)

    def shape(self, batch: int | None, context: int | None) -> tuple[int, int]:
        """The batch and context to compile for: the given ones, else the preset's."""
        return (
            self.batch_size if batch is None else batch,
            self.config.context_length if context is None else context,
        )


def _preset(name: str, layers: int, width: int, heads: int, context: int, batch: int, steps: int) -> Preset:
    config = ModelConfig(
        model_name=name, n_layers=layers, d_model=width, n_heads=heads, d_mlp=4 * width, context_length=context
    )
    return Preset(config, batch, steps)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        #       name        layers width heads context batch steps
        _preset("tiny",     2,     48,   3,    32,     16,   2000),
        _preset("small",    3,     96,   3,    64,     16,   1500),
        _preset("medium",   4,     128,  4,    96,     16,   1000),
        _preset("large",    6,     192,  6,    128,    12,   600),
        _preset("xl",       8,     256,  8,    128,    8,    400),
        _preset("huge",     12,    256,  8,    256,    8,    1500),
        _preset("massive",  14,    384,  12,   256,    4,    1000),
        _preset("mega",     14,    384,  12,   512,    2,    800),
        _preset("behemoth", 24,    1280, 20,   512,    1,    50),
    )
}  # fmt: skip


def find(source: str | Path | Mapping[str, Any] | ModelConfig | Preset) -> Preset:
    """The configuration a user means: a preset or its name, a JSON file, a mapping of fields or a ModelConfig.

    Everything but a preset gets the default batch size and steps. Raises UserError."""
    if isinstance(source, Preset):
        return source
    if isinstance(source, ModelConfig):
        return Preset(source)
    if isinstance(source, Mapping):
        return Preset(ModelConfig(**source))
    if isinstance(source, str) and source in PRESETS:
        return PRESETS[source]
    path = Path(source)
    if path.suffix == ".json" or path.is_file() or len(path.parts) > 1:
        return Preset(ModelConfig.from_json(path))
    raise UserError(
        f'"{source}" is neither a preset nor a file; the nearest preset is "{nearest(str(source), PRESETS)}"',
        hint=f"the presets are {', '.join(PRESETS)}; or give a JSON file of model fields",
    )
