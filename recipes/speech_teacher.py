"""A frozen speech model as a teacher: what it makes of every crop, at the frames of the codec.

    teacher: {type: speech_teacher, source: FOLDER, layers: 9}                     # the model hears every crop
    teacher: {type: speech_teacher, source: FOLDER, layers: 9, cache: FEATURES}    # read from a cache instead

Without a cache the model hears the very crop that the codec hears, noise and reverberation included, and nothing beyond
its ends. With a cache (`tools/cache_features.py`) targets are of the recording as it is, heard as a whole. It is far
faster, but does not know what augmentation does to the crop; the model is loaded once, to see that the cache is of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchaudio.functional import resample

from codec.config import register
from codec.features import Features, SpeechModel, at_frames, load_speech_model
from recipes.crops import Place
from recipes.data import Batch, SpeechData
from recipes.feature_cache import CacheKey, FeatureCache
from recipes.targets import LayeredTeacherConfig, Targets


@dataclass(frozen=True, kw_only=True)
class SpeechTeacherConfig(LayeredTeacherConfig):
    """`source` as in `codec.features.load_speech_model`. `cache`: a folder of precomputed features, or null."""

    cache: str | None = None


@register("speech_teacher", SpeechTeacherConfig)
class SpeechTeacher:
    """See the module. ValueError where there is no such model, layer or cache, or the cache is of another teacher."""

    feature_dim: int
    num_mixed_layers: int | None  # for "weighted": targets are [B, F, L, D]
    version: str

    def __init__(self, config: SpeechTeacherConfig) -> None:
        model = load_speech_model(config.source)
        self.config = config
        self.key = CacheKey.of(model, config.layers)
        self.version, self.feature_dim = str(self.key), model.feature_dim
        self.num_mixed_layers = None if self.key.is_averaged else self.key.num_kept
        self.model: SpeechModel | None = model
        self.cache: FeatureCache | None = None
        if config.cache is not None:
            self.model, self.cache = None, FeatureCache(Path(config.cache))
            self.cache.check(self.key)

    def check(self, data: SpeechData) -> None:
        """ValueError where the cache lacks a recording that may be drawn, or holds it as it was before."""
        if self.cache is not None:
            self.cache.check_recordings(data.recordings())

    @torch.no_grad()
    def targets(self, batch: Batch, *, sample_rate_hz: int, num_frames: int, frame_rate_hz: float) -> Targets:
        """Of crops [B, C, T] with `num_frames` frames of the codec: values [B, F, D] or [B, F, L, D], on their device.

        Frames beyond the end of a recording, where a crop holds zeros, have no target. ValueError where the frames are
        not those of audio as long as the crops: teacher rate against codec rate.
        """
        audio = batch.audio
        seconds, rate_hz = audio.shape[2] / sample_rate_hz, self.key.frame_rate_hz
        if abs(num_frames / frame_rate_hz - seconds) > 1 / frame_rate_hz + 1 / rate_hz:
            raise ValueError(
                f"teacher rate against codec rate: {num_frames} frames at {frame_rate_hz:g} Hz are not the "
                f"{seconds:.3f} s of a crop"
            )
        if self.cache is None:
            features, start = self._heard(batch, sample_rate_hz), torch.zeros(len(audio))
        else:
            features, start = self._cached(batch, seconds)
        features = Features(features.values.to(audio.device), features.num_frames.to(audio.device))
        values, mask = at_frames(
            features, from_hz=rate_hz, to_hz=frame_rate_hz, num_frames=num_frames, start_seconds=start
        )
        if self.num_mixed_layers is not None:
            values = values.unflatten(2, (self.num_mixed_layers, self.feature_dim))
        return Targets(values, mask)

    def _heard(self, batch: Batch, sample_rate_hz: int) -> Features:
        """What the model makes of the crops now: values [B, F, D], or layers side by side [B, F, L * D]."""
        assert self.model is not None
        audio, rate_hz = batch.audio, self.model.sample_rate_hz
        model = self.model.to(audio.device)
        with torch.autocast(audio.device.type, enabled=False):
            mono = resample(audio.float().mean(1), sample_rate_hz, rate_hz)
            num_samples = torch.tensor([_num_samples(place, rate_hz, mono.shape[1]) for place in batch.places])
            if self.key.is_averaged:
                features: Features = model(mono, num_samples, layers=self.key.layers)
                return features
            states, num_frames = model.hidden(mono, num_samples)
        return Features(states.permute(1, 2, 0, 3).flatten(2), num_frames)

    def _cached(self, batch: Batch, seconds: float) -> tuple[Features, Tensor]:
        """The stretches of recordings that hold the crops, as `_heard`, and where crops begin in them, in seconds."""
        assert self.cache is not None
        rate_hz = self.key.frame_rate_hz
        num_frames = math.ceil(seconds * rate_hz) + 3  # with one before, one after, and one that is cut
        width = self.key.num_kept * self.feature_dim
        values, lengths = torch.zeros(len(batch.places), num_frames, width), []
        start = torch.zeros(len(batch.places), dtype=torch.float64)
        for row, place in enumerate(batch.places):
            first = max(0, math.floor(place.first_second * rate_hz) - 1)
            stretch = self.cache.read(place.source, place.recording, first, num_frames)
            values[row, : len(stretch)] = torch.from_numpy(stretch).flatten(1)
            lengths.append(len(stretch))
            start[row] = place.first_second - first / rate_hz
        return Features(values, torch.tensor(lengths)), start


def _num_samples(place: Place, rate_hz: int, most: int) -> int:
    """How many samples of a crop its recording reaches, at this rate."""
    left = place.recording.num_samples - place.first_sample
    return min(most, max(1, math.ceil(left * rate_hz / place.recording.sample_rate_hz)))
