"""The header and the numbers and packed codes that containers are made of."""

import struct
import tracemalloc
import zlib
from dataclasses import replace
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from containers import HEADER, chained, end_block, header_bytes, headers, leb128, opened, packed, random_codes, sealed
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import header as header_module
from codec.bitstream import BitstreamError, Header, TruncatedError
from codec.header import numbers, pack_bits, pack_codes, split_number, unpack_bits, unpack_codes


@given(header=headers)
def test_what_was_written_is_read(header: Header) -> None:
    assert opened(header.to_bytes()).header == header


@given(header=headers, num_samples=st.integers(0, 2**40))
def test_frames_and_samples_are_counted_exactly(header: Header, num_samples: int) -> None:
    resampled = ceil(Fraction(num_samples * header.codec_rate_hz, header.rate_hz))
    num_frames = ceil(Fraction(resampled, header.hop_length))
    assert header.resampled(num_samples) == resampled
    assert header.num_frames_for(num_samples) == num_frames
    most = header.num_samples_in(num_frames)
    assert most >= num_samples
    assert header.num_frames_for(most) == num_frames or num_samples == most
    assert header.num_frames_for(most + 1) > num_frames


@pytest.mark.parametrize(
    ("changes", "spelled"),
    [
        pytest.param({}, header_bytes(), id="plain"),
        pytest.param({"entropy_id": "89abcdef"}, header_bytes(flags=1, entropy_id="89abcdef"), id="entropy"),
        pytest.param({"entropy_id": "00000000"}, header_bytes(flags=1, entropy_id="00000000"), id="zero_id"),
        pytest.param(
            {"codebook_sizes": (1024,) * 12, "num_frames_before": 200, "num_frames_after": 1},
            header_bytes(num_rows=12, runs=((12, 1024),), context=(200, 1)),
            id="one_run",
        ),
        pytest.param(
            {"codebook_sizes": (4, 4, 8, 4)}, header_bytes(num_rows=4, runs=((2, 4), (1, 8), (1, 4))), id="three_runs"
        ),
        pytest.param({"codebook_sizes": (2,) * 255}, header_bytes(num_rows=255, runs=((255, 2),)), id="255_rows"),
        pytest.param({"num_channels": 1024}, header_bytes(num_channels=1024), id="many_channels"),
        pytest.param({"model": "ü" * 127}, header_bytes(name="ü".encode() * 127), id="long_name"),
        pytest.param({"rate_hz": 10**6}, header_bytes(rates_hz=(16000, 10**6)), id="high_rate"),
        pytest.param({"model": ""}, header_bytes(name=b""), id="no_name"),
        pytest.param({"hop_length": 2**31 - 1}, header_bytes(hop_length=2**31 - 1), id="long_hop"),
    ],
)
def test_bytes_are_those_of_the_table(changes: dict[str, object], spelled: bytes) -> None:
    header = replace(HEADER, **changes)  # type: ignore[arg-type]
    assert header.to_bytes() == spelled
    assert opened(spelled).header == header


def test_golden_bytes() -> None:
    golden = "89434f444543 01 00 0123456789abcdef 807d c03e 01 c002 00 00 02 0104 0108 03 6d4031"
    assert HEADER.to_bytes()[:-4] == bytes.fromhex(golden)
    assert HEADER.to_bytes()[-4:] == zlib.crc32(bytes.fromhex(golden)).to_bytes(4, "little")
    entropy = golden.replace(" 01 00 ", " 01 01 ").replace("abcdef ", "abcdef 89abcdef ")
    assert replace(HEADER, entropy_id="89abcdef").to_bytes()[:-4] == bytes.fromhex(entropy)


@pytest.mark.parametrize("data", [header_bytes(), header_bytes(flags=1, entropy_id="89abcdef", name=b"a name")])
def test_truncation_and_every_flipped_bit_are_refused(data: bytes) -> None:
    for size in range(len(data)):
        with pytest.raises(TruncatedError, match=r"ends inside the header" if size else "empty"):
            opened(data[:size], allow_truncated=True)
    for bit in range(8 * len(data)):
        damaged = bytearray(data + end_block(0, 0))
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            opened(bytes(damaged), allow_truncated=bit % 2 == 0)


@pytest.mark.parametrize(
    ("version", "flags"), [(0, 0), (2, 0), (255, 0), (1, 2), (1, 3), (1, 128)], ids=lambda value: str(value)
)
def test_other_versions_and_unknown_flags_are_refused(version: int, flags: int) -> None:
    with pytest.raises(BitstreamError, match=rf"version {version} \(flags {flags}\) needs a newer version"):
        opened(chained(header_bytes(version=version, flags=flags), end_block(0, 0)))


@pytest.mark.parametrize("data", [b"RIFF" + bytes(100), b"a short text", header_bytes()[1:]])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(BitstreamError, match=r"^not a \.codec file$"):
        opened(data)


