"""The gpu loop strategy: a tile kernel becomes the program of one workgroup, a grid point each.

Tiles live in registers, spread over the threads as lowering/gpu_values.py says. Only two ops make threads meet, through
workgroup memory (lowering/gpu_memory.py): a `dot`, whose operands are staged in slices of the contraction
(lowering/gpu_dot.py), and a `reduce`, whose partial results are, unless the threads of a row share a subgroup. Here:
the kernel, its limits, its blocks and loops, reductions and stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.index import Index
from tinygpt.ir.plan import grid_points
from tinygpt.ir.tile import IDENTITY, STRUCTURAL
from tinygpt.ir.types import Dim, ScalarType, TensorType, VectorType
from tinygpt.lowering.gpu_dot import DotLowering
from tinygpt.lowering.gpu_memory import Piece
from tinygpt.lowering.gpu_values import Key

COMBINE = {"sum": "add", "max": "max"}
SERIAL_PARTIALS = 16  # partial results a thread adds up itself; of more, groups are added up first
KEPT_ACROSS_LOOP = 8  # registers a value may take that is computed before a loop because the loop reads it


def lower(kernel: Kernel, caps: Caps) -> Kernel:
    """One kernel as the loop-level program of a workgroup. Raises UserError if it does not fit the device."""
    check_limits(kernel, caps)
    return GpuLowering(kernel, caps).lowered()


def check_limits(kernel: Kernel, caps: Caps) -> None:
    """Compare buffers and grid with the profile's limits."""
    if caps.bindings and len(kernel.params) > caps.bindings:
        raise refusal(kernel, f"has {len(kernel.params)} buffers, {caps.name} binds {caps.bindings}", "take a profile with more bindings")
    for buffer in kernel.params:
        size = buffer.type.bytes if isinstance(buffer.type, TensorType) else 0
        if caps.binding_bytes and size > caps.binding_bytes:
            raise refusal(
                kernel, f"buffer {buffer.hint} has {size:,} bytes, a binding of {caps.name} at most {caps.binding_bytes:,}",
                "take a smaller batch, context or model, or a profile with larger bindings",
            )  # fmt: skip
    if caps.grid_limit and grid_points(kernel) > caps.grid_limit**2:
        raise refusal(kernel, f"has {grid_points(kernel):,} workgroups, {caps.name} runs {caps.grid_limit:,} by {caps.grid_limit:,}", "take a smaller model")


def refusal(kernel: Kernel, problem: str, hint: str) -> UserError:
    return UserError(f"kernel {kernel.name} ({kernel.of}) {problem}", hint=hint)


