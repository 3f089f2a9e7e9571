r"""The `.codec` container: a header, then blocks with checksums. Reading one takes neither a model nor torch.

Numbers written `v` are LEB128: 7 bits a byte, low bits first, the high bit set on all bytes but the last, no needless
bytes. Everything else is little endian.

Header

    6    magic: 89 43 4F 44 45 43 ("\x89CODEC"; no text begins like that)
    1    version (1)
    1    flags: 1 if blocks may be entropy-coded; all other bits are 0, and a reader refuses those it does not know
    8    codec id: the first 8 bytes of the SHA-256 that names the model's weights and configuration
    4    only with flag 1: entropy id, the first 4 bytes of the SHA-256 over the tables (`codec.entropy`)
    v    rate of the codec, Hz
    v    rate of the original, Hz
    v    channels of the original; each is a row of codes of its own
    v    hop: samples per frame at the codec's rate
    v    context before: frames that a decoder must have seen for its output to be what it is in mid-stream
    v    context after: frames past a sample's own that its decoder looks at
    1    K: rows of codes in every frame
    v v  as often as it takes to reach K rows: number of rows, and their codebook size
    1+n  the model's name: its length, then UTF-8, such as "speech_16k@1"
    4    CRC-32 of all bytes before

Block

    v    8 * size of the payload + type; payloads have at most 2^20 bytes
    n    payload
    4    CRC-32 of the bytes before in this block, begun with the checksum right before it, the header's or a block's:
         it fails where a block was lost, moved, or taken from another file

    0 END      v samples of the file at the original rate, v frames, v size of the INDEX block right before (0: none),
               1 size of this payload, so that END is found from the end of the file. Nothing may follow it
    1 PACKED   v number of frames, then their codes: frame by frame, in a frame channel by channel, coarsest row first,
               each code in ceil(log2(codebook size)) bits, low bit first, the last byte filled up with zeros
    2 CODED    v number of frames, then their codes, range-coded (`codec.entropy`), at most 2^17 of them, in fewer bytes
               than packed
    3 GLOBAL   v number, v codebook size, then codes of the whole segment, packed as above: channel by channel
    4 SEGMENT  v samples of the segment that ends here (0 before the first), v samples to skip in the one that begins
    5 INDEX    where to begin reading: any number of entries (v bytes on from the entry before, or from the end of the
               header; v frames on from it; v 0 within a segment, 1 + samples of the one before at a segment's start)
    6, 7       reserved for what a reader may skip

A file is one segment or several, each decoded on its own from a fresh state: that is what makes joined files sound as
they did alone. A segment without a SEGMENT block skips nothing. Of what a segment's frames decode to, the first
samples are skipped (they stand there so that the decoder knows the past: a cut file sounds as it did whole), then come
the samples that count; its frames are as many as skipped and counted samples take, and at most "context after" more.
GLOBAL comes before the segment's first frames. A file without END is truncated.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import BinaryIO

import numpy as np

from codec.entropy import EntropyError, EntropyTables
from codec.files import AtomicFile
from codec.header import (
    ENTROPY_CODED,
    MAGIC,
    MAX_CODEBOOK_SIZE,
    MAX_LEB128_BYTES,
    MAX_PAYLOAD_BYTES,
    VERSION,
    BitstreamError,
    Header,
    TruncatedError,
    check_codes,
    leb128,
    numbers,
    pack_bits,
    pack_codes,
    packed_bytes,
    split_number,
    unpack_bits,
    unpack_codes,
)

__all__ = ["BitstreamError", "Header", "Reader", "Segment", "SegmentEnd", "SegmentStart", "TruncatedError", "Writer"]

END, PACKED, CODED, GLOBAL, SEGMENT, INDEX = range(6)
# 2.5 s at 50 frames per second: what a damaged or missing block costs, against 7 bytes for each.
FRAMES_PER_BLOCK = 125
BLOCKS_PER_INDEX_ENTRY = 32
_MAX_FRAMES_PER_BLOCK = 1000
_MAX_CODED_CODES = 2**17  # a block takes 0.1 s: a few bytes can claim to hold any number
_READ_BYTES = 2**16


@dataclass(frozen=True, eq=False)
class SegmentStart:
    """A decoder begins anew. The first `skip_samples` samples (at the original rate) are not part of the recording."""

    skip_samples: int = 0
    global_codes: np.ndarray | None = None  # int64 [channels, L]
    global_codebook_size: int = 0

    @property
    def num_global_bits(self) -> int:
        """Bits of the global codes, packed."""
        return 0 if self.global_codes is None else self.global_codes.size * (self.global_codebook_size - 1).bit_length()


@dataclass(frozen=True)
class SegmentEnd:
    """The segment's frames are complete, and this many samples at the original rate count."""

    num_samples: int


