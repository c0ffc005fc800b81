"""exp, log, tanh and erf in single precision from primitives, so that every CPU-like target computes the same bits.

Error bounds are relative to float64 over the stated range, measured by `tests/test_polynomials.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tinygpt.ir.scalar import Scalar, bitcast, cast, compare, constant, fma, maximum, minimum, select

ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 in two pieces; the first has few enough bits to multiply exactly


def horner(coefficients: Sequence[float], x: Scalar) -> Scalar:
    """c0 * x^n + c1 * x^(n-1) + …"""
    value: Scalar = constant(coefficients[0], "f32")
    for c in coefficients[1:]:
        value = fma(value, x, c)
    return value


def exp(x: Scalar) -> Scalar:
    """e^x for x in [-87, 88]: at most 2e-7 off. 0 below -87.7, so that nothing made of a masked score is denormal: WebAssembly
    cannot flush such numbers, and some processors take a hundred cycles for each. e^88 from there on."""
    x = minimum(maximum(x, -88.0), 88.0)  # at -88 the bits of the power of two are those of 0
    shifted = fma(x, LOG2_E, ROUND)
    n = shifted - ROUND
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))
    p = horner((1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1), r)
    power = bitcast((bitcast(shifted, "i32") << 23) + 0x3F800000, "f32")
    return fma(p, r * r, r + 1.0) * power


def log(x: Scalar) -> Scalar:
    """Natural logarithm of a positive normal number: at most 2e-7 off (absolute near 1)."""
    bits = bitcast(x, "i32")
    exponent = cast((bits >> 23) - 127, "f32")
    mantissa = bitcast((bits & 0x7FFFFF) | 0x3F800000, "f32")
    large = compare("ge", mantissa, 1.41421356)
    m = select(large, mantissa * 0.5, mantissa) - 1.0
    e = select(large, exponent + 1.0, exponent)
    z = m * m
    p = horner(
        (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
         2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1), m,
    )  # fmt: skip
    return fma(e, LN2_HIGH, fma(e, LN2_LOW, fma(z, -0.5, m * z * p)) + m)


def tanh(x: Scalar) -> Scalar:
    """Hyperbolic tangent: at most 4e-7 off. x P(x^2) / Q(x^2), minimax on [-7.9, 7.9], clamped outside."""
    x = minimum(maximum(x, -7.9), 7.9)
    z = x * x
    p = horner((-1.47945024286944e-11, 3.386839964036881e-08, 2.9319437089725398e-05, 0.003932103980332613, 0.13730530440807343, 1.0), z)
    q = horner((1.3806181886858403e-06, 0.00040519150206819177, 0.02747832052409649, 0.470638632774353, 1.0), z)
    return x * p / q


def erf(x: Scalar) -> Scalar:
    """Error function: at most 4e-7 off. x P(x^2) / Q(x^2), minimax on [-3.8325, 3.8325], clamped outside."""
    x = minimum(maximum(x, -3.832506856900711), 3.832506856900711)
    z = x * x
    p = horner(
        (2.123132389897364e-06, 0.0002859383530449122, 0.0036526103504002094, 0.05241807922720909, 0.18730518221855164,
         1.1283791065216064), z,
    )  # fmt: skip
    q = horner(
        (3.8898033380974084e-05, 0.001141669461503625, 0.014742209576070309, 0.11289916932582855, 0.49932780861854553, 1.0), z,
    )  # fmt: skip
    return x * p / q


DEFINITIONS: dict[str, Callable[[Scalar], Scalar]] = {"exp": exp, "log": log, "tanh": tanh, "erf": erf}


def definitions(native: frozenset[str]) -> dict[str, Callable[[Scalar], Scalar]]:
    """The definitions a target needs that computes `native` itself."""
    return {name: f for name, f in DEFINITIONS.items() if name not in native}
