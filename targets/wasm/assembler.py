"""WebAssembly modules as records, and their binary form (WebAssembly 3.0, section 5; threads and relaxed SIMD
proposals).

An instruction is a tuple: its name in the text form, then its immediates.
- `("local.get", 3)`, `("call", 12)`, `("br_if", 1)`: an index, or how many blocks out.
- `("v128.load", offset)` or `("v128.load", offset, memory)`: memory 0 unless said otherwise.
- `("block",)` or `("block", "i32")`: a result type; blocks, loops and ifs end with `("end",)`.
- `("br_table", (0, 1, 2), 3)`: labels, and the default.
- `("v128.const", sixteen bytes)`, `("i8x16.shuffle", sixteen bytes)`, `("f32.const", four bytes)`: bit patterns.
- `("note", "text")`: a comment, printed in the text form only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tinygpt.ir.errors import CompilerBug
from tinygpt.targets.wasm import instructions as kinds
from tinygpt.targets.wasm.instructions import OPCODES

PAGE = 65536
Instruction = tuple[Any, ...]

VALUE_TYPES = {"i32": 0x7F, "i64": 0x7E, "f32": 0x7D, "f64": 0x7C, "v128": 0x7B}
_EMPTY_BLOCK = 0x40
_FUNCTION, _MEMORY = 0, 2
_OTHER_MEMORY = 0x40  # bit 6 of the alignment says that a memory index follows


@dataclass(frozen=True, slots=True)
class MemoryType:
    """Pages of 64 KiB from `minimum` to `maximum` (None: no bound); `address` is "i32" or "i64"."""

    minimum: int
    maximum: int | None
    shared: bool
    address: str


@dataclass(frozen=True, slots=True)
class ImportedMemory:
    module: str
    name: str
    type: MemoryType


@dataclass(frozen=True, slots=True)
class Variable:
    """A parameter or a local of a function; the name is for reading."""

    name: str
    type: str


@dataclass(frozen=True)
class Function:
    """A function; its body has no closing `end`. `comment` is for reading, `name` also for tools (names section)."""

    name: str
    parameters: tuple[Variable, ...]
    results: tuple[str, ...]
    variables: tuple[Variable, ...]
    body: tuple[Instruction, ...]
    comment: str = ""

    @property
    def signature(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(p.type for p in self.parameters), self.results


@dataclass(frozen=True, slots=True)
class Export:
    """A function by its index, under a name that hosts use."""

    name: str
    function: int


@dataclass(frozen=True)
class Module:
    """Imported memories come first in the memory index space, then those of the module itself."""

    name: str
    imports: tuple[ImportedMemory, ...]
    memories: tuple[MemoryType, ...]
    functions: tuple[Function, ...]
    exports: tuple[Export, ...]

    @property
    def signatures(self) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        """The distinct signatures of the functions, in order of first use."""
        return tuple(dict.fromkeys(f.signature for f in self.functions))


def encode_module(module: Module) -> bytes:
    """The binary form of the module. Raises CompilerBug for an instruction that is unknown."""
    signatures = {signature: index for index, signature in enumerate(module.signatures)}
    sections = [
        (1, _vector(b"\x60" + _types(params) + _types(results) for params, results in signatures)),
        (2, _vector(_name(i.module) + _name(i.name) + bytes([_MEMORY]) + _limits(i.type) for i in module.imports)),
        (3, _vector(unsigned(signatures[f.signature]) for f in module.functions)),
        (5, _vector(_limits(memory) for memory in module.memories)),
        (7, _vector(_name(e.name) + bytes([_FUNCTION]) + unsigned(e.function) for e in module.exports)),
        (10, _vector(_sized(_code(f)) for f in module.functions)),
        (0, _names(module)),
    ]
    body = b"".join(bytes([number]) + _sized(content) for number, content in sections if content != b"\x00")
    return b"\x00asm\x01\x00\x00\x00" + body


def encode_body(body: Iterable[Instruction]) -> bytes:
    """The bytes of a sequence of instructions. Notes have none."""
    return b"".join(map(_instruction, body))


def unsigned(value: int) -> bytes:
    """Unsigned LEB128."""
    if value < 0:
        raise CompilerBug(f"wasm: {value} where a number that is not negative belongs")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed(value: int) -> bytes:
    """Signed LEB128."""
    out = bytearray()
    while not -0x40 <= value < 0x40:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value & 0x7F)
    return bytes(out)


def _sized(content: bytes) -> bytes:
    return unsigned(len(content)) + content


def _vector(items: Iterable[bytes]) -> bytes:
    listed = list(items)
    return unsigned(len(listed)) + b"".join(listed)


def _name(text: str) -> bytes:
    return _sized(text.encode())


def _types(types: Sequence[str]) -> bytes:
    return _vector(bytes([VALUE_TYPES[t]]) for t in types)


def _limits(memory: MemoryType) -> bytes:
    flags = (memory.maximum is not None) | memory.shared << 1 | (memory.address == "i64") << 2
    end = b"" if memory.maximum is None else unsigned(memory.maximum)
    return bytes([flags]) + unsigned(memory.minimum) + end


def _code(function: Function) -> bytes:
    runs: list[tuple[int, str]] = []
    for variable in function.variables:
        if runs and runs[-1][1] == variable.type:
            runs[-1] = (runs[-1][0] + 1, variable.type)
        else:
            runs.append((1, variable.type))
    declared = _vector(unsigned(count) + bytes([VALUE_TYPES[type]]) for count, type in runs)
    return declared + encode_body(function.body) + OPCODES["end"].code


def _names(module: Module) -> bytes:
    """The names section: the module and its functions, for profilers, debuggers and stack traces."""
    functions = _vector(unsigned(index) + _name(f.name) for index, f in enumerate(module.functions))
    return _name("name") + b"\x00" + _sized(_name(module.name)) + b"\x01" + _sized(functions)


@lru_cache(maxsize=1 << 16)
def _instruction(instruction: Instruction) -> bytes:
    name, *immediates = instruction
    if name == "note":
        return b""
    opcode = OPCODES.get(name)
    if opcode is None:
        raise CompilerBug(f"wasm: no instruction {name!r}")
    if opcode.immediate == kinds.MEMORY:
        return opcode.code + _memory_argument(opcode.alignment, *immediates)
    return opcode.code + _IMMEDIATES[opcode.immediate](*immediates)


def _memory_argument(alignment: int, offset: int = 0, memory: int = 0) -> bytes:
    if memory:
        return bytes([alignment | _OTHER_MEMORY]) + unsigned(memory) + unsigned(offset)
    return bytes([alignment]) + unsigned(offset)


def _exactly(size: int) -> Callable[[bytes], bytes]:
    def checked(bits: bytes) -> bytes:
        if len(bits) != size:
            raise CompilerBug(f"wasm: a bit pattern of {len(bits)} bytes where {size} belong")
        return bits

    return checked


_IMMEDIATES: dict[str, Callable[..., bytes]] = {
    kinds.NONE: lambda: b"",
    kinds.BLOCK: lambda result=None: bytes([VALUE_TYPES[result] if result else _EMPTY_BLOCK]),
    kinds.LABEL: unsigned,
    kinds.LABELS: lambda labels, default: _vector(map(unsigned, labels)) + unsigned(default),
    kinds.FUNCTION: unsigned,
    kinds.LOCAL: unsigned,
    kinds.LANE: lambda lane: bytes([lane]),
    kinds.I32: signed,
    kinds.I64: signed,
    kinds.F32: _exactly(4),
    kinds.V128: _exactly(16),
    kinds.SHUFFLE: _exactly(16),
}
