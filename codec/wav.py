"""WAV headers, read from and written to streams that cannot seek, and PCM samples.

ValueError where a header cannot be used; the message says why.
Source: RIFF and WAVE, "Multimedia Programming Interface and Data Specifications 1.0" (IBM and Microsoft, 1991);
WAVE_FORMAT_EXTENSIBLE, https://learn.microsoft.com/windows-hardware/drivers/audio/extensible-wave-format-descriptors;
RF64, EBU Tech 3306.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

MAX_RIFF_BYTES = 2**32 - 2  # the largest value of 32 bits means "unknown"
MAX_CHANNELS = 1024  # as in libsndfile; what claims more is no audio
_MAX_CHUNKS = 1000  # before the samples; an endless stream of zeros looks like chunks without content
PIECE_BYTES = 2**16
_EXTENSIBLE = 0xFFFE
_EXTENSIBLE_GUID_END = bytes.fromhex("000000001000800000aa00389b71")  # after the two bytes of the format


@dataclass(frozen=True)
class Encoding:
    """How samples stand in a file, little endian: `decode` turns them into float32, full scale at -1..1."""

    num_bytes: int  # of one sample
    dtype: str
    zero: float = 0.0
    full_scale: float = 1.0

    def decode(self, data: bytes, num_channels: int) -> np.ndarray:
        """Whole sample frames as [C, n]. Rounds to float32 as libsndfile does."""
        if self.num_bytes == 3:  # into the upper bytes of 32 bits
            wide = np.zeros((len(data) // 3, 4), np.uint8)
            wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
            samples = wide.reshape(-1).view("<i4")
        else:
            samples = np.frombuffer(data, self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # doubles beyond float32 become infinite
            audio = (samples.astype(np.float32) - np.float32(self.zero)) / np.float32(self.full_scale)
        return np.ascontiguousarray(audio.reshape(-1, num_channels).T)


PCM_16 = Encoding(2, "<i2", full_scale=2.0**15)
_ENCODINGS = {  # by format code and bytes per sample
    (1, 1): Encoding(1, "u1", zero=128.0, full_scale=128.0),
    (1, 2): PCM_16,
    (1, 3): Encoding(3, "<i4", full_scale=2.0**31),
    (1, 4): Encoding(4, "<i4", full_scale=2.0**31),
    (3, 4): Encoding(4, "<f4"),
    (3, 8): Encoding(8, "<f8"),
}


@dataclass(frozen=True)
class WavFormat:
    """What a WAV header says."""

    rate_hz: int
    num_channels: int
    encoding: Encoding
    num_samples: int | None = None  # per channel; None: up to the end of the stream
    num_trailing_bytes: int = 0  # after the samples: other chunks


def read_header(read: Callable[[int], bytes], num_file_bytes: int = 0) -> WavFormat | None:
    """Read up to the first sample. None where it is no WAV, or one whose encoding is not known here.

    `read(n)` returns n bytes, fewer only at the end; `num_file_bytes` is how many there are where that is known.

    Sizes that programs write to pipes, not knowing them, mean "up to the end": 2^32 - 1 (ffmpeg), 2^31 (arecord),
    somewhat less (sox), or 0, in headers that were never completed. In a file that is large enough they are true:
    recorders split at 2 GiB.
    """
    start = read(12)
    if len(start) < 12 or start[:4] not in (b"RIFF", b"RF64") or start[8:] != b"WAVE":
        return None
    num_riff_bytes = int.from_bytes(start[4:8], "little")
    position, wide_data_bytes, found = 12, 0, None
    for _ in range(_MAX_CHUNKS):
        name, num_bytes = struct.unpack("<4sI", _read_all(read, 8))
        position += 8
        if name == b"data":
            break
        content = _read_all(read, min(num_bytes, 40))
        _skip(read, num_bytes + num_bytes % 2 - len(content))
        position += num_bytes + num_bytes % 2
        if name == b"fmt ":
            found = _parse_format(content)
            if found is None:
                return None
        elif name == b"ds64" and start[:4] == b"RF64":
            num_riff_bytes, wide_data_bytes = struct.unpack("<QQ", _fixed(content, 16, "ds64"))
    else:
        raise ValueError(f"it holds no samples in its first {_MAX_CHUNKS} chunks")
    if found is None:
        raise ValueError("it has no fmt chunk before its samples")
    rate_hz, num_channels, encoding = found
    if start[:4] == b"RF64" and num_bytes == 2**32 - 1:
        num_bytes = wide_data_bytes
    riff_end = None if _is_unknown(num_riff_bytes) else num_riff_bytes + 8
    is_unknown = _is_unknown(num_bytes) and not 0 < num_bytes <= num_file_bytes - position
    if num_bytes == 0 and riff_end is not None:
        is_unknown = riff_end <= position  # else other chunks follow, and a header that knows of them is no guess
    if is_unknown:
        return WavFormat(rate_hz, num_channels, encoding)
    frame_bytes = num_channels * encoding.num_bytes
    num_samples = num_bytes // frame_bytes
    num_trailing_bytes = (riff_end or 0) - position - num_samples * frame_bytes
    return WavFormat(rate_hz, num_channels, encoding, num_samples, max(0, num_trailing_bytes))


class PcmReader:
    """Samples as they stand in WAV and raw files, from where the stream is. ValueError where they end too early."""

    def __init__(self, stream: BinaryIO, format: WavFormat, num_bytes: int | None) -> None:
        """`num_bytes` from here to the end, None for a pipe."""
        self.rate_hz, self.num_channels, self.num_samples = format.rate_hz, format.num_channels, format.num_samples
        self._stream, self._format = stream, format
        self._frame_bytes = format.num_channels * format.encoding.num_bytes
        self._is_file = num_bytes is not None
        self._num_left = format.num_samples  # None: up to the end of the stream
        if num_bytes is not None:
            num_there = num_bytes // self._frame_bytes
            if self.num_samples is None:
                self.num_samples = num_there
            elif num_there < self.num_samples:
                raise ValueError(f"it ended after {num_there} of {self.num_samples} samples")

    def read(self, num_samples: int) -> np.ndarray:
        if self._num_left is not None:
            num_samples = min(num_samples, self._num_left)
            self._num_left -= num_samples
            if num_samples == 0:  # a program on the other end of the pipe can finish
                _drop(self._stream, self._format.num_trailing_bytes)
        data = read_exactly(self._stream, num_samples * self._frame_bytes)
        rest = len(data) % self._frame_bytes
        is_padding = rest == 1 and data[-1] == 0 and self._frame_bytes % 2 == 1  # to a whole number of 16-bit words
        if rest and self._num_left is None and not is_padding:
            raise ValueError(f"it ended inside a sample: {rest} bytes of {self._frame_bytes}")
        return self._format.encoding.decode(data[: len(data) - rest], self.num_channels)

    def jump(self, num_samples: int) -> int:
        if not self._is_file:
            return 0
        self._stream.seek(num_samples * self._frame_bytes, os.SEEK_CUR)
        if self._num_left is not None:
            self._num_left -= num_samples
        return num_samples


def write_header(rate_hz: int, num_channels: int, num_samples: int | None, *, wide: bool = False) -> bytes:
    """The header of a 16-bit WAV file.

    44 bytes, with sizes 2^32 - 1 where `num_samples` is None or too large for them; or, `wide`, 80 bytes that have room
    for any number: RF64 where it is too large, else with a JUNK chunk in that place, which makes it easy to replace one
    by the other.
    """
    block_align = 2 * num_channels
    if not (0 < rate_hz < 2**31 and 0 < block_align < 2**16 and rate_hz * block_align < 2**32):
        raise ValueError(f"WAV cannot hold {num_channels} channels of {rate_hz} Hz")
    is_large = not fits(num_channels, num_samples)
    num_data_bytes = (num_samples or 0) * block_align
    num_riff_bytes = num_data_bytes + (72 if wide else 36)
    sizes = (2**32 - 1, 2**32 - 1) if is_large else (num_riff_bytes, num_data_bytes)
    chunks = b""
    if wide and is_large and num_samples is not None:
        chunks = struct.pack("<4sIQQQI", b"ds64", 28, num_riff_bytes, num_data_bytes, num_samples, 0)
    elif wide:
        chunks = struct.pack("<4sI28x", b"JUNK", 28)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, num_channels, rate_hz, rate_hz * block_align, block_align, 16)
    start = struct.pack("<4sI4s", b"RF64" if chunks[:4] == b"ds64" else b"RIFF", sizes[0], b"WAVE")
    return start + chunks + form + struct.pack("<4sI", b"data", sizes[1])


def fits(num_channels: int, num_samples: int | None) -> bool:
    """Whether so many 16-bit samples are known to fit into a WAV file that is not RF64."""
    return num_samples is not None and num_samples * num_channels * 2 + 72 <= MAX_RIFF_BYTES


def read_exactly(stream: BinaryIO, num_bytes: int) -> bytes:
    """So many bytes, fewer only at the end. Never has room made for more than came."""
    data = bytearray()
    while len(data) < num_bytes:
        piece = stream.read(min(num_bytes - len(data), PIECE_BYTES))
        if piece is None:
            raise ValueError("it does not wait for its data")
        if not piece:
            break
        data += piece
    return bytes(data)


def _drop(stream: BinaryIO, num_bytes: int) -> None:
    while num_bytes > 0 and (piece := read_exactly(stream, min(num_bytes, PIECE_BYTES))):
        num_bytes -= len(piece)


def _parse_format(content: bytes) -> tuple[int, int, Encoding] | None:
    """Rate, channels and encoding of a fmt chunk; None where the encoding is not known here."""
    code, num_channels, rate_hz, _, block_align, num_bits = struct.unpack("<HHIIHH", _fixed(content, 16, "fmt"))
    if code == _EXTENSIBLE:
        code, end = struct.unpack("<H14s", _fixed(content, 40, "fmt")[24:])
        if end != _EXTENSIBLE_GUID_END:
            return None
    encoding = _ENCODINGS.get((code, -(-num_bits // 8)))
    if encoding is None:
        return None
    if not (0 < num_channels <= MAX_CHANNELS and rate_hz > 0):
        raise ValueError(f"it claims {num_channels} channels of {rate_hz} Hz")
    if block_align != num_channels * encoding.num_bytes:
        raise ValueError(f"it claims {num_channels} samples of {num_bits} bits in {block_align} bytes")
    return rate_hz, num_channels, encoding


def _is_unknown(num_bytes: int) -> bool:
    """Whether a size is one that programs write to pipes; sox: 2^31 - 4096, less what makes no whole frame."""
    return num_bytes == 0 or num_bytes == 2**32 - 1 or 2**31 - 2**13 <= num_bytes <= 2**31 + 2**8 or num_bytes >= 2**62


def _fixed(content: bytes, num_bytes: int, name: str) -> bytes:
    if len(content) < num_bytes:
        raise ValueError(f"its {name} chunk is too short")
    return content[:num_bytes]


def _read_all(read: Callable[[int], bytes], num_bytes: int) -> bytes:
    data = read(num_bytes)
    if len(data) < num_bytes:
        raise ValueError("it ends before its samples begin")
    return data


def _skip(read: Callable[[int], bytes], num_bytes: int) -> None:
    while num_bytes > 0:
        num_bytes -= len(_read_all(read, min(num_bytes, PIECE_BYTES)))
