"""`codec serve` on the command line. Heavy imports wait until it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from codec.console import one_line_errors
from codec.jobs import UserError

TOKEN_VARIABLE = "CODEC_TOKEN"
DEFAULT_MODEL = "speech_16k"


def serve(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A bundled model or a folder.")] = DEFAULT_MODEL,
    host: Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8765,
    max_sessions: Annotated[int, typer.Option("--max-sessions", min=1, help="At the same time.")] = 64,
    max_message_bytes: Annotated[int, typer.Option("--max-message-bytes", min=1, help="Of one message.")] = 2**20,
    idle_timeout_s: Annotated[
        float, typer.Option("--idle-timeout-s", help="End sessions that send nothing for so long.")
    ] = 30.0,
    max_duration_s: Annotated[
        float | None, typer.Option("--max-duration-s", help="End sessions after so long. Default: never.")
    ] = None,
    slow_reader_timeout_s: Annotated[
        float, typer.Option("--slow-reader-timeout-s", help="End sessions that do not read for so long.")
    ] = 30.0,
    drain_s: Annotated[
        float, typer.Option("--drain-s", help="On SIGTERM or Ctrl-C, let sessions go on for so long.")
    ] = 30.0,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help=f"Only who knows the token in it may use the server; or ${TOKEN_VARIABLE}."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", help="A web page of this origin may use it, too: https://example.org."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1...")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of the model.")] = 1,
) -> None:
    """Serve streams over WebSockets, and a page to try the codec on.

    One session is one stream: codes in and audio out, or the other way round; codec/serving/protocol.py says how. GET
    /health and /metrics (Prometheus) tell how it is.
    """
    with one_line_errors():
        try:
            from codec.serving.config import ServeConfig
            from codec.serving.server import CodecServer
        except ModuleNotFoundError as error:
            raise UserError(
                f"{error.name} is missing, which serving needs: pip install 'exact-codec[serving]'"
            ) from error
        config = ServeConfig(
            host=host,
            port=port,
            max_sessions=max_sessions,
            max_message_bytes=max_message_bytes,
            idle_timeout_s=idle_timeout_s,
            max_duration_s=max_duration_s,
            slow_reader_timeout_s=slow_reader_timeout_s,
            drain_s=drain_s,
            token=_token(token_file),
            allowed_origins=tuple(allow_origin or ()),
        )
        import torch

        from codec.pretrained import load

        torch.set_num_threads(threads)
        try:
            codec = load(model, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"{device}: {str(error).splitlines()[0]}") from error

        server = CodecServer(codec, config)
        guard = "with a token" if config.token else "without a token"
        server.run(lambda: typer.echo(f"{codec.name} at {server.address}, {max_sessions} sessions, {guard}", err=True))


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE)
    token = file.read_text(encoding="utf-8").strip()
    if not token:
        raise UserError(f"{file} is empty")
    return token
