"""selfcheck: whether this CPU gives the bits that every CPU must give, in a few seconds."""

from torch_slmops.selfcheck.check import OpResult, Result, default_threads, selfcheck, steps

__all__ = ["OpResult", "Result", "default_threads", "selfcheck", "steps"]
