"""HiFi-Codec: a HiFi-GAN generator, an encoder that mirrors it, and two stages of grouped codebooks between them.

    audio -> convolution -> (strided convolution, residual blocks) per ratio -> convolution -> latents
    latents -> convolution -> (transposed convolution, residual blocks) per ratio -> convolution -> tanh -> audio

It is not causal: a group norm after each residual block of the encoder takes its mean over the whole recording, so a
frame hears all of it. `num_frames` is `ceil(num_samples / hop_length)`, as everywhere here, and the last frame is
padded with zeros; the published code drops a frame that is not full.

Source: Yang et al., "HiFi-Codec: Group-residual vector quantization for high fidelity audio codec" (2023), sections 2.1
and 2.2; Kong et al., "HiFi-GAN" (2020), appendix A.1, V1, for the generator; as published,
https://github.com/yangdongchao/AcademiCodec (academicodec/models/hificodec, egs/HiFi-Codec-*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import build, register
from codec.layers.causal import State
from codec.layers.conv import EVERYTHING, Chain, Conv, ConvTranspose, ResidualBlock, SignalLayer
from codec.models.interface import UNLIMITED, WholeCodec
from codec.quantizers.interface import Quantizer, QuantizerConfig
from codec.quantizers.residual import ResidualVQConfig

# As published: the slope between layers, and PyTorch's default before the last convolution of either network.
SLOPE = 0.1
LAST_SLOPE = 0.01
CHANNELS_PER_NORM_GROUP = 16
NORM_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class HiFiCodecConfig:
    """`hop_length = prod(ratios)`, ratios and their kernels in the generator's order; those at 320 are the defaults.

    The encoder has `encoder_channels` at the audio's rate, and twice as many after each ratio; the generator has
    `decoder_channels` at the rate of frames, and half as many after each. After each ratio come residual blocks, one
    per kernel size, of as many units as there are dilations.
    """

    sample_rate_hz: int
    quantizer: QuantizerConfig
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    kernel_sizes: tuple[int, ...] = (16, 11, 8, 4)
    encoder_channels: int = 32
    decoder_channels: int = 512
    residual_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    residual_dilations: tuple[int, ...] = (1, 3, 5)

    def __post_init__(self) -> None:
        for name in ("sample_rate_hz", "encoder_channels", "decoder_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("ratios", "residual_kernel_sizes", "residual_dilations"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be one or more positive numbers, got {getattr(self, name)}")
        if len(self.kernel_sizes) != len(self.ratios):
            raise ValueError(f"{len(self.kernel_sizes)} kernel_sizes do not fit {len(self.ratios)} ratios")
        for kernel_size, ratio in zip(self.kernel_sizes, self.ratios, strict=True):
            # Else the encoder skips samples, or a frame has no middle.
            if kernel_size < 2 * ratio - 1 or (kernel_size - ratio) % 2:
                raise ValueError(
                    f"a ratio of {ratio} needs a kernel of {2 * ratio - 1} samples or more, and an even number more "
                    f"than the ratio; kernel_sizes has {kernel_size}"
                )
        if any(kernel_size % 2 == 0 for kernel_size in self.residual_kernel_sizes):
            raise ValueError(f"residual_kernel_sizes must be odd, got {self.residual_kernel_sizes}")
        if 2 * self.encoder_channels % CHANNELS_PER_NORM_GROUP:
            raise ValueError(
                f"encoder_channels={self.encoder_channels} is not a multiple of {CHANNELS_PER_NORM_GROUP // 2}"
            )
        if self.decoder_channels % 2 ** len(self.ratios):
            raise ValueError(
                f"decoder_channels={self.decoder_channels} cannot be halved {len(self.ratios)} times, once per ratio"
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.ratios)


def _published(sample_rate_hz: int, ratios: tuple[int, ...], kernel_sizes: tuple[int, ...]) -> HiFiCodecConfig:
    quantizer = ResidualVQConfig(latent_dim=512, num_stages=2, num_groups=2, codebook_size=1024, learning="gradient")
    return HiFiCodecConfig(sample_rate_hz=sample_rate_hz, ratios=ratios, kernel_sizes=kernel_sizes, quantizer=quantizer)


# Source: egs/HiFi-Codec-*/config_*.json as published.
HIFICODEC_16K_320D = _published(16000, (8, 5, 4, 2), (16, 11, 8, 4))
HIFICODEC_24K_320D = _published(24000, (8, 5, 4, 2), (16, 11, 8, 4))
HIFICODEC_24K_240D = _published(24000, (8, 5, 3, 2), (16, 11, 7, 4))


@register("hificodec", HiFiCodecConfig)
class HiFiCodec(WholeCodec):
    """HiFi-Codec; see `AudioCodec` for the meaning of its methods and attributes. It takes whole recordings.

    >>> import torch
    >>> quantizer = ResidualVQConfig(latent_dim=8, num_stages=2, num_groups=2, codebook_size=16)
    >>> config = HiFiCodecConfig(sample_rate_hz=16000, quantizer=quantizer, ratios=(3, 2), kernel_sizes=(7, 4),
    ...                          encoder_channels=8, decoder_channels=8)
    >>> codec = HiFiCodec(config).eval()
    >>> tokens = codec.encode(torch.zeros(1, 1, 100))
    >>> tokens.codes.shape, codec.decode(tokens).shape
    (torch.Size([1, 4, 17]), torch.Size([1, 1, 100]))
    """

    num_channels = 1

    def __init__(self, config: HiFiCodecConfig) -> None:
        super().__init__()
        self.config: HiFiCodecConfig = config
        self.sample_rate_hz = config.sample_rate_hz
        self.hop_length = config.hop_length
        self.encoder = Chain(_encoder_layers(config))
        self.quantizer: Quantizer = build(config.quantizer)
        self.generator = Chain(_generator_layers(config))
        self.codebook_sizes = self.quantizer.codebook_sizes
        self.valid_num_quantizers = self.quantizer.valid_num_quantizers
        # The generator has no norms, so it hears a limited stretch, the same around every frame.
        first, last = self.generator.reach(0, self.hop_length - 1)
        self.decode_frames_before, self.decode_frames_after = min(-first, UNLIMITED), min(last, UNLIMITED)

    def analyze(self, audio: Tensor) -> Tensor:
        latents: Tensor = self.encoder(F.pad(audio, (0, -audio.shape[2] % self.hop_length)))
        return latents

    def synthesize(self, latents: Tensor, num_samples: int) -> Tensor:
        audio: Tensor = self.generator(latents)
        return audio[:, :, :num_samples]


def _encoder_layers(config: HiFiCodecConfig) -> list[SignalLayer]:
    width = config.encoder_channels
    layers: list[SignalLayer] = [Conv(1, width, 7, causal=False)]
    for ratio, kernel_size in zip(reversed(config.ratios), reversed(config.kernel_sizes), strict=True):
        layers += [
            LeakyReLU(SLOPE),
            Conv(width, 2 * width, kernel_size, stride=ratio, causal=False),
            NormedBlocks(2 * width, config.residual_kernel_sizes[::-1], config.residual_dilations),
        ]
        width *= 2
    return [*layers, LeakyReLU(LAST_SLOPE), Conv(width, config.quantizer.latent_dim, 3, causal=False)]


def _generator_layers(config: HiFiCodecConfig) -> list[SignalLayer]:
    # HiFi-GAN asks for weights from N(0, 0.01), but weight norm overwrites them before they are used: the published
    # models began, as these layers do, from PyTorch's own initialisation.
    width = config.decoder_channels
    layers: list[SignalLayer] = [Conv(config.quantizer.latent_dim, width, 7, causal=False)]
    for ratio, kernel_size in zip(config.ratios, config.kernel_sizes, strict=True):
        layers += [
            LeakyReLU(SLOPE),
            ConvTranspose(width, width // 2, kernel_size, stride=ratio, causal=False),
            MeanOfBlocks(width // 2, config.residual_kernel_sizes, config.residual_dilations),
        ]
        width //= 2
    return [*layers, LeakyReLU(LAST_SLOPE), Conv(width, 1, 7, causal=False), Tanh()]


class LeakyReLU(SignalLayer):
    """Negative values times `slope`."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return F.leaky_relu(x, self.slope), state


