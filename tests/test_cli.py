"""The command line on ordinary files: what comes out, for every kind of input, output, name and option."""

import os
import shutil
import subprocess
import sys
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import (
    HOP_LENGTH,
    RATE_HZ,
    assert_wav,
    partial_files,
    read_json,
    refusal,
    run,
    snapshot,
    succeed,
    write_wav,
)

from codec.bitstream import Reader
from codec.cli import _time
from codec.pretrained import load
from codec.testing import speech_like

pytest_plugins = ["commands"]


@pytest.mark.parametrize("rate_hz", [8000, 11025, 16000, 44100, 48000, 192000])
@pytest.mark.parametrize("num_channels", [1, 2, 6])
def test_lengths_channels_and_rates_come_back_exactly(
    rate_hz: int, num_channels: int, folder: Path, model: Path
) -> None:
    frame = HOP_LENGTH * rate_hz // RATE_HZ
    source, coded, target = folder / "in.wav", folder / "out.codec", folder / "out.wav"
    for num_samples in (1, frame - 1, frame, frame + 1, 4001):
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
        np.testing.assert_array_equal(reader.read(), tokens.codes.numpy())
    expected = np.clip(np.round(codec.decode(tokens)[:, 0].numpy().T * 2**15), -32768, 32767)
    np.testing.assert_array_equal(soundfile.read("decoded.wav", dtype="int16")[0], expected)
    assert Path("decoded.wav").read_bytes() == Path("roundtrip.wav").read_bytes()


@pytest.mark.parametrize("name", ["speech.codec", "speech_16k.codec"])
def test_the_bundled_model_is_the_default_and_found_by_its_name(name: str, speech: Path) -> None:
    succeed("encode", speech, name, "--num-quantizers", 2)
    succeed("decode", name, "out.wav")
    assert_wav("out.wav", 2, 3000, RATE_HZ)


@pytest.mark.parametrize(
    ("format", "subtype", "suffix"),
    [
        ("WAV", "PCM_U8", ".wav"),
        ("WAV", "PCM_16", ".wav"),
        ("WAV", "PCM_24", ".wav"),
        ("WAV", "PCM_32", ".wav"),
        ("WAV", "FLOAT", ".wav"),
        ("WAV", "DOUBLE", ".wav"),
        ("WAVEX", "PCM_24", ".wav"),
        ("RF64", "PCM_16", ".wav"),
        ("WAV", "ULAW", ".wav"),
        ("FLAC", "PCM_16", ".flac"),
        ("FLAC", "PCM_24", ".flac"),
        ("OGG", "VORBIS", ".ogg"),
        ("OGG", "OPUS", ".opus"),
        ("MP3", "MPEG_LAYER_III", ".mp3"),
        ("AIFF", "PCM_16", ".aiff"),
    ],
)
def test_formats_that_are_read(format: str, subtype: str, suffix: str, folder: Path, model: Path) -> None:
    soundfile.write(f"in{suffix}", speech_like(4000), RATE_HZ, format=format, subtype=subtype)
    succeed("encode", f"in{suffix}", "out.codec", "--model", model)
    heard, _ = soundfile.read(f"in{suffix}", dtype="float32")
    assert abs(len(heard) - 4000) < 2000  # MP3 is padded
    with Reader("out.codec") as reader:
        assert reader.num_samples == len(heard)
        np.testing.assert_array_equal(reader.read(), load(model).encode(torch.from_numpy(heard)[None, None]).codes)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3", ".WAV", ".Flac"])
def test_the_suffix_says_what_is_written(suffix: str, speech: Path, container: Path, model: Path) -> None:
    succeed("decode", container, "plain.wav", "--model", model)
    plain, _ = soundfile.read("plain.wav", dtype="int16")
    for command, source in (("decode", container), ("roundtrip", speech)):
        target = f"{command}{suffix}"
        run(command, source, target, "--model", model)
        info = soundfile.info(target)
        assert (info.channels, info.samplerate) == (2, RATE_HZ)
        assert info.format == {".opus": "OGG"}.get(suffix, suffix[1:].upper())
        heard, _ = soundfile.read(target, dtype="int16")
        if suffix != ".mp3":
            assert len(heard) == 3000
        if suffix.lower() in (".wav", ".flac"):
            np.testing.assert_array_equal(heard, plain)


