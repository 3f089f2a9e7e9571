import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner, Result

from codec.bitstream import Header, Reader, Writer
from codec.cli import app
from codec.pretrained import load, save
from codec.testing import speech_like, tiny_codec

HOP_LENGTH, RATE_HZ = 64, 16000  # of the tiny codec


@pytest.fixture(autouse=True)
def _number_of_threads_stays() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny_codec(), folder, name="tiny@1", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "other"
    save(tiny_codec(seed=1), folder, name="other@1", dtype="float32")
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def speech(folder: Path) -> Path:
    path = folder / "speech.wav"
    write_wav(path, np.stack([speech_like(3000, seed=1), speech_like(3000, seed=2)]))
    return path


@pytest.fixture
def container(speech: Path, model: Path) -> Path:
    path = speech.with_name("speech.codec")
    succeed("encode", speech, path, "--model", model)
    return path


def write_wav(path: Path, audio: np.ndarray, rate_hz: int = RATE_HZ, subtype: str = "FLOAT") -> None:
    soundfile.write(path, audio.T, rate_hz, subtype=subtype)


def run(*args: object) -> Result:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    # Everything but an exit on purpose would be a traceback for the user.
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def succeed(*args: object) -> str:
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def snapshot(folder: Path) -> dict[Path, object]:
    return {f: f.readlink() if f.is_symlink() else f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


def refusal(*args: object) -> str:
    """The one line on stderr of a command that fails with status 1 and changes nothing in the current folder."""
    before = snapshot(Path.cwd())
    result = run(*args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("codec: ")
    assert result.stderr.endswith("\n")
    assert len(result.stderr.splitlines()) == 1
    assert snapshot(Path.cwd()) == before
    return result.stderr


def read_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    facts: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return facts


def assert_wav(path: Path, num_channels: int, num_samples: int, rate_hz: int) -> None:
    info = soundfile.info(path)
    assert (info.format, info.subtype) == ("WAV", "PCM_16")
    assert (info.channels, info.frames, info.samplerate) == (num_channels, num_samples, rate_hz)


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100, 48000, 192000])
@pytest.mark.parametrize("num_channels", [1, 2, 6])
def test_lengths_channels_and_rates_come_back_exactly(
    rate_hz: int, num_channels: int, folder: Path, model: Path
) -> None:
    frame = HOP_LENGTH * rate_hz // RATE_HZ
    source, coded, target = folder / "in.wav", folder / "out.codec", folder / "out.wav"
    for num_samples in (1, 2, frame - 1, frame, frame + 1, 3 * frame, 4001):
        write_wav(source, np.random.default_rng(0).uniform(-0.5, 0.5, (num_channels, num_samples)), rate_hz)
        assert succeed("encode", source, coded, "--model", model, "--force") == ""
        facts = read_json(succeed("info", coded, "--json"))
        assert facts["num_frames"] == ceil(ceil(num_samples * RATE_HZ / rate_hz) / HOP_LENGTH)
        assert (facts["num_samples"], facts["num_channels"], facts["rate_hz"]) == (num_samples, num_channels, rate_hz)
        assert succeed("decode", coded, target, "--model", model, "--force") == ""
        assert_wav(target, num_channels, num_samples, rate_hz)
    assert {f.name for f in folder.iterdir()} == {"in.wav", "out.codec", "out.wav"}


def test_files_hold_what_the_library_computes(speech: Path, model: Path) -> None:
    succeed("encode", speech, "out.codec", "--model", model)
    succeed("decode", "out.codec", "decoded.wav", "--model", model)
    succeed("roundtrip", speech, "roundtrip.wav", "--model", model)
    codec = load(model)
    audio = torch.from_numpy(soundfile.read(speech, dtype="float32")[0].T.copy())[:, None]
    tokens = codec.encode(audio)
    with Reader("out.codec") as reader:
        assert reader.header.codec_id == codec.codec_id
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks()), axis=2), tokens.codes.numpy())
    expected = np.round(codec.decode(tokens)[:, 0].numpy().T * 2**15)
    np.testing.assert_array_equal(soundfile.read("decoded.wav", dtype="int16")[0], expected)
    assert Path("decoded.wav").read_bytes() == Path("roundtrip.wav").read_bytes()


def test_the_model_that_a_file_names_is_found(speech: Path) -> None:
    succeed("encode", speech, "out.codec")
    succeed("decode", "out.codec", "out.wav")
    assert_wav(Path("out.wav"), 2, 3000, RATE_HZ)


