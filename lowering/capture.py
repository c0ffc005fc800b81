"""Capture: a PyTorch module's forward pass with loss becomes an ir.Module with the one function `loss`.

torch.export traces the forward; `lowering.aten` maps its ATen graph op by op. Here are the walk over that graph, the
parameters and their names, source locations, and the check of the result's gradients against eager autograd."""

from __future__ import annotations

import contextlib
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_leaves

from tinygpt.ir.core import Function, Location, Module, Parameter, Region, Value, without_dead_ops
from tinygpt.ir.errors import CompilerBug, UserError
from tinygpt.ir.interpret import evaluate
from tinygpt.ir.types import TensorType
from tinygpt.lowering.aten import HANDLERS, POINTWISE, convert, packet
from tinygpt.lowering.aten_builder import DTYPES, AtenBuilder
from tinygpt.lowering.differentiate import GRADIENT, gradients

INPUT_NAMES = ("tokens", "targets")

# Rows of the batch on which gradients are checked: two, so that a mistake across the batch shows.
CHECKED_ROWS = 2

# Largest difference to eager autograd that passes, relative to the largest element of the tensor and of all gradients.
# Float32 rounding stays near 1e-6; a wrong formula is off by 1e-2 and more.
CHECK_TOLERANCE = (1e-4, 1e-6)

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n    ([^\n]*))?')
_TORCH = os.path.dirname(torch.__file__) + os.sep


def capture(
    torch_module: torch.nn.Module, example_inputs: Sequence[Any], *, name: str = "", check: bool = True
) -> Module:
    """The graph of `torch_module(*example_inputs)`, specialised to the inputs' shapes (tokens and targets [B, T]).

    The function `loss` takes `tokens` and `targets` (i32[B, T]) and, where the module is in training mode and drops
    anything out, `key` (u32[2]); it returns `loss` and `logits` (f32[B, T, V]). Parameters that the loss depends on
    keep their names, a tied one the first of its names. They start as `torch_module.initializers()` says, {name:
    ("normal", std) or ("constant", c)}; without that method the same kinds are estimated from the present weights.

    `check` compares loss and gradients with eager autograd (not on the meta device, where there are no values).
    Raises UserError when the model contains what cannot be captured, with the line it stands on."""
    if not isinstance(torch_module, torch.nn.Module):
        raise UserError(f"capture: expected a torch.nn.Module, got {type(torch_module).__name__}")
    inputs = _checked_inputs(torch_module, example_inputs)
    name = name or re.sub(r"\W", "_", type(torch_module).__name__.lower())
    module = _translate(torch_module, inputs, name)
    if check and not any(p.is_meta for p in torch_module.parameters()):
        _check_on_few_rows(module, torch_module, inputs)
    return module


