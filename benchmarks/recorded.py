"""What a model said about some windows of text, as a model that says it again at no cost."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from torch_slmops.windows import logits_of

BATCH = 8


class Recorded(nn.Module):
    """A model that has said what it says: the logits of known windows.

    Args:
        windows: Token ids, int64 [C, T].
        logits: [C, T, V].
    """

    def __init__(self, windows: Tensor, logits: np.ndarray) -> None:
        super().__init__()
        self._rows = {ids.numpy().tobytes(): i for i, ids in enumerate(windows)}
        self._logits = logits
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        rows = [self._rows[row.numpy().tobytes()] for row in ids.contiguous()]
        return torch.from_numpy(self._logits[rows])


def recorded(model: nn.Module, windows: Tensor) -> Recorded:
    """What `model` says about `windows`, to be asked for again and again."""
    with torch.no_grad():
        found = [logits_of(model, batch) for batch in windows.split(BATCH)]
    return Recorded(windows, torch.cat(found).numpy())
