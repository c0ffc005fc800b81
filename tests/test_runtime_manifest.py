"""A manifest is believed only when everything in it holds."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_engine import document, manifest, write_bundle
from tinygpt.runtime import manifest as manifests
from tinygpt.runtime.errors import UserError


def test_a_valid_manifest_is_read_as_it_is() -> None:
    read = manifest(batch=3, context=5)
    assert (read.batch, read.context, read.vocab_size, read.target_name) == (3, 5, 256, "fake")
    weight = read.parameters[0]
    assert (weight.name, weight.shape, weight.role, weight.decay) == ("table.weight", (256, 256), "param", True)
    assert weight.nbytes == 256 * 256 * 4 and weight.end <= read.pools["state"]
    assert [slot.name for slot in read.functions["train_step"].inputs] == ["tokens", "targets", "lr", "bias1", "bias2"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["format"], "zip", "format"),
        (["version"], 2, "version 2"),
        (["version"], True, "version"),
        (["batch"], 0, "batch"),
        (["batch"], 4.0, "batch"),
        (["strict"], 1, "strict"),
        (["pools", "state"], -1, "pools.state"),
        (["pools", "state"], 1 << 60, "pools.state"),
        (["parameters", 0, "name"], "../../etc/passwd", "parameters[0].name"),
        (["parameters", 0, "shape"], [1 << 39, 1 << 39, 1 << 39], "parameters[0].offset"),
        (["parameters", 0, "shape", 0], -256, "parameters[0].shape[0]"),
        (["parameters", 0, "shape", 0], 0, "parameters[0].shape[0]"),
        (["parameters", 0, "shape"], [1] * 9, "parameters[0].shape"),
        (["parameters", 0, "dtype"], "f8", "parameters[0].dtype"),
        (["parameters", 0, "dtype"], ["f32"], "parameters[0].dtype"),
        (["parameters", 0, "pool"], "heap", "parameters[0].pool"),
        (["parameters", 0, "pool"], {}, "parameters[0].pool"),
        (["parameters", 0, "offset"], 2, "parameters[0].offset"),
        (["parameters", 0, "offset"], -4, "parameters[0].offset"),
        (["parameters", 0, "offset"], 1 << 62, "parameters[0].offset"),
        (["parameters", 0, "role"], "buffer", "parameters[0].role"),
        (["parameters", 1, "offset"], 4, "'table.weight' and 'position.bias' overlap"),
        (["parameters", 1, "name"], "table.weight", "'table.weight' occurs twice"),
        (["functions", "loss", "inputs", 0, "pool"], "state", "overlap"),
        (["functions", "loss", "inputs", 1, "offset"], 0, "'tokens' and 'targets' overlap"),
        (["functions", "loss", "inputs", 1, "name"], "tokens", "'tokens' occurs twice"),
        (["functions", "loss", "outputs"], None, "functions.loss.outputs"),
        (["functions", "lo ss"], {}, "lo ss"),
        (["training", "lr"], "fast", "training.lr"),
        (["training", "beta1"], 1.0, "training.beta1"),
        (["target", "name"], "", "target.name"),
        (["files"], {"../model.cpp": "0" * 64}, "../model.cpp"),
        (["files"], {"/etc/passwd": "0" * 64}, "/etc/passwd"),
        (["files"], {"model.cpp": "0" * 63}, "files.model.cpp"),
        (["golden"], {"loss": {"loss": -1}}, "golden.loss.loss"),
        (["config"], [], "config"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused_by_name(path: list[str | int], value: Any, named: str) -> None:
    text = document()
    node: Any = text
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    with pytest.raises(UserError, match=re.escape(named)):
        manifests.parse(json.dumps(text))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', "[" * 100_000, "\xff"]
)
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        manifests.parse(text.encode("latin-1"))


def test_a_vocabulary_must_be_known_because_tokens_become_addresses() -> None:
    text = document()
    del text["functions"]["logits"], text["config"]["vocab_size"]
    with pytest.raises(UserError, match="vocab_size"):
        manifests.parse(json.dumps(text))


def _paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(below for key, child in children for below in _paths(child, (*path, key)))]


_DOCUMENT = document()
_HOSTILE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-(1 << 63), 1 << 32, 1 << 63, 1 << 64, 1 << 200]),
    st.floats(), st.text(max_size=5), st.just([]), st.just({}), st.lists(st.integers(), max_size=3),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(path=st.sampled_from(_paths(_DOCUMENT)[1:]), value=_HOSTILE, delete=st.booleans())
def test_any_hostile_value_is_refused_or_harmless(path: tuple[Any, ...], value: Any, delete: bool) -> None:
    text = copy.deepcopy(_DOCUMENT)
    node: Any = text
    for step in path[:-1]:
        node = node[step]
    if delete:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    try:
        read = manifests.parse(json.dumps(text))
    except UserError:
        return
    for slot in (*read.parameters, *(slot for f in read.functions.values() for slot in (*f.inputs, *f.outputs))):
        assert 0 <= slot.offset <= slot.end <= read.pools[slot.pool]


def test_a_changed_or_missing_file_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", {"host/page.html": b"<p>"})
    read = manifests.load(folder)
    assert read.file(folder, "host/page.html").read_bytes() == b"<p>"
    with pytest.raises(UserError, match="lists no file 'other'"):
        read.file(folder, "other")
    (folder / "model.src").write_bytes(b"other kernels\n")
    with pytest.raises(UserError, match=r"model\.src is not the file"):
        manifests.load(folder)
    (folder / "model.src").unlink()
    with pytest.raises(UserError, match=r"model\.src is missing"):
        manifests.load(folder)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder, problem in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "has no manifest"),
    ):
        with pytest.raises(UserError, match=problem) as refusal:
            manifests.load(folder)
        assert "hint:" in str(refusal.value)
