"""The load test of many streams: what it counts, and its command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from codec.models.interface import StreamableCodec
from codec.pretrained import save
from codec.testing import tiny_codec, tiny_voiced_codec
from tools.stream_load import traffic, ways
from tools.stream_load.traffic import Load
from tools.stream_load.ways import Done


class _Scripted:
    """Decoders that need a given time, by a clock of their own, for each frame; every frame has 20 ms."""

    frame_seconds, sample_rate_hz, state_bytes_per_stream, in_step = 0.02, 1000, 2048, False

    def __init__(self, clock: "_Clock", seconds_per_frame: float, *, late_frames: int = 0) -> None:
        self.clock, self.seconds_per_frame, self.late_frames = clock, seconds_per_frame, late_frames
        self.waiting: list[int] = []
        self.begin()

    def begin(self) -> None:
        self.num_done: dict[int, int] = {}

    def push(self, stream: int) -> None:
        self.waiting.append(stream)

    def work(self) -> list[Done]:
        if not self.waiting:
            return []
        stream = self.waiting.pop(0)
        self.clock.now += self.seconds_per_frame
        self.num_done[stream] = self.num_done.get(stream, 0) + 1
        return [Done(stream, 1, 20 if self.num_done[stream] > self.late_frames else 0)]


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1e-6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(traffic, "time", clock)
    return clock


def _run(decoders: _Scripted, num_streams: int, seconds: float = 2.0) -> Load:
    return traffic.run(decoders, "scripted", num_streams=num_streams, seconds=seconds, prebuffer_ms=40)


def test_who_is_fast_enough_makes_nobody_wait(clock: _Clock) -> None:
    load = _run(_Scripted(clock, 0.001, late_frames=1), 10)
    assert load.num_underruns == 0
    assert load.is_real_time
    assert load.num_frames == 1000
    assert load.busy_share == pytest.approx(0.5, abs=0.05)
    assert load.latency_p50_ms == pytest.approx(1, abs=0.3)
    assert load.first_audio_p50_ms == pytest.approx(21, abs=1), "the first audio waits for the second frame"
    assert load.state_kib_per_stream == 2


def test_who_is_too_slow_is_found_out(clock: _Clock) -> None:
    load = _run(_Scripted(clock, 0.0025), 10)
    assert load.busy_share > 0.99
    assert load.num_underruns > 0
    assert not load.is_real_time
    assert load.latency_p99_ms > 300, "a quarter of two seconds is behind at the end"


def test_one_long_stop_is_an_underrun_of_every_stream(clock: _Clock) -> None:
    decoders = _Scripted(clock, 0.0001)
    work, num_calls = decoders.work, 0

    def stopping() -> list[Done]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 300:
            clock.now += 0.2
        return work()

    decoders.work = stopping  # type: ignore[method-assign]
    load = _run(decoders, 4)
    assert load.num_underruns == 4, "each listener waits once, and later than before everything is in time"


@pytest.mark.parametrize("codec", [tiny_codec(), tiny_voiced_codec()], ids=["multirate", "semantic_global"])
def test_every_way_decodes_every_frame(codec: StreamableCodec) -> None:
    codes = ways.Codes(codec, 3)
    tried: list[ways.Decoders] = [ways.Pool(codec, 3, codes), ways.OneByOne(codec, 3, codes)]
    if codec.num_global_codes:
        with pytest.raises(ValueError, match="hears everything before a frame"):
            ways.Recompute(codec, 3, codes)
    else:
        tried.append(ways.Recompute(codec, 3, codes))
    for way in tried:
        num_frames, num_samples = [0] * 3, [0] * 3
        for at in range(30):
            for stream in range(3):
                if (at + stream) % 3:
                    way.push(stream)
            while moved := way.work():
                for done in moved:
                    num_frames[done.stream] += done.num_frames
                    num_samples[done.stream] += done.num_samples
        assert num_frames == [20, 20, 20]
        late = codec.decode_delay_samples
        assert num_samples == [20 * codec.hop_length - late] * 3


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.benchmark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=120)


def test_the_command_measures() -> None:
    arguments = ("--json", "streams", "--streams", "2", "--seconds", "0.2", "--ways", "pool", "one by one")
    done = _command(*arguments)
    assert done.returncode == 0, done.stderr
    loads = json.loads(done.stdout)["loads"]
    assert [load["way"] for load in loads] == ["pool", "one by one"]
    assert all(load["num_frames"] == 20 for load in loads)


def test_sessions_of_a_server_get_every_frame(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from tools.stream_load.served import run_served

    codec = tiny_codec()
    save(codec, tmp_path / "model", name="tiny@1")
    load = run_served(str(tmp_path / "model"), codec, num_streams=3, seconds=0.2, prebuffer_ms=40)
    assert load.num_streams == 3
    assert load.num_frames == 3 * (50 - 1), "the first of the 50 frames of each comes out with the second"
    assert 0 < load.latency_p50_ms < 10_000
    assert 0 < load.busy_share < 2


def test_a_mistake_is_one_line() -> None:
    done = _command("streams", "--streams", "0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["error: --streams 0 must be positive"]
