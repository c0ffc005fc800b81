"""From text to a light tree of lines: Lark, its grammar (ir/grammar.lark), and errors that show the place.

Attributes, index expressions and locations arrive as they will stay. Values, types and names are still the tokens that
were written; what they stand for is found in ir/text.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedInput, UnexpectedToken
from lark.lexer import PatternStr

from tinygpt.ir.core import Location
from tinygpt.ir.errors import UserError
from tinygpt.ir.index import Index


def module_syntax(text: str) -> ModuleSyntax:
    """The tree of a module's text. To be called inside `errors_shown_in`."""
    return cast(ModuleSyntax, _parser().parse(text, start="module"))


def kernel_syntax(text: str) -> KernelSyntax:
    """The tree of a kernel's text. To be called inside `errors_shown_in`."""
    return cast(KernelSyntax, _parser().parse(text, start="kernel"))


class TypedSyntax(NamedTuple):
    name: Token
    type: Token


class BufferSyntax(NamedTuple):
    name: Token
    access: Token
    type: Token


class RegionSyntax(NamedTuple):
    args: list[TypedSyntax]
    ops: list[OpSyntax]
    yields: list[Token]


class OpSyntax(NamedTuple):
    call: Token
    results: list[Token]
    operands: list[Token]
    attrs: dict[str, Any]
    regions: list[RegionSyntax]
    types: list[Token]
    loc: Location | None


class DimSyntax(NamedTuple):
    name: Token
    start: Index
    size: Token
    limit: Token


class UpdateSyntax(NamedTuple):
    parameter: Token
    value: Token


class FunctionSyntax(NamedTuple):
    name: Token
    params: list[TypedSyntax]
    results: list[TypedSyntax]
    ops: list[OpSyntax]
    updates: list[UpdateSyntax]
    returned: list[Token]


class KernelSyntax(NamedTuple):
    name: Token
    params: list[BufferSyntax]
    attrs: dict[str, Any]
    grid: list[TypedSyntax]
    dims: list[DimSyntax]
    ops: list[OpSyntax]


class ParameterSyntax(NamedTuple):
    role: Token
    name: Token
    type: Token
    attrs: dict[str, Any]


class ModuleSyntax(NamedTuple):
    name: Token
    attrs: dict[str, Any]
    items: list[ParameterSyntax | FunctionSyntax | KernelSyntax]


class _Tree(Transformer[Token, Any]):
    """Builds the tree while Lark parses: one method for each rule or terminal. It keeps no state.

    `[part]` in the grammar arrives as None where the part is absent."""

    def module(self, parts: list[Any]) -> ModuleSyntax:
        return ModuleSyntax(parts[0], parts[1] or {}, parts[2:])

    def parameter(self, parts: list[Any]) -> ParameterSyntax:
        role, name, type, attrs = parts
        return ParameterSyntax(role, name, type, attrs or {})

    def function(self, parts: list[Any]) -> FunctionSyntax:
        name, params, results, *body, returned = parts
        ops = [line for line in body if isinstance(line, OpSyntax)]
        updates = [line for line in body if isinstance(line, UpdateSyntax)]
        return FunctionSyntax(name, params or [], results or [], ops, updates, returned or [])

    def kernel(self, parts: list[Any]) -> KernelSyntax:
        name, params, attrs, grid, *body = parts
        dims = [line for line in body if isinstance(line, DimSyntax)]
        ops = [line for line in body if isinstance(line, OpSyntax)]
        return KernelSyntax(name, params or [], attrs or {}, grid or [], dims, ops)

    def op(self, parts: list[Any]) -> OpSyntax:
        results, call, operands, attrs, *regions, types, loc = parts
        return OpSyntax(call, results or [], operands or [], attrs or {}, regions, types or [], loc)

    def region(self, parts: list[Any]) -> RegionSyntax:
        args, *ops, yields = parts
        return RegionSyntax(args or [], ops, yields or [])

    def loc(self, parts: list[Any]) -> Location:
        file, line, text = parts
        return Location(unquoted(file), line, unquoted(text) if text else "")

    def attrs(self, parts: list[tuple[Token, Any]]) -> dict[str, Any]:
        attrs: dict[str, Any] = {}
        for key, value in parts:
            name = unquoted(key)
            if name in attrs:
                raise Problem(f"attribute {name} is given twice", key)
            attrs[name] = value
        return attrs

    def attr(self, parts: list[Any]) -> tuple[Token, Any]:
        key, value = parts
        # A key needs its token to the end, a string value does not.
        return key, unquoted(value) if isinstance(value, Token) else value

    def sequence(self, parts: list[Any]) -> tuple[Any, ...]:
        return tuple(unquoted(item) if isinstance(item, Token) else item for item in parts)

    def none(self, _: list[Any]) -> None:
        return None

    def true(self, _: list[Any]) -> bool:
        return True

    def false(self, _: list[Any]) -> bool:
        return False

    def empty(self, _: list[Any]) -> dict[str, Any]:
        return {}

    def INT(self, token: Token) -> int:
        return int(token)

    def FLOAT(self, token: Token) -> float:
        return float(token)

    def INDEX(self, token: Token) -> Index:
        try:
            return _index(token[1:-1])
        except UnexpectedInput as error:
            found, expected = _unexpected(error)
            shift = error.column if found else len(token) - 1
            message = f"{found or 'the index expression ends too early'}: expected {expected}"
            raise Problem(message, token, shift=shift) from None
        except (ValueError, ArithmeticError) as error:
            raise Problem(f"index expression {_shortened(token)}: {error}", token) from None

    def dim(self, parts: list[Any]) -> DimSyntax:
        return DimSyntax(*parts)

    def update(self, parts: list[Any]) -> UpdateSyntax:
        return UpdateSyntax(*parts)

    def buffer(self, parts: list[Any]) -> BufferSyntax:
        return BufferSyntax(*parts)

    def typed_value(self, parts: list[Any]) -> TypedSyntax:
        return TypedSyntax(*parts)

    result = extent = typed_value

    def values(self, parts: list[Any]) -> list[Any]:
        return parts

    operands = types = typed_values = results = buffers = grid = values

    def returned(self, parts: list[Any]) -> list[Token]:
        found: list[Token] = parts[0]
        return found

    yielded = returned

    def constant(self, parts: list[Token]) -> Index:
        return Index.of(int(parts[0]))

    def variable(self, parts: list[Token]) -> Index:
        return Index.variable(str(parts[0]))

    def negate(self, parts: list[Index]) -> Index:
        return -parts[0]

    def add(self, parts: list[Index]) -> Index:
        return parts[0] + parts[1]

    def subtract(self, parts: list[Index]) -> Index:
        return parts[0] - parts[1]

    def multiply(self, parts: list[Index]) -> Index:
        return parts[0] * parts[1]

    def floor_divide(self, parts: list[Index]) -> Index:
        return parts[0] // parts[1]

    def remainder(self, parts: list[Index]) -> Index:
        return parts[0] % parts[1]

    def minimum(self, parts: list[Index]) -> Index:
        return Index.minimum(*parts)

    def maximum(self, parts: list[Index]) -> Index:
        return Index.maximum(*parts)


