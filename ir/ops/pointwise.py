"""Pointwise ops: each is its formula. Type rule, numpy meaning, derivative and target code follow from it."""

from __future__ import annotations

import math

from tinygpt.ir.registry import pointwise
from tinygpt.ir.scalar import Scalar, absolute, apply, bitcast, compare, constant, erf as erf_of, exp as exp_of, log as log_of
from tinygpt.ir.scalar import cast as cast_to, maximum as larger, minimum as smaller, select, sqrt as root, tanh as tanh_of

SQRT_HALF = math.sqrt(0.5)


@pointwise(2, aten=("aten.add.Tensor",))
def add(a: Scalar, b: Scalar) -> Scalar:
    """a + b."""
    return a + b


@pointwise(2, aten=("aten.sub.Tensor",))
def sub(a: Scalar, b: Scalar) -> Scalar:
    """a - b."""
    return a - b


@pointwise(2, aten=("aten.mul.Tensor",))
def mul(a: Scalar, b: Scalar) -> Scalar:
    """a * b."""
    return a * b


@pointwise(2, aten=("aten.div.Tensor",))
def div(a: Scalar, b: Scalar) -> Scalar:
    """a / b."""
    return a / b


@pointwise(1, aten=("aten.neg.default",))
def neg(x: Scalar) -> Scalar:
    """-x."""
    return -x


@pointwise(2, aten=("aten.minimum.default",))
def min_(a: Scalar, b: Scalar) -> Scalar:
    """The smaller of a and b."""
    return smaller(a, b)


@pointwise(2, aten=("aten.maximum.default",))
def max_(a: Scalar, b: Scalar) -> Scalar:
    """The larger of a and b."""
    return larger(a, b)


@pointwise(1, aten=("aten.abs.default",))
def abs_(x: Scalar) -> Scalar:
    """|x|."""
    return absolute(x)


@pointwise(1, aten=("aten.exp.default",))
def exp(x: Scalar) -> Scalar:
    """e to the x, for x in [-87, 88]; 0 below and e^88 above."""
    return exp_of(x)


@pointwise(1, aten=("aten.log.default",))
def log(x: Scalar) -> Scalar:
    """Natural logarithm of a positive number."""
    return log_of(x)


@pointwise(1, aten=("aten.tanh.default",))
def tanh(x: Scalar) -> Scalar:
    """Hyperbolic tangent."""
    return tanh_of(x)


@pointwise(1, aten=("aten.erf.default",))
def erf(x: Scalar) -> Scalar:
    """The error function."""
    return erf_of(x)


@pointwise(1, aten=("aten.sqrt.default",))
def sqrt(x: Scalar) -> Scalar:
    """Square root."""
    return root(x)


@pointwise(1, aten=("aten.rsqrt.default",))
def rsqrt(x: Scalar) -> Scalar:
    """1 / sqrt(x)."""
    return 1.0 / root(x)


