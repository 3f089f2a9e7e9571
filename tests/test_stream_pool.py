"""Pools: random traffic against every stream alone, what is refused, threads, and the recording of CUDA graphs."""

import functools
import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from codec import config as codec_config
from codec.models.interface import StreamableCodec
from codec.models.seanet import SEANetConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.streaming import PoolFull, StreamClosed, StreamingDecoder, StreamingEncoder, StreamPool
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec


def _seanet(pad_mode: str) -> StreamableCodec:
    quantizer = ResidualVQConfig(latent_dim=6, num_stages=3, codebook_size=16)
    config = SEANetConfig(sample_rate_hz=16000, quantizer=quantizer, ratios=(3, 2, 2), num_filters=4, pad_mode=pad_mode)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec: StreamableCodec = codec_config.build(config)
    return codec.double().eval().requires_grad_(False)


CODECS: dict[str, StreamableCodec] = {
    "multirate": tiny_codec(),
    "semantic_global": tiny_voiced_codec(),
    "seanet": _seanet("zero"),
    "seanet_reflect": _seanet("reflect"),
}
# The families that promise bits; the others round differently by how much comes at once, far below this in float64.
EXACT = {"multirate", "semantic_global"}


class _Traffic:
    """A pool, and beside it each of its streams alone: random calls go to both."""

    def __init__(self, codec: StreamableCodec, direction: str, seed: int, **sizes: int) -> None:
        self.codec, self.direction = codec, direction
        self.random = random.Random(seed)
        self.pool = StreamPool(codec, direction, **sizes)
        self.alone: dict[int, Any] = {}
        self.wanted: dict[int, list[Tensor]] = {}
        self.given: dict[int, list[Tensor]] = {}
        self.over: list[int] = []

    def open(self) -> None:
        voice = None
        if self.codec.num_global_codes:
            voice = torch.tensor([self.random.randrange(64) for _ in range(self.codec.num_global_codes)])
        if self.direction == "decode":
            number, alone = self.pool.open(global_codes=voice), StreamingDecoder(self.codec, global_codes=voice)
        else:
            num_rows = self.random.choice(self.codec.valid_num_quantizers)
            number = self.pool.open(num_quantizers=num_rows)
            alone = StreamingEncoder(self.codec, num_quantizers=num_rows)  # type: ignore[assignment]
        self.alone[number], self.wanted[number], self.given[number] = alone, [], []

    def piece(self) -> Tensor:
        length = self.random.choice([0, 1, 1, 2, 5, 17, 40])
        if self.direction == "encode":
            length = length * self.codec.hop_length + self.random.randrange(self.codec.hop_length)
            return torch.from_numpy(speech_like(length, seed=self.random.randrange(1000)))[None]
        num_rows = self.random.choice(self.codec.valid_num_quantizers)
        rows = [[self.random.randrange(size) for _ in range(length)] for size in self.codec.codebook_sizes[:num_rows]]
        return torch.tensor(rows, dtype=torch.int64).view(num_rows, length)

    def push(self, number: int) -> None:
        piece = self.piece()
        try:
            self.pool.push(number, piece)
        except PoolFull:
            return
        self.wanted[number].append(self.alone[number].push(piece))
        piece.zero_()  # the caller's memory is the caller's

    def conceal(self, number: int) -> None:
        if self.direction == "encode":
            return
        num_frames = self.random.choice([1, 2, 7])
        try:
            self.pool.conceal(number, num_frames)
        except PoolFull:
            return
        self.wanted[number].append(self.alone[number].conceal(num_frames))

    def end(self, number: int) -> None:
        self.pool.end(number)
        self.wanted[number].append(self.alone[number].flush())
        self.over.append(number)

    def reset(self, number: int) -> None:
        # What was given for the old recording need not be all that was due, but it must be its beginning.
        self.check(number, whole=False)
        self.pool.reset(number)
        self.alone[number].reset()
        self.wanted[number], self.given[number] = [], []

    def fork(self, number: int) -> None:
        try:
            other = self.pool.fork(number)
        except PoolFull:
            return
        self.alone[other] = self.alone[number].fork()
        self.wanted[other], self.given[other] = list(self.wanted[number]), list(self.given[number])

    def close(self, number: int) -> None:
        self.check(number, whole=False)
        self.pool.close(number)
        self.forget(number)

    def forget(self, number: int) -> None:
        for kept in (self.alone, self.wanted, self.given):
            del kept[number]

    def step(self) -> None:
        for number, output in self.pool.step().items():
            self.given[number].append(output)
        for number in [number for number in self.over if not self.pool.is_open(number)]:
            self.check(number, whole=True)
            self.forget(number)
            self.over.remove(number)

    def check(self, number: int, *, whole: bool) -> None:
        nothing = torch.zeros(1, 0)
        wanted = torch.cat(self.wanted[number] or [nothing], dim=1)
        given = torch.cat(self.given[number] or [nothing], dim=1)
        assert wanted.shape[1] == given.shape[1] if whole else wanted.shape[1] >= given.shape[1]
        wanted = wanted[:, : given.shape[1]]
        if given.shape[1] == 0:
            return
        if self.codec.is_bit_exact or self.direction == "encode":
            assert torch.equal(given, wanted)
        else:
            torch.testing.assert_close(given, wanted, rtol=0, atol=1e-12)

    def go(self, num_calls: int) -> None:
        calls = [self.push] * 8 + [self.conceal, self.end, self.reset, self.fork, self.close]
        for _ in range(num_calls):
            accepting = [number for number in self.alone if number not in self.over]
            choice = self.random.random()
            if choice < 0.3:
                self.step()
            elif not accepting or (choice < 0.45 and self.pool.num_open < self.pool.capacity):
                if self.pool.num_open < self.pool.capacity:
                    self.open()
                else:
                    self.step()
            else:
                self.random.choice(calls)(self.random.choice(accepting))
        for number in [number for number in self.alone if number not in self.over]:
            self.end(number)
        while self.over:
            self.step()
        assert self.pool.num_open == 0
        assert not self.alone


