"""What goes over a socket of `codec serve`, at `ws://HOST:PORT/stream`.

The client opens with one JSON text:

    {"kind": "decode", "model": "speech_16k@1", "num_quantizers": 8, "global_codes": [...], "sample_format": "pcm16"}

`kind`: "decode" (codes in, audio out), "encode" (audio in, codes out), "loopback" (audio in, what the codec makes of it
out). All else may be left out. `model`: the name, with or without its version, or the codec id that the client expects;
another one is refused. `num_quantizers`: rows of codes in a frame; all of them by default. `global_codes`: the voice,
for models that keep it apart; to decode with these, it is needed. `sample_format`: "pcm16" (the default) or "float32".

The server answers with the fields of `Welcome`. From then on binary messages carry the stream, little endian:

- codes: frame after frame, each of `num_quantizers` integers, coarsest row first; uint16, or uint32 where the welcome's
  `code_format` says so. A message holds whole frames, any number of them.
- audio: samples of `sample_format` at the welcome's rate, channels interleaved. A message holds whole samples; pieces
  of 10 ms are usual, any size will do. 32768 steps of PCM16 are 1.0.

JSON texts steer it:

    client                    server
    {"end": true}             the rest of the stream, {"done": {"num_frames": F, "num_samples": T}}, close code 1000
    {"lost": n}               decode: n frames, 10,000 at the most, never came; the decoder conceals them
    {"reset": true}           {"reset": true}: what was not sent yet is dropped, what follows is a new recording
                              {"global_codes": [...]}: encode, once the voice is known, where the model has one
                              {"codes": [[...], ...]}: loopback, frames by rows, once for every piece
                              {"error": "one line"}: this session ends, with one of the close codes below

| close code | why |
|---|---|
| 1000 | done |
| 1009 | a message is larger than the welcome's `max_message_bytes` |
| 1011 | the server failed |
| 4400 | what came in is wrong: no JSON, unknown fields, half a frame, codes out of range, input after the end |
| 4401 | the token is missing or wrong |
| 4403 | a web page of another origin asks |
| 4408 | nothing came in for `idle_timeout_s`, though all that came in was answered |
| 4409 | the server has another model |
| 4410 | the session took longer than sessions may |
| 4429 | what is sent is not read, or too slowly |
| 4503 | all sessions are taken, or the server is about to shut down |

Where a client pushes faster than it reads, or than the server computes, the server stops taking its messages until
there is room; it answers no pings meanwhile. A token goes into the header `Authorization: Bearer TOKEN`, or, for
browsers, into the address as `?token=TOKEN`.

This module needs numpy only. Letters: C channels, n samples, K rows of codes, F frames.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from codec.models.interface import Codec

KINDS = ("decode", "encode", "loopback")
SAMPLE_FORMATS: dict[str, np.dtype[Any]] = {"pcm16": np.dtype("<i2"), "float32": np.dtype("<f4")}
CODE_FORMATS: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
PATH = "/stream"
DEFAULT_PORT = 8765
MAX_LOST_FRAMES = 10_000  # in one message, for they cost the sender nothing
MAX_REASON_BYTES = (
    123  # of a close frame. Source: RFC 6455, section 5.5: control frames carry 125 bytes, 2 of them a code
)


class Close(IntEnum):
    """Codes that sessions are closed with. 4000 and above are HTTP's numbers for the same."""

    DONE = 1000
    TOO_BIG = 1009
    FAILED = 1011
    BAD_INPUT = 4400
    NO_TOKEN = 4401
    FORBIDDEN = 4403
    IDLE = 4408
    WRONG_MODEL = 4409
    TOO_LONG = 4410
    SLOW_READER = 4429
    UNAVAILABLE = 4503


