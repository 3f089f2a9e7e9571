"""How long quantizers take, ours and others', beside the floors that no implementation can be under.

Every candidate of a case encodes the same latents with the same codebooks. In each repetition all take turns, floors
included: a turn is some 10 ms of calls, or one, and where it is several, the first, which brings memory into caches,
does not count. A call has ended when its result is there. Times are medians, with the 10th and 90th percentile.

Candidates: "ours" is the module's `encode`, "ours, compiled" the same with the search that Numba compiled, "search: X"
the search alone by one implementation, with the projections before it. "eager" loops do the same with single operations
of torch, on tables that were prepared once; "compile" is such a loop under `torch.compile`, and "graph", on a GPU, that
loop and ours in CUDA graphs. Each of the "peers" is the quantizer of another package; `tools.quantizer_speed.peers`
tells what is called.

Two floors, measured in turns with the rest; the larger one counts:

- arithmetic: the products of the same shapes, all rows at once or in blocks, whichever is faster; those of few rows at
  the rate of many;
- memory: reading as many bytes as codebooks and projections have, over and over, in the fastest of a few ways.

"same codes" is the share of codes that are those of "ours". Where they are not, "clear" counts the frames whose first
other code is not a near tie: its margin, in squared distances or 1 - cosine, is at least 1e-5. It should be 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from codec.pretrained import load
from tools.quantizer_speed.candidates import KINDS
from tools.quantizer_speed.cases import FORMS, SHAPES, Case, model_case, synthetic_case
from tools.quantizer_speed.report import limited_threads, lines_of, measure, surroundings

_REPETITIONS, _REPETITIONS_OF_MANY, _MANY_FRAMES = 20, 5, 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default="bulk,frame,stream16", help=f"of {','.join(SHAPES)}; {_shapes_help()}")
    parser.add_argument("--forms", help=f"of {','.join(FORMS)} (default: plain,grouped,factorized,split)")
    parser.add_argument(
        "--model", default=argparse.SUPPRESS, help="take the quantizer and the latents of a model, instead of --forms"
    )
    parser.add_argument("--data", type=Path, help="with --model: a folder of recordings (default: a made signal)")
    parser.add_argument("--candidates", default=",".join(KINDS), help=f"of {','.join(KINDS)} (default: all)")
    parser.add_argument(
        "--repetitions",
        type=int,
        help=f"turns of each candidate (default: {_REPETITIONS}, beyond {_MANY_FRAMES} frames {_REPETITIONS_OF_MANY})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the latents and codebooks (default: 0)")
    parser.add_argument("--json", dest="json_file", type=Path, metavar="FILE", help="write everything there, too")


def run(args: argparse.Namespace) -> None:
    """Measure and print, case by case. ValueError for a mistake in the arguments."""
    shapes, kinds = _names("--shapes", args.shapes, SHAPES), _names("--candidates", args.candidates, KINDS)
    if args.threads < 1 or (args.repetitions is not None and args.repetitions < 1):
        raise ValueError("--threads and --repetitions must be positive")
    if args.model and args.forms:
        raise ValueError("--model brings its own form: leave --forms out")
    if args.data and not args.model:
        raise ValueError("--data needs a --model, whose latents to take")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU")
    forms = _names("--forms", args.forms or "plain,grouped,factorized,split", FORMS)
    with limited_threads(args.threads):
        about = surroundings(args.device, args.threads)
        if not args.json:
            print(f"{about['machine']}, {about['device']}, {args.threads} thread(s), load {about['load']:.1f}")
            print(f"beyond the caches: {about['memory_bytes_per_s'] / 1e9:.1f} GB/s; commit {about['commit']}")
            print(", ".join(f"{name} {version}" for name, version in about["versions"].items()), flush=True)
        results = []
        for shape, case in _cases(args, shapes, forms):
            few = _REPETITIONS_OF_MANY if case.num_rows > _MANY_FRAMES else _REPETITIONS
            results.append(measure(case, shape, repetitions=args.repetitions or few, kinds=kinds))
            if not args.json:
                print("", *lines_of(results[-1]), sep="\n", flush=True)
    text = json.dumps(about | {"results": [asdict(result) for result in results]}, indent=1)
    if args.json:
        print(text)
    if args.json_file:
        args.json_file.write_text(text + "\n", encoding="utf-8")


def _cases(args: argparse.Namespace, shapes: tuple[str, ...], forms: tuple[str, ...]) -> Iterator[tuple[str, Case]]:
    for name in [args.model] if args.model else forms:
        for shape in shapes:
            if args.model:
                yield shape, model_case(load(name), SHAPES[shape], folder=args.data, device=args.device)
            else:
                yield shape, synthetic_case(name, FORMS[name], SHAPES[shape], seed=args.seed, device=args.device)


def _names(option: str, given: str, known: Collection[str]) -> tuple[str, ...]:
    names = tuple(given.split(","))
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names


def _shapes_help() -> str:
    return ", ".join(f"{name}: {batch} x {frames} frames" for name, (batch, frames) in SHAPES.items())
