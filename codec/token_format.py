"""What one has to know of a model to read and write its codes, without loading it: `tokens.safetensors` in its folder.

Everything here works on NumPy arrays and imports no torch, for those who make or use tokens and never hear them.

>>> import codec  # doctest: +SKIP
>>> codec.write("speech.codec", codes, model="speech_16k")  # codes: int64 [channels, K, F]  # doctest: +SKIP
>>> with codec.open("speech.codec") as file:  # doctest: +SKIP
...     codes = file.read()
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from codec.bitstream import BitstreamError, Event, Header, Reader, SegmentStart, Writer
from codec.entropy import EntropyTables
from codec.files import AtomicFile
from codec.salvage import SalvagingReader

FILE_NAME = "tokens.safetensors"
FEATURE_FOLDER = "features"  # beside it, where a model has one: the speech model that it hears by
DEFAULT_MODEL = "speech_16k"


def _bundled_folder() -> Path:
    """Where the bundled models lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "bundled"
    return installed if installed.is_dir() else package.parent / "pretrained"


def available() -> dict[str, Path]:
    """The bundled models by name, each with its folder."""
    return {f.parent.name: f.parent for f in sorted(_bundled_folder().glob("*/config.json"))}


@dataclass(frozen=True, kw_only=True)
class TokenFormat:
    """The codes of a model: which model, how many to a frame, how long a frame is, how they are coded in files.

    `num_frames_before` and `num_frames_after`: how far around a frame its decoder hears. `num_global_codes` of
    `global_codebook_size` say the voice of a recording; most models have none.
    """

    codec_id: str
    model: str  # "speech_16k@1"
    sample_rate_hz: int
    hop_length: int
    codebook_sizes: tuple[int, ...]
    valid_num_quantizers: tuple[int, ...]
    num_frames_before: int
    num_frames_after: int
    num_global_codes: int = 0
    global_codebook_size: int = 0
    tables: EntropyTables | None = None

    @staticmethod
    def load(source: str | os.PathLike[str] = DEFAULT_MODEL) -> TokenFormat:
        """Of a bundled model by its name, or of a folder that `codec.save` wrote. ValueError where there is none."""
        folder = available().get(os.fspath(source), Path(source))
        path = folder / FILE_NAME
        if not path.is_file():
            raise ValueError(
                f"{os.fspath(source)!r} is neither a bundled model ({', '.join(available()) or 'none'}) "
                f"nor a folder with {FILE_NAME}"
            )
        try:
            with safe_open(path, "numpy") as file:
                facts = json.loads((file.metadata() or {})["token_format"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts |= {key: tuple(map(int, facts[key])) for key in ("codebook_sizes", "valid_num_quantizers")}
            facts |= {key: int(facts.get(key, 0)) for key in ("num_global_codes", "global_codebook_size")}
            found = TokenFormat(**facts, tables=EntropyTables.from_tensors(tensors) if tensors else None)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if found.tables is not None and found.tables.codebook_sizes != found.codebook_sizes:
            raise ValueError(f"{path}: the entropy tables do not fit the codebooks")
        return found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a model's folder."""
        facts = {key: value for key, value in vars(self).items() if key != "tables"}
        if not self.num_global_codes:  # programs that are older than global codes read this, too
            del facts["num_global_codes"], facts["global_codebook_size"]
        tensors = {} if self.tables is None else self.tables.to_tensors()
        with AtomicFile(Path(folder) / FILE_NAME) as new:
            new.file.write(serialize(tensors, metadata={"token_format": json.dumps(facts)}))
            new.commit()

    def header(self, *, rate_hz: int | None = None, num_channels: int = 1, num_quantizers: int | None = None) -> Header:
        """The header of a file with such codes. ValueError for a number of rows that the model cannot decode."""
        num_rows = len(self.codebook_sizes) if num_quantizers is None else num_quantizers
        if num_rows not in self.valid_num_quantizers:
            raise ValueError(f"num_quantizers={num_rows} is not one of {self.valid_num_quantizers}")
        return Header(
            codec_id=self.codec_id,
            model=self.model,
            codec_rate_hz=self.sample_rate_hz,
            rate_hz=self.sample_rate_hz if rate_hz is None else rate_hz,
            num_channels=num_channels,
            hop_length=self.hop_length,
            codebook_sizes=self.codebook_sizes[:num_rows],
            num_frames_before=self.num_frames_before,
            num_frames_after=self.num_frames_after,
            entropy_id=None if self.tables is None else self.tables.id,
        )

    def segment_start(self, global_codes: np.ndarray | None, *, num_channels: int = 1) -> SegmentStart:
        """How a file with these global codes [channels, L] begins. ValueError where they are not the model's."""
        if not self.num_global_codes:
            if global_codes is not None:
                raise ValueError(f"{self.model} has no global codes")
            return SegmentStart()
        wanted = f"[{num_channels}, {self.num_global_codes}] in 0..{self.global_codebook_size - 1}"
        if global_codes is None:
            raise ValueError(f"{self.model} needs global codes, {wanted}: they say the voice")
        codes = np.asarray(global_codes)
        if codes.shape != (num_channels, self.num_global_codes) or codes.dtype.kind not in "iu":
            raise ValueError(f"global_codes must be integers {wanted}, got {codes.dtype} {list(codes.shape)}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.global_codebook_size:
            raise ValueError(f"global_codes must be integers {wanted}, got {codes.min()}..{codes.max()}")
        return SegmentStart(global_codes=codes.astype(np.int64), global_codebook_size=self.global_codebook_size)


def open(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    model: str | os.PathLike[str] | None = None,
    allow_truncated: bool = False,
    allow_damaged: bool = False,
) -> Reader:
    """Open a `.codec` file for reading; see `Reader`. No model is loaded.

    With `allow_damaged` it is a `codec.salvage.SalvagingReader`: frames that are lost to damage are codes of -1.

    Entropy tables are those of `model`, a bundled model or a folder; by default, of the bundled model that made the
    file. BitstreamError where the file is none; OSError where it cannot be opened.

    >>> with open("speech.codec") as file:  # doctest: +SKIP
    ...     for codes in file:  # int64 [channels, K, F], block by block
    ...         ...
    """
    reader = SalvagingReader(source) if allow_damaged else Reader(source, allow_truncated=allow_truncated)
    try:
        if reader.header.entropy_id is not None:
            reader.tables = _tables_for(reader.header, model)
    except BaseException:
        reader.close()
        raise
    return reader


def _tables_for(header: Header, model: str | os.PathLike[str] | None) -> EntropyTables | None:
    """The tables that a header names, where they can be found; a reader complains if it comes to need them."""
    for source in available() if model is None else [model]:
        tables = TokenFormat.load(source).tables
        if tables is not None and tables.id == header.entropy_id:
            return tables
    return None


def write(
    target: str | os.PathLike[str] | BinaryIO,
    codes: np.ndarray,
    *,
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    num_samples: int | None = None,
    rate_hz: int | None = None,
    global_codes: np.ndarray | None = None,
) -> None:
    """Write codes int64 [channels, K, F] as a `.codec` file, whole or not at all. No model is loaded.

    `model`: the bundled model, or the folder of the model, that the codes belong to. `num_samples` per channel at
    `rate_hz`, by default all samples of all frames at the model's rate. `global_codes` int64 [channels, L]: the voice,
    for models that have it apart. ValueError for codes that are not the model's.
    """
    codes = np.asarray(codes)
    if codes.ndim != 3:
        raise ValueError(f"codes must be [channels, K, F], got {list(codes.shape)}")
    token_format = TokenFormat.load(model)
    header = token_format.header(rate_hz=rate_hz, num_channels=codes.shape[0], num_quantizers=codes.shape[1])
    start = token_format.segment_start(global_codes, num_channels=codes.shape[0])
    with Writer(target, header, tables=token_format.tables, start=start) as writer:
        writer.write(codes)
        writer.finish(header.num_samples_in(codes.shape[2]) if num_samples is None else num_samples)


def cut(
    source: str | os.PathLike[str] | BinaryIO,
    target: str | os.PathLike[str] | BinaryIO,
    first_sample: int,
    num_samples: int,
    *,
    model: str | os.PathLike[str] | None = None,
) -> None:
    """Write a stretch of a `.codec` file, in samples at the original rate, as a file of its own, without decoding it.

    It decodes to the same samples as that stretch of the whole file (exactly, where codec and original have one rate).
    """
    with open(source, model=model) as reader:
        copy_events(target, reader, reader.events(first_sample, num_samples))


def join(
    sources: Sequence[str | os.PathLike[str] | BinaryIO],
    target: str | os.PathLike[str] | BinaryIO,
    *,
    model: str | os.PathLike[str] | None = None,
) -> None:
    """Write several `.codec` files as one, without decoding them. It decodes to the same samples as they do alone.

    BitstreamError where they are not of one model, rate, channel count and number of rows.
    """
    with contextlib.ExitStack() as opened:
        readers = [opened.enter_context(open(source, model=model)) for source in sources]
        if not readers:
            raise BitstreamError("there is nothing to join")
        copy_events(target, readers[0], join_events((reader.header, reader.events()) for reader in readers))


def copy_events(target: str | os.PathLike[str] | BinaryIO, like: Reader, events: Iterable[Event]) -> None:
    """Write events (`Reader.events`) of one or several files into a new one of the same kind."""
    events = iter(events)
    start = next(events, None)
    if not isinstance(start, SegmentStart):
        raise BitstreamError("there is nothing to write")
    tables = None if like.header.entropy_id is None else like.tables
    with Writer(target, like.header, tables=tables, start=start) as writer:
        writer.write_events(events)


def join_events(files: Iterable[tuple[Header, Iterable[Event]]]) -> Iterator[Event]:
    """The events of several files, one after the other. BitstreamError where they do not go together."""
    first: Header | None = None
    for header, events in files:
        comparable = replace(header, entropy_id=None)
        first = first or comparable
        for field, value in vars(first).items():
            other: Any = getattr(comparable, field)
            if other != value:
                raise BitstreamError(f"files with {field} {value} and {other} cannot be joined")
        yield from events
