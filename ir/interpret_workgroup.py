"""The interpreter of the loop level for kernels of the gpu strategy: workgroups in numpy, and what their threads may not do.

The threads of many workgroups go through the program together: a number is an array over (workgroup, thread), a vector
has its lanes as a last axis. Some threads may sit out a branch or the last trips of a loop. Every access is checked,
as the program order of one thread says nothing about another's:

- Workgroup memory: between two barriers, no thread touches what another one stores. No piece of it is read before it is
  stored to through the same pointer; it starts as NaN.
- Buffers: no thread touches what another one stores, in the whole launch; barriers order workgroup memory only.
- A barrier and a subgroup operation are reached by all threads of a workgroup or by none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import CodeType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index
from tinygpt.ir.plan import grid_points
from tinygpt.ir.scalar import PRIMITIVES, TRANSCENDENTAL, numpy_primitive
from tinygpt.ir.text import print_op
from tinygpt.ir.types import NUMPY_DTYPES, VectorType

Array = NDArray[Any]

THREADS_AT_ONCE = 8192  # of as many workgroups as that is
_NOBODY, _SEVERAL = -1, -2  # instead of a thread's number
_FOLDS: dict[str, Callable[[Any, Any], Any]] = {"sum": np.add, "max": np.maximum}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def run_workgroups(kernel: Kernel, buffers: Sequence[Array], points: Sequence[int] | None = None) -> None:
    """Run a kernel of the gpu strategy over flat buffers, one per parameter, changed in place.

    `points` are the flattened grid points to run (all of them by default). Raises CompilerBug, naming kernel, op and
    threads, for an access outside memory, a race, a read of what nobody stored, a barrier that some threads miss."""
    if kernel.level != "loop" or "threads" not in kernel.cost:
        raise CompilerBug(f"kernel {kernel.name} is no loop kernel of the gpu strategy")
    for parameter, array in zip(kernel.params, buffers, strict=True):
        if array.ndim != 1 or array.dtype != NUMPY_DTYPES[parameter.type.dtype]:
            raise CompilerBug(f"kernel {kernel.name}: %{parameter.hint} is flat {parameter.type}, not {array.dtype} {array.shape}")
    memories = [_Buffer(array, access) for array, access in zip(buffers, kernel.access, strict=True)]
    chosen = np.arange(grid_points(kernel)) if points is None else np.asarray(points)
    together = max(1, THREADS_AT_ONCE // kernel.cost["threads"])
    with np.errstate(all="ignore"):  # elements outside an axis hold anything
        for first in range(0, len(chosen), together):
            _Workgroups(kernel, memories, chosen[first : first + together]).region(kernel.body)


class _Buffer:
    """A kernel's parameter, and which thread of the launch stored or read each element."""

    def __init__(self, array: Array, access: str) -> None:
        self.array = array
        self.writer = np.full(array.size if access != "in" else 0, _NOBODY, np.int64)
        self.reader = np.full(array.size if access == "inout" else 0, _NOBODY, np.int64)

    def read(self, cells: Array, threads: Array) -> str:
        """Note reads; says what is wrong with them, or nothing."""
        if not self.reader.size:
            return ""
        note_readers(self.reader, cells, threads)
        return "which another thread stores" if other(self.writer[cells], threads) else ""

    def stored(self, cells: Array, threads: Array) -> str:
        """Note stores; says what is wrong with them, or nothing."""
        if not self.writer.size:
            return "a buffer that is only read"
        before = self.writer[cells]
        self.writer[cells] = threads
        if other(before, threads) or other(self.writer[cells], threads):
            return "which another thread stores"
        return "which another thread reads" if self.reader.size and other(self.reader[cells], threads) else ""


