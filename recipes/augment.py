"""What is done to a crop before the model sees it: reverberation, noise, level. Every draw comes from the caller.

And, for what must not change with them, distortions of whole recordings, which say the same afterwards: other speed,
other pitch, noise, a room.

Audio is float32 [C, T], full scale at -1..1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from codec.audio import fit_length, resample

# Draws a stretch of so many samples, [C, num_samples], at the rate and with the channels of the crop.
DrawAudio = Callable[[np.random.Generator, int], np.ndarray]

_SILENCE_LUFS = -70.0  # Source: ITU-R BS.1770-4, annex 1, the absolute gate


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges are [lowest, highest], drawn from uniformly, for every crop anew.

    loudness_lufs: crops are brought to this loudness (ITU-R BS.1770); None leaves their own. DAC trains at -16.
    gain_db: gain after that, held back where it would clip.
    noise_probability, noise_snr_db: the share of crops that get noise, and the crop's power relative to it.
    reverb_probability: the share of crops that is reverberated.
    reverb_decay_ms: of artificial rooms, the time in which reverberation falls by 60 dB.
    reverb_direct_db: of artificial rooms, the power of the direct sound relative to the reverberation.
    """

    loudness_lufs: float | None = None
    gain_db: tuple[float, float] = (0.0, 0.0)
    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (5.0, 30.0)
    reverb_probability: float = 0.0
    reverb_decay_ms: tuple[float, float] = (100.0, 600.0)
    reverb_direct_db: tuple[float, float] = (0.0, 15.0)

    def __post_init__(self) -> None:
        for name in ("gain_db", "noise_snr_db", "reverb_decay_ms", "reverb_direct_db"):
            low, high = getattr(self, name)
            if not (np.isfinite([low, high]).all() and low <= high):
                raise ValueError(f"{name} must be [lowest, highest], not [{low}, {high}]")
        for name in ("noise_probability", "reverb_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in 0..1, not {getattr(self, name)}")
        if self.reverb_decay_ms[0] <= 0.0:
            raise ValueError(f"reverb_decay_ms must be positive, not {list(self.reverb_decay_ms)}")
        if self.loudness_lufs is not None and not _SILENCE_LUFS < self.loudness_lufs <= 0.0:
            raise ValueError(f"loudness_lufs must lie in {_SILENCE_LUFS:g}..0, not {self.loudness_lufs}")


class Augmentation:
    """Changes crops as `config` says.

    `noise` draws noise, and `room` an impulse response [C, n], the direct sound first; without it rooms are artificial.

    Use it in two steps, since the reverberation of a crop begins before it: `draw_room`, then `__call__` on a crop with
    that many more samples at its front.

    >>> augmentation = Augmentation(AugmentConfig(reverb_probability=1.0), sample_rate_hz=16000, num_channels=1)
    >>> rng = np.random.default_rng(0)
    >>> response = augmentation.draw_room(rng)
    >>> crop = rng.normal(size=(1, response.shape[1] - 1 + 8000)).astype(np.float32)
    >>> augmentation(crop, response, rng).shape
    (1, 8000)
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        sample_rate_hz: int,
        num_channels: int,
        noise: DrawAudio | None = None,
        room: Callable[[np.random.Generator], np.ndarray] | None = None,
    ) -> None:
        if config.noise_probability > 0.0 and noise is None:
            raise ValueError(f"noise_probability is {config.noise_probability}, but there is no source of noise")
        self.config = config
        self.sample_rate_hz, self.num_channels = sample_rate_hz, num_channels
        self._noise = noise
        self._room = room or self._artificial_room

    def draw_room(self, rng: np.random.Generator) -> np.ndarray:
        """An impulse response [C, n], the direct sound at its first sample; of length 1 where there is no reverb."""
        if rng.random() < self.config.reverb_probability:
            return self._room(rng)
        return np.ones((self.num_channels, 1), np.float32)

    def __call__(self, audio: np.ndarray, response: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[C, n - 1 + T] and the response [C, n] that was drawn for it become [C, T]. It never clips."""
        audio = reverberate(audio, response)
        if self._noise is not None and rng.random() < self.config.noise_probability:
            snr_db = rng.uniform(*self.config.noise_snr_db)
            audio = add_noise(audio, self._noise(rng, audio.shape[1]), snr_db)
        gain_db = rng.uniform(*self.config.gain_db)
        if self.config.loudness_lufs is not None:
            loudness = loudness_lufs(audio, self.sample_rate_hz)
            if loudness > _SILENCE_LUFS:  # silence stays silence
                gain_db += self.config.loudness_lufs - loudness
        peak = float(np.abs(audio).max())
        levelled: np.ndarray = audio * np.float32(min(10.0 ** (gain_db / 20.0), 1.0 / max(peak, 1e-6)))
        return levelled

    def _artificial_room(self, rng: np.random.Generator) -> np.ndarray:
        config = self.config
        return artificial_room(
            rng, config.reverb_decay_ms, config.reverb_direct_db,
            sample_rate_hz=self.sample_rate_hz, num_channels=self.num_channels,
        )  # fmt: skip


