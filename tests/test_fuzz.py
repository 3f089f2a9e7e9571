"""The fuzzer finds nothing in readers as they are, and something in readers that do not check."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from codec.bitstream import Reader
from codec.header import split_number
from codec.salvage import SalvagingReader
from tools.fuzz import Mutation, fuzz, mutation, samples

NUM_MUTATIONS = 20_000


def test_readers_keep_their_promises_whatever_the_bytes() -> None:
    outcome = fuzz(range(NUM_MUTATIONS), seed=1)
    assert not outcome.failures
    assert outcome.num_mutations == NUM_MUTATIONS
    # It reaches all ends: a fuzzer whose mutations all die in the header would say nothing.
    assert set(outcome.counts) == {
        "header refused",
        "block refused",
        "truncated",
        "read as it was",
        "read as something else",
    }
    assert min(outcome.counts.values()) > NUM_MUTATIONS // 500
    assert outcome.most_bytes < 2**24


def test_mutations_are_the_same_in_every_run_and_of_all_kinds() -> None:
    first, second = ([mutation(same, 0, index) for index in range(300)] for same in (samples(), samples()))
    assert [(m.kind, m.data) for m in first] == [(m.kind, m.data) for m in second]
    assert len({m.kind for m in first}) == 11
    assert {m.sample.name for m in first} == {sample.name for sample in samples()}
    assert first[0].data != mutation(samples(), 1, 0).data


def test_samples_are_small_and_valid() -> None:
    for sample in samples():
        assert len(sample.data) < 700
        assert len(b"".join(sample.blocks)) + sample.header_size == len(sample.data)


def unchecked(reader: Reader, offset: int) -> tuple[int, bytes, int]:
    """`Reader._read_block` of a careless engineer."""
    reader._seek(offset)
    key, _ = reader._read_leb128("a block")
    payload = reader._exactly(key // 8, "a block")
    reader._exactly(4, "a block")
    return key % 8, payload, reader._position


def test_a_reader_that_does_not_check_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "_read_block", unchecked)
    outcome = fuzz(range(3000))
    assert outcome.counts["VIOLATION"] == len(outcome.failures) > 20
    assert any("what was given out is not in the file" in failure for failure in outcome.failures)
    found = re.fullmatch(r"--seed 0 --only (\d+): (.*) of '(.*)' \((\d+) bytes\): Violation .*", outcome.failures[0])
    assert found is not None
    replayed: Mutation = mutation(samples(), 0, int(found[1]))
    assert (replayed.kind, replayed.sample.name, len(replayed.data)) == (found[2], found[3], int(found[4]))
    assert fuzz(range(int(found[1]), int(found[1]) + 1)).failures == outcome.failures[:1]


def test_a_reader_that_crashes_or_hangs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Reader._num_frames_of

    def crashing(reader: Reader, payload: bytes) -> int:
        return real(reader, payload) if split_number(payload)[0] < 100 else 1 // 0

    monkeypatch.setattr(Reader, "_num_frames_of", crashing)
    assert any("ZeroDivisionError" in failure for failure in fuzz(range(3000)).failures)

    def hanging(reader: Reader, payload: bytes) -> int:
        while split_number(payload)[0] >= 100:
            pass
        return real(reader, payload)

    monkeypatch.setattr(Reader, "_num_frames_of", hanging)
    monkeypatch.setattr("tools.fuzz._MAX_SECONDS", 0.2)
    assert any("_TooSlow after 0.2 s" in failure for failure in fuzz(range(3000), seconds=2).failures)


def test_a_careless_salvager_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(reader: SalvagingReader, window: bytes, at: int, checksum_before: int) -> bool:
        return reader._claimed(window, at, len(window)) is not None

    monkeypatch.setattr(SalvagingReader, "_is_good", trusting)
    assert any("what is salvaged is not in its place" in failure for failure in fuzz(range(2000)).failures)


def test_it_stops_when_it_is_time() -> None:
    outcome = fuzz(range(10**6), seconds=0.5)
    assert 0 < outcome.num_mutations < 10**5
    assert 0.5 < outcome.seconds < 30


def test_the_program_prints_a_summary() -> None:
    command = [sys.executable, "-m", "tools.fuzz", "--mutations", "200", "--seed", "3"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert sum(int(line.split()[0]) for line in lines[:-2]) == 200
    assert lines[-2].startswith("200 mutations in ")
