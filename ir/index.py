"""Index expressions: integer arithmetic over grid ids, loop variables and constants, in a canonical linear form.

An Index is `constant + sum(coefficient * atom)`; an atom is a variable or a floor division, remainder, minimum or
maximum of two Index expressions. Equal expressions compare equal, which is what bounds proofs, kernel sharing and
the folding of constant displacements rest on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

_PYTHON: dict[str, Callable[[int, int], int]] = {
    "//": lambda a, b: a // b, "%": lambda a, b: a % b, "min": min, "max": max,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variable:
    """A grid id, a loop variable or a thread id, known by its name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Compound:
    """A non-linear atom: `left // right`, `left % right`, `min(left, right)` or `max(left, right)`."""

    op: str
    left: Index
    right: Index

    def __str__(self) -> str:
        if self.op in ("min", "max"):
            return f"{self.op}({self.left}, {self.right})"
        return f"({self.left}) {self.op} ({self.right})"


Atom = Variable | Compound


@dataclass(frozen=True, slots=True)
class Index:
    """An integer expression in canonical form: terms sorted by their text, no zero coefficient."""

    terms: tuple[tuple[Atom, int], ...]
    constant: int

    @staticmethod
    def of(value: int | Index) -> Index:
        return value if isinstance(value, Index) else Index((), int(value))

    @staticmethod
    def variable(name: str) -> Index:
        return Index(((Variable(name), 1),), 0)

    @staticmethod
    def minimum(left: int | Index, right: int | Index) -> Index:
        return _compound("min", Index.of(left), Index.of(right))

    @staticmethod
    def maximum(left: int | Index, right: int | Index) -> Index:
        return _compound("max", Index.of(left), Index.of(right))

    @property
    def is_constant(self) -> bool:
        return not self.terms

    def __add__(self, other: int | Index) -> Index:
        other = Index.of(other)
        if not other.terms:
            return Index(self.terms, self.constant + other.constant) if other.constant else self
        sums = dict(self.terms)
        for atom, coefficient in other.terms:
            sums[atom] = sums.get(atom, 0) + coefficient
        return _canonical(sums, self.constant + other.constant)

    __radd__ = __add__

    def __neg__(self) -> Index:
        return self * -1

    def __sub__(self, other: int | Index) -> Index:
        return self + -Index.of(other)

    def __rsub__(self, other: int | Index) -> Index:
        return Index.of(other) - self

    def __mul__(self, factor: int | Index) -> Index:
        factor = Index.of(factor)
        if not factor.is_constant:
            if not self.is_constant:
                raise ValueError(f"index expressions are linear: ({self}) * ({factor}) is not")
            return factor * self
        if factor.constant == 0:
            return Index((), 0)
        return Index(tuple((a, c * factor.constant) for a, c in self.terms), self.constant * factor.constant)

    __rmul__ = __mul__

    def __floordiv__(self, divisor: int | Index) -> Index:
        return _compound("//", self, Index.of(divisor))

    def __mod__(self, divisor: int | Index) -> Index:
        return _compound("%", self, Index.of(divisor))

    def divisible_by(self, n: int) -> bool:
        """Whether the value is provably a multiple of n, whatever the variables are."""
        return self.constant % n == 0 and all((c * _factor(a)) % n == 0 for a, c in self.terms)

    def substitute(self, values: Mapping[str, int | Index]) -> Index:
        """The expression with variables replaced; names that are missing stay."""
        result = Index.of(self.constant)
        for atom, coefficient in self.terms:
            match atom:
                case Variable(name):
                    value = Index.of(values[name]) if name in values else Index(((atom, 1),), 0)
                case Compound(op, left, right):
                    value = _compound(op, left.substitute(values), right.substitute(values))
            result = result + value * coefficient
        return result

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The value for given variables (a KeyError names one that is missing)."""
        total = self.constant
        for atom, coefficient in self.terms:
            match atom:
                case Variable(name):
                    total += coefficient * values[name]
                case Compound(op, left, right):
                    total += coefficient * _PYTHON[op](left.evaluate(values), right.evaluate(values))
        return total

    def bounds(self, ranges: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        """Inclusive interval of the value when each variable lies in its inclusive range."""
        low = high = self.constant
        for atom, coefficient in self.terms:
            a, b = _atom_bounds(atom, ranges)
            low += min(a * coefficient, b * coefficient)
            high += max(a * coefficient, b * coefficient)
        return low, high

    def variables(self) -> frozenset[str]:
        names: set[str] = set()
        for atom, _ in self.terms:
            match atom:
                case Variable(name):
                    names.add(name)
                case Compound(_, left, right):
                    names |= left.variables() | right.variables()
        return frozenset(names)

    def __str__(self) -> str:
        pieces: list[str] = []
        for atom, coefficient in self.terms:
            text = str(atom)
            if isinstance(atom, Compound) and atom.op in ("//", "%"):
                text = f"({text})"
            magnitude = text if abs(coefficient) == 1 else f"{text}*{abs(coefficient)}"
            sign = "-" if coefficient < 0 else "+"
            pieces.append(f" {sign} {magnitude}" if pieces else (f"-{magnitude}" if sign == "-" else magnitude))
        if self.constant or not pieces:
            if not pieces:
                return str(self.constant)
            pieces.append(f" {'-' if self.constant < 0 else '+'} {abs(self.constant)}")
        return "".join(pieces)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _canonical(sums: Mapping[Atom, int], constant: int) -> Index:
    terms = tuple(sorted(((a, c) for a, c in sums.items() if c), key=lambda term: _text(term[0])))
    return Index(terms, constant)


@lru_cache(maxsize=None)
def _text(atom: Atom) -> str:
    return str(atom)


def _factor(atom: Atom) -> int:
    """A number that provably divides the atom (0 divides only zero; 1 divides everything)."""
    match atom:
        case Compound("min" | "max", left, right):
            return gcd(_index_factor(left), _index_factor(right))
        case Compound("%", left, right):
            return gcd(_index_factor(left), _index_factor(right))
    return 1


def _index_factor(index: Index) -> int:
    factor = index.constant
    for atom, coefficient in index.terms:
        factor = gcd(factor, coefficient * _factor(atom))
    return factor or 1


def _never_negative(index: Index) -> bool:
    """Whether the shape of the expression alone keeps it from being negative, for variables that are not."""
    return index.constant >= 0 and all(c > 0 and _atom_never_negative(a) for a, c in index.terms)


def _atom_never_negative(atom: Atom) -> bool:
    match atom:
        case Compound("min", left, right):
            return _never_negative(left) and _never_negative(right)
        case Compound("max", left, right):
            return _never_negative(left) or _never_negative(right)
        case Compound("//", left, right):
            return _never_negative(left) and _never_negative(right)
        case Compound("%", _, right):
            return _never_negative(right)
    return True


def _compound(op: str, left: Index, right: Index) -> Index:
    if left.is_constant and right.is_constant:
        return Index.of(_PYTHON[op](left.constant, right.constant))
    if op in ("min", "max") and left == right:
        return left
    if op in ("//", "%") and right.is_constant:
        divisor = right.constant
        if divisor == 1:
            return left if op == "//" else Index.of(0)
        whole = {a: c // divisor for a, c in left.terms if (c * _factor(a)) % divisor == 0 and c % divisor == 0}
        rest = _canonical({a: c for a, c in left.terms if a not in whole}, left.constant % divisor)
        if rest.is_constant and op == "//":
            return _canonical(whole, left.constant // divisor)
        if rest.is_constant:
            return Index.of(rest.constant)
        # What stays must not become negative by the split, as targets truncate where this floors.
        if (whole or left.constant // divisor) and _never_negative(rest):
            inner = _compound(op, rest, right)
            return inner if op == "%" else inner + _canonical(whole, left.constant // divisor)
    return Index(((Compound(op, left, right), 1),), 0)


def _atom_bounds(atom: Atom, ranges: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    match atom:
        case Variable(name):
            return ranges[name]
        case Compound(op, left, right):
            (a, b), (c, d) = left.bounds(ranges), right.bounds(ranges)
            if op in ("min", "max"):
                return _PYTHON[op](a, c), _PYTHON[op](b, d)
            if op == "//":
                corners = [x // y for x in (a, b) for y in (c, d)]
                return min(corners), max(corners)
            return (a % d, b % d) if c == d and a // d == b // d else (0, d - 1)
    raise TypeError(atom)
