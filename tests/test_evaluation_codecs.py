"""Codecs over recordings: models, programs, delays, statistics, and what the command prints and writes."""

import csv
import html.parser
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import Pipe, read_all, read_json, refusal, run, start, succeed, wait_until, write_wav
from hypothesis import given
from hypothesis import strategies as st

import codec
from codec.config import build
from codec.evaluation import Evaluation, FileResult, Summary, SystemResult, UsageError, evaluate, measure
from codec.evaluation.coders import classic_coder, model_coders, ogg_packet_bytes
from codec.evaluation.delay import aligned, find_delay
from codec.evaluation.figures import peak_power, spectrogram
from codec.evaluation.page import render
from codec.evaluation.recordings import find_recordings, spread
from codec.evaluation.results import CodebookUse, compare, summarize
from codec.models.seanet import SEANetConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.testing import speech_like

pytest_plugins = ["commands"]

QUICK = ("si_sdr_db", "log_spectral_db")
PROGRAMS = {"opus": ("opusenc", "opusdec"), "speex": ("speexenc", "speexdec"), "codec2": ("c2enc", "c2dec")}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recordings, at 16 and 8 kHz, and a manifest that knows their texts."""
    folder = tmp_path_factory.mktemp("data") / "speech"
    (folder / "b").mkdir(parents=True)
    for name, rate_hz, seconds in (("a.wav", 16000, 1.0), ("b/c.wav", 8000, 0.7), ("b/d.flac", 16000, 0.55)):
        audio = speech_like(int(seconds * rate_hz), rate_hz=rate_hz, seed=len(name))
        soundfile.write(folder / name, audio, rate_hz)
    return folder


@pytest.fixture(scope="module")
def manifest(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest") / "set"
    shutil.copytree(speech, folder)
    rows = [
        ("a.wav", "dev", "made", "ann", "16000", "1.0", "HELLO THERE"),
        ("b/c.wav", "train", "made", "bob", "8000", "0.7", ""),
        ("b/d.flac", "dev", "made", "bob", "16000", "0.55", "YES"),
    ]
    (folder / "manifest.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return folder


# --- recordings


def test_recordings_of_a_folder_and_of_a_manifest(speech: Path, manifest: Path) -> None:
    assert [r.name for r in find_recordings(speech)] == ["a.wav", "b/c.wav", "b/d.flac"]
    assert [r.name for r in find_recordings(speech, max_files=2)] == ["a.wav", "b/c.wav"]
    for source in (manifest, manifest / "manifest.tsv"):
        found = find_recordings(source, split="dev")
        assert [(r.name, r.speaker, r.text) for r in found] == [
            ("a.wav", "ann", "HELLO THERE"),
            ("b/d.flac", "bob", "YES"),
        ]
        assert len(find_recordings(source)) == 3


@given(st.integers(0, 50), st.integers(1, 60))
def test_a_part_is_evenly_spread(num_items: int, count: int) -> None:
    taken = spread(range(num_items), count)
    assert len(taken) == min(num_items, count)
    assert taken == sorted(set(taken))
    gaps = np.diff([*taken, num_items])
    assert not len(taken) or (taken[0] == 0 and gaps.max() - gaps.min() <= 1)


def test_stereo_is_mixed_down(tmp_path: Path) -> None:
    left, right = speech_like(1000, seed=1), speech_like(1000, seed=2)
    write_wav(tmp_path / "a.wav", np.stack([left, right]))
    audio, rate_hz = find_recordings(tmp_path)[0].read()
    np.testing.assert_allclose(audio, (left + right) / 2, atol=1e-7)
    assert rate_hz == 16000


def test_mistakes_with_data_are_told(speech: Path, manifest: Path, tmp_path: Path) -> None:
    for source, split, told in (
        (tmp_path / "nothing", None, "neither a folder nor a manifest"),
        (tmp_path, None, "no audio files"),
        (speech, "dev", "no manifest.tsv"),
        (manifest, "test", r"no rows of split 'test' \(it has \['dev', 'train'\]\)"),
    ):
        with pytest.raises(ValueError, match=told):
            find_recordings(source, split=split)
    (tmp_path / "manifest.tsv").write_text("a.wav\tdev\n")
    with pytest.raises(ValueError, match="line 1: 7 tab-separated columns"):
        find_recordings(tmp_path)
    (tmp_path / "manifest.tsv").write_text("a.wav\tdev\tc\ts\t1\t1\t\n")
    with pytest.raises(ValueError, match=r"1 files that are not there, the first is a\.wav"):
        find_recordings(tmp_path)


# --- delay


@pytest.mark.parametrize("rate_hz", [8000, 16000, 48000])
@pytest.mark.parametrize("delay_ms", [-50, -3, 0, 0.25, 7, 50])
def test_the_delay_of_a_late_copy_is_found(rate_hz: int, delay_ms: float) -> None:
    delay = round(delay_ms * rate_hz / 1000)
    signals = [speech_like(rate_hz, rate_hz=rate_hz, seed=seed) for seed in range(2)]
    noise = np.random.default_rng(0).standard_normal(rate_hz)
    late = [-0.5 * np.roll(signal, delay) + 0.01 * noise for signal in signals]  # a codec may turn the sign, too
    assert find_delay(list(zip(signals, late, strict=True)), rate_hz) == delay


def test_the_delay_of_a_vocoder_is_found_to_some_milliseconds() -> None:
    reference = speech_like(32000)
    spectrum = np.stack([np.fft.rfft(reference[at : at + 640] * np.hanning(640)) for at in range(0, 31000, 320)])
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, spectrum.shape)
    decoded = np.zeros(32000)
    for i, frame in enumerate(np.abs(spectrum) * np.exp(1j * phases)):
        decoded[320 * i + 320 : 320 * i + 960] += np.fft.irfft(frame)[: len(decoded) - 320 * i - 320]
    assert find_delay([(reference, decoded)], 16000) == pytest.approx(320, abs=100)


def test_signals_that_have_nothing_in_common_have_no_delay() -> None:
    rng = np.random.default_rng(0)
    assert find_delay([(rng.standard_normal(16000), rng.standard_normal(16000))], 16000) == 0
    assert find_delay([(speech_like(16000), np.zeros(16000))], 16000) == 0
    assert find_delay([], 16000) == 0


@given(st.integers(-20, 20), st.integers(20, 60), st.integers(20, 60))
def test_alignment_takes_the_common_stretch(delay: int, num_in: int, num_out: int) -> None:
    reference = np.arange(num_in)
    decoded = np.arange(num_out) - delay
    first, second = aligned(reference, decoded, delay)
    assert first.tolist() == second.tolist()
    assert first.tolist() == list(range(max(0, -delay), min(num_in, num_out - delay)))


# --- codecs


def test_a_model_is_coded_as_by_hand(model: Path) -> None:
    (coder,) = model_coders([model], [3, 1])
    loaded = codec.load(model)
    assert (coder.name, coder.settings, coder.version) == ("tiny", (3, 1), f"tiny@1, id {loaded.codec_id}")
    audio = speech_like(16000)
    import torch

    tokens = loaded.encode(torch.from_numpy(audio)[None, None], num_quantizers=1)
    coded = coder.code(audio, 16000, 1)
    assert coded.codes is not None
    assert coded.codes.tolist() == tokens.codes[0].tolist()
    assert coded.audio.tolist() == loaded.decode(tokens)[0, 0].tolist()
    assert coded.packed_bits == 250 * 5
    container = io.BytesIO()
    codec.write(container, tokens.codes.numpy(), model=model, num_samples=16000)
    assert coded.file_bytes == len(container.getvalue())
    assert coded.coded_bytes is not None
    assert 250 * 5 / 8 <= coded.coded_bytes <= 250 * 5 / 8 + 5  # blocks are filled up to whole bytes
    assert len(coder.code(speech_like(7001, rate_hz=22050), 22050, 3).audio) == 7001


def test_global_codes_are_counted(voiced_model: Path, tmp_path: Path) -> None:
    (coder,) = model_coders([voiced_model], [1])
    audio = speech_like(6500)
    coded = coder.code(audio, 16000, 1)
    assert coded.packed_bits == 4 * 6 + 102 * 6
    assert coded.coded_bytes == 3 + -(-102 * 6 // 8)
    write_wav(tmp_path / "in.wav", audio[None])
    succeed("encode", tmp_path / "in.wav", tmp_path / "x.codec", "-m", voiced_model, "-k", 1)
    assert coded.file_bytes == (tmp_path / "x.codec").stat().st_size
    succeed("decode", tmp_path / "x.codec", tmp_path / "out.wav", "-m", voiced_model)
    heard = soundfile.read(tmp_path / "out.wav", dtype="float32")[0]
    assert np.abs(heard - coded.audio).max() < 1e-4  # 16-bit output


def test_a_stereo_model_that_looks_ahead_hears_mono_twice(tmp_path: Path) -> None:
    import torch

    config = SEANetConfig(
        sample_rate_hz=8000, num_channels=2, ratios=(4, 2), num_filters=4, num_lstm_layers=0, causal=False,
        norm="group", segment_samples=800, segment_stride_samples=792, normalize_loudness=True,
        quantizer=ResidualVQConfig(latent_dim=16, num_stages=2, codebook_size=16),
    )  # fmt: skip
    torch.manual_seed(0)
    codec.save(build(config), tmp_path / "stereo", name="stereo@1", dtype="float32")
    (coder,) = model_coders([tmp_path / "stereo"], [2])
    audio = speech_like(4000, rate_hz=16000)
    coded = coder.code(audio, 16000, 2)
    assert len(coded.audio) == 4000
    assert coded.codes is not None
    num_segments = -(-2000 // 792)
    assert coded.packed_bits == 2 * 4 * coded.codes.shape[1] + 32 * num_segments  # a loudness for each
    assert (coded.coded_bytes, coded.file_bytes) == (None, None)  # no file can hold such codes


def test_models_of_one_name_are_told_apart(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "tiny")
    coders = model_coders([model, tmp_path / "tiny"], [])
    assert [coder.name for coder in coders] == [str(model), str(tmp_path / "tiny")]
    assert coders[0].settings == (1, 2, 3)
    with pytest.raises(UsageError, match="named twice"):
        model_coders([model, model], [])
    with pytest.raises(UsageError, match=r"num_quantizers=4 is not one of \(1, 2, 3\)"):
        model_coders([model], [4])


@pytest.mark.parametrize(("kind", "setting"), [("opus", 12), ("speex", 8), ("codec2", 3200)])
def test_programs_code_speech(kind: str, setting: int) -> None:
    if any(shutil.which(program) is None for program in PROGRAMS[kind]):
        pytest.skip(f"{kind} is not installed")
    audio, rate_hz = soundfile.read(Path(__file__).parent / "data" / "speech.flac", dtype="float32")
    audio = audio[: 3 * rate_hz]
    coder = classic_coder(kind, [setting])
    coded = coder.code(audio, rate_hz, setting)
    assert coded.coded_bytes is not None
    assert coded.file_bytes is not None
    bits_per_second = setting * (1 if kind == "codec2" else 1000)
    assert 8 * coded.coded_bytes / 3 == pytest.approx(bits_per_second, rel=0.25)
    assert coded.file_bytes >= coded.coded_bytes
    assert abs(len(coded.audio) - len(audio)) <= 0.045 * rate_hz
    delay = find_delay([(audio, coded.audio)], rate_hz)
    distance = measure(*aligned(audio, coded.audio, delay), rate_hz, ("log_spectral_db",))["log_spectral_db"]
    assert distance < 10
    unaligned = aligned(audio, coded.audio, delay + rate_hz // 25)
    assert measure(*unaligned, rate_hz, ("log_spectral_db",))["log_spectral_db"] > distance + 1
    again = coder.code(audio, rate_hz, setting)
    assert again.audio.tolist() == coded.audio.tolist()


def test_ogg_packets_are_counted_without_pages_and_headers() -> None:
    def page(table: list[int]) -> bytes:
        return b"OggS" + bytes(22) + bytes([len(table)]) + bytes(table) + bytes(sum(table))

    # Two header packets, then packets of 10, 255 + 255 + 3 (over two pages) and 255 + 0 bytes.
    data = page([19]) + page([40]) + page([10, 255]) + page([255, 3, 255, 0])
    assert ogg_packet_bytes(data) == 10 + 513 + 255
    with pytest.raises(ValueError, match="no Ogg"):
        ogg_packet_bytes(b"RIFF" + bytes(40))


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_programs_that_are_missing_or_fail_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="Opus needs the program opusenc, which is not installed"):
        classic_coder("opus", [6])
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    fake(tmp_path, "opusenc", '[ "$1" = --version ] && { echo fake 1.0; exit; }\necho trouble here >&2\nexit 3')
    fake(tmp_path, "opusdec", "cat")
    assert classic_coder("opus", [6]).version == "fake 1.0"
    with pytest.raises(ValueError, match="Opus: opusenc failed: trouble here"):
        evaluate(data=speech, opus_kbps=[6], metrics=QUICK, measures_speed=False)
    fake(tmp_path, "opusenc", "cat >/dev/null")
    with pytest.raises(ValueError, match="opusenc failed: status 0, no output"):
        evaluate(data=speech, opus_kbps=[6], metrics=QUICK, measures_speed=False)
    for kind, setting, told in (
        ("opus", 5, "Opus has no rate 5 "),
        ("codec2", 1000, r"no rate 1000 \(there are: 3200, "),
    ):
        for program in PROGRAMS[kind]:
            fake(tmp_path, program, "true")
        with pytest.raises(UsageError, match=told):
            classic_coder(kind, [setting])


# --- statistics


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        summary = summarize(rng.normal(3, 1, 40).tolist())
        assert summary.low <= summary.mean <= summary.high
        covered += summary.low <= 3 <= summary.high
    assert 51 <= covered <= 60


def test_undefined_values_are_left_out_and_counted() -> None:
    summary = summarize([1, math.nan, 3])
    assert (summary.mean, summary.median, summary.num_files) == (2, 2, 2)
    assert summary == summarize([1, math.nan, 3])
    nothing = summarize([math.nan])
    assert nothing.num_files == 0
    assert math.isnan(nothing.mean)


def test_weighted_means_are_sums_over_sums() -> None:
    assert summarize([0.5, 0.0], [2, 8]).mean == pytest.approx(0.1)
    assert summarize([0.5, math.nan], [2, 0]).num_files == 1


def system(name: str, values: dict[str, float]) -> SystemResult:
    files = tuple(FileResult(file, "", 1.0, 10, 10, 8, 1, 2, {"m": value}) for file, value in values.items())
    return SystemResult(name, name, 1, "", 0.0, 1.0, 1.0, 2.0, None, None, None, None, files, {}, {})


def test_differences_are_taken_file_by_file() -> None:
    first = system("a", {"1": 10.0, "2": 20.0, "3": 30.0})
    second = system("b", {"2": 21.0, "3": 31.0, "4": 99.0})
    difference = compare(first, second, ["m"]).differences["m"]
    assert difference == Summary(1.0, 1.0, 1.0, 1.0, 2)


def test_use_of_codebooks() -> None:
    use = CodebookUse.of_counts([np.array([5, 5, 0, 0]), np.array([10, 0])])
    assert use.usage == (0.5, 0.5)
    assert use.perplexity == pytest.approx((2.0, 1.0))
    assert (use.codebook_sizes, use.num_frames) == ((4, 2), 10)


# --- everything


@pytest.fixture(scope="module")
def evaluation(model: Path, other_model: Path, manifest: Path) -> Evaluation:
    return evaluate(
        [model, other_model],
        data=manifest,
        num_quantizers=[1, 3],
        metrics=("log_spectral_db", "si_sdr_db"),
        scorers=["test_evaluation_scorers:Loudness=2"],
        measures_speed=False,
        num_examples=2,
    )


def test_all_systems_measure_all_files(evaluation: Evaluation, manifest: Path, model: Path) -> None:
    assert [s.name for s in evaluation.systems] == ["original", "tiny k=1", "tiny k=3", "other k=1", "other k=3"]
    assert evaluation.metrics == ("si_sdr_db", "log_spectral_db", "loudness")
    assert (evaluation.num_files, round(evaluation.seconds, 6), evaluation.failures) == (3, 2.25, {})
    tiny = evaluation.systems[1]
    assert tiny.packed_bps == pytest.approx(1250, rel=0.01)
    assert tiny.file_bps is not None
    assert tiny.coded_bps is not None
    assert tiny.file_bps > tiny.coded_bps
    assert tiny.codebooks is None
    assert tiny.num_wrong_lengths == 0
    (coder,) = model_coders([model], [1])
    reference, rate_hz = find_recordings(manifest)[0].read()
    delay = round(tiny.delay_ms * rate_hz / 1000)
    pair = aligned(reference, coder.code(reference, rate_hz, 1).audio, delay)
    assert tiny.files[0].values == measure(*pair, rate_hz, ("si_sdr_db", "log_spectral_db")) | {
        "loudness": float(2 * np.abs(pair[1]).mean())
    }
    counts = Counter[int]()
    for recording in find_recordings(manifest):
        codes = model_coders([model], [3])[0].code(*recording.read(), 3).codes
        assert codes is not None
        counts.update(codes[0].tolist())
    use = evaluation.systems[2].codebooks
    assert use is not None
    assert len(use.usage) == 3  # of the highest setting
    assert use.usage[0] == len(counts) / 32
    assert use.num_frames == counts.total()


def test_others_are_compared_with_the_first(evaluation: Evaluation) -> None:
    assert [(c.baseline, c.other) for c in evaluation.comparisons] == [
        ("tiny k=1", "other k=1"),
        ("tiny k=3", "other k=3"),
    ]
    first, second = ([file.values["si_sdr_db"] for file in evaluation.systems[i].files] for i in (1, 3))
    difference = evaluation.comparisons[0].differences["si_sdr_db"]
    assert difference.mean == pytest.approx(np.mean(np.subtract(second, first)))
    assert difference.num_files == 3


def test_processes_and_repetition_change_nothing(evaluation: Evaluation, model: Path, manifest: Path) -> None:
    again = evaluate([model], data=manifest, num_quantizers=[1, 3], metrics=QUICK, measures_speed=True, num_processes=2)
    for system_again, system_before in zip(again.systems, evaluation.systems[1:3], strict=True):
        for file_again, file_before in zip(system_again.files, system_before.files, strict=True):
            assert file_again.values == {name: file_before.values[name] for name in QUICK}
        assert system_again.coded_bps == system_before.coded_bps
        assert system_again.encode_times_real_time is not None
        assert system_again.encode_times_real_time > 1
        assert system_again.peak_memory_mb is not None
        assert system_again.peak_memory_mb > 50
    assert again.systems[1].codebooks == evaluation.systems[2].codebooks


def test_csv_and_json_say_the_same(evaluation: Evaluation) -> None:
    rows = list(csv.DictReader(io.StringIO(evaluation.to_csv())))
    assert len(rows) == 5 * 3
    own = [row for row in rows if (row["codec"], row["setting"]) == ("tiny", "3")]
    facts = read_json(evaluation.to_json())
    told = next(s for s in facts["systems"] if s["name"] == "tiny k=3")
    mean = told["summaries"]["si_sdr_db"]["mean"]
    assert np.mean([float(row["si_sdr_db"]) for row in own]) == pytest.approx(mean, rel=1e-4)
    bits, seconds = (sum(float(row[name]) for row in own) for name in ("packed_bits", "seconds"))
    assert bits / seconds == pytest.approx(told["packed_bps"])
    assert facts["facts"]["scorers"] == {"loudness": "1"}
    assert {"torch", "numpy", "exact-codec"} <= set(facts["facts"]["versions"])
    original = facts["systems"][0]
    assert original["summaries"]["si_sdr_db"]["mean"] is None
    assert original["summaries"]["loudness"]["num_files"] == 3


class _Page(html.parser.HTMLParser):
    """Tags with their attributes; complains of what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "path", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_stands_alone_and_can_be_read_by_all(evaluation: Evaluation) -> None:
    text = render(evaluation)
    page = _Page(text)
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "poster", "action", "xlink:href"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value and value[:80])
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)  # no address, not even in a name space
    assert "@import" not in text
    assert "url(" not in text
    (policy,) = [attrs["content"] for attrs in page.of("meta") if "http-equiv" in attrs]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert len(page.of("audio")) == len(page.of("img")) == 2 * 5
    assert all(attrs["aria-label"] for attrs in page.of("audio"))
    assert all(attrs["alt"] for attrs in page.of("img"))
    assert len(page.of("caption")) == len(page.of("table")) >= 4
    plots = [attrs for attrs in page.of("svg") if attrs.get("role") == "img"]
    assert len(plots) == 3
    assert all(attrs["aria-label"] for attrs in plots)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {(attrs["href"] or "")[1:] for attrs in page.of("a")}
    assert links <= set(ids)
    assert "prefers-color-scheme:dark" in text


