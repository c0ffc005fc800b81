"""One loop-level kernel of the gpu strategy as a WGSL module. One to one: it optimises nothing.

A buffer is an array of vec4 where every access is a vector at a multiple of four, else an array of numbers. Values are
`let`s, or part of the one expression that reads them where that is short; what a loop carries is a `var` that the loop's
end assigns. A load is always a `let`, so none moves across a store or a barrier, and so is what a subgroup computes.
Index expressions of grid ids and threads that need a division are computed once, at the head. Browsers want the directive
`enable subgroups;` before a module that needs it, and wgpu refuses it: the browser's host adds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from tinygpt.ir.bounds import read_by_number
from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Atom, Compound, Index, Variable
from tinygpt.ir.plan import grid_points
from tinygpt.ir.types import VectorType
from tinygpt.targets.wgsl.names import Names

LONGEST_INLINED = 60  # characters
_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
_CALLS = {"min": "min", "max": "max", "abs": "abs", "sqrt": "sqrt", "exp": "exp", "log": "log", "tanh": "tanh"}
_HINTS = {
    "load": "x", "fold": "total", "index": "n", "join": "v", "extract": "lane", "splat": "v", "select": "chosen",
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), "is"),
}  # fmt: skip
# How a thread knows its number: as an argument of the entry point, and an expression. Where subgroups compute, a thread's
# neighbours must be its subgroup's lanes; the specification does not say which lanes the local index gives.
_THREAD = ("@builtin(local_invocation_index) local: u32", "local")
_SUBGROUP_THREAD = (
    "@builtin(subgroup_id) subgroup: u32, @builtin(subgroup_size) subgroup_lanes: u32, @builtin(subgroup_invocation_id) lane_id: u32",
    "subgroup * subgroup_lanes + lane_id",
)
_COMPARE = {name: _INFIX[name] for name in ("lt", "le", "gt", "ge", "eq", "ne")}


@dataclass(frozen=True)
class Place:
    """What a pointer points to: an array, the lanes of its elements, and where in it, in elements of one number."""

    array: str
    lanes: int
    at: Index
    by: str = ""  # added at run time


def grid_size(kernel: Kernel, limit: int) -> tuple[int, int, int]:
    """Workgroups along x, y and z: one for each grid point, in rows where a dimension cannot hold them all."""
    points = grid_points(kernel)
    if not limit or points <= limit:
        return points, 1, 1
    rows = ceil(points / limit)
    return ceil(points / rows), rows, 1


def print_kernel(kernel: Kernel, caps: Caps) -> str:
    """The kernel as a module with the entry point `main`; its buffers are bindings 0, 1, … of group 0."""
    return KernelPrinter(kernel, caps).text()


class KernelPrinter:
    """Prints one kernel."""

    def __init__(self, kernel: Kernel, caps: Caps) -> None:
        if kernel.level != "loop" or "threads" not in kernel.cost:
            raise CompilerBug(f"wgsl: kernel {kernel.name} is no loop kernel of the gpu strategy")
        self.kernel, self.caps = kernel, caps
        self.names = Names()
        self.lines: list[str] = []
        self.depth = 1
        self.values: dict[Value, str] = {}
        self.places: dict[Value, Place] = {}
        self.carried: set[Value] = set()  # variables: what reads one is a `let`, computed before it changes
        self.indices = {name: name for name in ("thread", *kernel.grid)}
        self.heads: dict[str, str] = {}  # texts computed at the head, and what they are called there
        self.shared: dict[int, int] = {}
        self.uses = Counter(v for op in kernel.body.walk() for v in [*op.operands, *(y for r in op.regions for y in r.yields)])
        self.is_local = local_reads(kernel.body)
        self.folds = any(op.name == "subgroup_fold" for op in kernel.body.walk())
        self.vectors = set(kernel.params) - read_by_number(kernel)

    # -- the module
    def text(self) -> str:
        for name in self.kernel.grid:
            self.names.new(name)
        bindings = []
        for number, (value, access) in enumerate(zip(self.kernel.params, self.kernel.access, strict=True)):
            name = self.names.new(value.hint or "buffer")
            lanes = 4 if value in self.vectors else 1
            self.places[value] = Place(name, lanes, Index.of(0))
            element = value.type.dtype if lanes == 1 else f"vec4<{value.type.dtype}>"
            mode = "read" if access == "in" else "read_write"
            bindings.append(f"@group(0) @binding({number}) var<storage, {mode}> {name}: array<{element}>;")
        self.region(self.kernel.body)
        body, self.lines = self.lines, []
        shared = [f"var<workgroup> memory{'4' if n == 4 else ''}: array<{'vec4<f32>' if n == 4 else 'f32'}, {size // n}>;" for n, size in sorted(self.shared.items())]
        threads = self.kernel.cost["threads"]
        arguments, thread = _SUBGROUP_THREAD if self.folds else _THREAD
        head = [
            f"@compute @workgroup_size({threads})",
            f"fn main(@builtin(workgroup_id) workgroup_id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, {arguments}) {{",
            f"  let thread = i32({thread});",
            *self.grid_ids(),
            *(f"  let {name} = {text};" for text, name in self.heads.items()),
        ]
        directives = ["enable f16;"] if any(v.type.dtype == "f16" for v in self.kernel.params) else []
        pieces = [self.comment(), directives, bindings, shared, [*head, *body, "}"]]
        return "\n\n".join("\n".join(p) for p in pieces if p) + "\n"

    def comment(self) -> list[str]:
        def fields(values: Mapping[str, object]) -> str:
            return ", ".join(f"{key} = {value}" for key, value in values.items() if key != "extents")

        rows = {
            "of": self.kernel.of, "grid": fields(self.kernel.grid), "order": fields(self.kernel.order), "cost": fields(self.kernel.cost),
            "dims": ", ".join(f"{d.name} = {d.size} of {d.limit} from {d.start}" for d in self.kernel.dims),
            "profile": self.caps.name,
        }  # fmt: skip
        return [f"// {one_line(self.kernel.name)}", *(f"//   {key:8}{one_line(text)}" for key, text in rows.items() if text)]

    def grid_ids(self) -> list[str]:
        """The grid ids from the workgroup's number, and the end of workgroups beyond the last grid point."""
        points = grid_points(self.kernel)
        width, height, _ = grid_size(self.kernel, self.caps.grid_limit)
        if points == 1:
            return [f"  let {name} = 0;" for name in self.kernel.grid]
        lines = ["  let point = i32(workgroup_id.x);" if height == 1 else "  let point = i32(workgroup_id.y * groups.x + workgroup_id.x);"]
        if width * height > points:
            lines.append(f"  if (point >= {points}) {{ return; }}")
        inner = 1
        for name, extent in reversed(list(self.kernel.grid.items())):
            text = "point" if inner == 1 else f"point / {inner}"
            if inner * extent < points:
                text = f"({text}) % {extent}" if inner > 1 else f"point % {extent}"
            lines.append(f"  let {name} = {text if extent > 1 else 0};")
            inner *= extent
        return lines

    # -- statements
    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    def region(self, region: Region) -> None:
        for op in region.ops:
            match op.name:
                case "note":
                    self.line(f"// {one_line(op.attrs['text'])}")
                case "barrier":
                    self.line("workgroupBarrier();")
                case "store":
                    self.store(op)
                case "for":
                    self.loop(op)
                case "if":
                    self.branch(op)
                case "bind":
                    self.bind(op)
                case "shared":
                    lanes = op.attrs["lanes"]
                    end = op.attrs["offset"] + op.attrs["size"]
                    self.shared[lanes] = max(self.shared.get(lanes, 0), -(-end // 4) * 4)
                    self.places[op.result] = Place("memory4" if lanes == 4 else "memory", lanes, Index.of(op.attrs["offset"]))
                case "advance":
                    self.places[op.result] = self.advanced(op)
                case "subgroup_fold":
                    self.subgroup_fold(op)
                case _:
                    self.value(op)

    def subgroup_fold(self, op: Op) -> None:
        """Threads exchange what they have with the one half a group away, then a quarter, and so on."""
        self.name_operand(op.operands[0])
        x = self.values[op.operands[0]]
        for distance in (op.attrs["width"] >> n for n in range(1, op.attrs["width"].bit_length())):
            name = self.names.new("total" if op.attrs["kind"] == "sum" else "most")
            other = f"subgroupShuffleXor({x}, {distance}u)"
            self.line(f"let {name} = {f'{x} + {other}' if op.attrs['kind'] == 'sum' else f'max({x}, {other})'};")
            x = name
        self.values[op.result] = x

    def value(self, op: Op) -> None:
        """A value: inlined where it is short and read once, a `let` elsewhere."""
        count = self.uses[op.result]
        if not count:
            return
        if op.name in ("extract", "fold"):
            self.name_operand(op.operands[0])
        text = self.expression(op)
        short = count == 1 and op.result in self.is_local and op.name != "load" and len(text) < LONGEST_INLINED
        if op.name in ("const", "index", "lanes") or ((op.name == "extract" or short) and not self.carried & set(op.operands)):
            plain = op.name in ("const", "extract", "splat", "join", "lanes", "fold") or is_call(text) or text.isidentifier()
            self.values[op.result] = text if plain else f"({text})"
            return
        name = self.names.new(op.result.hint or _HINTS.get(op.name, op.name))
        self.line(f"let {name} = {text};")
        self.values[op.result] = name

    def name_operand(self, value: Value) -> None:
        """Give a value a name if it is an expression, because it is about to be written more than once."""
        if not self.values[value].isidentifier():
            name = self.names.new("v")
            self.line(f"let {name} = {self.values[value]};")
            self.values[value] = name

    def loop(self, op: Op) -> None:
        (body,) = op.regions
        variables = []
        for arg, start in zip(body.args, op.operands, strict=True):
            variables.append(self.names.new(arg.hint or "sum"))
            self.line(f"var {variables[-1]} = {self.values[start]};")
            self.values[arg] = variables[-1]
            self.carried.add(arg)
        name = self.names.new(op.attrs["var"])
        self.indices[op.attrs["var"]] = name
        low, high, step = self.index(op.attrs["lo"]), self.index(op.attrs["hi"]), op.attrs["step"]
        self.line(f"for (var {name} = {low}; {name} < {high}; {name} += {step}) {{")
        self.depth += 1
        self.region(body)
        self.assign(body, variables)
        self.depth -= 1
        self.line("}")
        for result, variable in zip(op.results, variables, strict=True):
            self.values[result] = variable

    def bind(self, op: Op) -> None:
        name = self.indices[op.attrs["var"]] = self.names.new(op.attrs["var"])
        self.line(f"let {name} = clamp({self.values[op.operands[0]]}, {op.attrs['lo']}, {op.attrs['hi']});")

    def assign(self, body: Region, variables: Sequence[str]) -> None:
        """The next values of what a loop carries. One that is another's old value is saved first."""
        texts = [self.values[v] for v in body.yields]
        for n, text in enumerate(texts):
            if text in variables[:n]:
                texts[n] = self.names.new("next")
                self.line(f"let {texts[n]} = {text};")
        for variable, text in zip(variables, texts, strict=True):
            if variable != text:
                self.line(f"{variable} = {text};")

    def branch(self, op: Op) -> None:
        left, right = self.index(op.attrs["left"]), self.index(op.attrs["right"])
        self.line(f"if ({left} {_COMPARE[op.attrs['compare']]} {right}) {{")
        for number, region in enumerate(op.regions):
            if number:
                self.line("} else {")
            self.depth += 1
            self.region(region)
            self.depth -= 1
        self.line("}")

    # -- memory
    def advanced(self, op: Op) -> Place:
        place = self.places[op.operands[0]]
        by = place.by
        if len(op.operands) > 1:
            step = self.values[op.operands[1]]
            by = " + ".join(filter(None, [by, step if op.attrs["scale"] == 1 else f"{step} * {op.attrs['scale']}"]))
        return Place(place.array, place.lanes, place.at + op.attrs["by"], by)

    def address(self, place: Place, at: Index) -> str:
        at = place.at + at
        if place.lanes == 1:
            return " + ".join(filter(None, [place.by, self.index(at) if at != Index.of(0) or not place.by else ""]))
        if place.by:
            return f"({place.by} + {self.index(at)}) / {place.lanes}"
        if not at.divisible_by(place.lanes):
            raise CompilerBug(f"{self.kernel.name}: {at} is not a multiple of {place.lanes}")
        return self.index(at // place.lanes)

    def loaded(self, op: Op) -> str:
        place, at = self.places[op.operands[0]], op.attrs["at"]
        type = op.result.type
        if not isinstance(type, VectorType) or place.lanes == type.lanes:
            return f"{place.array}[{self.address(place, at)}]"
        lanes = [f"{place.array}[{self.address(place, at + n)}]" for n in range(type.lanes)]
        return f"{type_name(type)}({', '.join(lanes)})"

    def store(self, op: Op) -> None:
        place, at = self.places[op.operands[0]], op.attrs["at"]
        value = op.operands[1]
        if not isinstance(value.type, VectorType) or place.lanes == value.type.lanes:
            self.line(f"{place.array}[{self.address(place, at)}] = {self.values[value]};")
            return
        self.name_operand(value)
        for n in range(value.type.lanes):
            self.line(f"{place.array}[{self.address(place, at + n)}] = {self.values[value]}.{'xyzw'[n]};")

    # -- expressions
    def expression(self, op: Op) -> str:
        args = [self.values[v] for v in op.operands if v in self.values]
        type = op.result.type
        match op.name:
            case "const":
                text = literal(op.attrs["value"], type.dtype)
                return f"{type_name(type)}({text})" if isinstance(type, VectorType) else text
            case "index":
                return self.index(op.attrs["at"])
            case "lanes":
                return f"vec4<i32>({', '.join(map(str, range(type.lanes)))})"
            case "splat" | "join":
                return f"{type_name(type)}({', '.join(args)})"
            case "extract":
                return f"{args[0]}.{'xyzw'[op.attrs['lane']]}"
            case "load":
                return self.loaded(op)
            case "fold":
                return folded(args[0], op.attrs["kind"])
            case "cast":
                return f"{type_name(type)}({args[0]})"
            case "bitcast":
                return f"bitcast<{type_name(type)}>({args[0]})"
            case "select":
                return f"select({args[2]}, {args[1]}, {args[0]})"
            case "fma":
                return f"fma({', '.join(args)})" if self.caps.fma else f"{args[0]} * {args[1]} + {args[2]}"
            case "neg":
                return f"-{args[0]}"
            case "shl" | "shr":
                amount = type_name(VectorType("u32", type.lanes) if isinstance(type, VectorType) else "u32")
                return f"{args[0]} {_INFIX[op.name]} {amount}({args[1]})"
        if op.name in _INFIX:
            return f"{args[0]} {_INFIX[op.name]} {args[1]}"
        if op.name in _CALLS:
            return f"{_CALLS[op.name]}({', '.join(args)})"
        raise CompilerBug(f"{self.kernel.name}: WGSL has no {op.name}")

    def index(self, at: Index) -> str:
        pieces = []
        for atom, coefficient in at.terms:
            text = self.atom(atom)
            size = abs(coefficient)
            text = text if size == 1 else f"{text} * {size}"
            pieces.append(f"{'-' if coefficient < 0 else '+'} {text}")
        if at.constant or not pieces:
            pieces.append(f"{'-' if at.constant < 0 else '+'} {abs(at.constant)}")
        if pieces[0].startswith("-"):
            later = next((n for n, p in enumerate(pieces) if p.startswith("+")), 0)
            pieces.insert(0, pieces.pop(later))
        first = pieces[0].removeprefix("+ ") if pieces[0].startswith("+") else f"-{pieces[0].removeprefix('- ')}"
        return " ".join([first, *pieces[1:]])

    def atom(self, atom: Atom) -> str:
        if isinstance(atom, Variable):
            return self.indices[atom.name]
        left, right = self.index(atom.left), self.index(atom.right)
        if atom.op in ("min", "max"):
            return f"{atom.op}({left}, {right})"
        text = f"{left if left.isidentifier() else f'({left})'} {divided(atom) or f'{atom.op[0]} {right}'}"
        names = atom.left.variables() | atom.right.variables()
        if names <= {"thread", *self.kernel.grid}:
            if text not in self.heads:
                self.heads[text] = self.names.new(head_name(atom))
            return self.heads[text]
        return f"({text})"


def local_reads(region: Region) -> set[Value]:
    """Values that an op of the same region reads, so that writing them there moves nothing into a loop or branch."""
    own = {r for op in region.ops for r in op.results}
    found = own & ({v for op in region.ops for v in op.operands if not op.regions} | set(region.yields))
    return found.union(*(local_reads(r) for op in region.ops for r in op.regions))


def divided(atom: Compound) -> str:
    """Division by a power of two as the shift, its remainder as the mask that it is; empty for other divisors."""
    n = atom.right.constant
    if not atom.right.is_constant or n <= 0 or n & (n - 1):
        return ""
    return f">> {n.bit_length() - 1}" if atom.op == "//" else f"& {n - 1}"


def head_name(atom: Compound) -> str:
    """A name for a quotient or remainder of the thread's number: its place in the grid of threads."""
    if atom.left == Index.variable("thread"):
        return "y" if atom.op == "//" else "x"
    return "part" if atom.op == "//" else "rest"


def is_call(text: str) -> bool:
    """Whether the text is one call, so that it needs no parentheses: every parenthesis inside closes before the last."""
    if not text.endswith(")") or not text.split("(", 1)[0].replace("<", "").replace(">", "").isidentifier():
        return False
    depth = 0
    for n, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 0 and n < len(text) - 1:
            return False
    return True


def one_line(text: str) -> str:
    return " ".join(text.split())


def type_name(type: object) -> str:
    if isinstance(type, VectorType):
        return f"vec{type.lanes}<{type.dtype}>"
    return str(type.dtype) if hasattr(type, "dtype") else str(type)


def folded(v: str, kind: str) -> str:
    """The lanes of a vec4 as a tree: lane i with lane i + 2, then with lane i + 1."""
    if kind == "sum":
        return f"(({v}.x + {v}.z) + ({v}.y + {v}.w))"
    return f"max(max({v}.x, {v}.z), max({v}.y, {v}.w))"


def literal(value: float | int, dtype: str) -> str:
    """A number of a dtype; floats by the shortest decimal that rounds to them."""
    match dtype:
        case "bool":
            return "true" if value else "false"
        case "u32":
            return f"{int(value) & 0xFFFFFFFF}u"
        case "i32":
            return str(int(value)) if int(value) > -(2**31) else "(-2147483647 - 1)"
        case "f32":
            number = np.float32(value)
            if not np.isfinite(number):
                raise CompilerBug(f"WGSL has no literal for {number}")
            return f"({number!s}f)" if np.signbit(number) else f"{number!s}f"
        case "f16":
            half = np.float16(value)
            if not np.isfinite(half):
                raise CompilerBug(f"WGSL has no literal for {half}")
            return f"({half!s}h)" if np.signbit(half) else f"{half!s}h"
    raise CompilerBug(f"the wgsl target has no {dtype}")

