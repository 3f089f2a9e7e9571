"""`codec evaluate --labels`: what codes tell of phones, in results and in reports, and what users may get wrong."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import read_json, refusal, run, succeed

import codec
from codec.evaluation import Evaluation, UsageError, evaluate
from codec.evaluation.abx import abx
from codec.evaluation.coders import model_coders
from codec.evaluation.labelled import LabelledRecording, label_facts, semantics_of, tokens_of
from codec.evaluation.labels import Segment, frame_labels
from codec.evaluation.page import render
from codec.evaluation.semantics import pnmi, probe, purity
from codec.evaluation.tables import semantics_table, text
from codec.testing import speech_like, tiny_codec

pytest_plugins = ["commands"]
pytest.importorskip("sklearn")

QUICK = ("si_sdr_db",)
NUMBERS = {"h": 0, "x": 1}


def spans(seconds: float) -> list[Segment]:
    """A label each tenth of a second, and silence after every third of them."""
    starts = [i / 10 for i in range(int(10 * seconds)) if i % 4 < 3]
    return [Segment("hx"[i % 2], start, start + 0.1) for i, start in enumerate(starts)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four recordings of two speakers, and a CTM file for all but the last."""
    folder = tmp_path_factory.mktemp("labelled")
    rows, lines = [], []
    for i, (name, seconds) in enumerate((("a", 1.0), ("s/b", 0.8), ("s/c", 0.9), ("d", 0.6))):
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / f"{name}.wav", speech_like(int(16000 * seconds), seed=i), 16000)
        rows.append(f"{name}.wav\tdev\tmade\t{'ann' if i % 2 else 'bob'}\t16000\t{seconds}\tYES\n")
        lines += [f"{name} 1 {s.start_seconds} 0.1 {s.label}\n" for s in spans(seconds) if i < 3]
    (folder / "manifest.tsv").write_text("".join(rows))
    (folder / "phones.ctm").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def evaluation(data: Path, model: Path) -> Evaluation:
    return evaluate(
        [model], data=data, num_quantizers=[1, 3], metrics=QUICK, labels=data / "phones.ctm", measures_speed=False
    )


def test_values_are_those_of_the_functions(evaluation: Evaluation, data: Path, model: Path) -> None:
    first, highest = evaluation.systems
    assert first.semantics == ()
    assert [told.rows for told in highest.semantics] == ["0", "1", "2", "0 to 2"]
    (coder,) = model_coders([model], [3])
    rate_hz = 16000 / 64
    codes, labels, files, tokens = [], [], [], []
    for i, (name, speaker) in enumerate((("a", "bob"), ("s/b", "ann"), ("s/c", "bob"))):
        audio, _ = soundfile.read(data / f"{name}.wav", dtype="float32")
        found = coder.code(audio, 16000, 3).codes
        assert found is not None
        codes.append(found)
        labels.append(frame_labels(spans(len(audio) / 16000), found.shape[1], rate_hz, NUMBERS))
        files += [i] * found.shape[1]
        import torch

        latents = codec.load(model).quantizer.decode(torch.from_numpy(found)[None, :1])[0].T.numpy()
        tokens += tokens_of(latents, spans(len(audio) / 16000), rate_hz, speaker)
    whole, joined = np.concatenate(codes, axis=1), np.concatenate(labels)
    for row in range(3):
        values = highest.semantics[row].values
        assert values["purity"].mean == pytest.approx(purity(whole[row], joined))
        assert values["pnmi"].mean == pytest.approx(pnmi(whole[row], joined))
        assert values["pnmi"].low < values["pnmi"].mean < values["pnmi"].high
    values = highest.semantics[0].values
    for name, across in (("abx_within", False), ("abx_across", True)):
        assert values[name].mean == pytest.approx(abx(tokens, across=across, by_context=False))
    latents = np.concatenate([token.latents for token in tokens])
    assert 0.3 < values["probe"].mean < 1
    assert len(latents) == (joined >= 0).sum()
    of_rows = {"purity", "unseen_purity", "cluster_purity", "pnmi", "pnmi_by_chance"}
    assert set(highest.semantics[1].values) == of_rows
    assert set(highest.semantics[3].values) == {"probe", "abx_within", "abx_across"}
    assert evaluation.facts["labels"] | {"most_frequent": 0.5} == {
        "source": "phones.ctm", "tier": None, "num_files": 3, "num_labels": 2, "num_segments": 21,
        "most_frequent": 0.5, "is_by_speaker": False,
    }  # fmt: skip
    assert list(evaluation.failures) == ["d.wav, labels"]


def test_reports_show_them(evaluation: Evaluation) -> None:
    table = semantics_table(evaluation)
    assert [row[:2] for row in table.rows] == [("tiny", "0"), ("tiny", "1"), ("tiny", "2"), ("tiny", "0 to 2")]
    purity_of_row_0 = f"{evaluation.systems[1].semantics[0].values['purity'].mean:.3f} ±"
    assert table.rows[0][2].startswith(purity_of_row_0)
    assert purity_of_row_0 in text(evaluation)
    page = render(evaluation)
    assert "What codes tell of labels" in page
    assert "phones.ctm: 21 segments with 2 labels in 3 recordings" in page
    facts = read_json(evaluation.to_json())
    told = facts["systems"][1]["semantics"][0]
    assert told["rows"] == "0"
    assert told["values"]["abx_within"]["low"] is None


