"""What wgpu-native can do and wgpu's Python classes do not offer: shaders without run-time checks, fast recording.

A dispatch recorded through the classes costs three checked calls, more than the GPU needs for a small kernel; here it is
three calls of the C library. Errors of either surface where the command encoder is finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Command = tuple[Any, Any, tuple[int, int, int]]  # pipeline, bind group, workgroups


def record(work: Any, commands: Sequence[Command]) -> None:
    """Record dispatches into a compute pass, one after another."""
    from wgpu.backends.wgpu_native import ffi, lib

    encoder, current = work._internal, None
    for pipeline, group, (x, y, z) in commands:
        if pipeline is not current:
            lib.wgpuComputePassEncoderSetPipeline(encoder, pipeline._internal)
            current = pipeline
        lib.wgpuComputePassEncoderSetBindGroup(encoder, 0, group._internal, 0, ffi.NULL)
        lib.wgpuComputePassEncoderDispatchWorkgroups(encoder, x, y, z)


def trusted_module(device: Any, label: str, code: str) -> Any:
    """A shader module without clamps of addresses and without forced ends of loops: only for code whose accesses are
    proved to lie inside their memory. An error in the code surfaces where a pipeline is made of it."""
    from wgpu.backends.wgpu_native import GPUShaderModule, ffi, lib

    kept = [ffi.new("char[]", text.encode()) for text in (code, label)]  # as long as the call
    source = ffi.new("WGPUShaderSourceWGSL *")
    source.chain.sType = lib.WGPUSType_ShaderSourceWGSL
    source.code.data, source.code.length = kept[0], len(kept[0]) - 1
    descriptor = ffi.new("WGPUShaderModuleDescriptor *")
    descriptor.nextInChain = ffi.cast("WGPUChainedStruct *", source)
    descriptor.label.data, descriptor.label.length = kept[1], len(kept[1]) - 1
    handle = lib.wgpuDeviceCreateShaderModuleTrusted(device._internal, descriptor, 0)
    return GPUShaderModule(label, handle, device)
