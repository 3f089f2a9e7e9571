"""Containers for tests: the byte table of `codec.bitstream` once more, written with nothing of it, and their makers."""

import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from codec.bitstream import FRAMES_PER_BLOCK, Event, Header, Reader, SegmentEnd, SegmentStart, Writer
from codec.entropy import EntropyTables
from tools.fuzz import draw_codes, random_tables, same_events

MAGIC = bytes.fromhex("89434f444543")
CODEC_ID = "0123456789abcdef"
END, PACKED, CODED, GLOBAL, SEGMENT, INDEX = range(6)

# 160 samples a frame at the original rate.
HEADER = Header(
    codec_id=CODEC_ID,
    model="m@1",
    codec_rate_hz=16000,
    rate_hz=8000,
    num_channels=1,
    hop_length=320,
    codebook_sizes=(4, 8),
)


headers = st.builds(
    Header,
    codec_id=st.binary(min_size=8, max_size=8).map(bytes.hex),
    model=st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), max_size=40),
    codec_rate_hz=st.sampled_from([8000, 16000, 24000, 44100]),
    rate_hz=st.integers(1, 1_000_000),
    num_channels=st.integers(1, 3),
    hop_length=st.integers(1, 500),
    codebook_sizes=st.lists(
        st.sampled_from([2, 3, 256, 257, 1000, 1024, 2**24]) | st.integers(2, 5000), min_size=1, max_size=5
    ).map(tuple),
    num_frames_before=st.integers(0, 1000),
    num_frames_after=st.integers(0, 2**31 - 1),
    entropy_id=st.none() | st.binary(min_size=4, max_size=4).map(bytes.hex),
)


def sealed(data: bytes, begun_with: int = 0) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data, begun_with))


def chained(head: bytes, *blocks: bytes) -> bytes:
    """A header and blocks, their checksums begun with the ones before. A checksum that was wrong stays wrong."""
    data = head
    rest = b"".join(blocks)
    while rest:
        size = _block_size(rest)
        if size > len(rest):
            return data + rest
        body, wrong = rest[: size - 4], _number(rest[size - 4 : size]) ^ zlib.crc32(rest[: size - 4])
        data += body + struct.pack("<I", zlib.crc32(body, _number(data[-4:])) ^ wrong)
        rest = rest[size:]
    return data


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _block_size(data: bytes) -> int:
    """From its first bytes: the size of a block with its checksum."""
    key = size = 0
    while size < len(data) and (not size or data[size - 1] >= 0x80):
        key |= (data[size] & 0x7F) << (7 * size)
        size += 1
    return size + key // 8 + 4


def leb128(*values: int) -> bytes:
    spelled = b""
    for value in values:
        digits = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
        spelled += bytes(digit | 0x80 for digit in digits[:-1]) + bytes(digits[-1:])
    return spelled


def block(block_type: int, payload: bytes) -> bytes:
    return sealed(leb128(8 * len(payload) + block_type) + payload)


def end_block(num_samples: int, num_frames: int, index_size: int = 0) -> bytes:
    numbers = leb128(num_samples, num_frames, index_size)
    return block(END, numbers + bytes([len(numbers) + 1]))


def header_bytes(
    *,
    version: int = 1,
    flags: int = 0,
    entropy_id: str = "",
    rates_hz: tuple[int, int] = (16000, 8000),
    num_channels: int = 1,
    hop_length: int = 320,
    context: tuple[int, int] = (0, 0),
    num_rows: int = 2,
    runs: tuple[tuple[int, int], ...] = ((1, 4), (1, 8)),
    name: bytes = b"m@1",
) -> bytes:
    data = MAGIC + bytes([version, flags]) + bytes.fromhex(CODEC_ID + entropy_id)
    data += leb128(*rates_hz, num_channels, hop_length, *context) + bytes([num_rows])
    data += b"".join(leb128(*run) for run in runs)
    return sealed(data + bytes([len(name)]) + name)


