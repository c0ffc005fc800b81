"""One loop-level kernel as a readable C++20 function over GCC/Clang vector extensions. One to one: it optimises
nothing.

Values become constants or, where they are used once and their text is short, part of the expression that uses them.
Three rules keep that true to the order of the ops: a load moves across no store, an expression moves across no change
of a variable it reads, and nothing moves into a loop. A value carried by a `for` is a variable, changed in place where
its old value is no longer needed (so an accumulator reads `acc += a * b`, which contracts to one fused
multiply-add)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Op, Region, Value, uses
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Compound, Index, Variable
from tinygpt.ir.types import PointerType, ScalarType, TensorType, VectorType
from tinygpt.targets.cpp.names import Names, identifier

VECTOR_WIDTHS = (4, 8, 16)
_LONGEST_INLINED = 72  # characters
_DTYPES = ("f32", "i32", "u32", "bool")
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_FALLBACK_NAMES = {
    "load": "x",
    "fold": "total",
    "index": "n",
    "extract": "lane",
    "select": "chosen",
    **dict.fromkeys(_COMPARE, "mask"),
}

# Precedence of C++ operators, as far as they are printed without parentheses: smaller binds tighter.
_PRIMARY, _UNARY, _PRODUCT, _SUM, _LOOSE = range(5)
_OPERATORS = {
    "add": ("+", _SUM), "sub": ("-", _SUM), "mul": ("*", _PRODUCT), "div": ("/", _PRODUCT),
    "and": ("&", _LOOSE), "or": ("|", _LOOSE), "xor": ("^", _LOOSE), "shl": ("<<", _LOOSE), "shr": (">>", _LOOSE),
    **{name: (symbol, _LOOSE) for name, symbol in _COMPARE.items()},
}  # fmt: skip
_NEVER_UPDATES = ("const", "lanes", "scratch", "advance", "for")
_FUNCTIONS = {"min": "minimum", "max": "maximum", "sqrt": "square_root"}


@dataclass(frozen=True)
class _Expression:
    """C++ text. `reads` are the variables it depends on that may change, `loads` whether it reads memory; `literal` is
    the scalar in every lane of a constant vector."""

    text: str
    precedence: int = _PRIMARY
    reads: frozenset[str] = frozenset()
    loads: bool = False
    literal: str = ""

    def at(self, precedence: int) -> str:
        """The text as an operand that must bind at least as tightly."""
        return self.text if self.precedence <= precedence else f"({self.text})"


def print_kernel(kernel: Kernel, caps: Caps, *, restrict: bool = True) -> str:
    """The kernel as `void NAME(buffers…, f32* scratch, long lo, long hi)`, with what it is in a comment above.

    `restrict` promises that no buffer it writes overlaps another of its buffers."""
    signature = f"void {identifier(kernel.name)}({_parameters(kernel, ' __restrict' if restrict else '')}) {{"
    printer = _KernelPrinter(kernel)
    body = printer.body()
    return "\n".join([*printer.outlined(), *_header(kernel, caps), signature, *body, "}"]) + "\n"


def declaration(kernel: Kernel) -> str:
    """The function's prototype, with types only."""
    types = [
        f"{'const ' if access == 'in' else ''}{value.type.dtype}*"
        for value, access in zip(kernel.params, kernel.access, strict=True)
    ]
    return f"void {identifier(kernel.name)}({', '.join([*types, 'f32*', 'long', 'long'])});"


def parameter_names(kernel: Kernel) -> list[str]:
    """The C++ names of the buffers, in order."""
    names = Names()
    return [names.new(value.hint or "buffer") for value in kernel.params]


def _parameters(kernel: Kernel, qualifier: str) -> str:
    pieces = [
        f"{'const ' if access == 'in' else ''}{_dtype(value.type.dtype)}*{qualifier} {name}"
        for value, access, name in zip(kernel.params, kernel.access, parameter_names(kernel), strict=True)
    ]
    return ", ".join([*pieces, f"[[maybe_unused]] f32*{qualifier} scratch", "long lo", "long hi"])


