"""What one job of the command line is made of: options, inputs and outputs that may be pipes, and one-line mistakes."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from codec.batch import STANDARD, Advance, Job, Outcome
from codec.stretch import Stretch, StretchError

if TYPE_CHECKING:
    import numpy as np

    from codec.audio import AudioReader, RawFormat
    from codec.bitstream import Event, Header, Reader
    from codec.models.interface import Codec


# What `codec convert` takes where nothing is named: a bundled model that keeps the voice apart.
DEFAULT_VOICED_MODEL = "speech_16k_semantic"

_MAX_PLACES = 5  # that one line tells of


class UserError(Exception):
    """A mistake of the user's that the command line itself finds."""


@dataclass(frozen=True)
class Options:
    """What a job needs to know; goes to other processes with it."""

    model: str | None = None
    device: str = "cpu"
    threads: int = 1
    start_seconds: Fraction | None = None
    duration_seconds: Fraction | None = None
    force: bool = False
    resume: bool = False
    num_quantizers: int | None = None
    voice: str | None = None
    raw_rate_hz: int | None = None
    raw_channels: int = 1
    is_raw: bool = False
    frames_per_block: int | None = None
    conceals: bool = False

    def stretch(self, rate_hz: int) -> Stretch | None:
        """The stretch asked for, at this rate; None for all."""
        if self.start_seconds is None and self.duration_seconds is None:
            return None
        duration = None if self.duration_seconds is None else round(self.duration_seconds * rate_hz)
        return Stretch(round((self.start_seconds or 0) * rate_hz), duration)

    @property
    def raw_format(self) -> RawFormat | None:
        """Of the input; None where it has a header."""
        from codec.audio import RawFormat

        return None if self.raw_rate_hz is None else RawFormat(self.raw_rate_hz, self.raw_channels)


JobWork = Callable[[Job, Advance, "Options"], Outcome]


def guarded(job: Job, advance: Advance, *, work: JobWork, options: Options) -> Outcome:
    """A job's mistakes are its outcome."""
    try:
        return work(job, advance, options)
    except BrokenPipeError:
        raise
    except (UserError, ValueError, OSError, MemoryError) as error:
        return Outcome(job.source, job.target, "failed", error=reason_of(error))


def encode_job(job: Job, advance: Advance, options: Options) -> Outcome:
    """Audio to a container. Raises for a user's mistake; see `guarded`."""
    from codec.bitstream import FRAMES_PER_BLOCK

    check_target(job, options)
    with open_audio(job.source, options) as audio:
        _make_folders(job)
        codec = load_model(options.model, options)
        voice = None if options.voice is None else find_voice(options.voice, codec)
        stretch = options.stretch(audio.rate_hz)
        with named(job.source):
            if options.resume and _is_encoded(job, codec, audio, stretch, voice, options):
                return _outcome(job, "skipped", 0, audio.rate_hz, audio.num_channels)
            from codec.transcode import encode_audio

            with open_target(job.target) as out:
                num_samples = encode_audio(
                    codec,
                    audio,
                    out,
                    num_quantizers=options.num_quantizers,
                    global_codes=voice,
                    stretch=stretch,
                    frames_per_block=options.frames_per_block or FRAMES_PER_BLOCK,
                    progress=advance,
                )
        return _outcome(job, "done", num_samples, audio.rate_hz, audio.num_channels)


