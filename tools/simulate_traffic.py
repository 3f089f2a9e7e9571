"""Hours of traffic against a real server: `python -m tools.simulate_traffic MODEL --stream-hours H`.

Starts `codec serve MODEL` and keeps it busy with sessions that come and go at any time. Each has a recording of its
own length, which was coded offline before, and one of the manners below. Whatever a session gets, up to where it ends,
must be what the offline calls give for that recording, bit for bit. At the end the server must have no session open,
must not have grown, must not have written a traceback, and must stop when it is asked to.

Stream-hours are the audio that was given and compared. `--narrow` takes an untrained model of the family of the bundled
one with an eighth of its channels, which is as good for finding leaks and mix-ups, and many times faster.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.config import build
from codec.models.interface import StreamableCodec, streamable
from codec.models.multirate import MultirateCodec, MultirateConfig
from codec.pretrained import load, save
from codec.serving.client import DecodeSession, EncodeSession
from codec.serving.protocol import Close, SessionError
from codec.testing import speech_like
from codec.tokens import Tokens
from tools.stream_load.server import resident_mib, running_server

_NUM_RECORDINGS = 40
# The memory of the server after this share of the traffic is what the end is compared with.
_SETTLED_SHARE = 0.25
_MOST_GROWTH = 0.10


@dataclass(frozen=True)
class Recording:
    """Codes and what they must be decoded to, and audio and what it must be encoded to."""

    codes: np.ndarray  # int64 [K, F]
    audio: np.ndarray  # float32 [C, F * hop]
    global_codes: tuple[int, ...] | None
    spoken: np.ndarray  # int16 [C, n]
    spoken_codes: np.ndarray  # int64 [K, F']


def recordings_of(codec: StreamableCodec, rng: random.Random, longest_seconds: float) -> list[Recording]:
    """Of all lengths from one frame on, more short ones than long ones, at all rates."""
    made = []
    for at in range(_NUM_RECORDINGS):
        seconds = math.exp(rng.uniform(math.log(0.02), math.log(longest_seconds)))
        num_frames = max(1, round(seconds * codec.sample_rate_hz / codec.hop_length))
        num_rows = rng.choice(codec.valid_num_quantizers)
        generator = torch.Generator().manual_seed(at)
        sizes = codec.codebook_sizes[:num_rows]
        codes = torch.stack([torch.randint(0, size, (num_frames,), generator=generator) for size in sizes])
        # 0 is an entry of any codebook.
        voice = torch.zeros(1, codec.num_global_codes, dtype=torch.int64) if codec.num_global_codes else None
        num_samples = torch.tensor([num_frames * codec.hop_length])
        audio = codec.decode(Tokens(codes[None], num_samples, codec.codec_id, global_codes=voice))[0]
        spoken = speech_like(max(1, int(seconds * codec.sample_rate_hz)), rate_hz=codec.sample_rate_hz, seed=at)
        pcm = np.round(np.clip(spoken, -1, 1) * 32767).astype(np.int16)[None].repeat(codec.num_channels, axis=0)
        heard = torch.from_numpy(pcm.astype(np.float32) / np.float32(32768))
        made.append(
            Recording(
                codes.numpy(),
                audio.numpy(),
                None if voice is None else tuple(voice[0].tolist()),
                pcm,
                codec.encode(heard[None], num_quantizers=num_rows).codes[0].numpy(),
            )
        )
    return made


class Mismatch(AssertionError):
    """A session got what it should not."""


class Traffic:
    """All sessions, and what is counted of them."""

    def __init__(self, url: str, codec: StreamableCodec, recordings: list[Recording], seed: int) -> None:
        self.url, self.codec, self.recordings = url, codec, recordings
        self.random = random.Random(seed)
        self.num_samples = 0  # of audio that was given and is right
        self.num_sessions: Counter[str] = Counter()
        self.problems: list[str] = []
        self.is_over = False
        manners: dict[Callable[[], Awaitable[None]], int] = {
            self.decode: 10,
            self.encode: 3,
            self.drop: 2,
            self.send_nonsense: 2,
            self.begin_anew: 2,
            self.read_late: 1,
            self.ask_for_another_model: 1,
        }
        self._manners, self._weights = list(manners), list(manners.values())

    @property
    def stream_hours(self) -> float:
        """Of audio that was compared."""
        return self.num_samples / self.codec.sample_rate_hz / 3600

    async def visitor(self) -> None:
        """One session after another, until the traffic is over."""
        while not self.is_over:
            manner = self.random.choices(self._manners, self._weights)[0]
            try:
                await asyncio.wait_for(manner(), 900)
            except SessionError as error:
                if error.code != Close.UNAVAILABLE:
                    self._blame(f"{manner.__name__}: {error.code}: {error}")
                # It has not noticed yet that others have gone.
                self.num_sessions["refused, for the server was full"] += 1
                await asyncio.sleep(0.1)
                continue
            except Exception as error:
                self._blame(f"{manner.__name__}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
            self.num_sessions[manner.__name__] += 1
            await asyncio.sleep(self.random.choice([0, 0, 0.01, 0.2]))

    def _blame(self, problem: str) -> None:
        self.problems.append(problem)
        print(problem, file=sys.stderr, flush=True)

    # Manners

    async def decode(self) -> None:
        """Codes in pieces of any size, with stalls and bursts."""
        recording = self.random.choice(self.recordings)
        async with self._decoding(recording) as session:
            sending = asyncio.ensure_future(self._send(session, recording.codes, self.codec.hop_length))
            await self._expect(session, recording.audio, whole=True)
            await sending

    async def encode(self) -> None:
        """The same with audio, in pieces of 10 ms and of any size."""
        recording = self.random.choice(self.recordings)
        async with EncodeSession(self.url, num_quantizers=len(recording.spoken_codes)) as session:
            sending = asyncio.ensure_future(self._send(session, recording.spoken, 1))
            await self._expect(session, recording.spoken_codes, whole=True, samples_each=self.codec.hop_length)
            await sending

    async def drop(self) -> None:
        """The connection is lost in the middle, without a word."""
        recording = self.random.choice(self.recordings)
        async with self._decoding(recording) as session:
            sending = asyncio.ensure_future(self._send(session, recording.codes, self.codec.hop_length))
            await self._expect(session, recording.audio, at_most=self.random.randrange(1 + recording.audio.shape[1]))
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            session._socket.transport.abort()

    async def send_nonsense(self) -> None:
        """Some of a recording, and then what no server can understand."""
        recording = self.random.choice(self.recordings)
        num_rows, num_frames = recording.codes.shape
        num_good = self.random.randrange(min(num_frames, 200) + 1)
        nonsense: dict[str | bytes, int] = {
            b"\xff\xff" * num_rows: Close.BAD_INPUT,
            b"\0": Close.BAD_INPUT,
            '{"end": 1}': Close.BAD_INPUT,
            '{"lost": -3}': Close.BAD_INPUT,
            "no JSON": Close.BAD_INPUT,
            b"\0" * (2**20 + 2 * num_rows): Close.TOO_BIG,
        }
        message = self.random.choice(list(nonsense))
        async with self._decoding(recording) as session:
            await session.push(recording.codes[:, :num_good])
            with contextlib.suppress(SessionError):
                await session._sent(message)
            try:
                await self._expect(session, recording.audio)
            except SessionError as error:
                if error.code != nonsense[message]:
                    raise Mismatch(f"{message[:20]!s} was answered with {error.code}: {error}") from error
            else:
                raise Mismatch(f"{message[:20]!s} was not refused")

    async def begin_anew(self) -> None:
        """Half a recording, then all of it from the beginning in the same session."""
        recording = self.random.choice(self.recordings)
        async with self._decoding(recording) as session:
            await session.push(recording.codes[:, : recording.codes.shape[1] // 2])
            await asyncio.sleep(self.random.choice([0, 0.05]))
            await session.reset()
            sending = asyncio.ensure_future(self._send(session, recording.codes, self.codec.hop_length))
            await self._expect(session, recording.audio, whole=True)
            await sending

    async def read_late(self) -> None:
        """Nothing is read for a while, and then everything."""
        recording = self.random.choice(self.recordings)
        async with self._decoding(recording) as session:
            sending = asyncio.ensure_future(self._send(session, recording.codes, self.codec.hop_length))
            session._socket.transport.pause_reading()
            await asyncio.sleep(self.random.uniform(0, 2))
            session._socket.transport.resume_reading()
            await self._expect(session, recording.audio, whole=True)
            await sending

    async def ask_for_another_model(self) -> None:
        """Which this server does not have."""
        try:
            async with DecodeSession(self.url, model="0123456789abcdef"):
                raise Mismatch("another model was not refused")
        except SessionError as error:
            if error.code == Close.UNAVAILABLE:
                raise
            if error.code != Close.WRONG_MODEL:
                raise Mismatch(f"another model was answered with {error.code}: {error}") from error

    # What they are made of

    def _decoding(self, recording: Recording) -> DecodeSession:
        return DecodeSession(
            self.url,
            num_quantizers=len(recording.codes),
            global_codes=recording.global_codes,
            sample_format="float32",
        )

    async def _send(self, session: DecodeSession | EncodeSession, whole: np.ndarray, unit: int) -> None:
        """All of it, in some rhythm; `unit`: samples in one column."""
        rate_hz = self.codec.sample_rate_hz
        rhythm = self.random.choice(["all at once", "frames", "pieces", "stalls"])
        position = 0
        while position < whole.shape[1]:
            match rhythm:
                case "all at once":
                    size = whole.shape[1]
                case "frames":
                    size = self.random.choice([1, 1, 2, 3]) if unit > 1 else rate_hz // 100
                case _:
                    size = max(1, int(rate_hz / unit * self.random.choice([0.01, 0.1, 1, 5])))
            await session.push(whole[:, position : position + size])
            position += size
            if rhythm == "stalls" and self.random.random() < 0.1:
                await asyncio.sleep(self.random.uniform(0, 0.5))
        await session.end()

    async def _expect(
        self,
        session: DecodeSession | EncodeSession,
        wanted: np.ndarray,
        *,
        whole: bool = False,
        at_most: int | None = None,
        samples_each: int = 1,
    ) -> None:
        """What comes must be what is wanted, from its beginning; `whole`: all of it must come."""
        position = 0
        async for output in session:
            expected = wanted[:, position : position + output.shape[1]]
            if not np.array_equal(output, expected):
                raise Mismatch(f"{output.shape[1]} columns from {position} on are not those of the recording alone")
            position += output.shape[1]
            self.num_samples += output.shape[1] * samples_each
            if at_most is not None and position >= at_most:
                return
        if whole and position != wanted.shape[1]:
            raise Mismatch(f"{position} columns came, {wanted.shape[1]} were due")


async def simulate(
    traffic: Traffic, process: subprocess.Popen[bytes], *, stream_hours: float, num_visitors: int, report_every_s: float
) -> dict[str, Any]:
    """The traffic, until so much of it was compared; what there is to say of it."""
    visitors = [asyncio.ensure_future(traffic.visitor()) for _ in range(num_visitors)]
    started = reported = time.monotonic()
    settled_mib, largest_mib = 0.0, 0.0
    while traffic.stream_hours < stream_hours and process.poll() is None and len(traffic.problems) < 20:
        await asyncio.sleep(0.5)
        largest_mib = max(largest_mib, resident_mib(process))
        if traffic.stream_hours < _SETTLED_SHARE * stream_hours:
            settled_mib = largest_mib
        if time.monotonic() - reported > report_every_s:
            reported = time.monotonic()
            took, hours = reported - started, traffic.stream_hours
            print(
                f"{took:7.0f} s  {hours:8.2f} stream-hours, {hours * 3600 / took:5.0f} times real time,"
                f" {sum(traffic.num_sessions.values())} sessions, {resident_mib(process):.0f} MiB,"
                f" {len(traffic.problems)} problems",
                flush=True,
            )
    traffic.is_over = True
    await asyncio.gather(*visitors)
    took = time.monotonic() - started
    return {
        "stream_hours": traffic.stream_hours,
        "seconds": took,
        "times_real_time": traffic.stream_hours * 3600 / took,
        "sessions": dict(traffic.num_sessions),
        "settled_mib": settled_mib,
        "largest_mib": largest_mib,
    }


def problems_of(result: dict[str, Any], process: subprocess.Popen[bytes], url: str, log: Path) -> list[str]:
    """What the server did wrong beside what its sessions saw; stops it."""
    if process.poll() is not None:
        return [f"the server died with {process.returncode}"]
    problems = []
    for _ in range(50):  # of connections that were lost it learns a little later
        with urllib.request.urlopen(f"{url}/health") as answer:
            health = json.load(answer)
        if health["num_sessions"] == 0:
            break
        time.sleep(0.1)
    else:
        problems.append(f"{health['sessions']} sessions are still open")
    if result["largest_mib"] > (1 + _MOST_GROWTH) * result["settled_mib"]:
        problems.append(f"the server grew from {result['settled_mib']:.0f} to {result['largest_mib']:.0f} MiB")
    process.send_signal(signal.SIGTERM)
    try:
        if process.wait(60) != 0:
            problems.append(f"the server stopped with {process.returncode}")
    except subprocess.TimeoutExpired:
        problems.append("the server did not stop")
    if "Traceback" in log.read_text(errors="replace"):
        problems.append("the server wrote a traceback")
    return problems


def save_narrow(folder: Path) -> None:
    """An untrained model as the bundled one, with an eighth of its channels."""
    config = load("speech_16k").config
    assert isinstance(config, MultirateConfig)
    narrow = replace(
        config,
        encoder_channels=tuple(channels // 8 for channels in config.encoder_channels),
        decoder_channels=tuple(channels // 8 for channels in config.decoder_channels),
    )
    torch.manual_seed(0)
    codec: MultirateCodec = build(narrow)
    save(codec.eval(), folder, name="narrow@1")


def main() -> None:
    """Parse arguments and simulate; exit status 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="speech_16k", help="a bundled model or a folder")
    parser.add_argument("--narrow", action="store_true", help="instead of a model: an untrained, fast one")
    parser.add_argument("--stream-hours", type=float, default=1.0)
    parser.add_argument("--sessions", type=int, default=48, help="at the same time (default: 48)")
    parser.add_argument("--longest-s", type=float, default=300.0, help="of a recording (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every-s", type=float, default=30.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the server would outlive this
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if args.stream_hours <= 0 or args.sessions < 1 or args.longest_s < 0.02:
                raise ValueError("--stream-hours, --sessions and --longest-s must be positive, the last at least 0.02")
            if args.narrow:
                args.model = os.path.join(scratch, "narrow")
                save_narrow(Path(args.model))
            codec = streamable(load(args.model))
            if not codec.is_bit_exact:
                raise ValueError(f"{codec.name} does not promise bits, so there is nothing to compare")
            recordings = recordings_of(codec, random.Random(args.seed), args.longest_s)
            log = Path(scratch) / "server.log"
            with running_server(args.model, args.sessions, log) as (process, url):
                traffic = Traffic(url, codec, recordings, args.seed)
                result = asyncio.run(
                    simulate(
                        traffic,
                        process,
                        stream_hours=args.stream_hours,
                        num_visitors=args.sessions,
                        report_every_s=args.report_every_s,
                    )
                )
                problems = traffic.problems + problems_of(result, process, url, log)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    result |= {"model": codec.name, "problems": problems}
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
