"""The registry of graph ops: the interface of an op, pointwise ops from formulas, and the builder that emits ops.

The ops themselves live in `tinygpt.ir.ops`, one class or one formula each.

Printer, verifier, interpreter, differentiation, capture, fuzzer, docs and conformance tests are loops over `OPS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tinygpt.ir import scalar
from tinygpt.ir.core import Location, Op, Value
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.types import Dim, TensorType

if TYPE_CHECKING:
    from tinygpt.ir.tile import Position, Readers, TileBuilder, Writers

Attrs = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """Operand types and attributes on which an op is tested and documented. `inputs` restricts operand values."""

    types: tuple[TensorType, ...]
    attrs: Attrs = field(default_factory=dict)
    inputs: Callable[[np.random.Generator], Sequence[np.ndarray]] | None = None


def token_example(types: Sequence[TensorType], vocabulary: int, attrs: Attrs | None = None) -> Example:
    """An example whose i32 operands are tokens below `vocabulary` and whose other operands are normal numbers."""

    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        return [
            rng.integers(0, vocabulary, t.shape).astype(np.int32) if t.dtype == "i32" else rng.standard_normal(t.shape).astype(np.float32)
            for t in types
        ]

    return Example(tuple(types), attrs or {}, draw)


@dataclass(frozen=True)
class Axis:
    """An axis of an operand or a result: the indices first, first + 1, … of one of its op's index ranges."""

    range: str
    first: int = 0


Axes = tuple[Axis | None, ...]  # of one operand or result; None is an axis that is needed whole
Box = Mapping[str, tuple[int, int]]  # of some index ranges, the indices start..stop


def named(names: str) -> Axes:
    """Axes by their ranges, "m k"; "_" is one that is needed whole."""
    return tuple(None if name == "_" else Axis(name) for name in names.split())


class GraphOp:
    """One op over whole tensors. `infer`, `evaluate` and `gradient` are its meaning; `tiles` its tile program."""

    name: str
    aten: tuple[str, ...] = ()
    kind: ClassVar[str] = "root"  # pointwise, view, rows and columns (programs that fuse with each other) or root
    pattern: ClassVar[str] = ""  # the shape of its tile program, which schedules are chosen by

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        """Result types. Raises ValueError with the reason when operands do not fit."""
        raise CompilerBug(f"{self.name} does not say how its result types follow")

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        """The meaning in numpy; results have the floating dtype of the operands (float64 in, float64 out)."""
        raise CompilerBug(f"{self.name} does not say what it computes")

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        """Gradients of the operands, given those of the results (None: not needed or zero)."""
        raise UserError(f"{self.name} has no gradient", hint="use it outside of what the loss depends on")

    def terms(self, types: Sequence[TensorType]) -> int:
        """How many terms every element of the result is a sum of, if the op has an attribute `parts`; 0 if it has not."""
        return 0

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        """The index ranges that the op can be computed in stretches of, behind the axes of its operands and its results.

        Stretches of a range that the results have are parts of them; of one that only operands have, they add up to them."""
        return [(None,) * t.rank for t in types], [(None,) * t.rank for t in self.infer(types, attrs)]

    def stretch(self, g: GraphBuilder, op: Op, operands: Sequence[Value | None], box: Box) -> Sequence[Value]:
        """Emit the op for stretches of some of its index ranges; operands are cut to them, None if nothing is left."""
        return g.emit(self.name, *(v for v in operands if v is not None), hint=op.results[0].hint, **op.attrs).results

    def tiles(self, k: TileBuilder, op: Op, read: Readers, write: Writers) -> None:
        """Emit the tile program that computes the results through `write` from operands through `read`."""
        raise CompilerBug(f"{self.name} has no tile program")

    def examples(self) -> Sequence[Example]:
        return ()


class RowOp(GraphOp):
    """An op whose results at a row depend on that row of its operands only."""

    kind = "rows"
    pattern = "rows"
    shared: ClassVar[tuple[int, ...]] = ()  # operands that every row reads whole

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        lead = tuple(Axis(f"r{i}") for i in range(types[0].rank - 1))

        def by_row(t: TensorType) -> Axes:
            return lead + (None,) * (t.rank - len(lead))

        operands = [(None,) * t.rank if i in self.shared else by_row(t) for i, t in enumerate(types)]
        return operands, [by_row(t) for t in self.infer(types, attrs)]

    def space(self, op: Op) -> tuple[int, ...]:
        """The shape it runs over: rows first, the elements of a row last. That of its first operand, or of a larger result."""
        first: tuple[int, ...] = op.operands[0].type.shape
        result: tuple[int, ...] = op.results[0].type.shape
        return first if len(first) >= max(r.type.rank for r in op.results) else result

    def rows(self, k: TileBuilder, op: Op, lead: Sequence[Position], i: Dim | None, read: Readers) -> list[Value]:
        """Result tiles for the rows `lead` (whose last entry is the Dim `i`, if there are rows)."""
        raise CompilerBug(f"{self.name} has no row program")


