"""A compilation to look around in: `m` of `tinygpt repl`, and what `tinygpt ir` prints from.

m = inspect("small")            m.after("fuse")         m.stages
m.kernels["k7"].tile            .loop  .source  .schedule  .of        m.plan"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tinygpt import compiler
from tinygpt.config import nearest
from tinygpt.devices import settled
from tinygpt.ir.core import Function, Kernel, Module, Op, Value
from tinygpt.ir.errors import UserError
from tinygpt.ir.show import show, summary
from tinygpt.ir.text import print_function, print_kernel, print_module
from tinygpt.listing import plan_listing
from tinygpt.lowering.pipeline import Stage

LEVELS = ("graph", "tile", "loop", "plan")
SHOWN = (Module, Function, Kernel, Op, Value)  # types that a prompt shows by ir.show


class Listing(str):
    """Text that a prompt shows as it is."""

    def __repr__(self) -> str:
        return str(self)


def inspect(
    model: Any,
    target: str = "cpp",
    batch: int | None = None,
    context: int | None = None,
    *,
    strict: bool = False,
    options: Mapping[str, str] | None = None,
) -> Inspector:
    """Compile what `tinygpt.compile` takes, and keep every stage. Raises UserError."""
    options = settled(target, options or {})
    device, caps = compiler.device_for(target, options)
    module = compiler.module_for(model, batch, context)
    return Inspector(compiler.lower(module, device, caps, strict=strict, options=options))


class Inspector:
    """A compilation: its stages by pass, its kernels by name, its plan. Everything is made on demand and prints."""

    def __init__(self, compilation: compiler.Compilation) -> None:
        self.compilation = compilation
        self.stages = Stages(compilation.stages)
        self.kernels = Kernels(compilation)

    @property
    def name(self) -> str:
        return self.compilation.captured.name

    @property
    def config(self) -> Any:
        """The model's fields; None for a module that was captured from PyTorch."""
        return self.compilation.captured.attrs["config"]

    @property
    def plan(self) -> Listing:
        """Pools, buffers, launches and barriers."""
        return Listing(plan_listing(self.compilation.plan))

    def after(self, name: str | int) -> Module:
        """The module as a pass left it: "fuse", "simplify.2" for the second time it ran, or the stage's number."""
        return self.stages[name]

    def __repr__(self) -> str:
        done = self.compilation
        launches = {name: len(entry.launches) for name, entry in done.plan.entries.items()}
        return (
            f"{summary(done.captured)}\n{done.device.name} ({done.caps.name}), {len(done.plan.kernels)} kernels\n"
            f"launches: {', '.join(f'{name} {count}' for name, count in launches.items())}\n"
            "look at: .stages .after(PASS) .kernels[NAME] .plan .config"
        )


class Stages(Mapping[str, Module]):
    """The modules between the passes. A pass that runs again is NAME.2, NAME.3."""

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        self.by_key: dict[str, Stage] = {}
        for stage in stages:
            again = sum(s.name == stage.name for s in self.by_key.values())
            self.by_key[f"{stage.name}.{again + 1}" if again else stage.name] = stage

    def stage(self, name: str | int) -> Stage:
        """The stage of that key or number. Raises UserError with the nearest name."""
        for key, stage in self.by_key.items():
            if str(name) in (key, str(stage.number), f"{stage.number:02}", stage.file):
                return stage
        raise UserError(
            f"there is no stage {str(name)!r}; the nearest is {nearest(str(name), self.by_key)!r}",
            hint=f"stages: {', '.join(self.by_key)}",
        )

    def last(self, level: str) -> Stage:
        """The last stage of a level."""
        return [stage for stage in self.by_key.values() if stage.level == level][-1]

    def __getitem__(self, name: str | int) -> Module:
        return self.stage(name).module

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_key)

    def __len__(self) -> int:
        return len(self.by_key)

    def __repr__(self) -> str:
        lines = []
        for key, stage in self.by_key.items():
            counts = ", ".join(f"{name} {len(f.body.ops)}" for name, f in stage.module.functions.items())
            kernels = f"; {len(stage.module.kernels)} kernels" if stage.module.kernels else ""
            lines.append(
                f"{stage.number:02} {key:16} {stage.level:6} {stage.seconds * 1e3:6.0f} ms   ops: {counts}{kernels}"
            )
        return "\n".join(lines)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


@dataclass(frozen=True)
class ScheduleView:
    """How a kernel is cut up: `order` decides the bits, `cost` only the speed."""

    grid: Mapping[str, int]
    order: Mapping[str, Any]
    cost: Mapping[str, Any]

    def __repr__(self) -> str:
        parts = {"grid": self.grid, "order": self.order, "cost": self.cost}
        return "\n".join(
            f"{name:6} {', '.join(f'{k} = {v}' for k, v in fields.items()) or '-'}" for name, fields in parts.items()
        )


