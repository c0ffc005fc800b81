"""The proof that accesses lie inside their memory (ir/bounds.py): what it shows of kernels, and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.lowered import op_module, tiled
from tinygpt.ir.bounds import unproved_accesses
from tinygpt.ir.core import Kernel
from tinygpt.ir.registry import Example
from tinygpt.ir.types import TensorType
from tinygpt.lowering.gpu import lower
from tinygpt.lowering.simplify import Simplify
from tinygpt.targets.wgsl.profiles import DEFAULT


def loops(name: str, *types: TensorType, **attrs: object) -> Kernel:
    """The loop kernel of an op on the gpu strategy."""
    (kernel,) = tiled(Simplify().run(op_module(name, Example(types, attrs)), DEFAULT), DEFAULT).kernels.values()
    return lower(kernel, DEFAULT)


def f32(*shape: int) -> TensorType:
    return TensorType("f32", shape)


@pytest.mark.parametrize(
    "kernel",
    [
        lambda: loops("matmul", f32(130, 70), f32(70, 65)),
        lambda: loops("matmul", f32(96, 1024), f32(1024, 384), parts=8),
        lambda: loops("attention", *[f32(1, 2, 33, 24)] * 3, causal=True, scale=0.2),
        lambda: loops("sum_columns", f32(300, 130)),
        lambda: loops("cross_entropy", f32(3, 9001), TensorType("i32", (3,))),
        lambda: loops("segment_sum", f32(70, 33), TensorType("i32", (70,)), TensorType("i32", (42,)), first=0, rows=41),
        lambda: loops("stable_ranks", TensorType("i32", (9001,))),
    ],
    ids=["odd product", "product in parts", "odd attention", "column sums", "long rows", "rows between numbers from memory", "counts"],
)
def test_every_access_of_a_kernel_is_proved_and_none_of_one_over_less_memory(kernel: Callable[[], Kernel]) -> None:
    proved = kernel()
    assert unproved_accesses(proved) == []
    for number, size in enumerate(proved.cost["extents"]):
        extents = list(proved.cost["extents"])
        extents[number] = size - 1
        smaller = replace(proved, cost={**proved.cost, "extents": tuple(extents)})
        assert unproved_accesses(smaller), f"buffer {number} is one element too short and nothing is seen"


def test_more_threads_than_a_kernel_is_made_for_are_seen() -> None:
    kernel = loops("sum_rows", f32(64, 256))
    assert unproved_accesses(replace(kernel, cost={**kernel.cost, "threads": 2 * kernel.cost["threads"]}))


def test_rows_picked_by_number_are_never_proved() -> None:
    kernel = loops("embedding", TensorType("i32", (8,)), f32(12, 16))
    assert {op.name for op in unproved_accesses(kernel)} == {"load"}
