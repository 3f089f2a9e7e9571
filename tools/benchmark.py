"""Measure a model: `python -m tools.benchmark quality FOLDER` or `python -m tools.benchmark speed`.

`quality` encodes and decodes every recording under a folder at several rates and prints the mean of each metric, one
line per rate. `speed` times the offline calls and single frames on one CPU thread, on a signal it makes itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.audio import find_audio, read_audio, resample
from codec.evaluation import available_metrics, evaluate
from codec.models.interface import StreamableCodec, streamable
from codec.pretrained import load
from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like
from codec.token_format import DEFAULT_MODEL

# One model per process, not one per file.
_load_once = functools.cache(load)


def _measure_file(
    file: Path, *, model: str, num_quantizers: tuple[int, ...], metrics: tuple[str, ...]
) -> dict[int, dict[str, float]]:
    torch.set_num_threads(1)
    codec = _load_once(model)
    audio, rate_hz = read_audio(file)
    reference = resample(audio[:1], rate_hz, codec.sample_rate_hz)[0].copy()
    tokens = codec.encode(torch.from_numpy(reference)[None, None])
    return {
        k: evaluate(reference, codec.decode(tokens.prefix(k))[0, 0].numpy(), codec.sample_rate_hz, metrics)
        for k in num_quantizers
    }


def quality(model: str, folder: Path, num_quantizers: tuple[int, ...], num_workers: int) -> list[dict[str, Any]]:
    """Mean metrics over the recordings of a folder, one row per rate. ValueError where there are no recordings."""
    files = find_audio(folder)
    codec, metrics = load(model), available_metrics()
    rates = num_quantizers or codec.valid_num_quantizers
    for k in rates:
        if k not in codec.valid_num_quantizers:
            raise ValueError(f"num_quantizers={k} is not one of {codec.valid_num_quantizers}")
    measure = functools.partial(_measure_file, model=model, num_quantizers=rates, metrics=metrics)
    with ProcessPoolExecutor(num_workers) as pool:
        results = list(pool.map(measure, files))
    rows = []
    for k in rates:
        row: dict[str, Any] = {"kbps": codec.bitrate_bps(k) / 1000, "num_quantizers": k, "files": len(files)}
        for name in metrics:
            values = [result[k][name] for result in results if not np.isnan(result[k][name])]
            row[name] = statistics.fmean(values) if values else None
        rows.append(row)
    return rows


def _median_seconds(call: Callable[[], object], num_runs: int) -> float:
    call()
    seconds = []
    for _ in range(num_runs):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def speed(codec: StreamableCodec, *, seconds: float, num_threads: int, num_runs: int = 5) -> dict[str, Any]:
    """Offline speed in times real time (medians), and milliseconds for one frame pushed at a time."""
    torch.set_num_threads(num_threads)
    rate_hz, hop = codec.sample_rate_hz, codec.hop_length
    audio = torch.from_numpy(speech_like(int(seconds * rate_hz), rate_hz=rate_hz))[None]
    tokens = codec.encode(audio[None])
    encode_seconds = _median_seconds(lambda: codec.encode(audio[None]), num_runs)
    decode_seconds = _median_seconds(lambda: codec.decode(tokens), num_runs)
    encoder, decoder = StreamingEncoder(codec), StreamingDecoder(codec)
    encode_ms, decode_ms = [], []
    for frame in audio.split(hop, dim=1):
        started = time.perf_counter()
        codes = encoder.push(frame)
        middle = time.perf_counter()
        decoder.push(codes)
        encode_ms.append(1000 * (middle - started))
        decode_ms.append(1000 * (time.perf_counter() - middle))
    return {
        "threads": num_threads,
        "encode_times_real_time": seconds / encode_seconds,
        "decode_times_real_time": seconds / decode_seconds,
        "frame_encode_ms": dataclasses.asdict(_Spread.of(encode_ms)),
        "frame_decode_ms": dataclasses.asdict(_Spread.of(decode_ms)),
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


def _print_table(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    cells = [[f"{row[n]:.3f}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    for line in [names, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    """Parse arguments and measure; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"a bundled model or a folder (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    commands = parser.add_subparsers(dest="command", required=True)
    quality_parser = commands.add_parser("quality", help="metrics over a folder of recordings")
    quality_parser.add_argument("folder", type=Path)
    quality_parser.add_argument("--num-quantizers", type=int, nargs="+", default=[], help="rates (default: all)")
    quality_parser.add_argument("--num-workers", type=int, default=1)
    speed_parser = commands.add_parser("speed", help="offline and frame by frame")
    speed_parser.add_argument("--seconds", type=float, default=60.0, help="length of the signal (default: 60)")
    speed_parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    try:
        if args.command == "quality":
            rows = quality(args.model, args.folder, tuple(args.num_quantizers), args.num_workers)
            result: dict[str, Any] = {"quality": rows}
        else:
            result = {"speed": speed(streamable(load(args.model)), seconds=args.seconds, num_threads=args.threads)}
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.json:
        about = {
            "model": args.model,
            "id": load(args.model).codec_id,
            "torch": torch.__version__,
            "machine": platform.processor(),
        }
        print(json.dumps(about | result))
    elif args.command == "quality":
        _print_table(result["quality"])
    else:
        for name, value in result["speed"].items():
            text = ", ".join(f"{k} {v:.2f}" for k, v in value.items()) if isinstance(value, dict) else f"{value:g}"
            print(f"{name:24} {text}")


if __name__ == "__main__":
    main()
