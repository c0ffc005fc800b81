"""Checkpoints: weights, optimizer moments, step and settings in one safetensors file.

Arrays are saved under the parameter's name (NAME, NAME.m, NAME.v), in PyTorch's shapes, so a checkpoint belongs to a
model and not to a target. A save is whole or not at all: the file is written in a folder of its own beside the
destination, synced, renamed over it, and the folder's entry is synced. A kill at any moment leaves the previous
checkpoint; what it left behind (`.NAME.partial/`) goes with the next save.

The metadata holds a SHA-256 over all arrays and settings, so an edited file is told from a whole one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from tinygpt.runtime.errors import UserError
from tinygpt.runtime.manifest import DTYPES, Manifest

FORMAT = "tinygpt-checkpoint"
VERSION = 1

_HEADER_ALLOWANCE = 1 << 20  # names, shapes and settings, in the estimate of the space a save takes
_ANOTHER = "use another checkpoint, or train again"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` optimizer steps. `training` are the settings it ran with, `config` the model's
    fields (None if it was captured from a module), `data` the fingerprint of its corpus, if it had one."""

    arrays: Mapping[str, NDArray[Any]]
    step: int
    seed: int
    batch: int
    context: int
    config: Mapping[str, Any] | None
    training: Mapping[str, Any]
    data: Mapping[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the arrays, as it goes into the file."""
        return {
            "step": self.step, "seed": self.seed, "batch": self.batch, "context": self.context,
            "config": self.config, "training": self.training, "data": self.data,
        }  # fmt: skip


def save(path: str | Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` to `path`; returns the path it resolved to. Raises UserError if it cannot be written (no
    space, no permission, not a file), with the previous file untouched."""
    destination = _destination(path)
    arrays = {name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}
    require_writable(destination, sum(array.nbytes for array in arrays.values()))
    settings = json.dumps(checkpoint.settings, sort_keys=True, allow_nan=False)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "settings": settings,
        "sha256": _content_hash(settings, arrays),
    }
    partial = destination.parent / f".{destination.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_synced(partial / destination.name, arrays, metadata)
        os.replace(partial / destination.name, destination)
        _sync(destination.parent)
    except OSError as error:
        raise _refusal(destination, error) from error
    except safetensors.SafetensorError as error:
        raise _refusal(destination, _as_os_error(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return destination


def require_writable(path: str | Path, payload_bytes: int = 0) -> None:
    """Raise UserError if `path` cannot become a checkpoint of `payload_bytes`: a run finds out before it starts, not
    after."""
    destination = _destination(path)
    folder = destination.parent
    if not folder.is_dir():
        raise UserError(f"checkpoint {path}: there is no folder {folder}", hint=f"create it: mkdir -p {folder}")
    if destination.exists() and not destination.is_file():
        raise UserError(f"checkpoint {path}: is not a regular file", hint="name a file, such as run.safetensors")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refusal(destination, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _refusal(destination, error) from error
    if free < payload_bytes + _HEADER_ALLOWANCE:
        raise UserError(
            f"checkpoint {path}: needs {_mib(payload_bytes + _HEADER_ALLOWANCE)}, the disk has {_mib(free)} free "
            "(the previous checkpoint stays until the new one is whole)",
            hint="free some space, or write to another disk",
        )


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint and check its content hash. Raises UserError for a file that is missing, truncated, edited, of
    another version, or no checkpoint at all."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"checkpoint {path}: no such file", hint="give the file that `tinygpt train --out FILE` wrote")
    if not path.is_file():
        raise UserError(f"checkpoint {path}: is not a file", hint="give the file that `tinygpt train --out FILE` wrote")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            _require_format(path, metadata)
            names = file.keys()  # it is no mapping
            arrays = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"checkpoint {path}: is truncated or not a safetensors file: {error}", hint=_ANOTHER) from error
    settings = metadata.get("settings", "")
    if _content_hash(settings, arrays) != metadata.get("sha256"):
        raise UserError(
            f"checkpoint {path}: was damaged or edited (its content does not match its sha256)", hint=_ANOTHER
        )
    try:
        return _parse(json.loads(settings), arrays)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"checkpoint {path}: its settings are malformed: {error}", hint=_ANOTHER) from error


def require_fit(checkpoint: Checkpoint, manifest: Manifest, path: str | Path) -> None:
    """Raise UserError unless the checkpoint has exactly the model's arrays, shapes and dtypes; the message names the
    first config fields that differ, or the first arrays."""
    wanted = {slot.name: (slot.shape, slot.numpy_dtype) for slot in manifest.parameters}
    found = {name: (array.shape, array.dtype) for name, array in checkpoint.arrays.items()}
    if wanted == found:
        return
    config, ours = checkpoint.config or {}, manifest.config or {}
    fields = [
        f"{key} is {config.get(key)!r} in the checkpoint and {ours.get(key)!r} in the model"
        for key in sorted(config.keys() & ours.keys())
        if config[key] != ours[key] and key != "model_name"
    ]
    arrays = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    arrays += [f"{name} is not in the model" for name in found.keys() - wanted.keys()]
    arrays += [
        f"{name} is {_type(*found[name])}, the model has {_type(*wanted[name])}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    raise UserError(
        f"checkpoint {path}: belongs to another model than bundle {manifest.name!r}: {_some(fields or sorted(arrays))}",
        hint="compile the model the checkpoint was trained with, or give a checkpoint of this one",
    )


def _destination(path: str | Path) -> Path:
    """Through symbolic links, so that a rename replaces the file and not the link."""
    return Path(os.path.realpath(path))


def _write_synced(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode  # what the umask gives; safetensors makes its files private
    safetensors.numpy.save_file(dict(arrays), path, metadata)
    path.chmod(mode)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_os_error(error: safetensors.SafetensorError) -> OSError:
    """safetensors reports a failed write as text that ends in "(os error N)"."""
    number = re.search(r"os error (\d+)", str(error))
    code = int(number.group(1)) if number else errno.EIO
    return OSError(code, os.strerror(code) if number else str(error))


def _refusal(path: Path, error: OSError) -> UserError:
    hints = {
        errno.ENOSPC: "free some space, or write to another disk",
        errno.EDQUOT: "free some of your quota, or write to another disk",
        errno.EACCES: f"make {path.parent} writable, or write elsewhere",
        errno.EPERM: f"make {path.parent} writable, or write elsewhere",
        errno.EROFS: "write to another disk",
    }
    kept = "; the previous checkpoint is untouched" if path.exists() else ""
    hint = hints.get(error.errno or 0, "write to another place")
    return UserError(f"checkpoint {path}: cannot be written: {error.strerror or error}{kept}", hint=hint)


def _content_hash(settings: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(settings.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\0{name}|{array.dtype.str}|{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _require_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path}: is a safetensors file, but no TinyGPT checkpoint",
            hint="load plain weights with session.load_parameters(safetensors.numpy.load_file(path))",
        )
    if metadata.get("version") != str(VERSION):
        raise UserError(
            f"checkpoint {path}: has format version {metadata.get('version')}, this runtime reads version {VERSION}",
            hint="use the tinygpt that wrote it",
        )


def _parse(settings: Any, arrays: Mapping[str, NDArray[Any]]) -> Checkpoint:
    numbers = {key: settings[key] for key in ("step", "seed", "batch", "context")}
    for (key, value), bits in zip(numbers.items(), (32, 64, 32, 32), strict=True):
        if type(value) is not int or not 0 <= value < 1 << bits:
            raise ValueError(f"{key} is {value!r}")
    config, training, data = settings["config"], settings["training"], settings["data"]
    if not isinstance(training, dict) or not all(isinstance(entry, dict | None) for entry in (config, data)):
        raise TypeError("config, training and data must be objects")
    return Checkpoint(arrays=arrays, config=config, training=training, data=data, **numbers)


def _type(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    name = next((short for short, known in DTYPES.items() if known == dtype), str(dtype))
    return f"{name}{list(shape)}"


def _some(problems: Iterable[str]) -> str:
    first, *others = problems
    return "; ".join([first, *others[:2]]) + (f"; and {len(others) - 2} more" if len(others) > 2 else "")


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
