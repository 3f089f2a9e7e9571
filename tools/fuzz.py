"""Damage containers at random and see what readers make of it: `python -m tools.fuzz --mutations 1000000 --seed 0`.

Small valid containers of all kinds are damaged (bits, bytes, truncation), edited (ranges deleted, repeated, taken from
another container) or forged (changed with all checksums repaired, so that the code behind them is reached), and read in
all ways. Whatever the bytes: nothing but BitstreamError is raised, soon and in little memory, and where reading through
succeeds, every way of reading tells the same. Damage and edits must not pass unseen either: what is given out comes
from the true file, in its order. What is salvaged of damaged files (`codec.salvage`) has the true lengths, and where
there is one loss, every frame that is not lost is the true one, in its place. Prints how often what happened; `--only
INDEX` replays one mutation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import random
import signal
import struct
import sys
import time
import traceback
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

import numpy as np

from codec.bitstream import Event, Reader, Segment, SegmentEnd, SegmentStart, Writer
from codec.entropy import EntropyTables, Parent, RowModel
from codec.header import BitstreamError, Header, TruncatedError, leb128, split_number
from codec.salvage import SalvagingReader

_MAX_SECONDS = 10.0  # of processor time for one mutation; a few bytes can claim 2^17 codes, which take 0.1 s each time
_MAX_BYTES = 2**25
_MEMORY_EVERY = 1000  # tracing memory is slow
_NUMBERS = [0, 1, 2, 3, 127, 128, 2**14, 2**20, 2**20 + 1, 2**24, 2**31, 2**32, 2**53, 2**62, 2**63 - 1]


def random_tables(rng: np.random.Generator, codebook_sizes: tuple[int, ...], *, power: float = 8.0) -> EntropyTables:
    """Entropy tables without meaning: parents, groups and classes by chance. The higher `power`, the more skewed."""
    rows = []
    for k, size in enumerate(codebook_sizes):
        candidates = [Parent(j, 1) for j in range(k + 1)] + [Parent(j, 0) for j in range(k)]
        parents = (candidates[rng.integers(len(candidates))], candidates[rng.integers(len(candidates))])
        groups = [rng.integers(0, rng.integers(1, 5), codebook_sizes[p.row] + 1).astype(np.uint8) for p in parents]
        classes = rng.integers(0, 6, (int(groups[0].max()) + 1, int(groups[1].max()) + 1)).astype(np.uint8)
        counts = (1 + 65534 * rng.random((int(classes.max()) + 1, size)) ** power).astype(np.uint16)
        rows.append(RowModel(parents, (groups[0], groups[1]), classes, counts))
    return EntropyTables(tuple(rows))


def draw_codes(tables: EntropyTables, rng: np.random.Generator, num_channels: int, num_frames: int) -> np.ndarray:
    """Codes int64 [channels, K, F] as the tables expect them; the same on every machine."""
    codes = np.empty((num_channels, len(tables.rows), num_frames), np.int64)
    for channel in codes:
        before = list(tables.codebook_sizes)
        for f in range(num_frames):
            frame: list[int] = []
            for row in tables.rows:
                first, second = (
                    groups[(frame, before)[parent.lag][parent.row]]
                    for parent, groups in zip(row.parents, row.groups, strict=True)
                )
                sums = np.cumsum(row.counts[row.classes[first, second]], dtype=np.int64)
                frame.append(int(np.searchsorted(sums, rng.integers(sums[-1]), side="right")))
            channel[:, f] = before = frame
    return codes


@dataclass(frozen=True, eq=False)
class Sample:
    """A valid container and what is in it."""

    name: str
    data: bytes
    tables: EntropyTables | None
    events: list[Event]
    segments: tuple[Segment, ...]
    codes: np.ndarray
    header_size: int
    blocks: list[bytes]  # each with its checksum

    @staticmethod
    def of(name: str, data: bytes, tables: EntropyTables | None) -> Sample:
        reader = Reader(io.BytesIO(data), tables=tables)
        header_size = len(reader.header.to_bytes())
        events, blocks = list(reader.events()), split_blocks(data, header_size)
        return Sample(name, data, tables, events, reader.segments, reader.read(), header_size, blocks)

    def open(self, data: bytes, *, allow_truncated: bool = False) -> Reader:
        return Reader(io.BytesIO(data), tables=self.tables, allow_truncated=allow_truncated)


def split_blocks(data: bytes, header_size: int) -> list[bytes]:
    """The blocks of a container, by their sizes alone; the last takes what is left."""
    blocks, at = [], header_size
    while at < len(data):
        with contextlib.suppress(BitstreamError):
            key, rest = split_number(data[at:])
            after = len(data) - len(rest) + key // 8 + 4
            blocks.append(data[at:after])
            at = after
            continue
        return [*blocks, data[at:]]
    return blocks


def block(kind: int, payload: bytes) -> bytes:
    """A block whose checksum is to be repaired."""
    return leb128(8 * len(payload) + kind) + payload + bytes(4)


def repaired(head: bytes, blocks: list[bytes]) -> bytes:
    """A header and blocks, every checksum begun with the one before."""
    data = head
    for sealed in blocks:
        (before,) = struct.unpack("<I", data[-4:])
        data += sealed[:-4] + struct.pack("<I", zlib.crc32(sealed[:-4], before))
    return data


def samples() -> list[Sample]:
    """Small containers of all kinds."""
    rng = np.random.default_rng(0)
    tables = random_tables(rng, (5, 8, 16))
    plain = Header("0123456789abcdef", "m@1", 16000, 8000, 1, 320, (4, 8))
    mono = Header("0123456789abcdef", "m@1", 16000, 16000, 1, 320, (5, 8, 16), 3, 1, tables.id)
    stereo = Header("0123456789abcdef", "m@1", 16000, 11025, 2, 320, (5, 8, 16), 3, 1, tables.id)

    def written(header: Header, parts: list[tuple[SegmentStart, int, int]], frames_per_block: int) -> bytes:
        """Parts are segments: how they start, frames, samples."""
        used = tables if header.entropy_id else None
        sizes = np.array(header.codebook_sizes)[:, None]
        target = io.BytesIO()
        with Writer(target, header, tables=used, start=parts[0][0], frames_per_block=frames_per_block) as writer:
            for i, (start, num_frames, _) in enumerate(parts):
                if i:
                    writer.next_segment(parts[i - 1][2], start)
                if used is None or i % 2:
                    writer.write(rng.integers(0, sizes, (header.num_channels, len(sizes), num_frames)))
                else:
                    writer.write(draw_codes(used, rng, header.num_channels, num_frames))
            writer.finish(parts[-1][2])
        return target.getvalue()

    begin, skipping = SegmentStart(), SegmentStart(300)
    with_global = [SegmentStart(skip, rng.integers(0, 9, (1, length)), 9) for skip, length in ((0, 5), (70, 3))]
    packed = written(plain, [(begin, 10, 1555)], 4)
    header_size = len(plain.to_bytes())
    reserved = [block(6, b"later"), *split_blocks(packed, header_size)]
    reserved.insert(3, block(7, b""))
    index_parts = [(begin, 0, 0), (with_global[1], 3, 700), (begin, 0, 0), (with_global[0], 33, 33 * 320)]
    return [
        Sample.of("packed", packed, None),
        Sample.of("empty", written(plain, [(begin, 0, 0)], 4), None),
        Sample.of("reserved blocks", repaired(packed[:header_size], reserved), None),
        Sample.of("coded", written(mono, [(begin, 14, 14 * 320 - 320)], 7), tables),
        Sample.of("stereo", written(stereo, [(begin, 9, 1900)], 4), tables),
        Sample.of("skipped", written(stereo, [(skipping, 8, 1300)], 4), tables),
        Sample.of("segments", written(mono, [(begin, 5, 1500), (begin, 0, 0), (skipping, 6, 1300)], 3), tables),
        Sample.of("global codes", written(mono, [(with_global[0], 5, 1600), (with_global[1], 4, 900)], 3), tables),
        Sample.of("index", written(plain, [(begin, 33, 33 * 160 - 1)], 1), None),
        Sample.of("index and segments", written(mono, index_parts, 1), tables),
    ]


@dataclass(frozen=True)
class Mutation:
    """Bytes made from a sample, perhaps with the help of another."""

    kind: str
    data: bytes
    sample: Sample
    other: Sample

    def __str__(self) -> str:
        return f"{self.kind} of {self.sample.name!r} ({len(self.data)} bytes)"


def mutation(all_samples: list[Sample], seed: int, index: int) -> Mutation:
    """The mutation of that number: the same in every run."""
    rng = random.Random(f"{seed}/{index}")
    sample, other = rng.choice(all_samples), rng.choice(all_samples)
    kind = rng.choice(list(_KINDS))
    return Mutation(kind, _KINDS[kind](rng, sample, other), sample, other)


def _flip(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    data = bytearray(sample.data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _overwrite(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    at, size = rng.randrange(len(sample.data)), rng.randint(1, 8)
    return sample.data[:at] + rng.randbytes(size) + sample.data[at + size :]


def _insert(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    at = rng.randint(0, len(sample.data))
    return sample.data[:at] + rng.randbytes(rng.randint(1, 8)) + sample.data[at:]


def _truncate(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    return sample.data[: rng.randrange(len(sample.data))]


def _delete(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    at = rng.randrange(len(sample.data))
    return sample.data[:at] + sample.data[at + rng.randint(1, 40) :]


def _repeat(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    at, to = rng.randrange(len(sample.data)), rng.randint(0, len(sample.data))
    return sample.data[:to] + sample.data[at : at + rng.randint(1, 40)] + sample.data[to:]


def _splice(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    return sample.data[: rng.randint(0, len(sample.data))] + other.data[rng.randint(0, len(other.data)) :]


def _misplace_blocks(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    """Whole blocks in another order, twice, not at all, or from another container."""
    return sample.data[: sample.header_size] + b"".join(_reordered(rng, sample, other))


def _reorder_blocks(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    """The same, with the checksums repaired."""
    return repaired(sample.data[: sample.header_size], _reordered(rng, sample, other))


def _reordered(rng: random.Random, sample: Sample, other: Sample) -> list[bytes]:
    blocks = list(sample.blocks)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(blocks) + 1)
        action = rng.randrange(4)
        if action == 0 and blocks:
            blocks.insert(at, blocks.pop(rng.randrange(len(blocks))))
        elif action == 1 and blocks:
            blocks.pop(rng.randrange(len(blocks)))
        else:
            blocks.insert(at, rng.choice((sample if action == 2 else other).blocks))
    return blocks


def _forge_block(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    """Another payload or type, with the checksums repaired."""
    blocks = list(sample.blocks)
    for _ in range(rng.choice([1, 1, 2])):
        # INDEX and END, which come last, are as likely as all others.
        at = rng.choice([rng.randrange(len(blocks)), len(blocks) - 1, max(0, len(blocks) - 2)])
        key, rest = split_number(blocks[at])
        kind, payload = key % 8, _forge(rng, rest[:-4])
        if rng.randrange(4) == 0:
            kind = rng.randrange(8)
        if kind == 0 and rng.randrange(2):  # END's last byte is its size
            payload = payload[:-1] + bytes([len(payload) % 256])
        blocks[at] = block(kind, payload)
    return repaired(sample.data[: sample.header_size], blocks)


def _forge_header(rng: random.Random, sample: Sample, other: Sample) -> bytes:
    head = sample.data[: sample.header_size - 4]
    forged = head[:6] + _forge(rng, head[6:])
    return repaired(forged + struct.pack("<I", zlib.crc32(forged)), sample.blocks)


def _forge(rng: random.Random, data: bytes) -> bytes:
    """Other bytes, or a number put into them."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, action = rng.randint(0, len(data)), rng.randrange(4)
        if action == 0:
            data = data[:at] + rng.randbytes(1) + data[at + 1 :]
        elif action == 1:
            data = data[:at] + rng.randbytes(rng.randint(1, 3)) + data[at:]
        elif action == 2:
            data = data[:at] + data[at + rng.randint(1, 3) :]
        else:
            data = data[:at] + leb128(rng.choice(_NUMBERS)) + data[at + rng.randint(0, 2) :]
    return data


