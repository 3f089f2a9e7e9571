import contextlib
import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.bitstream import (
    FRAMES_PER_BLOCK,
    BitstreamError,
    Header,
    Reader,
    Writer,
    frames_for,
    pack_codes,
    unpack_codes,
)

MAGIC = bytes.fromhex("89434f4445430d0a")
FRAMES, END = 1, 2
HEADER = Header(
    codec_id="0123456789abcdef",
    model="m@1",
    codec_rate_hz=16000,
    rate_hz=8000,
    num_channels=1,
    hop_length=320,
    codebook_sizes=(4, 8),
)

# The byte table of the module's docstring once more, written with nothing of the module.


FullDisk = Callable[[], contextlib.AbstractContextManager[None]]


def sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data))


def leb128(value: int) -> bytes:
    digits = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes(digit | 0x80 for digit in digits[:-1]) + bytes(digits[-1:])


def block(block_type: int, payload: bytes) -> bytes:
    return sealed(bytes([block_type]) + leb128(len(payload)) + payload)


def end_block(num_samples: int, num_frames: int) -> bytes:
    return block(END, struct.pack("<QQ", num_samples, num_frames))


def header_bytes(
    *,
    version: int = 1,
    flags: int = 0,
    rate_hz: int = 8000,
    num_channels: int = 1,
    hop_length: int = 320,
    codebook_sizes: tuple[int, ...] = (4, 8),
    name: bytes = b"m@1",
) -> bytes:
    fixed = MAGIC + struct.pack("<BB", version, flags) + bytes.fromhex("0123456789abcdef")
    fixed += struct.pack("<IIHIB", 16000, rate_hz, num_channels, hop_length, len(codebook_sizes))
    sizes = b"".join(struct.pack("<I", size) for size in codebook_sizes)
    return sealed(fixed + sizes + bytes([len(name)]) + name)


def blocks_of(data: bytes) -> list[tuple[int, bytes]]:
    at, found = 33 + 4 * data[32], []
    at += 1 + data[at] + 4
    while at < len(data):
        size, shift, start = 0, 0, at + 1
        while True:
            size |= (data[start] & 0x7F) << shift
            shift, start = shift + 7, start + 1
            if data[start - 1] < 0x80:
                break
        found.append((data[at], data[start : start + size]))
        at = start + size + 4
    return found


def random_codes(header: Header, num_frames: int, seed: int = 0) -> np.ndarray:
    sizes = np.array(header.codebook_sizes)[None, :, None]
    return np.random.default_rng(seed).integers(0, sizes, (header.num_channels, len(header.codebook_sizes), num_frames))


def written(header: Header, codes: np.ndarray, num_samples: int, cuts: tuple[int, ...] = ()) -> bytes:
    target = io.BytesIO()
    with Writer(target, header) as writer:
        for piece in np.split(codes, sorted(cuts), axis=2):
            writer.write(piece)
        writer.finish(num_samples)
    return target.getvalue()


def read(data: bytes) -> tuple[Header, np.ndarray, int | None]:
    reader = Reader(io.BytesIO(data))
    nothing = np.empty((reader.header.num_channels, len(reader.header.codebook_sizes), 0), np.int64)
    codes = np.concatenate([nothing, *reader.blocks()], axis=2)
    assert reader.num_frames == codes.shape[2]
    return reader.header, codes, reader.num_samples


def refusal(data: bytes) -> str:
    with pytest.raises(BitstreamError) as caught:
        read(data)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


headers = st.builds(
    Header,
    codec_id=st.binary(min_size=8, max_size=8).map(bytes.hex),
    model=st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=40),
    codec_rate_hz=st.sampled_from([8000, 16000, 24000, 44100]),
    rate_hz=st.integers(8000, 192000),
    num_channels=st.integers(1, 3),
    hop_length=st.integers(1, 500),
    codebook_sizes=st.lists(
        st.sampled_from([2, 3, 5, 256, 257, 1000, 1024, 2**24]) | st.integers(2, 5000), min_size=1, max_size=5
    ).map(tuple),
)


