"""The WebAssembly printer: every op of the loop level, wasm32 and wasm64, against the interpreter, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loop_programs import (
    DTYPES,
    POINTS,
    Case,
    addressed_case,
    constant_cases,
    control_cases,
    lane_cases,
    make,
    mixed_case,
    primitive_cases,
    random_case,
)
from tests.test_random_tiles import THOROUGH
from tests.wasm_kernels import WasmKernels, kernel_module
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index
from tinygpt.ir.interpret_loop import run_loop_kernel
from tinygpt.ir.loop import LoopBuilder
from tinygpt.ir.types import ScalarType, VectorType
from tinygpt.targets.wasm.profiles import PROFILES
from tinygpt.targets.wasm.wat import print_function

TESTED = ("wasm32-relaxed-v8", "wasm32-v8", "wasm64-relaxed-wasmtime", "wasm64-v8")


def check(cases: Sequence[Case], caps: Caps) -> None:
    kernels = WasmKernels([case.kernel for case in cases], caps)
    for case in cases:
        expected, found = case.buffers(), case.buffers()
        run_loop_kernel(case.kernel, expected, 0, POINTS, fused=caps.fma and not has_scalar_fma(case.kernel))
        kernels.run(case.kernel, found, 0, 1)
        kernels.run(case.kernel, found, 2, 2)
        kernels.run(case.kernel, found, 1, POINTS)
        for want, got in zip(expected, found, strict=True):
            assert want.tobytes() == got.tobytes(), f"{print_function(kernels.module, case.kernel.name)}\n{want}\n{got}"


def has_scalar_fma(kernel: Kernel) -> bool:
    """Whether a multiply-add of scalars is there, which relaxed SIMD does not fuse."""
    return any(op.name == "fma" and isinstance(op.result.type, ScalarType) for op in kernel.body.walk())


@pytest.mark.parametrize("profile", TESTED)
@pytest.mark.parametrize("width", [1, 4])
def test_every_op_computes_what_the_interpreter_computes(width: int, profile: str) -> None:
    cases = [*primitive_cases(width), *constant_cases(width), *(lane_cases(4) if width > 1 else control_cases())]
    check(cases, PROFILES[profile])


@pytest.mark.parametrize("profile", TESTED)
@THOROUGH
@given(seed=st.integers(0, 2**64 - 1))
def test_random_programs_compute_what_the_interpreter_computes(profile: str, seed: int) -> None:
    """The order of ops, addresses that share parts (computed where they are first needed or before a loop; what a branch
    or a skipped loop computes stays there), and values of every type. An example is a program of each kind."""
    check([random_case(seed), addressed_case(seed), mixed_case(seed)], PROFILES[profile])


@pytest.mark.parametrize("profile", TESTED)
def test_scalars_join_to_a_vector(profile: str) -> None:
    def joined(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        x = b.load(inputs[0], point * 4, 4)
        b.store(output, b.join([b.extract(x, lane) for lane in (2, 0, 3, 1)]), point * 4)

    cases = [make(f"join_{dtype}", [dtype], dtype, joined) for dtype in DTYPES]
    kernels = WasmKernels([case.kernel for case in cases], PROFILES[profile])
    for case in cases:
        given, found = case.buffers()
        kernels.run(case.kernel, [given, found], 0, POINTS)
        wanted = given[: 4 * POINTS].reshape(POINTS, 4)[:, [2, 0, 3, 1]]
        assert wanted.tobytes() == found[: 4 * POINTS].tobytes()


def test_shifts_may_differ_from_lane_to_lane() -> None:
    def shifted(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        amounts = b.primitive("add", [b.lanes(4), b.const(1, VectorType("i32", 4))])
        b.store(output, b.primitive("shl", [b.load(inputs[0], point * 4, 4), amounts]), point * 4)

    check([make("shifts", ["i32"], "i32", shifted)], PROFILES["wasm32-v8"])


@pytest.mark.parametrize(("op", "type"), [("exp", ScalarType("f32")), ("add", VectorType("f32", 8))])
def test_what_the_target_does_not_have_is_a_bug_of_the_compiler(op: str, type: ScalarType | VectorType) -> None:
    def body(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        x = b.load(inputs[0], point, getattr(type, "lanes", 1))
        b.store(output, b.primitive(op, [x] if op == "exp" else [x, x]), point)

    with pytest.raises(CompilerBug, match="exp|f32x8"):
        kernel_module([make("k", ["f32"], "f32", body).kernel], PROFILES["wasm32-v8"])
