"""The language model of tokens: it sees only the past, it learns, and goes on with a prompt frame by frame."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from language_models import HOP, PATTERNS, tiny_lm, tokens_for
from torch import Tensor

import codec
from codec.testing import speech_like, tiny_codec, tiny_voiced_codec
from codec.token_format import TokenFormat
from codec.token_vocabulary import VocabularyDecoder
from codec.tokens import Tokens
from recipes.optimizers import MuonAdamW
from recipes.token_lm import NetworkConfig, TokenLM, load_lm, save_lm
from recipes.token_sampling import Sampling, continued
from tools.continue_speech import Speed, encode_prompt, main, speak

ROOT = Path(__file__).resolve().parent.parent
with_patterns = pytest.mark.parametrize("pattern", PATTERNS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    codec.save(tiny_codec(), folder, name="tiny@1")
    return folder


# The network


@with_patterns
def test_a_step_sees_the_past_and_nothing_else(pattern: str) -> None:
    lm = tiny_lm(pattern)
    ids = lm.config.vocabulary.encode(tokens_for(lm))
    embedded: list[Tensor] = []
    lm.dropout.register_forward_hook(lambda _, __, out: embedded.append(out.requires_grad_(True)))
    logits = lm(ids)
    at = 5
    (gradient,) = torch.autograd.grad(logits[0, at].square().sum(), embedded)
    seen = gradient[0].abs().sum(dim=1) > 0
    assert seen[: at + 1].all()
    assert not seen[at + 1 :].any()


@with_patterns
def test_steps_with_kept_keys_and_values_are_the_whole_at_once(pattern: str) -> None:
    """Up to rounding: sums of other sizes."""
    lm = tiny_lm(pattern)
    ids = lm.config.vocabulary.encode(tokens_for(lm, batch_size=2))
    whole = lm(ids)
    past, parts, at = lm.start(2), [], 0
    for size in (1, 3, 1, 1, 4, ids.shape[2]):
        parts.append(lm.step(ids[:, :, at : at + size], past))
        at += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_more_steps_than_the_context_holds_are_an_error() -> None:
    lm = tiny_lm(context_steps=8)
    past = lm.start()
    lm.step(torch.ones(1, 1, 8, dtype=torch.int64), past)
    with pytest.raises(ValueError, match="9 steps are more than the 8 of the context"):
        lm.step(torch.ones(1, 1, 1, dtype=torch.int64), past)


@with_patterns
def test_losses_are_of_what_has_to_be_told(pattern: str) -> None:
    """Against the definition, id by id; padding of a shorter recording has no part in them."""
    lm = tiny_lm(pattern)
    vocabulary = lm.config.vocabulary
    ids = vocabulary.encode(tokens_for(lm, 4))
    padded = torch.nn.functional.pad(ids, (0, 3), value=vocabulary.pad_id)
    losses, is_told = lm.losses(padded)
    assert not is_told[:, :, ids.shape[2] - 1 :].any()
    assert not losses[~is_told].any()
    logits = lm(padded).detach()
    for stream in range(vocabulary.num_streams):
        for step in range(padded.shape[2] - 1):
            target = int(padded[0, stream, step + 1])
            if not is_told[0, stream, step]:
                assert target == vocabulary.pad_id or (stream > 0 and target < vocabulary.row_ids[0].start)
                continue
            one_stream = vocabulary.num_streams == 1
            rivals = [id for ids in vocabulary.row_ids for id in ids] if one_stream else [*vocabulary.row_ids[stream]]
            if stream == 0:
                rivals += [vocabulary.begin_id, vocabulary.end_id, *vocabulary.global_ids]
            expected = -float(logits[0, step].double()[rivals].log_softmax(0)[rivals.index(target)])
            assert float(losses[0, stream, step].detach()) == pytest.approx(expected, abs=1e-4)
    num_codes = int((lm.rows_of(padded[:, :, 1:])[is_told] >= 0).sum())
    assert num_codes == 4 * 2


def test_one_batch_can_be_overfitted() -> None:
    lm = TokenLM(tiny_lm().config)
    ids = lm.config.vocabulary.encode(tokens_for(lm, batch_size=2))
    optimizer = MuonAdamW(lm, lr=0.03, weight_decay=0.0, betas=(0.9, 0.98))
    means = []
    for _ in range(60):
        losses, is_told = lm.losses(ids)
        loss = losses.sum() / is_told.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(float(loss.detach()))
    assert means[0] > 2.0
    assert means[-1] < 0.2


def test_a_model_is_a_folder(tmp_path: Path) -> None:
    lm = tiny_lm("interleave")
    save_lm(lm, tmp_path)
    loaded = load_lm(tmp_path)
    assert loaded.config == lm.config
    ids = lm.config.vocabulary.encode(tokens_for(lm))
    assert torch.equal(loaded(ids), lm(ids))
    assert json.loads((tmp_path / "config.json").read_text())["vocabulary"]["pattern"] == "interleave"
    config = json.loads((tmp_path / "config.json").read_text())
    config["network"]["num_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not fit its config\.json"):
        load_lm(tmp_path)
    config["network"]["depth"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no such setting"):
        load_lm(tmp_path)
    with pytest.raises(ValueError, match="holds no language model"):
        load_lm(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0}, "width must be positive"),
        ({"width": 18}, "width=18 is not a multiple of 2"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
    ],
)
def test_networks_that_cannot_be_are_errors(values: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"width": 16, "num_layers": 1, "num_heads": 2, "context_steps": 9}
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**good | values)


def test_vocabularies_that_do_not_go_with_the_network_are_errors() -> None:
    with pytest.raises(ValueError, match="context_steps=5 must be 6 or more"):
        tiny_lm(context_steps=5)
    with pytest.raises(ValueError, match="wants ids of its own"):
        tiny_lm(shares_ids=True)
    with pytest.raises(ValueError, match="counted from 0"):
        tiny_lm(first_id=7)


# Going on with a prompt


def offline(lm: TokenLM, prompt: Tokens, sampling: Sampling, num_steps: int) -> Tensor:
    """The same draws, with everything computed anew in every step: ids [1, S, N]."""
    draws = torch.Generator().manual_seed(sampling.seed)
    ids = lm.config.vocabulary.prompt(prompt)
    while ids.shape[2] < num_steps:
        decoder = VocabularyDecoder(lm.config.vocabulary)
        decoder.push(ids[0])
        if decoder.is_ended:
            break
        logits = lm(ids)[0, -1].double()
        step = []
        for mask in decoder.valid_ids(may_end=sampling.may_end):
            shares = logits.masked_fill(~mask, -math.inf).div(sampling.temperature).softmax(0)
            if sampling.top_k is not None:
                least = shares.sort(descending=True).values[min(sampling.top_k, len(shares)) - 1]
                shares = shares.masked_fill(shares < least, 0.0)
            place = torch.rand((), generator=draws, dtype=torch.float64) * shares.sum()
            step.append(int((shares.cumsum(0) <= place).sum()))
        ids = torch.cat([ids, torch.tensor(step)[None, :, None]], dim=2)
    return ids


@with_patterns
@pytest.mark.parametrize("sampling", [Sampling(seed=1), Sampling(seed=2, top_k=3, temperature=0.7, may_end=False)])
def test_a_stream_of_frames_is_what_sampling_offline_gives(pattern: str, sampling: Sampling) -> None:
    lm = tiny_lm(pattern)
    prompt = tokens_for(lm, 4)
    ids = offline(lm, prompt, sampling, 40)
    decoder = VocabularyDecoder(lm.config.vocabulary)
    expected = decoder.push(ids[0])
    frames, num_frames = [], 0
    for codes in continued(lm, prompt, sampling):
        assert codes.shape[1] > 0
        frames.append(codes)
        num_frames += codes.shape[1]
        if num_frames >= expected.shape[1] and not decoder.is_ended:
            break
    assert torch.equal(torch.cat(frames, dim=1), expected)
    num_kept = 3 if pattern.endswith("delay") else 4  # whole frames of a delayed prompt
    assert torch.equal(expected[:, :num_kept], prompt.codes[0, :, :num_kept])
    assert expected.shape[1] >= (4 if sampling.may_end else 11)


def test_other_seeds_say_other_things() -> None:
    lm = tiny_lm()
    prompt = tokens_for(lm, 4)

    def first(seed: int) -> list[int]:
        frames = continued(lm, prompt, Sampling(seed=seed, may_end=False))
        return [int(next(frames)[0, -1]) for _ in range(8)]

    assert first(1) == first(1)
    assert len({tuple(first(seed)) for seed in range(5)}) == 5


def test_the_likeliest_id_alone_is_drawn_with_top_k_of_one() -> None:
    lm = tiny_lm()
    prompt = tokens_for(lm, 4)
    frames = [continued(lm, prompt, Sampling(seed=seed, top_k=1, may_end=False)) for seed in range(3)]
    for _ in range(8):
        codes = [next(stream) for stream in frames]
        assert all(torch.equal(codes[0], other) for other in codes)


@with_patterns
def test_a_recording_may_grow_beyond_the_context(pattern: str) -> None:
    """What is told of then: the global codes and the most recent half."""
    lm = tiny_lm(pattern, context_steps=16)
    prompt = tokens_for(lm, 12)
    heard: list[tuple[int, Tensor]] = []  # what a new past began with, and how many steps there were by then
    step, num_calls = lm.step, 0

    def watched(ids: Tensor, past: Any) -> Tensor:
        nonlocal num_calls
        assert past.num_steps + ids.shape[2] <= 16
        if past.num_steps == 0:
            heard.append((prompt_ids.shape[2] + num_calls, ids))
        num_calls += 1
        return step(ids, past)

    vocabulary = lm.config.vocabulary
    prompt_ids = vocabulary.prompt(prompt)
    lm.step = watched  # type: ignore[method-assign]
    parts: list[Tensor] = []
    for codes in continued(lm, prompt, Sampling(may_end=False)):
        parts.append(codes)
        if sum(part.shape[1] for part in parts) > 60:
            break
    told = torch.cat(parts, dim=1)[None]
    lengths = torch.tensor([told.shape[2] * HOP])
    ids = vocabulary.prompt(Tokens(told, lengths, vocabulary.codec_id, global_codes=prompt.global_codes))
    num_before = vocabulary.num_steps_before
    checked = [(num_steps, recent) for num_steps, recent in heard[1:] if num_steps <= ids.shape[2]]
    assert len(checked) > 2
    for num_steps, recent in checked:
        num_recent = recent.shape[2] - num_before
        assert 0 < num_recent <= 8
        assert torch.equal(recent[:, :, :num_before], ids[:, :, :num_before])
        assert torch.equal(recent[:, :, num_before:], ids[:, :, num_steps - num_recent : num_steps])
        if vocabulary.pattern != "delay":
            assert (num_steps - num_recent - num_before) % vocabulary.steps_per_block == 0


def test_prompts_and_samplings_that_cannot_be_are_errors() -> None:
    lm = tiny_lm()
    with pytest.raises(ValueError, match="batch of one recording, not of 2"):
        next(continued(lm, tokens_for(lm, batch_size=2), Sampling()))
    with pytest.raises(ValueError, match="has 2 rows of codes, the tokens 1"):
        next(continued(lm, tokens_for(lm).prefix(1), Sampling()))
    wrong: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": math.nan}, {"top_k": 0}]
    for values in wrong:
        with pytest.raises(ValueError, match="must be positive"):
            Sampling(**values)


# Speech


@pytest.fixture
def spoken(model: Path, tmp_path: Path) -> tuple[Path, Path, TokenLM]:
    """A folder with a language model of the tiny codec's first two rows, and a prompt of 20 frames and a half."""
    lm = tiny_lm(codec_id=TokenFormat.load(model).codec_id, codebook_sizes=(32, 32))
    save_lm(lm, tmp_path / "lm")
    soundfile.write(tmp_path / "prompt.wav", speech_like(20 * HOP + 32), 16000)
    return tmp_path / "lm", tmp_path / "prompt.wav", lm