def test_codes_that_tell_all_have_the_best_values() -> None:
    """A codec whose first row is the label: nothing is left to be known."""
    model = tiny_codec()
    rate_hz = 16000 / 64
    recordings, codes = {}, {}
    for i in range(4):
        labels = frame_labels(spans(1.0), 250, rate_hz, NUMBERS)
        rows = np.stack([np.where(labels >= 0, labels, 2), *np.random.default_rng(i).integers(0, 32, (2, 250))])
        recordings[f"{i}"] = LabelledRecording("ann" if i < 2 else "bob", 1.0, tuple(spans(1.0)))
        codes[f"{i}"] = rows
    first, second, *_ = semantics_of(model, codes, recordings)
    assert first.values["purity"].mean == first.values["cluster_purity"].mean == 1
    assert first.values["unseen_purity"].mean == 1
    assert first.values["pnmi"].mean == pytest.approx(1)
    assert first.values["probe"].mean == 1
    assert first.values["abx_within"].mean == first.values["abx_across"].mean == 0
    assert second.values["pnmi"].mean < 0.2
    assert label_facts(recordings)["most_frequent"] == pytest.approx(0.5, abs=0.1)


def test_frames_that_overlap_have_no_place_in_time() -> None:
    recordings = {"a": LabelledRecording("", 1.0, tuple(spans(1.0)))}
    with pytest.raises(ValueError, match="a has 300 frames, which do not lie one after the other"):
        semantics_of(tiny_codec(), {"a": np.zeros((3, 300), np.int64)}, recordings)
    with pytest.raises(ValueError, match="no frame has a label"):
        semantics_of(tiny_codec(), {}, recordings)


def test_one_recording_has_values_but_no_probe() -> None:
    recordings = {"a": LabelledRecording("", 1.0, tuple(spans(1.0)))}
    codes = {"a": np.random.default_rng(0).integers(0, 32, (3, 250))}
    first = semantics_of(tiny_codec(), codes, recordings)[0]
    assert first.values["probe"].num_files == 0
    assert math.isnan(first.values["abx_across"].mean)
    assert 0 <= first.values["abx_within"].mean <= 1
    assert "unseen_purity" not in first.values
    assert math.isnan(first.values["purity"].high)


def test_tokens_are_segments_with_their_neighbours() -> None:
    segments = [Segment("a", 0.0, 0.1), Segment("b", 0.1, 0.12), Segment("c", 0.4, 0.6)]
    tokens = tokens_of(np.arange(10)[:, None], segments, 20.0, "ann")  # centres at 0.025, 0.075, ...
    assert [(t.label, t.latents[:, 0].tolist(), t.context) for t in tokens] == [
        ("a", [0, 1], ("", "b")),
        ("c", [8, 9], ("", "")),  # the audio ends within it; b holds no centre
    ]
    assert tokens[0].speaker == "ann"


def test_mistakes_are_one_line(data: Path, model: Path, tmp_path: Path) -> None:
    def measure(models: Sequence[Path] = (model,), **options: object) -> Evaluation:
        return evaluate(models, data=data, metrics=QUICK, measures_speed=False, num_quantizers=[1], **options)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="none are named"):
        measure(tier="phones")
    with pytest.raises(UsageError, match="no model is named"):
        measure((), labels=data / "phones.ctm", codec2_bps=[3200])
    with pytest.raises(ValueError, match=r"labels for none of 4 recordings; a\.wav: "):
        measure(labels=tmp_path)
    (tmp_path / "late.ctm").write_text("a 1 0.5 3.0 h\n")
    with pytest.raises(ValueError, match=r"a\.wav, labels: its labels end at 3\.50 s, but the audio at 1\.00 s"):
        measure(labels=tmp_path / "late.ctm")
    (tmp_path / "late.ctm").write_text("a 1 0.5 3.0 h\nd 1 0.1 0.1 h\nd 1 0.2 0.1 x\n")
    some = measure(labels=tmp_path / "late.ctm")
    assert sorted(some.failures) == ["a.wav, labels", "s/b.wav, labels", "s/c.wav, labels"]
    assert some.facts["labels"]["num_files"] == 1


def test_the_command_takes_them(data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("evaluate", model, "--data", data, "-k", "1", "--metric", "si_sdr_db", "--no-speed", "--jobs", "1")
    done = succeed(*command, "--max-files", "1", "--labels", data / "phones.ctm")
    assert "What codes, and their quantized latents, tell of the labels" in done
    assert "PNMI" in done
    wrong = run(*command, "--labels", data / "phones.ctm", "--tier", "words")
    assert wrong.exit_code == 2
    assert "no tiers such as 'words'" in wrong.stderr.replace("\n", " ")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "labels for none of 4 recordings" in refusal(*command, "--labels", tmp_path / "empty")


def test_a_probe_is_left_unchanged_by_frames_without_a_label() -> None:
    rng = np.random.default_rng(0)
    latents, labels, files = rng.standard_normal((90, 3)), rng.integers(0, 2, 90), np.arange(90) // 30
    more = np.concatenate([latents, 9 * latents]), np.concatenate([labels, 0 * labels - 1]), np.tile(files, 2)
    assert probe(*more) == probe(latents, labels, files)
