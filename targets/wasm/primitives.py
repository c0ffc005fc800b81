"""Primitives of the scalar language and vector ops of the loop dialect, as WebAssembly instructions.

Everything here maps code that leaves the operands on the stack to code that leaves the result. A bool is an i32 that
is 0 or 1, a vector of bools a mask: all ones or all zeros in each 32-bit lane."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.types import PointerType, ScalarType, VectorType
from tinygpt.targets.wasm.assembler import Instruction

Code = list[Instruction]
Register = ScalarType | VectorType | PointerType
Twice = Callable[[Code, str], tuple[Code, Code]]  # of code and the type it leaves: code for a first use, and for others

LANES = 4
COMMUTATIVE = frozenset({"add", "mul", "and", "or", "xor", "eq", "ne"})

# The text-form suffix of a primitive by element type; comparisons of u32 and bool are unsigned.
_FLOAT = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "neg": "neg", "abs": "abs", "sqrt": "sqrt",
    "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "eq": "eq", "ne": "ne",
}  # fmt: skip
_SIGNED = {
    "add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor", "shl": "shl", "shr": "shr_s",
    "lt": "lt_s", "le": "le_s", "gt": "gt_s", "ge": "ge_s", "eq": "eq", "ne": "ne",
}  # fmt: skip
_UNSIGNED = {**_SIGNED, "shr": "shr_u", "lt": "lt_u", "le": "le_u", "gt": "gt_u", "ge": "ge_u"}
_SUFFIXES = {"f32": _FLOAT, "i32": _SIGNED, "u32": _UNSIGNED, "bool": _UNSIGNED}
_BITWISE = ("and", "or", "xor")


def is_vector(type: Register) -> bool:
    return isinstance(type, VectorType)


def register_type(type: ScalarType | VectorType) -> str:
    """The type of a local that holds such a value. Raises CompilerBug for what this target has no registers for."""
    if type.dtype not in _SUFFIXES or (isinstance(type, VectorType) and type.lanes != LANES):
        raise CompilerBug(f"wasm: no register holds {type}: elements of 32 bits, alone or in fours, are what there is")
    if isinstance(type, VectorType):
        return "v128"
    return "f32" if type.dtype == "f32" else "i32"


def scalar_constant(value: float | int, dtype: str) -> Instruction:
    return ("f32.const", struct.pack("<f", value)) if dtype == "f32" else ("i32.const", _signed(int(value)))


def lane_bits(value: float | int, dtype: str) -> bytes:
    """The four bytes of one lane."""
    if dtype == "f32":
        return struct.pack("<f", value)
    if dtype == "bool":
        return b"\xff\xff\xff\xff" if value else b"\x00\x00\x00\x00"
    return (int(value) & 0xFFFFFFFF).to_bytes(4, "little")


def shuffle(lanes: Sequence[int]) -> Instruction:
    """A shuffle of two vectors by 32-bit lanes: 0 to 3 of the first, 4 to 7 of the second."""
    return ("i8x16.shuffle", bytes(4 * lane + byte for lane in lanes for byte in range(4)))


def stack_order(name: str, result: Register) -> tuple[int, ...] | None:
    """In which order a primitive's operands go on the stack, where it is not their own."""
    if name == "select":
        return (1, 2, 0)
    if name in ("min", "max") and result == VectorType("f32", LANES):
        return (1, 0)
    return None


def primitive(
    name: str, types: Sequence[Register], result: Register, codes: Sequence[Code], relaxed: bool, twice: Twice
) -> Code:
    """Code of one primitive of `ir.scalar`; `codes` are in the order of the stack, `types` in that of the operands.

    `relaxed`: relaxed SIMD may be used (fused multiply-add, lane selection, truncation of numbers in range). A shift's
    amount is a scalar. Raises CompilerBug for what has no instruction."""
    vector, dtype = is_vector(result), types[-1].dtype
    match name:
        case "min" | "max":
            return _extremum(name, dtype, vector, codes, twice)
        case "fma" if vector and relaxed:
            return [*codes[0], *codes[1], *codes[2], ("f32x4.relaxed_madd",)]
        case "fma":
            shape = "f32x4" if vector else "f32"
            return [*codes[0], *codes[1], (f"{shape}.mul",), *codes[2], (f"{shape}.add",)]
        case "select":
            return _select(codes, vector, relaxed)
        case "neg" if dtype in ("i32", "u32"):
            return [*codes[0], ("i32x4.neg",)] if vector else [("i32.const", 0), *codes[0], ("i32.sub",)]
        case "abs" if dtype == "u32":
            return codes[0]
        case "abs" if dtype == "i32":
            return [*codes[0], ("i32x4.abs",)] if vector else _absolute(codes[0], twice)
        case "cast":
            return [*codes[0], *_cast(types[0].dtype, result.dtype, vector, relaxed)]
        case "bitcast":
            return [*codes[0], *_bitcast(types[0].dtype, result.dtype, vector)]
        case "shl" | "shr":
            return [*codes[0], *codes[1], (_spelled(name, types[0].dtype, vector),)]
    return [*(i for code in codes for i in code), (_spelled(name, dtype, vector),)]