def test_names_cannot_break_the_page(evaluation: Evaluation) -> None:
    import dataclasses

    odd = '<script>alert("x")</script>&'
    example = dataclasses.replace(evaluation.examples[0], file=odd, text=odd)
    facts = dict(evaluation.facts) | {"data": odd}
    changed = dataclasses.replace(evaluation, examples=(example,), facts=facts, failures={odd: odd})
    text = render(changed)
    assert "<script>alert" not in text
    assert len(_Page(text).of("script")) == 1


def test_players_hold_what_was_heard(evaluation: Evaluation) -> None:
    import base64

    text = render(evaluation)
    sounds = re.findall(r'src="data:audio/flac;base64,([^"]+)"', text)
    example = evaluation.examples[0]
    for sound, audio in zip(sounds, [example.original, *example.heard.values()], strict=False):
        decoded, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(sound)))
        assert rate_hz == example.rate_hz
        np.testing.assert_allclose(decoded, np.clip(audio, -1, 1), atol=2**-15)


def test_examples_reach_from_the_worst_to_the_best(evaluation: Evaluation) -> None:
    values = sorted(file.values["si_sdr_db"] for file in evaluation.systems[2].files)
    assert [(e.chosen_for, e.metric) for e in evaluation.examples] == [("tiny k=3", "si_sdr_db")] * 2
    assert [e.value for e in evaluation.examples] == [values[0], values[-1]]
    assert [len(e.heard) for e in evaluation.examples] == [4, 4]


