"""What every CPU must give: the published digests, by tools/publish_digests.py."""

from __future__ import annotations

__all__ = ["LOGITS", "OPS", "VECTORS"]

OPS = {
    "add_rms_norm": "6bcf19ba127ed19a",
    "attention": "6d9f2a8a6515805d",
    "decoder_layers": "e4255cd2879c4254",
    "embedding": "9741c08496961339",
    "linear": "9297d8ee0b86f304",
    "pack_": "1d6d1713a646de96",
    "qkv_rotary": "3b79a68d86636d2c",
    "quantize": "145ceae3a8999415",
    "rms_norm": "6891f07445da39d0",
    "rotary": "7a08d741747728b8",
    "rotary_table": "3faf42fb615f422b",
    "store_int8_": "a114dee5e3649ffe",
    "swiglu": "c6187477d429bcfa",
    "unpack": "c7348128e324b07c",
}

VECTORS = "86c29072d82b96958e15d01f7d7bcf173dc8e37512fd0e7f4f2ee8005f895f8a"

LOGITS = "874815a833a717be4807b99584331276511b6898e14c066396af38f209151235"
