"""Whether exported graphs do in onnxruntime what the codec does in PyTorch, and how fast; see `tools.export_onnx`.

Two streams are coded at once, in pieces of random sizes, states carried from piece to piece. The bounds:

- Codes of equal latents are equal, but latents differ by what two runtimes round, some 1e-6 of their size. That may
  turn a choice that is as near to a tie as that, and with it what the rows after it of the same frame choose. So a
  code that differs first in its frame must have had a margin below `MOST_MARGIN`, and `LEAST_EQUAL_CODES` of all must
  be equal.
- Audio of the same codes is a sum of rounded products over some dozens of layers: `MOST_DIFFERENCE` of the peak is four
  times the most that was seen, and a third of a step of 16 bits.
- With pulses (`codec.layers.source`), what rounding does to a pitch adds up in the phase, and does so for ever: two
  runtimes drift apart (the bundled model, with row 0 alone: 57 dB in the first ten seconds, 36 dB after a minute, 23 dB
  after four). There the error as a whole must be `LEAST_SNR_DB` below the audio in the first `PULSE_SECONDS`.

Letters: B batch, C channels, T samples, K rows of codes, F frames.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from codec.kernels.residual_search import rvq_margins, searches_seen
from codec.layers.source import HarmonicNoise
from codec.models.interface import FRAMES_PER_STEP, StreamableCodec
from codec.models.voice import VoicedCodec
from codec.testing import speech_like
from tools.examples.onnx_stream import Stream

LEAST_EQUAL_CODES = 0.999
MOST_MARGIN = 1e-4
MOST_DIFFERENCE = 1e-5
LEAST_SNR_DB = 40.0
PULSE_SECONDS = 10.0
_BATCH = 2
_MOST_FRAMES = 16  # of a piece
_TIMED_STEPS = 60


@dataclass(frozen=True)
class Agreement:
    """What was compared. `largest_margin` is None where no code differs, or the quantizer searches nothing.

    `difference`: the largest of audio, as a part of its peak; `snr_db`: the power of the audio over that of the error.
    """

    num_codes: int
    num_equal_codes: int
    largest_margin: float | None
    difference: float
    snr_db: float
    num_global_codes: int
    num_equal_global_codes: int
    has_pulses: bool

    def failures(self) -> list[str]:
        """What is out of bounds, a line each."""
        found = []
        if self.num_equal_codes < LEAST_EQUAL_CODES * self.num_codes:
            found.append(f"only {self.num_equal_codes} of {self.num_codes} codes are equal")
        if self.largest_margin is not None and self.largest_margin > MOST_MARGIN:
            found.append(f"a code differs that had a margin of {self.largest_margin:.2g}, above {MOST_MARGIN:g}")
        if self.has_pulses and not self.snr_db >= LEAST_SNR_DB:
            found.append(f"audio differs by {-self.snr_db:.1f} dB of its power, above {-LEAST_SNR_DB:g}")
        if not self.has_pulses and not self.difference <= MOST_DIFFERENCE:
            found.append(f"audio differs by {self.difference:.2g} of its peak, above {MOST_DIFFERENCE:g}")
        if self.num_equal_global_codes < self.num_global_codes:
            found.append(f"only {self.num_equal_global_codes} of {self.num_global_codes} global codes are equal")
        return found


def compare(codec: StreamableCodec, folder: Path, *, seconds: float, seed: int = 0) -> Agreement:
    """Code two signals of so many seconds with both, and decode the same codes, of random numbers of rows."""
    told = json.loads((folder / "streams.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(seed)
    sizes = list(_sizes(told, rng, max(1, codec.num_frames_for(round(seconds * codec.sample_rate_hz)))))
    shape = (_BATCH, codec.num_channels, sum(sizes) * codec.hop_length)
    audio = torch.from_numpy(
        np.stack(
            [
                speech_like(shape[2], rate_hz=codec.sample_rate_hz, seed=seed + place)
                for place in range(_BATCH * codec.num_channels)
            ]
        ).reshape(shape)
    )
    codes, margins_BFK = _codes_and_margins(codec, audio, told["num_quantizers"])
    encoder = _stream(folder, told["encoder"], _BATCH)
    pieces = audio.split([size * codec.hop_length for size in sizes], dim=2)
    different_BFK = (
        torch.from_numpy(np.concatenate([encoder(piece.numpy())["codes"] for piece in pieces], axis=2)) != codes
    )
    different_BFK = different_BFK.transpose(1, 2)
    is_first_BFK = different_BFK & (different_BFK.cumsum(2) == 1)
    margins = margins_BFK[is_first_BFK].tolist() if margins_BFK is not None else []

    has_pulses = any(isinstance(module, HarmonicNoise) for module in codec.modules())
    if has_pulses:
        most = codec.num_frames_for(round(PULSE_SECONDS * codec.sample_rate_hz))
        sizes = [size for size, end in zip(sizes, np.cumsum(sizes), strict=True) if end <= most] or sizes[:1]
    decoded = codes[:, :, : sum(sizes)].clone()
    prefixes = rng.choice(told["valid_num_quantizers"], len(sizes))
    for piece, num_rows in zip(decoded.split(sizes, dim=2), prefixes, strict=True):
        piece[0, num_rows:] = -1  # in place; the other stream keeps all rows
    global_codes = codec.encode_global(audio) if isinstance(codec, VoicedCodec) else None
    wanted = _decoded(codec, decoded, global_codes)
    decoder = _stream(folder, told["decoder"], _BATCH, _voices(folder, told, global_codes))
    heard = np.concatenate([decoder(piece.numpy())["audio"] for piece in decoded.split(sizes, dim=2)], axis=2)
    error = (torch.from_numpy(heard) - wanted).double()
    power = [float(signal.double().square().mean().clamp_min(1e-30)) for signal in (wanted, error)]
    equal_voices = _equal_global_codes(folder, told, audio, global_codes)
    return Agreement(
        num_codes=codes.numel(),
        num_equal_codes=codes.numel() - int(different_BFK.sum()),
        largest_margin=max(margins, default=None),
        difference=float(error.abs().max() / wanted.abs().max().clamp_min(1e-30)),
        snr_db=10 * float(np.log10(power[0] / power[1])),
        num_global_codes=0 if global_codes is None else global_codes.numel(),
        num_equal_global_codes=equal_voices,
        has_pulses=has_pulses,
    )


def speeds(codec: StreamableCodec, folder: Path) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step of one stream, medians: of "encode, 1 frame" and so on, onnxruntime's and PyTorch's."""
    told = json.loads((folder / "streams.json").read_text(encoding="utf-8"))
    rows, found = told["num_quantizers"], {}
    voice = torch.zeros(1, codec.num_global_codes, dtype=torch.int64) if codec.num_global_codes else None
    for num_frames in [told["frames_per_step"]] if told["frames_per_step"] else [1, _MOST_FRAMES]:
        audio = torch.from_numpy(speech_like(num_frames * codec.hop_length, rate_hz=codec.sample_rate_hz))
        audio = audio.expand(1, codec.num_channels, -1).contiguous()
        codes = torch.randint(min(codec.codebook_sizes[:rows]), (1, rows, num_frames))
        encoder = _stream(folder, told["encoder"], 1)
        decoder = _stream(folder, told["decoder"], 1, _voices(folder, told, voice))
        encode = partial(codec.encode_step, audio, codec.encode_init(1), num_quantizers=rows)
        decode = partial(codec.decode_step, codes, codec.decode_init(1, voice))
        noun = f"{num_frames} frame{'s' if num_frames > 1 else ''}"
        found[f"encode, {noun}"] = _median_ms(partial(encoder, audio.numpy())), _median_ms(encode)
        found[f"decode, {noun}"] = _median_ms(partial(decoder, codes.numpy())), _median_ms(decode)
    return found


