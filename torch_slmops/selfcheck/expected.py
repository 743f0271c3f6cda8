"""The published digests: what every CPU must give. tools/publish_digests.py writes them."""

from __future__ import annotations

__all__ = ["LOGITS", "OPS", "VECTORS"]

OPS = {
    "add_rms_norm": "6bcf19ba127ed19a",
    "attention": "fb99fa580d0195b4",
    "decoder_layers": "8bdcc05240d175e6",
    "embedding": "9741c08496961339",
    "linear": "9297d8ee0b86f304",
    "pack_": "1d6d1713a646de96",
    "qkv_rotary": "3b79a68d86636d2c",
    "quantize": "145ceae3a8999415",
    "rms_norm": "6891f07445da39d0",
    "rotary": "7a08d741747728b8",
    "rotary_table": "3faf42fb615f422b",
    "swiglu": "c6187477d429bcfa",
    "unpack": "c7348128e324b07c",
}

VECTORS = "7d7a0bc75e729b92eb8d77ecb2249f4a2aa30a3ffec880e7b0fbeff183efbca1"

LOGITS = "874815a833a717be4807b99584331276511b6898e14c066396af38f209151235"