def test_a_name_in_a_file_never_stands_for_a_folder(
    container: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)  # here "tiny" is a folder with the very model
    assert "tiny@1, which is not bundled" in refusal("decode", container, "out.wav")


@pytest.mark.parametrize("num_quantizers", [1, 2, 3])
def test_fewer_quantizers_make_a_smaller_file(num_quantizers: int, speech: Path, model: Path) -> None:
    succeed("encode", speech, "out.codec", "--model", model, "--num-quantizers", num_quantizers)
    facts = read_json(succeed("info", "out.codec", "--json"))
    assert facts["codebook_sizes"] == [32] * num_quantizers
    assert facts["codes_bps"] == 2 * 5 * num_quantizers * RATE_HZ / HOP_LENGTH
    succeed("decode", "out.codec", "out.wav", "--model", model)
    assert_wav(Path("out.wav"), 2, 3000, RATE_HZ)
    report = read_json(succeed("roundtrip", speech, "again.wav", "-m", model, "-k", num_quantizers, "--json"))
    assert report["num_quantizers"] == num_quantizers
    assert report["container_bytes"] == Path("out.codec").stat().st_size
    assert Path("again.wav").read_bytes() == Path("out.wav").read_bytes()


def test_info_says_what_a_file_holds(container: Path, model: Path) -> None:
    facts = read_json(succeed("info", container, "--json"))
    size = container.stat().st_size
    assert facts == {
        "file": str(container),
        "model": "tiny@1",
        "codec_id": load(model).codec_id,
        "seconds": 3000 / RATE_HZ,
        "num_samples": 3000,
        "rate_hz": RATE_HZ,
        "num_channels": 2,
        "codec_rate_hz": RATE_HZ,
        "hop_length": HOP_LENGTH,
        "num_frames": 47,
        "codebook_sizes": [32, 32, 32],
        "codes_bps": 2 * 15 * 250,
        "container_bps": round(8 * size / (3000 / RATE_HZ), 1),
    }
    text = succeed("info", container)
    assert [line.split()[0] for line in text.splitlines()] == list(facts)
    assert "tiny@1" in text


def test_info_says_what_is_installed() -> None:
    facts = read_json(succeed("info", "--json"))
    assert facts["torch"] == torch.__version__
    assert {"version", "residual_search"} <= set(facts)
    assert facts["version"] in succeed("info")


def test_roundtrip_reports_in_json_and_in_words(speech: Path, model: Path) -> None:
    report = read_json(succeed("roundtrip", speech, "out.wav", "--model", model, "--json"))
    assert report["model"] == "tiny@1"
    assert (report["num_samples_in"], report["num_samples_out"], report["num_frames"]) == (3000, 3000, 47)
    assert (report["num_channels"], report["rate_hz"], report["num_quantizers"]) == (2, RATE_HZ, 3)
    assert report["codes_bps"] == 7500
    assert report["container_bps"] == pytest.approx(8 * report["container_bytes"] * RATE_HZ / 3000)
    assert report["encode_times_real_time"] > 0
    assert report["decode_times_real_time"] > 0
    assert isinstance(report["metrics"]["si_sdr_db"], float)
    assert isinstance(report["metrics"]["log_spectral_db"], float)
    text = succeed("roundtrip", speech, "out.wav", "--model", model, "--force")
    for words in ("tiny@1, 3 rows", "3000 in, 3000 out", "7.50 kbps", "SI-SDR", "log-spectral", "STOI", "PESQ"):
        assert words in text


@pytest.mark.parametrize(
    "audio",
    [
        pytest.param(np.zeros(5000), id="silence"),
        pytest.param(np.where(np.arange(5000) % 40 < 20, 1.0, -1.0), id="full_scale_square"),
        pytest.param(np.full(5000, 1.0), id="full_scale_constant"),
        pytest.param(25 * speech_like(5000), id="beyond_full_scale"),
        pytest.param(np.full(5000, 1e30), id="far_beyond_full_scale"),
        pytest.param(np.full(5000, 1e-42), id="denormal"),
    ],
)
@pytest.mark.parametrize("rate_hz", [16000, 22050])
def test_extreme_signals(audio: np.ndarray, rate_hz: int, folder: Path, model: Path) -> None:
    write_wav(folder / "in.wav", audio[None], rate_hz)
    report = read_json(succeed("roundtrip", "in.wav", "out.wav", "--model", model, "--json"))
    assert report["num_samples_out"] == 5000
    assert_wav(Path("out.wav"), 1, 5000, rate_hz)
    assert audio.any() or all(value is None for value in report["metrics"].values())


