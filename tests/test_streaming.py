import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec

CODEC, VOICED = tiny_codec(), tiny_voiced_codec()
HOP, VOICE_SAMPLES = CODEC.hop_length, VOICED.voice_samples


def _audio(num_samples: int) -> torch.Tensor:
    return torch.from_numpy(speech_like(num_samples))[None]


@given(sizes=st.lists(st.integers(0, 3 * HOP), max_size=12), num_quantizers=st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=30)
def test_a_stream_encodes_to_the_bits_of_the_file(
    num_threads: int, sizes: list[int], num_quantizers: int | None
) -> None:
    audio = _audio(sum(sizes))
    encoder = StreamingEncoder(CODEC, num_quantizers=num_quantizers)
    parts = [encoder.push(piece) for piece in audio.split(sizes, dim=1)] if sizes else []
    for index, part in enumerate(parts):
        ready = sum(sizes[: index + 1]) // HOP - sum(sizes[:index]) // HOP
        assert part.shape == (num_quantizers or 3, ready), "a frame is due as soon as its last sample is there"
    codes = torch.cat([*parts, encoder.flush()], dim=1)
    assert torch.equal(codes, CODEC.encode(audio[None], num_quantizers=num_quantizers).codes[0])


@given(cuts=st.lists(st.integers(0, 6), max_size=10), missing=st.integers(0, HOP - 1))
@settings(max_examples=30)
def test_a_stream_decodes_to_the_bits_of_the_file(num_threads: int, cuts: list[int], missing: int) -> None:
    num_samples = max(0, sum(cuts) * HOP - missing)
    tokens = CODEC.encode(_audio(num_samples)[None])
    decoder = StreamingDecoder(CODEC)
    parts = [decoder.push(piece) for piece in tokens.codes[0].split(cuts, dim=1)] if cuts else []
    joined = torch.cat([*parts, decoder.flush()], dim=1)
    assert joined.shape == (1, sum(cuts) * HOP)
    assert torch.equal(joined[:, :num_samples], CODEC.decode(tokens)[0])


def test_one_sample_at_a_time_and_all_at_once_agree() -> None:
    audio = _audio(2 * HOP + 5)
    slow, fast = StreamingEncoder(CODEC), StreamingEncoder(CODEC)
    pieces = [slow.push(audio[:, i : i + 1]) for i in range(audio.shape[1])]
    assert torch.equal(torch.cat([*pieces, slow.flush()], dim=1), torch.cat([fast.push(audio), fast.flush()], dim=1))


def test_a_minute_in_one_push_equals_the_file() -> None:
    audio = _audio(60 * CODEC.sample_rate_hz)
    encoder, decoder = StreamingEncoder(CODEC), StreamingDecoder(CODEC)
    codes = torch.cat([encoder.push(audio), encoder.flush()], dim=1)
    heard = torch.cat([decoder.push(codes), decoder.flush()], dim=1)
    tokens = CODEC.encode(audio[None])
    assert torch.equal(codes, tokens.codes[0])
    assert torch.equal(heard[:, : audio.shape[1]], CODEC.decode(tokens)[0])


def test_forks_go_separate_ways() -> None:
    audio = _audio(10 * HOP + 30)
    encoder = StreamingEncoder(CODEC)
    encoder.push(audio[:, : 4 * HOP + 11])
    fork = encoder.fork()
    fork.push(torch.zeros(1, 3 * HOP))
    rest = torch.cat([encoder.push(audio[:, 4 * HOP + 11 :]), encoder.flush()], dim=1)
    tokens = CODEC.encode(audio[None])
    assert torch.equal(rest, tokens.codes[0, :, 4:])

    decoder = StreamingDecoder(CODEC)
    first = decoder.push(tokens.codes[0, :, :5])
    other = decoder.fork()
    other.push(tokens.codes[0, :, :3])
    other.flush()
    joined = torch.cat([first, decoder.push(tokens.codes[0, :, 5:]), decoder.flush()], dim=1)
    assert torch.equal(joined[:, : audio.shape[1]], CODEC.decode(tokens)[0])


def test_reset_begins_again() -> None:
    audio = _audio(5 * HOP)
    encoder = StreamingEncoder(CODEC)
    once = torch.cat([encoder.push(audio), encoder.flush()], dim=1)
    encoder.reset()
    assert torch.equal(torch.cat([encoder.push(audio), encoder.flush()], dim=1), once)
    decoder = StreamingDecoder(CODEC)
    heard = torch.cat([decoder.push(once), decoder.flush()], dim=1)
    decoder.reset()
    assert torch.equal(torch.cat([decoder.push(once), decoder.flush()], dim=1), heard)


def test_the_callers_buffer_may_be_reused() -> None:
    audio = _audio(HOP)
    encoder = StreamingEncoder(CODEC)
    buffer = audio[:, : HOP - 1].clone()
    encoder.push(buffer)
    buffer.fill_(9.0)
    assert torch.equal(encoder.push(audio[:, HOP - 1 :]), CODEC.encode(audio[None]).codes[0])


