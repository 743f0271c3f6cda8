"""What a fork and Ctrl-C would break: threads that a child lacks, a model swapped by half.

A forked process has one thread, that which forked. The pool of OpenMP, through which torch runs its
parallel work and ours, doesn't notice and waits forever for the others.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["uninterrupted", "watch_forks"]

_TASKS = "/proc/self/task"
_logger = logging.getLogger("torch_slmops")
_pool_started = False


def watch_forks() -> None:
    """Lets torch work on one thread in processes that are forked off once its pool has started."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_child=_in_child)


def _before_fork() -> None:
    global _pool_started
    # More threads than Python's own; where they cannot be counted, the careful answer.
    tasks = len(os.listdir(_TASKS)) if os.path.isdir(_TASKS) else threading.active_count() + 1
    _pool_started = tasks > threading.active_count()


def _in_child() -> None:
    if _pool_started and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        _logger.info(
            "forked after torch's threads had started, which a child does not have: it works on "
            "one thread. For more, spawn the process, or fork before the first op"
        )


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    held: list[tuple[Any, ...]] = []
    before = signal.getsignal(signal.SIGINT)
    if before is None:  # set by other code than Python's: nothing to put back later
        yield
        return
    signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])
