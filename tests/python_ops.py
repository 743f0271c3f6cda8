"""The fused ops in Python, computed by the reference: for as long as their C++ is not there."""

from __future__ import annotations

from typing import Any

import torch

from torch_slmops import ops, reference

_SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps, float offset, bool cast_before_weight, "
    "ScalarType? out_dtype=None) -> Tensor",
    "rotary": "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    "qkv_rotary": "(Tensor x, Tensor packed, int[] heads_q_k_v, int head_dim, Tensor? bias, "
    "Tensor? q_norm, Tensor? k_norm, float eps, float offset, bool cast_before_weight, "
    "Tensor? cos, Tensor? sin, bool interleaved, Tensor? perm=None) -> (Tensor, Tensor, Tensor)",
    "swiglu": "(Tensor x, Tensor gate_up, Tensor down, int hidden, int out_features, "
    "str activation, Tensor? gate_up_bias=None, Tensor? down_bias=None) -> Tensor",
}

_library: Any = torch.library.Library("slmops", "FRAGMENT")
for _op, _schema in _SCHEMAS.items():
    if not hasattr(torch.ops.slmops, _op):
        _library.define(_op + _schema)
        _library.impl(_op, getattr(reference, _op), "CPU")
        torch.library.register_fake(f"slmops::{_op}", getattr(ops, f"_{_op}_fake"), lib=_library)
