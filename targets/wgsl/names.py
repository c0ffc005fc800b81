"""Names in generated WGSL: from hints to identifiers that collide with nothing, and unique ones."""

from __future__ import annotations

from tinygpt.targets import naming

# Keywords and reserved words (WGSL, sections 15.1 and 15.2), as far as a hint or an op's name could be one, predeclared
# types and functions that the printer uses, and what it declares itself.
_RESERVED = """
    alias break case const const_assert continue continuing default diagnostic discard else enable false fn for if let
    loop override requires return struct switch true var while
    abstract active as auto await become cast class compile constexpr delete demote do dynamic_cast enum explicit export
    extends extern external fallthrough filter final finally friend from get goto groupshared handle highp impl
    implements import inline instanceof interface layout lowp macro match mediump meta mod module move mut mutable
    namespace new nil noexcept noinline null nullptr of operator package packoffset partition pass patch pixelfragment
    precise precision premerge priv protected pub public readonly ref register regardless require resource restrict self
    set shared sizeof smooth snorm static std subroutine super target template this throw trait try type typedef typeid
    typename typeof union unless unorm unsafe unsized use using varying virtual volatile wgsl where with writeonly yield
    array atomic bool f16 f32 i32 mat2x2 ptr sampler u32 vec2 vec3 vec4 workgroup storage
    abs bitcast exp log max min select sqrt tanh fma workgroupBarrier main thread workgroup_id groups memory memory4 point
    local subgroup subgroup_lanes lane_id subgroupShuffleXor
"""
RESERVED = frozenset(_RESERVED.split())


def identifier(text: str) -> str:
    """`text` as a WGSL identifier: `adam.m` is `adam_m`."""
    return naming.identifier(text, lambda name: name in RESERVED)


class Names(naming.UniqueNames):
    """Hands out identifiers of this language."""

    def __init__(self) -> None:
        super().__init__(identifier)
