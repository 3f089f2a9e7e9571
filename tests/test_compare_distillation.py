"""The comparison of distillations: what its runs are, what it says of them, and that finished ones are kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from runs import compose, write_recordings
from teachers import small_teachers

import codec
from codec.config import to_dict
from codec.testing import tiny_codec
from recipes.settings import parse
from tools.compare_distillation import CONDITIONS, Comparison, run, table

pytest.importorskip("transformers")


def _comparison(folder: Path, **changes: Any) -> Comparison:
    values: dict[str, Any] = {
        **dict.fromkeys(("train_dir", "dev_dir", "data", "speech_teacher", "text_teacher", "words", "labels"), "x"),
        **dict.fromkeys(("split", "speech_cache", "max_files")),
        "out": folder,
        "speech_layers": "last",
        "init_from": "speech_16k",
        "max_steps": 7,
        "weight": 4.0,
        "num_quantizers": (1, 2),
        "num_word_files": 2,
        "overrides": (),
    }
    return Comparison(**(values | changes))


def test_conditions_differ_in_their_objectives_alone(tmp_path: Path) -> None:
    comparison = _comparison(tmp_path, overrides=("data.num_workers=0",))
    composed = {name: compose(*comparison.training(name, 3, tmp_path / name)) for name in CONDITIONS}
    objectives = {name: parse(config).distillation or {} for name, config in composed.items()}
    assert {name: set(found) for name, found in objectives.items()} == {
        "none": set(),
        "speech": {"speech"},
        "text_index": {"text"},
        "text_forced": {"text"},
        "speech_text": {"speech", "text"},
    }
    for name, found in objectives.items():
        assert name == "none" or sum(objective.weight for objective in found.values()) == 4.0
    assert objectives["text_index"]["text"].alignment == {"type": "index", "pad_targets": True}
    assert objectives["text_index"]["text"].teacher["num_slots"] == 149
    assert objectives["text_forced"]["text"].alignment == {"type": "forced"}
    assert objectives["speech_text"]["text"].alignment == {"type": "forced"}
    plain = [OmegaConf.to_container(config) for config in composed.values()]
    for values in plain:
        assert isinstance(values, dict)
        del values["output_dir"]
        values.pop("distillation", None)
    assert all(values == plain[0] for values in plain)
    assert plain[0]["seed"] == 3  # type: ignore[index, call-overload]


def test_the_table_has_means_and_paired_intervals() -> None:
    results = {"none": [{"stoi": 0.5}, {"stoi": 0.6}, {"stoi": 0.7}], "speech": [{"stoi": v} for v in (0.6, 0.8, 0.9)]}
    # Differences 0.1, 0.2, 0.2: their standard deviation is 0.0577, and t of two degrees of freedom 4.3027.
    rows = ["| | stoi |", "|---|---|", "| none | 0.600 |", "| speech | 0.767 (+0.167 ±0.143) |"]
    assert table(results, ["stoi"]).splitlines() == rows
    one = {"none": [{"a": 1.0, "b": 0.0}], "speech": [{"a": 0.5, "b": 0.0}]}
    assert table(one, ["a"]).endswith("| speech | 0.500 (-0.500) |")


def _tiny_model() -> list[str]:
    """What makes the model of the experiment the tiny one."""
    values = to_dict(tiny_codec().config)
    quantizer = {name: values["quantizer"][name] for name in ("latent_dim", "num_stages", "codebook_size")}
    changes = {name: value for name, value in values.items() if name not in ("type", "quantizer")}
    return [
        *(f"model.{name}={value}" for name, value in changes.items()),
        *(f"model.quantizer.{name}={value}" for name, value in quantizer.items()),
    ]


def test_a_run_trains_is_exported_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recordings = write_recordings(tmp_path / "audio", num_samples=56000)
    model = tmp_path / "start"
    codec.save(tiny_codec(), model, name="tiny@1")
    teachers = {name: str(path) for name, path in small_teachers(tmp_path, recordings).items()}
    comparison = _comparison(
        tmp_path / "out",
        train_dir=str(recordings),
        dev_dir=str(recordings),
        speech_teacher=teachers["speech"],
        text_teacher=teachers["text"],
        words=teachers["words"],
        init_from=str(model),
        max_steps=1,
        overrides=(*_tiny_model(), "data.num_workers=0", "trainer.accelerator=cpu", "data.batch_size=2"),
    )
    heard: list[Path] = []

    def measure(self: Comparison, model: Path) -> dict[str, float]:
        heard.append(model)
        return {"stoi": 0.5}

    monkeypatch.setattr(Comparison, "measure", measure)
    assert run(comparison, "speech_text", 0) == {"stoi": 0.5}
    assert codec.load(heard[0]).codebook_sizes == tiny_codec().codebook_sizes
    assert run(comparison, "speech_text", 0) == {"stoi": 0.5}  # read, not measured again
    assert len(heard) == 1
    assert json.loads((tmp_path / "out" / "speech_text_0" / "values.json").read_text()) == {"stoi": 0.5}


def test_what_fails_in_a_run_is_told_in_one_line(tmp_path: Path) -> None:
    arguments = [f"--{name}=x" for name in ("train-dir", "dev-dir", "data", "speech-teacher", "text-teacher")]
    arguments += ["--words=x", "--labels=x", "--only", "none", "--seeds", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.compare_distillation", str(tmp_path), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: none_0: recipes.train failed: error: ")
    assert done.stderr.count("\n") == 1