@lru_cache(maxsize=None)
def _parser() -> Lark:
    return Lark(
        Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8"),
        parser="lalr",
        lexer="contextual",
        start=["module", "kernel", "index"],
        transformer=_Tree(),
        maybe_placeholders=True,
    )


@lru_cache(maxsize=65536)
def _index(text: str) -> Index:
    return cast(Index, _parser().parse(text, start="index"))


def unquoted(token: Token) -> str:
    if token.type != "STRING":
        return str(token)
    try:
        return str(json.loads(token, strict=False))
    except json.JSONDecodeError as error:
        raise Problem(f"a string with an unknown escape: {error.msg}", token) from None


class Problem(Exception):
    """Something wrong at a token; `shift` is how many characters into it."""

    def __init__(self, message: str, at: Token, *, hint: str = "", shift: int = 0) -> None:
        super().__init__(message)
        self.line = at.line or 1
        self.column = (at.column or 1) + shift
        self.hint = hint


@contextmanager
def errors_shown_in(text: str, source: str) -> Iterator[None]:
    """Turns what goes wrong inside into a UserError that shows the place in the text."""
    try:
        yield
    except Problem as problem:
        raise _shown(text, source, str(problem), problem.line, problem.column, problem.hint) from None
    except UnexpectedInput as error:
        found, expected = _unexpected(error)
        line, column = (error.line, error.column) if found else _end(text)
        message = f"{found or 'the text ends too early'}: expected {expected}"
        raise _shown(text, source, message, line, column, "the syntax is in ir/grammar.lark") from None
    except RecursionError:
        raise UserError(f"{source}: regions, attributes or index expressions are nested too deeply") from None


def _end(text: str) -> tuple[int, int]:
    """Line and column just after the last character that is not white space."""
    body = text.rstrip()
    return body.count("\n") + 1, len(body) - body.rfind("\n")


def _shown(text: str, source: str, message: str, line: int, column: int, hint: str) -> UserError:
    shown = next(islice(text.split("\n"), line - 1, None), "").replace("\t", " ").rstrip("\r")
    start = max(0, column - 80) if len(shown) > 120 else 0
    ellipsis = "…" if start else ""
    excerpt = ellipsis + shown[start : start + 120].rstrip()
    caret = " " * (column - 1 - start + len(ellipsis)) + "^"
    return UserError(f"{source}:{line}:{column}: {message}\n  {excerpt}\n  {caret}", hint=hint)


# What a terminal is called in an error; terminals with a fixed text show it.
_PLAIN_WORDS = {
    "$END": "the end of the text", "ROLE": '"param", "state"', "ACCESS": '"in", "out" or "inout"', "_DO": '"do"',
    "_LOC": '"loc"', "CALL": "an op with its operands in parentheses", "SYMBOL": "a name", "NAME": "a name",
    "PARAMETER": "a parameter such as @weight", "VALUE": "a value such as %x", "TYPE": "a type such as f32[16, 32]",
    "INDEX": "an index expression such as <g0*64>", "STRING": "a quoted string", "FLOAT": "a number",
    "INT": "a whole number", "NATURAL": "a number without sign",
}  # fmt: skip


def _unexpected(error: UnexpectedInput) -> tuple[str, str]:
    """What was found (empty at the end of the text), and what could have stood there, in words."""
    if isinstance(error, UnexpectedToken):
        found = "" if error.token.type == "$END" else f"unexpected `{_shortened(error.token)}`"
        expected = error.accepts or error.expected
    else:
        found = f"unexpected `{getattr(error, 'char', '')}`"
        expected = getattr(error, "allowed", None) or set()
    fixed = {t.name: f'"{t.pattern.value}"' for t in _parser().terminals if isinstance(t.pattern, PatternStr)}
    words = sorted({_PLAIN_WORDS.get(name) or fixed.get(name, "") for name in expected} - {""})
    if len(words) > 1:
        return found, f"{', '.join(words[:-1])} or {words[-1]}"
    return found, words[0] if words else "something else"


def _shortened(token: str) -> str:
    return f"{token[:40]}…" if len(token) > 40 else str(token)
