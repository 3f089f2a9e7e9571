"""Audio files to `.codec` files and back, in constant memory: what `codec encode`, `decode` and `convert` do.

Everything passes through in pieces, and no piece's size changes a bit of what comes out. Each channel is a row of the
batch. `seconds` in reports are of audio, not of the clock.

Letters: C channels, n samples, K rows of codes, F frames, L global codes of codecs that keep the voice apart.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from codec.audio import AudioReader, AudioWriter, Resampler, fit_length
from codec.bitstream import FRAMES_PER_BLOCK, BitstreamError, Event, Header, Reader, SegmentEnd, SegmentStart, Writer
from codec.models.interface import FRAMES_PER_STEP, UNLIMITED, Codec, StreamableCodec, streamable
from codec.models.voice import VoicedCodec, voiced
from codec.streaming.concealment import Concealer
from codec.stretch import Stretch, StretchError
from codec.token_format import TokenFormat
from codec.windows import WindowedDecoder, WindowedEncoder

# Called with the number of samples, at the original rate, done since the last call, and of all where that is known.
Progress = Callable[[int, int | None], None]


def encode_audio(
    codec: Codec,
    audio: AudioReader,
    target: str | os.PathLike[str] | BinaryIO,
    *,
    num_quantizers: int | None = None,
    global_codes: np.ndarray | None = None,
    stretch: Stretch | None = None,
    frames_per_block: int = FRAMES_PER_BLOCK,
    progress: Progress | None = None,
) -> int:
    """Encode a recording into a container and return its number of samples; `global_codes` as for `encode_blocks`.

    AudioError, BitstreamError or OSError where it cannot be read or written; then a path holds what it held before.
    """
    blocks, _ = _watched(codec, audio, stretch, progress)
    return encode_blocks(
        codec,
        blocks,
        target,
        rate_hz=audio.rate_hz,
        num_channels=audio.num_channels,
        num_quantizers=num_quantizers,
        global_codes=global_codes,
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
    global_codes: np.ndarray | None = None,
    frames_per_block: int = FRAMES_PER_BLOCK,
) -> int:
    """Encode audio float32 [C, n] in pieces into a container and return its number of samples.

    `global_codes` int64 [L] give all channels one voice, and can be written at once. Without them the beginning of each
    channel says its voice, and waits until that has been heard.
    """
    token_format = _format_of(codec)
    header = token_format.header(rate_hz=rate_hz, num_channels=num_channels, num_quantizers=num_quantizers)
    num_samples = 0
    events = encode_events(codec, header, blocks, global_codes=global_codes)
    start = next(events)
    assert isinstance(start, SegmentStart)
    with Writer(target, header, tables=token_format.tables, start=start, frames_per_block=frames_per_block) as writer:
        for event in events:
            if isinstance(event, np.ndarray):
                writer.write(event)
            elif isinstance(event, SegmentEnd):
                num_samples = event.num_samples
        writer.finish(num_samples)
    return num_samples


def encode_events(
    codec: Codec, header: Header, blocks: Iterable[np.ndarray], *, global_codes: np.ndarray | None = None
) -> Iterator[Event]:
    """Audio float32 [C, n] in pieces, at the original rate -> what a container of it holds, as `Reader.events` tells.

    `global_codes` as for `encode_blocks`.
    """
    token_format = _format_of(codec)
    resampler = Resampler(header.rate_hz, codec.sample_rate_hz, header.num_channels)
    num_samples = 0

    def resampled() -> Iterator[np.ndarray]:
        nonlocal num_samples
        for block in blocks:
            num_samples += block.shape[1]
            yield resampler.push(block)
        yield resampler.flush()

    audio, voices = resampled(), None
    if global_codes is not None:
        voiced(codec)
        voices = np.broadcast_to(global_codes, (header.num_channels, *global_codes.shape))
    elif isinstance(codec, VoicedCodec):
        voices, audio = _with_voices(codec, audio, header.num_channels)
    encoder = _encoder(codec, header.num_channels, len(header.codebook_sizes))
    yield token_format.segment_start(voices, num_channels=header.num_channels)
    for block in audio:
        yield encoder.push(block)
    yield encoder.flush()
    yield SegmentEnd(num_samples)


def hear_voice(codec: Codec, audio: AudioReader) -> np.ndarray:
    """The global codes int64 [L] of a reference of any rate, its channels averaged, from its beginning on.

    A codec that streams reads no more of it than it hears. ValueError where the codec has no global codes, AudioError
    where the reference cannot be read.
    """
    speaker = voiced(codec)
    resampler = Resampler(audio.rate_hz, codec.sample_rate_hz, 1)

    def resampled() -> Iterator[np.ndarray]:
        for block in stretch_of(audio, None, codec):
            yield resampler.push(block.mean(axis=0, keepdims=True, dtype=np.float32))
        yield resampler.flush()

    voices, _ = _with_voices(speaker, resampled(), 1)
    of_reference: np.ndarray = voices[0]
    return of_reference


def _with_voices(
    codec: VoicedCodec, audio: Iterator[np.ndarray], num_channels: int
) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """The global codes int64 [C, L] of audio [C, n] at the codec's rate, and all of that audio again."""
    # Codecs that look ahead may have to know a whole recording, for its loudness; those that stream must not.
    wanted = codec.voice_samples if codec.is_streamable else UNLIMITED
    heard, num_heard = [np.zeros((num_channels, 0), np.float32)], 0
    for block in audio:
        heard.append(block)
        num_heard += block.shape[1]
        if num_heard >= wanted:
            break
    beginning = np.concatenate(heard, axis=1)
    reference = torch.from_numpy(beginning[:, None]).to(next(codec.parameters()).device)
    return codec.encode_global(reference).cpu().numpy(), itertools.chain([beginning], audio)


