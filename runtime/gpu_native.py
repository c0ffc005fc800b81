"""What wgpu-native can do and wgpu's Python classes do not offer: shaders without run-time checks, fast recording, waiting for
one submission.

A dispatch recorded through the classes costs three checked calls, more than the GPU needs for a small kernel; here it is
three calls of the C library. Errors of either surface where the command encoder is finished. A small write takes half the
time here. A buffer mapped through the classes costs a submission more, two changes of threads, and a wait for all that
was submitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

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


class Queue:
    """A device's queue: what the host writes, submits and reads back."""

    def __init__(self, device: Any) -> None:
        from wgpu.backends.wgpu_native import ffi, lib
        from wgpu.backends.wgpu_native._api import libf

        answers: list[int] = []
        raised: list[BaseException] = []  # in the callback: Ctrl-C, as it is the first Python code to run behind a wait

        def keep(kind: Any, error: BaseException, trace: Any) -> None:
            raised.append(error)

        @ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)", onerror=keep)  # type: ignore[untyped-decorator]  # cffi has no types
        def mapped(status: int, message: Any, first: Any, second: Any) -> None:
            answers.append(status)

        self._device, self._handle = device, device.queue._internal
        self._ffi, self._lib, self._checked = ffi, lib, libf
        self._answers, self._raised, self._callback = answers, raised, mapped
        self._mapping = ffi.new("WGPUBufferMapCallbackInfo *", {"mode": lib.WGPUCallbackMode_AllowProcessEvents, "callback": mapped})

    def write(self, buffer: Any, offset: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array into a buffer, before what is submitted next. Raises wgpu.GPUError if that cannot be."""
        self._checked.wgpuQueueWriteBuffer(self._handle, buffer._internal, offset, self._ffi.from_buffer(array), array.nbytes)

    def submit(self, commands: Any) -> Any:
        """Submit a command buffer; returns what `content` waits for. Raises wgpu.GPUError if it breaks a rule."""
        handles = self._ffi.new("WGPUCommandBuffer[]", [commands._internal])
        return self._ffi.new("WGPUSubmissionIndex *", self._checked.wgpuQueueSubmitForIndex(self._handle, 1, handles))

    def content(self, buffer: Any, submission: Any) -> bytearray:
        """What a buffer with usage MAP_READ holds after a submission, the last that used it; later ones may still run. It is
        not mapped before nor after. Raises UserError if the device was lost, RuntimeError if this is closed."""
        if self._device is None:
            raise RuntimeError("the engine is closed")
        lib, handle, size = self._lib, buffer._internal, buffer.size
        self._answers.clear()
        self._raised.clear()
        try:
            lib.wgpuBufferMapAsync(handle, lib.WGPUMapMode_Read, 0, size, self._mapping[0])
            lib.wgpuDevicePoll(self._device._internal, True, submission)
            if self._raised:
                raise self._raised.pop()
            if self._answers != [lib.WGPUMapAsyncStatus_Success]:
                raise UserError("the GPU's driver stopped and its results are lost", hint="start again, or go on from the last checkpoint")
            return bytearray(self._ffi.buffer(lib.wgpuBufferGetMappedRange(handle, 0, size), size))
        finally:
            lib.wgpuBufferUnmap(handle)  # after Ctrl-C, too: it ends the wait

    def close(self) -> None:
        """Read nothing any more: the device goes."""
        self._device = None
