"""ir, passes, presets, devices, help: what the command line prints; and `m` of `tinygpt repl`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tinygpt.ir.core import Kernel, Module
from tinygpt.ir.errors import UserError
from tinygpt.ir.text import parse_kernel, parse_module, print_kernel, print_module
from tinygpt.lowering.pipeline import PASSES

import tinygpt as tg
from tests.cli import CONFIG, SHAPE, CommandLine
from tinygpt.cli import main
from tinygpt.commands import Command, commands
from tinygpt.inspection import Inspector, inspect, listing
from tinygpt.presets import PRESETS


@pytest.fixture
def tinygpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(tmp_path, capsys)


@pytest.fixture(scope="module")
def m() -> Inspector:
    return inspect(CONFIG, batch=2, context=8)


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.name)
def test_every_command_has_help_with_examples(capsys: pytest.CaptureFixture[str], command: Command) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command.name, "--help"])
    text = capsys.readouterr().out
    assert f"  tinygpt {command.name}" in text.partition("examples:\n")[2]


def test_the_version_and_the_module_entry() -> None:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "tinygpt", "--version"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == f"tinygpt {tg.__version__}\n"


def test_a_wrong_argument_is_status_2(tinygpt: CommandLine) -> None:
    for arguments in (("frobnicate",), ("train", "tiny", "--steps", "-1"), ("compile", "tiny", "--batch", "0"), ()):
        with pytest.raises(SystemExit, match="2"):
            tinygpt(*arguments)


def test_presets_passes_and_devices_list_what_there_is(tinygpt: CommandLine) -> None:
    presets = tinygpt.works("presets")
    for preset in PRESETS.values():
        assert preset.name in presets and f"{preset.config.parameter_count:,}" in presets
    passes = tinygpt.works("passes")
    assert all(f"  {name} " in passes for name in PASSES)
    devices = tinygpt.works("devices")
    assert "target     cpp" in devices and "compiler" in devices


def test_ir_prints_any_stage_and_its_text_parses(m: Inspector) -> None:
    assert listing(m) == print_module(m.after("captured"))
    for name in ("simplify", "simplify.2", "10", "fuse", "10-fuse.tir"):
        assert listing(m, after=name) == print_module(parse_module(listing(m, after=name)))
    assert listing(m, level="graph") == listing(m, after="fuse")
    assert listing(m, level="loop") == listing(m, after="loops")
    tile = listing(m, level="tile", function="apply")
    launched = {launch.kernel for launch in m.compilation.plan.entries["apply"].launches}
    assert tile.startswith("fn apply(") and tile.count("\nkernel ") == len(launched)
    assert "fn loss" in listing(m, function="loss") and "fn logits" not in listing(m, function="loss")


def test_the_plan_lists_pools_lives_launches_and_barriers(m: Inspector) -> None:
    text = listing(m, level="plan", function="train_step")
    launches = m.compilation.plan.entries["train_step"].launches
    assert f"train_step: {len(launches)} launches, {sum(x.barrier for x in launches)} barriers" in text
    assert text.count("---- barrier") == sum(x.barrier for x in launches)
    assert "live at the peak" in text and "without reuse" in text and " live 0.." in text and "fn loss" not in text
    assert "blocks.0.ln1.weight.m" in listing(m, level="plan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": "fuze"}, "nearest is 'fuse'"),
        ({"function": "los"}, "nearest is 'loss'"),
        ({"level": "tile", "after": "fuse"}, "at graph level, not tile"),
        ({"level": "plan", "after": "fuse"}, "exclude each other"),
        ({"level": "wat"}, "no level 'wat'"),
    ],
)
def test_ir_refuses_what_there_is_not(m: Inspector, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        listing(m, **arguments)


def test_the_ir_command(tinygpt: CommandLine) -> None:
    text = tinygpt.works("ir", "mini.json", *SHAPE, "--function", "loss", "--after", "fuse")
    assert text.startswith("fn loss(") and " = group(" in text


def test_m_shows_stages_and_kernels_at_every_level(m: Inspector) -> None:
    assert isinstance(m.after("fuse"), Module) and "train_step" in m.after("fuse").functions
    assert (
        list(m.stages)[0] == "captured" and "simplify.3" in m.stages and repr(m.stages).count("\n") == len(m.stages) - 1
    )
    name = next(name for name in m.kernels if name.endswith("_attention"))
    kernel = m.kernels[name]
    assert m.kernels[name.split("_")[0]] is kernel and kernel.of == "attention"
    assert isinstance(kernel.tile, Kernel) and kernel.tile.level == "tile" and kernel.loop.level == "loop"
    assert print_kernel(parse_kernel(print_kernel(kernel.tile))) == print_kernel(kernel.tile)
    assert f"void {name}(" in kernel.source and repr(kernel.source) == str(kernel.source)
    assert "order  tile" in repr(kernel.schedule) and kernel.schedule.order["lanes"] == 16
    assert "train_step[" in m.kernels["k1"].launches or "loss[" in m.kernels["k1"].launches
    assert name in repr(m.kernels) and name in repr(kernel) and "kernels" in repr(m) and m.config["n_layers"] == 1
    assert "train_step: " in repr(m.plan)


def test_kernels_side_by_side_say_what_they_are_made_of() -> None:
    m = inspect("tiny", "wgsl", options={"profile": "webgpu-default"})
    views = [m.kernels[name] for name in m.compilation.plan.kernels if name.startswith("a")]
    several = next(view for view in views if len(view.loop.cost["sides"]) > 1)
    with pytest.raises(UserError, match=f"is several kernels side by side: {', '.join(several.loop.cost['sides'])}"):
        several.tile  # noqa: B018 - an expression for its error
    one = next(view for view in views if len(view.loop.cost["sides"]) == 1)
    assert one.tile.name == one.loop.cost["sides"][0]
    assert all(str(view) and str(view.source) and str(view.schedule) for view in (one, several))


def test_tab_completes_stages_and_kernels(m: Inspector) -> None:
    completer = pytest.importorskip("IPython.core.completer")
    found = completer.IPCompleter(namespace={"m": m}, use_jedi=False)
    found.shell = None
    assert "fuse" in m.stages._ipython_key_completions_() and "k0_embedding" in m.kernels._ipython_key_completions_()
    assert ".kernels" in " ".join(found.attr_matches("m.ker")) or "m.kernels" in found.attr_matches("m.ker")


def test_unknown_kernels_and_ambiguous_beginnings_are_refused(m: Inspector) -> None:
    with pytest.raises(UserError, match="is no kernel; the nearest is"):
        m.kernels["q7"]
    with pytest.raises(UserError, match="could be k"):
        m.kernels["k"]


def test_the_prompt_prints_ir_as_text(tmp_path: Path) -> None:
    pytest.importorskip("IPython")
    (tmp_path / "mini.json").write_text('{"n_layers": 1, "d_model": 16, "n_heads": 2, "context_length": 8}')
    root = Path(__file__).resolve().parent.parent
    typed = 'm\nm.after("captured").functions["loss"]\nm.kernels["k1"].tile\nconfig["d_model"]\nexit\n'
    done = subprocess.run(
        [sys.executable, "-m", "tinygpt", "repl", str(tmp_path / "mini.json"), "--batch", "2"],
        cwd=root, input=typed, capture_output=True, text=True, timeout=100, check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(root), "NO_COLOR": "1"},
    )  # fmt: skip
    assert "look at: .stages" in done.stdout and "fn loss(%tokens: i32[2, 8]" in done.stdout
    assert "kernel k1_" in done.stdout and ": 16" in done.stdout and "Traceback" not in done.stdout + done.stderr
