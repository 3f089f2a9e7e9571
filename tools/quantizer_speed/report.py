"""Timing the candidates of a case in turns, and the table of what came out."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.evaluation.environment import environment
from codec.kernels.residual_search import rvq_margins
from tools.quantizer_speed.candidates import KINDS, Candidate, Field, field, flops, num_bytes, reads
from tools.quantizer_speed.cases import Case

CLEAR_MARGIN = 1e-5
_TURN_SECONDS = 0.01
_MOST_CALLS = 50
_BEYOND_CACHES_BYTES = 2**28
_PACKAGES = ("encodec", "transformers", "descript-audio-codec", "vector-quantize-pytorch", "moshi", "triton")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of `num_calls` calls."""

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    mean_ms: float
    num_calls: int


@dataclass(frozen=True)
class Encoding(Timing):
    """The time to encode, and how the codes compare with ours."""

    times_floor: float
    times_ours: float
    same_codes: float
    other_frames: int
    clear_frames: int


@dataclass(frozen=True)
class Decoding(Timing):
    """The time to decode, and by what part of their peak the latents differ from ours."""

    times_ours: float
    difference: float


@dataclass(frozen=True)
class Result:
    """Everything about one case; of the two floors in milliseconds, the larger one counts."""

    case: str
    form: str
    shape: str
    sizes: dict[str, int]
    arithmetic_ms: float
    flops_per_s: float
    memory_ms: float
    num_bytes: int
    bytes_per_s: float
    encoding: list[Encoding]
    decoding: list[Decoding]
    floors: list[Timing]
    missing: dict[str, str]


@torch.inference_mode()
def measure(case: Case, shape: str, *, repetitions: int, kinds: Sequence[str] = KINDS) -> Result:
    """Everything of one case. ValueError where ours cannot do it."""
    entrants = field(case, kinds)
    groups = (entrants.encoders, entrants.decoders, entrants.products, entrants.reads)
    timings = take_turns([candidate for group in groups for candidate in group], repetitions, case.device)
    encodings, decodings, products, reading = (timings[_places(groups, index)] for index in range(len(groups)))
    arithmetic_ms, memory_ms = (min(timing.median_ms for timing in group) for group in (products, reading))
    batch_size, num_dims, num_frames = case.latents[0].shape
    return Result(
        case=case.name,
        form=case.kind,
        shape=shape,
        sizes={
            "batch": batch_size,
            "frames": num_frames,
            "latent_dim": num_dims,
            "codebook_dim": case.tables.entries_KCd.shape[2],
            "codebook_size": case.tables.codebook_size,
            "num_quantizers": case.tables.num_rows,
        },
        arithmetic_ms=arithmetic_ms,
        flops_per_s=flops(case) / arithmetic_ms * 1000,
        memory_ms=memory_ms,
        num_bytes=num_bytes(case),
        bytes_per_s=num_bytes(case) / memory_ms * 1000,
        encoding=_encodings(case, entrants, encodings, max(arithmetic_ms, memory_ms)),
        decoding=_decodings(entrants, decodings),
        floors=[*products, *reading],
        missing=entrants.missing,
    )


def take_turns(candidates: Sequence[Candidate], repetitions: int, device: torch.device) -> list[Timing]:
    """Time candidates in turns, each of which was called before; one timing for each."""
    inputs = [itertools.cycle(candidate.inputs) for candidate in candidates]
    counts = [_calls_per_turn(*pair, device) for pair in zip(candidates, inputs, strict=True)]
    seconds: list[list[float]] = [[] for _ in candidates]
    for _ in range(repetitions):
        for candidate, given, num_calls, taken in zip(candidates, inputs, counts, seconds, strict=True):
            if num_calls > 1:
                candidate.call(next(given))
            taken.extend(_seconds(candidate, given, device) for _ in range(num_calls))
    timings = []
    for candidate, taken in zip(candidates, seconds, strict=True):
        taken_ms = 1000 * candidate.scale * np.array(taken)
        median_ms, p10_ms, p90_ms = np.quantile(taken_ms, (0.5, 0.1, 0.9)).tolist()
        timings.append(Timing(candidate.name, median_ms, p10_ms, p90_ms, float(taken_ms.mean()), len(taken)))
    return timings


def _calls_per_turn(candidate: Candidate, inputs: Iterator[Tensor], device: torch.device) -> int:
    # The best of a few calls: one alone may have been interrupted.
    taken = [_seconds(candidate, inputs, device)]
    while len(taken) < 5 and sum(taken) < _TURN_SECONDS:
        taken.append(_seconds(candidate, inputs, device))
    return min(_MOST_CALLS, max(1, int(_TURN_SECONDS / max(1e-9, min(taken)))))


def _seconds(candidate: Candidate, inputs: Iterator[Tensor], device: torch.device) -> float:
    value = next(inputs)
    started = time.perf_counter()
    candidate.call(value)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _places(groups: Sequence[Sequence[Candidate]], index: int) -> slice:
    first = sum(len(group) for group in groups[:index])
    return slice(first, first + len(groups[index]))