_Mutator = Callable[[random.Random, Sample, Sample], bytes]
_DAMAGE: dict[str, _Mutator] = {
    "flip": _flip,
    "overwrite": _overwrite,
    "insert": _insert,
    "delete": _delete,
    "repeat": _repeat,
    "truncate": _truncate,
}
_EDITS: dict[str, _Mutator] = {"splice": _splice, "misplace": _misplace_blocks}
_FORGERIES: dict[str, _Mutator] = {
    "reorder": _reorder_blocks,
    "forge block": _forge_block,
    "forge header": _forge_header,
}
_KINDS = _DAMAGE | _EDITS | _FORGERIES


class Violation(Exception):
    """A reader did what it must not."""


class _TooSlow(BaseException):  # no `except Exception` stops it
    pass


def check(mutated: Mutation, rng: random.Random) -> str:
    """Read it in all ways and say what came of it. Violation where a promise was broken."""
    sample, data = mutated.sample, mutated.data
    try:
        reader = sample.open(data)
    except BitstreamError as refusal:
        _check_message(refusal)
        return "header refused"
    events, error = _collect(reader.events())
    _check_events(mutated, events, is_whole=error is None, is_cut_short=False)
    if error is None:
        _check_agreement(reader, events)
    if isinstance(error, TruncatedError) or rng.randrange(4) == 0:
        lenient = sample.open(data, allow_truncated=True)
        rescued, lenient_error = _collect(lenient.events())
        _must(not isinstance(error, TruncatedError) or len(rescued) >= len(events), "fewer events were rescued")
        _must(lenient.is_truncated == (lenient_error is None and error is not None), "is_truncated is wrong")
        _check_events(mutated, rescued, is_whole=lenient_error is None, is_cut_short=lenient.is_truncated)
        _search(mutated, lenient, rng)
    _search(mutated, sample.open(data), rng)
    if error is None or rng.randrange(3) == 0:
        _salvage(mutated, events, error, rng)
    if error is None:
        return (
            "read as it was" if data == sample.data or same_events(events, sample.events) else "read as something else"
        )
    return "truncated" if isinstance(error, TruncatedError) else "block refused"