class SessionError(RuntimeError):
    """Why a session ended before its time, in one line; `code` is what it was closed with."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Opening:
    """What a client asks for."""

    kind: str
    model: str | None = None
    num_quantizers: int | None = None
    global_codes: tuple[int, ...] | None = None
    sample_format: str = "pcm16"

    @classmethod
    def from_text(cls, text: str) -> Opening:
        """SessionError where it is not what a client may ask for.

        >>> Opening.from_text('{"kind": "decode"}')
        Opening(kind='decode', model=None, num_quantizers=None, global_codes=None, sample_format='pcm16')
        """
        data = read_object(text)
        names = {field.name for field in fields(cls)}
        if unknown := sorted(data.keys() - names):
            raise SessionError(
                f"the opening has unknown fields ({', '.join(unknown)}); {', '.join(sorted(names))} are known",
                Close.BAD_INPUT,
            )
        # A null is as good as nothing.
        data = {name: value for name, value in data.items() if value is not None}
        if data.get("kind") not in KINDS:
            raise SessionError(f"kind={data.get('kind')!r} is not one of {', '.join(KINDS)}", Close.BAD_INPUT)
        if data.get("sample_format", "pcm16") not in SAMPLE_FORMATS:
            formats = ", ".join(SAMPLE_FORMATS)
            raise SessionError(f"sample_format={data['sample_format']!r} is not one of {formats}", Close.BAD_INPUT)
        if not isinstance(data.get("model", ""), str):
            raise SessionError(f"model={data['model']!r} is no name", Close.BAD_INPUT)
        if not _is_whole(data.get("num_quantizers", 1)):
            raise SessionError(f"num_quantizers={data['num_quantizers']!r} is no whole number", Close.BAD_INPUT)
        codes = data.get("global_codes", [])
        if not (isinstance(codes, list) and all(_is_whole(code) and 0 <= code < 2**31 for code in codes)):
            raise SessionError("global_codes must be a list of whole numbers, none below 0", Close.BAD_INPUT)
        if "global_codes" in data:
            data["global_codes"] = tuple(codes)
        return cls(**data)

    def to_text(self) -> str:
        """As a client sends it."""
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class Facts:
    """What there is to know of the server's model, before a session; `GET /model` answers with it."""

    model: str
    codec_id: str
    sample_rate_hz: int
    num_channels: int
    hop_length: int
    codebook_sizes: tuple[int, ...]
    valid_num_quantizers: tuple[int, ...]
    encode_delay_samples: int
    decode_delay_samples: int
    num_global_codes: int
    is_bit_exact: bool

    @classmethod
    def of(cls, codec: Codec) -> Facts:
        return cls(codec.name, **{field.name: getattr(codec, field.name) for field in fields(cls)[1:]})

    def check_model(self, wanted: str | None) -> None:
        """SessionError where a client expects another model."""
        if wanted is not None and wanted not in {self.model, self.model.partition("@")[0], self.codec_id}:
            raise SessionError(
                f"this server has {self.model} ({self.codec_id}), not {_shortened(wanted)}", Close.WRONG_MODEL
            )