def _header(kernel: Kernel, caps: Caps) -> list[str]:
    """The comment above the function."""

    def fields(values: Mapping[str, object]) -> str:
        return ", ".join(f"{key} = {value}" for key, value in values.items())

    rows = {
        "of": kernel.of,
        "grid": fields(kernel.grid),
        "order": fields(kernel.order),
        "cost": fields(kernel.cost),
        "dims": ", ".join(f"{d.name} = {d.size} of {d.limit} from {d.start}" for d in kernel.dims),
        "profile": f"{caps.name}, {caps.lanes} lanes",
    }
    return [f"// {one_line(kernel.name)}", *(f"//   {key:8}{one_line(text)}" for key, text in rows.items() if text)]


def one_line(text: str) -> str:
    """Text that cannot end its // comment: no line breaks, no backslash at the end."""
    return " ".join(text.split()).replace("\\", "/")


def _dtype(dtype: str) -> str:
    if dtype not in _DTYPES:
        raise CompilerBug(f"the C++ target has no {dtype}")
    return dtype


def _stem(name: str) -> str:
    """A name without the number that made it unique."""
    return re.sub(r"_\d+$", "", name)


def _lanes(value: Value) -> int:
    return value.type.lanes if isinstance(value.type, VectorType) else 1


def _count_reads(region: Region, counts: Counter[Value]) -> None:
    """How often each value is read by ops that are not themselves without readers: those are not printed."""
    counts.update(region.yields)
    for op in reversed(region.ops):
        if op.results and not op.regions and not any(counts[value] for value in op.results):
            continue
        for inner in op.regions:
            _count_reads(inner, counts)
        counts.update(op.operands)


def _reads(op: Op) -> set[Value]:
    """The values an op reads, those that its regions read included."""
    return set(uses(Region((), (op,))))


def _literal(value: float | int, dtype: str) -> str:
    """A number of a dtype; floats by the shortest decimal that rounds to them."""
    if dtype == "bool":
        return "true" if value else "false"
    if dtype == "u32":
        return f"{int(value) & 0xFFFFFFFF:#x}u" if int(value) > 0xFFFF else f"{int(value)}u"
    if dtype == "i32":
        return str(int(value)) if int(value) > -(2**31) else "(-2147483647 - 1)"
    number = np.float32(value)
    if not np.isfinite(number):
        return '__builtin_nanf("")' if math.isnan(value) else f"{'-' if value < 0 else ''}__builtin_inff()"
    return f"{number!s}f"


