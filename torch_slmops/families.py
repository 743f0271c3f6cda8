"""Model families as data: what the blocks that `optimize` fuses are made of.

A row names the children of a block and where its numbers are found. `match.py` takes a module for
what a row says only if its children and parameters are exactly those of the row and if, on random
input, it computes what the row says. docs/adding-a-model.md explains how to write one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "DecoderLayer",
    "Experts",
    "GatedMLP",
    "RMSNorm",
    "register_family",
    "rows",
]

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu2")


@dataclass(frozen=True)
class RMSNorm:
    """A module with one parameter, `weight`: y = x / sqrt(mean(x^2) + eps) * (offset + weight).

    Attributes:
        name: Of the row, for reports.
        eps: Its attribute that holds eps.
        offset: 1 where the stored weight is the weight minus one.
        cast_before_weight: x / sqrt(...) is rounded to the dtype of x before it meets the weight.
    """

    name: str
    eps: str = "eps"
    offset: float = 0.0
    cast_before_weight: bool = False


@dataclass(frozen=True)
class GatedMLP:
    """y = down(activation(gate(x)) * up(x)).

    Attributes:
        name: Of the row, for reports.
        gate_up: The children that are gate and up, or the one that gives both, gate first.
        down: The child that is the down projection.
        activation: An attribute of the module that is the activation function, whose kind is found
            by comparing values; or one of ACTIVATIONS, for code that calls the function itself.
        dropouts: Children that are `nn.Dropout` or `nn.Identity`.
    """

    name: str
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: str = "act_fn"
    dropouts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experts:
    """The experts of a sparse layer: `GatedMLP`s in two parameters, called with the routing.

    `forward(x [T, K], top_k_index [T, S], top_k_weights [T, S])` gives the sum of the outputs of
    the S chosen experts of each token, each times its weight.

    Attributes:
        name: Of the row, for reports.
        gate_up: The parameter [E, 2 * hidden, K], gate first.
        down: The parameter [E, N, hidden].
        activation: As in `GatedMLP`.
        count: The attribute that holds E.
    """

    name: str
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    count: str = "num_experts"


@dataclass(frozen=True)
class Attention:
    """Projections to q, k and v, norms and rotary embedding of q and k, attention, projection.

    Sources of values are paths from the module, such as "sliding_window" (which it must have) or
    "config.sliding_window" (None if the config has none).

    Attributes:
        name: Of the row, for reports.
        projections: The children that are q, k and v; or the one that gives all three, rows of q
            first, then `heads` is needed.
        output: The child that is the output projection, or None if another module has it.
        norms: The children that are the norms of q and k, `RMSNorm`s, of each head or of all heads
            together, whichever their width says; or None.
        dropouts: Children that are `nn.Dropout` or `nn.Identity`.
        head_dim: Source of the width of a head.
        heads: Sources of the numbers of query heads and of key heads; None derives them from the
            projections.
        scaling: Source of the factor of q k^T, or None for 1 / sqrt(head_dim).
        rotary: Which elements are rotated with each other: "half" (i and i + R / 2), "interleaved"
            (2 i and 2 i + 1), or None for no rotary embedding.
        rotary_width: Source of the rotated elements R of a head, or "*" for the tables' width.
        rotary_flag: An attribute that is false in layers without rotary embedding, or None.
        options: Keyword arguments that the attention function gets besides those of all families,
            with the sources of their values.
        drops: Keyword arguments of the module that the attention function doesn't get.
        forward: For modules that don't follow transformers' conventions: a function
            `(module, qkv, *args, **kwargs)` that does what the module's forward does with these
            arguments, where `qkv(x, tables)` with tables (cos, sin) or None gives q, k and v,
            [B, L, heads, head_dim].
        children: With `forward`: children of the module besides the projections and norms.
        inputs: With `forward`: a function of the module that gives args and kwargs, float32, to
            compare it on.
    """

    name: str
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str | None = "o_proj"
    norms: tuple[str, str] | None = None
    dropouts: tuple[str, ...] = ()
    head_dim: str = "head_dim"
    heads: tuple[str, str] | None = None
    scaling: str | None = "scaling"
    rotary: Literal["half", "interleaved"] | None = "half"
    rotary_width: str = "head_dim"
    rotary_flag: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    drops: tuple[str, ...] = ()
    forward: Callable[..., Any] | None = None
    children: tuple[str, ...] = ()
    inputs: Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]] | None = None


@dataclass(frozen=True)
class DecoderLayer:
    """An attention and a gated MLP, each added to what came in, with norms before or after them.

    h = x + multiplier * post_attention(attention(pre_attention(x)))
    y = h + multiplier * post_mlp(mlp(pre_mlp(h)))

    Attributes:
        name: Of the row, for reports.
        norms: The children that are pre_attention, post_attention, pre_mlp and post_mlp: `RMSNorm`s
            that are alike; None where there is none.
        attention: The child that is an `Attention`, without a `forward` of its own.
        mlp: The child that is a `GatedMLP`.
        multiplier: Source of the factor, or None for 1.
        dropouts: Children that are `nn.Dropout` or `nn.Identity`.
    """

    name: str
    norms: tuple[str | None, str | None, str | None, str | None]
    attention: str = "self_attn"
    mlp: str = "mlp"
    multiplier: str | None = None
    dropouts: tuple[str, ...] = ()


Row: TypeAlias = RMSNorm | GatedMLP | Experts | Attention | DecoderLayer

_WINDOW = ("sliding_window", "sliding_window")
_CONFIG_WINDOW = ("sliding_window", "config.sliding_window")
_QK_NORMS = ("q_norm", "k_norm")
_CONFIG_HEADS = ("config.num_attention_heads", "config.num_key_value_heads")

_IN, _MIDDLE = "input_layernorm", "post_attention_layernorm"
_BEFORE_MLP, _AFTER_MLP = "pre_feedforward_layernorm", "post_feedforward_layernorm"

# The first row that fits is taken. A family that differs from another only in the numbers of its
# config needs no row: SmolLM2 is "llama".
_ROWS: list[Row] = [
    RMSNorm("llama norm", eps="variance_epsilon", cast_before_weight=True),
    RMSNorm("olmo2 norm", eps="variance_epsilon"),
    RMSNorm("gemma norm", offset=1.0),
    RMSNorm("torch norm"),
    GatedMLP("gated MLP"),
    GatedMLP("phi3 MLP", gate_up=("gate_up_proj",), activation="activation_fn"),
    GatedMLP("modernbert MLP", gate_up=("Wi",), down="Wo", activation="act", dropouts=("drop",)),
    Experts("experts"),
    Attention("smollm3", rotary_flag="use_rope", options=(_WINDOW,)),
    Attention("gemma2", options=(_WINDOW, ("softcap", "attn_logit_softcapping"))),
    Attention("qwen2", options=(_WINDOW,)),
    Attention("stablelm", rotary_width="rotary_ndims", drops=("output_attentions", "use_cache")),
    Attention("llama"),
    Attention("mistral", options=(_CONFIG_WINDOW,)),
    Attention("cohere", rotary="interleaved"),
    Attention("qwen3, gemma3", norms=_QK_NORMS, options=(_WINDOW,)),
    Attention("olmo2", norms=_QK_NORMS),
    Attention(
        "phi3",
        projections=("qkv_proj",),
        heads=_CONFIG_HEADS,
        rotary_width="*",
        options=(_CONFIG_WINDOW,),
    ),
    Attention(
        "bert",
        projections=("query", "key", "value"),
        output=None,
        dropouts=("dropout",),
        head_dim="attention_head_size",
        rotary=None,
    ),
    Attention(
        "modernbert",
        projections=("Wqkv",),
        output="Wo",
        dropouts=("out_drop",),
        heads=("config.num_attention_heads", "config.num_attention_heads"),
        scaling=None,
        options=(_WINDOW, ("deterministic", "deterministic_flash_attn")),
    ),
    DecoderLayer("granite layer", (_IN, None, _MIDDLE, None), multiplier="residual_multiplier"),
    DecoderLayer("llama layer", (_IN, None, _MIDDLE, None)),
    DecoderLayer("gemma2 layer", (_IN, _MIDDLE, _BEFORE_MLP, _AFTER_MLP)),
    DecoderLayer("olmo2 layer", (None, _MIDDLE, None, _AFTER_MLP)),
    DecoderLayer(
        "phi3 layer",
        (_IN, None, _MIDDLE, None),
        dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
    ),
]


def register_family(*new: Row) -> None:
    """Makes `optimize` try these rows, before those that it knows.

    Raises:
        TypeError: Not rows.
        ValueError: A row's name is taken, or an `Attention` has only one of `forward` and `inputs`.
    """
    for row in new:
        if not isinstance(row, RMSNorm | GatedMLP | Experts | Attention | DecoderLayer):
            raise TypeError(
                "register_family: expected rows (torch_slmops.families.Attention, GatedMLP, "
                f"Experts, RMSNorm, DecoderLayer), got a {type(row).__name__}"
            )
        if any(row.name == other.name for other in _ROWS):
            raise ValueError(f"register_family: there is a row named {row.name!r} already")
        if isinstance(row, Attention) and (row.forward is None) != (row.inputs is None):
            raise ValueError(
                f"register_family: expected {row.name!r} to have both forward and inputs, or "
                "neither: without inputs its forward cannot be compared with the module's"
            )
    _ROWS[:0] = new


def rows() -> tuple[Row, ...]:
    """Returns all rows, in the order in which they are tried."""
    return tuple(_ROWS)
