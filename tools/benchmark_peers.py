"""Time training of EnCodec's 24 kHz network, ours beside the `encodec` package's: `python -m tools.benchmark_peers`.

Both in one process, in turns, on the same noise, with weight norm; medians of wall time over repetitions, after a first
that does not count. Two measurements, each in float32 and under bfloat16 autocast:

- network: encoder and decoder, forward and backward;
- step: all that a plain loop does with a batch: encoder, quantizer, decoder, waveform and commitment loss, backward,
  Adam, and the codebooks' own learning.

Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from codec.importers.encodec import ENCODEC_24KHZ
from codec.layers.conv import add_weight_norm
from codec.models.seanet import SEANetCodec

_NUM_QUANTIZERS, _BANDWIDTH_KBPS = 8, 6.0  # the same: 75 frames per second of 10 bits each
_FRAME_RATE_HZ = 75


class Ours:
    """Our network, untrained."""

    def __init__(self) -> None:
        self.model = SEANetCodec(ENCODEC_24KHZ)
        add_weight_norm(self.model)

    def network(self, audio: Tensor) -> Tensor:
        """Loss of the network alone."""
        return _error(self.model.reconstruct(audio, lambda latents: latents), audio)

    def step(self, audio: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Loss with quantizer, and what is left to do after the optimizer."""
        quantized = self.model.quantizer(self.model.analyze(audio), num_quantizers=_NUM_QUANTIZERS)
        decoded = self.model.synthesize(quantized.latents, audio.shape[2])
        loss = _error(decoded, audio) + quantized.losses["commitment"]
        return loss, lambda: self.model.quantizer.update(quantized)


class Theirs:
    """The package's network, untrained. Its quantizer learns as it goes forward."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the package's way of weight norm
            try:
                encodec = importlib.import_module("encodec")
            except ImportError as error:
                raise ValueError("the package `encodec` is not installed: it comes with the extra `peers`") from error
            self.model: Any = encodec.EncodecModel.encodec_model_24khz(pretrained=False)

    def network(self, audio: Tensor) -> Tensor:
        """Loss of the network alone."""
        return _error(self.model.decoder(self.model.encoder(audio)), audio)

    def step(self, audio: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Loss with quantizer, and what is left to do after the optimizer."""
        latents = self.model.encoder(audio)
        # In float32: its statistics take nothing else.
        with torch.autocast("cpu", enabled=False):
            quantized = self.model.quantizer(latents.float(), _FRAME_RATE_HZ, _BANDWIDTH_KBPS)
        return _error(self.model.decoder(quantized.quantized), audio) + quantized.penalty.mean(), lambda: None


def _error(decoded: Tensor, audio: Tensor) -> Tensor:
    return (decoded[:, :, : audio.shape[2]].float() - audio).abs().mean()


def compare(
    *, batch_size: int, num_samples: int, num_repetitions: int, precision: str, measurement: str
) -> tuple[float, float]:
    """Median milliseconds of ours and theirs. `measurement`: "network" or "step"; `precision`: "fp32" or "bf16"."""
    torch.manual_seed(0)
    audio = 0.1 * torch.randn(batch_size, 1, num_samples)
    sides: list[Ours | Theirs] = [Ours(), Theirs()]
    sizes = [sum(p.numel() for p in side.model.train().parameters()) for side in sides]
    if sizes[0] != sizes[1]:
        raise ValueError(f"these are not the same network: {sizes[0]} weights beside {sizes[1]}")
    optimizers = [torch.optim.Adam(side.model.parameters(), lr=3e-4) for side in sides]
    times_ms: list[list[float]] = [[], []]
    for _ in range(num_repetitions + 1):
        for side, optimizer, taken in zip(sides, optimizers, times_ms, strict=True):
            start = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, finish = side.step(audio) if measurement == "step" else (side.network(audio), None)
            loss.backward()
            if finish is not None:
                optimizer.step()
                finish()
            taken.append(1000.0 * (time.perf_counter() - start))
    return statistics.median(times_ms[0][1:]), statistics.median(times_ms[1][1:])


def main(arguments: list[str]) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark_peers", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-samples", type=int, default=24000)
    parser.add_argument("--repetitions", type=int, default=10)
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__} on {platform.processor() or platform.machine()}, median milliseconds")
    print(f"batches of {options.batch_size} x {options.num_samples} samples, {options.repetitions} repetitions")
    print(f"{'':9}{'':6}{'threads':>8}{'ours':>9}{'encodec':>9}{'ratio':>7}{'ours, s/s':>11}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for measurement in ("network", "step"):
            for precision in ("fp32", "bf16"):
                ours, theirs = compare(
                    batch_size=options.batch_size,
                    num_samples=options.num_samples,
                    num_repetitions=options.repetitions,
                    precision=precision,
                    measurement=measurement,
                )
                speed = options.batch_size * options.num_samples / ENCODEC_24KHZ.sample_rate_hz / ours * 1000.0
                figures = f"{threads:8}{ours:9.0f}{theirs:9.0f}{ours / theirs:7.2f}{speed:11.1f}"
                print(f"{measurement:9}{precision:6}{figures}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
