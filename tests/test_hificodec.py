import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec import config as codec_config
from codec.layers.conv import add_weight_norm, fold_weight_norm
from codec.models.hificodec import (
    HIFICODEC_16K_320D,
    HIFICODEC_24K_240D,
    HIFICODEC_24K_320D,
    HiFiCodec,
    HiFiCodecConfig,
    MeanOfBlocks,
    NormedBlocks,
)
from codec.models.interface import UNLIMITED, AudioCodec
from codec.pretrained import load, save
from codec.quantizers.residual import ResidualVQConfig
from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like

HOP = 15
FLOAT64_TOLERANCE = 1e-12


def _config(**changes: Any) -> HiFiCodecConfig:
    values: dict[str, Any] = {
        "sample_rate_hz": 16000,
        "quantizer": ResidualVQConfig(latent_dim=12, num_stages=2, num_groups=2, codebook_size=16, learning="gradient"),
        "ratios": (5, 3),
        "kernel_sizes": (11, 7),
        "encoder_channels": 8,
        "decoder_channels": 16,
        "residual_kernel_sizes": (3, 5),
        "residual_dilations": (1, 3),
    }
    return HiFiCodecConfig(**values | changes)


def _audio(num_samples: int, *, seed: int = 0) -> Tensor:
    return torch.from_numpy(speech_like(num_samples, seed=seed))[None, None]


