"""Losses are heard as sound that goes on and fades: bounded, without clicks, in time, and then it is as if none was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec import config as codec_config
from codec.models.interface import UNLIMITED, StreamableCodec, streamable
from codec.models.mimi import MimiConfig
from codec.models.seanet import SEANetCodec, SEANetConfig
from codec.models.voice import VoicedCodec
from codec.pretrained import load
from codec.quantizers.residual import ResidualVQConfig
from codec.quantizers.split import SplitVQConfig
from codec.streaming import StreamingDecoder
from codec.streaming.concealment import Concealer
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec
from codec.tokens import Tokens

HOLD, FADE, RISE = 640, 1280, 160  # samples at 16 kHz


def _seanet(**changes: Any) -> SEANetCodec:
    values: dict[str, Any] = {
        "sample_rate_hz": 16000,
        "quantizer": ResidualVQConfig(latent_dim=6, num_stages=3, codebook_size=16),
        "ratios": (4, 4, 4),
        "num_filters": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec: SEANetCodec = codec_config.build(SEANetConfig(**values | changes))
        with torch.no_grad():
            for name, value in codec.named_parameters():
                value.mul_(2.0 if name.endswith("weight") and ".norm." not in name else 1.0)
            codec.quantizer.get_buffer("codebooks").mul_(3.0)
    return codec.eval().requires_grad_(False)


def _mimi() -> StreamableCodec:
    config = MimiConfig(
        sample_rate_hz=16000,
        quantizer=SplitVQConfig(latent_dim=8, num_stages=4, codebook_size=16, codebook_dim=6),
        ratios=(4, 4),
        num_filters=4,
        num_layers=2,
        num_heads=2,
        feedforward_dim=12,
        window=7,
        initial_scale=0.7,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec: StreamableCodec = codec_config.build(config)
        with torch.no_grad():
            for name, value in codec.named_parameters():
                value.mul_(2.0 if name.endswith("weight") and "norm" not in name else 1.0)
    return codec.eval().requires_grad_(False)


CODECS: dict[str, Callable[[], StreamableCodec]] = {
    "multirate": tiny_codec,
    "late": lambda: tiny_codec(decode_delay_frames=3),
    "voiced": tiny_voiced_codec,
    "soundstream": lambda: _seanet(num_lstm_layers=0),
    "encodec": _seanet,
    "reflect": lambda: _seanet(pad_mode="reflect"),
    "mimi": _mimi,
    "speech_16k": lambda: streamable(load("speech_16k")),
    "speech_16k_semantic": lambda: streamable(load("speech_16k_semantic")),
}
MADE: dict[str, StreamableCodec] = {}


def _made(name: str) -> StreamableCodec:
    if name not in MADE:
        MADE[name] = CODECS[name]()
    return MADE[name]


def _tokens(codec: StreamableCodec, num_frames: int, *, seed: int = 0) -> Tokens:
    return codec.encode(torch.from_numpy(speech_like(num_frames * codec.hop_length, seed=seed))[None, None])


def _decoder(codec: StreamableCodec, tokens: Tokens) -> StreamingDecoder:
    return StreamingDecoder(codec, global_codes=tokens.global_codes)


def _heard(decoder: StreamingDecoder, codes: Tensor, lost: list[tuple[int, int]]) -> Tensor:
    """All audio [n] of codes [K, F] of which some frames, from first to last, are lost."""
    parts, at = [], 0
    for first, last in lost:
        parts += [decoder.push(codes[:, at:first]), decoder.conceal(last - first)]
        at = last
    return torch.cat([*parts, decoder.push(codes[:, at:]), decoder.flush()], dim=1)[0]


@pytest.mark.parametrize("name", CODECS)
def test_a_loss_is_bounded_and_does_not_click(name: str) -> None:
    codec = _made(name)
    tokens = _tokens(codec, 40000 // codec.hop_length)
    codes, hop = tokens.codes[0], codec.hop_length
    true = codec.decode(tokens)[0, 0]
    steepest = true.diff().abs().max()
    num_lost = 4800 // hop
    for first in range(max(3, 640 // hop), codes.shape[1] - num_lost, codes.shape[1] // 7):
        heard = _heard(_decoder(codec, tokens), codes, [(first, first + num_lost)])
        assert heard.shape == (codes.shape[1] * hop,)
        begin, end = first * hop, (first + num_lost) * hop
        before = true[max(0, begin - 1600) : begin]
        concealed = heard[begin:end]
        assert concealed.abs().max() <= 2.0 * before.abs().max() + 1e-3
        level, level_before = (part.square().mean().sqrt() for part in (concealed[:HOLD], before[-max(2 * hop, 320) :]))
        assert level <= 1.5 * level_before + 1e-3
        assert heard[end:].abs().max() <= 1.5 * true.abs().max()
        assert heard.diff().abs().max() <= 1.25 * steepest, "it clicks"
        assert concealed[HOLD + FADE :].abs().max() == 0.0
        # What the decoder gave before the loss could be known stays.
        known = max(0, first - codec.decode_frames_after) * hop
        torch.testing.assert_close(heard[:known], true[:known], rtol=0, atol=0 if codec.is_bit_exact else 1e-5)


@pytest.mark.parametrize("name", ["multirate", "late", "soundstream", "speech_16k"])
@pytest.mark.parametrize("num_lost", [1, 5, 3000])
def test_after_a_loss_the_audio_is_soon_what_it_is_without(name: str, num_lost: int) -> None:
    codec = _made(name)
    hop, reach = codec.hop_length, codec.decode_frames_before
    num_lost = num_lost if name != "speech_16k" else min(num_lost, 20)
    tokens = _tokens(codec, 10 + num_lost + reach + 10 + RISE // hop)
    true = codec.decode(tokens)[0, 0]
    heard = _heard(_decoder(codec, tokens), tokens.codes[0], [(10, 10 + num_lost)])
    again = max((10 + num_lost + reach) * hop, (10 + num_lost) * hop + RISE)
    torch.testing.assert_close(heard[again:], true[again:], rtol=0, atol=0 if codec.is_bit_exact else 1e-5)
    assert not torch.equal(heard[10 * hop : again], true[10 * hop : again])


@pytest.mark.parametrize("name", ["multirate", "late", "voiced", "encodec", "reflect", "mimi"])
@given(script=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=7), cuts=st.randoms(use_true_random=False))
@settings(max_examples=12)
def test_pieces_change_nothing_and_lengths_are_those_of_pushes(
    name: str, script: list[tuple[bool, int]], cuts: Any
) -> None:
    codec = _made(name)
    num_frames = sum(size for _, size in script)
    tokens = _tokens(codec, max(num_frames, 1))
    whole, pieces, plain = (_decoder(codec, tokens) for _ in range(3))
    parts: list[list[Tensor]] = [[], [], []]
    at = 0
    for is_lost, size in script:
        codes = tokens.codes[0, :, at : at + size]
        at += size
        parts[0].append(whole.conceal(size) if is_lost else whole.push(codes))
        parts[2].append(plain.push(codes))
        assert parts[0][-1].shape == parts[2][-1].shape
        while size:
            some = cuts.randint(1, size)
            parts[1].append(pieces.conceal(some) if is_lost else pieces.push(codes[:, -size:][:, :some]))
            size -= some
    one, other = (
        torch.cat([*found, decoder.flush()], dim=1) for found, decoder in zip(parts, (whole, pieces), strict=False)
    )
    assert one.shape == (1, num_frames * codec.hop_length)
    torch.testing.assert_close(one, other, rtol=0, atol=0 if codec.is_bit_exact else 1e-5)


@pytest.mark.parametrize("name", ["multirate", "voiced", "encodec", "reflect", "mimi"])
def test_a_stream_may_begin_with_a_loss(name: str) -> None:
    codec = _made(name)
    tokens = _tokens(codec, 40)
    heard = _heard(_decoder(codec, tokens), tokens.codes[0], [(0, 10)])
    begin = 10 * codec.hop_length
    assert heard.shape == (40 * codec.hop_length,)
    assert heard[:begin].abs().max() == 0.0
    assert heard[begin:].abs().max() > 0.0
    assert heard.diff().abs().max() <= 1.25 * codec.decode(tokens).diff().abs().max()
    nothing = _decoder(codec, tokens)
    assert torch.cat([nothing.conceal(7), nothing.flush()], dim=1).equal(torch.zeros(1, 7 * codec.hop_length))


def test_many_losses_and_a_minute_of_it() -> None:
    codec = _made("multirate")
    tokens = _tokens(codec, 600)
    true = codec.decode(tokens)[0, 0]
    lost = [(first, first + 1 + first % 7) for first in range(4, 590, 11)]
    heard = _heard(_decoder(codec, tokens), tokens.codes[0], lost)
    assert heard.abs().max() <= 1.5 * true.abs().max()
    assert heard.diff().abs().max() <= 1.25 * true.diff().abs().max()
    decoder = _decoder(codec, tokens)
    decoder.push(tokens.codes[0, :, :50])
    minute = decoder.conceal(60 * 250)
    assert minute.shape == (1, 60 * 16000)
    assert minute[:, codec.decode_delay_samples + HOLD + FADE :].abs().max() == 0.0
    assert decoder.push(tokens.codes[0, :, 50:]).abs().max() > 0.1 * true.abs().max()


def test_forks_and_resets_know_of_losses() -> None:
    codec = _made("multirate")
    tokens = _tokens(codec, 30)
    codes = tokens.codes[0]
    decoder = _decoder(codec, tokens)
    decoder.push(codes[:, :5])
    decoder.conceal(2)
    fork = decoder.fork()
    rest = [decoder.conceal(6), decoder.push(codes[:, 13:]), decoder.flush()]
    assert fork.push(codes[:, 7:]).shape == (1, 23 * codec.hop_length)  # no loss of the other's
    decoder.reset()
    again = [decoder.push(codes[:, :5]), decoder.conceal(8), decoder.push(codes[:, 13:]), decoder.flush()]
    joined = torch.cat(again, dim=1)
    assert torch.equal(joined[:, 7 * codec.hop_length - codec.decode_delay_samples :], torch.cat(rest, dim=1))
    decoder.reset()
    decoder.conceal(9)
    decoder.reset()
    heard = torch.cat([decoder.push(codes), decoder.flush()], dim=1)
    assert torch.equal(heard, codec.decode(tokens)[0])


def test_mistakes_are_value_errors() -> None:
    decoder = StreamingDecoder(_made("multirate"))
    with pytest.raises(ValueError, match="num_frames must not be negative, got -1"):
        decoder.conceal(-1)
    assert decoder.conceal(0).shape == (1, 0)
    assert decoder.flush().shape == (1, 0)
    with pytest.raises(ValueError, match="was flushed"):
        decoder.conceal(1)


# The value behind it


def _concealer() -> Concealer:
    return Concealer.of(_made("multirate"))


def test_the_gain_holds_falls_and_rises_at_the_lost_frames_place() -> None:
    codes, hop = torch.arange(30).view(3, 10), 64
    concealer = _concealer().heard(codes)
    _, concealer = concealer.lost(40)
    concealer = concealer.heard(codes)
    gain, concealer = concealer.shape(torch.ones(1, 60 * hop))
    begin, end = 10 * hop, 50 * hop
    assert bool((gain[:, : begin + HOLD] == 1).all())
    fall = 1 - torch.arange(FADE) / FADE
    torch.testing.assert_close(gain[0, begin + HOLD : begin + HOLD + FADE], fall, rtol=0, atol=1e-6)
    assert bool((gain[:, begin + HOLD + FADE : end] == 0).all())
    torch.testing.assert_close(gain[0, end : end + RISE], torch.arange(RISE) / RISE, rtol=0, atol=1e-6)
    assert bool((gain[:, end + RISE :] == 1).all())
    assert not concealer.ramps


def test_a_gain_of_one_leaves_the_very_same_tensor() -> None:
    concealer = _concealer().heard(torch.zeros(3, 4, dtype=torch.int64))
    audio = torch.ones(1, 100)
    same, concealer = concealer.shape(audio)
    assert same is audio
    _, concealer = concealer.lost(1)
    same, concealer = concealer.shape(audio)  # the loss is still to come
    assert same is audio
    concealer = concealer.heard(torch.zeros(3, 1, dtype=torch.int64))
    same, concealer = concealer.shape(torch.ones(1, 6 * 64 - 200))
    assert bool((same == 1).all())
    assert not concealer.ramps


def test_the_last_frame_goes_on_while_it_is_heard() -> None:
    codes = torch.tensor([[1, 2], [3, 4]])
    concealer = _concealer().heard(codes)
    codes.fill_(9)  # a caller may use its buffer again
    first, concealer = concealer.lost(3)
    rest, concealer = concealer.lost(60)
    instead = torch.cat([first, rest], dim=1)
    num_steady = (HOLD + FADE) // 64 + 1
    assert instead[:, :num_steady].tolist() == [[2] * num_steady, [4] * num_steady]
    assert bool((instead[:, num_steady:] == -1).all())
    assert _concealer().lost(2)[0].tolist() == [[-1, -1]]
    batch, _ = _concealer().heard(torch.tensor([[[1]], [[2]]])).lost(2)
    assert batch.tolist() == [[[1, 1]], [[2, 2]]]


@given(
    script=st.lists(st.tuples(st.booleans(), st.integers(0, 40)), min_size=1, max_size=8),
    data=st.data(),
)
@settings(max_examples=40)
def test_samples_may_come_as_late_as_they_like(script: list[tuple[bool, int]], data: st.DataObject) -> None:
    early, late = _concealer(), _concealer()
    parts: list[Tensor] = []
    num_in = num_out = 0
    for is_lost, size in script:
        codes = torch.zeros(3, size, dtype=torch.int64)
        early = early.lost(size)[1] if is_lost else early.heard(codes)
        late = late.lost(size)[1] if is_lost else late.heard(codes)
        num_in += size * 64
        num_now = data.draw(st.integers(0, num_in - num_out))
        part, early = early.shape(torch.ones(1, num_now))
        parts.append(part)
        num_out += num_now
    part, early = early.shape(torch.ones(1, num_in - num_out))
    joined = torch.cat([*parts, part], dim=1)
    assert torch.equal(joined, late.shape(torch.ones(1, num_in))[0])
    assert float(joined.diff().abs().max() if num_in > 1 else 0) <= 1 / RISE + 1e-6


def test_codecs_are_those_that_they_are_called() -> None:
    assert _made("soundstream").decode_frames_before < UNLIMITED
    assert isinstance(_made("voiced"), VoicedCodec)
    assert _made("late").decode_delay_samples == 3 * 64
