"""The assembler against others: the text form of a module, assembled by wasmtime, gives the same bytes; wabt finds every
module valid, and the names of its functions in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import wasmtime
from hypothesis import given
from hypothesis import strategies as st

from tests import wasm_bundle
from tests.loop_programs import Case, constant_cases, control_cases, lane_cases, matmul, primitive_cases, random_case
from tests.node import wabt
from tests.wasm_kernels import kernel_module
from tinygpt.ir.errors import CompilerBug
from tinygpt.targets.wasm.assembler import (
    Export, Function, ImportedMemory, MemoryType, Module, Variable, encode_body, encode_module, signed, unsigned,
)  # fmt: skip
from tinygpt.targets.wasm.emit import build_module
from tinygpt.targets.wasm.instructions import OPCODES
from tinygpt.targets.wasm.profiles import PROFILES
from tinygpt.targets.wasm.wat import print_function, print_module


def sections(module: bytes) -> Iterator[tuple[int, bytes]]:
    """The sections of a module, without custom ones (names)."""
    assert module[:8] == b"\0asm\1\0\0\0"
    at = 8
    while at < len(module):
        number, size, shift, at = module[at], 0, 0, at + 1
        while True:
            byte = module[at]
            size, shift, at = size | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                break
        if number:
            yield number, bytes(module[at : at + size])
        at += size


def agree(module: Module) -> None:
    ours = encode_module(module)
    wasmtime.Module.validate(wasmtime.Engine(), ours)
    theirs = wasmtime.wat2wasm(print_module(module))
    assert list(sections(ours)) == list(sections(bytes(theirs)))


def cases(width: int) -> list[Case]:
    return [*primitive_cases(width), *constant_cases(width), *(lane_cases(4) if width > 1 else control_cases())]


@pytest.mark.parametrize("profile", ["wasm32-relaxed-v8", "wasm64-v8"])
def test_kernels_assemble_as_elsewhere(profile: str) -> None:
    kernels = [case.kernel for case in (*cases(1), *cases(4), *(random_case(seed) for seed in range(10)))]
    agree(kernel_module([*kernels, matmul(4, 6, 2)], PROFILES[profile]))


@pytest.mark.parametrize("profile", PROFILES)
def test_bundles_assemble_as_elsewhere(profile: str) -> None:
    agree(build_module(wasm_bundle.plan(), PROFILES[profile], "bigram"))


@pytest.mark.parametrize("profile", PROFILES)
def test_another_toolkit_finds_modules_valid_and_their_names(profile: str, tmp_path: Path) -> None:
    kernels = [case.kernel for case in (*cases(1), *cases(4), *(random_case(seed) for seed in range(10)))]
    modules = {
        "kernels": kernel_module([*kernels, matmul(4, 2, 1)], PROFILES[profile]),
        "bundle": build_module(wasm_bundle.plan(), PROFILES[profile], "bigram"),
    }
    for name, module in modules.items():
        path = tmp_path / f"{name}.wasm"
        path.write_bytes(encode_module(module))
        wabt("wasm-validate", "--enable-all", path)
        shown = wabt("wasm-objdump", "--details", path)
        assert [f.name for f in module.functions if f"<{f.name}>" not in shown] == []


def test_several_memories_and_labels() -> None:
    """What no kernel needs yet: a private 32-bit memory beside a shared 64-bit one, and results of blocks."""
    copy = Function(
        "copy",
        (Variable("from", "i64"), Variable("to", "i32")),
        ("i32",),
        (),
        (
            ("local.get", 1), ("local.get", 0), ("v128.load", 1 << 33), ("v128.store", 16, 1),
            ("block", "i32"), ("i32.const", -3), ("local.get", 1), ("br_table", (0, 0), 0), ("end",),
        ),
    )  # fmt: skip
    memory = ImportedMemory("env", "big", MemoryType(1, 1 << 18, True, "i64"))
    agree(Module("two", (memory,), (MemoryType(2, None, False, "i32"),), (copy,), (Export("copy", 0),)))


def test_functions_have_their_names() -> None:
    module = build_module(wasm_bundle.plan(), PROFILES["wasm32-threads-relaxed-v8"], "bigram")
    content = encode_module(module)
    for name in (b"row_losses", b"update.shrink1", b"entry.train_step", b"barrier"):
        assert bytes([len(name)]) + name in content


def test_text_reads_as_the_kernel_it_came_from() -> None:
    module = kernel_module([matmul(4, 2, 1)], PROFILES["wasm32-relaxed-v8"])
    text = print_function(module, "k7")
    assert text.startswith(";; %9 matmul, %10 relu (lanes = 4, register_tile = (2, 1))\n(func $k7 ")
    loop = text[text.rindex("loop") : text.index("br_if 0")]
    assert [line.strip() for line in loop.splitlines()] == [
        "loop",
        "local.get $columns", "local.get $k", "i32.const 5", "i32.shl", "i32.add", "v128.load align=4", "local.set $b0",
        "local.get $a_rows", "local.get $k", "i32.const 2", "i32.shl", "i32.add", "local.tee $at.3",
        "v128.load32_splat", "local.set $v.2", "local.get $at.3", "v128.load32_splat offset=32", "local.set $v.3",
        "local.get $v.2", "local.get $b0", "local.get $sum0", "f32x4.relaxed_madd",
        "local.get $v.3", "local.get $b0", "local.get $sum1", "f32x4.relaxed_madd",
        "local.set $sum1", "local.set $sum0",
        "local.get $k", "i32.const 1", "i32.add", "local.tee $k", "i32.const 8", "i32.lt_s", "",
    ]  # fmt: skip


@given(st.integers(0, 2**64 - 1))
def test_unsigned_numbers(value: int) -> None:
    encoded = unsigned(value)
    assert sum((byte & 127) << 7 * n for n, byte in enumerate(encoded)) == value
    assert len(encoded) == max(1, -(-value.bit_length() // 7))


@given(st.integers(-(2**63), 2**63 - 1))
def test_signed_numbers(value: int) -> None:
    encoded = signed(value)
    bits = sum((byte & 127) << 7 * n for n, byte in enumerate(encoded))
    assert bits - ((encoded[-1] >> 6 & 1) << 7 * len(encoded)) == value
    assert len(encoded) == value.bit_length() // 7 + 1 if value >= 0 else (~value).bit_length() // 7 + 1


def test_unknown_instructions_are_bugs() -> None:
    with pytest.raises(CompilerBug, match=r"f32\.tan"):
        encode_body([("f32.tan",)])
    with pytest.raises(CompilerBug, match="15 bytes"):
        encode_body([("v128.const", bytes(15))])
    with pytest.raises(CompilerBug, match="not negative"):
        unsigned(-1)


def test_opcodes_are_distinct() -> None:
    assert len({opcode.code for opcode in OPCODES.values()}) == len(OPCODES)
