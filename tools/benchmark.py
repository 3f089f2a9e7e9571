"""Time a model that streams, or quantizers: `python -m tools.benchmark speed`, `... streams` or `... quantizer`.

`speed`: offline calls and single frames of a model, on a signal that it makes itself. For quality, and for codecs that
do not stream, there is `codec evaluate`. `streams`: how many streams are decoded in real time. `quantizer`: our
quantizers beside those of others and the machine's limits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from codec.models.interface import StreamableCodec, streamable
from codec.pretrained import load
from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like
from codec.token_format import DEFAULT_MODEL
from tools.quantizer_speed import command as quantizer_command
from tools.stream_load import command as streams_command


def _median_seconds(call: Callable[[], object], num_runs: int) -> float:
    call()
    seconds = []
    for _ in range(num_runs):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def speed(
    codec: StreamableCodec, *, seconds: float, num_threads: int, num_runs: int = 5, pushed_frames: int = 1
) -> dict[str, Any]:
    """Offline speed in times real time (medians), and milliseconds for so many frames pushed at a time."""
    torch.set_num_threads(num_threads)
    rate_hz, hop = codec.sample_rate_hz, codec.hop_length
    audio = torch.from_numpy(speech_like(int(seconds * rate_hz), rate_hz=rate_hz))[None]
    tokens = codec.encode(audio[None])
    encode_seconds = _median_seconds(lambda: codec.encode(audio[None]), num_runs)
    decode_seconds = _median_seconds(lambda: codec.decode(tokens), num_runs)
    encoder, decoder = StreamingEncoder(codec), StreamingDecoder(codec, global_codes=tokens.global_codes)
    encode_ms, decode_ms = [], []
    for piece in audio.split(pushed_frames * hop, dim=1):
        started = time.perf_counter()
        codes = encoder.push(piece)
        middle = time.perf_counter()
        decoder.push(codes)
        encode_ms.append(1000 * (middle - started))
        decode_ms.append(1000 * (time.perf_counter() - middle))
    return {
        "threads": num_threads,
        "encode_times_real_time": seconds / encode_seconds,
        "decode_times_real_time": seconds / decode_seconds,
        "pushed_frames": pushed_frames,
        "push_encode_ms": dataclasses.asdict(_Spread.of(encode_ms)),
        "push_decode_ms": dataclasses.asdict(_Spread.of(decode_ms)),
        "push_decode_times_real_time": 1000 * pushed_frames * hop / rate_hz / _Spread.of(decode_ms).median,
        "frame_samples": hop,
        "encode_delay_samples": hop + codec.encode_delay_samples,
        "decode_delay_samples": codec.decode_delay_samples,
    }


@dataclasses.dataclass(frozen=True)
class _Spread:
    median: float
    p95: float

    @staticmethod
    def of(values: list[float]) -> _Spread:
        warm = values[10:] or values
        return _Spread(statistics.median(warm), float(np.quantile(warm, 0.95)))


def main() -> None:
    """Parse arguments and measure; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a bundled model or a folder (speed: {DEFAULT_MODEL} if none is given)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    commands = parser.add_subparsers(dest="command", required=True)
    speed_parser = commands.add_parser("speed", help="offline and frame by frame")
    speed_parser.add_argument("--seconds", type=float, default=60.0, help="length of the signal (default: 60)")
    speed_parser.add_argument("--threads", type=int, default=1)
    speed_parser.add_argument("--pushed-frames", type=int, default=1, help="that a stream gets at once (default: 1)")
    quantizer_command.add_arguments(
        commands.add_parser(
            "quantizer",
            help="quantizers, beside those of others and the machine's limits",
            description=quantizer_command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    streams_command.add_arguments(
        commands.add_parser(
            "streams",
            help="how many streams are decoded in real time",
            description=streams_command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    args = parser.parse_args()
    try:
        if args.command == "streams":
            streams_command.command(args)
            return
        if args.command == "quantizer":
            quantizer_command.run(args)
            return
        model = args.model or DEFAULT_MODEL
        if args.pushed_frames < 1:
            raise ValueError(f"--pushed-frames={args.pushed_frames} must be positive")
        chosen = streamable(load(model))
        result = speed(chosen, seconds=args.seconds, num_threads=args.threads, pushed_frames=args.pushed_frames)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        about = {
            "model": model,
            "id": load(model).codec_id,
            "torch": torch.__version__,
            "machine": platform.processor(),
        }
        print(json.dumps(about | {"speed": result}))
    else:
        for name, value in result.items():
            text = ", ".join(f"{k} {v:.2f}" for k, v in value.items()) if isinstance(value, dict) else f"{value:g}"
            print(f"{name:24} {text}")


if __name__ == "__main__":
    main()
