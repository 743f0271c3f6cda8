"""torch_slmops: quantized CPU ops for small language models in PyTorch.

`optimize(model)` packs the weights of any module into int4 or int8 and fuses the blocks of known
model families; the same bits come out on every CPU. docs/ has the arithmetic and the packed format.
"""

from typing import TYPE_CHECKING, Any

from torch_slmops import ops
from torch_slmops.attention import register_attention
from torch_slmops.checkpoints import from_checkpoint
from torch_slmops.dequantize import dequantize
from torch_slmops.evaluate import evaluate
from torch_slmops.families import register_family
from torch_slmops.hf_register import register_when_imported
from torch_slmops.isa import isa, isas, set_isa
from torch_slmops.lora import lora_config
from torch_slmops.optimize import optimize
from torch_slmops.processes import watch_forks
from torch_slmops.recipe import SavedModelError
from torch_slmops.report import report
from torch_slmops.rotate import rotate
from torch_slmops.save_load import load, save
from torch_slmops.tune import tune
from torch_slmops.tuning import start
from torch_slmops.weights import QuantizedWeight, quantize_weight

if TYPE_CHECKING:
    from torch_slmops.cache import Cache
    from torch_slmops.hf_quantizer import SlmopsConfig

__all__ = [
    "Cache",
    "QuantizedWeight",
    "SavedModelError",
    "SlmopsConfig",
    "__version__",
    "dequantize",
    "evaluate",
    "from_checkpoint",
    "isa",
    "isas",
    "load",
    "lora_config",
    "ops",
    "optimize",
    "quantize_weight",
    "register_attention",
    "register_family",
    "report",
    "rotate",
    "save",
    "set_isa",
    "tune",
]

__version__ = "0.1.0"

watch_forks()
start()


def __getattr__(name: str) -> Any:
    if name == "Cache":  # here, because it needs transformers
        from torch_slmops.cache import Cache

        return Cache
    if name == "SlmopsConfig":  # likewise
        from torch_slmops.hf_quantizer import SlmopsConfig

        return SlmopsConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_when_imported()
