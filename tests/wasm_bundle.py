"""A hand-written plan that looks like a compiled model, and its bundle for any WebAssembly profile: launches that
depend on each other, several threads, scratch memory, an outlined region, and every function a host calls.

The model is a bigram table. Its loss at (b, t) is table[token, target]² + 1, and a step shrinks the table; it does
not learn, but every number depends on every launch, in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Parameter, Region, Value
from tinygpt.ir.index import Index
from tinygpt.ir.loop import LoopBuilder
from tinygpt.ir.plan import Buffer, Entry, Launch, Plan
from tinygpt.ir.types import PointerType, ScalarType, TensorType
from tinygpt.runtime import bundle as bundles
from tinygpt.runtime.session import Session
from tinygpt.targets.wasm import emit, target_record

BATCH, CONTEXT, VOCABULARY = 4, 8, 256
TOKENS = BATCH * CONTEXT
TRAINING = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0, "batch_size": BATCH}
LO, HI = Index.variable("lo"), Index.variable("hi")
F32, I32, U32 = ScalarType("f32"), ScalarType("i32"), ScalarType("u32")
LANES = 4


def plan(reserved: int = 0) -> Plan:
    """`reserved` bytes of the work pool lie unused before the tensors, to move them beyond what 32 bits address."""
    ends = {"state": 0, "work": reserved}

    def buffer(pool: str, dtype: str, *shape: int) -> Buffer:
        placed = Buffer(pool, ends[pool], TensorType(dtype, shape))
        ends[pool] = -(-placed.end // 64) * 64
        return placed

    table, first, second = (buffer("state", "f32", VOCABULARY, VOCABULARY) for _ in range(3))
    tokens, targets = (buffer("work", "i32", BATCH, CONTEXT) for _ in range(2))
    lr, bias1, bias2, loss, norm = (buffer("work", "f32") for _ in range(5))
    rows = buffer("work", "f32", BATCH, CONTEXT)
    prompt, logits = buffer("work", "i32", 1, CONTEXT), buffer("work", "f32", 1, CONTEXT, VOCABULARY)
    seed, step, count, offsets = (
        buffer("work", "u32", 2),
        buffer("work", "u32"),
        buffer("work", "u32"),
        buffer("work", "i32", BATCH),
    )
    losses = [
        Launch("row_losses", (table, tokens, targets, rows), False, "%1 gather"),
        Launch("mean", (rows, loss, norm), True, "%2 reduce"),
    ]
    entries = [
        Entry("init", (("seed", seed),), (), (Launch("init", (seed, table, first, second), False),)),
        Entry(
            "logits", (("tokens", prompt),), (("logits", logits),), (Launch("gather", (table, prompt, logits), False),)
        ),
        Entry(
            "windows",
            (("seed", seed), ("step", step), ("count", count)),
            (("offsets", offsets),),
            (Launch("windows", (seed, step, count, offsets), False),),
        ),
        Entry(
            "loss", (("tokens", tokens), ("targets", targets)), (("loss", loss), ("row_losses", rows)), tuple(losses)
        ),
        Entry(
            "train_step",
            (("tokens", tokens), ("targets", targets), ("lr", lr), ("bias1", bias1), ("bias2", bias2)),
            (("loss", loss), ("grad_norm", norm)),
            (*losses, Launch("update", (loss, lr, bias1, bias2, table, first, second), True, "%3 adamw")),
        ),
    ]
    names = {"table.weight": (table, "param"), "table.weight.m": (first, "state"), "table.weight.v": (second, "state")}
    parameters = {name: (Parameter(name, Value(b.type), role), b) for name, (b, role) in names.items()}
    return Plan(ends, parameters, {e.name: e for e in entries}, {k.name: k for k in _kernels()})


def manifest_of(plan: Plan, target: Mapping[str, Any], name: str = "bigram") -> dict[str, Any]:
    """The manifest's document, without files."""

    def slot(name: str, b: Buffer) -> dict[str, Any]:
        return {"name": name, "shape": list(b.type.shape), "dtype": b.type.dtype, "pool": b.pool, "offset": b.offset}

    functions = {
        key: {"inputs": [slot(*i) for i in e.inputs], "outputs": [slot(*o) for o in e.outputs], "launches": []}
        for key, e in plan.entries.items()
    }
    parameters = [
        {**slot(name, b), "role": p.role, "init": list(p.init), "decay": p.role == "param"}
        for name, (p, b) in plan.parameters.items()
    ]
    return {
        "format": "tinygpt-bundle", "version": 1, "name": name, "strict": False,
        "config": {"vocab_size": VOCABULARY, "context_length": CONTEXT}, "batch": BATCH, "context": CONTEXT,
        "training": dict(TRAINING), "target": dict(target), "pools": dict(plan.pools), "parameters": parameters,
        "functions": functions, "kernels": {}, "files": {}, "golden": {},
    }  # fmt: skip


