"""Loop-level kernels as WebAssembly functions: structured SSA to structured control and locals, one to one.

The order of the ops is kept, because it was chosen so that the accumulators of a product stay in registers: a value
that is read once, by an op that follows at once, stays on the operand stack; every other value goes through a local.
Engines see through locals, so their number is a matter of size only. Pointers are byte addresses; the constants of an
address go to the access's offset. An outlined region is a function; equal functions of different kernels are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel, Op, Region, Value
from tinygpt.ir.errors import CompilerBug
from tinygpt.ir.index import Index
from tinygpt.ir.scalar import PRIMITIVES
from tinygpt.ir.types import DTYPE_BYTES, PointerType, VectorType
from tinygpt.targets.wasm import primitives
from tinygpt.targets.wasm.addresses import Addresses
from tinygpt.targets.wasm.analysis import Analysis
from tinygpt.targets.wasm.assembler import Function
from tinygpt.targets.wasm.frame import Frame
from tinygpt.targets.wasm.primitives import LANES, Code
from tinygpt.targets.wasm.profiles import RELAXED_SIMD

_SCRATCH_ALIGNMENT = 16  # elements of four bytes; a piece of scratch has this much room behind it
_SPLAT_LOADS = ("f32.load", "i32.load")


@dataclass
class FunctionTable:
    """The functions of a module so far. An index is a function's place in the module."""

    functions: list[Function] = field(default_factory=list)
    _known: dict[Function, int] = field(default_factory=dict)

    def add(self, function: Function) -> int:
        self.functions.append(function)
        return len(self.functions) - 1

    def share(self, function: Function) -> int:
        """The index of a function that does the same, which is added if there is none."""
        nameless = replace(
            function,
            name="",
            comment="",
            parameters=tuple(replace(p, name="") for p in function.parameters),
            variables=tuple(replace(v, name="") for v in function.variables),
            body=tuple(i for i in function.body if i[0] != "note"),
        )
        if nameless not in self._known:
            self._known[nameless] = self.add(function)
        return self._known[nameless]


def print_kernel(kernel: Kernel, caps: Caps, table: FunctionTable) -> int:
    """Add the kernel's function, and those it outlines, to the table. Returns its index.

    Parameters: the byte address of each buffer, that of the thread's scratch memory, and the flattened grid points
    `lo` (inclusive) to `hi` (exclusive), all in the profile's address types. Raises CompilerBug for a kernel that is
    not at loop level, or was made for another strategy or width."""
    if kernel.level != "loop" or caps.strategy != "cpu":
        raise CompilerBug(
            f"wasm: kernel {kernel.name} is at {kernel.level} level; wanted are loops of the cpu strategy"
        )
    printer = _FunctionPrinter(kernel.name, kernel.body, ("lo", "hi"), True, caps, table)
    printer.leave_if_empty("lo", "hi")
    printer.region(kernel.body)
    schedule = ", ".join(f"{key} = {value}" for key, value in {**kernel.order, **kernel.cost}.items())
    return table.add(printer.function(f"{kernel.of or kernel.name}{f' ({schedule})' if schedule else ''}"))


