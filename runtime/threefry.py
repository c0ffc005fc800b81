"""Threefry-2x32, the counter-based generator behind every random number (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011, 20 rounds): host-side draws here, initial weights, batch offsets and dropout masks in
compiled code.

A draw is a pure function of (key, counter): nothing is carried along, so no evaluation, pause or resume shifts a
stream."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tinygpt.runtime.errors import UserError

Word = TypeVar("Word", int, NDArray[Any])
Key = tuple[int, int]

_MASK = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)

# The purposes a seed serves on the host. Each gets its own key, so that sampling at position 3 and the dropout mask of
# step 3 are unrelated, and neither meets the counters that compiled functions use under the seed itself.
DROPOUT = 1
SAMPLING = 2
TALES = 3


def threefry2x32(key: Key, x0: Word, x1: Word) -> tuple[Word, Word]:
    """Encrypt the counter (x0, x1) under `key`: two words of 32 bits. Works on ints, or on uint64 arrays holding
    32-bit words."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0 = (x0 + k0) & _MASK
    x1 = (x1 + k1) & _MASK
    for round_ in range(20):
        rotation = _ROTATIONS[round_ % 8]
        x0 = (x0 + x1) & _MASK
        x1 = ((x1 << rotation) & _MASK) | (x1 >> (32 - rotation))
        x1 = x1 ^ x0
        if round_ % 4 == 3:
            injection = round_ // 4 + 1
            x0 = (x0 + schedule[injection % 3]) & _MASK
            x1 = (x1 + schedule[(injection + 1) % 3] + injection) & _MASK
    return x0, x1


def seed_words(seed: int) -> Key:
    """A 64-bit seed as compiled functions take it: (low, high) words. Raises UserError if it is not in 0 .. 2^64 -
    1."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 1 << 64:
        raise UserError(f"seed {seed!r}: must be an integer from 0 to 2^64 - 1", hint="give a seed such as 42")
    return int(seed) & _MASK, int(seed) >> 32


def purpose_key(seed: int, purpose: int) -> Key:
    """The key of one purpose (DROPOUT, SAMPLING, …) under a seed."""
    return threefry2x32(seed_words(seed), purpose, _MASK)


def uniform(key: Key, counter: int) -> float:
    """One float64 in [0, 1): the top 53 bits of the block at `counter` (low word first)."""
    high, low = threefry2x32(key, counter & _MASK, counter >> 32)
    return float((high << 21) | (low >> 11)) * 2.0**-53


def uniforms(key: Key, first: int, count: int) -> NDArray[Any]:
    """`uniform` at the counters first .. first + count - 1, as float64[count]."""
    counters = np.arange(first, first + count, dtype=np.uint64)
    high, low = threefry2x32(key, counters & np.uint64(_MASK), counters >> np.uint64(32))
    return ((high << np.uint64(21)) | (low >> np.uint64(11))).astype(np.float64) * 2.0**-53