class Tanh(SignalLayer):
    """The hyperbolic tangent."""

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return torch.tanh(x), state


class MeanOfBlocks(SignalLayer):
    """The mean of residual blocks of several kernel sizes, side by side: HiFi-GAN's multi-receptive field fusion.

    A block is a chain of units, one per dilation. Not causal: it takes whole signals.
    """

    def __init__(self, channels: int, kernel_sizes: Sequence[int], dilations: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Chain([_residual_unit(channels, kernel_size, dilation) for dilation in dilations])
            for kernel_size in kernel_sizes
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        raise ValueError("residual blocks are not causal: they take whole signals only")

    def finish(self, x: Tensor, state: State) -> Tensor:
        total = torch.zeros_like(x)
        for block in self.blocks:
            total = total + block(x)
        return total / len(self.blocks)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        reaches = [block.reach(first, last) for block in self.blocks if isinstance(block, Chain)]
        return min(a for a, _ in reaches), max(b for _, b in reaches)


class NormedBlocks(MeanOfBlocks):
    """The same with a group norm around every partial sum, so that the first block passes through all of the norms."""

    def __init__(self, channels: int, kernel_sizes: Sequence[int], dilations: Sequence[int]) -> None:
        super().__init__(channels, kernel_sizes, dilations)
        groups = channels // CHANNELS_PER_NORM_GROUP
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels, eps=NORM_EPSILON) for _ in kernel_sizes)

    def finish(self, x: Tensor, state: State) -> Tensor:
        total = torch.zeros_like(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            total = norm(total + block(x))
        return total / len(self.blocks)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        return -EVERYTHING, EVERYTHING


def _residual_unit(channels: int, kernel_size: int, dilation: int) -> ResidualBlock:
    return ResidualBlock(
        channels,
        [
            LeakyReLU(SLOPE),
            Conv(channels, channels, kernel_size, dilation=dilation, causal=False),
            LeakyReLU(SLOPE),
            Conv(channels, channels, kernel_size, causal=False),
        ],
    )
