"""Units that training makes: distortions, the losses by hand, that both kinds learn, and the programs for them."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import write_recordings

from codec.config import from_dict
from codec.evaluation.labels import Segment
from codec.evaluation.recordings import find_recordings
from codec.quantizers.product import KMeansVQ
from codec.quantizers.residual import ResidualVQConfig
from codec.testing import speech_like
from codec.units import (
    Centroids,
    PredictiveEncoder,
    SpeechUnits,
    UnitHead,
    deduplicate,
    load_units,
    log_mel_source,
    train_units,
)
from codec.units.assigners import CentroidsConfig
from recipes.augment import DISTORTIONS, Distortion, DistortionConfig, shift_pitch, time_stretch
from recipes.corpora import open_corpus
from recipes.crops import Pool
from recipes.unit_training import (
    ContextNetwork,
    UnitTrainingSettings,
    ctc_without_blank,
    hear,
    prediction_loss,
    train_invariant_units,
    train_predictive_units,
)
from tools import train_units as train_program
from tools.measure_units import measure, table

ROOT = Path(__file__).resolve().parent.parent
RATE_HZ = 16000


def tone(hz: float, num_samples: int = 32000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(num_samples) / RATE_HZ))[None].astype(np.float32)


def loudest_hz(audio: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(audio[0] * np.hanning(audio.shape[1])))
    return float(spectrum.argmax() * RATE_HZ / audio.shape[1])


def white(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    return rng.standard_normal((1, num_samples)).astype(np.float32)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("data") / "speech")


@pytest.fixture(scope="module")
def pool(recordings: Path) -> Pool:
    return Pool([(open_corpus(recordings), 1.0)], sample_rate_hz=RATE_HZ)


@pytest.fixture(scope="module")
def units() -> SpeechUnits:
    speech = [torch.from_numpy(speech_like(24000, seed=seed)) for seed in range(3)]
    return train_units(log_mel_source(num_bands=20), speech, 6)


# Distortions


@given(st.integers(0, 9000), st.floats(0.5, 2.0))
def test_stretched_audio_has_the_length_of_its_rate(num_samples: int, rate: float) -> None:
    stretched = time_stretch(speech_like(num_samples)[None], rate, sample_rate_hz=RATE_HZ)
    assert stretched.shape == (1, round(num_samples / rate))
    assert np.isfinite(stretched).all()


@pytest.mark.parametrize("rate", [0.8, 1.25])
def test_stretched_audio_has_the_same_pitch(rate: float) -> None:
    stretched = time_stretch(np.concatenate([tone(440), tone(1000)]), rate, sample_rate_hz=RATE_HZ)
    for channel, hz in zip(stretched, (440, 1000), strict=True):
        assert loudest_hz(channel[None]) == pytest.approx(hz, abs=1)
        assert np.std(channel[4000:-4000]) == pytest.approx(0.5 / math.sqrt(2), rel=0.12)  # neighbouring bins beat


def test_events_move_with_the_stretch() -> None:
    clicks = np.zeros((1, 16000), np.float32)
    clicks[:, [4000, 12000]] = 1.0
    stretched = np.abs(time_stretch(clicks, 0.8, sample_rate_hz=RATE_HZ)[0])
    energy = np.convolve(stretched, np.ones(800), "same")
    assert int(energy[:10000].argmax()) == pytest.approx(5000, abs=500)
    assert 10000 + int(energy[10000:].argmax()) == pytest.approx(15000, abs=500)


def test_a_rate_of_one_changes_nothing() -> None:
    speech = speech_like(16000)[None]
    assert np.abs(time_stretch(speech, 1.0, sample_rate_hz=RATE_HZ) - speech).max() < 1e-6


@pytest.mark.parametrize("semitones", [-12, -4, 4, 12])
def test_pitch_is_shifted_in_the_same_time(semitones: int) -> None:
    shifted = shift_pitch(tone(600), semitones, sample_rate_hz=RATE_HZ)
    assert shifted.shape == (1, 32000)
    assert loudest_hz(shifted) == pytest.approx(600 * 2 ** (semitones / 12), rel=0.002)


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_distortions_follow_from_their_draws(kind: str) -> None:
    distortion = Distortion(DistortionConfig(), sample_rate_hz=RATE_HZ, noise=white)
    speech = speech_like(16000)[None]
    first, again, other = (distortion(kind, speech, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.float32
    loud = distortion(kind, 1.9 * speech, np.random.default_rng(1))
    assert np.abs(loud).max() <= 1.0
    lengths = {distortion(kind, speech, np.random.default_rng(seed)).shape[1] for seed in range(20)}
    assert (lengths == {16000}) == (kind != "stretch")
    if kind == "stretch":
        assert 16000 / 1.2 <= min(lengths) < 14500 < 18500 < max(lengths) <= 16000 / 0.8
    else:
        assert np.abs(first - speech).max() > 0.05


def test_noise_has_the_ratio_that_was_drawn() -> None:
    config = DistortionConfig(noise_snr_db=(10.0, 10.0))
    speech = 0.2 * speech_like(16000)[None]
    noisy = Distortion(config, sample_rate_hz=RATE_HZ, noise=white)("noise", speech, np.random.default_rng(0))
    assert np.mean(speech**2) / np.mean((noisy - speech) ** 2) == pytest.approx(10, rel=1e-3)


def test_distortions_that_cannot_be_are_refused() -> None:
    quiet = Distortion(DistortionConfig(), sample_rate_hz=RATE_HZ)
    assert quiet.kinds == ("stretch", "pitch", "reverb")
    with pytest.raises(ValueError, match="kind='noise' is not one of"):
        quiet("noise", tone(100), np.random.default_rng(0))
    with pytest.raises(ValueError, match="lowest"):
        DistortionConfig(stretch=(1.2, 0.8))
    with pytest.raises(ValueError, match="must be positive"):
        DistortionConfig(stretch=(0.0, 0.8))


# Losses


def ctc_by_hand(scores: torch.Tensor, target: list[int]) -> float:
    """-log of the probability of all paths of units whose runs are the target."""
    probabilities = scores.double().softmax(-1)
    total = 0.0
    for path in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        if [unit for unit, _ in itertools.groupby(path)] == target:
            total += float(math.prod(probabilities[frame, unit] for frame, unit in enumerate(path)))
    return -math.log(total)


def test_ctc_counts_all_alignments_and_no_blank() -> None:
    scores = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0))
    targets = [[0, 2, 1], [1], [2, 0]]
    lengths = [5, 5, 3]
    expected = [
        ctc_by_hand(row[:length], target) / len(target)
        for row, length, target in zip(scores, lengths, targets, strict=True)
    ]
    found = ctc_without_blank(scores, torch.tensor(lengths), [torch.tensor(target) for target in targets])
    assert float(found) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_targets_that_do_not_fit_do_not_count() -> None:
    scores = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = [torch.tensor([0, 1]), torch.tensor([0, 1, 0, 1])]
    loss = ctc_without_blank(scores, torch.tensor([3, 3]), targets)
    assert float(loss.detach()) == pytest.approx(ctc_by_hand(scores[0].detach(), [0, 1]) / 2, rel=1e-5)
    loss.backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert bool((scores.grad[0] != 0).any())
    assert not scores.grad[1].any()
    assert float(ctc_without_blank(scores.detach()[1:], torch.tensor([3]), targets[1:])) == 0.0


def test_what_comes_next_is_told_from_other_frames() -> None:
    # Latents that are all different directions: whoever predicts them right is right, whoever nothing guesses.
    latents = 30 * torch.eye(20)[None]
    frames = torch.arange(20)
    right = torch.zeros(1, 20, 3, 20)
    for step in range(3):
        ahead = frames + 1 + step
        right[0, ahead < 20, step] = torch.eye(20)[ahead[ahead < 20]]
    rng = torch.Generator().manual_seed(0)
    assert float(prediction_loss(right, latents, rng)) == pytest.approx(0, abs=1e-6)
    assert float(prediction_loss(torch.zeros_like(right), latents, rng)) == pytest.approx(math.log(11), rel=1e-5)
    early = torch.roll(right, 1, dims=1)  # what comes one frame later is predicted too late
    assert float(prediction_loss(early, latents, rng)) > 5
    with pytest.raises(ValueError, match="3 frames are too few to predict 3 steps"):
        prediction_loss(right[:, :3], latents[:, :, :3], rng)


def test_predictions_know_nothing_of_what_comes() -> None:
    network, latents = ContextNetwork(4), torch.randn(1, 4, 12, requires_grad=True)
    network(latents)[0, 6].sum().backward()
    assert latents.grad is not None
    assert not latents.grad[0, :, 7:].any()
    assert bool(latents.grad[0, :, 6].all())


# Runs


def settings(**changes: Any) -> UnitTrainingSettings:
    values: dict[str, Any] = {
        "max_steps": 40, "num_crops": 8, "crop_frames": 40, "batch_size": 8, "lr": 5e-3, "warmup_steps": 2,
    }  # fmt: skip
    return UnitTrainingSettings(**values | changes)


def test_all_variants_of_a_crop_are_heard(pool: Pool, units: SpeechUnits) -> None:
    distortion = Distortion(DistortionConfig(), sample_rate_hz=RATE_HZ, noise=white)
    heard, again = (hear(pool, units.source, settings(num_crops=3), distortion) for _ in range(2))
    for crop, same in zip(heard, again, strict=True):
        assert len(crop.variants) == 5
        assert [len(crop.variants[i]) for i in (0, 2, 3, 4)] == [40] * 4
        for one, other in zip(crop.variants, same.variants, strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(crop.variants[0], crop.variants[3])
    assert not torch.equal(heard[0].variants[0], heard[1].variants[0])
    # With and without distortions the crops are the same.
    assert torch.equal(hear(pool, units.source, settings(num_crops=1))[0].variants[0], heard[0].variants[0])
    with pytest.raises(ValueError, match="units of 16000 Hz cannot hear 8000 Hz"):
        hear(pool, units.source, settings(), Distortion(DistortionConfig(), sample_rate_hz=8000))


def test_a_head_learns_what_the_units_say_and_to_ignore_distortions(pool: Pool, units: SpeechUnits) -> None:
    distortion = Distortion(DistortionConfig(), sample_rate_hz=RATE_HZ, noise=white)
    run = settings(max_steps=150)
    trained = train_invariant_units(pool, units, distortion, run, width=24, kernel_size=3)
    assert isinstance(trained.assigner, UnitHead)
    assert trained.num_units == 6
    agree, edits = [], {"before": 0, "after": 0}
    for crop in hear(pool, units.source, run, distortion):
        clean = crop.variants[0].float()
        agree.append((trained.assigner.assign(clean) == units.assigner.assign(clean)).float().mean())
        for name, one in (("before", units), ("after", trained)):
            noisy = one.assigner.assign(crop.variants[3].float())
            edits[name] += int((noisy != one.assigner.assign(clean)).sum())
    assert float(torch.stack(agree).mean()) > 0.8
    assert edits["after"] < 0.6 * edits["before"]


def test_rounds_learn_from_the_round_before(pool: Pool, units: SpeechUnits, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import unit_training

    learned_from: list[list[torch.Tensor]] = []
    heads: list[UnitHead] = []

    def noted(module: Any, crops: Any, run: UnitTrainingSettings) -> None:
        learned_from.append(crops._targets)
        torch.nn.init.normal_(module.head.scores.weight)
        heads.append(module.head)

    monkeypatch.setattr(unit_training, "_fit", noted)
    distortion = Distortion(DistortionConfig(), sample_rate_hz=RATE_HZ)
    train_invariant_units(pool, units, distortion, settings(num_crops=2), num_rounds=2)
    clean = [crop.variants[0].float() for crop in hear(pool, units.source, settings(num_crops=2))]
    for targets, teacher in zip(learned_from, (units.assigner, heads[0]), strict=True):
        for target, features in zip(targets, clean, strict=True):
            assert torch.equal(target, deduplicate(teacher.assign(features))[0])
    with pytest.raises(ValueError, match="num_rounds"):
        train_invariant_units(pool, units, distortion, settings(), num_rounds=0)


@pytest.mark.parametrize("kind", ["gumbel_vq", "kmeans_vq"])
def test_predictive_units_learn(kind: str, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import unit_training

    losses: list[float] = []
    measured = unit_training.prediction_loss

    def noted(*args: Any) -> torch.Tensor:
        loss = measured(*args)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(unit_training, "prediction_loss", noted)
    source = log_mel_source(num_bands=10)
    quantizer = from_dict({"type": kind, "latent_dim": 16, "num_groups": 2, "codebook_size": 8})
    trained = train_predictive_units(pool, source, quantizer, settings(max_steps=60))
    assert losses[0] == pytest.approx(math.log(11), abs=1.5)
    assert np.mean(losses[-10:]) < math.log(11) - 0.05  # of who only guesses
    assert trained.num_units == 64
    assert isinstance(trained.assigner, PredictiveEncoder)
    trained.save(tmp_path / "units")
    audio = torch.from_numpy(speech_like(16000))[None]
    ids = trained.encode(audio)[0]
    assert len(ids.unique()) > 3
    assert torch.equal(load_units(tmp_path / "units").encode(audio)[0], ids)
    if kind == "gumbel_vq":
        assert trained.assigner.quantizer.temperature == pytest.approx(0.5)  # its end, in so short a run
    else:
        assert isinstance(trained.assigner.quantizer, KMeansVQ)


def test_runs_are_repeated_to_the_bit(pool: Pool, units: SpeechUnits) -> None:
    distortion = Distortion(DistortionConfig(), sample_rate_hz=RATE_HZ)
    first, again, other = (
        train_invariant_units(pool, units, distortion, settings(max_steps=3, num_crops=2, seed=seed), width=8)
        for seed in (0, 0, 1)
    )
    weights = first.assigner.state_dict()
    assert all(torch.equal(value, again.assigner.state_dict()[key]) for key, value in weights.items())
    assert not all(torch.equal(value, other.assigner.state_dict()[key]) for key, value in weights.items())


def test_settings_that_cannot_be_are_refused(pool: Pool) -> None:
    for changes in ({"max_steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"warmup_steps": -1}):
        with pytest.raises(ValueError, match=r"must be|not negative"):
            settings(**changes)
    quantizer = ResidualVQConfig(latent_dim=8, num_stages=1)
    with pytest.raises(ValueError, match="neither gumbel_vq nor kmeans_vq"):
        train_predictive_units(pool, log_mel_source(num_bands=4), quantizer, settings())


# Programs


TINY = ["--max-steps", "2", "--num-crops", "2", "--crop-frames", "20", "--batch-size", "2", "--width", "8"]


def trained_by_program(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_units", *map(str, args)])
    train_program.main()


def test_the_program_trains_both_kinds(
    recordings: Path, units: SpeechUnits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units.save(tmp_path / "units")
    trained_by_program(
        monkeypatch, "invariant", recordings, tmp_path / "invariant", "--units", tmp_path / "units", "--noise",
        recordings, *TINY,
    )  # fmt: skip
    assert isinstance(load_units(tmp_path / "invariant").assigner, UnitHead)
    more = ["--quantizer", "kmeans_vq", "--codebook-size", "4"]
    trained_by_program(monkeypatch, "predictive", recordings, tmp_path / "predictive", *more, *TINY)
    assert load_units(tmp_path / "predictive").num_units == 16
    with pytest.raises(SystemExit, match="holds units already"):
        trained_by_program(monkeypatch, "predictive", recordings, tmp_path / "predictive", *more, *TINY)
    with pytest.raises(SystemExit, match="--teacher needs --layer"):
        trained_by_program(monkeypatch, "predictive", recordings, tmp_path / "new", *more, "--teacher", "x")


def test_units_are_measured_on_the_same_distortions(recordings: Path, units: SpeechUnits) -> None:
    distortion = Distortion(DistortionConfig(), sample_rate_hz=RATE_HZ, noise=white)
    found = find_recordings(recordings)
    labels: dict[str, tuple[Segment, ...]] = {found[0].name: (Segment("a", 0.0, 0.5), Segment("b", 0.5, 1.0))}
    same_centroids = Centroids(CentroidsConfig(feature_dim=units.source.feature_dim, num_units=6))
    deaf = SpeechUnits(units.source, same_centroids)
    first, same, blind = measure({"one": units, "two": units, "deaf": deaf}, found, distortion, labels)
    assert first.distances == same.distances
    assert sorted(first.distances) == sorted(DISTORTIONS)
    assert 0 < first.distances["noise"].per_frame.mean < first.distances["noise"].per_unit.mean
    assert all(blind.distances[kind].per_unit.mean == 0 for kind in DISTORTIONS)
    assert (first.num_units, first.num_used, blind.num_used) == (6, 6, 1)
    assert blind.units_per_second == pytest.approx(1 / 1.5)
    assert first.purity is not None
    assert blind.purity == pytest.approx(0.5)
    assert first.purity > 0.5
    lines = table([first, same, blind]).splitlines()
    assert lines[0].split() == ["units", "of", "used", "a", "second", "purity", "PNMI", *DISTORTIONS]
    assert "+0 % (+0 %)" in lines[2]
    assert "-100 % (-100 %)" in lines[3]
    unlabelled = measure({"one": units}, found[:1], distortion, {})[0]
    assert (unlabelled.purity, unlabelled.pnmi) == (None, None)


def test_the_program_measures(recordings: Path, units: SpeechUnits, tmp_path: Path) -> None:
    units.save(tmp_path / "units")

    def measured(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-m", "tools.measure_units", *map(str, args)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = measured(recordings, "--units", tmp_path / "units", "--max-files", 1, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)[0]
    assert told["num_units"] == 6
    assert sorted(told["distances"]) == ["pitch", "reverb", "stretch"]
    wrong = measured(recordings, "--units", tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr == f"error: {tmp_path} holds no units.json: it is no folder of speech units\n"
