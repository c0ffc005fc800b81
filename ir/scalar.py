"""The scalar expression language that pointwise formulas are written in.

A formula is a Python function over `Scalar`s; tracing it once gives an expression, from which come the numpy meaning
(`evaluate`), the derivative (`differentiate`) and the body on every target (`expand` rewrites the functions that
no instruction set has, see `ir.polynomials`, and the loop level is emitted from what remains)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygpt.ir.types import NUMPY_DTYPES

ARITHMETIC = ("add", "sub", "mul", "div", "min", "max", "neg", "abs", "sqrt", "fma")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
BITWISE = ("and", "or", "xor", "shl", "shr")
CONVERSIONS = ("cast", "bitcast")
TRANSCENDENTAL = ("exp", "log", "tanh", "erf")
PRIMITIVES = (*ARITHMETIC, *COMPARISONS, *BITWISE, *CONVERSIONS, "select")


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """An expression node: a primitive or transcendental over others, an argument (`arg`) or a constant (`const`)."""

    op: str
    dtype: str
    args: tuple[Scalar, ...] = ()
    value: Any = None

    def walk(self) -> Iterator[Scalar]:
        """Every node of the expression once."""
        seen, stack = {id(self)}, [self]
        while stack:
            x = stack.pop()
            yield x
            for a in x.args:
                if id(a) not in seen:
                    seen.add(id(a))
                    stack.append(a)

    def __add__(self, other: Number) -> Scalar:
        return apply("add", self, other)

    def __radd__(self, other: Number) -> Scalar:
        return apply("add", other, self)

    def __sub__(self, other: Number) -> Scalar:
        return apply("sub", self, other)

    def __rsub__(self, other: Number) -> Scalar:
        return apply("sub", other, self)

    def __mul__(self, other: Number) -> Scalar:
        return apply("mul", self, other)

    def __rmul__(self, other: Number) -> Scalar:
        return apply("mul", other, self)

    def __truediv__(self, other: Number) -> Scalar:
        return apply("div", self, other)

    def __rtruediv__(self, other: Number) -> Scalar:
        return apply("div", other, self)

    def __neg__(self) -> Scalar:
        return apply("neg", self)

    def __and__(self, other: Number) -> Scalar:
        return apply("and", self, other)

    def __or__(self, other: Number) -> Scalar:
        return apply("or", self, other)

    def __xor__(self, other: Number) -> Scalar:
        return apply("xor", self, other)

    def __lshift__(self, other: Number) -> Scalar:
        return apply("shl", self, other)

    def __rshift__(self, other: Number) -> Scalar:
        return apply("shr", self, other)


Number = Scalar | float | int


def argument(position: int, dtype: str) -> Scalar:
    return Scalar("arg", dtype, value=position)


def constant(value: float | int, dtype: str) -> Scalar:
    return Scalar("const", dtype, value=value if dtype in ("i32", "u32", "bool") else float(value))


def is_constant(x: Scalar, value: float) -> bool:
    return x.op == "const" and x.value == value


def apply(op: str, *args: Number, dtype: str = "") -> Scalar:
    """The node `op(*args)`; Python numbers take the dtype of the scalars beside them, identities fold away."""
    like = dtype if op in CONVERSIONS else next(a.dtype for a in args if isinstance(a, Scalar) and (op != "select" or a.dtype != "bool"))
    nodes = tuple(a if isinstance(a, Scalar) else constant(a, like) for a in args)
    folded = _fold(op, nodes)
    if folded is not None:
        return folded
    result = "bool" if op in COMPARISONS else dtype if op in CONVERSIONS else nodes[-1].dtype
    if op in CONVERSIONS and nodes[0].dtype == dtype:
        return nodes[0]
    return Scalar(op, result, nodes)


def _fold(op: str, a: tuple[Scalar, ...]) -> Scalar | None:
    """Identities that hold for every finite number (0 * x is taken as 0: formulas have no infinities)."""
    if op == "add":
        if is_constant(a[0], 0):
            return a[1]
        if is_constant(a[1], 0):
            return a[0]
    if op == "sub" and is_constant(a[1], 0):
        return a[0]
    if op == "mul":
        for one, other in (a, a[::-1]):
            if is_constant(one, 0):
                return one
            if is_constant(one, 1):
                return other
    if op == "div" and is_constant(a[1], 1):
        return a[0]
    if op in ("add", "sub", "mul", "div", "neg") and a[0].dtype == "f32" and all(x.op == "const" for x in a):
        return constant(_FLOAT[op](*(x.value for x in a)), "f32")
    return None


_FLOAT: dict[str, Callable[..., float]] = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y, "neg": lambda x: -x,
}  # fmt: skip


def exp(x: Scalar) -> Scalar:
    return apply("exp", x)


def log(x: Scalar) -> Scalar:
    return apply("log", x)


def tanh(x: Scalar) -> Scalar:
    return apply("tanh", x)


def erf(x: Scalar) -> Scalar:
    return apply("erf", x)


def sqrt(x: Scalar) -> Scalar:
    return apply("sqrt", x)


def absolute(x: Scalar) -> Scalar:
    return apply("abs", x)


def minimum(a: Number, b: Number) -> Scalar:
    return apply("min", a, b)


def maximum(a: Number, b: Number) -> Scalar:
    return apply("max", a, b)


def fma(a: Number, b: Number, c: Number) -> Scalar:
    return apply("fma", a, b, c)


def compare(op: str, a: Number, b: Number) -> Scalar:
    return apply(op, a, b)


def select(condition: Scalar, a: Number, b: Number) -> Scalar:
    return apply("select", condition, a, b)


def cast(x: Scalar, dtype: str) -> Scalar:
    return apply("cast", x, dtype=dtype)


def bitcast(x: Scalar, dtype: str) -> Scalar:
    return apply("bitcast", x, dtype=dtype)


_erf = np.frompyfunc(math.erf, 1, 1)


def _wrapping(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def wrapped(a: Any, b: Any) -> Any:
        with np.errstate(over="ignore"):
            return f(a, b)

    return wrapped


def _divide(a: Any, b: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return a / b


_NUMPY: dict[str, Callable[..., Any]] = {
    "add": _wrapping(np.add), "sub": _wrapping(np.subtract), "mul": _wrapping(np.multiply), "div": _divide,
    "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt,
    "fma": lambda a, b, c: a * b + c,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift, "select": np.where,
    "exp": np.exp, "tanh": np.tanh,
    "log": lambda x: np.log(np.maximum(x, np.finfo(np.float32).tiny)),
    "erf": lambda x: np.asarray(_erf(x)).astype(np.asarray(x).dtype),
}  # fmt: skip


def numpy_primitive(op: str, args: Sequence[Any], dtype: str) -> Any:
    """One primitive on numpy values; `dtype` matters for conversions only. float64 operands stay float64."""
    if op == "cast":
        wide = dtype == "f32" and np.asarray(args[0]).dtype == np.float64
        with np.errstate(over="ignore"):  # what is too large for f16 becomes infinite
            return np.asarray(args[0]).astype(np.float64 if wide else NUMPY_DTYPES[dtype])
    if op == "bitcast":
        return np.ascontiguousarray(args[0]).view(NUMPY_DTYPES[dtype]).reshape(np.shape(args[0]))
    return _NUMPY[op](*args)


def evaluate(expression: Scalar, args: Sequence[Any]) -> Any:
    """The value of an expression on numpy arrays (broadcast together), float64 where the arguments are."""
    memo: dict[Scalar, Any] = {}
    wide = any(np.asarray(a).dtype == np.float64 for a in args)

    def value(x: Scalar) -> Any:
        if x not in memo:
            if x.op == "arg":
                memo[x] = np.asarray(args[x.value])
            elif x.op == "const":
                dtype = np.float64 if wide and x.dtype == "f32" else NUMPY_DTYPES[x.dtype]
                memo[x] = np.asarray(x.value, dtype)
            else:
                memo[x] = numpy_primitive(x.op, [value(a) for a in x.args], x.dtype)
        return memo[x]

    return value(expression)


def substitute(expression: Scalar, args: Sequence[Scalar]) -> Scalar:
    """The expression with its arguments replaced."""
    memo: dict[Scalar, Scalar] = {}

    def rebuilt(x: Scalar) -> Scalar:
        if x.op == "arg":
            replacement: Scalar = args[x.value]
            return replacement
        if x.op == "const":
            return x
        if x not in memo:
            memo[x] = apply(x.op, *(rebuilt(a) for a in x.args), dtype=x.dtype)
        return memo[x]

    return rebuilt(expression)


def differentiate(expression: Scalar, position: int) -> Scalar:
    """The partial derivative with respect to argument `position`, an expression over the same arguments.

    Forward mode over the expression: each node's derivative by the chain rule, shared where nodes are shared."""
    memo: dict[Scalar, Scalar] = {}

    def d(x: Scalar) -> Scalar:
        if x not in memo:
            memo[x] = _derivative(x, d, position)
        return memo[x]

    return d(expression)


