"""Audio files to `.codec` files and back, in constant memory: what `codec encode` and `codec decode` do.

Everything passes through in pieces, and no piece's size changes a bit of what comes out. Each channel is a row of the
batch. `seconds` in reports are of audio, not of the clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from codec.audio import AudioReader, AudioWriter, Resampler, fit_length
from codec.bitstream import FRAMES_PER_BLOCK, BitstreamError, Event, Header, Reader, SegmentEnd, SegmentStart, Writer
from codec.models.interface import FRAMES_PER_STEP, Codec, StreamableCodec, streamable
from codec.stretch import Stretch, StretchError
from codec.windows import WindowedDecoder, WindowedEncoder

# Called with the number of samples, at the original rate, done since the last call, and of all where that is known.
Progress = Callable[[int, int | None], None]


def encode_audio(
    codec: Codec,
    audio: AudioReader,
    target: str | os.PathLike[str] | BinaryIO,
    *,
    num_quantizers: int | None = None,
    stretch: Stretch | None = None,
    frames_per_block: int = FRAMES_PER_BLOCK,
    progress: Progress | None = None,
) -> int:
    """Encode a recording into a container and return its number of samples.

    AudioError, BitstreamError or OSError where it cannot be read or written; then a path holds what it held before.
    """
    if stretch is not None and audio.num_samples is not None:
        stretch = stretch.within(audio.num_samples)
    num_in_all = audio.num_samples if stretch is None else stretch.num_samples

    def watched() -> Iterator[np.ndarray]:
        for block in stretch_of(audio, stretch, codec):
            yield block
            if progress is not None:
                progress(block.shape[1], num_in_all)

    return encode_blocks(
        codec,
        watched(),
        target,
        rate_hz=audio.rate_hz,
        num_channels=audio.num_channels,
        num_quantizers=num_quantizers,
        frames_per_block=frames_per_block,
    )


def encode_blocks(
    codec: Codec,
    blocks: Iterable[np.ndarray],
    target: str | os.PathLike[str] | BinaryIO,
    *,
    rate_hz: int,
    num_channels: int,
    num_quantizers: int | None = None,
    frames_per_block: int = FRAMES_PER_BLOCK,
) -> int:
    """Encode audio float32 [C, n] in pieces into a container and return its number of samples."""
    _check_can_be_filed(codec)
    token_format = codec.token_format
    if token_format is None:
        raise ValueError("this codec has no id to put into a file; save it and load it")
    header = token_format.header(rate_hz=rate_hz, num_channels=num_channels, num_quantizers=num_quantizers)
    resampler = Resampler(rate_hz, codec.sample_rate_hz, num_channels)
    encoder = _encoder(codec, num_channels, len(header.codebook_sizes))
    num_samples = 0
    with Writer(target, header, tables=token_format.tables, frames_per_block=frames_per_block) as writer:
        for block in blocks:
            num_samples += block.shape[1]
            writer.write(encoder.push(resampler.push(block)))
        writer.write(encoder.push(resampler.flush()))
        writer.write(encoder.flush())
        writer.finish(num_samples)
    return num_samples


def stretch_of(audio: AudioReader, stretch: Stretch | None, codec: Codec) -> Iterator[np.ndarray]:
    """The stretch of a recording, in pieces of about one step; smaller ones where audio is still coming in."""
    frames = 16 if audio.is_live else FRAMES_PER_STEP
    block_samples = max(1, frames * codec.hop_length * audio.rate_hz // codec.sample_rate_hz // audio.num_channels)
    if stretch is None:
        yield from audio.blocks(block_samples)
        return
    audio.seek(stretch.first_sample)
    left = stretch.num_samples
    num_given = 0
    for block in audio.blocks(block_samples):
        part = block if left is None else block[:, : left - num_given]
        num_given += part.shape[1]
        yield part
        if num_given == left:
            break
    if num_given == 0:
        raise StretchError("there is nothing of the stretch asked for")


def _check_can_be_filed(codec: Codec) -> None:
    """ValueError for codecs whose tokens are more than the rows of codes that a container holds for each channel."""
    if codec.num_channels != 1 or codec.num_frames_for(10**9) != -(-(10**9) // codec.hop_length):
        raise ValueError(
            f"{codec.name} codes several channels at once, or overlapping segments, and .codec files hold neither"
        )


def _encoder(codec: Codec, num_channels: int, num_quantizers: int) -> _StepEncoder | _WindowEncoder:
    if codec.is_streamable:
        return _StepEncoder(streamable(codec), num_channels, num_quantizers)
    return _WindowEncoder(codec, num_channels, num_quantizers)


class _WindowEncoder:
    """As `_StepEncoder`, of a codec that looks ahead."""

    def __init__(self, codec: Codec, num_channels: int, num_quantizers: int) -> None:
        self._windows = WindowedEncoder(codec, num_channels, num_quantizers=num_quantizers)

    def push(self, audio: np.ndarray) -> np.ndarray:
        codes: np.ndarray = self._windows.push(torch.from_numpy(audio.copy())[:, None]).cpu().numpy()
        return codes

    def flush(self) -> np.ndarray:
        codes: np.ndarray = self._windows.flush().cpu().numpy()
        return codes


class _StepEncoder:
    """Audio [C, n] at the codec's rate in pieces of any size -> codes [C, K, F], each channel a row of the batch."""

    def __init__(self, codec: StreamableCodec, num_channels: int, num_quantizers: int) -> None:
        self._codec = codec
        self._num_quantizers = num_quantizers
        self._state = codec.encode_init(num_channels)
        self._pending = np.zeros((num_channels, 0), np.float32)
        self._device = next(codec.parameters()).device

    def push(self, audio: np.ndarray) -> np.ndarray:
        self._pending = np.concatenate([self._pending, audio], axis=1)
        hop = self._codec.hop_length
        whole = self._pending.shape[1] // hop * hop
        ready, self._pending = self._pending[:, :whole], self._pending[:, whole:]
        parts = [self._codes(torch.zeros(len(audio), self._num_quantizers, 0, dtype=torch.int64))]
        step = max(1, FRAMES_PER_STEP // len(audio)) * hop
        for first in range(0, whole, step):
            piece = torch.from_numpy(np.ascontiguousarray(ready[:, None, first : first + step])).to(self._device)
            codes, self._state = self._codec.encode_step(piece, self._state, num_quantizers=self._num_quantizers)
            parts.append(self._codes(codes))
        return np.concatenate(parts, axis=2)

    def flush(self) -> np.ndarray:
        missing = -self._pending.shape[1] % self._codec.hop_length
        last = self.push(np.zeros((len(self._pending), missing), np.float32))
        due = self._codec.encode_flush(self._state, num_quantizers=self._num_quantizers)
        return np.concatenate([last, self._codes(due)], axis=2)

    @staticmethod
    def _codes(codes: Tensor) -> np.ndarray:
        result: np.ndarray = codes.cpu().numpy()
        return result


def check_fits(codec: Codec, header: Header) -> None:
    """BitstreamError unless the codec is the one that made the file."""
    if codec.codec_id != header.codec_id:
        raise BitstreamError(
            f"it was made by {header.model} (id {header.codec_id}); this is {codec.name} (id {codec.codec_id})"
        )
    sizes = header.codebook_sizes
    claims = (header.codec_rate_hz, header.hop_length, sizes, header.num_frames_before, header.num_frames_after)
    facts = (codec.sample_rate_hz, codec.hop_length, tuple(codec.codebook_sizes[: len(sizes)]))
    if claims != (*facts, codec.decode_frames_before, codec.decode_frames_after):
        raise BitstreamError(f"its header does not fit the model that it names, {codec.name}")
    if len(sizes) not in codec.valid_num_quantizers:
        raise BitstreamError(f"{codec.name} cannot decode {len(sizes)} rows of codes")


def decode_events(codec: Codec, header: Header, events: Iterable[Event]) -> Iterator[np.ndarray]:
    """Audio float32 [C, n] at the original rate, in pieces, from what `Reader.events` gives."""
    check_fits(codec, header)
    decoder: _Decoder | None = None
    for event in events:
        if isinstance(event, SegmentStart):
            if event.global_codes is not None:
                raise BitstreamError(f"it holds global codes, which {codec.name} does not know")
            decoder = _Decoder(codec, header, event)
        elif decoder is None:
            raise BitstreamError("its codes belong to no segment")
        elif isinstance(event, SegmentEnd):
            yield decoder.finish(event.num_samples)
        else:
            yield decoder.push(event)


class _Steps:
    """Codes [B, K, F] -> audio [B, C, n], late by the decoder's delay, of a codec that streams."""

    def __init__(self, codec: StreamableCodec, batch_size: int) -> None:
        self._codec = codec
        self._state = codec.decode_init(batch_size)

    def push(self, codes: Tensor) -> Tensor:
        audio, self._state = self._codec.decode_step(codes, self._state)
        return audio

    def flush(self) -> Tensor:
        return self._codec.decode_flush(self._state)


class _Decoder:
    """Codes [C, K, F] of one segment -> audio [C, n] at the original rate."""

    def __init__(self, codec: Codec, header: Header, start: SegmentStart) -> None:
        rows = header.num_channels
        self._synthesis = _Steps(streamable(codec), rows) if codec.is_streamable else WindowedDecoder(codec, rows)
        self._header = header
        self._num_skipped = self._num_to_skip = start.skip_samples
        self._num_given = 0  # samples at the original rate that went out
        self._num_fed = 0  # samples at the codec's rate that went into the resampler
        self._num_late = codec.decode_delay_samples
        # What may lie beyond the end, which only the end tells.
        self._num_held = (1 + header.num_frames_after) * codec.hop_length
        self._held = np.zeros((header.num_channels, 0), np.float32)
        self._resampler = Resampler(codec.sample_rate_hz, header.rate_hz, header.num_channels)
        self._device = next(codec.parameters()).device

    def push(self, codes: np.ndarray) -> np.ndarray:
        parts = [self._held]
        step = max(1, FRAMES_PER_STEP // len(codes))
        for first in range(0, codes.shape[2], step):
            piece = torch.from_numpy(np.ascontiguousarray(codes[:, :, first : first + step])).to(self._device)
            parts.append(self._in_time(self._synthesis.push(piece)))
        joined = np.concatenate(parts, axis=1)
        known = max(0, joined.shape[1] - self._num_held)
        self._held = joined[:, known:]
        return self._at_original_rate(joined[:, :known])

    def finish(self, num_samples: int) -> np.ndarray:
        rest = np.concatenate([self._held, self._in_time(self._synthesis.flush())], axis=1)
        wanted = self._header.resampled(self._num_skipped + num_samples) - self._num_fed
        before = self._num_given
        last = self._at_original_rate(fit_length(rest, wanted))
        return fit_length(
            np.concatenate([last, self._unskipped(self._resampler.flush())], axis=1), num_samples - before
        )

    def _in_time(self, audio: Tensor) -> np.ndarray:
        late = min(self._num_late, audio.shape[2])
        self._num_late -= late
        result: np.ndarray = audio[:, 0, late:].cpu().numpy()
        return result

    def _at_original_rate(self, audio: np.ndarray) -> np.ndarray:
        self._num_fed += audio.shape[1]
        return self._unskipped(self._resampler.push(audio))

    def _unskipped(self, audio: np.ndarray) -> np.ndarray:
        skip = min(self._num_to_skip, audio.shape[1])
        self._num_to_skip -= skip
        self._num_given += audio.shape[1] - skip
        return audio[:, skip:]


def decode_audio(
    codec: Codec,
    container: Reader,
    target: str | os.PathLike[str] | BinaryIO,
    *,
    stretch: Stretch | None = None,
    raw: bool = False,
    progress: Progress | None = None,
) -> int:
    """Decode a container into an audio file and return its number of samples.

    AudioError, BitstreamError or OSError where it cannot be read or written; then a path holds what it held before.
    """
    header = container.header
    total: int | None = None
    if container.is_seekable:
        stretch = (stretch or Stretch()).within(container.num_samples)
        total = stretch.num_samples
    elif stretch is not None:
        raise BitstreamError("a stretch needs a file that can seek, not a pipe")
    whole = stretch is None or (stretch.first_sample == 0 and total == container.num_samples)
    events = container.events() if whole or stretch is None else container.events(stretch.first_sample, total)
    num_samples = 0
    with AudioWriter(target, header.rate_hz, header.num_channels, num_samples=total, raw=raw) as writer:
        for piece in decode_events(codec, header, events):
            writer.write(piece)
            num_samples += piece.shape[1]
            if progress is not None:
                progress(piece.shape[1], total)
        if not num_samples:
            raise BitstreamError("it holds no audio")
        writer.finish()
    return num_samples
