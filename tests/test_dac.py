import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import config as codec_config
from codec import token_format
from codec.layers.conv import Snake, add_weight_norm, fold_weight_norm
from codec.models.dac import DAC_16KHZ, DAC_24KHZ, DAC_44KHZ, DAC_44KHZ_16KBPS, DACCodec, DACConfig
from codec.models.interface import AudioCodec
from codec.pretrained import load, save
from codec.quantizers.factorized import FactorizedVQConfig
from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like
from codec.tokens import Tokens

HOP = 30
# The published decoder is one sample short after its rate of 5, which are 6 after those of 3 and 2; and again one after
# its rate of 3, which are 2 after that of 2.
NUM_SHORT = 8
# Other lengths are convolved in matrix products of other shapes, whose sums round differently.
FLOAT64_TOLERANCE = 1e-12


def _config(**changes: Any) -> DACConfig:
    values: dict[str, Any] = {
        "sample_rate_hz": 8000,
        "quantizer": FactorizedVQConfig(latent_dim=10, num_stages=3, codebook_size=16, codebook_dim=4),
        "encoder_dim": 4,
        "encoder_rates": (2, 3, 5),
        "decoder_dim": 16,
        "decoder_rates": (5, 3, 2),
    }
    return DACConfig(**values | changes)


def _codec(**changes: Any) -> DACCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec: DACCodec = codec_config.build(_config(**changes))
        with torch.no_grad():
            for name, value in codec.named_parameters():
                value *= 1.5 if name.startswith("encoder") and name.endswith("weight") else 1.0  # latents shall vary
                if name.endswith("alpha"):
                    value += 0.5 * torch.randn_like(value).abs()
    return codec.eval().requires_grad_(False)


