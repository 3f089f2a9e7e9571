"""Codecs that look ahead work through long recordings window by window, and files hold their codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from torch import Tensor

import codec
from codec import windows
from codec.models.dac import DACCodec, DACConfig
from codec.models.interface import Codec
from codec.models.seanet import SEANetCodec, SEANetConfig
from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.windows import WindowedDecoder, WindowedEncoder
from tests.commands import refusal, succeed

QUANTIZER = ResidualVQConfig(latent_dim=6, num_stages=2, codebook_size=16)


def looking_ahead(num_lstm_layers: int = 0) -> SEANetCodec:
    """A codec that is not causal; without recurrent layers, what it hears is limited."""
    torch.manual_seed(3)
    config = SEANetConfig(
        sample_rate_hz=16000,
        quantizer=QUANTIZER,
        ratios=(4, 2),
        num_filters=4,
        causal=False,
        num_lstm_layers=num_lstm_layers,
    )
    model = SEANetCodec(config).eval().requires_grad_(False)
    model.quantizer.initialize(model.analyze(torch.rand(1, 1, 4000) - 0.5))  # codes that tell one latent from another
    return model


def pieces_of(x: Tensor, sizes: list[int]) -> list[Tensor]:
    cuts = np.minimum(np.cumsum(sizes), x.shape[2])
    return list(torch.tensor_split(x, cuts.tolist(), dim=2))


def dac() -> DACCodec:
    torch.manual_seed(3)
    quantizer = FactorizedVQConfig(latent_dim=8, num_stages=2, codebook_size=16, codebook_dim=3)
    config = DACConfig(
        sample_rate_hz=16000,
        quantizer=quantizer,
        encoder_dim=2,
        encoder_rates=(2, 3),
        decoder_dim=8,
        decoder_rates=(3, 2),
    )
    return DACCodec(config).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [looking_ahead, partial(looking_ahead, num_lstm_layers=1), dac])
@settings(max_examples=15, deadline=None)
@given(num_samples=st.integers(0, 700), sizes=st.lists(st.integers(0, 300), max_size=6))
def test_windows_give_the_codes_and_the_audio_of_the_whole(
    make: Callable[[], Codec], num_samples: int, sizes: list[int]
) -> None:
    model = make().double()  # so that rounding cannot choose another code
    audio = torch.rand(2, 1, num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    whole = model.encode(audio.float())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "FRAMES_PER_WINDOW", 8)
        encoder = WindowedEncoder(model, 2)
        codes = torch.cat([*[encoder.push(piece) for piece in pieces_of(audio.float(), sizes)], encoder.flush()], dim=2)
        decoder = WindowedDecoder(model, 2)
        parts = [decoder.push(piece) for piece in pieces_of(codes, [size // model.hop_length for size in sizes])]
        decoded = torch.cat([*parts, decoder.flush()], dim=2)[:, :, :num_samples]
    assert torch.equal(codes, whole.codes)
    assert torch.allclose(decoded, model.decode(whole).float(), rtol=0, atol=1e-6)  # float32 at the end


def test_a_limited_codec_gives_codes_before_the_end_and_keeps_little() -> None:
    model = looking_ahead()
    encoder, given = WindowedEncoder(model, 1), 0
    for _ in range(40):
        given += encoder.push(torch.zeros(1, 1, 64 * model.hop_length)).shape[2]
        assert sum(piece.shape[2] for piece in encoder._pieces) < 2 * windows.FRAMES_PER_WINDOW * model.hop_length
    assert 40 * 64 - 2 * windows.FRAMES_PER_WINDOW < given < 40 * 64
    assert given + encoder.flush().shape[2] == 40 * 64


def test_what_a_window_hears_around_it_matters() -> None:
    model = looking_ahead().double()
    audio = torch.rand(1, 1, 800, generator=torch.Generator().manual_seed(1)) - 0.5
    model.encode_samples_before = 0  # a wrong claim
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "FRAMES_PER_WINDOW", 8)
        encoder = WindowedEncoder(model, 1)
        codes = torch.cat([encoder.push(audio), encoder.flush()], dim=2)
    assert not torch.equal(codes, model.encode(audio).codes)


@pytest.mark.parametrize("rate_hz", [16000, 44100])
@pytest.mark.parametrize("num_lstm_layers", [0, 1])
def test_files_hold_codes_of_models_that_look_ahead(rate_hz: int, num_lstm_layers: int, tmp_path: Path) -> None:
    codec.save(looking_ahead(num_lstm_layers), tmp_path / "ahead", name="ahead@1", dtype="float32")
    model = codec.load(tmp_path / "ahead")
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (5001, 2)).astype(np.float32)
    soundfile.write(tmp_path / "in.wav", audio, rate_hz, subtype="FLOAT")
    commands = (
        ["encode", tmp_path / "in.wav", tmp_path / "x.codec", "--model", tmp_path / "ahead"],
        ["decode", tmp_path / "x.codec", tmp_path / "out.wav", "--model", tmp_path / "ahead"],
    )
    for command in commands:
        succeed(*command)
    decoded, decoded_rate_hz = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert (decoded.shape, decoded_rate_hz) == (audio.shape, rate_hz)
    if rate_hz == model.sample_rate_hz:
        tokens = model.encode(torch.from_numpy(audio.T[:, None].copy()))
        with codec.open(tmp_path / "x.codec") as file:
            assert torch.equal(torch.from_numpy(file.read()), tokens.codes)
        assert np.abs(decoded.T - model.decode(tokens)[:, 0].clamp(-1, 1).numpy()).max() < 1e-4  # 16-bit output


def test_overlapping_segments_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = SEANetConfig(
        sample_rate_hz=16000,
        quantizer=QUANTIZER,
        ratios=(4, 2),
        num_filters=4,
        causal=False,
        segment_samples=800,
        segment_stride_samples=792,
    )
    codec.save(SEANetCodec(config), tmp_path / "m", name="m@1")
    soundfile.write(tmp_path / "in.wav", np.zeros(1000), 16000)
    line = refusal("encode", tmp_path / "in.wav", tmp_path / "x.codec", "--model", tmp_path / "m")
    assert "overlapping segments" in line
    assert not (tmp_path / "x.codec").exists()
