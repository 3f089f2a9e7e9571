"""Sources of recordings: what they name, any stretch of it, and what is wrong with them."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from codec.audio import AudioError
from codec.testing import speech_like
from recipes.corpora import Corpus, PackedCorpus, examine, open_corpus
from recipes.packing import pack_audio
from recipes.recordings import Recording, Skipped, find_recordings

FORMATS = {".wav": None, ".flac": None, ".ogg": "VORBIS", ".mp3": None, ".aiff": None, ".opus": "OPUS"}


def _write(
    file: Path, num_samples: int = 8000, rate_hz: int = 16000, *, channels: int = 1, seed: int = 0
) -> np.ndarray:
    """[C, T] written; what comes back from lossy formats differs."""
    audio = np.stack([speech_like(num_samples, rate_hz=rate_hz, seed=seed + c) for c in range(channels)])
    file.parent.mkdir(parents=True, exist_ok=True)
    is_opus = file.suffix == ".opus"
    soundfile.write(file, audio.T, rate_hz, format="OGG" if is_opus else None, subtype=FORMATS.get(file.suffix.lower()))
    return audio


def _tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _as_bytes(audio: np.ndarray, rate_hz: int = 16000, format: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio.T, rate_hz, format=format)
    return file.getvalue()


def _names(corpus: Corpus) -> list[str]:
    return [recording.path for recording in corpus.recordings]


@pytest.mark.parametrize("suffix", FORMATS)
def test_any_stretch_of_any_format_is_what_the_whole_file_holds(suffix: str, tmp_path: Path) -> None:
    _write(tmp_path / f"a{suffix}", 24000, channels=2)
    whole = soundfile.read(tmp_path / f"a{suffix}", dtype="float32", always_2d=True)[0].T
    corpus = open_corpus(tmp_path)
    (recording,) = corpus.recordings
    assert (recording.path, recording.sample_rate_hz, recording.num_channels) == (f"a{suffix}", 16000, 2)
    assert recording.num_samples == whole.shape[1]
    # Opus decoders forget their past by degrees; the others come to the same values wherever they begin.
    tolerance = 0.01 if suffix == ".opus" else 1e-6
    for first, num_samples in [(0, 1), (0, 24000), (11111, 5000), (23999, 1)]:
        assert np.abs(corpus.read(0, first, num_samples) - whole[:, first : first + num_samples]).max() <= tolerance


def test_mp3_is_read_without_complaints_of_its_decoder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Which come, on stderr, where it begins in the middle: a frame needs bits of those before it."""
    time = np.arange(80_000) / 16000
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(time))
    soundfile.write(tmp_path / "a.mp3", 0.3 * np.sin(2 * np.pi * (200 + 50 * time) * time) + noise, 16000)
    corpus = open_corpus(tmp_path)
    for first in range(1000, 70_000, 1777):
        assert corpus.read(0, first, 1000).shape == (1, 1000)
    assert capfd.readouterr().err == ""


