r"""What lost frames cost, concealed and not.

    python -m tools.measure_concealment MODEL --data DIR --split dev --loss 5 10 20 --burst 1 3 --num-quantizers 8

Recordings are encoded, frames are lost at random in bursts of so many, and what is left is decoded as a stream:

- concealed: `StreamingDecoder.conceal` in place of what is lost;
- absent codes: the decoder is told nothing in these frames, codes of -1, and what comes out is taken as it is;
- zeros: the decoder is never told of them, and silence is put where they were, as by a player that has no data;
- lossless: nothing is lost.

All hear the same losses; the same seed draws the same ones, whatever the model. STOI and PESQ (where their packages are
installed) compare with the recording, the log-spectral distance with the lossless audio; loudest is the highest peak,
against that of the lossless audio. Means are over recordings, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from codec.audio import resample
from codec.evaluation.metrics import METRICS, available_metrics, measure
from codec.evaluation.recordings import Recording, find_recordings
from codec.evaluation.results import Summary, summarize, without_nan
from codec.files import AtomicFile
from codec.models.interface import StreamableCodec, streamable
from codec.pretrained import load
from codec.streaming import StreamingDecoder
from codec.tokens import Tokens

CONCEALED, ABSENT, ZEROS, LOSSLESS = "concealed", "absent codes", "zeros", "lossless"
DISTANCE, LOUDEST = "log-spectral distance to lossless, dB", "loudest"
_QUALITY = ("stoi", "pesq_wb")


def draw_losses(num_frames: int, *, loss_percent: float, burst: int, seed: int) -> np.ndarray:
    """Which frames are lost, bool [F]: bursts of so many, and the time between them at random, one frame at least.

    About so many percent in the mean. The first frame is never lost. ValueError for what cannot be.
    """
    if not 0 < loss_percent < 100 or burst < 1:
        raise ValueError(f"a loss of {loss_percent} % in bursts of {burst} frames cannot be drawn")
    mean_between = burst * (100 - loss_percent) / loss_percent
    if mean_between < 1:
        raise ValueError(f"bursts of {burst} frames are too short for a loss of {loss_percent} %")
    rng = np.random.default_rng(seed)
    lost = np.zeros(num_frames, bool)
    at = int(rng.geometric(1 / mean_between))
    while at < num_frames:
        lost[at : at + burst] = True
        at += burst + int(rng.geometric(1 / mean_between))
    return lost


def decoded(codec: StreamableCodec, tokens: Tokens, lost: np.ndarray, way: str) -> np.ndarray:
    """The audio float32 [n] of one recording in one of the ways, as many samples for all of them."""
    codes, decoder = tokens.codes[0], StreamingDecoder(codec, global_codes=tokens.global_codes)
    parts: list[Tensor] = []
    if way == CONCEALED:
        for first, last in _runs(lost):
            parts.append(decoder.conceal(last - first) if lost[first] else decoder.push(codes[:, first:last]))
    elif way == ABSENT:
        parts.append(decoder.push(codes.masked_fill(torch.from_numpy(lost), -1)))
    else:
        is_kept = torch.from_numpy(~lost if way == ZEROS else np.ones_like(lost))
        parts.append(decoder.push(codes[:, is_kept]))
    audio: np.ndarray = torch.cat([*parts, decoder.flush()], dim=1)[0].numpy()
    if way == ZEROS:
        frames = np.zeros((len(lost), codec.hop_length), np.float32)
        frames[~lost] = audio.reshape(-1, codec.hop_length)
        audio = frames.ravel()
    return audio[: int(tokens.num_samples[0])]


def _runs(lost: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last frame (exclusive) of each stretch that is lost, or is not."""
    places = [0, *(np.flatnonzero(np.diff(lost)) + 1).tolist(), len(lost)]
    return itertools.pairwise(places)