@given(data=st.data(), header=headers, seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_what_was_written_is_read_and_its_bytes_do_not_depend_on_the_chunks(
    data: st.DataObject, header: Header, seed: int
) -> None:
    most_samples = 130 * header.hop_length * header.rate_hz // header.codec_rate_hz
    num_samples = data.draw(st.integers(0, most_samples))
    at_codec_rate = ceil(Fraction(num_samples * header.codec_rate_hz, header.rate_hz))
    num_frames = ceil(Fraction(at_codec_rate, header.hop_length))
    assert frames_for(num_samples, header) == num_frames
    cuts = data.draw(st.lists(st.integers(0, num_frames), max_size=6).map(tuple))
    codes = random_codes(header, num_frames, seed)

    whole = written(header, codes, num_samples)
    assert written(header, codes, num_samples, cuts) == whole
    assert [kind for kind, _ in blocks_of(whole)] == [FRAMES] * -(-num_frames // FRAMES_PER_BLOCK) + [END]
    header_read, codes_read, num_samples_read = read(whole)
    assert header_read == header
    assert codes_read.dtype == np.int64
    np.testing.assert_array_equal(codes_read, codes)
    assert num_samples_read == num_samples


def test_golden_bytes() -> None:
    # Frame 0 is (1, 6), frame 1 is (3, 2): bits 10 011 | 11 010, low bit first, so bytes 0b01111001 and 0b00000001.
    header = "89434f4445430d0a 01 00 0123456789abcdef 803e0000 401f0000 0100 40010000 02 04000000 08000000"
    header += "03 6d4031 6f589f45"
    frames = "01 03 02 79 01 04578963"
    end = "02 10 2c01000000000000 0200000000000000 93495d3e"
    for part in (header, frames, end):
        assert zlib.crc32(bytes.fromhex(part)[:-4]).to_bytes(4, "little") == bytes.fromhex(part)[-4:]
    golden = bytes.fromhex(header + frames + end)
    codes = np.array([[[1, 3], [6, 2]]])
    assert written(HEADER, codes, 300) == golden
    header_read, codes_read, num_samples = read(golden)
    assert (header_read, num_samples) == (HEADER, 300)
    np.testing.assert_array_equal(codes_read, codes)


def test_codes_are_packed_channel_by_channel_within_a_frame() -> None:
    header = replace(HEADER, num_channels=2)
    # [channel, row, frame]; one frame of channel 0 (2, 5) and channel 1 (1, 4): bits 01 101 10 001.
    codes = np.array([[[2], [5]], [[1], [4]]])
    assert pack_codes(codes, header) == bytes([0b00110110, 0b00000010])
    np.testing.assert_array_equal(unpack_codes(bytes([0b00110110, 0b00000010]), 1, header), codes)


@pytest.fixture(scope="module")
def small_file() -> bytes:
    return written(HEADER, random_codes(HEADER, 53), 53 * 160)


def num_good_frames(damaged: bytes) -> int:
    """Frames that come before the error; they must be those of `small_file`."""
    codes, num_frames = random_codes(HEADER, 53), 0
    with pytest.raises(BitstreamError):  # noqa: PT012
        for piece in Reader(io.BytesIO(damaged)).blocks():
            np.testing.assert_array_equal(piece, codes[:, :, num_frames : num_frames + piece.shape[2]])
            num_frames += piece.shape[2]
    return num_frames


def test_every_truncation_is_refused_after_the_good_blocks(small_file: bytes) -> None:
    first_ends = len(header_bytes()) + len(block(FRAMES, bytes(1 + -(-50 * 5 // 8))))
    second_ends = len(small_file) - len(end_block(0, 0))
    for size in range(len(small_file)):
        expected = 53 if size >= second_ends else 50 if size >= first_ends else 0
        assert num_good_frames(small_file[:size]) == expected


def test_every_flipped_bit_is_refused_and_never_gives_other_codes(small_file: bytes) -> None:
    for bit in range(8 * len(small_file)):
        damaged = bytearray(small_file)
        damaged[bit // 8] ^= 1 << bit % 8
        assert num_good_frames(bytes(damaged)) in (0, 50, 53)


@given(data=st.binary(max_size=200), after_header=st.booleans())
@settings(max_examples=200)
def test_arbitrary_bytes_are_refused(data: bytes, after_header: bool) -> None:
    refusal(header_bytes() + data if after_header else data)


HUGE = 2**35 - 1  # the largest value of five LEB128 bytes


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(bytes([FRAMES]) + leb128(2**20), id="largest_block_allowed"),
        pytest.param(bytes([FRAMES]) + leb128(2**20 + 1) + bytes(100), id="block_too_large"),
        pytest.param(bytes([FRAMES]) + leb128(HUGE) + bytes(100), id="block_of_32_GiB"),
        pytest.param(bytes([200]) + leb128(HUGE), id="optional_block_of_32_GiB"),
        pytest.param(bytes([FRAMES]) + b"\xff" * 100, id="size_without_end"),
        pytest.param(block(FRAMES, leb128(HUGE) + bytes(32)), id="frames_that_are_not_there"),
        pytest.param(block(FRAMES, b"\xff" * 100), id="frame_count_without_end"),
        pytest.param(end_block(2**64 - 1, 2**64 - 1), id="end_of_2_to_the_64_frames"),
        pytest.param(end_block(2**64 - 1, 0), id="end_of_2_to_the_64_samples"),
    ],
)
@pytest.mark.parametrize("from_disk", [False, True], ids=["memory", "disk"])
def test_a_claim_of_gigantic_size_allocates_nothing(data: bytes, from_disk: bool, tmp_path: Path) -> None:
    path = tmp_path / "claims.codec"
    path.write_bytes(header_bytes() + data)
    tracemalloc.start()
    try:
        with path.open("rb") if from_disk else io.BytesIO(path.read_bytes()) as file, pytest.raises(BitstreamError):
            list(Reader(file).blocks())
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_block_that_is_too_large_is_refused_even_where_it_is_whole() -> None:
    assert "more than" in refusal(header_bytes() + block(200, bytes(2**20 + 1)) + end_block(0, 0))
    assert read(header_bytes() + block(200, bytes(2**20)) + end_block(0, 0))[2] == 0


def test_the_largest_frame_of_a_header_allocates_nothing() -> None:
    data = header_bytes(num_channels=65535, codebook_sizes=(2**24,) * 255) + block(FRAMES, leb128(1) + bytes(1000))
    tracemalloc.start()
    try:
        refusal(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("block_type", [128, 200, 255])
@pytest.mark.parametrize("size", [0, 1, 200, 100_000])
def test_unknown_optional_blocks_are_skipped_anywhere(block_type: int, size: int) -> None:
    extra = block(block_type, bytes(size))
    frames = block(FRAMES, leb128(2) + b"\x79\x01")
    for parts in ((extra, frames), (frames, extra), (extra, extra, frames, extra)):
        _, codes, num_samples = read(header_bytes() + b"".join(parts) + end_block(300, 2))
        np.testing.assert_array_equal(codes, [[[1, 3], [6, 2]]])
        assert num_samples == 300
    refusal(header_bytes() + frames + extra[:-1] + bytes([extra[-1] ^ 1]) + end_block(300, 2))
    refusal(header_bytes() + frames + end_block(300, 2) + extra)


@pytest.mark.parametrize("block_type", [0, 3, 4, 127])
def test_unknown_critical_blocks_are_refused(block_type: int) -> None:
    assert "newer" in refusal(header_bytes() + block(block_type, b"") + end_block(0, 0))


@pytest.mark.parametrize(("version", "flags"), [(0, 0), (2, 0), (255, 0), (1, 1), (1, 128)])
def test_other_versions_and_unknown_flags_are_refused(version: int, flags: int) -> None:
    message = refusal(header_bytes(version=version, flags=flags) + end_block(0, 0))
    assert str(version) in message
    assert "newer" in message


def test_other_files_are_refused() -> None:
    assert "not a .codec file" in refusal(b"RIFF" + bytes(100))
    assert "not a .codec file" in refusal(b"a short text")
    assert "not a .codec file" in refusal(header_bytes().replace(b"\r\n", b"\n\n") + end_block(0, 0))


@pytest.mark.parametrize("tail", [b"\0", end_block(0, 0), header_bytes() + end_block(0, 0)])
def test_bytes_after_the_end_are_refused(tail: bytes) -> None:
    assert "after END" in refusal(header_bytes() + end_block(0, 0) + tail)


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(block(FRAMES, b"\x02\x79\x01") + end_block(300, 1), id="end_with_fewer_frames"),
        pytest.param(block(FRAMES, b"\x02\x79\x01") + end_block(300, 3), id="end_with_more_frames"),
        pytest.param(block(FRAMES, b"\x02\x79\x01") + end_block(160, 2), id="too_few_samples"),
        pytest.param(block(FRAMES, b"\x02\x79\x01") + end_block(321, 2), id="too_many_samples"),
        pytest.param(block(FRAMES, b"\x02\x79\x01") + block(END, bytes(15)), id="short_end"),
        pytest.param(block(FRAMES, b"\x02\x79\x01") + block(END, bytes(17)), id="long_end"),
        pytest.param(block(FRAMES, b"\x00") + end_block(0, 0), id="block_of_no_frames"),
        pytest.param(block(FRAMES, b"") + end_block(0, 0), id="empty_frames_payload"),
        pytest.param(block(FRAMES, b"\x80") + end_block(0, 0), id="frame_count_cut_off"),
        pytest.param(block(FRAMES, b"\x82\x00\x79\x01") + end_block(300, 2), id="frame_count_of_needless_bytes"),
        pytest.param(block(FRAMES, b"\x01\x79\x01") + end_block(160, 1), id="bytes_beyond_the_frames"),
        pytest.param(block(FRAMES, b"\x04\x79\x01") + end_block(640, 4), id="frames_beyond_the_bytes"),
        pytest.param(block(FRAMES, b"\x02\x79\x05") + end_block(300, 2), id="filling_that_is_not_zero"),
        pytest.param(sealed(bytes([END, 0x90, 0x00]) + bytes(16)), id="block_size_of_needless_bytes"),
    ],
)
def test_blocks_that_contradict_themselves_are_refused(blocks: bytes) -> None:
    refusal(header_bytes() + blocks)


def test_codes_outside_their_codebook_are_refused() -> None:
    header = replace(HEADER, codebook_sizes=(3, 5))
    data = header_bytes(codebook_sizes=(3, 5)) + block(FRAMES, b"\x01" + bytes([0b00111])) + end_block(160, 1)
    assert "outside its codebook" in refusal(data)
    for outside in ([[[3], [0]]], [[[0], [5]]], [[[-1], [0]]]):
        with pytest.raises(BitstreamError, match="outside its codebook"):
            pack_codes(np.array(outside), header)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(header_bytes(num_channels=0), id="no_channels"),
        pytest.param(header_bytes(rate_hz=0), id="no_rate"),
        pytest.param(header_bytes(hop_length=0), id="no_hop"),
        pytest.param(header_bytes(codebook_sizes=()), id="no_rows"),
        pytest.param(header_bytes(codebook_sizes=(4, 1)), id="codebook_of_one"),
        pytest.param(header_bytes(codebook_sizes=(4, 2**24 + 1)), id="codebook_too_large"),
        pytest.param(header_bytes(rate_hz=1_000_001), id="rate_too_large"),
        pytest.param(header_bytes(name=b"\x1b[2J"), id="terminal_escape"),
        pytest.param(header_bytes(name=b"\xff"), id="name_is_not_utf8"),
    ],
)
def test_headers_that_make_no_sense_are_refused(data: bytes) -> None:
    refusal(data + end_block(0, 0))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: replace(HEADER, codec_id="0123"), id="short_codec_id"),
        pytest.param(lambda: replace(HEADER, codec_id="0123456789abcdef00"), id="long_codec_id"),
        pytest.param(lambda: replace(HEADER, codec_id="0123456789ABCDEF"), id="codec_id_in_capitals"),
        pytest.param(lambda: replace(HEADER, codec_id="no hexadecimals!"), id="codec_id_not_hexadecimal"),
        pytest.param(lambda: replace(HEADER, codec_id="01 3456789abcdef"), id="codec_id_with_a_space"),
        pytest.param(lambda: replace(HEADER, rate_hz=0), id="no_rate"),
        pytest.param(lambda: replace(HEADER, codebook_sizes=()), id="no_rows"),
        pytest.param(lambda: replace(HEADER, codebook_sizes=(2,) * 256), id="too_many_rows"),
        pytest.param(lambda: replace(HEADER, rate_hz=2**32).to_bytes(), id="rate_too_large"),
        pytest.param(lambda: replace(HEADER, num_channels=2**16).to_bytes(), id="too_many_channels"),
        pytest.param(lambda: replace(HEADER, model="ä" * 128).to_bytes(), id="name_too_long"),
    ],
)
def test_headers_that_cannot_be_written_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(BitstreamError):
        make()


