"""Reading what is left of a damaged `.codec` file: which frames are lost, and all others in their places.

Every block's checksum begins with the one before, so the next good block is found by its bytes alone, whatever the
damage did to sizes, or moved. What lies between good blocks is a gap. END says how many frames the file had, and with
that how many the gaps had; what can still be read of their blocks, or else their bytes, share them out.

A damaged header is an error still, and so are damaged global codes, the damaged beginning of a segment, and gaps that
no frames fit into. (Where a gap swallows all from the frames of one segment to those of the next, and nothing tells,
both are taken for one.) Without a good END, a file ends with its last good block.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np

from codec.bitstream import (
    CODED,
    END,
    FRAMES_PER_BLOCK,
    GLOBAL,
    INDEX,
    PACKED,
    SEGMENT,
    Event,
    Reader,
    Segment,
    SegmentEnd,
    SegmentStart,
)
from codec.entropy import EntropyTables
from codec.header import (
    MAX_LEB128_BYTES,
    MAX_PAYLOAD_BYTES,
    BitstreamError,
    TruncatedError,
    numbers,
    packed_bytes,
    split_number,
)

_GAP = -1
_SEARCH_BYTES = 2**20
_MAX_BLOCK_BYTES = MAX_LEB128_BYTES + MAX_PAYLOAD_BYTES + 4
# More than entropy coding gets even of silence: a forged END must not make years of lost frames.
_MAX_FRAMES_PER_BYTE = 64
_TOO_DAMAGED = "more than frames is damaged: global codes, or where segments begin and end"


class _Piece(NamedTuple):
    """A block or a gap: where it, its payload, and what follows begin."""

    kind: int
    begin: int
    payload: int
    end: int
    num_frames: int = 0


@dataclass(frozen=True)
class _Part:
    """A segment: its blocks of frames and its gaps, in order. Where the file is cut off, its length is not known."""

    start: SegmentStart
    pieces: list[_Piece]
    num_samples: int | None

    @property
    def num_frames(self) -> int:
        return sum(piece.num_frames for piece in self.pieces)


class SalvagingReader(Reader):
    """A `Reader` that goes on behind damage: lost frames are codes of -1, in blocks of their own; `lost` lists them.

    It needs a file that can seek, and reads through it before it tells anything. Files without damage it reads as a
    `Reader` with `allow_truncated` does; of others it does not count blocks and bytes. BitstreamError for what the
    module calls an error.
    """

    def __init__(self, source: str | os.PathLike[str] | BinaryIO, *, tables: EntropyTables | None = None) -> None:
        self._known_parts: list[_Part] | None = None
        self._is_damaged = False
        self._num_bytes = 0
        super().__init__(source, tables=tables, allow_truncated=True)

    @property
    def lost(self) -> list[tuple[int, int]]:
        """Where something was lost: first sample and number of samples, at the original rate."""
        found = []
        for part, segment in zip(self._parts(), self.segments, strict=False):
            frame = 0
            for piece in part.pieces:
                frames = frame, frame + piece.num_frames
                first, last = (
                    min(max(0, self.header.num_samples_in(at) - part.start.skip_samples), segment.num_samples)
                    for at in frames
                )
                if piece.kind == _GAP and first < last:
                    found.append((segment.first_sample + first, last - first))
                frame = frames[1]
        return found

    @property
    def segments(self) -> tuple[Segment, ...]:
        parts = self._parts()
        if not self._is_damaged:
            return super().segments
        segments: list[Segment] = []
        frame = sample = 0
        for part in parts:
            num_samples = part.num_samples
            if num_samples is None:
                num_samples = max(0, self.header.num_samples_in(part.num_frames) - part.start.skip_samples)
            segments.append(Segment(part.start, frame, part.num_frames, sample, num_samples))
            frame, sample = frame + part.num_frames, sample + num_samples
        return tuple(segments)

    def events(self, first_sample: int = 0, num_samples: int | None = None, *, decode: bool = True) -> Iterator[Event]:
        if first_sample == 0 and num_samples is None:
            return self._all_events(decode)
        return super().events(first_sample, num_samples, decode=decode)

    def _all_events(self, decode: bool) -> Iterator[Event]:
        parts = self._parts()
        if not self._is_damaged:
            yield from super().events(decode=decode)
            return
        for part, segment in zip(parts, self.segments, strict=True):
            yield part.start
            for piece in part.pieces if decode else ():
                yield from self._codes(piece)
            yield SegmentEnd(segment.num_samples)

    def _frames(self, first_frame: int, last_frame: int) -> Iterator[np.ndarray]:
        parts = self._parts()
        if not self._is_damaged:
            yield from super()._frames(first_frame, last_frame)
            return
        frame = 0
        for piece in itertools.chain.from_iterable(part.pieces for part in parts):
            if frame < last_frame and frame + piece.num_frames > first_frame:
                at = frame
                for codes in self._codes(piece):
                    wanted = codes[:, :, max(0, first_frame - at) : max(0, last_frame - at)]
                    at += codes.shape[2]
                    if wanted.shape[2]:
                        yield wanted
            frame += piece.num_frames

    def _codes(self, piece: _Piece) -> Iterator[np.ndarray]:
        """The codes of a block; of a gap, as many of -1."""
        if piece.kind != _GAP:
            yield self._decode_frames(piece.kind, self._payload(piece))
            return
        shape = (self.header.num_channels, len(self.header.codebook_sizes))
        for first in range(0, piece.num_frames, FRAMES_PER_BLOCK):
            yield np.full((*shape, min(FRAMES_PER_BLOCK, piece.num_frames - first)), -1, np.int64)

    def _parts(self) -> list[_Part]:
        """What a damaged file is made of; nothing of others. Reads through the file, once."""
        if self._known_parts is None:
            if self._base is None:
                raise BitstreamError("a pipe cannot be searched for what is left of it")
            self._position = self._num_bytes = self._file.seek(0, os.SEEK_END) - self._base
            pieces = self._scanned()
            self._known_parts = self._divided(pieces) if self._is_damaged else []
        return self._known_parts

    # Where good blocks are

    def _scanned(self) -> list[_Piece]:
        """Good blocks and gaps, up to END or the end of the file; finds out whether anything is damaged."""
        pieces: list[_Piece] = []
        offset = self._first_block
        while offset < self._num_bytes and not (pieces and pieces[-1].kind == END):
            piece = self._good_block(offset) or self._mended_block(offset)
            if piece is None:
                self._is_damaged = True
                piece = _Piece(_GAP, offset, offset, self._next_good(offset))
            pieces.append(piece)
            offset = piece.end
        return pieces

    def _good_block(self, offset: int) -> _Piece | None:
        try:
            kind, payload, end = self._read_block(offset)
        except BitstreamError:
            return None
        num_frames = self._num_frames_of(payload) if kind in (PACKED, CODED) else 0
        return _Piece(kind, offset, end - 4 - len(payload), end, num_frames)

    def _mended_block(self, offset: int) -> _Piece | None:
        """A block of which the checksum alone was damaged: the next block's own tells what it should have been."""
        if self._checksum_at != offset:
            return None
        window = self._bytes(offset, 2 * _MAX_BLOCK_BYTES)
        piece = self._claimed(window, 0, len(window))
        if piece is None:
            return None
        checksum = zlib.crc32(window[: piece.end - 4], self._checksum)
        if not self._is_good(window, piece.end, checksum):
            return None
        self._is_damaged = True
        self._checksum, self._checksum_at = checksum, offset + piece.end
        return piece._replace(begin=offset, payload=offset + piece.payload, end=offset + piece.end)

    def _next_good(self, offset: int) -> int:
        """Where the next good block begins; the end of the file where there is none."""
        for first in range(offset + 1, self._num_bytes, _SEARCH_BYTES):
            window = self._bytes(first - 4, 4 + _SEARCH_BYTES + _MAX_BLOCK_BYTES)
            for at in range(4, min(4 + _SEARCH_BYTES, len(window))):
                if self._is_good(window, at, int.from_bytes(window[at - 4 : at], "little")):
                    return first - 4 + at
        return self._num_bytes

    def _is_good(self, window: bytes, at: int, checksum_before: int) -> bool:
        piece = self._claimed(window, at, len(window))
        if piece is None:
            return False
        checksum = zlib.crc32(memoryview(window)[at : piece.end - 4], checksum_before)
        return checksum == int.from_bytes(window[piece.end - 4 : piece.end], "little")

    def _claimed(self, data: bytes, at: int, end: int) -> _Piece | None:
        """What bytes say of a block that begins at a place and has ended by another; None where it can be none.

        Its checksum may be wrong. Blocks whose size says nothing are left out, for any bytes might be one.
        """
        try:
            head = data[at : at + MAX_LEB128_BYTES]
            key, rest = split_number(head)
            size, kind = divmod(key, 8)
            payload = at + len(head) - len(rest)
            piece = _Piece(kind, at, payload, payload + size + 4)
            if piece.end > end:
                return None
            if kind in (END, SEGMENT):
                return piece if 2 <= size <= 4 * MAX_LEB128_BYTES else None  # a few numbers
            head = data[payload : payload + min(size, 2 * MAX_LEB128_BYTES)]
            count, rest = split_number(head)
            if kind == GLOBAL:
                codebook_size, rest = split_number(rest)
                wanted = -(-self.header.num_channels * count * (codebook_size - 1).bit_length() // 8)
            else:
                wanted = packed_bytes(count, self.header)
            num_bytes = size - len(head) + len(rest)  # of codes
            fits = num_bytes < wanted if kind == CODED else num_bytes == wanted
        except BitstreamError:
            return None
        if kind not in (PACKED, CODED, GLOBAL) or not count or not fits:
            return None
        return piece if kind == GLOBAL else piece._replace(num_frames=count)

    # Which segments they make, and how many frames were in gaps

    def _divided(self, pieces: list[_Piece]) -> list[_Part]:
        """The segments of a damaged file, each gap with its number of frames."""
        num_samples = num_frames = None
        last = pieces.pop()
        if last.kind == END:
            if last.end != self._num_bytes:
                raise BitstreamError("there are bytes after END")
            num_samples, num_frames, index_size = self._end_numbers(self._payload(last))
            if pieces and pieces[-1].kind == _GAP and pieces[-1].end - pieces[-1].begin == index_size:
                pieces.pop()
        else:
            self.is_truncated = True
            if last.kind != _GAP:
                pieces.append(last)
            if not any(piece.num_frames for piece in pieces):
                raise TruncatedError("the file has neither its END nor a good block of frames")
        parts: list[_Part] = []
        start, inside, is_first, num_ended = SegmentStart(), list[_Piece](), True, 0
        for piece in pieces:
            if piece.kind in (PACKED, CODED, _GAP):
                inside.append(piece)
            elif piece.kind in (GLOBAL, SEGMENT):
                payload = self._payload(piece)
                if piece.kind == SEGMENT and not is_first:
                    parts.append(_Part(start, inside, numbers(payload, 2)[0]))
                    num_ended += numbers(payload, 2)[0]
                    start, inside = SegmentStart(), []
                if inside or start.global_codes is not None:
                    raise BitstreamError(_TOO_DAMAGED)
                start = self._segment_start(piece.kind, payload, start)
            is_first = is_first and piece.kind > INDEX
        if num_samples is not None:
            parts.append(_Part(start, inside, num_samples - num_ended))
        elif inside:
            parts.append(_Part(start, inside, None))
        return self._filled(parts, num_frames)

    def _filled(self, parts: list[_Part], num_frames: int | None) -> list[_Part]:
        """With numbers of frames for gaps, so that the segments have their lengths, and the file its `num_frames`."""
        good = [piece for part in parts for piece in part.pieces if piece.kind != _GAP]
        guesses = [
            [self._guess(piece, good, piece is part.pieces[-1]) for piece in part.pieces if piece.kind == _GAP]
            for part in parts
        ]
        bounds = [self._bounds(part, guess) for part, guess in zip(parts, guesses, strict=True)]
        lost = [min(max(sum(guess), least), most) for guess, (least, most) in zip(guesses, bounds, strict=True)]
        if num_frames is not None:
            left = num_frames - sum(piece.num_frames for piece in good) - sum(lost)
            for i, (least, most) in enumerate(bounds):
                shift = min(max(left, least - lost[i]), most - lost[i])
                lost[i], left = lost[i] + shift, left - shift
            if left:
                raise BitstreamError(_TOO_DAMAGED)
        filled = []
        for part, guess, number in zip(parts, guesses, lost, strict=True):
            if guess and part.pieces[-1].kind == _GAP:
                guess[-1] = max(1, number - sum(guess[:-1]))  # a last block may have any number
            shares = iter(_shared(number, guess))
            pieces = [p if p.kind != _GAP else p._replace(num_frames=next(shares)) for p in part.pieces]
            if any(p.kind == _GAP and p.num_frames > _MAX_FRAMES_PER_BYTE * (p.end - p.begin) for p in pieces):
                raise BitstreamError(_TOO_DAMAGED)
            filled.append(_Part(part.start, pieces, part.num_samples))
        return filled

    def _bounds(self, part: _Part, guess: list[int]) -> tuple[int, int]:
        """The least and the most frames that all gaps of a segment can have had."""
        if part.num_samples is None:
            return sum(guess), sum(guess)
        least = self.header.num_frames_for(part.start.skip_samples + part.num_samples) - part.num_frames
        most = least + self.header.num_frames_after
        if not guess and least <= 0 <= most:
            return 0, 0
        least = max(least, len(guess))
        if part.num_samples < 0 or not guess or least > most:
            raise BitstreamError(_TOO_DAMAGED)
        return least, most

    def _guess(self, gap: _Piece, good: list[_Piece], is_last: bool) -> int:
        """How many frames a gap says that it had; where it says nothing that can be, what its bytes would hold.

        All blocks of a segment but the last have as many frames.
        """
        usual = max((piece.num_frames for piece in good), default=0)
        size = gap.end - gap.begin
        at = num_frames = 0
        while at < size:
            piece = self._claimed(self._bytes(gap.begin + at, 4 * MAX_LEB128_BYTES), 0, size - at)
            if piece is None or (usual and piece.num_frames > 2 * usual):
                per_byte = sum(p.num_frames for p in good) / max(1, sum(p.end - p.begin for p in good))
                num_frames = round(size * (per_byte or 1 / packed_bytes(1, self.header)))
                break
            if piece.kind in (GLOBAL, SEGMENT):
                raise BitstreamError(_TOO_DAMAGED)
            at, num_frames = at + piece.end, num_frames + piece.num_frames
        if usual and not is_last:
            num_frames = max(1, round(num_frames / usual)) * usual
        return max(1, num_frames)

    def _payload(self, piece: _Piece) -> bytes:
        return self._bytes(piece.payload, piece.end - 4 - piece.payload)

    def _bytes(self, offset: int, size: int) -> bytes:
        """From an offset on, so many bytes or those that there are."""
        self._seek(offset)
        return self._exactly(min(size, self._num_bytes - offset), "a block")


def _shared(total: int, weights: list[int]) -> list[int]:
    """As many positive numbers of that sum as weights, about in proportion to them."""
    if sum(weights) == total:
        return weights
    sums = [0, *itertools.accumulate(weights)]
    spare = total - len(weights)
    return [1 + spare * b // sums[-1] - spare * a // sums[-1] for a, b in itertools.pairwise(sums)]
