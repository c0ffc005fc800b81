"""The manifest of a bundle: read, validated, and only then believed.

A manifest is hostile until validated. Every number that later becomes an address (pool sizes, offsets, shapes) is
checked here, once, so that engines may use slots without looking again:

- every slot lies inside its pool and is aligned to its element type (sizes are computed in unbounded integers);
- parameters and optimizer state share no byte, and the inputs of a function share no byte with each other or with them;
- names are plain (no path can leave the bundle's folder), and every listed file has the content its hash says.

What a launch or a kernel entry means is the target's own business: they pass through as parsed JSON, and the engine of
that target checks them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Never

import numpy as np

from tinygpt.runtime import trust
from tinygpt.runtime.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "tinygpt-bundle"
VERSION = 1

DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "f16": np.dtype(np.float16),
    "i32": np.dtype(np.int32), "u32": np.dtype(np.uint32), "bool": np.dtype(np.bool_),
}  # fmt: skip

_MAX_MANIFEST_BYTES = 256 << 20
_MAX_POOL_BYTES = 1 << 44
_MAX_DIMENSION = 1 << 40
_MAX_RANK = 8
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,255}")
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-]{0,254}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RECOMPILE = "compile the bundle again: tinygpt compile CONFIG --target T --out DIR"


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a pool: row-major, `offset` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    pool: str
    offset: int

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def end(self) -> int:
        """The first byte after the tensor."""
        return self.offset + self.nbytes


@dataclass(frozen=True)
class ParameterSlot(Slot):
    """A tensor that lives from step to step: a weight (role "param", PyTorch's name and shape) or one of the
    optimizer's moments (role "state", named NAME.m or NAME.v)."""

    role: str
    init: tuple[Any, ...]
    decay: bool


@dataclass(frozen=True)
class FunctionEntry:
    """A compiled function: where its inputs go, where its outputs are after `run`, and the target's launch list."""

    name: str
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    launches: tuple[Any, ...]


@dataclass(frozen=True)
class Manifest:
    """A validated manifest. `batch` and `context` are the B and T of every token input but that of `logits` (1 and
    T)."""

    name: str
    strict: bool
    config: Mapping[str, Any] | None
    batch: int
    context: int
    vocab_size: int
    training: Mapping[str, Any]
    target: Mapping[str, Any]
    pools: Mapping[str, int]
    parameters: tuple[ParameterSlot, ...]
    functions: Mapping[str, FunctionEntry]
    kernels: Any
    files: Mapping[str, str]
    golden: Mapping[str, Mapping[str, float]]
    digest: str  # of the manifest's text: the bundle's name

    @property
    def target_name(self) -> str:
        return str(self.target["name"])

    def file(self, folder: Path, name: str) -> Path:
        """The path of a file of the bundle whose hash was checked. Raises UserError if the manifest does not list
        it."""
        if name not in self.files:
            raise UserError(f"bundle {folder}: {MANIFEST} lists no file {name!r}", hint=_RECOMPILE)
        return folder / name


def load(folder: str | Path) -> Manifest:
    """Read and validate `folder`/manifest.json, and check the hash of every file it lists.

    Raises UserError naming the entry or the file that is wrong."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        what = "is a file, not a bundle's folder" if folder.exists() else "does not exist"
        raise UserError(f"bundle {folder}: {what}", hint="give the folder that `tinygpt compile --out DIR` wrote")
    if not path.is_file():
        raise UserError(
            f"bundle {folder}: has no {MANIFEST}", hint="give the folder that `tinygpt compile --out DIR` wrote"
        )
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise UserError(f"{path}: is larger than {_MAX_MANIFEST_BYTES >> 20} MiB", hint=_RECOMPILE)
        manifest = parse(path.read_bytes(), str(path))
        _verify_files(folder, manifest)
    except OSError as error:
        raise UserError(f"bundle {folder}: cannot be read: {error}", hint="check the folder's permissions") from error
    return manifest


def parse(text: str | bytes, origin: str = MANIFEST) -> Manifest:
    """Validate the text of a manifest; `origin` names it in messages. Does not look at any file."""
    try:
        document = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: is not valid JSON: {error}", hint=_RECOMPILE) from error
    root = _Node(origin, document)
    if root.member("format").text() != FORMAT:
        root.member("format").fail(f"must be {FORMAT!r}")
    version = root.member("version").integer(0, 1 << 31)
    if version != VERSION:
        raise UserError(
            f"{origin}: has format version {version}, this runtime reads version {VERSION}",
            hint="use the tinygpt that wrote the bundle, or compile it again with this one",
        )
    pools = {name: node.integer(0, _MAX_POOL_BYTES) for name, node in root.member("pools").named()}
    parameters = tuple(_parameter(node, pools) for node in root.member("parameters").items())
    functions = {name: _function(name, node, pools) for name, node in root.member("functions").named()}
    config = root.member("config").mapping() if root.get("config") is not None else None
    _refuse_repeated_names(parameters, f"{origin}: parameters")
    _refuse_overlap(parameters, f"{origin}: parameters")
    for function in functions.values():
        where = f"{origin}: functions.{function.name}"
        _refuse_repeated_names(function.inputs, f"{where}.inputs")
        _refuse_repeated_names(function.outputs, f"{where}.outputs")
        _refuse_overlap((*parameters, *function.inputs), f"{where}.inputs")
    target = root.member("target")
    target.member("name").name()
    return Manifest(
        name=root.member("name").text(),
        strict=root.member("strict").boolean(),
        config=config,
        batch=root.member("batch").integer(1, 1 << 24),
        context=root.member("context").integer(1, 1 << 24),
        vocab_size=_vocab_size(root, functions),
        training=_training(root.member("training"), functions),
        target=target.mapping(),
        pools=pools,
        parameters=parameters,
        functions=functions,
        kernels=root.get("kernels"),
        files={name: _hash(name, node) for name, node in root.member("files").members()},
        golden={
            function: {name: node.number() for name, node in nodes.named()}
            for function, nodes in (root.member("golden").named() if root.get("golden") is not None else ())
        },
        digest=trust.digest(text if isinstance(text, bytes) else text.encode()),
    )


@dataclass(frozen=True)
class _Node:
    """A value of the document and the path that leads to it, so that each refusal says where."""

    path: str
    value: Any

    def fail(self, problem: str) -> Never:
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise UserError(f"{self.path}: {problem}, found {shown}", hint=_RECOMPILE)

    def _down(self, key: str) -> str:
        return f"{self.path}.{key}" if ": " in self.path else f"{self.path}: {key}"

    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            self.fail("must be an object")
        return self.value

    def get(self, key: str) -> Any:
        return self.mapping().get(key)

    def member(self, key: str) -> _Node:
        if key not in self.mapping():
            raise UserError(f"{self._down(key)}: is missing", hint=_RECOMPILE)
        return _Node(self._down(key), self.value[key])

    def members(self) -> Iterator[tuple[str, _Node]]:
        for key, value in self.mapping().items():
            yield key, _Node(self._down(key), value)

    def named(self) -> Iterator[tuple[str, _Node]]:
        """Members whose keys are names (of pools, functions, tensors)."""
        for key, node in self.members():
            _Node(self.path, key).name()
            yield key, node

    def items(self) -> Iterator[_Node]:
        if not isinstance(self.value, list):
            self.fail("must be a list")
        for index, value in enumerate(self.value):
            yield _Node(f"{self.path}[{index}]", value)

    def integer(self, low: int, high: int) -> int:
        if type(self.value) is not int or not low <= self.value <= high:
            self.fail(f"must be an integer from {low} to {high}")
        return self.value

    def number(self) -> float:
        """A finite number, not negative."""
        if type(self.value) not in (int, float) or not 0 <= self.value <= 1e300:
            self.fail("must be a finite number, not negative")
        return float(self.value)

    def boolean(self) -> bool:
        if type(self.value) is not bool:
            self.fail("must be true or false")
        return self.value

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.fail("must be a string")
        return self.value

    def name(self) -> str:
        if not _NAME.fullmatch(self.text()):
            self.fail("must be a name of letters, digits, '_', '.', ':' and '-'")
        return self.text()

    def choice(self, *choices: str) -> str:
        if self.value not in choices:
            self.fail(f"must be one of {', '.join(choices)}")
        return self.text()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    key, times = Counter(key for key, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    if times > 1:
        raise ValueError(f"key {key!r} occurs {times} times")
    return dict(pairs)


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _slot_fields(node: _Node, pools: Mapping[str, int]) -> dict[str, Any]:
    dtype = node.member("dtype").choice(*DTYPES)
    shape = tuple(dimension.integer(1, _MAX_DIMENSION) for dimension in node.member("shape").items())
    if len(shape) > _MAX_RANK:
        node.member("shape").fail(f"must have at most {_MAX_RANK} dimensions")
    pool = node.member("pool").choice(*pools)
    offset = node.member("offset").integer(0, pools[pool])
    slot = Slot(node.member("name").name(), shape, dtype, pool, offset)
    if offset % slot.numpy_dtype.itemsize:
        node.member("offset").fail(f"must be a multiple of {slot.numpy_dtype.itemsize}, the size of {dtype}")
    if slot.end > pools[pool]:
        node.member("offset").fail(
            f"{slot.name!r} of {slot.nbytes} bytes ends after pool {pool!r} of {pools[pool]} bytes"
        )
    return {"name": slot.name, "shape": shape, "dtype": dtype, "pool": pool, "offset": offset}


def _parameter(node: _Node, pools: Mapping[str, int]) -> ParameterSlot:
    return ParameterSlot(
        **_slot_fields(node, pools),
        role=node.member("role").choice("param", "state"),
        init=tuple(item.value for item in node.member("init").items()),
        decay=node.member("decay").boolean(),
    )


def _function(name: str, node: _Node, pools: Mapping[str, int]) -> FunctionEntry:
    def slots(key: str) -> tuple[Slot, ...]:
        return tuple(Slot(**_slot_fields(item, pools)) for item in node.member(key).items())

    launches = tuple(item.value for item in node.member("launches").items())
    return FunctionEntry(name, slots("inputs"), slots("outputs"), launches)


def _refuse_repeated_names(slots: tuple[Slot, ...], where: str) -> None:
    names = [slot.name for slot in slots]
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: the name {repeated!r} occurs twice", hint=_RECOMPILE)


def _refuse_overlap(slots: tuple[Slot, ...], where: str) -> None:
    for first, second in pairwise(sorted(slots, key=lambda slot: (slot.pool, slot.offset))):
        if first.pool == second.pool and second.offset < first.end:
            raise UserError(
                f"{where}: {first.name!r} and {second.name!r} overlap in pool {first.pool!r} at byte {second.offset}",
                hint=_RECOMPILE,
            )


def _vocab_size(root: _Node, functions: Mapping[str, FunctionEntry]) -> int:
    """Tokens index an embedding, so their bound must be known: from the logits' last axis, or from the config."""
    logits = functions.get("logits")
    if logits and logits.outputs and logits.outputs[0].shape:
        return logits.outputs[0].shape[-1]
    return root.member("config").member("vocab_size").integer(1, 1 << 31)


def _training(node: _Node, functions: Mapping[str, FunctionEntry]) -> Mapping[str, Any]:
    settings = node.mapping()
    if not {"train_step", "apply"} & functions.keys():
        return settings
    node.member("lr").number()
    for beta in ("beta1", "beta2"):
        if not node.member(beta).number() < 1:
            node.member(beta).fail("must be less than 1")
    return settings


def _hash(name: str, node: _Node) -> str:
    if not all(_FILE_PART.fullmatch(part) for part in name.split("/")):
        raise UserError(f"{node.path}: {name!r} is not a plain file name", hint=_RECOMPILE)
    if not _SHA256.fullmatch(node.text()):
        node.fail("must be a SHA-256 of 64 hexadecimal digits")
    return node.text()


def _verify_files(folder: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"bundle {folder}: {name} is missing", hint=_RECOMPILE)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise UserError(
                f"bundle {folder}: {name} is not the file this bundle was built with "
                f"(sha256 {found[:12]}…, {MANIFEST} says {expected[:12]}…)",
                hint="restore the file, or run `tinygpt regen BUNDLE` to build from model.tir again",
            )