def _must(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Violation(otherwise)


def _collect(events: Iterator[Event]) -> tuple[list[Event], BitstreamError | None]:
    found: list[Event] = []
    try:
        for event in events:
            found.append(event)
    except BitstreamError as error:
        _check_message(error)
        return found, error
    return found, None


def _check_message(error: BitstreamError) -> None:
    _must(bool(str(error)) and "\n" not in str(error), f"the message is {str(error)!r}")


def same_events(one: list[Event], other: list[Event]) -> bool:
    """Whether two files tell the same, block for block."""
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: Event, other: Event) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, SegmentStart) and isinstance(other, SegmentStart):
        facts = [(e.skip_samples, e.global_codebook_size, e.global_codes is None) for e in (one, other)]
        codes = [np.empty(0) if e.global_codes is None else e.global_codes for e in (one, other)]
        return facts[0] == facts[1] and np.array_equal(codes[0], codes[1])
    return one == other


def _check_events(mutated: Mutation, events: list[Event], *, is_whole: bool, is_cut_short: bool) -> None:
    """Of damaged and edited files, only what is true is given out."""
    sample, other = mutated.sample, mutated.other
    if mutated.kind in _DAMAGE:
        # A file cut short ends with a SegmentEnd of its own.
        checked = events[:-1] if is_cut_short and events and isinstance(events[-1], SegmentEnd) else events
        _must(same_events(checked, sample.events[: len(checked)]), "what was given out is not in the file")
        _must(is_cut_short or not is_whole or len(events) == len(sample.events), "the file ends too early")
    elif mutated.kind in _EDITS:  # parts of two files: what is the beginning of one of them is as it was
        checked = events[:-1] if is_cut_short and events and isinstance(events[-1], SegmentEnd) else events
        files = [sample.events, other.events]
        _must(any(same_events(checked, f[: len(checked)]) for f in files), "what was given out is in neither file")
        _must(is_cut_short or not is_whole or any(same_events(events, f) for f in files), "a mixture was read")


