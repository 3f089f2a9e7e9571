"""The command line: a thin shell over the library. Heavy imports wait until a command runs."""

from __future__ import annotations

import contextlib
import json as json_format
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from codec.bitstream import Header
    from codec.models.interface import StreamableCodec
    from codec.tokens import Tokens

app = typer.Typer(
    name="codec",
    help="Speech to tokens and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="A bundled model or a folder with one. Default: speech_16k.")
]
NumQuantizers = Annotated[
    int | None,
    typer.Option("--num-quantizers", "-k", help="Rows of codes to keep: fewer is a lower rate. Default: all."),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads. One is fast; codes depend on the number.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an output file that exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


class _UserError(Exception):
    """A mistake of the user's that the command line itself finds."""


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """A mistake in the input is one line on stderr and exit status 1, never a traceback."""
    try:
        yield
    except (_UserError, ValueError, OSError, MemoryError) as error:
        reason = str(error) or "out of memory"
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        typer.echo(f"codec: {' '.join(reason.split())}", err=True)
        raise typer.Exit(1) from error


@app.command()
def encode(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An audio file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The .codec file to write.")],
    model: Model = None,
    num_quantizers: NumQuantizers = None,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Turn an audio file into tokens in a .codec file."""
    with _one_line_errors():
        _check_target(source, target, force)
        codec = _load(model, threads)
        audio, rate_hz = _read(source)
        _write_container(target, codec, _encode(codec, audio, rate_hz, num_quantizers), audio, rate_hz)


@app.command()
def decode(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A .codec file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The WAV file to write.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model; default: the one the file names.")
    ] = None,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Turn a .codec file back into audio: as many samples, channels and hertz as went in."""
    with _one_line_errors():
        from codec.audio import write_audio

        _check_target(source, target, force)
        header, codes, num_samples = _read_container(source)
        codec = _load(_bundled_name(header, source) if model is None else model, threads)
        write_audio(target, _decode(codec, header, codes, num_samples), header.rate_hz)


@app.command()
def roundtrip(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An audio file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The WAV file to write.")],
    model: Model = None,
    num_quantizers: NumQuantizers = None,
    threads: Threads = 1,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Encode and decode, and say what came out: lengths, bitrate, speed, signal metrics."""
    with _one_line_errors():
        import io

        import numpy as np

        from codec.audio import write_audio
        from codec.bitstream import Reader
        from codec.evaluation import available_metrics, evaluate

        _check_target(source, target, force)
        codec = _load(model, threads)
        audio, rate_hz = _read(source)
        started = time.perf_counter()
        tokens = _encode(codec, audio, rate_hz, num_quantizers)
        encoded = time.perf_counter()
        container = io.BytesIO()
        _write_container(container, codec, tokens, audio, rate_hz)
        container.seek(0)
        reader = Reader(container)
        codes = np.concatenate(list(reader.blocks()), axis=2)
        opened = time.perf_counter()
        decoded = _decode(codec, reader.header, codes, audio.shape[1])
        done = time.perf_counter()
        write_audio(target, decoded, rate_hz)
        seconds = audio.shape[1] / rate_hz
        names = available_metrics()
        rows = [evaluate(a, b, rate_hz, names) for a, b in zip(audio, decoded, strict=True)]
        report: dict[str, Any] = {
            "model": codec.name,
            "num_samples_in": audio.shape[1],
            "num_samples_out": decoded.shape[1],
            "num_channels": len(audio),
            "rate_hz": rate_hz,
            "num_frames": codes.shape[2],
            "num_quantizers": codes.shape[1],
            "container_bytes": len(container.getvalue()),
            "codes_bps": reader.header.bitrate_bps,
            "container_bps": 8 * len(container.getvalue()) / seconds,
            "encode_times_real_time": seconds / (encoded - started),
            "decode_times_real_time": seconds / (done - opened),
            "metrics": {name: float(np.mean([row[name] for row in rows])) for name in names},
        }
    if json:
        report["metrics"] = {k: None if v != v else v for k, v in report["metrics"].items()}  # NaN is no JSON
        typer.echo(json_format.dumps(report))
        return
    typer.echo(f"model      {report['model']}, {report['num_quantizers']} rows of codes, {threads} thread(s)")
    typer.echo(f"audio      {seconds:.3f} s, {len(audio)} channel(s) at {rate_hz} Hz")
    typer.echo(f"samples    {report['num_samples_in']} in, {report['num_samples_out']} out")
    typer.echo(
        f"bitrate    {report['codes_bps'] / 1000:.2f} kbps of codes, {report['container_bps'] / 1000:.2f} as a file"
    )
    typer.echo(
        f"speed      encode {report['encode_times_real_time']:.0f}x real time, "
        f"decode {report['decode_times_real_time']:.0f}x"
    )
    units = {"si_sdr_db": ("SI-SDR", " dB"), "log_spectral_db": ("log-spectral distance", " dB")}
    for name, value in report["metrics"].items():
        label, unit = units.get(name, (name.upper().replace("_", "-"), ""))
        typer.echo(f"metric     {label} {value:.3f}{unit}")
    for name, extra in (("stoi", "metrics"), ("pesq_wb", "pesq")):
        if name not in names:
            typer.echo(f"metric     {name.upper().replace('_', '-')} not measured: needs the extra '{extra}'")


@app.command()
def info(
    source: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A .codec file; none: this installation.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Say what a .codec file holds, or which models and kernels there are."""
    with _one_line_errors():
        facts = _installation() if source is None else _file_facts(source)
    if json:
        typer.echo(json_format.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name:20} {value}")


def _file_facts(source: Path) -> dict[str, Any]:
    header, codes, num_samples = _read_container(source)
    seconds = num_samples / header.rate_hz
    return {
        "file": str(source),
        "model": header.model,
        "codec_id": header.codec_id,
        "seconds": round(seconds, 6),
        "num_samples": num_samples,
        "rate_hz": header.rate_hz,
        "num_channels": header.num_channels,
        "codec_rate_hz": header.codec_rate_hz,
        "hop_length": header.hop_length,
        "num_frames": codes.shape[2],
        "codebook_sizes": list(header.codebook_sizes),
        "codes_bps": header.bitrate_bps,
        "container_bps": round(8 * source.stat().st_size / seconds, 1),
    }


def _installation() -> dict[str, Any]:
    import torch

    import codec as package
    from codec.kernels.residual_search import resolve_impl
    from codec.pretrained import available, load

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
    return facts


def _check_target(source: Path, target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise _UserError(f"{target.parent} is not a folder")
    if target.is_dir():
        raise _UserError(f"{target} is a folder")
    if target.exists() and not target.is_file():
        raise _UserError(f"{target} is no ordinary file")
    if target.exists() and source.exists() and target.samefile(source):
        raise _UserError(f"{target} is the input itself")
    if target.exists() and not force:
        raise _UserError(f"{target} exists already; --force replaces it")


def _read(source: Path) -> tuple[np.ndarray, int]:
    from codec.audio import read_audio

    return read_audio(source)


def _load(model: str | None, threads: int) -> StreamableCodec:
    import torch

    from codec.pretrained import load

    torch.set_num_threads(threads)
    return load() if model is None else load(model)


def _bundled_name(header: Header, source: Path) -> str:
    """The bundled model that a file names. A name in a file never stands for a folder."""
    from codec.pretrained import available

    name = header.model.split("@")[0]
    if name not in available():
        raise _UserError(f"{source} was made by {header.model}, which is not bundled; --model says where it is")
    return name


def _encode(codec: StreamableCodec, audio: np.ndarray, rate_hz: int, num_quantizers: int | None) -> Tokens:
    """Each channel becomes a row of the batch."""
    import torch

    from codec.audio import resample

    at_codec_rate = resample(audio, rate_hz, codec.sample_rate_hz)
    return codec.encode(torch.from_numpy(at_codec_rate.copy())[:, None], num_quantizers=num_quantizers)


def _decode(codec: StreamableCodec, header: Header, codes: np.ndarray, num_samples: int) -> np.ndarray:
    import torch

    from codec.audio import fit_length, resample, resampled_length
    from codec.bitstream import BitstreamError
    from codec.tokens import Tokens

    if codec.codec_id != header.codec_id:
        raise BitstreamError(
            f"the file was made by {header.model} (id {header.codec_id}); this is {codec.name} (id {codec.codec_id})"
        )
    num_rows = len(header.codebook_sizes)
    claims = (header.codec_rate_hz, header.hop_length, header.codebook_sizes)
    if claims != (codec.sample_rate_hz, codec.hop_length, tuple(codec.codebook_sizes[:num_rows])):
        raise BitstreamError(f"the file's header does not fit the model that it names, {codec.name}")
    length = resampled_length(num_samples, header.rate_hz, codec.sample_rate_hz)
    tokens = Tokens(torch.from_numpy(codes), torch.full((len(codes),), length), codec.codec_id)
    audio = codec.decode(tokens)[:, 0].numpy()
    return fit_length(resample(audio, codec.sample_rate_hz, header.rate_hz), num_samples)


def _write_container(target: Any, codec: StreamableCodec, tokens: Tokens, audio: np.ndarray, rate_hz: int) -> None:
    from codec.bitstream import Header, Writer

    header = Header(
        codec_id=codec.codec_id,
        model=codec.name,
        codec_rate_hz=codec.sample_rate_hz,
        rate_hz=rate_hz,
        num_channels=len(audio),
        hop_length=codec.hop_length,
        codebook_sizes=codec.codebook_sizes[: tokens.codes.shape[1]],
    )
    with Writer(target, header) as writer:
        writer.write(tokens.codes.numpy())
        writer.finish(audio.shape[1])


def _read_container(source: Path) -> tuple[Header, np.ndarray, int]:
    import numpy as np

    from codec.bitstream import BitstreamError, Reader

    try:
        with Reader(source) as reader:
            blocks = list(reader.blocks())
            if not blocks or not reader.num_samples:
                raise BitstreamError("it holds no audio")
            return reader.header, np.concatenate(blocks, axis=2), reader.num_samples
    except BitstreamError as error:
        raise BitstreamError(f"{source}: {error}") from error


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
