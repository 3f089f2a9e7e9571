"""Dense convolutions over signals [B, C, T], causal ones with a state, and how far each of them hears.

Shapes: B batch, C channels, T samples (at whatever rate a layer works).

A layer can be fed in three ways. `step` takes a piece and a state, like every causal layer; `finish` is the last step,
and knows that the signal ends; `forward` is `finish` from the beginning: the whole signal at once. Layers that are not
causal have `forward` only.

With zeros before the beginning (`pad_mode="zero"`) a step of n * stride inputs gives n outputs, from the first on. With
mirrored inputs there (`"reflect"`) a layer withholds its first outputs until it has seen what is mirrored.

Weights are stored plainly, as `weight` and `bias`. Weight norm is a matter of training: `add_weight_norm` before it,
`fold_weight_norm` after it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from codec.layers.causal import CausalLayer, Sequential, State, leaves

PAD_MODES = ("zero", "reflect")
EVERYTHING = 2**80  # farther than any signal is long


class SignalLayer(CausalLayer):
    """Base of the layers over [B, C, T]."""

    def finish(self, x: Tensor, state: State) -> Tensor:
        """The outputs that are left when the signal ends with `x`, which may be empty and have any length."""
        return self.step(x, state)[0]

    def forward(self, x: Tensor) -> Tensor:
        """A whole signal, of any length."""
        return self.finish(x, self.init_state(x.shape[0]))

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """The first and the last input that outputs `first` to `last` depend on, in a signal that does not end."""
        return first, last


class ELU(SignalLayer):
    """The exponential linear unit."""

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return F.elu(x), state


class Snake(SignalLayer):
    """`x + sin(alpha x)^2 / alpha`, with one `alpha` per channel: periodic, and yet it grows with x.

    Source: Liu, Hartwig and Ueda, "Neural networks fail to learn periodic functions and how to fix it" (2020),
    equation 3; the small number beside alpha is DAC's.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        alpha = self.alpha[:, None]
        return x + (alpha + 1e-9).reciprocal() * (alpha * x).sin().square(), state


class Chain(Sequential, SignalLayer):
    """Layers one after another; the state is the tuple of theirs."""

    def _signal_layers(self) -> Iterator[SignalLayer]:
        return cast("Iterator[SignalLayer]", self._layers())

    def finish(self, x: Tensor, state: State) -> Tensor:
        for layer, before in zip(self._signal_layers(), state, strict=True):
            x = layer.finish(x, before)
        return x

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers():
            x = layer(x)
        return x

    def reach(self, first: int, last: int) -> tuple[int, int]:
        for layer in reversed(list(self._signal_layers())):
            first, last = layer.reach(first, last)
        return first, last


class _Convolution(SignalLayer):
    """What the two kinds of convolution share: plain weights, group norm, and the refusal to step where not causal."""

    def __init__(
        self,
        weight_shape: tuple[int, int, int],
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        causal: bool,
        group_norm: bool,
    ) -> None:
        super().__init__()
        if causal and group_norm:
            raise ValueError("group norm looks at the whole signal, so a causal layer cannot have it")
        # Shapes are read of these and of the bias: with weight norm, every look at `weight` computes it.
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.empty(out_channels))
        # As torch initialises its own convolutions.
        bound = (weight_shape[1] * weight_shape[2]) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self.norm = nn.GroupNorm(1, out_channels) if group_norm else None

    def _normalized(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _nothing(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], self.out_channels, 0)

    def _is_few(self, num_rows: int, device: torch.device) -> bool:
        """Whether so few windows are to be computed that one product of matrices is the fastest way.

        On a CPU a convolution lays its weights out anew in every call. For one frame of Mimi that took 59 of 68 ms in
        the first transposed convolution, where reading the weights takes 4.
        """
        return device.type == "cpu" and num_rows <= self.in_channels // 4

    def _refuse_to_step(self) -> None:
        if not self.causal:
            raise ValueError("this layer is not causal: it takes whole signals only")

    @abstractmethod
    def finish(self, x: Tensor, state: State) -> Tensor: ...


