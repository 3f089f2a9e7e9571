"""How many streams are decoded in real time: `python -m tools.benchmark streams`.

Every stream gets one frame of codes as often as a frame is long, as from a language model that speaks; the streams
begin at times spread evenly over a frame. One loop takes what has arrived and computes, so a frame that comes while
others are computed waits. Each way of decoding gets the same traffic, one after another:

- `pool`: a `StreamPool`;
- `one by one`: a `StreamingDecoder` for each stream;
- `recompute`: no state; for each frame the last frames are decoded again, as many as a sample depends on, and all but
  the new samples are thrown away: how codecs without streams are served;
- `served` (`--served`): a pool in `codec serve`, over sockets, with all clients in this process; on a machine of few
  cores they take their share;
- `mimi` (`--mimi`): the decoder of the `moshi` package, random weights of its published shape and 8 rows of codes,
  all streams in one batch in step with each other; its frames are of 80 ms.

A frame's latency is the time from its arrival to its audio. A listener starts `--prebuffer-ms` after the first audio;
an underrun is a piece of audio that was not there when its turn came, which then delays the rest. The first audio is
counted from the first frame's arrival, and waits for as many frames as the decoder is late.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from codec.models.interface import StreamableCodec, streamable
from codec.pretrained import load
from codec.token_format import DEFAULT_MODEL
from tools.stream_load.traffic import Load, run
from tools.stream_load.ways import Codes, Decoders, Mimi, OneByOne, Pool, Recompute

WAYS = ("pool", "one by one", "recompute")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 10, 20, 40, 60, 80], metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default: 10)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--mimi", action="store_true", help="Mimi of the moshi package as well, which must be there")
    parser.add_argument("--served", action="store_true", help="over sockets as well (the extra serving)")
    parser.add_argument("--prebuffer-ms", type=float, default=40.0, help="that a listener waits (default: 40)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)


def measured(codec: StreamableCodec, args: argparse.Namespace) -> Iterator[Load]:
    """Each way with each number of streams, until it falls behind."""
    torch.set_num_threads(args.threads)
    ways: dict[str, Callable[[int], Decoders]] = {
        "pool": lambda n: Pool(codec, n, Codes(codec, n)),
        "one by one": lambda n: OneByOne(codec, n, Codes(codec, n)),
        "recompute": lambda n: Recompute(codec, n, Codes(codec, n)),
    }
    wanted = args.ways or [way for way in WAYS if way != "recompute" or Recompute.can_decode(codec)]
    chosen = {way: ways[way] for way in wanted} | ({"mimi": Mimi} if args.mimi else {})
    times: dict[str, float] = {"seconds": args.seconds, "prebuffer_ms": args.prebuffer_ms}
    runs: dict[str, Callable[[int], Load]] = {
        way: functools.partial(_run_built, build, way, times) for way, build in chosen.items()
    }
    if args.served:
        from tools.stream_load.served import run_served  # needs packages that nothing else needs

        runs["served"] = lambda n: run_served(args.model or DEFAULT_MODEL, codec, num_streams=n, **times)
    for run_with in runs.values():
        for num_streams in sorted(args.streams):
            if num_streams < 1:
                raise ValueError(f"--streams {num_streams} must be positive")
            result = run_with(num_streams)
            yield result
            if not result.is_real_time:
                break


def _run_built(build: Callable[[int], Decoders], way: str, times: dict[str, float], num_streams: int) -> Load:
    return run(build(num_streams), way, num_streams=num_streams, **times)


def command(args: argparse.Namespace) -> None:
    """Measure and print."""
    codec = streamable(load(args.model or DEFAULT_MODEL)).to(args.device)
    if not args.json:
        print(
            f"{'':12}{'streams':>8}{'p50':>9}{'p95':>9}{'p99':>9}{'first audio':>16}{'underruns':>11}"
            f"{'busy':>7}{'state':>10}"
        )
    results = []
    for result in measured(codec, args):
        results.append(asdict(result))
        if not args.json:
            print(
                f"{result.way:12}{result.num_streams:8}{result.latency_p50_ms:6.1f} ms{result.latency_p95_ms:6.1f} ms"
                f"{result.latency_p99_ms:6.1f} ms{result.first_audio_p50_ms:6.1f}/{result.first_audio_worst_ms:.1f} ms"
                f"{result.num_underruns:11}{result.busy_share:7.0%}{result.state_kib_per_stream:6.0f} KiB",
                flush=True,
            )
    if args.json:
        print(json.dumps({"model": codec.name, "torch": torch.__version__, "loads": results}))
