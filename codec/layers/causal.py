"""Causal layers on channels-last sequences [B, T, C].

Every layer is a pure function of its input and a state, which is a value: a tree (nested tuples) of tensors, batch
first. Feeding a sequence in pieces through `step` gives the same bits as feeding it whole; `forward` is one step from
the zero state. Forking a stream is assignment, and resetting one row is `where_rows`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.kernels.row_linear import pad_rows, row_linear

State: TypeAlias = "Tensor | tuple[State, ...]"


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply a function to every tensor of one state, or to the matching tensors of several."""
    if isinstance(state, Tensor):
        return function(state, *others)
    return tuple(map_state(function, *parts) for parts in zip(state, *others, strict=True))


def leaves(state: State) -> Iterator[Tensor]:
    """The tensors of a state, in order."""
    if isinstance(state, Tensor):
        yield state
    else:
        for part in state:
            yield from leaves(part)


def where_rows(rows: Tensor, state: State, otherwise: State) -> State:
    """Per batch row: `state` where `rows` [B] (bool) is true, `otherwise` elsewhere."""
    return map_state(lambda a, b: torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b), state, otherwise)


class CausalLayer(nn.Module, ABC):
    """Base of all layers: `init_state`, `step`, and a `forward` that is one step from the zero state."""

    def init_state(self, batch_size: int) -> State:
        """The state before the first input; here none."""
        return ()

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """[B, T, C] and the state so far -> [B, T', C'] and the state after it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.init_state(x.shape[0]))[0]


class Linear(CausalLayer):
    """A row-exact linear layer over channels."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        nn.init.trunc_normal_(self.weight, std=in_channels**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return row_linear(x, self.weight, self.bias), state


class DepthwiseConv(CausalLayer):
    """Causal depthwise convolution: output t sees inputs t - kernel_size + 1 .. t. The state is the last inputs."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 1, kernel_size))
        nn.init.trunc_normal_(self.weight, std=kernel_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(channels))

    def init_state(self, batch_size: int) -> State:
        channels, kernel_size = self.weight.shape[0], self.weight.shape[3]
        return self.weight.new_zeros(batch_size, kernel_size - 1, channels)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, Tensor)
        context = state.shape[1]
        if x.shape[1] == 0:
            return x, state
        num_rows = x.shape[1]
        x = torch.cat([state.to(x.dtype), x], dim=1)
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            # For training: a 2-D convolution over a channels-last image of height 1 needs no transposed copy.
            image = x.transpose(1, 2).unsqueeze(2)
            y = F.conv2d(image, self.weight, self.bias, groups=self.weight.shape[0])
            y = y.squeeze(2).transpose(1, 2)
        else:
            # One product per tap: elementwise, so the same bits for any number of rows, and half the cost for one.
            taps = self.weight.flatten(1).t().contiguous()
            y = torch.addcmul(self.bias, x[:, :num_rows], taps[0])
            for tap in range(1, context + 1):
                y.addcmul_(x[:, tap : tap + num_rows], taps[tap])
        return y, x[:, num_rows:]


class ConvNeXtBlock(CausalLayer):
    """Depthwise convolution, layer norm, two linear layers with GELU between, residual.

    Source: Liu et al., "A ConvNet for the 2020s" (2022), section 2; causal and one-dimensional here, without layer
    scale: the last weights start small instead.
    """

    def __init__(self, channels: int, *, kernel_size: int, expansion: int, num_blocks: int) -> None:
        super().__init__()
        self.conv = DepthwiseConv(channels, kernel_size)
        self.norm = nn.LayerNorm(channels)
        self.expand = Linear(channels, channels * expansion)
        self.project = Linear(channels * expansion, channels)
        with torch.no_grad():
            self.project.weight.mul_(num_blocks**-0.5)

    def init_state(self, batch_size: int) -> State:
        return self.conv.init_state(batch_size)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.conv.step(x, state)
        rows = pad_rows(y.flatten(0, 1), self.expand.weight, self.project.weight)
        rows = self.project(F.gelu(self.expand(self.norm(rows))))
        return x + rows[: y.shape[0] * y.shape[1]].view(y.shape), state


class Downsample(CausalLayer):
    """`factor` neighbouring rows become one: [B, T, C] -> [B, T / factor, C']. T must be a multiple of the factor."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.norm = nn.LayerNorm(in_channels)
        self.linear = Linear(in_channels * factor, out_channels)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        batch_size, num_rows, channels = x.shape
        x = self.norm(x).reshape(batch_size, num_rows // self.factor, channels * self.factor)
        return self.linear(x), state


class Upsample(CausalLayer):
    """One row becomes `factor` rows: [B, T, C] -> [B, T * factor, C']."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.out_channels = out_channels
        self.norm = nn.LayerNorm(in_channels)
        self.linear = Linear(in_channels, out_channels * factor)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        batch_size, num_rows, _ = x.shape
        return self.linear(self.norm(x)).reshape(batch_size, num_rows * self.factor, self.out_channels), state


class History(CausalLayer):
    """Put the `num_rows` rows before each row in front of it: [B, T, C] -> [B, T, (num_rows + 1) * C].

    In front of a linear layer this makes overlapping windows: patches for an encoder, overlap-add for a decoder.
    """

    def __init__(self, channels: int, num_rows: int) -> None:
        super().__init__()
        self.channels = channels
        self.num_rows = num_rows
        self.register_buffer("_like", torch.zeros(()), persistent=False)

    def init_state(self, batch_size: int) -> State:
        like: Tensor = self._like  # type: ignore[assignment]
        return like.new_zeros(batch_size, self.num_rows, self.channels)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, Tensor)
        num_rows = x.shape[1]
        x = torch.cat([state.to(x.dtype), x], dim=1)
        windows = torch.cat([x[:, i : i + num_rows] for i in range(self.num_rows + 1)], dim=2)
        return windows, x[:, num_rows:]


class Sequential(CausalLayer):
    """Layers one after another; the state is the tuple of theirs."""

    def __init__(self, layers: Sequence[CausalLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def _layers(self) -> Iterator[CausalLayer]:
        return cast("Iterator[CausalLayer]", iter(self.layers))

    def init_state(self, batch_size: int) -> State:
        return tuple(layer.init_state(batch_size) for layer in self._layers())

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        after = []
        for layer, before in zip(self._layers(), state, strict=True):
            x, new = layer.step(x, before)
            after.append(new)
        return x, tuple(after)