def test_what_is_spoken_is_the_prompt_and_what_comes_then(model: Path, spoken: tuple[Path, Path, TokenLM]) -> None:
    _, file, lm = spoken
    tiny, sampling, speed = codec.load(model), Sampling(seed=3, may_end=False), Speed()
    prompt = encode_prompt(file, tiny, lm)
    assert prompt.num_samples.tolist() == [20 * HOP]
    pieces = list(speak(lm, tiny, prompt, sampling, num_samples=10 * HOP + 7, speed=speed))
    audio = torch.cat(pieces, dim=1)
    assert audio.shape == (1, 30 * HOP + 7)
    assert len(pieces) > 10  # it came frame by frame
    assert 0.0 < speed.first_audio_seconds < speed.seconds
    assert speed.audio_seconds == pytest.approx((10 * HOP + 7) / 16000)
    # All frames at once sound the same.
    frames, codes = continued(lm, prompt, sampling), torch.zeros(2, 0, dtype=torch.int64)
    while codes.shape[1] < 31:
        codes = torch.cat([codes, next(frames)], dim=1)
    whole = tiny.decode(Tokens(codes[None], torch.tensor([31 * HOP]), tiny.codec_id))
    assert torch.equal(audio, whole[0, :, : 30 * HOP + 7])


def test_a_recording_that_ends_by_itself_has_whole_frames(model: Path, spoken: tuple[Path, Path, TokenLM]) -> None:
    _, file, lm = spoken
    lm.table.data[lm.config.vocabulary.end_id] = 50.0 * lm.table.data[lm.config.vocabulary.row_ids[0][3]]
    tiny, num_samples = codec.load(model), 10**6
    prompt = encode_prompt(file, tiny, lm)
    audio = torch.cat(list(speak(lm, tiny, prompt, Sampling(), num_samples=num_samples, speed=Speed())), dim=1)
    assert 20 * HOP <= audio.shape[1] < num_samples
    assert audio.shape[1] % HOP == 0


