"""The plan as text: pools, and for each function its buffers (place, size, when they live) and launches."""

from __future__ import annotations

from collections.abc import Iterator

from tinygpt.ir.plan import Buffer, Entry, Plan, grid_points

STATE = "state"  # the pool of what lives from step to step; all others are work memory


def plan_listing(plan: Plan, function: str | None = None) -> str:
    """All of a plan, or one of its functions."""
    lines = [f"pool {name}: {size:,} bytes" for name, size in plan.pools.items()]
    lines.append(memory_line(plan))
    if function is None:
        lines += ["", f"parameters ({len(plan.parameters)}):"]
        lines += [f"  {_place(buffer)}  {buffer.type!s:16} {name}" for name, (_, buffer) in plan.parameters.items()]
    for name, entry in plan.entries.items():
        if function in (None, name):
            lines += ["", *_entry(plan, entry)]
    return "\n".join(lines) + "\n"


def memory_line(plan: Plan) -> str:
    """Transient memory with and without reuse, in one line."""
    work = sum(size for name, size in plan.pools.items() if name != STATE)
    times = f" ({plan.work_without_reuse / work:.1f} times as much)" if work else ""
    without = f"without reuse {plan.work_without_reuse:,}{times}"
    return f"work memory: {work:,} bytes; live at the peak {plan.work_live:,}; {without}"


def _entry(plan: Plan, entry: Entry) -> Iterator[str]:
    barriers = sum(launch.barrier for launch in entry.launches)
    yield f"{entry.name}: {len(entry.launches)} launches, {barriers} barriers"
    for what, slots in (("input", entry.inputs), ("output", entry.outputs)):
        for name, buffer in slots:
            yield f"  {what:6} {_place(buffer)}  {buffer.type!s:16} {name}"
    for (pool, offset, end), (first, last) in _lives(entry).items():
        yield f"  buffer {pool:>5} {offset:>12,} + {end - offset:<12,} live {first}..{last}"
    for number, launch in enumerate(entry.launches):
        if launch.barrier:
            yield "  ---- barrier"
        kernel = plan.kernels[launch.kernel]
        places = " ".join(
            f"{access}:{b.pool}+{b.offset}" for b, access in zip(launch.buffers, kernel.access, strict=True)
        )
        yield f"  {number:4} {launch.kernel:28} x {grid_points(kernel):<5} {places}" + (
            f"    {launch.of}" if launch.of else ""
        )


def _lives(entry: Entry) -> dict[tuple[str, int, int], tuple[int, int]]:
    """First and last launch that touches each piece of work memory, in order of first use."""
    lives: dict[tuple[str, int, int], tuple[int, int]] = {}
    for number, launch in enumerate(entry.launches):
        for buffer in launch.buffers:
            if buffer.pool != STATE:
                key = (buffer.pool, buffer.offset, buffer.end)
                lives[key] = (lives.get(key, (number, 0))[0], number)
    return lives


def _place(buffer: Buffer) -> str:
    return f"{buffer.pool:>5} {buffer.offset:>12,} + {buffer.type.bytes:<12,}"
