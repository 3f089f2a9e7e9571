"""Measure files and the command line: `python -m tools.benchmark_files container|command FOLDER`.

`container` encodes every recording under a folder and says what its files are made of: bits of codes packed and
entropy-coded, bytes of the container around them, and what entropy coding costs. `command` makes one long recording
and several short ones of them and times `codec encode` and `codec decode` as a user runs them, start-up and files
included, and their peak memory: one thread on the long one; one process and all cores on the short ones.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.audio import AudioReader, AudioWriter, Resampler, find_audio
from codec.bitstream import FRAMES_PER_BLOCK, Reader
from codec.pretrained import load
from codec.token_format import DEFAULT_MODEL
from codec.transcode import encode_audio


def container(model: str, folder: Path, num_quantizers: int | None) -> dict[str, Any]:
    """Sums over the recordings of a folder, on one thread. ValueError where there are none, or no entropy tables."""
    torch.set_num_threads(1)
    codec = load(model)
    tables = codec.token_format.tables if codec.token_format else None
    if tables is None:
        raise ValueError(f"{model} has no entropy tables; make them with: python -m tools.fit_entropy {model} ...")
    files = find_audio(folder)
    packed_bits = coded_bytes = num_blocks = num_bytes = 0
    seconds = encode_seconds = coding_seconds = 0.0
    for file in files:
        target = io.BytesIO()
        with AudioReader(file) as audio:
            started = time.perf_counter()
            num_samples = encode_audio(codec, audio, target, num_quantizers=num_quantizers)
            encode_seconds += time.perf_counter() - started
            seconds += num_samples / audio.rate_hz
        target.seek(0)
        reader = Reader(target, tables=tables)
        codes = np.concatenate(list(reader.blocks()), axis=2)
        packed_bits += codes.shape[2] * reader.header.bits_per_frame
        coded_bytes += reader.num_code_bytes
        num_blocks += reader.num_blocks
        num_bytes += reader.num_bytes
        started = time.perf_counter()
        for first in range(0, codes.shape[2], FRAMES_PER_BLOCK):
            tables.encode(codes[:, :, first : first + FRAMES_PER_BLOCK])
        coding_seconds += time.perf_counter() - started
    packed_bytes = packed_bits / 8
    # A block is more than its codes by 7 bytes: type and size, number of frames, checksum. Other bytes: header and END.
    block_bytes = 7 * num_blocks
    return {
        "files": len(files),
        "seconds": round(seconds, 1),
        "packed_bps": 8 * packed_bytes / seconds,
        "coded_bps": 8 * coded_bytes / seconds,
        "file_bps": 8 * num_bytes / seconds,
        "entropy_coding_saves": 1 - coded_bytes / packed_bytes,
        "entropy_coding_saves_net_of_blocks": 1 - (coded_bytes + block_bytes) / packed_bytes,
        "block_overhead": block_bytes / packed_bytes,
        "container_overhead": (num_bytes - coded_bytes) / packed_bytes,
        "entropy_coding_share_of_encode_time": coding_seconds / encode_seconds,
    }


def command(model: str, folder: Path, num_minutes: int, num_short: int) -> dict[str, Any]:
    """Times of the command line on real speech, repeated where there is too little of it."""
    cores = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"minutes": num_minutes, "short_files": num_short, "cores": cores}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "short").mkdir()
        _speech(folder, work / "long.wav", 60 * num_minutes)
        for i in range(num_short):
            _speech(folder, work / "short" / f"{i}.wav", 60, skip=i)
        seconds = 60 * num_minutes
        for verb, arguments in (
            ("encode", ["long.wav", "long.codec"]),
            ("decode", ["long.codec", "long2.wav"]),
        ):
            elapsed, peak = _timed(work, verb, *arguments, "--model", model)
            result[f"{verb}_times_real_time"] = seconds / elapsed
            result[f"{verb}_peak_mb"] = peak
        for label, jobs in (("one_process", 1), ("all_cores", cores)):
            elapsed, _ = _timed(work, "encode", "short", f"out{jobs}", "--jobs", str(jobs), "--model", model)
            result[f"short_files_{label}_times_real_time"] = 60 * num_short / elapsed
    return result


def _speech(folder: Path, target: Path, seconds: int, *, skip: int = 0, rate_hz: int = 16000) -> None:
    """So many seconds of the recordings under a folder, one after the other, as a mono file."""
    missing = seconds * rate_hz
    with AudioWriter(target, rate_hz, 1, num_samples=missing) as writer:
        for file in itertools.islice(itertools.cycle(find_audio(folder)), skip, None):
            with AudioReader(file) as audio:
                resampler = Resampler(audio.rate_hz, rate_hz, 1)
                for piece in [*(resampler.push(block[:1]) for block in audio.blocks()), resampler.flush()]:
                    writer.write(piece[:, :missing])
                    missing -= min(missing, piece.shape[1])
            if not missing:
                break
        writer.finish()


def _timed(work: Path, *arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in MB of one run of the command."""
    # A process of its own asks the system for its children's peak, so that one run's does not hide in another's.
    code = (
        "import resource, subprocess, sys, time; t = time.perf_counter(); subprocess.run(sys.argv[1:], check=True); "
        "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    call = [sys.executable, "-c", code, sys.executable, "-m", "codec", *arguments]
    done = subprocess.run(call, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"codec {' '.join(arguments)} failed: {done.stderr.strip()}")
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def main() -> None:
    """Parse arguments and measure; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["container", "command"])
    parser.add_argument("folder", type=Path, help="recordings of speech")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"a bundled model or a folder (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--num-quantizers", type=int, default=None, help="rows of codes (default: all)")
    parser.add_argument("--minutes", type=int, default=60, help="of the long recording (default: 60)")
    parser.add_argument("--short-files", type=int, default=16, help="recordings of a minute each (default: 16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    try:
        if args.what == "container":
            result = container(args.model, args.folder, args.num_quantizers)
        else:
            result = command(args.model, args.folder, args.minutes, args.short_files)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:42} {value:.4g}" if isinstance(value, float) else f"{key:42} {value}")


if __name__ == "__main__":
    main()
