"""The text form of a module, for reading: one instruction a line, indented by blocks, with comments and names of
locals.

`wat2wasm` of any toolkit reads it back to the same code; kernels are shipped as bytes, from the same records."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from tinygpt.targets.wasm import instructions as kinds
from tinygpt.targets.wasm.assembler import Function, Instruction, MemoryType, Module
from tinygpt.targets.wasm.instructions import OPCODES

_INDENT = "  "
_NOT_IN_AN_IDENTIFIER = re.compile(r"[^A-Za-z0-9_.:\-]")


def print_module(module: Module) -> str:
    """The text of a whole module."""
    lines = [f"(module {_identifier(module.name)}"]
    for params, results in module.signatures:
        lines.append(f"{_INDENT}(type (func{_list('param', params)}{_list('result', results)}))")
    for memory in module.imports:
        lines.append(f'{_INDENT}(import "{memory.module}" "{memory.name}" (memory {_memory(memory.type)}))')
    lines += [f"{_INDENT}(memory {_memory(memory)})" for memory in module.memories]
    types = {signature: index for index, signature in enumerate(module.signatures)}
    for function in module.functions:
        lines += [_INDENT + line for line in _function_lines(module, function, f" (type {types[function.signature]})")]
    for export in module.exports:
        lines.append(f'{_INDENT}(export "{export.name}" (func {_function_name(module, export.function)}))')
    return "\n".join(lines) + ")\n"


def print_function(module: Module, name: str) -> str:
    """The text of one function of the module (a KeyError names one that it has not)."""
    function = {f.name: f for f in module.functions}[name]
    return "\n".join(_function_lines(module, function)) + "\n"


def _function_lines(module: Module, function: Function, type: str = "") -> Iterator[str]:
    if function.comment:
        yield f";; {function.comment}"
    declared = "".join(f" (param ${_plain(p.name)} {p.type})" for p in function.parameters)
    yield f"(func {_identifier(function.name)}{type}{declared}{_list('result', function.results)}"
    names = [f"${_plain(v.name)}" for v in (*function.parameters, *function.variables)]
    for name, variable in zip(names[len(function.parameters) :], function.variables, strict=True):
        yield f"{_INDENT}(local {name} {variable.type})"
    depth = 1
    for instruction in function.body:
        if instruction[0] in ("end", "else"):
            depth -= 1
        yield _INDENT * depth + _instruction(module, names, instruction)
        if instruction[0] in ("block", "loop", "if", "else"):
            depth += 1
    yield ")"


def _instruction(module: Module, names: list[str], instruction: Instruction) -> str:
    name, immediates = str(instruction[0]), instruction[1:]
    if name == "note":
        return f";; {immediates[0]}"
    match OPCODES[name].immediate:
        case kinds.LOCAL:
            return f"{name} {names[immediates[0]]}"
        case kinds.FUNCTION:
            return f"{name} {_function_name(module, immediates[0])}"
        case kinds.MEMORY:
            offset, memory = (*immediates, 0, 0)[:2]
            return name + (f" {memory}" if memory else "") + (f" offset={offset}" if offset else "") + _alignment(name)
        case kinds.BLOCK:
            return name + (f" (result {immediates[0]})" if immediates else "")
        case kinds.LABELS:
            labels, default = immediates
            return f"{name} {' '.join(map(str, (*labels, default)))}"
        case kinds.F32:
            return f"{name} {_float(immediates[0])}"
        case kinds.V128:
            return f"{name} i32x4 {' '.join(f'0x{word:08x}' for word in struct.unpack('<4I', immediates[0]))}"
        case kinds.SHUFFLE:
            return f"{name} {' '.join(map(str, immediates[0]))}"
    return " ".join([name, *map(str, immediates)])


def _alignment(name: str) -> str:
    """Vectors are accessed at the alignment of their elements, which the text form must say."""
    return " align=4" if name in ("v128.load", "v128.store") else ""


def _float(bits: bytes) -> str:
    (value,) = struct.unpack("<f", bits)
    if value != value:
        return f"nan:0x{int.from_bytes(bits, 'little') & 0x7FFFFF:x}"
    return str(value) if abs(value) == float("inf") else value.hex()


def _memory(memory: MemoryType) -> str:
    address = "i64 " if memory.address == "i64" else ""
    end = "" if memory.maximum is None else f" {memory.maximum}"
    return f"{address}{memory.minimum}{end}{' shared' if memory.shared else ''}"


def _list(keyword: str, types: tuple[str, ...]) -> str:
    return f" ({keyword} {' '.join(types)})" if types else ""


def _identifier(name: str) -> str:
    return f"${_plain(name)}"


def _plain(name: str) -> str:
    return _NOT_IN_AN_IDENTIFIER.sub("_", name) or "_"


def _function_name(module: Module, index: int) -> str:
    return _identifier(module.functions[index].name)
