import math

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.layers.spectra import LogMel, mel_filters


def _layer() -> LogMel:
    return LogMel(sample_rate_hz=16000, hop_samples=160, window_hops=3, num_mels=80)


def _tone(frequency_hz: float, num_samples: int = 3200) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * frequency_hz / 16000 * torch.arange(num_samples))


@pytest.mark.parametrize(("fft_samples", "num_mels"), [(512, 40), (512, 80), (1024, 80), (128, 80)])
def test_filters_sum_to_one_and_none_is_empty(fft_samples: int, num_mels: int) -> None:
    filters = mel_filters(16000, fft_samples, num_mels)
    torch.testing.assert_close(filters.sum(1), torch.ones(num_mels))
    peaks = filters.argmax(1)
    assert (peaks.diff() >= 0).all()


def test_filters_are_librosas_but_for_their_height() -> None:
    expected = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=40)
    expected = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(mel_filters(16000, 1024, 40).numpy(), expected, atol=2e-6)


def test_values_against_numpy() -> None:
    audio = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))
    mels = _layer()(audio.unflatten(1, (10, 160)))
    padded = np.concatenate([np.zeros(320), audio[0].double().numpy()])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(480) / 480)
    filters = mel_filters(16000, 512, 80).double().numpy()
    for column in range(10):
        power = np.abs(np.fft.rfft(padded[160 * column : 160 * column + 480] * window, 512)) ** 2
        np.testing.assert_allclose(mels[0, column].numpy(), np.log(filters @ power + 1e-5) / 4, atol=1e-5)


@given(cuts=st.lists(st.integers(0, 9), min_size=1, max_size=8), batch_size=st.integers(1, 3))
@settings(max_examples=25)
def test_steps_give_the_bits_of_the_whole(num_threads: int, cuts: list[int], batch_size: int) -> None:
    layer = _layer()
    hops = torch.randn(batch_size, sum(cuts), 160, generator=torch.Generator().manual_seed(sum(cuts)))
    with torch.inference_mode():
        whole, _ = layer.step(hops, layer.init_state(batch_size))
        state, parts = layer.init_state(batch_size), []
        for piece in hops.split(cuts, dim=1):
            part, state = layer.step(piece, state)
            parts.append(part)
        assert torch.equal(torch.cat(parts, dim=1), whole)
        alone, _ = layer.step(hops[-1:], layer.init_state(1))
        assert torch.equal(alone, whole[-1:])


def test_few_cepstra_keep_formants_and_lose_harmonics() -> None:
    smooth = LogMel(sample_rate_hz=16000, hop_samples=160, window_hops=3, num_mels=80, num_cepstra=16)
    harmonics = torch.arange(1, 40)[:, None]
    time = torch.arange(3200) / 16000

    def mels(layer: LogMel, pitch_hz: float) -> torch.Tensor:
        loudness = torch.exp(-0.5 * ((harmonics * pitch_hz - 1500.0) / 400.0) ** 2) + 0.01
        voiced = (loudness * torch.sin(2 * math.pi * pitch_hz * harmonics * time)).sum(0)
        columns: torch.Tensor = layer(voiced.view(1, 20, 160))
        return columns[0, 10]

    def difference(layer: LogMel) -> float:
        return (mels(layer, 180.0) - mels(layer, 200.0)).square().mean().item()

    assert difference(smooth) < 0.3 * difference(_layer())
    assert mels(smooth, 180.0).argmax().item() == pytest.approx(mels(_layer(), 180.0).argmax().item(), abs=4)
    assert torch.linalg.matrix_rank(smooth.smoothing) == 16


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_stretch_reads_the_spectrum_at_multiples_of_frequencies(factor: float) -> None:
    layer = _layer()
    hops = torch.stack([_tone(1000.0), _tone(1000.0 / factor)]).unflatten(1, (20, 160))
    heard, _ = layer.step(hops, layer.init_state(2), torch.tensor([factor, 1.0]))
    plain = layer(hops)
    columns = slice(5, None)
    bands = [part[columns].argmax(1).float().mean().item() for part in (heard[0], plain[1], plain[0])]
    assert abs(bands[0] - bands[1]) <= 1
    assert abs(bands[0] - bands[2]) >= 2
    torch.testing.assert_close(heard[1], plain[1])
