"""The instructions of WebAssembly this target uses: opcode and kind of immediates of each, by its name in the text
form.

Covers the MVP, saturating truncation, 128-bit SIMD, relaxed SIMD and atomics, as far as the printer needs them."""

from __future__ import annotations

from dataclasses import dataclass

# What follows an opcode. "memory" is an alignment and an offset (the natural alignment, log2, is in `alignment`).
NONE, BLOCK, LABEL, LABELS, FUNCTION, LOCAL, MEMORY, LANE = (
    "none", "block", "label", "labels", "function", "local", "memory", "lane",
)  # fmt: skip
I32, I64, F32, V128, SHUFFLE = "i32", "i64", "f32", "v128", "shuffle"


@dataclass(frozen=True, slots=True)
class Opcode:
    """The bytes of an instruction before its immediates, what these are, and the natural alignment (log2) of an
    access."""

    code: bytes
    immediate: str = NONE
    alignment: int = 0


def _leb(value: int) -> bytes:
    """Unsigned LEB128 of an opcode behind a prefix."""
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7])


def _numbered(prefix: bytes, first: int, names: str) -> dict[str, Opcode]:
    """Opcodes without immediates that follow one another; `_` leaves a number out."""
    encode = _leb if prefix else lambda code: bytes([code])
    return {name: Opcode(prefix + encode(first + n)) for n, name in enumerate(names.split()) if name != "_"}


def _access(code: bytes, alignment: int) -> Opcode:
    return Opcode(code, MEMORY, alignment)


_COMPARE_INTEGERS = "eqz eq ne lt_s lt_u gt_s gt_u le_s le_u ge_s ge_u"
_INTEGER_ARITHMETIC = "clz ctz popcnt add sub mul div_s div_u rem_s rem_u and or xor shl shr_s shr_u rotl rotr"
_COMPARE_FLOATS = "eq ne lt gt le ge"
_FLOAT_ARITHMETIC = "abs neg ceil floor trunc nearest sqrt add sub mul div min max copysign"
_SIMD = b"\xfd"
_ATOMIC = b"\xfe"


def _family(shape: str, names: str) -> str:
    return " ".join(name if name == "_" else f"{shape}.{name}" for name in names.split())


