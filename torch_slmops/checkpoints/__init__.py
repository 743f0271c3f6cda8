"""Checkpoints that other tools quantized, read into packed weights: one file per format."""

from torch_slmops.checkpoints.load import from_checkpoint

__all__ = ["from_checkpoint"]
