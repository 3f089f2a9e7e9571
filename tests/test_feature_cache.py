"""Features computed once: what is kept is what the model says, runs go on, and another teacher's cache is refused."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speech_models import save_model

from codec.audio import resample
from codec.features import SpeechModel, load_speech_model
from codec.testing import speech_like
from recipes import feature_cache
from recipes.corpora import open_corpus
from recipes.feature_cache import CacheKey, FeatureCache, write_features
from tools import cache_features

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "small", head="Model")


@pytest.fixture(scope="module")
def model(folder: Path) -> SpeechModel:
    return load_speech_model(str(folder))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three recordings: mono, of another rate, and of two channels."""
    source = tmp_path / "in"
    source.mkdir()
    soundfile.write(source / "a.wav", speech_like(2400, seed=0), 16000)
    soundfile.write(source / "b.wav", speech_like(1234, rate_hz=8000, seed=1), 8000)
    soundfile.write(source / "c.wav", np.stack([speech_like(1600, seed=s) for s in (2, 3)], axis=1), 16000)
    return source


def _heard(model: SpeechModel, file: Path, layers: str | int | tuple[int, ...]) -> np.ndarray:
    """[F, L, D] of a file as a whole."""
    audio, rate_hz = soundfile.read(file, dtype="float32", always_2d=True)
    mono = torch.from_numpy(resample(audio.T.mean(0, keepdims=True), rate_hz, 16000))
    if layers == "weighted":
        return model.hidden(mono)[0][:, 0].transpose(0, 1).numpy()
    return model(mono, layers=layers).values[0][:, None].numpy()


