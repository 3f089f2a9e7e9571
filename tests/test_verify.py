"""`codec verify`: what it compares, what it finds, and how it tells."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import RATE_HZ, read_json, refusal, run, succeed, the_line, write_wav
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec import verification
from codec.config import build
from codec.jobs import Options, load_model
from codec.kernels import residual_search
from codec.kernels.residual_search import SearchTables, rvq_margins
from codec.models.dac import DACConfig
from codec.models.interface import Codec
from codec.models.seanet import SEANetConfig
from codec.quantizers.binary import BinarySphericalConfig
from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.interface import QuantizerConfig
from codec.quantizers.product import GumbelVQConfig, KMeansVQConfig, MultiCodebookVQConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.quantizers.scalar import FSQConfig
from codec.quantizers.simvq import SimVQConfig
from codec.quantizers.split import SplitVQConfig
from codec.streaming import StreamingDecoder, StreamingEncoder, StreamPool
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec
from codec.tokens import Tokens
from codec.verification import CodeDifference, Verification, Verifier, Way, text

pytest_plugins = ["commands"]

BATCH, PADDED, STREAM, POOL = "in a batch of 3", "padded, beside a longer one", "streamed", "in a pool of 3"
SEARCHES = ["search 'reference'", "search 'blocked'", "search 'numba'"]
NO_SEARCH: list[QuantizerConfig] = [
    FSQConfig(latent_dim=12, levels=(5, 4, 3)),
    BinarySphericalConfig(latent_dim=12, num_bits=4),
    GumbelVQConfig(latent_dim=12, num_groups=2, codebook_size=16),
]
WITH_SEARCH: list[QuantizerConfig] = [
    ResidualVQConfig(latent_dim=12, num_stages=2, num_groups=2, codebook_size=16),
    FactorizedVQConfig(latent_dim=12, num_stages=3, codebook_size=16, codebook_dim=4),
    SimVQConfig(latent_dim=12, num_stages=2, codebook_size=16),
    SplitVQConfig(latent_dim=12, num_stages=3, codebook_size=16, codebook_dim=4),
    KMeansVQConfig(latent_dim=12, num_groups=2, codebook_size=16),
    MultiCodebookVQConfig(latent_dim=12, num_groups=2, codebook_size=16),
]


def _audio(num_samples: int, *, num_channels: int = 1) -> Tensor:
    return torch.from_numpy(np.stack([speech_like(num_samples, seed=seed) for seed in range(num_channels)]))


def _random(config: Any) -> Codec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec: Codec = build(config).eval().requires_grad_(False)
    return codec


def _verified(codec: Codec, audio: Tensor, **arguments: Any) -> Verification:
    verifier = Verifier(codec, **arguments)
    assert verifier.add("a.wav", audio) == codec.num_frames_for(audio.shape[1])
    return verifier.result


def _names(found: Verification, kind: str) -> list[str]:
    return [way.name for way in found.ways if way.kind == kind]


@given(num_samples=st.integers(1, 700), num_quantizers=st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=10)
def test_our_model_keeps_its_promise(num_threads: int, num_samples: int, num_quantizers: int | None) -> None:
    codec, other = tiny_codec(), 3 - num_threads
    found = _verified(codec, _audio(num_samples), num_quantizers=num_quantizers, thread_counts=(1, 2))
    assert found.num_quantizers == (num_quantizers or 3)
    assert found.num_threads == torch.get_num_threads() == num_threads
    of_threads = f"{other} thread{'s' * (other > 1)}"
    assert _names(found, "codes") == [BATCH, PADDED, STREAM, POOL, *SEARCHES, of_threads]
    assert _names(found, "audio") == [BATCH, PADDED, STREAM, POOL, of_threads]
    for way in found.ways:
        assert way.is_promised == (way.name != of_threads)
        assert way.num_compared == (codec.num_frames_for(num_samples) if way.kind == "codes" else num_samples)
        assert not way.is_promised or (way.num_different, way.largest) == (0, None)
    assert found.broken_promises == []


@pytest.mark.parametrize("config", [*WITH_SEARCH, *NO_SEARCH], ids=lambda config: type(config).__name__)
def test_with_every_quantizer(config: QuantizerConfig) -> None:
    found = _verified(tiny_codec(quantizer=config), _audio(2000))
    assert found.broken_promises == []
    does_search = config in WITH_SEARCH
    assert _names(found, "codes") == [BATCH, PADDED, STREAM, POOL, *(SEARCHES if does_search else [])]
    assert (found.smallest_margin is not None) == does_search
    assert ("smallest margin" in text(found)) == does_search


def test_global_codes_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "available_impls", lambda device: [])  # what they do stands above
    codec, audio = tiny_voiced_codec(), _audio(5000)
    found = _verified(codec, audio, thread_counts=(1, 2))
    assert found.broken_promises == []
    of_voice = [way for way in found.ways if way.kind == "global codes"]
    assert [(way.name, way.is_promised) for way in of_voice] == [
        *((name, True) for name in (BATCH, PADDED, STREAM, POOL)),
        ("2 threads", False),
    ]
    assert all((way.num_compared, way.num_different) == (4, 0) for way in of_voice)
    assert "\nglobal codes " in text(found)
    assert "\nglobal codes " not in text(_verified(tiny_codec(), audio))

    hear = codec.encode_global
    for broken, num_rows in ((BATCH, 3), (PADDED, 2)):

        def flawed(audio: Tensor, *more: Any, num_rows: int = num_rows) -> Tensor:
            codes = hear(audio, *more)
            if len(codes) == num_rows:
                codes[1, 2] ^= 1
            return codes

        monkeypatch.setattr(codec, "encode_global", flawed)
        (way,) = _verified(codec, audio).broken_promises
        # The audio is that of the same tokens, whatever the others were.
        assert (way.kind, way.name, way.num_different) == ("global codes", broken, 1)


def test_margins_are_those_of_the_codes() -> None:
    codec, audio = tiny_codec(), _audio(3000)
    tokens = codec.encode(audio[None])
    latents_ND = codec.analyze(audio[None])[0].T[: tokens.codes.shape[2]]
    margins = rvq_margins(latents_ND, SearchTables(codec.quantizer.codebooks), tokens.codes[0].T)
    smallest = _verified(codec, audio).smallest_margin
    assert smallest == pytest.approx(float(margins.min()), rel=1e-3)
    other = _verified(codec, 0.1 * audio).smallest_margin
    for factors in ((1.0, 0.1), (0.1, 1.0)):
        verifier = Verifier(codec)
        for factor in factors:
            verifier.add("a.wav", factor * audio)
        assert verifier.result.smallest_margin == min(smallest or 0, other or 0)


def _flaw_of(codec: Codec, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Let one code be another one in one way of encoding; its frame and row."""
    frame, row = 5, 1
    encode, stream_step, pool_step = codec.encode, StreamingEncoder._step, StreamPool.step
    num_steps = 0

    def changed(codes: Tensor, frame: int) -> Tensor:
        codes = codes.clone()
        codes[-2 if len(codes) > 1 else 0, row, frame] ^= 1
        return codes

    def flawed_encode(audio: Tensor, num_samples: Tensor | None = None, **more: Any) -> Tokens:
        tokens = encode(audio, num_samples, **more)
        is_here = {BATCH: len(audio) == 3, "2 threads": torch.get_num_threads() == 2}.get(name, False)
        if is_here:
            tokens = Tokens(changed(tokens.codes, frame), tokens.num_samples, tokens.codec_id)
        if name == PADDED and num_samples is not None:
            codes = tokens.codes.clone()
            codes[1, row, frame] ^= 1
            tokens = Tokens(codes, tokens.num_samples, tokens.codec_id)
        return tokens

    def flawed_piece(codes_KF: Tensor) -> Tensor:
        """The next codes of one stream."""
        nonlocal num_steps
        at = frame - num_steps
        num_steps += codes_KF.shape[1]
        return changed(codes_KF[None], at)[0] if 0 <= at < codes_KF.shape[1] else codes_KF

    def flawed_stream(encoder: StreamingEncoder, audio: Tensor) -> Tensor:
        return flawed_piece(stream_step(encoder, audio))

    def flawed_pool(pool: StreamPool) -> dict[int, Tensor]:
        outputs = pool_step(pool)
        if pool.direction == "encode" and 0 in outputs:
            outputs[0] = flawed_piece(outputs[0])
        return outputs

    def flawed_search(latents: Tensor, tables: SearchTables, num_rows: int) -> tuple[Tensor, None]:
        codes = residual_search.rvq_reference(latents, tables, num_rows=num_rows)
        if residual_search._preferred.get() == "blocked":
            codes[frame, row] ^= 1
        return codes, None

    if name == STREAM:
        monkeypatch.setattr(StreamingEncoder, "_step", flawed_stream)
    elif name == POOL:
        monkeypatch.setattr(StreamPool, "step", flawed_pool)
    elif name == "search 'blocked'":
        monkeypatch.setitem(residual_search._FAST, "blocked", flawed_search)
    else:
        monkeypatch.setattr(codec, "encode", flawed_encode)
    return frame, row