def _codec(**changes: Any) -> HiFiCodec:
    """An untrained codec whose latents vary, and whose codebooks reach about as far as they do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec: HiFiCodec = codec_config.build(_config(**changes))
        with torch.no_grad():
            for value in codec.generator.parameters():
                value *= 2.0
            groups = list(codec.encoder(_audio(3000))[0].T.chunk(2, dim=1))
            for row, codebook in enumerate(codec.quantizer.codebooks.normal_()):
                rest = groups[row % 2]
                codebook.mul_(rest.std(0)).add_(rest.mean(0))
                groups[row % 2] = rest - codebook[torch.cdist(rest, codebook).argmin(1)]
    return codec.eval().requires_grad_(False)


CODEC = _codec()
CODEC64 = copy.deepcopy(CODEC).double()


def test_it_says_what_it_is() -> None:
    assert isinstance(CODEC, AudioCodec)
    assert (CODEC.sample_rate_hz, CODEC.num_channels, CODEC.hop_length) == (16000, 1, HOP)
    assert CODEC.codebook_sizes == (16, 16, 16, 16)
    assert CODEC.valid_num_quantizers == (2, 4)  # whole stages
    assert not CODEC.is_streamable
    assert CODEC.decode_delay_samples == 0
    assert CODEC.encode_delay_samples == CODEC.encode_samples_before == UNLIMITED  # the norms hear everything


@pytest.mark.parametrize(
    ("config", "hop_length", "bitrate_bps", "encoder_millions"),
    [
        (HIFICODEC_16K_320D, 320, 2000, "47.23"),
        (HIFICODEC_24K_320D, 320, 3000, "47.23"),
        (HIFICODEC_24K_240D, 240, 4000, "47.22"),
    ],
    ids=["16k_320d", "24k_320d", "24k_240d"],
)
def test_published_shapes(config: HiFiCodecConfig, hop_length: int, bitrate_bps: int, encoder_millions: str) -> None:
    with torch.device("meta"):
        codec = HiFiCodec(config)
        add_weight_norm(codec)  # the published counts include the lengths of weights
    assert (codec.hop_length, codec.bitrate_bps(), codec.valid_num_quantizers) == (hop_length, bitrate_bps, (2, 4))
    assert codec.quantizer.codebooks.shape == (4, 1024, 256)
    parts = (codec.encoder, codec.generator, codec.quantizer)
    millions = [f"{sum(value.numel() for value in part.parameters()) / 1e6:.2f}" for part in parts]
    assert millions == [encoder_millions, "15.35", "1.05"]
    assert codec_config.from_dict(codec_config.to_dict(config)) == config


@given(num_samples=st.integers(0, 40 * HOP))
@settings(max_examples=25)
def test_lengths_are_exact(num_samples: int) -> None:
    tokens = CODEC.encode(_audio(num_samples))
    assert tokens.codes.shape == (1, 4, -(-num_samples // HOP))
    assert CODEC.decode(tokens).shape == (1, 1, num_samples)


def test_the_last_frame_is_padded_with_zeros() -> None:
    audio = _audio(10 * HOP + 4)
    padded = torch.nn.functional.pad(audio, (0, HOP - 4))
    assert torch.equal(CODEC.encode(audio).codes, CODEC.encode(padded).codes)


def test_every_row_of_codes_is_used() -> None:
    codes = CODEC.encode(_audio(200 * HOP)).codes
    assert all(len(row.unique()) > 3 for row in codes[0])


def test_rows_of_codes_are_groups_of_stages() -> None:
    """Row 0 is the first half of the dimensions, row 1 the second; rows 2 and 3 refine them."""
    codes = CODEC.encode(_audio(20 * HOP)).codes
    books = CODEC.quantizer.codebooks
    halves = [books[row][codes[0, row]] + books[row + 2][codes[0, row + 2]] for row in (0, 1)]
    latents = CODEC.quantizer.decode(codes)[0].T
    torch.testing.assert_close(latents, torch.cat(halves, dim=1), rtol=1e-6, atol=1e-7)  # one sum of two floats


def test_norms_are_nested_around_partial_sums() -> None:
    torch.manual_seed(0)
    layer, x = NormedBlocks(16, (5, 3), (1, 2)).double(), torch.randn(2, 16, 30, dtype=torch.float64)
    first, second = layer.blocks[0](x), layer.blocks[1](x)

    def norm(y: Tensor) -> Tensor:  # one group of 16 channels
        mean, variance = y.mean((1, 2), keepdim=True), y.var((1, 2), keepdim=True, unbiased=False)
        return (y - mean) / (variance + 1e-6).sqrt()

    torch.testing.assert_close(layer(x), norm(norm(first) + second) / 2, rtol=0, atol=FLOAT64_TOLERANCE)
    plain = MeanOfBlocks(16, (5, 3), (1, 2)).double()
    plain.blocks.load_state_dict(layer.blocks.state_dict())
    torch.testing.assert_close(plain(x), (first + second) / 2, rtol=0, atol=FLOAT64_TOLERANCE)


def test_what_a_frame_hears_is_what_it_says() -> None:
    num_frames, frame = 60, 30
    latents = torch.randn(1, 12, num_frames, generator=torch.Generator().manual_seed(0), requires_grad=True)
    piece = CODEC.generator(latents)[:, :, frame * HOP : (frame + 1) * HOP]
    (gradient,) = torch.autograd.grad(piece.square().sum(), latents)
    used = gradient[0].abs().sum(0).nonzero()[:, 0]
    assert (int(used[0]), int(used[-1])) == (frame - CODEC.decode_frames_before, frame + CODEC.decode_frames_after)
    audio = _audio(num_frames * HOP).requires_grad_(True)
    (gradient,) = torch.autograd.grad(CODEC.encoder(audio)[:, :, frame].square().sum(), audio)
    assert gradient.abs().gt(0).float().mean() > 0.99  # all of it, through the norms


@given(lengths=st.lists(st.integers(0, 20 * HOP), min_size=1, max_size=4), extra=st.integers(0, 2 * HOP))
@settings(max_examples=10)
def test_a_row_is_the_same_alone_and_in_a_batch(lengths: list[int], extra: int) -> None:
    audio = torch.full((len(lengths), 1, max(lengths) + extra), 0.7)  # what lies past a row's end must not matter
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


def test_it_refuses_to_stream() -> None:
    for call in (StreamingEncoder, StreamingDecoder):
        with pytest.raises(ValueError, match="not causal and cannot stream"):
            call(CODEC)
    with pytest.raises(ValueError, match="not causal"):
        CODEC.generator.step(torch.zeros(1, 12, 3), CODEC.generator.init_state(1))


def test_prefixes_are_what_fewer_quantizers_encode() -> None:
    audio = _audio(20 * HOP)
    tokens = CODEC.encode(audio)
    fewer = CODEC.encode(audio, num_quantizers=2)
    assert torch.equal(fewer.codes, tokens.prefix(2).codes)
    assert CODEC.decode(fewer).shape == audio.shape
    with pytest.raises(ValueError, match=r"num_quantizers=3 is not one of \(2, 4\)"):
        CODEC.encode(audio, num_quantizers=3)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    codec_id = save(CODEC, tmp_path / "tiny", name="tiny@1", dtype="float32")
    loaded = load(tmp_path / "tiny")
    assert (loaded.codec_id, loaded.config, loaded.name) == (codec_id, CODEC.config, "tiny@1")
    audio = _audio(20 * HOP)
    tokens = loaded.encode(audio)
    assert torch.equal(CODEC.encode(audio).codes, tokens.codes)
    assert torch.equal(CODEC.decode(dataclasses.replace(tokens, codec_id="")), loaded.decode(tokens))


def test_gradients_reach_everything() -> None:
    codec = _codec().train().requires_grad_(True)
    add_weight_norm(codec)
    losses: dict[str, Tensor] = {}

    def quantize(latents: Tensor) -> Tensor:
        quantized = codec.quantizer(latents)
        losses.update(quantized.losses)
        return quantized.latents

    audio = _audio(10 * HOP + 1)
    heard = codec.reconstruct(audio, quantize)
    assert heard.shape == audio.shape
    torch.stack([(heard - audio).square().mean(), *losses.values()]).sum().backward()
    for name, value in codec.named_parameters():
        assert value.grad is not None, name
        assert value.grad.any(), name
    fold_weight_norm(codec)
    assert set(codec.state_dict()) == set(CODEC.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_rate_hz": 0}, "sample_rate_hz must be positive"),
        ({"ratios": (), "kernel_sizes": ()}, "ratios must be one or more positive numbers"),
        ({"residual_dilations": (0,)}, "residual_dilations must be one or more positive numbers"),
        ({"kernel_sizes": (11,)}, "1 kernel_sizes do not fit 2 ratios"),
        ({"kernel_sizes": (10, 7)}, "a ratio of 5 needs a kernel of 9 samples or more, .*; kernel_sizes has 10"),
        ({"kernel_sizes": (11, 3)}, "a ratio of 3 needs a kernel of 5 samples or more, .*; kernel_sizes has 3"),
        ({"residual_kernel_sizes": (3, 4)}, "residual_kernel_sizes must be odd"),
        ({"encoder_channels": 12}, "encoder_channels=12 is not a multiple of 8"),
        ({"decoder_channels": 18}, "decoder_channels=18 cannot be halved 2 times"),
    ],
)
def test_impossible_configurations_are_value_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**changes)