@pytest.mark.parametrize("target", ["out", "out.txt", "out.codec", ".wav"])
def test_other_suffixes_are_refused(target: str, speech: Path, container: Path, model: Path) -> None:
    for command, source in (("decode", container), ("roundtrip", speech)):
        if (command, target) != ("decode", "out.codec"):
            assert "its suffix" in refusal(command, source, target, "--model", model)


def test_formats_that_cannot_hold_the_rate(folder: Path, model: Path) -> None:
    write_wav("in.wav", speech_like(1000)[None], 44100)
    succeed("encode", "in.wav", "in.codec", "--model", model)
    assert "Opus has no rate of 44100 Hz" in refusal("decode", "in.codec", "out.opus", "--model", model)


def test_raw_samples_in_and_out(folder: Path, model: Path) -> None:
    samples = np.round(np.stack([speech_like(3000, seed=1), speech_like(3000, seed=2)], axis=1) * 2**15).astype("<i2")
    Path("in.pcm").write_bytes(samples.tobytes())
    soundfile.write("in.wav", samples, RATE_HZ)
    succeed("encode", "in.pcm", "raw.codec", "--raw", "--rate", RATE_HZ, "--channels", 2, "-m", model)
    succeed("encode", "in.wav", "wav.codec", "-m", model)
    assert Path("raw.codec").read_bytes() == Path("wav.codec").read_bytes()
    succeed("decode", "raw.codec", "out.pcm", "--raw", "-m", model)
    succeed("decode", "raw.codec", "out.wav", "-m", model)
    expected, _ = soundfile.read("out.wav", dtype="int16")
    np.testing.assert_array_equal(np.frombuffer(Path("out.pcm").read_bytes(), "<i2").reshape(-1, 2), expected)


@pytest.mark.parametrize("num_quantizers", [1, 2, 3])
def test_fewer_quantizers_make_a_smaller_file(num_quantizers: int, speech: Path, model: Path) -> None:
    succeed("encode", speech, "out.codec", "--model", model, "--num-quantizers", num_quantizers)
    facts = read_json(succeed("info", "out.codec", "--json"))
    assert facts["codebook_sizes"] == [32] * num_quantizers
    assert facts["num_quantizers"] == num_quantizers
    assert facts["packed_bps"] == 2 * 5 * num_quantizers * RATE_HZ / HOP_LENGTH
    succeed("decode", "out.codec", "out.wav", "--model", model)
    assert_wav("out.wav", 2, 3000, RATE_HZ)
    report = read_json(succeed("roundtrip", speech, "again.wav", "-m", model, "-k", num_quantizers, "--json"))
    assert report["num_quantizers"] == num_quantizers
    assert report["container_bytes"] == Path("out.codec").stat().st_size
    assert Path("again.wav").read_bytes() == Path("out.wav").read_bytes()


def test_info_says_what_a_file_holds(container: Path, model: Path) -> None:
    facts = read_json(succeed("info", container, "--json"))
    size = container.stat().st_size
    coded_bps = facts.pop("coded_bps")
    assert coded_bps == pytest.approx(7500, rel=0.01)  # the last byte is filled up
    assert facts == {
        "file": str(container),
        "model": "tiny@1",
        "codec_id": load(model).codec_id,
        "entropy_id": None,
        "seconds": 3000 / RATE_HZ,
        "num_samples": 3000,
        "rate_hz": RATE_HZ,
        "num_channels": 2,
        "codec_rate_hz": RATE_HZ,
        "hop_length": HOP_LENGTH,
        "num_frames": 47,
        "frame_rate_hz": 250.0,
        "num_quantizers": 3,
        "codebook_sizes": [32, 32, 32],
        "num_segments": 1,
        "num_global_codes": [0],
        "num_global_bits": 0,
        "num_blocks": 1,
        "has_index": False,
        "file_bytes": size,
        "packed_bps": 2 * 15 * 250,
        "container_bps": round(8 * size / (3000 / RATE_HZ), 1),
        "checked": "all blocks and codes",
        "is_truncated": False,
    }
    text = succeed("info", container)
    assert {line.split()[0] for line in text.splitlines()} == {*facts, "coded_bps"}
    assert "tiny@1" in text


