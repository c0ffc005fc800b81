"""The text form of the IR, at every level: printing, and parsing back to the same module.

One syntax (ir/grammar.lark) serves graph functions, tile kernels and loop kernels; op names and attributes are not
checked here (the verifier does that). Printing what was parsed gives the same text again. ir/syntax.py reads the text
into a light tree; here names, types and dims are resolved, each complaint pointing at its line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lark import Token

from tinygpt.ir.core import Function, Kernel, Location, Module, Op, Parameter, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index
from tinygpt.ir.syntax import (
    FunctionSyntax, KernelSyntax, ModuleSyntax, OpSyntax, ParameterSyntax, Problem, RegionSyntax, errors_shown_in,
    kernel_syntax, module_syntax, unquoted,
)  # fmt: skip
from tinygpt.ir.types import NUMPY_DTYPES, Dim, PointerType, ScalarType, TensorType, TileType, Type, VectorType

Notes = Mapping[Op, Iterable[str]]
NOTE_MARK = "  ^ "

_INDENT = "  "
_SYMBOL = re.compile(r"[A-Za-z0-9_.:-]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_NOT_IN_A_VALUE_NAME = re.compile(r"[^A-Za-z0-9_.]")
_NUMBER_OF_COPY = re.compile(r"\.([0-9]+)$")
# After `module name {` these words start an item, so an attribute of that name is quoted.
_ITEM_WORDS = frozenset({"fn", "kernel"})


# ---------------------------------------------------------------------------------------------------- printing


def print_module(module: Module) -> str:
    """The text of a whole module: parameters, then functions, then kernels."""
    names = _parameter_names(module)
    lines = [f"module {_symbol(module.name)}{_braces(module.attrs)} {{"]
    lines += (_INDENT + _parameter_line(p) for p in module.parameters.values())
    for function in module.functions.values():
        _Printer(lines, names).function(function, _INDENT)
    for kernel in module.kernels.values():
        _Printer(lines).kernel(kernel, _INDENT)
    lines.append("}")
    return "\n".join(lines) + "\n"


def print_function(module: Module, function: Function, notes: Notes | None = None) -> str:
    """The text of one function; `module` names the parameters it reads, `notes` appear under the ops they are about."""
    lines: list[str] = []
    _Printer(lines, _parameter_names(module), notes).function(function, "")
    return "\n".join(lines) + "\n"


def print_kernel(kernel: Kernel, notes: Notes | None = None) -> str:
    """The text of one kernel; `parse_kernel` reads it, unless it has `notes`, which appear under the ops they are about."""
    lines: list[str] = []
    _Printer(lines, notes=notes).kernel(kernel, "")
    return "\n".join(lines) + "\n"


def print_op(op: Op) -> str:
    """The text of one op with its regions, out of context: values from outside go by their hints."""
    lines: list[str] = []
    _Printer(lines).op(op, "")
    return "\n".join(lines)


class _Printer:
    """Appends the lines of one function or kernel; a value gets its name where it is first met."""

    def __init__(self, lines: list[str], parameters: Mapping[Value, str] | None = None, notes: Notes | None = None) -> None:
        self.lines = lines
        self.notes = notes or {}
        self.names: dict[Value, str] = dict(parameters or {})
        self.copies: dict[str, int] = {}
        self.unnamed = 0
        self.texts: dict[int, str] = {}  # of types and Index expressions, by identity: the IR outlives the printer

    def function(self, function: Function, indent: str) -> None:
        body = function.body
        params = ", ".join(self.typed(v) for v in body.args)
        result_names = function.result_names or [f"result{i}" for i in range(len(body.yields))]
        named = zip(result_names, body.yields, strict=True)
        results = ", ".join(f"{_key(name)}: {self.text(v.type)}" for name, v in named)
        arrow = f" -> ({results})" if results else ""
        self.lines.append(f"{indent}fn {_symbol(function.name)}({params}){arrow} {{")
        inner = indent + _INDENT
        self.ops(body.ops, inner)
        for parameter, value in function.updates.items():
            self.lines.append(f"{inner}update @{_symbol(parameter)} = {self.name(value)}")
        if body.yields:
            self.lines.append(f"{inner}return {self.all_names(body.yields)}")
        self.lines.append(indent + "}")

    def kernel(self, kernel: Kernel, indent: str) -> None:
        buffers = zip(kernel.params, kernel.access, strict=True)
        params = ", ".join(f"{self.name(v)}: {access} {self.text(v.type)}" for v, access in buffers)
        attrs = {"level": kernel.level, "of": kernel.of, "order": kernel.order, "cost": kernel.cost}
        written = _braces({key: value for key, value in attrs.items() if value or key == "level"})
        self.lines.append(f"{indent}kernel {_symbol(kernel.name)}({params}){written} {{")
        inner = indent + _INDENT
        if kernel.grid:
            extents = ", ".join(f"{name} = {extent}" for name, extent in kernel.grid.items())
            self.lines.append(f"{inner}grid {extents}")
        for dim in kernel.dims:
            self.lines.append(f"{inner}dim {dim.name} = <{dim.start}> : {dim.size} of {dim.limit}")
        self.ops(kernel.body.ops, inner)
        self.lines.append(indent + "}")

    def ops(self, ops: Iterable[Op], indent: str) -> None:
        for op in ops:
            self.op(op, indent)

    def op(self, op: Op, indent: str) -> None:
        first = len(self.lines)
        targets = f"{self.all_names(op.results)} = " if op.results else ""
        line = f"{indent}{targets}{op.name}({self.all_names(op.operands)}){_braces(op.attrs, self.texts)}"
        for region in op.regions:
            args = ", ".join(self.typed(v) for v in region.args)
            self.lines.append(f"{line} do ({args}) {{" if args else f"{line} do {{")
            self.ops(region.ops, indent + _INDENT)
            if region.yields:
                self.lines.append(f"{indent}{_INDENT}yield {self.all_names(region.yields)}")
            line = indent + "}"
        if op.results:
            line += " : " + ", ".join([self.text(v.type) for v in op.results])
        self.lines.append(line + _location(op.loc) if op.loc else line)
        if op in self.notes:
            self.lines[first + 1 : first + 1] = [f"{indent}{NOTE_MARK}{note}" for note in self.notes[op]]

    def typed(self, value: Value) -> str:
        return f"{self.name(value)}: {self.text(value.type)}"

    def all_names(self, values: Iterable[Value]) -> str:
        return ", ".join([self.name(v) for v in values])

    def name(self, value: Value) -> str:
        found = self.names.get(value)
        if found is None:
            found = self.names[value] = "%" + self.fresh(value.hint)
        return found

    def fresh(self, hint: str) -> str:
        """The hint, with a dot and a number where it is taken. Reading takes the number off again, so that the hints of
        a module, and all names made from them, survive the round trip."""
        hint = _NUMBER_OF_COPY.sub(r"_\1", _NOT_IN_A_VALUE_NAME.sub("_", hint))
        if not hint or hint.isdigit():
            self.unnamed += 1
            return str(self.unnamed)
        copies = self.copies[hint] = self.copies.get(hint, -1) + 1
        return f"{hint}.{copies}" if copies else hint

    def text(self, type: Type) -> str:
        found = self.texts.get(id(type))
        if found is None:
            found = self.texts[id(type)] = str(type)
        return found


def _parameter_names(module: Module) -> dict[Value, str]:
    return {p.value: f"@{_symbol(p.name)}" for p in module.parameters.values()}


def _parameter_line(parameter: Parameter) -> str:
    return f"{parameter.role} @{_symbol(parameter.name)} : {parameter.type}{_braces({'init': parameter.init})}"


def _location(loc: Location) -> str:
    text = f", {_quoted(loc.text)}" if loc.text else ""
    return f"    loc({_quoted(loc.file)}, {loc.line}{text})"


def _symbol(name: str) -> str:
    if not _SYMBOL.fullmatch(name):
        raise CompilerBug(f"{name!r} cannot be printed as a name: only letters, digits and _ . : - can")
    return name


def _key(name: str) -> str:
    return name if _NAME.fullmatch(name) and name not in _ITEM_WORDS else _quoted(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _braces(attrs: Mapping[str, Any], texts: dict[int, str] | None = None) -> str:
    """The attributes with a space before them, or nothing where there are none."""
    if not attrs:
        return ""
    texts = {} if texts is None else texts
    return " {" + ", ".join([f"{_key(key)} = {_attr(value, texts)}" for key, value in attrs.items()]) + "}"


def _attr(value: object, texts: dict[int, str]) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case int():
            return int.__repr__(value)
        case float():  # numpy's float64 is one as well, with a repr of its own
            return float.__repr__(value)
        case str():
            return _quoted(value)
        case Index():
            found = texts.get(id(value))
            if found is None:
                found = texts[id(value)] = f"<{value}>"
            return found
        case tuple() | list():
            return "[" + ", ".join([_attr(item, texts) for item in value]) + "]"
        case Mapping():
            return "{" + ", ".join(f"{_key(key)} = {_attr(item, texts)}" for key, item in value.items()) + "}"
    raise CompilerBug(f"attribute value {value!r} ({type(value).__name__}) is not plain data: it would not parse back")


# ---------------------------------------------------------------------------------------------------- parsing


def parse_module(text: str, source: str = "<text>") -> Module:
    """The module that `print_module` wrote (or a person did).

    Raises UserError with line, column and the line itself; `source` is the file named in it."""
    with errors_shown_in(text, source):
        return _module(module_syntax(text))


def parse_kernel(text: str, source: str = "<text>") -> Kernel:
    """The kernel that `print_kernel` wrote (or a person did). Raises UserError as `parse_module` does."""
    with errors_shown_in(text, source):
        return _Builder({}).kernel(kernel_syntax(text))


_TYPE = re.compile(r"(?P<dtype>\w+?)(?:x(?P<lanes>[0-9]{1,18})|\[(?P<shape>.*)\]|<(?P<axes>.*)>)?")
_SHAPE = re.compile(r"\s*(?:[0-9]{1,18}\s*(?:,\s*[0-9]{1,18}\s*)*)?")
_PARAMETER_HINT = "declare it in the module with `param` or `state`; kernels see none, they take buffers"
_TYPE_FORMS = "types are f32[16, 32], f32<i, _>, f32, f32x16 and ptr<f32, scratch>"


def _module(tree: ModuleSyntax) -> Module:
    parameters: dict[str, Parameter] = {}
    kernels: dict[str, Kernel] = {}
    functions: dict[str, Function] = {}
    for item in tree.items:
        if isinstance(item, ParameterSyntax):
            _only_once(item.name, parameters, "parameter")
            parameters[item.name[1:]] = _parameter(item)
    builder = _Builder(parameters)
    for item in tree.items:
        match item:
            case FunctionSyntax():
                _only_once(item.name, functions, "function")
                functions[str(item.name)] = builder.function(item)
            case KernelSyntax():
                _only_once(item.name, kernels, "kernel")
                kernels[str(item.name)] = _Builder({}).kernel(item)
    return Module(str(tree.name), parameters, functions, kernels, tree.attrs)


def _parameter(tree: ParameterSyntax) -> Parameter:
    name = tree.name[1:]
    type = _resolved(tree.type, {})
    if not isinstance(type, TensorType):
        raise Problem(f"a {tree.role} is a tensor, {tree.type} is not", tree.type, hint="write f32[48, 192]")
    _known_keys(tree.attrs, {"init"}, tree.name)
    init = tree.attrs.get("init", ("constant", 0.0))
    if not isinstance(init, tuple):
        raise Problem("init is a list", tree.name, hint='write init = ["normal", 0.02]')
    return Parameter(name, Value(type, name), str(tree.role), init)


class _Builder:
    """Makes functions and kernels from the tree. Names are looked up in the scopes that are open at that line."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = {f"@{name}": p.value for name, p in parameters.items()}
        self.scope: dict[str, Value] = {}
        self.defined: list[str] = []  # the names of the scope, latest last: a region takes its own away
        self.types: dict[str, Type] = {}
        self.dims: dict[str, Dim] = {}

    def function(self, tree: FunctionSyntax) -> Function:
        self.open({})
        args = tuple(self.define(v.name, v.type) for v in tree.params)
        ops = tuple(map(self.op, tree.ops))
        updates: dict[str, Value] = {}
        for update in tree.updates:
            self.find(update.parameter)
            _only_once(update.parameter, updates, "update of")
            updates[update.parameter[1:]] = self.find(update.value)
        returned = tuple(map(self.find, tree.returned))
        if len(returned) != len(tree.results):
            message = f"{tree.name} declares {len(tree.results)} results and returns {len(returned)}"
            raise Problem(message, tree.returned[0] if tree.returned else tree.name)
        names: dict[str, None] = {}
        for declared, token, value in zip(tree.results, tree.returned, returned, strict=True):
            _only_once(declared.name, names, "result")
            names[unquoted(declared.name)] = None
            if self.type(declared.type) != value.type:
                raise Problem(f"{token} is {value.type}, result {declared.name} is {declared.type}", token)
        return Function(str(tree.name), Region(args, ops, returned), updates, tuple(names))

    def kernel(self, tree: KernelSyntax) -> Kernel:
        dims: dict[str, Dim] = {}
        for dim in tree.dims:
            _only_once(dim.name, dims, "dim")
            name = str(dim.name)
            dims[name] = Dim(name, dim.start, int(dim.size), int(dim.limit))
        grid: dict[str, int] = {}
        for id, extent in tree.grid:
            _only_once(id, grid, "grid id")
            grid[str(id)] = int(extent)
        self.open(dims)
        args = tuple(self.define(b.name, b.type) for b in tree.params)
        body = Region(args, tuple(map(self.op, tree.ops)))
        _known_keys(tree.attrs, {"level", "of", "order", "cost"}, tree.name)
        for key, value in tree.attrs.items():
            if not isinstance(value, str if key in ("level", "of") else dict):
                form = "a string" if key in ("level", "of") else "a dict such as {lanes = 16}"
                raise Problem(f"attribute {key} of {tree.name} is {form}", tree.name)
        access = tuple(str(b.access) for b in tree.params)
        return Kernel(str(tree.name), body, access, grid, tuple(dims.values()), **tree.attrs)

    def open(self, dims: Mapping[str, Dim]) -> None:
        """Start a function or kernel: no values yet, and the dims its types may name."""
        self.scope = {}
        self.defined = []
        self.types = {}
        self.dims = dict(dims)

    def op(self, tree: OpSyntax) -> Op:
        operands = tuple([self.find(v) for v in tree.operands])
        regions = tuple([self.region(r) for r in tree.regions])
        if len(tree.results) != len(tree.types):
            message = f"{tree.call} has {len(tree.results)} results and {len(tree.types)} result types"
            raise Problem(message, tree.call, hint="write one type for each result, after a colon")
        results = tuple(map(self.define, tree.results, tree.types))
        return Op(str(tree.call), operands, results, tree.attrs, regions, tree.loc)

    def region(self, tree: RegionSyntax) -> Region:
        outer = len(self.defined)
        args = tuple(self.define(v.name, v.type) for v in tree.args)
        ops = tuple(map(self.op, tree.ops))
        yields = tuple(map(self.find, tree.yields))
        for name in self.defined[outer:]:
            del self.scope[name]
        del self.defined[outer:]
        return Region(args, ops, yields)

    def define(self, name: Token, type: Token) -> Value:
        if name in self.scope:
            raise Problem(f"{name} is defined twice", name, hint="a value has one definition; rename one of them")
        hint = _NUMBER_OF_COPY.sub("", name[1:])
        value = Value(self.type(type), "" if hint.isdigit() else hint)
        self.scope[str(name)] = value
        self.defined.append(name)
        return value

    def find(self, name: Token) -> Value:
        found = self.scope.get(name)
        if found is not None:
            return found
        found = self.parameters.get(name)
        if found is not None:
            return found
        if name.type == "PARAMETER":
            raise Problem(f"no parameter {name} here", name, hint=_PARAMETER_HINT)
        raise Problem(f"{name} is not defined at this point", name, hint="a value is defined above its first use")

    def type(self, token: Token) -> Type:
        found = self.types.get(token)
        if found is None:
            found = self.types[str(token)] = _resolved(token, self.dims)
        return found


