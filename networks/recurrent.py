"""Recurrent networks over sequences: LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014).

A sequence is [T, F + 1]: features, and a last column that is 1 where the step is there and 0 where it is padding.
Padding stands at the end, so no step that is there ever sees it. The state of the last step that is there, or the
mean state over those that are, enters the head.

Each cell is written twice. PyTorch's fused kernel trains fastest, but vmap does not know it and it cannot be
differentiated forward or, by cuDNN, twice; the plain operators can. ``fused`` chooses; tests hold the two together.

Legend: B batch, T steps, F features, H units of the state, G = 4 H (LSTM) or 3 H (GRU) gates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HIDDEN = 64


class Recurrent(nn.Module):
    """Layers of recurrent cells, pooling over time, and a linear head.

    ``kind``: 'lstm' or 'gru'. ``mean``: pool by the mean over steps, not by the last one. Parameters are named and
    laid out as those of ``nn.LSTM`` and ``nn.GRU``, and drawn alike.
    """

    fused = True  # False where the step has to be differentiated twice, or many workers run as one

    def __init__(
        self, num_outputs: int, features: int, kind: str, hidden: int = HIDDEN, layers: int = 1, mean: bool = False
    ):
        super().__init__()
        self.kind, self.hidden, self.layers, self.mean = kind, hidden, layers, mean
        gates = {"lstm": 4, "gru": 3}[kind] * hidden
        bound = 1 / math.sqrt(hidden)
        for layer in range(layers):
            fan_in = features if layer == 0 else hidden
            shapes = {"weight_ih": (gates, fan_in), "weight_hh": (gates, hidden), "bias_ih": (gates,),
                      "bias_hh": (gates,)}  # fmt: skip
            for name, shape in shapes.items():
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))
        self.head = nn.Linear(hidden, num_outputs)

    def forward(self, sequences: Tensor) -> Tensor:
        """Outputs [B, C] of sequences [B, T, F + 1]."""
        x_BTF, there_BT = sequences[..., :-1], sequences[..., -1]
        plain = not self.fused or x_BTF.is_cuda or torch.is_autocast_enabled(x_BTF.device.type)
        states_BTH = self._plain(x_BTF) if plain else self._fused(x_BTF)
        later_BT = there_BT.flip(1).cumsum(1).flip(1)  # 1 at the last step that is there
        weight_BT = there_BT if self.mean else there_BT * (later_BT == 1)
        pooled_BH = (states_BTH * weight_BT.unsqueeze(-1)).sum(1) / weight_BT.sum(1, keepdim=True).clamp(min=1)
        return self.head(pooled_BH)

    def _weights(self, layer: int) -> list[Tensor]:
        return [getattr(self, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    def _fused(self, x_BTF: Tensor) -> Tensor:
        """States [B, T, H] by PyTorch's kernel."""
        weights = [w for layer in range(self.layers) for w in self._weights(layer)]
        start = x_BTF.new_zeros(self.layers, len(x_BTF), self.hidden)
        settings = (True, self.layers, 0.0, self.training, False, True)  # biases, layers, dropout, .., batch first
        if self.kind == "lstm":
            return torch._VF.lstm(x_BTF, (start, start), weights, *settings)[0]
        return torch._VF.gru(x_BTF, start, weights, *settings)[0]

    def _plain(self, x_BTF: Tensor) -> Tensor:
        """The same by plain operators: all steps' inputs in one product, then step by step."""
        cell = self._lstm_cell if self.kind == "lstm" else self._gru_cell
        for layer in range(self.layers):
            w_GF, w_GH, b_G, c_G = self._weights(layer)
            inputs_BTG = x_BTF @ w_GF.T + b_G
            state_BH = memory_BH = torch.zeros_like(inputs_BTG[:, 0, : self.hidden])
            states = []
            for input_BG in inputs_BTG.unbind(1):
                state_BH, memory_BH = cell(input_BG, state_BH @ w_GH.T + c_G, state_BH, memory_BH)
                states.append(state_BH)
            x_BTF = torch.stack(states, 1)
        return x_BTF

    @staticmethod
    def _lstm_cell(input_BG: Tensor, own_BG: Tensor, _: Tensor, memory_BH: Tensor) -> tuple[Tensor, Tensor]:
        take, keep, new, give = (input_BG + own_BG).chunk(4, -1)
        memory_BH = keep.sigmoid() * memory_BH + take.sigmoid() * new.tanh()
        return give.sigmoid() * memory_BH.tanh(), memory_BH

    @staticmethod
    def _gru_cell(input_BG: Tensor, own_BG: Tensor, state_BH: Tensor, memory_BH: Tensor) -> tuple[Tensor, Tensor]:
        (reset, keep, new), (own_reset, own_keep, own_new) = input_BG.chunk(3, -1), own_BG.chunk(3, -1)
        keep = (keep + own_keep).sigmoid()
        candidate_BH = (new + (reset + own_reset).sigmoid() * own_new).tanh()
        return candidate_BH + keep * (state_BH - candidate_BH), memory_BH


def lstm(num_outputs: int, shape: tuple[int, int]) -> Recurrent:
    """An LSTM of 64 units whose last state enters the head."""
    return Recurrent(num_outputs, shape[1] - 1, "lstm")


def lstm_mean(num_outputs: int, shape: tuple[int, int]) -> Recurrent:
    """:func:`lstm` whose mean state enters the head: for sound, where every moment tells as much."""
    return Recurrent(num_outputs, shape[1] - 1, "lstm", mean=True)


def gru(num_outputs: int, shape: tuple[int, int]) -> Recurrent:
    """A GRU of 64 units whose last state enters the head."""
    return Recurrent(num_outputs, shape[1] - 1, "gru")


lstm.takes = lstm_mean.takes = gru.takes = "sequences"