class GpuLowering(DotLowering):
    """Lowers one kernel."""

    def __init__(self, kernel: Kernel, caps: Caps) -> None:
        super().__init__(kernel, caps)
        self.in_place = {v for v, access in zip(kernel.params, kernel.access, strict=True) if access == "inout"}
        self.changed = {v for v, access in zip(kernel.params, kernel.access, strict=True) if access != "in"}

    def lowered(self) -> Kernel:
        threads = self.layout.threads
        if self.caps.workgroup_threads and threads > self.caps.workgroup_threads:
            raise refusal(self.kernel, f"wants {threads} threads, {self.caps.name} has {self.caps.workgroup_threads}", "choose fewer threads in its schedule")
        self.require_one_product()
        self.when(self.edges(), lambda: self.block(self.kernel.body.ops))
        size = 4 * sum(self.most.values())
        if self.caps.workgroup_bytes and size > self.caps.workgroup_bytes:
            raise refusal(
                self.kernel, f"needs {size:,} bytes of workgroup memory, {self.caps.name} has {self.caps.workgroup_bytes:,}",
                "take more, narrower heads, or --set profile=adapter on a device with more of it",
            )  # fmt: skip
        params = tuple(self.buffers[v] for v in self.kernel.params)
        extents = tuple(v.type.size for v in self.kernel.params)
        cost = {**self.kernel.cost, "extents": extents, "threads": threads}
        return replace(self.kernel, body=Region(params, self.b.finish()), grid=self.grid(), cost=cost, level="loop")

    def grid(self) -> dict[str, int]:
        """The grid, its last id fastest. Ids that decide how many trips a loop makes vary slowest: workgroups begin in the
        order of their numbers, tile programs put the longest first, and so the shortest fill the end."""
        bounds = [Index.of(op.attrs[name]) for op in self.kernel.body.walk() if op.name == "for" for name in ("lo", "hi")]
        deciding = {name for bound in bounds for name in bound.variables()}
        return dict(sorted(self.kernel.grid.items(), key=lambda item: item[0] not in deciding))

    def edges(self) -> list[tuple[Index, Index | int]]:
        """Where a thread has elements at all, if the kernel changes a buffer in place, one vector a thread: behind the end
        of an axis addresses are clamped, and a thread would read what another is changing. Threads with several vectors
        are not kept from that; what they read so they do not use."""
        written = [op.operands[1].type for op in self.kernel.body.walk() if op.name == "store" and op.operands[0] in self.in_place]
        meets = any(op.name in ("dot", "reduce") for op in self.kernel.body.walk())
        if meets or not written or any(type != written[0] or len(self.keys(type)) > 1 for type in written):
            return []
        rows, cols = written[0].dims
        places = [(rows, self.layout.row(rows, 0), 1)] if rows else []
        places += [(cols, self.layout.col(cols, 0), self.layout.width(cols))] if cols else []
        return [(at, self.live(dim)) for dim, at, width in places if self.may_be_outside(dim, at, width)]

    def require_one_product(self) -> None:
        """Groups of threads share one product from zero, and what follows it is each thread's own."""
        if self.layout.groups == 1:
            return
        found = [op for op in self.kernel.body.walk() if op.name in ("dot", "reduce", "for")]
        product = found[0] if len(found) == 1 and found[0].name == "dot" else None
        start = self.makers.get(product.operands[0]) if product else None
        from_zero = start is not None and start.name == "fill" and not start.attrs["value"]
        if product is None or not from_zero or any(self.is_placed(v) for v in product.operands[1:]):
            raise CompilerBug(f"{self.kernel.name}: groups of threads share one product of operands in memory; this is another program")

    # -- structure
    def block(self, ops: Sequence[Op]) -> None:
        """Lower ops in order. Free values are computed where they are read, unless the kernel changes what they read.

        Where groups of threads share a product and do not share its rows afterwards, the first goes on alone."""
        for number, op in enumerate(ops):
            match op.name:
                case "dot":
                    self.dot(op, self.next_product(ops[number + 1 :]))
                    if self.layout.groups > 1:
                        self.when([(self.layout.group, 1)], lambda: self.block(ops[number + 1 :]))
                        return
                case "for":
                    self.for_loop(op)
                case "reduce":
                    self.reduce(op)
                case "store":
                    self.store(op)
                case "bind":
                    self.bind(op)
                case "load" | "gather":
                    if op.operands[0] in self.changed and not self.is_long(op.result):
                        self.keep(op.result)
                case _:
                    if op.name not in STRUCTURAL and self.is_placed(op.result) and not self.is_long(op.result):
                        self.keep(op.result)

    def next_product(self, ops: Sequence[Op]) -> Op | None:
        """The product that comes next, if nothing before it changes what it reads."""
        found = next((op for op in ops if op.name in ("dot", "for", "bind", "store")), None)
        return found if found is not None and found.name == "dot" else None

    def keep(self, value: Value) -> None:
        """Compute a thread's elements of a value now."""
        for key in self.keys(value.type):
            self.element(value, key)

    def bind(self, op: Op) -> None:
        """A number from memory as an index variable: every thread reads it for itself."""
        low, high = op.attrs["lo"], op.attrs["hi"]
        index = self.indices[op.attrs["var"]] = self.b.bind(self.element(op.operands[0], (None, None)), low, high)
        self.ranges.update(dict.fromkeys(index.variables(), (low, high)))

    def for_loop(self, op: Op) -> None:
        """A loop of the tile program; what it carries stays in registers."""
        (body,) = op.regions
        self.compute_before(op)
        keys = [self.keys(v.type) for v in op.operands]
        starts = [self.vector(v, key) for v, part in zip(op.operands, keys, strict=True) for key in part]

        def blocks(values: Sequence[Value], owners: Sequence[Value]) -> None:
            flat = iter(values)
            for owner, part in zip(owners, keys, strict=True):
                self.registers[owner] = {key: next(flat) for key in part}

        def trip(n: Index, *carried: Value) -> list[Value]:
            self.indices[op.attrs["var"]] = n
            blocks(carried, body.args)
            self.block(body.ops)
            return [self.vector(v, key) for v, part in zip(body.yields, keys, strict=True) for key in part]

        blocks(self.loop(self.at(op.attrs["lo"]), self.at(op.attrs["hi"]), 1, trip, starts), op.results)

    def compute_before(self, loop: Op) -> None:
        """Compute what a loop reads and does not change before it, where it takes few registers."""
        ops = list(loop.regions[0].walk())
        inside = {r for op in ops for r in op.results} | {a for op in [loop, *ops] for r in op.regions for a in r.args}
        for op in ops:
            for v in op.operands:
                if op.name == "dot" or v in inside or v in self.buffers or self.is_placed(v) or self.makers[v].name in ("fill", "iota", "position"):
                    continue
                if len(self.keys(v.type)) <= KEPT_ACROSS_LOOP:
                    self.keep(v)

    # -- reductions
    def reduce(self, op: Op) -> None:
        """Each thread reduces what it holds; the partial results go through workgroup memory, in a fixed order."""
        rows, cols = op.operands[0].type.dims
        kind = op.attrs["kind"]
        if op.attrs["axis"] == 1:
            partial = self.row_partials(op.operands[0], kind)
            if self.layout.threads_x > 1:
                height = self.layout.padded_rows(rows) if rows else self.layout.threads_y
                at = [self.layout.row(rows, r) if r is not None and rows else self.layout.y for r, _ in partial]
                self.registers[op.result] = dict(zip(partial, self.across_columns(list(partial.values()), at, height, kind), strict=True))
                return
        else:
            partial = self.column_partials(op.operands[0], kind)
            if self.layout.threads_y > 1:
                width = self.layout.width(cols)
                pitch = self.layout.padded_cols(cols) if cols else self.layout.threads_x
                at = [self.layout.col(cols, v) if v is not None and cols else self.layout.x for _, v in partial]
                self.registers[op.result] = dict(zip(partial, self.across_rows(list(partial.values()), at, pitch, width, kind), strict=True))
                return
        self.registers[op.result] = partial

    def combined(self, kind: str, a: Value | None, b: Value) -> Value:
        return b if a is None else self.b.primitive(COMBINE[kind], [a, b])

    def row_partials(self, x: Value, kind: str) -> dict[Key, Value]:
        """For each row of the register block, what the thread's columns give."""
        rows, cols = x.type.dims
        width = self.layout.width(cols)
        own: Sequence[int | None] = range(self.layout.rows(rows)) if rows else [None]

        def masked(r: int | None, v: int | Index) -> Value:
            return self.or_else(self.vector(x, (r, v)), cols, self.layout.col(cols, v), width, IDENTITY[kind])

        if self.is_long(x):
            start = self.b.splat(self.b.const(IDENTITY[kind], ScalarType(x.type.dtype)), width)

            def step(v: Index, *totals: Value) -> list[Value]:
                return [self.combined(kind, t, masked(r, v)) for r, t in zip(own, totals, strict=True)]

            totals = self.loop(0, self.layout.vectors(cols), 1, step, [start for _ in own], stem="v")
            return {(r, None): self.b.fold(t, kind) for r, t in zip(own, totals, strict=True)}
        found: dict[Key, Value] = {}
        for r in own:
            total: Value | None = None
            for v in range(self.layout.vectors(cols)):
                total = self.combined(kind, total, masked(r, v))
            assert total is not None
            found[r, None] = self.b.fold(total, kind)
        return found

    def column_partials(self, x: Value, kind: str) -> dict[Key, Value]:
        """For each vector of columns of the register block, what the thread's rows give."""
        rows, cols = x.type.dims
        found: dict[Key, Value] = {}
        for v in range(self.layout.vectors(cols)) if cols else [None]:
            total: Value | None = None
            for r in range(self.layout.rows(rows)):
                part = self.or_else(self.vector(x, (r, v)), rows, self.layout.row(rows, r), 1, IDENTITY[kind])
                total = self.combined(kind, total, part)
            assert total is not None
            found[None, v] = total
        return found

    def across_columns(self, partial: list[Value], at: list[Index], height: int, kind: str) -> list[Value]:
        """Combine partial results of the threads along x: row n of the workgroup's partials is at `at[n]`.

        Threads that are sure to share a subgroup combine theirs there; what is left goes through workgroup memory."""
        lanes = self.lanes_together()
        if lanes > 1:
            partial = [self.b.subgroup_fold(x, kind, lanes) for x in partial]
        count = self.layout.threads_x // lanes
        if count == 1:
            return partial
        piece = self.piece(height * count, 1, "partial")
        self.will_write(piece)

        def hand_over() -> None:
            for x, row in zip(partial, at, strict=True):
                self.b.store(piece.pointer, x, row * count + self.layout.x // lanes)

        self.when([(self.layout.x % lanes, 1)] if lanes > 1 else [], hand_over)
        self.will_read(piece)
        if count <= SERIAL_PARTIALS or count % SERIAL_PARTIALS:
            totals = [self.serial(piece, row * count, 1, count, 1, kind) for row in at]
            self.release(piece)
            return totals
        groups = count // SERIAL_PARTIALS
        second = self.piece(height * groups, 1, "partial")
        group = self.layout.x % groups
        sums = [self.serial(piece, row * count + group * SERIAL_PARTIALS, 1, SERIAL_PARTIALS, 1, kind) for row in at]
        self.will_write(second)

        def leave() -> None:
            for x, row in zip(sums, at, strict=True):
                self.b.store(second.pointer, x, row * groups + group)

        self.when([(self.layout.x, groups)], leave)
        self.will_read(second)
        totals = [self.serial(second, row * groups, 1, groups, 1, kind) for row in at]
        self.release(piece, second)
        return totals

    def lanes_together(self) -> int:
        """How many neighbours along x are sure to be in one subgroup: a power of two that divides the threads along x."""
        threads = self.layout.threads_x
        return max(1, min(threads & -threads, self.caps.subgroup))

    def across_rows(self, partial: list[Value], at: list[Index], pitch: int, width: int, kind: str) -> list[Value]:
        """Combine partial results of the threads along y; each is `width` columns from `at[n]` on."""
        count = self.layout.threads_y
        piece = self.piece(count * pitch, width, "partial")
        self.will_write(piece)
        for x, col in zip(partial, at, strict=True):
            self.b.store(piece.pointer, self.b.splat(x, width), self.layout.y * pitch + col)
        self.will_read(piece)
        totals = [self.serial(piece, col, pitch, count, width, kind) for col in at]
        self.release(piece)
        return totals

    def serial(self, piece: Piece, first: Index, step: int, count: int, lanes: int, kind: str) -> Value:
        """The combination of `count` values in workgroup memory, one after another."""

        def part(total: Value | None, at: Index, values: int) -> Value:
            for n in range(values):
                total = self.combined(kind, total, self.b.load(piece.pointer, at + n * step, lanes))
            assert total is not None
            return total

        if count <= SERIAL_PARTIALS:
            return part(None, first, count)
        start = part(None, first, SERIAL_PARTIALS)
        rest = (count - SERIAL_PARTIALS) // SERIAL_PARTIALS * SERIAL_PARTIALS + SERIAL_PARTIALS
        (total,) = self.loop(SERIAL_PARTIALS, rest, SERIAL_PARTIALS, lambda n, t: [part(t, first + n * step, SERIAL_PARTIALS)], [start], stem="p")
        return part(total, first + rest * step, count - rest)

    # -- stores
    def store(self, op: Op) -> None:
        """Write a tile: each element by one of the threads that hold it, and only inside the axes."""
        value = op.operands[1]
        rows, cols = value.type.dims
        own: Sequence[int | None] = range(self.layout.rows(rows)) if rows else [None]
        owners = [] if rows or self.layout.threads_y == 1 else [(self.layout.y, Index.of(1))]
        owners += [] if cols or self.layout.threads_x == 1 else [(self.layout.x, Index.of(1))]
        if self.is_long(value):

            def columns(v: Index) -> None:
                for r in own:
                    self.store_elements(op, (r, v), owners)

            self.loop(0, self.layout.vectors(cols), 1, columns, stem="v")
            return
        keys = self.keys(value.type)
        for key in keys:  # all before the first store, which may change what they read
            self.vector(value, key)
        for key in keys:
            self.store_elements(op, key, owners)

    def store_elements(self, op: Op, key: Key, owners: Sequence[tuple[Index, Index]]) -> None:
        buffer, value = op.operands
        x = self.vector(value, key)
        conditions = list(owners)
        address = self.at(op.attrs["base"])
        lanes = x.type.lanes if isinstance(x.type, VectorType) else 1
        step = op.attrs["strides"][1]
        local: list[tuple[Dim | None, Index, int]] = [
            (value.type.rows, self.layout.row(value.type.rows, key[0]) if key[0] is not None else Index.of(0), 1),
            (value.type.cols, self.layout.col(value.type.cols, key[1]) if key[1] is not None else Index.of(0), lanes),
        ]
        for (dim, at, width), stride in zip(local, op.attrs["strides"], strict=True):
            if dim is None:
                continue
            address = address + (self.at(dim.start) + at) * stride
            if self.may_be_outside(dim, at, width):
                conditions.append((at, self.live(dim)))

        def write() -> None:
            if lanes == 1 or step == 1:
                self.b.store(self.buffers[buffer], x, address)
                return
            for n in range(lanes):
                self.b.store(self.buffers[buffer], self.b.extract(x, n), address + n * step)

        self.when(conditions, write)
