"""`.ecdc` files, as the `encodec` package writes them without its language model: codes of one recording, bit-packed.

    "ECDC", version 0 (1 byte), length of what follows (4 bytes, big endian),
    {"m": model, "al": samples, "nc": rows of codes, "lm": false} as JSON
    then for each segment: its loudness (float32, big endian; 48 kHz only), and its codes, frame after frame, row after
    row, 10 bits each with the lowest first, up to a whole byte

The 24 kHz model has one segment, the 48 kHz model one of a second every 0.99 s. Nothing else in the file tells where a
segment ends, and there are no checksums: a flipped bit among the codes cannot be found.

Files written with the language model cannot be read: their arithmetic coding follows that model's floating-point
probabilities to the last bit, and those differ between machines and versions of PyTorch.

Source: https://github.com/facebookresearch/encodec, compress.py and binary.py. Its own reader computes the number of
frames in floating point, which for a few lengths (6720 samples is the first) makes it ask for one frame more than its
writer wrote, and fail. Here those files are read.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codec.files import AtomicFile

if TYPE_CHECKING:
    from codec.models.seanet import SEANetCodec
    from codec.tokens import Tokens

MAGIC = b"ECDC"
HOP_LENGTH = 320
BITS_PER_CODE = 10
_PREFIX = struct.Struct("!4sBI")
_SCALE = struct.Struct("!f")
_NAMES = {"m": str, "al": int, "nc": int, "lm": bool}


@dataclass(frozen=True)
class _Layout:
    max_num_quantizers: int
    segment_samples: int | None = None  # None: all of it
    segment_stride_samples: int | None = None
    has_scales: bool = False

    def segment_frames(self, num_samples: int) -> Iterator[int]:
        """The number of frames of each segment, one after the other."""
        length, stride = self.segment_samples or num_samples, self.segment_stride_samples or num_samples
        first = 0
        while first < num_samples:
            yield -(-min(length, num_samples - first) // HOP_LENGTH)
            first += stride


_LAYOUTS = {"encodec_24khz": _Layout(32), "encodec_48khz": _Layout(16, 48000, 47520, has_scales=True)}


@dataclass(frozen=True, eq=False)
class EcdcFile:
    """What an `.ecdc` file holds. ValueError where the parts do not belong together.

    model: "encodec_24khz" or "encodec_48khz".
    num_samples: length of the audio at the model's rate.
    codes: integers [K, F]; the frames of overlapping segments lie one after the other.
    scales: float32 [S], the loudness of each segment; None at 24 kHz.
    """

    model: str
    num_samples: int
    codes: np.ndarray
    scales: np.ndarray | None = None

    def __post_init__(self) -> None:
        layout = _layout(self.model)
        if self.num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {self.num_samples}")
        segments = list(layout.segment_frames(self.num_samples))
        if self.codes.ndim != 2 or not 1 <= self.codes.shape[0] <= layout.max_num_quantizers:
            raise ValueError(
                f"codes of {self.model} must be [1..{layout.max_num_quantizers}, F], got {self.codes.shape}"
            )
        if self.codes.shape[1] != sum(segments):
            raise ValueError(f"{self.num_samples} samples are {sum(segments)} frames, not {self.codes.shape[1]}")
        if self.codes.dtype.kind not in "iu" or ((self.codes < 0) | (self.codes >= 2**BITS_PER_CODE)).any():
            raise ValueError(f"codes must be integers in 0..{2**BITS_PER_CODE - 1}")
        if (self.scales is None) == layout.has_scales:
            raise ValueError(f"{self.model} has {'a' if layout.has_scales else 'no'} scale for each segment")
        if self.scales is not None:
            if self.scales.shape != (len(segments),):
                raise ValueError(f"{len(segments)} segments need as many scales, got {self.scales.shape}")
            if not (np.isfinite(self.scales) & (self.scales >= 0)).all():
                raise ValueError("scales must be finite and not negative")


def read_ecdc(path: str | os.PathLike[str]) -> EcdcFile:
    """Read a file. ValueError where it is none, is cut off, goes on too long, or was written with a language model."""
    data = Path(path).read_bytes()
    try:
        return _parsed(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def write_ecdc(path: str | os.PathLike[str], ecdc: EcdcFile) -> None:
    """Write a file, the same bytes as the `encodec` package writes. It appears whole or not at all."""
    layout = _layout(ecdc.model)
    header = {"m": ecdc.model, "al": ecdc.num_samples, "nc": ecdc.codes.shape[0], "lm": False}
    text = json.dumps(header).encode()
    parts = [_PREFIX.pack(MAGIC, 0, len(text)), text]
    first = 0
    for segment, num_frames in enumerate(layout.segment_frames(ecdc.num_samples)):
        if ecdc.scales is not None:
            parts.append(_SCALE.pack(ecdc.scales[segment]))
        parts.append(_packed(ecdc.codes[:, first : first + num_frames]))
        first += num_frames
    with AtomicFile(path) as new:
        new.file.write(b"".join(parts))
        new.commit()


def to_tokens(ecdc: EcdcFile, codec: SEANetCodec) -> Tokens:
    """The file as tokens that the codec decodes. ValueError unless it has the published model's config.

    Whether it also has the weights that made the file, no file tells.
    """
    import torch

    from codec.tokens import Tokens

    if _model_of(codec) != ecdc.model:
        raise ValueError(f"the file was made by {ecdc.model}, and this codec is {_model_of(codec)}")
    return Tokens(
        torch.from_numpy(ecdc.codes.astype(np.int64))[None],
        torch.tensor([ecdc.num_samples]),
        codec.codec_id,
        scales=None if ecdc.scales is None else torch.from_numpy(ecdc.scales.astype(np.float32))[None],
    )


def from_tokens(tokens: Tokens, codec: SEANetCodec) -> EcdcFile:
    """Tokens of one recording as what `write_ecdc` writes. ValueError unless the codec has a published config."""
    if tokens.codec_id != codec.codec_id:
        raise ValueError(f"these tokens were made by codec {tokens.codec_id!r}, not by this one ({codec.codec_id!r})")
    if len(tokens.codes) != 1:
        raise ValueError(f"a file holds one recording, not a batch of {len(tokens.codes)}")
    model, num_samples = _model_of(codec), int(tokens.num_samples[0])
    segments = list(_layout(model).segment_frames(num_samples))
    return EcdcFile(
        model,
        num_samples,
        tokens.codes[0, :, : sum(segments)].cpu().numpy(),
        None if tokens.scales is None else tokens.scales[0, : len(segments)].cpu().numpy(),
    )


def _model_of(codec: SEANetCodec) -> str:
    from codec.importers.encodec import ENCODEC_24KHZ, ENCODEC_48KHZ

    for name, config in (("encodec_24khz", ENCODEC_24KHZ), ("encodec_48khz", ENCODEC_48KHZ)):
        if codec.config == config:
            return name
    raise ValueError(f".ecdc files are of the published EnCodec models, and {codec.name or 'this codec'} is none")


def _layout(model: str) -> _Layout:
    if model not in _LAYOUTS:
        raise ValueError(f"model {model!r} is not one of {', '.join(_LAYOUTS)}")
    return _LAYOUTS[model]


def _parsed(data: bytes) -> EcdcFile:
    header, at = _header(data)
    model, num_samples, num_quantizers = header["m"], header["al"], header["nc"]
    layout = _layout(model)
    if not 1 <= num_quantizers <= layout.max_num_quantizers or num_samples < 0:
        raise ValueError(f"its header is damaged: {num_samples} samples, {num_quantizers} rows of codes")
    codes, scales = [np.zeros((num_quantizers, 0), np.int64)], list[float]()
    for num_frames in layout.segment_frames(num_samples):
        start = at + _SCALE.size * layout.has_scales
        end = start - (-num_frames * num_quantizers * BITS_PER_CODE // 8)
        if end > len(data):  # before anything of that size is made
            raise ValueError(f"it is cut off: {len(data)} bytes are too few for {num_samples} samples")
        if layout.has_scales:
            scales += _SCALE.unpack_from(data, at)
        codes.append(_unpacked(data[start:end], num_frames, num_quantizers))
        at = end
    if at != len(data):
        raise ValueError(f"it goes on for {len(data) - at} bytes after its end")
    return EcdcFile(
        model, num_samples, np.concatenate(codes, axis=1), np.array(scales, np.float32) if layout.has_scales else None
    )


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the segments begin."""
    if len(data) < _PREFIX.size or data[: len(MAGIC)] != MAGIC:
        raise ValueError("it is no .ecdc file")
    _, version, num_bytes = _PREFIX.unpack_from(data)
    if version != 0:
        raise ValueError(f"its version is {version}; 0 is known")
    start = _PREFIX.size + num_bytes
    if start > len(data):
        raise ValueError("it is cut off within its header")
    try:
        header = json.loads(data[_PREFIX.size : start].decode())
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is damaged: it is no JSON") from error
    if not isinstance(header, dict) or any(type(header.get(name)) is not kind for name, kind in _NAMES.items()):
        raise ValueError(f"its header is damaged: it must say {', '.join(_NAMES)}")
    if header["lm"]:
        raise ValueError(
            "it was written with a language model (--lm), whose floating-point probabilities must be the same to the "
            "last bit to read it; compress the audio again without"
        )
    return header, start


def _packed(codes_KF: np.ndarray) -> bytes:
    values = codes_KF.T.reshape(-1)
    bits = np.empty((len(values), BITS_PER_CODE), np.uint8)
    for bit in range(BITS_PER_CODE):
        bits[:, bit] = (values >> bit) & 1
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def _unpacked(data: bytes, num_frames: int, num_quantizers: int) -> np.ndarray:
    """Codes int64 [K, F]."""
    num_codes = num_frames * num_quantizers
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=num_codes * BITS_PER_CODE, bitorder="little")
    bits = flat.reshape(num_codes, BITS_PER_CODE)
    values = np.zeros(num_codes, np.int64)
    for bit in range(BITS_PER_CODE):
        values |= bits[:, bit].astype(np.int64) << bit
    return values.reshape(num_frames, num_quantizers).T