class Conv(_Convolution):
    """A convolution: [B, C, T] -> [B, C', ceil(T / stride)].

    What is missing for that many windows is padded: before the signal where causal, on both sides else, and behind it
    until the last window is full. State: the last `kernel - stride` inputs; where the beginning is mirrored, a tuple of
    the inputs so far until there are enough of them.

    Source: padding as in EnCodec (Défossez et al. 2022), https://github.com/facebookresearch/encodec, modules/conv.py.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = True,
        pad_mode: str = "zero",
        group_norm: bool = False,
    ) -> None:
        super().__init__(
            (out_channels, in_channels, kernel_size),
            in_channels,
            out_channels,
            stride,
            causal=causal,
            group_norm=group_norm,
        )
        self.dilation = dilation
        self.pad_mode = pad_mode
        self.window = (kernel_size - 1) * dilation + 1  # inputs from the first to the last that an output sees
        self.num_padded = self.window - stride
        if pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode={pad_mode!r} is not one of {PAD_MODES}")
        if self.num_padded < stride - 1:
            raise ValueError(f"a stride of {stride} needs a window of {2 * stride - 1} inputs, not {self.window}")

    def init_state(self, batch_size: int) -> State:
        if not self.causal:
            return ()
        if self.pad_mode == "reflect" and self.num_padded:
            return (self.bias.new_zeros(batch_size, self.in_channels, 0),)
        return self.bias.new_zeros(batch_size, self.in_channels, self.num_padded)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        self._refuse_to_step()
        if x.shape[2] % self.stride:
            raise ValueError(f"a step takes a multiple of {self.stride} inputs, not {x.shape[2]}")
        x = _joined(*leaves(state), x)
        if not isinstance(state, Tensor):
            if x.shape[2] <= self.num_padded:
                return self._nothing(x), (x.clone(),)  # never the memory of the caller
            x = _padded(x, self.num_padded, 0, self.pad_mode)
        return self._windows(x), x[:, :, x.shape[2] - self.num_padded :]

    def finish(self, x: Tensor, state: State) -> Tensor:
        is_begun = isinstance(state, Tensor)
        num_new = x.shape[2]
        x = _joined(*leaves(state), x)
        if x.shape[2] == 0 or (is_begun and num_new == 0):
            return self._nothing(x)
        left = 0 if is_begun else self._left()
        missing = -(num_new if is_begun else x.shape[2]) % self.stride
        right = missing if self.causal else missing + self.num_padded - left
        return self._windows(_padded(x, left, right, self.pad_mode))

    def reach(self, first: int, last: int) -> tuple[int, int]:
        if self.norm is not None:
            return -EVERYTHING, EVERYTHING
        first = first * self.stride - self._left()
        last = last * self.stride - self._left() + self.window - 1
        if self.pad_mode == "reflect" and first < 0:
            return (first if first <= -EVERYTHING else 0), max(last, min(-first, self._left()))
        return first, last

    def _left(self) -> int:
        return self.num_padded if self.causal else self.num_padded - self.num_padded // 2

    def _windows(self, x: Tensor) -> Tensor:
        if x.shape[2] < self.window:
            return self._nothing(x)
        num_outputs = (x.shape[2] - self.window) // self.stride + 1
        if self._is_few(x.shape[0] * num_outputs, x.device):
            taps = x.unfold(2, self.window, self.stride)[..., :: self.dilation]
            rows = F.linear(taps.transpose(1, 2).flatten(2), self.weight.flatten(1), self.bias)
            return self._normalized(rows.transpose(1, 2))
        return self._normalized(F.conv1d(x, self.weight, self.bias, stride=self.stride, dilation=self.dilation))


class ConvTranspose(_Convolution):
    """A transposed convolution: [B, C, T] -> [B, C', T * stride].

    What the windows reach beyond that is cut off: behind the signal where causal, on both sides else (the norm still
    sees it). State: what the inputs so far add to the next outputs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        causal: bool = True,
        group_norm: bool = False,
    ) -> None:
        super().__init__(
            (in_channels, out_channels, kernel_size),
            in_channels,
            out_channels,
            stride,
            causal=causal,
            group_norm=group_norm,
        )
        if kernel_size < stride:
            raise ValueError(f"kernel_size={kernel_size} leaves gaps at stride={stride}")
        self.overlap = kernel_size - stride

    def init_state(self, batch_size: int) -> State:
        return self.bias.new_zeros(batch_size, self.out_channels, self.overlap) if self.causal else ()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        self._refuse_to_step()
        assert isinstance(state, Tensor)
        if x.shape[2] == 0:
            return self._nothing(x), state
        y = self._spread(x)
        y[:, :, : self.overlap] += state
        num_done = x.shape[2] * self.stride
        return y[:, :, :num_done] + self.bias[:, None], y[:, :, num_done:]

    def finish(self, x: Tensor, state: State) -> Tensor:
        return self.step(x, state)[0] if self.causal else self._whole(x)

    def forward(self, x: Tensor) -> Tensor:
        # What `finish` gives from the beginning, in fewer passes over memory where causal.
        return self._whole(x) if self.causal else super().forward(x)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        if self.norm is not None:
            return -EVERYTHING, EVERYTHING
        first, last = first + self._left(), last + self._left()
        return -(-(first - self.overlap - self.stride + 1) // self.stride), last // self.stride

    def _left(self) -> int:
        return 0 if self.causal else self.overlap - self.overlap // 2

    def _spread(self, x: Tensor) -> Tensor:
        """What the inputs add to the outputs, as far as their windows reach; without bias."""
        batch_size, _, num_inputs = x.shape
        num_strides, rest = divmod(self.overlap + self.stride, self.stride)
        if rest or not self._is_few(batch_size * num_inputs, x.device):
            return F.conv_transpose1d(x, self.weight, stride=self.stride)
        windows = torch.matmul(x.transpose(1, 2), self.weight.flatten(1))
        windows = windows.view(batch_size, num_inputs, self.out_channels, num_strides, self.stride).transpose(1, 2)
        y = x.new_zeros(batch_size, self.out_channels, num_inputs + num_strides - 1, self.stride)
        for i in range(num_strides):
            y[:, :, i : i + num_inputs] += windows[:, :, :, i]
        return y.flatten(2)

    def _whole(self, x: Tensor) -> Tensor:
        if x.shape[2] == 0:
            return self._nothing(x)
        y = self._normalized(F.conv_transpose1d(x, self.weight, self.bias, stride=self.stride))
        return y[:, :, self._left() : self._left() + x.shape[2] * self.stride]


class ResidualBlock(SignalLayer):
    """A branch of layers around which the input, or what a shortcut makes of it, is added to the output.

    State: those of the branch and of the shortcut, and what of the shortcut waits for a branch that withholds.
    """

    def __init__(self, channels: int, branch: Sequence[SignalLayer], shortcut: SignalLayer | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.branch = Chain(branch)
        self.shortcut = Chain([shortcut] if shortcut else [])

    def init_state(self, batch_size: int) -> State:
        waiting = next(self.parameters()).new_zeros(batch_size, self.channels, 0)
        return self.branch.init_state(batch_size), self.shortcut.init_state(batch_size), waiting

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        branch, shortcut, waiting = state
        assert isinstance(waiting, Tensor)
        y, branch = self.branch.step(x, branch)
        skipped, shortcut = self.shortcut.step(x, shortcut)
        skipped = _joined(waiting, skipped)
        return y + skipped[:, :, : y.shape[2]], (branch, shortcut, skipped[:, :, y.shape[2] :])

    def finish(self, x: Tensor, state: State) -> Tensor:
        branch, shortcut, waiting = state
        assert isinstance(waiting, Tensor)
        skipped = _joined(waiting, self.shortcut.finish(x, shortcut))
        return self.branch.finish(x, branch) + skipped

    def reach(self, first: int, last: int) -> tuple[int, int]:
        (a, b), (c, d) = self.branch.reach(first, last), self.shortcut.reach(first, last)
        return min(a, c), max(b, d)


def add_weight_norm(network: nn.Module) -> None:
    """Train every convolution in the network as direction and length; it computes the same as before.

    The state dict then has another layout: `fold_weight_norm` before saving.

    Source: Salimans and Kingma, "Weight normalization" (2016), section 2.
    """
    for layer in network.modules():
        if isinstance(layer, _Convolution):
            weight_norm(layer, "weight")


def fold_weight_norm(network: nn.Module) -> None:
    """Undo `add_weight_norm`, keeping what was learned: the plain layout again."""
    for layer in list(network.modules()):
        if isinstance(layer, _Convolution) and parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")


def _joined(*parts: Tensor) -> Tensor:
    """Pieces of a signal as one; not copied where only one of them holds anything."""
    filled = [part for part in parts if part.shape[2]]
    return torch.cat(filled, dim=2) if len(filled) > 1 else (filled or parts)[0]


def _padded(x: Tensor, left: int, right: int, pad_mode: str) -> Tensor:
    """Zeros, or the signal mirrored, on both sides; a signal too short to be mirrored is taken to go on with zeros."""
    if left == right == 0:
        return x  # `F.pad` would copy it
    if pad_mode == "zero":
        return F.pad(x, (left, right))
    num_given = x.shape[2]
    num_missing = max(left, right) + 1 - num_given
    if num_missing > 0:
        x = F.pad(x, (0, num_missing))
    # `F.pad` can mirror, too, but takes longer in training, and leaves bfloat16 under autocast.
    end = x.shape[2] - 1
    mirrored = _joined(x[:, :, 1 : left + 1].flip(2), x, x[:, :, end - right : end].flip(2))
    return mirrored[:, :, : left + num_given + right] if num_missing > 0 else mirrored