# What a container is made of, in order: SegmentStart, codes int64 [channels, K, F] as often as needed, SegmentEnd.
Event = SegmentStart | np.ndarray | SegmentEnd


@dataclass(frozen=True)
class Segment:
    """Where a segment lies in its file; samples are at the original rate."""

    start: SegmentStart
    first_frame: int
    num_frames: int
    first_sample: int
    num_samples: int


class Writer:
    """Writes a container block by block: `write(codes)` as often as needed, then `finish(num_samples)`.

    To a path, the file appears whole at `finish` or not at all. To a binary stream, blocks leave as they fill up.
    A writer is finished once; leave its `with` block right after. With `tables`, blocks are entropy-coded where that
    makes them smaller; they must be the ones that the header names.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        header: Header,
        *,
        tables: EntropyTables | None = None,
        start: SegmentStart | None = None,
        frames_per_block: int = FRAMES_PER_BLOCK,
    ) -> None:
        if header.entropy_id != (tables and tables.id):
            raise BitstreamError(
                f"the header names entropy tables {header.entropy_id}, these are {tables and tables.id}"
            )
        if frames_per_block < 1:
            raise BitstreamError(f"frames_per_block={frames_per_block} must be positive")
        self.header = header
        self._tables = tables
        if tables is not None and tables.codebook_sizes[: len(header.codebook_sizes)] != header.codebook_sizes:
            raise BitstreamError(f"tables for codebooks of {tables.codebook_sizes} do not fit {header.codebook_sizes}")
        largest = min((MAX_PAYLOAD_BYTES - 2) // packed_bytes(1, header), _MAX_FRAMES_PER_BLOCK)  # 2: their number
        self._frames_per_block = max(1, min(frames_per_block, largest))
        self._pending = np.empty((header.num_channels, len(header.codebook_sizes), 0), np.int64)
        self._segment = start or SegmentStart()
        self._num_segment_frames = 0
        self._num_samples = 0  # of the segments that have ended
        self._index = _Index()
        self._name = os.fspath(target) if isinstance(target, str | os.PathLike) else "the output"
        self._atomic = AtomicFile(target) if isinstance(target, str | os.PathLike) else None
        self._file: BinaryIO = self._atomic.file if self._atomic is not None else target  # type: ignore[assignment]
        try:
            head = header.to_bytes()
            (self._checksum,) = struct.unpack("<I", head[-4:])
            self._put(head)
            self._begin(0, self._segment)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def write(self, codes: np.ndarray) -> None:
        """Append codes int64 [channels, K, F], F >= 0."""
        check_codes(codes, self.header)
        self._pending = np.concatenate([self._pending, codes.astype(np.int64, copy=False)], axis=2)
        while self._pending.shape[2] >= self._frames_per_block:
            self._write_frames(self._pending[:, :, : self._frames_per_block])
            self._pending = self._pending[:, :, self._frames_per_block :]

    def next_segment(self, num_samples: int, start: SegmentStart) -> None:
        """End a segment of `num_samples` samples at the original rate, and begin another."""
        self._end(num_samples)
        if not self._index.num_bytes:  # a SEGMENT that comes first would be taken for this segment's
            self._write_block(SEGMENT, leb128(0, 0))
        self._segment = start
        self._num_segment_frames = 0
        self._begin(num_samples, start)

    def finish(self, num_samples: int) -> None:
        """End the file; `num_samples` counts the last segment's samples, at the original rate."""
        self._end(num_samples)
        index_size = 0
        index = self._index.to_bytes()
        if self._index.num_blocks > BLOCKS_PER_INDEX_ENTRY and len(index) <= MAX_PAYLOAD_BYTES:
            index_size = self._write_block(INDEX, index)
        payload = leb128(self._num_samples, self._index.num_frames, index_size)
        self._write_block(END, payload + bytes([len(payload) + 1]))
        if self._atomic is not None:
            self._atomic.commit()
        else:
            self._file.flush()

    def write_events(self, events: Iterable[Event]) -> None:
        """Write what `Reader.events` gives, whole segments, and finish. The first SegmentStart is the constructor's."""
        ended: SegmentEnd | None = None
        for event in events:
            if isinstance(event, SegmentStart):
                if ended is not None:
                    self.next_segment(ended.num_samples, event)
            elif isinstance(event, SegmentEnd):
                ended = event
            else:
                self.write(event)
        self.finish(ended.num_samples if ended is not None else 0)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._atomic is not None:
            self._atomic.discard()

    def _begin(self, num_samples_before: int, start: SegmentStart) -> None:
        if start.skip_samples < 0:
            raise BitstreamError(f"{start.skip_samples} samples cannot be skipped")
        self._index.begin_segment(num_samples_before)
        if len(self._index.entries) > 1 or start.skip_samples:
            self._write_block(SEGMENT, leb128(num_samples_before, start.skip_samples))
        if start.global_codes is not None:
            codes, size = start.global_codes, start.global_codebook_size
            if codes.ndim != 2 or codes.shape[0] != self.header.num_channels or not codes.shape[1]:
                raise BitstreamError(f"global codes must be [{self.header.num_channels}, L], got {list(codes.shape)}")
            if codes.dtype.kind not in "iu":
                raise BitstreamError(f"global codes must be integers, got {codes.dtype}")
            if not 2 <= size <= MAX_CODEBOOK_SIZE or codes.min() < 0 or codes.max() >= size:
                raise BitstreamError(f"global codes are outside a codebook of {size}")
            packed = pack_bits(codes.reshape(-1, 1), [(size - 1).bit_length()])
            self._write_block(GLOBAL, leb128(codes.shape[1], size) + packed)

    def _end(self, num_samples: int) -> None:
        if self._pending.shape[2]:
            self._write_frames(self._pending)
            self._pending = self._pending[:, :, :0]
        _check_segment(self.header, self._segment.skip_samples, num_samples, self._num_segment_frames)
        self._num_samples += num_samples

    def _write_frames(self, codes: np.ndarray) -> None:
        num_frames = codes.shape[2]
        self._index.add_block(num_frames)
        kind, data = PACKED, pack_codes(codes, self.header)
        if self._tables is not None and codes.size <= _MAX_CODED_CODES:
            coded = self._tables.encode(codes)
            if len(coded) < len(data):
                kind, data = CODED, coded
        self._write_block(kind, leb128(num_frames) + data)
        self._num_segment_frames += num_frames

    def _write_block(self, block_type: int, payload: bytes) -> int:
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise BitstreamError(f"a block of {len(payload)} bytes is more than the {MAX_PAYLOAD_BYTES} allowed")
        body = leb128(8 * len(payload) + block_type) + payload
        self._checksum = zlib.crc32(body, self._checksum)
        self._put(body + struct.pack("<I", self._checksum))
        self._index.num_bytes += len(body) + 4
        return len(body) + 4

    def _put(self, data: bytes) -> None:
        try:
            self._file.write(data)
            if self._atomic is None:
                self._file.flush()
        except OSError as error:
            error.filename = error.filename or self._name  # a full disk, say
            raise