@pytest.mark.parametrize("shape", [(1, 2), (1, 3, 4), (2, 2, 4), (1, 2, 4, 1)])
def test_the_writer_refuses_codes_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(BitstreamError, match="codes must be"):
        Writer(io.BytesIO(), HEADER).write(np.zeros(shape, np.int64))


@pytest.mark.parametrize("num_samples", [-1, -200, 0, 320, 481, 2**64])
def test_finish_refuses_a_wrong_number_of_samples(num_samples: int) -> None:
    target = io.BytesIO()
    with Writer(target, HEADER) as writer, pytest.raises(BitstreamError, match="samples"):  # noqa: PT012
        writer.write(random_codes(HEADER, 3))
        writer.finish(num_samples)
    assert "ends inside" in refusal(target.getvalue())


def test_the_writer_writes_no_block_that_the_reader_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codec.bitstream._MAX_PAYLOAD_BYTES", 32)
    with pytest.raises(BitstreamError, match="33 bytes"):
        Writer(io.BytesIO(), HEADER).write(random_codes(HEADER, FRAMES_PER_BLOCK))


def test_a_path_holds_the_bytes_of_a_stream_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    codes = random_codes(HEADER, 120)
    path = tmp_path / "with space ü.codec"
    path.write_bytes(b"what was there before")
    with Writer(path, HEADER) as writer:
        writer.write(codes)
        assert path.read_bytes() == b"what was there before"
        writer.finish(120 * 160)
    assert path.read_bytes() == written(HEADER, codes, 120 * 160)
    assert list(tmp_path.iterdir()) == [path]
    with Reader(str(path)) as reader:
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks()), axis=2), codes)


