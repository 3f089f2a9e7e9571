"""What a language model of tokens learns from, its runs, and its measure: the same numbers when a run is resumed."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from language_models import HOP, PATTERNS, tiny_lm
from omegaconf import DictConfig, OmegaConf
from runs import CONFIGS, LIGHTNING_WARNINGS
from torch import Tensor

import codec
from codec.testing import tiny_codec, tiny_voiced_codec
from codec.token_format import TokenFormat
from codec.token_vocabulary import Vocabulary, VocabularyDecoder
from recipes.module import NonFiniteError
from recipes.token_data import CodeCorpus, TokenBatches, all_windows, ids_of
from recipes.token_lm import TokenLM, load_lm
from recipes.train_lm import TokenLMTraining, open_data, parse_lm, train_lm
from tools.evaluate_lm import evaluate
from tools.export_lm import export_lm

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


# Data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    codec.save(tiny_codec(), folder, name="tiny@1")
    return folder


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 3 to 47 frames, in two folders; one has two channels, one has two segments."""
    folder = tmp_path_factory.mktemp("codes")
    (folder / "more").mkdir()
    draws = np.random.default_rng(0)
    for index, num_frames in enumerate((3, 20, 47, 9)):
        num_channels = 2 if index == 1 else 1
        # Runs of one code, so that there is something to learn.
        codes = np.repeat(draws.integers(0, 32, (num_channels, 3, num_frames)), 3, axis=2)[:, :, :num_frames]
        name = folder / ("more" if index else ".") / f"{index}.codec"
        codec.write(name, codes, model=model)
    codec.join([folder / "0.codec", folder / "more" / "3.codec"], folder / "joined.codec", model=model)
    return folder


def test_recordings_are_channels_of_segments_of_files(folder: Path, model: Path) -> None:
    corpus = CodeCorpus(folder, TokenFormat.load(model), 2)
    found = [(r.file.name, r.channel, r.first_frame, r.num_frames) for r in corpus.recordings]
    assert found == [
        *(("0.codec", 0, 0, 3), ("joined.codec", 0, 0, 3), ("joined.codec", 0, 3, 9)),
        *(("1.codec", 0, 0, 20), ("1.codec", 1, 0, 20), ("2.codec", 0, 0, 47), ("3.codec", 0, 0, 9)),
    ]
    with codec.open(folder / "more" / "1.codec", model=model) as file:
        expected = torch.from_numpy(file.read())
    read = corpus.read(4, 5, 7)
    assert torch.equal(read.codes, expected[1:, :2, 5:12])
    assert read.num_samples.tolist() == [7 * HOP]
    second, third = corpus.read(2, 1, 3), corpus.read(6, 1, 3)
    assert torch.equal(second.codes, third.codes)


def test_global_codes_are_those_of_the_channel(model: Path, tmp_path: Path) -> None:
    codec.save(tiny_voiced_codec(), tmp_path / "voiced", name="voiced@1")
    voices = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    file = tmp_path / "codes" / "a.codec"
    file.parent.mkdir()
    codec.write(file, np.zeros((2, 4, 9), np.int64), model=tmp_path / "voiced", global_codes=voices)
    corpus = CodeCorpus(tmp_path / "codes", TokenFormat.load(tmp_path / "voiced"), 1)
    assert corpus.read(1, 0, 1).global_codes.tolist() == [[5, 6, 7, 8]]  # type: ignore[union-attr]
    settings = parse_lm(run_config(tmp_path / "codes", tmp_path / "voiced", tmp_path / "run", "num_quantizers=1"))
    vocabulary = open_data(settings)[2]
    assert (vocabulary.codebook_sizes, vocabulary.num_global_codes, vocabulary.global_codebook_size) == ((48,), 4, 64)
    with pytest.raises(ValueError, match=r"a\.codec: it has 4 global codes, not 0"):
        CodeCorpus(tmp_path / "codes", replace(TokenFormat.load(tmp_path / "voiced"), num_global_codes=0), 1)


