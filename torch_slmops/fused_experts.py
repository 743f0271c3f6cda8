"""Experts of a sparse layer, each with packed weights of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_slmops import fused, ops
from torch_slmops.fused import ExpertsSpec, Fused
from torch_slmops.modules import Linear
from torch_slmops.packed_rows import GateUp

__all__ = ["FusedExperts"]


class FusedExperts(Fused):
    """Experts with one packed gate_up and one packed down each; the float parameters are gone."""

    gate_up: nn.ModuleList
    down: nn.ModuleList
    slmops: ExpertsSpec

    def describe(self) -> str:
        return (
            f"swiglu ({self.slmops.row.name}): {self.slmops.activation}, {len(self.down)} experts"
        )

    def _inner(self) -> tuple[str, ...]:
        row = self.slmops.row
        return (row.activation,) if row.activation in self._modules else ()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns [T, N]: per token, in float32, experts ascending, one rounding.

        While a graph is traced, every expert computes every token, and what the routing did not
        choose is dropped: the same bits, without sizes that depend on values.
        """
        x = hidden_states
        if x.requires_grad and torch.is_grad_enabled():
            ops.refuse_gradient("experts")
        total = x.new_zeros(len(x), self._out_features(), dtype=torch.float32)
        traced = torch.compiler.is_compiling()
        for e in range(len(self.gate_up)) if traced else torch.unique(top_k_index).tolist():
            chosen = top_k_index == e
            weight = (top_k_weights.float() * chosen).sum(-1, keepdim=True)
            if traced:
                y = self._expert(e, x).float() * weight
                total = torch.where(chosen.any(-1, keepdim=True), total + y, total)
            elif e < len(self.gate_up):  # a larger one is nobody
                at = chosen.any(-1).nonzero()[:, 0]
                total[at] += self._expert(e, x[at]).float() * weight[at]
        return total.to(x.dtype)

    def _out_features(self) -> int:
        down = self.down[0]
        assert isinstance(down, Linear)
        return down.out_features

    def _expert(self, e: int, x: Tensor) -> Tensor:
        gate_up, down = self.gate_up[e], self.down[e]
        assert isinstance(gate_up, GateUp) and isinstance(down, Linear)
        return fused._swiglu(
            x,
            gate_up.packed,
            down.packed,
            gate_up.hidden,
            down.out_features,
            self.slmops.activation,
        )
