"""Runs single kernels as WebAssembly, in wasmtime, on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import wasmtime
from numpy.typing import NDArray

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel
from tinygpt.targets.wasm.assembler import Export, ImportedMemory, MemoryType, Module, encode_module
from tinygpt.targets.wasm.profiles import MULTI_MEMORY
from tinygpt.targets.wasm.printer import FunctionTable, print_kernel, scratch_bytes

_QUIET_NAN = 0x7FC00000


def kernel_module(kernels: Sequence[Kernel], caps: Caps, pages: int = 4) -> Module:
    """A module with a memory to import and each kernel exported by its name."""
    table = FunctionTable()
    exports = [Export(kernel.name, print_kernel(kernel, caps, table)) for kernel in kernels]
    memories = [ImportedMemory("env", "memory", MemoryType(pages, pages, False, f"i{caps.address_bits}"))]
    if MULTI_MEMORY in caps.features:
        memories.append(ImportedMemory("env", "scratch", MemoryType(pages, pages, False, "i32")))
    return Module("kernels", tuple(memories), (), tuple(table.functions), tuple(exports))


class WasmKernels:
    """Kernels compiled together. Buffers lie at odd multiples of four bytes: tensors are aligned to elements only."""

    def __init__(self, kernels: Sequence[Kernel], caps: Caps, pages: int = 4) -> None:
        self.module = kernel_module(kernels, caps, pages)
        self.bytes = encode_module(self.module)
        self.store = wasmtime.Store(wasmtime.Engine())
        limits = wasmtime.Limits(pages, pages)
        widths = [m.type.address == "i64" for m in self.module.imports]
        self.memories = [wasmtime.Memory(self.store, wasmtime.MemoryType(limits, is_64=is_wide)) for is_wide in widths]
        compiled = wasmtime.Module(self.store.engine, self.bytes)
        self.exports = wasmtime.Instance(self.store, compiled, self.memories).exports(self.store)

    def run(self, kernel: Kernel, buffers: Sequence[NDArray], lo: int, hi: int) -> None:
        """Run grid points lo to hi - 1 over the buffers, in place. Scratch starts as NaN."""
        view, private = (self.content(memory) for memory in (self.memories[0], self.memories[-1]))
        places, end = [], 4
        for array in buffers:
            view[end : end + array.nbytes] = array.view(np.uint8).ravel()
            places.append(end)
            end += (array.nbytes + 3) // 4 * 4 + 8
        scratch = (end + 63) // 64 * 64
        private[scratch : scratch + scratch_bytes(kernel)].view(np.uint32)[:] = _QUIET_NAN
        guard = private[scratch + scratch_bytes(kernel) :]
        guard[:] = 0xAB
        self.exports[kernel.name](self.store, *places, scratch, lo, hi)
        assert (guard == 0xAB).all(), f"{kernel.name} wrote behind its scratch memory"
        for array, place in zip(buffers, places, strict=True):
            array.view(np.uint8).ravel()[:] = view[place : place + array.nbytes]

    def content(self, memory: wasmtime.Memory) -> NDArray[np.uint8]:
        """The bytes of a memory, in place."""
        return np.frombuffer(memory.get_buffer_ptr(self.store), np.uint8)