def measured(
    codec: StreamableCodec,
    recording: Recording,
    *,
    losses: Sequence[tuple[float, int]],
    num_quantizers: int | None,
    max_seconds: float,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Values by their names, by loss and way of decoding."""
    audio, rate_hz = recording.read()
    audio = resample(audio[None, : round(max_seconds * rate_hz)], rate_hz, codec.sample_rate_hz)[0]
    tokens = codec.encode(torch.from_numpy(np.array(audio, np.float32))[None, None], num_quantizers=num_quantizers)
    num_frames = tokens.codes.shape[2]
    quality = [name for name in _QUALITY if name in available_metrics()]
    whole = decoded(codec, tokens, np.zeros(num_frames, bool), LOSSLESS)

    def values(heard: np.ndarray) -> dict[str, float]:
        found = measure(audio, heard, codec.sample_rate_hz, quality)
        found[DISTANCE] = measure(whole, heard, codec.sample_rate_hz, ["log_spectral_db"])["log_spectral_db"]
        return found | {LOUDEST: float(np.abs(heard).max() / max(np.abs(whole).max(), 1e-9))}

    results = {LOSSLESS: values(whole)}
    for loss_percent, burst in losses:
        # Of every recording others, and the same for all models.
        own_seed = zlib.crc32(f"{seed}/{recording.name}/{loss_percent:g}/{burst}".encode())
        lost = draw_losses(num_frames, loss_percent=loss_percent, burst=burst, seed=own_seed)
        for way in (CONCEALED, ABSENT, ZEROS):
            results[f"{loss_percent:g} % in {burst}, {way}"] = values(decoded(codec, tokens, lost, way))
    return results


def summaries(of_recordings: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Summary]]:
    """Over recordings: of each way, each value."""
    first = of_recordings[0]
    return {
        way: {name: summarize([values[way][name] for values in of_recordings]) for name in first[way]} for way in first
    }


def table(found: Mapping[str, Mapping[str, Summary]]) -> str:
    """Means and intervals, as Markdown."""
    names = list(found[LOSSLESS])
    titles = [METRICS[name].title if name in METRICS else name for name in names]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(names) + 1) + "|"]
    for way, values in found.items():
        cells = [f"{values[n].mean:.3f} ({values[n].low:.3f} to {values[n].high:.3f})" for n in names]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, measure, print the table; a mistake is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a bundled model or a folder, one that streams and is mono")
    parser.add_argument("--data", required=True, help="recordings, as codec evaluate takes them")
    parser.add_argument("--split", help="rows of the manifest to take (default: all)")
    parser.add_argument("--max-files", type=int, default=12, help="take so many recordings, evenly spread")
    parser.add_argument("--max-seconds", type=float, default=10.0, help="of each recording, from its beginning")
    parser.add_argument("--num-quantizers", "-k", type=int, help="rows of codes (default: all)")
    parser.add_argument("--loss", type=float, nargs="+", default=[5.0, 10.0, 20.0], help="percent of frames")
    parser.add_argument("--burst", type=int, nargs="+", default=[1, 3], help="frames that are lost together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all values here, as JSON")
    args = parser.parse_args()
    try:
        losses = [(loss_percent, burst) for loss_percent in args.loss for burst in args.burst]
        for loss_percent, burst in losses:
            draw_losses(1, loss_percent=loss_percent, burst=burst, seed=0)
        codec = streamable(load(args.model))
        if codec.num_channels != 1:
            raise ValueError(f"{codec.name} codes {codec.num_channels} channels at once; this takes mono ones")
        codec.quantizer.check_num_quantizers(args.num_quantizers)
        recordings = find_recordings(args.data, split=args.split, max_files=args.max_files)
        torch.set_num_threads(1)
        of_one = functools.partial(
            measured,
            codec,
            losses=losses,
            num_quantizers=args.num_quantizers,
            max_seconds=args.max_seconds,
            seed=args.seed,
        )
        of_recordings = [of_one(recording) for recording in recordings]
        found = summaries(of_recordings)
        if args.out is not None:
            facts = {
                "model": codec.name,
                "codec_id": codec.codec_id,
                "num_quantizers": args.num_quantizers or codec.valid_num_quantizers[-1],
                "seed": args.seed,
                "means": {way: {name: asdict(s) for name, s in values.items()} for way, values in found.items()},
                "recordings": {r.name: values for r, values in zip(recordings, of_recordings, strict=True)},
            }
            with AtomicFile(args.out) as new:
                new.file.write((json.dumps(without_nan(facts), indent=2) + "\n").encode())
                new.commit()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    num_rows = args.num_quantizers or codec.valid_num_quantizers[-1]
    print(f"{codec.name}, id {codec.codec_id}, {num_rows} rows: {len(recordings)} recordings, seed {args.seed}\n")
    print(table(found))


if __name__ == "__main__":
    main()