@pytest.mark.parametrize("layers", ["last", 2, (1, 3), "weighted"])
def test_what_is_kept_is_what_the_model_says(
    layers: str | int | tuple[int, ...], source: Path, model: SpeechModel, tmp_path: Path
) -> None:
    corpus = open_corpus(source)
    report = write_features(corpus, model, tmp_path / "out", layers=layers)
    assert (report.num_added, report.num_there, report.skipped) == (3, 0, [])
    cache = pickle.loads(pickle.dumps(FeatureCache(tmp_path / "out")))
    cache.check(CacheKey.of(model, layers))
    cache.check_recordings((str(source), recording) for recording in corpus.recordings)
    for recording in corpus.recordings:
        expected = _heard(model, source / recording.path, layers)
        whole = cache.read(str(source), recording, 0, 10_000)
        assert whole.dtype == np.float32
        assert whole.shape == (-(-2 * 1234 // 8), *expected.shape[1:]) if "b" in recording.path else expected.shape
        assert np.abs(whole - expected).max() <= 2e-3  # of values below 4, half the step of float16
        num_frames = len(whole)
        for first, count in [(0, 1), (17, 30), (num_frames - 3, 10), (num_frames, 1), (num_frames + 5, 2)]:
            assert np.array_equal(cache.read(str(source), recording, first, count), whole[first : first + count])
    assert report.num_frames == 300 + 309 + 200
    with pytest.raises(ValueError, match="must not be negative"):
        cache.read(str(source), corpus.recordings[0], -1, 4)


def test_a_map_does_not_travel(source: Path, model: SpeechModel, tmp_path: Path) -> None:
    corpus = open_corpus(source)
    write_features(corpus, model, tmp_path / "out", layers="weighted")
    cache = FeatureCache(tmp_path / "out")
    cache.read(str(source), corpus.recordings[0], 0, 10)
    assert len(pickle.dumps(cache)) < 2000


def test_another_model_or_layer_is_refused(source: Path, model: SpeechModel, tmp_path: Path) -> None:
    corpus, out = open_corpus(source), tmp_path / "out"
    write_features(corpus, model, out, layers=(1, 3))
    cache = FeatureCache(out)
    cache.check(CacheKey.of(model, [3, 1]))
    other = load_speech_model(str(save_model(tmp_path / "other", "xlsr", head="Model")))
    for wrong_model, layers in [(model, "last"), (model, 1), (model, (1, 2)), (model, "weighted"), (other, (1, 3))]:
        with pytest.raises(
            ValueError, match=r"out is of another teacher: it holds small, weights .*, mean of layers 1, 3;"
        ):
            cache.check(CacheKey.of(wrong_model, layers))
        with pytest.raises(ValueError, match="out is of another teacher"):
            write_features(corpus, wrong_model, out, layers=layers)
    before = (out / "features.f16").read_bytes()
    assert len(before) == 2 * 16 * 809
    assert write_features(corpus, model, out, layers=(1, 3)).num_there == 3
    assert (out / "features.f16").read_bytes() == before
    with pytest.raises(ValueError, match="is no cache of features"):
        FeatureCache(tmp_path)


def test_recordings_that_changed_or_lack_are_told_and_made_again(
    source: Path, model: SpeechModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_features(open_corpus(source), model, out, layers=1)
    soundfile.write(source / "a.wav", speech_like(2000, seed=7), 16000)
    soundfile.write(source / "d.wav", speech_like(800, seed=8), 16000)
    corpus, cache = open_corpus(source), FeatureCache(out)
    changed, *same, new = corpus.recordings
    cache.check_recordings((str(source), recording) for recording in same)
    with pytest.raises(ValueError, match=r"out is stale: a\.wav has 2000 samples at 16000 Hz, and had 2400"):
        cache.check_recordings([(str(source), changed)])
    with pytest.raises(ValueError, match=r"stale: a\.wav"):
        cache.read(str(source), changed, 0, 1)
    with pytest.raises(ValueError, match=r"out lacks d\.wav of .*in: run tools\.cache_features for it"):
        cache.check_recordings([(str(source), new)])
    with pytest.raises(ValueError, match=r"out lacks b\.wav of elsewhere"):
        cache.read("elsewhere", same[0], 0, 1)
    report = write_features(corpus, model, out, layers=1)
    assert (report.num_added, report.num_there) == (2, 2)
    cache = FeatureCache(out)
    for recording in corpus.recordings:
        expected = _heard(model, source / recording.path, 1)
        assert np.abs(cache.read(str(source), recording, 0, 1000) - expected).max() <= 2e-3


def test_sources_are_added_and_known_by_any_name(
    source: Path, model: SpeechModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, second = tmp_path / "out", tmp_path / "second"
    second.mkdir()
    soundfile.write(second / "a.wav", speech_like(2400, seed=9), 16000)  # as long as the other a.wav
    for folder in (source, second):
        write_features(open_corpus(folder), model, out, layers=1)
    cache = FeatureCache(out)
    monkeypatch.chdir(tmp_path)
    for folder in (source, second):
        expected = _heard(model, folder / "a.wav", 1)
        for name in (str(folder), folder.name):
            feature_cache._real.cache_clear()
            read = cache.read(name, open_corpus(folder).recordings[0], 0, 1000)
            assert np.abs(read - expected).max() <= 2e-3


@pytest.mark.parametrize("damage", ["ended", "line cut", "features not in the index", "index not begun"])
def test_a_run_that_was_interrupted_goes_on(
    damage: str, source: Path, model: SpeechModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, out, whole = open_corpus(source), tmp_path / "out", tmp_path / "whole"
    write_features(corpus, model, whole, layers=(0, 2))
    computed, files, is_ending = feature_cache._computed, [], [True]

    def interrupted(corpus, number, *rest):  # type: ignore[no-untyped-def]
        files.append(number)
        for values in computed(corpus, number, *rest):
            yield values
            if number == 1 and is_ending:
                raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "_computed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_features(corpus, model, out, layers=(0, 2))
    index, features = out / "index.jsonl", out / "features.f16"
    if damage == "line cut":
        index.write_bytes(index.read_bytes()[:-5])
    elif damage == "features not in the index":
        features.write_bytes(features.read_bytes() + b"123")
    elif damage == "index not begun":
        index.write_bytes(b'{"version": ')
    num_there = {"line cut": 0, "index not begun": 0}.get(damage, 1)
    files.clear()
    is_ending.clear()
    report = write_features(corpus, model, out, layers=(0, 2))
    assert (report.num_there, files) == (num_there, list(range(num_there, 3)))
    assert features.read_bytes() == (whole / "features.f16").read_bytes()
    assert index.read_bytes() == (whole / "index.jsonl").read_bytes()


def test_a_damaged_cache_is_one_line(source: Path, model: SpeechModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_features(open_corpus(source), model, out, layers=1)
    features, index = (out / "features.f16").read_bytes(), (out / "index.jsonl").read_text()
    (out / "features.f16").write_bytes(features[:-1])
    with pytest.raises(ValueError, match=r"features\.f16 was cut off: remove .*out and begin anew"):
        FeatureCache(out)
    (out / "features.f16").write_bytes(features)
    for wrong in ("", "[]\n", "no\n", index + "{}\n", index.replace('"layers": [1]', '"layers": 1')):
        (out / "index.jsonl").write_text(wrong)
        with pytest.raises(ValueError, match=r"index\.jsonl is damaged: ") as caught:
            FeatureCache(out)
        assert "\n" not in str(caught.value)


def test_a_cache_in_use_is_left_alone(source: Path, model: SpeechModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_features(open_corpus(source), model, out, layers=1)
    with (
        feature_cache._opened(out, CacheKey.of(model, 1)),
        pytest.raises(ValueError, match="out is in use by another process"),
    ):
        write_features(open_corpus(source), model, out, layers=1)


def test_broken_recordings_are_listed_and_tried_again(source: Path, model: SpeechModel, tmp_path: Path) -> None:
    """Training may draw them, fails to, and draws others: they are no reason to refuse the cache."""
    (source / "a0.flac").write_bytes(b"broken")
    whole = tmp_path / "d.flac"
    soundfile.write(whole, speech_like(16000, seed=5), 16000)
    (source / "d.flac").write_bytes(whole.read_bytes()[:-4000])
    corpus, out = open_corpus(source), tmp_path / "out"
    report = write_features(corpus, model, out, layers=1)
    assert [skipped.path for skipped in report.skipped] == ["a0.flac", "d.flac"]
    assert (report.num_added, report.num_frames) == (3, 809)
    cache = FeatureCache(out)
    cache.check_recordings((str(source), recording) for recording in corpus.recordings)
    assert cache.read(str(source), corpus.recordings[3], 0, 5).shape == (0, 1, 16)
    (source / "d.flac").write_bytes(whole.read_bytes())
    report = write_features(open_corpus(source), model, out, layers=1)
    assert (report.num_added, report.num_there, report.num_frames) == (1, 3, 809 + 2000)
    assert FeatureCache(out).read(str(source), corpus.recordings[3], 0, 9000).shape == (2000, 1, 16)


def test_long_recordings_are_heard_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 of a model without group norm hears little beyond a frame: pieces give what the whole gives."""
    folder = save_model(tmp_path / "local", "xlsr", head="Model", normalize=False)
    model = load_speech_model(str(folder))  # 2000 frames a second
    source = tmp_path / "in"
    source.mkdir()
    soundfile.write(source / "a.wav", speech_like(16000, seed=0), 16000)
    monkeypatch.setattr(feature_cache, "_PIECE_SECONDS", 0.3)
    monkeypatch.setattr(feature_cache, "_CONTEXT_SECONDS", 0.01)
    heard = []
    monkeypatch.setattr(
        model,
        "forward",
        lambda audio, **rest: heard.append(audio.shape[1]) or type(model).forward(model, audio, **rest),
    )
    write_features(open_corpus(source), model, tmp_path / "out", layers=0)
    assert heard == [4960, 5120, 5120, 1760]
    read = FeatureCache(tmp_path / "out").read(str(source), open_corpus(source).recordings[0], 0, 3000)
    assert np.abs(read - _heard(model, source / "a.wav", 0)).max() <= 2e-3


def test_values_too_large_for_the_file_are_cut(
    source: Path, model: SpeechModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward

    def loud(*arguments, **options):  # type: ignore[no-untyped-def]
        features = forward(*arguments, **options)
        return type(features)(features.values * 1e6, features.num_frames)

    monkeypatch.setattr(model, "forward", loud)
    corpus = open_corpus(source)
    write_features(corpus, model, tmp_path / "out", layers=1)
    assert np.abs(FeatureCache(tmp_path / "out").read(str(source), corpus.recordings[0], 0, 99)).max() == 65504


# The tool


def _run(*arguments: str | Path) -> object:
    """What the command ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cache_features", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cache_features.main()
    return caught.value.code


def test_the_tool_writes_what_a_teacher_reads(
    source: Path, folder: Path, model: SpeechModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (source / "list.tsv").write_text("path\tsplit\na.wav\ttrain\nb.wav\ttrain\nc.wav\tdev\n")
    out = tmp_path / "out"
    assert _run(source / "list.tsv", folder, out, "--layers", "1", "3", "--split", "train") == 0
    told, errors = capfd.readouterr()
    assert errors == ""
    assert f"0.00 h of {CacheKey.of(model, (1, 3))}" in told
    assert "2 recordings were added, 0 were there" in told
    FeatureCache(out).check(CacheKey.of(model, (1, 3)))
    lines = (out / "index.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines[1:]] == ["a.wav", "b.wav"]


def test_the_tool_tells_what_is_left_out(
    source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "broken.wav").write_bytes(b"RIFF")
    out, unused = tmp_path / "out", tmp_path / "unused"
    assert _run(source, folder, out, "--layers", "weighted") == 1
    assert "left out: broken.wav: " in capsys.readouterr().err
    assert _run(source, folder, out, "--layers", "weighted", "--skip-broken") == 0
    assert str(_run(source, folder, out)).startswith(f"error: {out} is of another teacher: ")
    expected = 'error: --layers nine: neither numbers nor "last" or "weighted"'
    assert _run(source, folder, unused, "--layers", "nine") == expected
    assert 'has "last" and 0 to 3' in str(_run(source, folder, unused, "--layers", "9"))
    assert "holds no model.safetensors" in str(_run(source, tmp_path, unused))
    assert not unused.exists()