@pytest.mark.parametrize("name", [BATCH, PADDED, STREAM, POOL, "search 'blocked'", "2 threads"])
def test_a_code_that_differs_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, audio = tiny_codec(), _audio(64 * 30)
    codes = codec.encode(audio[None]).codes[0]
    latents_ND = codec.analyze(audio[None])[0].T
    margins = rvq_margins(latents_ND[:30], SearchTables(codec.quantizer.codebooks), codes.T)
    frame, row = _flaw_of(codec, name, monkeypatch)
    verifier = Verifier(codec, thread_counts=(1, 2))
    verifier.add("a.wav", audio, first_frame=1000)
    (difference,) = verifier.result.differences
    code = int(codes[row, frame])
    assert difference == CodeDifference("a.wav", name, 1000 + frame, row, code, code ^ 1, difference.margin)
    assert difference.margin == pytest.approx(float(margins[frame, row]), rel=1e-2)
    for way in verifier.result.ways:
        is_it = (way.kind, way.name) == ("codes", name)
        assert (way.num_different, way.largest) == ((1, difference.margin) if is_it else (0, None)), way
    broken = [(way.kind, way.name) for way in verifier.result.broken_promises]
    assert broken == ([] if name == "2 threads" else [("codes", name)])


@pytest.mark.parametrize("name", [BATCH, PADDED, STREAM, POOL, "2 threads"])
def test_audio_that_differs_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, audio = tiny_codec(), _audio(64 * 30)
    decode, stream_push, pool_step = codec.decode, StreamingDecoder.push, StreamPool.step

    def flawed_decode(tokens: Tokens) -> Tensor:
        heard = decode(tokens)
        is_padded = len(tokens.codes) == 2
        if {BATCH: len(tokens.codes) == 3, PADDED: is_padded, "2 threads": torch.get_num_threads() == 2}.get(name):
            heard = heard.clone()
            heard[int(len(heard) > 1), 0, 100] += 0.25
        return heard

    def flawed_pool(pool: StreamPool) -> dict[int, Tensor]:
        outputs = pool_step(pool)
        return {number: output + 0.25 if pool.direction == "decode" else output for number, output in outputs.items()}

    if name == STREAM:
        monkeypatch.setattr(StreamingDecoder, "push", lambda decoder, codes: stream_push(decoder, codes) + 0.25)
    elif name == POOL:
        monkeypatch.setattr(StreamPool, "step", flawed_pool)
    else:
        monkeypatch.setattr(codec, "decode", flawed_decode)
    found = _verified(codec, audio, thread_counts=(2,))
    for way in found.ways:
        is_it = (way.kind, way.name) == ("audio", name)
        assert (way.num_different > 0) == is_it, way
        assert way.largest == (pytest.approx(0.25) if is_it else None)
    assert [way.name for way in found.broken_promises] == ([] if name == "2 threads" else [name])


