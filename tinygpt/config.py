"""ModelConfig: the shape of one GPT, validated, and what follows from it alone (parameter and FLOP counts).

Named configurations are in `presets`, training hyper-parameters in `training_defaults`, the network in `model`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.ir.errors import UserError

# Extents travel through the bundle as 32-bit integers.
LARGEST_EXTENT = 2**31 - 1

# The name becomes part of file names and of generated sources.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, init=False)
class ModelConfig:
    """A pre-LayerNorm GPT with learned positions: `ModelConfig(n_layers=3, d_model=96, n_heads=3, context_length=64)`.

    The fields are those of the JSON files. Keys that start with `_` are comments and are ignored; any other unknown
    key, and any value out of range, raises UserError. `d_mlp` is 4 * d_model unless given."""

    model_name: str = "tinygpt"
    vocab_size: int = 256
    context_length: int = 128
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 128
    d_mlp: int = 512
    dropout: float = 0.0
    tie_embeddings: bool = True
    dtype: str = "float32"

    def __init__(self, **fields: Any) -> None:
        given = {key: value for key, value in fields.items() if not key.startswith("_")}
        names = [f.name for f in dataclasses.fields(self)]
        for key in given:
            if key not in names:
                raise UserError(
                    f'model config: unknown key "{key}"; the nearest known key is "{nearest(key, names)}"',
                    hint=f"the keys are {', '.join(names)}; a key that starts with _ is a comment",
                )
        for f in dataclasses.fields(self):
            value = given.get(f.name, f.default)
            if f.name == "d_mlp" and "d_mlp" not in given:
                value = 4 * self.d_model
            object.__setattr__(self, f.name, _checked(f.name, str(f.type), value))
        if self.d_model % self.n_heads:
            raise UserError(
                f"model config: d_model {self.d_model} does not divide by n_heads {self.n_heads}",
                hint=f"each head gets d_model / n_heads channels; heads that divide {self.d_model}: "
                f"{', '.join(map(str, _divisors(self.d_model)[:16]))}",
            )

    @staticmethod
    def from_json(path: str | Path) -> ModelConfig:
        """Read a JSON object of the fields above. Raises UserError that names the file and what is wrong in it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"model config {path}: cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8 text'})",
                hint="give a preset name (tinygpt presets lists them) or a JSON file of model fields",
            ) from error
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(
                f"model config {path}: not valid JSON ({error})",
                hint='the file holds one object, such as {"n_layers": 3, "n_heads": 3, "d_model": 96}',
            ) from error
        if not isinstance(fields, dict):
            raise UserError(
                f"model config {path}: holds {_kind(fields)}, not an object",
                hint='the file holds one object, such as {"n_layers": 3, "n_heads": 3, "d_model": 96}',
            )
        try:
            return ModelConfig(**fields)
        except UserError as error:
            raise UserError(f"{path}: {error.args[0]}", hint=error.hint) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; `ModelConfig(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.d_model // self.n_heads

    @property
    def parameter_count(self) -> int:
        """Number of weights; a tied head counts once."""
        c, m = self.d_model, self.d_mlp
        attention = 4 * (c * c + c)
        mlp = (c * m + m) + (m * c + c)
        norms = 2 * 2 * c
        embeddings = self.vocab_size * c + self.context_length * c
        head = 0 if self.tie_embeddings else self.vocab_size * c
        return embeddings + self.n_layers * (attention + mlp + norms) + 2 * c + head

    def flops_per_step(self, batch: int, context: int | None = None) -> int:
        """Floating-point operations of one training step over `batch` windows of `context` tokens.

        Matrix products only, a multiply-add as two: 6 per token and weight of a linear layer or the head (2 forward,
        4 backward), and causal attention's six products (2 forward, 4 backward) over half of the T x T square."""
        context = self.context_length if context is None else context
        c, m = self.d_model, self.d_mlp
        linear = 6 * batch * context * (self.n_layers * (4 * c * c + 2 * c * m) + self.vocab_size * c)
        attention = 6 * context * context * c * self.n_layers * batch
        return linear + attention


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that resembles `name` most; for messages."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _checked(name: str, kind: str, value: Any) -> Any:
    """The value of one field as its declared type, or UserError."""
    if kind == "int":
        return _extent(name, value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise UserError(f"model config: {name} is {_kind(value)}", hint=f"{name} is true or false")
        return value
    if kind == "float":
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(
                f"model config: {name} is {_kind(value)}",
                hint=f"{name} is a probability: 0 (off) up to, but not including, 1",
            )
        return float(value)
    if name == "dtype" and value != "float32":
        raise UserError(f"model config: dtype is {_kind(value)}", hint='weights are "float32"; --set dtype=f16 is an option of the target wgsl')
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise UserError(
            f"model config: {name} is {_kind(value)}",
            hint="a name is 1 to 100 letters, digits, dots, dashes and underscores, and starts with a letter or digit",
        )
    return value


def _extent(name: str, value: Any) -> int:
    try:
        extent = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        extent = None
    if extent is None:
        raise UserError(f"model config: {name} is {_kind(value)}", hint=f"{name} is a whole number, at least 1")
    if not 1 <= extent <= LARGEST_EXTENT:
        raise UserError(
            f"model config: {name} is {extent}", hint=f"{name} is a whole number from 1 to {LARGEST_EXTENT:,}"
        )
    return extent


def _kind(value: Any) -> str:
    """A value as a message shows it: what was in the JSON, cut short."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
