"""`codec serve`: sessions give the bits of streams alone, and what goes wrong in one is told there, and only there."""

import asyncio
import contextlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from servers import serving
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from codec.models.interface import Codec
from codec.serving.client import DecodeSession, EncodeSession, decode, encode, stream_url
from codec.serving.config import ServeConfig
from codec.serving.engine import Engine, Output, Stream
from codec.serving.metrics import Metrics
from codec.serving.protocol import Close, Opening, SessionError, Welcome
from codec.serving.server import CodecServer
from codec.streaming import StreamingDecoder, StreamingEncoder
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec

CODEC, VOICED = tiny_codec(), tiny_voiced_codec()
FAST = tiny_codec(patch_samples=160, strides=(2, 4))  # frames of 1280 samples, so that buffers fill soon
CODEC.name, VOICED.name, FAST.name = "tiny@1", "voiced@1", "fast@1"
HOP = CODEC.hop_length


@pytest.fixture(scope="module")
def server() -> Iterator[CodecServer]:
    with serving(CODEC, max_message_bytes=4000, max_sessions=12) as running:
        yield running


def codes_of(num_frames: int, seed: int = 0, codec: Codec = CODEC) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, num_frames) for size in codec.codebook_sizes])


def audio_of(num_samples: int, seed: int = 0) -> np.ndarray:
    return speech_like(num_samples, seed=seed)[None]


def decoded(codes: np.ndarray, codec: Codec = CODEC, voice: np.ndarray | None = None) -> np.ndarray:
    """What a stream alone gives."""
    decoder = StreamingDecoder(codec, global_codes=None if voice is None else torch.from_numpy(voice))
    return torch.cat([decoder.push(torch.from_numpy(codes)), decoder.flush()], dim=1).numpy()


def encoded(audio: np.ndarray, num_quantizers: int | None = None, codec: Codec = CODEC) -> np.ndarray:
    encoder = StreamingEncoder(codec, num_quantizers=num_quantizers)
    return torch.cat([encoder.push(torch.from_numpy(audio)), encoder.flush()], dim=1).numpy()