def _sizes(told: dict[str, Any], rng: np.random.Generator, num_frames: int) -> Iterator[int]:
    while num_frames > 0:
        yield (size := told["frames_per_step"] or int(np.exp(rng.uniform(0, np.log(_MOST_FRAMES + 1)))))
        num_frames -= size


def _stream(folder: Path, part: dict[str, Any], batch_size: int, given: Any = ()) -> Stream:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    stream = Stream(folder, part, (), options)
    stream.state = {name: np.repeat(leaf, batch_size, axis=0) for name, leaf in stream.state.items()} | dict(given)
    return stream


def _voices(folder: Path, told: dict[str, Any], global_codes: Tensor | None) -> dict[str, np.ndarray]:
    """What the voices [B, L] say of the decoder's first state."""
    if global_codes is None:
        return {}
    voice = Stream(folder, told["voice"])
    states = [voice(row[None].numpy()) for row in global_codes]
    return {name: np.concatenate([state[name] for state in states]) for name in told["voice"]["outputs"]}


def _equal_global_codes(folder: Path, told: dict[str, Any], audio: Tensor, global_codes: Tensor | None) -> int:
    if global_codes is None:
        return 0
    speaker = Stream(folder, told["speaker"])
    heard = audio[:, :, : told["speaker"]["voice_samples"]].numpy()
    return sum(
        int((speaker(row[None])["global_codes"][0] == codes.numpy()).sum())
        for row, codes in zip(heard, global_codes, strict=True)
    )


def _codes_and_margins(codec: StreamableCodec, audio: Tensor, num_quantizers: int) -> tuple[Tensor, Tensor | None]:
    """Codes [B, K, F] and their margins [B, F, K]; None where the quantizer does not search for all of them."""
    state, codes, margins = codec.encode_init(len(audio)), [], []
    for piece in audio.split(FRAMES_PER_STEP * codec.hop_length, dim=2):
        with searches_seen() as searches:
            found, state = codec.encode_step(piece, state, num_quantizers=num_quantizers)
        codes.append(found)
        if searches:  # one after the other, of some of the rows each
            seen_NK = torch.cat([rvq_margins(*search) for search in searches], dim=1)
            margins.append(seen_NK.view(found.shape[0], found.shape[2], -1))
    all_margins = torch.cat(margins, dim=1) if margins else None
    has_all = all_margins is not None and all_margins.shape[2] == num_quantizers
    return torch.cat(codes, dim=2).clone(), all_margins if has_all else None


def _decoded(codec: StreamableCodec, codes: Tensor, global_codes: Tensor | None) -> Tensor:
    """What the steps give, delay and all, [B, C, F * hop]."""
    state, parts = codec.decode_init(len(codes), global_codes), []
    for piece in codes.split(FRAMES_PER_STEP, dim=2):
        audio, state = codec.decode_step(piece, state)
        parts.append(audio)
    return torch.cat(parts, dim=2)


def _median_ms(step: Callable[[], object]) -> float:
    step()
    times = []
    for _ in range(_TIMED_STEPS):
        started = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
