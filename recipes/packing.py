"""Make recordings ready for training: pack them into one file, or write them as WebDataset shards.

Decoding thousands of small compressed files in every epoch costs more CPU than a small model does. A packed folder is
one flat file of 16-bit samples, `audio.i16`, with `index.json` beside it; shards are tar files of FLAC, for disks that
do not like many files.

Work goes on in processes of their own, in constant memory however long recordings are. A run that was interrupted goes
on where it was when it is started again. Recordings that cannot be used are listed in `skipped.tsv`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

from codec.files import AtomicFile
from recipes.inspection import Finding, Parts, Report, find_unpacked, inspect_all
from recipes.recordings import Recording

_JOURNAL = "progress.jsonl"
_PARTS = "parts"


def pack_audio(
    source: Path,
    out: Path,
    *,
    sample_rate_hz: int,
    num_channels: int = 1,
    split: str | None = "train",
    num_workers: int = 1,
) -> Report:
    """Decode and resample recordings into `out/audio.i16` and `out/index.json`.

    See `recipes.recordings.find_recordings` for sources. Channels are interleaved. ValueError where no recording can be
    used.
    """
    parts = Parts(out / _PARTS, ".i16", sample_rate_hz, num_channels)
    return _prepare(source, out, parts, _PackWriter(out, parts), split=split, num_workers=num_workers)


def write_shards(
    source: Path,
    out: Path,
    *,
    sample_rate_hz: int,
    num_channels: int = 1,
    split: str | None = "train",
    num_workers: int = 1,
    shard_bytes: int = 2**28,
) -> Report:
    """Decode and resample recordings into WebDataset shards of 16-bit FLAC, `out/shard-000000.tar` and so on.

    A shard holds `<number>.flac` and `<number>.json` (path, corpus, speaker, text, rate, channels, samples) for every
    recording, and is closed when it has `shard_bytes`. ValueError as `pack_audio`.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be positive, not {shard_bytes}")
    parts = Parts(out / _PARTS, ".flac", sample_rate_hz, num_channels)
    writer = _ShardWriter(out, parts, shard_bytes)
    return _prepare(source, out, parts, writer, split=split, num_workers=num_workers)


# From the parts to the whole, in the order of the source


class _Writer(Protocol):
    def resume(self, groups: Sequence[Sequence[Finding]]) -> None:
        """Go on after these recordings. A group is what became safe at once."""

    def add(self, number: int, finding: Finding) -> bool:
        """Take a recording's part, if it has one. Returns whether all that was added is safe by now."""

    def finish(self) -> None:
        """Complete the output."""

    def close(self) -> None:
        """Leave nothing that a next run cannot use."""


def _prepare(source: Path, out: Path, parts: Parts, writer: _Writer, *, split: str | None, num_workers: int) -> Report:
    if parts.sample_rate_hz < 1 or parts.num_channels < 1:
        raise ValueError(f"cannot make {parts.num_channels} channels of {parts.sample_rate_hz} Hz")
    listed, journal_file = out / "skipped.tsv", out / _JOURNAL
    shutil.rmtree(parts.folder, ignore_errors=True)  # of a run that was interrupted
    found, broken = find_unpacked(source, split)
    parts.folder.mkdir(parents=True)
    report = Report(skipped=list(broken))
    with contextlib.ExitStack() as opened:
        opened.callback(shutil.rmtree, parts.folder)
        journal = _Journal(journal_file, _fingerprint(source, parts, found))
        opened.callback(journal.close)
        writer.resume(journal.groups)
        opened.callback(writer.close)
        for group in journal.groups:
            for finding in group:
                report.add(finding)
        done = sum(len(group) for group in journal.groups)
        findings = inspect_all(found, first=done, parts=parts, num_workers=num_workers)
        opened.enter_context(contextlib.closing(findings))  # its processes end before their folder is removed
        for number, finding in enumerate(findings, done):
            journal.add(finding, is_safe=writer.add(number, finding))
            report.add(finding)
        if report.num_samples:
            writer.finish()
    journal_file.unlink()
    listed.unlink(missing_ok=True)
    if report.skipped:
        listed.write_text("".join(f"{skipped.row}\n" for skipped in report.skipped), encoding="utf-8")
    if not report.num_samples:
        raise ValueError(f"{source}: no recording can be used of {len(report.skipped)}; the first, {report.skipped[0]}")
    return report


def _fingerprint(source: Path, parts: Parts, found: Sequence[Recording]) -> str:
    """Of everything that decides what comes out."""
    digest = hashlib.sha256(repr((source.resolve(), parts)).encode())
    for recording in found:
        status = os.stat(recording.file) if os.path.isfile(recording.file) else None
        digest.update(repr((recording, status and (status.st_size, status.st_mtime_ns))).encode())
    return digest.hexdigest()


