"""The multirate family: short patches, causal ConvNeXt blocks at a few falling rates, a residual quantizer, and back.

    audio -> windows of a few patches -> blocks at 1 kHz -> blocks at 250 Hz -> blocks at 50 Hz -> latents -> codes
    codes -> latents -> blocks at 50 Hz -> blocks at 250 Hz -> blocks at 1 kHz -> overlapping patches -> audio

Everything is linear layers over rows and depthwise causal convolutions, which can be made independent of what comes
with them bit for bit (`codec.kernels.row_linear`). That is why a stream gives the same bits as a file, and a row the
same bits alone as in a batch: there is only one code path, the step, and the offline calls run it in pieces.

A network at the frame rate alone cannot move a waveform by less than a frame, and so never learns phase; at 1 kHz it
can, and the cost of the fast stages is small because they are narrow.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from codec.config import build, register
from codec.layers.causal import (
    CausalLayer,
    ConvNeXtBlock,
    Downsample,
    History,
    Linear,
    Sequential,
    State,
    Upsample,
    leaves,
)
from codec.models.interface import StreamableCodec
from codec.quantizers.interface import Quantizer, QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class MultirateConfig:
    """`hop_length = patch_samples * prod(strides)`; channels and blocks are listed from the fastest rate on.

    `window_patches` patches, the current one last, make an input window; the output overlaps as many. The decoder may
    look `decode_delay_frames` frames ahead: its output is that much later than its input.
    """

    sample_rate_hz: int
    patch_samples: int
    strides: tuple[int, ...]
    encoder_channels: tuple[int, ...]
    encoder_blocks: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    quantizer: QuantizerConfig
    window_patches: int = 3
    kernel_size: int = 7
    expansion: int = 4
    decode_delay_frames: int = 1

    def __post_init__(self) -> None:
        num_rates = len(self.strides) + 1
        for name in ("encoder_channels", "encoder_blocks", "decoder_channels", "decoder_blocks"):
            if len(getattr(self, name)) != num_rates:
                raise ValueError(
                    f"{name} must name {num_rates} rates, one more than strides; got {getattr(self, name)}"
                )
        if min(self.sample_rate_hz, self.patch_samples, self.window_patches, self.kernel_size, *self.strides) < 1:
            raise ValueError("rates, sizes and strides must be positive")
        if self.decode_delay_frames < 0:
            raise ValueError("decode_delay_frames must not be negative")


class MultirateFamily(StreamableCodec):
    """What the codecs of this family share: mono, steps of whole frames, and no code that waits for later audio."""

    num_channels = 1
    is_bit_exact = True
    encode_delay_samples = 0
    config: MultirateConfig

    def __init__(self, config: MultirateConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_rate_hz = config.sample_rate_hz
        self.hop_length = config.patch_samples * prod(config.strides)
        self.decode_delay_samples = config.decode_delay_frames * self.hop_length
        self.decode_frames_after = config.decode_delay_frames

    @abstractmethod
    def encode_latents(self, audio: Tensor, state: State) -> tuple[Tensor, State]:
        """Audio [B, F * hop] -> latents [B, D, F] of unit scale, before quantization."""

    @torch.inference_mode()
    def encode_step(self, audio: Tensor, state: State, *, num_quantizers: int | None = None) -> tuple[Tensor, State]:
        if audio.dim() != 3 or audio.shape[1] != 1 or audio.shape[2] % self.hop_length:
            raise ValueError(f"audio must be [B, 1, n * {self.hop_length}], got {tuple(audio.shape)}")
        latents, state = self.encode_latents(audio[:, 0], state)
        return self.quantizer.encode(latents, num_quantizers=num_quantizers), state

    @torch.inference_mode()
    def encode_flush(self, state: State, *, num_quantizers: int | None = None) -> Tensor:
        batch_size = next(leaves(state)).shape[0]
        num_rows = self.quantizer.check_num_quantizers(num_quantizers)
        return torch.zeros(batch_size, num_rows, 0, dtype=torch.int64, device=self.quantizer.device)

    @torch.inference_mode()
    def decode_flush(self, state: State) -> Tensor:
        batch_size, num_rows = next(leaves(state)).shape[0], self.valid_num_quantizers[0]
        absent = torch.full((batch_size, num_rows, self.config.decode_delay_frames), -1, device=self.quantizer.device)
        return self.decode_step(absent, state)[0]

    def _checked_codes(self, codes: Tensor) -> Tensor:
        """ValueError where these cannot be codes at all."""
        if codes.dim() != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes must be int64 [B, K, n], got {codes.dtype} {tuple(codes.shape)}")
        return codes

    def _whole_frames(self, audio: Tensor) -> Tensor:
        """Audio [B, 1, T] as [B, F * hop], with the frames that the decoder's delay reaches into."""
        num_frames = self.num_frames_for(audio.shape[2]) + self.config.decode_delay_frames
        return F.pad(audio[:, 0], (0, num_frames * self.hop_length - audio.shape[2]))

    def _patches(self, audio: Tensor) -> Tensor:
        """Audio [B, F * hop] -> [B, N, patch]."""
        size = self.config.patch_samples
        patches: Tensor = audio.unflatten(1, (audio.shape[1] // size, size))
        return patches


@register("multirate", MultirateConfig)
class MultirateCodec(MultirateFamily):
    """A streamable mono codec; see `AudioCodec` and `StreamableCodec` for the meaning of its methods and attributes."""

    def __init__(self, config: MultirateConfig) -> None:
        super().__init__(config)
        self.encoder = Sequential(encoder_layers(config, config.quantizer.latent_dim))
        self.quantizer: Quantizer = build(config.quantizer)
        self.quantizer.check_framewise()
        self.decoder = Sequential(decoder_layers(config, config.quantizer.latent_dim))
        self.decode_frames_before = max(0, decoder_past_frames(config) - config.decode_delay_frames)
        self.codebook_sizes = self.quantizer.codebook_sizes
        self.valid_num_quantizers = self.quantizer.valid_num_quantizers

    @torch.inference_mode()
    def encode_init(self, batch_size: int) -> State:
        return self.encoder.init_state(batch_size)

    @torch.inference_mode()
    def decode_init(self, batch_size: int, global_codes: Tensor | None = None) -> State:
        if global_codes is not None:
            raise ValueError("this codec has no global codes")
        return self.decoder.init_state(batch_size)

    @torch.inference_mode()
    def decode_step(self, codes: Tensor, state: State) -> tuple[Tensor, State]:
        audio, state = self.decode_latents(self.quantizer.decode(self._checked_codes(codes)), state)
        return audio[:, None], state

    # Networks, shared by training and inference: [B, F * hop] <-> latents [B, D, F].

    def analyze(self, audio: Tensor) -> Tensor:
        """Besides the frames of the audio, those that the decoder's delay reaches into: latents [B, D, F + delay]."""
        return self.encode_latents(self._whole_frames(audio), self.encoder.init_state(len(audio)))[0]

    def synthesize(self, latents: Tensor, num_samples: int) -> Tensor:
        audio = self.decode_latents(latents, self.decoder.init_state(len(latents)))[0]
        return audio[:, None, self.decode_delay_samples :][:, :, :num_samples]

    def encode_latents(self, audio: Tensor, state: State) -> tuple[Tensor, State]:
        rows, state = self.encoder.step(self._patches(audio), state)
        # A fixed scale: without it the commitment loss shrinks the latents towards zero.
        return F.layer_norm(rows.float(), rows.shape[-1:]).transpose(1, 2), state

    def decode_latents(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """Latents [B, D, F] -> audio [B, F * hop], late by `decode_delay_samples`."""
        rows, state = self.decoder.step(latents.transpose(1, 2), state)
        return rows.flatten(1).float(), state


def encoder_layers(config: MultirateConfig, latent_dim: int) -> list[CausalLayer]:
    """From patches [B, T, patch] to latents [B, F, D], without the scale."""
    channels = config.encoder_channels
    layers: list[CausalLayer] = [
        History(config.patch_samples, config.window_patches - 1),
        Linear(config.patch_samples * config.window_patches, channels[0]),
    ]
    for rate, num_blocks in enumerate(config.encoder_blocks):
        if rate:
            layers.append(Downsample(channels[rate - 1], channels[rate], config.strides[rate - 1]))
        layers += _blocks(config, channels[rate], num_blocks, sum(config.encoder_blocks))
    return [*layers, Linear(channels[-1], latent_dim)]


def decoder_layers(config: MultirateConfig, latent_dim: int) -> list[CausalLayer]:
    """From latents [B, F, D] to patches [B, T, patch]."""
    channels = config.decoder_channels
    layers: list[CausalLayer] = [Linear(latent_dim, channels[-1])]
    for rate in reversed(range(len(channels))):
        layers += _blocks(config, channels[rate], config.decoder_blocks[rate], sum(config.decoder_blocks))
        if rate:
            layers.append(Upsample(channels[rate], channels[rate - 1], config.strides[rate - 1]))
    head = Linear(channels[0] * config.window_patches, config.patch_samples)
    with torch.no_grad():
        head.weight.mul_(0.05)  # start near the level of speech: a loud start costs hundreds of steps
    return [*layers, History(channels[0], config.window_patches - 1), head]


def decoder_past_frames(config: MultirateConfig) -> int:
    """How many frames before the last one that came in the decoder's newest output hears, rounded up."""
    steps_per_frame = prod(config.strides)
    past_frames = Fraction(config.window_patches - 1, steps_per_frame)
    for rate, num_blocks in enumerate(config.decoder_blocks):
        past_frames += Fraction(num_blocks * (config.kernel_size - 1), prod(config.strides[rate:]))
    return ceil(past_frames)


def _blocks(config: MultirateConfig, channels: int, num_blocks: int, total: int) -> list[CausalLayer]:
    return [
        ConvNeXtBlock(channels, kernel_size=config.kernel_size, expansion=config.expansion, num_blocks=total)
        for _ in range(num_blocks)
    ]