def _needless_byte() -> bytes:
    body = header_bytes()[:-4]
    at = 18 + 2  # the second rate: c0 3e
    return sealed(body[:at] + b"\xc0\xbe\x00" + body[at + 2 :])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(header_bytes(num_channels=0), "must be positive", id="no_channels"),
        pytest.param(header_bytes(num_channels=65536), "65536 channels", id="too_many_channels"),
        pytest.param(header_bytes(rates_hz=(16000, 0)), "must be positive", id="no_rate"),
        pytest.param(header_bytes(rates_hz=(0, 8000)), "must be positive", id="no_codec_rate"),
        pytest.param(header_bytes(rates_hz=(16000, 10**6 + 1)), "at most 1000000", id="rate_too_large"),
        pytest.param(header_bytes(hop_length=0), "must be positive", id="no_hop"),
        pytest.param(header_bytes(hop_length=2**31), "at most", id="hop_too_large"),
        pytest.param(header_bytes(context=(2**31, 0)), "at most", id="context_too_large"),
        pytest.param(header_bytes(num_rows=0, runs=()), "1 to 255 rows", id="no_rows"),
        pytest.param(header_bytes(runs=((1, 4), (1, 1))), "codebook sizes", id="codebook_of_one"),
        pytest.param(header_bytes(runs=((1, 4), (1, 2**24 + 1))), "codebook sizes", id="codebook_too_large"),
        pytest.param(header_bytes(runs=((1, 4), (2, 8))), "more than its rows", id="run_too_long"),
        pytest.param(header_bytes(runs=((0, 4), (2, 8))), "more than its rows", id="run_of_none"),
        pytest.param(header_bytes(runs=((2**60, 4),)), "more than its rows", id="run_without_end"),
        pytest.param(header_bytes(runs=((1, 4), (1, 4))), "written wrongly", id="one_run_as_two"),
        pytest.param(_needless_byte(), "number is written wrongly", id="needless_byte"),
        pytest.param(header_bytes(hop_length=2**63), "number is written wrongly", id="number_of_ten_bytes"),
        pytest.param(header_bytes(name=b"\x1b[2J"), "control characters", id="terminal_escape"),
        pytest.param(header_bytes(name=b"a\nb"), "control characters", id="two_lines"),
        pytest.param(header_bytes(name=b"\xff"), "not UTF-8", id="name_is_not_utf8"),
        pytest.param(header_bytes()[:-1] + b"\0", "checksum", id="checksum"),
    ],
)
def test_headers_that_make_no_sense_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message) as caught:
        opened(data + end_block(0, 0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"codec_id": "0123"}, "16 hexadecimal digits", id="short_codec_id"),
        pytest.param({"codec_id": "0123456789abcdef00"}, "16 hexadecimal", id="long_codec_id"),
        pytest.param({"codec_id": "0123456789ABCDEF"}, "16 hexadecimal", id="codec_id_in_capitals"),
        pytest.param({"codec_id": "no hexadecimals!"}, "16 hexadecimal", id="codec_id_not_hexadecimal"),
        pytest.param({"entropy_id": ""}, "8 hexadecimal digits, not ''", id="no_entropy_id"),
        pytest.param({"entropy_id": "0123456789"}, "8 hexadecimal", id="long_entropy_id"),
        pytest.param({"rate_hz": 0}, "positive", id="no_rate"),
        pytest.param({"rate_hz": 2**32}, "at most", id="rate_too_large"),
        pytest.param({"codec_rate_hz": 2**32}, "at most", id="codec_rate_too_large"),
        pytest.param({"num_channels": -1}, "positive", id="negative_channels"),
        pytest.param({"num_channels": 1025}, "1025 channels", id="too_many_channels"),
        pytest.param({"codebook_sizes": ()}, "not 0", id="no_rows"),
        pytest.param({"codebook_sizes": (2,) * 256}, "not 256", id="too_many_rows"),
        pytest.param({"codebook_sizes": (2, 1)}, "codebook sizes", id="codebook_of_one"),
        pytest.param({"num_frames_before": -1}, "negative", id="negative_context_before"),
        pytest.param({"num_frames_after": -1}, "negative", id="negative_context_after"),
        pytest.param({"num_frames_after": 2**31}, "at most", id="context_too_large"),
        pytest.param({"hop_length": 2**63}, "at most", id="hop_too_large"),
        pytest.param({"model": "a\tb"}, "control characters", id="tab"),
        pytest.param({"model": "\udc80"}, "control characters", id="surrogate"),
    ],
)
def test_headers_that_cannot_be_written_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        replace(HEADER, **changes)  # type: ignore[arg-type]


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(BitstreamError, match="longer than 255 bytes"):
        replace(HEADER, model="ä" * 128).to_bytes()