def scratch_bytes(kernel: Kernel) -> int:
    """How many bytes of its own memory a thread needs to run the kernel."""
    pieces = (op for op in kernel.body.walk() if op.name == "scratch")
    end = max((op.attrs["offset"] + op.attrs["size"] + _SCRATCH_ALIGNMENT for op in pieces), default=0)
    return -(-end // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT * 4


class _FunctionPrinter:
    """Prints the region of one function. `pending` are the values that are on the operand stack now, in order: their
    code is held back until it is consumed, or flushed to locals because something else must come before."""

    def __init__(
        self, name: str, region: Region, indices: tuple[str, ...], scratch: bool, caps: Caps, table: FunctionTable
    ) -> None:
        self.name, self.caps, self.table, self.has_scratch = name, caps, table, scratch
        self.relaxed = RELAXED_SIMD in caps.features and caps.fma
        self.code: Code = []
        self.facts = Analysis(region, indices)
        self.frame = Frame()
        self.home: dict[Value, int] = {}
        self.pending: dict[Value, Code] = {}
        self.kept: set[Value] = set()  # values whose local belongs to something else
        self.wanted: dict[Value, int] = {}  # next values of carried values, which may go to the same local at once
        self.addresses = Addresses(self.facts, self.frame, caps, self.home, self.read)
        for value in region.args:
            self.home[value] = self.frame.parameter(self.register_type(value), _stem(value))
        if scratch:
            self.home[self.facts.scratch] = self.frame.parameter(self.register_type(self.facts.scratch), "scratch")
        for index in indices:
            self.addresses.variables[index] = self.frame.parameter(self.addresses.type, index)

    def function(self, comment: str) -> Function:
        parameters, variables = self.frame.split()
        return Function(self.name, parameters, (), variables, tuple(self.code), comment)

    def leave_if_empty(self, low: str, high: str) -> None:
        compared = [*self.addresses.variable(low), *self.addresses.variable(high)]
        self.code += [*compared, (f"{self.addresses.type}.ge_s",), ("if",), ("return",), ("end",)]

    # Values

    def register_type(self, value: Value) -> str:
        if isinstance(value.type, PointerType):
            return self.addresses.space(value).type
        return primitives.register_type(value.type)

    def put(self, value: Value, code: Code) -> None:
        """Code whose result is `value`: held back if it is read once and here, else set to a local."""
        if self.facts.uses[value] == 1 and value not in self.facts.escaping:
            self.pending[value] = code
            return
        self.flush()
        self.set(value, code)

    def set(self, value: Value, code: Code) -> None:
        local = self.wanted.get(value)
        self.home[value] = self.frame.local(self.register_type(value), _stem(value)) if local is None else local
        self.code += [*code, ("local.set", self.home[value])]

    def flush(self) -> None:
        """Everything pending to locals."""
        pending = dict(self.pending)
        self.pending.clear()
        for value, code in pending.items():
            self.set(value, code)

    def ready(self, values: Sequence[Value], alone: bool = False) -> None:
        """Make sure that `values` may be read in this order: those pending are the last ones, in this order, or else
        all go to locals. `alone`: what reads them has effects, and nothing may be pending beneath them."""
        needed = [root for root in (self.facts.resolve(v)[0] for v in values) if root in self.pending]
        pending = list(self.pending)
        if needed != (pending if alone else pending[len(pending) - len(needed) :]):
            self.flush()

    def read(self, value: Value) -> Code:
        """Code of a value that is ready."""
        facts = self.facts
        if value in facts.scalar_constants:
            return [primitives.scalar_constant(*facts.scalar_constants[value])]
        root, displacement = facts.resolve(value)
        if root in self.home:
            code: Code = [("local.get", self.home[root])]
        elif root in self.pending:
            code = self.pending.pop(root)
        elif root in facts.vector_constants:
            code = [("v128.const", facts.vector_constants[root])]
        else:
            raise CompilerBug(f"wasm: {self.name} reads %{value.hint} ({value.type}), which is not defined there")
        return [*code, *self.addresses.plus(displacement, self.register_type(root))] if displacement else code

    def settle_parts(self, value: Value) -> None:
        """Before making code that runs ahead of the pending `value`, but may reuse what that code keeps in locals."""
        if any(instruction[0] == "local.tee" for instruction in self.pending.get(self.facts.resolve(value)[0], ())):
            self.flush()

    def take(self, values: Sequence[Value]) -> list[Code]:
        self.ready(values)
        return [self.read(value) for value in values]

    # Regions

    def region(self, region: Region) -> list[Code]:
        """The ops of a region, in order. Returns the code of what it yields."""
        dying: dict[int, list[Value]] = {}
        for value, position in self.facts.last[region].items():
            if self.facts.home[value] is region:
                dying.setdefault(position, []).append(value)
        self.addresses.enter(region)
        outside = set(self.addresses.variables)
        for position, op in enumerate(region.ops):
            if op not in self.facts.dead:
                self.statement(op, region, position)
                self.retire(dying.get(position, ()))
        yields = self.take(region.yields)
        self.flush()
        self.addresses.leave()
        for name in [name for name in self.addresses.variables if name not in outside]:
            self.frame.release(self.addresses.variables.pop(name))
        self.retire(dying.get(len(region.ops), ()))
        return yields

    def retire(self, values: Sequence[Value]) -> None:
        """Give back the locals of values that no later op reads, once no code held back reads them either."""
        for value in values:
            if value in self.home and value not in self.kept:
                self.frame.release(self.home[value])
        if not self.pending:
            self.frame.settle()

    def statement(self, op: Op, region: Region, position: int) -> None:
        match op.name:
            case "note":
                self.code.append(("note", op.attrs["text"]))
            case "store":
                self.store(op)
            case "for":
                self.loop(op, region, position)
            case "if":
                self.branch(op)
            case "outline":
                self.call(op)
            case "bind":
                self.bind(op)
            case _ if op.result in self.facts.vector_constants:
                self.constant(op.result)
            case _:
                self.ready(self.stacked(op))
                self.put(op.result, self.expression(op))

    def constant(self, value: Value) -> None:
        """A vector constant that is read more than once goes to a local; one read once is written where it is read."""
        often = self.facts.uses[value] > 1 or value in self.facts.escaping
        if often and value not in self.home:
            self.flush()
            self.set(value, [("v128.const", self.facts.vector_constants[value])])

    def store(self, op: Op) -> None:
        pointer, value = op.operands
        self.ready((pointer, value), alone=True)
        self.settle_parts(value)
        address, place = self.addresses.place(pointer, op.attrs["at"])
        self.code += [*address, *primitives.store(value.type, self.read(value), *place)]

    def branch(self, op: Op) -> None:
        self.flush()
        compare = op.attrs["compare"] + ("" if op.attrs["compare"] in ("eq", "ne") else "_s")
        condition = [*self.addresses.index(op.attrs["left"]), *self.addresses.index(Index.of(op.attrs["right"]))]
        self.code += [*condition, (f"{self.addresses.type}.{compare}",), ("if",)]
        for number, region in enumerate(op.regions):
            if number:
                self.code.append(("else",))
            self.region(region)
        self.code.append(("end",))

    def call(self, op: Op) -> None:
        (body,) = op.regions
        indices = tuple(op.attrs["indices"])
        scratch = any(inner.name == "scratch" for inner in body.walk())
        printer = _FunctionPrinter(f"{self.name}.{op.attrs['name']}", body, indices, scratch, self.caps, self.table)
        printer.region(body)
        function = self.table.share(printer.function(f"outlined from {self.name}"))
        self.ready(op.operands, alone=True)
        arguments = [instruction for value in op.operands for instruction in self.read(value)]
        if scratch:
            arguments += self.read(self.facts.scratch)
        arguments += [instruction for name in indices for instruction in self.addresses.variable(name)]
        self.code += [*arguments, ("call", function)]

    def bind(self, op: Op) -> None:
        """A number as an index variable, moved into its range."""
        self.ready(op.operands, alone=True)
        type = self.addresses.type
        local = self.addresses.variables[op.attrs["var"]] = self.frame.local(type, "s")
        self.code += [*self.read(op.operands[0]), *([("i64.extend_i32_s",)] if type == "i64" else []), ("local.set", local)]
        for limit, outside in ((op.attrs["lo"], "lt_s"), (op.attrs["hi"], "gt_s")):
            end = (f"{type}.const", limit)
            self.code += [end, ("local.get", local), ("local.get", local), end, (f"{type}.{outside}",), ("select",), ("local.set", local)]

    # Loops

    def loop(self, op: Op, region: Region, position: int) -> None:
        (body,) = op.regions
        type, attrs = self.addresses.type, op.attrs
        low, high = Index.of(attrs["lo"]), Index.of(attrs["hi"])
        carried = self.initialized(op, region, position)
        constants = self.constants_before(body)
        self.code += self.addresses.hoisted(body)
        variable = self.frame.local(type, attrs["var"].rstrip("0123456789") or "i")
        self.code += [*self.addresses.index(low), ("local.set", variable)]
        counters, limit = [variable], self.addresses.index(high)
        if not high.is_constant:
            counters.append(self.frame.local(type, "end"))
            self.code += [*limit, ("local.set", counters[1])]
            limit = [("local.get", counters[1])]
        runs = low.is_constant and high.is_constant and low.constant < high.constant
        again: Code = [*limit, (f"{type}.lt_s",)]
        self.code += [] if runs else [("local.get", variable), *again, ("if",)]
        self.code.append(("loop",))
        self.home.update(zip(body.args, carried, strict=True))
        self.kept.update(body.args)
        self.wish(body)
        self.addresses.variables[attrs["var"]] = variable
        self.carry(self.region(body), carried)
        del self.addresses.variables[attrs["var"]]
        step = self.addresses.plus(attrs["step"], type)
        self.code += [("local.get", variable), *step, ("local.tee", variable), *again, ("br_if", 0), ("end",)]
        self.code += [] if runs else [("end",)]
        self.home.update(zip(op.results, carried, strict=True))
        for local in (*counters, *constants):
            self.frame.release(local)
        for result, local in zip(op.results, carried, strict=True):
            if not self.facts.uses[result] and result not in self.kept:
                self.frame.release(local)

    def initialized(self, op: Op, region: Region, position: int) -> list[int]:
        """The locals of the carried values, set to what they start with. Where that is read for the last time here, the
        two share a local; it then belongs to the loop's result, unless it belonged to something else already."""
        (body,) = op.regions
        self.ready(op.operands, alone=True)
        carried: list[int] = []
        start: Code = []
        targets: list[int] = []
        for operand, argument, result in zip(op.operands, body.args, op.results, strict=True):
            if self.is_last_read(operand, op, region, position):
                carried.append(self.home[operand])
                (self.kept.add(result) if operand in self.kept else self.kept.add(operand))
                continue
            start += self.read(operand)
            carried.append(self.frame.local(self.register_type(argument), _stem(argument)))
            targets.append(carried[-1])
        self.code += [*start, *(("local.set", local) for local in reversed(targets))]
        return carried

    def is_last_read(self, operand: Value, op: Op, region: Region, position: int) -> bool:
        """Whether `operand` is in a local which nothing reads after it has started this loop's carried value."""
        facts = self.facts
        if operand not in self.home or operand in facts.aliases or facts.home[operand] is not region:
            return False
        if operand in facts.vector_constants or operand in facts.last[op.regions[0]]:
            return False
        return facts.last[region].get(operand) == position and op.operands.count(operand) == 1

    def constants_before(self, body: Region) -> list[int]:
        """The vector constants of a loop's body, set to locals before it, because an engine makes them anew in each
        trip; all but zero, which is one cheap instruction."""
        locals: list[int] = []
        for value in _constants_in(body):
            if any(self.facts.vector_constants.get(value, b"")) and self.facts.uses[value]:
                self.set(value, [("v128.const", self.facts.vector_constants[value])])
                self.kept.add(value)
                locals.append(self.home[value])
        return locals

    def wish(self, body: Region) -> None:
        """Let what a loop yields go straight to the carried value's local, where its old value is not read any more."""
        last = self.facts.last[body]
        defined = {
            op.results[0]: position for position, op in enumerate(body.ops) if len(op.results) == 1 and op.name != "for"
        }
        for argument, value in zip(body.args, body.yields, strict=True):
            fits = value in defined and value not in self.facts.aliases and value not in self.facts.vector_constants
            if not fits or body.yields.count(value) > 1:
                continue
            if all(last.get(reader, -1) <= defined[value] for reader in self.heirs(argument, body)):
                self.wanted[value] = self.home[argument]
                self.kept.add(value)

    def heirs(self, value: Value, body: Region) -> list[Value]:
        """A carried value and the results of inner loops that may take over its local, one after the other."""
        found = [value]
        while (position := self.facts.last[body].get(found[-1], len(body.ops))) < len(body.ops):
            op = body.ops[position]
            if op.name != "for" or found[-1] not in op.operands:
                break
            found.append(op.results[op.operands.index(found[-1])])
        return found

    def carry(self, yields: Sequence[Code], carried: Sequence[int]) -> None:
        """Set the carried values to what the body yielded, all at once."""
        moves = [(code, local) for code, local in zip(yields, carried, strict=True) if code != [("local.get", local)]]
        self.code += [instruction for code, _ in moves for instruction in code]
        self.code += [("local.set", local) for _, local in reversed(moves)]

    # Expressions

    def stacked(self, op: Op) -> list[Value]:
        """The values an op reads, in the order in which they go on the stack."""
        order = primitives.stack_order(op.name, op.result.type)
        return [op.operands[n] for n in order] if order else self.facts.operands(op, constants=True)

    def expression(self, op: Op) -> Code:
        """Code of a pure op or a load, whose operands are ready."""
        operands, type, attrs = op.operands, op.result.type, op.attrs
        match op.name:
            case "load":
                address, place = self.addresses.place(operands[0], attrs["at"])
                return [*address, *primitives.load(type, *place)]
            case "advance":
                return self.advance(op)
            case "index":
                wrap: Code = [("i32.wrap_i64",)] if self.addresses.type == "i64" else []
                return [*self.addresses.index(attrs["at"]), *wrap]
            case "splat":
                return self.splat(operands[0])
            case "join":
                return primitives.join(type.dtype, [self.read(value) for value in operands])
            case "extract":
                return [*self.read(operands[0]), *primitives.extract(attrs["lane"], type.dtype)]
            case "broadcast_lane":
                first, again = self.frame.twice(self.read(operands[0]), "v128")
                return [*first, *again, primitives.shuffle([attrs["lane"]] * LANES)]
            case "interleave":
                low = 2 * attrs["half"]
                lanes = (low, low + LANES, low + 1, low + 1 + LANES)
                return [*self.read(operands[0]), *self.read(operands[1]), primitives.shuffle(lanes)]
            case "fold":
                return primitives.fold(attrs["kind"], type.dtype, self.read(operands[0]), self.frame.twice)
            case "shl" | "shr" if isinstance(type, VectorType):
                return self.shift(op)
            case name if name in PRIMITIVES:
                types = [value.type for value in operands]
                codes = [self.read(value) for value in self.stacked(op)]
                return primitives.primitive(name, types, type, codes, self.relaxed, self.frame.twice)
        raise CompilerBug(f"wasm: {self.name} has {op.name}, which the cpu strategy does not emit for this target")

    def advance(self, op: Op) -> Code:
        """The pointer's own address, and a number of elements known at run time only."""
        self.settle_parts(op.operands[-1])
        type = self.register_type(op.result)
        address, (constant, *_) = self.addresses.place(op.operands[0], op.attrs["by"])
        code = [*address, *self.addresses.plus(constant, type)]
        if len(op.operands) == 1:
            return code
        steps = self.read(op.operands[1])
        if type == "i64":
            steps = [*steps, (f"i64.extend_i32_{'u' if op.operands[1].type.dtype == 'u32' else 's'}",)]
        size = op.attrs["scale"] * DTYPE_BYTES[op.result.type.dtype]
        return [*code, *steps, *self.addresses.times(size, type), (f"{type}.add",)]

    def splat(self, scalar: Value) -> Code:
        """A load that is read by nothing else becomes one instruction with the splat."""
        code = self.read(scalar)
        name, *rest = code[-1]
        if name in _SPLAT_LOADS:
            return [*code[:-1], ("v128.load32_splat", *rest)]
        return [*code, *primitives.splat(scalar.type.dtype)]

    def shift(self, op: Op) -> Code:
        type, amount = op.result.type, self.facts.uniform_amount(op)
        shifted = self.read(op.operands[0])
        if amount is None:
            codes = [shifted, self.read(op.operands[1])]
            return primitives.shift_lanes(op.name, type.dtype, codes, self.frame.twice)
        scalar: Code = [("i32.const", amount)] if isinstance(amount, int) else self.read(amount)
        return primitives.primitive(op.name, [type], type, [shifted, scalar], self.relaxed, self.frame.twice)


def _stem(value: Value) -> str:
    """What a local of the value is called."""
    if value.hint:
        return value.hint
    if isinstance(value.type, PointerType):
        return "p"
    return "v" if isinstance(value.type, VectorType) else "x" if value.type.dtype == "f32" else "n"


def _constants_in(body: Region) -> list[Value]:
    """The results of ops that may be vector constants, of a loop's body without the loops in it."""
    found: list[Value] = []
    for op in body.ops:
        if op.name in ("const", "lanes", "splat"):
            found.append(op.result)
        if op.name == "if":
            found += [value for region in op.regions for value in _constants_in(region)]
    return found
