"""LoRA adapters of peft beside packed layers: the base stays packed and frozen."""

from __future__ import annotations

import functools
import warnings
from importlib import import_module
from typing import Any, NoReturn, TypeVar

from torch_slmops.modules import Linear
from torch_slmops.packed_rows import GateUp, Rows

__all__ = ["lora_config"]

Config = TypeVar("Config")


def lora_config(config: Config) -> Config:
    """Makes a `peft.LoraConfig` take packed layers as its targets; returns it.

    Use it wherever peft gets the config of an optimized model:

        get_peft_model(model, lora_config(LoraConfig(target_modules=["q_proj", "v_proj"])))
        PeftModel.from_pretrained(model, path, config=lora_config(PeftConfig.from_pretrained(path)))

    A block with an adapter on one of its projections is computed projection by projection, the
    others stay fused. Adapters cannot be merged into packed weights.

    Raises:
        ImportError: peft is not installed.
        TypeError: `config` is no LoraConfig.
    """
    peft: Any = import_module("peft")
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"lora_config: expected a peft.LoraConfig, got a {type(config).__name__}")
    layer = _layer_class()
    own: Any = config
    own._register_custom_module(dict.fromkeys((Linear, Rows, GateUp), layer))
    return config


@functools.cache
def _layer_class() -> type:
    lora: Any = import_module("peft.tuners.lora")

    class PackedLora(lora.Linear):  # type: ignore[misc]
        """peft's LoRA layer around a packed one."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with warnings.catch_warnings():
                # peft does not know the class; in_features and out_features are all it asks for.
                warnings.filterwarnings("ignore", "Unsupported layer type")
                super().__init__(*args, **kwargs)

        def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
            raise RuntimeError(
                "merging an adapter into a packed weight would round it again: leave it beside "
                "the weight, or make the model float (torch_slmops.dequantize), merge, and "
                "optimize it again"
            )

    return PackedLora