@pytest.mark.parametrize("direction", ["decode", "encode"])
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_a_stream_gives_what_it_gives_alone(name: str, direction: str, seed: int) -> None:
    _Traffic(CODECS[name], direction, seed, capacity=5 + 70 * (seed == 3), max_pending_frames=60).go(200)


def _codes(num_frames: int, *, seed: int = 0, num_rows: int = 3) -> Tensor:
    return torch.randint(0, 32, (num_rows, num_frames), generator=torch.Generator().manual_seed(seed))


def _alone(codes: Tensor) -> Tensor:
    decoder = StreamingDecoder(CODECS["multirate"])
    return torch.cat([decoder.push(codes), decoder.flush()], dim=1)


def _drained(pool: StreamPool) -> dict[int, Tensor]:
    given: dict[int, list[Tensor]] = {}
    while pool.wait(0):
        for number, output in pool.step().items():
            given.setdefault(number, []).append(output)
    return {number: torch.cat(parts, dim=1) for number, parts in given.items()}


def test_neighbours_change_no_bit(num_threads: int) -> None:
    pool = StreamPool(CODECS["multirate"], "decode", capacity=100)
    numbers = [pool.open() for _ in range(100)]
    for number in numbers:
        pool.push(number, _codes(1 + number % 7, seed=number))
        pool.end(number)
    given = _drained(pool)
    for number in numbers:
        assert torch.equal(given[number], _alone(_codes(1 + number % 7, seed=number)))


def test_who_sends_much_delays_nobody() -> None:
    pool = StreamPool(CODECS["multirate"], "decode", capacity=2, step_frames=4)
    much, little = pool.open(), pool.open()
    pool.push(much, _codes(400))
    pool.push(little, _codes(1))
    pool.push(little, _codes(2))
    pool.step()
    assert pool.room(little) == 500, "all of the little is worked off in the first step"
    assert pool.room(much) == 500 - 396, "and no more of the much than a step may take"
    assert pool.num_pending_frames == 396


