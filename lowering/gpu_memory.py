"""Workgroup memory and control flow of the gpu strategy: pieces of memory, the hazards between threads, loops.

A piece is taken by the op that needs it and given back when it is done. A barrier is placed where a piece would be read
before others have written it, or written over before they have read it; every bound of a loop with a barrier comes from grid
ids (the verifier wants it so), and all threads meet the same barriers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Value
from tinygpt.ir.index import Index
from tinygpt.lowering.gpu_values import WIDTH, ValueLowering


@dataclass(frozen=True)
class Piece:
    """Part of the workgroup's memory, in elements. Pieces of different lanes lie in different memories."""

    pointer: Value
    lanes: int
    start: int
    end: int

    def overlaps(self, other: Piece) -> bool:
        return self.lanes == other.lanes and self.start < other.end and other.start < self.end


class WorkgroupLowering(ValueLowering):
    """Places barriers, and keeps what is known inside loops and branches there."""

    def __init__(self, kernel: Kernel, caps: Caps) -> None:
        super().__init__(kernel, caps)
        self.used = {1: 0, WIDTH: 0}  # elements of workgroup memory in use, by lanes
        self.most = {1: 0, WIDTH: 0}
        self.written: list[Piece] = []  # since the last barrier
        self.read: list[Piece] = []
        self.touches = 0  # how often workgroup memory was touched so far
        self.all_dirty = False  # whether any piece may have been touched since the last barrier

    # -- control flow
    def loop(
        self, low: Index | int, high: Index | int, step: int, body: Callable[..., Sequence[Value] | None], carried: Sequence[Value] = (), stem: str = "n"
    ) -> list[Value]:
        """A loop of the builder. The range of its variable is noted, and what it computes is forgotten behind it.

        When a trip begins, any workgroup memory may have been touched since the last barrier: by the trip before. When
        the loop ends, or has no trip at all, what was touched before it counts too."""
        low, high = Index.of(low), Index.of(high)
        before = (self.written, self.read, self.all_dirty)
        touches = self.touches

        def scoped(n: Index, *args: Value) -> Sequence[Value] | None:
            if n != low:
                (name,) = n.variables()
                self.ranges[name] = (low.bounds(self.ranges)[0], max(low.bounds(self.ranges)[0], high.bounds(self.ranges)[1] - 1))
                self.written, self.read, self.all_dirty = [], [], True
            self.scopes.append({})
            yields = body(n, *args)
            self.scopes.pop()
            return yields

        results = self.b.loop(low, high, step, scoped, carried, stem=stem)
        written, read, dirty = before
        if self.touches == touches:
            self.written, self.read, self.all_dirty = before
        else:
            self.written, self.read, self.all_dirty = written + self.written, read + self.read, dirty or self.all_dirty
        return results

    def when(self, conditions: Sequence[tuple[Index, Index | int]], body: Callable[[], None]) -> None:
        """body, where each left side is less than its right side."""
        if not conditions:
            body()
            return
        (left, right), *rest = conditions
        self.scopes.append({})
        self.b.when(left, "lt", right, lambda: self.when(rest, body))
        self.scopes.pop()

    # -- workgroup memory
    def piece(self, size: int, lanes: int, hint: str) -> Piece:
        """A new piece, of `size` elements; it is given back by `release`."""
        start = self.used[lanes]
        self.used[lanes] = start + -(-size // WIDTH) * WIDTH
        self.most[lanes] = max(self.most[lanes], self.used[lanes])
        return Piece(self.b.shared(start, size, lanes, hint), lanes, start, start + size)

    def release(self, *pieces: Piece) -> None:
        for piece in pieces:
            self.used[piece.lanes] = min(self.used[piece.lanes], piece.start)

    def will_write(self, *pieces: Piece) -> None:
        """Place a barrier if others may still read or write the pieces' memory."""
        if self.all_dirty or any(p.overlaps(q) for p in pieces for q in (*self.written, *self.read)):
            self.barrier()
        self.touches += 1
        self.written = [*self.written, *pieces]

    def will_read(self, *pieces: Piece) -> None:
        """Place a barrier if others may not have written the pieces' memory yet."""
        if self.all_dirty or any(p.overlaps(q) for p in pieces for q in self.written):
            self.barrier()
        self.touches += 1
        self.read = [*self.read, *pieces]

    def barrier(self) -> None:
        self.b.barrier()
        self.written, self.read, self.all_dirty = [], [], False
