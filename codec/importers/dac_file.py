"""`.dac` files: codes of the `descript-audio-codec` package, read without running what they could contain.

Such a file is a pickle inside of a `.npy`, and a pickle can name any function to be called. Here it is unpickled with
stand-ins for the few names that an array of numbers needs, and no other name is let in: they collect shapes and bytes,
which are checked and only then made arrays. Even so it is done on request only (`allow_pickle`).

Long recordings are cut into chunks, each encoded and decoded without padding, with what surrounds it taken from the
recording; `decode_dac` does the same, since these codes mean nothing to a decoder that pads.

Source: `DACFile` and `CodecMixin` of https://github.com/descriptinc/descript-audio-codec, dac/model/base.py; the pickle
of an array is what numpy's `ndarray.__reduce__` says.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codec.files import AtomicFile
from codec.layers.conv import Chain, Conv, ConvTranspose, ResidualBlock, SignalLayer
from codec.models.dac import DACCodec

_VERSION = "1.0.0"  # of the format, the only one that there is
_MAX_CODEBOOK_SIZE = 2**16  # codes are stored as uint16


@dataclass(frozen=True, kw_only=True, eq=False)
class DACFile:
    """What a `.dac` file holds.

    codes: int64 [C, K, F], a row of the batch per channel.
    sample_rate_hz, num_samples: of the recording as it came, per channel; the codec may have another rate.
    loudness_db: of the recording as it came (ITU-R BS.1770, in LUFS). The package encodes it at -16 LUFS by default,
        and amplifies each channel that it decodes to this loudness.
    frames_per_chunk: how many frames were made together; all F of them where the recording was not cut.
    is_padded: whether convolutions were padded; false where the recording was cut into chunks.

    ValueError for values that cannot be.
    """

    codes: np.ndarray
    sample_rate_hz: int
    num_samples: int
    loudness_db: float
    frames_per_chunk: int
    is_padded: bool

    def __post_init__(self) -> None:
        codes = self.codes
        if codes.ndim != 3 or codes.dtype.kind not in "iu":
            raise ValueError(f"codes must be integers [C, K, F], got {codes.dtype} {codes.shape}")
        if codes.size and not (codes.min() >= 0 and codes.max() < _MAX_CODEBOOK_SIZE):
            raise ValueError(f"codes must lie in 0..{_MAX_CODEBOOK_SIZE - 1}, got {codes.min()}..{codes.max()}")
        if self.sample_rate_hz < 1 or self.num_samples < 0:
            raise ValueError(f"{self.num_samples} samples at {self.sample_rate_hz} Hz are no recording")
        if not np.isfinite(self.loudness_db):
            raise ValueError(f"loudness_db must be finite, got {self.loudness_db}")
        if self.frames_per_chunk < 1 or codes.shape[2] % self.frames_per_chunk:
            raise ValueError(f"{codes.shape[2]} frames are not a number of chunks of {self.frames_per_chunk}")
        if self.is_padded and codes.shape[2] != self.frames_per_chunk:
            raise ValueError("codes in several chunks cannot have been padded")
        object.__setattr__(self, "codes", codes.astype(np.int64))


def read_dac(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> DACFile:
    """What a `.dac` file holds. ValueError unless `allow_pickle`, or where it is no such file, damaged or harmful."""
    if not allow_pickle:
        raise ValueError(f"{path} is a pickle; if you trust it, allow_pickle=True reads it")
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file")
    try:
        with open(path, "rb") as file:
            return _converted(_unpickled(file))
    except Exception as error:  # a damaged pickle, or one of something else, can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as a .dac file: {reason}") from error


def write_dac(path: str | os.PathLike[str], content: DACFile) -> None:
    """Write a `.dac` file, which the package reads; its name should end in ".dac". An old one is replaced."""
    num_channels = content.codes.shape[0]
    metadata = {
        "input_db": np.array([content.loudness_db], dtype=np.float32),
        "original_length": content.num_samples,
        "sample_rate": content.sample_rate_hz,
        "chunk_length": content.frames_per_chunk,
        "channels": num_channels,
        "padding": content.is_padded,
        "dac_version": _VERSION,
    }
    artifacts = {"codes": content.codes.astype(np.uint16), "metadata": metadata}
    with AtomicFile(path) as new:
        np.save(new.file, np.array(artifacts, dtype=object))
        new.commit()


@torch.inference_mode()
def decode_dac(codec: DACCodec, content: DACFile) -> Tensor:
    """Audio float32 [C, T] at the codec's rate, of as many samples as the recording has there, rounded up.

    Its loudness is that which was encoded; `content.loudness_db` is that of the recording. Where the decoder gives
    fewer samples, zeros follow, as the decoder of the 16 and 24 kHz models is 8 samples short.

    ValueError where the codes are not this codec's, or chunks are too short for it.
    """
    codes = torch.from_numpy(content.codes).to(codec.quantizer.device)
    num_samples = -(-content.num_samples * codec.sample_rate_hz // content.sample_rate_hz)
    if content.is_padded:
        return codec.synthesize(codec.quantizer.decode(codes), num_samples)[:, 0]
    parts = []
    for chunk in codes.split(content.frames_per_chunk, dim=2):
        parts.append(torch.tanh(_unpadded(codec.decoder, codec.quantizer.decode(chunk)))[:, 0])
    audio = torch.cat(parts, dim=1)
    return F.pad(audio, (0, num_samples - audio.shape[1]))


def _unpadded(layer: SignalLayer, x: Tensor) -> Tensor:
    """What a layer makes of [B, C, T] without padding: as far as windows are full, or as what they reach."""
    if isinstance(layer, Chain):
        for inner in layer.layers:
            x = _unpadded(inner, x)  # type: ignore[arg-type]
        return x
    if isinstance(layer, ResidualBlock):
        y = _unpadded(layer.branch, x)
        num_lost = (x.shape[2] - y.shape[2]) // 2
        return y + x[:, :, num_lost : x.shape[2] - num_lost]
    if isinstance(layer, ConvTranspose):
        return F.conv_transpose1d(x, layer.weight, layer.bias, stride=layer.stride)
    if isinstance(layer, Conv):
        if x.shape[2] < layer.window:
            raise ValueError("these chunks have too few frames to be decoded without padding")
        return F.conv1d(x, layer.weight, layer.bias, stride=layer.stride, dilation=layer.dilation)
    return cast(Tensor, layer(x))


# Reading. All stand-ins are classes with a `__setstate__`: of other objects a pickle could change the attributes.


class _Dtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name
        self.byte_order = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1]


class _Array:
    """Stands in for `numpy.ndarray` and for numpy's `_reconstruct`, whose arguments say nothing; `state` is all."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        """The array. ValueError unless it is one of numbers, with as many bytes as its shape needs."""
        _, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, _Dtype) or dtype.name not in _NUMBERS or dtype.byte_order not in ("<", ">", "|"):
            raise ValueError("it holds an array of something else than numbers")
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"it holds an array of shape {shape!r}")
        real = np.dtype(dtype.name).newbyteorder(dtype.byte_order)
        if not isinstance(data, bytes) or len(data) != prod(shape) * real.itemsize:
            raise ValueError("an array in it has more or fewer values than its shape says")
        return np.frombuffer(data, real).reshape(shape, order="F" if is_fortran else "C")


_NUMBERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
_STAND_INS = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # before numpy 2
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    """Lets in the names that arrays of numbers need, as the stand-ins above."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise ValueError(f"it asks for {module}.{name}, which no such file needs")
        return _STAND_INS[module, name]


def _unpickled(file: BinaryIO) -> Any:
    """The object in a `.npy` file of one."""
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"its .npy version is {version}")
    shape, _, dtype = read_header[version](file)
    if shape != () or dtype != np.dtype(object):
        raise ValueError(f"it is an array of {dtype} {shape}, not one object")
    array = _Unpickler(file).load()
    *_, content = array.state
    return content[0]


def _converted(artifacts: Any) -> DACFile:
    """The contents, checked."""
    metadata = artifacts["metadata"]
    if metadata.get("dac_version") != _VERSION:
        raise ValueError(f"its version is {metadata.get('dac_version')!r}, not {_VERSION!r}")
    for name in ("sample_rate", "original_length", "chunk_length", "channels"):
        if type(metadata[name]) is not int:
            raise ValueError(f"{name}={metadata[name]!r} is no whole number")
    if type(metadata["padding"]) is not bool:
        raise ValueError(f"padding={metadata['padding']!r} is neither True nor False")
    codes, loudness_db = artifacts["codes"].to_numpy(), metadata["input_db"].to_numpy()
    if codes.ndim != 3 or codes.shape[0] != metadata["channels"] or loudness_db.size != 1:
        raise ValueError(
            f"codes of shape {codes.shape} are not those of a recording of {metadata['channels']} channels"
        )
    return DACFile(
        codes=codes,
        sample_rate_hz=metadata["sample_rate"],
        num_samples=metadata["original_length"],
        loudness_db=loudness_db.item(),
        frames_per_chunk=metadata["chunk_length"],
        is_padded=metadata["padding"],
    )
