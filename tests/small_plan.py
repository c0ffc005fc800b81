"""A plan of hand-written loop kernels with every function a host knows, for tests of what runs plans.

The "model" is a table: `init` fills it from the seed, `train_step` adds lr to it, `loss` and `logits` are simple functions
of the tokens. `mirror` needs its barrier: its second launch reads backwards what the first one wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Parameter, Region, Value
from tinygpt.ir.index import Index
from tinygpt.ir.loop import LoopBuilder
from tinygpt.ir.plan import Buffer, Entry, Launch, Plan
from tinygpt.ir.types import PointerType, ScalarType, TensorType, VectorType
from tinygpt.targets.cpp import emit, target_record

BATCH, CONTEXT, VOCAB = 2, 8, 256
MIRRORED = 64
TRAINING = {"lr": 0.5, "beta1": 0.9, "beta2": 0.95, "max_steps": 3, "eval_interval": 2, "seed": 42}

Body = Callable[..., None]


def kernel(name: str, params: Mapping[str, tuple[str, str]], points: int, body: Body) -> Kernel:
    """`params` maps names to (dtype, access); `body(builder, point, *params)` is one grid point."""
    b = LoopBuilder()
    values = [Value(PointerType(dtype, "buffer"), hint) for hint, (dtype, _) in params.items()]
    b.loop(Index.variable("lo"), Index.variable("hi"), 1, lambda point: body(b, point, *values), stem="point")
    access = tuple(access for _, access in params.values())
    return Kernel(name, Region(tuple(values), b.finish()), access, {"g0": points}, level="loop", of=f"%{name}")


def _cast(b: LoopBuilder, x: Value) -> Value:
    return b.primitive("cast", [x], "f32")


def _double(b: LoopBuilder, g: Index, x: Value, t: Value) -> None:
    row = b.load(x, g * 8, 4), b.load(x, g * 8 + 4, 4)
    for i, v in enumerate(row):
        b.store(t, b.primitive("mul", [v, b.const(2.0, VectorType("f32", 4))]), g * 8 + 4 * i)


def _reverse(b: LoopBuilder, g: Index, x: Value, t: Value, y: Value) -> None:
    """y[i] = t[63 - i] + x[i], through scratch."""
    space = b.scratch(8, hint="turned")
    b.loop(0, 8, 1, lambda i: b.store(space, b.load(t, MIRRORED - 1 - g * 8 - i), i))
    b.loop(0, 8, 1, lambda i: b.store(y, b.primitive("add", [b.load(space, i), b.load(x, g * 8 + i)]), g * 8 + i))


def _fill(b: LoopBuilder, g: Index, seed: Value, table: Value) -> None:
    low = b.primitive("and", [b.load(seed, 0), b.const(255, ScalarType("u32"))])
    b.store(table, b.primitive("add", [_cast(b, low), _cast(b, b.index(g))]), g)


def _offsets(b: LoopBuilder, g: Index, seed: Value, step: Value, count: Value, offsets: Value) -> None:
    wanted = b.primitive(
        "add",
        [
            b.primitive("mul", [b.load(step, 0), b.const(3, ScalarType("u32"))]),
            b.primitive("cast", [b.index(g)], "u32"),
        ],
    )
    last = b.primitive("sub", [b.load(count, 0), b.const(1, ScalarType("u32"))])
    b.store(offsets, b.primitive("cast", [b.primitive("min", [wanted, last])], "i32"), g)


def _step(b: LoopBuilder, g: Index, lr: Value, bias1: Value, bias2: Value, table: Value) -> None:
    scaled = b.primitive("mul", [b.load(lr, 0), b.primitive("add", [b.load(bias1, 0), b.load(bias2, 0)])])
    b.store(table, b.primitive("add", [b.load(table, g), scaled]), g)


def _loss(b: LoopBuilder, g: Index, tokens: Value, targets: Value, loss: Value, norm: Value) -> None:
    zero = b.const(0.0, ScalarType("f32"))

    def add(i: Index, total: Value) -> list[Value]:
        return [b.primitive("add", [total, _cast(b, b.primitive("sub", [b.load(targets, i), b.load(tokens, i)]))])]

    (total,) = b.loop(0, BATCH * CONTEXT, 1, add, [zero])
    b.store(loss, total, 0)
    b.store(norm, b.primitive("mul", [total, total]), 0)


def _row_losses(b: LoopBuilder, g: Index, tokens: Value, targets: Value, losses: Value) -> None:
    difference = b.primitive("sub", [b.load(targets, g), b.load(tokens, g)])
    b.store(losses, _cast(b, b.primitive("mul", [difference, difference])), g)


def _logits(b: LoopBuilder, g: Index, tokens: Value, table: Value, logits: Value) -> None:
    token = b.load(tokens, g)

    def one(v: Index) -> None:
        mixed = b.primitive(
            "and",
            [
                b.primitive("mul", [b.primitive("add", [token, b.index(v * 7)]), b.const(29, ScalarType("i32"))]),
                b.const(63, ScalarType("i32")),
            ],
        )
        b.store(logits, b.primitive("mul", [_cast(b, mixed), b.const(0.125, ScalarType("f32"))]), g * VOCAB + v)

    b.loop(0, VOCAB, 1, one)


class _Pool:
    """Places tensors one after the other, at multiples of 64 bytes."""

    def __init__(self, name: str) -> None:
        self.name, self.end = name, 0

    def __call__(self, dtype: str, *shape: int) -> Buffer:
        buffer = Buffer(self.name, self.end, TensorType(dtype, shape))
        self.end += -(-buffer.type.bytes // 64) * 64
        return buffer


def plan() -> Plan:
    state, work = _Pool("state"), _Pool("work")
    points = BATCH * CONTEXT
    table = state("f32", VOCAB)
    tokens, targets, one = work("i32", BATCH, CONTEXT), work("i32", BATCH, CONTEXT), work("i32", 1, CONTEXT)
    lr, bias1, bias2, loss, norm, step, count = (work(d) for d in ("f32", "f32", "f32", "f32", "f32", "u32", "u32"))
    seed, offsets = work("u32", 2), work("i32", BATCH)
    rows, logits = work("f32", BATCH, CONTEXT), work("f32", 1, CONTEXT, VOCAB)
    x, t, y = (work("f32", MIRRORED) for _ in range(3))
    f32_in, i32_in, u32_in, f32_out = ("f32", "in"), ("i32", "in"), ("u32", "in"), ("f32", "out")
    kernels = [
        kernel("double", {"x": f32_in, "t": f32_out}, 8, _double),
        kernel("reverse", {"x": f32_in, "t": f32_in, "y": f32_out}, 8, _reverse),
        kernel("fill", {"seed": u32_in, "table": f32_out}, VOCAB, _fill),
        kernel(
            "offsets", {"seed": u32_in, "step": u32_in, "count": u32_in, "offsets": ("i32", "out")}, BATCH, _offsets
        ),
        kernel("step", {"lr": f32_in, "bias1": f32_in, "bias2": f32_in, "table": ("f32", "inout")}, VOCAB, _step),
        kernel("mean_loss", {"tokens": i32_in, "targets": i32_in, "loss": f32_out, "norm": f32_out}, 1, _loss),
        kernel("row_losses", {"tokens": i32_in, "targets": i32_in, "losses": f32_out}, points, _row_losses),
        kernel("logits", {"tokens": i32_in, "table": f32_in, "logits": f32_out}, CONTEXT, _logits),
    ]
    launch = partial(Launch, barrier=False)
    batch = (("tokens", tokens), ("targets", targets))
    rates = (("lr", lr), ("bias1", bias1), ("bias2", bias2))
    mean = launch("mean_loss", (tokens, targets, loss, norm))
    entries = [
        Entry(
            "mirror",
            (("x", x),),
            (("y", y),),
            (launch("double", (x, t)), Launch("reverse", (x, t, y), True, "%2 reverse")),
        ),
        Entry("init", (("seed", seed),), (), (launch("fill", (seed, table)),)),
        Entry(
            "windows",
            (("seed", seed), ("step", step), ("count", count)),
            (("offsets", offsets),),
            (launch("offsets", (seed, step, count, offsets)),),
        ),
        Entry(
            "train_step",
            (*batch, *rates),
            (("loss", loss), ("grad_norm", norm)),
            (launch("step", (lr, bias1, bias2, table)), mean),
        ),
        Entry(
            "loss", batch, (("loss", loss), ("row_losses", rows)), (mean, launch("row_losses", (tokens, targets, rows)))
        ),
        Entry("logits", (("tokens", one),), (("logits", logits),), (launch("logits", (one, table, logits)),)),
    ]
    parameter = Parameter("table", Value(table.type, "table"), init=("normal", 0.02))
    return Plan(
        pools={"state": state.end, "work": work.end},
        parameters={"table": (parameter, table)},
        entries={entry.name: entry for entry in entries},
        kernels={k.name: k for k in kernels},
    )


def document(built: Plan, strict: bool = False) -> dict[str, Any]:
    """The manifest of the plan, before it knows its target and files."""

    def slot(name: str, buffer: Buffer) -> dict[str, Any]:
        return {
            "name": name,
            "shape": list(buffer.type.shape),
            "dtype": buffer.type.dtype,
            "pool": buffer.pool,
            "offset": buffer.offset,
        }

    return {
        "format": "tinygpt-bundle", "version": 1, "name": "small-plan", "strict": strict, "config": None,
        "batch": BATCH, "context": CONTEXT, "training": dict(TRAINING), "pools": dict(built.pools),
        "parameters": [
            {**slot(name, buffer), "role": parameter.role, "init": list(parameter.init), "decay": False}
            for name, (parameter, buffer) in built.parameters.items()
        ],
        "functions": {
            e.name: {
                "inputs": [slot(*i) for i in e.inputs],
                "outputs": [slot(*o) for o in e.outputs],
                "launches": [{"kernel": x.kernel, "barrier": x.barrier, "of": x.of} for x in e.launches],
            }
            for e in built.entries.values()
        },
    }  # fmt: skip


def write_bundle(folder: Path, caps: Caps, strict: bool = False, **changes: Any) -> Path:
    """The plan as a bundle of the C++ target."""
    built = plan()
    manifest = document(built, strict)
    files = emit(built, manifest, caps, strict)
    manifest["target"] = target_record(files, caps, strict)
    manifest |= changes
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    manifest["files"] = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in files.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