def decode_job(job: Job, advance: Advance, options: Options) -> Outcome:
    """A container to audio. Raises for a user's mistake; see `guarded`."""
    from codec.models.voice import voiced
    from codec.transcode import check_fits, decode_audio

    check_target(job, options)
    is_cut = options.start_seconds is not None or options.duration_seconds is not None
    with (
        open_container(
            job.source,
            options.model,
            seekable=is_cut or options.conceals,
            allow_truncated=True,
            allow_damaged=options.conceals,
        ) as reader,
        named(job.source),
    ):
        header = reader.header
        stretch = options.stretch(header.rate_hz)
        _make_folders(job)
        if options.resume and _is_decoded(job, reader, stretch, options):
            warning = truncated(job.source, reader.num_samples / header.rate_hz) if reader.is_truncated else None
            notice = _concealed(job.source, reader, stretch)
            return _outcome(job, "skipped", 0, header.rate_hz, header.num_channels, warning, notice)
        codec = load_model(_bundled_name(header) if options.model is None else options.model, options)
        check_fits(codec, header)
        voice, num_rows = None, options.num_quantizers
        if options.voice is not None:
            voice = find_voice(options.voice, codec)
            # More rows would carry the speaker along.
            num_rows = num_rows or min(voiced(codec).num_semantic_quantizers, len(header.codebook_sizes))
        with open_target(job.target) as out:
            num_samples = decode_audio(
                codec,
                reader,
                out,
                num_quantizers=num_rows,
                global_codes=voice,
                stretch=stretch,
                raw=options.is_raw,
                progress=advance,
            )
        warning = truncated(job.source, num_samples / header.rate_hz) if reader.is_truncated else None
        notice = _concealed(job.source, reader, stretch)
        return _outcome(job, "done", num_samples, header.rate_hz, header.num_channels, warning, notice)


def convert_job(job: Job, advance: Advance, options: Options) -> Outcome:
    """Audio to the same in another voice. Raises for a user's mistake; see `guarded`."""
    from codec.token_format import available
    from codec.transcode import convert_audio

    check_target(job, options)
    if options.model is None and DEFAULT_VOICED_MODEL not in available():
        raise UserError("no bundled model keeps the voice apart; --model names one that does")
    with open_audio(job.source, options) as audio:
        _make_folders(job)
        codec = load_model(options.model or DEFAULT_VOICED_MODEL, options)
        assert options.voice is not None  # the command line asks for it
        voice = find_voice(options.voice, codec)
        with named(job.source), open_target(job.target) as out:
            num_samples = convert_audio(
                codec,
                audio,
                out,
                global_codes=voice,
                num_quantizers=options.num_quantizers,
                stretch=options.stretch(audio.rate_hz),
                progress=advance,
            )
        return _outcome(job, "done", num_samples, audio.rate_hz, audio.num_channels)


def find_voice(source: str, codec: Codec) -> np.ndarray:
    """Global codes int64 [L] of a reference recording, or those that a .codec file of this codec has in the beginning.

    Of several channels, a recording's are averaged; a file's first one is taken.
    """
    from codec.audio import AudioReader
    from codec.bitstream import BitstreamError, SegmentStart
    from codec.header import MAGIC
    from codec.models.voice import voiced
    from codec.transcode import check_fits, hear_voice, voices_of

    voiced(codec)
    if source == STANDARD:
        raise UserError("a voice is taken from a file, not from standard input")
    with open(source, "rb") as file:
        is_container = file.read(len(MAGIC)) == MAGIC
    if not is_container:
        with AudioReader(source) as audio:
            return hear_voice(codec, audio)
    try:
        with open_container(source, None, allow_truncated=True) as reader, named(source):
            check_fits(codec, reader.header)
            start = next(reader.events(decode=False))
            assert isinstance(start, SegmentStart)
            voices = voices_of(codec, start, reader.header.num_channels, None)
    except BitstreamError as error:  # which would be told with the name of the job's own file, too
        raise UserError(str(error)) from error
    assert voices is not None
    return voices[0].numpy()


def _outcome(
    job: Job,
    status: str,
    num_samples: int,
    rate_hz: int,
    num_channels: int,
    warning: str | None = None,
    notice: str | None = None,
) -> Outcome:
    num_bytes = 0 if job.target == STANDARD else os.path.getsize(job.target)
    return Outcome(
        job.source, job.target, status, num_samples, rate_hz, num_channels, num_bytes, warning=warning, notice=notice
    )