class _Shared:
    """The memories of some workgroups for elements of `lanes` numbers, side by side: what each cell holds, through which
    piece it was stored, and who stored or read it since the workgroup's last barrier."""

    def __init__(self, workgroups: int, size: int, lanes: int) -> None:
        self.lanes, self.size = lanes, -(-size // lanes)
        self.array = np.full((workgroups * self.size, lanes), np.nan, np.float32)
        self.piece = np.full(workgroups * self.size, _NOBODY, np.int64)
        self.writer = np.full((workgroups, self.size), _NOBODY, np.int64)
        self.reader = np.full((workgroups, self.size), _NOBODY, np.int64)

    def read(self, cells: Array, threads: Array, piece: int) -> str:
        note_readers(self.reader.reshape(-1), cells, threads)
        if other(self.writer.reshape(-1)[cells], threads):
            return "which another thread stored since the last barrier"
        return "which nobody stored" if (self.piece[cells] != piece).any() else ""

    def stored(self, cells: Array, threads: Array, piece: int) -> str:
        writer = self.writer.reshape(-1)
        before = writer[cells]
        writer[cells] = threads
        self.piece[cells] = piece
        if other(before, threads) or other(writer[cells], threads):
            return "which another thread stored since the last barrier"
        return "which another thread read since the last barrier" if other(self.reader.reshape(-1)[cells], threads) else ""

    def barrier(self, workgroups: Array | slice) -> None:
        self.writer[workgroups] = _NOBODY
        self.reader[workgroups] = _NOBODY


def note_readers(reader: Array, cells: Array, threads: Array) -> None:
    """Enter the threads as readers of the cells; a cell that several read says so."""
    before = reader[cells]
    reader[cells] = threads
    shared = (reader[cells] != threads) | ((before != _NOBODY) & (before != threads))
    reader[cells[shared]] = _SEVERAL


def other(owners: Array, threads: Array) -> bool:
    """Whether a cell's owner is somebody else."""
    return bool(((owners != _NOBODY) & (owners != threads)).any())


class _Workgroups:
    """Some workgroups of one launch, in step."""

    def __init__(self, kernel: Kernel, buffers: Sequence[_Buffer], points: Array) -> None:
        self.kernel = kernel
        self.shape = (len(points), int(kernel.cost["threads"]))
        extents = tuple(kernel.grid.values())
        ids = np.unravel_index(points, extents) if extents else ()
        self.indices: dict[str, Any] = {"thread": np.arange(self.shape[1])[None]}
        self.indices |= {name: i.astype(np.int64)[:, None] for name, i in zip(kernel.grid, ids, strict=True)}
        self.number = points[:, None] * self.shape[1] + self.indices["thread"]  # of a thread in the launch
        self.active = np.full(self.shape, True)
        self.all_active = True
        self.values: dict[Value, Array] = {}
        # A pointer: its memory, how many elements of it there are, how far into it, and a number for its piece.
        self.pointers: dict[Value, tuple[_Buffer | _Shared, int, Any, int]] = {
            p: (b, b.array.size, 0, 0) for p, b in zip(kernel.params, buffers, strict=True)
        }
        pieces = [op for op in kernel.body.walk() if op.name == "shared"]
        sizes: dict[int, int] = {}
        for op in pieces:
            sizes[op.attrs["lanes"]] = max(sizes.get(op.attrs["lanes"], 0), op.attrs["offset"] + op.attrs["size"])
        self.shared = {lanes: _Shared(self.shape[0], size, lanes) for lanes, size in sizes.items()}
        self.pieces = {op: number for number, op in enumerate(pieces)}
        self.rules: dict[str, Callable[[Op], Any]] = {
            "const": self.const, "index": self.index, "lanes": self.lanes, "shared": self.piece, "advance": self.advance, "load": self.load,
            "store": self.store, "splat": self.splat, "extract": self.extract, "join": self.join, "fold": self.fold,
            "subgroup_fold": self.subgroup_fold, "barrier": self.barrier, "for": self.loop, "if": self.branch,
            "bind": self.bind, "note": lambda op: None,
        }  # fmt: skip

    def bug(self, op: Op, message: str) -> CompilerBug:
        return CompilerBug(f"kernel {self.kernel.name}: {message}\n  {print_op(op)}")

    def region(self, region: Region) -> None:
        for op in region.ops:
            value = self.rules.get(op.name, self.primitive)(op)
            if value is not None:
                self.values[op.result] = value

    def at(self, index: Index | int) -> Any:
        """The value of an index expression: a number where it is the same everywhere."""
        return eval(_code(Index.of(index)), {"min": np.minimum, "max": np.maximum}, self.indices)

    # -- values
    def const(self, op: Op) -> Array:
        type = op.result.type
        lanes = (type.lanes,) if isinstance(type, VectorType) else ()
        return np.full(lanes, op.attrs["value"], NUMPY_DTYPES[type.dtype])

    def index(self, op: Op) -> Array:
        return np.asarray(self.at(op.attrs["at"])).astype(np.int32)

    def lanes(self, op: Op) -> Array:
        return np.arange(op.result.type.lanes, dtype=np.int32)

    def splat(self, op: Op) -> Array:
        x = self.values[op.operands[0]]
        return np.broadcast_to(x[..., None], (*x.shape, op.result.type.lanes))

    def extract(self, op: Op) -> Array:
        found: Array = self.values[op.operands[0]][..., op.attrs["lane"]]
        return found

    def join(self, op: Op) -> Array:
        return np.stack(np.broadcast_arrays(*(self.values[v] for v in op.operands)), axis=-1)

    def fold(self, op: Op) -> Array:
        return tree(self.values[op.operands[0]], op.attrs["kind"])

    def subgroup_fold(self, op: Op) -> Array:
        """Threads in runs of `width` combine: each with the one half a run away, then a quarter, and so on."""
        self.whole_workgroups(op)
        width, x = op.attrs["width"], self.values[op.operands[0]]
        type = op.result.type
        lanes = (type.lanes,) if isinstance(type, VectorType) else ()
        runs = np.broadcast_to(x, (*self.shape, *lanes)).reshape(self.shape[0], -1, width, *lanes)
        total = tree(np.moveaxis(runs, 2, -1), op.attrs["kind"])
        return np.repeat(total, width, axis=1)

    def primitive(self, op: Op) -> Array:
        x = [self.values[v] for v in op.operands]
        if op.name == "fma":
            return np.asarray(x[0] * x[1] + x[2])
        if op.name not in PRIMITIVES and op.name not in TRANSCENDENTAL:
            raise self.bug(op, f"{op.name} is no op of a workgroup")
        return np.asarray(numpy_primitive(op.name, x, op.result.type.dtype))

    # -- memory
    def piece(self, op: Op) -> None:
        memory = self.shared[op.attrs["lanes"]]
        self.pointers[op.result] = (memory, op.attrs["size"], op.attrs["offset"], self.pieces[op])

    def advance(self, op: Op) -> None:
        memory, size, start, piece = self.pointers[op.operands[0]]
        by = self.at(op.attrs["by"])
        if len(op.operands) > 1:
            by = by + self.values[op.operands[1]].astype(np.int64) * op.attrs["scale"]
        if isinstance(memory, _Shared):
            raise self.bug(op, "a pointer to workgroup memory moves")
        self.pointers[op.result] = (memory, size, start + by, piece)

    def cells(self, op: Op, lanes: int) -> tuple[Array, Array]:
        """The elements of a buffer, or the cells of workgroup memory, that each thread touches; those of threads that sit
        out are 0. And which threads touch them, in the same shape."""
        memory, size, start, _ = self.pointers[op.operands[0]]
        at = np.broadcast_to(self.at(op.attrs["at"]), self.shape)
        first = at + start if isinstance(memory, _Buffer) else at
        if not self.all_active:
            first = np.where(self.active, first, 0)
        if first.min() < 0 or first.max() + lanes > size:
            raise self.bug(op, f"{op.name} of elements {first.min()}..{first.max() + lanes - 1} of an array of {size}")
        if isinstance(memory, _Buffer):
            if lanes == 1:
                return first, self.number
            return first[..., None] + np.arange(lanes), np.broadcast_to(self.number[..., None], (*self.shape, lanes))
        if lanes != memory.lanes or ((first + start) % memory.lanes).any():
            raise self.bug(op, f"workgroup memory of {memory.lanes} lanes is accessed as a whole")
        return (first + start) // lanes + np.arange(self.shape[0])[:, None] * memory.size, np.broadcast_to(self.indices["thread"], self.shape)

    def touched(self, cells: Array, threads: Array) -> tuple[Array, Array]:
        """The cells that active threads touch, and the threads."""
        if self.all_active:
            return cells.reshape(-1), threads.reshape(-1)
        return cells[self.active].reshape(-1), threads[self.active].reshape(-1)

    def load(self, op: Op) -> Array:
        memory, _, _, piece = self.pointers[op.operands[0]]
        type = op.result.type
        lanes = type.lanes if isinstance(type, VectorType) else 1
        cells, threads = self.cells(op, lanes)
        if isinstance(memory, _Buffer):
            wrong = memory.read(*self.touched(cells, threads))
            found = memory.array[cells]
        else:
            wrong = memory.read(*self.touched(cells, threads), piece)
            found = memory.array[cells] if lanes > 1 else memory.array[cells, 0]
        if wrong:
            raise self.bug(op, f"a thread loads {self.place(op)}, {wrong}")
        return found

    def store(self, op: Op) -> None:
        memory, _, _, piece = self.pointers[op.operands[0]]
        value, type = self.values[op.operands[1]], op.operands[1].type
        lanes = type.lanes if isinstance(type, VectorType) else 1
        cells, threads = self.cells(op, lanes)
        value = np.broadcast_to(value, (*self.shape, lanes) if lanes > 1 else self.shape)
        where, who = self.touched(cells, threads)
        given = value if self.all_active else value[self.active]
        if isinstance(memory, _Buffer):
            wrong = memory.stored(where, who)
            memory.array[where] = given.reshape(-1)
        else:
            wrong = memory.stored(where, who, piece)
            memory.array[where] = given.reshape(-1, lanes)
        if wrong:
            raise self.bug(op, f"a thread stores to {self.place(op)}, {wrong}")

    def place(self, op: Op) -> str:
        return f"an element of %{op.operands[0].hint}"

    # -- control
    def whole_workgroups(self, op: Op) -> Array | slice:
        """The workgroups that reach an op all of whose threads have to."""
        if self.all_active:
            return slice(None)
        reached: Array = np.asarray(self.active.any(axis=1))
        if (reached != self.active.all(axis=1)).any():
            raise self.bug(op, f"only some threads of a workgroup reach a {op.name}")
        return reached

    def barrier(self, op: Op) -> None:
        reached = self.whole_workgroups(op)
        for memory in self.shared.values():
            memory.barrier(reached)

    def within(self, condition: Any, run: Callable[[], None]) -> None:
        """Run something for those of the active threads that a condition holds for."""
        saved = self.active, self.all_active
        self.active = self.active & condition
        self.all_active = bool(self.active.all())
        if self.active.any():
            run()
        self.active, self.all_active = saved

    def branch(self, op: Op) -> None:
        condition = _COMPARE[op.attrs["compare"]](self.at(op.attrs["left"]), self.at(op.attrs["right"]))
        for held, region in zip((condition, ~np.asarray(condition)), op.regions, strict=False):
            self.within(held, partial(self.region, region))

    def bind(self, op: Op) -> None:
        self.indices[op.attrs["var"]] = np.clip(self.values[op.operands[0]].astype(np.int64), op.attrs["lo"], op.attrs["hi"])

    def loop(self, op: Op) -> None:
        """Threads with fewer trips than others sit out the rest, and keep what they carry."""
        (body,) = op.regions
        carried = [self.values[v] for v in op.operands]
        low, step, name = self.at(op.attrs["lo"]), op.attrs["step"], op.attrs["var"]
        trips = np.asarray(-(-(self.at(op.attrs["hi"]) - low) // step))
        for n in range(int(trips.max())):
            self.indices[name] = low + n * step
            self.values.update(zip(body.args, carried, strict=True))
            if n < trips.min():
                self.region(body)
                carried = [self.values[v] for v in body.yields]
                continue
            runs = np.broadcast_to(n < trips, self.shape)
            self.within(runs, lambda: self.region(body))
            carried = [self.chosen(runs, v, before) for v, before in zip(body.yields, carried, strict=True)]
        self.indices.pop(name, None)
        self.values.update(zip(op.results, carried, strict=True))

    def chosen(self, runs: Array, value: Value, before: Array) -> Array:
        """A value where threads run, what it was before elsewhere, and everywhere if no active thread ran."""
        now = self.values.get(value, before)
        return np.where(runs[..., None] if isinstance(value.type, VectorType) else runs, now, before)


def tree(x: Array, kind: str) -> Array:
    """Combine the last axis: element i with element i + half, until one is left."""
    while x.shape[-1] > 1:
        middle = x.shape[-1] // 2
        x = _FOLDS[kind](x[..., :middle], x[..., middle:])
    return x[..., 0]


@lru_cache(maxsize=None)
def _code(index: Index) -> CodeType:
    return compile(str(index), "<index>", "eval")  # an index expression prints as Python