async def through(session: Any, piece: np.ndarray, seed: int = 0, pause_s: float = 0.0) -> np.ndarray:
    """All that a session gives for a piece that is pushed in random parts."""
    rng = np.random.default_rng(seed)

    async def push() -> None:
        first = 0
        while first < piece.shape[1]:
            size = int(rng.integers(1, 1 + piece.shape[1] // 4))
            await session.push(piece[:, first : first + size])
            first += size
            await asyncio.sleep(pause_s)
        await session.end()

    async with session:
        pushing = asyncio.create_task(push())
        outputs = [output async for output in session]
        await pushing
    return np.concatenate(outputs, axis=1)


@contextlib.asynccontextmanager
async def neighbours(server: CodecServer, codec: Codec = CODEC) -> AsyncIterator[None]:
    """Two sessions that run meanwhile, and whose bits must be those of streams alone."""
    codes, audio = codes_of(60, 7, codec), audio_of(40 * codec.hop_length + 5, seed=8)
    first = through(DecodeSession(server.address, sample_format="float32"), codes, seed=1, pause_s=0.02)
    second = through(EncodeSession(server.address, sample_format="float32"), audio, seed=2, pause_s=0.02)
    both = asyncio.gather(first, second)
    await asyncio.sleep(0.02)
    yield
    heard, written = await both
    assert np.array_equal(heard, decoded(codes, codec))
    assert np.array_equal(written, encoded(audio, codec=codec))


async def opened(server: CodecServer, opening: str | bytes | None = None, **options: Any) -> ClientConnection:
    """A bare socket."""
    connection = await connect(stream_url(server.address), compression=None, **options)
    if opening is not None:
        with contextlib.suppress(ConnectionClosed):  # it was refused already
            await connection.send(opening)
    return connection


async def ending_of(connection: ClientConnection) -> tuple[int, str]:
    """The close code, and the error that was told before it. The two reasons agree."""
    told = ""
    with contextlib.suppress(ConnectionClosed):
        while True:
            message = await asyncio.wait_for(connection.recv(), 10)
            if isinstance(message, str):
                told = json.loads(message).get("error", told)
    code, reason = connection.close_code, connection.close_reason
    assert code is not None
    assert reason
    assert not told or told.startswith(reason)
    return code, told or reason


def fetch(address: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


# What goes well.


def test_sessions_side_by_side_give_the_bits_of_streams_alone(server: CodecServer) -> None:
    async def run() -> None:
        work: list[Awaitable[np.ndarray]] = []
        expected = []
        for seed in range(6):
            rows = (3, 2, 1)[seed % 3]
            codes, audio = codes_of(30 + 17 * seed, seed)[:rows], audio_of(900 * seed + 77, seed)
            options: dict[str, Any] = {"num_quantizers": rows, "sample_format": "float32"}
            work += [through(DecodeSession(server.address, **options), codes, seed)]
            work += [through(EncodeSession(server.address, **options), audio, seed)]
            expected += [decoded(codes), encoded(audio, rows)]
        for given, right in zip(await asyncio.gather(*work), expected, strict=True):
            assert np.array_equal(given, right)

    asyncio.run(run())


def test_one_call_encodes_and_one_decodes(server: CodecServer) -> None:
    audio = audio_of(20 * HOP + 1)
    codes = encode(server.address, audio, sample_format="float32", model="tiny")
    assert np.array_equal(codes, encoded(audio))
    heard = decode(server.address, codes[:2], model=CODEC.codec_id)
    assert heard.dtype == np.int16
    assert np.array_equal(heard, np.clip(np.round(decoded(codes[:2]) * 32768), -32768, 32767).astype(np.int16))
    pcm = (audio * 32767).astype(np.int16)
    assert np.array_equal(encode(server.address, pcm), encoded(pcm / np.float32(32768)))


def test_more_than_a_queue_holds_waits_for_room(server: CodecServer) -> None:
    codes = codes_of(1700)
    assert np.array_equal(decode(server.address, codes, sample_format="float32"), decoded(codes))


def test_frames_are_counted_and_empty_sessions_are_fine(server: CodecServer) -> None:
    async def run() -> None:
        async with DecodeSession(server.address) as session:
            assert session.welcome.sample_rate_hz == CODEC.sample_rate_hz
            assert session.welcome.bitrate_bps == CODEC.bitrate_bps()
            await session.push(codes_of(5))
            await session.end()
            assert sum([audio.shape[1] async for audio in session]) == 5 * HOP
            assert session.done == {"num_frames": 5, "num_samples": 5 * HOP}

    asyncio.run(run())
    assert decode(server.address, codes_of(0)).shape == (1, 0)
    assert encode(server.address, audio_of(0)).shape == (3, 0)


def test_a_loopback_gives_codes_and_what_they_sound_like(server: CodecServer) -> None:
    audio = audio_of(25 * HOP + 9)

    async def run() -> None:
        connection = await opened(server, Opening("loopback", sample_format="float32", num_quantizers=2).to_text())
        welcome = json.loads(await connection.recv())
        assert welcome["num_quantizers"] == 2
        for piece in np.array_split(audio[0], 7):
            await connection.send(piece.tobytes())
        await connection.send('{"end": true}')
        codes, heard, done = [], b"", None
        async for message in connection:
            if isinstance(message, bytes):
                heard += message
            elif "codes" in (said := json.loads(message)):
                codes += said["codes"]
            else:
                done = said["done"]
        assert connection.close_code == Close.DONE
        expected = encoded(audio, 2)
        assert np.array_equal(np.array(codes).T, expected)
        assert np.array_equal(np.frombuffer(heard, np.float32), decoded(expected)[0])
        assert done == {"num_frames": 26, "num_samples": 26 * HOP}

    asyncio.run(run())


def test_lost_frames_are_concealed_in_their_turn(server: CodecServer) -> None:
    codes = codes_of(30)

    async def run() -> np.ndarray:
        async with DecodeSession(server.address, sample_format="float32") as session:
            await session.push(codes[:, :12])
            await session.lost(9)
            await session.push(codes[:, 21:])
            await session.end()
            return np.concatenate([audio async for audio in session], axis=1)

    decoder = StreamingDecoder(CODEC)
    first, last = torch.from_numpy(codes[:, :12]), torch.from_numpy(codes[:, 21:])
    expected = torch.cat([decoder.push(first), decoder.conceal(9), decoder.push(last), decoder.flush()], dim=1)
    assert np.array_equal(asyncio.run(run()), expected.numpy())


def test_a_reset_begins_again_and_nothing_old_comes_after_it(server: CodecServer) -> None:
    old, new = codes_of(400, seed=1), codes_of(20, seed=2)

    async def run() -> np.ndarray:
        async with DecodeSession(server.address, sample_format="float32") as session:
            await session.push(old)
            while session._outputs.empty():
                await asyncio.sleep(0.001)
            await session.reset()
            await session.push(new)
            await session.end()
            outputs = [audio async for audio in session]
            assert session.done == {"num_frames": 20, "num_samples": 20 * HOP}
            return np.concatenate(outputs, axis=1)

    assert np.array_equal(asyncio.run(run()), decoded(new))


def test_outputs_that_are_under_way_at_a_reset_do_not_arrive() -> None:
    engine = Engine(CODEC, Metrics(), max_sessions=2, failed=lambda error: None)
    welcome = Welcome.to(Opening("decode"), engine.facts, max_message_bytes=1, idle_timeout_s=1)
    received: list[Output] = []
    stream = Stream(engine, welcome, None, received.append)
    stream.push(codes_of(4))
    late = engine._cycle()
    stream.reset()
    stream.push(codes_of(4))
    new = engine._cycle()
    engine._deliver([*late, *new])
    assert received == [output for _, _, output in new]
    assert len(late) == len(new) == 1


def test_voices_are_told_and_asked_for() -> None:
    audio = audio_of(VOICED.voice_samples + 500)
    voice = VOICED.encode(torch.from_numpy(audio[None])).global_codes
    assert voice is not None

    async def run(server: CodecServer) -> None:
        for num_samples in (audio.shape[1], 1000):  # the second ends before the voice would be known
            session = EncodeSession(server.address, sample_format="float32")
            codes = await through(session, audio[:, :num_samples])
            whole = VOICED.encode(torch.from_numpy(audio[None, :, :num_samples]))
            assert np.array_equal(codes, whole.codes[0].numpy())
            assert whole.global_codes is not None
            assert session.global_codes is not None
            assert np.array_equal(session.global_codes, whole.global_codes[0].numpy())
        speaking = DecodeSession(server.address, sample_format="float32", global_codes=voice[0].numpy())
        heard = await through(speaking, codes)
        assert np.array_equal(heard, decoded(codes, VOICED, voice[0].numpy()))
        with pytest.raises(SessionError, match=r"global.codes"):
            await through(DecodeSession(server.address), codes)
        with pytest.raises(SessionError, match=r"global.codes"):
            await through(DecodeSession(server.address, global_codes=[1, 2]), codes)

        connection = await opened(server, Opening("loopback", sample_format="float32").to_text())
        await connection.send(audio[0].tobytes())
        await connection.send('{"end": true}')
        messages = [message async for message in connection]
        heard_back = b"".join(message for message in messages if isinstance(message, bytes))
        codes = VOICED.encode(torch.from_numpy(audio[None])).codes[0].numpy()
        assert np.array_equal(np.frombuffer(heard_back, np.float32), decoded(codes, VOICED, voice[0].numpy())[0])

    with serving(VOICED) as server:
        asyncio.run(run(server))


# What goes wrong, with others beside.

DECODE, ENCODE = Opening("decode").to_text(), Opening("encode", sample_format="float32").to_text()
FRAME = codes_of(1).astype("<u2").tobytes()
BAD_SESSIONS: dict[str, tuple[list[str | bytes], int, str]] = {
    "no JSON": (["hello"], Close.BAD_INPUT, "'hello' is no JSON object"),
    "deep JSON": (["[" * 3000], Close.BAD_INPUT, "no JSON object"),
    "bytes first": ([FRAME], Close.BAD_INPUT, "opens with a JSON text"),
    "unknown kind": (['{"kind": "sing"}'], Close.BAD_INPUT, "'sing' is not one of decode, encode, loopback"),
    "unknown field": (['{"kind": "decode", "rows": 2}'], Close.BAD_INPUT, "unknown fields (rows)"),
    "unknown format": (['{"kind": "decode", "sample_format": "mp3"}'], Close.BAD_INPUT, "not one of pcm16, float32"),
    "rows of another type": (['{"kind": "decode", "num_quantizers": "2"}'], Close.BAD_INPUT, "no whole number"),
    "too many rows": (['{"kind": "encode", "num_quantizers": 4}'], Close.BAD_INPUT, "not one of (1, 2, 3)"),
    "a voice too many": (['{"kind": "decode", "global_codes": [1]}'], Close.BAD_INPUT, "does not keep the voice apart"),
    "a voice below 0": (['{"kind": "decode", "global_codes": [-1]}'], Close.BAD_INPUT, "none below 0"),
    "a voice of huge numbers": (['{"kind": "decode", "global_codes": [1e30]}'], Close.BAD_INPUT, "whole numbers"),
    "another model": (['{"kind": "decode", "model": "tiny@2"}'], Close.WRONG_MODEL, "has tiny@1"),
    "codes out of range": ([DECODE, FRAME, b"\xff\xff" * 3], Close.BAD_INPUT, "65535"),
    "half a frame": ([DECODE, FRAME + FRAME[:2]], Close.BAD_INPUT, "8 bytes are no whole frames of 3 uint16 codes"),
    "half a sample": ([ENCODE, b"123"], Close.BAD_INPUT, "3 bytes are no whole float32 samples"),
    "no numbers": ([ENCODE, np.full(8, np.nan, "<f4").tobytes()], Close.BAD_INPUT, "NaN or infinity"),
    "unknown text": ([DECODE, '{"stop": true}'], Close.BAD_INPUT, "none of"),
    "two things at once": ([DECODE, '{"end": true, "reset": true}'], Close.BAD_INPUT, "none of"),
    "losses of an encoder": ([ENCODE, '{"lost": 3}'], Close.BAD_INPUT, "only be lost on the way to a decoder"),
    "endless losses": ([DECODE, '{"lost": 1000000000000}'], Close.BAD_INPUT, '{"lost": 1 to 10000}'),
    "negative losses": ([DECODE, '{"lost": -1}'], Close.BAD_INPUT, "none of"),
    "input after the end": ([DECODE, FRAME * 400, '{"end": true}', FRAME], Close.BAD_INPUT, "nothing may follow"),
    "two ends": ([DECODE, FRAME * 400, '{"end": true}', '{"end": true}'], Close.BAD_INPUT, "nothing may follow"),
    "a large message": ([DECODE, FRAME * 700], Close.TOO_BIG, "4200 bytes is larger than the 4000"),
    "a huge message": ([DECODE, bytes(10**6)], Close.TOO_BIG, "exceeds limit of 16000 bytes"),
    "a large opening": ([DECODE + " " * 4000], Close.TOO_BIG, "larger than the 4000"),
}


@pytest.mark.parametrize("name", BAD_SESSIONS)
def test_bad_sessions_hear_why_and_harm_nobody(name: str, server: CodecServer) -> None:
    messages, code, reason = BAD_SESSIONS[name]

    async def run() -> None:
        async with neighbours(server):
            connection = await opened(server)
            with contextlib.suppress(ConnectionClosed):
                for message in messages:
                    await connection.send(message)
            given = await ending_of(connection)
            assert given[0] == code
            assert reason in given[1]
            assert "\n" not in given[1]

    asyncio.run(run())
    assert json.loads(fetch(server.address + "/health")[1])["num_sessions"] == 0


def test_who_falls_silent_is_sent_away() -> None:
    async def run(server: CodecServer) -> None:
        async with neighbours(server):
            silent = [await opened(server), await opened(server, DECODE), await opened(server, DECODE)]
            await silent[2].send(FRAME * 2)
            for connection in silent:
                assert await ending_of(connection) == (Close.IDLE, "nothing came for 0.4 s")

    with serving(CODEC, idle_timeout_s=0.4) as server:
        asyncio.run(run(server))


def test_sessions_may_be_limited_in_time() -> None:
    async def run(server: CodecServer) -> None:
        connection = await opened(server, DECODE)
        given = asyncio.create_task(ending_of(connection))
        with contextlib.suppress(ConnectionClosed):
            while not given.done():
                await connection.send(FRAME)
                await asyncio.sleep(0.05)
        assert await given == (Close.TOO_LONG, "sessions may take 0.5 s")

    with serving(CODEC, max_duration_s=0.5) as server:
        asyncio.run(run(server))


def test_a_slow_reader_is_let_go_and_holds_nobody_up() -> None:
    async def run(server: CodecServer) -> None:
        host, port = server.address.removeprefix("http://").split(":")
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**17)
        narrow.connect((host, int(port)))
        connection = await opened(server, DECODE, sock=narrow, max_queue=1, ping_interval=None)
        for _ in range(20):  # more output than all buffers on the way hold, by far
            await connection.send(FRAME * 200)
        taken = 0
        async with neighbours(server, FAST):
            while server.service.sessions:
                streams = [session._stream for session in server.service.sessions]
                taken = max(taken, *(stream.num_frames for stream in streams if stream), 0)
                await asyncio.sleep(0.02)
        assert 300 < taken < 2000, "input goes on being taken though nobody reads the output"
        assert await ending_of(connection) == (Close.SLOW_READER, "nothing of the output was read for 1 s")
        assert server.service.engine.decoders.num_open == 0

    with serving(FAST, slow_reader_timeout_s=1) as server:
        asyncio.run(run(server))


def test_a_reader_that_never_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codec.serving.server.GOODBYE_S", 0.1)

    async def run(server: CodecServer) -> None:
        connection = await opened(server, DECODE, max_queue=1, ping_interval=None)
        for _ in range(100):
            await connection.send(FRAME * 200)
        for _ in range(500):
            if not server.service.sessions and not server._server.server_state.connections:
                break
            await asyncio.sleep(0.02)
        else:
            pytest.fail("the connection is still there")
        connection.transport.abort()
        await asyncio.sleep(0.05)

    with serving(FAST, slow_reader_timeout_s=0.3) as server:
        asyncio.run(run(server))


def test_connections_beyond_the_limit_are_refused_and_those_before_go_on() -> None:
    async def one(server: CodecServer) -> tuple[int, str]:
        connection = await opened(server, DECODE)
        return await ending_of(connection)

    async def run(server: CodecServer) -> None:
        async with neighbours(server):
            held = [await opened(server, DECODE) for _ in range(2)]
            for ending in await asyncio.gather(*(one(server) for _ in range(150))):
                assert ending == (Close.UNAVAILABLE, "the server is full: all 4 sessions are taken; try later")
            for connection in held:
                await connection.close()
        codes = codes_of(9)
        assert np.array_equal(
            await through(DecodeSession(server.address, sample_format="float32"), codes), decoded(codes)
        )

    with serving(CODEC, max_sessions=4) as server:
        asyncio.run(run(server))
        assert 'codec_session_errors_total{reason="unavailable"} 150.0' in fetch(server.address + "/metrics")[1]


def test_who_hangs_up_gives_the_place_back(server: CodecServer) -> None:
    async def run() -> None:
        async with neighbours(server):
            for opening in (DECODE, Opening("loopback").to_text()):
                connection = await opened(server, opening)
                await connection.send(FRAME * 300)
                connection.transport.abort()
        for _ in range(100):
            if not server.service.sessions:
                break
            await asyncio.sleep(0.02)
        assert (server.service.engine.encoders.num_open, server.service.engine.decoders.num_open) == (0, 0)

    asyncio.run(run())


def test_a_step_that_fails_ends_all_sessions_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no memory")

    async def run(server: CodecServer) -> None:
        connections = [await opened(server, DECODE) for _ in range(2)]
        for connection in connections:
            await connection.recv()
        monkeypatch.setattr(server.service.engine.decoders, "step", broken)
        await connections[0].send(FRAME)
        for connection in connections:
            assert await ending_of(connection) == (Close.FAILED, "the server failed")
        assert (await ending_of(await opened(server, DECODE)))[0] == Close.UNAVAILABLE

    with serving(CODEC) as server:
        asyncio.run(run(server))
        status, health = fetch(server.address + "/health")
        assert (status, json.loads(health)["status"]) == (503, "failed")


# Who may use it.


def test_a_token_is_asked_for() -> None:
    async def ending(address: str, **options: Any) -> tuple[int, str]:
        return await ending_of(await connect(address, **options))

    with serving(CODEC, token="open sesame") as server:
        address = stream_url(server.address)
        for suffix, headers, reason in [
            ("", {}, "wants a token"),
            ("?token=open", {}, "the token is wrong"),
            ("", {"Authorization": "Bearer nothing"}, "the token is wrong"),
            ("", {"Authorization": "Basic open sesame"}, "wants a token"),
        ]:
            code, told = asyncio.run(ending(address + suffix, additional_headers=headers))
            assert code == Close.NO_TOKEN
            assert reason in told
        codes = codes_of(3)
        assert decode(server.address, codes, token="open sesame").shape == (1, 3 * HOP)
        assert decode(server.address + "?token=open+sesame", codes).shape == (1, 3 * HOP)
        with pytest.raises(SessionError, match="wrong"):
            decode(server.address, codes, token="close sesame")
        assert fetch(server.address + "/metrics")[0] == 401
        assert fetch(server.address + "/metrics", Authorization="Bearer open sesame")[0] == 200
        assert fetch(server.address + "/health")[0] == 200


@pytest.mark.parametrize(
    ("config", "headers", "is_welcome"),
    [
        ({}, {}, True),
        ({}, {"origin": "http://127.0.0.1:8765"}, True),
        ({}, {"origin": "http://evil.example"}, False),
        ({}, {"origin": "null"}, False),
        ({}, {"origin": "http://evil.example:8765", "host": "evil.example:8765"}, False),  # its name points here
        ({}, {"origin": "http://127.0.0.1:1"}, False),
        ({}, {"origin": "http://localhost:8765", "host": "localhost:8765"}, True),
        ({}, {"origin": "http://[::1]:8765", "host": "[::1]:8765"}, True),
        ({"allowed_origins": ("https://app.example",)}, {"origin": "https://app.example"}, True),
        ({"allowed_origins": ("https://app.example",)}, {"origin": "http://app.example"}, False),
        ({"host": "0.0.0.0"}, {"origin": "http://box.example", "host": "box.example"}, True),
        ({"token": "t"}, {"origin": "http://evil.example", "authorization": "Bearer t"}, True),
    ],
)
def test_pages_of_others_may_not_use_it(config: dict[str, Any], headers: dict[str, str], is_welcome: bool) -> None:
    def check() -> None:
        ServeConfig(**config).check_access({"host": "127.0.0.1:8765"} | headers, {})

    if is_welcome:
        check()
    else:
        with pytest.raises(SessionError) as refusal:
            check()
        assert refusal.value.code == Close.FORBIDDEN


def test_origins_are_looked_at(server: CodecServer) -> None:
    async def run() -> tuple[int, str]:
        return await ending_of(await opened(server, DECODE, origin="http://evil.example"))

    assert asyncio.run(run()) == (Close.FORBIDDEN, "pages of http://evil.example may not use this server")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"port": 70000}, "port=70000"),
        ({"max_sessions": 0}, "max_sessions must be positive"),
        ({"idle_timeout_s": float("nan")}, "idle_timeout_s must be positive"),
        ({"max_duration_s": 0}, "max_duration_s must be positive"),
        ({"drain_s": -1}, "drain_s must not be negative"),
        ({"token": ""}, "the token must be one line"),
        ({"token": "a\nb"}, "the token must be one line"),
        ({"allowed_origins": ("example.org",)}, "origin 'example.org'"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ServeConfig(**values)


# How it is, and how it ends.


def test_health_model_and_metrics(server: CodecServer) -> None:
    decode(server.address, codes_of(50))
    status, text = fetch(server.address + "/health")
    assert (status, json.loads(text)["status"], json.loads(text)["max_sessions"]) == (200, "ok", 12)
    facts = json.loads(fetch(server.address + "/model")[1])
    assert (facts["codec_id"], facts["codebook_sizes"]) == (CODEC.codec_id, list(CODEC.codebook_sizes))
    numbers = dict(
        line.rsplit(" ", 1) for line in fetch(server.address + "/metrics")[1].splitlines() if not line.startswith("#")
    )
    assert float(numbers['codec_sessions_total{kind="decode"}']) >= 1
    assert float(numbers['codec_sessions_open{kind="decode"}']) == 0
    assert float(numbers['codec_audio_decoded_seconds_total{kind="decode"}']) >= 50 * HOP / CODEC.sample_rate_hz
    assert float(numbers['codec_step_seconds_count{direction="decode"}']) >= 1
    assert float(numbers['codec_answer_seconds_count{kind="decode"}']) >= 1
    assert float(numbers["codec_pending_frames"]) == 0
    assert fetch(server.address + "/nothing")[0] == 404


def test_draining_lets_sessions_end_and_takes_no_more() -> None:
    codes = codes_of(40)

    async def run(server: CodecServer) -> np.ndarray:
        async with DecodeSession(server.address, sample_format="float32") as session:
            await session.push(codes[:, :20])
            server.drain()
            await asyncio.sleep(0.1)
            assert (await asyncio.to_thread(fetch, server.address + "/health"))[0] == 503
            with pytest.raises(SessionError, match="shuts down") as refusal:
                await DecodeSession(server.address).__aenter__()
            assert refusal.value.code == Close.UNAVAILABLE
            await session.push(codes[:, 20:])
            await session.end()
            return np.concatenate([audio async for audio in session], axis=1)

    with serving(CODEC, drain_s=20) as server:
        assert np.array_equal(asyncio.run(run(server)), decoded(codes))
    with pytest.raises(OSError, match=r"refused|failed"):
        decode(server.address, codes)


def test_draining_has_an_end() -> None:
    async def run(server: CodecServer) -> None:
        connection = await opened(server, DECODE)
        await connection.recv()
        server.drain()
        assert await ending_of(connection) == (Close.UNAVAILABLE, "the server shuts down")

    with serving(CODEC, drain_s=0.2) as server:
        asyncio.run(run(server))


# The client.


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda url: decode("nowhere", codes_of(1)), "no address of a server"),
        (lambda url: decode(url, codes_of(1) + 32), "below"),
        (lambda url: decode(url, codes_of(1) * 1.0), "must be integers"),
        (lambda url: encode(url, audio_of(9)[0]), r"must be int16 or float \[1, n\]"),
        (lambda url: encode(url, audio_of(9).astype(int)), r"must be int16 or float \[1, n\]"),
    ],
)
def test_the_client_finds_mistakes_itself(call: Callable[[str], np.ndarray], reason: str, server: CodecServer) -> None:
    with pytest.raises(ValueError, match=reason):
        call(server.address)


def test_the_client_tells_why_a_session_ended(server: CodecServer) -> None:
    async def run() -> None:
        async with DecodeSession(server.address) as session:
            await session.push(codes_of(3))
            await session._socket.send('{"stop": true}')
            with pytest.raises(SessionError, match="none of") as ending:
                _ = [audio async for audio in session]
            assert ending.value.code == Close.BAD_INPUT
            with pytest.raises(SessionError, match="none of"):
                await session.push(codes_of(3))
            with pytest.raises(SessionError, match="none of"):
                await session.reset()

    asyncio.run(run())
    with pytest.raises(SessionError, match="takes no sessions"):
        decode(server.address + "/elsewhere", codes_of(1))