def _check_agreement(reader: Reader, events: list[Event]) -> None:
    """A file that was read through is the same in every way of reading it."""
    pieces = [event for event in events if isinstance(event, np.ndarray)]
    lengths = [event.num_samples for event in events if isinstance(event, SegmentEnd)]
    starts = [event for event in events if isinstance(event, SegmentStart)]
    _must(reader.num_frames == sum(p.shape[2] for p in pieces), "num_frames is wrong")
    _must(reader.num_samples == sum(lengths), "num_samples is wrong")
    _must([s.num_samples for s in reader.segments] == lengths, "lengths of segments are wrong")
    _must(all(_equal(s.start, t) for s, t in zip(reader.segments, starts, strict=True)), "starts are wrong")
    if pieces:
        _must(np.array_equal(reader.read(), np.concatenate(pieces, axis=2)), "read() gives other codes")


def _salvage(mutated: Mutation, events: list[Event], error: BitstreamError | None, rng: random.Random) -> None:
    """Read what is left; of damage, the lengths and what is not lost have to be true."""
    sample = mutated.sample
    reader = SalvagingReader(io.BytesIO(mutated.data), tables=sample.tables)
    salvaged, refusal = _collect(reader.events())
    if error is None:
        _must(same_events(salvaged, events), "a good file is salvaged as something else")
    if refusal is not None:
        return
    _check_agreement(reader, salvaged)
    pieces = [event for event in salvaged if isinstance(event, np.ndarray)]
    codes = np.concatenate([sample.codes[:, :, :0], *pieces], axis=2) if mutated.kind in _DAMAGE else sample.codes
    is_lost = (codes < 0).all(axis=(0, 1))
    _must(np.array_equal(is_lost, (codes < 0).any(axis=(0, 1))), "parts of a frame are lost")
    num_losses = int(np.count_nonzero(np.diff(is_lost, prepend=False) & is_lost))
    _must((num_losses == 0) == (not is_lost.any()) and bool(reader.lost) <= bool(error), "what is lost is told wrongly")
    if mutated.kind in _DAMAGE:
        _must(reader.is_truncated or codes.shape == sample.codes.shape, "there are other frames")
        ends, true_ends = ([s.first_sample + s.num_samples for s in of] for of in (reader.segments, sample.segments))
        _must(reader.is_truncated or ends[-1] == true_ends[-1], "there are other samples")
        # A gap may swallow where one segment ends and another begins.
        _must(reader.is_truncated or set(ends) <= set(true_ends), "segments end elsewhere")
        true = sample.codes[:, :, : codes.shape[2]]
        if num_losses <= 1 and not reader.is_truncated:
            _must(np.array_equal(codes[:, :, ~is_lost], true[:, :, ~is_lost]), "what is salvaged is not in its place")
    count = reader.num_samples
    if count:
        first = rng.randrange(count)
        _collect(reader.events(first, rng.randint(1, count - first)))


