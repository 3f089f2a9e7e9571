"""A text-to-speech loop: a language model writes codes, `codec serve` makes audio of them, frames of 10 ms come out.

    codec serve & python -m tools.examples.tts_adapter ws://127.0.0.1:8765 speech.codec --out heard.wav

The service has the form that voice agents built on Pipecat expect of one: `run_tts` is an asynchronous generator of
frames, each with PCM16 bytes, a rate and a number of channels. The language model is a stand-in, which says the codes
of a `.codec` file at an uneven pace; everything after it is what a real one would need.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import wave
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

import codec
from codec.serving.client import DecodeSession
from codec.serving.protocol import SessionError


@dataclass(frozen=True)
class AudioFrame:
    """A piece of speech on its way to the listener: PCM16 little endian, channels interleaved."""

    audio: bytes
    sample_rate: int
    num_channels: int


class FakeLanguageModel:
    """Says the codes of a file [K, F], some frames at a time; thinks first, and now and then again."""

    def __init__(self, codes: np.ndarray, *, think_s: float = 0.1, jitter_s: float = 0.02, seed: int = 0) -> None:
        self.codes = codes
        self._think_s, self._jitter_s = think_s, jitter_s
        self._rng = np.random.default_rng(seed)
        self.first_code_at: float | None = None

    async def generate(self, text: str) -> AsyncIterator[np.ndarray]:
        """Codes [K, n], n from 1 to 4."""
        await asyncio.sleep(self._think_s)
        first = 0
        while first < self.codes.shape[1]:
            last = first + int(self._rng.integers(1, 5))
            self.first_code_at = self.first_code_at or time.perf_counter()
            yield self.codes[:, first:last]
            first = last
            await asyncio.sleep(float(self._rng.exponential(self._jitter_s)))


class CodecTTSService:
    """Text to audio frames of 10 ms, the last one shorter where it has to be."""

    def __init__(self, url: str, language_model: FakeLanguageModel, *, token: str | None = None) -> None:
        self._url = url
        self._language_model = language_model
        self._token = token

    async def run_tts(self, text: str) -> AsyncIterator[AudioFrame]:
        """Frames as soon as they are known. Whoever stops listening ends the session, and the model with it."""
        num_rows = len(self._language_model.codes)
        async with DecodeSession(self._url, num_quantizers=num_rows, token=self._token) as session:
            pushing = asyncio.create_task(self._push(session, text))
            try:
                rate_hz, num_channels = session.welcome.sample_rate_hz, session.welcome.num_channels
                frame_bytes = rate_hz // 100 * session.welcome.bytes_per_sample
                pending = b""
                async for audio in session:
                    pending += session.welcome.pack_audio(audio)
                    while len(pending) >= frame_bytes:
                        yield AudioFrame(pending[:frame_bytes], rate_hz, num_channels)
                        pending = pending[frame_bytes:]
                if pending:
                    yield AudioFrame(pending, rate_hz, num_channels)
                await pushing
            finally:
                pushing.cancel()

    async def _push(self, session: DecodeSession, text: str) -> None:
        try:
            async for codes in self._language_model.generate(text):
                await session.push(codes)
        finally:  # also where the model fails: what it said so far is heard
            await session.end()


async def speak(
    url: str, codes: np.ndarray, *, token: str | None = None, seed: int = 0
) -> tuple[list[AudioFrame], float]:
    """All frames, and the seconds from the model's first code to the first frame."""
    language_model = FakeLanguageModel(codes, seed=seed)
    frames, first_frame_at = [], 0.0
    async for frame in CodecTTSService(url, language_model, token=token).run_tts("Whatever the codes say."):
        first_frame_at = first_frame_at or time.perf_counter()
        frames.append(frame)
    return frames, first_frame_at - (language_model.first_code_at or first_frame_at)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server: ws://127.0.0.1:8765")
    parser.add_argument("codes", help="what is said: a .codec file of the server's model")
    parser.add_argument("--out", help="a WAV file for what is heard")
    parser.add_argument("--token", help="of the server, where it wants one")
    args = parser.parse_args()
    try:
        with codec.open(args.codes) as file:
            codes = file.read(0, file.num_frames)[0]
        frames, first_s = asyncio.run(speak(args.url, codes, token=args.token))
    except (codec.BitstreamError, SessionError, ValueError, OSError) as error:
        sys.exit(f"tts_adapter: {error}")
    seconds = sum(len(frame.audio) / (2 * frame.num_channels * frame.sample_rate) for frame in frames)
    print(f"{len(frames)} frames, {seconds:.2f} s of speech; first audio {1000 * first_s:.0f} ms after the first code")
    if args.out and frames:
        with wave.open(args.out, "wb") as out:
            out.setparams((frames[0].num_channels, 2, frames[0].sample_rate, 0, "NONE", ""))
            out.writeframes(b"".join(frame.audio for frame in frames))


if __name__ == "__main__":
    main()
