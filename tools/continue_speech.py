"""Let a language model of tokens go on with a recording, and write the audio as it comes.

    python -m tools.continue_speech LM CODEC prompt.wav out.wav --seconds 5 --top-k 100 --seed 1
    python -m tools.continue_speech LM CODEC prompt.wav - | aplay

LM is a folder that tools.export_lm wrote, CODEC the model whose tokens it writes: a bundled one, or a folder. The
output is the prompt, as the codec makes it sound, and what the language model says then, in the prompt's voice where
the codec keeps voices apart. How fast that was is told on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from codec.audio import AudioWriter, read_audio, resample
from codec.models.interface import Codec, streamable
from codec.pretrained import load
from codec.streaming import StreamingDecoder
from codec.tokens import Tokens
from recipes.token_lm import TokenLM, load_lm
from recipes.token_sampling import Sampling, continued


@dataclass
class Speed:
    """What a continuation took, from the first step of the language model on."""

    seconds: float = 0.0  # by the clock
    first_audio_seconds: float = 0.0  # until there was audio beyond the prompt's
    audio_seconds: float = 0.0  # beyond the prompt's

    def __str__(self) -> str:
        times = self.audio_seconds / self.seconds if self.seconds else 0.0
        told = f"{self.audio_seconds:.2f} s in {self.seconds:.2f} s, {times:.2f} times real time"
        return f"{told}; first new audio after {1000 * self.first_audio_seconds:.0f} ms, the prompt read in that time"


def encode_prompt(file: Path, codec: Codec, lm: TokenLM) -> Tokens:
    """A recording, mixed down, as tokens of whole frames, since zeros after it would be heard.

    ValueError where the codec is not the language model's, or the recording has not a frame.
    """
    vocabulary = lm.config.vocabulary
    if codec.codec_id != vocabulary.codec_id:
        raise ValueError(f"the language model writes tokens of codec {vocabulary.codec_id}, not of {codec.name}")
    audio, rate_hz = read_audio(file)
    mono = resample(audio.mean(axis=0, keepdims=True), rate_hz, codec.sample_rate_hz)
    num_samples = mono.shape[1] // codec.hop_length * codec.hop_length
    if num_samples == 0:
        raise ValueError(f"{file} is shorter than a frame of {codec.hop_length} samples")
    return codec.encode(torch.from_numpy(mono[None, :, :num_samples].copy()), num_quantizers=vocabulary.num_quantizers)


def speak(
    lm: TokenLM, codec: Codec, prompt: Tokens, sampling: Sampling, *, num_samples: int, speed: Speed
) -> Iterator[Tensor]:
    """Audio [C, n] of the prompt and of at most `num_samples` beyond it, as it comes; `speed` is told on the way."""
    decoder = StreamingDecoder(streamable(codec), global_codes=prompt.global_codes)
    num_left = int(prompt.num_samples) + num_samples
    num_frames_left = codec.num_frames_for(num_left)
    started = time.perf_counter()

    def told(audio: Tensor) -> Tensor:
        nonlocal num_left
        audio = audio[:, :num_left]
        num_left -= audio.shape[1]
        speed.seconds = time.perf_counter() - started
        speed.audio_seconds = max(0, num_samples - num_left) / codec.sample_rate_hz
        if speed.audio_seconds and not speed.first_audio_seconds:
            speed.first_audio_seconds = speed.seconds
        return audio

    for codes in continued(lm, prompt, sampling):
        codes = codes[:, :num_frames_left]
        num_frames_left -= codes.shape[1]
        yield told(decoder.push(codes))
        if num_frames_left == 0:
            break
    yield told(decoder.flush())


def main() -> None:
    """Parse arguments and do it; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lm", type=Path, metavar="LM")
    parser.add_argument("codec", metavar="CODEC")
    parser.add_argument("prompt", type=Path, metavar="PROMPT")
    parser.add_argument("out", metavar="OUT", help="an audio file, or - for WAV on standard output")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to go on, at most (default: 5)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, help="draw from so many ids (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-end", action="store_true", help="go on for all of --seconds")
    parser.add_argument("--num-threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    speed = Speed()
    try:
        if not 0.0 < args.seconds < 1e6:
            raise ValueError(f"--seconds={args.seconds} must be positive")
        sampling = Sampling(temperature=args.temperature, top_k=args.top_k, seed=args.seed, may_end=not args.no_end)
        lm, codec = load_lm(args.lm), streamable(load(args.codec))
        prompt = encode_prompt(args.prompt, codec, lm)
        num_samples = round(args.seconds * codec.sample_rate_hz)
        target = sys.stdout.buffer if args.out == "-" else args.out
        with AudioWriter(target, codec.sample_rate_hz, codec.num_channels) as writer:
            for audio in speak(lm, codec, prompt, sampling, num_samples=num_samples, speed=speed):
                writer.write(audio.numpy())
            writer.finish()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
        sys.exit("error: standard output was closed")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(speed, file=sys.stderr)


if __name__ == "__main__":
    main()
