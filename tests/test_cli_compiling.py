"""compile, --dump and --from, --check each, regen, verify, selftest."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Module, Op, Region
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.lowering import pipeline
from tinygpt.lowering.passes import Pass

import tinygpt as tg
from tests.cli import CONFIG, SHAPE, CommandLine
from tinygpt import compiler, golden
from tinygpt.checking import StageChecker


@pytest.fixture
def tinygpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(tmp_path, capsys)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle `b` and the dumps `stages` of mini.json, for tests to copy from."""
    folder = tmp_path_factory.mktemp("compiled")
    tg.compile(CONFIG, batch=2, context=8, dump=folder / "stages", out=folder / "b")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_dump_lowers_to_the_same_bytes(tinygpt: CommandLine, compiled: Path) -> None:
    dumps = sorted((compiled / "stages").iterdir())
    assert dumps[0].name == "00-captured.tir" and dumps[-1].name.endswith("-loops.tir")
    wanted = contents(compiled / "b")
    for dump in dumps:
        report = tinygpt.works("compile", "mini.json", "--out", "again", "--from", dump, *SHAPE)
        assert contents(tinygpt.folder / "again") == wanted, dump.name
    assert "kernels; a step is" in report and "without reuse" in report


def test_a_resumed_compilation_can_be_dumped_and_resumed(tinygpt: CommandLine, compiled: Path) -> None:
    resumed = ("--from", compiled / "stages/08-rematerialize.tir", "--dump", "later")
    tinygpt.works("compile", "mini.json", "--plan-only", *SHAPE, *resumed)
    first, later = contents(compiled / "stages"), contents(tinygpt.folder / "later")
    assert later == {name: first[name] for name in first if name == "00-captured.tir" or name >= "08"}


