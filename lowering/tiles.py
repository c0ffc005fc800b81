"""tile: every group becomes a tile kernel, every function a list of launches over buffers.

A group's root op writes its own tile program; operands reach it through readers and results leave it through writers,
so computed operands and epilogues are ordinary pointwise code around it. Equal groups share one kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Kernel, Module, Op, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index, ceil_div
from tinygpt.ir.ops import OPS, ColumnOp, RowOp
from tinygpt.ir.ops.movement import ViewOp
from tinygpt.ir.storage import Strided
from tinygpt.ir.tile import Position, Reader, TileBuilder, Writer, stored_reader, stored_writer, transposed
from tinygpt.ir.types import DTYPE_BYTES, Dim, TensorType
from tinygpt.lowering.passes import Pass, register
from tinygpt.lowering.placement import Place, Placement, Root
from tinygpt.lowering.schedule import Schedule, choose


@register
@dataclass(frozen=True)
class Tile(Pass):
    """Lower groups to tile kernels. Functions become `buffer` and `launch` ops: launches write into buffers."""

    name = "tile"
    level = "tile"

    def run(self, module: Module, caps: Caps) -> Module:
        library = KernelLibrary(caps)
        parameters = {p.value: p.name for p in module.parameters.values()}
        functions = {name: FunctionTiler(f, parameters, library).tiled() for name, f in module.functions.items()}
        return replace(module, functions=functions, kernels=dict(library.kernels))


class KernelLibrary:
    """Kernels by what they compute: equal groups over equally laid out operands are one kernel."""

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self.kernels: dict[str, Kernel] = {}
        self.known: dict[str, str] = {}

    def kernel(self, group: Op, operands: Sequence[Strided], results: Sequence[Strided], aliases: Sequence[int | None], owners: Sequence[int]) -> Kernel:
        """The kernel of a group; `aliases[i]` is the operand that result i overwrites in place, if any, and `owners[i]`
        the result whose buffer it is in."""
        key = signature(group, operands, results, aliases, owners)
        if key not in self.known:
            words = [op.name for op in group.regions[0].ops if OPS[op.name].kind != "view" and op.operands]
            name = f"k{len(self.kernels)}_{root_name(group)}"
            kernel = GroupTiler(name, group, operands, results, aliases, owners, self.caps, " ".join(words)).kernel()
            self.kernels[name] = kernel
            self.known[key] = name
        return self.kernels[self.known[key]]


def root_name(group: Op) -> str:
    """A short name for reading: the root op, or the last pointwise op."""
    ops = group.regions[0].ops
    return next((op.name for op in ops if OPS[op.name].kind not in ("pointwise", "view")), ops[-1].name)


def signature(group: Op, operands: Sequence[Strided], results: Sequence[Strided], aliases: Sequence[int | None], owners: Sequence[int]) -> str:
    """Text that is equal for groups that compute the same thing from operands laid out the same way."""
    region = group.regions[0]
    number = {v: i for i, v in enumerate(region.args)}
    lines = [f"{group.attrs} {operands} {results} {aliases} {owners} {[str(a.type) for a in region.args]}"]
    for op in region.ops:
        lines.append(f"{op.name} {[number[v] for v in op.operands]} {sorted(op.attrs.items(), key=lambda kv: kv[0])} {[str(r.type) for r in op.results]}")
        for r in op.results:
            number[r] = len(number)
    lines.append(str([number[v] for v in region.yields]))
    return "\n".join(lines)


class FunctionTiler:
    """Lowers one function: places values, builds kernels, emits launches, copies where no address will do."""

    def __init__(self, function: Function, parameters: dict[Value, str], library: KernelLibrary) -> None:
        self.function, self.library = function, library
        self.placement = Placement(function, parameters)
        self.parameters = {name: v for v, name in parameters.items()}
        self.ops: list[Op] = []
        self.buffers: dict[Root, Value] = {r: v for v, r in self.placement.roots.items()}

    def tiled(self) -> Function:
        for op in self.function.body.ops:
            if op.name == "group":
                self.launch_group(op)
            elif op.name in ("concat", "pack"):
                self.gather_pieces(op)
        yields = tuple(self.result_buffer(v) for v in self.function.body.yields)
        for name, value in self.function.updates.items():
            state = self.placement.places[self.parameters[name]]
            if self.place_of(value) != state:
                self.copy(value, state)
        body = replace(self.function.body, ops=tuple(self.ops), yields=yields)
        return replace(self.function, body=body, updates={})

    def place_of(self, value: Value) -> Place:
        """The place of a value, after a copy if it is a view that no address expresses."""
        place = self.placement.place(value)
        if place is not None:
            return place
        op = self.placement.made[value]
        (source,) = op.operands
        dense = self.placement.fresh(source)
        self.copy(source, dense)
        definition = OPS[op.name]
        storage = definition.view(dense.storage, dict(op.attrs)) if isinstance(definition, ViewOp) else None
        if storage is None:
            raise CompilerBug(f"{op.name} of a dense tensor has no address")
        self.placement.places[value] = Place(dense.root, storage)
        return self.placement.places[value]

    def gather_pieces(self, op: Op) -> None:
        """Copy the pieces of a concat or pack that were not computed in place; clear the gaps of a pack once."""
        target = self.place_of(op.results[0])
        definition = OPS[op.name]
        wanted = definition.place(target.storage, [v.type for v in op.operands], dict(op.attrs)) if isinstance(definition, ViewOp) else None
        if wanted is None:
            raise CompilerBug(f"{op.name} has no pieces with an address")
        ends = [s.offset + v.type.size for v, s in zip(op.operands, wanted, strict=True)]
        starts = [s.offset for s in wanted[1:]] + [target.storage.offset + op.results[0].type.size]
        for end, start in zip(ends, starts, strict=True):
            if op.name == "pack" and end < start:
                self.clear(target.root, end, start - end)
        for value, storage in zip(op.operands, wanted, strict=True):
            piece = Place(target.root, storage)
            if self.is_constant(value) or self.place_of(value) != piece:
                self.copy(value, piece)

    def clear(self, root: Root, offset: int, count: int) -> None:
        """Launch a kernel that writes zeros into part of a buffer."""
        zero, zeros, result = Value(TensorType("f32", ())), Value(TensorType("f32", (count,))), Value(TensorType("f32", (count,)))
        ops = (
            Op("constant", (), (zero,), {"value": 0.0, "dtype": "f32"}),
            Op("broadcast", (zero,), (zeros,), {"shape": (count,)}),
            Op("copy", (zeros,), (result,)),
        )
        group = Op("group", (), (result,), {"kind": "pointwise"}, (Region((), ops, (result,)),))
        self.launch(group, [], [Place(root, Strided.dense((count,), offset))])

    def is_constant(self, value: Value) -> bool:
        op = self.placement.made.get(value)
        return op is not None and OPS.get(op.name) is not None and (
            not op.operands or (OPS[op.name].kind == "view" and len(op.operands) == 1 and self.is_constant(op.operands[0]))
        )

    def copy(self, value: Value, target: Place) -> None:
        """Launch a kernel that writes a value to a place."""
        if self.is_constant(value):
            op = self.placement.made[value]
            chain = [op]
            while op.operands:
                op = self.placement.made[op.operands[0]]
                chain.insert(0, op)
            args: tuple[Value, ...] = ()
            ops = tuple(chain)
        else:
            args, ops = (Value(value.type),), ()
        source = args[0] if args else value
        result = Value(value.type)
        ops = (*ops, Op("copy", (source,), (result,)))
        group = Op("group", (value,) if args else (), (result,), {"kind": "pointwise"}, (Region(args, ops, (result,)),))
        self.launch(group, [self.place_of(value)] if args else [], [target])

    def launch_group(self, group: Op) -> None:
        self.launch(group, [self.place_of(v) for v in group.operands], [self.place_of(v) for v in group.results])

    def launch(self, group: Op, operands: list[Place], results: list[Place]) -> None:
        aliases: list[int | None] = [next((i for i, p in enumerate(operands) if p == r), None) for r in results]
        reads = [self.binding_start(p) for p in operands]
        writes, owners = self.binding_starts(results, aliases)
        kernel = self.library.kernel(
            group,
            [replace(p.storage, offset=p.storage.offset - start) for p, start in zip(operands, reads, strict=True)],
            [replace(p.storage, offset=p.storage.offset - start) for p, start in zip(results, writes, strict=True)],
            aliases,
            owners,
        )
        own = [i for i, alias in enumerate(aliases) if alias is None and owners[i] == i]
        attrs = {"kernel": kernel.name, "offsets": (*reads, *(writes[i] for i in own))}
        places = operands + [results[i] for i in own]
        self.ops.append(Op("launch", tuple(self.buffer(p.root) for p in places), (), attrs, (), group.loc))

    def binding_start(self, place: Place) -> int:
        """The element of its buffer at which a launch binds a place: its first, or one before it that is aligned."""
        caps = self.library.caps
        aligned = caps.offset_alignment // DTYPE_BYTES[place.root.type.dtype]  # elements
        return place.storage.offset // aligned * aligned if caps.exclusive_pools else place.storage.offset

    def binding_starts(self, results: Sequence[Place], aliases: Sequence[int | None]) -> tuple[list[int], list[int]]:
        """Where a launch binds its results, and for each the first result it shares a binding with: where a device forbids
        writable bindings to overlap, results that lie between each other (the heads of dk and dv) are one buffer."""
        starts, owners = [self.binding_start(p) for p in results], list(range(len(results)))
        if not self.library.caps.exclusive_pools:
            return starts, owners
        ends = [start_and_end(p.storage)[1] for p in results]
        for i, place in enumerate(results):
            for j in range(i):
                near = place.root is results[j].root and starts[i] < ends[j] and starts[j] < ends[i]
                if near and aliases[i] is None and aliases[j] is None:
                    owner = owners[j]
                    owners[i] = owner
                    starts[owner] = min(starts[owner], starts[i])
                    ends[owner] = max(ends[owner], ends[i])
                    break
        return [starts[owner] for owner in owners], owners

    def buffer(self, root: Root) -> Value:
        if root not in self.buffers:
            value = Value(root.type)
            self.ops.append(Op("buffer", (), (value,)))
            self.buffers[root] = value
        return self.buffers[root]

    def result_buffer(self, value: Value) -> Value:
        """The buffer a result is returned in: one of its own, in natural order."""
        place = self.place_of(value)
        own = place.root.value is None and place.storage.is_dense and place.storage.offset == 0 and place.root.type.size == value.type.size
        if not own:
            place = self.placement.fresh(value)
            self.copy(value, place)
        buffer = self.buffer(place.root)
        if buffer.type == value.type:
            return buffer
        shaped = Value(value.type, value.hint)
        self.ops.append(Op("reshape", (buffer,), (shaped,), {"shape": value.type.shape}))
        return shaped


class GroupTiler:
    """Builds the kernel of one group."""

    def __init__(
        self, name: str, group: Op, operands: Sequence[Strided], results: Sequence[Strided],
        aliases: Sequence[int | None], owners: Sequence[int], caps: Caps, of: str,
    ) -> None:  # fmt: skip
        self.group, self.region, self.caps = group, group.regions[0], caps
        self.made = {r: op for op in self.region.ops for r in op.results}
        self.stored = dict(zip(self.region.args, operands, strict=True))
        self.schedule = self.choose_schedule()
        self.k = TileBuilder(name, self.schedule.order, self.schedule.cost, of)
        self.readers: dict[Value, Reader] = {}
        buffers = []
        for i, (arg, storage) in enumerate(zip(self.region.args, operands, strict=True)):
            access = "inout" if i in aliases else "in"
            buffers.append(self.k.buffer(arg.hint or f"x{i}", extent_type(arg.type, storage), access))
            self.readers[arg] = stored_reader(self.k, buffers[i], arg.type, storage)
        self.writers: dict[Value, Writer] = {}
        outputs: dict[int, Value] = {}
        for i, (value, storage, alias, owner) in enumerate(zip(self.region.yields, results, aliases, owners, strict=True)):
            if alias is None and owner == i:
                sharing = [s for s, o in zip(results, owners, strict=True) if o == i]
                longest = max(sharing, key=lambda s: start_and_end(s)[1])
                outputs[i] = self.k.buffer(f"y{i}", extent_type(value.type, longest), "out")
            self.writers[value] = stored_writer(self.k, buffers[alias] if alias is not None else outputs[owner], value.type, storage)

    @property
    def root(self) -> Op | None:
        return next((op for op in self.region.ops if OPS[op.name].kind in ("root", "columns", "rows")), None)

    @property
    def parts(self) -> int:
        """In how many parts the group's column sums are left."""
        return int(self.root.attrs.get("parts", 1)) if self.root is not None and OPS[self.root.name].kind == "columns" else 1

    def choose_schedule(self) -> Schedule:
        root, space = self.root, self.row_space()
        pattern = OPS[root.name].pattern if root else "flat"
        if pattern == "contraction":
            assert root is not None
            inner = root.operands[0].type.shape[-1] // root.attrs.get("parts", 1)
            shape = root.results[0].type.shape
            extents = {"rows": shape[-2], "columns": shape[-1], "inner": inner, "batch": prod(shape[:-2]), "dots": self.dots_of_rows(root)}
        elif pattern == "attention":
            assert root is not None
            shape = root.operands[0].type.shape
            extents = {"rows": shape[2], "columns": shape[3], "batch": shape[0] * shape[1]}
        elif pattern in ("counting", "segments"):
            assert root is not None
            extents = {"rows": root.results[0].type.shape[0], "columns": root.operands[0].type.shape[-1]}
        else:
            extents = {"rows": prod(space[:-1]) // self.parts, "columns": space[-1] if space else 1}
        return choose(pattern, extents, self.caps)

    def dots_of_rows(self, product: Op) -> bool:
        """Whether both operands of a product lie in memory along the contraction, as far as they are stored."""
        return all(self.runs_along(v, axis) for v, axis in zip(product.operands, (-1, -2), strict=False))

    def runs_along(self, value: Value, axis: int) -> bool:
        """Whether neighbours along an axis of a value, or of what it is computed from, are neighbours in memory."""
        if value in self.stored:
            return len(self.stored[value].shape) > 1 and self.stored[value].runs_along(axis)
        return value in self.made and any(self.runs_along(v, axis) for v in self.made[value].operands)

    def row_space(self) -> tuple[int, ...]:
        """The largest shape the group's row programs and pointwise ops run over: rows first, elements of a row last."""
        shapes = [v.type.shape for op in self.region.ops for v in (*op.operands, *op.results) if OPS[op.name].kind in ("rows", "columns")]
        if not shapes:
            shapes = [v.type.shape for v in self.region.yields]
        if self.root is not None and isinstance(definition := OPS[self.root.name], RowOp):
            return definition.space(self.root)
        return max(shapes, key=lambda s: (len(s), prod(s)))

    def kernel(self) -> Kernel:
        kind = OPS[self.root.name].kind if self.root else "pointwise"
        {"root": self.rooted, "columns": self.columns, "rows": self.rows, "pointwise": self.rows}[kind]()
        kernel = self.k.finish()
        return transposed(kernel) if self.schedule.transpose else kernel

    # -- values inside the group
    def reader(self, value: Value) -> Reader:
        """How to read any value of the group by index: from its buffer, or computed from what it is made of."""
        if value not in self.readers:
            self.readers[value] = Reader(value.type, lambda index, rows, cols: self.computed(value, index, rows, cols), lambda *at: self.picked(value, *at))
        return self.readers[value]

    def picked(self, value: Value, rows: Value, cols: Dim) -> Value:
        """Rows, picked by number, of a matrix that is computed from stored ones of its shape and from constants."""
        op = self.made[value]
        operands = [self.reader(v).gather(rows, cols) if v.type.rank else self.computed(v, (), None, None) for v in op.operands]
        return self.k.pointwise(op.name, *operands, **op.attrs)

    def computed(self, value: Value, index: tuple[Position, ...], rows: Dim | None, cols: Dim | None) -> Value:
        op = self.made[value]
        if op.name == "constant":
            return self.k.fill(op.attrs["value"], dtype=op.attrs["dtype"])
        if op.name == "iota":
            position = index[op.attrs["axis"]]
            return self.k.iota(position, 0 if position == rows else 1) if isinstance(position, Dim) else self.k.position(position)
        if OPS[op.name].kind == "view":
            return self.constant_behind(op)
        operands = [self.read_aligned(v, op.results[0].type, index, rows, cols) for v in op.operands]
        return self.k.pointwise(op.name, *operands, **op.attrs)

    def constant_behind(self, op: Op) -> Value:
        while OPS[op.name].kind == "view":
            op = self.made[op.operands[0]]
        if op.name != "constant":
            raise CompilerBug(f"{op.name} is read through a view inside a group")
        return self.k.fill(op.attrs["value"], dtype=op.attrs["dtype"])

    def read_aligned(self, value: Value, result: TensorType, index: tuple[Position, ...], rows: Dim | None, cols: Dim | None) -> Value:
        """Read an operand at an index of the result it broadcasts to."""
        shape = value.type.shape
        own = tuple(Index.of(0) if n == 1 and isinstance(p, Dim) and p.limit != 1 else p for n, p in zip(shape, index[len(index) - len(shape) :], strict=True))
        return self.reader(value)(*own, rows=rows if rows in own else None, cols=cols if cols in own else None)

    # -- products and attention: their own program, pointwise code before and behind
    def rooted(self) -> None:
        root = self.root
        assert root is not None
        after = {root, *(op for op in self.region.ops if self.depends(op, root) or any(r in self.writers for r in op.results))}

        finished: dict[Op, Value] = {}  # which result an op was computed behind

        def writer(result: Value) -> Writer:
            def write(tile: Value, index: tuple[Position, ...], rows: Dim | None, cols: Dim | None) -> None:
                self.readers[result] = Reader(result.type, lambda *_: tile)
                for op in self.region.ops:
                    is_due = op in after and op is not root and finished.get(op, result) is result
                    if is_due and all(v in self.readers or v not in self.made or self.made[v] not in after for v in op.operands):
                        finished[op] = result
                        self.finish_pointwise(op, result.type, index, rows, cols)
                if result in self.writers:
                    self.writers[result](tile, *index, rows=rows, cols=cols)

            return Writer(result.type, write)

        OPS[root.name].tiles(self.k, root, [self.reader(v) for v in root.operands], [writer(r) for r in root.results])

    def depends(self, op: Op, root: Op) -> bool:
        return any(v in root.results or (v in self.made and self.depends(self.made[v], root)) for v in op.operands)

    def finish_pointwise(self, op: Op, type: TensorType, index: tuple[Position, ...], rows: Dim | None, cols: Dim | None) -> None:
        """Compute an epilogue op at the root's index and write it if it leaves the group."""
        value = self.computed(op.result, index, rows, cols)
        self.readers[op.result] = Reader(op.result.type, lambda *_: value)
        if op.result in self.writers:
            self.writers[op.result](value, *index, rows=rows, cols=cols)

    # -- row programs and plain pointwise groups
    def rows(self) -> None:
        space = self.row_space()
        lead: list[Position] = []
        for extent in space[:-2]:
            lead.append(self.k.grid(extent))
        i = None
        if len(space) > 1:
            size = min(self.k.order["rows"], space[-2])
            i = self.k.dim("i", self.k.grid(ceil_div(space[-2], size)) * size, size, space[-2])
            lead.append(i)
        c = self.column_dim(space)
        for op in self.region.ops:
            kind = OPS[op.name].kind
            if kind == "view" or (kind == "pointwise" and (not op.operands or self.is_widening(op))):
                continue
            if isinstance(definition := OPS[op.name], RowOp):
                tiles = definition.rows(self.k, op, lead, i, [self.reader(v) for v in op.operands])
            else:
                index = self.row_index(op.result.type, lead, c, space)
                tiles = [self.computed(op.result, index, i if i in index else None, c if c in index else None)]
            for value, tile in zip(op.results, tiles, strict=True):
                self.readers[value] = self.fixed_reader(value.type, tile)
                if value in self.writers:
                    index = self.row_index(value.type, lead, c, space)
                    self.writers[value](tile, *index, rows=i if i in index else None, cols=c if c in index else None)

    def is_widening(self, op: Op) -> bool:
        """Whether the op only turns what is kept narrow into the number that it stands for: whoever needs it does that
        while reading, at an index of its own."""
        narrow = [v.type.dtype == "f16" if v not in self.made else self.is_widening(self.made[v]) for v in op.operands if v.type.rank]
        return OPS[op.name].kind == "pointwise" and bool(narrow) and all(narrow) and op.result not in self.writers

    def fixed_reader(self, type: TensorType, tile: Value) -> Reader:
        return Reader(type, lambda *_: tile)

    def column_dim(self, space: tuple[int, ...]) -> Dim | None:
        if not space:
            return None
        if self.root is not None or space[-1] <= self.k.order["columns"]:
            return self.k.axis("c", space[-1])
        size = self.k.order["columns"]
        return self.k.dim("c", self.k.grid(ceil_div(space[-1], size)) * size, size, space[-1])

    def row_index(self, type: TensorType, lead: Sequence[Position], c: Dim | None, space: tuple[int, ...]) -> tuple[Position, ...]:
        """The index of a value of the group: over whole rows, over rows only, or broadcast along some of them."""
        full = (*lead, *([c] if c is not None else []))
        if type.shape == space:
            return full
        if type.shape == space[:-1]:
            return tuple(lead)
        padded = full[len(full) - type.rank :]
        return tuple(Index.of(0) if n == 1 else p for n, p in zip(type.shape, padded, strict=True))

    # -- column sums
    def columns(self) -> None:
        root = self.root
        assert root is not None
        rows, columns = root.operands[0].type.shape
        block_rows, block_columns = self.k.order["tile"]
        extent = rows // self.parts
        block_rows = block_rows if extent % block_rows == 0 or self.parts == 1 else extent  # no block lies in two parts
        part = [self.k.grid(self.parts)] if self.parts > 1 else []
        first = sum((p * extent for p in part), Index.of(0))
        j = self.k.dim("j", self.k.grid(ceil_div(columns, block_columns)) * block_columns, block_columns, columns)
        sums = [(op, definition) for op in self.region.ops if isinstance(definition := OPS[op.name], ColumnOp)]

        def body(n: Index, *totals: Value) -> list[Value]:
            i = self.k.dim("i", first + n * block_rows, block_rows, rows)
            found = [definition.column(self.k, op, i, j, [self.reader(v) for v in op.operands]) for op, definition in sums]
            return [self.k.add(t, p) for t, p in zip(totals, found, strict=True)]

        totals = self.k.loop(0, ceil_div(extent, block_rows), [self.k.fill(0.0, None, j) for _ in sums], body)
        for (op, _), total in zip(sums, totals, strict=True):
            self.writers[op.result](total, *part, j, cols=j)


def start_and_end(storage: Strided) -> tuple[int, int]:
    """The first element of a storage, and the one behind its last."""
    last = sum((n - 1) * s for n, s in zip(storage.shape, storage.strides, strict=True)) if prod(storage.shape) else -1
    return storage.offset, storage.offset + last + 1


def extent_type(type: TensorType, storage: Strided) -> TensorType:
    """A buffer just long enough for the storage."""
    return TensorType(type.dtype, (start_and_end(storage)[1],))
