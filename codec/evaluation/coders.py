"""What is compared: models of this library, and Opus, Codec2 and Speex where their programs are installed.

Audio is float32 [T], one channel. Programs are fed and heard through pipes; nothing is left on disk.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from codec.audio import fit_length, resample

if TYPE_CHECKING:
    from codec.models.interface import Codec
    from codec.tokens import Tokens

MAX_DEFAULT_SETTINGS = 4
_PROGRAM_SECONDS = 600  # after which one is taken for stuck


class UsageError(ValueError):
    """What was asked for cannot be had: a codec, a rate, a metric or a program."""


@dataclass(frozen=True)
class Coded:
    """A recording, encoded and decoded.

    `packed_bits`: its codes, packed without any coding. `coded_bytes`: what the coder makes of them, without a file
    around it. `file_bytes`: all of a file. None where there is no such thing.
    """

    audio: np.ndarray  # float32 [T'] at the recording's rate, as it came: neither aligned nor cut
    encode_seconds: float
    decode_seconds: float
    packed_bits: int | None = None
    coded_bytes: int | None = None
    file_bytes: int | None = None
    codes: np.ndarray | None = None  # int64 [K, F]


class Coder(Protocol):
    """A codec with the settings, each a bit rate of it, that are measured. Travels to other processes."""

    @property
    def name(self) -> str:
        """Of the codec, without a setting."""

    @property
    def settings(self) -> tuple[int, ...]:
        """Numbers of its own: rows of codes, kbps or bps."""

    @property
    def version(self) -> str:
        """Which weights or which program."""

    def label(self, setting: int) -> str:
        """The codec at this setting, for people."""

    def code(self, audio: np.ndarray, rate_hz: int, setting: int) -> Coded:
        """Encode and decode. ValueError where the codec cannot take this recording."""


@dataclass(frozen=True)
class ModelCoder:
    """A model of this library, on the CPU and one thread."""

    name: str
    source: str
    settings: tuple[int, ...]  # rows of codes
    version: str
    codebook_sizes: tuple[int, ...]

    @property
    def codec(self) -> Codec:
        """The model, loaded once per process."""
        return _loaded(self.source)

    def label(self, setting: int) -> str:
        """With its rows, unless it has no choice of them."""
        return f"{self.name} k={setting}"

    def code(self, audio: np.ndarray, rate_hz: int, setting: int) -> Coded:
        """Whole recordings; a stereo model hears mono twice, and its channels are averaged."""
        import torch

        torch.set_num_threads(1)
        codec = self.codec
        at_rate = np.array(resample(audio[None], rate_hz, codec.sample_rate_hz), np.float32)
        batch = torch.from_numpy(at_rate).repeat(codec.num_channels, 1)[None]
        started = time.perf_counter()
        tokens = codec.encode(batch, num_quantizers=setting)
        encoded = time.perf_counter()
        decoded = codec.decode(tokens)
        done = time.perf_counter()
        heard = resample(decoded[0].float().mean(0, keepdim=True).numpy(), codec.sample_rate_hz, rate_hz)
        if decoded.shape[2] == batch.shape[2]:  # resampling there and back may have added a sample
            heard = fit_length(heard, len(audio))
        bits_per_frame = sum((size - 1).bit_length() for size in self.codebook_sizes[:setting])
        coded_bytes, file_bytes = _container_bytes(codec, tokens, rate_hz, len(audio))
        return Coded(
            audio=heard[0],
            encode_seconds=encoded - started,
            decode_seconds=done - encoded,
            packed_bits=bits_per_frame * tokens.codes.shape[2]
            + (0 if tokens.scales is None else 32 * tokens.scales.numel())
            + _global_bits(codec, tokens),
            coded_bytes=coded_bytes,
            file_bytes=file_bytes,
            codes=tokens.codes[0].numpy(),
        )


@functools.cache
def _loaded(source: str) -> Codec:
    from codec.pretrained import load

    return load(source)


def model_coders(sources: Sequence[str | os.PathLike[str]], num_quantizers: Sequence[int]) -> list[ModelCoder]:
    """The models with the settings asked for, by default up to four of theirs that include the highest.

    They are called by the last part of their source where that tells them apart. ValueError where one is not found,
    UsageError where one does not have a setting.
    """
    names = [os.fspath(source) for source in sources]
    if len(set(names)) < len(names):
        raise UsageError(f"a model is named twice: {', '.join(names)}")
    short = [Path(name).name or name for name in names]
    coders = []
    for name, tail in zip(names, short, strict=True):
        codec = _loaded(name)
        valid = tuple(codec.valid_num_quantizers)
        for setting in num_quantizers:
            if setting not in valid:
                raise UsageError(f"num_quantizers={setting} is not one of {valid}, those of {name}")
        settings = tuple(dict.fromkeys(num_quantizers)) or _spread(valid)
        shown = tail if short.count(tail) == 1 else name
        version = f"{codec.name}, id {codec.codec_id}"
        coders.append(ModelCoder(shown, name, settings, version, tuple(codec.codebook_sizes)))
    return coders


def _spread(valid: tuple[int, ...]) -> tuple[int, ...]:
    """Up to four of them, evenly spread, the last one included."""
    count = min(MAX_DEFAULT_SETTINGS, len(valid))
    return tuple(valid[len(valid) * (i + 1) // count - 1] for i in range(count))


def _global_bits(codec: Codec, tokens: Tokens) -> int:
    """Bits of the global codes, packed."""
    from codec.models.voice import voiced

    if tokens.global_codes is None:
        return 0
    return len(tokens.global_codes) * voiced(codec).num_global_bits


def _container_bytes(codec: Codec, tokens: Tokens, rate_hz: int, num_samples: int) -> tuple[int | None, int | None]:
    """Bytes of the codes as a `.codec` file holds them, and of the whole file; None where no file can hold them."""
    from codec.bitstream import Reader, Writer

    if codec.token_format is None or codec.num_channels > 1 or tokens.scales is not None:
        return None, None
    header = codec.token_format.header(rate_hz=rate_hz, num_quantizers=tokens.codes.shape[1])
    if tokens.codes.shape[2] != header.num_frames_for(num_samples):
        return None, None  # segments that overlap
    file = io.BytesIO()
    start = codec.token_format.segment_start(None if tokens.global_codes is None else tokens.global_codes.numpy())
    with Writer(file, header, tables=codec.token_format.tables, start=start) as writer:
        writer.write(tokens.codes.numpy())
        writer.finish(num_samples)
    num_bytes = file.tell()
    file.seek(0)
    reader = Reader(file, tables=codec.token_format.tables)
    for _ in reader.events(decode=False):
        pass
    return reader.num_code_bytes, num_bytes


@dataclass(frozen=True)
class OpusCoder:
    """Opus by `opusenc` and `opusdec`, variable bit rate, all else as they choose. Settings are kbps."""

    settings: tuple[int, ...]
    version: str = ""
    name: str = "Opus"

    def label(self, setting: int) -> str:
        """With its target in kbps."""
        return f"Opus {setting} kbps"

    def code(self, audio: np.ndarray, rate_hz: int, setting: int) -> Coded:
        """At the nearest rate above that Opus knows."""
        opus_hz = next((rate for rate in (8000, 12000, 16000, 24000) if rate >= rate_hz), 48000)
        samples = _to_pcm(audio, rate_hz, opus_hz)
        raw = ("--raw", "--raw-rate", str(opus_hz), "--raw-chan", "1")
        file, encode_seconds = _run(("opusenc", "--quiet", *raw, "--bitrate", str(setting), "-", "-"), samples)
        decode = ("opusdec", "--quiet", "--float", "--rate", str(opus_hz), "-", "-")
        pcm, decode_seconds = _run(decode, file)
        return Coded(
            audio=_from_pcm(pcm, "<f4", len(audio), rate_hz, opus_hz),
            encode_seconds=encode_seconds,
            decode_seconds=decode_seconds,
            coded_bytes=ogg_packet_bytes(file),
            file_bytes=len(file),
        )


@dataclass(frozen=True)
class SpeexCoder:
    """Speex wide-band by `speexenc` and `speexdec`. Settings are kbps: the highest rate not above is taken."""

    settings: tuple[int, ...]
    version: str = ""
    name: str = "Speex"

    def label(self, setting: int) -> str:
        """With its target in kbps."""
        return f"Speex {setting} kbps"

    def code(self, audio: np.ndarray, rate_hz: int, setting: int) -> Coded:
        """At 16 kHz."""
        samples = _to_pcm(audio, rate_hz, 16000)
        raw = ("--wideband", "--rate", "16000", "--16bit", "--le")
        file, encode_seconds = _run(("speexenc", *raw, "--bitrate", str(1000 * setting), "-", "-"), samples)
        pcm, decode_seconds = _run(("speexdec", "-", "-"), file)
        return Coded(
            audio=_from_pcm(pcm, "<i2", len(audio), rate_hz, 16000),
            encode_seconds=encode_seconds,
            decode_seconds=decode_seconds,
            coded_bytes=ogg_packet_bytes(file),
            file_bytes=len(file),
        )


@dataclass(frozen=True)
class Codec2Coder:
    """Codec2 by `c2enc` and `c2dec`. Settings are its modes in bps; each frame is filled up to whole bytes."""

    settings: tuple[int, ...]
    version: str = ""
    name: str = "Codec2"

    def label(self, setting: int) -> str:
        """With its mode."""
        return f"Codec2 {setting}"

    def code(self, audio: np.ndarray, rate_hz: int, setting: int) -> Coded:
        """At 8 kHz; it drops the last frame where that is not whole."""
        mode = "700C" if setting == 700 else str(setting)
        file, encode_seconds = _run(("c2enc", mode, "-", "-"), _to_pcm(audio, rate_hz, 8000))
        pcm, decode_seconds = _run(("c2dec", mode, "-", "-"), file)
        return Coded(
            audio=_from_pcm(pcm, "<i2", len(audio), rate_hz, 8000),
            encode_seconds=encode_seconds,
            decode_seconds=decode_seconds,
            coded_bytes=len(file),
            file_bytes=len(file),
        )


_PROGRAMS = {"opus": ("opusenc", "opusdec"), "speex": ("speexenc", "speexdec"), "codec2": ("c2enc", "c2dec")}
_CLASSICS: dict[str, type[OpusCoder] | type[SpeexCoder] | type[Codec2Coder]] = {
    "opus": OpusCoder,
    "speex": SpeexCoder,
    "codec2": Codec2Coder,
}
_RATES: dict[str, Sequence[int]] = {
    "opus": range(6, 257),
    "speex": range(4, 43),
    "codec2": (3200, 2400, 1600, 1400, 1300, 1200, 700),
}


def classic_coder(kind: str, settings: Sequence[int]) -> OpusCoder | SpeexCoder | Codec2Coder:
    """`opus` or `speex` (kbps), or `codec2` (bps). UsageError where its programs are missing or a rate is unknown."""
    name = kind.capitalize()
    for program in _PROGRAMS[kind]:
        if shutil.which(program) is None:
            raise UsageError(f"{name} needs the program {program}, which is not installed")
    rates = _RATES[kind]
    for setting in settings:
        if setting not in rates:
            allowed = f"{rates[0]} to {rates[-1]} kbps" if isinstance(rates, range) else ", ".join(map(str, rates))
            raise UsageError(f"{name} has no rate {setting} (there are: {allowed})")
    return _CLASSICS[kind](tuple(dict.fromkeys(settings)), _program_version(_PROGRAMS[kind][0]))


def _program_version(program: str) -> str:
    """What it says of itself in its first line, where it knows a version."""
    if program == "c2enc":
        return "c2enc (it tells no version)"
    done = subprocess.run([program, "--version"], capture_output=True, check=False, timeout=_PROGRAM_SECONDS)
    return (done.stdout.decode(errors="replace").splitlines() or [program])[0]


def _run(command: tuple[str, ...], data: bytes) -> tuple[bytes, float]:
    """What a program makes of its standard input, and its seconds from start to end. ValueError where it fails."""
    started = time.perf_counter()
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=False, timeout=_PROGRAM_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{command[0]} did not end within {_PROGRAM_SECONDS} s") from error
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"{command[0]} failed: {said[-1] if said else f'status {done.returncode}, no output'}")
    return done.stdout, time.perf_counter() - started


def _to_pcm(audio: np.ndarray, rate_hz: int, to_hz: int) -> bytes:
    at_rate = resample(audio[None], rate_hz, to_hz)[0]
    samples: np.ndarray = np.clip(np.round(at_rate * 32768.0), -32768, 32767).astype("<i2")
    return samples.tobytes()


def _from_pcm(data: bytes, dtype: str, num_samples: int, rate_hz: int, from_hz: int) -> np.ndarray:
    """Samples at the recording's rate; `num_samples` of them where only resampling has added one."""
    samples = np.frombuffer(data[: len(data) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize], dtype)
    audio = samples.astype(np.float32) / (32768.0 if dtype == "<i2" else 1.0)
    back: np.ndarray = resample(audio[None], from_hz, rate_hz)[0]
    most_added = -(-rate_hz // from_hz)
    return back[:num_samples] if num_samples <= len(back) <= num_samples + most_added else back


def ogg_packet_bytes(data: bytes, num_header_packets: int = 2) -> int:
    """Bytes of the packets in an Ogg file, but for the first ones: what the codec made, without Ogg's own.

    Source: RFC 3533, section 6: pages begin with 27 bytes and a table of segments; a packet ends with one below 255.
    """
    at, num_packets, num_bytes = 0, 0, 0
    while at < len(data):
        if data[at : at + 4] != b"OggS":
            raise ValueError("the program made no Ogg file")
        num_segments = data[at + 26]
        table = data[at + 27 : at + 27 + num_segments]
        for size in table:
            num_bytes += size if num_packets >= num_header_packets else 0
            num_packets += size < 255
        at += 27 + num_segments + sum(table)
    return num_bytes
