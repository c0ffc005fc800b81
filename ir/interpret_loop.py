"""The interpreter of the loop level, for kernels of the cpu strategy: each kernel becomes a Python function over numpy.

Scalars are numpy scalars and vectors small arrays, so that every primitive rounds as the target's float32 does. A
pointer is an array and an offset, and every access is checked. Scratch starts as NaN: what nobody wrote shows up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index
from tinygpt.ir.scalar import PRIMITIVES, TRANSCENDENTAL, numpy_primitive
from tinygpt.ir.text import print_op
from tinygpt.ir.types import NUMPY_DTYPES, ScalarType, VectorType

Pointer = tuple[np.ndarray, int]

SCRATCH_ALIGNMENT = 16  # elements; a piece of scratch has at least this much room behind it
_QUIET_NAN = 0x7FC00000
_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
_FOLDS: dict[str, Callable[[Any, Any], Any]] = {"sum": np.add, "max": np.maximum}


def run_loop_kernel(kernel: Kernel, buffers: Sequence[np.ndarray], lo: int, hi: int, fused: bool = False) -> None:
    """Run the flattened grid points lo..hi-1 of a kernel over flat buffers, one per parameter, changed in place.

    `fused`: multiply-add rounds once, as on targets whose profile says so. Raises CompilerBug, naming kernel, op and
    address, for an access outside a buffer or a piece of scratch."""
    pointers: list[Pointer] = []
    for parameter, array in zip(kernel.params, buffers, strict=True):
        if array.ndim != 1 or array.dtype != NUMPY_DTYPES[parameter.type.dtype]:
            found = f"{array.dtype} {array.shape}"
            raise CompilerBug(f"kernel {kernel.name}: %{parameter.hint} is flat {parameter.type}, not {found}")
        pointers.append((array, 0))
    size, run = _compiled(kernel, fused)
    with np.errstate(all="ignore"):
        run(pointers, np.full(size, _QUIET_NAN, np.uint32), lo, hi)


def scratch_elements(kernel: Kernel) -> int:
    """How many elements of four bytes of scratch a thread needs to run the kernel."""
    return max((_end_of_piece(op) for op in kernel.body.walk() if op.name == "scratch"), default=0)


def _end_of_piece(op: Op) -> int:
    end: int = op.attrs["offset"] + op.attrs["size"] + SCRATCH_ALIGNMENT
    return -(-end // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT


@lru_cache(maxsize=64)
def _compiled(kernel: Kernel, fused: bool) -> tuple[int, Callable[..., None]]:
    if kernel.level != "loop":
        raise CompilerBug(f"kernel {kernel.name} is at {kernel.level} level, not at loop level")
    writer = _PythonWriter(kernel, fused)
    scope = writer.bound
    exec(compile(writer.source(), f"<kernel {kernel.name}>", "exec"), scope)  # written above, from the kernel alone
    return scratch_elements(kernel), scope["kernel"]


class _PythonWriter:
    """Writes a kernel as the text of a Python function; constants and ops are globals of that function."""

    def __init__(self, kernel: Kernel, fused: bool) -> None:
        self.kernel, self.fused = kernel, fused
        self.lines: list[str] = []
        self.names: dict[Value, str] = {}
        self.count = 0
        self.bound: dict[str, Any] = {
            "load": _load, "store": _store, "full": np.full, "i32": np.int32, "minimum": np.minimum,
            "maximum": np.maximum, "primitive": numpy_primitive, "interleave": _interleave, "fold": _fold,
            "scratch": _scratch, "fma": _fused,
        }  # fmt: skip

    def source(self) -> str:
        self.lines.append("def kernel(pointers, memory, lo, hi):")
        for number, value in enumerate(self.kernel.params):
            self.lines.append(f"    {self.define(value)} = pointers[{number}]")
        self.region(self.kernel.body, "    ")
        return "\n".join(self.lines)

    def define(self, value: Value) -> str:
        self.count += 1
        self.names[value] = f"_{self.count}"  # no index variable starts with an underscore
        return self.names[value]

    def get(self, op: Op, value: Value) -> str:
        if value not in self.names:
            raise CompilerBug(f"kernel {self.kernel.name}: %{value.hint} is not defined here\n  {print_op(op)}")
        return self.names[value]

    def bind(self, thing: Any) -> str:
        """A global name for something that has no text of its own."""
        name = f"g_{len(self.bound)}"
        self.bound[name] = thing
        return name

    def region(self, region: Region, indent: str) -> None:
        for op in region.ops:
            match op.name:
                case "note":
                    pass
                case "for":
                    self.loop(op, indent)
                case "bind":
                    number, attrs = self.get(op, op.operands[0]), op.attrs
                    self.lines.append(f"{indent}{attrs['var']} = min(max(int({number}), {attrs['lo']}), {attrs['hi']})")
                case "if":
                    self.branch(op, indent)
                case "outline":
                    self.outline(op, indent)
                case _:
                    text = self.expression(op, [self.get(op, v) for v in op.operands])
                    target = f"{self.define(op.result)} = " if op.results else ""
                    self.lines.append(f"{indent}{target}{text}")
        self.lines.append(f"{indent}pass")

    def assign(self, indent: str, targets: Sequence[str], sources: Sequence[str]) -> None:
        if targets:
            self.lines.append(f"{indent}{', '.join(targets)}, = {', '.join(sources)},")

    def loop(self, op: Op, indent: str) -> None:
        (body,) = op.regions
        start = [self.get(op, v) for v in op.operands]
        carried = [self.define(v) for v in body.args]
        self.assign(indent, carried, start)
        low, high, step = _text(op.attrs["lo"]), _text(op.attrs["hi"]), op.attrs.get("step", 1)
        self.lines.append(f"{indent}for {op.attrs['var']} in range({low}, {high}, {step}):")
        self.region(body, indent + "  ")
        self.assign(indent + "  ", carried, [self.get(op, v) for v in body.yields])
        self.assign(indent, [self.define(v) for v in op.results], carried)

    def branch(self, op: Op, indent: str) -> None:
        condition = f"{_text(op.attrs['left'])} {_INFIX[op.attrs['compare']]} {_text(op.attrs['right'])}"
        for keyword, region in zip((f"if {condition}:", "else:"), op.regions):
            self.lines.append(f"{indent}{keyword}")
            self.region(region, indent + "  ")

    def outline(self, op: Op, indent: str) -> None:
        """The region in place, seeing its operands only."""
        (body,) = op.regions
        outer = self.names
        self.names = {arg: self.get(op, v) for arg, v in zip(body.args, op.operands, strict=True)}
        self.region(body, indent)
        self.names = outer

    def expression(self, op: Op, operands: list[str]) -> str:
        attrs, type = op.attrs, next((v.type for v in (*op.results, *reversed(op.operands))), ScalarType("i32"))
        lanes = type.lanes if isinstance(type, VectorType) else 1
        match op.name:
            case "const":
                return self.bind(_filled(type, NUMPY_DTYPES[type.dtype](attrs["value"])))
            case "index":
                return f"i32({_text(attrs['at'])})"
            case "lanes":
                return self.bind(np.arange(lanes, dtype=np.int32))
            case "scratch":
                return f"scratch(memory, {attrs['offset']}, {_end_of_piece(op)}, {self.bind(NUMPY_DTYPES[type.dtype])})"
            case "advance":
                by = f" + int({operands[1]}) * {attrs['scale']}" if len(operands) > 1 else ""
                return f"({operands[0]}[0], {operands[0]}[1] + {_text(attrs['by'])}{by})"
            case "load":
                return f"load({operands[0]}, {_text(attrs['at'])}, {lanes}, {self.bind((self.kernel, op))})"
            case "store":
                user = self.bind((self.kernel, op))
                return f"store({operands[0]}, {operands[1]}, {_text(attrs['at'])}, {lanes}, {user})"
            case "splat":
                return f"full({lanes}, {operands[0]})"
            case "extract":
                return f"{operands[0]}[{attrs['lane']}]"
            case "broadcast_lane":
                return f"full({lanes}, {operands[0]}[{attrs['lane']}])"
            case "interleave":
                return f"interleave({operands[0]}, {operands[1]}, {attrs['half']})"
            case "fold":
                return f"fold({operands[0]}, {attrs['kind']!r})"
            case "fma" if self.fused:
                return f"fma({', '.join(operands)})"
            case "fma":
                return f"{operands[0]} * {operands[1]} + {operands[2]}"
            case "neg":
                return f"-{operands[0]}"
            case "min" | "max":
                return f"{op.name}imum({', '.join(operands)})"
            case name if name in _INFIX:
                return f"{operands[0]} {_INFIX[name]} {operands[1]}"
            case name if name in PRIMITIVES or name in TRANSCENDENTAL:
                return f"primitive({name!r}, ({', '.join(operands)},), {type.dtype!r})[()]"
            case "barrier" | "shared" | "subgroup_fold":
                raise CompilerBug(f"kernel {self.kernel.name}: {op.name} needs the workgroup interpreter")
        raise CompilerBug(f"kernel {self.kernel.name}: {op.name} is not an op of the loop level")


def _text(index: Index | int) -> str:
    return str(index)  # an index expression prints as Python


def _filled(type: Any, value: Any) -> Any:
    return np.full(type.lanes, value) if isinstance(type, VectorType) else value


def _scratch(memory: np.ndarray, offset: int, end: int, dtype: Any) -> Pointer:
    return memory[offset:end].view(dtype), 0


def _place(pointer: Pointer, at: int, lanes: int, user: tuple[Kernel, Op]) -> int:
    array, offset = pointer
    first = offset + at
    if first < 0 or first + lanes > array.size:
        kernel, op = user
        where = f"elements {first}..{first + lanes - 1} of an array of {array.size}"
        raise CompilerBug(f"kernel {kernel.name}: {op.name} of {where}\n  {print_op(op)}")
    return first


def _load(pointer: Pointer, at: int, lanes: int, user: tuple[Kernel, Op]) -> Any:
    first = _place(pointer, at, lanes, user)
    return pointer[0][first] if lanes == 1 else pointer[0][first : first + lanes].copy()


def _store(pointer: Pointer, value: Any, at: int, lanes: int, user: tuple[Kernel, Op]) -> None:
    first = _place(pointer, at, lanes, user)
    pointer[0][first : first + lanes] = value


def _interleave(a: np.ndarray, b: np.ndarray, half: int) -> np.ndarray:
    middle = a.size // 2
    picked = slice(middle) if half == 0 else slice(middle, None)
    return np.stack((a[picked], b[picked]), axis=1).ravel()


def _fold(v: np.ndarray, kind: str) -> Any:
    while v.size > 1:
        middle = v.size // 2
        v = _FOLDS[kind](v[:middle], v[middle:])
    return v[0]


def _fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c rounded once: the product of two float32 is exact in float64."""
    wide = np.multiply(a, b, dtype=np.float64) + np.asarray(c, np.float64)
    return wide.astype(np.float32)[()]