def test_callers_mistakes_are_value_errors() -> None:
    encoder, decoder = StreamingEncoder(CODEC), StreamingDecoder(CODEC)
    with pytest.raises(ValueError, match=r"audio must be float \[1, n\]"):
        encoder.push(torch.zeros(10))
    with pytest.raises(ValueError, match="NaN or infinity"):
        encoder.push(torch.full((1, 3), float("nan")))
    with pytest.raises(ValueError, match=r"codes must be int64 \[K, F\]"):
        decoder.push(torch.zeros(1, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_quantizers=9 is not one of"):
        StreamingEncoder(CODEC, num_quantizers=9)
    encoder.flush()
    decoder.flush()
    for call in (lambda: encoder.push(torch.zeros(1, 1)), encoder.flush, decoder.flush):
        with pytest.raises(ValueError, match="was flushed"):
            call()


# Codecs that keep the voice apart


def _voice(encoder: StreamingEncoder) -> torch.Tensor:
    voice = encoder.global_codes
    assert voice is not None
    return voice


@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6))
@settings(max_examples=25)
def test_a_stream_has_the_voice_of_the_file_as_soon_as_it_was_heard(sizes: list[int]) -> None:
    audio = _audio(sum(sizes))
    tokens = VOICED.encode(audio[None])
    assert tokens.global_codes is not None
    expected = tokens.global_codes[0]
    encoder, num_pushed, codes = StreamingEncoder(VOICED), 0, []
    for piece in audio.split(sizes, dim=1):
        codes.append(encoder.push(piece))
        num_pushed += piece.shape[1]
        voice = encoder.global_codes
        assert (voice is not None) == (num_pushed >= VOICE_SAMPLES)
        assert voice is None or torch.equal(voice, expected)
    codes.append(encoder.flush())
    assert torch.equal(_voice(encoder), expected)
    assert torch.equal(torch.cat(codes, dim=1), tokens.codes[0])


def test_the_voice_may_be_asked_for_at_any_time() -> None:
    audio = _audio(3 * VOICE_SAMPLES)
    encoder = StreamingEncoder(VOICED)
    encoder.push(audio)
    kept = sum(piece.shape[1] for piece in encoder._voice._heard)
    encoder.flush()
    assert kept == VOICE_SAMPLES, "what says nothing of the voice is not kept"
    assert torch.equal(_voice(encoder), VOICED.encode_global(audio[None])[0])


def test_voices_of_forks_and_of_the_next_recording() -> None:
    first, other = _audio(VOICE_SAMPLES + 100), torch.rand(1, VOICE_SAMPLES) - 0.5
    encoder = StreamingEncoder(VOICED)
    encoder.push(first[:, :1000])
    fork = encoder.fork()
    encoder.push(first[:, 1000:])
    fork.push(other[:, 1001:])
    assert fork.global_codes is None
    fork.push(other[:, :1])
    mixed = torch.cat([first[:, :1000], other[:, 1001:], other[:, :1]], dim=1)
    for stream, heard in ((encoder, first), (fork, mixed)):
        assert torch.equal(_voice(stream), VOICED.encode_global(heard[None])[0])
    encoder.reset()
    assert encoder.global_codes is None
    encoder.push(other)
    assert torch.equal(_voice(encoder), VOICED.encode_global(other[None])[0])
    assert not torch.equal(VOICED.encode_global(other[None]), VOICED.encode_global(first[None]))


def test_a_given_voice_is_there_at_once_and_stays() -> None:
    voice = torch.tensor([3, 0, 63, 9])
    for given_voice in (voice, voice[None]):
        encoder = StreamingEncoder(VOICED, global_codes=given_voice)
        for _ in range(2):
            encoder.push(_audio(VOICE_SAMPLES))
            assert _voice(encoder).tolist() == voice.tolist()
            encoder.reset()
    assert StreamingEncoder(CODEC).global_codes is None


def test_a_stream_speaks_in_the_voice_it_is_given() -> None:
    tokens = VOICED.encode(_audio(10 * HOP)[None])
    for voice in (torch.tensor([3, 0, 63, 9]), torch.tensor([[60, 1, 2, 3]])):
        decoder = StreamingDecoder(VOICED, global_codes=voice)
        expected = VOICED.decode(tokens.with_voice(voice))[0]
        for _ in range(2):
            heard = torch.cat([*map(decoder.push, tokens.codes[0].split([3, 7], dim=1)), decoder.flush()], dim=1)
            assert torch.equal(heard, expected)
            decoder.reset()
        assert not torch.equal(expected, VOICED.decode(tokens)[0])


def test_voices_that_are_missing_or_none_of_the_codecs() -> None:
    with pytest.raises(ValueError, match=r"this codec needs global codes, int64 \[1, 4\] in 0\.\.63"):
        StreamingDecoder(VOICED)
    voice = torch.zeros(4, dtype=torch.int64)
    for make in (StreamingEncoder, StreamingDecoder):
        for wrong in (voice[:3], voice + 64, voice.float(), voice.expand(2, 4), torch.tensor(3)):
            with pytest.raises(ValueError, match=r"global_codes must be int64 \[1, 4\]"):
                make(VOICED, global_codes=wrong)
        with pytest.raises(ValueError, match="does not keep the voice apart"):
            make(CODEC, global_codes=voice)