def packed(codes: np.ndarray, widths: tuple[int, ...]) -> bytes:
    """Codes [channels, K, F] bit by bit, as text."""
    bits = ""
    for frame in codes.transpose(2, 0, 1).tolist():
        for channel in frame:
            for code, width in zip(channel, widths, strict=True):
                bits += f"{code:0{width}b}"[::-1]
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))


def blocks_of(data: bytes, header: Header = HEADER) -> list[tuple[int, bytes, int]]:
    """Type, payload and offset of every block."""
    at, found = len(header.to_bytes()), []
    while at < len(data):
        key = shift = size = 0
        while not size or data[at + size - 1] >= 0x80:
            key |= (data[at + size] & 0x7F) << shift
            shift, size = shift + 7, size + 1
        after = at + size + key // 8
        found.append((key % 8, data[at + size : after], at))
        at = after + 4
    return found


@dataclass(frozen=True, eq=False)
class Part:
    """A segment."""

    codes: np.ndarray
    num_samples: int
    start: SegmentStart = field(default_factory=SegmentStart)

    @property
    def num_frames(self) -> int:
        return int(self.codes.shape[2])


def random_codes(header: Header, num_frames: int, seed: int = 0) -> np.ndarray:
    sizes = np.array(header.codebook_sizes)[None, :, None]
    return np.random.default_rng(seed).integers(0, sizes, (header.num_channels, len(header.codebook_sizes), num_frames))


def likely_codes(tables: EntropyTables, num_channels: int, num_frames: int, seed: int = 0) -> np.ndarray:
    return draw_codes(tables, np.random.default_rng(seed), num_channels, num_frames)


def some_tables(codebook_sizes: tuple[int, ...], seed: int = 0, *, power: float = 8.0) -> EntropyTables:
    return random_tables(np.random.default_rng(seed), codebook_sizes, power=power)


def written(
    header: Header,
    *parts: Part,
    tables: EntropyTables | None = None,
    frames_per_block: int = FRAMES_PER_BLOCK,
    cuts: tuple[int, ...] = (),
) -> bytes:
    """A container of these segments, each given to the Writer in pieces."""
    target = io.BytesIO()
    with Writer(target, header, tables=tables, start=parts[0].start, frames_per_block=frames_per_block) as writer:
        for before, part in zip([None, *parts], parts, strict=False):
            if before is not None:
                writer.next_segment(before.num_samples, part.start)
            for piece in np.split(part.codes, sorted(cuts), axis=2):
                writer.write(piece)
        writer.finish(parts[-1].num_samples)
    return target.getvalue()


TABLES = some_tables((5, 8, 16))
CODED_HEADER = replace(
    HEADER,
    rate_hz=16000,
    codebook_sizes=(5, 8, 16),
    num_frames_before=3,
    num_frames_after=1,
    entropy_id=TABLES.id,
)


def global_start(length: int, skip_samples: int = 0, *, num_channels: int = 1, seed: int = 0) -> SegmentStart:
    codes = np.random.default_rng(seed).integers(0, 300, (num_channels, length))
    return SegmentStart(skip_samples, codes, 300)


def opened(data: bytes, tables: EntropyTables | None = None, *, allow_truncated: bool = False) -> Reader:
    return Reader(io.BytesIO(data), tables=tables, allow_truncated=allow_truncated)


def parts_of(reader: Reader, events: Iterable[Event] | None = None) -> list[Part]:
    """The segments that events tell of, by default all of a file. The last one may lack its end: -1 samples."""
    parts: list[Part] = []
    for event in reader.events() if events is None else events:
        if isinstance(event, SegmentStart):
            parts.append(Part(random_codes(reader.header, 0), -1, event))
        elif isinstance(event, SegmentEnd):
            parts[-1] = replace(parts[-1], num_samples=event.num_samples)
        else:
            assert event.dtype == np.int64
            parts[-1] = replace(parts[-1], codes=np.concatenate([parts[-1].codes, event], axis=2))
    return parts


def assert_same_parts(found: list[Part], true: list[Part]) -> None:
    assert same_events(_events(found), _events(true)), f"{found} is not {true}"


def _events(parts: list[Part]) -> list[Event]:
    return [event for part in parts for event in (part.start, part.codes, SegmentEnd(part.num_samples))]