def test_a_spectrogram_shows_a_tone_where_it_is() -> None:
    tone = 0.5 * np.sin(2 * np.pi * 2000 * np.arange(16000) / 16000)
    png = spectrogram(tone, 16000, peak_power(tone, 16000))
    width, height = struct.unpack(">II", png[16:24])
    at = png.index(b"IDAT")
    (size,) = struct.unpack(">I", png[at - 4 : at])
    levels = np.frombuffer(zlib.decompress(png[at + 4 : at + 4 + size]), np.uint8).reshape(height, width + 1)[:, 1:]
    assert (width, height) == (480, 128)
    loudest = levels.mean(axis=1).argmax()
    assert loudest == pytest.approx(128 - 128 / 4, abs=2)
    assert levels[loudest].min() >= 60
    assert levels[10].max() < 20


# --- the command


def test_an_interrupt_is_one_line_and_leaves_no_process(model: Path, folder: Path) -> None:
    Path("speech").mkdir()
    write_wav("speech/0.wav", speech_like(64000)[None])
    for i in range(1, 200):  # more than are done before the interrupt
        os.link("speech/0.wav", f"speech/{i}.wav")
    with Pipe.opened() as errors:
        arguments = (
            "evaluate",
            model,
            "--data",
            "speech",
            "--no-speed",
            "-j",
            2,
            "--metric",
            "si_sdr_db",
            "--out",
            "o",
        )
        process = start(*arguments, stderr=errors.writing)
        errors.close_writing()
        wait_until(lambda: len(children(process.id)) >= 2, "two helpers")
        process.send(signal.SIGINT)
        assert process.wait() == 128 + signal.SIGINT
        assert read_all(errors.reading) == b"codec: ended by SIGINT\n"  # its end also says that no helper holds it
    assert not Path("o").exists()


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def test_the_command_prints_tables_and_writes_files(model: Path, speech: Path, folder: Path) -> None:
    args = ("evaluate", model, "--data", speech, "--no-speed", "--jobs", 1, "--metric", "si_sdr_db")
    shown = succeed(*args, "-k", 1, 3, "--out", "new/results", "--examples", 1)
    assert "3 recordings" in shown
    assert re.search(r"^tiny k=1 .*\d ±", shown, re.MULTILINE)
    assert sorted(os.listdir("new/results")) == ["files.csv", "report.html", "results.json"]
    told = read_json(Path("new/results/results.json").read_text())
    assert [s["setting"] for s in told["systems"]] == [1, 3]
    assert "exists already; --force replaces it" in refusal(*args, "--out", "new/results")
    again = read_json(succeed(*args, "-k", 1, "-k", 3, "--json", "--max-files", 1))
    assert [s["name"] for s in again["systems"]] == ["tiny k=1", "tiny k=3"]
    assert again["num_files"] == 1


