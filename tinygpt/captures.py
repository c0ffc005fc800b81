"""Where compiling starts: the functions loss, logits and training_loss of a model, as one captured module.

From a config the reference model is captured once for each of them; from a user's captured module they are cut out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tinygpt.config import ModelConfig
from tinygpt.ir.core import Function, Module, Op, Region, Rewriter, Value, without_dead_ops
from tinygpt.ir.errors import UserError
from tinygpt.ir.ops import GraphBuilder
from tinygpt.ir.types import TensorType
from tinygpt.training_defaults import TRAINING_DEFAULTS, TrainingDefaults

LARGEST_BATCH = 1 << 16  # windows a step
MOST_PARAMETERS = 2**31 - 1  # weights are one array, indexed by 32-bit numbers


def capture_config(
    config: ModelConfig, batch: int, context: int, training: TrainingDefaults = TRAINING_DEFAULTS
) -> Module:
    """The reference model of a config as a module with functions loss and logits (and training_loss with dropout).

    Raises UserError for a batch or context that does not fit, and where PyTorch is missing."""
    if not 1 <= context <= config.context_length:
        raise UserError(
            f"context {context} is outside 1..{config.context_length}",
            hint="the model has a position for each token of its context_length",
        )
    if not 1 <= batch <= LARGEST_BATCH:
        raise UserError(f"batch {batch} is outside 1..{LARGEST_BATCH}", hint="16 windows a step are usual")
    if config.parameter_count > MOST_PARAMETERS:
        raise UserError(
            f"{config.model_name} has {config.parameter_count:,} parameters, at most {MOST_PARAMETERS:,} are supported",
            hint="take a smaller d_model, n_layers or vocab_size",
        )
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"capturing a model needs PyTorch, which cannot be imported: {error}", hint="pip install torch"
        ) from error
    from tinygpt.lowering.capture import capture
    from tinygpt.model import TinyGPT

    with torch.device("meta"):
        model = TinyGPT(config).eval()
    tokens, one = (torch.zeros((rows, context), dtype=torch.int64, device="meta") for rows in (batch, 1))
    module = capture(model, (tokens, tokens), name=config.model_name, check=False)
    logits = capture(model, (one, one), check=False)
    trained = capture(model.train(), (tokens, tokens), check=False) if config.dropout > 0 else None
    functions = {"loss": with_row_losses(module.functions["loss"]), "logits": _logits(_over(module, logits, "loss"))}
    if trained is not None:
        functions["training_loss"] = _only(_over(module, trained, "loss"), "loss", name="training_loss")
    return replace(module, functions=functions, attrs=_attrs(config.to_dict(), batch, context, training))


def complete(module: Module, training: TrainingDefaults = TRAINING_DEFAULTS) -> Module:
    """A module that `tinygpt.capture` made, with everything a bundle needs. Raises UserError if it computes no loss, or was
    captured in training mode and drops anything out.

    Its shapes are those it was captured at; its logits are computed for a whole batch and the first row is kept."""
    if "logits" in module.functions and "training" in module.attrs:
        return module
    loss = module.functions.get("loss")
    if loss is None or len(loss.params) < 2:
        raise UserError(
            f"module {module.name} has no function loss(tokens, targets)",
            hint="capture it with tg.capture(model, (tokens, targets))",
        )
    if len(loss.params) > 2:
        raise UserError(
            f"module {module.name} was captured in training mode with dropout, which is no way to evaluate or to generate",
            hint="call eval() on the model before tg.capture; a model from a config trains with its dropout",
        )
    batch, context = loss.params[0].type.shape
    training = replace(training, batch_size=batch)
    functions = {"loss": with_row_losses(loss), "logits": _first_row(_logits(loss), batch)}
    return replace(module, functions=functions, attrs={**module.attrs, **_attrs(None, batch, context, training)})


def _attrs(config: dict[str, Any] | None, batch: int, context: int, training: TrainingDefaults) -> dict[str, Any]:
    return {"config": config, "batch": batch, "context": context, "training": training.to_dict()}


def with_row_losses(loss: Function) -> Function:
    """`loss` that returns the mean and, from its cross-entropy, the loss of every token."""
    values, names, ops = [loss.body.yields[loss.result_names.index("loss")]], ["loss"], list(loss.body.ops)
    rows = [op.results[0] for op in ops if op.name == "cross_entropy"]
    if rows:
        values.append(_appended(ops, "reshape", rows[-1], shape=loss.params[0].type.shape))
        names.append("row_losses")
    return without_dead_ops(
        replace(loss, body=Region(loss.params, tuple(ops), tuple(values)), result_names=tuple(names))
    )


def _logits(function: Function) -> Function:
    """The part of `loss` that scores tokens; targets are not needed for it."""
    return _only(function, "logits", name="logits", unneeded="targets")


def _only(function: Function, result: str, *, name: str, unneeded: str = "") -> Function:
    """The function with one of its results, and without an input that is not needed for it."""
    kept = function.body.yields[function.result_names.index(result)]
    args = tuple(a for a in function.params if a.hint != unneeded)
    body = Region(args, function.body.ops, (kept,))
    return without_dead_ops(replace(function, name=name, body=body, result_names=(result,)))


def _over(module: Module, source: Module, name: str) -> Function:
    """A function of another module over the parameters of this one, which has the same ones."""
    r = Rewriter()
    r.mapping = {p.value: module.parameters[name].value for name, p in source.parameters.items()}
    function = source.functions[name]
    for op in function.body.ops:
        r.clone(op)
    return replace(function, body=Region(function.params, tuple(r.ops), tuple(r.get(v) for v in function.body.yields)))


def _first_row(logits: Function, batch: int) -> Function:
    """logits(tokens[B, T]) as logits(tokens[1, T]): the row is repeated, and the first row of the scores returned."""
    if batch == 1:
        return logits
    (tokens,) = logits.params
    row = Value(TensorType(tokens.type.dtype, (1, *tokens.type.shape[1:])), tokens.hint)
    first: list[Op] = []
    r = Rewriter()
    r.mapping = {tokens: _appended(first, "concat", *[row] * batch, axis=0)}
    r.ops = first
    for op in logits.body.ops:
        r.clone(op)
    scores = _appended(r.ops, "slice", r.get(logits.body.yields[0]), axis=0, start=0, stop=1)
    return replace(logits, body=Region((row,), tuple(r.ops), (scores,)))


def _appended(ops: list[Op], name: str, *operands: Value, **attrs: Any) -> Value:
    """The result of a new op behind the others."""
    g = GraphBuilder()
    g.ops = ops
    return g(name, *operands, **attrs)


__all__: Sequence[str] = ("capture_config", "complete", "with_row_losses")
