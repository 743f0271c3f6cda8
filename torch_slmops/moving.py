"""Moving packed weights from a mapped file into huge pages, while the model is in use already.

Memory for a copy has to be provided first, by the host where the machine is a virtual one: a second
and more for a gigabyte. A mapped file is there at once, but lies in small pages, where decoding is
slower. So a large model starts with the file, and a thread copies one weight after the other. A
forward takes a weight from wherever it is; its bits are the same.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from torch_slmops import memory

__all__ = ["LARGE", "finish_moving", "move_later"]

# Bytes of packed weights from which a model is moved later: up to here a copy takes some 0.2 s.
LARGE = 128 << 20
_KEY = "packed"
_CHUNK = 32 << 20  # copied before the thread looks whether the process is about to end

_logger = logging.getLogger("torch_slmops")


class _Place:
    """A weight in a file, and the modules that have it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.modules: list[ref[nn.Module]] = []

    def put(self, new: Tensor) -> None:
        """Gives it to the modules that still have the old one; forwards in progress keep that."""
        for found in self.modules:
            module = found()
            if module is not None and module._buffers.get(_KEY) is self.tensor:
                module._buffers[_KEY] = new


# By model: the thread, and what it has not moved yet.
_moving: WeakKeyDictionary[nn.Module, tuple[threading.Thread, list[_Place]]] = WeakKeyDictionary()


def move_later(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Starts a thread that moves packed weights of `model`, which may be used meanwhile.

    Args:
        model: The model.
        tensors: Those that lie in a file.
    """
    places = {id(tensor): _Place(tensor) for tensor in tensors}
    for module in model.modules():
        place = places.get(id(module._buffers.get(_KEY)))
        if place is not None:
            place.modules.append(ref(module))
    pending = list(places.values())[::-1]
    thread = threading.Thread(target=_move, args=(pending,), name="torch_slmops: moving weights")
    _moving[model] = thread, pending
    thread.start()


def finish_moving() -> None:
    """Returns when no packed weight lies in the file that it was loaded from any more.

    A file that is about to be written over must not be mapped.
    """
    for model, (thread, pending) in list(_moving.items()):
        thread.join()
        _move(pending)  # a child of fork() has no such thread
        _moving.pop(model, None)


def _move(pending: list[_Place]) -> None:
    while pending:
        place = pending[-1]
        if any(module() is not None for module in place.modules):
            try:
                new = _copied(place.tensor)
            except (MemoryError, OSError, RuntimeError) as error:
                _logger.warning("packed weights stay in the file that they are in: %s", error)
                return
            if new is None:
                return
            place.put(new)
        pending.pop()


def _copied(tensor: Tensor) -> Tensor | None:
    """A copy in huge pages, made without torch's threads; None if the process is about to end."""
    size = tensor.numel()
    new = memory.empty(size)
    for start in range(0, size, _CHUNK):
        if not threading.main_thread().is_alive():
            return None
        length = min(_CHUNK, size - start)
        ctypes.memmove(new.data_ptr() + start, tensor.data_ptr() + start, length)
    return new