@pytest.mark.parametrize("already_there", [False, True])
@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt, "wrong_codes", "wrong_count", "bad_header"])
def test_a_writer_that_does_not_finish_leaves_nothing(
    failure: str | type[BaseException] | None, already_there: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file.codec"
    if already_there:
        path.write_bytes(b"before")
    header = replace(HEADER, model="x" * 256) if failure == "bad_header" else HEADER
    expected = BitstreamError if isinstance(failure, str) else failure
    with pytest.raises(expected) if expected else contextlib.nullcontext(), Writer(path, header) as writer:
        writer.write(random_codes(HEADER, 60))
        if failure == "wrong_codes":
            writer.write(np.full((1, 2, 60), 99))
        elif failure == "wrong_count":
            writer.finish(5)
        elif expected:
            raise expected
    assert [f.name for f in tmp_path.iterdir()] == ["file.codec"] * already_there
    assert not already_there or path.read_bytes() == b"before"


@pytest.mark.parametrize("num_frames", [7000, 200_000], ids=["found_when_closing", "found_when_writing"])
def test_a_full_disk_leaves_nothing(num_frames: int, tmp_path: Path, full_disk: FullDisk) -> None:
    with full_disk(), pytest.raises(OSError, match="too large"), Writer(tmp_path / "file.codec", HEADER) as writer:  # noqa: PT012
        writer.write(random_codes(HEADER, num_frames))
        writer.finish(num_frames * 160)
    assert not list(tmp_path.iterdir())


def test_blocks_can_be_read_from_a_pipe_as_they_arrive() -> None:
    codes = random_codes(HEADER, 70)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as source, os.fdopen(write_end, "wb", buffering=0) as target:
        writer = Writer(target, HEADER)
        reader = Reader(source)
        writer.write(codes[:, :, :60])
        blocks = reader.blocks()
        np.testing.assert_array_equal(next(blocks), codes[:, :, :50])
        writer.write(codes[:, :, 60:])
        writer.finish(70 * 160)
        target.close()
        np.testing.assert_array_equal(next(blocks), codes[:, :, 50:])
        assert next(blocks, None) is None
        assert (reader.num_frames, reader.num_samples) == (70, 70 * 160)
        reader.close()
        assert not source.closed  # whoever opened a stream closes it


class OneByteAtATime(io.RawIOBase):
    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        byte = self._data.read(1)
        buffer[: len(byte)] = byte
        return len(byte)


def test_a_source_may_give_fewer_bytes_than_asked_for(small_file: bytes) -> None:
    source: BinaryIO = OneByteAtATime(small_file)  # type: ignore[assignment]
    reader = Reader(source)
    np.testing.assert_array_equal(np.concatenate(list(reader.blocks()), axis=2), random_codes(HEADER, 53))


def test_a_recording_without_samples_is_a_file() -> None:
    assert written(HEADER, random_codes(HEADER, 0), 0) == header_bytes() + end_block(0, 0)
    _, codes, num_samples = read(header_bytes() + end_block(0, 0))
    assert (codes.shape, num_samples) == ((1, 2, 0), 0)


def test_bits_of_a_frame() -> None:
    header = replace(HEADER, codebook_sizes=(2, 3, 4, 5, 1000, 1024, 1025), num_channels=2)
    assert header.code_bits == (1, 2, 2, 3, 10, 10, 11)
    assert header.bits_per_frame == 78
    assert header.bitrate_bps == 78 * 50
