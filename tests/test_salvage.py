"""Of damaged containers everything good is read, in its place; what is lost is told, and what cannot be is refused."""

import io
import itertools
from pathlib import Path

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
    leb128,
    likely_codes,
    opened,
    parts_of,
    random_codes,
    written,
)

from codec.bitstream import SegmentStart
from codec.entropy import EntropyTables
from codec.header import BitstreamError, TruncatedError
from codec.salvage import SalvagingReader

CODES = random_codes(HEADER, 17)
PLAIN = written(HEADER, Part(CODES, 17 * 160 - 5), frames_per_block=4)  # 4, 4, 4, 4, 1 frames
CODED_CODES = likely_codes(TABLES, 1, 287)
RANGE_CODED = written(CODED_HEADER, Part(CODED_CODES, 287 * 320 - 320), tables=TABLES, frames_per_block=50)


def salvaged(data: bytes, tables: EntropyTables | None = None) -> SalvagingReader:
    return SalvagingReader(io.BytesIO(data), tables=tables)


def damaged(data: bytes, *places: int, bit: int = 0) -> bytes:
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 1 << bit
    return bytes(changed)


def places_of(data: bytes, kind: int, header: object = HEADER) -> list[int]:
    """Where blocks of this kind begin."""
    return [at for found, _, at in blocks_of(data, header) if found == kind]  # type: ignore[arg-type]


def lost_frames(codes: np.ndarray) -> list[int]:
    is_lost = codes[0] < 0
    assert bool((is_lost.all(axis=0) == is_lost.any(axis=0)).all())
    return [int(f) for f in np.flatnonzero(is_lost[0])]


