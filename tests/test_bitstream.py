"""The container: its bytes, what is read back, damage, seeking, pipes, cutting and joining."""

import contextlib
import io
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from containers import (
    CODED,
    CODED_HEADER,
    END,
    GLOBAL,
    HEADER,
    INDEX,
    PACKED,
    SEGMENT,
    TABLES,
    Part,
    assert_same_parts,
    block,
    blocks_of,
    chained,
    end_block,
    global_start,
    header_bytes,
    headers,
    leb128,
    likely_codes,
    opened,
    packed,
    parts_of,
    random_codes,
    sealed,
    some_tables,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.bitstream import (
    BLOCKS_PER_INDEX_ENTRY,
    FRAMES_PER_BLOCK,
    BitstreamError,
    Header,
    Reader,
    Segment,
    SegmentEnd,
    SegmentStart,
    TruncatedError,
    Writer,
)
from codec.entropy import EntropyTables

FullDisk = Callable[[], contextlib.AbstractContextManager[None]]

TWO_FRAMES = np.array([[[1, 3], [6, 2]]])  # bits 10 011 | 11 010, low bit first: 0b01111001 0b00000001
FRAMES = block(PACKED, b"\x02\x79\x01")


def refusal(data: bytes, tables: EntropyTables | None = None) -> str:
    with pytest.raises(BitstreamError) as caught:
        list(opened(data, tables).events())
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# The bytes


def test_golden_bytes() -> None:
    golden = header_bytes() + bytes.fromhex("19 027901 aa7aa4f8  28 ac02 02 00 05 d9da3644")
    assert golden == chained(header_bytes(), FRAMES, end_block(300, 2))
    assert written(HEADER, Part(TWO_FRAMES, 300)) == golden


def test_a_file_of_segments_is_the_table_byte_for_byte() -> None:
    header = replace(HEADER, num_channels=2, num_frames_before=200, num_frames_after=1, entropy_id=TABLES.id)
    header = replace(header, codebook_sizes=(5, 8, 16), rate_hz=11025)
    coded, random = likely_codes(TABLES, 2, 40), random_codes(header, 7)
    start = SegmentStart(441, np.array([[1, 2, 5], [8, 0, 4]]), 9)
    data = written(header, Part(coded, 8700), Part(random, 1000, start), tables=TABLES, frames_per_block=25)

    first, second = coded[:, :, :25], coded[:, :, 25:]
    spelled = header_bytes(
        flags=1,
        entropy_id=TABLES.id,
        rates_hz=(16000, 11025),
        num_channels=2,
        context=(200, 1),
        num_rows=3,
        runs=((1, 5), (1, 8), (1, 16)),
    )
    blocks = block(CODED, leb128(25) + TABLES.encode(first)) + block(CODED, leb128(15) + TABLES.encode(second))
    blocks += block(SEGMENT, leb128(8700, 441)) + block(GLOBAL, leb128(3, 9) + bytes([0x21, 0x85, 0x40]))
    blocks += block(PACKED, leb128(7) + packed(random, (3, 3, 4))) + end_block(9700, 47)
    assert data == chained(spelled, blocks)
    assert_same_parts(parts_of(opened(data, TABLES)), [Part(coded, 8700), Part(random, 1000, start)])


def test_index_is_the_table_byte_for_byte() -> None:
    start = SegmentStart(100)
    codes = random_codes(HEADER, 40)
    data = written(HEADER, Part(codes[:, :, :3], 480, SegmentStart()), Part(codes, 6300, start), frames_per_block=1)
    size = len(block(PACKED, b"\1\0"))
    blocks = [block(PACKED, b"\1" + packed(codes[:, :, f : f + 1], (2, 3))) for f in range(40)]
    segment = block(SEGMENT, leb128(480, 100))
    entries = leb128(0, 0, 1, 3 * size, 3, 481, len(segment) + 32 * size, 32, 0)
    index = block(INDEX, entries)
    assert data == chained(header_bytes(), *blocks[:3], segment, *blocks, index, end_block(6780, 43, len(index)))


@pytest.mark.parametrize(("num_blocks", "has_index"), [(31, False), (32, False), (33, True), (100, True)])
def test_index_is_written_for_more_than_32_blocks(num_blocks: int, has_index: bool) -> None:
    data = written(HEADER, Part(random_codes(HEADER, 2 * num_blocks), num_blocks * 320), frames_per_block=2)
    assert [kind for kind, _, _ in blocks_of(data)] == [PACKED] * num_blocks + [INDEX] * has_index + [END]
    reader = opened(data)
    list(reader)
    assert (reader.has_index, reader.num_blocks, reader.num_bytes) == (has_index, num_blocks, len(data))
    assert reader.num_code_bytes == num_blocks * len(packed(random_codes(HEADER, 2), (2, 3)))


def test_an_index_that_is_too_large_for_a_block_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codec.bitstream.MAX_PAYLOAD_BYTES", 250)
    parts = [Part(random_codes(HEADER, 1, i), 160) for i in range(100)]
    data = written(HEADER, *parts)
    assert INDEX not in {kind for kind, _, _ in blocks_of(data)}
    assert_same_parts(parts_of(opened(data)), parts)


@pytest.mark.parametrize("frames_per_block", [1, 7, 125, 1000, 10**6])
def test_blocks_have_as_many_frames_as_asked_for_up_to_1000(frames_per_block: int) -> None:
    codes = random_codes(HEADER, 2500)
    data = written(HEADER, Part(codes, 2500 * 160), frames_per_block=frames_per_block)
    size = min(frames_per_block, 1000)
    assert [b.shape[2] for b in opened(data)] == [size] * (2500 // size) + [2500 % size] * (2500 % size > 0)
    np.testing.assert_array_equal(opened(data).read(), codes)


@pytest.mark.parametrize(("num_channels", "num_rows", "num_frames"), [(512, 16, 42), (1024, 255, 1)])
def test_frames_of_many_bytes_make_shorter_blocks(num_channels: int, num_rows: int, num_frames: int) -> None:
    header = replace(HEADER, num_channels=num_channels, codebook_sizes=(2**24,) * num_rows)
    codes = random_codes(header, num_frames + 1)
    data = written(header, Part(codes, 160 * (num_frames + 1)))
    assert [block.shape[2] for block in opened(data)] == [num_frames, 1]
    np.testing.assert_array_equal(opened(data).read(), codes)
    assert all(len(payload) <= 2**20 for _, payload, _ in blocks_of(data, header))


def test_a_block_of_more_than_2_to_the_17_codes_is_packed() -> None:
    tables = some_tables((5,), power=30.0)
    header = replace(HEADER, num_channels=1024, codebook_sizes=(5,), entropy_id=tables.id)
    codes = np.full((1024, 1, 129), tables.decode(b"", 1, 1, 1)[0, 0, 0])
    for num_frames, expected in ((128, CODED), (129, PACKED)):
        part = Part(codes[:, :, :num_frames], 160 * num_frames)
        data = written(header, part, tables=tables, frames_per_block=num_frames)
        assert [kind for kind, _, _ in blocks_of(data, header)] == [expected, END]
    forged = chained(header.to_bytes(), block(CODED, leb128(129) + tables.encode(codes)), end_block(129 * 160, 129))
    assert "a coded block claims 129 frames in" in refusal(forged, tables)


@given(data=st.data(), header=headers, seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_what_was_written_is_read_and_its_bytes_do_not_depend_on_the_chunks(
    data: st.DataObject, header: Header, seed: int
) -> None:
    header = replace(header, entropy_id=None, rate_hz=max(header.rate_hz, 8000), num_frames_after=2)
    parts = []
    for _ in range(data.draw(st.integers(1, 3))):
        skip = data.draw(st.integers(0, header.num_samples_in(3)))
        num_samples = data.draw(st.integers(0, header.num_samples_in(130)))
        num_frames = header.num_frames_for(skip + num_samples) + data.draw(st.integers(0, 2))
        start = SegmentStart(skip)
        if data.draw(st.booleans()):
            start = global_start(data.draw(st.integers(1, 50)), skip, num_channels=header.num_channels)
        parts.append(Part(random_codes(header, num_frames, seed + len(parts)), num_samples, start))
    shortest = min(part.num_frames for part in parts)
    cuts = data.draw(st.lists(st.integers(0, shortest), max_size=6).map(tuple))

    whole = written(header, *parts)
    assert written(header, *parts, cuts=cuts) == whole
    reader = opened(whole)
    assert reader.header == header
    assert_same_parts(parts_of(reader), parts)
    assert reader.num_frames == sum(part.num_frames for part in parts)
    assert reader.num_samples == sum(part.num_samples for part in parts)
    np.testing.assert_array_equal(reader.read(), np.concatenate([part.codes for part in parts], axis=2))


def test_a_recording_without_samples_is_a_file() -> None:
    data = written(HEADER, Part(random_codes(HEADER, 0), 0))
    assert data == chained(header_bytes(), end_block(0, 0))
    reader = opened(data)
    assert_same_parts(parts_of(reader), [Part(random_codes(HEADER, 0), 0)])
    assert (reader.num_frames, reader.num_samples, reader.read().shape) == (0, 0, (1, 2, 0))
    with pytest.raises(BitstreamError, match="not a stretch of a file of 0"):
        reader.events(0, 1)


@pytest.mark.parametrize("frames_per_block", [1, 125])
@pytest.mark.parametrize("second", [SegmentStart(), SegmentStart(70), global_start(3), global_start(3, 70)])
def test_segments_without_samples_stay(second: SegmentStart, frames_per_block: int) -> None:
    empty = random_codes(HEADER, 0)
    parts = [
        Part(empty, 0),
        Part(random_codes(HEADER, 40), 6300, second),
        Part(empty, 0, global_start(2)),
        Part(empty, 0),
    ]
    for order in (parts, parts[::-1], [*parts, parts[1]]):
        data = written(HEADER, *order, frames_per_block=frames_per_block)
        reader = opened(data)
        assert_same_parts(parts_of(reader), order)
        assert reader.has_index == (frames_per_block == 1)
        assert_same_parts(
            [Part(s.codes, t.num_samples, t.start) for s, t in zip(order, reader.segments, strict=True)], order
        )


# Damage


def small_files() -> dict[str, tuple[bytes, EntropyTables | None]]:
    """Of every kind one, of about 100 to 400 bytes."""
    coded = [Part(likely_codes(TABLES, 1, n, n), 320 * n - 350) for n in (20, 13)]
    empty = Part(random_codes(CODED_HEADER, 0), 0)
    with_global = [replace(part, start=global_start(4, 30, seed=i)) for i, part in enumerate(coded)]
    return {
        "packed": (written(HEADER, Part(random_codes(HEADER, 53), 53 * 160 - 7), frames_per_block=25), None),
        "coded": (written(CODED_HEADER, coded[0], tables=TABLES, frames_per_block=8), TABLES),
        "segments": (written(CODED_HEADER, coded[0], empty, coded[1], tables=TABLES, frames_per_block=8), TABLES),
        "global": (written(CODED_HEADER, *with_global, tables=TABLES, frames_per_block=16), TABLES),
        "index": (written(HEADER, Part(random_codes(HEADER, 34), 34 * 160), frames_per_block=1), None),
    }


SMALL_FILES = small_files()


@pytest.fixture(params=SMALL_FILES)
def small_file(request: pytest.FixtureRequest) -> tuple[bytes, EntropyTables | None]:
    return SMALL_FILES[request.param]


def read_until_it_ends(reader: Reader) -> tuple[list[Any], BitstreamError | None]:
    """Events, each with codes as lists, and the error that ended them."""
    found: list[Any] = []
    try:
        for event in reader.events():
            if isinstance(event, SegmentStart):
                found.append((event.skip_samples, event.global_codebook_size, np.asarray(event.global_codes).tolist()))
            else:
                found.append(event.tolist() if isinstance(event, np.ndarray) else event)
    except BitstreamError as error:
        return found, error
    return found, None


def test_every_truncation_is_refused_after_the_good_blocks(small_file: tuple[bytes, EntropyTables | None]) -> None:
    data, tables = small_file
    header = opened(data).header
    true, _ = read_until_it_ends(opened(data, tables))
    header_size = len(header.to_bytes())
    for size in range(header_size, len(data)):
        found, error = read_until_it_ends(opened(data[:size], tables))
        assert isinstance(error, TruncatedError)
        assert found == true[: len(found)]
        num_frames = sum(len(codes[0][0]) for codes in found if isinstance(codes, list))
        assert str(error) == f"the file ends inside a block, after {num_frames} good frames"
        blocks = blocks_of(data, header)
        num_good = sum(kind in (PACKED, CODED) and following[2] <= size for (kind, _, _), following in pairwise(blocks))
        assert sum(isinstance(codes, list) for codes in found) == num_good

        lenient = opened(data[:size], tables, allow_truncated=True)
        rescued, error = read_until_it_ends(lenient)
        if not num_frames:
            assert isinstance(error, TruncatedError)
            continue
        assert error is None
        assert lenient.is_truncated
        if isinstance(found[-1], SegmentEnd):
            assert rescued == found
            continue
        start = max(i for i, event in enumerate(found) if isinstance(event, tuple))
        in_segment = sum(len(codes[0][0]) for codes in found[start + 1 :])
        end = SegmentEnd(max(0, in_segment * header.hop_length * header.rate_hz // 16000 - found[start][0]))
        assert rescued == [*found, end]
        assert lenient.num_frames == num_frames
        np.testing.assert_array_equal(lenient.read(), opened(data, tables).read(0, num_frames))


def test_every_flipped_bit_is_refused_and_never_gives_other_codes(
    small_file: tuple[bytes, EntropyTables | None],
) -> None:
    data, tables = small_file
    true, _ = read_until_it_ends(opened(data, tables))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        for allow_truncated in (False, True):
            try:
                reader = opened(bytes(damaged), tables, allow_truncated=allow_truncated)
            except BitstreamError:
                continue
            found, error = read_until_it_ends(reader)
            if reader.is_truncated:  # a size was damaged, and the rest taken for one block
                assert allow_truncated
                found = found[:-1] if isinstance(found[-1], SegmentEnd) else found
            else:
                assert isinstance(error, BitstreamError)
            assert found == true[: len(found)]
            if not allow_truncated:
                with contextlib.suppress(BitstreamError):  # an INDEX may lead past the damage
                    assert (reader.num_samples, reader.num_frames) == (
                        opened(data).num_samples,
                        opened(data).num_frames,
                    )


@given(data=st.binary(max_size=200), after_header=st.booleans())
@settings(max_examples=200)
def test_arbitrary_bytes_are_refused(data: bytes, after_header: bool) -> None:
    refusal(header_bytes() + data if after_header else data)
    with pytest.raises(BitstreamError):
        _ = opened(header_bytes() + data).num_samples


HUGE = 2**63 - 1  # the largest number there is


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(leb128(8 * 2**20 + PACKED), id="largest_block_allowed"),
        pytest.param(leb128(8 * (2**20 + 1) + PACKED) + bytes(100), id="block_too_large"),
        pytest.param(leb128(HUGE) + bytes(100), id="reserved_block_of_an_exabyte"),
        pytest.param(b"\xff" * 100, id="size_without_end"),
        pytest.param(block(PACKED, leb128(HUGE) + bytes(32)), id="frames_that_are_not_there"),
        pytest.param(block(CODED, leb128(HUGE) + bytes(32)), id="coded_frames_that_are_not_there"),
        pytest.param(block(CODED, leb128(2**17) + bytes(32)), id="more_codes_than_may_be_coded"),
        pytest.param(block(PACKED, b"\xff" * 100), id="frame_count_without_end"),
        pytest.param(block(GLOBAL, leb128(HUGE, 2**24) + bytes(32)), id="global_codes_that_are_not_there"),
        pytest.param(block(SEGMENT, leb128(0, HUGE)) + end_block(0, 0), id="skips_what_is_not_there"),
        pytest.param(block(SEGMENT, leb128(0, 0)) + block(SEGMENT, leb128(HUGE, 0)), id="segment_of_2_to_the_63"),
        pytest.param(end_block(HUGE, HUGE), id="end_of_2_to_the_63_frames"),
        pytest.param(end_block(HUGE, 0), id="end_of_2_to_the_63_samples"),
        pytest.param(end_block(0, 0, HUGE), id="index_of_an_exabyte"),
        pytest.param(block(INDEX, leb128(0, 0, 1, HUGE, HUGE, 1)) + end_block(0, 0, 30), id="index_into_nowhere"),
    ],
)
@pytest.mark.parametrize("from_disk", [False, True], ids=["memory", "disk"])
def test_a_claim_of_gigantic_size_allocates_nothing(data: bytes, from_disk: bool, tmp_path: Path) -> None:
    path = tmp_path / "claims.codec"
    path.write_bytes(chained(CODED_HEADER.to_bytes(), data))
    tracemalloc.start()
    try:
        with path.open("rb") if from_disk else io.BytesIO(path.read_bytes()) as file:
            reader = Reader(file, tables=TABLES)
            with pytest.raises(BitstreamError):
                list(reader)
            with pytest.raises(BitstreamError):
                _ = reader.num_samples
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_block_that_is_too_large_is_refused_even_where_it_is_whole() -> None:
    assert "1048577 bytes, more than" in refusal(chained(header_bytes(), block(6, bytes(2**20 + 1)), end_block(0, 0)))
    assert opened(chained(header_bytes(), block(6, bytes(2**20)), end_block(0, 0))).num_samples == 0


@pytest.mark.parametrize("block_type", [6, 7])
@pytest.mark.parametrize("size", [0, 1, 200, 100_000])
def test_reserved_blocks_are_skipped_anywhere(block_type: int, size: int) -> None:
    extra = block(block_type, bytes(size))
    segment = block(SEGMENT, leb128(0, 20))
    true = [Part(TWO_FRAMES, 280, SegmentStart(20))]
    for parts in ((extra, segment, FRAMES), (segment, extra, FRAMES), (extra, extra, segment, FRAMES, extra)):
        reader = opened(chained(header_bytes(), *parts, end_block(280, 2)))
        assert_same_parts(parts_of(reader), true)
        np.testing.assert_array_equal(reader.read(1, 1), TWO_FRAMES[:, :, 1:])
        assert (reader.num_blocks, reader.num_samples) == (1, 280)
    assert "damaged" in refusal(chained(header_bytes(), FRAMES, extra[:-1], bytes([extra[-1] ^ 1]), end_block(300, 2)))
    assert "after END" in refusal(chained(header_bytes(), FRAMES, end_block(300, 2), extra))


@pytest.mark.parametrize("tail", [b"\0", end_block(0, 0), chained(header_bytes(), end_block(0, 0))])
def test_bytes_after_the_end_are_refused(tail: bytes) -> None:
    assert refusal(chained(header_bytes(), end_block(0, 0)) + tail) == "there are bytes after END"


GLOBAL_BLOCK = block(GLOBAL, leb128(1, 16) + b"\x07")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        pytest.param(FRAMES + end_block(300, 1), "END does not fit", id="end_with_fewer_frames"),
        pytest.param(FRAMES + end_block(300, 3), "END does not fit", id="end_with_more_frames"),
        pytest.param(FRAMES + end_block(160, 2), "160 samples take 1 frames, but 2 came", id="too_few_samples"),
        pytest.param(FRAMES + end_block(321, 2), "321 samples take 3 frames, but 2 came", id="too_many_samples"),
        pytest.param(FRAMES + end_block(300, 2, 9), "END does not fit", id="index_that_is_not_there"),
        pytest.param(FRAMES + block(END, leb128(300, 2, 0)), "written wrongly", id="short_end"),
        pytest.param(FRAMES + block(END, leb128(300, 2, 0) + b"\5\5"), "too long", id="long_end"),
        pytest.param(FRAMES + block(END, leb128(300, 2, 0) + b"\6"), "wrong size", id="end_of_another_size"),
        pytest.param(block(PACKED, b"\x00") + end_block(0, 0), "claims 0 frames", id="block_of_no_frames"),
        pytest.param(block(PACKED, b""), "written wrongly", id="empty_payload"),
        pytest.param(block(PACKED, b"\x80"), "written wrongly", id="frame_count_cut_off"),
        pytest.param(block(PACKED, b"\x82\x00\x79\x01"), "written wrongly", id="frame_count_of_needless_bytes"),
        pytest.param(block(PACKED, b"\x01\x79\x01"), "5 bits of codes do not fit 2", id="bytes_beyond_the_frames"),
        pytest.param(block(PACKED, b"\x04\x79\x01"), "20 bits of codes do not fit 2", id="frames_beyond_the_bytes"),
        pytest.param(block(PACKED, b"\x02\x79\x05"), "filling bits", id="filling_that_is_not_zero"),
        pytest.param(block(CODED, b"\x02\x79"), "the header names no tables", id="coded_without_tables"),
        pytest.param(sealed(b"\x99\x00\x02\x79\x01"), "written wrongly", id="block_size_of_needless_bytes"),
        pytest.param(GLOBAL_BLOCK * 2 + FRAMES, "in the wrong place", id="global_twice"),
        pytest.param(FRAMES + GLOBAL_BLOCK, "in the wrong place", id="global_after_frames"),
        pytest.param(block(GLOBAL, leb128(0, 16)), "0 global codes of 16", id="global_none"),
        pytest.param(block(GLOBAL, leb128(1, 1) + b"\0"), "1 global codes of 1", id="global_codebook_of_one"),
        pytest.param(block(GLOBAL, leb128(1, 2**24 + 1) + bytes(4)), "1 global codes of", id="global_codebook_large"),
        pytest.param(block(GLOBAL, leb128(1, 6) + b"\x07"), "outside its codebook", id="global_outside"),
        pytest.param(block(GLOBAL, leb128(1, 16) + b"\x17"), "filling bits", id="global_filling"),
        pytest.param(block(GLOBAL, leb128(3, 16) + b"\x07"), "12 bits of codes do not fit 1", id="global_size"),
        pytest.param(block(SEGMENT, leb128(0)), "written wrongly", id="short_segment"),
        pytest.param(block(SEGMENT, leb128(0, 0, 0)), "too long", id="long_segment"),
        pytest.param(block(SEGMENT, leb128(5, 0)) + FRAMES, "not there", id="first_segment_ends_one"),
        pytest.param(FRAMES + block(SEGMENT, leb128(160, 0)), "160 samples take 1 frames", id="segment_too_short"),
        pytest.param(
            block(SEGMENT, leb128(0, 200)) + FRAMES + end_block(300, 2),
            "300 samples after 200 skipped ones take 4 frames, but 2 came",
            id="skips_more_than_there_is",
        ),
        pytest.param(
            FRAMES + block(SEGMENT, leb128(300, 0)) + end_block(299, 2), "-1 samples", id="end_with_fewer_samples"
        ),
        pytest.param(block(INDEX, b"") + FRAMES, "INDEX does not fit", id="index_first"),
        pytest.param(FRAMES + block(INDEX, b"\0\0\1") + FRAMES, "not the last block before END", id="index_inside"),
        pytest.param(FRAMES + block(INDEX, b"\0\0\1") * 2, "not the last block before END", id="index_twice"),
        pytest.param(FRAMES + block(INDEX, b"\0\0\1") + block(6, b""), "not the last block", id="index_reserved_end"),
        pytest.param(FRAMES + block(INDEX, b"\0\0\1\5\2\0"), "INDEX does not fit", id="index_of_too_much"),
        pytest.param(
            FRAMES + block(INDEX, b"\0\0\1") + end_block(300, 2, 9), "END does not fit", id="index_of_another_size"
        ),
    ],
)
def test_blocks_that_contradict_themselves_are_refused(blocks: bytes, message: str) -> None:
    assert message in refusal(chained(header_bytes(), blocks))


def test_an_index_that_nobody_needs_is_read() -> None:
    index = block(INDEX, b"\0\0\1")
    reader = opened(chained(header_bytes(), FRAMES, index, end_block(300, 2, len(index))))
    assert_same_parts(parts_of(reader), [Part(TWO_FRAMES, 300)])
    assert reader.has_index


def test_coded_blocks_that_cannot_be_are_refused() -> None:
    header = CODED_HEADER.to_bytes()
    codes = likely_codes(TABLES, 1, 20)
    data = TABLES.encode(codes)
    coded = block(CODED, leb128(20) + data)
    np.testing.assert_array_equal(opened(chained(header, coded, end_block(6400, 20)), TABLES).read(), codes)
    other = f"the codes are coded with tables {TABLES.id} of m@1, which are not here"
    assert refusal(chained(header, coded), None) == other
    assert refusal(chained(header, coded), some_tables((5, 8, 16), 1)) == other
    assert "coded block claims 20 frames" in refusal(chained(header, block(CODED, leb128(20) + bytes(25))), TABLES)
    for wrong in (data + b"\0", data + b"\1", data[:-1], bytes([data[0] ^ 64]) + data[1:]):
        assert "coded bytes" in refusal(chained(header, block(CODED, leb128(20) + wrong)), TABLES)
    more_rows = replace(CODED_HEADER, codebook_sizes=(5, 8, 16, 16)).to_bytes()
    assert "tables for 3 rows" in refusal(chained(more_rows, coded), TABLES)
    smaller = replace(CODED_HEADER, codebook_sizes=(2, 2, 2)).to_bytes()
    assert refusal(chained(smaller, block(CODED, leb128(80) + TABLES.encode(likely_codes(TABLES, 1, 80)))), TABLES)


# Seeking


def long_files() -> dict[str, tuple[bytes, Header, list[Part], EntropyTables | None]]:
    """With INDEX, one to four segments."""
    plain = [Part(random_codes(HEADER, 300), 300 * 160 - 5)]
    lengths = [
        (40, 12800, SegmentStart()),
        (7, 2000, global_start(3, 100)),
        (0, 0, global_start(1)),
        (90, 28000, global_start(9, 400)),
    ]
    parts = [Part(likely_codes(TABLES, 1, frames, frames), samples, start) for frames, samples, start in lengths]
    return {
        "plain": (written(HEADER, *plain, frames_per_block=4), HEADER, plain, None),
        "segments": (written(CODED_HEADER, *parts, tables=TABLES, frames_per_block=2), CODED_HEADER, parts, TABLES),
    }


LONG_FILES = long_files()


def without_index(data: bytes, header: Header) -> bytes:
    blocks = blocks_of(data, header)
    assert [kind for kind, _, _ in blocks[-2:]] == [INDEX, END]
    parts = blocks_of(data, header)
    num_samples, num_frames = opened(data).num_samples, opened(data).num_frames
    return chained(data[: parts[-2][2]], end_block(num_samples, num_frames))


@pytest.mark.parametrize("name", LONG_FILES)
def test_seeking_with_and_without_index_gives_the_same(name: str) -> None:
    data, header, parts, tables = LONG_FILES[name]
    codes = np.concatenate([part.codes for part in parts], axis=2)
    num_frames, rng = codes.shape[2], np.random.default_rng(0)
    readers = [opened(data, tables), opened(without_index(data, header), tables)]
    places = [(0, num_frames), (0, 0), (num_frames, 0), (num_frames - 1, 1), (32, 1)]
    places += [(first, int(rng.integers(0, num_frames - first + 1))) for first in range(num_frames)]
    for reader in readers:
        for first, count in places:
            np.testing.assert_array_equal(reader.read(first, count), codes[:, :, first : first + count])
        for first, count in ((-1, 2), (0, num_frames + 1), (num_frames + 1, 0), (5, -1)):
            with pytest.raises(BitstreamError, match=f"are not in a file of {num_frames}"):
                reader.read(first, count)
    expected, first_frame, first_sample = [], 0, 0
    for part in parts:
        expected.append((part, first_frame, first_sample))
        first_frame, first_sample = first_frame + part.num_frames, first_sample + part.num_samples
    for reader in readers:
        for segment, (part, frame, sample) in zip(reader.segments, expected, strict=True):
            assert_same_parts([Part(part.codes, segment.num_samples, segment.start)], [part])
            numbers = (segment.first_frame, segment.num_frames, segment.first_sample)
            assert numbers == (frame, part.num_frames, sample)


def test_seeking_reads_little() -> None:
    data = written(HEADER, Part(random_codes(HEADER, 6400), 6400 * 160), frames_per_block=4)

    class Counting(io.BytesIO):
        num_read = 0

        def read(self, size: int | None = -1) -> bytes:
            taken = super().read(size)
            self.num_read += len(taken)
            return taken

    source = Counting(data)
    reader = Reader(source)
    assert reader.num_samples == 6400 * 160
    reader.read(3000, 1)
    assert source.num_read < len(data) / 10


@pytest.mark.parametrize("entry", range(6))
@pytest.mark.parametrize("change", [1, 7, 2**40])
def test_a_wrong_index_with_a_right_checksum_is_refused(entry: int, change: int) -> None:
    data, header, _, _ = LONG_FILES["plain"]
    kind, payload, at = blocks_of(data, header)[-2]
    assert kind == INDEX
    numbers = [0, 0, 1]
    size = len(block(PACKED, leb128(4) + bytes(3)))
    numbers += [32 * size, 128, 0] * 2
    assert leb128(*numbers) == payload
    numbers[entry] += change
    index = block(INDEX, leb128(*numbers))
    forged = chained(data[:at], index, end_block(300 * 160 - 5, 300, len(index)))
    assert refusal(forged) == "INDEX does not fit the blocks before it"
    with contextlib.suppress(BitstreamError):
        assert opened(forged).num_frames == 300


def test_bytes_lost_before_the_index_are_noticed_by_seeking() -> None:
    data, header, _, _ = LONG_FILES["plain"]
    first, second = (at for _, _, at in blocks_of(data, header)[:2])
    for damaged in (data[:first] + data[second:], data[:second] + data[first:]):  # a block less, a block twice
        with pytest.raises(BitstreamError):
            opened(damaged).read(200, 1)


def test_interleaved_passes_do_not_disturb_each_other(small_file: tuple[bytes, EntropyTables | None]) -> None:
    data, tables = small_file
    true, _ = read_until_it_ends(opened(data, tables))
    reader = opened(data, tables)
    num_frames = opened(data).num_frames
    codes = opened(data, tables).read()
    found: list[Any] = []
    for one, other in zip(reader.events(), reader.events(), strict=True):
        assert type(one) is type(other)
        found += [one.tolist()] if isinstance(one, np.ndarray) else []
        np.testing.assert_array_equal(
            reader.read(num_frames // 2, 3), codes[:, :, num_frames // 2 : num_frames // 2 + 3]
        )
    assert found == [event for event in true if isinstance(event, list)]
    assert reader.num_frames == num_frames


def test_a_segment_tells_where_it_lies() -> None:
    data, _, parts, _ = LONG_FILES["plain"]
    (segment,) = opened(data).segments
    assert segment == Segment(segment.start, 0, 300, 0, parts[0].num_samples)
    assert (segment.start.skip_samples, segment.start.global_codes, BLOCKS_PER_INDEX_ENTRY) == (0, None, 32)


# Streams


def test_blocks_arrive_as_soon_as_they_are_written() -> None:
    codes = random_codes(HEADER, 170)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as source, os.fdopen(write_end, "wb") as target:
        writer = Writer(target, HEADER)
        reader = Reader(source)
        assert reader.header == HEADER
        assert not reader.is_seekable
        events = reader.events()
        writer.write(codes[:, :, :FRAMES_PER_BLOCK])
        assert isinstance(next(events), SegmentStart)
        np.testing.assert_array_equal(next(events), codes[:, :, :FRAMES_PER_BLOCK])
        writer.write(codes[:, :, FRAMES_PER_BLOCK:])
        writer.next_segment(170 * 160, SegmentStart())
        np.testing.assert_array_equal(next(events), codes[:, :, FRAMES_PER_BLOCK:])
        assert next(events) == SegmentEnd(170 * 160)
        writer.finish(0)
        target.close()
        assert [type(event) for event in events] == [SegmentStart, SegmentEnd]
        assert reader.num_bytes == len(written(HEADER, Part(codes, 170 * 160), Part(codes[:, :, :0], 0)))
        for use in (lambda: reader.num_samples, lambda: reader.segments, lambda: reader.read(0, 1)):
            with pytest.raises(BitstreamError, match="a pipe cannot be searched"):
                use()
        with pytest.raises(BitstreamError, match="a pipe can be read only once"):
            next(reader.events())
        reader.close()
        assert not source.closed  # whoever opened a stream closes it
        writer.__exit__(None, None, None)


class OneByteAtATime(io.RawIOBase):
    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        byte = self._data.read(1)
        buffer[: len(byte)] = byte
        return len(byte)


def test_a_source_may_give_fewer_bytes_than_asked_for(small_file: tuple[bytes, EntropyTables | None]) -> None:
    data, tables = small_file
    source: BinaryIO = OneByteAtATime(data)  # type: ignore[assignment]
    assert read_until_it_ends(Reader(source, tables=tables)) == read_until_it_ends(opened(data, tables))


def test_a_container_may_stand_behind_other_bytes(small_file: tuple[bytes, EntropyTables | None]) -> None:
    data, tables = small_file
    source = io.BytesIO(b"before" * 10 + data)
    source.seek(60)
    reader = Reader(source, tables=tables)
    np.testing.assert_array_equal(reader.read(), opened(data, tables).read())
    assert reader.num_samples == opened(data).num_samples
    reader.close()
    assert not source.closed


def test_a_path_holds_the_bytes_of_a_stream_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    codes = random_codes(HEADER, 180)
    path = tmp_path / "with space ü.codec"
    path.write_bytes(b"what was there before")
    with Writer(path, HEADER) as writer:
        writer.write(codes)
        assert path.read_bytes() == b"what was there before"
        writer.finish(180 * 160)
    assert path.read_bytes() == written(HEADER, Part(codes, 180 * 160))
    assert list(tmp_path.iterdir()) == [path]
    with Reader(str(path)) as reader:
        np.testing.assert_array_equal(reader.read(), codes)
    with pytest.raises(ValueError, match="closed file"):
        reader.read()


# What a Writer refuses


@pytest.mark.parametrize("already_there", [False, True])
@pytest.mark.parametrize(
    "failure", [None, RuntimeError, KeyboardInterrupt, "codes", "count", "header", "start", "next"]
)
def test_a_writer_that_does_not_finish_leaves_nothing(
    failure: str | type[BaseException] | None, already_there: bool, tmp_path: Path
) -> None:
    path = tmp_path / "file.codec"
    if already_there:
        path.write_bytes(b"before")
    header = replace(HEADER, model="x" * 256) if failure == "header" else HEADER
    start = SegmentStart(-1) if failure == "start" else None
    expected = BitstreamError if isinstance(failure, str) else failure
    with (
        pytest.raises(expected) if expected else contextlib.nullcontext(),
        Writer(path, header, start=start) as writer,
    ):
        writer.write(random_codes(HEADER, 160))
        if failure == "codes":
            writer.write(np.full((1, 2, 60), 99))
        elif failure == "count":
            writer.finish(5)
        elif failure == "next":
            writer.next_segment(5, SegmentStart())
        elif expected:
            raise expected
    assert [f.name for f in tmp_path.iterdir()] == ["file.codec"] * already_there
    assert not already_there or path.read_bytes() == b"before"


@pytest.mark.parametrize("num_frames", [7000, 200_000], ids=["found_when_closing", "found_when_writing"])
def test_a_full_disk_leaves_nothing(num_frames: int, tmp_path: Path, full_disk: FullDisk) -> None:
    codes = random_codes(HEADER, num_frames)
    with full_disk(), pytest.raises(OSError, match="too large") as caught, Writer(tmp_path / "a", HEADER) as writer:  # noqa: PT012
        writer.write(codes)
        writer.finish(num_frames * 160)
    assert caught.value.filename == str(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_samples", [-1, -200, 0, 320, 481, 2**64])
def test_finish_refuses_a_wrong_number_of_samples(num_samples: int) -> None:
    target = io.BytesIO()
    with Writer(target, HEADER) as writer, pytest.raises(BitstreamError, match=f"^{num_samples} samples"):  # noqa: PT012
        writer.write(random_codes(HEADER, 3))
        writer.finish(num_samples)
    assert "ends inside" in refusal(target.getvalue())


@pytest.mark.parametrize(
    ("num_samples", "is_good"), [(800, True), (801, False), (640, True), (481, True), (480, False)]
)
def test_frames_may_be_more_by_the_context_after(num_samples: int, is_good: bool) -> None:
    header = replace(HEADER, num_frames_after=1)
    codes = random_codes(header, 5)
    data = chained(header.to_bytes(), block(PACKED, leb128(5) + packed(codes, (2, 3))), end_block(num_samples, 5))
    if is_good:
        assert written(header, Part(codes, num_samples)) == data
        assert opened(data).num_samples == num_samples
        return
    with pytest.raises(BitstreamError, match="but 5 came"):
        written(header, Part(codes, num_samples))
    assert "but 5 came" in refusal(data)


@pytest.mark.parametrize(
    ("codes", "size", "message"),
    [
        (np.zeros((2, 3), int), 9, r"global codes must be \[1, L\], got \[2, 3\]"),
        (np.zeros((1, 0), int), 9, r"got \[1, 0\]"),
        (np.zeros(3, int), 9, r"got \[3\]"),
        (np.zeros((1, 3)), 9, "must be integers, got float64"),
        (np.array([[9]]), 9, "outside a codebook of 9"),
        (np.array([[-1]]), 9, "outside a codebook of 9"),
        (np.array([[0]]), 1, "outside a codebook of 1"),
        (np.array([[0]]), 2**24 + 1, "outside a codebook"),
        (np.zeros((1, 2**20), int), 300, "a block of 1179653 bytes is more than the 1048576 allowed"),
    ],
)
def test_global_codes_that_cannot_be_are_refused(codes: np.ndarray, size: int, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        Writer(io.BytesIO(), HEADER, start=SegmentStart(0, codes, size))


def test_writers_refuse_tables_that_the_header_does_not_name() -> None:
    for header, tables in ((HEADER, TABLES), (CODED_HEADER, None), (CODED_HEADER, some_tables((5, 8, 16), 1))):
        with pytest.raises(BitstreamError, match="the header names entropy tables"):
            Writer(io.BytesIO(), header, tables=tables)
    with pytest.raises(BitstreamError, match="do not fit"):
        Writer(io.BytesIO(), replace(CODED_HEADER, codebook_sizes=(5, 9)), tables=TABLES)
    fewer_rows = replace(CODED_HEADER, codebook_sizes=(5, 8))
    codes = likely_codes(TABLES, 1, 50)[:, :2]
    data = written(fewer_rows, Part(codes, 16000), tables=TABLES)
    assert [kind for kind, _, _ in blocks_of(data, fewer_rows)] == [CODED, END]
    np.testing.assert_array_equal(opened(data, TABLES).read(), codes)


@pytest.mark.parametrize("frames_per_block", [0, -1])
def test_blocks_of_no_frames_are_refused(frames_per_block: int) -> None:
    with pytest.raises(BitstreamError, match=f"frames_per_block={frames_per_block} must be positive"):
        Writer(io.BytesIO(), HEADER, frames_per_block=frames_per_block)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64])
def test_codes_of_all_integer_types_are_written(dtype: type) -> None:
    codes = random_codes(HEADER, 20)
    start = global_start(3)
    small = SegmentStart(0, (start.global_codes % 200).astype(dtype), 300)  # type: ignore[operator]
    data = written(HEADER, Part(codes.astype(dtype), 3200, small))
    assert_same_parts(parts_of(opened(data)), [Part(codes, 3200, small)])
