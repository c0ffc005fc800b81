"""How a tensor's elements lie in a buffer, and how views of it lie in the same buffer."""

from __future__ import annotations

from dataclasses import dataclass

from tinygpt.ir.types import contiguous_strides


@dataclass(frozen=True)
class Strided:
    """Where a tensor's elements lie in a buffer: element (i, j, …) at offset + i*strides[0] + j*strides[1] + …"""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def dense(shape: tuple[int, ...], offset: int = 0) -> Strided:
        return Strided(offset, shape, contiguous_strides(shape))

    @property
    def is_dense(self) -> bool:
        wanted = contiguous_strides(self.shape)
        return all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, wanted, strict=True))

    def runs_along(self, axis: int) -> bool:
        """Whether neighbours along the axis are neighbours in memory."""
        return self.strides[axis] == 1


def reshape_strides(storage: Strided, shape: tuple[int, ...]) -> Strided | None:
    """The same elements, in order, under another shape, if strides can say so."""
    old = [(n, s) for n, s in zip(storage.shape, storage.strides, strict=True) if n != 1]
    groups: list[list[int]] = []  # runs of axes that lie one after another: [elements, innermost stride]
    for n, s in old:
        if groups and groups[-1][1] == n * s:
            groups[-1] = [groups[-1][0] * n, s]
        else:
            groups.append([n, s])
    strides = [0] * len(shape)
    left = 1
    for axis in reversed(range(len(shape))):
        if shape[axis] == 1:
            continue
        if not groups or groups[-1][0] % (left * shape[axis]):
            return None
        strides[axis] = groups[-1][1] * left
        left *= shape[axis]
        if left == groups[-1][0]:
            groups.pop()
            left = 1
    return Strided(storage.offset, shape, tuple(strides)) if not groups else None
