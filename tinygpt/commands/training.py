"""train, evaluate, generate: using a model here, in this process."""

from __future__ import annotations

import codecs
import json
import math
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from tinygpt.commands import Command
from tinygpt.commands.options import add_shape, add_target, add_threads, chosen, compiled, console, is_bundle, whole
from tinygpt.ir.errors import UserError

SEED = 42
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def _train_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="BUNDLE|CONFIG", help="a bundle's folder, or a preset or JSON file to compile first"
    )
    add_target(parser)
    add_shape(parser)
    _add_data(parser)
    parser.add_argument(
        "--steps",
        metavar="N",
        type=whole(0),
        help="steps in all, those of a resumed checkpoint included (default: the preset's)",
    )
    parser.add_argument(
        "--lr", metavar="X", type=float, help="learning rate (default: 3e-4, or the resumed checkpoint's)"
    )
    parser.add_argument("--seed", metavar="S", type=int, help=f"of weights, batches and dropout (default: {SEED})")
    add_threads(parser)
    parser.add_argument(
        "--eval-every",
        metavar="N",
        type=whole(0),
        help="steps between evaluations of the validation text; 0: none (default: 100)",
    )
    parser.add_argument(
        "--out", metavar="CHECKPOINT", type=Path, help="where to save (default: the resumed file, or MODEL.safetensors)"
    )
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        type=Path,
        help="continue from a checkpoint, to the bit as if it had never stopped",
    )
    parser.add_argument(
        "--metrics", metavar="FILE", type=Path, help="write a JSON line for each step and each evaluation"
    )


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="a text file, or tinyshakespeare, or tales (default: TinyShakespeare, else generated tales)",
    )


def _train(args: Namespace) -> int:
    from tinygpt.estimate import estimate
    from tinygpt.runtime import checkpoint, data
    from tinygpt.runtime import training as loop

    out = args.out or args.resume or _unused(args.model)
    checkpoint.require_writable(out)
    resumed = checkpoint.load(args.resume) if args.resume else None
    if resumed is not None and args.seed not in (None, resumed.seed):
        raise UserError(
            f"--seed {args.seed}: the checkpoint's run has seed {resumed.seed}",
            hint="leave out --seed: a resumed run keeps its own",
        )
    corpus = data.load(args.data)
    bundle = _bundle(args)
    corpus.require_windows(bundle.manifest.context)
    settings = bundle.manifest.training
    steps = settings["max_steps"] if args.steps is None else args.steps
    eval_every = settings["eval_interval"] if args.eval_every is None else args.eval_every
    view = console()
    with bundle.session(args.threads, SEED if args.seed is None else args.seed) as session:
        if args.resume:
            session.load(args.resume)
        count = sum(math.prod(slot.shape) for slot in bundle.manifest.parameters if slot.role == "param")
        threads = session.engine.threads
        view.print(f"{bundle.manifest.name}: {count:,} parameters, {bundle.manifest.target_name}, {threads} threads")
        view.print(str(estimate(session, corpus, steps, eval_every)))
        result = loop.train(
            session, corpus, steps, lr=args.lr, eval_every=eval_every, out=out, metrics=args.metrics, console=view
        )
    if result.interrupted:
        view.print(f"continue with: tinygpt train {args.model} --resume {result.checkpoint} --steps {steps}")
    return INTERRUPTED if result.interrupted else 0


def _unused(model: str) -> Path:
    """A checkpoint's name in the current folder that no file has yet."""
    stem = Path(model).resolve().stem
    return next(path for n in range(1, 10_000) if not (path := Path(f"{stem}{f'-{n}' * (n > 1)}.safetensors")).exists())


def _bundle(args: Namespace) -> Any:
    """The bundle that BUNDLE | CONFIG names."""
    from tinygpt.runtime.bundle import load

    if not is_bundle(args.model):
        return compiled(chosen(args, args.model, local=True))
    bundle = load(args.model)
    asked = {"--batch": (args.batch, bundle.manifest.batch), "--context": (args.context, bundle.manifest.context)}
    for name, (wanted, found) in asked.items():
        if wanted not in (None, found):
            raise UserError(
                f"{name} {wanted}: bundle {args.model} was compiled for {found}",
                hint=f"compile it again with {name} {wanted}, or give a CONFIG",
            )
    if args.settings or args.strict:
        raise UserError(
            f"--set and --strict are for compiling; {args.model} is a bundle", hint="leave them out, or give a CONFIG"
        )
    return bundle