def _derivative(x: Scalar, d: Callable[[Scalar], Scalar], position: int) -> Scalar:
    zero = constant(0.0, x.dtype)
    a = x.args
    match x.op:
        case "arg":
            return constant(1.0 if x.value == position else 0.0, x.dtype)
        case "add":
            return d(a[0]) + d(a[1])
        case "sub":
            right = d(a[1])
            return d(a[0]) if is_constant(right, 0) else apply("sub", d(a[0]), right)
        case "mul":
            return d(a[0]) * a[1] + a[0] * d(a[1])
        case "div":
            return _quotient(d(a[0]), d(a[1]), x, a[1])
        case "neg":
            inner = d(a[0])
            return zero if is_constant(inner, 0) else -inner
        case "min" | "max":
            left = compare("le" if x.op == "min" else "ge", a[0], a[1])
            return select(left, d(a[0]), d(a[1]))
        case "abs":
            return select(compare("lt", a[0], 0.0), -d(a[0]), d(a[0]))
        case "sqrt":
            return d(a[0]) * (0.5 / x)
        case "exp":
            return d(a[0]) * x
        case "log":
            return _quotient(d(a[0]), zero, x, a[0])
        case "tanh":
            return d(a[0]) * (1.0 - x * x)
        case "erf":
            return d(a[0]) * (2.0 / math.sqrt(math.pi) * exp(-(a[0] * a[0])))
        case "select":
            return select(a[0], d(a[1]), d(a[2]))
    return zero


def _quotient(top: Scalar, bottom: Scalar, quotient: Scalar, divisor: Scalar) -> Scalar:
    numerator = top if is_constant(bottom, 0) else top - quotient * bottom
    return numerator if is_constant(numerator, 0) else numerator / divisor


def expand(expression: Scalar, definitions: Mapping[str, Callable[[Scalar], Scalar]]) -> Scalar:
    """The expression with each transcendental in `definitions` replaced by its definition."""
    memo: dict[Scalar, Scalar] = {}

    def expanded(x: Scalar) -> Scalar:
        if x.op in ("arg", "const"):
            return x
        if x not in memo:
            args = [expanded(a) for a in x.args]
            if x.op in definitions:
                memo[x] = expanded(definitions[x.op](args[0]))
            else:
                memo[x] = apply(x.op, *args, dtype=x.dtype)
        return memo[x]

    return expanded(expression)
