"""The command line and voices: `encode --speaker-from`, `decode --voice`, `convert`, what is told of global codes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import RATE_HZ, assert_wav, pipe_through, read_json, refusal, run, snapshot, succeed, write_wav

from codec import jobs, token_format
from codec.bitstream import Reader, SegmentStart, Writer
from codec.models.semantic_global import SemanticGlobalCodec
from codec.pretrained import load, save
from codec.testing import speech_like, tiny_voiced_codec
from codec.transcode import encode_blocks

pytest_plugins = ["commands"]

SAMPLES = 5000  # the voice is in the first 4000


@pytest.fixture
def codec(voiced_model: Path) -> SemanticGlobalCodec:
    model = load(voiced_model)
    assert isinstance(model, SemanticGlobalCodec)
    return model


@pytest.fixture
def reference(folder: Path) -> Path:
    write_wav("ref.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (2, 8000)), 22050)
    return folder / "ref.wav"


def audio_of(path: Path | str) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0].T.copy())[:, None]


def voices_in(path: Path | str) -> list[list[int]]:
    with Reader(path) as reader:
        (segment,) = reader.segments
        assert segment.start.global_codes is not None
        voices: list[list[int]] = segment.start.global_codes.tolist()
        return voices


@pytest.fixture
def target_voice(reference: Path, speech: Path, voiced_model: Path) -> list[int]:
    """That of the reference, as `encode --speaker-from` finds it; not that of the speech."""
    succeed("encode", speech, "own.codec", "-m", voiced_model)
    succeed("encode", speech, "other.codec", "-m", voiced_model, "--speaker-from", reference)
    voice = voices_in("other.codec")
    assert voice[0] == voice[1]
    assert voice[0] not in voices_in("own.codec")
    return voice[0]


def test_files_hold_the_voices_that_the_library_computes(
    target_voice: list[int], reference: Path, speech: Path, codec: SemanticGlobalCodec, voiced_model: Path
) -> None:
    tokens = codec.encode(audio_of(speech))
    assert tokens.global_codes is not None
    assert voices_in("own.codec") == tokens.global_codes.tolist()
    write_wav("mono.wav", audio_of(reference).mean(0).numpy(), 22050)
    for source in ("mono.wav", "other.codec"):
        succeed("encode", speech, "again.codec", "-m", voiced_model, "--speaker-from", source, "--force")
        assert voices_in("again.codec") == [target_voice, target_voice]
    assert Path("again.codec").read_bytes() == Path("other.codec").read_bytes()


def test_three_ways_to_another_voice_sound_the_same(
    target_voice: list[int], reference: Path, speech: Path, codec: SemanticGlobalCodec, voiced_model: Path
) -> None:
    options = ("-m", voiced_model)
    succeed("encode", speech, "thin.codec", *options, "-k", 1, "--speaker-from", reference)
    succeed("decode", "thin.codec", "0.wav", *options)
    succeed("decode", "own.codec", "1.wav", *options, "--voice", reference)
    succeed("decode", "own.codec", "2.wav", *options, "--voice", "other.codec")
    succeed("convert", speech, "3.wav", *options, "--voice", reference)
    tokens = codec.encode(audio_of(speech), num_quantizers=1).with_voice(torch.tensor(target_voice))
    expected = np.clip(np.round(codec.decode(tokens)[:, 0].numpy().T * 2**15), -32768, 32767)
    for number in range(4):
        np.testing.assert_array_equal(soundfile.read(f"{number}.wav", dtype="int16")[0], expected)
    # More rows where they are asked for.
    succeed("decode", "own.codec", "4.wav", *options, "--voice", reference, "-k", 3)
    succeed("convert", speech, "5.wav", *options, "--voice", reference, "-k", 3)
    assert Path("4.wav").read_bytes() == Path("5.wav").read_bytes() != Path("3.wav").read_bytes()
    # And without a voice, a lower rate of the same.
    succeed("encode", speech, "two.codec", *options, "-k", 2)
    succeed("decode", "two.codec", "6.wav", *options)
    succeed("decode", "own.codec", "7.wav", *options, "-k", 2)
    assert Path("6.wav").read_bytes() == Path("7.wav").read_bytes()


@pytest.mark.parametrize(("rate_hz", "num_channels"), [(8000, 1), (44100, 2), (16000, 6)])
def test_what_is_converted_keeps_its_length_rate_and_channels(
    rate_hz: int, num_channels: int, reference: Path, voiced_model: Path
) -> None:
    for num_samples in (1, 777, 4001):
        write_wav("in.wav", np.stack([speech_like(num_samples, rate_hz=rate_hz)] * num_channels), rate_hz)
        args = ("convert", "in.wav", "out.wav", "-m", voiced_model, "--voice", reference, "--force")
        assert read_json(succeed(*args, "--json"))["files"][0]["num_samples"] == num_samples
        assert_wav("out.wav", num_channels, num_samples, rate_hz)
    succeed(*args, "--start", "0.01", "--duration", "0.05")
    assert_wav("out.wav", num_channels, round(0.06 * rate_hz) - round(0.01 * rate_hz), rate_hz)


def test_folders_are_converted(reference: Path, voiced_model: Path) -> None:
    for name in ("in/a.wav", "in/deep/b.wav"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_wav(name, speech_like(SAMPLES)[None])
    Path("in/bad.wav").write_bytes(b"no audio")
    result = run("convert", "in", "out", "-m", voiced_model, "--voice", reference, "--jobs", 1)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 2)
    assert "bad.wav" in result.stderr
    succeed("convert", "in/a.wav", "one.wav", "-m", voiced_model, "--voice", reference)
    for name in ("out/a.wav", "out/deep/b.wav"):
        assert Path(name).read_bytes() == Path("one.wav").read_bytes()


def test_pipes_give_the_bytes_of_files(target_voice: list[int], speech: Path, voiced_model: Path) -> None:
    options = ("-m", voiced_model)
    coded = pipe_through("encode", "-", "-", *options, stdin=speech.read_bytes())
    assert (coded.status, coded.stderr, coded.stdout) == (0, "", Path("own.codec").read_bytes())
    converted = pipe_through("convert", "-", "-", *options, "--voice", "ref.wav", stdin=speech.read_bytes())
    decoded = pipe_through("decode", "-", "-", *options, "--voice", "ref.wav", stdin=coded.stdout)
    assert (converted.status, converted.stderr) == (decoded.status, decoded.stderr) == (0, "")
    succeed("convert", speech, "out.wav", *options, "--voice", "ref.wav")
    expected = soundfile.read("out.wav", dtype="int16")[0]
    for stream in (converted.stdout, decoded.stdout):
        np.testing.assert_array_equal(np.frombuffer(stream[-expected.nbytes :], "<i2").reshape(-1, 2), expected)


def test_the_default_of_convert_is_the_bundled_model_with_a_voice(
    reference: Path, speech: Path, voiced_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_format, "available", dict)
    line = refusal("convert", speech, "out.wav", "--voice", reference)
    assert line == "codec: no bundled model keeps the voice apart; --model names one that does\n"
    monkeypatch.setattr(jobs, "DEFAULT_VOICED_MODEL", str(voiced_model))
    monkeypatch.setattr(token_format, "available", lambda: {str(voiced_model): voiced_model})
    succeed("convert", speech, "out.wav", "--voice", reference)
    succeed("convert", speech, "named.wav", "--voice", reference, "-m", voiced_model)
    assert Path("out.wav").read_bytes() == Path("named.wav").read_bytes()


def test_resuming_does_again_what_has_another_voice(target_voice: list[int], speech: Path, voiced_model: Path) -> None:
    options = ("-m", voiced_model, "--resume", "--json")
    for source, statuses in (("own", ("done", "skipped")), ("other", ("skipped", "skipped"))):
        shutil.copy(f"{source}.codec", "out.codec")
        for status in statuses:
            done = read_json(succeed("encode", speech, "out.codec", *options, "--speaker-from", "ref.wav"))
            assert [file["status"] for file in done["files"]] == [status]
        assert voices_in("out.codec") == [target_voice, target_voice]


def test_info_and_reports_count_global_codes(speech: Path, voiced_model: Path) -> None:
    succeed("encode", speech, "x.codec", "-m", voiced_model, "-k", 1)
    facts = read_json(succeed("info", "x.codec", "--json"))
    assert (facts["num_global_codes"], facts["num_global_bits"]) == ([4], 2 * 4 * 6)
    frames_bps, seconds = 2 * 6 * 250, 3000 / RATE_HZ
    assert facts["packed_bps"] == frames_bps + 48 / seconds
    assert facts["coded_bps"] == pytest.approx(8 * (6 + 2 * 47 * 6 / 8) / seconds, rel=0.01)
    report = read_json(succeed("roundtrip", speech, "x.wav", "-m", voiced_model, "-k", 1, "--json"))
    assert (report["num_global_codes"], report["num_global_bits"]) == (4, 48)
    assert report["packed_bps"] == facts["packed_bps"]
    assert report["container_bytes"] == facts["file_bytes"]
    succeed("decode", "x.codec", "y.wav", "-m", voiced_model)
    assert Path("x.wav").read_bytes() == Path("y.wav").read_bytes()


def test_info_tells_which_models_have_a_voice(
    folder: Path, model: Path, voiced_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_format, "available", lambda: {str(model): model, str(voiced_model): voiced_model})
    facts = read_json(succeed("info", "--json"))
    assert facts[f"model {voiced_model}"].endswith(", 4 global codes (24 bits) for the voice")
    assert "global" not in facts[f"model {model}"]


def test_models_without_a_voice_take_none(reference: Path, speech: Path, model: Path) -> None:
    succeed("encode", speech, "x.codec", "-m", model)
    reason = "tiny@1 does not keep the voice apart: that takes a model with global codes\n"
    for args in (
        ("encode", speech, "out.codec", "--speaker-from", reference),
        ("decode", "x.codec", "out.wav", "--voice", reference),
        ("convert", speech, "out.wav", "--voice", reference),
    ):
        assert refusal(*args, "-m", model).endswith(reason)


def test_references_that_say_no_voice(speech: Path, voiced_model: Path, codec: SemanticGlobalCodec) -> None:
    Path("text").write_text("no audio")
    write_wav("empty.wav", np.zeros((1, 0)))
    write_wav("nan.wav", np.full((1, 500), np.nan))
    save(tiny_voiced_codec(seed=1), "another", name="another@1", dtype="float32")
    encode_blocks(load("another"), [np.zeros((1, 100), np.float32)], "another.codec", rate_hz=RATE_HZ, num_channels=1)
    assert codec.token_format is not None
    with Writer("mute.codec", codec.token_format.header(), start=SegmentStart()) as writer:
        writer.finish(0)
    shutil.copy("mute.codec", "cut.codec")
    with open("cut.codec", "r+b") as file:
        file.truncate(20)
    before = snapshot(Path.cwd())
    for reference, reason in (
        ("nothing.wav", "nothing.wav: No such file or directory"),
        ("another", "another: Is a directory"),
        ("text", "text cannot be read as audio"),
        ("empty.wav", "empty.wav holds no samples"),
        ("nan.wav", "nan.wav holds NaN or infinite samples"),
        ("another.codec", "another.codec: it was made by another@1"),
        ("mute.codec", "mute.codec: it holds no global codes, and voiced@1 needs 4 global codes of 64"),
        ("cut.codec", "cut.codec: the file ends inside the header"),
        ("-", "a voice is taken from a file, not from standard input"),
    ):
        for args in (("encode", speech, "out.codec", "--speaker-from"), ("convert", speech, "out.wav", "--voice")):
            line = refusal(*args, reference, "-m", voiced_model)
            assert line.startswith(f"codec: {reason}"), line
    assert snapshot(Path.cwd()) == before


def test_files_without_the_voice_that_their_model_needs(
    folder: Path, codec: SemanticGlobalCodec, voiced_model: Path
) -> None:
    assert codec.token_format is not None
    with Writer("mute.codec", codec.token_format.header()) as writer:
        writer.write(np.zeros((1, 4, 10), np.int64))
        writer.finish(640)
    line = refusal("decode", "mute.codec", "out.wav", "-m", voiced_model)
    assert line == (
        "codec: mute.codec: it holds no global codes, and voiced@1 needs 4 global codes of 64: they say the voice\n"
    )
    # Another voice does not need its own.
    write_wav("ref.wav", speech_like(SAMPLES)[None])
    succeed("decode", "mute.codec", "out.wav", "-m", voiced_model, "--voice", "ref.wav")
    assert_wav("out.wav", 1, 640, RATE_HZ)


def test_rows_that_a_file_does_not_have(speech: Path, voiced_model: Path) -> None:
    succeed("encode", speech, "x.codec", "-m", voiced_model, "-k", 2)
    line = refusal("decode", "x.codec", "out.wav", "-m", voiced_model, "-k", 3)
    assert line == "codec: x.codec: num_quantizers=3 cannot be had of its 2 rows of codes\n"