def _resolved(token: Token, dims: Mapping[str, Dim]) -> Type:
    """The type that a TYPE terminal spells."""
    match = _TYPE.fullmatch(token)
    if match is None:
        raise Problem(f"unknown type {token}", token, hint=_TYPE_FORMS)
    dtype, lanes, shape, axes = match.groups()
    parts = [part.strip() for part in (shape or axes or "").split(",")]
    if dtype == "ptr" and axes is not None and len(parts) == 2 and parts[0] in NUMPY_DTYPES:
        return PointerType(parts[0], parts[1])
    if dtype not in NUMPY_DTYPES:
        known = ", ".join(NUMPY_DTYPES)
        raise Problem(f"unknown type {token}", token, hint=f"{_TYPE_FORMS}; element types are {known}")
    if lanes is not None:
        return VectorType(dtype, int(lanes))
    if shape is not None:
        if not _SHAPE.fullmatch(shape):
            raise Problem(f"{token} has an extent that is not a number", token, hint="write f32[16, 32]")
        return TensorType(dtype, tuple(int(part) for part in parts if part))
    if axes is None:
        return ScalarType(dtype)
    if len(parts) != 2:
        raise Problem(f"{token} does not have two axes", token, hint="a tile has two, `_` for an axis of extent one")
    rows, cols = (None if part == "_" else _dim(part, dims, token) for part in parts)
    return TileType(dtype, rows, cols)


def _dim(name: str, dims: Mapping[str, Dim], at: Token) -> Dim:
    if name not in dims:
        declared = f"declared are {', '.join(dims)}" if dims else "none is declared here"
        hint = f"{declared}; write `dim {name} = <START> : SIZE of LIMIT`"
        raise Problem(f"dim {name} of {at} is not declared", at, hint=hint)
    return dims[name]


def _only_once(name: Token, known: Mapping[str, object], kind: str) -> None:
    plain = unquoted(name).removeprefix("@")
    if plain in known:
        raise Problem(f"{kind} {plain} is given twice", name)


def _known_keys(attrs: Mapping[str, Any], known: set[str], at: Token) -> None:
    for key in attrs.keys() - known:
        raise Problem(f"unknown attribute {key} of {at}", at, hint=f"known: {', '.join(sorted(known))}")
