"""The verifier. What every module must satisfy, whatever pass made it:

Everywhere: a value is defined once, before it is used, and used only where it is visible; numbers are finite.

Graph functions
- Every op is registered, and its result types are what its `infer` says of its operands. The formula of a pointwise op
  fits its operands' element types.
- A `group` sees its operands only; what it yields has the types of its results.
- A `buffer` is memory that launches write into. A `launch` names a kernel of the module and gives it memory for each
  of its buffers, from an offset on, of that element type and long enough; what it writes is a `buffer` or a module
  parameter.
- Parameters of a function have distinct names; every result has a name; updates name parameters of the module and
  have their types.

Tile kernels
- Axes of tiles are declared, once each, and start inside their limits: a tile has at least one live element. A dim that
  depends on a loop variable is used inside that loop only.
- Pointwise ops are registered formulas; axes of operands are equal or missing. `dot` contracts equal axes, and its
  accumulator has the type of its result. `reduce` drops its axis.
- A loop carries the same types in, around and out. Index variables are bound once in a kernel.
- A `bind` names a number from memory, and is visible in its region. A loop with such a number in its bounds contains no
  `dot` and no `reduce`: the threads of a workgroup meet in these, and a device cannot know that all make the same trips.
- Loads and gathers read "in" and "inout" buffers, stores write "out" and "inout" ones, in the buffer's element type.
- Every address of a live element is provably inside its buffer, for every grid point and trip. (The row a gather picks
  is data: the host checks tokens before a step. The proof covers the rest of the address.)
- Index expressions divide numbers that are never negative by positive constants, so that a target may truncate.
- That grid points never touch what another one stores is checked by the interpreter (ir/interpret_tile.py).

Loop kernels
- Ops are those of ir/loop.py, with the operands, attributes and types stated there. Pointers keep their space and
  element type; no store goes to an "in" buffer. An outlined region sees its operands and named indices only.
- No branch or loop around a barrier or a subgroup operation depends on the thread, or on a number from memory. That threads of a workgroup touch no
  memory of each other without a barrier between, and read none that nobody stored, is checked by the interpreter
  (ir/interpret_workgroup.py).
- For a profile: vectors have its lanes, transcendentals are its native ones, workgroup ops and memory fit it.

With a profile, a kernel also respects its bindings, binding bytes and grid limits.

All errors of a function or kernel are reported at once, each under its line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Function, Kernel, Module, Op, Region, Value
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.findings import Findings, excerpt, formula_error, listed, named
from tinygpt.ir.ops import OPS, Pointwise
from tinygpt.ir.text import print_function, print_kernel
from tinygpt.ir.types import TensorType
from tinygpt.ir.verify_loop import LoopFindings
from tinygpt.ir.verify_tile import TileFindings

FROM_OUTSIDE = ("", "capture")


def verify(module: Module, caps: Caps | None = None, after: str = "") -> None:
    """Check every function and kernel of a module, kernels against the limits of a profile too if one is given.

    `after` names the pass that made the module; it is empty for one that was captured or read from a file.
    Raises UserError for a graph that came from outside like this, and CompilerBug for anything a pass made."""
    check_parameters(module, after)
    for function in module.functions.values():
        graph = GraphFindings(module, function)
        graph.check()
        if graph.count:
            all_named = len(function.result_names) == len(function.body.yields)
            shown = function if all_named else replace(function, result_names=())
            message = headline(f"function {function.name}", graph) + excerpt(print_function(module, shown, graph.notes))
            if after in FROM_OUTSIDE:
                raise UserError(message, hint="change the model, or the text, at the lines marked ^")
            raise CompilerBug(message, after=after)
    for kernel in module.kernels.values():
        verify_kernel(kernel, caps, after)


def verify_kernel(kernel: Kernel, caps: Caps | None = None, after: str = "") -> None:
    """Check one kernel, of either level. Raises CompilerBug with all that is wrong."""
    if kernel.level not in ("tile", "loop"):
        raise CompilerBug(f"kernel {kernel.name}: level is tile or loop, not {kernel.level}", after=after)
    found = TileFindings(kernel, caps) if kernel.level == "tile" else LoopFindings(kernel, caps)
    found.check()
    if found.count:
        missing = len(kernel.params) - len(kernel.access)
        shown = replace(kernel, access=(kernel.access + ("in",) * missing)[: len(kernel.params)]) if missing else kernel
        listing = excerpt(print_kernel(shown, found.notes))
        raise CompilerBug(headline(f"kernel {kernel.name}", found) + listing, after=after)


def headline(what: str, found: Findings) -> str:
    """What is wrong as a whole, above the listing."""
    rules = "1 rule" if found.count == 1 else f"{found.count} rules"
    return "\n".join([f"{what} breaks {rules} of the IR", *(f"  {m}" for m in found.general)]) + "\n"


def check_parameters(module: Module, after: str) -> None:
    values: set[Value] = set()
    for name, parameter in module.parameters.items():
        if parameter.name != name or parameter.role not in ("param", "state") or parameter.value in values:
            message = f"parameter @{name} is not one param or state of that name with a value of its own: {parameter}"
            raise CompilerBug(message, after=after)
        values.add(parameter.value)


class GraphFindings(Findings):
    """The check of one function over whole tensors."""

    def __init__(self, module: Module, function: Function) -> None:
        super().__init__()
        self.module, self.function = module, function
        self.writable = {p.value for p in module.parameters.values()}

    def check(self) -> None:
        body = self.function.body
        self.define(None, (p.value for p in self.module.parameters.values()))
        self.define(None, body.args)
        names = [p.hint for p in body.args]
        for name in sorted({n for n in names if names.count(n) > 1}):
            self.report(None, f"two parameters are called {name!r}")
        for value in (*body.args, *body.yields):
            if not isinstance(value.type, TensorType):
                self.report(None, f"{named(value)} is not a tensor")
        self.region(body)
        self.use(None, body.yields)
        result_names = self.function.result_names
        if len(result_names) != len(body.yields) or len(set(result_names)) != len(body.yields):
            self.report(None, f"{len(body.yields)} results are called {listed(result_names) or 'nothing'}")
        self.updates()

    def updates(self) -> None:
        for name, value in self.function.updates.items():
            self.use(None, [value])
            if name not in self.module.parameters:
                self.report(None, f"updates @{name}, which is no parameter of the module")
            elif self.module.parameters[name].type != value.type:
                self.report(None, f"updates @{name}, which is {self.module.parameters[name].type}, by {named(value)}")

    def region(self, region: Region) -> None:
        for op in region.ops:
            if self.use(op, op.operands):
                self.finite(op)
                self.op(op)
            self.define(op, op.results)

    def op(self, op: Op) -> None:
        if op.name == "group":
            self.group(op)
        elif op.name == "launch":
            self.launch(op)
        elif op.name == "buffer":
            self.buffer(op)
        elif op.name not in OPS:
            near = difflib.get_close_matches(op.name, OPS, 1)
            self.report(op, f"there is no op {op.name}" + (f"; did you mean {near[0]}?" if near else ""))
        else:
            self.registered(op)

    def registered(self, op: Op) -> None:
        definition, types = OPS[op.name], [v.type for v in op.operands]
        try:
            if isinstance(definition, Pointwise):
                reason = formula_error(definition, [t.dtype for t in types], op.attrs)
                if reason:
                    self.report(op, reason)
                    return
            expected = definition.infer(types, dict(op.attrs))
        except KeyError as missing:
            self.report(op, f"{op.name} lacks the attribute {missing.args[0]}")
        except (ValueError, TypeError, IndexError) as error:
            self.report(op, f"{op.name}: {error}")
        else:
            self.types(op, expected, op.results, "results are")

    def types(self, op: Op, expected: Iterable[TensorType], values: Iterable[Value], what: str) -> None:
        wanted, found = list(expected), [v.type for v in values]
        if wanted != found:
            self.report(op, f"{what} {listed(wanted) or 'nothing'}, not {listed(found) or 'nothing'}")

    def group(self, op: Op) -> None:
        if len(op.regions) != 1:
            self.report(op, f"group has one region, not {len(op.regions)}")
            return
        (body,) = op.regions
        self.types(op, [v.type for v in op.operands], body.args, "arguments are")
        outer, self.visible = self.visible, set()
        self.define(op, body.args)
        self.region(body)
        self.use(op, body.yields)
        self.visible = outer
        self.types(op, [v.type for v in body.yields], op.results, "results are")

    def launch(self, op: Op) -> None:
        kernel, offsets = self.module.kernels.get(op.attrs.get("kernel", "")), op.attrs.get("offsets", ())
        if kernel is None:
            self.report(op, f"there is no kernel {op.attrs.get('kernel')!r}")
            return
        if not len(kernel.params) == len(op.operands) == len(offsets) or op.results:
            self.report(op, f"{kernel.name} takes {len(kernel.params)} buffers with an offset each and has no results")
            return
        for parameter, access, value, offset in zip(kernel.params, kernel.access, op.operands, offsets):
            size = parameter.type.size if isinstance(parameter.type, TensorType) else 1
            if value.type.dtype != parameter.type.dtype or not 0 <= offset <= value.type.size - size:
                wanted = f"{parameter.type} for %{parameter.hint} of {kernel.name}"
                self.report(op, f"{named(value)} from element {offset} on is no {wanted}")
            if access != "in" and value not in self.writable:
                self.report(op, f"{kernel.name} writes {named(value)}, no buffer and no parameter of the module")

    def buffer(self, op: Op) -> None:
        if op.operands or len(op.results) != 1 or not isinstance(op.result.type, TensorType):
            self.report(op, "a buffer has no operands and is one tensor")
        self.writable.update(op.results)