def write_bundle(folder: Path, caps: Caps, reserved: int = 0) -> Path:
    """A bundle folder that loads, with golden vectors that it made itself."""
    made = plan(reserved)
    document = manifest_of(made, target_record(made, caps, strict=False))
    files: dict[str, bytes] = dict(emit(made, document, caps, strict=False))
    _write(folder, document, files)
    files[bundles.GOLDEN] = _golden(folder)
    document["golden"] = {"train_step": {"loss": 1e-6, "table.weight": 1e-6}, "logits": {"logits": 0.0}}
    _write(folder, document, files)
    return folder


def _write(folder: Path, document: dict[str, Any], files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(document))


def _golden(folder: Path) -> bytes:
    rng = np.random.default_rng(7)
    tokens, targets = rng.integers(0, VOCABULARY, (2, BATCH, CONTEXT)).astype(np.int32)
    with bundles.load(folder).session(threads=1) as session:
        before = session.parameters()
        arrays = {f"param/{name}": array for name, array in before.items()}
        arrays |= {"logits/in/tokens": tokens[:1], "logits/out/logits": session.logits(tokens[:1])}
        arrays |= {"train_step/in/tokens": tokens, "train_step/in/targets": targets}
        loss, _ = session.train_step(tokens, targets)
        inputs = {slot.name: session.engine.read(slot) for slot in session.manifest.functions["train_step"].inputs}
        arrays |= {f"train_step/in/{name}": array for name, array in inputs.items()}
        arrays |= {
            "train_step/out/loss": np.float32(loss).reshape(()),
            "train_step/out/table.weight": session.parameters()["table.weight"],
        }
    content: bytes = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    return content


def expected_step(session: Session, tokens: np.ndarray, targets: np.ndarray, lr: float) -> tuple[float, np.ndarray]:
    """The loss and the next table, in numpy."""
    table = session.parameters()["table.weight"]
    loss = np.mean(table[tokens, targets].astype(np.float64) ** 2 + 1)
    return float(loss), table - table * np.float32(lr) * np.float32(loss)


def _kernel(name: str, access: Mapping[str, tuple[str, str]], points: int, body: Callable[..., None]) -> Kernel:
    """A kernel over buffers name -> (dtype, access); `body(builder, point, *buffers)` is one grid point."""
    b = LoopBuilder()
    buffers = [Value(PointerType(dtype, "buffer"), hint) for hint, (dtype, _) in access.items()]
    b.loop(LO, HI, 1, lambda point: body(b, point, *buffers), stem="point")
    modes = tuple(mode for _, mode in access.values())
    return Kernel(name, Region(tuple(buffers), b.finish()), modes, {"g0": points}, level="loop", of=f"%{name}")


def _kernels() -> list[Kernel]:
    f, i, u = (lambda mode: ("f32", mode)), (lambda mode: ("i32", mode)), (lambda mode: ("u32", mode))
    return [
        _kernel("init", {"seed": u("in"), "table": f("out"), "m": f("out"), "v": f("out")}, VOCABULARY, _init),
        _kernel("gather", {"table": f("in"), "tokens": i("in"), "logits": f("out")}, CONTEXT, _gather),
        _kernel("windows", {"seed": u("in"), "step": u("in"), "count": u("in"), "offsets": i("out")}, BATCH, _windows),
        _kernel(
            "row_losses",
            {"table": f("in"), "tokens": i("in"), "targets": i("in"), "rows": f("out")},
            TOKENS,
            _row_losses,
        ),
        _kernel("mean", {"rows": f("in"), "loss": f("out"), "norm": f("out")}, 1, _mean),
        _kernel(
            "update",
            {
                "loss": f("in"),
                "lr": f("in"),
                "b1": f("in"),
                "b2": f("in"),
                "table": f("inout"),
                "m": f("out"),
                "v": f("out"),
            },
            VOCABULARY,
            _update,
        ),
    ]


