"""rotate: turns the residual stream of a decoder, so that outliers spread over all channels.

With an orthogonal Q and RMS norms of weight one, norm(x Q) = norm(x) Q. So the weight of every norm
goes into the layers that read it, W diag(g), and then the embedding E becomes E Q, a layer that
reads the stream W Q, one that adds to it Q^T W (its bias Q^T b), the head H diag(g) Q. In exact
arithmetic the logits stay what they were. Q is a Hadamard matrix with random signs, for a width of
2^k * m times a random orthogonal m x m one (QuaRot, arXiv 2404.00456, without its online part).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_slmops.activation_check import random_ids
from torch_slmops.compare import compare
from torch_slmops.families import DecoderLayer
from torch_slmops.fuse import find_blocks
from torch_slmops.fused import AttentionSpec, MLPSpec, NormSpec
from torch_slmops.fused_decoder import LayerSpec
from torch_slmops.match import match_norm
from torch_slmops.notes import note_rotated
from torch_slmops.survey import check_model, find_sites
from torch_slmops.windows import logits_of

__all__ = ["rotate", "rotation"]

Model = TypeVar("Model", bound=nn.Module)

# Of the logits, by dtype: how far a model may be from what it was, in nats per token. Rounding the
# new weights to bfloat16 costs as much as rounding the old ones did (docs/accuracy.md).
_MOST_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def rotation(width: int, seed: int = 0) -> Tensor:
    """Returns a random orthogonal matrix, float64 [width, width]: see above."""
    generator = torch.Generator().manual_seed(seed)
    power = width & -width
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(int(math.log2(power))):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / math.sqrt(power)
    odd = width // power
    if odd > 1:
        drawn = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
        matrix = torch.kron(torch.linalg.qr(drawn).Q.contiguous(), matrix)
    signs = torch.randint(2, (width,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix


@dataclass(frozen=True)
class _Stream:
    """What touches the residual stream of a model.

    Attributes:
        embedding: What it begins with.
        readers: Each norm with its offset and the layers that read what it gives.
        writers: The layers whose outputs are added to it.
    """

    embedding: nn.Embedding
    readers: list[tuple[nn.Module, float, list[nn.Linear]]]
    writers: list[nn.Linear]


def rotate(model: Model, *, seed: int = 0) -> Model:
    """Rotates the residual stream of a causal language model of transformers, in place.

    For use before `optimize`: channels with large activations, which take the resolution of their
    group, are spread over all channels, and the norms' weights are in those of the layers. It does
    not pay for every model (docs/accuracy.md). A head that shares the embedding's weight gets one
    of its own, since it takes the last norm's weight in: that many bytes more.

    At the peak memory holds the weights twice. In bfloat16 the new weights are rounded once more,
    so load the model in float32.

    Args:
        model: A model in eval mode on the CPU, not packed yet, whose decoder layers are of a known
            family with a norm before attention and MLP and none after them.
        seed: Of the random signs.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module.
        ValueError: It is none of those, or its logits would change; then it is as it was.
    """
    check_model(model)
    stream = _find(model)
    ids = random_ids(model)
    if ids is None:
        raise ValueError("rotate: expected a causal language model of transformers")
    with torch.no_grad():
        before = logits_of(model, ids)
        changed = _changed(stream, rotation(stream.embedding.embedding_dim, seed))
        old = [(module, name, module._parameters[name]) for module, name, _ in changed]
        _put(changed)
        kl = float(compare(before.flatten(0, 1), logits_of(model, ids).flatten(0, 1)).kl.mean())
    most = _MOST_KL[stream.embedding.weight.dtype]
    if not abs(kl) <= most:
        _put(old)
        raise ValueError(
            f"rotate: the model's logits would change, by {kl:.2g} nats per token (at most "
            f"{most:g} is rounding): something else reads or adds to the residual stream"
        )
    _untie(model)
    note_rotated(model)
    return model


def _find(model: nn.Module) -> _Stream:
    """What touches the stream, if all of it is known."""
    hint = "rotate: expected a decoder with a norm before attention and MLP and none after them"
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise ValueError(f"{hint}; found no embedding and head, or packed ones")
    sites = find_sites(model)
    todo = [site for site in sites if site.obstacle is None]
    plan = find_blocks(model, sites, todo, lambda *names: True, lambda *names: False)
    specs = {block.module: block.spec for block in plan.blocks}
    layers = [block.module for block in plan.blocks if isinstance(block.spec, LayerSpec)]
    parents = [m for m in model.modules() if embedding in m._modules.values()]
    if not layers or len(parents) != 1:
        why = next((f"{n}: {left.reason}" for n, left in plan.left.items()), "no decoder layer")
        raise ValueError(f"{hint}; {why}")
    (parent,) = parents
    lists = [m for m in parent.children() if isinstance(m, nn.ModuleList)]
    norms = [m for m in parent.children() if not isinstance(match_norm(m), str)]
    others = [
        name
        for name, module in parent.named_children()
        if module not in (embedding, *lists, *norms) and next(module.parameters(), None) is not None
    ]
    owners = [name for name, module in model.named_children() if module not in (parent, head)]
    whole = len(lists) == 1 and list(lists[0]) == layers and len(norms) == 1
    if not whole or others or owners:
        raise ValueError(f"{hint}; found something else beside the layers, one norm and the head")
    readers, writers = [], []
    for layer in layers:
        spec = specs[layer]
        assert isinstance(spec, LayerSpec)
        found = _of_layer(layer, spec.row, specs)
        if found is None:
            raise ValueError(f"{hint}; {type(layer).__name__} has others, or has no o_proj")
        readers += found[0]
        writers += found[1]
    readers.append((norms[0], _offset(match_norm(norms[0])), [head]))
    return _Stream(embedding, readers, writers)


def _of_layer(
    layer: nn.Module, row: DecoderLayer, specs: dict[nn.Module, Any]
) -> tuple[list[tuple[nn.Module, float, list[nn.Linear]]], list[nn.Linear]] | None:
    """Readers and writers of a decoder layer; None if it has norms after attention or MLP."""
    children: dict[str, Any] = dict(layer._modules)
    before, after, middle, last = row.norms
    if before is None or middle is None or after is not None or last is not None:
        return None
    attention, mlp = children[row.attention], children[row.mlp]
    how, what = specs[attention], specs[mlp]
    assert isinstance(how, AttentionSpec) and isinstance(what, MLPSpec)
    if how.row.output is None:
        return None

    def pick(block: nn.Module, names: tuple[str, ...]) -> list[nn.Linear]:
        found: Any = [block._modules[name] for name in names]
        return list(found)

    readers = [
        (children[before], _offset(specs[children[before]]), pick(attention, how.row.projections)),
        (children[middle], _offset(specs[children[middle]]), pick(mlp, what.row.gate_up)),
    ]
    return readers, pick(attention, (how.row.output,)) + pick(mlp, (what.row.down,))


def _offset(spec: Any) -> float:
    assert isinstance(spec, NormSpec)
    return spec.row.offset


def _changed(stream: _Stream, q: Tensor) -> list[tuple[nn.Module, str, nn.Parameter | None]]:
    """The new parameters: module, name, value."""
    found: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def add(module: nn.Module, name: str, make: Any) -> None:
        old = module._parameters[name]
        if old is not None:
            values = make(old.detach().double()).to(old.dtype)
            found.append((module, name, nn.Parameter(values, requires_grad=old.requires_grad)))

    add(stream.embedding, "weight", lambda w: w @ q)
    for norm, offset, layers in stream.readers:
        weight: Any = norm._parameters["weight"]
        gain = weight.detach().double() + offset
        add(norm, "weight", lambda w, offset=offset: torch.full_like(w, 1 - offset))
        for layer in layers:
            add(layer, "weight", lambda w, gain=gain: (w * gain) @ q)
    for layer in stream.writers:
        add(layer, "weight", lambda w: q.t() @ w)
        add(layer, "bias", lambda b: b @ q)
    return found


def _put(changed: list[tuple[nn.Module, str, nn.Parameter | None]]) -> None:
    for module, name, value in changed:
        module._parameters[name] = value


def _untie(model: Any) -> None:
    """Tells transformers that head and embedding are two."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
