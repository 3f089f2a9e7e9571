"""Whether a model keeps its promise of equal bits on given recordings; what `codec verify` does.

A recording is encoded alone, and again in ways that should not matter: in a batch, padded, as a stream, as one of the
streams of a pool, with other implementations of the residual search, with other numbers of threads. Its codes are
decoded likewise. Alone, in one go, is what the others are compared with. The global codes of codecs that keep the voice
apart are compared, too.

Letters: C channels, T samples, K rows of codes, F frames, L global codes.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.audio import Resampler, find_audio
from codec.batch import progress_bar
from codec.jobs import Options, UserError, load_model, named, open_audio, reason_of
from codec.kernels.residual_search import Search, available_impls, rvq_margins, search_with, searches_seen
from codec.models.interface import UNLIMITED, Codec
from codec.streaming import StreamingDecoder, StreamingEncoder, StreamPool
from codec.tokens import Tokens
from codec.transcode import stretch_of
from codec.windows import WindowedDecoder, WindowedEncoder

# Longer recordings are taken as several, one after the other, so that memory does not grow. Longer than a window of
# `codec.windows`, for otherwise there would be nothing to see of them.
FRAMES_PER_PIECE = 1024
_DIFFERENCES_SHOWN = 20
_GLOBAL = "global codes"
_BATCH, _PADDED, _STREAM, _WINDOWS = "in a batch of 3", "padded, beside a longer one", "streamed", "in windows"
_POOL = "in a pool of 3"


@dataclass(frozen=True)
class CodeDifference:
    """A code that is another one than alone. `margin`: see `rvq_margins`; None where the quantizer searches nothing."""

    file: str
    way: str
    frame: int
    row: int
    code: int
    other_code: int
    margin: float | None


@dataclass
class Way:
    """How often a way of encoding (`kind` "codes", or "global codes") or decoding ("audio") gave something else.

    num_compared: frames, global codes, or samples of all channels. num_different: codes, or samples.
    largest: of a code that differs while the coarser ones of its frame do not, the largest margin: what rounding
    explains is about 1e-6 or less. Of samples, the largest difference. None where there is none.
    """

    kind: str
    name: str
    is_promised: bool
    num_compared: int = 0
    num_different: int = 0
    largest: float | None = None

    def add(self, num_compared: int, num_different: int, largest: float | None) -> None:
        """Count another piece."""
        self.num_compared += num_compared
        self.num_different += num_different
        if largest is not None:
            self.largest = largest if self.largest is None else max(self.largest, largest)


@dataclass
class Verification:
    """What was found. `failures`: files that could not be used, and why."""

    model: str
    codec_id: str
    num_quantizers: int
    num_threads: int
    num_files: int = 0
    seconds: float = 0.0
    smallest_margin: float | None = None
    ways: list[Way] = field(default_factory=list)
    differences: list[CodeDifference] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def broken_promises(self) -> list[Way]:
        """The ways that gave something else although they promise not to."""
        return [way for way in self.ways if way.is_promised and way.num_different]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"seconds": round(self.seconds, 6), "is_promise_kept": not self.broken_promises}


def verify(sources: Sequence[str], options: Options, *, thread_counts: Sequence[int] = ()) -> Verification:
    """Compare all ways on audio files, and on all that are in folders. A file that cannot be used is a failure of it.

    `thread_counts`: numbers of threads to try beside that of the options. UserError or ValueError where there is
    nothing to compare, or the model cannot be loaded.
    """
    files = [file for source in sources for file in _files(source)]
    codec = load_model(options.model, options)
    verifier = Verifier(codec, num_quantizers=options.num_quantizers, thread_counts=thread_counts)
    result = verifier.result
    with progress_bar() as advance:
        for file in files:
            try:
                num_frames = 0
                for audio in _pieces(file, codec, options):
                    num_frames += verifier.add(file, audio, first_frame=num_frames)
                    result.seconds += audio.shape[1] / codec.sample_rate_hz
                result.num_files += 1
            except (UserError, ValueError, OSError, MemoryError) as error:
                result.failures[file] = reason_of(error)
            advance(1, len(files))
    return result


def _files(source: str) -> list[str]:
    return [str(file) for file in find_audio(Path(source))] if os.path.isdir(source) else [source]


def _pieces(source: str, codec: Codec, options: Options) -> Iterator[Tensor]:
    """A recording as the codec takes it, float32 [C, T], in pieces of `FRAMES_PER_PIECE` and a last one."""
    with open_audio(source, options) as reader, named(source):
        if reader.num_channels not in (1, codec.num_channels) and codec.num_channels > 1:
            raise UserError(f"{source} has {reader.num_channels} channels, and {codec.name} codes {codec.num_channels}")
        stretch = options.stretch(reader.rate_hz)
        if stretch is not None and reader.num_samples is not None:
            stretch = stretch.within(reader.num_samples)
        resampler = Resampler(reader.rate_hz, codec.sample_rate_hz, codec.num_channels)
        piece_samples = FRAMES_PER_PIECE * codec.hop_length
        kept = np.zeros((codec.num_channels, 0), np.float32)

        def resampled() -> Iterator[np.ndarray]:
            for block in stretch_of(reader, stretch, codec):
                mixed = block.mean(0, keepdims=True, dtype=np.float32) if codec.num_channels == 1 else block
                yield resampler.push(np.ascontiguousarray(np.broadcast_to(mixed, (codec.num_channels, block.shape[1]))))
            yield resampler.flush()

        for block in resampled():
            kept = np.concatenate([kept, block], axis=1)
            while kept.shape[1] >= piece_samples:
                yield torch.from_numpy(kept[:, :piece_samples].copy())
                kept = kept[:, piece_samples:]
        if kept.shape[1]:
            yield torch.from_numpy(kept)


class Verifier:
    """Compares all ways on recordings that are given one by one, and collects what differs in `result`.

    It compares with the number of threads that PyTorch has; `thread_counts` are others to try. ValueError where
    `num_quantizers` is no number of code rows that the codec has.

    >>> from codec.testing import tiny_codec
    >>> verifier = Verifier(tiny_codec())
    >>> verifier.add("noise", torch.rand(1, 1000) - 0.5)
    16
    >>> verifier.result.broken_promises
    []
    """

    def __init__(self, codec: Codec, *, num_quantizers: int | None = None, thread_counts: Sequence[int] = ()) -> None:
        self._codec = codec
        self._num_quantizers = codec.quantizer.check_num_quantizers(num_quantizers)
        is_on_cpu = next(codec.parameters()).device.type == "cpu"
        self._thread_counts = sorted(set(thread_counts) - {torch.get_num_threads()}) if is_on_cpu else []
        self._ways: dict[tuple[str, str], Way] = {}
        self.result = Verification(codec.name, codec.codec_id, self._num_quantizers, torch.get_num_threads())

    @torch.inference_mode()
    def add(self, name: str, audio: Tensor, *, first_frame: int = 0) -> int:
        """Compare all ways on audio float32 [C, T], and return its number of frames.

        `first_frame`: where it begins in the file of this name. ValueError where the codec cannot take it.
        """
        audio = audio.to(next(self._codec.parameters()).device)[None]
        with searches_seen() as searches:
            alone = self._encode(audio)
        margins_FK = _margins(searches, alone.codes[0])
        if margins_FK is not None and margins_FK.numel():
            smallest = float(margins_FK.min())
            before = self.result.smallest_margin
            self.result.smallest_margin = smallest if before is None else min(before, smallest)
        batches = {_BATCH: self._in_a_batch(audio), _PADDED: self._padded(audio)}
        for way, codes_KF, voice_L in self._other_codes(audio, batches, does_search=bool(searches)):
            self._compare_codes(name, way, alone.codes[0], codes_KF, margins_FK, first_frame)
            if voice_L is not None and alone.global_codes is not None:
                self._way(_GLOBAL, way).add(len(voice_L), int((voice_L != alone.global_codes[0]).sum()), None)
        heard = self._codec.decode(alone)[0]
        for way, other in self._other_audio(alone, batches):
            differing = heard != other
            num_different = int(differing.sum())
            largest = float((heard - other).abs().max()) if num_different else None
            self._way("audio", way).add(heard.numel(), num_different, largest)
        return alone.codes.shape[2]

    def _encode(self, audio: Tensor, num_samples: Tensor | None = None) -> Tokens:
        return self._codec.encode(audio, num_samples, num_quantizers=self._num_quantizers)

    def _in_a_batch(self, audio: Tensor) -> Tokens:
        """The recording, as row 1, among others of its length: itself backwards, and later and softer."""
        return self._encode(torch.cat([audio.flip(2), audio, -0.5 * audio.roll(audio.shape[2] // 3, 2)]))

    def _padded(self, audio: Tensor) -> Tokens:
        """The recording, as row 1, with padding, for row 0 is longer."""
        longer = torch.cat([audio.flip(2), audio[:, :, : 5 * self._codec.hop_length + 3]], dim=2)
        num_samples = torch.tensor([longer.shape[2], audio.shape[2]], device=audio.device)
        padded = torch.nn.functional.pad(audio, (0, longer.shape[2] - audio.shape[2]))
        return self._encode(torch.cat([longer, padded]), num_samples)

    def _other_codes(
        self, audio: Tensor, batches: dict[str, Tokens], *, does_search: bool
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Each way's codes [K, F] of the recording, and its global codes [L] where they are found in that way."""
        num_frames = self._codec.num_frames_for(audio.shape[2])
        for way, tokens in batches.items():
            yield way, tokens.codes[1, :, :num_frames], _voice_of(tokens, 1)
        if self._codec.is_streamable:
            encoder = StreamingEncoder(self._codec, num_quantizers=self._num_quantizers)
            chunks = audio[0].split(_random_sizes(audio.shape[2], 16 * self._codec.hop_length), dim=1)
            codes_KF = torch.cat([*map(encoder.push, chunks), encoder.flush()], dim=1)
            yield _STREAM, codes_KF, encoder.global_codes
            yield _POOL, *self._in_a_pool("encode", [audio[0], audio[0].flip(1), -0.5 * audio[0]])
        elif self._works_in_windows:
            windows = WindowedEncoder(self._codec, 1, num_quantizers=self._num_quantizers)
            yield _WINDOWS, torch.cat([windows.push(audio.cpu()), windows.flush()], dim=2)[0], None
        for impl in available_impls(audio.device.type) if does_search else ():
            with search_with(impl):
                yield f"search {impl!r}", self._encode(audio).codes[0], None
        for count in self._thread_counts:
            with _threads(count):
                tokens = self._encode(audio)
                yield _counted(count, "thread"), tokens.codes[0], _voice_of(tokens, 0)

    def _other_audio(self, alone: Tokens, batches: dict[str, Tokens]) -> Iterator[tuple[str, Tensor]]:
        """Each way's audio [C, T] of the tokens that the recording has alone."""
        num_samples, num_frames = int(alone.num_samples[0]), alone.codes.shape[2]
        for way, tokens in batches.items():
            batch = replace(tokens, codes=tokens.codes.clone())
            batch.codes[1, :, :num_frames] = alone.codes[0]
            if tokens.global_codes is not None and alone.global_codes is not None:
                voices = tokens.global_codes.clone()
                voices[1] = alone.global_codes[0]
                batch = batch.with_voice(voices)
            yield way, self._codec.decode(batch)[1, :, :num_samples]
        if self._codec.is_streamable:
            decoder = StreamingDecoder(self._codec, global_codes=alone.global_codes)
            chunks = alone.codes[0].split(_random_sizes(num_frames, 16), dim=1)
            yield _STREAM, torch.cat([*map(decoder.push, chunks), decoder.flush()], dim=1)[:, :num_samples]
            codes_KF = alone.codes[0]
            heard, _ = self._in_a_pool("decode", [codes_KF, codes_KF.flip(1), codes_KF[:, 1:]], alone.global_codes)
            yield _POOL, heard.to(codes_KF.device)[:, :num_samples]
        elif self._works_in_windows:
            windows = WindowedDecoder(self._codec, 1, global_codes=alone.global_codes)
            heard = torch.cat([windows.push(alone.codes), windows.flush()], dim=2)
            yield _WINDOWS, heard[0, :, :num_samples]
        for count in self._thread_counts:
            with _threads(count):
                yield _counted(count, "thread"), self._codec.decode(alone)[0]

    def _in_a_pool(
        self, direction: str, inputs: Sequence[Tensor], voice: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What a pool gives for the first of these streams, and its global codes; each gets pieces of its own sizes."""
        pool = StreamPool(self._codec, direction, capacity=len(inputs))
        num_quantizers = self._num_quantizers if direction == "encode" else None
        numbers = [pool.open(num_quantizers=num_quantizers, global_codes=voice) for _ in inputs]
        largest = 16 if direction == "decode" else 16 * self._codec.hop_length
        sizes = [_random_sizes(whole.shape[1], largest, seed=seed) for seed, whole in enumerate(inputs)]
        pieces = [deque(whole.split(of_one, dim=1)) for whole, of_one in zip(inputs, sizes, strict=True)]
        outputs = []
        while pool.is_open(numbers[0]):
            for number, waiting in zip(numbers, pieces, strict=True):
                if waiting:
                    pool.push(number, waiting.popleft())
            if not pieces[0]:
                pool.end(numbers[0])
                voice = pool.global_codes(numbers[0])
            while pool.wait(0):
                outputs.append(pool.step().get(numbers[0]))
        return torch.cat([output for output in outputs if output is not None], dim=1), voice

    @property
    def _works_in_windows(self) -> bool:
        """Whether `codec encode` would cut the recording. Codecs that code overlapping segments are not meant."""
        is_limited = max(self._codec.encode_samples_before, self._codec.encode_delay_samples) < UNLIMITED
        return is_limited and self._codec.num_frames_for(10**9) == -(-(10**9) // self._codec.hop_length)

    def _compare_codes(
        self, file: str, way: str, codes_KF: Tensor, others_KF: Tensor, margins_FK: Tensor | None, first_frame: int
    ) -> None:
        """Count the codes that differ, and note them."""
        num_frames = codes_KF.shape[1]
        differing_FK = (codes_KF != others_KF).T
        largest = None
        for frame, row in differing_FK.nonzero().tolist():
            margin = None if margins_FK is None else float(margins_FK[frame, row])
            code, other = int(codes_KF[row, frame]), int(others_KF[row, frame])
            self.result.differences.append(CodeDifference(file, way, first_frame + frame, row, code, other, margin))
            if margin is not None and not differing_FK[frame, :row].any():
                largest = margin if largest is None else max(largest, margin)
        self._way("codes", way).add(num_frames, int(differing_FK.sum()), largest)

    def _way(self, kind: str, name: str) -> Way:
        if (kind, name) not in self._ways:
            # Equal latents have equal codes in every model; that latents are equal only some promise.
            is_of_search = name.startswith("search ")
            is_of_model = name in (_BATCH, _PADDED, _STREAM, _POOL) and self._codec.is_bit_exact
            self._ways[kind, name] = Way(kind, name, is_of_search or is_of_model)
            self.result.ways.append(self._ways[kind, name])
        return self._ways[kind, name]


def _voice_of(tokens: Tokens, row: int) -> Tensor | None:
    """The global codes [L] of a row, where there are any."""
    return None if tokens.global_codes is None else tokens.global_codes[row]


def _margins(searches: list[Search], codes_KF: Tensor) -> Tensor | None:
    """Margins [F, K] of codes that came from these searches, one after the other; None where they did not."""
    num_frames = codes_KF.shape[1]
    if not searches or any(search.codes_NK.shape[1] != len(codes_KF) for search in searches):
        return None
    if not torch.equal(torch.cat([search.codes_NK for search in searches])[:num_frames], codes_KF.T):
        return None
    return torch.cat([rvq_margins(*search) for search in searches])[:num_frames]


def _random_sizes(total: int, largest: int, *, seed: int = 0) -> list[int]:
    """Sizes that add up to a total, the same for a seed, small ones as likely as large ones, and some are 0."""
    rng = np.random.default_rng(seed)
    sizes = [0]
    while total:
        sizes.append(min(total, int(np.exp(rng.uniform(-0.5, np.log(largest))))))
        total -= sizes[-1]
    return sizes


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def text(found: Verification) -> str:
    """For people: tables of ways of encoding, one of decoding, and the first of the codes that differ."""
    titles = {
        "codes": ("codes", "promised", "frames", "codes that differ", "largest margin of them"),
        _GLOBAL: (_GLOBAL, "promised", "compared", "codes that differ", "largest margin of them"),
        "audio": ("audio", "promised", "samples", "samples that differ", "largest difference"),
    }
    setting = f"{_counted(found.num_quantizers, 'row')} of codes, {_counted(found.num_threads, 'thread')}"
    blocks = [f"{found.model}, {setting}: {_counted(found.num_files, 'file')}, {found.seconds:.1f} s\n"]
    for kind, head in titles.items():
        ways = [way for way in found.ways if way.kind == kind]
        if kind == _GLOBAL and not ways:
            continue
        cells = [
            (w.name, "yes" if w.is_promised else "no", str(w.num_compared), str(w.num_different), _number(w.largest))
            for w in ways
        ]
        blocks.append(_table(head, cells))
        if kind == "codes" and found.smallest_margin is not None:
            blocks.append(f"smallest margin of all codes: {_number(found.smallest_margin)}\n")
    if found.differences:
        shown = [
            (d.file, d.way, *map(str, (d.frame, d.row, d.code, d.other_code)), _number(d.margin))
            for d in found.differences[:_DIFFERENCES_SHOWN]
        ]
        blocks.append(_table(("file", "way", "frame", "row", "code", "other code", "margin"), shown))
        if rest := len(found.differences) - len(shown):
            blocks.append(f"and {_counted(rest, 'more code')}; --json lists all\n")
    return "\n".join(blocks)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=400, no_color=True, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for title in head:
        table.add_column(title, justify="right" if title not in ("codes", _GLOBAL, "audio", "file", "way") else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())
