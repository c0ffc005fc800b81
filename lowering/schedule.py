"""Schedules: for each pattern of tile program, the sizes it is built with on a device. Order fields decide the bits.

A schedule is chosen from the pattern and the extents alone, never from the op's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinygpt.ir.caps import Caps
from tinygpt.ir.index import ceil_div

Order = dict[str, Any]
FEW_ROWS = 16
SHORTEST_PART = 128  # terms of a sum that is made in parts
LARGEST_PARTIALS = 512 << 20  # bytes that the parts of all sums may take
LONGEST_CONTRACTION = 2560  # all of K in one trip up to here: accumulators never leave their registers


@dataclass(frozen=True)
class Schedule:
    """`order` fields are part of the result's bits, `cost` fields are not; `transpose` turns the tile program."""

    order: Order
    cost: Mapping[str, Any]
    transpose: bool = False


def even_blocks(extent: int, target: int, multiple: int) -> int:
    """A block size of at most about `target` elements.

    One that divides the extent is best: then no tile is ragged, and every trip count is known when the kernel is
    compiled. Else a multiple of `multiple` that cuts the extent into blocks of nearly equal size."""
    if extent <= target:
        return extent
    for step in (multiple, 4):
        exact = [n for n in range(step, target + 1, step) if extent % n == 0]
        if exact and 2 * exact[-1] >= target:
            return exact[-1]
    blocks = ceil_div(extent, target)
    return min(extent, ceil_div(ceil_div(extent, blocks), multiple) * multiple)


