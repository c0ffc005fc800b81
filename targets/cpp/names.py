"""Names in generated C++: from hints and user names to identifiers that collide with nothing, and unique ones."""

from __future__ import annotations

import re

from tinygpt.targets import naming

_KEYWORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class co_await
    co_return co_yield compl concept const const_cast consteval constexpr constinit continue decltype default delete do
    double dynamic_cast else enum explicit export extern false final float for friend goto if import inline int long
    module mutable namespace new noexcept not not_eq nullptr operator or or_eq override private protected public
    register reinterpret_cast requires return short signed sizeof static static_assert static_cast struct switch
    template this thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t
    while xor xor_eq
"""
# What the generated files declare themselves, and macros of the system's headers.
_TAKEN = """
    f32 i32 u32 load store splat minimum maximum absolute square_root interleave_lower interleave_upper fold_sum
    fold_max lanes4 lanes8 lanes16 load_bool4 load_bool8 load_bool16 store_bool4 store_bool8 store_bool16
    scratch lo hi kernels entries std main model thread share
    NULL EOF BUFSIZ NAN INFINITY HUGE_VAL errno stdin stdout stderr assert offsetof setjmp signal_stack unix linux
    major minor
"""
RESERVED = frozenset((_KEYWORDS + _TAKEN).split())
_VECTOR_TYPE = re.compile(r"(f32|i32|u32|i8|bool)x\d+")


def identifier(text: str) -> str:
    """`text` as a C++ identifier, no keyword and nothing the generated files use: `blocks.0.w` is `blocks_0_w`."""
    return naming.identifier(text, lambda name: name in RESERVED or _VECTOR_TYPE.fullmatch(name) is not None)


class Names(naming.UniqueNames):
    """Hands out identifiers of this language."""

    def __init__(self) -> None:
        super().__init__(identifier)
