"""Cutting and joining containers without decoding them."""

import io
import itertools
from dataclasses import replace
from fractions import Fraction
from math import ceil, gcd
from typing import Any

import numpy as np
import pytest
from containers import (
    CODED_HEADER,
    HEADER,
    TABLES,
    Part,
    assert_same_parts,
    chained,
    end_block,
    global_start,
    header_bytes,
    likely_codes,
    opened,
    parts_of,
    random_codes,
    written,
)

from codec.bitstream import BitstreamError, Header, SegmentEnd, SegmentStart, Writer
from codec.entropy import EntropyTables
from codec.token_format import copy_events, join_events


def cut(data: bytes, tables: EntropyTables | None, first: int, count: int | None) -> bytes:
    target = io.BytesIO()
    reader = opened(data, tables)
    copy_events(target, reader, reader.events(first, count))
    return target.getvalue()


def join(*files: bytes, tables: EntropyTables | None = None) -> bytes:
    target = io.BytesIO()
    readers = [opened(data, tables) for data in files]
    copy_events(target, readers[0], join_events((reader.header, reader.events()) for reader in readers))
    return target.getvalue()


def promised(header: Header, part: Part, first: int, last: int) -> Part:
    """What a cut of samples first to last of a segment has to hold, sample by sample as the docstrings tell."""
    first, last = first + part.start.skip_samples, last + part.start.skip_samples
    hop, rate_hz, codec_rate_hz = header.hop_length, header.rate_hz, header.codec_rate_hz
    num_frames = ceil(Fraction(ceil(Fraction(last * codec_rate_hz, rate_hz)), hop))
    begin = max(0, first * codec_rate_hz // (rate_hz * hop) - header.num_frames_before)
    while begin * hop * rate_hz % codec_rate_hz:  # no sample begins where this frame begins
        begin -= 1
    skip = first - begin * hop * rate_hz // codec_rate_hz
    end = min(num_frames + header.num_frames_after, part.num_frames)
    return Part(part.codes[:, :, begin:end], last - first, replace(part.start, skip_samples=skip))


@pytest.mark.parametrize("rate_hz", [16000, 8000, 11025, 8001, 44100, 48000])
@pytest.mark.parametrize("context", [(0, 0), (3, 1), (70, 2)])
def test_a_cut_holds_the_frames_that_its_samples_need(rate_hz: int, context: tuple[int, int]) -> None:
    header = replace(HEADER, rate_hz=rate_hz, num_frames_before=context[0], num_frames_after=context[1])
    num_samples = header.num_samples_in(120) - 5
    part = Part(random_codes(header, 120 + context[1]), num_samples)
    data = written(header, part, frames_per_block=3)
    period = 16000 // gcd(16000, 320 * rate_hz)
    assert period == {11025: 2, 8001: 50}.get(rate_hz, 1)
    rng = np.random.default_rng(rate_hz)
    edges = {0, 1, num_samples - 1, *(header.num_samples_in(f) + d for f in (1, 50, 51, 100) for d in (-1, 0, 1))}
    for first in sorted(edges | set(rng.integers(0, num_samples, 25).tolist())):
        for count in {1, num_samples - first, int(rng.integers(1, num_samples - first + 1))}:
            piece = cut(data, None, first, count)
            expected = promised(header, part, first, first + count)
            assert expected.start.skip_samples <= header.num_samples_in(context[0] + period + 1)
            assert_same_parts(parts_of(opened(piece)), [expected])
            assert piece == written(header, expected)
            assert opened(piece).num_samples == count


def test_every_cut_of_a_small_file() -> None:
    header = replace(HEADER, codec_rate_hz=8, rate_hz=7, hop_length=2, num_frames_before=2, num_frames_after=1)
    lengths = [
        (7, 10, global_start(2)),
        (0, 0, SegmentStart()),
        (12, 15, global_start(3, 5, seed=1)),
        (6, 9, SegmentStart(1)),
    ]
    parts = [Part(random_codes(header, frames, frames), samples, start) for frames, samples, start in lengths]
    data = written(header, *parts, frames_per_block=2)
    for first in range(34):
        for last in range(first + 1, 35):
            expected, begin = [], 0
            for part in parts:
                inside = max(first - begin, 0), min(last - begin, part.num_samples)
                begin += part.num_samples
                if inside[0] < inside[1]:
                    expected.append(promised(header, part, *inside))
            piece = cut(data, None, first, last - first)
            assert_same_parts(parts_of(opened(piece)), expected)
            if last == 34:
                assert cut(data, None, first, None) == (piece if first else written(header, *parts))
    for first, count in ((0, 35), (34, 1), (34, 0), (3, 0), (-1, 2), (5, -1)):
        with pytest.raises(
            BitstreamError, match=f"samples {first} to {first + count} are not a stretch of a file of 34"
        ):
            cut(data, None, first, count)


@pytest.mark.parametrize("rate_hz", [16000, 11025])
def test_cuts_of_cuts_and_joined_pieces_hold_the_same_samples(rate_hz: int) -> None:
    header = replace(CODED_HEADER, rate_hz=rate_hz)
    num_samples = header.num_samples_in(60)
    part = Part(likely_codes(TABLES, 1, 61), num_samples, global_start(5))
    data = written(header, part, tables=TABLES, frames_per_block=10)
    edges = [0, 1, 777, num_samples // 2, num_samples - 1, num_samples]
    pieces = [cut(data, TABLES, a, b - a) for a, b in itertools.pairwise(edges)]
    joined = join(*pieces, tables=TABLES)
    expected = [promised(header, part, a, b) for a, b in itertools.pairwise(edges)]
    reader = opened(joined, TABLES)
    assert_same_parts(parts_of(reader), expected)
    assert reader.num_samples == num_samples
    assert [segment.num_samples for segment in reader.segments] == np.diff(edges).tolist()
    # A cut of a cut is the cut of the whole, but for context that the first cut no longer has.
    again = parts_of(opened(cut(pieces[3], TABLES, 5, 200), TABLES))
    assert_same_parts(again, [promised(header, expected[3], 5, 205)])
    # Across the segments of a joined file.
    across = parts_of(opened(cut(joined, TABLES, 700, num_samples // 2), TABLES))
    lengths = [p.num_samples for p in across]
    assert lengths == [77, num_samples // 2 - 777, 700]
    assert all(np.array_equal(p.start.global_codes, part.start.global_codes) for p in across)  # type: ignore[arg-type]


@pytest.mark.parametrize("tables", [None, TABLES])
def test_joining_with_an_empty_file_changes_nothing_else(tables: EntropyTables | None) -> None:
    header = replace(CODED_HEADER, entropy_id=tables and tables.id)
    long = Part(likely_codes(TABLES, 1, 50), 15000, SegmentStart(900))
    empty = written(header, Part(random_codes(header, 0), 0), tables=tables)
    file = written(header, long, tables=tables, frames_per_block=1)
    for files, order in (((empty, file), [0, 1]), ((empty, empty, file), [0, 0, 1]), ((file, empty, file), [1, 0, 1])):
        target = io.BytesIO()
        readers = [opened(data, tables) for data in files]
        events = list(join_events((reader.header, reader.events()) for reader in readers))
        assert isinstance(events[0], SegmentStart)
        with Writer(target, header, tables=tables, start=events[0], frames_per_block=1) as writer:
            writer.write_events(events)
        reader = opened(target.getvalue(), tables)
        assert_same_parts(parts_of(reader), [long if i else Part(random_codes(header, 0), 0) for i in order])
        assert reader.has_index
        assert reader.num_samples == 15000 * sum(order)


def test_packed_and_coded_files_can_be_joined() -> None:
    part = Part(likely_codes(TABLES, 1, 50), 15800)
    coded = written(CODED_HEADER, part, tables=TABLES)
    plain = written(replace(CODED_HEADER, entropy_id=None), part)
    assert len(coded) < len(plain)
    assert join(coded, plain, tables=TABLES) == written(CODED_HEADER, part, part, tables=TABLES)
    assert join(plain, coded, tables=TABLES) == written(replace(CODED_HEADER, entropy_id=None), part, part)
    assert join(plain) == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codec_id", "0" * 16),
        ("model", "n@1"),
        ("codec_rate_hz", 8000),
        ("rate_hz", 8001),
        ("num_channels", 2),
        ("hop_length", 319),
        ("codebook_sizes", (4,)),
        ("num_frames_before", 1),
        ("num_frames_after", 1),
    ],
)
def test_files_that_differ_are_not_joined(field: str, value: Any) -> None:
    header = replace(HEADER, **{field: value})
    one, other = (written(h, Part(random_codes(h, 0), 0)) for h in (HEADER, header))
    with pytest.raises(BitstreamError) as caught:
        join(one, one, other)
    assert str(caught.value) == f"files with {field} {getattr(HEADER, field)} and {value} cannot be joined"


def test_nothing_cannot_be_copied() -> None:
    for events in ([], [SegmentEnd(0)]):
        with pytest.raises(BitstreamError, match="there is nothing to write"):
            copy_events(io.BytesIO(), opened(chained(header_bytes(), end_block(0, 0))), events)
