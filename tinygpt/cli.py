"""The command line: finds the command, runs it, and turns failures into a paragraph and an exit status.

0 it worked · 1 something is wrong with us, or a selftest failed · 2 something is wrong with the input · 130 Ctrl-C"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import tinygpt
from tinygpt.commands import Command, commands
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.runtime.errors import UserError as RuntimeUserError

DESCRIPTION = "A compiler for small GPT models: from a PyTorch config to native, WebAssembly or WebGPU training."
EXAMPLES = (
    "tinygpt train small --data corpus.txt --steps 1500 --out small.safetensors",
    'tinygpt generate small.safetensors --prompt "ROMEO:" --tokens 300',
    "tinygpt compile small --out small.bundle",
    "tinygpt COMMAND --help",
)
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; a wrong argument exits with 2 as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    args = parser().parse_args(arguments)
    command: Command = args.command
    try:
        return command.run(args)
    except (UserError, RuntimeUserError) as error:
        return _failed(f"error: {error}", 2)
    except CompilerBug as error:
        return _failed(f"compiler bug: {error}\n  hint: please report this, with the command that led to it", 1)
    except KeyboardInterrupt:
        return _failed("stopped", INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    top = argparse.ArgumentParser(
        prog="tinygpt",
        description=DESCRIPTION,
        epilog=_examples(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"tinygpt {tinygpt.__version__}")
    sub = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands():
        about = command.summary[0].upper() + command.summary[1:] + "."
        inner = sub.add_parser(
            command.name,
            help=command.summary,
            description=about,
            epilog=_examples(command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(inner)
        inner.set_defaults(command=command)
    return top


def _examples(lines: Sequence[str]) -> str:
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def _failed(message: str, status: int) -> int:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    return status