def _encodings(case: Case, entrants: Field, timings: list[Timing], floor_ms: float) -> list[Encoding]:
    ours_NK = _codes(entrants.encoders[0])
    margins_NK: Tensor | None = None
    encodings = []
    for candidate, timing in zip(entrants.encoders, timings, strict=True):
        is_other_NK = _codes(candidate) != ours_NK
        other_N = is_other_NK.any(1).nonzero()[:, 0]
        clear_frames = 0
        if len(other_N):
            if margins_NK is None:
                rows_ND = torch.cat([case.rows(latents) for latents in case.latents])
                margins_NK = rvq_margins(rows_ND, case.tables, ours_NK)
            # After the first code that differs, any may follow.
            first_n = is_other_NK[other_N].byte().argmax(1)
            clear_frames = int((margins_NK[other_N, first_n] >= CLEAR_MARGIN).sum())
        encodings.append(
            Encoding(
                **asdict(timing),
                times_floor=timing.median_ms / floor_ms,
                times_ours=timing.median_ms / timings[0].median_ms,
                same_codes=1.0 - float(is_other_NK.double().mean()),
                other_frames=len(other_N),
                clear_frames=clear_frames,
            )
        )
    return encodings


def _codes(encoder: Candidate) -> Tensor:
    """All its codes [N, K]."""
    # Copies: what a CUDA graph gives is overwritten by its next replay.
    codes = [encoder.call(latents).transpose(1, 2).flatten(0, 1).clone() for latents in encoder.inputs]
    return torch.cat(codes)


def _decodings(entrants: Field, timings: list[Timing]) -> list[Decoding]:
    return [
        Decoding(
            **asdict(timing),
            times_ours=timing.median_ms / timings[0].median_ms,
            difference=max(_difference(entrants.decoders[0], candidate, codes) for codes in candidate.inputs),
        )
        for candidate, timing in zip(entrants.decoders, timings, strict=True)
    ]


def _difference(ours: Candidate, other: Candidate, codes: Tensor) -> float:
    expected = ours.call(codes).clone()
    return float((other.call(codes) - expected).abs().max() / expected.abs().max())


def lines_of(result: Result) -> Iterator[str]:
    """The table of a result."""
    size = result.sizes
    yield (
        f"{result.case}, {result.shape}: {size['batch']} x {size['frames']} frames of {size['latent_dim']} dims, "
        f"{size['num_quantizers']} x {size['codebook_size']} entries of {size['codebook_dim']} dims"
    )
    yield (
        f"floors: products {_ms(result.arithmetic_ms)} ms at {result.flops_per_s / 1e9:.1f} Gflop/s, "
        f"reading {result.num_bytes / 1e6:.2f} MB {_ms(result.memory_ms)} ms at {result.bytes_per_s / 1e9:.1f} GB/s"
    )
    head = f"{'median ms':>11}{'10 %':>10}{'90 %':>10}{'/ floor':>9}{'/ ours':>9}"
    yield f"{'encode':26}{head}{'same codes':>12}{'other frames':>14}{'clear':>7}"
    for entry in result.encoding:
        yield (
            f"{entry.name:26}{_times(entry)}{entry.times_floor:9.2f}{entry.times_ours:9.2f}"
            f"{100 * entry.same_codes:10.4f} %{entry.other_frames:14}{entry.clear_frames:7}"
        )
    yield f"{'decode':26}{head.replace('/ floor', '')}{'difference':>21}"
    for decoded in result.decoding:
        yield f"{decoded.name:26}{_times(decoded)}{'':9}{decoded.times_ours:9.2f}{decoded.difference:12.1e}"
    for name, reason in result.missing.items():
        yield f"{name:26}not available: {reason}"


def _times(timing: Timing) -> str:
    return f"{_ms(timing.median_ms):>11}{_ms(timing.p10_ms):>10}{_ms(timing.p90_ms):>10}"


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def surroundings(device: str, threads: int) -> dict[str, Any]:
    """Machine, versions, commit, command line, threads, load, and what can be read from memory beyond the caches."""
    about = environment()
    for package in _PACKAGES:
        try:
            about["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    timings = take_turns(list(reads(_BEYOND_CACHES_BYTES, torch.device(device))), 5, torch.device(device))
    return about | {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "command": shlex.join(["python", "-m", "tools.benchmark", *sys.argv[1:]]),
        "threads": threads,
        "libraries": _libraries(),
        "load": os.getloadavg()[0],
        "memory_bytes_per_s": _BEYOND_CACHES_BYTES / min(timing.median_ms for timing in timings) * 1000,
    }


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """So many threads for torch, and for numpy's products where `threadpoolctl` is installed."""
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads)
        if importlib.util.find_spec("threadpoolctl"):
            stack.enter_context(_threadpoolctl().threadpool_limits(threads, user_api="blas"))
        yield


def _libraries() -> list[dict[str, Any]] | dict[str, str]:
    """Which libraries compute, with how many threads; or else what the environment says about threads."""
    if not importlib.util.find_spec("threadpoolctl"):
        return {name: value for name, value in os.environ.items() if name.endswith("_NUM_THREADS")}
    found = _threadpoolctl().threadpool_info()
    return [{name: library.get(name) for name in ("internal_api", "version", "num_threads")} for library in found]


def _threadpoolctl() -> Any:
    return importlib.import_module("threadpoolctl")
