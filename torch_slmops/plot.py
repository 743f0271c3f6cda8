"""A picture of what bytes buy: divergence against bits per weight. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch_slmops.evaluate import Evaluation

__all__ = ["plot_kl"]


def plot_kl(evaluations: Mapping[str, Evaluation], path: str | os.PathLike[str]) -> None:
    """Draws the mean KL of each evaluation, with its interval, against its bits per weight.

    Args:
        evaluations: By name; each was made with a reference.
        path: The file to write; its suffix is the format, such as .png or .svg.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is none, or one without a reference.
    """
    if not evaluations:
        raise ValueError("plot_kl: expected at least one evaluation, got none")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_kl needs matplotlib: pip install matplotlib, or pip install torch_slmops[plot]"
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, found in evaluations.items():
        if found.kl_mean is None:
            raise ValueError(
                f"plot_kl: expected evaluations against a reference, {name!r} has none"
            )
        kl = found.kl_mean
        # An interval that reaches 0 has no place on a logarithmic axis: it is cut there.
        below = min(kl.value - kl.low, 0.9 * kl.value)
        above = min(kl.high - kl.value, 9 * kl.value)
        axes.errorbar(found.bits_per_weight, kl.value, yerr=[[below], [above]], fmt="o", capsize=3)
        at = (found.bits_per_weight, kl.value)
        axes.annotate(name, at, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("mean KL per token, nats")
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path)