def fold(kind: str, dtype: str, code: Code, twice: Twice) -> Code:
    """The sum or the maximum of the lanes: lanes 0 and 2, 1 and 3, then the two results."""
    name, type = {"sum": "add", "max": "max"}[kind], VectorType(dtype, LANES)
    for lanes in ((2, 3, 0, 1), (1, 0, 3, 2)):
        first, again = twice(code, "v128")
        code = primitive(name, (type, type), type, ([*first, *again, shuffle(lanes)], again), False, twice)
    return [*code, *extract(0, dtype)]


def extract(lane: int, dtype: str) -> Code:
    if dtype == "f32":
        return [("f32x4.extract_lane", lane)]
    whole: Code = [("i32x4.extract_lane", lane)]
    return [*whole, ("i32.const", 1), ("i32.and",)] if dtype == "bool" else whole


def splat(dtype: str) -> Code:
    if dtype == "f32":
        return [("f32x4.splat",)]
    return [*_mask_of_bool(), ("i32x4.splat",)] if dtype == "bool" else [("i32x4.splat",)]


def join(dtype: str, codes: Sequence[Code]) -> Code:
    """Scalars as the lanes of a vector."""
    shape = "f32x4" if dtype == "f32" else "i32x4"
    out = [*codes[0], *splat(dtype)]
    for lane, code in enumerate(codes[1:], 1):
        mask = _mask_of_bool() if dtype == "bool" else []
        out += [*code, *mask, (f"{shape}.replace_lane", lane)]
    return out


def shift_lanes(name: str, dtype: str, codes: Sequence[Code], twice: Twice) -> Code:
    """A shift whose amount differs from lane to lane, one lane at a time: there is no such instruction."""
    value, value_again = twice(codes[0], "v128")
    amount, amount_again = twice(codes[1], "v128")
    out: Code = []
    for lane in range(LANES):
        operands = (value, amount) if lane == 0 else (value_again, amount_again)
        shifted = [i for code in operands for i in (*code, ("i32x4.extract_lane", lane))]
        shifted.append((_spelled(name, dtype, False),))
        out += [*shifted, ("i32x4.splat",)] if lane == 0 else [*shifted, ("i32x4.replace_lane", lane)]
    return out


def load(type: Register, *place: int) -> Code:
    """The instructions after the address that load a value; `place` is the access's offset and memory."""
    match type:
        case VectorType("bool"):
            widen: Code = [("i16x8.extend_low_i8x16_u",), ("i32x4.extend_low_i16x8_u",), ("i32x4.neg",)]
            return [("v128.load32_zero", *place), *widen]
        case VectorType():
            return [("v128.load", *place)]
        case ScalarType("bool"):
            return [("i32.load8_u", *place)]
        case ScalarType("f32"):
            return [("f32.load", *place)]
    return [("i32.load", *place)]


def store(type: Register, value: Code, *place: int) -> Code:
    """The instructions after the address that store a value; `place` is the access's offset and memory."""
    match type:
        case VectorType("bool"):
            ones: Code = [("v128.const", lane_bits(1, "i32") * LANES), ("v128.and",)]
            narrow: Code = [("i16x8.narrow_i32x4_s",)]
            zeros: Code = [("v128.const", bytes(16))]
            packed: Code = [*value, *ones, *zeros, *narrow, *zeros, ("i8x16.narrow_i16x8_s",)]
            return [*packed, ("i32x4.extract_lane", 0), ("i32.store", *place)]
        case VectorType():
            return [*value, ("v128.store", *place)]
        case ScalarType("bool"):
            return [*value, ("i32.store8", *place)]
        case ScalarType("f32"):
            return [*value, ("f32.store", *place)]
    return [*value, ("i32.store", *place)]