def _search(mutated: Mutation, reader: Reader, rng: random.Random) -> None:
    """Segments, some frames, and a stretch, by the INDEX where there is one that is good enough."""
    is_damage, sample = mutated.kind in _DAMAGE, mutated.sample
    try:
        num_frames, num_samples = reader.num_frames, reader.num_samples
    except BitstreamError:
        return
    if is_damage and not reader.is_truncated:
        _must(len(reader.segments) == len(sample.segments), "there are other segments")
        for found, true in zip(reader.segments, sample.segments, strict=True):
            facts = [(s.first_frame, s.num_frames, s.first_sample, s.num_samples) for s in (found, true)]
            _must(facts[0] == facts[1] and _equal(found.start, true.start), f"a segment is {found}, not {true}")
    first, last = sorted(rng.randint(0, num_frames) for _ in range(2))
    with contextlib.suppress(BitstreamError):
        codes = reader.read(first, last - first)
        _must(codes.shape[2] == last - first, "read() gives another number of frames")
        _must(not is_damage or np.array_equal(codes, sample.codes[:, :, first:last]), "read() gives other codes")
    if num_samples:
        first = rng.randrange(num_samples)
        count = rng.randint(1, num_samples - first)
        events, _ = _collect(reader.events(first, count))
        if is_damage and not reader.is_truncated:
            expected = list(sample.open(sample.data).events(first, count))
            _must(same_events(events, expected[: len(events)]), f"samples {first} to {first + count} are others")