class ColumnOp(GraphOp):
    """An op whose results at a column are sums over the rows of its operands."""

    kind = "columns"
    pattern = "columns"

    def column(self, k: TileBuilder, op: Op, i: Dim, j: Dim, read: Readers) -> Value:
        """What a block of rows adds to the columns j."""
        raise CompilerBug(f"{self.name} has no column program")


OPS: dict[str, GraphOp] = {}


def register(cls: type[GraphOp]) -> type[GraphOp]:
    """Class decorator: add one instance to the registry under its name."""
    if cls.name in OPS:
        raise CompilerBug(f"two ops are called {cls.name}")
    OPS[cls.name] = cls()
    return cls


class Pointwise(GraphOp):
    """An op given by a scalar formula, applied element by element with numpy broadcasting."""

    kind = "pointwise"

    def __init__(self, name: str, formula: Callable[..., scalar.Scalar], dtypes: tuple[str, ...], doc: str, differentiable: bool) -> None:
        self.name = name
        self.formula, self.dtypes, self.differentiable = formula, dtypes, differentiable
        self.__doc__ = doc

    @property
    def arity(self) -> int:
        return len(self.dtypes)

    def trace(self, dtypes: Sequence[str], attrs: Attrs) -> scalar.Scalar:
        """The formula as an expression over arguments of these dtypes."""
        return self.formula(*(scalar.argument(i, d) for i, d in enumerate(dtypes)), **attrs)

    def infer(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        if len(types) != self.arity:
            raise ValueError(f"takes {self.arity} operands, not {len(types)}")
        try:
            shape = np.broadcast_shapes(*(t.shape for t in types))
        except ValueError:
            raise ValueError(f"shapes do not broadcast: {', '.join(map(str, types))}") from None
        return (TensorType(self.trace([t.dtype for t in types], attrs).dtype, shape),)

    def axes(self, types: Sequence[TensorType], attrs: Attrs) -> tuple[list[Axes], list[Axes]]:
        (result,) = self.infer(types, attrs)
        return [broadcast_axes(t, result) for t in types], [broadcast_axes(result, result)]

    def evaluate(self, operands: Sequence[np.ndarray], attrs: Attrs) -> tuple[np.ndarray, ...]:
        dtypes = ["f32" if np.asarray(x).dtype == np.float64 else dtype_name(x) for x in operands]
        shape = np.broadcast_shapes(*(np.shape(x) for x in operands))
        return (np.broadcast_to(scalar.evaluate(self.trace(dtypes, attrs), operands), shape),)

    def gradient(self, g: GraphBuilder, op: Op, grads: Sequence[Value | None]) -> Sequence[Value | None]:
        (grad,) = grads
        if grad is None or not self.differentiable:
            return [None] * len(op.operands)
        found: list[Value | None] = []
        for position, operand in enumerate(op.operands):
            if operand.type.dtype != "f32":
                found.append(None)
                continue
            expression = scalar.differentiate(self.trace([v.type.dtype for v in op.operands], dict(op.attrs)), position)
            found.append(g.sum_to(_chain(g, expression, op, position, grad), operand.type.shape))
        return found

    def examples(self) -> Sequence[Example]:
        attrs = {"dtype": "i32"} if self.name == "cast" else {}
        first = [((3, 5),) * self.arity, ((7, 4),) + ((4,),) * (self.arity - 1)]
        return [Example(tuple(map(TensorType, self.dtypes, shapes)), attrs) for shapes in first]


def broadcast_axes(type: TensorType, result: TensorType) -> Axes:
    """The axes of an operand that broadcasts to a result, by the result's; what is repeated is needed whole."""
    start = result.rank - type.rank
    return tuple(Axis(f"a{start + i}") if n == result.shape[start + i] else None for i, n in enumerate(type.shape))


def _chain(g: GraphBuilder, derivative: scalar.Scalar, op: Op, position: int, grad: Value) -> Value | None:
    """grad * derivative, using plain ops where the derivative is a constant or another operand."""
    if derivative.op == "const":
        if derivative.value == 0:
            return None
        return grad if derivative.value == 1 else g("mul", grad, g.constant(derivative.value))
    if derivative.op == "arg":
        return g("mul", grad, op.operands[derivative.value])
    return g("mul", grad, g(f"{op.name}_d{position}", *op.operands, **op.attrs))


def pointwise(
    arity: int, *, aten: tuple[str, ...] = (), dtypes: tuple[str, ...] = (), differentiable: bool = True
) -> Callable[[Callable[..., scalar.Scalar]], Callable[..., scalar.Scalar]]:
    """Register a formula as an op, and each of its partial derivatives as `NAME_dI`. Operands are f32 unless `dtypes` says so."""

    def registered(formula: Callable[..., scalar.Scalar]) -> Callable[..., scalar.Scalar]:
        name = formula.__name__.removesuffix("_")
        op = Pointwise(name, formula, dtypes or ("f32",) * arity, formula.__doc__ or "", differentiable)
        op.aten = aten
        OPS[name] = op
        for position in range(arity if differentiable else 0):
            OPS[f"{name}_d{position}"] = _derivative_op(op, position)
        return formula

    return registered


def _derivative_op(op: Pointwise, position: int) -> Pointwise:
    def formula(*args: scalar.Scalar, **attrs: Any) -> scalar.Scalar:
        return scalar.differentiate(op.formula(*args_as_arguments(args), **attrs), position)

    doc = f"Partial derivative of `{op.name}` with respect to operand {position}."
    return Pointwise(f"{op.name}_d{position}", formula, op.dtypes, doc, differentiable=False)


def args_as_arguments(args: Sequence[scalar.Scalar]) -> Sequence[scalar.Scalar]:
    if any(a.op != "arg" for a in args):
        raise CompilerBug("a derivative is traced over plain arguments")
    return args


class GraphBuilder:
    """Appends ops to a list while inferring their types. Calling it emits one op: `g("matmul", a, b)`."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.loc: Location | None = None

    def emit(self, name: str, *operands: Value, hint: str = "", **attrs: Any) -> Op:
        """Append the op. Raises UserError when the operands do not fit, with their types and the source line."""
        types = [v.type for v in operands]
        try:
            results = OPS[name].infer(types, attrs)
        except ValueError as reason:
            where = f"\n  {self.loc}" if self.loc else ""
            raise UserError(f"{name}: {reason}{where}") from None
        op = Op(name, operands, tuple(Value(t, hint) for t in results), attrs, loc=self.loc)
        self.ops.append(op)
        return op

    def __call__(self, name: str, *operands: Value, hint: str = "", **attrs: Any) -> Value:
        """Append an op and return its first result."""
        return self.emit(name, *operands, hint=hint, **attrs).results[0]

    def constant(self, value: float, dtype: str = "f32") -> Value:
        return self("constant", value=value, dtype=dtype)

    def add(self, a: Value | None, b: Value | None) -> Value | None:
        """The sum of two gradients, either of which may be absent."""
        if a is None or b is None:
            return b if a is None else a
        return self("add", a, b)

    def sum_to(self, x: Value | None, shape: tuple[int, ...]) -> Value | None:
        """Undo broadcasting: sum x over the axes along which `shape` was stretched."""
        if x is None or x.type.shape == shape:
            return x
        extra = x.type.rank - len(shape)
        axes = tuple(range(extra)) + tuple(extra + i for i, n in enumerate(shape) if n == 1 and x.type.shape[extra + i] != 1)
        if axes:
            x = self("sum", x, axes=axes)
        return x if x.type.shape == shape else self("reshape", x, shape=shape)


_DTYPE_NAMES = {"float32": "f32", "float64": "f64", "float16": "f16", "int32": "i32", "int64": "i32", "uint32": "u32", "bool": "bool"}


def dtype_name(array: np.ndarray) -> str:
    """The IR's name for a numpy array's element type."""
    return _DTYPE_NAMES[np.asarray(array).dtype.name]


def sample_operands(example: Example, rng: np.random.Generator) -> list[np.ndarray]:
    """Operand values for an example: its own, or normal floats, small integers, random bits and booleans."""
    if example.inputs:
        return list(example.inputs(rng))
    draw: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
        "f32": lambda shape: rng.standard_normal(shape).astype(np.float32),
        "i32": lambda shape: rng.integers(0, 100, shape).astype(np.int32),
        "u32": lambda shape: rng.integers(0, 2**32, shape).astype(np.uint32),
        "bool": lambda shape: rng.random(shape) < 0.5,
    }
    return [draw[t.dtype](t.shape) for t in example.types]

