"""The command line: a thin shell over the library. Heavy imports wait until a command runs."""

from __future__ import annotations

import contextlib
import functools
import json as json_format
import os
import re
import sys
import time
from fractions import Fraction
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from codec.batch import STANDARD, Job, plan, run
from codec.console import fail, one_line_errors
from codec.jobs import (
    DEFAULT_VOICED_MODEL,
    JobWork,
    Options,
    UserError,
    check_target,
    convert_job,
    decode_job,
    encode_job,
    find_containers,
    guarded,
    named,
    named_events,
    open_container,
    open_target,
    truncated,
)
from codec.serving.command import serve
from codec.stretch import Stretch
from codec.units_cli import app as units_app

app = typer.Typer(
    name="codec",
    help="Speech to tokens and back. A path may be '-': standard input or output.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(units_app)
app.command()(serve)

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
Voice = Annotated[
    str | None,
    typer.Option(
        "--voice", metavar="REF", help="Another voice: that of a recording, or of a .codec file of the model."
    ),
]
Sources = Annotated[list[str], typer.Argument(metavar="IN...")]


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
    speaker_from: Annotated[
        str | None,
        typer.Option(
            "--speaker-from", metavar="REF", help="Speak in the voice of REF, not in that of the first seconds."
        ),
    ] = None,
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

    IN is any audio that libsndfile knows, or WAV from a pipe. OUT is a file for one input, a folder for several. REF is
    audio, too, or a .codec file of the same model; only models that keep the voice apart can take another one.
    """
    if raw and rate is None:
        raise typer.BadParameter("--raw needs --rate")
    if (rate is not None or channels is not None) and not raw:
        raise typer.BadParameter("--rate and --channels are for --raw input; a file says its own")
    options = Options(
        model, device, threads, _time(start), _time(duration), force, resume, num_quantizers=num_quantizers,
        voice=speaker_from, raw_rate_hz=rate, raw_channels=channels or 1, frames_per_block=frames_per_block,
    )  # fmt: skip
    with one_line_errors():
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
    voice: Voice = None,
    num_quantizers: Annotated[
        int | None,
        typer.Option(
            "--num-quantizers",
            "-k",
            help="Rows of codes to decode. Default: all; with --voice, those without the voice.",
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Write headerless 16-bit PCM.")] = False,
    conceal: Annotated[
        bool, typer.Option("--conceal", help="Bridge damaged blocks by sound that fades, instead of refusing them.")
    ] = False,
    jobs: Jobs = None,
    resume: Resume = False,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Turn .codec files back into audio: as many samples, channels and hertz as went in.

    OUT's suffix says the format: .wav, .flac, .ogg, .opus, .mp3; several files become .wav files in the folder OUT. A
    file that ends too early is decoded up to its last good block, with a warning and exit status 1. With --conceal, a
    line of stderr says what was lost, and the exit status is 0; a pipe is read to its end first.
    """
    options = Options(
        model, device, threads, _time(start), _time(duration), force, resume, num_quantizers=num_quantizers,
        voice=voice, is_raw=raw, conceals=conceal,
    )  # fmt: skip
    with one_line_errors():
        _transcode(
            decode_job, options, plan(sources, target, find_containers, ".pcm" if raw else ".wav"), jobs, json=json
        )


@app.command()
def convert(
    sources: Sources,
    target: Annotated[str, typer.Argument(metavar="OUT")],
    voice: Annotated[
        str, typer.Option("--voice", metavar="REF", help="The voice: that of a recording, or of a .codec file.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help=f"A bundled model or a folder with one. Default: {DEFAULT_VOICED_MODEL}."),
    ] = None,
    num_quantizers: Annotated[
        int | None,
        typer.Option("--num-quantizers", "-k", help="Rows of codes to go through. Default: those without the voice."),
    ] = None,
    device: Device = "cpu",
    threads: Threads = 1,
    start: Start = None,
    duration: Duration = None,
    jobs: Jobs = None,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Say the same in another voice: encode, swap the global codes, decode.

    IN and OUT are audio, or folders: as many samples, channels and hertz come out as went in. It takes a model that
    keeps the voice apart. With more rows of codes there is more of how it was said, and more of who said it.
    """
    options = Options(
        model, device, threads, _time(start), _time(duration), force, num_quantizers=num_quantizers, voice=voice
    )
    with one_line_errors():
        from codec.audio import find_audio

        _transcode(convert_job, options, plan(sources, target, find_audio, ".wav"), jobs, json=json)


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
    with one_line_errors():
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


class _ManyNumbers(TyperCommand):
    """Options that take several numbers at once: `--opus 6 12` is `--opus 6 --opus 12`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        expanded: list[str] = []
        option, num_values = "", 0
        for arg in args:
            is_number = re.fullmatch(r"-?[0-9.]+", arg) is not None
            if option and is_number and num_values:
                expanded.append(option)
            num_values += 1
            if arg in names or not is_number:
                option, num_values = (arg if arg in names else ""), 0
            expanded.append(arg)
        return super().parse_args(ctx, expanded)


@app.command(cls=_ManyNumbers)
def evaluate(
    data: Annotated[
        str, typer.Option("--data", metavar="DIR", help="A folder of audio, or of a manifest.tsv, or that file.")
    ],
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL...]", help="Bundled models or folders with one.")
    ] = None,
    num_quantizers: Annotated[
        list[int] | None,
        typer.Option("--num-quantizers", "-k", help="Rows of codes, one or more numbers. Default: up to four choices."),
    ] = None,
    opus: Annotated[
        list[int] | None, typer.Option("--opus", metavar="KBPS", help="Opus, at one or more rates.")
    ] = None,
    codec2: Annotated[list[int] | None, typer.Option("--codec2", metavar="BPS", help="Codec2, likewise.")] = None,
    speex: Annotated[list[int] | None, typer.Option("--speex", metavar="KBPS", help="Speex, likewise.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="A metric; again for more. Default: all that can be measured.")
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            "--scorer",
            help="pocketsphinx, resemblyzer, wer=FOLDER, speaker=FOLDER or module:Class[=ARGUMENT]; again for more.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="DIR", help="TextGrid or CTM files: what do codes tell of phones?"),
    ] = None,
    tier: Annotated[str | None, typer.Option("--tier", help="Of TextGrids. Default: phones, or the only one.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Rows of the manifest to take. Default: all.")] = None,
    max_files: Annotated[
        int | None, typer.Option("--max-files", min=1, help="Take so many recordings, evenly spread.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Write report.html, results.json and files.csv here.")
    ] = None,
    examples: Annotated[int, typer.Option("--examples", min=0, help="Recordings to hear in the report.")] = 3,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed and memory.")] = True,
    jobs: Jobs = None,
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Measure models, and Opus, Codec2 and Speex where they are installed, on the same recordings.

    Quality, bit rate, use of codebooks, delay, speed and memory, and with --labels what codes tell of phones: as
    tables, as JSON, and as a page to look at and listen to. A file that cannot be read is left out, told at the end,
    and makes the exit status 1.
    """
    with one_line_errors():
        from codec.evaluation import UsageError
        from codec.evaluation import evaluate as evaluate_codecs
        from codec.evaluation.tables import text
        from codec.reports import check_evaluation_target, write_evaluation

        try:
            if out is not None:
                check_evaluation_target(out, force=force)
            evaluation = evaluate_codecs(
                models or [], data=data, split=split, max_files=max_files, num_quantizers=num_quantizers or [],
                opus_kbps=opus or [], codec2_bps=codec2 or [], speex_kbps=speex or [], metrics=metric or None,
                scorers=scorer or [], labels=labels, tier=tier, measures_speed=speed,
                num_examples=0 if out is None else examples, num_processes=jobs or _num_cores(),
            )  # fmt: skip
        except UsageError as error:
            raise typer.BadParameter(str(error)) from error
        if out is not None:
            write_evaluation(evaluation, out)
    typer.echo(evaluation.to_json() if json else text(evaluation), nl=False)
    failures = [f"{file}: {why}" for file, why in evaluation.failures.items()]
    for system in evaluation.systems:
        failures += [f"{file}, {system.name}: {why}" for file, why in system.failures.items()]
    if failures:
        fail(*failures)


@app.command()
def verify(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...")],
    model: Model = None,
    num_quantizers: NumQuantizers = None,
    device: Device = "cpu",
    threads: Threads = 1,
    start: Start = None,
    duration: Duration = None,
    json: AsJson = False,
) -> None:
    """Check on your recordings that codes and audio are the same alone, in batches, padded and streamed.

    SOURCE is audio, or folders of it. Codes are found again with every implementation of the residual search that there
    is, and, for information, with other numbers of threads. The exit status is 1 where anything differs that promises
    not to. A margin says how clear a choice was: by what part the next best entry is further off.
    """
    options = Options(model, device, threads, _time(start), _time(duration), num_quantizers=num_quantizers)
    with one_line_errors():
        from codec.verification import text
        from codec.verification import verify as verify_model

        found = verify_model(sources, options, thread_counts=(1, _num_cores()))
    if found.num_files:
        typer.echo(json_format.dumps(found.to_dict()) if json else text(found), nl=json)
    broken = [
        f"{way.name}: {way.num_different} {'samples' if way.kind == 'audio' else way.kind} differ, where none may"
        for way in found.broken_promises
    ]
    if reasons := [*broken, *found.failures.values()]:
        fail(*reasons)


@app.command()
def info(
    source: Annotated[str | None, typer.Argument(metavar="[FILE]")] = None,
    model: FileModel = None,
    json: AsJson = False,
) -> None:
    """Say what a .codec file holds, having checked every block; or which models and kernels there are."""
    with one_line_errors():
        from codec.reports import file_facts, installation

        facts = installation() if source is None else file_facts(source, model)
    if json:
        typer.echo(json_format.dumps(facts))
    else:
        for name, value in facts.items():
            typer.echo(f"{name:20} {value}".encode(errors="backslashreplace"))  # names need not be UTF-8
    if facts.get("is_truncated"):
        fail(truncated(source or "", facts["seconds"]))


@app.command("import")
def import_checkpoint(
    source: Annotated[str, typer.Argument(metavar="SOURCE")],
    target: Annotated[str, typer.Argument(metavar="OUT")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="encodec, dac, hificodec, speechtokenizer (DM-Codec too), bicodec, mimi. Default: by its content.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What files will call the model. Default: the name of OUT, @1.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles (.pt, .th, .pth, .bin) too, weights only.")
    ] = False,
    sample_rate_hz: Annotated[
        int | None, typer.Option("--sample-rate-hz", min=1, help="Of a model that does not say: HiFi-Codec's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the model that OUT holds.")] = False,
) -> None:
    """Turn a checkpoint of another project into a model, for --model and codec.load.

    Known are EnCodec, DAC, HiFi-Codec, SpeechTokenizer, DM-Codec and BiCodec (Spark-TTS).

    SOURCE is a file of weights, or a folder with a config.json or config.yaml. OUT becomes a folder.
    """
    with one_line_errors():
        from codec.files import check_new_folder, new_folder
        from codec.token_format import FEATURE_FOLDER, FILE_NAME

        names = {"config.json", "model.safetensors", FILE_NAME, FEATURE_FOLDER}
        if os.path.isfile(source) and not source.endswith(".safetensors") and not allow_pickle:
            raise UserError(f"{source} is not a .safetensors file; if you trust it, --allow-pickle reads it")
        if os.path.isdir(target) and os.listdir(target) and not force:
            raise UserError(f"{target} exists already; --force replaces the model in it")
        if os.path.isdir(target) and os.path.exists(source) and os.path.samefile(source, target):
            raise UserError(f"{target} is the input itself")
        check_new_folder(target, replaceable=names)
        name = name or f"{os.path.basename(os.path.realpath(target))}@1"
        if not name.isprintable() or len(name.encode(errors="surrogateescape")) > 255:
            raise UserError(f"the name {name!r} is longer than 255 bytes, or not printable")

        from codec.importers.detect import load_checkpoint
        from codec.importers.speech_folder import copy_speech_model
        from codec.pretrained import save

        model = load_checkpoint(source, kind=kind, sample_rate_hz=sample_rate_hz, allow_pickle=allow_pickle)
        with new_folder(target, replaceable=names) as folder:
            codec_id = save(model, folder, name=name, dtype="float32")
            if model.feature_folder is not None:
                copy_speech_model(model.feature_folder, folder / FEATURE_FOLDER, allow_pickle=allow_pickle)
    rows = model.valid_num_quantizers
    rates = [f"{model.bitrate_bps(num_rows) / 1000:.4g}" for num_rows in (rows[0], rows[-1])]
    typer.echo(f"model      {name}, id {codec_id}")
    typer.echo(f"audio      {model.num_channels} channel(s) at {model.sample_rate_hz} Hz, {model.hop_length} per frame")
    typer.echo(f"codes      {' to '.join(dict.fromkeys(map(str, (rows[0], rows[-1]))))} rows")
    typer.echo(f"bitrate    {' to '.join(dict.fromkeys(rates))} kbps")
    typer.echo(f"streams    {'yes' if model.is_streamable else 'no: it looks ahead, and takes whole recordings'}")
    if model.hears_by_features:
        place = os.path.join(target, FEATURE_FOLDER)
        typer.echo(f"encodes    {'with' if model.feature_folder else 'once its speech model lies in'} {place}")


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
    with one_line_errors():
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
                fail(truncated(source, whole / reader.header.rate_hz))


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
    with one_line_errors():
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


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _transcode(work: JobWork, options: Options, jobs: list[Job], num_processes: int | None, *, json: bool) -> None:
    """Do the jobs and report. One job's error is the command's; of many, the good ones are done first."""
    if json and jobs[0].target == STANDARD:
        raise typer.BadParameter("--json and the result would both go to standard output")
    _refuse_terminal(jobs[0].target)
    started = time.perf_counter()
    outcomes = run(
        jobs,
        functools.partial(guarded, work=work, options=options),
        num_processes=num_processes or max(1, _num_cores() // options.threads),
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
    for outcome in outcomes:
        if outcome.notice:
            typer.echo("codec: " + " ".join(outcome.notice.split()), err=True)
    if failed:
        fail(*(outcome.error or outcome.warning or "" for outcome in failed))