def test_info_of_the_bundled_model(speech: Path) -> None:
    succeed("encode", speech, "out.codec")
    facts = read_json(succeed("info", "out.codec", "--json"))
    assert (facts["model"].split("@")[0], facts["checked"]) == ("speech_16k", "all blocks and codes")
    facts = read_json(succeed("info", "--json"))
    assert facts["torch"] == torch.__version__
    assert {"version", "residual_search", "model speech_16k"} <= set(facts)
    assert facts["version"] in succeed("info")


def test_roundtrip_reports_in_json_and_in_words(speech: Path, model: Path) -> None:
    report = read_json(succeed("roundtrip", speech, "out.wav", "--model", model, "--json"))
    assert report["model"] == "tiny@1"
    assert (report["num_samples_in"], report["num_samples_out"], report["num_frames"]) == (3000, 3000, 47)
    assert (report["num_channels"], report["rate_hz"], report["num_quantizers"]) == (2, RATE_HZ, 3)
    assert report["packed_bps"] == 7500
    assert report["container_bps"] == pytest.approx(8 * report["container_bytes"] * RATE_HZ / 3000)
    assert report["encode_times_real_time"] > 0
    assert report["decode_times_real_time"] > 0
    assert isinstance(report["metrics"]["si_sdr_db"], float)
    assert isinstance(report["metrics"]["log_spectral_db"], float)
    text = succeed("roundtrip", speech, "out.wav", "--model", model, "--force")
    for words in ("tiny@1, 3 rows", "3000 in, 3000 out", "7.50 kbps", "SI-SDR", "log-spectral", "STOI", "PESQ"):
        assert words in text


def test_encode_and_decode_report_in_json(speech: Path, model: Path) -> None:
    report = read_json(succeed("encode", speech, "out.codec", "--model", model, "--json"))
    elapsed = report.pop("elapsed_seconds")
    assert 0 <= elapsed < 60
    file = {
        "source": str(speech),
        "target": "out.codec",
        "status": "done",
        "num_samples": 3000,
        "rate_hz": RATE_HZ,
        "num_channels": 2,
        "num_bytes": Path("out.codec").stat().st_size,
        "seconds": 3000 / RATE_HZ,
        "error": None,
        "warning": None,
        "notice": None,
    }
    counts = {"num_done": 1, "num_skipped": 0, "num_failed": 0, "seconds": 3000 / RATE_HZ}
    assert report == {"files": [file], **counts}
    report = read_json(succeed("decode", "out.codec", "out.wav", "--model", model, "--json"))
    assert report["files"][0] == file | {"source": "out.codec", "target": "out.wav", "num_bytes": 44 + 2 * 2 * 3000}
    result = run("decode", "missing", "out.pcm", "--model", model, "--json")
    assert (result.exit_code, result.stderr) == (1, "codec: missing: No such file or directory\n")
    assert read_json(result.stdout)["files"][0]["error"] == "missing: No such file or directory"


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
    write_wav("in.wav", audio[None], rate_hz)
    report = read_json(succeed("roundtrip", "in.wav", "out.wav", "--model", model, "--json"))
    assert report["num_samples_out"] == 5000
    assert_wav("out.wav", 1, 5000, rate_hz)
    assert audio.any() or all(value is None for value in report["metrics"].values())
    succeed("encode", "in.wav", "out.codec", "--model", model)
    succeed("decode", "out.codec", "decoded.wav", "--model", model)
    assert Path("decoded.wav").read_bytes() == Path("out.wav").read_bytes()