def _add_checkpoint(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a file that `tinygpt train` saved")
    parser.add_argument(
        "--bundle", metavar="DIR", type=Path, help="run it on this bundle instead of compiling its config"
    )
    add_target(parser)
    add_threads(parser)


def _opened(args: Namespace) -> Any:
    """A session with a checkpoint's weights, on a bundle compiled from its config at the shape it was trained at."""
    from tinygpt.runtime import checkpoint
    from tinygpt.runtime.bundle import load

    saved = checkpoint.load(args.checkpoint)
    if args.bundle:
        bundle = load(args.bundle)
    elif saved.config is None:
        raise UserError(
            f"checkpoint {args.checkpoint} is of a model captured from PyTorch, not of a config",
            hint="give its bundle with --bundle DIR",
        )
    else:
        bundle = _compiled_config(args, saved)
    session = bundle.session(args.threads)
    session.load(args.checkpoint)
    return session


def _compiled_config(args: Namespace, saved: Any) -> Any:
    from tinygpt import compiler
    from tinygpt.targets import target

    options = dict(target(args.target).local) | dict(args.settings)
    return compiler.compile(dict(saved.config), args.target, saved.batch, saved.context, options=options)


def _evaluate_arguments(parser: ArgumentParser) -> None:
    _add_checkpoint(parser)
    _add_data(parser)
    parser.add_argument(
        "--part",
        choices=("validation", "train", "all"),
        default="validation",
        help="of the text (default: its last 10 %%, validation)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _evaluate(args: Namespace) -> int:
    from tinygpt.runtime import data

    corpus = data.load(args.data)
    text = {"validation": corpus.validation, "train": corpus.train, "all": corpus.data}[args.part]
    with _opened(args) as session:
        loss = session.evaluate(text)
    if args.json:
        print(
            json.dumps(
                {"loss": loss, "step": session.step, "part": args.part, "bytes": int(text.size), "data": corpus.name}
            )
        )
        return 0
    floor = f"; the text's own entropy is {corpus.floor:.4f}" if corpus.floor else ""
    bits, size = loss / math.log(2), f"{text.size:,} bytes of {corpus.name}"
    console().print(f"{args.part} loss {loss:.4f} nats/byte ({bits:.4f} bits) over {size}, step {session.step}{floor}")
    return 0


def _generate_arguments(parser: ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument(
        "--prompt", metavar="TEXT", default="\n", help="what the text begins with (default: a new line)"
    )
    parser.add_argument("--tokens", metavar="N", type=whole(0), default=200, help="bytes to add (default: 200)")
    parser.add_argument(
        "--temperature",
        metavar="X",
        type=float,
        default=0.8,
        help="0 takes the likeliest byte each time (default: 0.8)",
    )
    parser.add_argument(
        "--top-k", metavar="K", type=whole(0), default=40, help="choose among the K likeliest; 0: all (default: 40)"
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="choose among the likeliest that share P of the probability (default: 1)",
    )
    parser.add_argument("--seed", metavar="S", type=int, default=SEED, help=f"of the sample (default: {SEED})")


def _generate(args: Namespace) -> int:
    from tinygpt.runtime.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    prompt = args.prompt.encode("utf-8", "surrogateescape")  # bytes that are no text reach the model as they are
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with _opened(args) as session:
        sys.stdout.write(prompt.decode("utf-8", "replace"))
        for token in session.stream(prompt, args.tokens, sampling):
            sys.stdout.write(decoder.decode(bytes([token])))
            sys.stdout.flush()
        sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    return 0


COMMANDS = (
    Command(
        "train",
        "train a bundle, or a config that is compiled first, on a text",
        (
            "tinygpt train small --data corpus.txt --steps 1500 --out small.safetensors",
            "tinygpt train small.bundle --data corpus.txt --threads 2 --metrics run.jsonl",
            "tinygpt train small --resume small.safetensors --steps 3000",
        ),
        _train_arguments,
        _train,
    ),
    Command(
        "evaluate",
        "the loss of a checkpoint on a text",
        (
            "tinygpt evaluate small.safetensors --data corpus.txt",
            "tinygpt evaluate small.safetensors --target wasm32 --json",
        ),
        _evaluate_arguments,
        _evaluate,
    ),
    Command(
        "generate",
        "write text with a checkpoint",
        (
            'tinygpt generate small.safetensors --prompt "ROMEO:" --tokens 300',
            "tinygpt generate small.safetensors --temperature 0 --tokens 100",
        ),
        _generate_arguments,
        _generate,
    ),
)
