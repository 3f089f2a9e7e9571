"""A causal transformer over signals: every row attends to a window of rows that ends with itself.

Letters: B batch, C channels, T rows, H heads, D = C / H dims of a head, W rows of the window, S keys.

Positions enter as rotations (RoPE), so that only distances count. Their angles are worked out in float64, in which the
row number of a stream stays exact however long it runs. The published Mimi models take float32, and so agree with this
one at first, to what float32 rounds; between rows of one window of 250, at 25 rows a second, their angles are off by
0.005 after an hour, 0.09 after a day and 0.7 after a week.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.layers.causal import State, leaves
from codec.layers.conv import SignalLayer


class Transformer(SignalLayer):
    """Layers of attention and of two linear layers, normalised before and scaled after: [B, C, T] -> [B, C, T].

    Row t attends to rows t - `window` + 1 to t, so with all layers it depends on `num_layers * (window - 1)` rows
    before its own. State: how many rows there have been, int64 [B], and per layer the keys and values
    [B, 2, H, W - 1, D] of the last ones; zeros, which nobody attends to, stand for rows before the first.

    `forward` takes a whole signal and weighs each pair of its rows: right for training, too much for hours.

    Source: Vaswani et al., "Attention is all you need" (2017), section 3; Su et al., "RoFormer: enhanced transformer
    with rotary position embedding" (2021), section 3.2; Touvron et al., "Going deeper with image transformers" (2021),
    section 2, for the scales; Défossez et al., "Moshi: a speech-text foundation model for real-time dialogue" (2024),
    section 3.3.2, and as published, https://github.com/kyutai-labs/moshi, moshi/moshi/modules/transformer.py.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_layers: int,
        num_heads: int,
        feedforward_dim: int,
        window: int,
        rope_base: float,
        initial_scale: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = channels // num_heads
        self.window = window
        self.rope_base = rope_base
        self.layers = nn.ModuleList(
            _Layer(channels, num_heads, feedforward_dim, initial_scale) for _ in range(num_layers)
        )

    def init_state(self, batch_size: int) -> State:
        device = next(self.parameters()).device
        num_before = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return num_before, tuple(self._past(batch_size, self.window - 1) for _ in self.layers)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if x.shape[2] == 0:
            return x, state
        num_before, pasts = state
        assert isinstance(num_before, Tensor)
        y, seen = self._attended(x, num_before, tuple(leaves(pasts)))
        return y, (num_before + x.shape[2], tuple(rows[:, :, :, rows.shape[3] - self.window + 1 :] for rows in seen))

    def forward(self, x: Tensor) -> Tensor:
        # What one step from the beginning gives, without the rows before it, to which nobody attends.
        if x.shape[2] == 0:
            return x
        num_before = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        return self._attended(x, num_before, [self._past(x.shape[0], 0)] * len(self.layers))[0]

    def reach(self, first: int, last: int) -> tuple[int, int]:
        return first - len(self.layers) * (self.window - 1), last

    def _past(self, batch_size: int, num_rows: int) -> Tensor:
        return next(self.parameters()).new_zeros(batch_size, 2, self.num_heads, num_rows, self.head_dim)

    def _attended(self, x: Tensor, num_before: Tensor, pasts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The signal after all layers, and the keys and values [B, 2, H, S, D] of each, those of the past first."""
        rows, seen = x.transpose(1, 2), []
        cos, sin = self._rotation(num_before, x.shape[2], torch.promote_types(x.dtype, torch.float32))
        may_attend = self._may_attend(num_before, x.shape[2], pasts[0].shape[3])
        for layer, past in zip(self.layers, pasts, strict=True):
            rows, keys_and_values = layer(rows, past, cos, sin, may_attend)
            seen.append(keys_and_values)
        return rows.transpose(1, 2), seen

    def _rotation(self, num_before: Tensor, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, T, D / 2] of the angles by which pairs of dims are turned."""
        pair = torch.arange(self.head_dim // 2, dtype=torch.float64, device=num_before.device)
        angles_per_row = self.rope_base ** (-2 * pair / self.head_dim)
        row = num_before[:, None] + torch.arange(num_rows, device=num_before.device)
        angles = row[:, None, :, None] * angles_per_row
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _may_attend(self, num_before: Tensor, num_rows: int, num_past: int) -> Tensor:
        """Who attends to whom, [B, 1, T, S]: rows that are in the window, and have been there at all."""
        key = torch.arange(-num_past, num_rows, device=num_before.device)
        distance = key[num_past:, None] - key
        is_real = key >= -num_before[:, None]
        return (distance >= 0) & (distance < self.window) & is_real[:, None, None, :]


class _Layer(nn.Module):
    """Attention, then two linear layers with GELU between, each with a norm before it and a scale after it."""

    def __init__(self, channels: int, num_heads: int, feedforward_dim: int, initial_scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.attention_scale = nn.Parameter(torch.full((channels,), initial_scale))
        self.feedforward_norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, feedforward_dim, bias=False)
        self.project = nn.Linear(feedforward_dim, channels, bias=False)
        self.feedforward_scale = nn.Parameter(torch.full((channels,), initial_scale))

    def forward(
        self, rows: Tensor, past: Tensor, cos: Tensor, sin: Tensor, may_attend: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows [B, T, C] after the layer; and their keys and values, after those of the past."""
        qkv = self.qkv(self.attention_norm(rows)).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        keys_and_values = torch.cat([past, torch.stack([_turned(keys, cos, sin), values], dim=1)], dim=3)
        heard = F.scaled_dot_product_attention(
            _turned(queries, cos, sin), keys_and_values[:, 0], keys_and_values[:, 1], attn_mask=may_attend
        )
        rows = rows + self.attention_scale * self.out(heard.transpose(1, 2).flatten(2))
        changed = self.project(F.gelu(self.expand(self.feedforward_norm(rows))))
        return rows + self.feedforward_scale * changed, keys_and_values


def _turned(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rows [B, H, T, D], each pair of neighbouring dims turned by its angle; never in less than float32."""
    first, second = rows.unflatten(3, (-1, 2)).unbind(4)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=4)
    return turned.flatten(3).to(rows.dtype)