DISTORTIONS = ("stretch", "pitch", "noise", "reverb")


@dataclass(frozen=True)
class DistortionConfig:
    """Ranges are [lowest, highest], drawn from uniformly.

    stretch: how many times as fast speech becomes. pitch_semitones: by how much it rises. Others: see `AugmentConfig`.
    """

    stretch: tuple[float, float] = (0.8, 1.2)
    pitch_semitones: tuple[float, float] = (-4.0, 4.0)
    noise_snr_db: tuple[float, float] = (5.0, 15.0)
    reverb_decay_ms: tuple[float, float] = (100.0, 600.0)
    reverb_direct_db: tuple[float, float] = (0.0, 15.0)

    def __post_init__(self) -> None:
        for name in ("stretch", "pitch_semitones", "noise_snr_db", "reverb_decay_ms", "reverb_direct_db"):
            low, high = getattr(self, name)
            if not (np.isfinite([low, high]).all() and low <= high):
                raise ValueError(f"{name} must be [lowest, highest], not [{low}, {high}]")
        if min(self.stretch[0], self.reverb_decay_ms[0]) <= 0.0:
            raise ValueError("stretch and reverb_decay_ms must be positive")


class Distortion:
    """Distorts recordings in one of the ways `kinds`, as many of `DISTORTIONS` as there is a source of noise for.

    Source of the ways and their ranges: Gat et al., "Augmentation invariant discrete representation for generative
    spoken language modeling" (2022), section 5, as remembered; rooms are simulated by their geometry there.

    >>> distortion = Distortion(DistortionConfig(), sample_rate_hz=16000)
    >>> distortion.kinds
    ('stretch', 'pitch', 'reverb')
    >>> distortion("pitch", np.zeros((1, 8000), np.float32), np.random.default_rng(0)).shape
    (1, 8000)
    """

    def __init__(self, config: DistortionConfig, *, sample_rate_hz: int, noise: DrawAudio | None = None) -> None:
        self.config, self.sample_rate_hz = config, sample_rate_hz
        self.kinds = tuple(kind for kind in DISTORTIONS if kind != "noise" or noise is not None)
        self._noise = noise

    def __call__(self, kind: str, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Audio [C, T] -> [C, T], or as much longer or shorter as it was stretched. It never clips."""
        if kind not in self.kinds:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(self.kinds)}")
        config = self.config
        if kind == "stretch":
            distorted = time_stretch(audio, rng.uniform(*config.stretch), sample_rate_hz=self.sample_rate_hz)
        elif kind == "pitch":
            distorted = shift_pitch(audio, rng.uniform(*config.pitch_semitones), sample_rate_hz=self.sample_rate_hz)
        elif kind == "noise":
            assert self._noise is not None
            snr_db = rng.uniform(*config.noise_snr_db)
            distorted = add_noise(audio, self._noise(rng, audio.shape[1]), snr_db)
        else:
            response = artificial_room(
                rng, config.reverb_decay_ms, config.reverb_direct_db,
                sample_rate_hz=self.sample_rate_hz, num_channels=len(audio),
            )  # fmt: skip
            distorted = reverberate(np.pad(audio, ((0, 0), (response.shape[1] - 1, 0))), response)
        return distorted / np.float32(max(1.0, float(np.abs(distorted).max(initial=0.0))))


def time_stretch(audio: np.ndarray, rate: float, *, sample_rate_hz: int) -> np.ndarray:
    """[C, T] as [C, round(T / rate)]: `rate` times as fast, at the same pitch, by a phase vocoder.

    Source: Flanagan and Golden, "Phase vocoder" (1966); Laroche and Dolson, "Improved phase vocoder time-scale
    modification of audio" (1999), section II.
    """
    num_samples = round(audio.shape[1] / rate)
    size = 1 << (round(0.05 * sample_rate_hz) - 1).bit_length()  # 64 ms at 16 kHz
    hop = size // 4
    window = np.hanning(size + 1)[:-1]
    num_out = -(-num_samples // hop) + 1
    steps = np.arange(num_out) * rate  # where each frame that comes out lies among those that come in
    before = steps.astype(np.int64)
    padded = np.pad(audio.astype(np.float64), ((0, 0), (size // 2, (int(before[-1]) + 2) * hop + size)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size, axis=1)[:, ::hop][:, : before[-1] + 2]
    spectra = np.fft.rfft(frames * window)
    share = (steps - before)[:, None]
    magnitudes = (1 - share) * np.abs(spectra[:, before]) + share * np.abs(spectra[:, before + 1])
    # What a bin's phase gains from one frame to the next; whole turns do not matter, since frames stay as far apart.
    gain = np.angle(spectra[:, before + 1]) - np.angle(spectra[:, before])
    phases = np.angle(spectra[:, :1]) + np.cumsum(gain, axis=1) - gain
    pieces = np.fft.irfft(magnitudes * np.exp(1j * phases), size) * window
    result = np.zeros((len(audio), (num_out + 3) * hop))
    weight = np.zeros(result.shape[1])
    for piece in range(num_out):
        result[:, piece * hop : piece * hop + size] += pieces[:, piece]
        weight[piece * hop : piece * hop + size] += window**2
    stretched = (result / np.maximum(weight, 1e-3))[:, size // 2 :][:, :num_samples]
    return np.ascontiguousarray(stretched, np.float32)


def shift_pitch(audio: np.ndarray, semitones: float, *, sample_rate_hz: int) -> np.ndarray:
    """[C, T] with all frequencies higher by so many semitones, formants too, in the same time."""
    ratio = 2.0 ** (semitones / 12.0)
    slower = time_stretch(audio, 1.0 / ratio, sample_rate_hz=sample_rate_hz)
    return fit_length(resample(slower, round(sample_rate_hz * ratio), sample_rate_hz), audio.shape[1])


def artificial_room(
    rng: np.random.Generator,
    decay_ms: tuple[float, float],
    direct_db: tuple[float, float],
    *,
    sample_rate_hz: int,
    num_channels: int,
) -> np.ndarray:
    """An impulse response [C, n], the direct sound first: noise that decays exponentially, after the direct sound.

    Source: Polack, "La transmission de l'energie sonore dans les salles" (1988): the tail of a room's response is
    Gaussian noise under an exponential envelope.
    """
    decay_samples = rng.uniform(*decay_ms) * sample_rate_hz / 1000
    drawn_db = rng.uniform(*direct_db)
    num_samples = max(2, round(decay_samples))
    response = rng.standard_normal((num_channels, num_samples))
    response *= 10.0 ** (-3.0 * np.arange(num_samples) / decay_samples)
    response[:, 0] = 0.0
    response *= 10.0 ** (-drawn_db / 20.0) / np.sqrt(np.square(response).sum(axis=1, keepdims=True))
    response[:, 0] = 1.0
    return np.asarray(response, np.float32)


def reverberate(audio: np.ndarray, response: np.ndarray) -> np.ndarray:
    """[C, n - 1 + T] through a room [C, n]: the last T samples, as loud as they were."""
    num_before = response.shape[1] - 1
    dry = audio[:, num_before:]
    if num_before == 0:
        return dry
    size = 1 << (audio.shape[1] + num_before - 1).bit_length()
    spectrum = np.fft.rfft(audio.astype(np.float64), size) * np.fft.rfft(response.astype(np.float64), size)
    wet = np.fft.irfft(spectrum, size)[:, num_before : audio.shape[1]]
    scale = np.sqrt(_power(dry) / max(_power(wet), 1e-20))
    return np.asarray(wet * scale, np.float32)


def add_noise(audio: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """[C, T] with noise [C, T] at this ratio of powers; as it is where one of them is silent."""
    noise_power = _power(noise)
    if noise_power == 0.0:
        return audio
    scale = np.sqrt(_power(audio) / noise_power) * 10.0 ** (-snr_db / 20.0)
    return (audio + noise * np.float32(scale)).astype(np.float32)


def loudness_lufs(audio: np.ndarray, sample_rate_hz: int) -> float:
    """Integrated loudness of [C, T], mono or stereo; -inf where all of it is below the absolute gate of -70.

    What is shorter than the gate's blocks of 400 ms is one block. Source: ITU-R BS.1770-4, annex 1.
    """
    num_samples = audio.shape[1]
    block, hop = round(0.4 * sample_rate_hz), round(0.1 * sample_rate_hz)
    size = 1 << (num_samples + sample_rate_hz // 4).bit_length()  # the filters ring for a while
    spectrum = np.fft.rfft(audio, size) * _k_weighting(sample_rate_hz, size)
    weighted = np.fft.irfft(spectrum, size)[:, :num_samples]
    energy = np.concatenate([[0.0], np.cumsum(np.square(weighted).sum(axis=0))])
    block = min(block, num_samples)
    starts = np.arange(0, num_samples - block + 1, hop)
    powers = (energy[starts + block] - energy[starts]) / block
    powers = powers[powers > 10.0 ** ((_SILENCE_LUFS + 0.691) / 10.0)]
    if not len(powers):
        return float("-inf")
    powers = powers[powers > 0.1 * powers.mean()]  # the relative gate, 10 dB down
    return float(-0.691 + 10.0 * np.log10(powers.mean()))


def k_weighting_filters(sample_rate_hz: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Numerator and denominator of the two filters before the measurement: a shelf for the head, then a high pass.

    The recommendation lists them for 48 kHz only. Source of the analog filters behind those values, from which any
    rate's follow by the bilinear transform: De Man, "Evaluation of implementations of the EBU R128 loudness
    measurement" (AES 145, 2018).
    """
    warped = np.tan(np.pi * 1681.974450955533 / sample_rate_hz)
    quality = 0.7071752369554196
    high = 10.0 ** (3.999843853973347 / 20.0)
    band = high**0.4996667741545416
    scale = 1.0 + warped / quality + warped**2
    shelf = np.array(
        [high + band * warped / quality + warped**2, 2 * (warped**2 - high), high - band * warped / quality + warped**2]
    )
    shelf_poles = np.array([scale, 2 * (warped**2 - 1), 1 - warped / quality + warped**2])
    warped, quality = np.tan(np.pi * 38.13547087602444 / sample_rate_hz), 0.5003270373238773
    pass_scale = 1.0 + warped / quality + warped**2
    pass_poles = np.array([pass_scale, 2 * (warped**2 - 1), 1 - warped / quality + warped**2])
    return [(shelf / scale, shelf_poles / scale), (np.array([1.0, -2.0, 1.0]), pass_poles / pass_scale)]


@cache
def _k_weighting(sample_rate_hz: int, size: int) -> np.ndarray:
    """The response of both filters at the frequencies of `rfft`."""
    delay = np.exp(-2j * np.pi * np.arange(size // 2 + 1) / size)
    response = np.ones(size // 2 + 1, np.complex128)
    for numerator, denominator in k_weighting_filters(sample_rate_hz):
        response *= np.polyval(numerator[::-1], delay) / np.polyval(denominator[::-1], delay)
    return response


def _power(audio: np.ndarray) -> float:
    return float(np.mean(np.square(audio, dtype=np.float64)))
