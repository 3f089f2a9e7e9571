r"""The `.codec` container: a header, then typed blocks with checksums, little endian throughout.

Header

    offset  size  field
    0       8     magic: 89 43 4F 44 45 43 0D 0A ("\x89CODEC\r\n"; text-mode transfers break it visibly)
    8       1     version (1)
    9       1     flags (0; a reader refuses flags it does not know)
    10      8     codec id: the first 8 bytes of the SHA-256 that names the model's weights and configuration
    18      4     rate of the codec, Hz
    22      4     rate of the original, Hz
    26      2     channels of the original; each is a row of codes of its own
    28      4     hop: samples per frame at the codec's rate
    32      1     K: rows of codes in every frame
    33      4*K   codebook sizes
    .       1     length n of the model's name
    .       n     the model's name, UTF-8, such as "speech_16k@1"
    .       4     CRC-32 of all bytes before

Block

    1       type: 1 FRAMES, 2 END, 3 GLOBAL; from 128 on, types that a reader may skip (128 INDEX)
    1..5    n: size of the payload, LEB128 (7 bits a byte, low bits first, high bit set on all but the last)
    n       payload
    4       CRC-32 of type, size and payload

FRAMES: the number of frames (LEB128), then the codes, frame by frame, within a frame channel by channel, coarsest row
first, each code in ceil(log2(codebook size)) bits, low bit first, the last byte filled up with zeros.
END: the number of samples at the original rate (u64) and the number of frames (u64). Nothing may follow it.

Payloads are frame-major, so a file can be read as it arrives. A file without END is truncated.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

MAGIC = b"\x89CODEC\r\n"
VERSION = 1
FRAMES, END, GLOBAL, FIRST_OPTIONAL = 1, 2, 3, 128
FRAMES_PER_BLOCK = 50
_MAX_PAYLOAD_BYTES = 2**20
_MAX_RATE_HZ = 1_000_000
_MAX_CODEBOOK_SIZE = 2**24
_READ_BYTES = 2**16
_FIXED = struct.Struct("<8sBB8sIIHIB")
_END = struct.Struct("<QQ")


class BitstreamError(ValueError):
    """The bytes are not a container that this version can read; the message says why in one line."""


@dataclass(frozen=True)
class Header:
    """What a file says before its first frame."""

    codec_id: str  # 16 hex digits
    model: str
    codec_rate_hz: int
    rate_hz: int
    num_channels: int
    hop_length: int
    codebook_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.codec_id) != 16 or not set(self.codec_id) <= set("0123456789abcdef"):
            raise BitstreamError(f"a codec id is 16 hexadecimal digits, not {self.codec_id!r}")
        if min(self.codec_rate_hz, self.rate_hz, self.num_channels, self.hop_length) < 1:
            raise BitstreamError("rates, channels and hop must be positive")
        if max(self.codec_rate_hz, self.rate_hz) > _MAX_RATE_HZ:
            raise BitstreamError(
                f"rates of {self.codec_rate_hz} and {self.rate_hz} Hz: at most {_MAX_RATE_HZ} are allowed"
            )
        if not self.model.isprintable():
            raise BitstreamError(f"the model's name holds control characters: {self.model!r}")
        if not 1 <= len(self.codebook_sizes) <= 255:
            raise BitstreamError(f"a frame has 1 to 255 rows of codes, not {len(self.codebook_sizes)}")
        if not all(2 <= size <= _MAX_CODEBOOK_SIZE for size in self.codebook_sizes):
            raise BitstreamError(f"codebook sizes must lie in 2..{_MAX_CODEBOOK_SIZE}, got {self.codebook_sizes}")

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

    def to_bytes(self) -> bytes:
        """The header as it stands in a file."""
        name = self.model.encode("utf-8")
        if len(name) > 255:
            raise BitstreamError(f"the model's name is longer than 255 bytes: {self.model!r}")
        try:
            fixed = _FIXED.pack(
                MAGIC, VERSION, 0, bytes.fromhex(self.codec_id), self.codec_rate_hz, self.rate_hz,
                self.num_channels, self.hop_length, len(self.codebook_sizes),
            )  # fmt: skip
        except (struct.error, ValueError) as error:
            raise BitstreamError(f"a header field is out of range: {error}") from error
        sizes = struct.pack(f"<{len(self.codebook_sizes)}I", *self.codebook_sizes)
        body = fixed + sizes + bytes([len(name)]) + name
        return body + struct.pack("<I", zlib.crc32(body))


def pack_codes(codes: np.ndarray, header: Header) -> bytes:
    """Codes int64 [channels, K, F] -> bytes, as in a FRAMES payload. BitstreamError for codes out of range."""
    sizes = np.array(header.codebook_sizes)
    if codes.shape[:2] != (header.num_channels, len(sizes)):
        raise BitstreamError(f"codes must be [{header.num_channels}, {len(sizes)}, F], got {codes.shape}")
    if codes.size and (codes.min() < 0 or (codes >= sizes[None, :, None]).any()):
        raise BitstreamError("a code is outside its codebook")
    columns = [
        (codes[channel, row, :, None] >> np.arange(bits)) & 1
        for channel in range(header.num_channels)
        for row, bits in enumerate(header.code_bits)
    ]
    return np.packbits(np.concatenate(columns, axis=1).astype(np.uint8), bitorder="little").tobytes()


def unpack_codes(data: bytes, num_frames: int, header: Header) -> np.ndarray:
    """Undo `pack_codes`: int64 [channels, K, F]. BitstreamError where size, filling or codes are wrong."""
    num_bits = num_frames * header.bits_per_frame
    if len(data) != -(-num_bits // 8):
        raise BitstreamError(f"{num_frames} frames do not fit a payload of {len(data)} bytes")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[num_bits:].any():
        raise BitstreamError("the filling bits of a block are not zero")
    frames = bits[:num_bits].reshape(num_frames, header.bits_per_frame)
    codes = np.empty((header.num_channels, len(header.codebook_sizes), num_frames), np.int64)
    at = 0
    for channel in range(header.num_channels):
        for row, width in enumerate(header.code_bits):
            codes[channel, row] = frames[:, at : at + width] @ (1 << np.arange(width))
            at += width
    if (codes >= np.array(header.codebook_sizes)[None, :, None]).any():
        raise BitstreamError("a code is outside its codebook")
    return codes


class Writer:
    """Writes a container block by block: `write(codes)` as often as needed, then `finish(num_samples)`.

    To a path, the file appears whole at `finish` or not at all. To a binary stream, blocks leave as they fill up.
    A writer is finished once; leave its `with` block right after.
    """

    def __init__(self, target: str | os.PathLike[str] | BinaryIO, header: Header) -> None:
        self.header = header
        head = header.to_bytes()
        self._path: Path | None = None
        if isinstance(target, str | os.PathLike):
            self._path = Path(target)
            self._partial = self._path.with_name(f".{self._path.name}.partial-{os.getpid()}")
            self._file: BinaryIO = self._partial.open("wb")
        else:
            self._file = target
        self._pending = np.empty((header.num_channels, len(header.codebook_sizes), 0), np.int64)
        self._num_frames = 0
        self._file.write(head)

    def write(self, codes: np.ndarray) -> None:
        """Append codes int64 [channels, K, F], F >= 0."""
        if codes.ndim != 3 or codes.shape[:2] != self._pending.shape[:2]:
            raise BitstreamError(
                f"codes must be [{self._pending.shape[0]}, {self._pending.shape[1]}, F], got {codes.shape}"
            )
        self._pending = np.concatenate([self._pending, codes], axis=2)
        while self._pending.shape[2] >= FRAMES_PER_BLOCK:
            self._write_frames(self._pending[:, :, :FRAMES_PER_BLOCK])
            self._pending = self._pending[:, :, FRAMES_PER_BLOCK:]

    def finish(self, num_samples: int) -> None:
        """Write what is pending and the END block; `num_samples` counts at the original rate."""
        if not 0 <= num_samples < 2**64:
            raise BitstreamError(f"num_samples={num_samples} is not a count of 64 bits")
        if self._pending.shape[2]:
            self._write_frames(self._pending)
        expected = frames_for(num_samples, self.header)
        if self._num_frames != expected:
            raise BitstreamError(f"{num_samples} samples take {expected} frames, but {self._num_frames} were written")
        self._write_block(END, _END.pack(num_samples, self._num_frames))
        if self._path is not None:
            self._file.close()
            os.replace(self._partial, self._path)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None:
            try:
                self._file.close()  # may fail on a full disk
            finally:
                self._partial.unlink(missing_ok=True)

    def _write_frames(self, codes: np.ndarray) -> None:
        self._write_block(FRAMES, _leb128(codes.shape[2]) + pack_codes(codes, self.header))
        self._num_frames += codes.shape[2]

    def _write_block(self, block_type: int, payload: bytes) -> None:
        if len(payload) > _MAX_PAYLOAD_BYTES:
            raise BitstreamError(f"a block of {len(payload)} bytes is more than the {_MAX_PAYLOAD_BYTES} allowed")
        block = bytes([block_type]) + _leb128(len(payload)) + payload
        self._file.write(block + struct.pack("<I", zlib.crc32(block)))


class Reader:
    """Reads a container block by block, in constant memory.

    `header` is there at once; `blocks()` yields codes int64 [channels, K, F] and ends after END has been checked, when
    `num_samples` (at the original rate) and `num_frames` are known. Every other end is a BitstreamError.
    """

    def __init__(self, source: str | os.PathLike[str] | BinaryIO) -> None:
        self._owned = isinstance(source, str | os.PathLike)
        self._file: BinaryIO = open(source, "rb") if isinstance(source, str | os.PathLike) else source  # noqa: SIM115
        self.num_samples: int | None = None
        self.num_frames = 0
        try:
            self.header = self._read_header()
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

    def blocks(self) -> Iterator[np.ndarray]:
        """The codes of one FRAMES block after the other."""
        while self.num_samples is None:
            block_type, payload = self._read_block()
            if block_type == FRAMES:
                stream = io.BytesIO(payload)
                num_frames, _ = _read_leb128(stream)
                rest = stream.read()
                if num_frames == 0 or num_frames * self.header.bits_per_frame > 8 * len(rest):
                    raise BitstreamError(f"a block claims {num_frames} frames in {len(rest)} bytes")
                self.num_frames += num_frames
                yield unpack_codes(rest, num_frames, self.header)
            elif block_type == END:
                self._check_end(payload)
            elif block_type < FIRST_OPTIONAL:
                raise BitstreamError(f"a block of type {block_type} needs a newer version of this program")

    def _check_end(self, payload: bytes) -> None:
        if len(payload) != _END.size:
            raise BitstreamError("the END block has the wrong size")
        num_samples, num_frames = _END.unpack(payload)
        if num_frames != self.num_frames or frames_for(num_samples, self.header) != num_frames:
            raise BitstreamError(
                f"END speaks of {num_frames} frames and {num_samples} samples, but {self.num_frames} frames came"
            )
        if self._file.read(1):
            raise BitstreamError("there are bytes after END")
        self.num_samples = num_samples

    def _read_header(self) -> Header:
        magic = self._exactly(len(MAGIC), "the header")
        if magic != MAGIC:
            raise BitstreamError("not a .codec file")
        fixed = magic + self._exactly(_FIXED.size - len(MAGIC), "the header")
        _, version, flags, codec_id, codec_rate_hz, rate_hz, num_channels, hop_length, num_rows = _FIXED.unpack(fixed)
        if version != VERSION or flags:
            raise BitstreamError(f"version {version} (flags {flags}) needs a newer version of this program")
        sizes = self._exactly(4 * num_rows + 1, "the header")
        name = self._exactly(sizes[-1], "the header")
        (checksum,) = struct.unpack("<I", self._exactly(4, "the header"))
        if checksum != zlib.crc32(fixed + sizes + name):
            raise BitstreamError("the header is damaged (checksum)")
        try:
            model = name.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BitstreamError("the model's name is not UTF-8") from error
        codebook_sizes = struct.unpack(f"<{num_rows}I", sizes[:-1])
        return Header(codec_id.hex(), model, codec_rate_hz, rate_hz, num_channels, hop_length, codebook_sizes)

    def _read_block(self) -> tuple[int, bytes]:
        kind = self._exactly(1, "a block")
        size, size_bytes = _read_leb128(self._file)
        if size > _MAX_PAYLOAD_BYTES:
            raise BitstreamError(f"a block claims {size} bytes, more than the {_MAX_PAYLOAD_BYTES} allowed")
        payload = self._exactly(size, "a block")
        (checksum,) = struct.unpack("<I", self._exactly(4, "a block"))
        if checksum != zlib.crc32(kind + size_bytes + payload):
            raise BitstreamError(f"a block is damaged (checksum), after {self.num_frames} good frames")
        return kind[0], payload

    def _exactly(self, size: int, what: str) -> bytes:
        """Piece by piece: a raw pipe gives what is there, and a size that is not there must not be allocated."""
        data = bytearray()
        while len(data) < size:
            piece = self._file.read(min(size - len(data), _READ_BYTES))
            if not piece:
                raise BitstreamError(f"the file ends inside {what}, after {self.num_frames} good frames")
            data += piece
        return bytes(data)


def frames_for(num_samples: int, header: Header) -> int:
    """Frames that `num_samples` at the original rate take: resampled length and frames are both rounded up."""
    at_codec_rate = -(-num_samples * header.codec_rate_hz // header.rate_hz)
    return -(-at_codec_rate // header.hop_length)


def _leb128(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _read_leb128(stream: BinaryIO) -> tuple[int, bytes]:
    """The value and the bytes it took; at most 5 bytes, no needless ones, so that a value has one spelling."""
    taken = b""
    value = 0
    for shift in range(0, 35, 7):
        byte = stream.read(1)
        if not byte:
            raise BitstreamError("the file ends inside a block")
        taken += byte
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            if byte[0] == 0 and shift:
                break
            return value, taken
    raise BitstreamError("a size is written wrongly")