def test_a_full_pool_and_a_full_queue_say_so_and_take_nothing() -> None:
    pool = StreamPool(CODECS["multirate"], "decode", capacity=1, max_pending_frames=10)
    number = pool.open()
    with pytest.raises(PoolFull, match="all 1 places of this pool are taken"):
        pool.open()
    with pytest.raises(PoolFull, match="all 1 places"):
        pool.fork(number)
    pool.push(number, _codes(8))
    with pytest.raises(PoolFull, match="3 frames do not fit in the queue of this stream, which has room for 2"):
        pool.push(number, _codes(3))
    with pytest.raises(PoolFull, match="room for 2"):
        pool.conceal(number, 3)
    with pytest.raises(ValueError, match="11 frames at once are more than max_pending_frames=10"):
        pool.push(number, _codes(11))
    assert pool.room(number) == 2
    pool.end(number)
    assert torch.equal(_drained(pool)[number], _alone(_codes(8)))
    assert pool.open() != number, "the place is free again, and the number new"


BAD_CODES = {
    "too large": (torch.full((3, 2), 32), "codes must lie in -1..31"),
    "negative": (torch.full((3, 2), -2), "codes must lie in"),
    "too many rows": (torch.zeros(4, 2, dtype=torch.int64), "num_quantizers=4 is not one of"),
    "one row too few dimensions": (torch.zeros(3, dtype=torch.int64), r"codes must be int64 \[K, F\]"),
    "no integers": (torch.zeros(3, 2), r"codes must be int64 \[K, F\]"),
}


@pytest.mark.parametrize("name", BAD_CODES)
def test_bad_codes_are_an_error_of_one_stream(name: str) -> None:
    pool = StreamPool(CODECS["multirate"], "decode", capacity=2)
    bad, good = pool.open(), pool.open()
    pool.push(good, _codes(5))
    pool.push(bad, _codes(4))
    codes, message = BAD_CODES[name]
    with pytest.raises(ValueError, match=message):
        pool.push(bad, codes)
    pool.end(good)
    pool.end(bad)
    given = _drained(pool)
    assert torch.equal(given[good], _alone(_codes(5)))
    assert torch.equal(given[bad], _alone(_codes(4))), "the stream itself is as before"


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.full((1, 5), torch.nan), "NaN"),
        (torch.zeros(2, 5), r"audio must be float \[1, n\]"),
        (torch.zeros(1, 5, dtype=torch.int16), "audio must be float"),
    ],
)
def test_bad_audio_is_an_error_of_one_stream(audio: Tensor, message: str) -> None:
    pool = StreamPool(CODECS["multirate"], "encode", capacity=1)
    number = pool.open()
    with pytest.raises(ValueError, match=message):
        pool.push(number, audio)
    assert pool.room(number) == 500


def test_what_a_closed_stream_answers() -> None:
    pool = StreamPool(CODECS["multirate"], "decode", capacity=1)
    number = pool.open()
    pool.push(number, _codes(5))
    pool.end(number)
    for call in (lambda: pool.push(number, _codes(1)), lambda: pool.conceal(number, 1), lambda: pool.end(number)):
        with pytest.raises(StreamClosed, match="was ended: it takes no more input"):
            call()
    pool.close(number)
    for call in (lambda: pool.push(number, _codes(1)), lambda: pool.close(number), lambda: pool.reset(number)):
        with pytest.raises(StreamClosed, match="is closed, or never was open"):
            call()
    assert not pool.is_open(number)
    assert pool.step() == {}


def test_mistakes_of_callers_are_value_errors() -> None:
    codec = CODECS["multirate"]
    with pytest.raises(ValueError, match="direction='both' is not one of"):
        StreamPool(codec, "both")
    with pytest.raises(ValueError, match="capacity must be positive"):
        StreamPool(codec, "decode", capacity=0)
    with pytest.raises(ValueError, match="num_quantizers is for encoders"):
        StreamPool(codec, "decode").open(num_quantizers=1)
    with pytest.raises(ValueError, match="num_quantizers=9"):
        StreamPool(codec, "encode").open(num_quantizers=9)
    with pytest.raises(ValueError, match="needs global codes"):
        StreamPool(CODECS["semantic_global"], "decode").open()
    encoders = StreamPool(codec, "encode")
    with pytest.raises(ValueError, match="only decoders conceal"):
        encoders.conceal(encoders.open(), 1)