def check(reader: SalvagingReader, codes: np.ndarray, num_samples: int, lost: list[int]) -> None:
    """All ways of reading say that just these frames are lost, and give the rest."""
    (part,) = parts_of(reader)
    assert part.num_samples == reader.num_samples == num_samples
    assert part.codes.shape == codes.shape
    assert lost_frames(part.codes) == lost
    kept = part.codes >= 0
    assert np.array_equal(part.codes[kept], codes[kept])
    assert np.array_equal(reader.read(), part.codes)
    for first, last in itertools.combinations(range(0, codes.shape[2], 3), 2):
        assert np.array_equal(reader.read(first, last - first), part.codes[:, :, first:last])
    places = [s for first, count in reader.lost for s in range(first, first + count)]
    assert places == [s for s in range(num_samples) if s * codes.shape[2] // (codes.shape[2] * 160) in lost]
    assert not reader.is_truncated


@pytest.mark.parametrize("number", range(5))
def test_a_damaged_block_is_lost_and_no_other(number: int) -> None:
    begin = places_of(PLAIN, PACKED)[number]
    lost = list(range(4 * number, min(4 * number + 4, 17)))
    size = dict(itertools.pairwise([*places_of(PLAIN, PACKED), *places_of(PLAIN, END)]))
    for place in range(begin, size[begin] - 4):
        for bit in range(8):
            check(salvaged(damaged(PLAIN, place, bit=bit)), CODES, 17 * 160 - 5, lost)


def test_a_damaged_checksum_costs_nothing() -> None:
    for begin in [*places_of(PLAIN, PACKED)[1:], *places_of(PLAIN, END)]:
        for place in range(begin - 4, begin):
            check(salvaged(damaged(PLAIN, place)), CODES, 17 * 160 - 5, [])


def test_blocks_may_be_damaged_missing_longer_and_shorter() -> None:
    first, second, third, fourth, last = places_of(PLAIN, PACKED)
    check(salvaged(damaged(PLAIN, second + 3, fourth + 3)), CODES, 17 * 160 - 5, [*range(4, 8), *range(12, 16)])
    check(salvaged(damaged(PLAIN, second + 3, third + 3)), CODES, 17 * 160 - 5, list(range(4, 12)))
    # Of a missing block the next one does not know the checksum, and is lost with it.
    check(salvaged(PLAIN[:second] + PLAIN[third:]), CODES, 17 * 160 - 5, list(range(4, 12)))
    check(salvaged(PLAIN[: second + 3] + b"more" + PLAIN[second + 3 :]), CODES, 17 * 160 - 5, list(range(4, 8)))
    check(salvaged(PLAIN[: second + 3] + PLAIN[second + 4 :]), CODES, 17 * 160 - 5, list(range(4, 8)))
    check(salvaged(PLAIN[:first] + bytes(last - first) + PLAIN[last:]), CODES, 17 * 160 - 5, list(range(17)))


def test_coded_blocks_and_how_many_frames_they_say_that_they_have() -> None:
    places = places_of(RANGE_CODED, CODED, CODED_HEADER)
    assert len(places) == 6
    num_samples = 287 * 320 - 320

    def found(*damage: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        reader = salvaged(damaged(RANGE_CODED, *damage), TABLES)
        assert reader.num_samples == num_samples
        codes = reader.read()
        kept = codes >= 0
        assert np.array_equal(codes[kept], CODED_CODES[kept])
        return codes, reader.lost

    codes, lost = found(places[2] + 10)
    assert lost_frames(codes) == list(range(100, 150))
    assert lost == [(100 * 320, 50 * 320)]
    codes, lost = found(places[1] + 2, places[4] + 9)  # the number of frames itself, which then is 51
    assert lost_frames(codes) == [*range(50, 100), *range(200, 250)]
    codes, lost = found(places[1], places[4])  # the sizes: what lies between good blocks is shared out
    assert lost_frames(codes) == [*range(50, 100), *range(200, 250)]
    for place in (places[5], places[5] + 1):
        codes, lost = found(places[1] + 9, place)  # the last block, which is shorter
        assert lost_frames(codes) == [*range(50, 100), *range(250, 287)]


def test_parts_of_a_file_are_told_apart() -> None:
    parts = [
        Part(random_codes(HEADER, 6, 1), 900, global_start(3)),
        Part(random_codes(HEADER, 7, 2), 800, SegmentStart(skip_samples=200)),
        Part(random_codes(HEADER, 5, 3), 800),
    ]
    data = written(HEADER, *parts, frames_per_block=2)
    frames = places_of(data, PACKED)
    reader = salvaged(damaged(data, frames[4] + 3, frames[8] + 3))
    assert [lost_frames(part.codes) for part in parts_of(reader)] == [[], [2, 3], [2, 3]]
    assert [s.num_samples for s in reader.segments] == [900, 800, 800]
    assert [part.num_samples for part in parts_of(reader)] == [900, 800, 800]
    assert reader.lost == [(900 + 2 * 160 - 200, 320), (1700 + 320, 320)]
    stretch = parts_of(reader, reader.events(1000, 1100))
    assert [part.num_samples for part in stretch] == [700, 400]
    assert [lost_frames(part.codes) for part in stretch] == [[1, 2], [2]]
    for kind in (GLOBAL, SEGMENT):
        for place in places_of(data, kind):
            with pytest.raises(BitstreamError, match="more than frames is damaged"):
                list(salvaged(damaged(data, place + 2)).events())
    with pytest.raises(BitstreamError, match="more than frames is damaged"):
        list(salvaged(damaged(data, places_of(data, GLOBAL)[0] + 2, frames[0] + 3)).events())


def test_without_its_end_a_file_ends_with_the_last_good_block() -> None:
    end = places_of(PLAIN, END)[0]
    for data in (damaged(PLAIN, end + 1), damaged(PLAIN, end), PLAIN[: end + 3], PLAIN[:-1]):
        reader = salvaged(data)
        assert_same_parts(parts_of(reader), [Part(CODES, 17 * 160)])
        assert reader.is_truncated
        assert not reader.lost
    second, last = places_of(PLAIN, PACKED)[1], places_of(PLAIN, PACKED)[-1]
    reader = salvaged(damaged(PLAIN, second + 3)[: last + 2])
    (part,) = parts_of(reader)
    assert part.num_samples == 16 * 160
    assert lost_frames(part.codes) == [4, 5, 6, 7]
    assert reader.is_truncated
    for data in (PLAIN[: places_of(PLAIN, PACKED)[0] + 3], PLAIN[: len(HEADER.to_bytes())]):
        with pytest.raises(TruncatedError):
            list(salvaged(data).events())


def test_a_damaged_index_is_not_missed() -> None:
    codes = random_codes(HEADER, 40)
    data = written(HEADER, Part(codes, 40 * 160), frames_per_block=1)
    (place,) = places_of(data, INDEX)
    check(salvaged(damaged(data, place + 3)), codes, 40 * 160, [])
    check(salvaged(damaged(data, places_of(data, PACKED)[7] + 2, place + 3)), codes, 40 * 160, [7])


def test_files_without_damage_are_read_as_ever() -> None:
    for data, tables in ((PLAIN, None), (RANGE_CODED, TABLES)):
        assert_same_parts(parts_of(salvaged(data, tables)), parts_of(opened(data, tables)))
        assert salvaged(data, tables).lost == []
        for size in range(len(data) - 100, len(data), 7):
            try:
                expected = parts_of(opened(data[:size], tables, allow_truncated=True))
            except BitstreamError:
                continue
            reader = salvaged(data[:size], tables)
            assert_same_parts(parts_of(reader), expected)
            assert reader.is_truncated
    with pytest.raises(BitstreamError, match="bytes after END"):
        list(salvaged(PLAIN + b"x").events())
    with pytest.raises(BitstreamError, match="bytes after END"):
        list(salvaged(damaged(PLAIN, places_of(PLAIN, PACKED)[0] + 3) + b"x").events())


def test_an_end_that_claims_years_is_refused() -> None:
    frames = block(PACKED, leb128(4) + bytes(3))
    head = HEADER.to_bytes()
    broken = damaged(chained(head, frames, frames, end_block(160 * 10**12, 10**12)), len(head) + 3)
    with pytest.raises(BitstreamError, match="more than frames is damaged"):
        list(salvaged(broken).events())


def test_damage_longer_than_what_is_searched_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codec.salvage._SEARCH_BYTES", 1000)
    header, codes = HEADER, random_codes(HEADER, 40)
    data = written(header, Part(codes, 40 * 160), frames_per_block=10)
    second, third = places_of(data, PACKED)[1:3]
    noise = np.random.default_rng(0).bytes(4990)
    path = tmp_path / "noise.codec"
    path.write_bytes(data[: second + 1] + noise + data[third - 1 :])
    with SalvagingReader(path) as reader:
        # The checksum before the third block is gone as well.
        assert lost_frames(reader.read()) == list(range(10, 30))


def test_a_pipe_cannot_be_searched() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    with pytest.raises(BitstreamError, match="a pipe cannot be searched"):
        list(SalvagingReader(Pipe(PLAIN)).events())
