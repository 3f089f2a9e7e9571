"""Train every kind of quantizer for the same short time on the same latents, and compare what they keep of them.

    python -m tools.benchmark_quantizers --data RECORDINGS

The latents are those of a model, before its quantizer, of the first 20 seconds of as many recordings, in random order,
as make up `--minutes`; every fourth recording is held out. Each member has 40 bits a frame, or as near as it comes, and
learns by its own losses, the mean square error of what comes out, Adam with a rate that falls to zero, and
`Quantizer.update`.

The latents stand still. So what is compared is how quantizers fit latents, not what a codec would make of them; how
well a gradient passes to an encoder does not show. Members that give out latents of another kind (unit vectors,
normalised ones, entries of their own) stand between two linear maps, which begin as the identity and learn with them;
others have such maps inside.

Columns, all of held-out frames and of codes as in use (`encode`):

- distortion: mean square error over variance;
- bits: of a frame, packed; entropy: bits of a frame at the entropies of the single code rows;
- usage: the number of different codes over what as many frames would show if all codes were equally likely; mean over
  rows. A row of 64,000 codes cannot show them all in a few thousand frames, and so its entropy and perplexity also fall
  short of the truth;
- perplexity: of the codes of a row; geometric mean over rows;
- step: median milliseconds of a training step.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.audio import find_audio, read_audio, resample
from codec.config import build, from_dict
from codec.models.interface import Codec
from codec.pretrained import load
from codec.quantizers.interface import Quantizer
from codec.token_format import DEFAULT_MODEL

HELD_OUT = 4  # every fourth recording
MAX_SECONDS = 20  # of a recording


@dataclass(frozen=True)
class Member:
    """A quantizer to compare.

    `settings`: its configuration, but for the latents' dims. `weights`: of its losses, as published where its class
    tells, and else said here. `lr`: the best of 0.003, 0.01 and 0.03 in 100 steps. `mapped`: between linear maps.
    """

    settings: Mapping[str, Any]
    weights: Mapping[str, float] = field(default_factory=dict)
    lr: float = 0.03
    mapped: bool = False


def _member(
    type: str, weights: Mapping[str, float], *, lr: float = 0.03, mapped: bool = False, **settings: Any
) -> Member:
    return Member({"type": type, **settings}, weights, lr, mapped)


_RVQ: dict[str, Any] = {"num_stages": 4, "codebook_size": 1024}
_PRODUCT: dict[str, Any] = {"num_groups": 4, "codebook_size": 1024}
_COMMITMENT = {"commitment": 1.0}  # moves nothing here but a split quantizer's projections
_BOTH = {"commitment": 0.25, "codebook": 1.0}

MEMBERS: dict[str, Member] = {
    "rvq": _member("residual_vq", _COMMITMENT, **_RVQ),
    "rvq_balanced": _member("residual_vq", _COMMITMENT, **_RVQ, assignment="balanced"),
    "rvq_gradient": _member("residual_vq", _BOTH, **_RVQ, learning="gradient"),
    "rvq_gradient_balanced": _member("residual_vq", _BOTH, **_RVQ, learning="gradient", assignment="balanced"),
    # The published weight belongs to images and sums over dims.
    "rvq_gradient_transport": _member(
        "residual_vq", {**_BOTH, "transport": 1.0}, **_RVQ, learning="gradient", transport="uniform"
    ),
    "grvq": _member("residual_vq", _COMMITMENT, num_stages=2, num_groups=2, codebook_size=1024),
    "split": _member("split_vq", _COMMITMENT, **_RVQ, codebook_dim=128, lr=0.003),
    # At 1 the commitment shrinks the projected latents: a rotated gradient does not hold against it.
    "split_rotation": _member("split_vq", {"commitment": 0.25}, **_RVQ, codebook_dim=128, gradient="rotation", lr=0.01),
    "factorized": _member("factorized_vq", _BOTH, **_RVQ),
    "simvq": _member("simvq", _BOTH, codebook_size=4096),
    "simvq_residual": _member("simvq", _BOTH, **_RVQ),
    "fsq": _member("fsq", {}, levels=[8, 8, 8, 5, 5, 5]),
    "fsq_residual": _member("fsq", {}, levels=[3] * 8, num_stages=3),
    # Published: 0.01 and 0.01, with a weight decay that is not for others.
    "latent_scalars": _member("latent_scalars", _BOTH, num_scalars=20, num_values=4, num_groups=4),
    "lfq": _member(
        "lookup_free", {"sample_entropy": 0.1, "diversity": 0.1, "commitment": 0.25}, num_bits=40, num_groups=4
    ),
    "bsq": _member(
        "binary_spherical", {"sample_entropy": 0.1, "diversity": 0.1, "commitment": 0.0}, num_bits=40, num_groups=4
    ),
    # The temperature falls in hundreds of steps instead of hundreds of thousands.
    "gumbel": _member(
        "gumbel_vq",
        {"diversity": 0.1},
        **_PRODUCT,
        shared_codebook=False,
        temperature_decay=0.993,
        mapped=True,
        lr=0.01,
    ),
    "kmeans_pq": _member("kmeans_vq", _BOTH, **_PRODUCT, shared_codebook=False, mapped=True),
    "multi_codebook": _member("multi_codebook_vq", _BOTH, **_PRODUCT, mapped=True, lr=0.01),
}


@dataclass(frozen=True)
class Result:
    """What a member made of the held-out latents; see the top of this file. `perplexities` are those of all rows."""

    name: str
    distortion: float
    bits: int
    entropy: float
    usage: float
    perplexity: float
    perplexities: list[float]
    step_ms: float


class _Mapped(nn.Module):
    """A quantizer, between linear maps or not, from frames [N, D] to frames."""

    def __init__(self, member: Member, latent_dim: int) -> None:
        super().__init__()
        self.quantizer: Quantizer = build(from_dict({**member.settings, "latent_dim": latent_dim}))
        self.maps = nn.ModuleList()
        for _ in range(2 if member.mapped else 0):
            linear = nn.Linear(latent_dim, latent_dim)
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.maps.append(linear)

    def enter(self, rows_ND: Tensor) -> Tensor:
        """Frames -> latents [1, D, N]."""
        return (self.maps[0](rows_ND) if self.maps else rows_ND).t()[None]

    def leave(self, latents: Tensor) -> Tensor:
        """Latents [1, D, N] -> frames."""
        rows_ND = latents[0].t()
        return self.maps[1](rows_ND) if self.maps else rows_ND


def latents_of(codec: Codec, folder: str, *, minutes: float, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of latents [N, D] to train with and to hold out, of the recordings in a folder.

    ValueError where there are too few.
    """
    files = find_audio(folder)
    random.Random(seed).shuffle(files)
    parts: list[Tensor] = []
    frames_left = minutes * 60 * codec.sample_rate_hz / codec.hop_length
    for file in files:
        if frames_left <= 0:
            break
        audio, rate_hz = read_audio(file)
        audio = resample(audio[:, : MAX_SECONDS * rate_hz].mean(0, keepdims=True), rate_hz, codec.sample_rate_hz)
        with torch.inference_mode():
            channels = torch.from_numpy(audio).float().expand(codec.num_channels, -1)[None]
            latents = codec.analyze(channels)[0, :, : codec.num_frames_for(audio.shape[1])]
        parts.append(latents.float().t().clone())
        frames_left -= len(parts[-1])
    if len(parts) < HELD_OUT:
        raise ValueError(f"{folder}: {len(parts)} recordings are too few, at least {HELD_OUT} are needed")
    held_out = parts[HELD_OUT - 1 :: HELD_OUT]
    train = [part for index, part in enumerate(parts) if index % HELD_OUT != HELD_OUT - 1]
    return torch.cat(train), torch.cat(held_out)