def _watched(
    codec: Codec, audio: AudioReader, stretch: Stretch | None, progress: Progress | None
) -> tuple[Iterator[np.ndarray], int | None]:
    """The stretch of a recording, in pieces, as `progress` is told, and its number of samples where that is known."""
    if stretch is not None and audio.num_samples is not None:
        stretch = stretch.within(audio.num_samples)
    num_in_all = audio.num_samples if stretch is None else stretch.num_samples

    def watched() -> Iterator[np.ndarray]:
        for block in stretch_of(audio, stretch, codec):
            yield block
            if progress is not None:
                progress(block.shape[1], num_in_all)

    return watched(), num_in_all


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


def _format_of(codec: Codec) -> TokenFormat:
    """What files with its codes say. ValueError where tokens are more than a container holds for each channel."""
    if codec.num_channels != 1 or codec.num_frames_for(10**9) != -(-(10**9) // codec.hop_length):
        raise ValueError(
            f"{codec.name} codes several channels at once, or overlapping segments, and .codec files hold neither"
        )
    if codec.token_format is None:
        raise ValueError("this codec has no id to put into a file; save it and load it")
    return codec.token_format


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


def decode_events(
    codec: Codec,
    header: Header,
    events: Iterable[Event],
    *,
    num_quantizers: int | None = None,
    global_codes: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Audio float32 [C, n] at the original rate, in pieces, from what `Reader.events` gives.

    `num_quantizers`: rows of codes to decode, by default all that are there. `global_codes` int64 [L]: another voice,
    for all channels. ValueError where the codec has none, BitstreamError for all else that does not fit together.
    Blocks whose codes are -1 were lost (`codec.salvage`), and are concealed.
    """
    check_fits(codec, header)
    num_there = len(header.codebook_sizes)
    num_rows = num_there if num_quantizers is None else num_quantizers
    if num_rows > num_there or num_rows not in codec.valid_num_quantizers:
        raise BitstreamError(f"num_quantizers={num_rows} cannot be had of its {num_there} rows of codes")
    if global_codes is not None:
        voiced(codec)
    decoder: _Decoder | None = None
    for event in events:
        if isinstance(event, SegmentStart):
            voices = voices_of(codec, event, header.num_channels, global_codes)
            decoder = _Decoder(codec, header, event.skip_samples, voices)
        elif decoder is None:
            raise BitstreamError("its codes belong to no segment")
        elif isinstance(event, SegmentEnd):
            yield decoder.finish(event.num_samples)
        else:
            yield decoder.push(event[:, :num_rows])


def voices_of(codec: Codec, start: SegmentStart, num_channels: int, global_codes: np.ndarray | None) -> Tensor | None:
    """Global codes [C, L] for the channels of a segment: its own, unless others [L] are given; None for codecs without.

    BitstreamError where its own are missing, or none of this codec's.
    """
    if not isinstance(codec, VoicedCodec):
        if start.global_codes is not None:
            raise BitstreamError(f"it holds global codes, which {codec.name} does not know")
        return None
    if global_codes is not None:
        return torch.from_numpy(global_codes).expand(num_channels, -1)
    wanted = f"{codec.num_global_codes} global codes of {codec.global_codebook_size}"
    if start.global_codes is None:
        raise BitstreamError(f"it holds no global codes, and {codec.name} needs {wanted}: they say the voice")
    found = (start.global_codes.shape[1], start.global_codebook_size)
    if found != (codec.num_global_codes, codec.global_codebook_size):
        raise BitstreamError(f"it holds {found[0]} global codes of {found[1]}, and {codec.name} has {wanted}")
    return torch.from_numpy(start.global_codes)


class _Steps:
    """Codes [B, K, F] -> audio [B, C, n], late by the decoder's delay, of a codec that streams."""

    def __init__(self, codec: StreamableCodec, batch_size: int, global_codes: Tensor | None) -> None:
        self._codec = codec
        self._state = codec.decode_init(batch_size, global_codes)

    def push(self, codes: Tensor) -> Tensor:
        audio, self._state = self._codec.decode_step(codes, self._state)
        return audio

    def flush(self) -> Tensor:
        return self._codec.decode_flush(self._state)


class _Decoder:
    """Codes [C, K, F] of one segment -> audio [C, n] at the original rate, in the voices of global codes [C, L]."""

    def __init__(self, codec: Codec, header: Header, skip_samples: int, global_codes: Tensor | None) -> None:
        rows = header.num_channels
        self._synthesis = (
            _Steps(streamable(codec), rows, global_codes)
            if codec.is_streamable
            else WindowedDecoder(codec, rows, global_codes=global_codes)
        )
        self._header = header
        self._num_skipped = self._num_to_skip = skip_samples
        self._num_given = 0  # samples at the original rate that went out
        self._num_fed = 0  # samples at the codec's rate that went into the resampler
        self._num_late = codec.decode_delay_samples
        # What may lie beyond the end, which only the end tells.
        self._num_held = (1 + header.num_frames_after) * codec.hop_length
        self._held = np.zeros((header.num_channels, 0), np.float32)
        self._resampler = Resampler(codec.sample_rate_hz, header.rate_hz, header.num_channels)
        self._device = next(codec.parameters()).device
        self._concealer = Concealer.of(codec)

    def push(self, codes: np.ndarray) -> np.ndarray:
        """Real codes, or -1 throughout: those were lost."""
        parts = [self._held]
        step = max(1, FRAMES_PER_STEP // len(codes))
        for first in range(0, codes.shape[2], step):
            piece = torch.from_numpy(np.ascontiguousarray(codes[:, :, first : first + step])).to(self._device)
            if piece[0, 0, 0] < 0:
                # In place: windows want as many rows of codes in all pieces.
                instead, self._concealer = self._concealer.lost(piece.shape[2])
                piece[:, : instead.shape[-2]] = instead
            else:
                self._concealer = self._concealer.heard(piece)
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
        audio, self._concealer = self._concealer.shape(audio[:, 0, late:])
        result: np.ndarray = audio.cpu().numpy()
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
    num_quantizers: int | None = None,
    global_codes: np.ndarray | None = None,
    stretch: Stretch | None = None,
    raw: bool = False,
    progress: Progress | None = None,
) -> int:
    """Decode a container into an audio file and return its number of samples; `decode_events` tells what may be asked.

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
        for piece in decode_events(codec, header, events, num_quantizers=num_quantizers, global_codes=global_codes):
            writer.write(piece)
            num_samples += piece.shape[1]
            if progress is not None:
                progress(piece.shape[1], total)
        if not num_samples:
            raise BitstreamError("it holds no audio")
        writer.finish()
    return num_samples


def convert_audio(
    codec: Codec,
    audio: AudioReader,
    target: str | os.PathLike[str] | BinaryIO,
    *,
    global_codes: np.ndarray,
    num_quantizers: int | None = None,
    stretch: Stretch | None = None,
    progress: Progress | None = None,
) -> int:
    """What a recording says in the voice of `global_codes` int64 [L], as an audio file; returns its number of samples.

    It goes through `num_quantizers` rows of codes, by default those that know nothing of the voice. AudioError,
    BitstreamError or OSError where it cannot be read or written; then a path holds what it held before.
    """
    num_rows = voiced(codec).num_semantic_quantizers if num_quantizers is None else num_quantizers
    rate_hz, num_channels = audio.rate_hz, audio.num_channels
    header = _format_of(codec).header(rate_hz=rate_hz, num_channels=num_channels, num_quantizers=num_rows)
    blocks, total = _watched(codec, audio, stretch, progress)
    total = None if audio.num_samples is None else total  # a pipe may end before the stretch does
    num_samples = 0
    with AudioWriter(target, rate_hz, num_channels, num_samples=total) as writer:
        events = encode_events(codec, header, blocks, global_codes=global_codes)
        for piece in decode_events(codec, header, events):
            writer.write(piece)
            num_samples += piece.shape[1]
        writer.finish()
    return num_samples
