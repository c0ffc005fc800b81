"""Values in the cpu strategy: the state of lowering one kernel, what tile-level indices are called at the loop level, which
values are recomputed where they are read, and where the others lie in the thread's scratch memory."""

from __future__ import annotations

from dataclasses import dataclass

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Value, uses
from tinygpt.ir.index import Index
from tinygpt.ir.loop import LoopBuilder
from tinygpt.ir.tile import STRUCTURAL
from tinygpt.ir.types import Dim, PointerType, TileType

LAZY = ("load", "gather", "fill", "iota", "position")


@dataclass(frozen=True)
class Stored:
    """A tile value in memory: element (r, c) of the tile at pointer + (r - first_row)*rows + (c - first_col)*cols."""

    pointer: Value
    rows: int
    cols: int
    first_row: Index = Index.of(0)
    first_col: Index = Index.of(0)


class CpuValues:
    """The state of lowering one kernel: the builder, where values are, and what tile-level indices are called here."""

    def __init__(self, kernel: Kernel, caps: Caps) -> None:
        self.kernel, self.caps = kernel, caps
        self.lanes = caps.lanes
        self.logical_lanes = kernel.order.get("lanes", caps.lanes)
        self.b = LoopBuilder()
        self.indices: dict[str, Index] = {}
        self.stored: dict[Value, Stored] = {}
        self.panels: dict[Value, Value] = {}
        self.row_panels: dict[Value, Value] = {}
        self.copied: dict[Value, Stored] = {}
        self.wanted: dict[Value, Stored] = {}
        self.blocks: set[Value] = set()
        self.readers = uses(kernel.body)
        self.makers = {r: op for op in kernel.body.walk() for r in op.results}
        self.buffers = {v: Value(PointerType(v.type.dtype, "buffer"), v.hint) for v in kernel.params}

    # -- facts
    def at(self, index: Index | int) -> Index:
        """A tile-level index expression in terms of the loop level's variables."""
        return Index.of(index).substitute(self.indices)

    def live(self, dim: Dim | None) -> Index:
        """How many elements of an axis are inside it, at this grid point."""
        return Index.of(1) if dim is None else self.at(dim.live)

    def is_lazy(self, value: Value) -> bool:
        """Whether a value is recomputed where it is read: loads, fills, indices, and pointwise ops of the latter."""
        op = self.makers.get(value)
        if op is None:
            return False
        if op.name in LAZY:
            return True
        return op.name not in STRUCTURAL and all(self.makers.get(v) is not None and self.makers[v].name in LAZY[2:] for v in op.operands)

    # -- storage
    def padded_columns(self, dim: Dim | None) -> int:
        panel = self.caps.register_tile[1] * self.lanes
        return -(-dim.size // panel) * panel if dim else 1

    def new_storage(self, type: TileType, hint: str = "tile") -> Stored:
        """Scratch for a tile; rows are padded to whole panels so that vector code may run over their ends."""
        rows, cols = type.dims
        width = self.padded_columns(cols)
        height = rows.size if rows else 1
        pointer = self.b.scratch(height * width, "f32" if type.dtype == "bool" else type.dtype, hint)
        if cols is None:
            return Stored(pointer, 1 if rows else 0, 0)
        return Stored(pointer, width if rows else 0, 1)

    def block_storage(self, pointer: Value, pitch: int, row: Index, col: Index) -> Stored:
        """A finished register block, as the part of its tile that it is."""
        return Stored(pointer, pitch, 1, row, col)