def _audio(num_samples: int, *, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(speech_like(num_samples, seed=seed))[None, None]


CODEC = _codec()
CODEC64 = copy.deepcopy(CODEC).double()


def test_it_says_what_it_is() -> None:
    assert isinstance(CODEC, AudioCodec)
    assert (CODEC.sample_rate_hz, CODEC.num_channels, CODEC.hop_length) == (8000, 1, HOP)
    assert CODEC.codebook_sizes == (16, 16, 16)
    assert CODEC.valid_num_quantizers == (1, 2, 3)
    assert not CODEC.is_streamable
    for call in (StreamingEncoder, StreamingDecoder):
        with pytest.raises(ValueError, match="is not causal and cannot stream"):
            call(CODEC)  # type: ignore[arg-type]


# Counted over the published networks, with a length beside each direction of their weight norm.
@pytest.mark.parametrize(
    ("config", "millions", "hop_length", "bitrate_bps"),
    [
        (DAC_16KHZ, 74.18, 320, 6000),
        (DAC_24KHZ, 74.71, 320, 24000),
        (DAC_44KHZ, 76.65, 512, 7752),
        (DAC_44KHZ_16KBPS, 64.21, 512, 15504),
    ],
    ids=["16khz", "24khz", "44khz", "44khz_16kbps"],
)
def test_published_models_have_the_published_size(
    config: DACConfig, millions: float, hop_length: int, bitrate_bps: float
) -> None:
    with torch.device("meta"):
        codec = DACCodec(config)
        add_weight_norm(codec)
    num_parameters = sum(parameter.numel() for parameter in codec.parameters())
    assert round(num_parameters / 1e6, 2) == millions
    assert codec.hop_length == hop_length
    assert codec.bitrate_bps() == pytest.approx(bitrate_bps, abs=1)
    assert codec_config.from_dict(codec_config.to_dict(config)) == config


def test_snake_is_its_formula() -> None:
    snake = Snake(3)
    assert snake.alpha.tolist() == [1.0, 1.0, 1.0]
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([0.5, 1.0, 3.0]))
    x = torch.linspace(-4, 4, 60).view(2, 3, 10)
    alpha = torch.tensor([0.5, 1.0, 3.0])[:, None]
    # One division against one reciprocal.
    torch.testing.assert_close(snake(x), x + torch.sin(alpha * x) ** 2 / alpha, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_samples", [0, 1, 5, HOP - 1, HOP, HOP + 1, 7 * HOP + 3, 40 * HOP])
def test_lengths_are_exact(num_samples: int) -> None:
    tokens = CODEC.encode(_audio(num_samples))
    assert tokens.codes.shape == (1, 3, -(-num_samples // HOP))
    heard = CODEC.decode(tokens)
    assert heard.shape == (1, 1, num_samples)
    assert not (heard.abs() >= 1).any()
    num_known = max(0, tokens.codes.shape[2] * HOP - NUM_SHORT)
    assert heard[:, :, :num_known].all()
    assert not heard[:, :, num_known:].any()


def test_a_partial_frame_is_filled_with_silence() -> None:
    audio = _audio(5 * HOP - 7)
    padded = torch.nn.functional.pad(audio, (0, 7))
    assert torch.equal(CODEC.analyze(audio), CODEC.analyze(padded))
    assert torch.equal(CODEC.encode(audio).codes, CODEC.encode(padded).codes)


@given(lengths=st.lists(st.integers(0, 12 * HOP), min_size=1, max_size=4), extra=st.integers(0, 3 * HOP))
@settings(max_examples=12, deadline=None)
def test_a_row_is_the_same_alone_and_in_a_batch(lengths: list[int], extra: int) -> None:
    audio = torch.full((len(lengths), 1, max(lengths) + extra), 0.7)  # past a row's end it must not matter
    for row, length in enumerate(lengths):
        audio[row, :, :length] = _audio(length, seed=row)[0]
    tokens = CODEC64.encode(audio, torch.tensor(lengths))
    heard = CODEC64.decode(tokens)
    for row, length in enumerate(lengths):
        alone = CODEC64.encode(_audio(length, seed=row))
        num_frames = alone.codes.shape[2]
        assert torch.equal(tokens.codes[row, :, :num_frames], alone.codes[0])
        assert not tokens.codes[row, :, num_frames:].any()
        expected = CODEC64.decode(alone)[0]
        torch.testing.assert_close(heard[row, :, :length], expected, rtol=0, atol=FLOAT64_TOLERANCE)
        assert not heard[row, :, length:].any()


@pytest.mark.parametrize("num_quantizers", [1, 2, 3])
def test_prefixes_decode(num_quantizers: int) -> None:
    audio = _audio(8 * HOP)
    whole = CODEC.encode(audio)
    tokens = CODEC.encode(audio, num_quantizers=num_quantizers)
    assert torch.equal(tokens.codes, whole.codes[:, :num_quantizers])
    assert torch.equal(CODEC.decode(tokens), CODEC.decode(whole.prefix(num_quantizers)))


def test_what_a_frame_hears_is_what_it_says() -> None:
    num_frames, frame = 60, 30
    before, after = CODEC.decode_frames_before, CODEC.decode_frames_after
    assert 4 <= before < 20
    assert 4 <= after < 20
    latents = torch.randn(1, 10, num_frames, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    heard = CODEC.synthesize(latents, num_frames * HOP)[0, 0]
    (gradient,) = torch.autograd.grad(heard[frame * HOP : (frame + 1) * HOP].square().sum(), latents)
    used = gradient[0].abs().sum(0).nonzero()[:, 0]
    assert int(used[0]) == frame - before
    assert int(used[-1]) == frame + after


def test_a_stretch_of_a_file_can_be_decoded_alone(tmp_path: Path) -> None:
    """What the header says of the frames around is enough, and the decoder's short end is not heard in it."""
    codec_id = save(CODEC, tmp_path / "tiny", name="tiny@1", dtype="float32")
    codec = load(tmp_path / "tiny")
    tokens = codec.encode(_audio(80 * HOP))
    assert tokens.codec_id == codec_id
    token_format.write(tmp_path / "tiny.codec", tokens.codes.numpy(), model=tmp_path / "tiny")
    with token_format.open(tmp_path / "tiny.codec", model=tmp_path / "tiny") as reader:
        before, after = reader.header.num_frames_before, reader.header.num_frames_after
        codes = torch.from_numpy(reader.read(40 - before, 2 + before + after))
    part = codec.decode(Tokens(codes, torch.tensor([codes.shape[2] * HOP]), codec_id))
    expected = codec.decode(tokens)[:, :, 40 * HOP : 42 * HOP]
    # Float32, in products of another shape.
    np.testing.assert_allclose(part[:, :, before * HOP :][:, :, : 2 * HOP], expected, rtol=0, atol=1e-5)


def test_training_reaches_every_weight() -> None:
    codec = _codec().train().requires_grad_(True)
    audio = torch.cat([_audio(8 * HOP + 4), _audio(8 * HOP + 4, seed=1)])
    losses: dict[str, torch.Tensor] = {}

    def quantize(latents: torch.Tensor) -> torch.Tensor:
        quantized = codec.quantizer(latents)
        losses.update(quantized.losses)
        result: torch.Tensor = quantized.latents
        return result

    heard = codec.reconstruct(audio, quantize)
    assert heard.shape == audio.shape
    ((heard - audio).square().mean() + losses["codebook"]).backward()
    without = [
        name for name, parameter in codec.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []
    with torch.no_grad():
        tokens = codec.eval().encode(audio)
        # Float32 sums through a straight-through estimator.
        torch.testing.assert_close(heard, codec.decode(tokens), rtol=0, atol=1e-5)


def test_weight_norm_changes_nothing_and_can_be_undone() -> None:
    codec = _codec()
    before = copy.deepcopy(codec.state_dict())
    audio = _audio(6 * HOP)
    heard = CODEC.synthesize(CODEC.analyze(audio), 6 * HOP)
    add_weight_norm(codec)
    assert sum("original0" in key for key in codec.state_dict()) == sum(key.endswith(".weight") for key in before)
    torch.testing.assert_close(codec.synthesize(codec.analyze(audio), 6 * HOP), heard, rtol=0, atol=1e-5)
    fold_weight_norm(codec)
    assert codec.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_rate_hz": 0}, "sample_rate_hz must be positive, got 0"),
        ({"encoder_rates": ()}, r"encoder_rates must be one or more numbers from 2 on, got \(\)"),
        ({"decoder_rates": (30, 1)}, r"decoder_rates must be one or more numbers from 2 on, got \(30, 1\)"),
        ({"decoder_rates": (5, 3)}, r"make 30 samples per frame, decoder_rates=\(5, 3\) 15"),
        ({"decoder_dim": 12}, "decoder_dim=12 cannot be halved 3 times"),
    ],
)
def test_impossible_configurations_are_value_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**changes)