def check_gradients(module: Module, torch_module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Compare the module's loss and gradients, interpreted in float64, with eager autograd's on the same inputs.

    The module is one captured at these inputs' shapes, without dropout. Raises CompilerBug that names the tensor."""
    weights = _named_parameters(torch_module)
    trained = {key: weights[key] for key in module.parameters}
    try:
        loss = _find_loss(torch_module(*inputs))
        expected = torch.autograd.grad(loss, list(trained.values()))
    except RuntimeError as error:
        raise UserError(
            f"capture: PyTorch cannot differentiate {type(torch_module).__name__}: {str(error).splitlines()[0]}",
            hint="gradients are compared with eager autograd; make loss.backward() work, or pass check=False",
        ) from error
    arrays = dict(zip(INPUT_NAMES, (x.numpy().astype(np.int32) for x in inputs)))
    values = {key: p.detach().numpy().astype(np.float64) for key, p in trained.items()}
    found = evaluate(module.with_function(gradients(module, module.functions["loss"])), "grads", arrays, values)
    relative, floor = CHECK_TOLERANCE
    largest = max(float(g.abs().max()) for g in expected)
    pairs = [("loss", found["loss"], loss.detach().numpy())]
    pairs += [(key, found[GRADIENT + key], g.numpy()) for key, g in zip(trained, expected, strict=True)]
    for key, ours, theirs in pairs:
        distance, size = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
        if not distance <= relative * size + floor * largest:
            raise CompilerBug(f"capture: {key} differs from eager autograd by {distance:.3g} (largest element {size:.3g})")


def _check_on_few_rows(module: Module, torch_module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Check on two rows of random tokens, with dropout off; captured again if that is not how the module was."""
    function = module.functions["loss"]
    lookups = [op for op in function.body.ops if op.name == "embedding" and op.operands[0] in function.params]
    limits = [op.operands[1].type.shape[0] for op in lookups]
    limits += [op.operands[0].type.shape[-1] for op in function.body.ops if op.name == "cross_entropy"]
    rows = min(CHECKED_ROWS, inputs[0].shape[0])
    generator = torch.Generator().manual_seed(0)
    few = [torch.randint(min(limits, default=2), (rows, *x.shape[1:]), generator=generator) for x in inputs]
    with _evaluation_mode(torch_module):
        if rows < inputs[0].shape[0] or len(function.params) > len(inputs):
            module = _translate(torch_module, few, module.name)
        if len(module.functions["loss"].params) > len(inputs):
            raise UserError(
                "capture: the model drops out even in evaluation mode, so its gradients cannot be checked",
                hint="pass training=self.training to F.dropout, or capture with check=False",
            )
        check_gradients(module, torch_module, few)


@contextlib.contextmanager
def _evaluation_mode(torch_module: torch.nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in torch_module.modules()}
    torch_module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


def _checked_inputs(torch_module: torch.nn.Module, example_inputs: Sequence[Any]) -> list[torch.Tensor]:
    """The inputs as int64 tensors of their own (PyTorch merges inputs that are one object), where the model lives."""
    device = next((p.device for p in torch_module.parameters()), torch.device("cpu"))
    if device.type not in ("cpu", "meta"):
        raise UserError(f"capture: the model is on {device}", hint="capture a CPU copy: copy.deepcopy(model).cpu()")
    inputs = [torch.as_tensor(x).detach() for x in example_inputs]
    if not 1 <= len(inputs) <= len(INPUT_NAMES):
        raise UserError(
            f"capture: {len(inputs)} example inputs",
            hint="pass (tokens, targets), integer tensors of one shape [batch, context]",
        )
    for label, x in zip(INPUT_NAMES, inputs):
        if x.is_floating_point() or x.dim() != 2 or 0 in x.shape or x.shape != inputs[0].shape:
            raise UserError(
                f"capture: example {label} have type {x.dtype} and shape {list(x.shape)}",
                hint="pass (tokens, targets), integer tensors of one shape [batch, context]",
            )
    return [x.to(device=device, dtype=torch.int64, copy=True) for x in inputs]


def _export(torch_module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> torch.export.ExportedProgram:
    """The ATen graph, functional, with ops we do not map decomposed where PyTorch knows how.

    Only those: the blanket core decompositions silently break the gradients of attention (torch 2.13)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(torch_module, tuple(inputs))
            known = torch.export.default_decompositions()
            for _ in range(4):  # a decomposition may contain further ops that need one
                foreign = _foreign(program, known)
                if not foreign and not any(map(_writes, program.graph.nodes)):
                    break
                program = program.run_decompositions({t: known[t] for t in foreign})
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"capture: torch.export could not trace {type(torch_module).__name__}: {reason}",
            hint="forward(tokens, targets) must run on these inputs, without branches on the values of tensors",
        ) from error
    return program


def _needed_nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    """The calls that outputs depend on, in order, and those that write to something."""
    needed = set(program.graph.output_node().all_input_nodes)
    found: list[torch.fx.Node] = []
    for node in reversed(program.graph.nodes):
        if node.op == "call_function" and (node in needed or _writes(node)):
            found.append(node)
            needed.update(node.all_input_nodes)
    return found[::-1]


def _writes(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _foreign(program: torch.export.ExportedProgram, known: Mapping[Any, Any]) -> set[Any]:
    """The ops that act on more than fixed tensors and that `lowering.aten` does not map, but PyTorch can decompose."""
    varying = {InputKind.PARAMETER, InputKind.USER_INPUT}
    specs = program.graph_signature.input_specs
    names = {spec.arg.name for spec in specs if spec.kind in varying and hasattr(spec.arg, "name")}
    reached = {node for node in program.graph.nodes if node.op == "placeholder" and node.name in names}
    for node in program.graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    targets = {n.target for n in _needed_nodes(program) if n in reached}
    return {t for t in targets if t in known and packet(t) not in HANDLERS and packet(t) not in POINTWISE}


def _translate(torch_module: torch.nn.Module, inputs: Sequence[torch.Tensor], name: str) -> Module:
    program = _export(torch_module, inputs)
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        changed = ", ".join([*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()])
        raise UserError(f"capture: forward writes to {changed}", hint="forward may only read its buffers and inputs")
    g = AtenBuilder()
    weights = _named_parameters(torch_module)
    parameters = {key: Value(_tensor_type(p, f"parameter {key}", None), key) for key, p in weights.items()}
    first_names = {id(p): key for key, p in weights.items()}
    env: dict[torch.fx.Node, Any] = {}
    arguments: list[Value] = []
    specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    needed = set(_needed_nodes(program))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind == InputKind.PARAMETER:
                env[node] = parameters[first_names[id(torch_module.get_parameter(str(spec.target)))]]
            elif spec.kind == InputKind.USER_INPUT:
                arguments.append(Value(TensorType("i32", tuple(inputs[0].shape)), INPUT_NAMES[len(arguments)]))
                env[node] = arguments[-1]
            else:
                env[node] = _constant_input(program, str(spec.target))
        elif node.op == "get_attr":
            env[node] = operator.attrgetter(str(node.target))(program.graph_module)
        elif node in needed:
            env[node] = _call(g, node, env)
    results = _results(g, program, env, inputs[0])
    region = Region(tuple(arguments), tuple(g.ops), tuple(results.values()))
    function = without_dead_ops(Function("loss", region, result_names=tuple(results)))
    used = {v for op in function.body.ops for v in op.operands}
    if g.random_key in used:
        function = replace(function, body=replace(function.body, args=(*arguments, g.random_key)))
    trained = {key: value for key, value in parameters.items() if value in used}
    starts = _initializers(torch_module, {key: weights[key] for key in trained})
    kept = {key: Parameter(key, value, "param", starts[key]) for key, value in trained.items()}
    return Module(name, kept, {"loss": function})


def _named_parameters(torch_module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters under the first of their names. Raises UserError for one that is not to be trained."""
    weights = dict(torch_module.named_parameters())
    for key, p in weights.items():
        if not p.requires_grad:
            raise UserError(
                f"capture: parameter {key} is frozen (requires_grad is False)",
                hint="set requires_grad, or register the tensor as a buffer",
            )
    return weights


def _initializers(
    torch_module: torch.nn.Module, weights: Mapping[str, torch.nn.Parameter]
) -> dict[str, tuple[str, float]]:
    """How each parameter starts: as the module says, else as its present values look (to two digits)."""
    if callable(tell := getattr(torch_module, "initializers", None)):
        told = tell()
        missing = [key for key in weights if key not in told]
        if missing:
            raise UserError(f"capture: initializers() of {type(torch_module).__name__} does not name {missing[0]}")
        return {key: told[key] for key in weights}
    found: dict[str, tuple[str, float]] = {}
    for key, p in weights.items():
        if p.is_meta:
            raise UserError(
                f"capture: parameter {key} is on the meta device and has no values to start from",
                hint='give the model a method initializers() that returns {name: ("normal", std) or ("constant", c)}',
            )
        values = p.detach()
        first, spread = float(values.flatten()[0]), float(values.square().mean().sqrt())
        found[key] = ("constant", first) if bool((values == first).all()) else ("normal", float(f"{spread:.2g}"))
    return found


def _constant_input(program: torch.export.ExportedProgram, target: str) -> torch.Tensor:
    """The value of a buffer, or of a tensor made while the module was built."""
    value = program.constants[target] if target in program.constants else program.state_dict[target]
    if not isinstance(value, torch.Tensor):
        raise UserError(f"capture: {target} is a {type(value).__name__}", hint="keep plain numbers and tensors only")
    if value.is_meta:
        raise UserError(f"capture: buffer {target} has no values (meta device)", hint="build the model on the CPU")
    return value.detach()


def _call(g: AtenBuilder, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> Any:
    """The value(s) of one node: computed at once where everything it reads is fixed, else as graph ops."""
    args, kwargs = _resolved((node.args, node.kwargs), env)
    if node.target is operator.getitem:
        return args[0][args[1]]
    loc = _location(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        raise UserError(f"capture: {node.target} is not supported\n  {loc}", hint="use plain tensor operations here")
    if not any(isinstance(env[n], Value | list) for n in node.all_input_nodes):
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise UserError(f"capture: {node.target} draws random numbers\n  {loc}", hint="only dropout may be random")
        return node.target(*args, **{key: "cpu" if key == "device" else x for key, x in kwargs.items()})
    value = node.meta["val"]
    several = isinstance(value, list | tuple)
    g.at(str(node.target), _tensor_type(value[0] if several else value, str(node.target), loc), loc)
    args, kwargs = _with_known_tensors((args, kwargs), g)
    result = convert(g, packet(node.target), args, kwargs)
    first = result[0] if several else result
    if first.type != g.expected:
        raise CompilerBug(f"capture: {node.target} became {first.type}, PyTorch says {g.expected}\n  {loc}")
    return result


def _resolved(x: Any, env: Mapping[torch.fx.Node, Any]) -> Any:
    """A node's arguments, with the nodes among them replaced by what they became."""
    return _mapped(x, lambda leaf: env[leaf] if isinstance(leaf, torch.fx.Node) else leaf)


def _with_known_tensors(x: Any, g: AtenBuilder) -> Any:
    """Arguments with fixed tensors turned into graph values."""
    return _mapped(x, lambda leaf: g.known_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf)


def _mapped(x: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(x, dict):
        return {key: _mapped(item, change) for key, item in x.items()}
    return [_mapped(item, change) for item in x] if isinstance(x, (list, tuple)) else change(x)


def _results(
    g: AtenBuilder, program: torch.export.ExportedProgram, env: Mapping[torch.fx.Node, Any], tokens: torch.Tensor
) -> dict[str, Value]:
    """`loss`, the scalar output, and `logits`, the output of their size, else what cross-entropy was taken of."""
    specs = program.graph_signature.output_specs
    names = {spec.arg.name for spec in specs if spec.kind == OutputKind.USER_OUTPUT and hasattr(spec.arg, "name")}
    outputs = [env[n] for n in program.graph.output_node().all_input_nodes if n.name in names]
    floats = [v for v in outputs if isinstance(v, Value) and v.type.dtype == "f32"]
    losses = [v for v in floats if v.type.size == 1]
    if not losses:
        raise UserError(
            "capture: the forward pass returns no scalar loss",
            hint="forward(tokens, targets) returns (logits, loss), where loss is the mean cross-entropy",
        )
    results = {"loss": g.reshape(losses[0], ())}
    width = g.logits.type.shape[-1] if g.logits is not None else None
    for candidate in [v for v in (*floats, g.logits) if v is not None and v is not losses[0]]:
        if candidate.type.shape[-1] == width and candidate.type.size == tokens.numel() * width:
            return results | {"logits": g.reshape(candidate, (*tokens.shape, width))}
    return results


def _find_loss(outputs: Any) -> torch.Tensor:
    """The scalar among what forward returned."""
    leaves = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
    return next(x for x in leaves if x.is_floating_point() and x.numel() == 1)


def _location(node: torch.fx.Node) -> Location | None:
    """The innermost line outside of PyTorch itself (which records the frames of forward methods only)."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if not own:
        return None
    file, line, text = own[-1]
    return Location(os.path.basename(file), int(line), text.strip())


def _tensor_type(value: torch.Tensor, what: str, loc: Location | None) -> TensorType:
    """The IR type of a tensor. Raises UserError for element types the compiler has no place for."""
    if value.dtype not in DTYPES:
        raise UserError(
            f"capture: {what} has type {value.dtype}" + (f"\n  {loc}" if loc else ""),
            hint="models are captured in float32 (and integer tokens): convert with model.float(), without autocast",
        )
    return TensorType(DTYPES[value.dtype], tuple(value.shape))