class _Journal:
    """The findings so far, a line for each group that became safe at once, so that an interrupted run can go on."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.groups: list[list[Finding]] = []
        self._unsafe: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines and lines[0] == fingerprint:
            with contextlib.suppress(ValueError, TypeError):  # a last line that is not whole
                for line in lines[1:]:
                    self.groups.append([Finding(**values) for values in json.loads(line)])
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._file.write("".join(f"{line}\n" for line in [fingerprint, *lines[1 : 1 + len(self.groups)]]))
        self._file.flush()

    def add(self, finding: Finding, *, is_safe: bool) -> None:
        self._unsafe.append(asdict(finding))
        if is_safe:
            self._file.write(json.dumps(self._unsafe) + "\n")
            self._file.flush()
            self._unsafe.clear()

    def close(self) -> None:
        self._file.close()


class _PackWriter:
    def __init__(self, out: Path, parts: Parts) -> None:
        self._out, self._parts = out, parts
        self._partial = out / "audio.i16.partial"
        self._clips: list[dict[str, Any]] = []
        self._num_samples = 0

    def resume(self, groups: Sequence[Sequence[Finding]]) -> None:
        for group in groups:
            for finding in group:
                self._count(finding)
        num_bytes = 2 * self._parts.num_channels * self._num_samples
        num_there = self._partial.stat().st_size if self._partial.exists() else 0
        if num_there < num_bytes:
            raise ValueError(f"{self._partial} was cut off; remove {self._out} and begin anew")
        self._file = self._partial.open("r+b" if num_bytes else "wb")
        self._file.seek(num_bytes)
        self._file.truncate()

    def add(self, number: int, finding: Finding) -> bool:
        part = self._parts.file(number)
        if finding.reason is None:
            with part.open("rb") as data:
                shutil.copyfileobj(data, self._file, 2**20)
        part.unlink(missing_ok=True)
        self._count(finding)
        self._file.flush()
        return True

    def close(self) -> None:
        self._file.close()
        if not self._num_samples:
            self._partial.unlink(missing_ok=True)

    def finish(self) -> None:
        self._file.close()
        index = {
            "sample_rate_hz": self._parts.sample_rate_hz,
            "num_channels": self._parts.num_channels,
            "num_samples": self._num_samples,
            "clips": self._clips,
        }
        with AtomicFile(self._out / "index.json") as new:
            new.file.write(json.dumps(index).encode())
            self._partial.replace(self._out / "audio.i16")
            new.commit()

    def _count(self, finding: Finding) -> None:
        if finding.reason is not None:
            return
        self._clips.append(
            {
                "path": finding.path,
                "corpus": finding.corpus,
                "speaker": finding.speaker,
                "text": finding.text,
                "first_sample": self._num_samples,
                "num_samples": finding.num_prepared,
            }
        )
        self._num_samples += finding.num_prepared


class _ShardWriter:
    """One shard at a time; it appears whole."""

    def __init__(self, out: Path, parts: Parts, shard_bytes: int) -> None:
        self._out, self._parts, self._shard_bytes = out, parts, shard_bytes
        self._shard = 0
        self._file: AtomicFile | None = None

    def resume(self, groups: Sequence[Sequence[Finding]]) -> None:
        self._shard = len(groups)
        for shard in self._out.glob("shard-*.tar"):  # of another run, or written but not in the journal
            if int(shard.stem.removeprefix("shard-")) >= self._shard:
                shard.unlink()

    def add(self, number: int, finding: Finding) -> bool:
        part = self._parts.file(number)
        if finding.reason is None:
            if self._file is None:
                self._file = AtomicFile(self._out / f"shard-{self._shard:06d}.tar")
                self._tar = tarfile.open(fileobj=self._file.file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            about = {
                "path": finding.path,
                "corpus": finding.corpus,
                "speaker": finding.speaker,
                "text": finding.text,
                "sample_rate_hz": self._parts.sample_rate_hz,
                "num_channels": self._parts.num_channels,
                "num_samples": finding.num_prepared,
            }
            self._put(f"{number:09d}.flac", part)
            self._put(f"{number:09d}.json", json.dumps(about).encode())
        part.unlink(missing_ok=True)
        if self._file is None or self._file.file.tell() < self._shard_bytes:
            return False
        self._complete()
        return True

    def finish(self) -> None:
        if self._file is not None:
            self._complete()

    def close(self) -> None:
        if self._file is not None:
            self._file.discard()

    def _put(self, name: str, content: Path | bytes) -> None:
        member = tarfile.TarInfo(name)  # no date and no owner: equal recordings make equal shards
        with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as data:
            member.size = data.seek(0, os.SEEK_END)
            data.seek(0)
            self._tar.addfile(member, data)

    def _complete(self) -> None:
        assert self._file is not None
        self._tar.close()
        self._file.commit()
        self._file = None
        self._shard += 1
