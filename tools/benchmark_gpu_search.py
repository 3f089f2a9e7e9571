"""Time the residual search on a GPU by itself; this needs nothing but PyTorch and Triton.

    python -m tools.benchmark_gpu_search --rows 1 64 12000 1000000

For each number of rows, milliseconds (medians of turns that all take one after the other) of:

- products: the products of all stages alone, by the library, in float32; what bulk is measured by;
- loop: the plain loop of torch operations, a product, argmax, lookup and subtraction for each stage;
- few, many: the two ways of the kernels, whichever `search` would choose; many with blocks of 32 and of 128 rows, and
  with three TF32 products on tensor cores;
- "graph": the same from a CUDA graph.

Codebooks get smaller from stage to stage as a trained quantizer's do. "same" is the share of rows whose codes are those
of the first way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from codec.kernels import triton_search
from codec.kernels.search_tables import SearchTables

_CHUNK_ROWS = 2**16  # of the loop and the products: their scores of 1024 entries are 256 MB
_MOST_FEW_ROWS = 1024
_MOST_GRAPH_ROWS = 2**14

_Call = Callable[[], Tensor]


def candidates(latents_ND: Tensor, tables: SearchTables) -> Iterator[tuple[str, _Call]]:
    """What is timed: name and call; each gives codes [N, K] but for the products."""
    num_latents = len(latents_ND)
    entries_KCd, offsets_KC = tables.entries_KCd, tables.exact_offsets_KC.float()
    chunk_rows = min(num_latents, _CHUNK_ROWS)
    scores_NC = latents_ND.new_empty(chunk_rows, tables.codebook_size)

    def products() -> Tensor:
        for chunk_Nd in latents_ND.split(chunk_rows):
            for entries_Cd in entries_KCd:
                torch.mm(chunk_Nd, entries_Cd.t(), out=scores_NC[: len(chunk_Nd)])
        return scores_NC

    def loop() -> Tensor:
        codes = []
        for residual_Nd in latents_ND.split(chunk_rows):
            codes_K = []
            for entries_Cd, offsets_C in zip(entries_KCd, offsets_KC, strict=True):
                codes_K.append(torch.addmm(offsets_C, residual_Nd, entries_Cd.t()).argmax(1))
                residual_Nd = residual_Nd - entries_Cd[codes_K[-1]]
            codes.append(torch.stack(codes_K, 1))
        return torch.cat(codes)

    def way(few_rows: int, many_rows: int, precision: str) -> _Call:
        def call() -> Tensor:
            with (
                patch.object(triton_search, "FEW_ROWS", few_rows),
                patch.object(triton_search, "FEW_BYTES", 0),
                patch.object(triton_search, "MANY_ROWS", many_rows),
            ):
                return triton_search.search(latents_ND, tables, tables.num_rows, precision=precision)[0]

        return call

    yield "products", products
    yield "loop", loop
    if num_latents <= _MOST_FEW_ROWS:
        yield "few", way(num_latents, 0, "ieee")
    for precision in ("ieee", "tf32x3"):
        for block_rows, many_rows in ((32, num_latents + 1), (128, 0)):
            yield f"many {precision} {block_rows}", way(0, many_rows, precision)


def measure(latents_ND: Tensor, tables: SearchTables, *, repetitions: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and "same" of each candidate, and of its CUDA graph where there is one."""
    calls: dict[str, _Call] = {}
    same: dict[str, float] = {}
    expected: Tensor | None = None
    for name, call in candidates(latents_ND, tables):
        codes_NK = call()  # compiles, too
        if name not in ("products", "loop") and expected is None:
            expected = codes_NK.clone()
        if expected is not None:
            same[name] = (codes_NK == expected).all(1).double().mean().item()
        calls[name] = call
        if latents_ND.is_cuda and len(latents_ND) <= _MOST_GRAPH_ROWS:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()
            calls[f"{name}, graph"] = _replay(graph, result)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            milliseconds[name].append(_milliseconds(call, latents_ND.is_cuda))
    return {
        name: {"ms": statistics.median(times)} | ({"same": same[name]} if name in same else {})
        for name, times in milliseconds.items()
    }


def _replay(graph: torch.cuda.CUDAGraph, result: Tensor) -> _Call:
    def call() -> Tensor:
        graph.replay()
        return result

    return call


def _milliseconds(call: _Call, is_on_gpu: bool) -> float:
    """Of one call of several in a row, about 20 ms of them on a GPU; the work of the processor is part of it."""
    num_calls = 1
    while True:
        started = time.perf_counter()
        for _ in range(num_calls):
            call()
        if is_on_gpu:
            torch.cuda.synchronize()
        took_ms = 1000 * (time.perf_counter() - started)
        if took_ms > 20 or num_calls >= 1000 or not is_on_gpu:
            return took_ms / num_calls
        num_calls *= 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments and measure; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 1024, 12_000, 100_000, 1_000_000])
    parser.add_argument("--num-quantizers", type=int, default=8)
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: with TRITON_INTERPRET=1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    args = parser.parse_args(arguments)
    if min(*args.rows, args.num_quantizers, args.codebook_size, args.dim, args.repetitions) < 1:
        sys.exit("error: all numbers must be positive")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU")
    generator = torch.Generator().manual_seed(0)
    shrink_K = 0.8 ** torch.arange(args.num_quantizers)
    codebooks_KCd = torch.randn(args.num_quantizers, args.codebook_size, args.dim, generator=generator)
    tables = SearchTables((codebooks_KCd * shrink_K[:, None, None]).to(args.device))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}: {args.num_quantizers} x {args.codebook_size} entries of {args.dim} dims")
    results = []
    for num_latents in args.rows:
        latents_ND = torch.randn(num_latents, args.dim, generator=generator).to(args.device)
        result = measure(latents_ND, tables, repetitions=args.repetitions)
        results.append({"rows": num_latents, "candidates": result})
        print(f"\n{num_latents} rows")
        for candidate, values in result.items():
            gflop = 2e-9 * num_latents * codebooks_KCd.numel()
            rate = f"{gflop / values['ms']:9.2f} Tflop/s"  # Gflop/ms
            print(
                f"  {candidate:24}{values['ms']:12.4f} ms{rate}", f"  same {values['same']}" if "same" in values else ""
            )
    if args.json:
        about = {"device": name, "torch": torch.__version__, "shape": list(codebooks_KCd.shape)}
        args.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
