"""Index expressions and addresses as code, in the address type; the numbers are not negative, so division is
unsigned.

A sum that a region needs more than once is computed once, and what does not change in a loop before it: engines do
neither for addresses as a rule. Constants are left over for the offset of the access."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Atom, Compound, Index, Variable
from tinygpt.targets.wasm.analysis import Analysis, Request, Sum, is_total, is_trivial
from tinygpt.targets.wasm.frame import Frame
from tinygpt.targets.wasm.primitives import Code
from tinygpt.targets.wasm.profiles import AddressSpace, address_space

_MAX_OFFSET = 1 << 31  # of an access; far above it, V8 checks bounds in another, slower way


class Addresses:
    """The index arithmetic of one function. `type` is that of index variables; `variables` are the locals of those in
    scope, `pointers` the locals of values; `read` gives the code of a pointer."""

    def __init__(
        self, facts: Analysis, frame: Frame, caps: Caps, pointers: dict[Value, int], read: Callable[[Value], Code]
    ) -> None:
        self.type = f"i{caps.address_bits}"
        self.variables: dict[str, int] = {}
        self._facts, self._frame, self._caps, self._pointers, self._read = facts, frame, caps, pointers, read
        self._scopes: list[dict[Request, int]] = []
        self._demand: list[Counter[Request]] = []

    def enter(self, region: Region) -> None:
        self._scopes.append({})
        self._demand.append(self._facts.requests[region])

    def leave(self) -> None:
        self._demand.pop()
        for local in self._scopes.pop().values():
            self._frame.release(local)

    def space(self, pointer: Value | None) -> AddressSpace:
        """How a pointer addresses memory; None stands for index variables."""
        return address_space(self._caps, pointer.type.space if pointer is not None else "index")

    def place(self, pointer: Value, at: Index) -> tuple[Code, tuple[int, ...]]:
        """Code of the address `at` elements from a pointer; then the constant that the access adds to it, and the
        memory if it is not the first."""
        sum, constant = self._facts.address(pointer, at)
        space = self.space(pointer)
        code = self._sum(sum)
        # An offset is added without wrapping around, so what it is added to must not be below zero.
        if not 0 <= constant < _MAX_OFFSET or any(coefficient < 0 for _, coefficient in sum[1]):
            code, constant = [*code, *self.plus(constant, space.type)], 0
        return code, (constant, space.memory) if space.memory else (constant,)

    def index(self, at: Index) -> Code:
        """Code of an index expression."""
        if at.is_constant:
            return [(f"{self.type}.const", at.constant)]
        return [*self._sum(self._facts.sum(at)), *self.plus(at.constant, self.type)]

    def variable(self, name: str) -> Code:
        if name not in self.variables:
            raise CompilerBug(f"wasm: the index variable {name} is read where it is not known")
        return [("local.get", self.variables[name])]

    @staticmethod
    def plus(constant: int, type: str) -> Code:
        return [(f"{type}.const", constant), (f"{type}.add",)] if constant else []

    @staticmethod
    def times(factor: int, type: str) -> Code:
        if factor == 1:
            return []
        if factor > 1 and factor & (factor - 1) == 0:
            return [(f"{type}.const", factor.bit_length() - 1), (f"{type}.shl",)]
        return [(f"{type}.const", factor), (f"{type}.mul",)]

    def hoisted(self, body: Region) -> Code:
        """Code, to run before a loop, of the sums and atoms of its body that do not change in it."""
        code: Code = []
        for sum in self._facts.roots[body]:
            self._hoist_sum(sum, code)
        return code

    # Sums and atoms

    def _sum(self, sum: Sum) -> Code:
        base, terms = sum
        if base is not None and not terms:
            return self._read(base)
        if is_trivial(sum):
            return self._atom(terms[0][0])
        return self._shared(sum)

    def _atom(self, atom: Atom) -> Code:
        return self.variable(atom.name) if isinstance(atom, Variable) else self._shared(atom)

    def _shared(self, request: Request) -> Code:
        """The value from where it was computed before; or its code, which keeps the value where it is needed again."""
        known = self._known(request)
        if known is not None:
            return [("local.get", known)]
        code = self._computed(request)
        if self._demand[-1][request] < 2:
            return code
        return [*code, ("local.tee", self._keep(request))]

    def _known(self, request: Request) -> int | None:
        return next((scope[request] for scope in reversed(self._scopes) if request in scope), None)

    def _keep(self, request: Request) -> int:
        type = self.type if isinstance(request, Compound) else self.space(request[0]).type
        local = self._frame.local(type, "at")
        self._scopes[-1][request] = local
        return local

    def _computed(self, request: Request) -> Code:
        if isinstance(request, Compound):
            return self._compound(request)
        base, terms = request
        atom, coefficient = terms[-1]
        if base is None and len(terms) == 1:
            return [*self._atom(atom), *self.times(coefficient, self.type)]
        type = self.space(base).type
        before = self._sum((base, terms[:-1]))  # first, as it runs first: it may keep what the term then finds
        wrap: Code = [("i32.wrap_i64",)] if type != self.type else []
        term = [*self._atom(atom), *wrap, *self.times(abs(coefficient), type)]
        return [*before, *term, (f"{type}.{'add' if coefficient > 0 else 'sub'}",)]

    def _compound(self, atom: Compound) -> Code:
        left, right = self.index(atom.left), atom.right
        if atom.op in ("min", "max"):
            first, again = self._frame.twice(left, self.type)
            other, other_again = self._frame.twice(self.index(right), self.type)
            compare = "lt_s" if atom.op == "min" else "gt_s"
            return [*first, *other, *again, *other_again, (f"{self.type}.{compare}",), ("select",)]
        if right.is_constant and right.constant > 0 and right.constant & (right.constant - 1) == 0:
            bits = right.constant.bit_length() - 1
            number, operator = (bits, "shr_u") if atom.op == "//" else (right.constant - 1, "and")
            return [*left, (f"{self.type}.const", number), (f"{self.type}.{operator}",)]
        return [*left, *self.index(right), (f"{self.type}.{'div_u' if atom.op == '//' else 'rem_u'}",)]

    # What does not change in a loop

    def _hoist_sum(self, sum: Sum, code: Code) -> None:
        """The longest prefix that is known before the loop, and of the terms behind it what is."""
        base, terms = sum
        while terms and not self._available((base, terms)):
            if isinstance(terms[-1][0], Compound):
                self._hoist_atom(terms[-1][0], code)
            terms = terms[:-1]
        if terms and not is_trivial((base, terms)):
            self._compute((base, terms), code)

    def _hoist_atom(self, atom: Compound, code: Code) -> None:
        if self._available((None, ((atom, 1),))):
            self._compute(atom, code)
            return
        for side in (atom.left, atom.right):
            self._hoist_sum(self._facts.sum(side), code)

    def _available(self, sum: Sum) -> bool:
        base, terms = sum
        if base is not None and base not in self._pointers:
            return False
        if not all(is_total(atom) for atom, _ in terms if isinstance(atom, Compound)):
            return False
        return all(name in self.variables for name in Index(terms, 0).variables())

    def _compute(self, request: Request, code: Code) -> None:
        if self._known(request) is None:
            computed = self._computed(request)
            code += [*computed, ("local.set", self._keep(request))]