OPCODES: dict[str, Opcode] = {
    "unreachable": Opcode(b"\x00"),
    "block": Opcode(b"\x02", BLOCK),
    "loop": Opcode(b"\x03", BLOCK),
    "if": Opcode(b"\x04", BLOCK),
    "else": Opcode(b"\x05"),
    "end": Opcode(b"\x0b"),
    "br": Opcode(b"\x0c", LABEL),
    "br_if": Opcode(b"\x0d", LABEL),
    "br_table": Opcode(b"\x0e", LABELS),
    "return": Opcode(b"\x0f"),
    "call": Opcode(b"\x10", FUNCTION),
    "drop": Opcode(b"\x1a"),
    "select": Opcode(b"\x1b"),
    "local.get": Opcode(b"\x20", LOCAL),
    "local.set": Opcode(b"\x21", LOCAL),
    "local.tee": Opcode(b"\x22", LOCAL),
    "i32.load": _access(b"\x28", 2),
    "f32.load": _access(b"\x2a", 2),
    "i32.load8_u": _access(b"\x2d", 0),
    "i32.store": _access(b"\x36", 2),
    "f32.store": _access(b"\x38", 2),
    "i32.store8": _access(b"\x3a", 0),
    "i32.const": Opcode(b"\x41", I32),
    "i64.const": Opcode(b"\x42", I64),
    "f32.const": Opcode(b"\x43", F32),
    **_numbered(b"", 0x45, _family("i32", _COMPARE_INTEGERS)),
    **_numbered(b"", 0x50, _family("i64", _COMPARE_INTEGERS)),
    **_numbered(b"", 0x5B, _family("f32", _COMPARE_FLOATS)),
    **_numbered(b"", 0x67, _family("i32", _INTEGER_ARITHMETIC)),
    **_numbered(b"", 0x79, _family("i64", _INTEGER_ARITHMETIC)),
    **_numbered(b"", 0x8B, _family("f32", _FLOAT_ARITHMETIC)),
    "i32.wrap_i64": Opcode(b"\xa7"),
    "i64.extend_i32_s": Opcode(b"\xac"),
    "i64.extend_i32_u": Opcode(b"\xad"),
    "f32.convert_i32_s": Opcode(b"\xb2"),
    "f32.convert_i32_u": Opcode(b"\xb3"),
    "i32.reinterpret_f32": Opcode(b"\xbc"),
    "f32.reinterpret_i32": Opcode(b"\xbe"),
    **_numbered(b"\xfc", 0x00, _family("i32", "trunc_sat_f32_s trunc_sat_f32_u")),
    # 128-bit SIMD
    "v128.load": _access(_SIMD + _leb(0), 2),  # a hint only: tensors are aligned to their elements, not to vectors
    "v128.load32_splat": _access(_SIMD + _leb(9), 2),
    "v128.store": _access(_SIMD + _leb(11), 2),
    "v128.const": Opcode(_SIMD + _leb(12), V128),
    "i8x16.shuffle": Opcode(_SIMD + _leb(13), SHUFFLE),
    "i32x4.splat": Opcode(_SIMD + _leb(17)),
    "f32x4.splat": Opcode(_SIMD + _leb(19)),
    "i32x4.extract_lane": Opcode(_SIMD + _leb(27), LANE),
    "i32x4.replace_lane": Opcode(_SIMD + _leb(28), LANE),
    "f32x4.extract_lane": Opcode(_SIMD + _leb(31), LANE),
    "f32x4.replace_lane": Opcode(_SIMD + _leb(32), LANE),
    **_numbered(_SIMD, 55, _family("i32x4", "eq ne lt_s lt_u gt_s gt_u le_s le_u ge_s ge_u")),
    **_numbered(_SIMD, 65, _family("f32x4", _COMPARE_FLOATS)),
    **_numbered(_SIMD, 77, _family("v128", "not and andnot or xor bitselect any_true")),
    "v128.load32_zero": _access(_SIMD + _leb(92), 2),
    "i8x16.narrow_i16x8_s": Opcode(_SIMD + _leb(101)),
    "i16x8.narrow_i32x4_s": Opcode(_SIMD + _leb(133)),
    "i16x8.extend_low_i8x16_u": Opcode(_SIMD + _leb(137)),
    "i32x4.abs": Opcode(_SIMD + _leb(160)),
    "i32x4.neg": Opcode(_SIMD + _leb(161)),
    "i32x4.extend_low_i16x8_u": Opcode(_SIMD + _leb(169)),
    **_numbered(_SIMD, 171, _family("i32x4", "shl shr_s shr_u add _ _ sub _ _ _ mul min_s min_u max_s max_u")),
    **_numbered(_SIMD, 224, _family("f32x4", "abs neg _ sqrt add sub mul div min max pmin pmax")),
    **_numbered(_SIMD, 248, _family("i32x4", "trunc_sat_f32x4_s trunc_sat_f32x4_u")),
    **_numbered(_SIMD, 250, _family("f32x4", "convert_i32x4_s convert_i32x4_u")),
    # relaxed SIMD
    **_numbered(_SIMD, 0x101, _family("i32x4", "relaxed_trunc_f32x4_s relaxed_trunc_f32x4_u")),
    "f32x4.relaxed_madd": Opcode(_SIMD + _leb(0x105)),
    "i32x4.relaxed_laneselect": Opcode(_SIMD + _leb(0x10B)),
    # threads
    "memory.atomic.notify": _access(_ATOMIC + _leb(0x00), 2),
    "memory.atomic.wait32": _access(_ATOMIC + _leb(0x01), 2),
    "i32.atomic.load": _access(_ATOMIC + _leb(0x10), 2),
    "i32.atomic.store": _access(_ATOMIC + _leb(0x17), 2),
    "i32.atomic.rmw.add": _access(_ATOMIC + _leb(0x1E), 2),
}  # fmt: skip
