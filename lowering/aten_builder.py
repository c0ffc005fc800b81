"""The builder that captured ATen ops are emitted through: graph ops, plus what is known about the values they make.

The ops themselves are mapped in `lowering.aten`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tinygpt.ir.core import Location, Op, Value
from tinygpt.ir.errors import UserError
from tinygpt.ir.ops import GraphBuilder
from tinygpt.ir.tile import MASKED_SCORE
from tinygpt.ir.types import TensorType

DTYPES = {torch.float32: "f32", torch.int64: "i32", torch.int32: "i32", torch.bool: "bool"}

Operand = Value | float | int | bool


class AtenBuilder(GraphBuilder):
    """A graph under construction, with what the mapping needs to know: the op behind each value, which values are
    constants, and the type PyTorch gave to the result it is about to build."""

    def __init__(self) -> None:
        super().__init__()
        self.producer: dict[Value, Op] = {}
        self.known: dict[Value, torch.Tensor] = {}
        self.numbers: dict[tuple[float, str], Value] = {}
        self.random_key = Value(TensorType("u32", (2,)), "key")  # an input of the function, if dropout reads it
        self.streams = 0
        self.dropped: dict[Value, tuple[Value, float, int]] = {}  # results of dropout: of what, with which p and stream
        self.logits: Value | None = None  # what cross_entropy was taken of
        self.aten = ""
        self.expected = TensorType("f32", ())

    def at(self, aten: str, expected: TensorType, loc: Location | None) -> None:
        """Say which ATen op comes next, its (first) result type, and where it stands in the model."""
        self.aten, self.expected, self.loc = aten, expected, loc

    def refuse(self, reason: str, hint: str = "") -> UserError:
        """The error for an op whose arguments have no counterpart in the graph."""
        where = f"\n  {self.loc}" if self.loc else ""
        return UserError(f"capture: {self.aten}: {reason}{where}", hint=hint or "write this line with a supported op")

    def emit(self, name: str, *operands: Value, hint: str = "", **attrs: Any) -> Op:
        op = super().emit(name, *operands, hint=hint, **attrs)
        self.producer.update((result, op) for result in op.results)
        return op

    def constant(self, value: float, dtype: str = "f32") -> Value:
        """A scalar constant, once per number. Infinities become the largest score the targets work with."""
        if math.isnan(value):
            raise self.refuse("the constant NaN")
        bounded = max(MASKED_SCORE, min(-MASKED_SCORE, value)) if math.isinf(value) else value
        if (bounded, dtype) not in self.numbers:
            number = super().constant(bounded, dtype)
            self.numbers[bounded, dtype] = number
            self.known[number] = torch.tensor(value)
        return self.numbers[bounded, dtype]

    def number(self, x: Value) -> float | None:
        """The number a value is known to be, everywhere."""
        tensor = self.known.get(x)
        if tensor is None or tensor.numel() == 0 or not bool((tensor == tensor.flatten()[0]).all()):
            return None
        return float(tensor.flatten()[0])

    def value(self, x: Operand, dtype: str = "f32") -> Value:
        """A Python number as a constant, anything else as it is."""
        return x if isinstance(x, Value) else self.constant(x, dtype)

    def cast(self, x: Value, dtype: str) -> Value:
        if x.type.dtype == dtype:
            return x
        number = self.number(x)
        if number is not None and x.type.rank == 0:
            return self.constant(number if dtype == "f32" else int(number), dtype)
        return self("cast", x, dtype=dtype)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """x under another shape; a reshape of a reshape is one."""
        behind = self.producer.get(x)
        if behind is not None and behind.name == "reshape":
            x = behind.operands[0]
        return x if x.type.shape == tuple(shape) else self("reshape", x, shape=tuple(shape))

    def transpose(self, x: Value, perm: Sequence[int]) -> Value:
        """x with its axes in another order; a transpose of a transpose is one."""
        behind = self.producer.get(x)
        if behind is not None and behind.name == "transpose":
            x, perm = behind.operands[0], [behind.attrs["perm"][axis] for axis in perm]
        return x if list(perm) == list(range(x.type.rank)) else self("transpose", x, perm=tuple(perm))

    def swap_last_axes(self, x: Value) -> Value:
        rank = x.type.rank
        return self.transpose(x, [*range(rank - 2), rank - 1, rank - 2])

    def broadcast(self, x: Value, shape: Sequence[int]) -> Value:
        return x if x.type.shape == tuple(shape) else self("broadcast", x, shape=tuple(shape))

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        if (start, stop) == (0, x.type.shape[axis]):
            return x
        return self("slice", x, axis=axis, start=start, stop=stop)

    def sum(self, x: Value, axes: Sequence[int], keepdim: bool) -> Value:
        axes = sorted({axis % max(x.type.rank, 1) for axis in axes}) if axes else list(range(x.type.rank))
        total = self("sum", x, axes=tuple(axes)) if axes else x
        kept = [1 if axis in axes else extent for axis, extent in enumerate(x.type.shape)]
        return self.reshape(total, kept) if keepdim else total

    def mean(self, x: Value, axes: Sequence[int], keepdim: bool) -> Value:
        total = self.sum(x, axes, keepdim)
        return self("mul", total, self.constant(total.type.size / x.type.size))

    def pointwise(self, name: str, *args: Operand) -> Value:
        """A pointwise op after PyTorch's type promotion: f32 over i32 over bool; division is always f32."""
        first = 1 if name == "where" else 0  # the condition takes no part in promotion
        met = {_kind(x) for x in args[first:]}
        common = "f32" if "f32" in met or name == "div" else "i32" if "i32" in met else "bool"
        if common == "bool" and name not in ("where", "eq", "ne"):
            common = "i32"
        kinds = ["bool"] * first + [common] * (len(args) - first)
        return self(name, *(self.cast(self.value(x, common), kind) for x, kind in zip(args, kinds, strict=True)))

    def keep(self, shape: Sequence[int], p: float, stream: int) -> Value:
        """The multipliers of a dropout: 0 with probability p, else 1 / (1 - p).

        An element's random bits are random_bits(key, its row-major index, stream), whatever the tiling."""
        index = self("iota", axis=0, shape=tuple(shape))
        for axis in range(1, len(shape)):
            scaled = self("mul", index, self.constant(shape[axis], "i32"))
            index = self("add", scaled, self("iota", axis=axis, shape=tuple(shape)))
        words = (self("slice", self.random_key, axis=0, start=word, stop=word + 1) for word in range(2))
        bits = self("random_bits", *words, self.cast(index, "u32"), self.constant(stream, "u32"))
        return self("bits_keep", bits, self.constant(p))

    def stream(self) -> int:
        """A number that tells this dropout's random numbers from those of all others."""
        self.streams += 1
        return self.streams - 1

    def known_tensor(self, tensor: torch.Tensor) -> Value:
        """A tensor whose elements are fixed, as ops that produce it: one number, a range, or a (causal) pattern of two
        numbers. Raises UserError for any other."""
        shape = tuple(tensor.shape)
        if tensor.dtype not in DTYPES:
            raise self.refuse(f"a constant tensor of type {tensor.dtype}", "use float32, int64 or bool")
        dtype = DTYPES[tensor.dtype]
        kinds = (self._uniform, self._range, self._two_valued)
        found = next(filter(None, (kind(tensor, dtype, shape) for kind in kinds)), None)
        if found is None:
            raise self.refuse(
                f"the constant tensor {dtype}{list(shape)} is none of the kinds that are recognised",
                "a fixed tensor is one number, an arange along one axis, or a causal mask; else make it a parameter",
            )
        self.known[found] = tensor
        return found

    def _uniform(self, tensor: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> Value | None:
        if tensor.numel() == 0 or not bool((tensor == tensor.flatten()[0]).all()):
            return None
        return self.broadcast(self.constant(tensor.flatten()[0].item(), dtype), shape)

    def _range(self, tensor: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> Value | None:
        if dtype == "bool":
            return None
        for axis, extent in enumerate(shape):
            if extent == 1:
                continue
            line = tensor.movedim(axis, -1).reshape(-1, extent)[0].double()
            first, step = float(line[0]), float(line[1] - line[0])
            ramp = (first + step * torch.arange(extent)).reshape([-1] + [1] * (len(shape) - axis - 1))
            if step == 0 or step % 1 or first % 1 or not bool((tensor == ramp).all()):
                continue
            index = self("iota", axis=axis, shape=shape)
            if step != 1:
                index = self("mul", index, self.constant(int(step), "i32"))
            if first != 0:
                index = self("add", index, self.constant(int(first), "i32"))
            return self.cast(index, dtype)
        return None

    def _two_valued(self, tensor: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> Value | None:
        """Below the diagonal one number, above it another: compare the indices of the last two axes."""
        if len(shape) < 2:
            return None
        plane = tensor.reshape(-1, *shape[-2:])[0]
        low, high = plane[-1, 0], plane[0, -1]
        above, right = int((plane[:, 0] != low).sum()), int((plane[0] == low).sum())
        offset = -above if above else right - 1
        pattern = torch.ones(shape[-2:], dtype=torch.bool).tril(offset)
        if low == high or not bool(((tensor == low) == pattern).all()):
            return None
        row, column = (self("iota", axis=len(shape) - back, shape=shape) for back in (2, 1))
        if offset:
            row = self("add", row, self.constant(offset, "i32"))
        if dtype == "bool":
            return self("ge", row, column) if bool(low) else self("lt", row, column)
        sides = (self.constant(side.item(), dtype) for side in (low, high))
        return self("where", self("ge", row, column), *sides)


def _kind(x: Operand) -> str:
    if isinstance(x, Value):
        return str(x.type.dtype)
    return "bool" if isinstance(x, bool) else "i32" if isinstance(x, int) else "f32"
