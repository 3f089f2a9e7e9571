"""A recurrent layer over signals [B, C, T]."""

from __future__ import annotations

from torch import Tensor, nn

from codec.layers.causal import State
from codec.layers.conv import EVERYTHING, SignalLayer


class LSTM(SignalLayer):
    """A stack of LSTM layers around which the input is added to the output. It hears everything since the beginning.

    State: hidden and cell values, each [B, num_layers, C].

    `bidirectional`: each layer also reads from the end to the beginning. The outputs [B, 2 C, T] are what the last one
    read forwards and, after it, backwards, with the input added to both. Such a layer takes whole signals only.

    Source: https://github.com/ZhangXInFD/SpeechTokenizer, modules/lstm.py, for the input beside two directions.
    """

    def __init__(self, channels: int, num_layers: int, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, num_layers, bidirectional=bidirectional)

    def init_state(self, batch_size: int) -> State:
        if self.lstm.bidirectional:
            return ()
        zeros = next(self.parameters()).new_zeros(batch_size, self.lstm.num_layers, self.lstm.hidden_size)
        return zeros, zeros

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if self.lstm.bidirectional:
            raise ValueError("this layer is not causal: it takes whole signals only")
        if x.shape[2] == 0:
            return x, state
        hidden, cell = (part.transpose(0, 1).contiguous() for part in state if isinstance(part, Tensor))
        y, (hidden, cell) = self.lstm(x.permute(2, 0, 1), (hidden, cell))
        return y.permute(1, 2, 0) + x, (hidden.transpose(0, 1), cell.transpose(0, 1))

    def finish(self, x: Tensor, state: State) -> Tensor:
        if not self.lstm.bidirectional:
            return super().finish(x, state)
        both = x.repeat(1, 2, 1)
        return self.lstm(x.permute(2, 0, 1))[0].permute(1, 2, 0) + both if x.shape[2] else both

    def reach(self, first: int, last: int) -> tuple[int, int]:
        return -EVERYTHING, EVERYTHING if self.lstm.bidirectional else last