def test_roundtrip_of_one_sample(folder: Path, model: Path) -> None:
    write_wav("in.wav", np.ones((1, 1)), 192000)
    assert read_json(succeed("roundtrip", "in.wav", "out.wav", "--model", model, "--json"))["num_samples_out"] == 1
    succeed("roundtrip", "in.wav", "out.wav", "--model", model, "--force")


NAMES = [
    "with space.wav",
    "Über 日本 🎵.wav",
    'it\'s "quoted".wav',
    ".hidden.wav",
    "a[b]*?.wav",
    "new\nline.wav",
    "%s.wav",
]


@pytest.mark.parametrize("name", [*NAMES, f"{'x' * 251}.wav", os.fsdecode(b"not \xff UTF-8.wav")], ids=repr)
def test_unusual_names(name: str, speech: Path, model: Path) -> None:
    speech.rename(name)
    coded = name[:-4] + ".c"
    succeed("encode", name, coded, "--model", model)
    assert read_json(succeed("info", coded, "--json"))["file"] == coded
    assert "tiny@1" in succeed("info", coded)
    succeed("cut", coded, "piece", "--duration", "0.1")
    succeed("decode", coded, name, "--model", model, "--force")
    assert_wav(name, 2, 3000, RATE_HZ)
    assert "exists already" in refusal("decode", coded, name, "--model", model)
    for part in (16, 300):
        Path("cut").write_bytes(Path(coded).read_bytes()[:part])
        os.replace("cut", coded)
        refusal("decode", coded, "out.wav", "--model", model)
    assert not partial_files(Path())


def test_names_that_look_like_options(speech: Path, model: Path) -> None:
    speech.rename("-k")
    succeed("encode", "--model", model, "--", "-k", "-f")
    succeed("decode", "--model", model, "--", "-f", "-o.wav")
    assert_wav("-o.wav", 2, 3000, RATE_HZ)


def test_links_are_as_good_as_files(speech: Path, container: Path, model: Path) -> None:
    os.symlink(speech, "link.wav")
    succeed("encode", "link.wav", "linked.codec", "--model", model)
    assert Path("linked.codec").read_bytes() == container.read_bytes()
    os.symlink(container, "link.codec")
    succeed("decode", "link.codec", "out.wav", "--model", model)
    # A target that is a link stays one, and what it points to is written.
    Path("elsewhere").mkdir()
    for name in ("old.wav", "new.wav"):
        os.symlink(f"elsewhere/{name}", name)
    Path("elsewhere/old.wav").write_bytes(b"before")
    assert "exists already" in refusal("decode", "link.codec", "old.wav", "--model", model)
    for name in ("old.wav", "new.wav"):
        succeed("decode", "link.codec", name, "--model", model, "--force")
        assert Path(name).is_symlink()
        assert Path(name).read_bytes() == Path("out.wav").read_bytes()
    assert not partial_files(Path())


def test_read_only_input_and_output_in_another_file_system(speech: Path, container: Path, model: Path) -> None:
    speech.chmod(0o444)
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == speech.stat().st_dev:
        pytest.fail("there is no other file system to test with")
    target = shared / f"codec-test-{os.getpid()}.codec"
    try:
        succeed("encode", speech, target, "--model", model)
        assert target.read_bytes() == container.read_bytes()
        os.symlink(target, "link")
        succeed("encode", speech, "link", "--model", model, "--force")
        assert Path("link").is_symlink()
        assert not partial_files(shared)
    finally:
        target.unlink(missing_ok=True)
    assert speech.stat().st_mode & 0o777 == 0o444


def test_what_is_replaced_keeps_its_permissions(speech: Path, model: Path) -> None:
    Path("out.codec").write_bytes(b"before")
    Path("out.codec").chmod(0o604)
    succeed("encode", speech, "out.codec", "--model", model, "--force")
    assert Path("out.codec").stat().st_mode & 0o777 == 0o604