def test_from_refuses_what_is_no_dump_of_this_model(tinygpt: CommandLine, compiled: Path) -> None:
    shutil.copytree(compiled / "stages", "stages")
    plan = ("compile", "mini.json", "--plan-only", *SHAPE, "--from")
    assert "not the name of a dump" in tinygpt.refused(*plan, "mini.json")
    assert "cannot be read" in tinygpt.refused(*plan, "nowhere/00-captured.tir")
    assert "for batch 2, not 3" in tinygpt.refused(*plan, "stages/10-fuse.tir", "--batch", "3")
    assert "another config" in tinygpt.refused(*plan, "stages/10-fuse.tir", "--set", "n_layers=2")
    text = (tinygpt.folder / "stages/10-fuse.tir").read_text()
    (tinygpt.folder / "stages/10-fuse.tir").write_text(text[: len(text) // 2])
    assert "10-fuse.tir" in tinygpt.refused(*plan, "stages/10-fuse.tir")
    (tinygpt.folder / "stages/00-captured.tir").unlink()
    assert "00-captured.tir" in tinygpt.refused(*plan, "stages/12-tile.tir")


def test_settings_are_fields_of_the_config_or_options_of_the_target(tinygpt: CommandLine) -> None:
    changed = ("--set", "n_layers=2", "--set", "d_model=32", "--set", "profile=baseline")
    tinygpt.works("compile", "mini.json", "--out", "b", *SHAPE, *changed)
    manifest = tg.load(tinygpt.folder / "b").manifest
    config = dict(manifest.config or {})
    assert (config["n_layers"], config["d_model"], config["d_mlp"]) == (2, 32, 128)
    assert manifest.target["profile"] == "baseline" and manifest.target["options"] == {"profile": "baseline"}
    assert "dtype=f16 is an option of the target wgsl" in tinygpt.refused("compile", "mini.json", "--plan-only", "--set", "dtype=f16")
    assert "options of wgsl: profile, device, dtype" in tinygpt.refused("compile", "mini.json", "--plan-only", "--target", "wgsl", "--set", "threads=2")
    assert "nearest field is 'n_layers'" in tinygpt.refused("compile", "mini.json", "--plan-only", "--set", "n_layer=3")
    assert "no profile" in tinygpt.refused("compile", "mini.json", "--plan-only", "--set", "profile=fast")
    assert "n_heads" in tinygpt.refused("compile", "mini.json", "--plan-only", "--set", "n_heads=5")
    with pytest.raises(SystemExit, match="2"):
        tinygpt("compile", "mini.json", "--plan-only", "--set", "n_layers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "smal", "--plan-only"), 'the nearest preset is "small"'),
        (("compile", "mini.json"), "where should the bundle go"),
        (("compile", "mini.json", "--plan-only", "--context", "99"), "context 99 is outside 1..16"),
        (("compile", "mini.json", "--plan-only", "--batch", "99999"), "batch 99999 is outside 1..65536"),
        (("compile", "mini.json", "--plan-only", "--set", "d_model=99996"), "parameters, at most 2,147,483,647"),
        (("compile", "mini.json", "--plan-only", "--target", "cuda"), "no target called 'cuda'"),
        (("compile", "small", "--plan-only", "--check", "each"), "too much for the interpreter"),
        (("compile", "mini.json", "--out", ".", *SHAPE), "other things in it"),
        (
            ("compile", "mini.json", "--plan-only", "--dump", "mini.json/x", *SHAPE),
            "--dump mini.json/x: cannot be written",
        ),
        (("regen", "nowhere"), "cannot be read"),
        (("verify", "nowhere"), "does not exist"),
        (("selftest", "nowhere"), "does not exist"),
        (("profile", "tiny"), "not a bundle"),
    ],
)
def test_bad_input_is_a_paragraph_and_status_2(tinygpt: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    assert message in tinygpt.refused(*arguments)


def test_a_broken_config_names_its_file(tinygpt: CommandLine) -> None:
    Path("bad.json").write_text('{"n_layer": 3}')
    error = tinygpt.refused("compile", "bad.json", "--plan-only")
    assert "bad.json" in error and "n_layers" in error


@pytest.mark.parametrize("target", ["cpp", "wgsl"])
def test_check_each_accepts_every_pass(tinygpt: CommandLine, target: str) -> None:
    report = tinygpt.works("compile", "mini.json", "--plan-only", "--check", "each", "--target", target, *SHAPE, "--set", "dropout=0.2")
    assert "stages compute the same" in report


@dataclass(frozen=True)
class Halve(Pass):
    """A pass with a mistake in it: what was added is multiplied."""

    name = "halve"

    def run(self, module: Module, caps: Caps) -> Module:
        return module.map_functions(self.spoiled)

    def spoiled(self, function: Function) -> Function:
        ops: list[Op] = list(function.body.ops)
        at = max((i for i, op in enumerate(ops) if op.name == "add"), default=None)
        if at is not None:
            ops[at] = replace(ops[at], name="mul")
        return replace(function, body=Region(function.params, tuple(ops), function.body.yields))


@pytest.mark.parametrize("before", ["simplify", "simplify,differentiate", "simplify,differentiate,optimize"])
def test_check_each_names_the_first_pass_that_changes_a_result(tmp_path: Path, before: str) -> None:
    module = compiler.module_for(CONFIG, 2, 8)
    passes = (*pipeline.parse_pipeline(before), Halve(), *pipeline.parse_pipeline("simplify"))
    with pytest.raises(CompilerBug, match=rf"(?s)off by.*{len(passes) - 1:02}-halve.tir.*after pass halve"):
        checker = StageChecker(module, tmp_path)
        pipeline.run(pipeline.captured(module), Caps("test"), passes, dump=tmp_path, check=checker)
    assert (tmp_path / f"{len(passes) - 1:02}-halve.tir").exists()


def test_a_compiler_bug_is_status_1(tinygpt: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise CompilerBug("the plan has a hole", after="fuse")

    monkeypatch.setattr(compiler, "lower", broken)
    done = tinygpt("compile", "mini.json", "--plan-only", *SHAPE)
    assert done.status == 1 and "the plan has a hole" in done.err and "after pass fuse" in done.err


def test_regen_lists_what_changed_and_writes_in_place(tinygpt: CommandLine, compiled: Path) -> None:
    shutil.copytree(compiled / "b", "b")
    before = contents(tinygpt.folder / "b")
    report = tinygpt.works("regen", "b", "--dry-run")
    assert "0 changed, 0 new, 0 removed" in report and "nothing written" in report
    manifest = json.loads(before["manifest.json"])
    changed, gone = list(manifest["kernels"])[:2]
    manifest["kernels"][changed]["hash"] = "0" * 16
    manifest["kernels"]["k99_old"] = {"hash": "f" * 16, "of": "a kernel of long ago"}
    manifest["files"]["kernels/k99_old.cpp"] = "0" * 64
    (tinygpt.folder / "b/kernels/k99_old.cpp").write_text("// old\n")
    (tinygpt.folder / "b/manifest.json").write_text(json.dumps(manifest))
    (tinygpt.folder / "b/notes.txt").write_text("mine")
    (tinygpt.folder / "b" / f"kernels/{gone}.cpp").write_text("edited")
    assert "regen" in tinygpt.refused("verify", "b")
    report = tinygpt.works("regen", "b")
    assert f"changed   {changed}\n" in report and "removed   k99_old\n" in report and "wrote b" in report
    assert contents(tinygpt.folder / "b") == before | {"notes.txt": b"mine"}


def test_regen_knows_a_renumbered_kernel(tinygpt: CommandLine, compiled: Path) -> None:
    shutil.copytree(compiled / "b", "b")
    path = tinygpt.folder / "b/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["kernels"] = {f"k{i}{name[1:]}": record for i, (name, record) in enumerate(manifest["kernels"].items(), 7)}
    path.write_text(json.dumps(manifest))
    assert "0 changed, 0 new, 0 removed" in tinygpt.works("regen", "b", "--dry-run")


def test_verify_and_selftest_trust_a_whole_bundle_only(tinygpt: CommandLine, compiled: Path) -> None:
    shutil.copytree(compiled / "b", "b")
    assert "match their hashes" in tinygpt.works("verify", "b")
    report = tinygpt.works("selftest", "b", "--threads", "1")
    assert "train_step: grad_norm" in report and report.endswith("b: passed\n")
    (tinygpt.folder / "b/model.cpp").write_text("// edited\n")
    assert "model.cpp" in tinygpt.refused("selftest", "b")


def test_a_failing_selftest_is_status_1(tinygpt: CommandLine, compiled: Path) -> None:
    shutil.copytree(compiled / "b", "b")
    manifest = json.loads((tinygpt.folder / "b/manifest.json").read_text())
    manifest["golden"]["loss"]["row_losses"] = 0.0
    (tinygpt.folder / "b/manifest.json").write_text(json.dumps(manifest))
    done = tinygpt("selftest", "b", "--threads", "1")
    assert done.status == 1 and "FAIL loss: row_losses" in done.out


def test_a_model_too_large_for_golden_weights_is_tested_from_its_initial_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "LARGEST_PARAMETERS", 1000)
    bundle = tg.compile(CONFIG, batch=2, context=8)
    size = (bundle.folder / "golden.safetensors").stat().st_size
    assert size < 4000
    report = bundle.selftest(threads=1)
    assert report.passed and {(c.function, c.name) for c in report.checks} == {
        ("loss", "loss"), ("train_step", "loss"), ("windows", "offsets"),
    }  # fmt: skip


def test_a_captured_module_compiles_trains_and_generates() -> None:
    import torch

    from tinygpt.model import TinyGPT

    torch.manual_seed(0)
    model = TinyGPT(tg.ModelConfig(**CONFIG)).eval()
    tokens = torch.zeros((2, 8), dtype=torch.int64)
    bundle = tg.compile(tg.capture(model, (tokens, tokens)))
    assert bundle.manifest.config is None and bundle.selftest(threads=1).passed
    with bundle.session(threads=1) as session:
        session.load_parameters({name: p.detach().numpy() for name, p in model.named_parameters()})
        with torch.no_grad():
            expected = model(torch.arange(8)[None])[0].numpy()
        assert np.abs(session.logits(np.arange(8)[None]) - expected).max() < 1e-5
        assert len(session.generate(b"a", 3)) == 3
    with pytest.raises(UserError, match="was captured for batch 2 and context 8"):
        tg.compile(tg.capture(model, (tokens, tokens)), batch=4)


def test_a_full_disk_leaves_a_bundle_that_does_not_load(
    tinygpt: CommandLine, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(compiled / "b", "b")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "model.tir":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        message = tinygpt.refused("compile", "mini.json", "--out", "b", *SHAPE, "--set", "n_layers=2")
    assert "No space left on device" in message
    assert "not the file this bundle was built with" in tinygpt.refused("verify", "b")
    tinygpt.works("regen", "b")
    tinygpt.works("verify", "b")
