"""SoundStream as a member of the SEANet family: its published shapes, and a stream that is the file."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margins import assert_same_codes
from torch import Tensor

from codec import config as codec_config
from codec.layers.conv import ResidualBlock
from codec.models.seanet import SOUNDSTREAM_16KHZ, SOUNDSTREAM_24KHZ, SEANetCodec
from codec.quantizers.residual import ResidualVQConfig
from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like

FLOAT64_TOLERANCE = 1e-12
# Pieces are convolved in matrix products of other shapes than the file, whose sums round differently.
FLOAT32_TOLERANCE = 1e-5
# The published network, only narrower: dilations 1, 3 and 9, no LSTM, four ratios.
TINY = dataclasses.replace(
    SOUNDSTREAM_24KHZ, num_filters=2, quantizer=ResidualVQConfig(latent_dim=6, num_stages=3, codebook_size=16)
)


def _audio(num_samples: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(speech_like(num_samples, rate_hz=24000, seed=seed))[None, None]


def _tiny_codec() -> SEANetCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec: SEANetCodec = codec_config.build(TINY)
        with torch.no_grad():
            for name, value in codec.named_parameters():
                value *= 2.0 if name.endswith("weight") else 0.1
            rows = codec.encoder(_audio(24000))[0].T
            for codebook in codec.quantizer.codebooks:
                codebook.mul_(rows.std(0)).add_(rows.mean(0))
                rows = rows - codebook[torch.cdist(rows, codebook).argmin(1)]
    return codec.eval().requires_grad_(False)


TINY_CODEC = _tiny_codec()
TINY_CODEC64 = copy.deepcopy(TINY_CODEC).double()


def _convolution(in_channels: int, out_channels: int, kernel_size: int) -> int:
    return (in_channels * kernel_size + 1) * out_channels


def test_published_shapes() -> None:
    """Parameters counted layer by layer from the paper's figure: 32 channels, and 512 dims of latents."""
    blocks = sum(3 * (_convolution(n, n, 7) + _convolution(n, n, 1)) for n in (32, 64, 128, 256))
    strides = ((32, 2), (64, 4), (128, 5), (256, 8))
    encoder = _convolution(1, 32, 7) + blocks + _convolution(512, 512, 3)
    encoder += sum(_convolution(n, 2 * n, 2 * stride) for n, stride in strides)
    decoder = _convolution(512, 512, 7) + blocks + _convolution(32, 1, 7)
    decoder += sum(_convolution(2 * n, n, 2 * stride) for n, stride in strides)
    assert (encoder, decoder) == (5_378_560, 6_426_625)
    codec = SEANetCodec(SOUNDSTREAM_24KHZ)
    assert sum(value.numel() for value in codec.encoder.parameters()) == encoder
    assert sum(value.numel() for value in codec.decoder.parameters()) == decoder
    assert codec.quantizer.codebooks.shape == (8, 1024, 512)
    assert (codec.bitrate_bps(), codec.is_streamable, codec.encode_delay_samples) == (6000, True, 0)


def test_residual_units_reach_farther_and_farther() -> None:
    units = [block.branch.layers[1] for block in TINY_CODEC.encoder.layers if isinstance(block, ResidualBlock)]
    assert [unit.dilation for unit in units] == [1, 3, 9] * 4
    assert {unit.weight.shape[2] for unit in units} == {7}


def test_published_rates() -> None:
    for config, rate_hz in ((SOUNDSTREAM_24KHZ, 75), (SOUNDSTREAM_16KHZ, 50)):
        assert config.sample_rate_hz / config.hop_length == rate_hz
        assert rate_hz * config.quantizer.num_stages * 10 == 6000
        assert codec_config.from_dict(codec_config.to_dict(config)) == config


def test_the_last_kernel_of_the_encoder_may_differ() -> None:
    assert TINY_CODEC.encoder.layers[-1].weight.shape[2] == 3
    assert TINY_CODEC.decoder.layers[-1].weight.shape[2] == 7
    same = SEANetCodec(dataclasses.replace(TINY, encoder_last_kernel_size=None))
    assert same.encoder.layers[-1].weight.shape[2] == 7
    with pytest.raises(ValueError, match="encoder_last_kernel_size must be positive, got 0"):
        dataclasses.replace(TINY, encoder_last_kernel_size=0)


@given(cuts=st.lists(st.integers(0, 4), min_size=1, max_size=6), batch_size=st.integers(1, 2))
@settings(max_examples=10)
def test_a_stream_is_the_file_from_the_first_frame_on(cuts: list[int], batch_size: int) -> None:
    codec, hop = TINY_CODEC64, TINY.hop_length
    audio = torch.cat([_audio(sum(cuts) * hop, seed=seed) for seed in range(batch_size)])
    tokens = codec.encode(audio)
    state, parts = codec.encode_init(batch_size), []
    for cut, piece in zip(cuts, audio.split([cut * hop for cut in cuts], dim=2), strict=True):
        codes, state = codec.encode_step(piece, state)
        assert codes.shape[2] == cut  # none is withheld
        parts.append(codes)
    assert torch.equal(torch.cat(parts, dim=2), tokens.codes)
    state, parts = codec.decode_init(batch_size), []
    for piece in tokens.codes.split(cuts, dim=2):
        heard, state = codec.decode_step(piece, state)
        assert heard.shape[2] == piece.shape[2] * hop
        parts.append(heard)
    torch.testing.assert_close(torch.cat(parts, dim=2), codec.decode(tokens), rtol=0, atol=FLOAT64_TOLERANCE)


@given(sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=6))
@settings(max_examples=10)
def test_a_stream_of_any_pieces_is_the_file_in_float32(sizes: list[int]) -> None:
    codec, audio = TINY_CODEC, _audio(sum(sizes))
    tokens = codec.encode(audio)
    encoder, decoder = StreamingEncoder(codec), StreamingDecoder(codec)
    codes = torch.cat([*(encoder.push(piece) for piece in audio[0].split(sizes, dim=1)), encoder.flush()], dim=1)
    if audio.shape[2]:
        padded = torch.nn.functional.pad(audio, (0, -audio.shape[2] % TINY.hop_length))
        assert_same_codes(codes[None], tokens.codes, codec.encoder(padded), codec.quantizer.codebooks)
    heard = torch.cat([*(decoder.push(piece) for piece in tokens.codes[0].split(3, dim=1)), decoder.flush()], dim=1)
    expected = codec.decode(tokens)[0]
    torch.testing.assert_close(heard[:, : expected.shape[1]], expected, rtol=0, atol=FLOAT32_TOLERANCE)


def test_codes_of_a_livened_codec_vary() -> None:
    codes = TINY_CODEC.encode(_audio(24000)).codes
    assert all(len(row.unique()) > 3 for row in codes[0])
