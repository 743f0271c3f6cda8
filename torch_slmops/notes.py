"""What `optimize` notes on a model for later: for `report`, and for saving."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from torch_slmops.attention import check_kv_cache, set_kv_cache
from torch_slmops.budget import Budget
from torch_slmops.fuse import Left
from torch_slmops.plan import make_formats

__all__ = [
    "budget_of",
    "check_options",
    "left_of",
    "note_budget",
    "note_left",
    "note_options",
    "note_rotated",
    "note_saved",
    "options_of",
    "was_rotated",
]

_BUDGET, _ROTATED = "_slmops_budget", "_slmops_rotated"
_LEFT, _OPTIONS = "_slmops_left", "_slmops_options"
# The arguments of `optimize` that are noted: those that make the formats, and the others.
_OF_FORMATS: dict[str, Any] = {
    "weights": str,
    "scale_kind": str | None,
    "group_size": int | None,
    "symmetric": bool,
    "activations": str | None,
    "act_group": int | None,
    "lm_head": str | None,
}
_OTHERS: dict[str, Any] = {
    "include": str | list | None,
    "exclude": str | list | None,
    "fuse": bool,
    "strict": bool,
    "kv_cache": str | None,
}


def note_left(model: nn.Module, left: Mapping[str, Left]) -> None:
    """Leaves a note for `report`: why blocks are not fused."""
    vars(model)[_LEFT] = {n: (block.what, block.reason) for n, block in left.items()}


def left_of(model: nn.Module) -> dict[str, tuple[str, str]] | None:
    """Returns the class and the reason of each block that is not fused, if that was noted."""
    found: dict[str, tuple[str, str]] | None = vars(model).get(_LEFT)
    return found


def note_budget(model: nn.Module, budget: Budget | None) -> None:
    """Leaves a note for `report`: how a budget was spent, if there was one."""
    if budget is None:
        vars(model).pop(_BUDGET, None)
    else:
        vars(model)[_BUDGET] = budget


def budget_of(model: nn.Module) -> Budget | None:
    """Returns how a budget was spent, if that was noted."""
    found: Budget | None = vars(model).get(_BUDGET)
    return found


def note_rotated(model: nn.Module) -> None:
    """Leaves a note for `report`: the residual stream was rotated."""
    vars(model)[_ROTATED] = True


def was_rotated(model: nn.Module) -> bool:
    """Returns whether the residual stream was rotated, as far as that was noted."""
    return bool(vars(model).get(_ROTATED))


def note_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Leaves the arguments of `optimize` on `model`, as values that JSON can say.

    The one that is of no weight but of calls, `kv_cache`, takes effect here.

    Models of transformers inside it, or it itself, get a quantizer, so that `save_pretrained` saves
    what `from_pretrained` can read.
    """
    noted = {name: _plain(value) for name, value in options.items()}
    vars(model)[_OPTIONS] = noted
    set_kv_cache(model, noted.get("kv_cache"))
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # then none of its models can be here
        return
    pending = [model]
    while pending:
        module = pending.pop()
        if isinstance(module, modeling.PreTrainedModel):
            from torch_slmops.hf_quantizer import attach

            attach(module, noted)
        else:
            pending += module.children()


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses what `note_options` cannot have been given; nothing at all is right too.

    Raises:
        ValueError: An argument that `optimize` does not have, misses or would refuse.
    """
    if not options:
        return
    expected = _OF_FORMATS | _OTHERS
    if unknown := sorted(options.keys() - expected.keys()):
        raise ValueError(f"options {', '.join(unknown)}")
    if missing := sorted(_OF_FORMATS.keys() - options.keys()):
        raise ValueError(f"no option {', '.join(missing)}")
    for name, value in options.items():
        patterns = value if isinstance(value, list) else []
        if not (isinstance(value, expected[name]) and all(isinstance(p, str) for p in patterns)):
            raise ValueError(f"option {name} of {value!r}")
    make_formats(**{name: options[name] for name in _OF_FORMATS})
    check_kv_cache(options.get("kv_cache"))


def note_saved(
    model: nn.Module, left: dict[str, tuple[str, str]] | None, options: dict[str, Any]
) -> None:
    """Leaves on a loaded model what the saved one had noted."""
    if left is not None:
        vars(model)[_LEFT] = dict(left)
    note_options(model, options)


def options_of(model: nn.Module) -> dict[str, Any]:
    """Returns the arguments of the last `optimize` of this very model, if it was called on it."""
    return dict(vars(model).get(_OPTIONS) or {})


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(value)
    return value