def test_roundtrip_of_one_sample(folder: Path, model: Path) -> None:
    write_wav(folder / "in.wav", np.ones((1, 1)), 192000)
    assert read_json(succeed("roundtrip", "in.wav", "out.wav", "--model", model, "--json"))["num_samples_out"] == 1
    succeed("roundtrip", "in.wav", "out.wav", "--model", model, "--force")


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "DOUBLE"])
def test_wav_formats(subtype: str, folder: Path, model: Path) -> None:
    write_wav(folder / "in.wav", speech_like(1000)[None], subtype=subtype)
    succeed("encode", "in.wav", "out.codec", "--model", model)


@pytest.mark.parametrize("name", ["with space.wav", "Über 日本 🎵.wav", 'it\'s "quoted".wav', ".hidden"])
def test_unusual_names(name: str, speech: Path, model: Path) -> None:
    speech.rename(name)
    succeed("encode", name, f"{name}.codec", "--model", model)
    succeed("decode", f"{name}.codec", f"{name}.out", "--model", model)
    assert_wav(Path(f"{name}.out"), 2, 3000, RATE_HZ)
    assert name in refusal("decode", f"{name}.codec", f"{name}.out", "--model", model)


def test_a_name_that_looks_like_an_option(speech: Path, model: Path) -> None:
    speech.rename("-k")
    succeed("encode", "--model", model, "--", "-k", "-f")
    assert Path("-f").is_file()


def test_a_link_is_as_good_as_its_file(speech: Path, container: Path, model: Path) -> None:
    os.symlink(speech, "link.wav")
    succeed("encode", "link.wav", "linked.codec", "--model", model)
    assert Path("linked.codec").read_bytes() == container.read_bytes()
    os.symlink(container, "link.codec")
    succeed("decode", "link.codec", "out.wav", "--model", model)


def test_threads_can_be_chosen(speech: Path, model: Path) -> None:
    succeed("encode", speech, "out.codec", "--model", model, "--threads", 2)
    assert torch.get_num_threads() == 2


@pytest.fixture
def bad_files(folder: Path) -> None:
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "text").write_text("neither audio\nnor a container\n")
    soundfile.write(folder / "zero_samples", np.zeros(0), RATE_HZ, format="WAV")
    soundfile.write(folder / "nan", np.array([0.1, np.nan]), RATE_HZ, format="WAV", subtype="FLOAT")
    soundfile.write(folder / "overflow", np.full(500, 3e38), 22050, format="WAV", subtype="FLOAT")
    os.symlink("nowhere", folder / "dangling")


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize("command", ["encode", "roundtrip"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file"),
        ("dangling", "no such file"),
        ("folder", "is a folder"),
        ("empty", "cannot be read as audio"),
        ("text", "cannot be read as audio"),
        ("zero_samples", "holds no samples"),
        ("nan", "NaN"),
        ("overflow", "NaN or infinity"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_bad_audio_is_refused_in_one_line(command: str, name: str, reason: str, force: bool, model: Path) -> None:
    if force:
        Path("out").write_bytes(b"before")
    message = refusal(command, name, "out", "--model", model, *["--force"] * force)
    assert reason in message
    assert name in message or name == "overflow"


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "No such file"),
        ("folder", "Is a directory"),
        ("empty", "ends inside the header"),
        ("text", "not a .codec file"),
        ("nan", "not a .codec file"),
    ],
)
def test_what_is_no_container_is_refused_in_one_line(name: str, reason: str, model: Path) -> None:
    for command in (["decode", name, "out.wav", "--model", model], ["info", name], ["info", name, "--json"]):
        message = refusal(*command)
        assert name in message
        assert reason in message


