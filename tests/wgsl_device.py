"""The WebGPU device of the tests: a Vulkan driver through wgpu, with no more than the default limits; kernels run
on it from numpy arrays. Without a driver a test fails where CI is set, and skips, with the reason, on a laptop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Module, Op
from tinygpt.ir.interpret import run_region
from tinygpt.ir.interpret_tile import run_kernel, unwritten
from tinygpt.ir.types import NUMPY_DTYPES
from tinygpt.ir.verify import verify_kernel
from tinygpt.lowering.gpu import lower
from tinygpt.runtime.gpu import wgpu_features
from tinygpt.targets.wgsl.printer import grid_size, print_kernel
from tinygpt.targets.wgsl.profiles import DEFAULT

LIMITS = {
    "max-storage-buffers-per-shader-stage": 8, "max-storage-buffer-binding-size": 128 << 20, "max-buffer-size": 256 << 20,
    "max-compute-workgroup-storage-size": 16 << 10, "max-compute-invocations-per-workgroup": 256,
    "max-compute-workgroup-size-x": 256, "max-compute-workgroups-per-dimension": 65535,
}  # fmt: skip
INSTALL = "sudo apt install mesa-vulkan-drivers libvulkan1, and pip install wgpu"


@cache
def device(features: frozenset[str] = frozenset()) -> Any:
    """A device of the first Vulkan adapter with these features of the specification; no device fails or skips the test."""
    try:
        import wgpu

        adapters = [a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] == "Vulkan"]
    except (ImportError, RuntimeError):
        adapters = []
    if adapters:
        return adapters[0].request_device_sync(required_limits=LIMITS, required_features=wgpu_features(features))
    if os.environ.get("CI"):
        pytest.fail(f"no Vulkan driver: {INSTALL}")
    pytest.skip(f"no Vulkan driver: {INSTALL}")


VALIDATE = """
import json, sys, wgpu
adapter = next(a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] == "Vulkan")
device = adapter.request_device_sync(required_features=json.loads(sys.argv[1]))
for path in sys.argv[2:]:
    try:
        device.create_shader_module(code=open(path).read())
    except wgpu.GPUError as error:
        sys.exit(f"{path}: {error}")
"""


def refused_by_naga(shaders: Iterable[Path], features: frozenset[str] = frozenset()) -> str:
    """What naga has against the first shader it refuses. In a child process: it can abort."""
    command = [sys.executable, "-c", VALIDATE, json.dumps(wgpu_features(features)), *sorted(map(str, shaders))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr or "naga ended without a word" if done.returncode else ""


def assert_bindings_obey_the_rules(target: Mapping[str, Any]) -> None:
    """No launch of a bundle reads and writes one pool, or writes one place twice; what it binds is aligned."""
    for launched in (launch for launches in target["functions"].values() for launch in launches):
        access = target["kernels"][launched["kernel"]]["access"]
        assert len(access) <= 8
        bound = list(zip(access, launched["bindings"], strict=True))
        read = {pool for a, (pool, _, _) in bound if a == "in"}
        written = [b for a, b in bound if a != "in"]
        assert not read & {pool for pool, _, _ in written}
        assert all(offset % 256 == 0 and size % 16 == 0 for _, (_, offset, size) in bound)
        assert all(p != q or a + m <= b or b + n <= a for (p, a, m), (q, b, n) in combinations(written, 2))


def run(kernel: Kernel, caps: Caps, buffers: Sequence[NDArray[Any]]) -> None:
    """Run a loop-level kernel over flat buffers, one per parameter, which it changes in place."""
    import wgpu

    gpu = device(caps.features)
    module = gpu.create_shader_module(code=print_kernel(kernel, caps))
    layout_entries = [
        {"binding": n, "visibility": wgpu.ShaderStage.COMPUTE, "buffer": {"type": "read-only-storage" if access == "in" else "storage"}}
        for n, access in enumerate(kernel.access)
    ]
    layout = gpu.create_bind_group_layout(entries=layout_entries)
    pipeline = gpu.create_compute_pipeline(
        layout=gpu.create_pipeline_layout(bind_group_layouts=[layout]), compute={"module": module, "entry_point": "main"}
    )
    usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.COPY_SRC
    found = []
    for array in buffers:
        found.append(gpu.create_buffer(size=-(-array.nbytes // 16) * 16, usage=usage))
        gpu.queue.write_buffer(found[-1], 0, array.tobytes() + bytes(-array.nbytes % 4))  # copies are of whole words
    entries = [{"binding": n, "resource": {"buffer": b, "offset": 0, "size": b.size}} for n, b in enumerate(found)]
    group = gpu.create_bind_group(layout=layout, entries=entries)
    encoder = gpu.create_command_encoder()
    work = encoder.begin_compute_pass()
    work.set_pipeline(pipeline)
    work.set_bind_group(0, group)
    work.dispatch_workgroups(*grid_size(kernel, caps.grid_limit))
    work.end()
    gpu.queue.submit([encoder.finish()])
    for array, buffer, access in zip(buffers, found, kernel.access, strict=True):
        if access != "in":
            array[:] = np.frombuffer(gpu.queue.read_buffer(buffer), array.dtype)[: array.size]


def launch(kernel: Kernel, buffers: Sequence[NDArray[Any]], caps: Caps = DEFAULT) -> None:
    """Run a tile kernel on the device, lowered for a profile."""
    loops = lower(kernel, caps)
    verify_kernel(loops, caps)
    run(loops, caps, buffers)


def run_function(module: Module, name: str, inputs: Mapping[str, NDArray[Any]], parameters: Mapping[str, NDArray[Any]], caps: Caps) -> dict[str, NDArray[Any]]:
    """Run a tiled function, each launch on the device: results by name, new contents of parameters under "@NAME"."""
    function = module.functions[name]
    values = {p: np.array(inputs[p.hint], NUMPY_DTYPES[p.type.dtype], order="C") for p in function.params}
    values |= {p.value: np.array(parameters[n], NUMPY_DTYPES[p.type.dtype], order="C") for n, p in module.parameters.items() if n in parameters}

    def launched(op: Op, operands: list[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        if op.name == "buffer":
            return (unwritten(op.result.type.size, NUMPY_DTYPES[op.result.type.dtype]).reshape(op.result.type.shape),)
        kernel = module.kernels[op.attrs["kernel"]]
        parts = zip(operands, op.attrs["offsets"], kernel.params, strict=True)
        launch(kernel, [x.reshape(-1)[at : at + p.type.size] for x, at, p in parts], caps)
        return ()

    run_region(function.body, values, launched)
    found = {n: values[v] for n, v in zip(function.result_names, function.body.yields, strict=True)}
    return found | {f"@{n}": values[p.value] for n, p in module.parameters.items() if p.value in values}


def difference(kernel: Kernel, buffers: Sequence[NDArray[Any]], floor: float = 1e-9, caps: Caps = DEFAULT) -> float:
    """How far the kernel on the device is from its tile program in float64, relative to the largest element.

    `floor` is for gradients that are zero but for rounding: a single key has no gradient of its score."""
    verify_kernel(kernel)
    expected = [b.astype(np.float64) if b.dtype == np.float32 else b.copy() for b in buffers]
    found = [b.copy() for b in buffers]
    run_kernel(kernel, expected, wide=True)
    launch(kernel, found, caps)
    worst = 0.0
    for access, a, b in zip(kernel.access, expected, found, strict=True):
        if access != "in":
            worst = float(np.maximum(worst, np.abs(a.astype(np.float64) - b).max() / (np.abs(a).max() + floor)))
    return worst