def measure(
    name: str, member: Member, train_ND: Tensor, held_out_ND: Tensor, *, steps: int, batch_frames: int, seed: int
) -> Result:
    """Train a member on the one frames, and see what it keeps of the others."""
    torch.manual_seed(seed)
    module = _Mapped(member, train_ND.shape[1])
    quantizer = module.quantizer
    draws = torch.Generator().manual_seed(seed)
    if quantizer.num_frames_to_initialize:
        chosen = torch.randperm(len(train_ND), generator=draws)[: quantizer.num_frames_to_initialize]
        with torch.no_grad():
            quantizer.initialize(module.enter(train_ND[chosen]), seed=seed)
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=member.lr) if parameters else None
    step_ms = []
    for step in range(steps):
        rows_ND = train_ND[torch.randint(len(train_ND), (batch_frames,), generator=draws)]
        started = time.perf_counter()
        quantized = quantizer(module.enter(rows_ND))
        if optimizer is not None:
            loss = F.mse_loss(module.leave(quantized.latents), rows_ND)
            loss = loss + sum(member.weights[key] * value for key, value in quantized.losses.items())
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = member.lr * (1 - step / steps)
            optimizer.step()
        quantizer.update(quantized)
        step_ms.append(1000 * (time.perf_counter() - started))

    with torch.no_grad():
        codes_KN = quantizer.encode(module.enter(held_out_ND))[0]
        error = F.mse_loss(module.leave(quantizer.decode(codes_KN[None])), held_out_ND)
    entropies, usages = zip(*map(_entropy_and_usage, codes_KN, quantizer.codebook_sizes), strict=True)
    return Result(
        name=name,
        distortion=float(error / (held_out_ND - held_out_ND.mean(0)).square().mean()),
        bits=sum(math.ceil(math.log2(size)) for size in quantizer.codebook_sizes),
        entropy=sum(entropies),
        usage=statistics.mean(usages),
        perplexity=2 ** statistics.mean(entropies),
        perplexities=[2**entropy for entropy in entropies],
        step_ms=statistics.median(step_ms),
    )


