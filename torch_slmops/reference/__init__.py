"""The executable specification: every op in plain torch, bit for bit what the kernels compute.

Ops have the signatures of `torch_slmops.ops`; `pack` returns the buffer that `ops.pack_` fills.
docs/arithmetic.md says in words what is computed here.
Nothing is shared with the C++, and nothing is fast: it exists to be read and to be compared with.
"""

from torch_slmops.reference.arithmetic import (
    canonical_nan,
    fma32,
    reduce16,
    round_to,
    to_bf16,
    to_f16,
)
from torch_slmops.reference.attention import attention
from torch_slmops.reference.choose import quantize
from torch_slmops.reference.compute import embedding, linear, quantize_rows
from torch_slmops.reference.decoder import decoder_layers
from torch_slmops.reference.functions import activate
from torch_slmops.reference.fused import qkv_rotary, swiglu
from torch_slmops.reference.int8_heads import store_int8_
from torch_slmops.reference.layout import pack, unpack
from torch_slmops.reference.rms_norm import add_rms_norm, rms_norm
from torch_slmops.reference.rotary import rotary, rotary_table

__all__ = [
    "activate",
    "add_rms_norm",
    "attention",
    "canonical_nan",
    "decoder_layers",
    "embedding",
    "fma32",
    "linear",
    "pack",
    "qkv_rotary",
    "quantize",
    "quantize_rows",
    "reduce16",
    "rms_norm",
    "rotary",
    "rotary_table",
    "round_to",
    "store_int8_",
    "swiglu",
    "to_bf16",
    "to_f16",
    "unpack",
]