def test_an_encoder_hears_the_voice() -> None:
    codec = CODECS["semantic_global"]
    audio = torch.from_numpy(speech_like(5000))[None]
    pool = StreamPool(codec, "encode", capacity=2)
    number, other = pool.open(), pool.open(global_codes=torch.tensor([1, 2, 3, 4]))
    for piece in audio.split(700, dim=1):
        pool.push(number, piece)
        pool.push(other, piece)
    codes = pool.global_codes(number)
    assert codes is not None
    assert torch.equal(codes, codec.encode(audio[None]).global_codes[0])  # type: ignore[index]
    given = pool.global_codes(other)
    assert given is not None
    assert given.tolist() == [1, 2, 3, 4]
    pool.reset(other)
    kept = pool.global_codes(other)
    assert kept is not None
    assert kept.tolist() == [1, 2, 3, 4]


def test_streams_of_many_threads_get_what_they_get_alone() -> None:
    pool = StreamPool(CODECS["multirate"], "decode", capacity=6, max_pending_frames=40)
    given: dict[int, list[Tensor]] = {}
    sent: dict[int, Tensor] = {}
    failures: list[BaseException] = []
    stop = threading.Event()

    def steps() -> None:
        while not stop.is_set():
            if pool.wait(0.01):
                for number, output in pool.step().items():
                    given.setdefault(number, []).append(output)

    def session(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for turn in range(6):
                number = _patiently(pool.open)
                codes = _codes(rng.randrange(60), seed=100 * seed + turn)
                for piece in codes.split(rng.choice([1, 3, 20]), dim=1):
                    _patiently(functools.partial(pool.push, number, piece))
                if rng.random() < 0.3:
                    pool.close(number)
                else:
                    sent[number] = codes
                    pool.end(number)
        except BaseException as error:
            failures.append(error)

    stepping = threading.Thread(target=steps)
    sessions = [threading.Thread(target=session, args=(seed,)) for seed in range(8)]
    stepping.start()
    for thread in sessions:
        thread.start()
    for thread in sessions:
        thread.join(60)
    for _ in range(2000):
        if pool.num_open == 0:
            break
        stop.wait(0.01)
    stop.set()
    stepping.join(60)
    assert not failures
    assert pool.num_open == 0
    for number, codes in sent.items():
        assert torch.equal(torch.cat(given[number], dim=1), _alone(codes))


def _patiently(call: Any) -> Any:
    while True:
        try:
            return call()
        except PoolFull:
            threading.Event().wait(0.001)


def test_the_state_of_a_stream_is_small_and_stays() -> None:
    pool = StreamPool(CODECS["multirate"], "decode", capacity=3)
    number = pool.open()
    state = CODECS["multirate"].decode_init(1)
    assert pool.state_bytes_per_stream == sum(part.numel() * part.element_size() for part in _leaves(state))
    for _ in range(20):
        pool.push(number, _codes(16))
        (audio,) = pool.step().values()
        assert audio.untyped_storage().nbytes() == audio.numel() * audio.element_size(), "no view of a whole tile"


def _leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [leaf for part in state for leaf in _leaves(part)]


def test_steps_may_be_compiled() -> None:
    wrapped = []

    def compile(function: Any) -> Any:
        wrapped.append(function)
        return lambda codes, state: function(codes, state)

    pool = StreamPool(CODECS["multirate"], "decode", capacity=2, compile=compile)
    number = pool.open()
    pool.push(number, _codes(21))
    pool.end(number)
    assert torch.equal(_drained(pool)[number], _alone(_codes(21)))
    assert wrapped == [CODECS["multirate"].decode_step]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["multirate", "semantic_global"])
def test_on_a_gpu_steps_are_recorded_and_neighbours_change_no_bit(name: str) -> None:
    codec = {"multirate": tiny_codec, "semantic_global": tiny_voiced_codec}[name]().cuda()
    voice = torch.tensor([1, 2, 3, 4]) if codec.num_global_codes else None
    alone: dict[int, Tensor] = {}
    together = StreamPool(codec, "decode", capacity=20)
    numbers = [together.open(global_codes=voice) for _ in range(20)]
    for number in numbers:
        lone = StreamPool(codec, "decode", capacity=1)
        for pool, target in ((together, number), (lone, lone.open(global_codes=voice))):
            pool.push(target, _codes(5 + number, seed=number).clamp_max(31))
            pool.end(target)
        (alone[number],) = _drained(lone).values()
    given = _drained(together)
    assert together.uses_cuda_graphs
    for number in numbers:
        assert torch.equal(given[number], alone[number])
