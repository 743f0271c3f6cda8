"""What the wrappers of ops share: the namespace, fakes, and errors that all ops have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

import torch_slmops.isa  # noqa: F401 - loads the extension, which defines the ops

_Function = TypeVar("_Function", bound=Callable[..., object])

OPS: Any = torch.ops.slmops


def fake(op: str) -> Callable[[_Function], _Function]:
    """Makes a function the fake of `slmops::<op>`: the shapes and dtypes without the values."""
    register: Any = torch.library.register_fake
    decorator: Callable[[_Function], _Function] = register(f"slmops::{op}")
    return decorator


def refuse_gradient(op: str) -> NoReturn:
    """Raises the error of an input that wants a gradient.

    The callers ask, not the op: an autograd kernel in Python would cost more than a small matmul.
    """
    raise RuntimeError(
        f"{op}: expected an x that does not require a gradient, as packed weights are for "
        "inference and give none. Call it under torch.no_grad() or torch.inference_mode(), or "
        "freeze what comes before with .requires_grad_(False)"
    )


def check_gradient(op: str, x: Tensor) -> None:
    """Refuses an x that wants a gradient, where gradients are being recorded."""
    if x.requires_grad and torch.is_grad_enabled():
        refuse_gradient(op)


def same_device(op: str, name: str, x: Tensor, other: Tensor, other_name: str = "packed") -> None:
    if x.device != other.device:
        raise RuntimeError(
            f"{op}: expected {name} and {other_name} on one device, got {x.device} and "
            f"{other.device}"
        )


def refuse_devices(*ops: str) -> None:
    """Gives `ops` kernels for other devices: an error that says what to do."""
    for op in ops:
        for device in ("CUDA", "MPS", "XPU"):
            _library.impl(op, _refuse_device(op, device), device)


def _refuse_device(op: str, device: str) -> Callable[..., NoReturn]:
    """The kernel of `op` for tensors on `device`: an error that says what to do."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"{op}: expected CPU tensors, got one on {device}: packed weights run on the CPU only. "
            'Move the model and its inputs back with .to("cpu"), or run the model that '
            "torch_slmops.optimize has not changed there."
        )

    return refuse


_library: Any = torch.library.Library("slmops", "IMPL")  # type: ignore[no-untyped-call]
