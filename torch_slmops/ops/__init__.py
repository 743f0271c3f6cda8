"""The ops of `torch.ops.slmops`: for each a typed wrapper and, beside it, its fake for tracing.

The ops run on CPU tensors and are for inference: they have no gradient. `torch_slmops.reference`
defines each of them in plain torch, bit for bit; docs/arithmetic.md says it in words. All errors
are `RuntimeError`s that say what was expected and what came, except where noted.
"""

from torch_slmops.ops.attention import attention
from torch_slmops.ops.common import refuse_gradient
from torch_slmops.ops.decoder import LAYER_PARTS, Kept, decoder_layers
from torch_slmops.ops.fused import qkv_rotary, swiglu
from torch_slmops.ops.int8_heads import int8_shape, read_int8, store_int8_
from torch_slmops.ops.linear import embedding, linear
from torch_slmops.ops.vector import add_rms_norm, rms_norm, rotary, rotary_table
from torch_slmops.ops.weights import (
    Header,
    checksum,
    copy_checksum,
    describe,
    pack_,
    packed_bytes,
    quantize,
    unpack,
)

__all__ = [
    "LAYER_PARTS",
    "Header",
    "Kept",
    "add_rms_norm",
    "attention",
    "checksum",
    "copy_checksum",
    "decoder_layers",
    "describe",
    "embedding",
    "int8_shape",
    "linear",
    "pack_",
    "packed_bytes",
    "qkv_rotary",
    "quantize",
    "read_int8",
    "refuse_gradient",
    "rms_norm",
    "rotary",
    "rotary_table",
    "store_int8_",
    "swiglu",
    "unpack",
]
