"""Hooks of modules: whether who calls a module would run more than its forward."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["HOOKS", "any_acts", "has_hooks", "hooks_are_global", "records_outputs"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RECORDING = "transformers.utils.output_capturing"


def hooks_are_global() -> bool:
    """Whether calls of any module run hooks, such as `register_module_forward_hook` adds."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def has_hooks(module: nn.Module | None) -> bool:
    """Whether a call of `module` runs own hooks that act, or a forward that its class has not."""
    own = vars(module)
    return "forward" in own or any(own[name] and any_acts(own[name]) for name in HOOKS)


def any_acts(hooks: Mapping[int, Any]) -> bool:
    """Whether one of the hooks does something in the call in progress.

    Those that transformers records outputs with stay on a model after the first call that asks for
    hidden states or attentions, and do nothing in others.
    """
    if torch.compiler.is_compiling() or records_outputs():
        return bool(hooks)
    return not all(getattr(hook, "__module__", None) == _RECORDING for hook in hooks.values())


def records_outputs() -> bool:
    """Whether the call in progress asks transformers for outputs of inner modules."""
    collector = getattr(sys.modules.get(_RECORDING), "_active_collector", None)
    return collector is None or bool(collector.get())
