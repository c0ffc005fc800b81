"""The cpu loop strategy: a tile kernel becomes vector loops for one profile (C++ and WebAssembly).

A block of tile ops is cut at its dots and loops. A `dot` is a register-blocked nest (lowering/cpu_dot.py); what lies
between is a segment, in which pointwise chains and reductions fuse into loops over rows and vectors of columns
(lowering/cpu_segment.py). Values that cross from one to the next live in the thread's scratch memory
(lowering/cpu_values.py). Here: the blocks, the loops and the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.index import Index
from tinygpt.lowering.cpu_dot import DotLowering
from tinygpt.lowering.cpu_values import Stored


def lower(kernel: Kernel, caps: Caps) -> Kernel:
    """One kernel as a loop-level kernel over flattened grid points lo..hi."""
    return CpuLowering(kernel, caps).lowered()


class CpuLowering(DotLowering):
    """Lowers one kernel: its grid, blocks and loops."""

    def lowered(self) -> Kernel:
        """Loops over the grid: all axes but the last outside, where panels that do not vary along the last are packed."""
        names = list(self.kernel.grid)
        last = names[-1] if names and self.kernel.grid[names[-1]] > 1 else ""
        extent = self.kernel.grid[last] if last else 1
        steady = [op for op in self.kernel.body.ops if last and self.is_panel(op) and self.varies(op) <= set(names) - {last}]
        low, high = Index.variable("lo"), Index.variable("hi")

        def outer(o: Index) -> None:
            rest = o
            for name in reversed(names[:-1] if last else names):
                self.indices[name] = rest % self.kernel.grid[name]
                rest = rest // self.kernel.grid[name]
            for op in steady:
                self.pack(op)
            if last:
                self.b.loop(Index.maximum(0, low - o * extent), Index.minimum(extent, high - o * extent), 1, point, stem="g")
            else:
                self.block(self.kernel.body.ops)

        def point(g: Index) -> None:
            self.indices[last] = g
            self.block([op for op in self.kernel.body.ops if op not in steady])

        self.b.loop(low // extent, (high + (extent - 1)) // extent, 1, outer, stem="o")
        params = tuple(self.buffers[v] for v in self.kernel.params)
        extents = tuple(v.type.size for v in self.kernel.params)
        return replace(self.kernel, body=Region(params, self.b.finish()), cost={**self.kernel.cost, "extents": extents}, level="loop")

    # -- facts
    def is_panel(self, op: Op) -> bool:
        """Whether a load is packed or copied for a product."""
        return op.name == "load" and (self.is_operand(op.result, 2) or self.is_moved(op))

    def varies(self, op: Op) -> frozenset[str]:
        """The grid ids and loop variables a load's address depends on."""
        base: Index = op.attrs["base"]
        names = base.variables()
        for dim in op.results[0].type.dims:
            names |= dim.start.variables() if dim else frozenset()
        return names

    # -- blocks
    def block(self, ops: Sequence[Op], wanted: dict[Value, Stored] | None = None) -> None:
        """Lower ops in order: runs of pointwise ops and reductions as segments, dots and loops one by one."""
        if wanted:
            self.want(ops, wanted)
        pending: list[Op] = []
        axis: int | None = None
        i = 0
        while i < len(ops):
            op = ops[i]
            if op.name == "dot":
                self.segment(pending)
                pending, axis = [], None
                epilogue = self.epilogue_of(op, ops[i + 1 :])
                self.dot(op, epilogue)
                i += len(epilogue)
            elif op.name in ("for", "bind"):
                self.segment(pending)
                pending, axis = [], None
                (self.for_loop if op.name == "for" else self.bind)(op)
            elif self.is_panel(op):
                self.pack(op)
            else:
                if op.name == "reduce":
                    if axis is not None and axis != op.attrs["axis"]:
                        self.segment(pending)
                        pending = []
                    axis = op.attrs["axis"]
                pending.append(op)
            i += 1
        self.segment(pending)

    def want(self, ops: Sequence[Op], wanted: dict[Value, Stored]) -> None:
        """Note where results should be computed to; a dot passes the wish on to its accumulator."""
        self.wanted.update(wanted)
        for op in reversed(ops):
            if op.name == "dot" and op.result in self.wanted and not self.is_lazy(op.operands[0]):
                self.wanted.setdefault(op.operands[0], self.wanted[op.result])

    def epilogue_of(self, dot: Op, rest: Sequence[Op]) -> list[Op]:
        """The pointwise ops and stores behind a dot that can run on each register block as it is finished."""
        segment: list[Op] = []
        if self.start_value(dot.operands[0]) is None:
            return []
        for op in rest:
            if op.name in ("dot", "for", "reduce", "bind") or self.is_panel(op):
                break
            segment.append(op)
        inside = set(segment)
        readers = self.readers.get(dot.result, [])
        leaves = any(u not in inside for op in segment for r in op.results for u in self.readers.get(r, []) if not self.is_lazy(r))
        turned = any(op.name == "store" and op.operands[1].type.cols is not None and op.attrs["strides"][1] != 1 for op in segment)
        turned = turned or any(self.is_turned(v) for op in segment for v in op.operands)
        stores = [op for op in segment if op.name == "store"]
        same = all(op.operands[1].type.dims == dot.result.type.dims for op in stores)
        if dot.result in self.wanted or leaves or turned or not stores or not same or any(u not in inside for u in readers):
            return []
        return segment

    # -- loops
    def bind(self, op: Op) -> None:
        """A number from memory as an index variable."""
        self.indices[op.attrs["var"]] = self.b.bind(self.number(op.operands[0]), op.attrs["lo"], op.attrs["hi"])

    def for_loop(self, op: Op) -> None:
        """A loop with carried tiles: each lives in scratch, and its next value is computed over it where that is safe."""
        (body,) = op.regions
        homes = []
        for param, start in zip(body.args, op.operands, strict=True):
            home = self.stored.get(start)
            if home is None or self.readers.get(start, []) != [op] or not self.is_result_of_loop(start):
                home = self.new_storage(param.type, "carried")
                self.copies([(start, home)])
            homes.append(home)
            self.stored[param] = home
        positions = self.positions(body)
        wanted, late = {}, []
        for param, result, home in zip(body.args, body.yields, homes, strict=True):
            first = result
            while first in self.makers and self.makers[first].name == "dot" and self.makers[first].operands[0] is not param:
                first = self.makers[first].operands[0]
            maker = self.makers.get(first)
            readers = [u for u in self.readers.get(param, []) if u in positions]
            if maker in positions and result is not param and all(positions[u] <= positions[maker] for u in readers) and result not in wanted:
                wanted[result] = home
            else:
                late.append((result, home))

        def trip(n: Index) -> None:
            self.indices[op.attrs["var"]] = n
            self.block(body.ops, wanted)
            self.copies([(result, home) for result, home in late if self.stored.get(result) != home])

        self.b.loop(self.at(op.attrs["lo"]), self.at(op.attrs["hi"]), 1, trip, stem="n")
        self.stored.update(zip(op.results, homes, strict=True))

    def is_result_of_loop(self, value: Value) -> bool:
        return self.makers[value].name == "for"

    def positions(self, body: Region) -> dict[Op, int]:
        """In which segment, dot or loop of the body each op runs."""
        found, at = {}, 0
        axis: int | None = None
        for op in body.ops:
            if op.name in ("dot", "for", "bind"):
                at, axis = at + 1, None
                found[op] = at
                at += 1
                continue
            if op.name == "reduce":
                if axis is not None and axis != op.attrs["axis"]:
                    at += 1
                axis = op.attrs["axis"]
            found[op] = at
        return found