def test_only_the_stretch_is_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a WAV in a tar file, a page or two; the decoder asks for no more."""
    _tar(tmp_path / "a.tar", {"a.wav": _as_bytes(np.zeros((1, 500_000)) + 0.1, format="WAV")})
    corpus = open_corpus(tmp_path / "a.tar")
    num_read = []
    pread = __import__("os").pread
    monkeypatch.setattr("os.pread", lambda *args: num_read.append(args[1]) or pread(*args))
    corpus.read(0, 250_000, 100)
    assert 200 <= sum(num_read) < 300_000


def test_folders_keep_their_tree_and_report_what_cannot_be_read(tmp_path: Path) -> None:
    _write(tmp_path / "b" / "2.wav")
    _write(tmp_path / "a" / "1.FLAC")
    (tmp_path / "a" / "broken.wav").write_bytes(b"RIFF1234WAVEnonsense")
    (tmp_path / "a" / "empty.flac").write_bytes(b"")
    (tmp_path / "a" / "other.m4a").write_bytes(b"something else")
    (tmp_path / "notes.txt").write_text("no audio")
    corpus = open_corpus(tmp_path)
    assert _names(corpus) == ["a/1.FLAC", "b/2.wav"]
    assert [recording.speaker for recording in corpus.recordings] == ["a", "b"]
    reasons = {skipped.path: skipped.reason for skipped in corpus.skipped}
    assert sorted(reasons) == ["a/broken.wav", "a/empty.flac", "a/other.m4a"]
    assert reasons["a/empty.flac"] == "is empty"
    for reason in reasons.values():
        assert str(tmp_path) not in reason
        assert "\n" not in reason


def test_an_unknown_length_is_counted(tmp_path: Path) -> None:
    _write(tmp_path / "a.flac", 20000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0  # the length in STREAMINFO: 36 bits, of which 0 says that it is unknown
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    corpus = open_corpus(tmp_path)
    assert corpus.recordings[0].num_samples == 20000
    assert corpus.read(0, 19000, 1000).shape == (1, 1000)


def test_manifests_of_three_forms_say_the_same(tmp_path: Path) -> None:
    _write(tmp_path / "x" / "a.wav", 4000, 8000)
    _write(tmp_path / "b.wav", 3000)
    rows = [("x/a.wav", "train", "c", "s", "Ä B"), ("b.wav", "dev", "d", "t", "")]
    headerless = "".join(f"{path}\t{split}\t{c}\t{s}\t1\t1.0\t{text}\n" for path, split, c, s, text in rows)
    (tmp_path / "seven.tsv").write_text(headerless, encoding="utf-8")
    header = "text\tpath\tseconds\tsplit\tspeaker\tcorpus\n"
    named = "".join(f"{text}\t{path}\t9\t{split}\t{s}\t{c}\n" for path, split, c, s, text in rows)
    (tmp_path / "named.tsv").write_text("\ufeff" + header + named + "\n", encoding="utf-8")
    keys = ("path", "split", "corpus", "speaker", "text")
    lines = "\n\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows)
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8")
    for name in ("seven.tsv", "named.tsv", "lines.jsonl"):
        corpus = open_corpus(tmp_path / name, split="train")
        assert _names(corpus) == ["x/a.wav"]
        first = corpus.recordings[0]
        assert (first.corpus, first.speaker, first.text) == ("c", "s", "Ä B")
        assert (first.sample_rate_hz, first.num_samples) == (8000, 4000)
        assert _names(open_corpus(tmp_path / name)) == ["x/a.wav", "b.wav"]
        with pytest.raises(ValueError, match=r"has no rows of split 'test' \(it has \['dev', 'train'\]\)"):
            open_corpus(tmp_path / name, split="test")


def test_a_manifest_that_tells_all_is_believed_until_it_is_found_wrong(tmp_path: Path) -> None:
    _write(tmp_path / "a.wav", 4000)
    row: dict[str, Any] = {"path": "a.wav", "sample_rate_hz": 16000, "num_channels": 1, "num_samples": 4000}
    (tmp_path / "right.jsonl").write_text(json.dumps(row))
    assert open_corpus(tmp_path / "right.jsonl").read(0, 3000, 1000).shape == (1, 1000)
    (tmp_path / "long.jsonl").write_text(json.dumps(row | {"num_samples": 5000}))
    with pytest.raises(AudioError, match=r"a\.wav: .*4000"):
        open_corpus(tmp_path / "long.jsonl").read(0, 3500, 1000)
    (tmp_path / "rate.jsonl").write_text(json.dumps(row | {"sample_rate_hz": 8000}))
    with pytest.raises(AudioError, match=r"a\.wav: it has 16000 Hz, not 8000 Hz"):
        open_corpus(tmp_path / "rate.jsonl").read(0, 0, 10)


def test_what_is_wrong_with_a_manifest_is_said_with_its_line(tmp_path: Path) -> None:
    _write(tmp_path / "a.wav")
    wrong = {
        "columns.tsv": ("a.wav\ttrain\tc\n", r"columns\.tsv:1: 3 tab-separated columns, not 7"),
        "header.tsv": ("path\ttext\na.wav\n", r"header\.tsv:2: 1 tab-separated columns, not 2"),
        "number.tsv": ("path\tnum_samples\na.wav\t1.5\n", r"number\.tsv:2: num_samples is '1\.5', not a whole number"),
        "zero.tsv": ("path\tnum_channels\na.wav\t0\n", r"zero\.tsv:2: num_channels is 0, not positive"),
        "json.jsonl": ('{"path": "a.wav"}\n{"path": \n', r"json\.jsonl:2 is not JSON"),
        "list.jsonl": ("[1]\n", r"list\.jsonl:1 is no JSON object"),
        "path.jsonl": ('{"text": "A"}\n', r"path\.jsonl:1 names no path"),
        "empty.tsv": ("", r"empty\.tsv names no recordings"),
        "only.tsv": ("path\ttext\n", r"only\.tsv names no recordings"),
        "missing.tsv": ("path\na.wav\nb.wav\nc.wav\n", r"names 2 files that are not there, the first: b\.wav"),
    }
    for name, (text, message) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            open_corpus(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "latin.tsv").write_bytes("path\nä.wav\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.tsv is no text of UTF-8"):
        open_corpus(tmp_path / "latin.tsv")


def test_sources_that_are_none_or_hold_nothing_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a folder of audio nor a manifest nor a tar file"):
        open_corpus(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no audio files under"):
        open_corpus(tmp_path / "empty")
    (tmp_path / "empty" / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no recording can be used of 1; the first, a\.wav: is empty"):
        open_corpus(tmp_path / "empty")
    _tar(tmp_path / "empty" / "b.tar", {})
    with pytest.raises(ValueError, match="holds both tar files"):
        open_corpus(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds no recordings"):
        open_corpus(tmp_path / "empty" / "b.tar")


def test_shards_are_read_like_files(tmp_path: Path) -> None:
    audio = [speech_like(3000 + 100 * i, seed=i)[None] for i in range(4)]
    about = {"text": "HELLO", "speaker": "s", "corpus": "c"}
    _tar(
        tmp_path / "0.tar",
        {
            "./x/1.flac": _as_bytes(audio[0]),
            "./x/1.json": json.dumps(about).encode(),
            "./x/2.txt": b"WORLD\n",
            "./x/2.mp3": _as_bytes(audio[1], format="MP3"),
            "./README.md": b"no recording",
        },
    )
    _tar(tmp_path / "1.tar", {"3.wav": _as_bytes(audio[2], 8000, "WAV"), "4.ogg": _as_bytes(audio[3], format="OGG")})
    corpus = open_corpus(tmp_path)
    assert _names(corpus) == ["0.tar/./x/1.flac", "0.tar/./x/2.mp3", "1.tar/3.wav", "1.tar/4.ogg"]
    assert [recording.text for recording in corpus.recordings] == ["HELLO", "WORLD", "", ""]
    assert [(recording.corpus, recording.speaker) for recording in corpus.recordings] == [("c", "s")] + 3 * [
        ("audio", "")
    ]
    assert [recording.sample_rate_hz for recording in corpus.recordings] == [16000, 16000, 8000, 16000]
    assert [recording.num_samples for recording in corpus.recordings] == [3000, 3100, 3200, 3300]
    for number in (3, 0, 2):  # in any order
        read = corpus.read(number, 1000, 1500)
        whole = corpus.read(number, 0, corpus.recordings[number].num_samples)
        assert np.array_equal(read, whole[:, 1000:2500])
        if number in (0, 2):  # lossless
            assert np.abs(read - audio[number][:, 1000:2500]).max() < 1e-4
    assert np.abs(corpus.read(1, 1000, 1500) - audio[1][:, 1000:2500]).max() < 0.2
    assert _names(open_corpus(tmp_path / "1.tar")) == ["1.tar/3.wav", "1.tar/4.ogg"]


def test_broken_shards_and_members_are_reported(tmp_path: Path) -> None:
    flac = _as_bytes(speech_like(8000)[None])
    _tar(tmp_path / "0.tar", {"1.flac": flac, "2.flac": b"nonsense", "3.flac": flac})
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(data[: data.rindex(b"fLaC") + 100])
    (tmp_path / "2.tar").write_bytes(b"no tar file at all" * 100)
    corpus = open_corpus(tmp_path)
    assert _names(corpus) == ["0.tar/1.flac", "0.tar/3.flac", "1.tar/1.flac"]
    assert [skipped.path for skipped in corpus.skipped] == ["1.tar", "2.tar", "0.tar/2.flac", "1.tar/2.flac"]
    assert "is broken after 2 recordings" in corpus.skipped[0].reason
    (tmp_path / "3.tar").write_bytes(data[:100])
    with pytest.raises(ValueError, match="holds no recordings: the tar file is broken"):
        open_corpus(tmp_path / "3.tar")


@given(st.integers(0, 999), st.integers(1, 1000))
def test_a_part_of_a_file_reads_like_a_file(first: int, num_samples: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        data = bytes(range(250)) * 8
        patched.setattr("os.pread", lambda _, size, offset: data[offset : offset + size])
        patched.setattr("builtins.open", lambda *_, **__: io.FileIO("/dev/null"))
        with Recording("x", file="x", first_byte=500, num_bytes=1000).opened() as part:
            assert not isinstance(part, str)
            part.seek(first)
            assert part.read(num_samples) == data[500 + first : min(1500, 500 + first + num_samples)]
            assert part.seek(-10, io.SEEK_END) == 990


def test_a_packed_folder_is_read_with_its_channels_and_travels_without_its_audio(tmp_path: Path) -> None:
    stereo = _write(tmp_path / "in" / "a.wav", 5000, channels=2)
    _write(tmp_path / "in" / "b.wav", 4000, 8000)
    pack_audio(tmp_path / "in", tmp_path / "out", sample_rate_hz=16000, num_channels=2)
    corpus = open_corpus(tmp_path / "out")
    assert isinstance(corpus, PackedCorpus)
    assert [recording.num_samples for recording in corpus.recordings] == [5000, 8000]
    assert {(r.num_channels, r.sample_rate_hz) for r in corpus.recordings} == {(2, 16000)}
    assert np.abs(corpus.read(0, 1000, 3000) - stereo[:, 1000:4000]).max() <= 1 / 32768
    left, right = corpus.read(1, 0, 8000)
    assert np.array_equal(left, right)
    with pytest.raises(AudioError, match="only 5000 samples"):
        corpus.read(0, 4000, 1001)
    assert len(pickle.dumps(corpus)) < 5000
    assert np.array_equal(pickle.loads(pickle.dumps(corpus)).read(0, 5, 5), corpus.read(0, 5, 5))


def test_folders_packed_before_channels_were_told_are_mono(tmp_path: Path) -> None:
    clip = {"path": "a", "corpus": "c", "speaker": "s", "text": "", "first_sample": 10, "num_samples": 20}
    index = {"sample_rate_hz": 16000, "num_samples": 30, "clips": [clip]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "audio.i16").write_bytes(np.arange(30, dtype="<i2").tobytes())
    corpus = open_corpus(tmp_path)
    assert np.array_equal(corpus.read(0, 1, 2), np.array([[11, 12]], np.float32) / 32768)
    (tmp_path / "audio.i16").write_bytes(bytes(58))
    with pytest.raises(ValueError, match=r"has 58 bytes, index\.json tells of 30 samples"):
        open_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"holds no index\.json"):
        PackedCorpus(tmp_path / "none")


def test_files_that_break_later_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "a.flac", 50000)
    corpus = open_corpus(tmp_path)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: len(data) // 2])
    assert corpus.read(0, 0, 1000).shape == (1, 1000)
    with pytest.raises(AudioError, match=r"^a\.flac: "):
        corpus.read(0, 49000, 1000)
    (tmp_path / "a.flac").unlink()
    with pytest.raises(AudioError, match=r"^a\.flac: no such file$"):
        corpus.read(0, 0, 1000)
    soundfile.write(tmp_path / "a.wav", np.full(100, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"^a\.wav: holds NaN or infinite samples$"):
        open_corpus(tmp_path).read(0, 0, 10)


def test_examining_says_why_in_one_line(tmp_path: Path) -> None:
    found = examine(Recording("a\nb.wav", file=str(tmp_path / "a\nb.wav")))
    assert found == Skipped("a\nb.wav", "no such file")
    assert found.row == "'a\\nb.wav'\tno such file"
    assert str(found) == "'a\\nb.wav': no such file"


def test_finding_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"not opened")
    found, skipped = find_recordings(tmp_path)
    assert [recording.path for recording in found] == ["a.wav"]
    assert skipped == []