def _concealed(source: str, reader: Reader, stretch: Stretch | None) -> str | None:
    """What to say of losses that were concealed in a stretch; None where there were none."""
    from codec.salvage import SalvagingReader

    if not isinstance(reader, SalvagingReader):
        return None
    stretch = (stretch or Stretch()).within(reader.num_samples)
    end = stretch.first_sample + (stretch.num_samples or 0)
    rate_hz = reader.header.rate_hz
    places = [
        f"{first / rate_hz:.3f} to {(first + num_samples) / rate_hz:.3f} s"
        for first, num_samples in reader.lost
        if first < end and first + num_samples > stretch.first_sample
    ]
    if not places:
        return None
    more = f" and {len(places) - _MAX_PLACES} more" if len(places) > _MAX_PLACES else ""
    return f"{_name(source)}: damaged; concealed {', '.join(places[:_MAX_PLACES])}{more}"


def _is_encoded(
    job: Job, codec: Codec, audio: AudioReader, stretch: Stretch | None, voice: np.ndarray | None, options: Options
) -> bool:
    """Whether the target is a whole container of just this recording, by this model, at this rate, in this voice."""
    from codec.bitstream import BitstreamError, Reader
    from codec.header import MAGIC

    if job.target == STANDARD or options.force or not os.path.isfile(job.target):
        return False
    assert codec.token_format is not None  # a loaded model has one
    expected = codec.token_format.header(
        rate_hz=audio.rate_hz, num_channels=audio.num_channels, num_quantizers=options.num_quantizers
    )
    wanted = audio.num_samples
    if wanted is not None and stretch is not None:
        wanted = stretch.within(wanted).num_samples
    with open(job.target, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{job.target} exists already and is no .codec file; --force replaces it")
    try:
        with Reader(job.target, tables=codec.token_format.tables) as reader:
            for _ in reader.events():  # every block is read and checked
                pass
            heard = reader.segments[0].start.global_codes
            has_voice = voice is None or (heard is not None and bool((heard == voice).all()))
            return reader.header == expected and reader.num_samples == wanted and has_voice
    except BitstreamError:
        return False


def _is_decoded(job: Job, reader: Reader, stretch: Stretch | None, options: Options) -> bool:
    """Whether the target is whole audio of the length, rate and channels that decoding would give."""
    from codec.audio import AudioError, AudioReader, RawFormat

    if job.target == STANDARD or options.force or not os.path.isfile(job.target):
        return False
    rate_hz, num_channels = reader.header.rate_hz, reader.header.num_channels
    try:
        with AudioReader(job.target, raw=RawFormat(rate_hz, num_channels) if options.is_raw else None) as audio:
            found = (audio.num_samples, audio.rate_hz, audio.num_channels)
    except AudioError as error:
        raise UserError(f"{job.target} exists already and is no audio; --force replaces it") from error
    if not reader.is_seekable:  # its length is not known
        return False
    return found == ((stretch or Stretch()).within(reader.num_samples).num_samples, rate_hz, num_channels)


def check_target(job: Job, options: Options) -> None:
    """Find a user's mistake before the work, not after it."""
    if job.target == STANDARD:
        if sys.stdout is None:
            raise UserError("standard output is closed")
        return
    target = Path(job.target)
    if not target.parent.is_dir() and not job.makes_folders:
        raise UserError(f"{target.parent} is not a folder")
    if target.is_dir():
        raise UserError(f"{target} is a folder")
    if target.exists() and not target.is_file():
        raise UserError(f"{target} is no ordinary file")
    if target.exists() and os.path.exists(job.source) and target.samefile(job.source):
        raise UserError(f"{target} is the input itself")
    if target.exists() and not (options.force or options.resume):
        raise UserError(f"{target} exists already; --force replaces it")


def _make_folders(job: Job) -> None:
    """For a job of several; a single one has to have its folder."""
    if job.makes_folders:
        os.makedirs(os.path.dirname(job.target), exist_ok=True)


def open_audio(source: str, options: Options) -> AudioReader:
    """A path or standard input, with a header or raw."""
    from codec.audio import AudioReader

    return AudioReader(_standard_input() if source == STANDARD else source, raw=options.raw_format)


def _standard_input() -> BinaryIO:
    """Unbuffered: what has come is there at once."""
    if sys.stdin is None:
        raise UserError("standard input is closed")
    return open(0, "rb", buffering=0, closefd=False)


@contextlib.contextmanager
def open_target(target: str) -> Iterator[Any]:
    """A path, or standard output as a binary stream."""
    if target != STANDARD:
        yield target
        return
    with open(1, "wb", closefd=False) as stream:
        yield stream


@contextlib.contextmanager
def named(source: str) -> Iterator[None]:
    """A container's flaw, or a stretch that it does not have, is told with the file's name."""
    from codec.bitstream import BitstreamError

    try:
        yield
    except (BitstreamError, StretchError) as error:
        raise type(error)(f"{_name(source)}: {error}") from error


def named_events(reader: Reader, source: str) -> Iterator[Event]:
    """`reader.events()`, with flaws told with the file's name."""
    with named(source):
        yield from reader.events()


@contextlib.contextmanager
def open_container(
    source: str,
    model: str | None,
    *,
    seekable: bool = False,
    allow_truncated: bool = False,
    allow_damaged: bool = False,
) -> Iterator[Reader]:
    """A container from a path or standard input; a pipe is copied first where it has to be searched."""
    from codec import token_format

    with contextlib.ExitStack() as opened:
        stream: BinaryIO = _standard_input() if source == STANDARD else opened.enter_context(open(source, "rb"))
        if seekable and not stream.seekable():
            spool = opened.enter_context(tempfile.TemporaryFile())
            while piece := stream.read(2**16):
                spool.write(piece)
            spool.seek(0)
            stream = spool
        with named(source):
            reader = token_format.open(
                stream, model=model, allow_truncated=allow_truncated, allow_damaged=allow_damaged
            )
        yield reader


def find_containers(folder: Path) -> list[Path]:
    """All .codec files under a folder, sorted."""
    found = sorted(file for file in folder.rglob("*.codec") if file.is_file())
    if not found:
        raise UserError(f"no .codec files under {folder}")
    return found


@functools.cache
def _loaded(model: str, device: str, threads: int) -> Codec:
    import torch

    from codec.pretrained import load

    torch.set_num_threads(threads)
    return load(model, device=device)


def load_model(model: str | None, options: Options) -> Codec:
    """A bundled model by its name, the default one, or that of a folder; once per process."""
    from codec.token_format import DEFAULT_MODEL

    try:
        return _loaded(DEFAULT_MODEL if model is None else model, options.device, options.threads)
    except (AssertionError, RuntimeError) as error:  # PyTorch's, for a device that is not there
        raise UserError(f"device {options.device!r} cannot be used: {error}") from error


def _bundled_name(header: Header) -> str:
    """The bundled model that a file names. A name in a file never stands for a folder."""
    from codec.bitstream import BitstreamError
    from codec.token_format import available

    name = header.model.split("@")[0]
    if name not in available():
        raise BitstreamError(f"it was made by {header.model}, which is not bundled; --model says where it is")
    return name


def truncated(source: str, seconds: float) -> str:
    """The warning that a file ends too early."""
    return f"{_name(source)}: the file is cut off; {seconds:.3f} s of it are good, and those were taken"


def _name(source: str) -> str:
    return "standard input" if source == STANDARD else source


def reason_of(error: Exception) -> str:
    """An error in one line."""
    reason = str(error) or "out of memory"
    if isinstance(error, OSError) and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        reason = f"{name}: {error.strerror}" if name else error.strerror
    return " ".join(reason.split())
