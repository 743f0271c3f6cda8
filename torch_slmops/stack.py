"""Which decoder layers are called one after the other with nothing between: they form runs.

That is read from the source of the forward that calls them: its one loop over the layers must do
nothing but `x = layer(x, ...)`, with arguments that are the same for all layers of a type. From the
same source and that of the model around it: whether what the last layer makes goes to a norm and
from there to the logits that are asked for, and nowhere else.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torch_slmops.fused import derived_class, read, scaling_of
from torch_slmops.fused_decoder import FusedDecoderLayer, Run
from torch_slmops.last_positions import LastPositions, Stack

__all__ = ["Layers", "connects_only", "link_layers"]

_KEPT = "logits_to_keep"  # transformers' names
_STATE = "last_hidden_state"

# What the forward of a model may call besides its children, and nothing is computed but integers,
# masks and what every CPU rounds alike: sums, products and quotients of elements.
_CONNECTING = {
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "DynamicCache",
    "ValueError",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "decoder_layer",  # by the loop over a list of children
    "enumerate",
    "isinstance",
    "mask_function",
    "past_key_values.get_seq_length",
    "position_ids.unsqueeze",
    "self.loss_function",  # of labels; no output depends on it
    "slice_logits_to_keep",
    "torch.arange",
}


class Layers(nn.ModuleList):
    """An `nn.ModuleList` whose slices cost little: many forwards take one for each token."""

    def __getitem__(self, idx: Any) -> Any:
        if not isinstance(idx, slice) or torch.compiler.is_compiling():
            return super().__getitem__(idx)
        chosen = tuple(self._modules.values())[idx]
        made = Layers()
        made._modules.update(zip(map(str, range(len(chosen))), chosen, strict=True))
        return made


def link_layers(model: nn.Module) -> None:
    """Tells the fused decoder layers of `model` how they are called: what they can save then."""
    _link_runs(model)
    for module in list(model.modules()):
        stack = _stack_of(module)
        if stack is not None:
            vars(module)["slmops_stack"] = stack
            if not isinstance(module, LastPositions):
                module.__class__ = derived_class(LastPositions, type(module))


def _link_runs(model: nn.Module) -> None:
    """Which of them can be computed together."""
    for parent in model.modules():
        for name, children in parent._modules.items():
            if not isinstance(children, nn.ModuleList):
                continue
            layers = list(children._modules.values())
            if not any(isinstance(layer, FusedDecoderLayer) for layer in layers):
                continue
            bounded = _plain_loop(parent, name)
            for start, run in _alike(layers):
                made = None
                if bounded is not None and len(run) > 1:
                    made = Run(parent, name, start, run, bounded)
                    if type(children) is nn.ModuleList:
                        children.__class__ = Layers
                for number, layer in enumerate(run):
                    layer.slmops_run = None if made is None else (made, number)


def _alike(layers: list[Any]) -> Iterator[tuple[int, tuple[FusedDecoderLayer, ...]]]:
    """The longest runs of fused layers that differ in nothing but their weights."""
    numbered = enumerate(layers)
    for key, run in itertools.groupby(numbered, lambda pair: _key(pair[1])):
        if key is not None:
            members = list(run)
            yield members[0][0], tuple(layer for _, layer in members)


def _key(layer: Any) -> object:
    """What the layers of a run have in common."""
    if not isinstance(layer, FusedDecoderLayer):
        return None
    spec = layer.slmops
    attention: Any = layer._modules[spec.row.attention]
    mlp: Any = layer._modules[spec.row.mlp]
    gate_up = mlp._modules[mlp.slmops.packed]
    values = [read(attention, source) for _, source in attention.slmops.row.options]
    values.append(scaling_of(attention, attention.slmops))
    if spec.row.multiplier is not None:
        values.append(read(layer, spec.row.multiplier))
    return spec, attention.slmops, mlp.slmops, gate_up.hidden, tuple(values), type(layer)


def _plain_loop(parent: nn.Module, name: str) -> bool | None:
    """Whether the loop over `parent.<name>` ends at config.num_hidden_layers; None if not plain."""
    tree = _source(parent)
    found = None if tree is None else _chain(tree, name)
    return None if found is None else found[1]


def _chain(forward: ast.FunctionDef, name: str) -> tuple[ast.For, bool] | None:
    """The one loop over `self.<name>`, and whether it is bounded; None if it is not plain."""
    uses = [node for node in ast.walk(forward) if _is_list(node, name)]
    loops = [node for node in ast.walk(forward) if isinstance(node, ast.For)]
    found = [(loop, _iterated(loop, name)) for loop in loops]
    plain = [(loop, bounded) for loop, bounded in found if bounded is not None]
    if len(uses) != 1 or len(plain) != 1 or not _is_chain(plain[0][0]):
        return None
    return plain[0]


def _stack_of(model: nn.Module) -> Stack | None:
    """The layers of a causal language model, if nothing but its logits depends on the last one."""
    function: Any = getattr(type(model), "forward", None)
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or _KEPT not in code.co_varnames:
        return None
    forward = _source(model)
    child = None if forward is None else _sliced_child(forward)
    parent = None if child is None else model._modules.get(child)
    inner = None if parent is None else _source(parent)
    if child is None or parent is None or inner is None:
        return None
    for name, layers in parent._modules.items():
        if not isinstance(layers, nn.ModuleList):
            continue
        found = _chain(inner, name)
        norm = None if found is None else _norm_after(inner, found[0])
        fused = any(isinstance(layer, FusedDecoderLayer) for layer in layers)
        if found is not None and norm in parent._modules and fused:
            return Stack(child, parent, name, found[1], norm)
    return None


def _sliced_child(forward: ast.FunctionDef) -> str | None:
    """The child of whose result the forward uses the end of the hidden state alone, for logits."""
    for before, after in itertools.pairwise(forward.body):
        hidden, value = _assigned(before)
        outputs = value.removesuffix(f".{_STATE}")
        sliced = f"slice_logits_to_keep({hidden}, {_KEPT})"
        if outputs == value or _assigned(after) != (hidden, sliced):
            continue
        calls = [value for name, value in map(_assigned, forward.body) if name == outputs]
        if len(calls) != 1 or not calls[0].startswith("self."):
            return None
        nodes = list(ast.walk(forward))
        used = [n for n in nodes if isinstance(n, ast.Name) and n.id == outputs]
        fields = [n for n in nodes if isinstance(n, ast.Attribute) and n.value in used]
        whole = [field for field in fields if field.attr == _STATE]
        if len(used) != len(fields) + 1 or len(whole) != 1:  # and once it is assigned
            return None
        return calls[0].removeprefix("self.").partition("(")[0]
    return None


def _norm_after(forward: ast.FunctionDef, loop: ast.For) -> str | None:
    """The child that gets what the loop made, before the forward returns it as its last state."""
    if loop not in forward.body:
        return None
    state = _assigned(loop.body[-1])[0]
    rest = forward.body[forward.body.index(loop) + 1 :]
    uses = [n for s in rest for n in ast.walk(s) if isinstance(n, ast.Name) and n.id == state]
    if not rest:
        return None
    name, value = _assigned(rest[0])
    returned = [
        keyword
        for call in ast.walk(rest[-1])
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == _STATE and ast.unparse(keyword.value) == state
    ]
    # Assigned, taken by the norm, returned.
    if name != state or len(uses) != 3 or len(returned) != 1:
        return None
    child = value.removeprefix("self.").removesuffix(f"({state})")
    return child if value == f"self.{child}({state})" else None


def _assigned(statement: ast.stmt) -> tuple[str, str]:
    """The target and the value of an assignment in words; empty ones if it is none."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return ast.unparse(statement.targets[0]), ast.unparse(statement.value)
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        return ast.unparse(statement.target), ast.unparse(statement.value)
    return "", ""