def test_truncated_containers_are_refused_in_one_line(container: Path, model: Path) -> None:
    data = container.read_bytes()
    for size in (0, 1, 7, 8, 30, 60, len(data) // 2, len(data) - 22, len(data) - 1):
        Path("cut.codec").write_bytes(data[:size])
        for command in (["decode", "cut.codec", "out.wav", "--model", model], ["info", "cut.codec"]):
            assert "cut.codec: the file ends inside" in refusal(*command)


def test_damaged_containers_are_refused_in_one_line(container: Path, model: Path) -> None:
    data = container.read_bytes()
    for bit in range(0, 8 * len(data), 61):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        Path("damaged.codec").write_bytes(damaged)
        assert "damaged.codec: " in refusal("info", "damaged.codec")
    assert "damaged.codec: " in refusal("decode", "damaged.codec", "out.wav", "--model", model)


def test_a_container_of_another_model_is_refused(container: Path, other_model: Path) -> None:
    message = refusal("decode", container, "out.wav", "--model", other_model)
    for words in ("tiny@1", "other@1", load(other_model).codec_id):
        assert words in message


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"codec_rate_hz": 8000}, id="codec_rate"),
        pytest.param({"hop_length": 32}, id="hop"),
        pytest.param({"codebook_sizes": (64, 32, 32)}, id="codebook_size"),
        pytest.param({"codebook_sizes": (32,) * 4}, id="rows"),
    ],
)
def test_a_header_that_lies_is_refused(changes: dict[str, Any], model: Path, folder: Path) -> None:
    header = Header(load(model).codec_id, "tiny@1", RATE_HZ, RATE_HZ, 1, HOP_LENGTH, (32, 32, 32))
    header = replace(header, **changes)
    num_samples = header.hop_length * header.rate_hz // header.codec_rate_hz // 1000 + 1
    with Writer(folder / "lies.codec", header) as writer:
        writer.write(np.full((1, len(header.codebook_sizes), 1), 31))
        writer.finish(num_samples)
    refusal("decode", "lies.codec", "out.wav", "--model", model)


def test_a_container_without_samples_is_refused(model: Path, folder: Path) -> None:
    header = Header(load(model).codec_id, "tiny@1", RATE_HZ, RATE_HZ, 1, HOP_LENGTH, (32, 32, 32))
    with Writer(folder / "nothing.codec", header) as writer:
        writer.finish(0)
    assert "holds no audio" in refusal("decode", "nothing.codec", "out.wav", "--model", model)
    assert "holds no audio" in refusal("info", "nothing.codec")


@pytest.mark.parametrize("command", ["encode", "decode", "roundtrip"])
def test_places_that_cannot_be_written_are_refused(command: str, speech: Path, container: Path, model: Path) -> None:
    source = container if command == "decode" else speech
    Path("folder").mkdir()
    Path("there").write_bytes(b"before")
    os.link(source, "hard_link")
    os.symlink(source, "link")
    os.mkfifo("pipe")
    for force in ([], ["--force"]):
        for target, reason in [
            ("missing/out", "missing is not a folder"),
            ("there/out", "there is not a folder"),
            ("folder", "is a folder"),
            (source, "is the input itself"),
            ("hard_link", "is the input itself"),
            ("link", "is the input itself"),
            ("pipe", "is no ordinary file"),
            (os.devnull, "is no ordinary file"),
            ("x" * 300, "name too long"),
        ]:
            assert reason in refusal(command, source, target, "--model", model, *force)
    assert "there exists already; --force replaces it" in refusal(command, source, "there", "--model", model)
    succeed(command, source, "there", "--model", model, "--force")
    assert Path("there").read_bytes() != b"before"


@pytest.mark.parametrize("num_quantizers", [-1, 0, 4])
@pytest.mark.parametrize("command", ["encode", "roundtrip"])
def test_wrong_numbers_of_quantizers_are_refused(command: str, num_quantizers: int, speech: Path, model: Path) -> None:
    message = refusal(command, speech, "out", "--model", model, "--num-quantizers", num_quantizers)
    assert f"num_quantizers={num_quantizers} is not one of (1, 2, 3)" in message


def test_unknown_models_are_refused(speech: Path) -> None:
    Path("no_model").mkdir()
    for name in ("nonsense", "no_model", "../../etc", ""):
        message = refusal("encode", speech, "out.codec", "--model", name)
        assert f"{name!r} is neither a bundled model" in message


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["encode"],
        ["encode", "in.wav"],
        ["encode", "in.wav", "out.codec", "more"],
        ["encode", "in.wav", "out.codec", "--nonsense"],
        ["encode", "in.wav", "out.codec", "--num-quantizers", "two"],
        ["encode", "in.wav", "out.codec", "--num-quantizers"],
        ["encode", "in.wav", "out.codec", "--threads", "0"],
        ["decode", "in.codec"],
        ["decode", "in.codec", "out.wav", "--num-quantizers", "2"],
        ["roundtrip"],
        ["info", "one", "two"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(args: list[str], folder: Path) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("args", [["--help"], ["-h"]])
def test_help_names_every_command(args: list[str]) -> None:
    text = succeed(*args)
    for command in ("encode", "decode", "roundtrip", "info"):
        assert command in text
        assert command in succeed(command, *args)


def test_the_console_script_starts_without_torch() -> None:
    script = Path(sys.executable).with_name("codec")
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(script), "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "codec.cli" in imported
    assert not imported & {"torch", "numpy", "scipy", "soundfile", "lightning", "transformers"}
    assert "roundtrip" in result.stdout
    assert not [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
