"""Text to train on: where a corpus is found, how it is split, and how windows of it become batches.

Without a name, the corpus is TinyShakespeare: from the folder TINYGPT_DATA names, from the cache, or downloaded once;
and where there is no network, the generated tales of tales.py. `Corpus.source` says which it was: print it."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from tinygpt.runtime import tales
from tinygpt.runtime.errors import UserError

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_BYTES = 1_115_394
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
FOLDER_VARIABLE = "TINYGPT_DATA"

_FILE = "tinyshakespeare.txt"
_TIMEOUT_SECONDS = 10
_DOWNLOAD_CHUNK = 1 << 16
_MAX_BYTES = (1 << 31) - 1  # window offsets are i32


@dataclass(frozen=True)
class Corpus:
    """A text as byte tokens, uint8[n]. `source` is a line for people; `floor` is the source's entropy in nats per byte,
    where it is known."""

    name: str
    source: str
    data: NDArray[np.uint8]
    floor: float | None = None

    @property
    def _cut(self) -> int:
        return self.data.size * 9 // 10

    @property
    def train(self) -> NDArray[np.uint8]:
        """The first 90 %."""
        return self.data[: self._cut]

    @property
    def validation(self) -> NDArray[np.uint8]:
        """The last 10 %."""
        return self.data[self._cut :]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint records of its data: name, bytes, sha256."""
        return {"name": self.name, "bytes": int(self.data.size), "sha256": hashlib.sha256(self.data.data).hexdigest()}

    def require_windows(self, context: int) -> None:
        """Raise UserError unless the training part holds a window of `context` tokens with its targets, and the
        validation part at least one prediction."""
        needed = bytes_needed(context)
        if self.data.size < needed:
            raise UserError(
                f"corpus {self.name}: has {self.data.size} bytes, context {context} needs at least {needed}",
                hint="give a longer text, or compile with a smaller --context",
            )


