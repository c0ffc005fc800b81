"""The interpreter of the tile level: a kernel's program in numpy, for every grid point or for sampled ones.

A tile is an array of its full static shape. What lies beyond the end of an axis loads as 0, takes no part in
reductions and dots, and is never stored. Every address is checked, and so is that grid points are independent:
they run in any order on any thread, so none may touch an element that another one stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygpt.ir import scalar
from tinygpt.ir.core import Kernel, Module, Op, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.interpret_loop import run_loop_kernel
from tinygpt.ir.interpret_workgroup import run_workgroups
from tinygpt.ir.ops import OPS, Pointwise
from tinygpt.ir.plan import grid_points
from tinygpt.ir.text import print_op
from tinygpt.ir.tile import IDENTITY, REDUCTIONS
from tinygpt.ir.types import NUMPY_DTYPES, Dim, TensorType

if TYPE_CHECKING:
    from tinygpt.ir.interpret import Evaluator

_NOBODY, _SEVERAL = -1, -2  # owners of an element that are no grid point


def run_kernel(
    kernel: Kernel, buffers: Sequence[np.ndarray], points: Sequence[tuple[int, ...]] | None = None, wide: bool = False
) -> None:
    """Run a tile kernel over flat buffers, one per parameter, which it changes in place.

    `points` are the grid points to run, ids outermost first (all of them by default); `wide` computes in float64.
    Raises CompilerBug, naming kernel, op and address, for an access outside a buffer or between grid points."""
    if kernel.level != "tile":
        raise CompilerBug(f"kernel {kernel.name} is at {kernel.level} level, not at tile level")
    arrays = [_Buffer(array, access) for array, access in zip(buffers, kernel.access, strict=True)]
    run = _Run(kernel, dict(zip(kernel.params, arrays, strict=True)), wide)
    with np.errstate(all="ignore"):  # elements outside an axis hold anything
        for number, point in enumerate(points if points is not None else product(*map(range, kernel.grid.values()))):
            run.point(number, point)


def launch_evaluator(module: Module, wide: bool = False) -> Evaluator:
    """What `interpret.run_region` needs to evaluate the `buffer` and `launch` ops of lowered functions.

    `buffer` makes an array that nobody wrote yet. A launch's operands are its kernel's buffers in order, contiguous
    arrays that it changes in place; each starts at its element of the attribute `offsets`. Kernels at loop level run
    too, in float32."""

    def evaluator(op: Op, operands: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        if op.name == "buffer":
            type = op.result.type
            dtype = np.float64 if wide and type.dtype == "f32" else NUMPY_DTYPES[type.dtype]
            return (unwritten(type.size, dtype).reshape(type.shape),)
        kernel = module.kernels[op.attrs["kernel"]]
        buffers = []
        for x, offset, parameter in zip(operands, op.attrs["offsets"], kernel.params, strict=True):
            end = offset + parameter.type.size if isinstance(parameter.type, TensorType) else x.size
            buffers.append(x.reshape(-1)[offset:end])
        if kernel.level == "tile":
            run_kernel(kernel, buffers, wide=wide)
        elif "threads" in kernel.cost:
            run_workgroups(kernel, buffers)
        else:
            run_loop_kernel(kernel, buffers, 0, grid_points(kernel))
        return ()

    return evaluator


def unwritten(size: int, dtype: Any) -> np.ndarray:
    """An output before anything is stored: NaN, or the most negative number, so that a gap shows."""
    if np.issubdtype(dtype, np.floating):
        return np.full(size, np.nan, dtype)
    return np.full(size, np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else False, dtype)


class _Buffer:
    """A kernel parameter's array, and which grid point stored or read each element."""

    def __init__(self, array: np.ndarray, access: str) -> None:
        if array.ndim != 1:
            raise CompilerBug(f"a kernel's buffers are flat, not {array.shape}")
        self.array = array
        self.writer = np.full(array.size if access != "in" else 0, _NOBODY, np.int64)
        self.reader = np.full(array.size if access == "inout" else 0, _NOBODY, np.int64)

    def note_read(self, addresses: np.ndarray, point: int) -> int | None:
        """An address that another grid point stored, if there is one."""
        if not self.reader.size:
            return None
        before = self.reader[addresses]
        self.reader[addresses] = np.where((before == _NOBODY) | (before == point), point, _SEVERAL)
        return _other(addresses, self.writer[addresses], point)

    def note_store(self, addresses: np.ndarray, point: int) -> int | None:
        """An address that another grid point stored or read, if there is one."""
        before = self.writer[addresses]
        self.writer[addresses] = point
        clash = _other(addresses, before, point)
        if clash is None and self.reader.size:
            clash = _other(addresses, self.reader[addresses], point)
        return clash