def _signed(value: int) -> int:
    """A 32-bit pattern as the signed number `i32.const` wants."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _spelled(name: str, dtype: str, vector: bool) -> str:
    suffix = _SUFFIXES[dtype].get(name)
    if suffix is None:
        raise CompilerBug(f"wasm: no instruction does {name} of {dtype}; a transcendental must be expanded first")
    if vector and name in _BITWISE:
        return f"v128.{suffix}"
    if dtype == "f32":
        return f"f32x4.{suffix}" if vector else f"f32.{suffix}"
    return f"i32x4.{suffix}" if vector else f"i32.{suffix}"


def _extremum(name: str, dtype: str, vector: bool, codes: Sequence[Code], twice: Twice) -> Code:
    """a < b ? a : b, or a > b ? a : b, NaNs and zeros included. `pmin(x, y)` is y < x ? y : x: its operands are b and
    a."""
    if vector:
        instruction = f"f32x4.p{name}" if dtype == "f32" else f"i32x4.{name}_{'s' if dtype == 'i32' else 'u'}"
        return [*codes[0], *codes[1], (instruction,)]
    type = "f32" if dtype == "f32" else "i32"
    first_a, again_a = twice(codes[0], type)
    first_b, again_b = twice(codes[1], type)
    compare = _spelled("lt" if name == "min" else "gt", dtype, False)
    return [*first_a, *first_b, *again_a, *again_b, (compare,), ("select",)]


def _select(codes: Sequence[Code], vector: bool, relaxed: bool) -> Code:
    """`codes` in the order of the stack: if true, if false, condition."""
    # A lane of a mask is all ones or all zeros: both instructions agree, and the relaxed one is a single blend on x86.
    choice = "i32x4.relaxed_laneselect" if relaxed else "v128.bitselect"
    return [*(i for code in codes for i in code), (choice if vector else "select",)]


def _absolute(code: Code, twice: Twice) -> Code:
    first, again = twice(code, "i32")
    return [("i32.const", 0), *first, ("i32.sub",), *again, *again, ("i32.const", 0), ("i32.lt_s",), ("select",)]


def _mask_of_bool() -> Code:
    """0 or 1 to 0 or all ones: x * -1."""
    return [("i32.const", -1), ("i32.mul",)]


def _cast(source: str, target: str, vector: bool, relaxed: bool) -> Code:
    sign = {"i32": "s", "u32": "u"}
    if source == target:
        return []
    match source, target:
        case ("f32", "i32" | "u32") if vector:
            kind = "relaxed_trunc" if relaxed else "trunc_sat"  # the same for every number that the integer can hold
            return [(f"i32x4.{kind}_f32x4_{sign[target]}",)]
        case "f32", "i32" | "u32":
            return [(f"i32.trunc_sat_f32_{sign[target]}",)]
        case "i32" | "u32", "f32":
            return [(f"f32x4.convert_i32x4_{sign[source]}" if vector else f"f32.convert_i32_{sign[source]}",)]
        case "bool", "f32" if vector:
            return [("v128.const", lane_bits(1.0, "f32") * LANES), ("v128.and",)]
        case "bool", "f32":
            return [("f32.convert_i32_u",)]
        case "bool", _ if vector:
            return [("i32x4.neg",)]
        case "f32", "bool":
            zero: Instruction = ("v128.const", bytes(16)) if vector else ("f32.const", bytes(4))
            return [zero, ("f32x4.ne" if vector else "f32.ne",)]
        case _, "bool":
            return [("v128.const", bytes(16)), ("i32x4.ne",)] if vector else [("i32.const", 0), ("i32.ne",)]
    return []  # between i32 and u32, and from a bool that is 0 or 1


def _bitcast(source: str, target: str, vector: bool) -> Code:
    if vector or (source == "f32") == (target == "f32"):
        return []
    return [("i32.reinterpret_f32",)] if source == "f32" else [("f32.reinterpret_i32",)]
