"""What the command line tells: of a file, of this installation, of recordings that were encoded and decoded."""

from __future__ import annotations

import io
import os
import time
from typing import TYPE_CHECKING, Any

from codec.files import AtomicFile
from codec.jobs import Options, UserError, load_model, named, open_audio, open_container, open_target

if TYPE_CHECKING:
    from codec.evaluation import Evaluation

_EVALUATION_FILES = ("report.html", "results.json", "files.csv")
_ROUNDTRIP_METRICS = ("si_sdr_db", "log_spectral_db", "stoi", "pesq_wb")  # those that take no long


def roundtrip_report(source: str, target: str, options: Options) -> dict[str, Any]:
    """Encode and decode, write what came out, and measure it."""
    import numpy as np

    from codec.audio import AudioWriter
    from codec.bitstream import Reader
    from codec.evaluation.metrics import available_metrics, measure
    from codec.transcode import decode_events, encode_blocks, stretch_of

    codec = load_model(options.model, options)
    with open_audio(source, options) as reader, named(source):
        rate_hz, stretch = reader.rate_hz, options.stretch(reader.rate_hz)
        if stretch is not None and reader.num_samples is not None:
            stretch = stretch.within(reader.num_samples)
        audio = np.concatenate(list(stretch_of(reader, stretch, codec)), axis=1)
    num_channels, num_samples = audio.shape
    seconds = num_samples / rate_hz
    started = time.perf_counter()
    container = io.BytesIO()
    encode_blocks(
        codec, [audio], container, rate_hz=rate_hz, num_channels=num_channels, num_quantizers=options.num_quantizers
    )
    encoded = time.perf_counter()
    container.seek(0)
    opened = Reader(container, tables=codec.token_format.tables if codec.token_format else None)
    num_global_bits = sum(segment.start.num_global_bits for segment in opened.segments)
    decoded = np.concatenate(list(decode_events(codec, opened.header, opened.events())), axis=1)
    done = time.perf_counter()
    with open_target(target) as out, AudioWriter(out, rate_hz, num_channels, num_samples=num_samples) as writer:
        writer.write(decoded)
        writer.finish()
    names = [name for name in _ROUNDTRIP_METRICS if name in available_metrics()]
    rows = [measure(a, b, rate_hz, names) for a, b in zip(audio, decoded, strict=True)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    return {
        "model": codec.name,
        "num_samples_in": num_samples,
        "num_samples_out": decoded.shape[1],
        "num_channels": num_channels,
        "rate_hz": rate_hz,
        "num_frames": opened.num_frames,
        "num_quantizers": len(opened.header.codebook_sizes),
        "num_global_codes": codec.num_global_codes,
        "num_global_bits": num_global_bits,
        "container_bytes": len(container.getvalue()),
        "packed_bps": opened.header.bitrate_bps + num_global_bits / seconds,
        "container_bps": 8 * len(container.getvalue()) / seconds,
        "encode_times_real_time": seconds / (encoded - started),
        "decode_times_real_time": seconds / (done - encoded),
        "metrics": {name: None if value != value else value for name, value in means.items()},  # NaN is no JSON
    }


def check_evaluation_target(folder: str, *, force: bool) -> None:
    """Find before the work that its results cannot be written: UserError."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder")
    for name in _EVALUATION_FILES:
        if not force and os.path.lexists(os.path.join(folder, name)):
            raise UserError(f"{os.path.join(folder, name)} exists already; --force replaces it")


def write_evaluation(evaluation: Evaluation, folder: str) -> None:
    """The page, the JSON and the CSV of an evaluation, each whole or not at all. OSError where that fails."""
    from codec.evaluation.page import render

    os.makedirs(folder, exist_ok=True)
    made = (render(evaluation), evaluation.to_json(), evaluation.to_csv())
    for name, content in zip(_EVALUATION_FILES, made, strict=True):
        with AtomicFile(os.path.join(folder, name)) as new:
            new.file.write(content.encode())
            new.commit()


def file_facts(source: str, model: str | None) -> dict[str, Any]:
    """What a container says, after reading and checking every block."""
    with open_container(source, model, seekable=True, allow_truncated=True) as reader, named(source):
        header = reader.header
        has_tables = header.entropy_id is None or reader.tables is not None
        for _ in reader.events(decode=has_tables):  # every block is read and checked
            pass
        seconds = reader.num_samples / header.rate_hz
        num_global_bits = sum(segment.start.num_global_bits for segment in reader.segments)
        return {
            "file": source,
            "model": header.model,
            "codec_id": header.codec_id,
            "entropy_id": header.entropy_id,
            "seconds": round(seconds, 6),
            "num_samples": reader.num_samples,
            "rate_hz": header.rate_hz,
            "num_channels": header.num_channels,
            "codec_rate_hz": header.codec_rate_hz,
            "hop_length": header.hop_length,
            "num_frames": reader.num_frames,
            "frame_rate_hz": header.codec_rate_hz / header.hop_length,
            "num_quantizers": len(header.codebook_sizes),
            "codebook_sizes": list(header.codebook_sizes),
            "num_segments": len(reader.segments),
            "num_global_codes": [
                0 if segment.start.global_codes is None else segment.start.global_codes.shape[1]
                for segment in reader.segments
            ],
            "num_global_bits": num_global_bits,
            "num_blocks": reader.num_blocks,
            "has_index": reader.has_index,
            "file_bytes": reader.num_bytes,
            "packed_bps": round(header.bitrate_bps + (num_global_bits / seconds if seconds else 0), 1),
            "coded_bps": round(8 * reader.num_code_bytes / seconds, 1) if seconds else None,
            "container_bps": round(8 * reader.num_bytes / seconds, 1) if seconds else None,
            "checked": "all blocks and codes" if has_tables else "all blocks; the entropy tables are not here",
            "is_truncated": reader.is_truncated,
        }


def installation() -> dict[str, Any]:
    """Versions, kernels and models."""
    import torch

    import codec as package
    from codec.kernels.residual_search import resolve_impl
    from codec.models.voice import VoicedCodec
    from codec.pretrained import load
    from codec.token_format import available

    facts: dict[str, Any] = {
        "version": package.__version__,
        "torch": torch.__version__,
        "residual_search": resolve_impl("auto"),
    }
    for name in available():
        model = load(name)
        rates = [model.bitrate_bps(k) / 1000 for k in model.valid_num_quantizers]
        facts[f"model {name}"] = (
            f"id {model.codec_id}, {model.sample_rate_hz} Hz, {rates[0]:g} to {rates[-1]:g} kbps in "
            f"{len(rates)} steps, delay "
            f"{model.hop_length + model.encode_delay_samples} samples to encode, {model.decode_delay_samples} to decode"
        )
        if isinstance(model, VoicedCodec):
            bits = model.num_global_bits
            facts[f"model {name}"] += f", {model.num_global_codes} global codes ({bits} bits) for the voice"
    return facts
