"""Which bundles this user's compiler wrote on this machine. Only their word is taken that an access lies inside its memory.

A manifest can say of a kernel that its bounds are proved, but so can a forged one. The compiler therefore notes the hash of
each manifest it writes in the user's cache folder; a bundle from elsewhere runs with all of the driver's checks."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import platformdirs


def digest(manifest: bytes) -> str:
    """The name of a bundle: the hash of its manifest, which holds the hashes of its files."""
    return hashlib.sha256(manifest).hexdigest()


def remember(manifest: bytes) -> None:
    """Note that a bundle with this manifest was compiled here. Where nothing can be written it counts as foreign."""
    with contextlib.suppress(OSError):
        _folder().mkdir(parents=True, exist_ok=True)
        (_folder() / digest(manifest)).touch()


def is_own(name: str) -> bool:
    """Whether the bundle of this digest was compiled here."""
    return (_folder() / name).is_file()


def _folder() -> Path:
    return platformdirs.user_cache_path("tinygpt") / "compiled"