def test_the_voice_of_the_prompt_stays(tmp_path: Path) -> None:
    voiced = tiny_voiced_codec()
    lm = tiny_lm(
        context_steps=40,
        codebook_sizes=voiced.codebook_sizes[:1],
        num_global_codes=voiced.num_global_codes,
        global_codebook_size=voiced.global_codebook_size,
    )
    soundfile.write(tmp_path / "prompt.wav", speech_like(80 * HOP), 16000)
    prompt = encode_prompt(tmp_path / "prompt.wav", voiced, lm)
    assert prompt.global_codes is not None
    sampling = Sampling(seed=1, may_end=False)
    pieces = speak(lm, voiced, prompt, sampling, num_samples=60 * HOP, speed=Speed())
    frames, codes = continued(lm, prompt, sampling), torch.zeros(1, 0, dtype=torch.int64)
    while codes.shape[1] < 140:
        codes = torch.cat([codes, next(frames)], dim=1)
    tokens = Tokens(codes[None], torch.tensor([140 * HOP]), voiced.codec_id, global_codes=prompt.global_codes)
    assert torch.equal(torch.cat(list(pieces), dim=1), voiced.decode(tokens)[0])


def test_the_command_writes_files_and_pipes(
    model: Path,
    spoken: tuple[Path, Path, TokenLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, file, _ = spoken

    def arguments(codec: str | Path, out: str | Path) -> list[str]:
        return [*map(str, (folder, codec, file, out)), "--seconds", "0.05", "--seed", "3", "--no-end"]

    monkeypatch.setattr(sys, "argv", ["continue_speech", *arguments(model, tmp_path / "out.wav")])
    main()
    assert "times real time; first new audio after" in capsys.readouterr().err
    audio, rate_hz = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert (len(audio), rate_hz) == (20 * HOP + 800, 16000)
    command = [sys.executable, "-W", "ignore", "-m", "tools.continue_speech", *arguments(model, "-")]
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with codec.audio.AudioReader(io.BytesIO(piped.stdout)) as reader:
        assert np.array_equal(np.concatenate(list(reader.blocks()), axis=1)[0], audio)
    monkeypatch.setattr(sys, "argv", ["continue_speech", *arguments("speech_16k", tmp_path / "other.wav")])
    with pytest.raises(
        SystemExit, match=r"^error: the language model writes tokens of codec \w+, not of speech_16k@1$"
    ):
        main()
    assert not (tmp_path / "other.wav").exists()


def test_prompts_without_a_frame_are_errors(model: Path, spoken: tuple[Path, Path, TokenLM], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", np.zeros(HOP - 1, np.float32), 16000)
    with pytest.raises(ValueError, match=r"short\.wav is shorter than a frame of 64 samples"):
        encode_prompt(tmp_path / "short.wav", codec.load(model), spoken[2])