class _KernelPrinter:
    """Prints one kernel's body. `_values` is how each value is read; `_pending` holds those not yet printed."""

    def __init__(self, kernel: Kernel, functions: dict[str, str] | None = None, uses: Counter[Value] | None = None) -> None:
        self.kernel = kernel
        self.functions = {} if functions is None else functions  # outlined functions: text behind the name -> name
        self._names = Names()
        self._lines: list[str] = []
        self._depth = 1
        self._uses = Counter[Value]() if uses is None else uses
        if uses is None:
            _count_reads(kernel.body, self._uses)
        self._values: dict[Value, _Expression] = {}
        self._pending: dict[Value, _Expression] = {}
        self._indices = {"lo": "lo", "hi": "hi"}
        self._read_only: set[Value] = set()  # pointers to const
        self._aliases: dict[str, set[Value]] = {}  # the values that a variable stands for
        for value, access in zip(kernel.params, kernel.access, strict=True):
            self._values[value] = _Expression(self._names.new(value.hint or "buffer"))
            if access == "in":
                self._read_only.add(value)

    def body(self) -> list[str]:
        self._region(self.kernel.body, {})
        return self._lines

    def outlined(self) -> list[str]:
        """The functions that the body calls."""
        return [f"[[gnu::noinline]] static void {name}{text}" for text, name in self.functions.items()]

    # -- statements

    def _line(self, text: str) -> None:
        self._lines.append(f"{'  ' * self._depth}{text}")

    def _region(self, region: Region, targets: Mapping[Value, str]) -> set[str]:
        """The ops of a region. `targets` maps results to the variables they are the next values of; returns those
        variables that took them over at once, because nothing reads the old value after that."""
        owned = {*region.args, *(r for op in region.ops for r in op.results)}
        last_use = {value: i for i, op in enumerate(region.ops) for value in _reads(op)} | dict.fromkeys(
            region.yields, len(region.ops)
        )
        changed: set[str] = set()
        for i, op in enumerate(region.ops):
            name = targets.get(op.results[0]) if op.results else None
            if name and all(last_use.get(alias, -1) <= i for alias in self._aliases[name]):
                self._update(op, name)
                changed.add(name)
            else:
                self._statement(op, owned)
        return changed

    def _statement(self, op: Op, owned: set[Value]) -> None:
        match op.name:
            case "for":
                self._for(op, owned)
            case "if":
                self._if(op)
            case "outline":
                self._outline(op)
            case "bind":
                self._bind(op)
            case "note":
                self._line(f"// {one_line(op.attrs['text'])}")
            case "store":
                self._store(op)
            case "scratch" | "advance":
                self._pointer(op)
            case "const" | "lanes":
                self._values[op.result] = self._constant(op)
            case "splat" if op.operands[0] in self._values and self._values[op.operands[0]].literal:
                self._values[op.result] = self._expression(op)
            case _:
                self._define(op)

    def _define(self, op: Op) -> None:
        if len(op.results) != 1:
            raise CompilerBug(f"kernel {self.kernel.name}: the C++ printer has no {op.name}")
        value = op.result
        count = self._uses[value]
        if not count:
            return
        expression = self._expression(op)
        if count == 1 and not value.hint and len(expression.text) <= _LONGEST_INLINED:
            self._pending[value] = expression
        else:
            self._name(value, expression, value.hint or _FALLBACK_NAMES.get(op.name, "t"))

    def _name(self, value: Value, expression: _Expression, hint: str) -> None:
        name = self._names.new(hint)
        self._values[value] = _Expression(name)
        self._line(f"{self._constant_type(value)} {name} = {expression.text};")

    def _flush(self, loads: bool = False, reads: str = "") -> None:
        """Print pending expressions: those that load, those that read a variable, or (without arguments) all."""
        for value, expression in list(self._pending.items()):
            if (loads and expression.loads) or reads in expression.reads or not (loads or reads):
                del self._pending[value]
                self._name(value, expression, "x" if expression.loads else "t")

    def _take(self, value: Value) -> _Expression:
        """How to read a value here; a pending expression is used up."""
        if value in self._pending:
            return self._pending.pop(value)
        if value not in self._values:
            raise CompilerBug(
                f"kernel {self.kernel.name}: %{value.hint or '?'}: {value.type} is used before it is defined"
            )
        return self._values[value]

    def _pointer(self, op: Op) -> None:
        """scratch and advance: pointers always have a name."""
        if not self._uses[op.result]:
            return
        if op.name == "scratch":
            self._name(op.result, self._scratch(op), op.result.hint or "piece")
            return
        base, *value = map(self._take, op.operands)
        if op.operands[0] in self._read_only:
            self._read_only.add(op.result)
        pieces = [base.text]
        if op.attrs["by"] != Index.of(0):
            pieces.append(self._index(op.attrs["by"]).text)
        if value:
            scale = op.attrs["scale"]
            pieces.append(f"{scale} * long({value[0].text})" if scale != 1 else f"long({value[0].text})")
        self._name(op.result, _Expression(" + ".join(pieces)), op.result.hint or _stem(base.text))

    def _scratch(self, op: Op) -> _Expression:
        where = f"scratch + {op.attrs['offset']}" if op.attrs["offset"] else "scratch"
        dtype = _dtype(op.result.type.dtype)
        return _Expression(where if dtype == "f32" else f"({dtype}*)({where})")

    def _store(self, op: Op) -> None:
        value = op.operands[1]
        target, stored = map(self._take, op.operands)
        self._flush(loads=True)
        at, lanes, dtype = self._index(op.attrs["at"]), _lanes(value), value.type.dtype
        if lanes == 1:
            self._line(f"{target.text}[{at.text}] = {stored.text};")
        elif dtype == "bool":
            self._line(f"store_bool{lanes}({self._address(target, at)}, {stored.text});")
        else:
            self._line(f"store<{dtype}x{lanes}>({self._address(target, at)}, {stored.text});")

    # -- control

    def _for(self, op: Op, owned: set[Value]) -> None:
        region = op.regions[0]
        starts = [self._take(v) for v in op.operands]
        self._flush()
        low, high = self._index(op.attrs["lo"]), self._index(op.attrs["hi"])
        variables = [
            self._carried(*pair, owned) for pair in zip(op.operands, starts, region.args, op.results, strict=True)
        ]
        variable = self._names.new(op.attrs["var"])
        self._indices[op.attrs["var"]] = variable
        if "unroll" in op.attrs:
            self._line(f"#pragma GCC unroll {op.attrs['unroll']}")
        step = f"{variable} += {op.attrs['step']}" if op.attrs["step"] != 1 else f"++{variable}"
        self._line(f"for (long {variable} = {low.text}; {variable} < {high.at(_SUM)}; {step}) {{")
        self._depth += 1
        changed = self._region(region, self._targets(region, variables))
        self._assign([(v, y) for v, y in zip(variables, region.yields, strict=True) if v not in changed])
        self._depth -= 1
        self._line("}")

    def _bind(self, op: Op) -> None:
        number = self._take(op.operands[0])
        name = self._indices[op.attrs["var"]] = self._names.new(op.attrs["var"])
        low, high = op.attrs["lo"], op.attrs["hi"]
        self._line(f"const long {name} = minimum<long>(maximum<long>({number.text}, {low}), {high});")

    def _carried(self, operand: Value, start: _Expression, arg: Value, result: Value, owned: set[Value]) -> str:
        """The variable of a carried value. One that nobody else needs any more is taken over, not copied."""
        if operand in self._read_only:
            self._read_only |= {arg, result}
        if start.reads == {start.text} and operand in owned and self._uses[operand] == 1:
            name = start.text
        else:
            stem = _stem(start.text) if isinstance(arg.type, PointerType | TensorType) else "acc"
            name = self._names.new(arg.hint or result.hint or stem)
            self._line(f"{self._type(arg)} {name} = {start.text};")
        self._aliases.setdefault(name, set()).update((arg, result))
        self._values[arg] = self._values[result] = _Expression(name, reads=frozenset({name}))
        return name

    def _targets(self, region: Region, variables: list[str]) -> dict[Value, str]:
        """Results of the region's own ops that only one yield reads, with that yield's variable."""
        computed = {op.result for op in region.ops if len(op.results) == 1 and op.name not in _NEVER_UPDATES}
        pairs = zip(region.yields, variables, strict=True)
        return {value: name for value, name in pairs if value in computed and self._uses[value] == 1}

    def _update(self, op: Op, name: str) -> None:
        """`op`'s result becomes the new value of a variable."""
        own = [i for i, v in enumerate(op.operands) if v in self._aliases[name]]
        match op.name, own:
            case "fma", [2]:
                a, b, _ = map(self._take, op.operands)
                text = f"{name} += {self._binary('mul', a, b).text};"
            case "add" | "mul", [position]:
                text = f"{name} {_OPERATORS[op.name][0]}= {self._take(op.operands[1 - position]).text};"
            case "sub", [0]:
                text = f"{name} -= {self._take(op.operands[1]).text};"
            case _:
                text = f"{name} = {self._expression(op).text};"
        self._flush(reads=name)
        self._line(text)

    def _assign(self, pairs: list[tuple[str, Value]]) -> None:
        """Carried variables take the values a trip yields, all at once: what an assignment would overwrite is kept."""
        changes = [(name, value, self._take(value)) for name, value in pairs]
        changes = [change for change in changes if change[2].text != change[0]]
        changed: set[str] = set()
        assignments: list[str] = []
        for name, value, expression in changes:
            if expression.reads & changed:
                kept = self._names.new(f"next_{name}")
                self._line(f"{self._constant_type(value)} {kept} = {expression.text};")
                expression = _Expression(kept)
            assignments.append(f"{name} = {expression.text};")
            changed.add(name)
        for assignment in assignments:
            self._line(assignment)

    def _if(self, op: Op) -> None:
        self._flush()
        left, right = self._index(op.attrs["left"]), self._index(op.attrs["right"])
        self._line(f"if ({left.at(_SUM)} {_COMPARE[op.attrs['compare']]} {right.at(_SUM)}) {{")
        for position, region in enumerate(op.regions):
            if position:
                self._line("} else {")
            self._block(region)
        self._line("}")

    def _outline(self, op: Op) -> None:
        """A function of its own: in a whole kernel, GCC spills what the inner loop reads (measured: half the speed)."""
        self._flush()
        region = op.regions[0]
        function = _KernelPrinter(self.kernel, self.functions, self._uses)
        parameters = []
        for arg, operand in zip(region.args, op.operands, strict=True):
            if operand in self._read_only:
                function._read_only.add(arg)
            name = function._names.new(arg.hint or "p")
            function._values[arg] = _Expression(name)
            parameters.append(f"{function._type(arg)} const __restrict {name}")
        for variable in op.attrs["indices"]:
            function._indices[variable] = function._names.new(variable)
            parameters.append(f"long {function._indices[variable]}")
        function._region(region, {})
        arguments = [self._values[v].text for v in op.operands] + [self._indices[v] for v in op.attrs["indices"]]
        text = "\n".join([f"({', '.join(parameters)}) {{", *function._lines, "}", ""])
        name = self.functions.setdefault(text, f"{identifier(self.kernel.name)}_{identifier(op.attrs['name'])}")
        self._line(f"{name}({', '.join(arguments)});")

    def _block(self, region: Region) -> None:
        self._depth += 1
        self._region(region, {})
        self._depth -= 1

    # -- expressions

    def _type(self, value: Value) -> str:
        match value.type:
            case PointerType() | TensorType():  # a buffer's address keeps the buffer's type
                return f"{'const ' if value in self._read_only else ''}{_dtype(value.type.dtype)}*"
            case VectorType(dtype, lanes) if lanes in VECTOR_WIDTHS:
                return f"{_dtype(dtype)}x{lanes}"
            case VectorType(dtype, 1) | ScalarType(dtype):
                return _dtype(dtype)
        raise CompilerBug(f"kernel {self.kernel.name}: no C++ type for {value.type}")

    def _constant_type(self, value: Value) -> str:
        return (
            f"{self._type(value)} const"
            if isinstance(value.type, PointerType | TensorType)
            else f"const {self._type(value)}"
        )

    def _constant(self, op: Op) -> _Expression:
        type_ = op.result.type
        lanes = _lanes(op.result)
        if op.name == "lanes":
            return _Expression(f"lanes{lanes}")
        literal = _literal(op.attrs["value"], type_.dtype)
        number = _Expression(literal, _UNARY if literal[0] == "-" else _PRIMARY, literal=literal)
        return self._splat(number, type_.dtype, lanes)

    def _splat(self, x: _Expression, dtype: str, lanes: int) -> _Expression:
        if lanes == 1:
            return x
        if dtype == "bool":
            return self._made(f"splat<boolx{lanes}>(-i32({x.text}))", x)
        return _Expression(f"splat<{dtype}x{lanes}>({x.text})", _PRIMARY, x.reads, x.loads, x.literal)

    def _expression(self, op: Op) -> _Expression:
        """The right-hand side for an op with one result."""
        dtype, lanes = op.result.type.dtype, _lanes(op.result)
        vector = f"{dtype}x{lanes}" if lanes > 1 else dtype
        if op.name == "index":
            return _Expression(f"i32({self._index(op.attrs['at']).text})")
        if op.name == "load":
            return self._load(op, dtype, lanes)
        args = [self._take(v) for v in op.operands]
        match op.name:
            case "splat":
                return self._splat(args[0], dtype, lanes)
            case "extract":
                return self._lane_of(op, args[0])
            case "broadcast_lane":
                return self._made(f"splat<{vector}>({args[0].at(_PRIMARY)}[{op.attrs['lane']}])", *args)
            case "interleave":
                return self._made(
                    f"interleave_{'upper' if op.attrs['half'] else 'lower'}({args[0].text}, {args[1].text})", *args
                )
            case "fold":
                return self._made(f"fold_{op.attrs['kind']}({args[0].text})", *args)
            case "cast" | "bitcast":
                return self._convert(op, args[0], op.operands[0].type.dtype, vector, lanes)
            case "min" | "max" | "sqrt":
                return self._made(f"{_FUNCTIONS[op.name]}({', '.join(a.text for a in args)})", *args)
            case "abs":
                return args[0] if dtype == "u32" else self._made(f"absolute({args[0].text})", *args)
            case "neg":
                return self._made(f"-{args[0].at(_PRIMARY)}", *args, precedence=_UNARY)
            case "fma":
                return self._binary("add", self._binary("mul", args[0], args[1]), args[2])
            case "select":
                mask, a, b = args
                return self._made(f"{mask.at(_SUM)} ? {a.at(_SUM)} : {b.at(_SUM)}", *args, precedence=_LOOSE)
            case name if name in _OPERATORS:
                return self._binary(name, *args)
        raise CompilerBug(f"kernel {self.kernel.name}: the C++ printer has no {op.name}")

    def _made(self, text: str, *args: _Expression, precedence: int = _PRIMARY) -> _Expression:
        return _Expression(text, precedence, frozenset().union(*(a.reads for a in args)), any(a.loads for a in args))

    def _binary(self, name: str, a: _Expression, b: _Expression) -> _Expression:
        """`a` operator `b`. Beside a vector, a constant is written as a scalar. Equal operators group to the left only:
        float arithmetic is not associative."""
        symbol, precedence = _OPERATORS[name]
        if bool(a.literal) != bool(b.literal):
            a, b = (_Expression(x.literal, _UNARY) if x.literal else x for x in (a, b))
        tight = precedence - 1 if precedence < _LOOSE else _UNARY
        left = a.at(precedence if precedence < _LOOSE else _UNARY)
        return self._made(f"{left} {symbol} {b.at(tight)}", a, b, precedence=precedence)

    def _load(self, op: Op, dtype: str, lanes: int) -> _Expression:
        source, at = self._take(op.operands[0]), self._index(op.attrs["at"])
        if lanes == 1:
            text = f"{source.text}[{at.text}]"
        elif dtype == "bool":
            text = f"load_bool{lanes}({self._address(source, at)})"
        else:
            text = f"load<{dtype}x{lanes}>({self._address(source, at)})"
        return _Expression(text, _PRIMARY, source.reads, loads=True)

    def _address(self, pointer: _Expression, at: _Expression) -> str:
        return pointer.text if at.text == "0" else f"{pointer.text} + {at.at(_SUM)}"

    def _lane_of(self, op: Op, vector: _Expression) -> _Expression:
        text = f"{vector.at(_PRIMARY)}[{op.attrs['lane']}]"
        if op.result.type.dtype == "bool":
            return self._made(f"{text} != 0", vector, precedence=_LOOSE)
        return self._made(text, vector)

    def _convert(self, op: Op, x: _Expression, source: str, target: str, lanes: int) -> _Expression:
        """cast and bitcast. Masks are 0 or -1 in each lane, as numbers 0 or 1."""
        dtype = op.result.type.dtype
        if source == dtype:
            return x
        if op.name == "bitcast":
            return self._made(f"__builtin_bit_cast({target}, {x.text})", x)
        if dtype == "bool":
            return self._binary("ne", x, _Expression(_literal(0, source)))
        if lanes == 1:
            return self._made(f"{dtype}({x.text})", x)
        if source == "bool":
            x = self._made(f"{x.at(_UNARY)} & 1", x, precedence=_LOOSE)
        if dtype == "f32" or source == "f32":
            return self._made(f"__builtin_convertvector({x.text}, {target})", x)
        return x if dtype == "i32" and source == "bool" else self._made(f"__builtin_bit_cast({target}, {x.text})", x)

    # -- index expressions

    def _index(self, index: Index) -> _Expression:
        """`long` arithmetic; the operands of / and % are not negative, so C++ rounds as the IR does."""
        terms = [(self._atom(atom), coefficient) for atom, coefficient in index.terms]
        if len(terms) == 1 and terms[0][1] == 1 and not index.constant:
            return terms[0][0]
        pieces = [(c, a.text if abs(c) == 1 else f"{abs(c)} * {a.at(_UNARY)}") for a, c in terms]
        if index.constant or not pieces:
            pieces.append((index.constant, str(abs(index.constant))))
        pieces.sort(key=lambda piece: piece[0] < 0)
        (sign, first), *rest = pieces
        text = " ".join(
            [f"-{first}" if sign < 0 else first, *(f"{'-' if sign < 0 else '+'} {piece}" for sign, piece in rest)]
        )
        return _Expression(text, _SUM if rest or sign < 0 else _PRODUCT if terms else _PRIMARY)

    def _atom(self, atom: Variable | Compound) -> _Expression:
        if isinstance(atom, Variable):
            if atom.name not in self._indices:
                raise CompilerBug(f"kernel {self.kernel.name}: index variable {atom.name} is not in scope")
            return _Expression(self._indices[atom.name])
        left, right = self._index(atom.left), self._index(atom.right)
        if atom.op in ("min", "max"):
            return _Expression(f"{_FUNCTIONS[atom.op]}<long>({left.text}, {right.text})")
        return _Expression(f"{left.at(_UNARY)} {'/' if atom.op == '//' else '%'} {right.at(_UNARY)}", _PRODUCT)
