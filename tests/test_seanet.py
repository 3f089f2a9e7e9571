import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margins import assert_same_codes
from torch import nn

from codec import config as codec_config
from codec import token_format
from codec.layers.conv import add_weight_norm, fold_weight_norm
from codec.layers.recurrent import LSTM
from codec.models.interface import UNLIMITED, AudioCodec
from codec.models.seanet import SEANetCodec, SEANetConfig
from codec.pretrained import load, save
from codec.quantizers.residual import ResidualVQConfig
from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like
from codec.tokens import Tokens
from codec.transcode import decode_events

HOP = 12
# Other lengths are convolved in matrix products of other shapes, whose sums round differently.
FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-5


def _config(**changes: Any) -> SEANetConfig:
    values: dict[str, Any] = {
        "sample_rate_hz": 16000,
        "quantizer": ResidualVQConfig(latent_dim=6, num_stages=3, codebook_size=16),
        "ratios": (3, 2, 2),
        "num_filters": 4,
    }
    return SEANetConfig(**values | changes)


def _codec(**changes: Any) -> SEANetCodec:
    """An untrained codec whose latents vary, and whose codebooks reach about as far as they do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec: SEANetCodec = codec_config.build(_config(**changes))
        with torch.no_grad():
            for name, value in codec.named_parameters():
                value *= 2.0 if name.endswith("weight") and ".norm." not in name else 1.0
            codec.quantizer.codebooks *= codec.encoder(_audio(4000, codec.num_channels)).std() / 2
    return codec.eval().requires_grad_(False)


def _audio(num_samples: int, num_channels: int = 1, *, seed: int = 0) -> torch.Tensor:
    channels = [speech_like(num_samples, seed=seed + 10 * channel) for channel in range(num_channels)]
    return torch.stack([torch.from_numpy(channel) for channel in channels])[None]


SEGMENTS: dict[str, Any] = {
    "num_channels": 2,
    "causal": False,
    "pad_mode": "reflect",
    "norm": "group",
    "segment_samples": 10 * HOP,
    "segment_stride_samples": 9 * HOP + 5,
    "normalize_loudness": True,
}
CODECS = {
    "zero": _codec(),
    "soundstream": _codec(num_lstm_layers=0, num_residual_blocks=3, conv_shortcut=False),
    "stereo": _codec(num_channels=2, num_lstm_layers=1),
    "reflect": _codec(pad_mode="reflect"),
    "snake": _codec(activation="snake"),
    "whole": _codec(causal=False, norm="none"),
    "whole_reflect": _codec(causal=False, pad_mode="reflect", norm="group"),
    "bidirectional": _codec(causal=False, pad_mode="reflect", bidirectional_lstm=True),
    "segments": _codec(**SEGMENTS),
}
CODECS64 = {name: copy.deepcopy(codec).double() for name, codec in CODECS.items()}
STREAMABLE = ["zero", "soundstream", "stereo", "reflect", "snake"]
WHOLE = ["whole", "whole_reflect", "bidirectional", "segments"]


@pytest.mark.parametrize("name", CODECS)
def test_it_says_what_it_is(name: str) -> None:
    codec = CODECS[name]
    assert isinstance(codec, AudioCodec)
    assert codec.hop_length == HOP
    assert codec.codebook_sizes == (16, 16, 16)
    assert codec.valid_num_quantizers == (1, 2, 3)
    assert codec.is_streamable == (name in STREAMABLE)
    assert codec.decode_delay_samples == 0
    assert (codec.encode_delay_samples == 0) == (name in STREAMABLE and name != "reflect")


def test_rates_name_rows_as_in_the_paper() -> None:
    config = _config(
        sample_rate_hz=24000,
        ratios=(8, 5, 4, 2),
        num_filters=2,
        quantizer=ResidualVQConfig(latent_dim=2, num_stages=32, codebook_size=1024),
    )
    codec = SEANetCodec(config)
    assert [codec.num_quantizers_for(kbps * 1000) for kbps in (1.5, 3, 6, 12, 24, 100)] == [2, 4, 8, 16, 32, 32]
    assert codec.num_quantizers_for(100) == 1


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("num_samples", [0, 1, 5, HOP - 1, HOP, HOP + 1, 7 * HOP + 3, 10 * HOP, 40 * HOP + 7])
def test_lengths_are_exact(name: str, num_samples: int) -> None:
    codec = CODECS[name]
    tokens = codec.encode(_audio(num_samples, codec.num_channels))
    assert tokens.codes.shape == (1, 3, codec.num_frames_for(num_samples))
    assert codec.decode(tokens).shape == (1, codec.num_channels, num_samples)
    if name != "segments":
        assert codec.num_frames_for(num_samples) == -(-num_samples // HOP)


@pytest.mark.parametrize("name", STREAMABLE)
@given(cuts=st.lists(st.integers(0, 9), min_size=1, max_size=10), batch_size=st.integers(1, 3))
@settings(max_examples=15)
def test_a_stream_is_the_file_in_float64(name: str, cuts: list[int], batch_size: int) -> None:
    codec = CODECS64[name]
    rows = [_audio(sum(cuts) * HOP, codec.num_channels, seed=seed) for seed in range(batch_size)]
    audio = torch.cat(rows)
    tokens = codec.encode(audio)
    state = codec.encode_init(batch_size)
    parts = []
    for piece in audio.split([cut * HOP for cut in cuts], dim=2):
        codes, state = codec.encode_step(piece, state)
        parts.append(codes)
    assert torch.equal(torch.cat([*parts, codec.encode_flush(state)], dim=2), tokens.codes)

    state = codec.decode_init(batch_size)
    parts = []
    for piece in tokens.codes.split(cuts, dim=2):
        heard, state = codec.decode_step(piece, state)
        parts.append(heard)
    joined = torch.cat([*parts, codec.decode_flush(state)], dim=2)
    torch.testing.assert_close(joined, codec.decode(tokens), rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("name", STREAMABLE)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=8), num_quantizers=st.integers(1, 3))
@settings(max_examples=10)
def test_a_stream_of_any_pieces_is_the_file(name: str, sizes: list[int], num_quantizers: int) -> None:
    codec = CODECS[name]
    if name == "reflect":  # a partial frame at the end is padded otherwise in a file
        sizes = [*sizes, -sum(sizes) % HOP]
    audio = _audio(sum(sizes), codec.num_channels)
    tokens = codec.encode(audio, num_quantizers=num_quantizers)
    encoder = StreamingEncoder(codec, num_quantizers=num_quantizers)
    codes = torch.cat([*(encoder.push(piece) for piece in audio[0].split(sizes, dim=1)), encoder.flush()], dim=1)
    if audio.shape[2]:
        padded = torch.nn.functional.pad(audio, (0, -audio.shape[2] % HOP))
        whole = codec.encode(padded).codes
        assert_same_codes(codes[None], whole, codec.encoder(padded), codec.quantizer.codebooks)
    decoder = StreamingDecoder(codec)
    heard = torch.cat([*(decoder.push(piece) for piece in tokens.codes[0].split(3, dim=1)), decoder.flush()], dim=1)
    expected = codec.decode(tokens)[0]
    assert heard.shape[1] == tokens.codes.shape[2] * HOP
    loudest = max(1.0, float(expected.abs().max())) if expected.shape[1] else 1.0
    tolerance = FLOAT32_TOLERANCE * loudest  # sums round by their largest parts
    torch.testing.assert_close(heard[:, : expected.shape[1]], expected, rtol=0, atol=tolerance)


def test_padded_with_zeros_every_frame_is_there_at_once() -> None:
    codec = CODECS["zero"]
    codes, _ = codec.encode_step(_audio(HOP), codec.encode_init(1))
    heard, _ = codec.decode_step(codes, codec.decode_init(1))
    assert (codes.shape[2], heard.shape[2]) == (1, HOP)


def test_mirrored_frames_are_withheld_until_known() -> None:
    codec = CODECS["reflect"]
    state, counts = codec.encode_init(1), []
    for piece in _audio(10 * HOP).split(HOP, dim=2):
        codes, state = codec.encode_step(piece, state)
        counts.append(codes.shape[2])
    assert counts == [0, 0, 0, 0, 0, 0, 7, 1, 1, 1]
    assert codec.encode_delay_samples == 6 * HOP
    state, counts = codec.decode_init(1), []
    for piece in codec.encode(_audio(10 * HOP)).codes.split(1, dim=2):
        heard, state = codec.decode_step(piece, state)
        counts.append(heard.shape[2])
    assert counts == [0, 0, 0, 0, 0, 0, 7 * HOP, HOP, HOP, HOP]
    assert codec.decode_frames_after == 6


@pytest.mark.parametrize("name", CODECS)
@given(lengths=st.lists(st.integers(0, 30 * HOP), min_size=1, max_size=4), extra=st.integers(0, 3 * HOP))
@settings(max_examples=10)
def test_a_row_is_the_same_alone_and_in_a_batch(name: str, lengths: list[int], extra: int) -> None:
    codec = CODECS64[name]
    width = max(lengths) + extra
    audio = torch.full((len(lengths), codec.num_channels, width), 0.7)  # what lies past a row's end must not matter
    for row, length in enumerate(lengths):
        audio[row, :, :length] = _audio(length, codec.num_channels, seed=row)[0]
    tokens = codec.encode(audio, torch.tensor(lengths))
    heard = codec.decode(tokens)
    for row, length in enumerate(lengths):
        alone = codec.encode(_audio(length, codec.num_channels, seed=row))
        num_frames = alone.codes.shape[2]
        assert torch.equal(tokens.codes[row, :, :num_frames], alone.codes[0])
        assert not tokens.codes[row, :, num_frames:].any()
        expected = codec.decode(alone)[0]
        torch.testing.assert_close(heard[row, :, :length], expected, rtol=0, atol=FLOAT64_TOLERANCE)
        assert not heard[row, :, length:].any()
        if alone.scales is not None and tokens.scales is not None:
            num_scales = alone.scales.shape[1]
            torch.testing.assert_close(tokens.scales[row, :num_scales], alone.scales[0], rtol=1e-6, atol=0)
            assert not tokens.scales[row, num_scales:].any()


@pytest.mark.parametrize("name", WHOLE)
def test_codecs_that_are_not_causal_refuse_to_stream(name: str) -> None:
    codec = CODECS[name]
    audio = _audio(2 * HOP, codec.num_channels)
    codes = torch.zeros(1, 3, 2, dtype=torch.int64)
    for call in (
        lambda: codec.encode_init(1),
        lambda: codec.encode_step(audio, ()),
        lambda: codec.encode_flush(()),
        lambda: codec.decode_init(1),
        lambda: codec.decode_step(codes, ()),
        lambda: codec.decode_flush(()),
        lambda: StreamingEncoder(codec),
        lambda: StreamingDecoder(codec),
    ):
        with pytest.raises(ValueError, match="not causal and cannot stream"):
            call()


@pytest.mark.parametrize("name", ["soundstream", "zero", "reflect", "whole", "whole_reflect", "bidirectional"])
def test_what_a_frame_hears_is_what_it_says(name: str) -> None:
    codec = CODECS[name]
    num_frames, frame = 60, 40
    latents = torch.randn(1, 6, num_frames, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    heard = codec.decoder(latents)[0]
    for at in (frame, 0):
        piece = heard[:, at * HOP : (at + 1) * HOP]
        (gradient,) = torch.autograd.grad(piece.square().sum(), latents, retain_graph=True)
        used = gradient[0].abs().sum(0).nonzero()[:, 0]
        first, last = max(0, at - codec.decode_frames_before), min(num_frames - 1, at + codec.decode_frames_after)
        assert first <= int(used[0])
        assert int(used[-1]) <= last
        if at == frame and codec.decode_frames_before < at:
            assert int(used[0]) == first
    if name == "soundstream":
        assert 6 < codec.decode_frames_before < 20
        assert codec.decode_frames_after == 0
    else:  # a recurrent decoder hears everything since the start
        assert codec.decode_frames_before == UNLIMITED


@pytest.mark.parametrize("num_samples", [0, 1, 20])
def test_an_lstm_of_two_directions_is_one_each_way(num_samples: int) -> None:
    torch.manual_seed(0)
    both = LSTM(4, 1, bidirectional=True)
    weights = both.lstm.state_dict()
    forwards, backwards = nn.LSTM(4, 4), nn.LSTM(4, 4)
    forwards.load_state_dict({name: weights[name] for name in weights if not name.endswith("_reverse")})
    backwards.load_state_dict({name: weights[f"{name}_reverse"] for name in forwards.state_dict()})
    x = torch.randn(2, 4, num_samples)
    y = both(x)
    assert y.shape == (2, 8, num_samples)
    if num_samples:
        rows = x.permute(2, 0, 1)
        expected = torch.cat([forwards(rows)[0] + rows, backwards(rows.flip(0))[0].flip(0) + rows], dim=2)
        torch.testing.assert_close(y, expected.permute(1, 2, 0), rtol=0, atol=FLOAT32_TOLERANCE)
    with pytest.raises(ValueError, match="not causal: it takes whole signals only"):
        both.step(x, both.init_state(2))


def test_an_encoder_that_reads_both_ways_hears_everything() -> None:
    codec = CODECS["bidirectional"]
    assert codec.encode_delay_samples == codec.encode_samples_before == UNLIMITED
    audio = _audio(30 * HOP).requires_grad_(True)
    latents = codec.encoder(audio)
    for frame in (0, 29):
        (gradient,) = torch.autograd.grad(latents[0, :, frame].square().sum(), audio, retain_graph=True)
        assert gradient[0, 0, 0] != 0
        assert gradient[0, 0, -1] != 0


@pytest.mark.parametrize("name", ["zero", "soundstream", "stereo", "snake"])
def test_the_encoder_is_causal(name: str) -> None:
    codec = CODECS[name]
    audio = _audio(12 * HOP, codec.num_channels).requires_grad_(True)
    (gradient,) = torch.autograd.grad(codec.encoder(audio)[0, :, 5].square().sum(), audio)
    assert gradient[0, :, 6 * HOP - 1].any()
    assert not gradient[0, :, 6 * HOP :].any()


@pytest.mark.parametrize("name", ["zero", "soundstream", "reflect"])
def test_a_stretch_of_a_file_is_decoded_from_where_it_must(name: str, tmp_path: Path) -> None:
    save(CODECS[name], tmp_path / "tiny", name="tiny@1", dtype="float32")
    codec = load(tmp_path / "tiny")
    tokens = codec.encode(_audio(80 * HOP))
    token_format.write(tmp_path / "tiny.codec", tokens.codes.numpy(), model=tmp_path / "tiny")
    first_sample, num_samples = 60 * HOP + 5, 3 * HOP
    with token_format.open(tmp_path / "tiny.codec", model=tmp_path / "tiny") as reader:
        assert reader.header.num_frames_before == codec.decode_frames_before
        events = list(reader.events(first_sample, num_samples))
        heard = np.concatenate(list(decode_events(codec, reader.header, events)), axis=1)
    num_frames = sum(event.shape[2] for event in events if isinstance(event, np.ndarray))
    first_frame = 60 - min(60, codec.decode_frames_before)
    assert num_frames == min(80, 60 + 4 + codec.decode_frames_after) - first_frame
    assert (first_frame == 0) == (name != "soundstream")
    expected = codec.decode(tokens)[0, :, first_sample : first_sample + num_samples].numpy()
    np.testing.assert_allclose(heard, expected, rtol=0, atol=FLOAT32_TOLERANCE)


def test_segments_overlap_and_keep_their_loudness() -> None:
    codec = CODECS["segments"]
    length, stride = SEGMENTS["segment_samples"], SEGMENTS["segment_stride_samples"]
    num_samples = 3 * stride + 40
    audio = _audio(num_samples, 2)
    tokens = codec.encode(audio)
    assert tokens.scales is not None
    assert tokens.scales.shape == (1, 4)
    assert tokens.codes.shape[2] == 10 + 10 + 10 + 4
    parts = []
    for i in range(4):
        segment = audio[:, :, i * stride : i * stride + length]
        alone = codec.encode(segment)
        loudness = segment.mean(1).square().mean().sqrt()
        torch.testing.assert_close(tokens.scales[0, i], loudness, rtol=1e-5, atol=1e-7)
        assert torch.equal(
            alone.codes[:, :, :10][0], tokens.codes[0, :, i * 10 : (i + 1) * 10][:, : alone.codes.shape[2]]
        )
        num_frames = min(10, -(-segment.shape[2] // HOP))
        one = Tokens(
            tokens.codes[:, :, i * 10 : i * 10 + num_frames],
            torch.tensor([min(num_frames * HOP, stride)]),
            "",
            scales=tokens.scales[:, i : i + 1],
        )
        parts.append(codec.decode(one))
    heard = codec.decode(tokens)
    overlap = length - stride
    for i in range(3):  # between the overlaps a segment is heard alone
        inner = slice(i * stride + overlap * (i > 0), (i + 1) * stride)
        expected = parts[i][:, :, overlap * (i > 0) : stride]
        torch.testing.assert_close(heard[:, :, inner], expected, rtol=0, atol=FLOAT32_TOLERANCE)


def test_overlapping_segments_fade_into_each_other() -> None:
    codec = CODECS["segments"]
    length, stride = SEGMENTS["segment_samples"], SEGMENTS["segment_stride_samples"]
    tokens = codec.encode(_audio(2 * stride, 2))
    assert tokens.scales is not None

    def decoded(*factors: float) -> torch.Tensor:
        assert tokens.scales is not None
        return codec.decode(dataclasses.replace(tokens, scales=tokens.scales * torch.tensor([factors])))

    # Decoding is linear in the scales, so each segment's share of the sum can be heard alone.
    first, second, both = decoded(1, 0), decoded(0, 1), decoded(1, 1)
    torch.testing.assert_close(first + second, both, rtol=0, atol=FLOAT32_TOLERANCE)
    alone = codec.decoder(codec.quantizer.decode(tokens.codes[:, :, :10])) * tokens.scales[:, :1, None]
    fading = torch.arange(length - stride, 0, -1) / (length - stride + 1)
    share = torch.cat([torch.ones(stride), fading])
    torch.testing.assert_close(first[:, :, :length], share * alone, rtol=0, atol=FLOAT32_TOLERANCE)
    assert not first[:, :, length:].any()
    assert not second[:, :, :stride].any()


def test_loudness_is_taken_out_and_given_back() -> None:
    codec = CODECS["segments"]
    audio = _audio(100, 2)
    tokens, loud = codec.encode(audio), codec.encode(4 * audio)
    assert torch.equal(tokens.codes, loud.codes)
    torch.testing.assert_close(4 * codec.decode(tokens), codec.decode(loud), rtol=0, atol=FLOAT32_TOLERANCE)
    silent = codec.encode(torch.zeros(1, 2, 100))
    assert codec.decode(silent).abs().max() < 1e-6


@pytest.mark.parametrize("name", CODECS)
def test_prefixes_are_what_fewer_quantizers_encode(name: str) -> None:
    codec = CODECS[name]
    audio = _audio(20 * HOP, codec.num_channels)
    whole = codec.encode(audio)
    for num_quantizers in codec.valid_num_quantizers:
        fewer = codec.encode(audio, num_quantizers=num_quantizers)
        assert torch.equal(fewer.codes, whole.prefix(num_quantizers).codes)
        assert codec.decode(fewer).shape == audio.shape


@pytest.mark.parametrize("name", CODECS)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    codec = CODECS[name]
    codec_id = save(codec, tmp_path / "tiny", name="tiny@1", dtype="float32")
    loaded = load(tmp_path / "tiny")
    assert (loaded.codec_id, loaded.config, loaded.name) == (codec_id, codec.config, "tiny@1")
    audio = _audio(20 * HOP, codec.num_channels)
    tokens, again = codec.encode(audio), loaded.encode(audio)
    assert torch.equal(tokens.codes, again.codes)
    assert torch.equal(codec.decode(tokens), loaded.decode(again))


def test_weight_norm_leaves_the_layout_as_it_was() -> None:
    codec = _codec()
    before = set(codec.state_dict())
    add_weight_norm(codec)
    assert set(codec.state_dict()) != before
    fold_weight_norm(codec)
    assert set(codec.state_dict()) == before
    assert "encoder.layers.0.weight" in before
    assert "decoder.layers.1.lstm.weight_ih_l0" in before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": ()}, "ratios must be one or more"),
        ({"ratios": (4, 0)}, "ratios must be one or more"),
        ({"num_filters": 5}, "num_filters=5 is not a multiple of compress=2"),
        ({"kernel_size": 0}, "kernel_size must be positive"),
        ({"num_lstm_layers": -1}, "must not be negative"),
        ({"pad_mode": "same"}, "pad_mode='same' is not one of"),
        ({"norm": "batch"}, "norm='batch' is not one of"),
        ({"activation": "relu"}, r"activation='relu' is not one of \('elu', 'snake'\)"),
        ({"bidirectional_lstm": True}, "bidirectional_lstm needs causal=False"),
        ({"bidirectional_lstm": True, "causal": False, "num_lstm_layers": 0}, "bidirectional_lstm needs causal=False"),
        ({"norm": "group"}, "need causal=False"),
        ({"normalize_loudness": True}, "need causal=False"),
        ({"causal": False, "segment_samples": 24}, "go together"),
        (
            {"causal": False, "segment_samples": 100, "segment_stride_samples": 50},
            r"segment_samples=100 is not a multiple of the 12 samples per frame that ratios=\(3, 2, 2\) make",
        ),
        ({"causal": False, "segment_samples": 24, "segment_stride_samples": 25}, "not in 1..24"),
    ],
)
def test_impossible_configurations_are_value_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**changes)
    data = codec_config.to_dict(_config()) | changes
    with pytest.raises(ValueError, match="model"):
        codec_config.from_dict(data, "model")


def test_callers_mistakes_are_value_errors() -> None:
    streaming, segments = CODECS["zero"], CODECS["segments"]
    audio = _audio(4 * HOP, 2)
    tokens = segments.encode(audio)
    with pytest.raises(ValueError, match=r"audio must be \[B, 1, n \* 12\]"):
        streaming.encode_step(torch.zeros(1, 1, 13), streaming.encode_init(1))
    with pytest.raises(ValueError, match=r"codes must be int64 \[B, K, n\]"):
        streaming.decode_step(torch.zeros(1, 3, 2), streaming.decode_init(1))
    with pytest.raises(ValueError, match="no global codes"):
        streaming.decode_init(1, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="audio must be float"):
        segments.encode(audio[:, :1])
    with pytest.raises(ValueError, match="num_quantizers=4 is not one of"):
        segments.encode(audio, num_quantizers=4)
    with pytest.raises(ValueError, match="made by codec 'other'"):
        segments.decode(dataclasses.replace(tokens, codec_id="other"))
    with pytest.raises(ValueError, match="more than the 4 frames"):
        segments.decode(dataclasses.replace(tokens, num_samples=torch.tensor([5 * HOP])))
    with pytest.raises(ValueError, match="tokens have scales"):
        segments.decode(dataclasses.replace(tokens, scales=None))
    with pytest.raises(ValueError, match="tokens have no scales"):
        CODECS["reflect"].decode(dataclasses.replace(tokens, scales=torch.ones(1, 1)))
    with pytest.raises(ValueError, match="no global codes"):
        segments.decode(dataclasses.replace(tokens, global_codes=torch.zeros(1, 2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="more than the 0 scales"):
        segments.decode(dataclasses.replace(tokens, scales=torch.ones(1, 0)))
