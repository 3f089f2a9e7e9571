"""The header of a `.codec` file, packed codes, and the numbers both are made of. `codec.bitstream` tells the format."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAGIC = b"\x89CODEC"
VERSION = 1
ENTROPY_CODED = 1
MAX_PAYLOAD_BYTES = 2**20
_MAX_RATE_HZ = 1_000_000
_MAX_CHANNELS = 1024  # more than audio files have; every channel costs a decoder memory
_MAX_HOP_LENGTH = 2**31 - 1  # of contexts as well
MAX_CODEBOOK_SIZE = 2**24
MAX_LEB128_BYTES = 9


class BitstreamError(ValueError):
    """The bytes are not a container that this version can read; the message says why in one line."""


class TruncatedError(BitstreamError):
    """The file ends before its END block. All blocks before the break are good."""


@dataclass(frozen=True)
class Header:
    """What a file says before its first block."""

    codec_id: str  # 16 hex digits
    model: str
    codec_rate_hz: int
    rate_hz: int
    num_channels: int
    hop_length: int
    codebook_sizes: tuple[int, ...]
    num_frames_before: int = 0
    num_frames_after: int = 0
    entropy_id: str | None = None  # 8 hex digits; None: all blocks are packed

    def __post_init__(self) -> None:
        for value, num_digits in ((self.codec_id, 16), ("0" * 8 if self.entropy_id is None else self.entropy_id, 8)):
            if len(value) != num_digits or not set(value) <= set("0123456789abcdef"):
                raise BitstreamError(f"an id is {num_digits} hexadecimal digits, not {value!r}")
        if min(self.codec_rate_hz, self.rate_hz, self.num_channels, self.hop_length) < 1:
            raise BitstreamError("rates, channels and hop must be positive")
        if max(self.codec_rate_hz, self.rate_hz) > _MAX_RATE_HZ:
            raise BitstreamError(
                f"rates of {self.codec_rate_hz} and {self.rate_hz} Hz: at most {_MAX_RATE_HZ} are allowed"
            )
        if self.num_channels > _MAX_CHANNELS:
            raise BitstreamError(f"{self.num_channels} channels: at most {_MAX_CHANNELS} are allowed")
        if max(self.hop_length, self.num_frames_before, self.num_frames_after) > _MAX_HOP_LENGTH:
            raise BitstreamError(f"hop and contexts can be {_MAX_HOP_LENGTH} at most")
        if not self.model.isprintable():
            raise BitstreamError(f"the model's name holds control characters: {self.model!r}")
        if not 1 <= len(self.codebook_sizes) <= 255:
            raise BitstreamError(f"a frame has 1 to 255 rows of codes, not {len(self.codebook_sizes)}")
        if not all(2 <= size <= MAX_CODEBOOK_SIZE for size in self.codebook_sizes):
            raise BitstreamError(f"codebook sizes must lie in 2..{MAX_CODEBOOK_SIZE}, got {self.codebook_sizes}")
        if min(self.num_frames_before, self.num_frames_after) < 0:
            raise BitstreamError("a context cannot be negative")

    @property
    def code_bits(self) -> tuple[int, ...]:
        """Bits of each code in a frame of one channel."""
        return tuple((size - 1).bit_length() for size in self.codebook_sizes)

    @property
    def bits_per_frame(self) -> int:
        """Bits of one frame of all channels, packed."""
        return sum(self.code_bits) * self.num_channels

    @property
    def bitrate_bps(self) -> float:
        """Bits per second of all channels, packed, without the container."""
        return self.bits_per_frame * self.codec_rate_hz / self.hop_length

    def num_frames_for(self, num_samples: int) -> int:
        """Frames that `num_samples` at the original rate take: resampled length and frames are both rounded up."""
        return -(-self.resampled(num_samples) // self.hop_length)

    def resampled(self, num_samples: int) -> int:
        """`num_samples` at the original rate -> samples at the codec's rate, rounded up."""
        return -(-num_samples * self.codec_rate_hz // self.rate_hz)

    def num_samples_in(self, num_frames: int) -> int:
        """The most samples at the original rate that fit into so many frames."""
        return num_frames * self.hop_length * self.rate_hz // self.codec_rate_hz

    def to_bytes(self) -> bytes:
        """The header as it stands in a file."""
        name = self.model.encode("utf-8")
        if len(name) > 255:
            raise BitstreamError(f"the model's name is longer than 255 bytes: {self.model!r}")
        numbers = [self.codec_rate_hz, self.rate_hz, self.num_channels, self.hop_length]
        body = MAGIC + bytes([VERSION, ENTROPY_CODED if self.entropy_id else 0])
        body += bytes.fromhex(self.codec_id + (self.entropy_id or ""))
        body += leb128(*numbers, self.num_frames_before, self.num_frames_after) + bytes([len(self.codebook_sizes)])
        body += b"".join(leb128(len(list(run)), size) for size, run in itertools.groupby(self.codebook_sizes))
        body += bytes([len(name)]) + name
        return body + struct.pack("<I", zlib.crc32(body))


def packed_bytes(num_frames: int, header: Header) -> int:
    """Bytes that so many frames take when packed."""
    return -(-num_frames * header.bits_per_frame // 8)


def pack_codes(codes: np.ndarray, header: Header) -> bytes:
    """Codes int64 [channels, K, F] -> bytes, as in a PACKED payload. BitstreamError for codes out of range."""
    check_codes(codes, header)
    return pack_bits(codes.transpose(2, 0, 1).reshape(-1, codes.shape[1]), header.code_bits)


def unpack_codes(data: bytes, num_frames: int, header: Header) -> np.ndarray:
    """Undo `pack_codes`: int64 [channels, K, F]. BitstreamError where size, filling or codes are wrong."""
    rows = unpack_bits(data, num_frames * header.num_channels, header.code_bits)
    codes = rows.reshape(len(header.codebook_sizes), num_frames, header.num_channels).transpose(2, 0, 1)
    check_codes(codes, header)
    return codes


def check_codes(codes: np.ndarray, header: Header) -> None:
    """BitstreamError unless these are codes [channels, K, F] of the header's model."""
    sizes = np.array(header.codebook_sizes)
    if codes.ndim != 3 or codes.shape[:2] != (header.num_channels, len(sizes)):
        raise BitstreamError(f"codes must be [{header.num_channels}, {len(sizes)}, F], got {list(codes.shape)}")
    if codes.dtype.kind not in "iu":
        raise BitstreamError(f"codes must be integers, got {codes.dtype}")
    if codes.size and (codes.min() < 0 or (codes >= sizes[None, :, None]).any()):
        raise BitstreamError("a code is outside its codebook")


def pack_bits(codes: np.ndarray, bits: Sequence[int]) -> bytes:
    """Codes [N, columns], the codes of a column in so many bits each, low bit first -> bytes, row by row."""
    columns = [(codes[:, i, None].astype(np.int64) >> np.arange(width)) & 1 for i, width in enumerate(bits)]
    return np.packbits(np.concatenate(columns, axis=1).astype(np.uint8), bitorder="little").tobytes()


def unpack_bits(data: bytes, num_rows: int, bits: Sequence[int]) -> np.ndarray:
    """Undo `pack_bits`: int64 [columns, N]. BitstreamError where the size or the filling is wrong."""
    num_bits = num_rows * sum(bits)
    if len(data) != -(-num_bits // 8):
        raise BitstreamError(f"{num_bits} bits of codes do not fit {len(data)} bytes of a payload")
    unpacked = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if unpacked[num_bits:].any():
        raise BitstreamError("the filling bits of a block are not zero")
    rows = unpacked[:num_bits].reshape(num_rows, sum(bits))
    starts = itertools.accumulate(bits, initial=0)
    return np.stack(
        [rows[:, at : at + width] @ (1 << np.arange(width)) for at, width in zip(starts, bits, strict=False)]
    )


def leb128(*values: int) -> bytes:
    """Numbers of 0 and more as they stand in a file."""
    parts = bytearray()
    for value in values:
        while value >= 0x80:
            parts.append(value & 0x7F | 0x80)
            value >>= 7
        parts.append(value)
    return bytes(parts)


def split_number(data: bytes) -> tuple[int, bytes]:
    """The number that data begins with, and the rest."""
    value, at = _number_at(data, 0)
    return value, data[at:]


def numbers(data: bytes, count: int | None = None) -> tuple[int, ...]:
    """Data that is so many numbers, by default any number of them, and nothing else."""
    values: list[int] = []
    at = 0
    while at < len(data) if count is None else len(values) < count:
        value, at = _number_at(data, at)
        values.append(value)
    if at < len(data):
        raise BitstreamError("a block is too long")
    return tuple(values)


def _number_at(data: bytes, at: int) -> tuple[int, int]:
    """The number that stands at an offset, and the offset after it. A number has one spelling."""
    value = 0
    for i, byte in enumerate(data[at : at + MAX_LEB128_BYTES]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            if byte == 0 and i:
                break
            return value, at + i + 1
    raise BitstreamError("a number is written wrongly")
