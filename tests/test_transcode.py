"""Audio to containers and back on the level of the library: pieces of any size give the bits of the whole."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.audio import AudioReader, RawFormat, fit_length, resample, resampled_length, write_audio
from codec.bitstream import BitstreamError, Reader, SegmentEnd, SegmentStart, Writer
from codec.models.interface import StreamableCodec
from codec.pretrained import load
from codec.stretch import Stretch, StretchError
from codec.testing import speech_like, tiny_codec
from codec.token_format import cut, join
from codec.tokens import Tokens
from codec.transcode import check_fits, decode_audio, decode_events, encode_audio, encode_blocks

pytest_plugins = ["commands"]

RATES_HZ = [8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000, 192000]


@pytest.fixture(scope="module")
def codec(model: Path) -> StreamableCodec:
    return load(model)


def recording(num_channels: int, num_samples: int, rate_hz: int = 16000) -> np.ndarray:
    return np.stack([speech_like(num_samples, rate_hz=rate_hz, seed=seed) for seed in range(num_channels)])


def pieces_of(audio: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    """Of these sizes over and over, empty ones included."""
    first = 0
    while first < audio.shape[1]:
        for size in sizes:
            yield audio[:, first : first + size]
            first += size


def container_of(codec: StreamableCodec, audio: np.ndarray, rate_hz: int = 16000, **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    num_samples = encode_blocks(codec, [audio], stream, rate_hz=rate_hz, num_channels=len(audio), **options)
    assert num_samples == audio.shape[1]
    stream.seek(0)
    return stream


def decoded(codec: StreamableCodec, reader: Reader, *stretch: int) -> np.ndarray:
    return np.concatenate(list(decode_events(codec, reader.header, reader.events(*stretch))), axis=1)


def tokens_of(codec: StreamableCodec, audio: np.ndarray, rate_hz: int, num_quantizers: int | None = None) -> Tokens:
    """What `encode` makes of the whole recording at once."""
    return codec.encode(
        torch.from_numpy(resample(audio, rate_hz, codec.sample_rate_hz))[:, None], num_quantizers=num_quantizers
    )


def whole_decode(codec: StreamableCodec, tokens: Tokens, rate_hz: int, num_samples: int) -> np.ndarray:
    return fit_length(resample(codec.decode(tokens)[:, 0].numpy(), codec.sample_rate_hz, rate_hz), num_samples)


@given(
    rate_hz=st.sampled_from(RATES_HZ),
    num_channels=st.sampled_from([1, 2, 3, 6]),
    milliseconds=st.integers(0, 200),
    more_samples=st.integers(1, 70),
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=6).filter(any),
    num_quantizers=st.sampled_from([None, 1, 2, 3]),
    frames_per_block=st.sampled_from([1, 3, 50]),
)
@settings(max_examples=50)
def test_pieces_make_the_codes_and_the_audio_of_the_whole(
    codec: StreamableCodec,
    rate_hz: int,
    num_channels: int,
    milliseconds: int,
    more_samples: int,
    sizes: list[int],
    num_quantizers: int | None,
    frames_per_block: int,
) -> None:
    audio = recording(num_channels, milliseconds * rate_hz // 1000 + more_samples, rate_hz)
    stream = io.BytesIO()
    num_samples = encode_blocks(
        codec,
        pieces_of(audio, sizes),
        stream,
        rate_hz=rate_hz,
        num_channels=num_channels,
        num_quantizers=num_quantizers,
        frames_per_block=frames_per_block,
    )
    assert num_samples == audio.shape[1]
    tokens = tokens_of(codec, audio, rate_hz, num_quantizers)
    stream.seek(0)
    reader = Reader(stream)
    np.testing.assert_array_equal(reader.read(), tokens.codes.numpy())
    assert (reader.num_samples, reader.header.rate_hz) == (num_samples, rate_hz)
    heard = decoded(codec, reader)
    assert heard.dtype == np.float32
    np.testing.assert_array_equal(heard, whole_decode(codec, tokens, rate_hz, num_samples))


@given(rate_hz=st.sampled_from(RATES_HZ), frames=st.integers(1, 3), off_by=st.sampled_from([-1, 0, 1]))
def test_around_whole_frames(codec: StreamableCodec, rate_hz: int, frames: int, off_by: int) -> None:
    audio = recording(1, max(1, resampled_length(frames * codec.hop_length, 16000, rate_hz) + off_by), rate_hz)
    reader = Reader(container_of(codec, audio, rate_hz))
    assert reader.num_frames == -(-resampled_length(audio.shape[1], rate_hz, 16000) // codec.hop_length)
    assert decoded(codec, reader).shape == audio.shape


def test_silence_and_extremes_stay_finite(codec: StreamableCodec) -> None:
    square = np.where(np.arange(5000) % 40 < 20, 1.0, -1.0)
    for audio in (np.zeros(5000), square, 25 * speech_like(5000), np.full(5000, 1e-42)):
        for rate_hz in (16000, 22050):
            heard = decoded(codec, Reader(container_of(codec, audio[None].astype(np.float32), rate_hz)))
            assert np.isfinite(heard).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_delay_frames": 0},
        {"decode_delay_frames": 1},
        {"decode_delay_frames": 3},
        {"window_patches": 1, "kernel_size": 1, "decode_delay_frames": 0},
        {"window_patches": 1, "kernel_size": 1, "decode_delay_frames": 2},
        {"window_patches": 9, "kernel_size": 1},
        {"kernel_size": 7, "decoder_blocks": (3, 2, 2)},
        {"kernel_size": 5, "decoder_blocks": (0, 0, 1), "decode_delay_frames": 2},
        {"kernel_size": 5, "decoder_blocks": (4, 0, 0), "decode_delay_frames": 0},
        {"strides": (3, 5), "decoder_blocks": (1, 2, 1)},
    ],
    ids=str,
)
def test_a_code_is_heard_as_far_as_the_codec_says_and_no_farther(changes: dict[str, Any]) -> None:
    """The first and last frames that change are just those; so a cut needs no less than that, and no more."""
    codec = tiny_codec(**changes)
    at, num_frames = 20, 48
    codes = torch.randint(0, 32, (1, 3, num_frames), generator=torch.Generator().manual_seed(0))
    num_samples = torch.tensor([num_frames * codec.hop_length])
    before = codec.decode(Tokens(codes, num_samples, codec.codec_id))[0, 0]
    changed = np.zeros(num_frames, bool)
    for stage in range(3):
        for entry in range(0, 32, 5):
            other = codes.clone()
            other[0, stage, at] = entry
            after = codec.decode(Tokens(other, num_samples, codec.codec_id))[0, 0]
            changed |= (before != after).view(num_frames, -1).any(dim=1).numpy()
    first, last = np.flatnonzero(changed)[[0, -1]]
    assert first == at - codec.decode_frames_after
    if codec.decode_frames_before:
        assert last == at + codec.decode_frames_before
    else:
        assert last <= at


@given(data=st.data(), num_channels=st.sampled_from([1, 2]), num_samples=st.integers(2, 3000))
@settings(max_examples=40)
def test_a_cut_sounds_as_that_stretch_of_the_whole(
    codec: StreamableCodec, data: st.DataObject, num_channels: int, num_samples: int
) -> None:
    container = container_of(codec, recording(num_channels, num_samples), frames_per_block=7)
    whole = decoded(codec, Reader(container))
    first = data.draw(st.integers(0, num_samples - 1))
    last = data.draw(st.integers(first + 1, num_samples))
    container.seek(0)
    np.testing.assert_array_equal(decoded(codec, Reader(container), first, last - first), whole[:, first:last])
    container.seek(0)
    piece = io.BytesIO()
    cut(container, piece, first, last - first)
    piece.seek(0)
    reader = Reader(piece)
    assert reader.num_samples == last - first
    np.testing.assert_array_equal(decoded(codec, reader), whole[:, first:last])
    # And a piece of the piece.
    middle = (last - first) // 2
    piece.seek(0)
    rest = io.BytesIO()
    cut(piece, rest, middle, last - first - middle)
    rest.seek(0)
    np.testing.assert_array_equal(decoded(codec, Reader(rest)), whole[:, first + middle : last])


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 44100, 48000, 192000])
def test_a_cut_at_another_rate_differs_by_the_resampler_only(codec: StreamableCodec, rate_hz: int) -> None:
    """The resampler starts from silence at a cut and ends in it, which is heard for as long as its filter.

    soxr's HQ filter reaches about 100 samples of the lower rate; farther inside, the phases of both are the same, and
    float32 sums in another order.
    """
    num_samples = rate_hz // 2
    container = container_of(codec, recording(1, num_samples, rate_hz), rate_hz)
    whole = decoded(codec, Reader(container))
    reach = -(-150 * rate_hz // min(rate_hz, 16000))
    for first, last in ((0, num_samples // 2), (num_samples // 3, num_samples), (rate_hz // 7, rate_hz // 4)):
        container.seek(0)
        piece = decoded(codec, Reader(container), first, last - first)
        assert piece.shape == (1, last - first)
        inner = slice(reach if first else 0, -reach if last < num_samples else None)
        np.testing.assert_allclose(piece[:, inner], whole[:, first:last][:, inner], rtol=0, atol=2e-6)
        assert np.abs(piece - whole[:, first:last]).max() <= np.abs(whole).max()


@given(
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=4),
    rate_hz=st.sampled_from([8000, 16000, 44100]),
    num_channels=st.sampled_from([1, 2]),
)
@settings(max_examples=30)
def test_joined_files_sound_as_they_did_alone(
    codec: StreamableCodec, sizes: list[int], rate_hz: int, num_channels: int
) -> None:
    files = [container_of(codec, recording(num_channels, size, rate_hz), rate_hz) for size in sizes]
    alone = [decoded(codec, Reader(file)) for file in files]
    for file in files:
        file.seek(0)
    joined = io.BytesIO()
    join(files, joined)
    joined.seek(0)
    reader = Reader(joined)
    assert (reader.num_samples, len(reader.segments)) == (sum(sizes), len(sizes))
    np.testing.assert_array_equal(decoded(codec, reader), np.concatenate(alone, axis=1))


@given(num_samples=st.integers(2, 3000), data=st.data())
@settings(max_examples=30)
def test_pieces_joined_again_sound_as_the_whole(codec: StreamableCodec, num_samples: int, data: st.DataObject) -> None:
    container = container_of(codec, recording(2, num_samples), frames_per_block=5)
    whole = decoded(codec, Reader(container))
    marks = sorted(data.draw(st.sets(st.integers(1, num_samples - 1), min_size=1, max_size=4)))
    pieces = []
    for first, last in zip([0, *marks], [*marks, num_samples], strict=True):
        container.seek(0)
        pieces.append(io.BytesIO())
        cut(container, pieces[-1], first, last - first)
        pieces[-1].seek(0)
    joined = io.BytesIO()
    join(pieces, joined)
    joined.seek(0)
    np.testing.assert_array_equal(decoded(codec, Reader(joined)), whole)
    # A stretch of a joined file crosses its segments.
    first = data.draw(st.integers(0, num_samples - 1))
    last = data.draw(st.integers(first + 1, num_samples))
    joined.seek(0)
    np.testing.assert_array_equal(decoded(codec, Reader(joined), first, last - first), whole[:, first:last])


class _Pipe(io.RawIOBase):
    """Gives what it has in small pieces, and cannot seek."""

    def __init__(self, data: bytes, piece_bytes: int = 100) -> None:
        self._stream, self._piece_bytes = io.BytesIO(data), piece_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._stream.readinto(memoryview(buffer)[: self._piece_bytes])


def raw_pcm(audio: np.ndarray) -> bytes:
    return np.round(audio.T * 32768).astype("<i2").tobytes()


@pytest.mark.parametrize("stretch", [None, Stretch(0, 1), Stretch(777), Stretch(1500, 1000), Stretch(2999, 5000)])
@pytest.mark.parametrize("from_pipe", [False, True])
def test_a_stretch_of_a_recording_is_encoded(
    stretch: Stretch | None, from_pipe: bool, codec: StreamableCodec, tmp_path: Path
) -> None:
    audio = recording(2, 3000)
    write_audio(tmp_path / "in.wav", audio, 16000)
    rounded = soundfile.read(tmp_path / "in.wav", dtype="float32")[0].T
    first = stretch.first_sample if stretch else 0
    last = min(3000, first + (stretch.num_samples or 3000)) if stretch else 3000
    seen: list[tuple[int, int | None]] = []
    source = (
        AudioReader(_Pipe(raw_pcm(audio)), raw=RawFormat(16000, 2))  # type: ignore[arg-type]
        if from_pipe
        else AudioReader(tmp_path / "in.wav")
    )
    with source as reader:
        num_samples = encode_audio(
            codec, reader, tmp_path / "out.codec", stretch=stretch, progress=lambda *args: seen.append(args)
        )
    assert num_samples == last - first == sum(done for done, _ in seen)
    if not from_pipe:
        assert {total for _, total in seen} == {num_samples}
    with Reader(tmp_path / "out.codec") as result:
        np.testing.assert_array_equal(
            result.read(), tokens_of(codec, np.ascontiguousarray(rounded[:, first:last]), 16000).codes.numpy()
        )


@pytest.mark.parametrize("stretch", [Stretch(0, 0), Stretch(3000), Stretch(10**12, 5)])
@pytest.mark.parametrize("from_pipe", [False, True])
def test_a_stretch_with_nothing_in_it(
    stretch: Stretch, from_pipe: bool, codec: StreamableCodec, tmp_path: Path
) -> None:
    data = raw_pcm(recording(1, 3000))
    source: Any = _Pipe(data) if from_pipe else io.BytesIO(data)
    if not from_pipe:
        (tmp_path / "in.pcm").write_bytes(data)
        source = tmp_path / "in.pcm"
    with (
        AudioReader(source, raw=RawFormat(16000)) as reader,
        pytest.raises(ValueError, match=r"nothing of the stretch|none to go to|no samples"),
    ):
        encode_audio(codec, reader, tmp_path / "out.codec", stretch=stretch)
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".pcm"]
    container = container_of(codec, recording(1, 3000))
    with pytest.raises(StretchError):
        decode_audio(codec, Reader(container), tmp_path / "out.wav", stretch=stretch)
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("rate_hz", [16000, 44100])
def test_files_and_pipes_decode_to_the_same(rate_hz: int, raw: bool, codec: StreamableCodec, tmp_path: Path) -> None:
    audio = recording(2, 4000, rate_hz)
    data = container_of(codec, audio, rate_hz, frames_per_block=9).getvalue()
    expected = np.clip(np.round(decoded(codec, Reader(io.BytesIO(data))) * 32768), -32768, 32767).T
    for source in (io.BytesIO(data), _Pipe(data)):
        target = tmp_path / "out.wav"
        seen: list[int] = []
        num_samples = decode_audio(
            codec,
            Reader(source),  # type: ignore[arg-type]
            target,
            raw=raw,
            progress=lambda done, _: seen.append(done),  # noqa: B023
        )
        assert num_samples == 4000 == sum(seen)
        if raw:
            np.testing.assert_array_equal(np.frombuffer(target.read_bytes(), "<i2").reshape(-1, 2), expected)
        else:
            np.testing.assert_array_equal(soundfile.read(target, dtype="int16")[0], expected)
    with pytest.raises(BitstreamError, match="a pipe"):
        decode_audio(codec, Reader(_Pipe(data)), tmp_path / "x.wav", stretch=Stretch(5))  # type: ignore[arg-type]


def test_a_failure_in_the_middle_leaves_the_old_file(codec: StreamableCodec, tmp_path: Path) -> None:
    def failing() -> Iterator[np.ndarray]:
        yield recording(1, 2000)
        raise OSError("gone")

    (tmp_path / "out.codec").write_bytes(b"before")
    with pytest.raises(OSError, match="gone"):
        encode_blocks(codec, failing(), tmp_path / "out.codec", rate_hz=16000, num_channels=1)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == {tmp_path / "out.codec": b"before"}


def test_a_codec_that_was_never_saved_has_no_id_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save it and load it"):
        encode_blocks(tiny_codec(), [recording(1, 100)], tmp_path / "out.codec", rate_hz=16000, num_channels=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"codec_id": "0" * 16}, id="codec_id"),
        pytest.param({"codec_rate_hz": 8000}, id="codec_rate"),
        pytest.param({"hop_length": 32}, id="hop"),
        pytest.param({"codebook_sizes": (64, 32, 32)}, id="codebook_size"),
        pytest.param({"codebook_sizes": (32,) * 4}, id="rows"),
        pytest.param({"num_frames_before": 0}, id="frames_before"),
        pytest.param({"num_frames_after": 9}, id="frames_after"),
    ],
)
def test_a_header_that_does_not_fit_the_codec(changes: dict[str, Any], codec: StreamableCodec) -> None:
    assert codec.token_format is not None
    header = codec.token_format.header()
    check_fits(codec, header)
    with pytest.raises(BitstreamError, match=r"it was made by tiny@1|does not fit"):
        check_fits(codec, replace(header, **changes))


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([np.zeros((1, 3, 1), np.int64), SegmentEnd(64)], "belong to no segment"),
        ([SegmentStart(global_codes=np.zeros((1, 1), np.int64), global_codebook_size=2)], "global codes"),
    ],
    ids=["no_segment", "global_codes"],
)
def test_events_that_make_no_sense(events: Iterable[Any], reason: str, codec: StreamableCodec) -> None:
    assert codec.token_format is not None
    with pytest.raises(BitstreamError, match=reason):
        list(decode_events(codec, codec.token_format.header(), events))


def test_a_container_without_audio_is_not_decoded(codec: StreamableCodec, tmp_path: Path) -> None:
    assert codec.token_format is not None
    stream = io.BytesIO()
    with Writer(stream, codec.token_format.header()) as writer:
        writer.finish(0)
    for source in (io.BytesIO(stream.getvalue()), _Pipe(stream.getvalue())):
        with pytest.raises(ValueError, match=r"no audio|0 samples"):
            decode_audio(codec, Reader(source), tmp_path / "out.wav")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_truncated_container_decodes_up_to_its_last_good_block(codec: StreamableCodec, tmp_path: Path) -> None:
    """What is good is the whole's audio up to there, but for the last frame: its successor is not known."""
    data = container_of(codec, recording(1, 64 * 30), frames_per_block=10).getvalue()
    whole = decoded(codec, Reader(io.BytesIO(data)))
    lengths = set()
    for size in range(len(data)):
        for source in (io.BytesIO(data[:size]), _Pipe(data[:size])):
            try:
                reader = Reader(source, allow_truncated=True)  # type: ignore[arg-type]
                num_samples = decode_audio(codec, reader, tmp_path / "out.wav")
            except BitstreamError:
                assert not list(tmp_path.iterdir())
                continue
            assert reader.is_truncated
            assert num_samples in (640, 1280, 1920)
            lengths.add(num_samples)
            heard = soundfile.read(tmp_path / "out.wav", dtype="int16")[0]
            assert len(heard) == num_samples
            sure = num_samples - codec.decode_frames_after * codec.hop_length
            np.testing.assert_array_equal(heard[:sure], np.clip(np.round(whole[0, :sure] * 32768), -32768, 32767))
            (tmp_path / "out.wav").unlink()
    assert lengths == {640, 1280, 1920}
