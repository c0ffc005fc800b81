"""Kernels with row reductions on a software driver, run as a program of its own, because the driver reads the lanes of a
subgroup from its environment: LP_NATIVE_VECTOR_WIDTH, in bits. Its arguments are the numbers of lanes that kernels rely on.
Prints what it found as one JSON object."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tests.lowered import op_module, random_buffers, tiled
from tests.wgsl_device import device, difference, run
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel
from tinygpt.ir.registry import Example
from tinygpt.ir.types import TensorType
from tinygpt.lowering.gpu import lower
from tinygpt.lowering.simplify import Simplify
from tinygpt.targets.wgsl.profiles import SUBGROUPS


def kernels(caps: Caps) -> Iterator[tuple[Kernel, list[np.ndarray]]]:
    """LayerNorm of several widths, also where the threads along a row are no power of two, and a maximum: cross-entropy."""
    rng = np.random.default_rng(5)

    def only(name: str, *types: TensorType, **attrs: object) -> Kernel:
        (kernel,) = tiled(Simplify().run(op_module(name, Example(types, attrs)), caps), caps).kernels.values()
        return kernel

    for columns in (5, 132, 1000):
        row = TensorType("f32", (columns,))
        kernel = only("layer_norm", TensorType("f32", (7, columns)), row, row, eps=1e-5)
        yield kernel, random_buffers(kernel, rng)
    for threads in ((8, 6), (3, 5), (2, 24)):
        yield replace(kernel, order={**kernel.order, "threads": threads}), random_buffers(kernel, rng)
    kernel = only("cross_entropy", TensorType("f32", (5, 70)), TensorType("i32", (5,)))
    yield kernel, random_buffers(kernel, rng)


def lanes() -> int:
    """The driver's lanes of a subgroup, by a kernel that asks for them."""
    import wgpu

    gpu = device(SUBGROUPS.features)
    code = (
        "@group(0) @binding(0) var<storage, read_write> x: array<u32>;"
        "@compute @workgroup_size(64) fn main(@builtin(subgroup_size) n: u32, @builtin(local_invocation_index) i: u32) { x[i] = n; }"
    )
    buffer = gpu.create_buffer(size=256, usage=wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC)
    pipeline = gpu.create_compute_pipeline(layout="auto", compute={"module": gpu.create_shader_module(code=code), "entry_point": "main"})
    group = gpu.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=[{"binding": 0, "resource": {"buffer": buffer}}])
    encoder = gpu.create_command_encoder()
    work = encoder.begin_compute_pass()
    work.set_pipeline(pipeline)
    work.set_bind_group(0, group)
    work.dispatch_workgroups(1)
    work.end()
    gpu.queue.submit([encoder.finish()])
    (found,) = set(np.frombuffer(gpu.queue.read_buffer(buffer), np.uint32).tolist())
    return int(found)


def measured(relied_on: int) -> dict[str, object]:
    """Kernels that rely on so many lanes, run twice: how far they are from their tile programs, and the bits of each run."""
    caps = replace(SUBGROUPS, subgroup=relied_on)
    worst, folds, digests = 0.0, 0, [hashlib.sha256(), hashlib.sha256()]
    for kernel, buffers in kernels(caps):
        worst = float(np.maximum(worst, difference(kernel, buffers, caps=caps)))
        loops = lower(kernel, caps)
        folds += sum(op.name == "subgroup_fold" for op in loops.body.walk())
        for digest in digests:
            again = [b.copy() for b in buffers]
            run(loops, caps, again)
            digest.update(b"".join(b.tobytes() for b in again))
    return {"worst": worst, "folds": folds, "bits": [digest.hexdigest() for digest in digests]}


if __name__ == "__main__":
    print(json.dumps({"lanes": lanes(), "relying on": {number: measured(int(number)) for number in sys.argv[1:]}}))
