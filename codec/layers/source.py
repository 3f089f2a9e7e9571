"""A voice made of a pulse train and of noise, each shaped band by band: what a decoder cannot learn from codes alone.

A network without memory of its own phase cannot go on with a period that codes do not tell. Here a layer keeps the
phase: for every row it is told a pitch and how loud pulses and noise are in each band, and gives the row's samples.

    pitch -> phase -> pulses --\
                                >-- windows -> spectra -> times gains -> overlap-add -> samples
             counter -> noise --/

Phase and counter are integers, so that a stream gives the same bits as a file.

Source: Wang, Takaki and Yamagishi, "Neural source-filter waveform models" (2019), section II; Engel et al., "DDSP:
differentiable digital signal processing" (2020), section 3, for pulses and filtered noise in one.

Letters: B batch, R rows, H samples in a row, N bands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from codec.kernels.row_linear import row_linear
from codec.layers.causal import History, State
from codec.layers.spectra import mel_filters

LOWEST_HZ, HIGHEST_HZ = 50.0, 500.0
_WINDOW_ROWS = 4
_TURN = 2**32  # a period in units of the phase


class HarmonicNoise(nn.Module):
    """Pitch and gains of rows -> their samples, late by `delay_rows` rows. It has no weights.

    `num_bands` bands lie evenly on the mel scale. Gains of 0 dB give pulses and noise of unit power, bands together.
    """

    delay_rows = _WINDOW_ROWS - 1
    window: Tensor
    bands: Tensor

    def __init__(self, *, sample_rate_hz: int, row_samples: int, num_bands: int) -> None:
        super().__init__()
        self.sample_rate_hz, self.row_samples = sample_rate_hz, row_samples
        self.window_samples = _WINDOW_ROWS * row_samples
        window = torch.hann_window(self.window_samples).sqrt()  # before and after: together they overlap to 2
        self.register_buffer("window", window, persistent=False)
        filters = mel_filters(sample_rate_hz, self.window_samples, num_bands)
        # Each bin has the gain of the bands that it lies in.
        self.register_buffer("bands", (filters / filters.sum(0).clamp_min(1e-9)).T.contiguous(), persistent=False)
        self.history = History(row_samples, _WINDOW_ROWS - 1)
        self.overlap = History(self.window_samples, _WINDOW_ROWS - 1)

    def init_state(self, batch_size: int) -> State:
        clock = torch.zeros(batch_size, 2, dtype=torch.int64, device=self.window.device)  # phase, samples so far
        return (
            clock,
            self.history.init_state(batch_size),
            self.history.init_state(batch_size),
            self.overlap.init_state(batch_size),
        )

    def step(self, pitch_hz: Tensor, gains: Tensor, state: State) -> tuple[Tensor, State]:
        """Pitch [B, R] and logarithms of gains [B, R, 2 N], pulses before noise -> samples [B, R, H].

        The gradient reaches the gains alone.
        """
        clock, pulse_history, noise_history, overlap = state
        assert isinstance(clock, Tensor)
        if pitch_hz.shape[1] == 0:
            return pitch_hz.new_zeros(*pitch_hz.shape, self.row_samples), state
        with torch.no_grad():
            pulses, noise, clock = self._sources(pitch_hz.detach(), clock)
            pulse_windows, pulse_history = self.history.step(pulses, pulse_history)
            noise_windows, noise_history = self.history.step(noise, noise_history)
            spectra = [torch.fft.rfft(windows * self.window) for windows in (pulse_windows, noise_windows)]
        shaped = [
            spectrum * row_linear(log_gains.contiguous().exp(), self.bands)
            for spectrum, log_gains in zip(spectra, gains.chunk(2, dim=2), strict=True)
        ]
        windows = torch.fft.irfft(shaped[0] + shaped[1], n=self.window_samples) * self.window
        late, overlap = self.overlap.step(windows, overlap)
        # Of the window that came i rows ago, its i-th row of samples is due now.
        samples = torch.zeros_like(windows[:, :, : self.row_samples])
        for i in range(_WINDOW_ROWS):
            begin = (_WINDOW_ROWS - 1 - i) * self.window_samples + i * self.row_samples
            samples = samples + late[:, :, begin : begin + self.row_samples]
        return 0.5 * samples, (clock, pulse_history, noise_history, overlap)

    def _sources(self, pitch_hz: Tensor, clock: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pulses and noise [B, R, H] of unit power, and the clock after them."""
        num_rows, size = pitch_hz.shape[1], self.row_samples
        pitch_hz = pitch_hz.clamp(LOWEST_HZ, HIGHEST_HZ)
        step = (pitch_hz.double() * (_TURN / self.sample_rate_hz)).round().long()[:, :, None]  # [B, R, 1]
        begin = clock[:, None, :1] + (step * size).cumsum(1) - step * size
        within = torch.arange(1, size + 1, device=step.device)
        phase = (begin + step * within).remainder(_TURN)
        angle = (phase.double() * (2 * math.pi / _TURN)).float()
        # The sum of the cosines of all harmonics below half the rate, in closed form, scaled to unit power.
        num_harmonics = (0.475 * self.sample_rate_hz / pitch_hz).floor().float()[:, :, None]
        half = (angle / 2).sin()
        is_peak = half.abs() < 1e-4
        kernel = ((num_harmonics + 0.5) * angle).sin() / torch.where(is_peak, 1.0, 2 * half) - 0.5
        pulses = torch.where(is_peak, num_harmonics, kernel) * (2.0 / num_harmonics).sqrt()
        at = clock[:, None, 1:] + torch.arange(num_rows, device=step.device)[:, None] * size + within
        after = torch.stack([phase[:, -1, -1], clock[:, 1] + num_rows * size], dim=1)
        return pulses, _noise(at), after


def _noise(at: Tensor) -> Tensor:
    """Numbers of samples int64 -> noise float32 of unit power, evenly spread: the same for the same number, always."""
    mixed = at & 0xFFFFFFFF
    for factor in (0x2C1B3C6D, 0x297A2D39):  # below 2^31, so that no product overflows
        mixed = ((mixed ^ (mixed >> 16)) * factor) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 15)
    return ((mixed.double() / 2**31 - 1.0) * math.sqrt(3.0)).float()
