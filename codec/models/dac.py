"""The Descript Audio Codec (DAC): strided convolutions with Snake activations, and a quantizer in small spaces.

    audio -> convolution -> (residual units, Snake, strided convolution) per rate -> Snake -> convolution -> latents
    latents -> convolution -> (Snake, transposed convolution, residual units) per rate -> Snake -> convolution -> tanh

Not causal: it takes whole recordings. Rows of different lengths are processed apart, so that nothing of one row, nor
padding, is heard in another.

Where a rate is odd, the published decoder is one sample short at that rate, so all of its output is somewhat short (8
samples at 16 and 24 kHz): the last sample would need a frame that is not there. Here zeros make up for it, so that
decoded audio has exactly as many samples as went in; a recording that fills its last frame ends in that many zeros.

Source: Kumar et al., "High-fidelity audio compression with improved RVQGAN" (2023), section 3 and appendix A, and as
published, https://github.com/descriptinc/descript-audio-codec, dac/model/dac.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.config import build, register
from codec.layers.causal import State
from codec.layers.conv import Chain, Conv, ConvTranspose, ResidualBlock, SignalLayer, Snake
from codec.models.interface import WholeCodec
from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.interface import Quantizer, QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class DACConfig:
    """`hop_length = prod(encoder_rates)`; the published 44.1 kHz network is the default.

    The encoder has `encoder_dim` channels at the audio's rate and twice as many after each of `encoder_rates`, which
    come in its order; the decoder has `decoder_dim` at the frame rate and half as many after each of `decoder_rates`.
    The latents have `quantizer.latent_dim` dims: as many as the encoder ends with, unless published otherwise.
    """

    sample_rate_hz: int
    quantizer: QuantizerConfig
    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)

    def __post_init__(self) -> None:
        for name in ("sample_rate_hz", "encoder_dim", "decoder_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("encoder_rates", "decoder_rates"):
            rates = getattr(self, name)
            if not rates or min(rates) < 2:
                raise ValueError(f"{name} must be one or more numbers from 2 on, got {rates}")
        if prod(self.encoder_rates) != prod(self.decoder_rates):
            raise ValueError(
                f"encoder_rates={self.encoder_rates} make {prod(self.encoder_rates)} samples per frame, "
                f"decoder_rates={self.decoder_rates} {prod(self.decoder_rates)}"
            )
        if self.decoder_dim % 2 ** len(self.decoder_rates):
            raise ValueError(
                f"decoder_dim={self.decoder_dim} cannot be halved {len(self.decoder_rates)} times, once per rate"
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.encoder_rates)


DAC_16KHZ = DACConfig(
    sample_rate_hz=16000,
    encoder_rates=(2, 4, 5, 8),
    decoder_rates=(8, 5, 4, 2),
    quantizer=FactorizedVQConfig(latent_dim=1024, num_stages=12),
)
DAC_24KHZ = DACConfig(
    sample_rate_hz=24000,
    encoder_rates=(2, 4, 5, 8),
    decoder_rates=(8, 5, 4, 2),
    quantizer=FactorizedVQConfig(latent_dim=1024, num_stages=32),
)
DAC_44KHZ = DACConfig(sample_rate_hz=44100, quantizer=FactorizedVQConfig(latent_dim=1024, num_stages=9))
DAC_44KHZ_16KBPS = DACConfig(sample_rate_hz=44100, quantizer=FactorizedVQConfig(latent_dim=128, num_stages=18))


@register("dac", DACConfig)
class DACCodec(WholeCodec):
    """A DAC; see `AudioCodec` and `Codec` for the meaning of its methods and attributes.

    Weights are plain; the published runs train with weight norm (`codec.layers.conv.add_weight_norm`).

    >>> import torch
    >>> quantizer = FactorizedVQConfig(latent_dim=16, num_stages=2, codebook_size=16)
    >>> config = DACConfig(
    ...     sample_rate_hz=16000, quantizer=quantizer, encoder_dim=4, encoder_rates=(2, 4), decoder_dim=8,
    ...     decoder_rates=(4, 2),
    ... )
    >>> codec = DACCodec(config).eval()
    >>> tokens = codec.encode(torch.zeros(1, 1, 100))
    >>> tokens.codes.shape, codec.decode(tokens).shape
    (torch.Size([1, 2, 13]), torch.Size([1, 1, 100]))
    """

    num_channels = 1

    def __init__(self, config: DACConfig) -> None:
        super().__init__()
        self.config: DACConfig = config
        self.sample_rate_hz = config.sample_rate_hz
        self.hop_length = config.hop_length
        self.encoder = Chain(_encoder_layers(config))
        self.quantizer: Quantizer = build(config.quantizer)
        self.decoder = Chain(_decoder_layers(config))
        self.codebook_sizes = self.quantizer.codebook_sizes
        self.valid_num_quantizers = self.quantizer.valid_num_quantizers
        first, last = self.encoder.reach(0, 0)
        self.encode_samples_before, self.encode_delay_samples = -first, last + 1 - self.hop_length
        first, last = self.decoder.reach(0, self.hop_length - 1)
        self.decode_frames_before, self.decode_frames_after = -first, last

    def analyze(self, audio: Tensor) -> Tensor:
        """Audio [B, 1, T], as if zeros filled its last frame, -> latents [B, D, ceil(T / hop)]; differentiable."""
        latents: Tensor = self.encoder(F.pad(audio, (0, -audio.shape[2] % self.hop_length)))
        return latents

    def synthesize(self, latents: Tensor, num_samples: int) -> Tensor:
        """Latents [B, D, F] -> audio [B, 1, num_samples]; zeros where the decoder is too short. Differentiable."""
        audio = torch.tanh(self.decoder(latents))
        return F.pad(audio, (0, num_samples - audio.shape[2]))


class _Upsampling(ConvTranspose):
    """[B, C, T] -> [B, C', T * stride], but one less where the stride is odd, since the published padding takes it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 2 * stride, stride=stride, causal=False)

    def finish(self, x: Tensor, state: State) -> Tensor:
        return super().finish(x, state)[:, :, : max(0, x.shape[2] * self.stride - self.stride % 2)]


def _encoder_layers(config: DACConfig) -> list[SignalLayer]:
    width = config.encoder_dim
    layers: list[SignalLayer] = [_conv(1, width, 7)]
    for rate in config.encoder_rates:
        layers.append(Chain([*residual_units(width), Snake(width), _conv(width, 2 * width, 2 * rate, stride=rate)]))
        width *= 2
    return [*layers, Snake(width), _conv(width, config.quantizer.latent_dim, 3)]


def _decoder_layers(config: DACConfig) -> list[SignalLayer]:
    width = config.decoder_dim
    layers: list[SignalLayer] = [_conv(config.quantizer.latent_dim, width, 7)]
    for rate in config.decoder_rates:
        layers.append(Chain([Snake(width), _Upsampling(width, width // 2, rate), *residual_units(width // 2)]))
        width //= 2
    return [*layers, Snake(width), _conv(width, 1, 7)]


def residual_units(width: int) -> list[SignalLayer]:
    """Three units with growing dilation: Snake, convolution, Snake and a convolution of one sample, residual."""
    return [
        ResidualBlock(
            width, [Snake(width), _conv(width, width, 7, dilation=dilation), Snake(width), _conv(width, width, 1)]
        )
        for dilation in (1, 3, 9)
    ]


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1) -> Conv:
    """Padded with as many zeros on either side as published; where the stride is odd, the last of those is unused."""
    return Conv(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, causal=False)
