"""A plan as a module: memory sized exactly, refused where it does not fit, functions shared, names that do not
collide."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import wasmtime

from tests import wasm_bundle
from tinygpt.compiler import device_for, lower, module_for
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.plan import Plan
from tinygpt.targets import targets
from tinygpt.targets.wasm import build_module, emit, target_record
from tinygpt.targets.wasm.assembler import PAGE, encode_module
from tinygpt.targets.wasm.profiles import PROFILES, profile


@pytest.mark.parametrize("name", PROFILES)
def test_memory_is_what_the_plan_needs(name: str) -> None:
    plan, caps = wasm_bundle.plan(), PROFILES[name]
    record = target_record(plan, caps, strict=False)
    (memory,) = build_module(plan, caps, "m").imports
    ends = [record["pools"][pool] + size for pool, size in plan.pools.items()]
    assert max(ends) <= record["scratch"] < max(ends) + 64
    assert all(at % 64 == 0 for at in (*record["pools"].values(), record["scratch"], record["scratch_stride"]))
    assert memory.type.minimum == -(-(record["scratch"] + record["scratch_stride"]) // PAGE)
    most = record["scratch"] + record["max_threads"] * record["scratch_stride"]
    assert memory.type.maximum == -(-most // PAGE)
    assert (record["max_threads"] > 1) == memory.type.shared == ("threads" in name)


def grown(size: int) -> Plan:
    plan = wasm_bundle.plan()
    return replace(plan, pools={**plan.pools, "work": size})


def test_a_model_that_does_not_fit_is_refused_with_the_target_that_fits() -> None:
    with pytest.raises(UserError, match=r"needs 5,\d+,\d+,\d+ bytes.*\n.*wasm64"):
        emit(grown(5 << 30), {"name": "m"}, profile("wasm32"), strict=False)
    assert emit(grown(5 << 30), {"name": "m"}, profile("wasm64"), strict=False)
    with pytest.raises(UserError, match="--target cpp"):
        emit(grown(17 << 30), {"name": "m"}, profile("wasm64"), strict=False)


def test_the_whole_32_bit_address_space_is_usable() -> None:
    """Addresses beyond 2 GiB are negative numbers to the instructions that make them."""
    plan = grown((4 << 30) - (1 << 20))
    module = build_module(plan, profile("wasm32"), "m")
    wasmtime.Module.validate(wasmtime.Engine(), encode_module(module))
    record = target_record(plan, profile("wasm32"), strict=False)
    assert record["scratch"] + record["max_threads"] * record["scratch_stride"] <= 4 << 30


@pytest.mark.parametrize("target", ["wasm32", "wasm64"])
def test_the_module_of_small_is_small(target: str, record_property: Callable[[str, object], None]) -> None:
    """Layers share kernels. How long the processor took to write the module is reported (the aim is 2 s)."""
    device, caps = device_for(target, {})
    done = lower(module_for("small"), device, caps)
    plan, manifest = done.plan, done.manifest  # which are made when they are asked for
    began = time.process_time()
    files = device.emit(plan, manifest, caps, False)
    seconds = time.process_time() - began
    record_property("seconds to emit small", round(seconds, 2))
    print(f"{target}: small is {len(files['model.wasm']):,} bytes, emitted in {seconds:.2f} s")
    assert len(files["model.wasm"]) <= 150_000


def test_kernels_share_what_they_outline() -> None:
    plan = wasm_bundle.plan()
    again = replace(plan.kernels["update"], name="update2")
    entry = plan.entries["train_step"]
    launches = (*entry.launches, replace(entry.launches[-1], kernel="update2"))
    twice = replace(
        plan,
        kernels={**plan.kernels, "update2": again},
        entries={**plan.entries, "train_step": replace(entry, launches=launches)},
    )
    names = [function.name for function in build_module(twice, profile("wasm32"), "m").functions]
    assert "update2" in names and [name for name in names if "shrink" in name] == ["update.shrink1"]


def test_kernels_that_no_entry_launches_are_left_out() -> None:
    plan = wasm_bundle.plan()
    only = replace(plan, entries={"logits": plan.entries["logits"]})
    names = {function.name for function in build_module(only, profile("wasm32"), "m").functions}
    assert names & set(plan.kernels) == {"gather"}


def test_an_entry_may_not_hide_an_export_of_the_module() -> None:
    plan = wasm_bundle.plan()
    with pytest.raises(CompilerBug, match="own exports"):
        build_module(replace(plan, entries={"serve": plan.entries["logits"]}), profile("wasm32"), "m")


def test_profiles_without_threads_have_no_atomics() -> None:
    module = build_module(wasm_bundle.plan(), profile("wasm32", threads=False), "m")
    assert not [i for function in module.functions for i in function.body if "atomic" in str(i[0])]


def test_targets_are_found_and_choose_profiles() -> None:
    target = targets()["wasm64"]
    options = {"engine": "wasmtime", "threads": "false", "other": "1"}
    assert target.choose(options).name == "wasm64-relaxed-wasmtime" and options == {"other": "1"}
    for wrong in ({"engine": "jsc"}, {"relaxed": "maybe"}):
        with pytest.raises(UserError, match="jsc|maybe"):
            target.choose(wrong)
    assert target.source is not None
    text = target.source(wasm_bundle.plan().kernels["update"], profile("wasm64"))
    assert "(func $update " in text and "(func $update.shrink1 " in text
