"""Which decoder layers are called one after the other with nothing between: they form runs.

That is read from the source of the forward that calls them: its one loop over the layers must do
nothing but `x = layer(x, ...)`, with arguments that are the same for all layers of a type.
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

from torch_slmops.fused import read, scaling_of
from torch_slmops.fused_decoder import FusedDecoderLayer, Run

__all__ = ["Layers", "connects_only", "link_runs"]

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


def link_runs(model: nn.Module) -> None:
    """Tells the fused decoder layers of `model` which of them can be computed together."""
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
    if tree is None:
        return None
    uses = [node for node in ast.walk(tree) if _is_list(node, name)]
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    found = [(loop, _iterated(loop, name)) for loop in loops]
    found = [(loop, layers) for loop, layers in found if layers is not None]
    if len(uses) != 1 or len(found) != 1:
        return None
    loop, bounded = found[0]
    return bounded if _is_chain(loop) else None


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
