"""Types of the IR: element types, tensors (graph level), tiles over named dimensions (tile level) and scalars,
vectors and pointers (loop level). What a value *means* is in the ops; here is only its shape."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from tinygpt.ir.index import Index

NUMPY_DTYPES: dict[str, type] = {
    "f32": np.float32, "f64": np.float64, "f16": np.float16,
    "i32": np.int32, "u32": np.uint32, "bool": np.bool_,
}  # fmt: skip
FLOATS = ("f32", "f64", "f16")
DTYPE_BYTES = {"f32": 4, "f64": 8, "f16": 2, "i32": 4, "u32": 4, "bool": 1}


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dense tensor, row-major unless a storage says otherwise. Prints as `f32[16, 32]`; a scalar is `f32[]`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * DTYPE_BYTES[self.dtype]

    @property
    def strides(self) -> tuple[int, ...]:
        """Row-major strides in elements."""
        return contiguous_strides(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Dim:
    """One axis of a tile: `size` elements from `start` on, of an axis that ends at `limit`.

    Dims are compared by name; a kernel declares each name once. `live` elements of the tile are inside the axis."""

    name: str
    start: Index
    size: int
    limit: int

    @property
    def exact(self) -> bool:
        """Whether every tile along this axis is full, whatever the grid point: no edge code is needed."""
        return self.limit % self.size == 0 and self.start.divisible_by(self.size)

    @property
    def live(self) -> Index:
        """How many elements of the tile lie inside the axis."""
        if self.exact:
            return Index.of(self.size)
        return Index.minimum(Index.of(self.size), Index.of(self.limit) - self.start)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class TileType:
    """A tile of at most two axes; None is an axis of extent one. Prints as `f32<i, k>` or `f32<i, _>`."""

    dtype: str
    rows: Dim | None
    cols: Dim | None

    @property
    def dims(self) -> tuple[Dim | None, Dim | None]:
        return (self.rows, self.cols)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows.size if self.rows else 1, self.cols.size if self.cols else 1)

    def __str__(self) -> str:
        return f"{self.dtype}<{self.rows or '_'}, {self.cols or '_'}>"


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A number in a register (loop level), prints as `f32`."""

    dtype: str

    def __str__(self) -> str:
        return self.dtype


@dataclass(frozen=True, slots=True)
class VectorType:
    """`lanes` numbers in a vector register (loop level), prints as `f32x16`."""

    dtype: str
    lanes: int

    def __str__(self) -> str:
        return f"{self.dtype}x{self.lanes}"


@dataclass(frozen=True, slots=True)
class PointerType:
    """The address of elements of one type in one memory space (loop level), prints as `ptr<f32, scratch>`.

    Spaces: `buffer` (a kernel parameter), `scratch` (private to a thread), `shared` (one workgroup's)."""

    dtype: str
    space: str

    def __str__(self) -> str:
        return f"ptr<{self.dtype}, {self.space}>"


Type = TensorType | TileType | ScalarType | VectorType | PointerType


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements, of a dense tensor of this shape."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
