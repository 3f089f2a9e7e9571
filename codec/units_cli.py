"""`codec units`: speech units on the command line. Heavy imports wait until a command runs."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codec.batch import STANDARD, Job, progress_bar
from codec.console import fail, one_line_errors
from codec.jobs import Options, UserError, check_target, open_audio, reason_of

if TYPE_CHECKING:
    import numpy as np

    from codec.units.sources import UnitSource

app = typer.Typer(
    name="units",
    help="Speech units: a small integer for every frame of speech, for language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1...")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads. Features may depend on the number.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")]


@app.command()
def train(
    data: Annotated[str, typer.Argument(metavar="DATA")],
    target: Annotated[str, typer.Argument(metavar="OUT")],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="A speech model: a folder of transformers, or torchaudio:NAME.")
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", min=0, help="Of the teacher; 0 enters its first one.")] = None,
    codec: Annotated[
        str | None, typer.Option("--codec", help="A bundled model or a folder, in place of a teacher.")
    ] = None,
    num_quantizers: Annotated[
        int | None,
        typer.Option("--num-quantizers", "-k", min=1, help="Of the codec: so many rows. Default: unquantized latents."),
    ] = None,
    log_mel: Annotated[bool, typer.Option("--log-mel", help="Log-mels, in place of a teacher.")] = False,
    num_units: Annotated[int, typer.Option("--num-units", min=1, help="How many units there are.")] = 200,
    standardize: Annotated[
        bool, typer.Option("--standardize/--no-standardize", help="Whether all dims of the features count alike.")
    ] = True,
    split: Annotated[str | None, typer.Option("--split", help="Rows of the manifest to take. Default: all.")] = None,
    max_files: Annotated[
        int | None, typer.Option("--max-files", min=1, help="Take so many recordings, evenly spread.")
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option("--max-frames", min=1, help="Learn from so many frames. Default: 100000.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    device: Device = "cpu",
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Find units by k-means: clusters of a speech model's features, of a codec's latents, or of log-mels.

    DATA is a folder of audio, or a manifest.tsv, or its folder. OUT becomes a folder, for `codec units apply`.
    """
    if (teacher is not None) + (codec is not None) + log_mel != 1:
        raise typer.BadParameter("one of --teacher, --codec and --log-mel is needed")
    if (teacher is None) != (layer is None):
        raise typer.BadParameter("--teacher and --layer need each other")
    if num_quantizers is not None and codec is None:
        raise typer.BadParameter("--num-quantizers is for --codec")
    with one_line_errors():
        from codec.evaluation.recordings import find_recordings
        from codec.files import check_new_folder
        from codec.units.sources import codec_source, log_mel_source, speech_model_source
        from codec.units.speech_units import CONFIG, MAX_FRAMES, WEIGHTS, train_units

        if os.path.isdir(target) and os.listdir(target) and not force:
            raise UserError(f"{target} exists already; --force replaces the units in it")
        check_new_folder(target, replaceable={CONFIG, WEIGHTS})
        recordings = find_recordings(data, split=split, max_files=max_files)
        _set_threads(threads)
        if teacher is not None and layer is not None:
            source = speech_model_source(teacher, layer)
        elif codec is not None:
            source = codec_source(codec, num_quantizers=num_quantizers or 0)
        else:
            source = log_mel_source()

        def heard() -> Iterator[Any]:
            with progress_bar() as advance:
                for recording in recordings:
                    yield _at_rate(*recording.read(), source, device)
                    advance(1, len(recordings))

        with _device_errors(device):
            units = train_units(
                source.to(device), heard(), num_units,
                seed=seed, max_frames=max_frames or MAX_FRAMES, standardize=standardize,
            )  # fmt: skip
        units.save(target)
    typer.echo(f"units      {units.num_units}, {units.frame_rate_hz:g} a second")
    typer.echo(f"features   {source.name}")


@app.command()
def apply(
    units: Annotated[str, typer.Argument(metavar="UNITS")],
    sources: Annotated[list[str], typer.Argument(metavar="IN...")],
    target: Annotated[str, typer.Argument(metavar="OUT")],
    dedup: Annotated[bool, typer.Option("--dedup", help="Runs of one unit become one, with its duration.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The speech model or codec of the units, where it has moved.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Turn audio into units: files, folders or quoted globs into a line of JSON each.

    UNITS is a folder that `codec units train` wrote. A line holds the path, the units, how many frames each lasts
    (without --dedup: 1), how many frames a second has, and how many units there are. OUT is a file, or '-'.
    """
    with one_line_errors():
        import torch

        from codec.units.runs import deduplicate
        from codec.units.speech_units import load_units

        files = list(_files(sources))
        for file in files:
            check_target(Job(file, target), Options(force=force))
        _set_threads(threads)
        with _device_errors(device):
            loaded = load_units(units, model=model, device=device)
        failed: list[str] = []
        with _lines_to(target) as write, progress_bar() as advance:
            for file in files:
                try:
                    audio = _at_rate(*_read(file), loaded.source, device)
                except (UserError, ValueError, OSError) as error:
                    failed.append(reason_of(error))
                    continue
                ids = loaded.encode(audio[None])[0][0].cpu()
                kept, durations = deduplicate(ids) if dedup else (ids, torch.ones_like(ids))
                line = {
                    "path": file,
                    "units": kept.tolist(),
                    "durations": durations.tolist(),
                    "frame_rate_hz": loaded.frame_rate_hz,
                    "num_units": loaded.num_units,
                }
                write(json.dumps(line).encode() + b"\n")
                advance(1, len(files))
            if failed and len(failed) == len(files):
                fail(*failed)  # inside, so that no empty file takes the target's place
    if failed:
        fail(*failed)


def _files(sources: Sequence[str]) -> Iterator[str]:
    """Files, those under folders, and what globs match."""
    from codec.audio import find_audio

    for source in sources:
        if os.path.isdir(source):
            yield from map(str, find_audio(Path(source)))
        elif source != STANDARD and not os.path.lexists(source) and glob.has_magic(source):
            matches = sorted(match for match in glob.glob(source, recursive=True) if not os.path.isdir(match))
            if not matches:
                raise UserError(f"{source} matches no files")
            yield from matches
        else:
            yield source


def _read(file: str) -> tuple[np.ndarray, int]:
    """All of it, channels averaged, float32 [T]; and its rate."""
    import numpy as np

    with open_audio(file, Options()) as reader:
        audio = np.concatenate(list(reader.blocks(2**16)), axis=1)
        return audio.mean(axis=0, dtype=np.float32), reader.rate_hz


def _at_rate(audio: np.ndarray, rate_hz: int, source: UnitSource, device: str) -> Any:
    """Float32 [T] as a tensor at the rate of the source."""
    import numpy as np
    import torch

    from codec.audio import resample

    return torch.from_numpy(np.array(resample(audio[None], rate_hz, source.sample_rate_hz)[0], np.float32)).to(device)


@contextlib.contextmanager
def _lines_to(target: str) -> Iterator[Any]:
    """A function that writes bytes to standard output at once, or to a file that appears whole or not at all."""
    if target == STANDARD:
        with open(1, "wb", buffering=0, closefd=False) as stream:
            yield stream.write
        return
    from codec.files import AtomicFile

    with AtomicFile(target) as new:
        yield new.file.write
        new.commit()


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@contextlib.contextmanager
def _device_errors(device: str) -> Iterator[None]:
    """PyTorch's error for a device that is not there is the user's mistake."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        if device == "cpu":
            raise
        raise UserError(f"device {device!r} cannot be used: {' '.join(str(error).split())}") from error