def test_files_that_cannot_be_used_are_named(folder: Path, model: Path, tmp_path: Path) -> None:
    token_format = TokenFormat.load(model)
    with pytest.raises(ValueError, match=r"no \.codec files with any frames under"):
        CodeCorpus(tmp_path, token_format, 2)
    codec.write(tmp_path / "few.codec", np.zeros((1, 2, 4), np.int64), model=model)
    with pytest.raises(ValueError, match=r"few\.codec: it has 2 rows of codes, not 3"):
        CodeCorpus(tmp_path, token_format, 3)
    with pytest.raises(ValueError, match=r"few\.codec: it was made by tiny@1, not by speech_16k@1"):
        CodeCorpus(tmp_path, TokenFormat.load(), 1)
    whole = (folder / "more" / "2.codec").read_bytes()
    (tmp_path / "cut.codec").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"cut\.codec: "):
        CodeCorpus(tmp_path, token_format, 1)


def _batches(folder: Path, model: Path, *, seed: int = 0, pattern: str = "flatten", context_steps: int = 40) -> Any:
    corpus = CodeCorpus(folder, TokenFormat.load(model), 2)
    vocabulary = Vocabulary(
        codec_id=TokenFormat.load(model).codec_id, hop_length=HOP, codebook_sizes=(32, 32), **PATTERNS[pattern]
    )
    return corpus, vocabulary, TokenBatches(corpus, vocabulary, batch_size=3, context_steps=context_steps, seed=seed)


@pytest.mark.parametrize("pattern", ["flatten", "interleave", "delay"])
def test_batches_follow_from_seed_and_number(folder: Path, model: Path, pattern: str) -> None:
    corpus, vocabulary, batches = _batches(folder, model, pattern=pattern)
    _, _, again = _batches(folder, model, pattern=pattern)
    _, _, other = _batches(folder, model, pattern=pattern, seed=1)
    ids = [batches[number] for number in range(16)]
    assert all(torch.equal(again[number], ids[number]) for number in (3, 15, 0))
    assert not all(torch.equal(other[number], ids[number]) for number in range(16))
    assert len({tuple(batch.flatten().tolist()) for batch in ids}) > 10
    recordings = [corpus.read(n, 0, r.num_frames).codes[0] for n, r in enumerate(corpus.recordings)]
    ends = set()
    for batch in ids:
        assert batch.shape[:2] == (3, vocabulary.num_streams)
        assert batch.shape[2] <= 41
        for row in batch:
            decoder = VocabularyDecoder(vocabulary)
            is_end = bool((row == vocabulary.end_id).any())
            width = row.shape[1] if is_end else int((row[0] != vocabulary.pad_id).sum())
            codes = decoder.push(row[:, :width])
            assert decoder.is_ended == is_end
            ends.add(is_end)
            places = [(r, at) for r in recordings for at in range(r.shape[1] - codes.shape[1] + 1)]
            assert any(torch.equal(r[:, at : at + codes.shape[1]], codes) for r, at in places)
            if is_end:
                assert any(torch.equal(r[:, r.shape[1] - codes.shape[1] :], codes) for r in recordings)
    assert ends == {True, False}


def test_windows_of_about_equal_length_come_together(folder: Path, model: Path) -> None:
    _, vocabulary, batches = _batches(folder, model, context_steps=100)
    lengths = [(batches[number] != vocabulary.pad_id).sum(dim=2)[:, 0].tolist() for number in range(8)]
    lengths.sort(key=min)
    assert all(max(low) <= min(high) for low, high in pairwise(lengths))
    assert len({max(batch) for batch in lengths}) > 2


