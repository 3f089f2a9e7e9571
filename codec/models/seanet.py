"""The SEANet family: SoundStream, EnCodec, SpeechTokenizer. Convolutions, LSTMs, a residual quantizer, and back.

    audio -> convolution -> (residual blocks, strided convolution) per ratio -> LSTM -> convolution -> latents
    latents -> convolution -> LSTM -> (transposed convolution, residual blocks) per ratio -> convolution -> audio

Three kinds of it:

- causal, padded with zeros: streams from the first frame on, and its offline calls are the steps of a stream;
- causal, beginning mirrored (`pad_mode="reflect"`, EnCodec 24 kHz as published): a stream withholds its first frames
  until it has heard what is mirrored. A file's last partial frame is padded layer by layer as published, a stream's
  with silence, so the codes of that one frame may differ;
- not causal (EnCodec 48 kHz and SpeechTokenizer as published): takes whole files, or overlapping segments of them, and
  cannot stream.

The last two process rows of different lengths apart, so that nothing of one row, nor padding, is heard in another.

Source: Zeghidour et al., "SoundStream" (2021), section III; Défossez et al., "High fidelity neural audio compression"
(EnCodec, 2022), section 3.1 and appendix A, and as published, https://github.com/facebookresearch/encodec; Zhang et
al., "SpeechTokenizer" (2023), as published, https://github.com/ZhangXInFD/SpeechTokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from codec.config import build, register
from codec.layers.causal import State, leaves
from codec.layers.conv import ELU, PAD_MODES, Chain, Conv, ConvTranspose, ResidualBlock, SignalLayer, Snake
from codec.layers.recurrent import LSTM
from codec.models.interface import UNLIMITED, StreamableCodec, rows_by_length
from codec.quantizers.interface import Quantizer, QuantizerConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.tokens import Tokens

NORMS = ("none", "weight", "group")
ACTIVATIONS = ("elu", "snake")


@dataclass(frozen=True, kw_only=True)
class SEANetConfig:
    """`hop_length = prod(ratios)`, ratios in the decoder's order; EnCodec's values are the defaults.

    The network has `num_filters` channels at the audio's rate, and twice as many after each ratio. A residual block
    narrows to a `compress`-th of its channels, and its dilation grows by `dilation_base` from block to block.
    `last_kernel_size` is that of both networks' last convolutions, unless `encoder_last_kernel_size` differs.

    `bidirectional_lstm`: the encoder's LSTM also reads from the end to the beginning, so it hears everything, and the
    last convolution takes twice as many channels. The decoder's reads forwards always. `activation`: "elu", or "snake"
    as in one release of SpeechTokenizer.

    `norm`: "weight" says how to train (see `codec.layers.conv.add_weight_norm`) and computes nothing else than "none";
    "group" normalises each layer's output over channels and time, which cannot be causal.

    Audio may be cut into segments of `segment_samples`, one every `segment_stride_samples`; where these overlap, frames
    are coded twice. `normalize_loudness` divides each segment by its loudness, which goes into `Tokens.scales`.
    """

    sample_rate_hz: int
    quantizer: QuantizerConfig
    num_channels: int = 1
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    num_filters: int = 32
    kernel_size: int = 7
    last_kernel_size: int = 7
    encoder_last_kernel_size: int | None = None
    residual_kernel_size: int = 3
    num_residual_blocks: int = 1
    dilation_base: int = 2
    compress: int = 2
    conv_shortcut: bool = True
    activation: str = "elu"
    num_lstm_layers: int = 2
    bidirectional_lstm: bool = False
    causal: bool = True
    pad_mode: str = "zero"
    norm: str = "weight"
    segment_samples: int | None = None
    segment_stride_samples: int | None = None
    normalize_loudness: bool = False

    def __post_init__(self) -> None:
        positive = (
            *("sample_rate_hz", "num_channels", "num_filters", "kernel_size", "last_kernel_size"),
            *("residual_kernel_size", "dilation_base", "compress"),
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.encoder_last_kernel_size is not None and self.encoder_last_kernel_size < 1:
            raise ValueError(f"encoder_last_kernel_size must be positive, got {self.encoder_last_kernel_size}")
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios must be one or more positive numbers, got {self.ratios}")
        if min(self.num_residual_blocks, self.num_lstm_layers) < 0:
            raise ValueError("num_residual_blocks and num_lstm_layers must not be negative")
        if self.num_filters % self.compress:
            raise ValueError(f"num_filters={self.num_filters} is not a multiple of compress={self.compress}")
        if self.pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode={self.pad_mode!r} is not one of {PAD_MODES}")
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} is not one of {NORMS}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {ACTIVATIONS}")
        if self.bidirectional_lstm and (self.causal or not self.num_lstm_layers):
            raise ValueError("bidirectional_lstm needs causal=False, for it looks ahead, and num_lstm_layers")
        if self.causal and (self.norm == "group" or self.normalize_loudness or self.segment_samples is not None):
            raise ValueError("group norm, normalize_loudness and segments need causal=False: they look ahead")
        if (self.segment_samples is None) != (self.segment_stride_samples is None):
            raise ValueError("segment_samples and segment_stride_samples go together")
        if self.segment_samples is not None and self.segment_stride_samples is not None:
            if self.segment_samples < 1 or self.segment_samples % self.hop_length:
                raise ValueError(
                    f"segment_samples={self.segment_samples} is not a multiple of the {self.hop_length} samples "
                    f"per frame that ratios={self.ratios} make"
                )
            if not 1 <= self.segment_stride_samples <= self.segment_samples:
                raise ValueError(
                    f"segment_stride_samples={self.segment_stride_samples} is not in 1..{self.segment_samples}"
                )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return prod(self.ratios)


def _soundstream(sample_rate_hz: int, num_stages: int) -> SEANetConfig:
    # The papers do not tell the width of the latents; 512 is that of AcademiCodec's recipes for SoundStream.
    return SEANetConfig(
        sample_rate_hz=sample_rate_hz,
        quantizer=ResidualVQConfig(latent_dim=512, num_stages=num_stages, codebook_size=1024),
        encoder_last_kernel_size=3,
        residual_kernel_size=7,
        num_residual_blocks=3,
        dilation_base=3,
        compress=1,
        conv_shortcut=False,
        num_lstm_layers=0,
        norm="none",
    )


# Source: SoundStream, section III, figure 3 and 6 kbps of section III.C.
SOUNDSTREAM_24KHZ = _soundstream(24000, num_stages=8)
# Source: Borsos et al., "AudioLM" (2022): the same network at 16 kHz, at 6 kbps.
SOUNDSTREAM_16KHZ = _soundstream(16000, num_stages=12)


@register("seanet", SEANetConfig)
class SEANetCodec(StreamableCodec):
    """A codec of the family; see `AudioCodec` and `StreamableCodec` for the meaning of its methods and attributes.

    Where `is_streamable` is False, the streaming calls are ValueErrors. Where segments overlap, there are more frames
    than `num_samples / hop_length`: `num_frames_for` tells how many. A padded row's codes and scales end in zeros.

    >>> import torch
    >>> quantizer = ResidualVQConfig(latent_dim=8, num_stages=2, codebook_size=16)
    >>> config = SEANetConfig(sample_rate_hz=16000, quantizer=quantizer, ratios=(4, 2), num_filters=4)
    >>> codec = SEANetCodec(config).eval()
    >>> tokens = codec.encode(torch.zeros(1, 1, 100))
    >>> tokens.codes.shape, codec.decode(tokens).shape
    (torch.Size([1, 2, 13]), torch.Size([1, 1, 100]))
    """

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        self.config: SEANetConfig = config
        self.sample_rate_hz = config.sample_rate_hz
        self.num_channels = config.num_channels
        self.hop_length = config.hop_length
        self.is_streamable = config.causal
        self.encoder = Chain(encoder_layers(config))
        self.quantizer: Quantizer = build(config.quantizer)
        if config.causal:
            self.quantizer.check_framewise()
        self.decoder = Chain(decoder_layers(config))
        self.codebook_sizes = self.quantizer.codebook_sizes
        self.valid_num_quantizers = self.quantizer.valid_num_quantizers
        self.decode_delay_samples = 0
        self.encode_delay_samples = self.decode_frames_before = self.decode_frames_after = UNLIMITED
        if config.segment_samples is None:
            self._set_reach()

    # Streams.

    @torch.inference_mode()
    def encode_init(self, batch_size: int) -> State:
        self._check_streamable()
        return self.encoder.init_state(batch_size)

    @torch.inference_mode()
    def encode_step(self, audio: Tensor, state: State, *, num_quantizers: int | None = None) -> tuple[Tensor, State]:
        self._check_streamable()
        if audio.dim() != 3 or audio.shape[1] != self.num_channels or audio.shape[2] % self.hop_length:
            raise ValueError(f"audio must be [B, {self.num_channels}, n * {self.hop_length}], got {tuple(audio.shape)}")
        latents, state = self.encoder.step(audio.to(self._dtype), state)
        return self.quantizer.encode(latents, num_quantizers=num_quantizers), state

    @torch.inference_mode()
    def encode_flush(self, state: State, *, num_quantizers: int | None = None) -> Tensor:
        """The codes [B, K, n] of frames withheld, if the audio was too short for them; most often n = 0."""
        self._check_streamable()
        start = next(leaves(state))
        latents = self.encoder.finish(start.new_zeros(start.shape[0], self.num_channels, 0), state)
        return self.quantizer.encode(latents, num_quantizers=num_quantizers)

    @torch.inference_mode()
    def decode_init(self, batch_size: int, global_codes: Tensor | None = None) -> State:
        self._check_streamable()
        if global_codes is not None:
            raise ValueError("this codec has no global codes")
        return self.decoder.init_state(batch_size)

    @torch.inference_mode()
    def decode_step(self, codes: Tensor, state: State) -> tuple[Tensor, State]:
        """Codes [B, K', n] -> audio [B, C, m * hop] that is known by then; with zero padding, m = n."""
        self._check_streamable()
        if codes.dim() != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes must be int64 [B, K, n], got {codes.dtype} {tuple(codes.shape)}")
        return self.decoder.step(self.quantizer.decode(codes), state)

    @torch.inference_mode()
    def decode_flush(self, state: State) -> Tensor:
        """The audio [B, C, n] withheld, if there were too few frames for it; most often n = 0."""
        self._check_streamable()
        start = next(leaves(state))
        return self.decoder.finish(start.new_zeros(start.shape[0], self.config.quantizer.latent_dim, 0), state)

    # Files.

    @torch.inference_mode()
    def encode(self, audio: Tensor, num_samples: Tensor | None = None, *, num_quantizers: int | None = None) -> Tokens:
        if self._is_made_of_steps:
            return super().encode(audio, num_samples, num_quantizers=num_quantizers)
        num_rows = self.quantizer.check_num_quantizers(num_quantizers)
        audio, num_samples = self._checked_audio(audio, num_samples)
        batch_size, _, num_given = audio.shape
        codes = audio.new_zeros((batch_size, num_rows, self.num_frames_for(num_given)), dtype=torch.int64)
        scales = audio.new_zeros(batch_size, len(self._segments(num_given)))
        for length, rows in rows_by_length(num_samples):
            for i, (first, last, frames) in enumerate(self._segments(length)):
                segment = audio[rows, :, first:last].to(self._dtype)
                if self.config.normalize_loudness:
                    loudness = _loudness(segment)
                    scales[rows, i] = loudness.flatten().float()
                    segment = segment / loudness
                latents = self._whole(self.encoder, segment, self.hop_length)
                codes[rows, :, frames] = self.quantizer.encode(latents, num_quantizers=num_rows)
        return Tokens(codes, num_samples, self.codec_id, scales=scales if self.config.normalize_loudness else None)

    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> Tensor:
        if self._is_made_of_steps:
            return super().decode(tokens)
        longest = self._checked_tokens(tokens)
        audio = torch.zeros(
            len(tokens.codes), self.num_channels, longest, dtype=self._dtype, device=tokens.codes.device
        )
        for length, rows in rows_by_length(tokens.num_samples):
            parts = []
            for i, (_, _, frames) in enumerate(self._segments(length)):
                part = self._whole(self.decoder, self.quantizer.decode(tokens.codes[rows, :, frames]), 1)
                parts.append(part if tokens.scales is None else part * tokens.scales[rows, i].view(-1, 1, 1))
            audio[rows, :, :length] = _overlap_add(parts, self.config.segment_stride_samples)[:, :, :length]
        return audio

    # Training: one segment, however long.

    def analyze(self, audio: Tensor) -> Tensor:
        latents: Tensor = self.encoder(audio)
        return latents

    def synthesize(self, latents: Tensor, num_samples: int) -> Tensor:
        audio: Tensor = self.decoder(latents)
        return audio[:, :, :num_samples]

    def reconstruct(self, audio: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        loudness = _loudness(audio) if self.config.normalize_loudness else audio.new_ones(())
        return super().reconstruct(audio / loudness, quantize) * loudness

    def num_frames_for(self, num_samples: int) -> int:
        """Frames that so many samples make: `ceil(num_samples / hop_length)`, and more where segments overlap."""
        return self._segments(num_samples)[-1][2].stop if num_samples else 0

    def num_quantizers_for(self, bitrate_bps: float) -> int:
        """The most rows of codes whose packed rate is not above `bitrate_bps`, and the fewest there can be if none is.

        EnCodec names its rates so: 1.5, 3, 6, 12 and 24 kbps are 2, 4, 8, 16 and 32 rows at 24 kHz.
        """
        fitting = [rows for rows in self.valid_num_quantizers if self.bitrate_bps(rows) <= bitrate_bps]
        return max(fitting, default=self.valid_num_quantizers[0])

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def _is_made_of_steps(self) -> bool:
        return self.config.causal and self.config.pad_mode == "zero"

    def _set_reach(self) -> None:
        # The first frame may hear further ahead than others, for what is mirrored, so both it and a late one count.
        first, late, hop = 0, 2**40, self.hop_length
        ahead = [self.encoder.reach(frame, frame)[1] - (frame + 1) * hop + 1 for frame in (first, late)]
        heard = {frame: self.decoder.reach(frame * hop, (frame + 1) * hop - 1) for frame in (first, late)}
        self.encode_delay_samples = min(UNLIMITED, max(ahead))
        self.encode_samples_before = min(UNLIMITED, late * hop - self.encoder.reach(late, late)[0])
        self.decode_frames_before = min(UNLIMITED, late - heard[late][0])
        self.decode_frames_after = min(UNLIMITED, max(last - frame for frame, (_, last) in heard.items()))

    def _check_streamable(self) -> None:
        if not self.is_streamable:
            raise ValueError("this codec is not causal and cannot stream; encode and decode whole recordings")

    def _checked_tokens(self, tokens: Tokens) -> int:
        longest = super()._checked_tokens(tokens)
        if tokens.global_codes is not None:
            raise ValueError("this codec has no global codes")
        if self.config.normalize_loudness != (tokens.scales is not None):
            raise ValueError(f"this codec's tokens have {'' if self.config.normalize_loudness else 'no '}scales")
        if tokens.scales is not None and tokens.scales.shape[1] < len(self._segments(longest)):
            raise ValueError(f"{longest} samples need more than the {tokens.scales.shape[1]} scales that are there")
        return longest

    def _segments(self, num_samples: int) -> list[tuple[int, int, slice]]:
        """First and last sample (exclusive) of each segment, and where its frames lie."""
        length, stride = self.config.segment_samples or num_samples, self.config.segment_stride_samples or num_samples
        segments, frame = [], 0
        for first in range(0, num_samples, max(stride, 1)):
            last = min(first + length, num_samples)
            after = frame - (first - last) // self.hop_length
            segments.append((first, last, slice(frame, after)))
            frame = after
        return segments

    def _whole(self, network: SignalLayer, x: Tensor, inputs_per_frame: int) -> Tensor:
        """A network's outputs for a whole signal; in pieces where it is causal, so that hours need little memory."""
        if not self.config.causal:
            whole: Tensor = network(x)
            return whole
        state, parts = network.init_state(x.shape[0]), []
        *pieces, rest = x.split(self._offline_frames(x.shape[0]) * inputs_per_frame, dim=2)
        for piece in pieces:
            part, state = network.step(piece, state)
            parts.append(part)
        return torch.cat([*parts, network.finish(rest, state)], dim=2)


def encoder_layers(config: SEANetConfig) -> list[SignalLayer]:
    """Audio [B, C, T] -> latents [B, D, ceil(T / hop_length)]."""
    width = config.num_filters
    layers: list[SignalLayer] = [_conv(config, config.num_channels, width, config.kernel_size)]
    for ratio in reversed(config.ratios):
        layers += _residual_blocks(config, width)
        layers += [_activation(config, width), _conv(config, width, 2 * width, 2 * ratio, stride=ratio)]
        width *= 2
    if config.num_lstm_layers:
        layers.append(LSTM(width, config.num_lstm_layers, bidirectional=config.bidirectional_lstm))
        width *= 2 if config.bidirectional_lstm else 1
    last_kernel_size = config.encoder_last_kernel_size or config.last_kernel_size
    last = _conv(config, width, config.quantizer.latent_dim, last_kernel_size)
    return [*layers, _activation(config, width), last]


def decoder_layers(config: SEANetConfig) -> list[SignalLayer]:
    """Latents [B, D, F] -> audio [B, C, F * hop_length]."""
    width = config.num_filters * 2 ** len(config.ratios)
    layers: list[SignalLayer] = [_conv(config, config.quantizer.latent_dim, width, config.kernel_size)]
    if config.num_lstm_layers:
        layers.append(LSTM(width, config.num_lstm_layers))
    for ratio in config.ratios:
        grouped = config.norm == "group"
        layers += [
            _activation(config, width),
            ConvTranspose(width, width // 2, 2 * ratio, stride=ratio, causal=config.causal, group_norm=grouped),
        ]
        width //= 2
        layers += _residual_blocks(config, width)
    last = _conv(config, width, config.num_channels, config.last_kernel_size)
    return [*layers, _activation(config, width), last]


def _residual_blocks(config: SEANetConfig, width: int) -> list[SignalLayer]:
    narrow = width // config.compress
    return [
        ResidualBlock(
            width,
            [
                _activation(config, width),
                _conv(config, width, narrow, config.residual_kernel_size, dilation=config.dilation_base**block),
                _activation(config, narrow),
                _conv(config, narrow, width, 1),
            ],
            _conv(config, width, width, 1) if config.conv_shortcut else None,
        )
        for block in range(config.num_residual_blocks)
    ]


def _activation(config: SEANetConfig, width: int) -> SignalLayer:
    return Snake(width) if config.activation == "snake" else ELU()


def _conv(
    config: SEANetConfig, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1
) -> Conv:
    return Conv(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        dilation=dilation,
        causal=config.causal,
        pad_mode=config.pad_mode,
        group_norm=config.norm == "group",
    )


def _loudness(audio: Tensor) -> Tensor:
    """Root mean square of the mean of all channels [B, 1, 1], never quite zero. Source: EnCodec, section 3.1."""
    return audio.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + 1e-8


def _overlap_add(parts: list[Tensor], stride: int | None) -> Tensor:
    """Segments [B, C, n], one every `stride` samples, as one signal; a weighted mean where they overlap.

    The weights are a triangle over the first segment's length.

    Source: EnCodec as published, `_linear_overlap_add` in utils.py.
    """
    if stride is None or len(parts) == 1:
        return parts[0]
    length = parts[0].shape[2]
    ramp = torch.linspace(0, 1, length + 2, dtype=parts[0].dtype, device=parts[0].device)[1:-1]
    weight = 0.5 - (ramp - 0.5).abs()
    total = parts[0].new_zeros(*parts[0].shape[:2], stride * (len(parts) - 1) + parts[-1].shape[2])
    # A short segment before the last may reach further than the last one does.
    total_weight = total.new_zeros(total.shape[2])
    for i, part in enumerate(parts):
        at = slice(i * stride, i * stride + part.shape[2])
        part = part[:, :, : total[:, :, at].shape[2]]
        total[:, :, at] += weight[: part.shape[2]] * part
        total_weight[at] += weight[: part.shape[2]]
    return total / total_weight
