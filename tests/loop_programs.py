"""Small loop-level kernels that between them use every op, for the tests of the printers: each with buffers to run it on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tinygpt.ir.core import Kernel, Region, Value
from tinygpt.ir.findings import primitive_error
from tinygpt.ir.index import Index
from tinygpt.ir.loop import LoopBuilder
from tinygpt.ir.scalar import BITWISE, COMPARISONS, CONVERSIONS, PRIMITIVES
from tinygpt.ir.types import NUMPY_DTYPES, Dim, PointerType, ScalarType, VectorType

DTYPES = ("f32", "i32", "u32", "bool")
LO, HI = Index.variable("lo"), Index.variable("hi")
POINTS = 3
MOST_LANES = 16


@dataclass(frozen=True)
class Case:
    """A kernel and the buffers to run it on."""

    kernel: Kernel
    buffers: Callable[[], list[NDArray]]


def numbers(dtype: str, size: int, seed: int, small: bool = False) -> NDArray:
    """Finite numbers of a dtype, with repetitions; `small` ones fit every conversion and shift."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(size) < 0.5
    if small:
        return rng.integers(0, 31, size).astype(NUMPY_DTYPES[dtype])
    if dtype == "f32":
        return np.where(rng.random(size) < 0.2, rng.integers(-2, 3, size), rng.standard_normal(size) * 100).astype(np.float32)
    return rng.integers(0, 2**32, size, dtype=np.uint32).view(NUMPY_DTYPES[dtype])


def vector(dtype: str, width: int) -> ScalarType | VectorType:
    return VectorType(dtype, width) if width > 1 else ScalarType(dtype)


def make(name: str, dtypes: Sequence[str], out: str, body: Callable[..., None], size: int = POINTS * MOST_LANES, small: bool = False) -> Case:
    """A kernel over input buffers of `dtypes` and one output; `body(builder, inputs, output, point)` is one grid point."""
    b = LoopBuilder()
    inputs = [Value(PointerType(dtype, "buffer"), f"input{i}") for i, dtype in enumerate(dtypes)]
    output = Value(PointerType(out, "buffer"), "out")
    b.loop(LO, HI, 1, partial(body, b, inputs, output), stem="point")
    region = Region((*inputs, output), b.finish())
    kernel = Kernel(name, region, (*("in" for _ in inputs), "out"), {"g0": POINTS}, level="loop")

    def buffers() -> list[NDArray]:
        return [*(numbers(d, size, i, small) for i, d in enumerate(dtypes)), np.zeros(size, NUMPY_DTYPES[out])]

    return Case(kernel, buffers)


