"""A recurrent layer over signals [B, C, T]."""

from __future__ import annotations

from torch import Tensor, nn

from codec.layers.causal import State
from codec.layers.conv import EVERYTHING, SignalLayer


class LSTM(SignalLayer):
    """A stack of LSTM layers around which the input is added to the output. It hears everything since the beginning.

    State: hidden and cell values, each [B, num_layers, C].
    """

    def __init__(self, channels: int, num_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, num_layers)

    def init_state(self, batch_size: int) -> State:
        zeros = next(self.parameters()).new_zeros(batch_size, self.lstm.num_layers, self.lstm.hidden_size)
        return zeros, zeros

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if x.shape[2] == 0:
            return x, state
        hidden, cell = (part.transpose(0, 1).contiguous() for part in state if isinstance(part, Tensor))
        y, (hidden, cell) = self.lstm(x.permute(2, 0, 1), (hidden, cell))
        return y.permute(1, 2, 0) + x, (hidden.transpose(0, 1), cell.transpose(0, 1))

    def reach(self, first: int, last: int) -> tuple[int, int]:
        return -EVERYTHING, last
