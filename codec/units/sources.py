"""What speech units are made of: a layer of a frozen speech model, the latents of a codec, or log-mels.

Letters: T samples, F frames, D dims.

    source = speech_model_source("folder/of/hubert", layer=6)   # as `codec.features.load_speech_model` takes them
    source = codec_source("speech_16k", num_quantizers=1)       # as `codec.load` does; its first row of codes
    source = log_mel_source()                                   # no model at all
    features = source.features(audio)                           # float32 [F, D]

A source's configuration says which model it is of, down to the version of the weights; made again from it, a source
refuses another model's weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codec import config as codec_config
from codec.config import register
from codec.features import load_speech_model
from codec.pretrained import load
from codec.speech_input import Entrance

_PIECE_SECONDS, _CONTEXT_SECONDS = 60, 5


@dataclass(frozen=True, kw_only=True)
class UnitSourceConfig:
    """Base of the configurations of sources."""


class UnitSource(ABC):
    """Features of recordings. `features` depends on nothing but the recording's own samples.

    Frame i is of samples i * `stride_samples` to (i + 1) * `stride_samples` of audio at `sample_rate_hz`, and there are
    ceil(T / stride_samples).
    """

    config: UnitSourceConfig
    sample_rate_hz: int
    stride_samples: int
    feature_dim: int
    name: str  # of the model, for people

    @property
    def frame_rate_hz(self) -> float:
        """Frames a second."""
        return self.sample_rate_hz / self.stride_samples

    @abstractmethod
    def to(self, device: str | torch.device) -> UnitSource:
        """Itself, after its model has moved there."""

    @abstractmethod
    def _hear(self, audio: Tensor) -> Tensor:
        """Features [F, D] of audio [T], T > 0."""

    @torch.no_grad()
    def features(self, audio: Tensor) -> Tensor:
        """Features float32 [F, D] of audio float [T], on the audio's device; no gradient.

        Recordings longer than 65 s are heard in pieces of 60 s, with 5 s more on both sides whose frames are not kept.
        """
        if audio.dim() != 1 or not audio.is_floating_point():
            raise ValueError(f"audio must be floating-point [T], not {audio.dtype} {list(audio.shape)}")
        if not torch.isfinite(audio).all():
            raise ValueError("audio holds NaN or infinity")
        stride, num_frames = self.stride_samples, -(-len(audio) // self.stride_samples)
        if not num_frames:
            return audio.new_zeros((0, self.feature_dim), dtype=torch.float32)
        piece, context = (round(seconds * self.frame_rate_hz) for seconds in (_PIECE_SECONDS, _CONTEXT_SECONDS))
        # The last piece takes in what would be shorter than its context.
        starts = [0, *range(piece, num_frames - context, piece)]
        parts = []
        for start, stop in zip(starts, [*starts[1:], num_frames], strict=True):
            first = max(0, start - context)
            heard = self._hear(audio[first * stride : (stop + context) * stride].float())
            parts.append(heard[start - first : stop - first])
        return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class SpeechModelSourceConfig(UnitSourceConfig):
    """`source` as `load_speech_model` takes it. `version`: of the model that is meant; "" is whichever is there."""

    source: str
    layer: int
    version: str = ""


@register("speech_model", SpeechModelSourceConfig)
class SpeechModelSource(UnitSource):
    """A layer of a frozen speech model, numbered as in `codec.features`."""

    def __init__(self, config: SpeechModelSourceConfig) -> None:
        self._model = load_speech_model(config.source)
        self._model.layer_numbers(config.layer)
        # The name in front is the folder's, which may have been moved.
        if config.version and _weights(config.version) != _weights(self._model.version):
            raise ValueError(f"{config.source} is {self._model.version}; these units are of {config.version}")
        self.config = replace(config, version=self._model.version)
        self.name = f"{self._model.version}, layer {config.layer}"
        self.sample_rate_hz, self.stride_samples = self._model.sample_rate_hz, self._model.stride_samples
        self.feature_dim = self._model.feature_dim
        self._layer = config.layer

    def to(self, device: str | torch.device) -> UnitSource:
        self._model.to(device)
        return self

    def _hear(self, audio: Tensor) -> Tensor:
        values: Tensor = self._model(audio[None], layers=self._layer).values
        return values[0]


def _weights(version: str) -> str:
    return version.rpartition(", weights ")[2]


@dataclass(frozen=True, kw_only=True)
class CodecSourceConfig(UnitSourceConfig):
    """`source` as `codec.load` takes it; `codec_id`: of the codec that is meant, "" is whichever is there.

    `num_quantizers`: 0 for the latents before the quantizer, else for what the first rows of codes make of them.
    """

    source: str
    num_quantizers: int = 0
    codec_id: str = ""


@register("codec", CodecSourceConfig)
class CodecSource(UnitSource):
    """The latents of a codec, as they are, or as its first rows of codes tell them."""

    def __init__(self, config: CodecSourceConfig) -> None:
        self._codec = codec = load(config.source)
        if config.codec_id and config.codec_id != codec.codec_id:
            raise ValueError(
                f"{config.source} is {codec.name}, id {codec.codec_id}; these units are of id {config.codec_id}"
            )
        if codec.num_channels != 1:
            raise ValueError(f"{codec.name} takes {codec.num_channels} channels; units are of one")
        if config.num_quantizers:
            codec.quantizer.check_num_quantizers(config.num_quantizers)
        self.config = replace(config, codec_id=codec.codec_id)
        rows = f"first {config.num_quantizers} rows" if config.num_quantizers else "latents"
        self.name = f"{codec.name}, id {codec.codec_id}, {rows}"
        self.sample_rate_hz, self.stride_samples = codec.sample_rate_hz, codec.hop_length
        self._num_quantizers = config.num_quantizers
        self.feature_dim = self._hear(torch.zeros(codec.hop_length)).shape[1]

    def to(self, device: str | torch.device) -> UnitSource:
        self._codec.to(device)
        return self

    @torch.no_grad()
    def _hear(self, audio: Tensor) -> Tensor:
        if not self._num_quantizers:
            return self._codec.analyze(audio[None, None])[0].T.float()
        tokens = self._codec.encode(audio[None, None], num_quantizers=self._num_quantizers)
        return self._codec.quantizer.decode(tokens.codes)[0].T.float()


@dataclass(frozen=True, kw_only=True)
class LogMelSourceConfig(UnitSourceConfig):
    """`num_bands` mel bands from 20 Hz up to half the sampling rate."""

    sample_rate_hz: int = 16000
    num_bands: int = 80

    def __post_init__(self) -> None:
        if self.sample_rate_hz < 1000 or self.sample_rate_hz % 200:
            raise ValueError(f"sample_rate_hz={self.sample_rate_hz} is no multiple of 200 from 1000 up")
        if self.num_bands < 1:
            raise ValueError(f"num_bands must be positive, not {self.num_bands}")


@register("log_mel", LogMelSourceConfig)
class LogMelSource(UnitSource):
    """Log-mels, two columns of 10 ms in a frame of 20 ms, each band normalised over the recording."""

    def __init__(self, config: LogMelSourceConfig) -> None:
        self.config = config
        self.name = f"log-mels, {config.num_bands} bands"
        hop, window = config.sample_rate_hz // 100, config.sample_rate_hz // 40
        self.sample_rate_hz, self.stride_samples = config.sample_rate_hz, 2 * hop
        self.feature_dim = 2 * config.num_bands
        num_bins = (1 << (window - 1).bit_length()) // 2 + 1
        self._entrance = Entrance(
            config.sample_rate_hz,
            2 * hop,
            hop + window,
            mel_filters=_mel_filters(num_bins, config.num_bands, config.sample_rate_hz),
            # Source: Kaldi's "povey" window.
            window=torch.hann_window(window, periodic=False, dtype=torch.float64) ** 0.85,
            num_columns=2,
        )

    def to(self, device: str | torch.device) -> UnitSource:
        self._entrance.to(device)
        return self

    def _hear(self, audio: Tensor) -> Tensor:
        heard: Tensor = self._entrance(audio[None], "centered")
        return heard[0]


def _mel_filters(num_bins: int, num_bands: int, sample_rate_hz: int) -> Tensor:
    """Triangles of height 1 over the mel scale, side by side from 20 Hz to half the rate: float64 [bins, bands]."""

    def mel(hz: float) -> float:
        return 1127.0 * math.log1p(hz / 700.0)

    corners = torch.linspace(mel(20.0), mel(sample_rate_hz / 2), num_bands + 2, dtype=torch.float64)
    bins = 1127.0 * torch.log1p(torch.linspace(0.0, sample_rate_hz / 2, num_bins, dtype=torch.float64) / 700.0)
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins[:, None] - left) / (middle - left)
    falling = (right - bins[:, None]) / (right - middle)
    return torch.minimum(rising, falling).clamp_min(0.0)


def speech_model_source(source: str, layer: int) -> UnitSource:
    """A layer of a speech model. ValueError as `load_speech_model`, and for layers that it does not have."""
    return _built(SpeechModelSourceConfig(source=source, layer=layer))


def codec_source(source: str, *, num_quantizers: int = 0) -> UnitSource:
    """The latents of a codec; of its first `num_quantizers` rows of codes, if not 0. ValueError as `codec.load`."""
    return _built(CodecSourceConfig(source=source, num_quantizers=num_quantizers))


def log_mel_source(*, sample_rate_hz: int = 16000, num_bands: int = 80) -> UnitSource:
    """Log-mels. ValueError for rates of which 5 ms are no whole samples."""
    return _built(LogMelSourceConfig(sample_rate_hz=sample_rate_hz, num_bands=num_bands))


def _built(config: UnitSourceConfig) -> UnitSource:
    source: UnitSource = codec_config.build(config)
    return source