def _entropy_and_usage(codes_N: Tensor, codebook_size: int) -> tuple[float, float]:
    counts = codes_N.unique(return_counts=True)[1].double()
    share = counts / counts.sum()
    expected = codebook_size * (1 - (1 - 1 / codebook_size) ** len(codes_N))
    return float(-(share * share.log2()).sum()), len(counts) / expected


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse arguments and measure; a mistake in them is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of recordings")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"whose latents: bundled, or a folder (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="of audio (default: 60)")
    parser.add_argument("--steps", type=int, default=200, help="of training (default: 200)")
    parser.add_argument("--batch-frames", type=int, default=2048, help="frames per step (default: 2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(MEMBERS), help=", ".join(MEMBERS))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    try:
        if min(args.steps, args.batch_frames, args.threads) < 1 or args.minutes <= 0:
            raise ValueError("--steps, --batch-frames, --threads and --minutes must be positive")
        for name in args.only:
            if name not in MEMBERS:
                raise ValueError(f"--only: {name!r} is not one of {', '.join(MEMBERS)}")
        torch.set_num_threads(args.threads)
        train_ND, held_out_ND = latents_of(load(args.model), args.data, minutes=args.minutes, seed=args.seed)
        amounts = {"steps": args.steps, "batch_frames": args.batch_frames, "seed": args.seed}
        results = []
        for name in args.only:
            results.append(measure(name, MEMBERS[name], train_ND, held_out_ND, **amounts))
            if not args.json:
                _print_row(results[-1], with_names=len(results) == 1)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.json:
        about = {"model": args.model, "frames": [len(train_ND), len(held_out_ND)], **amounts, "threads": args.threads}
        about |= {"torch": torch.__version__, "machine": platform.processor()}
        print(json.dumps(about | {"quantizers": [asdict(result) for result in results]}))


def _print_row(result: Result, *, with_names: bool) -> None:
    cells = {name: value for name, value in asdict(result).items() if name not in ("name", "perplexities")}
    if with_names:
        print(" " * 24, *(name.rjust(12) for name in cells), sep="")
    digits = {"distortion": 3, "usage": 3, "bits": 0}
    numbers = (f"{value:.{digits.get(name, 1)}f}".rjust(12) for name, value in cells.items())
    print(result.name.ljust(24), *numbers, sep="", flush=True)


if __name__ == "__main__":
    main()