def primitive_case(name: str, dtypes: tuple[str, ...], out: str, width: int) -> Case:
    def body(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        args = [b.load(v, point * width, width) for v in inputs]
        b.store(output, b.pure(name, args, vector(out, width)), point * width)

    return make(f"{name}_{'_'.join(dtypes)}_{out}_{width}", dtypes, out, body, small=name in ("cast", "shl", "shr"))


def primitive_cases(width: int) -> list[Case]:
    """Every primitive on all operand types that the verifier allows."""
    cases = []
    for name in PRIMITIVES:
        if name in CONVERSIONS:
            pairs = list(itertools.permutations(DTYPES if name == "cast" else DTYPES[:3], 2))
            cases += [primitive_case(name, (a,), b, width) for a, b in pairs]
            continue
        for arity, dtype in itertools.product((1, 2, 3), DTYPES):
            dtypes = ("bool", dtype, dtype) if name == "select" else (dtype,) * arity
            if arity == len(dtypes) and _meaningful(name, dtypes):
                cases.append(primitive_case(name, dtypes, "bool" if name in COMPARISONS else dtype, width))
    return cases


def _meaningful(name: str, dtypes: tuple[str, ...]) -> bool:
    """Allowed by the verifier, and the same in numpy and in C++ (no negation of unsigned, no order of booleans)."""
    arity = {"neg": 1, "abs": 1, "sqrt": 1, "fma": 3, "select": 3}.get(name, 2)
    if len(dtypes) != arity or primitive_error(name, list(dtypes)):
        return False
    if name == "div" or name == "sqrt" or name == "fma":
        return dtypes[0] == "f32"
    if dtypes[-1] == "bool":
        return name in ("and", "or", "xor", "eq", "ne", "select")
    return not (name in BITWISE and dtypes[-1] == "f32")


def lane_cases(width: int) -> list[Case]:
    """The ops that move lanes."""

    def extract(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        x = b.load(inputs[0], point * width, width)
        for lane in range(width):
            b.store(output, b.pure("extract", [x], ScalarType(x.type.dtype), lane=lane), point * width + (width - 1 - lane))

    def broadcast(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        x = b.load(inputs[0], point * width, width)
        b.store(output, b.pure("broadcast_lane", [x], x.type, lane=width - 2), point * width)

    def interleave(half: int, b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        x, y = (b.load(v, point * width, width) for v in inputs)
        b.store(output, b.pure("interleave", [x, y], x.type, half=half), point * width)

    def fold(kind: str, b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        x = b.load(inputs[0], point * width, width)
        b.store(output, b.pure("fold", [x], ScalarType(x.type.dtype), kind=kind), point)

    def splat(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        b.store(output, b.splat(b.load(inputs[0], point), width), point * width)

    def lanes(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        b.store(output, b.primitive("add", [b.lanes(width), b.index(point * 7)]), point * width)

    cases = [make(f"lanes_{width}", [], "i32", lanes)]
    for d in DTYPES:
        cases += [make(f"{name}_{d}_{width}", [d], d, f) for name, f in (("extract", extract), ("broadcast", broadcast), ("splat", splat))]
        cases += [make(f"interleave_{d}_{width}_{half}", [d, d], d, partial(interleave, half)) for half in (0, 1)]
        cases += [make(f"fold_{d}_{width}_{kind}", [d], d, partial(fold, kind)) for kind in ("sum", "max") if d != "bool"]
    return cases


def constant_cases(width: int) -> list[Case]:
    values = {"f32": (0.1, -0.0, 3.0, 1e-30, -3.0e38, float(np.float32(2 / 3))), "i32": (0, -(2**31), 2**31 - 1), "u32": (0, 2**32 - 1, 70000), "bool": (0, 1)}

    def body(dtype: str, b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        for i, value in enumerate(values[dtype]):
            b.store(output, b.const(value, vector(dtype, width)), (point * 6 + i) * width)

    return [make(f"const_{d}_{width}", [], d, partial(body, d), size=POINTS * 6 * MOST_LANES) for d in DTYPES]


def control_cases() -> list[Case]:
    """Scratch, pointers, branches, outlines, and carried values that trade places."""
    i32 = ScalarType("i32")

    def gather(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        row = b.load(inputs[0], point)
        source = b.advance(inputs[1], Index.of(-5) + 5, b.primitive("and", [row, b.const(3, i32)]), scale=8)
        b.store(output, b.load(source, 1, 4), point * 4)

    def panel(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        """Turn a 4x4 block through scratch, with the block's edge in an else branch."""
        space = b.scratch(16, hint="panel")
        other = b.scratch(16, "i32", hint="counts")
        for r in range(4):
            b.store(space, b.load(inputs[0], r * 4, 4), r * 4)
            b.store(other, b.index(point + r), r)

        def column(j: Index) -> None:
            def row(i: Index) -> None:
                count = b.primitive("cast", [b.load(other, i)], "f32")
                b.store(output, b.primitive("add", [b.load(space, i * 4 + j), count]), j * 4 + i)

            b.loop(0, Index.minimum(4, point + 2), 1, row)

        b.loop(0, 4, 1, column)

    def branches(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        x = b.load(inputs[0], point)
        b.when(point % 2, "eq", 1, lambda: b.store(output, x, point))
        b.when(point * 3 - 2, "gt", Index.maximum(point, 3) // 2, lambda: b.store(output, b.primitive("neg", [x]), point + 3))

    def outlined(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        (name,) = point.variables()
        b.note("a note */ with a backslash \\")
        b.outline("micro", [inputs[0], output], [name], lambda source, target: b.store(target, b.load(source, point), point))

    def trading(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        one, two = b.const(1, i32), b.const(2, i32)

        def step(i: Index, x: Value, y: Value, z: Value) -> list[Value]:
            b.store(output, x, point * 10 + i)
            return [y, b.primitive("add", [x, y]), x]

        for i, v in enumerate(b.loop(0, 5, 1, step, [one, two, two])):
            b.store(output, v, point * 10 + 5 + i)

    def pointers(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        """Two pointers that swap while one goes on."""

        def step(i: Index, p: Value, q: Value) -> list[Value]:
            b.store(output, b.load(p, point), point * 4 + i)
            return [q, b.advance(p, 2)]

        b.loop(0, 4, 1, step, [inputs[0], b.advance(inputs[0], 8)])

    def late_read(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        """The result of an inner loop is read after the value that is yielded is computed from it."""

        def outer(i: Index, x: Value) -> list[Value]:
            (inner,) = b.loop(0, 3, 1, lambda j, y: [b.primitive("add", [y, b.load(inputs[0], j)])], [x])
            following = b.primitive("mul", [inner, b.const(3, i32)])
            b.store(output, inner, point * 8 + i)
            return [following]

        (last,) = b.loop(0, 4, 1, outer, [b.load(inputs[0], point)])
        b.store(output, last, point * 8 + 4)

    def old_value(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        """What was computed from the old value of a variable is used after the new one is there."""

        def trip(i: Index, x: Value) -> list[Value]:
            before = b.primitive("add", [x, b.const(3, i32)])
            following = b.primitive("mul", [x, b.const(2, i32)])
            b.store(output, before, point * 4 + i)
            return [following]

        b.loop(0, 4, 1, trip, [b.load(inputs[0], point)])

    def bound(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        """Numbers from memory as bounds of a loop and in addresses, moved into their ranges; one is bound again in each trip."""
        least = b.bind(b.primitive("and", [b.load(inputs[0], point), b.const(7, i32)]), 1, 3)
        most = b.bind(b.load(inputs[0], point + 3), 2, 9)

        def trip(i: Index, total: Value) -> list[Value]:
            picked = b.bind(b.load(inputs[0], i * 2 + least), 0, 30)
            b.when(picked, "gt", 3, lambda: b.store(output, b.index(picked * 5 - least), point * 12 + i))
            return [b.primitive("add", [total, b.load(inputs[0], picked + most)])]

        (total,) = b.loop(least, most, 1, trip, [b.const(0, i32)])
        b.store(output, b.primitive("sub", [total, b.index(most - least)]), point * 12 + 11)

    def load_before_store(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        space = b.scratch(4, "i32")
        b.store(space, b.load(inputs[0], point), 0)
        before = b.load(space, 0)
        b.store(space, b.const(7, i32), 0)
        b.store(output, b.primitive("sub", [before, b.load(space, 0)]), point)

    return [
        make("gather", ["i32", "f32"], "f32", gather),
        make("panel", ["f32"], "f32", panel),
        make("branches", ["f32"], "f32", branches),
        make("outlined", ["i32"], "i32", outlined),
        make("trading", [], "i32", trading),
        make("pointers", ["f32"], "f32", pointers),
        make("late_read", ["i32"], "i32", late_read),
        make("old_value", ["i32"], "i32", old_value),
        make("bound", ["i32"], "i32", bound),
        make("load_before_store", ["i32"], "i32", load_before_store),
    ]


def random_case(seed: int) -> Case:
    """A random program: loops nested in loops that carry, permute and drop values, stores and loads in between."""
    rng = random.Random(seed)
    i32 = ScalarType("i32")
    slots = 8

    def body(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        space = b.scratch(slots, "i32")
        for i in range(slots):
            b.store(space, b.load(inputs[0], point * slots + i), i)

        def region(depth: int, known: list[Value], wanted: int) -> list[Value]:
            known = list(known)
            for _ in range(rng.randrange(1, 7)):
                kind = rng.choice(["op", "op", "op", "load", "store", "loop", "when"])
                if kind == "op":
                    name = rng.choice(["add", "sub", "mul", "xor", "min"])
                    known.append(b.primitive(name, [rng.choice(known), rng.choice(known)]))
                elif kind == "load":
                    known.append(b.load(space, rng.randrange(slots)))
                elif kind == "store":
                    b.store(space, rng.choice(known), rng.randrange(slots))
                elif kind == "when":
                    b.when(point, rng.choice(["lt", "ge"]), 1, lambda: b.store(space, rng.choice(known), rng.randrange(slots)))
                elif depth < 3:
                    starts = [rng.choice(known) for _ in range(rng.randrange(1, 4))]

                    def trip(i: Index, *args: Value) -> list[Value]:
                        return region(depth + 1, [*known, *args, b.index(i)], len(args))

                    known += b.loop(0, rng.randrange(2, 4), 1, trip, starts)
            return [rng.choice(known[-5:]) for _ in range(wanted)]

        for i, value in enumerate(region(0, [b.const(3, i32), b.load(space, 0), b.index(point)], 3)):
            b.store(output, value, point * slots + i)
        for i in range(3, slots):
            b.store(output, b.load(space, i), point * slots + i)

    return make(f"random{seed}", ["i32"], "i32", body)


def matmul(width: int, rows: int = 2, vectors: int = 2) -> Kernel:
    """C = A B, a register block a grid point: what the printer is mostly for."""
    b = LoopBuilder()
    size = vectors * width * 2
    a, w, c = (Value(PointerType("f32", "buffer"), name) for name in ("h.0.a-weight", "double", "out"))

    def point(g: Index) -> None:
        a_rows = b.advance(a, (g // 2) * (rows * size), hint="a_rows")
        columns = b.advance(w, (g % 2) * (vectors * width), hint="columns")

        def contract(k: Index, *sums: Value) -> list[Value]:
            right = [b.load(columns, k * size + v * width, width, hint=f"b{v}") for v in range(vectors)]
            left = [b.splat(b.load(a_rows, k + r * size), width) for r in range(rows)]
            return [b.primitive("fma", [left[r], right[v], sums[r * vectors + v]]) for r in range(rows) for v in range(vectors)]

        zeros = [b.emit("const", [], VectorType("f32", width), hint=f"sum{i}", value=0.0) for i in range(rows * vectors)]
        sums = b.loop(0, size, 1, contract, zeros, stem="k")
        for i, total in enumerate(sums):
            scaled = b.primitive("max", [b.primitive("mul", [total, b.const(0.5, ScalarType("f32"))]), b.const(0.0, total.type)])
            at = (g // 2) * (rows * size) + (g % 2) * (vectors * width) + (i // vectors) * size + (i % vectors) * width
            b.store(c, scaled, at)

    b.loop(LO, HI, 1, point, stem="tile")
    dims = (Dim("i", Index.variable("g0") * rows, rows, size), Dim("j", Index.variable("g1") * vectors * width, vectors * width, size))
    region = Region((a, w, c), b.finish())
    return Kernel("k7", region, ("in", "in", "out"), {"g0": size // rows, "g1": 2}, dims, {"lanes": width}, {"register_tile": (rows, vectors)}, "loop", "%9 matmul, %10 relu")


def addressed_case(seed: int) -> Case:
    """Loops whose addresses share sums, quotients, remainders, minima and maxima of their variables."""
    rng = random.Random(seed)
    size, out = 64, 256

    def expression(variables: list[Index], depth: int = 0) -> Index:
        """A number from 0 on, below a few hundred."""
        parts = [rng.choice(variables) * rng.randrange(1, 5) for _ in range(rng.randrange(1, 3))]
        total = sum(parts, Index.of(rng.randrange(4)))
        if depth == 2 or rng.random() < 0.3:
            return total
        inner = expression(variables, depth + 1)
        match rng.choice(["//", "%", "min", "max", "+"]):
            case "//":
                return total + inner // rng.choice([2, 3, 8])
            case "%":
                return total + inner % rng.choice([4, 5, 16])
            case "min":
                return Index.minimum(total, inner)
            case "max":
                return Index.maximum(total, inner)
        return total + inner

    def body(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        def nest(variables: list[Index]) -> None:
            shared = [expression(variables) for _ in range(3)]
            for _ in range(rng.randrange(1, 5)):
                at = rng.choice(shared) + rng.randrange(3)
                source = b.advance(inputs[0], (rng.choice(shared) + rng.choice(shared)) % 16) if rng.random() < 0.5 else inputs[0]
                value = b.load(source, at % 32)
                target = (rng.choice(shared) * 2 + at) % out
                if rng.random() < 0.2:
                    value = b.primitive("add", [value, b.index(rng.choice(shared) - rng.choice(shared))])
                if rng.random() < 0.2:
                    variables = [*variables, b.bind(value, 0, rng.randrange(1, 6))]
                if rng.random() < 0.2:
                    b.when(rng.choice(shared), rng.choice(["lt", "ge", "ne"]), rng.choice(shared), partial(b.store, output, value, target))
                b.store(output, value, target)
            if len(variables) < 4:
                for _ in range(rng.randrange(1, 3)):
                    low, high = rng.randrange(2), rng.choice([Index.of(3), rng.choice(variables) + 2, expression(variables) % 4])
                    b.loop(low, high, rng.randrange(1, 3), lambda i: nest([*variables, i]), stem="i")

        nest([point, point + 1])

    return make(f"addressed{seed}", ["i32"], "i32", body, size=max(size, out))


class _Mixed:
    """Draws the values of `mixed_case`: scalars and vectors of four of every type, numbers that stay finite."""

    def __init__(self, rng: random.Random, b: LoopBuilder) -> None:
        self.rng, self.b = rng, b

    def pick(self, known: Sequence[Value], dtype: str, lanes: int) -> Value:
        """A known value of the type, or a constant."""
        fitting = [v for v in known if v.type == vector(dtype, lanes)]
        if fitting and self.rng.random() < 0.95:
            return self.rng.choice(fitting[-6:])
        value = {"f32": self.rng.uniform(-9, 9), "i32": self.rng.randrange(-99, 99), "u32": self.rng.randrange(1 << 32), "bool": self.rng.randrange(2)}[dtype]
        return self.b.const(float(np.float32(value)) if dtype == "f32" else value, vector(dtype, lanes))

    def bounded(self, x: Value) -> Value:
        """Numbers that no chain of products makes infinite, and that i32 can hold."""
        low, high = (self.b.const(limit, x.type) for limit in (-1e6, 1e6))
        return self.b.primitive("min", [self.b.primitive("max", [x, low]), high])

    def value(self, known: Sequence[Value]) -> Value:
        """A new value computed from known ones."""
        b, rng, lanes = self.b, self.rng, self.rng.choice((1, 4))
        dtype = rng.choice(("f32", "f32", "i32", "u32", "bool"))
        x, y, z = (self.pick(known, dtype, lanes) for _ in range(3))
        match rng.choice(("compute",) * 5 + ("select", "convert", "lanes")):
            case "select":
                return b.primitive("select", [self.pick(known, "bool", lanes), x, y])
            case "convert":
                return self.converted(x, lanes)
            case "lanes":
                return self.moved(x, y, lanes)
        if dtype == "bool":
            kind = rng.choice(("f32", "i32", "u32"))
            left, right = (self.pick(known, kind, lanes) for _ in range(2))
            return rng.choice((b.primitive(rng.choice(COMPARISONS), [left, right]), b.primitive(rng.choice(("and", "or", "xor")), [x, y])))
        if dtype == "f32":
            return self.real(x, y, z)
        name = rng.choice(("add", "sub", "mul", "min", "max", "and", "or", "xor", "shl", "shr"))
        if name in ("shl", "shr"):
            y = b.const(rng.randrange(32), x.type)
        return b.primitive(name, [x, y])

    def real(self, x: Value, y: Value, z: Value) -> Value:
        b = self.b
        match self.rng.choice(("add", "sub", "mul", "min", "max", "neg", "abs", "div", "sqrt", "fma", "fma")):
            case "neg" | "abs" as name:
                return b.primitive(name, [x])
            case "min" | "max" as name:
                return b.primitive(name, [x, y])
            case "div":
                return self.bounded(b.primitive("div", [x, b.primitive("add", [b.primitive("abs", [y]), b.const(0.5, y.type)])]))
            case "sqrt":
                return b.primitive("sqrt", [b.primitive("abs", [x])])
            case "fma" if isinstance(x.type, VectorType):  # whether a scalar's is fused is the profile's own
                return self.bounded(b.primitive("fma", [x, y, z]))
            case name:
                return self.bounded(b.primitive(name if name != "fma" else "mul", [x, y]))

    def converted(self, x: Value, lanes: int) -> Value:
        b, dtype = self.b, x.type.dtype
        if dtype == "f32":
            return b.primitive("cast", [x], "i32")
        if dtype == "bool":
            return b.primitive("cast", [x], self.rng.choice(("f32", "i32", "u32")))
        whole = b.primitive("bitcast", [x], "i32" if dtype == "u32" else "u32")
        return self.bounded(b.primitive("cast", [whole], "f32")) if self.rng.random() < 0.5 else whole

    def moved(self, x: Value, y: Value, lanes: int) -> Value:
        b, rng = self.b, self.rng
        if lanes == 1:
            return b.splat(x, 4)
        kinds = ["extract", "broadcast", "interleave"] + (["fold"] if x.type.dtype in ("i32", "u32") else [])
        match rng.choice(kinds):
            case "extract":
                return b.extract(x, rng.randrange(4))
            case "broadcast":
                return b.pure("broadcast_lane", [x], x.type, lane=rng.randrange(4))
            case "fold":
                return b.fold(x, rng.choice(("sum", "max")))
        return b.pure("interleave", [x, y], x.type, half=rng.randrange(2))

    def store(self, pointer: Value, value: Value, at: Index | int) -> None:
        """Any value as i32, bit for bit."""
        if value.type.dtype != "i32":
            value = self.b.primitive("cast" if value.type.dtype == "bool" else "bitcast", [value], "i32")
        self.b.store(pointer, value, at)


def mixed_case(seed: int) -> Case:
    """A random program over scalars and vectors of every type: loops that carry them, branches, scratch memory."""
    rng = random.Random(seed)
    dtypes = ("f32", "i32", "u32")
    slots, stride = 8, 32  # vectors in scratch; elements of each array for a grid point

    def body(b: LoopBuilder, inputs: list[Value], output: Value, point: Index) -> None:
        draw = _Mixed(rng, b)
        space = b.scratch(slots * 4, "i32")
        for i in range(slots):
            b.store(space, b.load(inputs[1], point * stride + i * 4, 4), i * 4)

        def region(depth: int, known: Sequence[Value]) -> list[Value]:
            known = list(known)
            for _ in range(rng.randrange(6, 24) >> depth):
                kind = rng.choice(["value"] * 9 + ["load", "store", "loop", "when"])
                if kind == "value":
                    known.append(draw.value(known))
                elif kind == "load":
                    known.append(b.load(space, rng.randrange(slots) * 4, rng.choice((1, 4))))
                elif kind == "store":
                    draw.store(space, rng.choice(known), rng.randrange(slots) * 4)
                elif kind == "when":
                    b.when(point, rng.choice(["lt", "ge", "ne"]), 1, lambda: draw.store(space, rng.choice(known), rng.randrange(slots) * 4))
                elif depth < 2:
                    starts = [rng.choice(known) for _ in range(rng.randrange(1, 4))]

                    def trip(i: Index, *args: Value) -> list[Value]:
                        inside = region(depth + 1, [*known, *args, b.index(i)])
                        return [draw.pick(inside, v.type.dtype, getattr(v.type, "lanes", 1)) for v in args]

                    known += b.loop(0, rng.randrange(2, 4), 1, trip, starts)
            return known

        start = [b.load(source, point * stride + i * 4, lanes) for source in inputs for i, lanes in ((0, 1), (1, 4), (2, 4))]
        known = region(0, [start[0], *(draw.bounded(x) if x.type.dtype == "f32" else x for x in start), b.index(point)])
        for i, value in enumerate(known[-4:]):
            draw.store(output, value, point * stride + i * 4)
        for i in range(4):
            b.store(output, b.load(space, i * 4, 4), point * stride + 16 + i * 4)

    return make(f"mixed{seed}", dtypes, "i32", body, size=POINTS * stride)