@pointwise(1)
def gelu(x: Scalar) -> Scalar:
    """Gaussian error linear unit, exact form (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1.0 + erf_of(x * SQRT_HALF))


@pointwise(1)
def gelu_tanh(x: Scalar) -> Scalar:
    """Gaussian error linear unit, tanh form (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1.0 + tanh_of(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


@pointwise(1, aten=("aten.relu.default",))
def relu(x: Scalar) -> Scalar:
    """max(x, 0), with derivative 0 at 0."""
    return select(compare("gt", x, 0.0), x, 0.0)


@pointwise(1, aten=("aten.sigmoid.default",))
def sigmoid(x: Scalar) -> Scalar:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + exp_of(-x))


@pointwise(1, aten=("aten.silu.default",))
def silu(x: Scalar) -> Scalar:
    """x * sigmoid(x)."""
    return x / (1.0 + exp_of(-x))


@pointwise(3, aten=("aten.where.self",), dtypes=("bool", "f32", "f32"))
def where(condition: Scalar, a: Scalar, b: Scalar) -> Scalar:
    """a where the condition holds, b elsewhere."""
    return select(condition, a, b)


@pointwise(2, aten=("aten.lt.Tensor", "aten.lt.Scalar"), differentiable=False)
def lt(a: Scalar, b: Scalar) -> Scalar:
    """a < b."""
    return compare("lt", a, b)


@pointwise(2, aten=("aten.le.Tensor", "aten.le.Scalar"), differentiable=False)
def le(a: Scalar, b: Scalar) -> Scalar:
    """a <= b."""
    return compare("le", a, b)


@pointwise(2, aten=("aten.gt.Tensor", "aten.gt.Scalar"), differentiable=False)
def gt(a: Scalar, b: Scalar) -> Scalar:
    """a > b."""
    return compare("gt", a, b)


@pointwise(2, aten=("aten.ge.Tensor", "aten.ge.Scalar"), differentiable=False)
def ge(a: Scalar, b: Scalar) -> Scalar:
    """a >= b."""
    return compare("ge", a, b)


@pointwise(2, aten=("aten.eq.Tensor", "aten.eq.Scalar"), differentiable=False)
def eq(a: Scalar, b: Scalar) -> Scalar:
    """a == b."""
    return compare("eq", a, b)


@pointwise(2, aten=("aten.ne.Tensor", "aten.ne.Scalar"), differentiable=False)
def ne(a: Scalar, b: Scalar) -> Scalar:
    """a != b."""
    return compare("ne", a, b)


@pointwise(1, differentiable=False)
def cast(x: Scalar, dtype: str) -> Scalar:
    """x converted to another element type (floats are truncated towards zero)."""
    return cast_to(x, dtype)


ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(key0: Scalar, key1: Scalar, counter0: Scalar, counter1: Scalar) -> tuple[Scalar, Scalar]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011): two words of random bits from a key and a counter."""
    keys = (key0, key1, key0 ^ key1 ^ PARITY)
    x, y = counter0 + key0, counter1 + key1
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x = x + y
            y = ((y << distance) | (y >> (32 - distance))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + (group + 1)
    return x, y


@pointwise(4, dtypes=("u32",) * 4, differentiable=False)
def random_bits(key0: Scalar, key1: Scalar, counter0: Scalar, counter1: Scalar) -> Scalar:
    """32 random bits from a 64-bit key and a 64-bit counter: the first word of Threefry-2x32."""
    return threefry(key0, key1, counter0, counter1)[0]


@pointwise(1, dtypes=("u32",), differentiable=False)
def bits_to_uniform(bits: Scalar) -> Scalar:
    """A number in the open interval (0, 1) from 32 random bits: the middle of one of 2^23 equal cells."""
    mantissa = bitcast((bits >> 9) | 0x3F800000, "f32")
    return (mantissa - 1.0) + 2.0**-24


@pointwise(1, dtypes=("u32",), differentiable=False)
def bits_to_normal(bits: Scalar) -> Scalar:
    """A standard normal number from 32 random bits, by the inverse error function (Giles 2010, single precision)."""
    mantissa = bitcast((bits >> 9) | 0x3F800000, "f32")
    x = 2.0 * (mantissa - 1.0) + (2.0**-23 - 1.0)
    w = -log_of(larger((1.0 - x) * (1.0 + x), 2.0**-23))  # a driver that adds up in another order makes x = -1
    near, far = w - 2.5, root(w) - 3.0
    p, q = constant(2.81022636e-08, "f32"), constant(-0.000200214257, "f32")
    for c in (3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164, 0.246640727, 1.50140941):
        p = apply("fma", p, near, c)
    for c in (0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047, 1.00167406, 2.83297682):
        q = apply("fma", q, far, c)
    return math.sqrt(2.0) * (x * select(compare("lt", w, 5.0), p, q))


@pointwise(2, dtypes=("u32", "u32"), differentiable=False)
def bits_below(bits: Scalar, count: Scalar) -> Scalar:
    """A number in [0, count) from 32 random bits: the high word of bits * count, in 16-bit pieces (count < 2^31)."""
    bits_low, bits_high = bits & 0xFFFF, bits >> 16
    count_low, count_high = count & 0xFFFF, count >> 16
    middle = bits_high * count_low + ((bits_low * count_low) >> 16)
    carry = bits_low * count_high + (middle & 0xFFFF)
    return bits_high * count_high + (middle >> 16) + (carry >> 16)


@pointwise(2, dtypes=("u32", "f32"), differentiable=False)
def bits_keep(bits: Scalar, drop: Scalar) -> Scalar:
    """1 / (1 - drop) where the bits say to keep an element, 0 where they say to drop it."""
    mantissa = bitcast((bits >> 9) | 0x3F800000, "f32") - 1.0
    return select(compare("ge", mantissa, drop), 1.0 / (1.0 - drop), 0.0)


@pointwise(1)
def copy(x: Scalar) -> Scalar:
    """x itself, written elsewhere: what a view becomes when no address describes it."""
    return x