def test_bad_recordings_are_left_out_and_told(model: Path, speech: Path, folder: Path) -> None:
    shutil.copytree(speech, "mixed")
    Path("mixed/broken.wav").write_bytes(b"RIFF, or is it?")
    result = run("evaluate", model, "--data", "mixed", "--no-speed", "-j", 1, "--metric", "si_sdr_db", "--json")
    assert result.exit_code == 1
    assert "broken.wav cannot be read as audio" in result.stderr
    told = json.loads(result.stdout)
    assert told["num_files"] == 3
    assert list(told["failures"]) == ["broken.wav"]


def test_mistakes_are_one_line(model: Path, speech: Path, folder: Path) -> None:
    Path("empty").mkdir()
    Path("noise").mkdir()
    Path("noise/a.wav").write_bytes(b"no audio")
    Path("file").touch()
    for args, told in (
        (("nowhere", "--data", speech), "'nowhere' is neither a bundled model"),
        ((model, "--data", "nowhere"), "nowhere is neither a folder nor a manifest"),
        ((model, "--data", "empty"), "no audio files under empty"),
        ((model, "--data", "noise"), "a.wav cannot be read as audio"),
        ((model, "--data", speech, "--out", "file"), "file is no folder"),
    ):
        assert told in refusal("evaluate", *args, "--no-speed")


def test_wrong_usage_is_exit_status_2(model: Path, speech: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    for args, told in (
        (("--data", speech), "there is no codec to measure"),
        ((model, "--data", speech, "--metric", "mos"), "there is no metric 'mos' (there are: pesq_wb, "),
        ((model, "--data", speech, "-k", 9), "num_quantizers=9 is not one of (1, 2, 3)"),
        (("--data", speech, "--opus", 6, 12), "Opus needs the program opusenc, which is not installed"),
        ((model, "--data", speech, "--scorer", "nothing"), "scorer 'nothing' is neither one of"),
        ((model, "--data", speech, "--scorer", "wer"), "needs the folder of a model: wer=FOLDER"),
        ((model, "--data", speech, "--scorer", "codec.nothing:A"), "cannot be imported"),
        ((model,), "--data"),
    ):
        result = run("evaluate", *args, "--no-speed")
        assert result.exit_code == 2, result.stderr
        assert told in result.stderr
        assert not os.listdir()