def test_what_follows_from_a_difference_counts_no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a coarse code differs, those after it do, however clear they were."""
    codec, audio = tiny_codec(), _audio(640)
    encode, flaw = codec.encode, torch.ones(10, dtype=torch.int64)

    def flawed(given: Tensor, *more: Any, **named: Any) -> Tokens:
        tokens = encode(given, *more, **named)
        return tokens if len(given) != 3 else Tokens(tokens.codes ^ flaw, tokens.num_samples, tokens.codec_id)

    monkeypatch.setattr(codec, "encode", flawed)
    margins = {(d.frame, d.row): d.margin or 0.0 for d in _verified(codec, audio).differences}
    assert sorted(margins) == [(frame, row) for frame in range(10) for row in range(3)]
    unclear = next(frame for frame in range(10) if margins[frame, 0] < margins[frame, 1])
    flaw *= torch.arange(10) == unclear
    way = next(way for way in _verified(codec, audio).ways if way.name == BATCH)
    assert (way.num_different, way.largest) == (3, margins[unclear, 0])


def test_no_margin_is_told_where_the_searches_are_of_other_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = tiny_codec()
    encode = codec.encode

    def turned(given: Tensor, *more: Any, **named: Any) -> Tokens:
        tokens = encode(given, *more, **named)
        return Tokens(31 - tokens.codes, tokens.num_samples, tokens.codec_id)

    monkeypatch.setattr(codec, "encode", turned)
    found = _verified(codec, _audio(640))
    assert found.smallest_margin is None
    assert {difference.way for difference in found.differences} == {STREAM, POOL}
    assert {difference.margin for difference in found.differences} == {None}


CONVOLUTIONS: dict[str, Callable[[], Codec]] = {
    "dac": lambda: _random(
        DACConfig(
            sample_rate_hz=8000,
            encoder_dim=4,
            encoder_rates=(2, 5),
            decoder_dim=12,
            decoder_rates=(5, 2),
            quantizer=FactorizedVQConfig(latent_dim=16, num_stages=3, codebook_size=16, codebook_dim=3),
        )
    ),
    "encodec": lambda: _random(
        SEANetConfig(
            sample_rate_hz=8000,
            ratios=(3, 2),
            num_filters=4,
            num_lstm_layers=1,
            pad_mode="reflect",
            quantizer=ResidualVQConfig(latent_dim=6, num_stages=3, codebook_size=16),
        )
    ),
    "encodec_stereo": lambda: _random(
        SEANetConfig(
            sample_rate_hz=8000,
            num_channels=2,
            ratios=(3, 2),
            num_filters=4,
            causal=False,
            pad_mode="reflect",
            norm="group",
            segment_samples=600,
            segment_stride_samples=594,
            normalize_loudness=True,
            quantizer=ResidualVQConfig(latent_dim=6, num_stages=3, codebook_size=16),
        )
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_models_of_convolutions_are_compared_for_information(name: str) -> None:
    codec = CONVOLUTIONS[name]()
    audio = _audio(7000 if name == "dac" else 1500, num_channels=codec.num_channels)
    found = _verified(codec, audio)
    more = {"dac": ["in windows"], "encodec": [STREAM, POOL], "encodec_stereo": []}[name]
    assert _names(found, "codes") == [BATCH, PADDED, *more, *SEARCHES]
    assert _names(found, "audio") == [BATCH, PADDED, *more]
    assert {way.name for way in found.ways if way.is_promised} == set(SEARCHES)
    assert found.broken_promises == []
    assert found.smallest_margin is not None
    for way in found.ways:  # and all is nearly the same
        assert way.num_different <= 0.01 * way.num_compared * 3 if way.kind == "codes" else (way.largest or 0) < 1e-4
    if name == "dac":
        assert codec.num_frames_for(7000) > 600  # more than a window


@pytest.fixture
def loaded(model: Path) -> Codec:
    """The tiny model as commands in this process have it."""
    return load_model(str(model), Options())


@pytest.fixture
def other_rate(folder: Path) -> Iterator[Path]:
    path = folder / "other.wav"
    write_wav(path, speech_like(4800, rate_hz=48000)[None], rate_hz=48000)
    return path


def test_the_command_tells_in_tables(folder: Path, speech: Path, model: Path) -> None:
    said = succeed("verify", speech, "--model", model)
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines[0] == "tiny@1, 3 rows of codes, 1 thread: 1 file, 0.2 s"
    assert "codes promised frames codes that differ largest margin of them" in lines
    for way in (BATCH, PADDED, STREAM, POOL, *SEARCHES):
        assert f"{way} yes 47 0 -" in lines
    for way in (BATCH, PADDED, STREAM, POOL):
        assert f"{way} yes 3000 0 -" in lines
    assert sum(line.startswith("smallest margin of all codes: ") for line in lines) == 1
    assert not any(line.startswith("file way") for line in lines)


def test_the_command_tells_in_json(folder: Path, speech: Path, other_rate: Path, model: Path) -> None:
    told = read_json(succeed("verify", folder, "--model", model, "-k", 2, "--json"))
    assert told["model"] == "tiny@1"
    assert (told["num_quantizers"], told["num_threads"], told["num_files"]) == (2, 1, 2)
    assert told["seconds"] == pytest.approx((3000 + 1600) / RATE_HZ)
    assert told["is_promise_kept"] is True
    assert told["differences"] == []
    assert told["failures"] == {}
    assert 0 < told["smallest_margin"] < 1
    frames = {way["num_compared"] for way in told["ways"] if way["kind"] == "codes"}
    assert frames == {47 + 25}  # at the model's rate, channels averaged
    assert {way["num_compared"] for way in told["ways"] if way["kind"] == "audio"} == {4600}
    part = read_json(succeed("verify", speech, "--model", model, "--start", "0.1", "--duration", "0.05", "--json"))
    assert part["seconds"] == 0.05


def test_differences_are_told_and_are_the_exit_status(
    speech: Path, model: Path, loaded: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = loaded.encode

    def flawed(given: Tensor, *more: Any, **named: Any) -> Tokens:
        tokens = encode(given, *more, **named)
        codes = tokens.codes.clone()
        codes[:, 2, :30] ^= 1
        return tokens if len(given) != 3 else Tokens(codes, tokens.num_samples, tokens.codec_id)

    monkeypatch.setattr(loaded, "encode", flawed)
    result = run("verify", speech, "--model", model)
    assert result.exit_code == 1
    assert the_line(result.stderr) == f"codec: {BATCH}: 30 codes differ, where none may\n"
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith(f"{BATCH} yes 47 30 ") for line in lines)
    at = lines.index("file way frame row code other code margin")
    assert [line.split(BATCH)[1].split()[:2] for line in lines[at + 1 : at + 21]] == [[str(i), "2"] for i in range(20)]
    assert lines[-1] == "and 10 more codes; --json lists all"
    result = run("verify", speech, "--model", model, "--json")
    assert result.exit_code == 1
    told = read_json(result.stdout)
    assert told["is_promise_kept"] is False
    assert len(told["differences"]) == 30
    assert told["differences"][7]["frame"] == 7
    assert told["differences"][7]["file"] == str(speech)


def test_long_recordings_are_taken_in_pieces(
    speech: Path, model: Path, loaded: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, lengths = loaded.encode, []

    def flawed(given: Tensor, *more: Any, **named: Any) -> Tokens:
        tokens = encode(given, *more, **named)
        lengths.append(given.shape[2])
        codes = tokens.codes.clone()
        codes[:, 0, 3] ^= 1
        return tokens if len(given) != 3 else Tokens(codes, tokens.num_samples, tokens.codec_id)

    monkeypatch.setattr(verification, "FRAMES_PER_PIECE", 10)
    monkeypatch.setattr(loaded, "encode", flawed)
    told = read_json(run("verify", speech, "--model", model, "--json").stdout)
    assert [difference["frame"] for difference in told["differences"]] == [3, 13, 23, 33, 43]
    assert {way["num_compared"] for way in told["ways"]} == {47, 3000}
    assert max(lengths) < 17 * 64


def test_files_that_cannot_be_used_are_told_at_the_end(folder: Path, speech: Path, model: Path) -> None:
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    result = run("verify", folder, "nowhere.wav", "--model", model, "--json")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("codec: ") for line in lines)
    assert "broken.wav" in lines[0]
    assert "nowhere.wav" in lines[1]
    told = read_json(result.stdout)
    assert told["num_files"] == 1
    assert [Path(name).name for name in told["failures"]] == ["broken.wav", "nowhere.wav"]


def test_mistakes_are_one_line(folder: Path, speech: Path, model: Path) -> None:
    (folder / "empty").mkdir()
    assert "nowhere.wav" in refusal("verify", "nowhere.wav", "--model", model)
    assert "no audio files under empty" in refusal("verify", "empty", "--model", model)
    assert "neither a bundled model" in refusal("verify", speech, "--model", "nothing")
    assert "num_quantizers=7 is not one of (1, 2, 3)" in refusal("verify", speech, "--model", model, "-k", 7)
    assert "nothing of the stretch" in refusal("verify", speech, "--model", model, "--start", 5)
    assert run("verify", speech, "--model", model, "--threads", 0).exit_code == 2
    assert run("verify").exit_code == 2


def test_channels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = CONVOLUTIONS["encodec_stereo"]()
    codec.name = "stereo@1"
    monkeypatch.setattr(verification, "load_model", lambda model, options: codec)
    for num_channels in (1, 2, 3):
        audio = np.stack([speech_like(600, rate_hz=8000, seed=seed) for seed in range(num_channels)])
        write_wav(folder / f"{num_channels}.wav", audio, rate_hz=8000)
    found = verification.verify([str(folder)], Options())
    assert found.num_files == 2
    assert found.failures == {str(folder / "3.wav"): f"{folder / '3.wav'} has 3 channels, and stereo@1 codes 2"}
    audio = np.stack([speech_like(600, seed=seed) for seed in range(3)])
    write_wav(folder / "many.wav", audio)
    mixed = next(verification._pieces("many.wav", tiny_codec(), Options()))  # of one channel, as in `codec evaluate`
    assert np.array_equal(mixed.numpy()[0], audio.mean(0, dtype=np.float32))
    mono, stereo = (next(verification._pieces(f"{n}.wav", codec, Options())) for n in (1, 2))
    assert torch.equal(mono[0], mono[1])
    assert not torch.equal(stereo[0], stereo[1])


def test_a_way_counts_over_pieces() -> None:
    way = Way("codes", STREAM, is_promised=True)
    for counts in ((10, 0, None), (5, 2, 1e-6), (5, 1, 1e-7), (1, 0, None)):
        way.add(*counts)
    assert (way.num_compared, way.num_different, way.largest) == (21, 3, 1e-6)