def test_threads_can_be_chosen(speech: Path, model: Path, tmp_path: Path) -> None:
    fresh = shutil.copytree(model, tmp_path / "copy")  # models stay loaded, with the number of threads they came with
    succeed("encode", speech, "out.codec", "--model", fresh, "--threads", 2)
    assert torch.get_num_threads() == 2


def test_times() -> None:
    for text, seconds in {
        "0": 0,
        "12.5": Fraction(25, 2),
        "0.1": Fraction(1, 10),
        "90": 90,
        "1:02": 62,
        "1:2.5": Fraction(125, 2),
        "59:59": 3599,
        "1:02:03.5": Fraction(7447, 2),
        "100:00:00": 360000,
    }.items():
        assert _time(text) == seconds
    assert _time(None) is None


BAD_TIMES = [
    "",
    "x",
    "-1",
    "1,5",
    "1e3",
    ".5",
    "5.",
    "nan",
    "1:60",
    "1:2:60",
    "61:00",
    "1:",
    ":5",
    "1:2:3:4",
    "9" * 5000,
]


@pytest.mark.parametrize("text", BAD_TIMES, ids=lambda text: repr(text[:9]))
@pytest.mark.parametrize("option", ["--start", "--duration"])
def test_what_is_no_time_is_wrong_usage(text: str, option: str, speech: Path, container: Path) -> None:
    before = snapshot(Path.cwd())
    for command, source in (("encode", speech), ("decode", container), ("roundtrip", speech), ("cut", container)):
        result = run(command, source, "out.wav", f"{option}={text}")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "is no time" in " ".join(result.stderr.split())
    assert snapshot(Path.cwd()) == before


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        (["--start", "0.1"], 1600, 3000),
        (["--duration", "0.05"], 0, 800),
        (["--start", "0:00.1", "--duration", "0.05"], 1600, 2400),
        (["--start", "0:0:0.18", "--duration", "59:00"], 2880, 3000),
    ],
    ids=str,
)
def test_a_stretch_of_a_recording(
    options: list[str], first: int, last: int, speech: Path, container: Path, model: Path
) -> None:
    write_wav("part.wav", soundfile.read(speech, dtype="float32")[0].T[:, first:last])
    succeed("encode", "part.wav", "part.codec", "--model", model)
    succeed("encode", speech, "out.codec", "--model", model, *options)
    assert Path("out.codec").read_bytes() == Path("part.codec").read_bytes()
    report = read_json(succeed("roundtrip", speech, "roundtrip.wav", "--model", model, "--json", *options))
    assert report["num_samples_in"] == report["num_samples_out"] == last - first
    succeed("decode", "part.codec", "part_out.wav", "--model", model)
    assert Path("roundtrip.wav").read_bytes() == Path("part_out.wav").read_bytes()

    succeed("decode", container, "whole.wav", "--model", model)
    succeed("decode", container, "stretch.wav", "--model", model, *options)
    succeed("cut", container, "cut.codec", *options)
    succeed("decode", "cut.codec", "cut.wav", "--model", model)
    expected = soundfile.read("whole.wav", dtype="int16")[0][first:last]
    np.testing.assert_array_equal(soundfile.read("stretch.wav", dtype="int16")[0], expected)
    assert Path("cut.wav").read_bytes() == Path("stretch.wav").read_bytes()


@pytest.mark.parametrize("options", [["--start", "1:00"], ["--start", "0.1875"], ["--duration", "0"]], ids=str)
def test_a_stretch_that_is_not_there(options: list[str], speech: Path, container: Path, model: Path) -> None:
    for command, source, *model_options in (
        ("encode", speech, "--model", model),
        ("roundtrip", speech, "--model", model),
        ("decode", container, "--model", model),
        ("cut", container),
    ):
        message = refusal(command, source, "out.wav", *model_options, *options)
        assert f"{source}: it has 3000 samples, so there is nothing of the stretch" in message


