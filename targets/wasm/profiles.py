"""The profiles of WebAssembly: what an engine offers (address width, threads, relaxed SIMD) and which engine is tuned
for.

Every profile that an engine supports runs in it and gives the same bits; tuning changes speed only. Measured on one
core of a Zen 5 (480x480x512, packed panels, share of the 128-bit FMA peak): V8 reaches 97-100 % with 6x2 accumulators
and scalars splat by the load, wasmtime 87 % with 8x1, a shuffle of a vector of four, and two steps of the contraction
a trip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from tinygpt.ir.caps import Caps

THREADS = "threads"
RELAXED_SIMD = "relaxed-simd"
MULTI_MEMORY = "multi-memory"

ENGINES = ("v8", "wasmtime")
_GIB = 1 << 30
_MEMORY_BYTES = {32: 4 * _GIB, 64: 16 * _GIB}  # what the address reaches; what V8 and Firefox allow a memory to have


@dataclass(frozen=True)
class AddressSpace:
    """How a kind of memory is addressed: by which type of number, in which of the module's memories."""

    type: str
    memory: int


def address_space(caps: Caps, space: str) -> AddressSpace:
    """Where pointers of the loop level's space point: "buffer" (the shared memory) or "scratch" (the thread's own).

    With several memories, scratch has a 32-bit one to itself. Engines check no bounds there, and panels of products,
    which inner loops read, lie in scratch: a 64-bit module is then as fast as a 32-bit one."""
    if space == "scratch" and MULTI_MEMORY in caps.features:
        return AddressSpace("i32", 1)
    return AddressSpace(f"i{caps.address_bits}", 0)


def _profile(address_bits: int, threads: bool, relaxed: bool, engine: str) -> Caps:
    parts = (f"wasm{address_bits}", "threads" if threads else "", "relaxed" if relaxed else "", engine)
    features = {THREADS: threads, RELAXED_SIMD: relaxed, MULTI_MEMORY: address_bits == 64}
    generic = Caps(
        name="-".join(filter(None, parts)),
        lanes=4,
        registers=16,
        register_tile=(6, 2),
        unroll=4 if address_bits == 64 else 1,  # V8 checks each 64-bit address: fewer other instructions hide it
        splat="load",
        left="copied",
        fma=relaxed,
        address_bits=address_bits,
        memory_bytes=_MEMORY_BYTES[address_bits],
        threads=2 if threads else 1,
        features=frozenset(name for name, on in features.items() if on),
    )
    if engine == "wasmtime":
        return replace(generic, register_tile=(8, 1), splat="shuffle", left="panels", unroll=2)
    return generic


PROFILES: dict[str, Caps] = {
    caps.name: caps
    for caps in (_profile(*choice) for choice in product((32, 64), (True, False), (True, False), ENGINES))
}


def profile(target: str, engine: str = "v8", *, threads: bool = True, relaxed: bool = True) -> Caps:
    """The profile of a target ("wasm32" or "wasm64") for an engine ("v8" or "wasmtime").

    Raises KeyError for another target or engine."""
    parts = (target, "threads" if threads else "", "relaxed" if relaxed else "", engine)
    return PROFILES["-".join(filter(None, parts))]