@dataclass
class Outcome:
    """What came of many mutations."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest_seconds: float = 0.0  # of processor time
    most_bytes: int = 0

    @property
    def num_mutations(self) -> int:
        return sum(self.counts.values())


def fuzz(
    indices: range,
    *,
    seed: int = 0,
    seconds: float = float("inf"),
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Try the mutations of these numbers, for so many seconds at most. To be called from the main thread."""
    all_samples, outcome, began = samples(), Outcome(), time.monotonic()
    with _alarm() as set_alarm:
        for index in indices:
            mutated = mutation(all_samples, seed, index)
            is_traced = index % _MEMORY_EVERY == 0 and not tracemalloc.is_tracing()
            if is_traced:
                tracemalloc.start()
            before = time.process_time()
            try:
                set_alarm(_MAX_SECONDS)
                result = check(mutated, random.Random(index))
                set_alarm(0)
            except (Exception, _TooSlow) as error:
                set_alarm(0)
                result = "VIOLATION"
                where = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__} {error} ({os.path.basename(where.filename)}:{where.lineno})"
                outcome.failures.append(f"--seed {seed} --only {index}: {mutated}: {what}")
            outcome.slowest_seconds = max(outcome.slowest_seconds, time.process_time() - before)
            if is_traced:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                outcome.most_bytes = max(outcome.most_bytes, peak)
                if peak > _MAX_BYTES:
                    outcome.failures.append(f"--seed {seed} --only {index}: {mutated}: took {peak} bytes of memory")
            outcome.counts[result] += 1
            outcome.seconds = time.monotonic() - began
            progress(outcome)
            if outcome.seconds > seconds:
                break
    return outcome


@contextlib.contextmanager
def _alarm() -> Iterator[Callable[[float], object]]:
    """Sets when, in seconds of this process's time, _TooSlow is raised. Where there are no such signals: never."""
    if not hasattr(signal, "setitimer"):
        yield lambda seconds: None
        return

    def too_slow(number: int, frame: FrameType | None) -> None:
        raise _TooSlow(f"after {_MAX_SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, too_slow)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def main() -> None:
    """Parse arguments and fuzz; ends with status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--only", type=int, metavar="INDEX", help="replay one mutation")
    args = parser.parse_args()
    indices = range(args.mutations) if args.only is None else range(args.only, args.only + 1)
    reports = itertools.count(1)
    due = next(reports)

    def progress(outcome: Outcome) -> None:
        nonlocal due
        if outcome.seconds > 10 * due:
            due = next(reports)
            done, rate = outcome.num_mutations, outcome.num_mutations / outcome.seconds
            print(f"{done} mutations, {rate:.0f} per second, {len(outcome.failures)} failures", flush=True)

    outcome = fuzz(indices, seed=args.seed, seconds=args.seconds, progress=progress)
    for name, count in outcome.counts.most_common():
        print(f"{count:9}  {name}")
    print(f"{outcome.num_mutations} mutations in {outcome.seconds:.0f} s")
    print(f"the slowest took {outcome.slowest_seconds:.3f} s, the largest of those traced {outcome.most_bytes} bytes")
    for failure in outcome.failures[:20]:
        print(failure)
    if outcome.failures:
        sys.exit(f"error: {len(outcome.failures)} failures")


if __name__ == "__main__":
    main()