def test_cut_and_join_need_no_model_and_undo_each_other(container: Path, model: Path) -> None:
    succeed("cut", container, "1.codec", "--duration", "0.07")
    succeed("cut", container, "2.codec", "--start", "0.07", "--duration", "0.07")
    succeed("cut", container, "3.codec", "--start", "0.14")
    succeed("join", "1.codec", "2.codec", "3.codec", "joined.codec")
    facts = read_json(succeed("info", "joined.codec", "--json"))
    assert (facts["num_samples"], facts["num_segments"]) == (3000, 3)
    succeed("decode", "joined.codec", "joined.wav", "--model", model)
    succeed("decode", container, "whole.wav", "--model", model)
    assert Path("joined.wav").read_bytes() == Path("whole.wav").read_bytes()
    succeed("join", "1.codec", "1.codec", "twice.codec")
    succeed("decode", "twice.codec", "twice.wav", "--model", model)
    once = soundfile.read("whole.wav", dtype="int16")[0][:1120]
    np.testing.assert_array_equal(soundfile.read("twice.wav", dtype="int16")[0], np.concatenate([once, once]))
    succeed("cut", container, "all.codec")
    assert Path("all.codec").read_bytes() == container.read_bytes()


def test_cut_and_join_of_the_bundled_model(folder: Path) -> None:
    write_wav("in.wav", speech_like(16000)[None])
    succeed("encode", "in.wav", "in.codec")
    succeed("cut", "in.codec", "a.codec", "--duration", "0.31")
    succeed("cut", "in.codec", "b.codec", "--start", "0.31")
    succeed("join", "a.codec", "b.codec", "joined.codec")
    for name in ("in", "joined"):
        succeed("decode", f"{name}.codec", f"{name}_out.wav")
    assert Path("joined_out.wav").read_bytes() == Path("in_out.wav").read_bytes()


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["encode"],
        ["encode", "in.wav"],
        ["encode", "in.wav", "out.codec", "--nonsense"],
        ["encode", "in.wav", "out.codec", "--num-quantizers", "two"],
        ["encode", "in.wav", "out.codec", "--num-quantizers"],
        ["encode", "in.wav", "out.codec", "--threads", "0"],
        ["encode", "in.wav", "out.codec", "--jobs", "0"],
        ["encode", "in.wav", "out.codec", "--raw"],
        ["encode", "in.wav", "out.codec", "--rate", "16000"],
        ["encode", "in.wav", "out.codec", "--raw", "--rate", "0"],
        ["encode", "in.wav", "out.codec", "--frames-per-block", "0"],
        ["encode", "in.wav", "-", "--json"],
        ["encode", "in.wav", "more.wav", "-"],
        ["encode", "-", "in.wav", "out"],
        ["encode", "no*thing", "out"],
        ["decode", "in.codec"],
        ["decode", "in.codec", "-", "--json"],
        ["decode", "in.codec", "out.wav", "--frames-per-block", "2"],
        ["convert", "in.wav", "out.wav"],
        ["roundtrip"],
        ["roundtrip", "in.wav", "-"],
        ["info", "one", "two"],
        ["cut", "one"],
        ["join", "one"],
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
    for command in ("encode", "decode", "roundtrip", "info", "cut", "join"):
        assert command in text
        assert command in succeed(command, *args)


HEAVY = {"torch", "numpy", "scipy", "soundfile", "soxr", "lightning", "transformers", "rich.progress"}


def modules_of(*args: str) -> set[str]:
    """What the console script imports."""
    script = str(Path(sys.executable).with_name("codec"))
    result = subprocess.run(
        [sys.executable, "-X", "importtime", script, *args], capture_output=True, text=True, check=True
    )
    assert not [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}


def test_help_starts_without_anything_heavy() -> None:
    imported = modules_of("--help")
    assert "codec.cli" in imported
    assert not imported & HEAVY
    assert not modules_of("encode", "--help") & HEAVY


def test_files_are_told_of_cut_and_joined_without_torch(container: Path) -> None:
    for args in (["info"], ["cut", "cut.codec", "--duration", "0.1"], ["join", "joined.codec"]):
        assert not modules_of(args[0], str(container), *args[1:]) & (HEAVY - {"numpy"})