def connects_only(module: nn.Module) -> bool:
    """Whether the forward of `module` is known to do nothing but to connect its children."""
    forward = _source(module)
    if forward is None:
        return False
    children = {f"self.{name}" for name in module._modules}
    calls = {ast.unparse(node.func) for node in ast.walk(forward) if isinstance(node, ast.Call)}
    products = [node for node in ast.walk(forward) if isinstance(node, ast.MatMult | ast.Pow)]
    return bool(calls) and calls <= _CONNECTING | children and not products


def _source(module: nn.Module) -> ast.FunctionDef | None:
    """The forward of a module's class, without its decorators; None if there is no source."""
    if "forward" in vars(module):
        return None
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
        tree = ast.parse(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0]
    if not isinstance(found, ast.FunctionDef):
        return None
    found.decorator_list = []
    return found


def _is_list(node: ast.AST, name: str) -> bool:
    return ast.unparse(node) == f"self.{name}" if isinstance(node, ast.Attribute) else False


def _iterated(loop: ast.For, name: str) -> bool | None:
    """Whether a loop over the list, enumerated or not, is bounded; None if it is another loop."""
    words = ast.unparse(loop.iter)
    if words.startswith("enumerate(") and words.endswith(")"):
        words = words[len("enumerate(") : -1]
    forms = {f"self.{name}": False, f"self.{name}[:self.config.num_hidden_layers]": True}
    return forms.get(words)


def _is_chain(loop: ast.For) -> bool:
    """Whether the body is `x = layer(x, ...)`, with nothing of one layer in the arguments."""
    names = [node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)]
    index, layer = (names[0], names[1]) if len(names) == 2 else (None, names[0])
    # The type of a layer may choose among its arguments: layers of a run have one type.
    of_type = {f"self.config.layer_types[{index}]", f"{layer}.attention_type"}
    *before, call = loop.body
    for statement in before:
        if not isinstance(statement, ast.Assign) or ast.unparse(statement.value) not in of_type:
            return False
        of_type.add(ast.unparse(statement.targets[0]))
    if loop.orelse or not isinstance(call, ast.Assign) or not isinstance(call.value, ast.Call):
        return False
    target, value = ast.unparse(call.targets[0]), call.value
    if ast.unparse(value.func) != layer or [ast.unparse(a) for a in value.args] != [target]:
        return False
    for keyword in value.keywords:
        words = ast.unparse(keyword.value)
        for allowed in of_type:
            words = words.replace(f"[{allowed}]", "")
        used = {node.id for node in ast.walk(ast.parse(words)) if isinstance(node, ast.Name)}
        if used & {*names, target}:
            return False
    return True