@dataclass(frozen=True, repr=False)
class KernelView:
    """One kernel at every level, and where it is launched."""

    name: str
    compilation: compiler.Compilation

    @property
    def loop(self) -> Kernel:
        """The kernel as loops for the profile."""
        return self.compilation.plan.kernels[self.name]

    @property
    def tile(self) -> Kernel:
        """The kernel as a tile program. Raises UserError if it is several side by side, or if the compilation was resumed
        behind that stage."""
        name, *others = self.loop.cost.get("sides", (self.name,))
        if others:
            raise UserError(f"{self.name} is several kernels side by side: {', '.join([name, *others])}", hint="m.after('tile') has their programs")
        for stage in self.compilation.stages:
            if stage.level == "tile":
                return stage.module.kernels[name]
        raise UserError("the tile level was not dumped: compiling began behind it", hint="resume from an earlier dump")

    @property
    def source(self) -> Listing:
        """The kernel in the target's language."""
        return Listing(self.compilation.device.source(self.loop, self.compilation.caps))

    @property
    def schedule(self) -> ScheduleView:
        return ScheduleView(self.loop.grid, self.loop.order, self.loop.cost)

    @property
    def of(self) -> str:
        """The graph ops it computes."""
        return self.loop.of

    @property
    def launches(self) -> Listing:
        """Where it is launched: function, number of the launch, and the line of the model it is there for."""
        found = [
            f"{entry.name}[{number}]" + (f"  {launch.of}" if launch.of else "")
            for entry in self.compilation.plan.entries.values()
            for number, launch in enumerate(entry.launches)
            if launch.kernel == self.name
        ]
        return Listing("\n".join(found))

    def __repr__(self) -> str:
        count = len(self.launches.splitlines())
        return (
            f"kernel {self.name}: {self.of or 'copy'}, {count} launch{'es' * (count != 1)}\n{self.schedule!r}\n"
            "look at: .tile .loop .source .schedule .of .launches"
        )


class Kernels(Mapping[str, KernelView]):
    """The kernels by name; an unambiguous beginning of a name will do."""

    def __init__(self, compilation: compiler.Compilation) -> None:
        self.views = {name: KernelView(name, compilation) for name in compilation.plan.kernels}

    def __getitem__(self, name: str) -> KernelView:
        if name in self.views:
            return self.views[name]
        starting = [key for key in self.views if key.startswith(name)]
        starting = [
            key for key in starting if key.startswith(f"{name}_")
        ] or starting  # k1 is k1_matmul before k10_matmul
        if len(starting) != 1:
            found = (
                f"could be {', '.join(starting[:6])}"
                if starting
                else f"is no kernel; the nearest is {nearest(name, self.views)!r}"
            )
            raise UserError(f"{name!r} {found}", hint="m.kernels lists them")
        return self.views[starting[0]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)

    def __repr__(self) -> str:
        return "\n".join(f"{name:28} {view.of}" for name, view in self.views.items())

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


def listing(
    inspector: Inspector, level: str | None = None, after: str | None = None, function: str | None = None
) -> str:
    """What `tinygpt ir` prints: the captured module, the one after a pass, or the last of a level; or one function of
    it, with the kernels it launches. Raises UserError for what there is not."""
    if level is not None and level not in LEVELS:
        raise UserError(f"there is no level {level!r}", hint=f"levels: {', '.join(LEVELS)}")
    if level == "plan":
        if after is not None:
            raise UserError(
                f"--after {after} and --level plan exclude each other", hint="the plan comes behind every pass"
            )
        _require_function(function, inspector.compilation.plan.entries)
        return plan_listing(inspector.compilation.plan, function)
    stage = (
        inspector.stages.stage(after)
        if after is not None
        else inspector.stages.last(level)
        if level
        else inspector.compilation.stages[0]
    )
    if level is not None and stage.level != level:
        raise UserError(
            f"--after {after} leaves a module at {stage.level} level, not {level}",
            hint=f"leave out --level, or give --level {stage.level}",
        )
    if function is None:
        return print_module(stage.module)
    _require_function(function, stage.module.functions)
    found = stage.module.functions[function]
    launched = dict.fromkeys(op.attrs["kernel"] for op in found.body.ops if op.name == "launch")
    return "\n".join(
        [print_function(stage.module, found), *(print_kernel(stage.module.kernels[name]) for name in launched)]
    )


def _require_function(name: str | None, known: Mapping[str, object]) -> None:
    if name is not None and name not in known:
        raise UserError(
            f"there is no function {name!r} at this point; the nearest is {nearest(name, known)!r}",
            hint=f"functions: {', '.join(known)}",
        )


def open_prompt(inspector: Inspector) -> None:
    """IPython with `m`, `tg` and `config`; IR prints as text. Raises UserError where IPython is missing."""
    try:
        from IPython.terminal.ipapp import TerminalIPythonApp
    except ImportError as error:
        raise UserError(
            "the prompt needs IPython", hint="pip install ipython; or in Python: from tinygpt.inspection import inspect"
        ) from error
    import tinygpt

    app: Any = TerminalIPythonApp.instance(
        user_ns={"m": inspector, "tg": tinygpt, "config": inspector.config}, display_banner=False
    )
    app.initialize(argv=[])
    formatter = app.shell.display_formatter.formatters["text/plain"]
    for shown in SHOWN:
        formatter.for_type(shown, lambda thing, printer, cycle: printer.text(_shown(thing)))
    print(f"{inspector!r}\nalso: config, tg (the package)")
    app.start()


def _shown(thing: Any) -> str:
    return re.sub(
        r"\n+\Z", "", print_module(thing) if isinstance(thing, Module) and len(thing.kernels) == 0 else show(thing)
    )


__all__ = ["LEVELS", "Inspector", "KernelView", "Listing", "inspect", "listing", "open_prompt"]