def bytes_needed(context: int) -> int:
    """The least corpus for windows of `context`: context + 1 bytes in its first 90 %, and 2 in the rest."""
    return max(-(-10 * (context + 1) // 9), 11)


def load(source: str | Path | None = None) -> Corpus:
    """The corpus a user means: None (TinyShakespeare or the tales), "tinyshakespeare", "tales", or the path of any
    file.

    Raises UserError for a path that is missing, a folder, empty, too large or unreadable."""
    if source is None:
        return _default()
    path = Path(source)
    if str(source) == "tales" and not path.exists():
        return _tales("the generated tales")
    if str(source) == "tinyshakespeare" and not path.exists():
        return _found() or _downloaded()
    return _read(path)


def gather(data: NDArray[np.uint8], offsets: NDArray[Any], context: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Tokens and targets, uint8[B, context] each, of the windows at `offsets` (0 <= offset < data.size - context).
    Targets are the tokens shifted by one."""
    windows = data[offsets.astype(np.int64)[:, None] + np.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def evaluation_batches(
    data: NDArray[np.uint8], batch: int, context: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]]:
    """Windows that do not overlap and together predict every byte of `data` but the first, once: (tokens, targets,
    mask), each [batch, context]. Where the last window or the last batch is not full, it is padded with zeros and the
    mask is False; attention is causal, so padding behind a token does not change what is predicted for it."""
    predictions = data.size - 1
    for first in range(0, predictions, batch * context):
        positions = first + np.arange(batch * context).reshape(batch, context)
        mask = positions < predictions
        inside = np.minimum(positions, predictions - 1)
        yield np.where(mask, data[inside], 0), np.where(mask, data[inside + 1], 0), mask


def _read(path: Path) -> Corpus:
    if not path.exists():
        raise UserError(
            f"corpus {path}: no such file", hint="give the path of a text file, or leave it out for TinyShakespeare"
        )
    if path.is_dir():
        raise UserError(
            f"corpus {path}: is a folder", hint="give one text file; `cat FOLDER/*.txt > corpus.txt` joins several"
        )
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise UserError(
                f"corpus {path}: has {size} bytes, at most {_MAX_BYTES} are supported", hint="use a part of it"
            )
        data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise UserError(
            f"corpus {path}: cannot be read: {error.strerror or error}", hint="check its permissions"
        ) from error
    if not data.size:
        raise UserError(f"corpus {path}: is empty", hint="give a text file with something in it")
    return Corpus(path.name, f"{path} ({data.size:,} bytes)", data)


def _tales(source: str) -> Corpus:
    data = np.frombuffer(tales.generate(), dtype=np.uint8)
    floor = tales.entropy_per_byte()
    return Corpus("tales", f"{source} ({data.size:,} bytes, entropy {floor:.4f} nats/byte)", data, floor)


def _default() -> Corpus:
    """TinyShakespeare if it can be had, else the tales."""
    found = _found()
    if found:
        return found
    try:
        return _downloaded()
    except UserError as error:
        return _tales(f"generated tales, because {error.args[0]}")


def _found() -> Corpus | None:
    """TinyShakespeare from the folder the user names, or from the cache."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named and not Path(named).is_dir():
        raise UserError(
            f"{FOLDER_VARIABLE}={named}: is not a folder",
            hint=f"name a folder that holds {_FILE}, or unset {FOLDER_VARIABLE}",
        )
    if named and (Path(named) / _FILE).exists():
        corpus = _read(Path(named) / _FILE)
        if not _is_tinyshakespeare(corpus.data):
            raise UserError(
                f"{Path(named) / _FILE}: is not TinyShakespeare (its sha256 differs)",
                hint="replace it, or train on it as any text with --data FILE",
            )
        return Corpus("tinyshakespeare", f"TinyShakespeare from {Path(named) / _FILE}", corpus.data)
    try:
        data = np.frombuffer(_cache_path().read_bytes(), dtype=np.uint8)
    except OSError:
        return None
    if not _is_tinyshakespeare(data):  # damaged: to be fetched again
        return None
    return Corpus("tinyshakespeare", f"TinyShakespeare from {_cache_path()}", data)


def _downloaded() -> Corpus:
    """TinyShakespeare from the network, kept in the cache. Raises UserError if it cannot be had."""
    hint = f"put {_FILE} into a folder and set {FOLDER_VARIABLE} to it, or give any text with --data FILE"
    try:
        with urllib.request.urlopen(TINYSHAKESPEARE_URL, timeout=_TIMEOUT_SECONDS) as response:
            data = np.frombuffer(b"".join(_with_progress(response)), dtype=np.uint8)
    except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", error)
        raise UserError(f"TinyShakespeare could not be downloaded: {reason}", hint=hint) from error
    if not _is_tinyshakespeare(data):
        raise UserError("what was downloaded is not TinyShakespeare (its sha256 differs)", hint=hint)
    return Corpus("tinyshakespeare", f"TinyShakespeare, downloaded{_keep(_cache_path(), data)}", data)


def _cache_path() -> Path:
    return platformdirs.user_cache_path("tinygpt") / _FILE


def _is_tinyshakespeare(data: NDArray[np.uint8]) -> bool:
    return data.size == TINYSHAKESPEARE_BYTES and hashlib.sha256(data.data).hexdigest() == TINYSHAKESPEARE_SHA256


def _keep(path: Path, data: NDArray[np.uint8]) -> str:
    """Put a download into the cache, whole or not at all. A cache that cannot be written costs only the next
    download."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            (Path(folder) / path.name).write_bytes(data.tobytes())
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        return f" (not kept in {path.parent}: {error.strerror or error})"
    return f" to {path}"


def _with_progress(response: IO[bytes]) -> Iterator[bytes]:
    """The chunks of a response, at most one byte more than there should be; a line of progress on a terminal."""
    received = 0
    while received <= TINYSHAKESPEARE_BYTES:
        chunk = response.read(min(_DOWNLOAD_CHUNK, TINYSHAKESPEARE_BYTES + 1 - received))
        if not chunk:
            break
        received += len(chunk)
        if sys.stderr.isatty():
            share = min(received / TINYSHAKESPEARE_BYTES, 1)
            print(
                f"\rdownloading TinyShakespeare: {share:4.0%}",
                end="\n" if share == 1 else "",
                file=sys.stderr,
                flush=True,
            )
        yield chunk