class Reader:
    """Reads a container block by block, in constant memory: `header` at once, then `blocks()` or `events()`.

    From a file that can seek, `num_samples`, `num_frames`, `segments` and `read` are there as well. `tables` are needed
    where blocks are entropy-coded. With `allow_truncated`, a file that ends too early ends with its last good block,
    and `is_truncated` says so; otherwise that is a TruncatedError, after the good blocks. Every other flaw is a
    BitstreamError.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | BinaryIO,
        *,
        tables: EntropyTables | None = None,
        allow_truncated: bool = False,
    ) -> None:
        self.tables = tables
        self.is_truncated = False
        # Of the blocks that went by in the latest pass over the file:
        self.num_blocks = 0  # with codes of frames
        self.num_code_bytes = 0  # in them, and in blocks of global codes
        self.num_bytes = 0  # of the file so far
        self.has_index = False
        self._allow_truncated = allow_truncated
        self._owned = isinstance(source, str | os.PathLike)
        self._file: BinaryIO = open(source, "rb") if isinstance(source, str | os.PathLike) else source  # noqa: SIM115
        self._position = 0  # bytes read, from the beginning of the container
        self._checksum = self._checksum_at = 0  # the last one that was read and right, and where it ends
        self._known_layout: tuple[_Index, tuple[Segment, ...]] | None = None
        try:
            self._base = self._file.tell() if self._file.seekable() else None
            self.header = self._read_header()
            self._first_block = self._position
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, if it was opened here."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_seekable(self) -> bool:
        """Whether this is a file, not a pipe."""
        return self._base is not None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The file's segments, in order. Needs a file that can seek."""
        return self._layout()[1]

    @property
    def num_samples(self) -> int:
        """Samples per channel at the original rate. Needs a file that can seek."""
        return self.segments[-1].first_sample + self.segments[-1].num_samples

    @property
    def num_frames(self) -> int:
        """Frames of all segments. Needs a file that can seek."""
        return self.segments[-1].first_frame + self.segments[-1].num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.blocks()

    def blocks(self) -> Iterator[np.ndarray]:
        """Codes int64 [channels, K, F], block by block, of all segments."""
        return (event for event in self.events() if isinstance(event, np.ndarray))

    def read(self, first_frame: int = 0, num_frames: int | None = None) -> np.ndarray:
        """The codes int64 [channels, K, F] of some frames, counted over all segments; by default of all."""
        last_frame = self.num_frames if num_frames is None else first_frame + num_frames
        if not 0 <= first_frame <= last_frame <= self.num_frames:
            raise BitstreamError(f"frames {first_frame} to {last_frame} are not in a file of {self.num_frames}")
        none = np.empty((self.header.num_channels, len(self.header.codebook_sizes), 0), np.int64)
        return np.concatenate([none, *self._frames(first_frame, last_frame)], axis=2)

    def events(self, first_sample: int = 0, num_samples: int | None = None, *, decode: bool = True) -> Iterator[Event]:
        """What the file is made of: for each segment its start, its codes block by block, and its end.

        With `first_sample` or `num_samples` (at the original rate) only that stretch, with as much before and behind
        it as a decoder needs to make the same samples of it as of the whole file. Without `decode`, all blocks are
        checked, but their codes are left out.
        """
        if first_sample == 0 and num_samples is None:
            return self._walk(_Index(), decode=decode)
        last_sample = self.num_samples if num_samples is None else first_sample + num_samples
        if not 0 <= first_sample < last_sample <= self.num_samples:
            raise BitstreamError(
                f"samples {first_sample} to {last_sample} are not a stretch of a file of {self.num_samples}"
            )
        return self._cut(first_sample, last_sample)

    def _cut(self, first_sample: int, last_sample: int) -> Iterator[Event]:
        header = self.header
        # A segment can begin only where frames begin at both rates, which is every so many frames.
        period = header.codec_rate_hz // math.gcd(header.codec_rate_hz, header.hop_length * header.rate_hz)
        for segment in self.segments:
            skipped = segment.start.skip_samples
            first = skipped + max(first_sample - segment.first_sample, 0)
            last = skipped + min(last_sample - segment.first_sample, segment.num_samples)
            if first >= last:
                continue
            first_frame = first * header.codec_rate_hz // (header.rate_hz * header.hop_length)
            first_frame = max(0, first_frame - header.num_frames_before) // period * period
            last_frame = min(header.num_frames_for(last) + header.num_frames_after, segment.num_frames)
            yield replace(segment.start, skip_samples=first - header.num_samples_in(first_frame))
            yield from self._frames(segment.first_frame + first_frame, segment.first_frame + last_frame)
            yield SegmentEnd(last - first)

    def _frames(self, first_frame: int, last_frame: int) -> Iterator[np.ndarray]:
        """The codes of frames from `first_frame` on, before `last_frame`, in pieces."""
        frame, offset = self._layout()[0].before(first_frame)
        offset += self._first_block
        while frame < last_frame:
            kind, payload, offset = self._read_block(offset)
            if kind in (PACKED, CODED):
                num_frames = split_number(payload)[0]
                if frame + num_frames > first_frame:
                    codes = self._decode_frames(kind, payload)
                    yield codes[:, :, max(0, first_frame - frame) : last_frame - frame]
                frame += num_frames

    def _layout(self) -> tuple[_Index, tuple[Segment, ...]]:
        """Where frames and segments lie: from the INDEX block, or else by reading through the file once."""
        if self._known_layout is None:
            if self._base is None:
                raise BitstreamError("a pipe cannot be searched; read its blocks in order")
            try:
                self._known_layout = self._stored_layout()
            except BitstreamError:
                self._known_layout = self._scanned_layout()
        return self._known_layout

    def _scanned_layout(self) -> tuple[_Index, tuple[Segment, ...]]:
        index, segments = _Index(), []
        start, first_frame, first_sample = SegmentStart(), 0, 0
        for event in self._walk(index, decode=False):
            if isinstance(event, SegmentStart):
                start = event
            elif isinstance(event, SegmentEnd):
                segments.append(
                    Segment(start, first_frame, index.num_frames - first_frame, first_sample, event.num_samples)
                )
                first_frame, first_sample = index.num_frames, first_sample + event.num_samples
        return index, tuple(segments)

    def _stored_layout(self) -> tuple[_Index, tuple[Segment, ...]]:
        """What END and INDEX say. BitstreamError where they say nothing, or nothing that fits."""
        num_bytes = self._position = self._file.seek(0, os.SEEK_END) - (self._base or 0)
        self._seek(num_bytes - 5)
        size = self._exactly(1, "END")[0]  # the payload's last byte, right before the checksum
        end = num_bytes - 4 - size - len(leb128(8 * size))
        if end < self._first_block:
            raise BitstreamError("there is no END")
        kind, payload, after = self._read_block(end)
        num_samples, num_frames, index_size = self._end_numbers(payload)
        index_at = end - index_size
        if kind != END or after != num_bytes or not self._first_block < index_at < end:
            raise BitstreamError("there is no INDEX")
        kind, payload, after = self._read_block(index_at)
        if kind != INDEX or after != end:
            raise BitstreamError("there is no INDEX")
        index = _Index.from_bytes(payload)
        frame, offset = index.entries[-1].first_frame, self._first_block + index.entries[-1].offset
        while offset < index_at:  # where bytes were lost or added before here, INDEX leads to other blocks
            kind, payload, offset = self._read_block(offset)
            frame += split_number(payload)[0] if kind in (PACKED, CODED) else 0
        if (frame, offset) != (num_frames, index_at):
            raise BitstreamError("INDEX leads to other blocks")
        starts = [entry for entry in index.entries if entry.num_samples_ended is not None]
        segments: list[Segment] = []
        first_sample = 0
        for entry, following in itertools.zip_longest(starts, starts[1:]):
            start, offset = SegmentStart(), self._first_block + entry.offset
            end_of_segment = self._first_block + following.offset if following else index_at
            kind = -1
            while offset < end_of_segment and kind not in (PACKED, CODED):
                kind, payload, offset = self._read_block(offset)
                if kind in (SEGMENT, GLOBAL):
                    start = self._segment_start(kind, payload, start)
            if offset > end_of_segment:
                raise BitstreamError("INDEX does not lead to blocks")
            last_frame = following.first_frame if following else num_frames
            num_ended = (following.num_samples_ended or 0) if following else num_samples - first_sample
            _check_segment(self.header, start.skip_samples, num_ended, last_frame - entry.first_frame)
            segments.append(Segment(start, entry.first_frame, last_frame - entry.first_frame, first_sample, num_ended))
            first_sample += num_ended
        return index, tuple(segments)

    def _walk(self, index: _Index, *, decode: bool = True) -> Iterator[Event]:
        """All blocks in order, checked; from a pipe as well. Without `decode`, codes are left out.

        `index` is filled on the way: it is what the file's own INDEX has to be.
        """
        offset = self._first_block
        start, is_open = SegmentStart(), False  # a segment is open, and its start given out, from its first frames on
        first_frame = num_samples = index_size = 0
        index.begin_segment(0)
        self.num_blocks, self.num_code_bytes, self.has_index = 0, 0, False
        kind = previous = -1
        while kind != END:
            previous = kind if kind <= INDEX else previous
            try:
                kind, payload, after = self._read_block(offset)
            except TruncatedError as error:
                if not self._allow_truncated or not index.num_frames:
                    raise TruncatedError(f"{error}, after {index.num_frames} good frames") from error
                self.is_truncated = True
                if is_open:
                    good = self.header.num_samples_in(index.num_frames - first_frame) - start.skip_samples
                    yield SegmentEnd(max(0, good))
                return
            if previous == INDEX and kind != END:
                raise BitstreamError("INDEX is not the last block before END")
            if kind in (PACKED, CODED):
                if not is_open:
                    yield start
                    is_open = True
                num_frames = self._num_frames_of(payload)
                if decode:
                    yield self._decode_frames(kind, payload)
                index.add_block(num_frames)
                self.num_blocks += 1
                self.num_code_bytes += len(payload) - len(leb128(num_frames))
            elif kind == GLOBAL or (kind == SEGMENT and previous == -1):
                if is_open or start.global_codes is not None:
                    raise BitstreamError("global codes stand in the wrong place")
                start = self._segment_start(kind, payload, start)
                self.num_code_bytes += -(-start.num_global_bits // 8)
                if kind == SEGMENT and numbers(payload, 2)[0]:
                    raise BitstreamError("the first SEGMENT ends a segment that is not there")
            elif kind in (SEGMENT, END):
                num_ended = numbers(payload, 2)[0] if kind == SEGMENT else self._end_numbers(payload)[0] - num_samples
                _check_segment(self.header, start.skip_samples, num_ended, index.num_frames - first_frame)
                if not is_open:
                    yield start
                yield SegmentEnd(num_ended)
                if kind == SEGMENT:
                    num_samples += num_ended
                    first_frame, is_open = index.num_frames, False
                    index.begin_segment(num_ended)
                    start = self._segment_start(kind, payload, SegmentStart())
            elif kind == INDEX:
                if payload != index.to_bytes():
                    raise BitstreamError("INDEX does not fit the blocks before it")
                index_size = after - offset
                self.has_index = True
            index.num_bytes += after - offset
            self.num_bytes = after
            offset = after
        if self._end_numbers(payload)[1:] != (index.num_frames, index_size):
            raise BitstreamError("END does not fit the blocks before it")
        self._seek(offset)  # another pass may have gone elsewhere
        if self._file.read(1):
            raise BitstreamError("there are bytes after END")

    def _segment_start(self, kind: int, payload: bytes, before: SegmentStart) -> SegmentStart:
        """The start of a segment after one more block that belongs to it."""
        if kind == SEGMENT:
            return replace(before, skip_samples=numbers(payload, 2)[1])
        num_codes, data = split_number(payload)
        size, data = split_number(data)
        if not 2 <= size <= MAX_CODEBOOK_SIZE or not num_codes:
            raise BitstreamError(f"a block claims {num_codes} global codes of {size}")
        bits = (size - 1).bit_length()
        codes = unpack_bits(data, self.header.num_channels * num_codes, [bits])[0]
        if (codes >= size).any():
            raise BitstreamError("a global code is outside its codebook")
        return replace(before, global_codes=codes.reshape(self.header.num_channels, -1), global_codebook_size=size)

    def _end_numbers(self, payload: bytes) -> tuple[int, int, int]:
        """Samples, frames, and size of the INDEX."""
        num_samples, num_frames, index_size, size = numbers(payload, 4)
        if size != len(payload):
            raise BitstreamError("the END block has the wrong size")
        return num_samples, num_frames, index_size

    def _num_frames_of(self, payload: bytes) -> int:
        num_frames, _ = split_number(payload)
        if not num_frames or packed_bytes(num_frames, self.header) > MAX_PAYLOAD_BYTES:
            raise BitstreamError(f"a block claims {num_frames} frames")
        return num_frames

    def _decode_frames(self, kind: int, payload: bytes) -> np.ndarray:
        num_frames, data = self._num_frames_of(payload), split_number(payload)[1]
        if kind == PACKED:
            return unpack_codes(data, num_frames, self.header)
        if self.header.entropy_id is None:
            raise BitstreamError("a block is entropy-coded, but the header names no tables")
        if self.tables is None or self.tables.id != self.header.entropy_id:
            raise BitstreamError(
                f"the codes are coded with tables {self.header.entropy_id} of {self.header.model}, which are not here"
            )
        num_codes = num_frames * self.header.num_channels * len(self.header.codebook_sizes)
        if num_codes > _MAX_CODED_CODES or len(data) >= packed_bytes(num_frames, self.header):
            raise BitstreamError(f"a coded block claims {num_frames} frames in {len(data)} bytes")
        try:
            codes = self.tables.decode(data, self.header.num_channels, len(self.header.codebook_sizes), num_frames)
        except EntropyError as error:
            raise BitstreamError(str(error)) from error
        check_codes(codes, self.header)
        return codes

    def _read_header(self) -> Header:
        what = "the header"
        taken = self._exactly(len(MAGIC), what)
        if taken != MAGIC:
            raise BitstreamError("not a .codec file")
        version, flags = fixed = self._exactly(2, what)
        codec_id = self._exactly(8, what)
        taken += fixed + codec_id
        if version != VERSION or flags & ~ENTROPY_CODED:
            raise BitstreamError(f"version {version} (flags {flags}) needs a newer version of this program")
        entropy_id = None
        if flags & ENTROPY_CODED:
            taken += (entropy := self._exactly(4, what))
            entropy_id = entropy.hex()

        def number() -> int:
            nonlocal taken
            value, spelling = self._read_leb128(what)
            taken += spelling
            return value

        fields = [number() for _ in range(6)]
        taken += (num_rows := self._exactly(1, what))
        sizes: list[int] = []
        while len(sizes) < num_rows[0]:
            run, size = number(), number()
            if not 1 <= run <= num_rows[0] - len(sizes):
                raise BitstreamError("the header's codebook sizes are more than its rows")
            sizes += [size] * run
        taken += (name_bytes := self._exactly(1, what))
        taken += (name := self._exactly(name_bytes[0], what))
        self._check(zlib.crc32(taken), what)
        try:
            model = name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BitstreamError("the model's name is not UTF-8") from error
        codec_rate_hz, rate_hz, num_channels, hop_length, num_frames_before, num_frames_after = fields
        header = Header(
            codec_id=codec_id.hex(),
            model=model,
            codec_rate_hz=codec_rate_hz,
            rate_hz=rate_hz,
            num_channels=num_channels,
            hop_length=hop_length,
            codebook_sizes=tuple(sizes),
            num_frames_before=num_frames_before,
            num_frames_after=num_frames_after,
            entropy_id=entropy_id,
        )
        if header.to_bytes()[:-4] != taken:
            raise BitstreamError("the header is written wrongly")
        return header

    def _read_block(self, offset: int) -> tuple[int, bytes, int]:
        """The type and payload of the block at an offset, and the offset after it."""
        before = self._checksum
        if self._checksum_at == offset:
            self._seek(offset)
        else:
            self._seek(offset - 4)
            (before,) = struct.unpack("<I", self._exactly(4, "a checksum"))
        key, head = self._read_leb128("a block")
        size, kind = divmod(key, 8)
        if size > MAX_PAYLOAD_BYTES:
            raise BitstreamError(f"a block claims {size} bytes, more than the {MAX_PAYLOAD_BYTES} allowed")
        payload = self._exactly(size, "a block")
        self._check(zlib.crc32(head + payload, before), "a block")
        return kind, payload, self._position

    def _check(self, checksum: int, what: str) -> None:
        """Read the checksum of what has come."""
        if self._exactly(4, what) != struct.pack("<I", checksum):
            raise BitstreamError(f"{what} is damaged (checksum)")
        self._checksum, self._checksum_at = checksum, self._position

    def _seek(self, offset: int) -> None:
        if self._position != offset:
            if self._base is None:
                raise BitstreamError("a pipe can be read only once")
            self._file.seek(self._base + offset)
            self._position = offset

    def _exactly(self, size: int, what: str) -> bytes:
        """Piece by piece: a raw pipe gives what is there, and a size that is not there must not be allocated."""
        data = bytearray()
        while len(data) < size:
            piece = self._file.read(min(size - len(data), _READ_BYTES))
            if not piece:
                raise TruncatedError(f"the file ends inside {what}" if self._position or data else "the file is empty")
            data += piece
            self._position += len(piece)
        return bytes(data)

    def _read_leb128(self, what: str) -> tuple[int, bytes]:
        """A number and its spelling."""
        taken = b""
        while not taken or taken[-1] >= 0x80:
            if len(taken) == MAX_LEB128_BYTES:
                raise BitstreamError("a number is written wrongly")
            taken += self._exactly(1, what)
        return split_number(taken)[0], taken


@dataclass(frozen=True)
class _IndexEntry:
    """A place to begin reading at, counted from the end of the header."""

    offset: int
    first_frame: int
    num_samples_ended: int | None  # at the beginning of a segment: samples of the one before


class _Index:
    """Where segments begin, and every so many of their blocks. Writer and reader fill one as blocks go by."""

    def __init__(self) -> None:
        self.entries: list[_IndexEntry] = []
        self.num_bytes = 0
        self.num_frames = 0
        self.num_blocks = 0
        self._num_blocks_since = 0

    def begin_segment(self, num_samples_ended: int) -> None:
        """A segment's first block comes at `num_bytes`."""
        self.entries.append(_IndexEntry(self.num_bytes, self.num_frames, num_samples_ended))
        self._num_blocks_since = 0

    def add_block(self, num_frames: int) -> None:
        """A block of frames comes at `num_bytes`."""
        if self._num_blocks_since == BLOCKS_PER_INDEX_ENTRY:
            self.entries.append(_IndexEntry(self.num_bytes, self.num_frames, None))
            self._num_blocks_since = 0
        self.num_frames += num_frames
        self.num_blocks += 1
        self._num_blocks_since += 1

    def before(self, frame: int) -> tuple[int, int]:
        """The last place before a frame: the frame that comes there, and the offset."""
        at = bisect.bisect_right(self.entries, frame, key=lambda entry: entry.first_frame) - 1
        return self.entries[at].first_frame, self.entries[at].offset

    def to_bytes(self) -> bytes:
        """The payload of the INDEX block."""
        numbers: list[int] = []
        for before, entry in itertools.pairwise([_IndexEntry(0, 0, None), *self.entries]):
            ended = 0 if entry.num_samples_ended is None else 1 + entry.num_samples_ended
            numbers += [entry.offset - before.offset, entry.first_frame - before.first_frame, ended]
        return leb128(*numbers)

    @staticmethod
    def from_bytes(payload: bytes) -> _Index:
        """Undo `to_bytes`."""
        index, offset, first_frame = _Index(), 0, 0
        values = numbers(payload)
        for more_bytes, more_frames, ended in zip(values[::3], values[1::3], values[2::3], strict=False):
            offset, first_frame = offset + more_bytes, first_frame + more_frames
            index.entries.append(_IndexEntry(offset, first_frame, ended - 1 if ended else None))
        if len(values) % 3 or not index.entries or index.entries[0] != _IndexEntry(0, 0, 0):
            raise BitstreamError("INDEX does not list places from the first segment on")
        return index


def _check_segment(header: Header, skip_samples: int, num_samples: int, num_frames: int) -> None:
    wanted = header.num_frames_for(skip_samples + num_samples)
    if num_samples < 0 or not wanted <= num_frames <= wanted + header.num_frames_after:
        skipped = f" after {skip_samples} skipped ones" if skip_samples else ""
        raise BitstreamError(f"{num_samples} samples{skipped} take {wanted} frames, but {num_frames} came")
