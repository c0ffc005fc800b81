"""WebAssembly modules, written as bytes straight from the loop level, for wasmtime, Node and browsers.

profiles.py what is written for, printer.py a kernel as a function, emit.py a plan as a module, assembler.py and
wat.py the binary and the text form of a module."""

from collections.abc import Callable

from tinygpt.ir.caps import Caps
from tinygpt.ir.core import Kernel
from tinygpt.ir.errors import UserError
from tinygpt.targets import Target
from tinygpt.targets.wasm.assembler import Module
from tinygpt.targets.wasm.emit import build_module, emit, target_record
from tinygpt.targets.wasm.printer import FunctionTable, print_kernel
from tinygpt.targets.wasm.profiles import ENGINES, PROFILES, profile
from tinygpt.targets.wasm.wat import print_module


def chooser(target: str) -> Callable[[dict[str, str]], Caps]:
    """Reads `--set engine=v8|wasmtime`, `threads=true|false` and `relaxed=true|false`."""

    def choose(options: dict[str, str]) -> Caps:
        engine = options.pop("engine", "v8")
        if engine not in ENGINES:
            raise UserError(f"{target} is not tuned for {engine!r}", hint=f"engines: {', '.join(ENGINES)}")
        flags = {name: options.pop(name, "true") for name in ("threads", "relaxed")}
        for name, value in flags.items():
            if value not in ("true", "false"):
                raise UserError(f"--set {name}={value}: not true or false", hint=f"write --set {name}=false")
        return profile(target, engine, threads=flags["threads"] == "true", relaxed=flags["relaxed"] == "true")

    return choose


def kernel_text(kernel: Kernel, caps: Caps) -> str:
    """A kernel and the functions it outlines in WebAssembly's text form."""
    table = FunctionTable()
    print_kernel(kernel, caps, table)
    return print_module(Module(kernel.name, (), (), tuple(table.functions), ()))


TARGETS = tuple(
    Target(
        name,
        chooser(name),
        emit,
        lambda plan, files, caps, strict: target_record(plan, caps, strict),
        local={"engine": "wasmtime"},
        source=kernel_text,
        options=("engine", "threads", "relaxed"),
    )
    for name in ("wasm32", "wasm64")
)

__all__ = ["PROFILES", "TARGETS", "build_module", "emit", "print_kernel", "profile", "target_record"]
