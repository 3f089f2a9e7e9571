"""Mimi: a causal SEANet with a transformer on either side of a split quantizer, at 12.5 frames a second.

    audio -> SEANet encoder -> transformer -> downsampling -> latents -> semantic row + acoustic rows of codes
    codes -> latents -> upsampling -> transformer -> SEANet decoder -> audio

It streams from the first frame on, with no delay but the frame itself, and its offline calls are the steps of a stream.
Two things of published implementations are not so here:

- the `moshi` package, when streaming, forgets the oldest rows of the window before the first of the two rows of a frame
  attends to them, so from 10 s on its streams differ slightly from its files. Here they do not, and are as its files;
- `transformers` pads a file's last partial frame layer by layer. Here, as in `moshi`, silence fills it up, as it does
  at the end of a stream. The codes of that one frame may differ.

Source: Défossez et al., "Moshi: a speech-text foundation model for real-time dialogue" (2024), section 3.3, and as
published, https://github.com/kyutai-labs/moshi, moshi/moshi/models/{compression,loaders}.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.config import build, register
from codec.layers.attention import Transformer
from codec.layers.causal import State, leaves
from codec.layers.conv import Chain
from codec.layers.resample import ConvDownsample, ConvUpsample
from codec.models.interface import UNLIMITED, StreamableCodec
from codec.models.seanet import SEANetConfig, decoder_layers, encoder_layers
from codec.quantizers.interface import Quantizer, QuantizerConfig
from codec.quantizers.split import SplitVQConfig

_PUBLISHED_QUANTIZER = SplitVQConfig(latent_dim=512)


@dataclass(frozen=True, kw_only=True)
class MimiConfig:
    """`hop_length = prod(ratios) * downsampling`; the published model's values are the defaults.

    `ratios` to `compress` are as in `SEANetConfig`, and the network between is its causal one with zeros before the
    beginning, without LSTM, and with plain shortcuts. The transformers work on `downsampling` rows per frame, as wide
    as the latents, each of `num_layers` layers with `num_heads` heads that attend to `window` rows, the own one among
    them. What a layer adds is scaled per channel, by `initial_scale` before training.

    The quantizer has 32 rows of codes, of which Moshi uses the first 8 (1.1 kbps).
    """

    sample_rate_hz: int = 24000
    quantizer: QuantizerConfig = _PUBLISHED_QUANTIZER
    num_channels: int = 1
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    num_filters: int = 64
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    num_residual_blocks: int = 1
    dilation_base: int = 2
    compress: int = 2
    downsampling: int = 2
    num_layers: int = 8
    num_heads: int = 8
    feedforward_dim: int = 2048
    window: int = 250
    rope_base: float = 10000.0
    initial_scale: float = 0.01

    def __post_init__(self) -> None:
        _ = self.seanet  # has checks of its own
        for name in ("num_layers", "num_heads", "feedforward_dim", "window", "rope_base"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.downsampling < 2:
            raise ValueError(f"downsampling must be at least 2, got {self.downsampling}")
        if self.quantizer.latent_dim % (2 * self.num_heads):
            raise ValueError(
                f"latent_dim={self.quantizer.latent_dim} makes no pairs of dims for each of num_heads={self.num_heads}"
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.ratios) * self.downsampling

    @property
    def seanet(self) -> SEANetConfig:
        """The network around the transformers."""
        return SEANetConfig(
            sample_rate_hz=self.sample_rate_hz,
            quantizer=self.quantizer,
            num_channels=self.num_channels,
            ratios=self.ratios,
            num_filters=self.num_filters,
            kernel_size=self.kernel_size,
            last_kernel_size=self.last_kernel_size,
            residual_kernel_size=self.residual_kernel_size,
            num_residual_blocks=self.num_residual_blocks,
            dilation_base=self.dilation_base,
            compress=self.compress,
            conv_shortcut=False,
            num_lstm_layers=0,
        )


@register("mimi", MimiConfig)
class MimiCodec(StreamableCodec):
    """A Mimi; see `AudioCodec` and `StreamableCodec` for the meaning of its methods and attributes.

    In float32 the last bits depend on how a signal was cut, so codes may rarely differ; in float64 they are equal. The
    shapes of a state stay as they begin, and its rows may be at different places of their streams. A decoder hears
    `num_layers * (window - 1)` rows back, 80 s in the published model.

    Weights are plain; the published run trained with weight norm (`codec.layers.conv.add_weight_norm`).

    >>> import torch
    >>> quantizer = SplitVQConfig(latent_dim=8, num_stages=3, codebook_size=16, codebook_dim=4)
    >>> config = MimiConfig(quantizer=quantizer, ratios=(4, 2), num_filters=4, num_layers=1, num_heads=2, window=6)
    >>> codec = MimiCodec(config).eval()
    >>> tokens = codec.encode(torch.zeros(1, 1, 100))
    >>> tokens.codes.shape, codec.decode(tokens).shape
    (torch.Size([1, 3, 7]), torch.Size([1, 1, 100]))
    """

    decode_delay_samples = 0

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.config: MimiConfig = config
        self.sample_rate_hz = config.sample_rate_hz
        self.num_channels = config.num_channels
        self.hop_length = config.hop_length
        width = config.quantizer.latent_dim
        self.encoder = Chain(
            [Chain(encoder_layers(config.seanet)), _transformer(config), ConvDownsample(width, config.downsampling)]
        )
        self.quantizer: Quantizer = build(config.quantizer)
        self.quantizer.check_framewise()
        self.decoder = Chain(
            [ConvUpsample(width, config.downsampling), _transformer(config), Chain(decoder_layers(config.seanet))]
        )
        self.codebook_sizes = self.quantizer.codebook_sizes
        self.valid_num_quantizers = self.quantizer.valid_num_quantizers
        first, last = self.encoder.reach(0, 0)
        self.encode_samples_before, self.encode_delay_samples = min(UNLIMITED, -first), last + 1 - self.hop_length
        first, last = self.decoder.reach(0, self.hop_length - 1)
        self.decode_frames_before, self.decode_frames_after = min(UNLIMITED, -first), last

    @torch.inference_mode()
    def encode_init(self, batch_size: int) -> State:
        return self.encoder.init_state(batch_size)

    @torch.inference_mode()
    def encode_step(self, audio: Tensor, state: State, *, num_quantizers: int | None = None) -> tuple[Tensor, State]:
        """Audio [B, C, n * hop] -> codes [B, K, n], and the state after it."""
        if audio.dim() != 3 or audio.shape[1] != self.num_channels or audio.shape[2] % self.hop_length:
            raise ValueError(f"audio must be [B, {self.num_channels}, n * {self.hop_length}], got {tuple(audio.shape)}")
        latents, state = self.encoder.step(audio.to(self._dtype), state)
        return self.quantizer.encode(latents, num_quantizers=num_quantizers), state

    @torch.inference_mode()
    def encode_flush(self, state: State, *, num_quantizers: int | None = None) -> Tensor:
        """Nothing, [B, K, 0]: no frame is ever due."""
        num_rows = self.quantizer.check_num_quantizers(num_quantizers)
        return _nothing(state, num_rows, torch.int64)

    @torch.inference_mode()
    def decode_init(self, batch_size: int, global_codes: Tensor | None = None) -> State:
        if global_codes is not None:
            raise ValueError("this codec has no global codes")
        return self.decoder.init_state(batch_size)

    @torch.inference_mode()
    def decode_step(self, codes: Tensor, state: State) -> tuple[Tensor, State]:
        """Codes [B, K', n] of any number of rows, -1 where absent -> audio [B, C, n * hop], and the state after it."""
        if codes.dim() != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes must be int64 [B, K, n], got {codes.dtype} {tuple(codes.shape)}")
        return self.decoder.step(self.quantizer.decode(codes), state)

    @torch.inference_mode()
    def decode_flush(self, state: State) -> Tensor:
        """Nothing, [B, C, 0]: no sample is ever late."""
        return _nothing(state, self.num_channels, self._dtype)

    # Training.

    def analyze(self, audio: Tensor) -> Tensor:
        """Audio [B, C, T], as if zeros filled its last frame, -> latents [B, D, ceil(T / hop)]; differentiable."""
        latents: Tensor = self.encoder(F.pad(audio, (0, -audio.shape[2] % self.hop_length)))
        return latents

    def synthesize(self, latents: Tensor, num_samples: int) -> Tensor:
        audio: Tensor = self.decoder(latents)
        return audio[:, :, :num_samples]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def _transformer(config: MimiConfig) -> Transformer:
    return Transformer(
        config.quantizer.latent_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        feedforward_dim=config.feedforward_dim,
        window=config.window,
        rope_base=config.rope_base,
        initial_scale=config.initial_scale,
    )


def _nothing(state: State, num_rows: int, dtype: torch.dtype) -> Tensor:
    some = next(leaves(state))
    return torch.zeros(some.shape[0], num_rows, 0, dtype=dtype, device=some.device)
