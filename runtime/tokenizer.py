"""The byte tokenizer: a token is a byte of the UTF-8 text, and its id is the byte's value. No special tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tinygpt.runtime.errors import UserError

BYTES = 256


def encode(text: str | bytes, vocab_size: int = BYTES) -> NDArray[np.uint8]:
    """uint8[n] ids of `text`. Raises UserError if the model's vocabulary has no id for one of its bytes."""
    tokens = np.frombuffer(text.encode("utf-8") if isinstance(text, str) else text, dtype=np.uint8)
    require_vocabulary(tokens, vocab_size, "the text")
    return tokens


def decode(tokens: Iterable[int]) -> bytes:
    """The bytes of `tokens`. Raises UserError for an id that is no byte (a model with a larger vocabulary)."""
    ids = [int(token) for token in tokens]
    strange = next((token for token in ids if not 0 <= token < BYTES), None)
    if strange is not None:
        raise UserError(
            f"token {strange} is not a byte", hint="this model was not trained on bytes; decode its tokens yourself"
        )
    return bytes(ids)


def decode_text(tokens: Iterable[int]) -> str:
    """`decode` as text; bytes that are not UTF-8 (a cut or an untrained model) become U+FFFD."""
    return decode(tokens).decode("utf-8", errors="replace")


def require_vocabulary(tokens: NDArray[np.uint8], vocab_size: int, what: str) -> None:
    """Raise UserError if `what` has a byte that is no id of a vocabulary of `vocab_size`."""
    if vocab_size >= BYTES or not tokens.size or int(tokens.max()) < vocab_size:
        return
    at = int(np.argmax(tokens >= vocab_size))
    raise UserError(
        f"{what} has byte {int(tokens[at])} at offset {at}, but the model's vocabulary has only {vocab_size} ids",
        hint=f"use a model with vocab_size {BYTES}, or a text whose bytes are all below {vocab_size}",
    )
