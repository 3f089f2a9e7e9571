"""Containers of codecs that keep the voice apart: global codes come first, and say what a whole recording has."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import write_wav
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec import windows
from codec.audio import AudioReader, fit_length, resample
from codec.bitstream import BitstreamError, Event, Reader, SegmentEnd, SegmentStart
from codec.models.bicodec import BiCodec, BiCodecConfig
from codec.models.semantic_global import SemanticGlobalCodec
from codec.models.voice import VoicedCodec
from codec.pretrained import load, save
from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.scalar import FSQConfig
from codec.stretch import Stretch
from codec.testing import speech_like, tiny_codec
from codec.token_format import cut, join
from codec.transcode import convert_audio, decode_audio, decode_events, encode_audio, encode_blocks, hear_voice
from codec.windows import WindowedDecoder

pytest_plugins = ["commands"]

HOP, VOICE_SAMPLES = 64, 4000


@pytest.fixture(scope="module")
def codec(voiced_model: Path) -> SemanticGlobalCodec:
    model = load(voiced_model)
    assert isinstance(model, SemanticGlobalCodec)
    assert (model.hop_length, model.voice_samples) == (HOP, VOICE_SAMPLES)
    return model


def recording(num_channels: int, num_samples: int, rate_hz: int = 16000, seed: int = 0) -> np.ndarray:
    return np.stack([speech_like(num_samples, rate_hz=rate_hz, seed=seed + n) for n in range(num_channels)])


def container_of(codec: VoicedCodec, audio: np.ndarray, rate_hz: int = 16000, **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    encode_blocks(codec, [audio], stream, rate_hz=rate_hz, num_channels=len(audio), **options)
    stream.seek(0)
    return stream


def decoded(codec: VoicedCodec, source: io.BytesIO, *stretch: int, **options: Any) -> np.ndarray:
    source.seek(0)
    reader = Reader(source)
    return np.concatenate(list(decode_events(codec, reader.header, reader.events(*stretch), **options)), axis=1)


def batch_of(audio: np.ndarray, rate_hz: int = 16000) -> Tensor:
    return torch.from_numpy(resample(audio, rate_hz, 16000).copy())[:, None]


def voices_in(source: io.BytesIO) -> list[list[list[int]]]:
    source.seek(0)
    starts = [segment.start for segment in Reader(source).segments]
    assert {start.global_codebook_size for start in starts} == {64}
    return [start.global_codes.tolist() for start in starts if start.global_codes is not None]


@given(
    rate_hz=st.sampled_from([8000, 16000, 44100]),
    num_channels=st.sampled_from([1, 2]),
    milliseconds=st.integers(0, 400),  # the voice is in the first 250
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=5).filter(any),
    num_quantizers=st.sampled_from([None, 1, 3]),
    is_voice_given=st.booleans(),
)
@settings(max_examples=40)
def test_pieces_make_the_tokens_and_the_audio_of_the_whole(
    codec: SemanticGlobalCodec,
    rate_hz: int,
    num_channels: int,
    milliseconds: int,
    sizes: list[int],
    num_quantizers: int | None,
    is_voice_given: bool,
) -> None:
    audio = recording(num_channels, milliseconds * rate_hz // 1000 + 1, rate_hz)
    voice = np.array([5, 0, 63, 7]) if is_voice_given else None
    cuts = np.minimum(np.cumsum(sizes), audio.shape[1])
    stream = io.BytesIO()
    num_samples = encode_blocks(
        codec,
        np.split(audio, cuts, axis=1),
        stream,
        rate_hz=rate_hz,
        num_channels=num_channels,
        num_quantizers=num_quantizers,
        global_codes=voice,
    )
    assert num_samples == audio.shape[1]
    voices = None if voice is None else torch.from_numpy(voice).expand(num_channels, -1)
    tokens = codec.encode(batch_of(audio, rate_hz), num_quantizers=num_quantizers, global_codes=voices)
    assert tokens.global_codes is not None
    assert voices_in(stream) == [tokens.global_codes.tolist()]
    stream.seek(0)
    np.testing.assert_array_equal(Reader(stream).read(), tokens.codes.numpy())
    heard = codec.decode(tokens)[:, 0].numpy()
    np.testing.assert_array_equal(decoded(codec, stream), fit_length(resample(heard, 16000, rate_hz), num_samples))


def test_two_channels_have_two_voices(codec: SemanticGlobalCodec) -> None:
    audio = np.stack([recording(1, 5000)[0], np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)])
    (voices,) = voices_in(container_of(codec, audio))
    assert voices[0] != voices[1]
    assert voices == [voices_in(container_of(codec, row[None]))[0][0] for row in audio]


def test_a_given_voice_is_written_at_once_and_a_heard_one_as_soon_as_it_is_heard(codec: SemanticGlobalCodec) -> None:
    audio = recording(1, 6000)

    def num_bytes_after(voice: np.ndarray | None) -> list[int]:
        stream, seen = io.BytesIO(), []

        def blocks() -> Iterator[np.ndarray]:
            for first in range(0, 6000, 500):
                seen.append(len(stream.getvalue()))
                yield audio[:, first : first + 500]

        encode_blocks(codec, blocks(), stream, rate_hz=16000, num_channels=1, global_codes=voice, frames_per_block=1)
        return seen

    given_at, heard_at = (np.array(num_bytes_after(voice)) for voice in (np.zeros(4, np.int64), None))
    assert given_at[0] > 30
    assert (np.diff(given_at) > 0).all()
    # When the ninth block is asked for, eight have come: 4000 samples.
    assert np.flatnonzero(heard_at).tolist() == [8, 9, 10, 11]
    assert heard_at[8] == given_at[8]


def test_nothing_at_all_has_a_voice_too(codec: SemanticGlobalCodec) -> None:
    for blocks in ([], [np.zeros((1, 0), np.float32)]):
        stream = io.BytesIO()
        assert encode_blocks(codec, blocks, stream, rate_hz=16000, num_channels=1) == 0
        assert voices_in(stream) == [codec.encode_global(torch.zeros(1, 1, 0)).tolist()]
        assert decoded(codec, stream).shape == (1, 0)


@pytest.mark.parametrize("rate_hz", [16000, 22050])
def test_a_reference_of_any_kind_says_a_voice(codec: SemanticGlobalCodec, rate_hz: int, tmp_path: Path) -> None:
    audio = recording(2, rate_hz, rate_hz)
    write_wav(tmp_path / "ref.wav", audio, rate_hz)
    expected = codec.encode_global(batch_of(audio.mean(axis=0, keepdims=True), rate_hz))[0]
    with AudioReader(tmp_path / "ref.wav") as reference:
        assert hear_voice(codec, reference).tolist() == expected.tolist()
        assert reference._position < 0.6 * rate_hz  # no more is read than is heard
    with AudioReader(tmp_path / "ref.wav") as reference, pytest.raises(ValueError, match="does not keep the voice"):
        hear_voice(tiny_codec(), reference)


def test_a_stretch_has_the_voice_of_its_own_beginning(codec: SemanticGlobalCodec, tmp_path: Path) -> None:
    audio = recording(1, 9000)
    write_wav(tmp_path / "in.wav", audio)
    stream = io.BytesIO()
    with AudioReader(tmp_path / "in.wav") as source:
        encode_audio(codec, source, stream, stretch=Stretch(3000, 5000))
    assert stream.getvalue() == container_of(codec, audio[:, 3000:8000]).getvalue()


def test_cut_and_joined_files_keep_their_voices(codec: SemanticGlobalCodec) -> None:
    whole = container_of(codec, recording(1, 6000), global_codes=np.array([1, 2, 3, 4]))
    other = container_of(codec, recording(1, 3000, seed=5), global_codes=np.array([60, 50, 40, 30]))
    heard = [decoded(codec, stream) for stream in (whole, other)]
    assert not np.array_equal(heard[1], decoded(codec, other, global_codes=np.array([1, 2, 3, 4])))
    piece, joined = io.BytesIO(), io.BytesIO()
    whole.seek(0)
    cut(whole, piece, 2000, 3000)
    assert voices_in(piece) == voices_in(whole)
    np.testing.assert_array_equal(decoded(codec, piece), heard[0][:, 2000:5000])
    for stream in (other, piece):
        stream.seek(0)
    join([other, piece], joined)
    assert voices_in(joined) == [[[60, 50, 40, 30]], [[1, 2, 3, 4]]]
    both = np.concatenate([heard[1], heard[0][:, 2000:5000]], axis=1)
    np.testing.assert_array_equal(decoded(codec, joined), both)
    np.testing.assert_array_equal(decoded(codec, joined, 2500, 1500), both[:, 2500:4000])


def test_decoding_in_another_voice_and_from_fewer_rows(codec: SemanticGlobalCodec) -> None:
    audio = recording(2, 5000)
    stream, tokens = container_of(codec, audio), codec.encode(batch_of(audio))
    voice = torch.tensor([9, 8, 7, 6])
    expected = codec.decode(tokens.prefix(2).with_voice(voice))[:, 0].numpy()
    np.testing.assert_array_equal(decoded(codec, stream, num_quantizers=2, global_codes=voice.numpy()), expected)
    assert not np.array_equal(expected, codec.decode(tokens.prefix(2))[:, 0].numpy())
    for num_quantizers in (0, 5):
        with pytest.raises(BitstreamError, match=f"num_quantizers={num_quantizers} cannot be had of its 4 rows"):
            decoded(codec, stream, num_quantizers=num_quantizers)
    for wrong in (voice[:3].numpy(), voice.numpy() + 64):
        with pytest.raises(ValueError, match="global_codes must be"):
            decoded(codec, stream, global_codes=wrong)


@pytest.mark.parametrize(("rate_hz", "num_channels"), [(16000, 1), (44100, 2)])
def test_converting_is_encoding_and_decoding_in_another_voice(
    codec: SemanticGlobalCodec, rate_hz: int, num_channels: int, tmp_path: Path
) -> None:
    write_wav(tmp_path / "in.wav", recording(num_channels, 9001, rate_hz), rate_hz)
    voice, done = np.array([9, 8, 7, 6]), []
    for name, num_quantizers in (("row_0", None), ("two_rows", 2)):
        with AudioReader(tmp_path / "in.wav") as source:
            num_samples = convert_audio(
                codec,
                source,
                tmp_path / f"{name}.wav",
                global_codes=voice,
                num_quantizers=num_quantizers,
                progress=lambda num_done, num_in_all: done.append((num_done, num_in_all)),
            )
        assert num_samples == 9001
        with AudioReader(tmp_path / "in.wav") as source:
            encode_audio(codec, source, tmp_path / "x.codec", num_quantizers=num_quantizers or 1, global_codes=voice)
        with Reader(tmp_path / "x.codec") as container:
            decode_audio(codec, container, tmp_path / "x.wav")
        assert (tmp_path / f"{name}.wav").read_bytes() == (tmp_path / "x.wav").read_bytes()
    assert (sum(n for n, _ in done), {of for _, of in done}) == (2 * 9001, {9001})


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        (SegmentStart(), "holds no global codes, and voiced@1 needs 4 global codes of 64"),
        (SegmentStart(0, np.zeros((1, 3), np.int64), 64), "holds 3 global codes of 64, and voiced@1 has 4"),
        (SegmentStart(0, np.zeros((1, 4), np.int64), 32), "holds 4 global codes of 32, and voiced@1 has 4"),
    ],
    ids=["none", "too_few", "of_another_codebook"],
)
def test_files_whose_global_codes_do_not_fit(codec: SemanticGlobalCodec, start: SegmentStart, reason: str) -> None:
    assert codec.token_format is not None
    events: list[Event] = [start, np.zeros((1, 4, 1), np.int64), SegmentEnd(HOP)]
    with pytest.raises(BitstreamError, match=reason):
        list(decode_events(codec, codec.token_format.header(), events))


def test_codecs_without_voices_take_none(model: Path) -> None:
    plain, voice = load(model), np.zeros(4, np.int64)
    assert plain.token_format is not None
    with pytest.raises(ValueError, match="tiny@1 does not keep the voice apart"):
        encode_blocks(plain, [], io.BytesIO(), rate_hz=16000, num_channels=1, global_codes=voice)
    with pytest.raises(ValueError, match="tiny@1 does not keep the voice apart"):
        list(decode_events(plain, plain.token_format.header(), [SegmentStart()], global_codes=voice))
    with pytest.raises(ValueError, match="has no global codes"):
        WindowedDecoder(plain, 1, global_codes=torch.zeros(1, 4, dtype=torch.int64))


# Codecs that look ahead


@pytest.fixture(scope="module")
def looking_ahead(tmp_path_factory: pytest.TempPathFactory) -> BiCodec:
    """With samples in place of the features of a speech model."""
    config = BiCodecConfig(
        quantizer=FactorizedVQConfig(latent_dim=8, num_stages=1, codebook_size=16, codebook_dim=4),
        voice_quantizer=FSQConfig(latent_dim=4, levels=(255, 255)),
        num_global_codes=3,
        voice_dim=8,
        voice_samples=400,
        feature_dim=4,
        hidden_dim=8,
        expanded_dim=8,
        encoder_blocks=1,
        prenet_blocks=1,
        postnet_blocks=1,
        num_mels=4,
        mel_fft_samples=64,
        mel_window_samples=64,
        mel_hop_samples=16,
        speaker_channels=8,
        bottleneck_dim=4,
        head_dim=4,
        decoder_dim=8,
        decoder_rates=(4, 2),
        decoder_kernel_sizes=(8, 4),
    )
    folder = tmp_path_factory.mktemp("models") / "ahead"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = BiCodec(config)
        for name, parameter in made.named_parameters():  # or untrained voices would be all alike
            if parameter.dim() > 1 and name.startswith(("speaker_encoder", "voice_quantizer", "prenet", "postnet")):
                torch.nn.init.normal_(parameter, std=2.0 * parameter[0].numel() ** -0.5)
        save(made, folder, name="ahead@1", dtype="float32")
    model = load(folder)
    assert isinstance(model, BiCodec)

    def features(audio: Tensor) -> Tensor:
        padded: Tensor = torch.nn.functional.pad(audio[:, 0], (0, -audio.shape[2] % 8))
        return padded.view(len(audio), -1, 8)[:, :, :4]

    model.features = features  # type: ignore[method-assign]
    return model


def test_a_codec_that_looks_ahead_hears_the_voice_in_the_whole(looking_ahead: BiCodec) -> None:
    """In the first 400 samples of it, but as loud as the whole makes them."""
    audio = recording(2, 3001)
    audio[:, :2000] *= 0.02
    tokens = looking_ahead.encode(batch_of(audio.copy()))
    stream = io.BytesIO()
    encode_blocks(looking_ahead, np.split(audio, [1000], axis=1), stream, rate_hz=16000, num_channels=2)
    stream.seek(0)
    reader = Reader(stream)
    np.testing.assert_array_equal(reader.read(), tokens.codes.numpy())
    assert tokens.global_codes is not None
    np.testing.assert_array_equal(reader.segments[0].start.global_codes, tokens.global_codes.numpy())
    assert not torch.equal(looking_ahead.encode_global(batch_of(audio[:, :400].copy())), tokens.global_codes)
    expected = looking_ahead.decode(tokens)[:, 0].numpy()
    other = looking_ahead.decode(tokens.with_voice(torch.tensor([1, 2, 3])))[:, 0].numpy()
    assert np.abs(expected - other).max() > 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "FRAMES_PER_WINDOW", 32)
        # Sums over windows are rounded otherwise than sums over the whole.
        np.testing.assert_allclose(decoded(looking_ahead, stream), expected, rtol=0, atol=1e-6)
        heard = decoded(looking_ahead, stream, global_codes=np.array([1, 2, 3]))
        np.testing.assert_allclose(heard, other, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="needs global codes"):
        WindowedDecoder(looking_ahead, 1)