def _uniform(b: LoopBuilder, x: Value) -> Value:
    """f32 in [0, 1) from u32, by a multiplicative hash: 23 bits of it."""
    bits = b.primitive("shr", [b.primitive("mul", [x, b.const(2654435761, U32)]), b.const(9, U32)])
    return b.primitive("mul", [b.primitive("cast", [bits], "f32"), b.const(2.0**-23, F32)])


def _init(b: LoopBuilder, row: Index, seed: Value, table: Value, m: Value, v: Value) -> None:
    low = b.load(seed, 0)

    def column(j: Index) -> None:
        at = row * VOCABULARY + j
        numbers = b.primitive("add", [b.primitive("cast", [b.index(at)], "u32"), low])
        b.store(table, b.primitive("sub", [_uniform(b, numbers), b.const(0.5, F32)]), at)
        b.store(m, b.const(0.0, F32), at)
        b.store(v, b.const(0.0, F32), at)

    b.loop(0, VOCABULARY, 1, column)


def _gather(b: LoopBuilder, point: Index, table: Value, tokens: Value, logits: Value) -> None:
    row = b.advance(table, 0, b.load(tokens, point), scale=VOCABULARY, hint="row")
    b.loop(0, VOCABULARY, LANES, lambda j: b.store(logits, b.load(row, j, LANES), point * VOCABULARY + j))


def _windows(b: LoopBuilder, point: Index, seed: Value, step: Value, count: Value, offsets: Value) -> None:
    number = b.primitive("add", [b.primitive("mul", [b.load(step, 0), b.const(BATCH, U32)]), b.load(seed, 0)])
    number = b.primitive("add", [number, b.primitive("cast", [b.index(point)], "u32")])
    scaled = b.primitive("mul", [_uniform(b, number), b.primitive("cast", [b.load(count, 0)], "f32")])
    b.store(offsets, b.primitive("cast", [scaled], "i32"), point)


def _row_losses(b: LoopBuilder, point: Index, table: Value, tokens: Value, targets: Value, rows: Value) -> None:
    row = b.advance(table, 0, b.load(tokens, point), scale=VOCABULARY, hint="row")
    x = b.load(b.advance(row, 0, b.load(targets, point)), 0)
    b.store(rows, b.primitive("fma", [x, x, b.const(1.0, F32)]), point)


def _mean(b: LoopBuilder, point: Index, rows: Value, loss: Value, norm: Value) -> None:
    (total,) = b.loop(
        0, TOKENS, 1, lambda k, s: [b.primitive("add", [s, b.load(rows, k)])], [b.const(0.0, F32)], stem="k"
    )
    mean = b.primitive("mul", [total, b.const(1 / TOKENS, F32)])
    b.store(loss, mean, point)
    b.store(norm, b.primitive("sqrt", [mean]), point)


def _update(
    b: LoopBuilder, row: Index, loss: Value, lr: Value, b1: Value, b2: Value, table: Value, m: Value, v: Value
) -> None:
    """w - w * lr * loss, through scratch memory and an outlined region."""
    space = b.scratch(VOCABULARY, hint="space")
    weights = b.advance(table, row * VOCABULARY, hint="weights")
    rate, scale = b.load(lr, 0), b.load(loss, 0)
    b.loop(0, VOCABULARY, LANES, lambda j: b.store(space, b.load(weights, j, LANES), j))

    def shrink(weights: Value, space: Value, rate: Value, scale: Value) -> None:
        def block(j: Index) -> None:
            w = b.load(space, j, LANES)
            change = b.primitive("mul", [b.primitive("mul", [w, rate]), scale])
            b.store(weights, b.primitive("sub", [w, change]), j)

        b.loop(0, VOCABULARY, LANES, block)

    b.outline("shrink", [weights, space, rate, scale], [], shrink)
    b.store(m, b.load(b1, 0), row)
    b.store(v, b.load(b2, 0), row)
