"""Random crops of recordings, at the rate and with the channels of a model. Item i follows from (seed, i) alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from codec.audio import AudioError, fit_length, resample, resampled_length
from recipes.augment import Augmentation
from recipes.corpora import Corpus, to_channels
from recipes.recordings import Recording, Skipped

_MAX_DRAWS = 20  # recordings that may fail in a row
_QUIET_DRAWS = 3  # crops that are drawn again because they are quiet
# How far the filters of `resample` reach, in samples of the lower of both rates: measured for ten pairs of rates, this
# many samples beyond a crop bring it to -128 dB of what a resampling of the whole file gives (64 samples: -68 dB).
_RESAMPLING_CONTEXT = 128


@dataclass(frozen=True, slots=True)
class Place:
    """Where a crop comes from: the first sample is counted at the recording's own rate."""

    source: str
    recording: Recording
    first_sample: int

    @property
    def first_second(self) -> float:
        """Where the crop begins, in seconds from the beginning of the recording."""
        return self.first_sample / self.recording.sample_rate_hz

    def __str__(self) -> str:
        return f"{self.recording.path} of {self.source} from sample {self.first_sample}"


class Pool:
    """The recordings of several corpora, each drawn in proportion to its seconds and the weights of its corpus.

    `corpora` come with a weight each, and `corpus_weights` adds factors by the corpus that a recording says it is of
    (1.0 where unnamed); 0 leaves out. What has neither one channel nor `num_channels` can only be mixed down, to one.
    ValueError where nothing is left.
    """

    def __init__(
        self,
        corpora: Sequence[tuple[Corpus, float]],
        *,
        sample_rate_hz: int,
        num_channels: int = 1,
        corpus_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.sample_rate_hz, self.num_channels = sample_rate_hz, num_channels
        self.skipped = [skipped for corpus, _ in corpora for skipped in corpus.skipped]
        self._corpora = [corpus for corpus, _ in corpora]
        factors = dict(corpus_weights or {})
        sources = ", ".join(str(corpus.source) for corpus in self._corpora)
        unknown = set(factors) - {recording.corpus for corpus in self._corpora for recording in corpus.recordings}
        if unknown:
            raise ValueError(f"corpus_weights names {sorted(unknown)}, which {sources} does not hold")
        for weight in [*factors.values(), *(weight for _, weight in corpora)]:
            if not (math.isfinite(weight) and weight >= 0.0):
                raise ValueError(f"a weight must be finite and not negative, not {weight}")
        chosen: list[tuple[int, int, float, int]] = []
        for number, (corpus, weight) in enumerate(corpora):
            for index, recording in enumerate(corpus.recordings):
                if num_channels not in (1, recording.num_channels) and recording.num_channels != 1:
                    reason = f"it has {recording.num_channels} channels, neither 1 nor {num_channels}"
                    self.skipped.append(Skipped(recording.path, reason))
                    continue
                mass = recording.seconds * weight * factors.get(recording.corpus, 1.0)
                if mass > 0.0:
                    chosen.append((number, index, mass, self._length(recording)))
        if not chosen:
            raise ValueError(f"{sources}: weights and numbers of channels leave nothing to draw")
        # Arrays, since a list's objects would be copied into every worker as soon as they are counted.
        self._corpus = np.array([entry[0] for entry in chosen])
        self._index = np.array([entry[1] for entry in chosen])
        self._cumulative = np.cumsum([entry[2] for entry in chosen])
        self.num_recordings = len(chosen)
        self.longest_samples = max(entry[3] for entry in chosen)  # at the pool's rate
        self._told: set[str] = set()
        self._entries: dict[tuple[str, str], tuple[int, int]] | None = None  # built where references are drawn

    def recordings(self) -> Iterator[tuple[str, Recording]]:
        """All that can be drawn, each with the name of its source."""
        for corpus, index in zip(self._corpus, self._index, strict=True):
            yield str(self._corpora[corpus].source), self._corpora[corpus].recordings[index]

    def draw(
        self, rng: np.random.Generator, num_samples: int, num_before: int = 0, num_after: int = 0
    ) -> tuple[np.ndarray, Place]:
        """A random stretch as float32 [C, num_before + num_samples + num_after]; zeros for what a recording lacks.

        `num_before` and `num_after` count samples before and after the stretch. A recording that cannot be read is
        warned about, and the next draw takes its place; after 20 such in a row, AudioError.
        """
        last: AudioError | None = None
        for _ in range(_MAX_DRAWS):
            drawn = np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1], side="right")
            entry = min(int(drawn), self.num_recordings - 1)
            corpus, index = self._corpora[self._corpus[entry]], int(self._index[entry])
            recording = corpus.recordings[index]
            slack = self._length(recording) - num_samples
            first = int(rng.integers(slack + 1)) if slack > 0 else 0
            try:
                audio = read_stretch(
                    corpus,
                    index,
                    first - num_before,
                    first + num_samples + num_after,
                    sample_rate_hz=self.sample_rate_hz,
                    num_channels=self.num_channels,
                )
            except AudioError as error:
                last = error
                if recording.path not in self._told:
                    self._told.add(recording.path)
                    warnings.warn(f"{error}; another recording takes its place", RuntimeWarning, stacklevel=2)
                continue
            first_sample = first * recording.sample_rate_hz // self.sample_rate_hz
            return audio, Place(str(corpus.source), recording, first_sample)
        raise AudioError(f"{_MAX_DRAWS} recordings in a row could not be read, the last: {last}")

    def draw_reference(
        self, rng: np.random.Generator, place: Place, num_crop_samples: int, num_samples: int
    ) -> np.ndarray:
        """A random stretch [C, num_samples] of the recording that a crop is of, to know the voice by.

        The crop itself is silenced in it where at least a quarter of the stretch is left. A recording that is too short
        is repeated.
        """
        corpus, index = self._find(place)
        recording = place.recording
        length = self._length(recording)
        first = int(rng.integers(max(0, length - num_samples) + 1))
        audio = read_stretch(
            corpus,
            index,
            first,
            min(length, first + num_samples),
            sample_rate_hz=self.sample_rate_hz,
            num_channels=self.num_channels,
        )
        begin = place.first_sample * self.sample_rate_hz // recording.sample_rate_hz - first
        at = np.arange(audio.shape[1])
        is_crop = (at >= begin) & (at < begin + num_crop_samples)
        if np.count_nonzero(~is_crop) >= num_samples // 4:
            audio = np.where(is_crop, 0.0, audio).astype(np.float32)
        return np.tile(audio, -(-num_samples // audio.shape[1]))[:, :num_samples]

    def _find(self, place: Place) -> tuple[Corpus, int]:
        """The corpus of a crop, and its recording's index there."""
        if self._entries is None:
            self._entries = {
                (str(self._corpora[corpus].source), self._corpora[corpus].recordings[index].path): (corpus, int(index))
                for corpus, index in zip(self._corpus, self._index, strict=True)
            }
        corpus, index = self._entries[place.source, place.recording.path]
        return self._corpora[corpus], index

    def _length(self, recording: Recording) -> int:
        return resampled_length(recording.num_samples, recording.sample_rate_hz, self.sample_rate_hz)

    def draw_loop(self, rng: np.random.Generator, num_samples: int) -> np.ndarray:
        """As `draw`; a recording that is too short is repeated. For noise."""
        audio, place = self.draw(rng, num_samples)
        length = self._length(place.recording)
        return np.tile(audio[:, :length], -(-num_samples // length))[:, :num_samples]

    def draw_response(self, rng: np.random.Generator) -> np.ndarray:
        """A recording as an impulse response [C, n] that begins with its peak, the direct sound, scaled to 1."""
        audio, place = self.draw(rng, self.longest_samples)
        audio = audio[:, : self._length(place.recording)]
        loudest = np.abs(audio).max(axis=0)
        direct = int(loudest.argmax())
        return (audio[:, direct:] / max(float(loudest[direct]), 1e-6)).astype(np.float32)


def read_stretch(
    corpus: Corpus, index: int, start: int, stop: int, *, sample_rate_hz: int, num_channels: int
) -> np.ndarray:
    """Samples start..stop of a recording at another rate and with other channels, zeros where it does not reach.

    The same to -128 dB wherever a stretch begins. AudioError as `Corpus.read`.
    """
    recording = corpus.recordings[index]
    from_hz, to_hz = recording.sample_rate_hz, sample_rate_hz
    first, last = max(0, start), min(stop, resampled_length(recording.num_samples, from_hz, to_hz))
    if from_hz == to_hz:
        audio = corpus.read(index, first, last - first)
    else:
        # Both rates have a sample at every `up`-th of the new ones: only there can resampling begin anew.
        up, down = to_hz // math.gcd(from_hz, to_hz), from_hz // math.gcd(from_hz, to_hz)
        context = math.ceil(_RESAMPLING_CONTEXT * to_hz / min(from_hz, to_hz))
        begin = max(0, first - context) // up
        end = min(recording.num_samples, -(-(last + context) * from_hz // to_hz))
        audio = resample(corpus.read(index, begin * down, end - begin * down), from_hz, to_hz)
        audio = audio[:, first - begin * up :][:, : last - first]
    audio = to_channels(audio, num_channels)
    return fit_length(np.pad(audio, ((0, 0), (first - start, 0))), stop - start)


class Crop(NamedTuple):
    """An item of `Crops`: the crop, its number, where it comes from, and what else is asked for.

    `reference`: another stretch, for the voice. `surround`: the crop with `context_samples` before and after it.
    """

    audio: Tensor  # float32 [C, crop_samples]
    item: int
    place: Place
    reference: Tensor | None = None  # float32 [C, reference_samples]
    surround: Tensor | None = None  # float32 [C, context_samples + crop_samples + context_samples]


class Crops(Dataset[Crop]):
    """Item i is a `Crop`, drawn from `pool` by (seed, i), without end.

    A crop whose RMS is below `min_rms_db` is drawn again, up to three times, so that long silences are seen but do not
    fill the batches. What `augmentation` draws is drawn apart: the crops are the same with and without it.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        crop_samples: int,
        seed: int,
        augmentation: Augmentation,
        min_rms_db: float = -45.0,
        reference_samples: int | None = None,
        context_samples: int = 0,
    ) -> None:
        self.pool = pool
        self.reference_samples = reference_samples
        self.context_samples = context_samples
        self.crop_samples = crop_samples
        self.seed = seed
        self.augmentation = augmentation
        self.min_rms = 10.0 ** (min_rms_db / 20.0)

    def __getitem__(self, item: int) -> Crop:
        rng = np.random.default_rng((self.seed, item, 1))
        response = self.augmentation.draw_room(rng)
        crop, place = self._draw(item, response.shape[1] - 1)
        audio = torch.from_numpy(np.ascontiguousarray(self.augmentation(crop, response, rng)))
        reference = None
        if self.reference_samples is not None:
            rng = np.random.default_rng((self.seed, item, 2))
            drawn = self.pool.draw_reference(rng, place, self.crop_samples, self.reference_samples)
            reference = torch.from_numpy(np.ascontiguousarray(drawn))
        if not self.context_samples:
            return Crop(audio, item, place, reference)
        inner = audio[:, self.context_samples :][:, : self.crop_samples].clone()
        return Crop(inner, item, place, reference, surround=audio)

    def _draw(self, item: int, num_before: int) -> tuple[np.ndarray, Place]:
        rng = np.random.default_rng((self.seed, item))
        num_before, num_after = num_before + self.context_samples, self.context_samples
        for _ in range(_QUIET_DRAWS):
            crop, place = self.pool.draw(rng, self.crop_samples, num_before, num_after)
            if np.sqrt(np.mean(np.square(crop[:, num_before:][:, : self.crop_samples]))) >= self.min_rms:
                return crop, place
        return self.pool.draw(rng, self.crop_samples, num_before, num_after)