def _other(addresses: np.ndarray, owners: np.ndarray, point: int) -> int | None:
    clashes = addresses[(owners != _NOBODY) & (owners != point)]
    return int(clashes.flat[0]) if clashes.size else None


class _Run:
    """One launch of a kernel."""

    def __init__(self, kernel: Kernel, buffers: dict[Value, _Buffer], wide: bool) -> None:
        self.kernel, self.buffers, self.wide = kernel, buffers, wide
        self.number = 0
        self.indices: dict[str, int] = {}
        self.values: dict[Value, np.ndarray] = {}
        self.formulas: dict[Op, scalar.Scalar] = {}
        self.structural: dict[str, Callable[[Op], Any]] = {
            "load": self.load, "gather": self.gather, "store": self.store, "fill": self.fill, "iota": self.iota,
            "position": self.position, "reduce": self.reduce, "dot": self.dot, "for": self.loop,
            "bind": self.bind,
        }  # fmt: skip

    def point(self, number: int, point: tuple[int, ...]) -> None:
        self.number, self.values = number, {}
        self.indices = dict(zip(self.kernel.grid, point, strict=True))
        self.region(self.kernel.body)

    def region(self, region: Region) -> None:
        for op in region.ops:
            rule: Callable[[Op], Any] = self.structural.get(op.name) or self.pointwise
            value = rule(op)
            if op.name != "for" and op.results:
                self.values[op.result] = np.broadcast_to(value, op.result.type.shape)

    def bug(self, op: Op, message: str) -> CompilerBug:
        at = ", ".join(f"{name} = {value}" for name, value in self.indices.items())
        return CompilerBug(f"kernel {self.kernel.name} at {at or 'its only grid point'}: {message}\n  {print_op(op)}")

    def dtype(self, name: str) -> Any:
        return np.float64 if self.wide and name == "f32" else NUMPY_DTYPES[name]

    def live(self, dim: Dim | None) -> int:
        """How many elements of a tile's axis lie inside it."""
        return 1 if dim is None else max(0, min(dim.size, dim.limit - dim.start.evaluate(self.indices)))

    def inside(self, dims: tuple[Dim | None, Dim | None]) -> tuple[slice, slice]:
        return slice(self.live(dims[0])), slice(self.live(dims[1]))

    def along(self, dim: Dim | None, stride: int) -> np.ndarray:
        """Address contributions of the live elements of an axis."""
        start = dim.start.evaluate(self.indices) if dim else 0
        return (start + np.arange(self.live(dim))) * stride

    def checked(self, op: Op, addresses: np.ndarray) -> np.ndarray:
        size = self.buffers[op.operands[0]].array.size
        if addresses.size and (addresses.min() < 0 or addresses.max() >= size):
            first, last = addresses.min(), addresses.max()
            raise self.bug(op, f"{op.name} at addresses {first}..{last} of a buffer of {size} elements")
        return addresses

    def addresses(self, op: Op, dims: tuple[Dim | None, Dim | None]) -> np.ndarray:
        rows, cols = op.attrs["strides"]
        base = op.attrs["base"].evaluate(self.indices)
        return self.checked(op, base + self.along(dims[0], rows)[:, None] + self.along(dims[1], cols))

    def read(self, op: Op, addresses: np.ndarray) -> np.ndarray:
        buffer, type = self.buffers[op.operands[0]], op.result.type
        clash = buffer.note_read(addresses, self.number)
        if clash is not None:
            raise self.bug(op, f"{op.name} of address {clash}, which another grid point stores")
        tile = np.zeros(type.shape, self.dtype(type.dtype))
        tile[self.inside(type.dims)] = buffer.array[addresses]
        return tile

    def load(self, op: Op) -> np.ndarray:
        return self.read(op, self.addresses(op, op.result.type.dims))

    def gather(self, op: Op) -> np.ndarray:
        rows, cols = op.result.type.dims
        picked = self.values[op.operands[1]][: self.live(rows)].astype(np.int64)
        base, (row, col) = op.attrs["base"].evaluate(self.indices), op.attrs["strides"]
        return self.read(op, self.checked(op, base + picked * row + self.along(cols, col)))

    def store(self, op: Op) -> None:
        buffer, value = (op.operands[0], op.operands[1])
        addresses = self.addresses(op, value.type.dims)
        clash = self.buffers[buffer].note_store(addresses, self.number)
        if clash is not None:
            raise self.bug(op, f"store to address {clash}, which another grid point stores or reads")
        self.buffers[buffer].array[addresses] = self.values[value][self.inside(value.type.dims)]

    def fill(self, op: Op) -> np.ndarray:
        return np.asarray(op.attrs["value"], self.dtype(op.result.type.dtype))

    def iota(self, op: Op) -> np.ndarray:
        rows, cols = op.result.type.dims
        dim = rows or cols
        index: np.ndarray = (dim.start.evaluate(self.indices) + np.arange(dim.size)).astype(np.int32)
        return index[:, None] if rows else index

    def position(self, op: Op) -> np.ndarray:
        return np.asarray(op.attrs["at"].evaluate(self.indices), np.int32)

    def pointwise(self, op: Op) -> np.ndarray:
        """As the registered op evaluates, with its formula traced once a launch."""
        if op not in self.formulas:
            definition = OPS.get(op.name)
            if not isinstance(definition, Pointwise):
                raise self.bug(op, f"{op.name} is not an op of the tile level")
            self.formulas[op] = definition.trace([v.type.dtype for v in op.operands], dict(op.attrs))
        return np.asarray(scalar.evaluate(self.formulas[op], [self.values[v] for v in op.operands]), self.dtype(op.result.type.dtype))

    def reduce(self, op: Op) -> np.ndarray:
        kind, axis, x = op.attrs["kind"], op.attrs["axis"], op.operands[0]
        live = self.live(x.type.dims[axis])
        tile = self.values[x]
        if live == 0:
            return np.asarray(IDENTITY[kind], tile.dtype)
        inside = tile[:live] if axis == 0 else tile[:, :live]
        return np.asarray(REDUCTIONS[kind](inside, axis=axis, keepdims=True), tile.dtype)

    def dot(self, op: Op) -> np.ndarray:
        acc, a, b = op.operands
        live = self.live(a.type.cols)
        total: np.ndarray = self.values[acc] + self.values[a][:, :live] @ self.values[b][:live]
        return total

    def bind(self, op: Op) -> None:
        self.indices[op.attrs["var"]] = min(max(int(self.values[op.operands[0]][0, 0]), op.attrs["lo"]), op.attrs["hi"])

    def loop(self, op: Op) -> None:
        (body,) = op.regions
        carried = [self.values[v] for v in op.operands]
        name = op.attrs["var"]
        for index in range(op.attrs["lo"].evaluate(self.indices), op.attrs["hi"].evaluate(self.indices)):
            self.indices[name] = index
            self.values.update(zip(body.args, carried, strict=True))
            self.region(body)
            carried = [self.values[v] for v in body.yields]
        self.indices.pop(name, None)
        self.values.update(zip(op.results, carried, strict=True))