@dataclass(frozen=True)
class Welcome(Facts):
    """What the server answers: its model, the session's formats and limits. Packs and unpacks binary messages."""

    kind: str
    num_quantizers: int
    sample_format: str
    code_format: str
    bitrate_bps: float
    max_message_bytes: int
    idle_timeout_s: float

    @classmethod
    def to(cls, opening: Opening, facts: Facts, *, max_message_bytes: int, idle_timeout_s: float) -> Welcome:
        """The answer to an opening. SessionError where the server's model cannot do what it asks for."""
        facts.check_model(opening.model)
        valid = facts.valid_num_quantizers
        num_quantizers = valid[-1] if opening.num_quantizers is None else opening.num_quantizers
        if num_quantizers not in valid:
            raise SessionError(f"num_quantizers={num_quantizers} is not one of {valid}", Close.BAD_INPUT)
        sizes = facts.codebook_sizes[:num_quantizers]
        bits = sum((size - 1).bit_length() for size in sizes)
        return cls(
            **asdict(facts),
            kind=opening.kind,
            num_quantizers=num_quantizers,
            sample_format=opening.sample_format,
            code_format="uint16" if max(facts.codebook_sizes) <= 2**16 else "uint32",
            bitrate_bps=bits * facts.sample_rate_hz / facts.hop_length,
            max_message_bytes=max_message_bytes,
            idle_timeout_s=idle_timeout_s,
        )

    @classmethod
    def from_object(cls, data: dict[str, Any]) -> Welcome:
        """From a server's answer; fields beyond these are passed over. ValueError where some are missing."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in data]:
            raise ValueError(f"this is no server of codecs: its answer lacks {', '.join(missing)}")
        values: dict[str, Any] = {
            name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in names
        }
        return cls(**values)

    def to_text(self) -> str:
        """As a server sends it."""
        return json.dumps(asdict(self))

    @property
    def bytes_per_frame(self) -> int:
        """Of codes."""
        return self.num_quantizers * CODE_FORMATS[self.code_format].itemsize

    @property
    def bytes_per_sample(self) -> int:
        """Of audio, all channels."""
        return self.num_channels * SAMPLE_FORMATS[self.sample_format].itemsize

    def pack_codes(self, codes: np.ndarray) -> bytes:
        """Integers [K, F] -> a message."""
        return np.ascontiguousarray(codes.T).astype(CODE_FORMATS[self.code_format]).tobytes()

    def unpack_codes(self, message: bytes) -> np.ndarray:
        """A message -> int64 [K, F]. SessionError where it does not hold whole frames."""
        if len(message) % self.bytes_per_frame:
            raise SessionError(
                f"{len(message)} bytes are no whole frames of {self.num_quantizers} {self.code_format} codes",
                Close.BAD_INPUT,
            )
        codes = np.frombuffer(message, CODE_FORMATS[self.code_format])
        return codes.reshape(-1, self.num_quantizers).T.astype(np.int64, order="C")

    def pack_audio(self, audio: np.ndarray) -> bytes:
        """Float [C, n], or int16 of that shape -> a message. Floats beyond -1..1 are clipped in PCM16."""
        samples = np.ascontiguousarray(audio.T)
        if self.sample_format == "pcm16" and samples.dtype != np.int16:
            samples = np.clip(np.round(samples * 32768.0), -32768, 32767)
        elif self.sample_format == "float32" and samples.dtype == np.int16:
            samples = samples.astype(np.float32) / np.float32(32768)
        return samples.astype(SAMPLE_FORMATS[self.sample_format]).tobytes()

    def unpack_audio(self, message: bytes) -> np.ndarray:
        """A message -> int16 or float32 [C, n], as it was sent. SessionError where it does not hold whole samples."""
        if len(message) % self.bytes_per_sample:
            raise SessionError(
                f"{len(message)} bytes are no whole {self.sample_format} samples of {self.num_channels} channel(s)",
                Close.BAD_INPUT,
            )
        dtype = SAMPLE_FORMATS[self.sample_format]
        samples = np.frombuffer(message, dtype).reshape(-1, self.num_channels)
        return samples.T.astype(dtype.newbyteorder("="), order="C")


@dataclass(frozen=True)
class Control:
    """What a client says in the middle of a session: one of these."""

    end: bool = False
    reset: bool = False
    lost: int = 0

    @classmethod
    def from_text(cls, text: str) -> Control:
        """SessionError where it is none of them."""
        data = read_object(text)
        match list(data.items()):
            case [("end", True)]:
                return cls(end=True)
            case [("reset", True)]:
                return cls(reset=True)
            case [("lost", count)] if _is_whole(count) and 0 < count <= MAX_LOST_FRAMES:
                return cls(lost=count)
        raise SessionError(
            f'{_shortened(text)} is none of {{"end": true}}, {{"reset": true}}, {{"lost": 1 to {MAX_LOST_FRAMES}}}',
            Close.BAD_INPUT,
        )


def read_object(text: str) -> dict[str, Any]:
    """A JSON object. SessionError where it is none."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise SessionError(f"{_shortened(text)} is no JSON object", Close.BAD_INPUT)
    return data


def error_text(reason: str) -> str:
    """The last message of a session that failed."""
    return json.dumps({"error": " ".join(reason.split())})


def close_reason(reason: str) -> str:
    """The same, as short as a close frame wants it."""
    return reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
