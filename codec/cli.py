"""The command line: a thin shell over the library. Heavy imports wait until a command runs."""

from __future__ import annotations

import contextlib
import functools
import json as json_format
import os
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, NoReturn

import typer

from codec.batch import STANDARD, Job, PlanError, plan, run
from codec.jobs import (
    JobWork,
    Options,
    UserError,
    check_target,
    decode_job,
    encode_job,
    find_containers,
    guarded,
    named,
    named_events,
    open_container,
    open_target,
    reason_of,
    truncated,
)
from codec.stretch import Stretch

app = typer.Typer(
    name="codec",
    help="Speech to tokens and back. A path may be '-': standard input or output.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="A bundled model or a folder with one. Default: speech_16k.")
]
FileModel = Annotated[
    str | None, typer.Option("--model", "-m", help="A bundled model or a folder. Default: the one the file names.")
]
NumQuantizers = Annotated[
    int | None,
    typer.Option("--num-quantizers", "-k", help="Rows of codes to keep: fewer is a lower rate. Default: all."),
]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1...")]
Threads = Annotated[
    int, typer.Option("--threads", min=1, help="CPU threads per process. One is fast; codes may depend on the number.")
]
Jobs = Annotated[
    int | None, typer.Option("--jobs", "-j", min=1, help="Processes for several files. Default: one per core.")
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace output files that exist.")]
Resume = Annotated[bool, typer.Option("--resume", help="Skip files whose output is there and whole.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Start = Annotated[
    str | None, typer.Option("--start", metavar="TIME", help="Begin here: seconds (12.5) or h:mm:ss.s (1:02:03).")
]
Duration = Annotated[str | None, typer.Option("--duration", metavar="TIME", help="Take so much, at most.")]
Sources = Annotated[list[str], typer.Argument(metavar="IN...")]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """A mistake in the input is one line on stderr and exit status 1, never a traceback."""
    try:
        yield
    except PlanError as error:
        raise typer.BadParameter(str(error)) from error
    except BrokenPipeError:
        _fail("standard output was closed")
    except (UserError, ValueError, OSError, MemoryError) as error:
        _fail(reason_of(error))


def _fail(*reasons: str) -> NoReturn:
    for reason in reasons:
        typer.echo("codec: " + " ".join(reason.split()), err=True)
    raise typer.Exit(1)


@app.command()
def encode(
    sources: Sources,
    target: Annotated[str, typer.Argument(metavar="OUT")],
    model: Model = None,
    num_quantizers: NumQuantizers = None,
    device: Device = "cpu",
    threads: Threads = 1,
    start: Start = None,
    duration: Duration = None,
    raw: Annotated[bool, typer.Option("--raw", help="The input is headerless 16-bit PCM; needs --rate.")] = False,
    rate: Annotated[int | None, typer.Option("--rate", min=1, help="Hertz of raw input.")] = None,
    channels: Annotated[
        int | None, typer.Option("--channels", min=1, help="Channels of raw input, interleaved. Default: 1.")
    ] = None,
    frames_per_block: Annotated[
        int | None,
        typer.Option("--frames-per-block", min=1, max=1000, help="Fewer: less delay in a pipe, larger files."),
    ] = None,
    jobs: Jobs = None,
    resume: Resume = False,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Turn audio into tokens: files, folders (their tree is kept) or quoted globs into .codec files.

    IN is any audio that libsndfile knows, or WAV from a pipe. OUT is a file for one input, a folder for several.
    """
    if raw and rate is None:
        raise typer.BadParameter("--raw needs --rate")
    if (rate is not None or channels is not None) and not raw:
        raise typer.BadParameter("--rate and --channels are for --raw input; a file says its own")
    options = Options(
        model, device, threads, _time(start), _time(duration), force, resume, num_quantizers=num_quantizers,
        raw_rate_hz=rate, raw_channels=channels or 1, frames_per_block=frames_per_block,
    )  # fmt: skip
    with _one_line_errors():
        from codec.audio import find_audio

        _transcode(encode_job, options, plan(sources, target, find_audio, ".codec"), jobs, json=json)


@app.command()
def decode(
    sources: Sources,
    target: Annotated[str, typer.Argument(metavar="OUT")],
    model: FileModel = None,
    device: Device = "cpu",
    threads: Threads = 1,
    start: Start = None,
    duration: Duration = None,
    raw: Annotated[bool, typer.Option("--raw", help="Write headerless 16-bit PCM.")] = False,
    jobs: Jobs = None,
    resume: Resume = False,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Turn .codec files back into audio: as many samples, channels and hertz as went in.

    OUT's suffix says the format: .wav, .flac, .ogg, .opus, .mp3; several files become .wav files in the folder OUT. A
    file that ends too early is decoded up to its last good block, with a warning and exit status 1.
    """
    options = Options(model, device, threads, _time(start), _time(duration), force, resume, is_raw=raw)
    with _one_line_errors():
        _transcode(
            decode_job, options, plan(sources, target, find_containers, ".pcm" if raw else ".wav"), jobs, json=json
        )


@app.command()
def roundtrip(
    source: Annotated[str, typer.Argument(metavar="IN")],
    target: Annotated[str, typer.Argument(metavar="OUT")],
    model: Model = None,
    num_quantizers: NumQuantizers = None,
    device: Device = "cpu",
    threads: Threads = 1,
    start: Start = None,
    duration: Duration = None,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Encode and decode, and say what came out: lengths, bitrate, speed, signal metrics."""
    if target == STANDARD:
        raise typer.BadParameter("the report goes to standard output; name a file for the audio")
    options = Options(model, device, threads, _time(start), _time(duration), force, num_quantizers=num_quantizers)
    with _one_line_errors():
        from codec.reports import roundtrip_report

        check_target(Job(source, target), options)
        report = roundtrip_report(source, target, options)
    if json:
        typer.echo(json_format.dumps(report))
        return
    typer.echo(f"model      {report['model']}, {report['num_quantizers']} rows of codes, {threads} thread(s)")
    typer.echo(
        f"audio      {report['num_samples_in'] / report['rate_hz']:.3f} s, {report['num_channels']} channel(s) "
        f"at {report['rate_hz']} Hz"
    )
    typer.echo(f"samples    {report['num_samples_in']} in, {report['num_samples_out']} out")
    typer.echo(
        f"bitrate    {report['packed_bps'] / 1000:.2f} kbps of codes, {report['container_bps'] / 1000:.2f} as a file"
    )
    typer.echo(
        f"speed      encode {report['encode_times_real_time']:.0f}x real time, "
        f"decode {report['decode_times_real_time']:.0f}x"
    )
    units = {"si_sdr_db": ("SI-SDR", " dB"), "log_spectral_db": ("log-spectral distance", " dB")}
    for name, value in report["metrics"].items():
        label, unit = units.get(name, (name.upper().replace("_", "-"), ""))
        typer.echo(f"metric     {label} " + ("undefined" if value is None else f"{value:.3f}{unit}"))
    for name, extra in (("stoi", "metrics"), ("pesq_wb", "pesq")):
        if name not in report["metrics"]:
            typer.echo(f"metric     {name.upper().replace('_', '-')} not measured: needs the extra '{extra}'")


@app.command()
def info(
    source: Annotated[str | None, typer.Argument(metavar="[FILE]")] = None,
    model: FileModel = None,
    json: AsJson = False,
) -> None:
    """Say what a .codec file holds, having checked every block; or which models and kernels there are."""
    with _one_line_errors():
        from codec.reports import file_facts, installation

        facts = installation() if source is None else file_facts(source, model)
    if json:
        typer.echo(json_format.dumps(facts))
    else:
        for name, value in facts.items():
            typer.echo(f"{name:20} {value}".encode(errors="backslashreplace"))  # names need not be UTF-8
    if facts.get("is_truncated"):
        _fail(truncated(source or "", facts["seconds"]))


@app.command()
def cut(
    source: Annotated[str, typer.Argument(metavar="IN")],
    target: Annotated[str, typer.Argument(metavar="OUT")],
    start: Start = None,
    duration: Duration = None,
    model: FileModel = None,
    force: Force = False,
) -> None:
    """Take a stretch of a .codec file, exact to the sample, without decoding it.

    The result decodes to the same samples as that stretch of the whole file.
    """
    _refuse_terminal(target)
    options = Options(model, start_seconds=_time(start), duration_seconds=_time(duration), force=force)
    with _one_line_errors():
        from codec.token_format import copy_events

        check_target(Job(source, target), options)
        with open_container(source, model, seekable=True, allow_truncated=True) as reader:
            whole = reader.num_samples  # of a broken file, that is up to its last good block
            if not whole:
                raise UserError(f"{source}: it holds no audio")
            with open_target(target) as out, named(source):
                stretch = (options.stretch(reader.header.rate_hz) or Stretch()).within(whole)
                copy_events(out, reader, reader.events(stretch.first_sample, stretch.num_samples))
            if reader.is_truncated:
                _fail(truncated(source, whole / reader.header.rate_hz))


@app.command()
def join(
    sources: Sources,
    target: Annotated[str, typer.Argument(metavar="OUT")],
    model: FileModel = None,
    force: Force = False,
) -> None:
    """Put .codec files of one model, rate and channel count one after the other, without decoding them.

    The result decodes to the same samples as the files alone.
    """
    _refuse_terminal(target)
    with _one_line_errors():
        from codec.token_format import copy_events, join_events

        for source in sources:
            check_target(Job(source, target), Options(force=force))
        with contextlib.ExitStack() as opened:
            readers = [opened.enter_context(open_container(source, model)) for source in sources]
            files = (
                (reader.header, named_events(reader, source)) for reader, source in zip(readers, sources, strict=True)
            )
            with open_target(target) as out:
                copy_events(out, readers[0], join_events(files))


def _refuse_terminal(target: str) -> None:
    if target == STANDARD and sys.stdout is not None and sys.stdout.isatty():
        raise typer.BadParameter("the result would go to a terminal; name a file")


def _time(text: str | None) -> Fraction | None:
    """Seconds, "12.5", or hours and minutes before them, "1:02:03.5". Exact. Wrong usage where it is neither."""
    if text is None:
        return None
    found = re.fullmatch(r"(?:(?:(\d{1,9}):)?([0-5]?\d):(?=[0-5]?\d(?:\.|$)))?(\d{1,12}(?:\.\d{1,12})?)", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time; write seconds (12.5) or h:mm:ss (1:02:03.5)")
    hours, minutes, seconds = found.groups()
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + Fraction(seconds)


def _transcode(work: JobWork, options: Options, jobs: list[Job], num_processes: int | None, *, json: bool) -> None:
    """Do the jobs and report. One job's error is the command's; of many, the good ones are done first."""
    if json and jobs[0].target == STANDARD:
        raise typer.BadParameter("--json and the result would both go to standard output")
    _refuse_terminal(jobs[0].target)
    started = time.perf_counter()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    outcomes = run(
        jobs,
        functools.partial(guarded, work=work, options=options),
        num_processes=num_processes or max(1, cores // options.threads),
    )
    elapsed = time.perf_counter() - started
    failed = [outcome for outcome in outcomes if outcome.error or outcome.warning]
    done = [outcome for outcome in outcomes if outcome.status == "done"]
    seconds = sum(outcome.seconds for outcome in done)
    if json:
        typer.echo(
            json_format.dumps(
                {
                    "files": [outcome.to_dict() for outcome in outcomes],
                    "num_done": len(done),
                    "num_skipped": sum(outcome.status == "skipped" for outcome in outcomes),
                    "num_failed": sum(outcome.status == "failed" for outcome in outcomes),
                    "seconds": round(seconds, 6),
                    "elapsed_seconds": round(elapsed, 3),
                }
            )
        )
    elif len(jobs) > 1 or (sys.stderr is not None and sys.stderr.isatty()):
        num_bytes = sum(outcome.num_bytes for outcome in done)
        skipped = sum(outcome.status == "skipped" for outcome in outcomes)
        typer.echo(
            f"{len(done)} of {len(jobs)} files done"
            + (f", {skipped} were there" if skipped else "")
            + f": {seconds:.1f} s of audio, {num_bytes} bytes, {seconds / elapsed:.0f}x real time",
            err=True,
        )
    if failed:
        _fail(*(outcome.error or outcome.warning or "" for outcome in failed))