@pytest.mark.parametrize("pattern", ["flatten", "interleave", "delay"])
def test_validation_takes_every_frame_once(folder: Path, model: Path, pattern: str) -> None:
    corpus, vocabulary, _ = _batches(folder, model, pattern=pattern)
    windows = all_windows(corpus, vocabulary, 40)
    assert [w[2] for w in windows] == sorted(w[2] for w in windows)
    frames = [(number, frame) for number, first, n in windows for frame in range(first, first + n)]
    every = [(number, f) for number, r in enumerate(corpus.recordings) for f in range(r.num_frames)]
    assert sorted(frames) == every
    if pattern != "delay":
        ids = ids_of(corpus, vocabulary, windows)
        assert ids.shape[2] <= 41
        num_codes = sum(int((ids >= row.start).logical_and(ids < row.stop).sum()) for row in vocabulary.row_ids)
        assert num_codes == 2 * len(every)


# Runs


def run_config(folder: Path, model: Path, output_dir: Path, *overrides: str) -> DictConfig:
    """Six steps, three to an epoch."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(
            "lm_tiny",
            [
                f"output_dir={output_dir}",
                f"codec={model}",
                f"data.train_dir={folder}",
                f"data.dev_dir={folder}",
                "num_quantizers=2",
                "network={width: 16, num_layers: 1, num_heads: 2, context_steps: 40, dropout: 0.2}",
                "data.batch_size=3",
                "data.steps_per_epoch=3",
                "trainer.max_steps=6",
                "trainer.log_every_n_steps=1",
                "trainer.enable_progress_bar=false",
                "optimizer.schedule.warmup_steps=2",
                *overrides,
            ],
        )


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return state


@pytest.fixture(scope="module")
def whole(folder: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("whole")
    train_lm(run_config(folder, model, output_dir))
    return output_dir


@pytest.mark.parametrize("num_first_steps", [2, 3])
def test_a_run_that_was_interrupted_comes_to_the_same_numbers(
    num_first_steps: int, folder: Path, model: Path, whole: Path, tmp_path: Path
) -> None:
    """In the middle of an epoch and at its end. Stopped by hand: the learning rate falls until max_steps."""
    config = run_config(folder, model, tmp_path)

    class Interrupted(Exception):
        pass

    take = TokenLMTraining.training_step

    def training_step(self: TokenLMTraining, ids: Tensor, batch_index: int) -> None:
        if self.global_step == num_first_steps:
            self.trainer.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
            raise Interrupted
        take(self, ids, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenLMTraining, "training_step", training_step)
        with pytest.raises(Interrupted):
            train_lm(config)
    config.resume = True
    train_lm(config)
    ours, theirs = _state(tmp_path), _state(whole)
    assert ours["global_step"] == theirs["global_step"] == 6
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name


def test_logs_tell_losses_row_by_row(whole: Path) -> None:
    with (whole / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = [row for row in rows if row["val/loss"]]
    assert [int(row["step"]) for row in told] == [2, 5]
    for row in told:
        mean = (float(row["val/loss/row_0"]) + float(row["val/loss/row_1"])) / 2
        assert float(row["val/perplexity"]) == pytest.approx(math.exp(mean), rel=1e-4)
    assert len([row for row in rows if row["train/total"]]) == 6
    assert float(told[1]["val/loss"]) < float(told[0]["val/loss"]) < 5.0


def test_an_exported_run_is_evaluated_beside_counts(folder: Path, model: Path, whole: Path, tmp_path: Path) -> None:
    lm = export_lm(whole, tmp_path / "lm")
    assert load_lm(tmp_path / "lm").config == lm.config
    with pytest.raises(ValueError, match=r"other\.ckpt does not exist"):
        export_lm(whole, tmp_path / "lm", checkpoint="other.ckpt")
    corpus = CodeCorpus(folder, TokenFormat.load(model), 2)
    found = evaluate(lm.eval(), corpus, corpus)
    # The validation of the run has measured the same, in other batches.
    best = torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)
    assert found["language model"][0] == pytest.approx(_perplexity_at(whole, best["global_step"]), rel=1e-4)
    for values in found.values():
        assert values[0] == pytest.approx(math.sqrt(values[1] * values[2]))
        assert 1.0 < min(values) < max(values) < 64.0
    assert found["bigram"][1] < found["unigram"][1]  # codes come in runs


def _perplexity_at(run: Path, global_step: int) -> float:
    with (run / "logs" / "version_0" / "metrics.csv").open() as file:
        return next(
            float(row["val/perplexity"])
            for row in csv.DictReader(file)
            if row["val/perplexity"] and int(row["step"]) == global_step - 1
        )


def test_counts_are_counted(model: Path, tmp_path: Path) -> None:
    """Row 0 repeats its code, row 1 is drawn anew: pairs foresee the one, nothing the other."""
    codes = np.zeros((1, 3, 900), np.int64)
    draws = np.random.default_rng(0)
    codes[0, 0] = np.repeat(draws.integers(0, 4, 9), 100)
    codes[0, 1] = draws.integers(0, 4, 900)
    codec.write(tmp_path / "a.codec", codes, model=model)
    corpus = CodeCorpus(tmp_path, TokenFormat.load(model), 2)
    lm = tiny_lm(codec_id=TokenFormat.load(model).codec_id, codebook_sizes=(32, 32))
    found = evaluate(lm, corpus, corpus)
    assert found["unigram"][2] == pytest.approx(4.0, rel=0.1)
    assert found["bigram"][1] < 1.2 < 2.5 < found["unigram"][1]
    assert found["bigram"][2] == pytest.approx(4.0, rel=0.1)


def _message(config: DictConfig) -> str:
    with pytest.raises(ValueError, match=r".") as told:
        train_lm(config)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("nothing", 1, "nothing: the configuration has no such setting"),
        ("network.width", 15, "network: width=15 is not a multiple of"),
        ("network.context_steps", 4, "context_steps=4 must be"),
        ("pattern", "random", "pattern='random' is not one of"),
        ("num_coarse", 1, "num_coarse and block_frames go with"),
        ("num_quantizers", 4, "num_quantizers=4 is not one of (1, 2, 3)"),
        ("codec", "nowhere", "'nowhere' is neither a bundled model"),
        ("codec", "speech_16k", "data.train_dir: "),
        ("data.dev_dir", "nowhere", "data.dev_dir: there are no .codec files"),
        ("data.batch_size", 0, "data: batch_size must be positive"),
        ("optimizer.lr", 0.0, "optimizer: lr must be positive"),
        ("trainer.max_stepz", 1, "trainer.max_stepz: there is no such setting"),
        ("trainer.max_time", "an hour", "trainer.max_time='an hour' is not of the form"),
        ("resume", True, "holds no checkpoint to resume from"),
    ],
)
def test_mistakes_are_named_with_their_path(
    path: str, value: Any, message: str, folder: Path, model: Path, tmp_path: Path
) -> None:
    config = run_config(folder, model, tmp_path / "run")
    OmegaConf.update(config, path, value, merge=False, force_add=True)
    assert message in _message(config)


def test_a_run_is_not_written_over_and_not_resumed_as_another(folder: Path, model: Path, whole: Path) -> None:
    assert "holds a run already" in _message(run_config(folder, model, whole))
    told = _message(run_config(folder, model, whole, "resume=true", "network.width=32"))
    assert "network.width was 16, now 32" in told


def test_a_loss_that_is_not_finite_stops_the_run(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: Callable[[TokenLM, Tensor], tuple[Tensor, Tensor]] = TokenLM.losses
    monkeypatch.setattr(TokenLM, "losses", lambda self, ids: (losses(self, ids)[0] * math.nan, losses(self, ids)[1]))
    with pytest.raises(NonFiniteError, match="the loss is not finite in step 0"):
        train_lm(run_config(folder, model, tmp_path))


@pytest.mark.parametrize("name", ["lm", "lm_tiny"])
def test_the_configurations_are_complete(name: str) -> None:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose(name, ["output_dir=x", "data.train_dir=x", "data.dev_dir=x"])
    config = OmegaConf.create({key: value for key, value in config.items() if key != "hydra"})
    assert parse_lm(config).codec == "speech_16k"
