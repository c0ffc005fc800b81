"""The C++ printer: every op of the loop level at every width against the interpreter, to the bit; and how it reads."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cpp_toolchain import COMPILERS, CompiledKernels, compiler, header
from tests.loop_programs import (
    POINTS, Case, constant_cases, control_cases, lane_cases, make, matmul, primitive_case, primitive_cases, random_case,
)  # fmt: skip
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index
from tinygpt.ir.interpret_loop import run_loop_kernel
from tinygpt.ir.loop import LoopBuilder
from tinygpt.targets.cpp.build import compile_flags
from tinygpt.targets.cpp.names import Names, identifier
from tinygpt.targets.cpp.printer import print_kernel
from tinygpt.targets.cpp.profiles import PROFILES, native, processor

WIDTHS = (1, 4, 8, 16)
CAPS = PROFILES["native"]


def check(cases: Sequence[Case], compiled: CompiledKernels) -> None:
    for case in cases:
        expected, found = case.buffers(), case.buffers()
        run_loop_kernel(case.kernel, expected, 0, POINTS)
        compiled.run(case.kernel, found, 0, 1)
        compiled.run(case.kernel, found, 1, POINTS)
        for want, got in zip(expected, found, strict=True):
            assert want.tobytes() == got.tobytes(), f"{print_kernel(case.kernel, CAPS)}\nwant {want}\ngot  {got}"


@pytest.mark.parametrize("family", COMPILERS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_op_computes_what_the_interpreter_computes(width: int, family: str, tmp_path: Path) -> None:
    cases = [*primitive_cases(width), *constant_cases(width), *(lane_cases(width) if width > 1 else control_cases())]
    check(cases, CompiledKernels([c.kernel for c in cases], CAPS, tmp_path, compiler(family)))


def test_the_portable_baseline_computes_the_same(tmp_path: Path) -> None:
    """Its compiler splits wide vectors into narrow ones."""
    cases = [*primitive_cases(4), *lane_cases(4), *lane_cases(16)]
    check(cases, CompiledKernels([c.kernel for c in cases], PROFILES["baseline"], tmp_path, compiler("g++")))


def test_random_programs_keep_the_order_of_their_ops(tmp_path: Path) -> None:
    cases = [random_case(seed) for seed in range(80)]
    check(
        cases, CompiledKernels([c.kernel for c in cases], CAPS, tmp_path, compiler("g++"), more=("-O1", "-Wno-unused"))
    )


def test_multiply_add_is_fused_where_the_profile_says_so_and_never_in_strict(tmp_path: Path) -> None:
    case = primitive_case("fma", ("f32", "f32", "f32"), "f32", 4)
    if not CAPS.fma:
        pytest.skip("this processor has no fused multiply-add")
    for strict in (False, True):
        compiled = CompiledKernels([case.kernel], CAPS, tmp_path / str(strict), compiler("g++"), strict=strict)
        expected, found = case.buffers(), case.buffers()
        run_loop_kernel(case.kernel, expected, 0, POINTS, fused=not strict)
        compiled.run(case.kernel, found, 0, POINTS)
        assert expected[-1].tobytes() == found[-1].tobytes()


EXPECTED_MATMUL = """\
// k7
//   of      %9 matmul, %10 relu
//   grid    g0 = 4, g1 = 2
//   order   lanes = 4
//   cost    register_tile = (2, 1)
//   dims    i = 2 of 8 from g0*2, j = 4 of 8 from g1*4
//   profile native, 4 lanes
void k7(const f32* __restrict h_0_a_weight, const f32* __restrict double_, f32* __restrict out, \
[[maybe_unused]] f32* __restrict scratch, long lo, long hi) {
  for (long tile1 = lo; tile1 < hi; ++tile1) {
    const f32* const a_rows = h_0_a_weight + 16 * (tile1 / 2);
    const f32* const columns = double_ + 4 * (tile1 % 2);
    f32x4 sum0 = splat<f32x4>(0.0f);
    f32x4 sum1 = splat<f32x4>(0.0f);
    for (long k1 = 0; k1 < 8; ++k1) {
      const f32x4 b0 = load<f32x4>(columns + 8 * k1);
      sum0 += splat<f32x4>(a_rows[k1]) * b0;
      sum1 += splat<f32x4>(a_rows[k1 + 8]) * b0;
    }
    store<f32x4>(out + 4 * (tile1 % 2) + 16 * (tile1 / 2), maximum(sum0 * 0.5f, splat<f32x4>(0.0f)));
    store<f32x4>(out + 4 * (tile1 % 2) + 16 * (tile1 / 2) + 8, maximum(sum1 * 0.5f, splat<f32x4>(0.0f)));
  }
}
"""


def test_a_kernel_reads_like_a_loop_nest_someone_wrote() -> None:
    assert print_kernel(matmul(4, 2, 1), Caps("native", lanes=4)) == EXPECTED_MATMUL


@pytest.mark.parametrize("family", COMPILERS)
def test_accumulators_stay_in_registers_and_contract_to_fused_multiply_adds(family: str, tmp_path: Path) -> None:
    if CAPS.lanes != 16:
        pytest.skip("the assembly below is that of AVX-512")
    (tmp_path / "vector.h").write_text(header())
    (tmp_path / "k.cpp").write_text('#include "vector.h"\n' + print_kernel(matmul(16, *CAPS.register_tile), CAPS))
    command = [compiler(family), *compile_flags(CAPS, strict=False), "-S", str(tmp_path / "k.cpp"), "-o", "-"]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in assembly.splitlines() if line.startswith("\t")]
    assert sum(words[0].startswith("vfmadd") for words in lines) >= 24
    assert not [
        words for words in lines if words[0].startswith("vmov") and "zmm" in words[-1] and "(%rsp)" in words[-1]
    ], "spills"


def test_a_vector_square_root_is_one_instruction(tmp_path: Path) -> None:
    if CAPS.lanes == 4:
        pytest.skip("the assembly below is that of AVX")
    (tmp_path / "vector.h").write_text(header())
    (tmp_path / "k.cpp").write_text(
        '#include "vector.h"\n' + print_kernel(primitive_case("sqrt", ("f32",), "f32", CAPS.lanes).kernel, CAPS)
    )
    command = [compiler("g++"), *compile_flags(CAPS, strict=True), "-S", str(tmp_path / "k.cpp"), "-o", "-"]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "vsqrtps" in assembly and "vsqrtss" not in assembly


def test_names_collide_with_nothing() -> None:
    assert [identifier(x) for x in ("blocks.0.w", "double", "f32x16", "0", "", "__x__", "load", "é")] == [
        "blocks_0_w", "double_", "f32x16_", "v0", "v", "x", "load_", "v",
    ]  # fmt: skip
    names = Names()
    assert [names.new("for") for _ in range(3)] == ["for_", "for_1", "for_2"]
    assert [names.new(x) for x in ("x", "x_1", "x", "x")] == ["x", "x_1", "x_2", "x_3"]


@pytest.mark.parametrize("op", ["barrier", "exp"])
def test_an_op_the_target_does_not_have_is_a_bug_of_the_compiler(op: str) -> None:
    def body(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        if op == "barrier":
            b.emit("barrier", [], None)
        else:
            b.store(output, b.primitive(op, [b.load(inputs[0], point)]), point)

    with pytest.raises(CompilerBug, match=op):
        print_kernel(make("k", ["f32"], "f32", body).kernel, CAPS)


def test_profiles_follow_the_processor() -> None:
    assert (native("x86_64", {"avx2", "fma", "avx512f"}).lanes, native("x86_64", {"avx2", "fma"}).lanes) == (16, 8)
    assert (native("x86_64", {"sse2"}).lanes, native("x86_64", {"sse2"}).fma) == (4, False)
    assert (native("aarch64", set()).lanes, native("aarch64", set()).registers) == (4, 32)
    assert native("x86_64", {"avx2", "fma", "avx512f"}, "GenuineIntel").inner_block and not native("x86_64", {"avx2", "fma", "avx512f"}).inner_block


def test_a_processor_is_read_from_what_the_kernel_lists(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fma avx2\n\nprocessor\t: 1\nvendor_id\t: Other\nflags\t\t: fma\n")
    assert processor(listing) == ({"fma", "avx2"}, "GenuineIntel")
    assert processor(tmp_path / "none") == (set(), "")
