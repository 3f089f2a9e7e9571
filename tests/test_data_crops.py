"""Crops follow from (seed, item) alone, whatever rate, channels and source; order from (seed, step, rank)."""

import pickle
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import soundfile
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from codec.audio import AudioError, resample
from codec.testing import speech_like
from recipes.augment import Augmentation, AugmentConfig
from recipes.corpora import PackedCorpus, open_corpus
from recipes.crops import Crops, Pool
from recipes.data import Batch, DataSettings, RunSampler, SourceSettings, SpeechData, parse_data
from recipes.packing import pack_audio, write_shards

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five recordings of three rates and of one or two channels."""
    folder = tmp_path_factory.mktemp("audio")
    for index, rate_hz in enumerate((16000, 8000, 16000, 44100)):
        soundfile.write(folder / f"{index}.wav", speech_like(2 * rate_hz, rate_hz=rate_hz, seed=index), rate_hz)
    stereo = np.stack([speech_like(32000, seed=seed) for seed in (8, 9)], axis=1)
    soundfile.write(folder / "stereo.flac", stereo, 16000)
    return folder


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pack_audio(folder, out, sample_rate_hz=16000)
    return out


def _pool(source: Path, rate_hz: int = 16000, num_channels: int = 1, **options: Any) -> Pool:
    return Pool([(open_corpus(source), 1.0)], sample_rate_hz=rate_hz, num_channels=num_channels, **options)


def _crops(pool: Pool, *, crop_samples: int = 2000, seed: int = 0, min_rms_db: float = -45.0, **config: Any) -> Crops:
    augmentation = Augmentation(
        AugmentConfig(**config), sample_rate_hz=pool.sample_rate_hz, num_channels=pool.num_channels
    )
    return Crops(pool, crop_samples=crop_samples, seed=seed, augmentation=augmentation, min_rms_db=min_rms_db)


def _data(train_dir: Path | None, dev_dir: Path | None = None, **settings: Any) -> SpeechData:
    values = {
        "train_dir": None if train_dir is None else str(train_dir),
        "dev_dir": str(dev_dir or train_dir),
        "batch_size": 3,
        "crop_samples": 1000,
        "dev_crop_samples": 1000,
        "steps_per_epoch": 3,
        "num_workers": 0,
        "num_dev_items": 4,
    }
    return SpeechData(values | settings, sample_rate_hz=16000, seed=7)


def _batches(data: SpeechData, *, step: int = 0, rank: int = 0, num_ranks: int = 1) -> list[Batch]:
    """One epoch, as Lightning would have it on this rank."""
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=num_ranks, global_rank=rank, global_step=step, accumulate_grad_batches=1
    )
    return list(data.train_dataloader())  # type: ignore[arg-type]


# One crop


def test_crops_depend_on_seed_and_number_alone(folder: Path, packed: Path) -> None:
    for source in (folder, packed):
        one, two, other = (_crops(_pool(source), seed=seed, gain_db=(-6.0, 3.0)) for seed in (1, 1, 2))
        for item in (5, 0, 10**12):
            assert torch.equal(one[item][0], two[item][0])
            assert one[item][1] == item
        assert not torch.equal(one[5][0], one[0][0])
        assert any(one[i][2] != other[i][2] for i in range(5))
        assert one[0][0].shape == (1, 2000)
        assert one[0][0].dtype == torch.float32
        assert all(float(one[i][0].abs().max()) <= 1.0 for i in range(20))


def test_augmentation_changes_what_is_heard_and_not_which_crop_it_is(folder: Path) -> None:
    pool = _pool(folder)
    plain, louder = _crops(pool), _crops(pool, gain_db=(-3.0, -2.0), reverb_probability=0.5)
    assert [plain[i][2] for i in range(8)] == [louder[i][2] for i in range(8)]
    assert all(not torch.equal(plain[i][0], louder[i][0]) for i in range(8))


def test_places_tell_the_file_and_the_sample_there(folder: Path) -> None:
    pool = _pool(folder)
    crops = _crops(pool, crop_samples=500)
    seen = set()
    for item in range(30):
        place = crops[item][2]
        seen.add(place.recording.path)
        whole, rate_hz = soundfile.read(folder / place.recording.path, dtype="float32", always_2d=True)
        assert str(place) == f"{place.recording.path} of {folder} from sample {place.first_sample}"
        if rate_hz == 16000:
            mono = whole.mean(axis=1)[place.first_sample : place.first_sample + 500]
            assert np.allclose(crops[item][0][0], mono, atol=1e-6)  # the mean of two channels is rounded
        else:
            assert 0 <= place.first_sample <= len(whole) - 500 * rate_hz // 16000
    assert len(seen) == 5


@cache
def _noise_at(folder: Path, from_hz: int, to_hz: int) -> tuple[Pool, np.ndarray]:
    """A file of a second and of one rate, and all of it at the other."""
    file = folder / f"{from_hz}-{to_hz}" / "a.wav"
    file.parent.mkdir(parents=True)
    noise = 0.2 * np.random.default_rng(0).standard_normal(from_hz)
    soundfile.write(file, noise, from_hz, subtype="FLOAT")
    return _pool(file.parent, to_hz), resample(soundfile.read(file, dtype="float32")[0][None], from_hz, to_hz)[0]


@given(
    rates=st.sampled_from(
        [(8000, 16000), (44100, 16000), (48000, 16000), (22050, 24000), (16000, 44100), (11025, 8000)]
    ),
    seed=st.integers(0, 50),
    num_samples=st.sampled_from([1, 37, 1000]),
    num_before=st.sampled_from([0, 300]),
)
@example(rates=(44100, 16001), seed=0, num_samples=500, num_before=0)  # rates without a common divisor
def test_a_crop_is_resampled_as_the_whole_file_is(
    rates: tuple[int, int], seed: int, num_samples: int, num_before: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """To 1e-5 of full scale: -100 dB; without context it would be off by -20 to -35 dB at the edges."""
    from_hz, to_hz = rates
    pool, whole = _noise_at(tmp_path_factory.getbasetemp() / "noise", from_hz, to_hz)
    (crop,), place = pool.draw(np.random.default_rng(seed), num_samples, num_before)
    assert len(crop) == num_before + num_samples
    padded = np.concatenate([np.zeros(num_before, np.float32), whole])
    first = place.first_sample * to_hz // from_hz  # the place was rounded to the file's own rate
    starts = range(first, min(first + to_hz // from_hz + 2, len(whole) - num_samples + 1))
    assert min(np.abs(padded[start : start + len(crop)] - crop).max() for start in starts) < 1e-5


def test_channels_are_mixed_down_or_repeated(folder: Path, tmp_path: Path) -> None:
    stereo = soundfile.read(folder / "stereo.flac", dtype="float32")[0].T
    for index in range(40):
        rng = np.random.default_rng(index)
        both, place = _pool(folder, num_channels=2).draw(rng, 100)
        if place.recording.path == "stereo.flac":
            assert np.array_equal(both, stereo[:, place.first_sample : place.first_sample + 100])
        else:
            assert np.array_equal(both[0], both[1])
    three = np.zeros((500, 3)) + 0.1
    soundfile.write(tmp_path / "three.wav", three, 16000)
    soundfile.write(tmp_path / "one.wav", three[:, 0], 16000)
    assert _pool(tmp_path).num_recordings == 2
    pool = _pool(tmp_path, num_channels=2)
    assert [str(skipped) for skipped in pool.skipped] == ["three.wav: it has 3 channels, neither 1 nor 2"]
    assert pool.num_recordings == 1


def test_short_recordings_are_padded_and_quiet_crops_drawn_again(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", speech_like(1500, rate_hz=8000), 8000)
    long = _crops(_pool(tmp_path), crop_samples=5000)[0][0]
    assert long.shape == (1, 5000)
    assert long[0, :2900].abs().max() > 0.01
    assert not long[0, 3000:].any()
    mostly_silent = np.zeros(40000)
    mostly_silent[:20000] = speech_like(20000)
    soundfile.write(tmp_path / "a.wav", mostly_silent, 16000)
    pool = _pool(tmp_path)

    def num_silent(crops: Crops) -> int:
        return sum(not crops[i][0].any() for i in range(200))

    # Half of all crops are silent; with three more draws it is a sixteenth.
    assert 60 < num_silent(_crops(pool, crop_samples=200, min_rms_db=-1000.0)) < 140
    assert 0 < num_silent(_crops(pool, crop_samples=200)) < 40


def test_weights_say_how_often_seconds_are_drawn(folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", speech_like(6 * 8000, rate_hz=8000), 8000)
    soundfile.write(tmp_path / "short.wav", speech_like(2 * 16000), 16000)
    (tmp_path / "list.tsv").write_text("path\tcorpus\nlong.wav\tlong\nshort.wav\tshort\n")
    corpus, other = open_corpus(tmp_path / "list.tsv"), open_corpus(folder)  # 6 + 2 s, 10 s

    def shares(*corpora: Any, **weights: float) -> dict[str, float]:
        pool = Pool(corpora, sample_rate_hz=16000, corpus_weights=weights)
        rng = np.random.default_rng(0)
        drawn = [pool.draw(rng, 100)[1].recording.corpus for _ in range(1000)]
        return {name: drawn.count(name) / len(drawn) for name in set(drawn)}

    # 1000 draws: a share's standard deviation is 0.016 at most.
    assert shares((corpus, 1.0)) == pytest.approx({"long": 0.75, "short": 0.25}, abs=0.05)
    assert shares((corpus, 1.0), short=9.0) == pytest.approx({"long": 0.25, "short": 0.75}, abs=0.05)
    both = shares((corpus, 5.0), (other, 1.0), long=0.0)
    assert both == pytest.approx({"short": 0.5, "audio": 0.5}, abs=0.05)
    assert shares((corpus, 0.0), (other, 0.1)) == {"audio": 1.0}
    for weights, message in [({"x": 1.0}, r"names \['x'\]"), ({"long": -1.0}, "not -1"), ({"long": np.inf}, "not inf")]:
        with pytest.raises(ValueError, match=message):
            shares((corpus, 1.0), **weights)
    with pytest.raises(ValueError, match="leave nothing to draw"):
        shares((corpus, 0.0))


def test_a_file_that_breaks_is_warned_about_and_replaced_by_the_next_draw(tmp_path: Path) -> None:
    for index in range(4):
        soundfile.write(tmp_path / f"{index}.wav", speech_like(4000, seed=index), 16000)
    crops = _crops(_pool(tmp_path), crop_samples=500)
    before = {item: (crops[item][0], crops[item][2].recording.path) for item in range(40)}
    (tmp_path / "2.wav").unlink()
    with pytest.warns(RuntimeWarning, match=r"^2\.wav: no such file; another recording takes its place$") as caught:
        after = {item: crops[item][0] for item in range(40)}
    assert len(caught) == 1  # once is enough
    replaced = [item for item, (_, path) in before.items() if path == "2.wav"]
    assert 0 < len(replaced) < 40
    for item, (audio, _) in before.items():
        assert torch.equal(after[item], audio) == (item not in replaced)
        assert torch.equal(crops[item][0], after[item])
        assert crops[item][2].recording.path != "2.wav"
    for index in (0, 1, 3):
        (tmp_path / f"{index}.wav").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AudioError, match="20 recordings in a row could not be read, the last: "):
            crops[0]


def test_crops_travel_to_other_processes(folder: Path, packed: Path) -> None:
    for source in (folder, packed):
        crops = _crops(_pool(source), reverb_probability=0.5)
        before = crops[3][0]
        data = pickle.dumps(crops)
        assert len(data) < 10_000
        assert torch.equal(pickle.loads(data)[3][0], before)


# The order


def test_ranks_share_an_epoch_without_overlap() -> None:
    samplers = [RunSampler(10, lambda: 30, rank=rank, num_ranks=2) for rank in range(2)]
    assert sorted(item for sampler in samplers for item in sampler) == list(range(30, 40))
    samplers = [RunSampler(11, lambda: 30, rank=rank, num_ranks=4) for rank in range(4)]
    assert {len(list(sampler)) for sampler in samplers} == {len(sampler) for sampler in samplers} == {2}


def test_any_number_of_workers_gives_the_same_bits(folder: Path) -> None:
    settings = {"reverb_probability": 0.5, "gain_db": [-6.0, 3.0]}
    by_workers = [_batches(_data(folder, num_workers=n, **settings), step=5) for n in (0, 1, 2)]
    for batches in by_workers:
        assert [batch.items.tolist() for batch in batches] == [[15, 16, 17], [18, 19, 20], [21, 22, 23]]
        for batch, expected in zip(batches, by_workers[0], strict=True):
            assert batch.audio.shape == (3, 1, 1000)
            assert batch.items.dtype == torch.int64
            assert torch.equal(batch.audio, expected.audio)


def test_two_processes_see_what_one_with_twice_the_batch_sees(packed: Path) -> None:
    whole = _batches(_data(packed, batch_size=6), step=4)
    ranks = [_batches(_data(packed, batch_size=3), step=4, rank=rank, num_ranks=2) for rank in range(2)]
    assert len(whole) == len(ranks[0]) == len(ranks[1]) == 3
    for step, one in enumerate(whole):
        items = torch.cat([rank[step].items for rank in ranks])
        audio = torch.cat([rank[step].audio for rank in ranks])
        order = items.argsort()
        assert torch.equal(items[order], one.items)
        assert torch.equal(audio[order], one.audio)


def test_sources_of_every_kind_hold_the_same_crops(folder: Path, packed: Path, tmp_path: Path) -> None:
    """Packed or in shards, the crops are those of the files, to the rounding to 16 bits."""
    write_shards(folder, tmp_path / "shards", sample_rate_hz=16000, shard_bytes=10_000)
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 1
    files, flat, shards = (_crops(_pool(source)) for source in (folder, packed, tmp_path / "shards"))
    for item in range(20):
        # Rates of 8 and 44.1 kHz: -100 dB of resampling from the middle besides.
        assert torch.allclose(flat[item][0], files[item][0], rtol=0, atol=2.0 / 32768)
        assert torch.equal(shards[item][0], flat[item][0])


class _Listener(pl.LightningModule):
    """Learns nothing; writes down what it hears."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.items: list[list[int]] = []
        self.stop_after = stop_after

    def training_step(self, batch: Batch, batch_index: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.items.append(batch.items.tolist())
        return self.weight.sum()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == self.stop_after:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_hears_what_the_whole_one_would_have(packed: Path, tmp_path: Path, num_workers: int) -> None:
    """Interrupted in the middle of an epoch of three steps."""

    def run(listener: _Listener, checkpoint: Path | None) -> pl.Trainer:
        trainer = pl.Trainer(
            max_steps=8,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        with warnings.catch_warnings():
            for expected in ("your dataloader is not resumable", "have no `validation_step`"):
                warnings.filterwarnings("ignore", message=f".*{expected}.*")
            trainer.fit(listener, _data(packed, num_workers=num_workers), ckpt_path=checkpoint, weights_only=True)
        return trainer

    whole, first, second = _Listener(), _Listener(stop_after=4), _Listener()
    run(whole, None)
    run(first, None).save_checkpoint(tmp_path / "middle.ckpt")
    run(second, tmp_path / "middle.ckpt")
    assert whole.items == [[3 * step, 3 * step + 1, 3 * step + 2] for step in range(8)]
    assert first.items == whole.items[:4]
    assert second.items == whole.items[4:]


def test_validation_hears_the_same_crops_whatever_the_seed_and_their_level_alone_is_changed(packed: Path) -> None:
    settings = {"gain_db": [-20.0, -20.0], "reverb_probability": 1.0}
    batches = list(_data(packed, **settings).val_dataloader())
    assert [batch.items.tolist() for batch in batches] == [[0, 1, 2], [3]]
    crops = _crops(_pool(packed), crop_samples=1000, seed=0)
    for item, audio in enumerate(torch.cat([batch.audio for batch in batches])):
        assert torch.equal(audio, crops[item][0])
    quiet = torch.cat([batch.audio for batch in _data(packed, loudness_lufs=-40.0).val_dataloader()])
    assert float(quiet.abs().max()) < 0.1


def test_batches_tell_where_their_crops_come_from(packed: Path) -> None:
    data, corpus = _data(packed), PackedCorpus(packed)
    batch = next(iter(data.val_dataloader()))
    for audio, place in zip(batch.audio, batch.places, strict=True):
        assert f"of {packed} from sample {place.first_sample}" in str(place)
        assert place.first_second == place.first_sample / place.recording.sample_rate_hz
        number = corpus.recordings.index(place.recording)
        assert np.array_equal(corpus.read(number, place.first_sample, audio.shape[1]), audio.numpy())


# Settings, and what is wrong with them


def test_several_sources_have_weights_and_splits(packed: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "new.wav", speech_like(20000), 16000)
    manifest = tmp_path / "list.tsv"
    manifest.write_text("path\tsplit\nnew.wav\tother\n")
    sources = [{"source": str(packed), "weight": 0.0}, {"source": str(manifest), "split": "other"}]
    data = _data(None, packed, train=sources)
    batches = _batches(data)
    assert {place.recording.path for batch in batches for place in batch.places} == {"new.wav"}
    with pytest.raises(ValueError, match=r"data\.train: .* has no rows of split 'train'"):
        _data(manifest, packed).setup()


def test_noise_and_rooms_come_from_sources_of_their_own(folder: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    (tmp_path / "rooms").mkdir()
    soundfile.write(tmp_path / "noise" / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(300), 8000)
    response = np.zeros(200)
    response[50], response[150] = 0.5, 0.25
    soundfile.write(tmp_path / "rooms" / "a.wav", response, 16000, subtype="FLOAT")
    plain = _batches(_data(packed))[0].audio
    noisy = _data(packed, noise_source=str(tmp_path / "noise"), noise_probability=1.0, noise_snr_db=[10.0, 10.0])
    noise = _batches(noisy)[0].audio - plain
    snr_db = 10 * (plain.square().mean((1, 2)) / noise.square().mean((1, 2))).log10()
    assert torch.allclose(snr_db, torch.full((3,), 10.0), atol=0.01)
    wet = _data(packed, reverb_source=str(tmp_path / "rooms"), reverb_probability=1.0, min_rms_db=-1000.0)
    pool = _pool(packed)
    for audio, item in zip(_batches(wet)[0].audio, range(3), strict=True):
        dry = pool.draw(np.random.default_rng((7, item)), 1000, 149)[0]
        expected = dry[:, 149:] + 0.5 * dry[:, 49:-100]  # the direct sound, and half of what was heard 100 before
        expected *= np.sqrt(np.square(dry[:, 149:]).mean() / np.square(expected).mean())
        assert np.abs(audio.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_sample": 5}, r"data\.crop_sample: Key 'crop_sample' not in 'DataSettings'"),
        ({"crop_samples": "x"}, r"data\.crop_samples: "),
        ({"train": [{"source": "x", "wieght": 1}], "train_dir": None}, r"data\.train\[0\]\.wieght: "),
        ({"train": [{"weight": 1}], "train_dir": None}, r"data\.train\[0\]\..*source"),
        ({"train": ["x"], "train_dir": None}, r"data\.train must be a list of mappings"),
        ({"dev": "x", "dev_dir": None}, r"data\.dev must be a list of mappings"),
        ({"batch_size": 0}, r"data\.batch_size must be positive, not 0"),
        ({"num_workers": -1}, r"data\.num_workers must not be negative"),
        ({"train_dir": None}, r"data\.train_dir, or else train with a list of sources, must be given"),
        ({"train": [{"source": "x"}]}, "must be given, and not both"),
        ({"dev_dir": None, "dev": []}, r"data\.dev is an empty list"),
        ({"gain_db": [1.0]}, r"data\.gain_db must be \[lowest, highest\]"),
        ({"gain_db": [3.0, -3.0]}, r"data\.gain_db must be \[lowest, highest\]"),
        ({"noise_probability": 0.5}, r"data\.noise_source and noise_probability need each other"),
        ({"noise_source": "x"}, r"data\.noise_source and noise_probability need each other"),
        ({"reverb_source": "x"}, r"data\.reverb_source is given, but reverb_probability is 0"),
        ({"reverb_probability": 1.5}, r"data\.reverb_probability must lie in 0\.\.1, not 1\.5"),
        ({"reverb_decay_ms": [0.0, 1.0]}, r"data\.reverb_decay_ms must be positive"),
        ({"loudness_lufs": 3.0}, r"data\.loudness_lufs must lie in -70\.\.0"),
    ],
)
def test_settings_that_cannot_be_are_one_line_with_their_path(values: dict[str, Any], message: str) -> None:
    config = {"train_dir": "a", "dev_dir": "b"} | values
    for form in (config, OmegaConf.create(config)):
        with pytest.raises(ValueError, match=message) as caught:
            parse_data(form)
        assert "\n" not in str(caught.value)


def test_the_file_of_settings_lists_all_of_them_with_values_that_can_be() -> None:
    config = OmegaConf.load(CONFIGS / "data" / "packed.yaml")
    settings = parse_data(OmegaConf.merge(config, {"train_dir": "a", "dev": [{"source": "b"}]}))
    assert settings.sources("train") == [SourceSettings("a", split="train")]
    assert settings.sources("dev") == [SourceSettings("b", 1.0, "dev")]
    assert set(config) == set(DataSettings.__dataclass_fields__)
    assert parse_data(settings) is settings


def test_sources_that_cannot_be_used_are_errors_before_the_first_step(
    folder: Path, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.tsv").write_text("")
    (tmp_path / "missing.tsv").write_text("path\nx.wav\n")
    for train, message in {
        tmp_path / "nothing": r"data\.train: .*nothing is neither a folder",
        tmp_path / "empty": r"data\.train: no audio files under",
        tmp_path / "empty.tsv": r"data\.train: .*names no recordings",
        tmp_path / "missing.tsv": r"data\.train: .*names 1 files that are not there, the first: x\.wav",
    }.items():
        with pytest.raises(ValueError, match=message):
            _data(train, packed).setup()
    too_short = r"data\.train: all 5 recordings are shorter than data\.crop_samples=32001; the longest has 32000 "
    for source in (folder, packed):
        with pytest.raises(ValueError, match=too_short):
            _data(source, crop_samples=32001).setup()
    with pytest.raises(ValueError, match=r"data\.dev: all 5 recordings are shorter than data\.dev_crop_samples=32001"):
        _data(packed, dev_crop_samples=32001).setup()
    with pytest.raises(ValueError, match="is packed at 16000 Hz, the model needs 24000 Hz"):
        SpeechData({"train_dir": str(packed), "dev_dir": str(packed)}, sample_rate_hz=24000, seed=0).setup()
    with pytest.raises(ValueError, match=r"data\.noise_source: .*nothing is neither"):
        _data(packed, noise_source=str(tmp_path / "nothing"), noise_probability=0.1).setup()
    with pytest.raises(ValueError, match=r"data\.reverb_source: .*nothing is neither"):
        _data(packed, reverb_source=str(tmp_path / "nothing"), reverb_probability=0.1).setup()


@pytest.fixture
def with_broken(tmp_path: Path) -> Path:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for index in range(12):
        (mixed / f"{index:02d}.flac").write_bytes(b"")
    soundfile.write(mixed / "good.wav", speech_like(20000), 16000)
    return mixed


def test_unreadable_files_are_reported_once_and_listed(with_broken: Path, packed: Path, tmp_path: Path) -> None:
    data = _data(with_broken, packed)
    with pytest.warns(RuntimeWarning, match="12 recordings cannot be used") as caught:
        data.setup()
    data.setup()
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "train: 00.flac: is empty" in text
    assert "09.flac" in text
    assert "10.flac" not in text
    assert "and 2 more" in text
    data = _data(with_broken, packed)
    data.output_dir = tmp_path / "run"
    with pytest.warns(RuntimeWarning, match=r"all are listed in .*skipped\.tsv"):
        data.setup()
    rows = (tmp_path / "run" / "skipped.tsv").read_text().splitlines()
    assert len(rows) == 12
    assert rows[11] == "train\t11.flac\tis empty"
