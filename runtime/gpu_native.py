"""What wgpu-native can do and wgpu's Python classes do not offer: shaders without run-time checks, fast recording, waiting for
one submission.

A dispatch recorded through the classes costs three checked calls, more than the GPU needs for a small kernel; here it is
three calls of the C library. Errors of either surface where the command encoder is finished. A buffer mapped through the
classes costs a submission more, a thread that polls and two changes of threads, and a wait for all that was submitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinygpt.runtime.errors import UserError

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


def submit(device: Any, commands: Any) -> Any:
    """Submit a command buffer; returns what `Mapper.content` waits for. Raises wgpu.GPUError if it breaks a rule."""
    from wgpu.backends.wgpu_native import ffi
    from wgpu.backends.wgpu_native._api import libf

    handles = ffi.new("WGPUCommandBuffer[]", [commands._internal])
    return ffi.new("WGPUSubmissionIndex *", libf.wgpuQueueSubmitForIndex(device.queue._internal, 1, handles))


class Mapper:
    """Waits for submissions of one device and reads the buffers they filled."""

    def __init__(self, device: Any) -> None:
        from wgpu.backends.wgpu_native import ffi, lib

        answers: list[int] = []

        @ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)")  # type: ignore[untyped-decorator]
        def mapped(status: int, message: Any, first: Any, second: Any) -> None:
            answers.append(status)

        self._device, self._answers, self._callback = device, answers, mapped
        self._info = ffi.new("WGPUBufferMapCallbackInfo *", {"mode": lib.WGPUCallbackMode_AllowProcessEvents, "callback": mapped})

    def content(self, buffer: Any, submission: Any) -> bytearray:
        """What a buffer with usage MAP_READ holds after a submission, the last that used it; later ones may still run. It is
        not mapped before nor after. Raises UserError if the device was lost, RuntimeError if this is closed."""
        from wgpu.backends.wgpu_native import ffi, lib

        if self._device is None:
            raise RuntimeError("the engine is closed")
        handle, size = buffer._internal, buffer.size
        self._answers.clear()
        try:
            lib.wgpuBufferMapAsync(handle, lib.WGPUMapMode_Read, 0, size, self._info[0])
            lib.wgpuDevicePoll(self._device._internal, True, submission)
            if self._answers != [lib.WGPUMapAsyncStatus_Success]:
                raise UserError("the GPU's driver stopped and its results are lost", hint="start again, or go on from the last checkpoint")
            return bytearray(ffi.buffer(lib.wgpuBufferGetMappedRange(handle, 0, size), size))
        finally:
            lib.wgpuBufferUnmap(handle)  # after Ctrl-C, too: it ends the wait

    def close(self) -> None:
        """Read nothing any more: the device goes."""
        self._device = None
