"""serve: handing a bundle to browsers on this machine."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from tinygpt.commands import Command
from tinygpt.commands.options import console, whole

PORT = 8000


def _serve_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, of a target that runs in browsers")
    parser.add_argument(
        "--port", metavar="N", type=whole(0), default=PORT, help=f"0 takes any that is free (default: {PORT})"
    )


def _serve(args: Namespace) -> int:
    from tinygpt.runtime.bundle import load
    from tinygpt.serve import BundleServer

    with BundleServer(load(args.bundle), args.port) as server:
        console().print(f"{args.bundle} is at {server.url}\nCtrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console().print("ended")
    return 0


COMMANDS = (
    Command(
        "serve",
        "serve a bundle to browsers on this machine",
        ("tinygpt compile small --target wasm64 --out small.bundle", "tinygpt serve small.bundle --port 8000"),
        _serve_arguments,
        _serve,
    ),
)