def cpu_contraction(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Rows in a few blocks that threads share evenly, columns in blocks whose packed panels stay in the L2 cache."""
    rows, columns, inner = extents["rows"], extents["columns"], extents["inner"]
    tile_rows, vectors = caps.register_tile
    panel = vectors * caps.lanes
    block_inner = inner if inner <= LONGEST_CONTRACTION else even_blocks(inner, 2048, 16)
    reused = min(block_inner, caps.inner_block or block_inner)
    block_columns = even_blocks(columns, max(panel, 96 * 1024 // reused // panel * panel), panel)
    shares = 8 if rows >= 64 * tile_rows else 4 if rows >= 16 * tile_rows else 2
    block_rows = even_blocks(rows, max(tile_rows, ceil_div(rows, shares)), tile_rows)
    return Schedule({"tile": (block_rows, block_columns, block_inner), "lanes": 16}, {"reg": caps.register_tile})


def cpu_attention(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Square blocks: half of a diagonal block is wasted, and smaller ones cost more in reductions.

    Measured on Zen 4 at contexts 64 and 96, width 32: blocks of 32 take 0.87 of the time of blocks of 64."""
    block = even_blocks(extents["rows"], 32 if extents["rows"] <= 128 else 64, 16)
    return Schedule({"tile": (block, block), "lanes": 16}, {"reg": caps.register_tile})


def cpu_rows(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Blocks of about 8 Ki elements, at least 16 blocks where there are rows enough."""
    rows = max(1, min(8192 // max(1, extents["columns"]), ceil_div(extents["rows"], 16)))
    return Schedule({"rows": rows, "lanes": 16}, {})


def cpu_flat(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Stretches of a flat array, 4096 elements each; small matrices a few rows at a time."""
    rows = max(1, min(8192 // max(1, extents["columns"]), ceil_div(extents["rows"], 16)))
    return Schedule({"rows": rows, "columns": 4096 if extents["rows"] == 1 else extents["columns"], "lanes": 16}, {})


def cpu_columns(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Stripes of 64 columns, all rows in one piece."""
    return Schedule({"tile": (extents["rows"], 64), "lanes": 16}, {})


def cpu_counting(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Whole rows, in blocks that threads share evenly."""
    return Schedule({"tile": (even_blocks(extents["rows"], 64, 1), extents["columns"]), "lanes": 16}, {})


def cpu_segments(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Rows of the result one by one."""
    return Schedule({"tile": (1, extents["columns"]), "lanes": 16}, {})


CPU: dict[str, Callable[[Mapping[str, int], Caps], Schedule]] = {
    "contraction": cpu_contraction, "attention": cpu_attention, "rows": cpu_rows, "flat": cpu_flat, "columns": cpu_columns,
    "counting": cpu_counting, "segments": cpu_segments,
}  # fmt: skip


@dataclass(frozen=True)
class GpuProduct:
    """A schedule of products: a tile of the output, threads, groups of threads that share the contraction, a slice of it; the
    fewest tiles that fill a device, from which contraction on it pays, whether all threads must hold rows and columns in
    fours, so that what it keeps in workgroup memory is no more than 16 KiB, whether it is for dots of rows, where both
    operands lie along the contraction, or for all others (None: for both), and of how many tiles one product of a batch is."""

    tile: tuple[int, int]
    threads: tuple[int, int]
    groups: int
    depth: int
    fewest: int = 0
    shortest: int = 0
    in_fours: bool = False
    dots: bool | None = None
    each: range = range(1 << 31)

    def suits(self, extents: Mapping[str, int]) -> bool:
        """Whether there are enough tiles, and their edges waste little."""
        (height, width), rows, columns = self.tile, extents["rows"], extents["columns"]
        tiles = ceil_div(rows, height) * ceil_div(columns, width)
        enough = tiles * extents["batch"] >= self.fewest and extents["inner"] >= self.shortest
        ragged = self.in_fours and (columns % 4 or rows <= height - self.threads[0])
        return self.dots in (None, extents["dots"]) and tiles in self.each and enough and tiles * height * width <= 1.25 * rows * columns and not ragged


# Large tiles read each operand less often, small ones and groups leave no multiprocessor idle. Measured on an H100 in the
# three forms of a step, from 256 x 256 in eight parts to 4096 x 3072. Each of its 132 multiprocessors holds three workgroups
# of 64 x 64 in two groups, of 160 registers a thread, or four of 64 x 32: 512 of the former are a round and a third, twice
# as many of the latter nearly two, at 384 there is no difference. Parts of sums (gradients of weights) are left as they
# are: they are made beside attention, in workgroups of as many threads.
GPU_PRODUCTS = (
    GpuProduct((128, 64), (16, 8), 1, 16, fewest=128, shortest=512, dots=False),
    GpuProduct((64, 32), (8, 8), 2, 32, each=range(768, 1280)),
    GpuProduct((64, 64), (8, 8), 2, 32, fewest=512, in_fours=True, dots=True),
    GpuProduct((64, 64), (8, 8), 1, 16, fewest=512),
    GpuProduct((64, 64), (8, 8), 2, 32, fewest=256, in_fours=True),
    GpuProduct((64, 32), (8, 8), 2, 32, fewest=100),
    GpuProduct((32, 32), (8, 8), 2, 32, fewest=128),
)
FEW_TILES = GpuProduct((32, 32), (8, 8), 4, 64)


def gpu_contraction(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """The first of the schedules of products that suits. Where groups share the contraction, the slice decides who adds what."""
    found = next((p for p in GPU_PRODUCTS if p.suits(extents)), FEW_TILES)
    order = {"tile": (*found.tile, extents["inner"]), "threads": found.threads, "groups": found.groups, "slice": found.depth}
    return Schedule(order, {})


def gpu_attention(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Blocks of 32 queries (of 32 keys, where a program goes along the keys) against 64 of the others; smaller ones where the
    context is short or heads are wide: probabilities, a slice of the values and partial sums must fit 16 KiB, which are two
    memories where the context is not in fours.

    Measured on an H100 at contexts 64 to 1024 and widths 32 and 64, forward and backward."""
    if extents["rows"] <= 64 and extents["columns"] <= 64:
        return Schedule({"tile": (16, 32), "threads": (8, 8)}, {"slice": 32})
    short = 512 if extents["columns"] <= 32 else 256
    widest = 64 if extents["rows"] % 4 else 96
    if extents["rows"] < short or extents["columns"] > widest:
        depth = 32 if extents["columns"] <= 64 else max(4, min(16, 2048 // extents["columns"] // 4 * 4))
        return Schedule({"tile": (32, 32), "threads": (8, 8)}, {"slice": depth})
    return Schedule({"tile": (32, 64), "threads": (8, 8)}, {"slice": 16})


def gpu_rows(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """As many threads along a row as it has vectors of four, up to 256; workgroups of at least 64 threads."""
    along = threads_along(extents["columns"], 256)
    rows = max(1, 64 // along)
    return Schedule({"rows": rows, "threads": (rows, along)}, {})


def gpu_flat(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Four elements a thread: stretches of 1024, or as many rows as make that."""
    along = threads_along(extents["columns"], 256)
    rows = min(extents["rows"], max(1, 256 // along))
    return Schedule({"rows": rows, "columns": 1024, "threads": (rows, along)}, {})


def gpu_columns(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Stripes of 16 columns, 512 rows at a time: many workgroups, and few trips to workgroup memory. A few rows are added
    up by one thread each four columns."""
    if extents["rows"] <= FEW_ROWS:
        return Schedule({"tile": (extents["rows"], 256), "threads": (1, 64)}, {})
    return Schedule({"tile": (min(extents["rows"], 512), 16), "threads": (32, 4)}, {})


def gpu_counting(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """Whole rows, eight for each thread: what it reads of the columns serves them all."""
    along = threads_along(extents["columns"], 256)
    return Schedule({"tile": (8, extents["columns"]), "threads": (1, along)}, {})


def gpu_segments(extents: Mapping[str, int], caps: Caps) -> Schedule:
    """A row of the result for each workgroup, a thread for each vector of four: most sums have few terms or none."""
    along = min(256, 32 * ceil_div(extents["columns"], 128))
    return Schedule({"tile": (1, extents["columns"]), "threads": (1, along)}, {})


def gpu_parts(inner: int, elements: int) -> int:
    """In how many parts sums of `inner` terms are made, so that they fill a device; `elements` of them are kept together."""
    most = LARGEST_PARTIALS // (4 * elements)
    return max((n for n in (1, 2, 4, 8) if inner % n == 0 and inner >= n * SHORTEST_PART and n <= most), default=1)


def gpu_binds(elements: int, caps: Caps) -> bool:
    """Whether a device binds so many numbers as one buffer."""
    return all(4 * elements <= limit for limit in (caps.binding_bytes, caps.buffer_bytes) if limit)


def threads_along(extent: int, most: int) -> int:
    """A power of two of threads, each with four consecutive elements of a row."""
    return int(min(most, max(8, 1 << (ceil_div(extent, 4) - 1).bit_length())))


GPU: dict[str, Callable[[Mapping[str, int], Caps], Schedule]] = {
    "contraction": gpu_contraction, "attention": gpu_attention, "rows": gpu_rows, "flat": gpu_flat, "columns": gpu_columns,
    "counting": gpu_counting, "segments": gpu_segments,
}  # fmt: skip


def choose(pattern: str, extents: Mapping[str, int], caps: Caps) -> Schedule:
    """The schedule of a pattern with these extents on a device."""
    return {"cpu": CPU, "gpu": GPU}[caps.strategy][pattern](extents, caps)