def test_bits_of_a_frame() -> None:
    header = replace(HEADER, codebook_sizes=(2, 3, 4, 5, 1000, 1024, 1025), num_channels=2)
    assert header.code_bits == (1, 2, 2, 3, 10, 10, 11)
    assert header.bits_per_frame == 78
    assert header.bitrate_bps == 78 * 50


def test_codes_are_packed_channel_by_channel_within_a_frame() -> None:
    header = replace(HEADER, num_channels=2)
    # [channel, row, frame]; one frame of channel 0 (2, 5) and channel 1 (1, 4): bits 01 101 10 001.
    codes = np.array([[[2], [5]], [[1], [4]]])
    assert pack_codes(codes, header) == bytes([0b00110110, 0b00000010])
    np.testing.assert_array_equal(unpack_codes(bytes([0b00110110, 0b00000010]), 1, header), codes)


@given(header=headers, num_frames=st.integers(0, 40), seed=st.integers(0, 2**32))
@settings(max_examples=50)
def test_codes_are_packed_bit_by_bit(header: Header, num_frames: int, seed: int) -> None:
    codes = random_codes(header, num_frames, seed)
    data = pack_codes(codes, header)
    assert data == packed(codes, header.code_bits)
    np.testing.assert_array_equal(unpack_codes(data, num_frames, header), codes)
    for dtype in (np.uint32, np.uint64):
        assert pack_codes(codes.astype(dtype), header) == data


@pytest.mark.parametrize(
    ("data", "num_frames", "message"),
    [
        (b"\x79", 2, "10 bits of codes do not fit 1 bytes"),
        (b"\x79\x01\x00", 2, "10 bits of codes do not fit 3 bytes"),
        (b"\x79\x05", 2, "filling bits"),
    ],
)
def test_a_payload_of_another_size_or_filling_is_refused(data: bytes, num_frames: int, message: str) -> None:
    np.testing.assert_array_equal(unpack_codes(b"\x79\x01", 2, HEADER), [[[1, 3], [6, 2]]])
    with pytest.raises(BitstreamError, match=message):
        unpack_codes(data, num_frames, HEADER)


def test_a_frame_of_many_codes_that_are_not_there_allocates_nothing() -> None:
    header = replace(HEADER, num_channels=1000, codebook_sizes=(2,) * 255)
    tracemalloc.start()
    try:
        with pytest.raises(BitstreamError, match="255000 bits of codes do not fit 1000 bytes"):
            unpack_codes(bytes(1000), 1, header)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codes", [[[[4], [0]]], [[[0], [8]]], [[[-1], [0]]]])
def test_codes_outside_their_codebook_are_refused(codes: list[list[list[int]]]) -> None:
    with pytest.raises(BitstreamError, match="outside its codebook"):
        pack_codes(np.array(codes), HEADER)
    data = pack_bits(np.array([[3, 5]]), [2, 3])
    with pytest.raises(BitstreamError, match="outside its codebook"):
        unpack_codes(data, 1, replace(HEADER, codebook_sizes=(3, 6)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bool, np.complex64])
def test_codes_that_are_no_integers_are_refused(dtype: type) -> None:
    with pytest.raises(BitstreamError, match=f"must be integers, got {np.dtype(dtype)}"):
        pack_codes(np.zeros((1, 2, 3), dtype), HEADER)


@pytest.mark.parametrize("shape", [(1, 2), (1, 3, 4), (2, 2, 4), (1, 2, 4, 1)])
def test_codes_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BitstreamError, match=r"codes must be \[1, 2, F\], got"):
        pack_codes(np.zeros(shape, np.int64), HEADER)


@given(st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 300), max_size=5))
def test_numbers_have_one_spelling(values: list[int]) -> None:
    spelled = header_module.leb128(*values)
    assert spelled == leb128(*values)
    assert numbers(spelled, len(values)) == numbers(spelled) == tuple(values)
    rest = spelled + b"\x05rest"
    for value in values:
        found, rest = split_number(rest)
        assert found == value
    assert rest == b"\x05rest"


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff\x00", b"\xff" * 9, b"\x80" * 9 + b"\x01"])
def test_other_spellings_are_refused(data: bytes) -> None:
    with pytest.raises(BitstreamError, match="a number is written wrongly"):
        split_number(data)
    with pytest.raises(BitstreamError, match="a number is written wrongly"):
        numbers(b"\x01" + data, 2)


def test_numbers_with_something_behind_them_are_refused() -> None:
    with pytest.raises(BitstreamError, match="too long"):
        numbers(b"\x01\x02\x03", 2)


def test_bits_of_global_codes_are_packed_alike() -> None:
    codes = np.array([[1], [2], [5], [8]], np.uint8)
    assert pack_bits(codes, [4]) == bytes([0x21, 0x85])
    np.testing.assert_array_equal(unpack_bits(bytes([0x21, 0x85]), 4, [4]), [[1, 2, 5, 8]])
    assert struct.unpack("<H", pack_bits(codes.astype(np.uint64), [4])) == (0x8521,)
