"""Convolutions without bias between the rate of frames and one some times as high, over signals [B, C, T].

Both look as far back as one output, or input, of the lower rate. Source: Défossez et al., "Moshi: a speech-text
foundation model for real-time dialogue" (2024), section 3.3.1, and as published,
https://github.com/kyutai-labs/moshi, moshi/moshi/modules/resample.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.layers.causal import State
from codec.layers.conv import SignalLayer


class ConvDownsample(SignalLayer):
    """[B, C, T] -> [B, C, T / factor], from windows of `2 * factor` inputs; T must be a multiple of the factor.

    Before the beginning stands the first input, repeated. State: the last `factor` inputs [B, C, factor], and whether
    there have been any, bool [B].
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.empty(channels, channels, 2 * factor))
        # As torch initialises its own convolutions.
        nn.init.uniform_(self.weight, -((2 * factor * channels) ** -0.5), (2 * factor * channels) ** -0.5)

    def init_state(self, batch_size: int) -> State:
        is_begun = torch.zeros(batch_size, dtype=torch.bool, device=self.weight.device)
        return self.weight.new_zeros(batch_size, self.weight.shape[1], self.factor), is_begun

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if x.shape[2] % self.factor:
            raise ValueError(f"a step takes a multiple of {self.factor} inputs, not {x.shape[2]}")
        if x.shape[2] == 0:
            return x, state
        before, is_begun = state
        assert isinstance(before, Tensor)
        assert isinstance(is_begun, Tensor)
        before = torch.where(is_begun[:, None, None], before, x[:, :, :1])
        x = torch.cat([before, x], dim=2)
        return F.conv1d(x, self.weight, stride=self.factor), (x[:, :, -self.factor :], torch.ones_like(is_begun))

    def reach(self, first: int, last: int) -> tuple[int, int]:
        return (first - 1) * self.factor, (last + 1) * self.factor - 1


class ConvUpsample(SignalLayer):
    """[B, C, T] -> [B, C, T * factor], each channel on its own, by windows of `2 * factor` outputs that overlap.

    State: what the inputs so far add to the next outputs, [B, C, factor].
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.empty(channels, 1, 2 * factor))
        # An output is a sum of two inputs.
        nn.init.uniform_(self.weight, -(2**-0.5), 2**-0.5)

    def init_state(self, batch_size: int) -> State:
        return self.weight.new_zeros(batch_size, self.weight.shape[0], self.factor)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if x.shape[2] == 0:
            return x, state
        assert isinstance(state, Tensor)
        y = F.conv_transpose1d(x, self.weight, stride=self.factor, groups=self.weight.shape[0])
        num_done = x.shape[2] * self.factor
        return torch.cat([y[:, :, : self.factor] + state, y[:, :, self.factor : num_done]], dim=2), y[:, :, num_done:]

    def reach(self, first: int, last: int) -> tuple[int, int]:
        return first // self.factor - 1, last // self.factor
