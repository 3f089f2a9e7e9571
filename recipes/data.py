"""What training and validation hear: batches of crops, in an order that follows from (seed, step, rank) alone.

    train_dataloader(), val_dataloader() -> batches `Batch(audio, items, places, reference, surround)`

Any number of workers, a run that was interrupted, and two processes with half the batch each see the same items.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from recipes.augment import Augmentation, AugmentConfig
from recipes.corpora import Corpus, PackedCorpus, open_corpus
from recipes.crops import Crop, Crops, Place, Pool
from recipes.recordings import Recording, Skipped

_SHOWN = 10  # skipped recordings that a warning names


class Batch(NamedTuple):
    """Crops, their numbers, where they come from, and what else `data` asks for.

    `reference`, where there are `reference_samples`: for the voice. `surround`, with `context_samples`: the crops with
    so much before and after them.
    """

    audio: Tensor  # float32 [B, C, T]
    items: Tensor  # int64 [B]
    places: tuple[Place, ...]
    reference: Tensor | None = None  # float32 [B, C, R]
    surround: Tensor | None = None  # float32 [B, C, context_samples + T + context_samples]


@dataclass(frozen=True)
class SourceSettings:
    """One source of recordings, of any kind that `recipes.corpora` knows; `split` chooses rows of a manifest.

    `weight` says how often its recordings are drawn relative to their seconds.
    """

    source: str
    weight: float = 1.0
    split: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """The section `data` of a run; see `configs/data/packed.yaml` for every value, `AugmentConfig` for its last ones.

    Training and validation take either a single source (`train_dir`, `dev_dir`) or several (`train`, `dev`).
    """

    train_dir: str | None = None
    train: list[SourceSettings] | None = None
    dev_dir: str | None = None
    dev: list[SourceSettings] | None = None
    batch_size: int = 16
    crop_samples: int = 16000
    reference_samples: int | None = None
    context_samples: int = 0
    steps_per_epoch: int = 250
    num_workers: int = 1
    corpus_weights: dict[str, float] = field(default_factory=dict)
    min_rms_db: float = -45.0
    num_dev_items: int = 32
    dev_crop_samples: int = 48000
    noise_source: str | None = None
    reverb_source: str | None = None
    loudness_lufs: float | None = None
    gain_db: list[float] = field(default_factory=lambda: [0.0, 0.0])
    noise_probability: float = 0.0
    noise_snr_db: list[float] = field(default_factory=lambda: [5.0, 30.0])
    reverb_probability: float = 0.0
    reverb_decay_ms: list[float] = field(default_factory=lambda: [100.0, 600.0])
    reverb_direct_db: list[float] = field(default_factory=lambda: [0.0, 15.0])

    def __post_init__(self) -> None:
        for name in ("batch_size", "crop_samples", "steps_per_epoch", "num_dev_items", "dev_crop_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.reference_samples is not None and self.reference_samples < 1:
            raise ValueError(f"reference_samples must be positive or null, not {self.reference_samples}")
        for name in ("context_samples", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for split in ("train", "dev"):
            if (getattr(self, split) is None) == (getattr(self, f"{split}_dir") is None):
                raise ValueError(f"{split}_dir, or else {split} with a list of sources, must be given, and not both")
            if getattr(self, split) == []:
                raise ValueError(f"{split} is an empty list of sources")
        if (self.noise_source is None) != (self.noise_probability == 0.0):
            raise ValueError("noise_source and noise_probability need each other")
        if self.reverb_source is not None and self.reverb_probability == 0.0:
            raise ValueError("reverb_source is given, but reverb_probability is 0")
        self.augment  # noqa: B018  (checks its values)

    @property
    def augment(self) -> AugmentConfig:
        """What is done to training crops."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(AugmentConfig)}
        for name, value in values.items():
            if isinstance(value, list):
                if len(value) != 2:
                    raise ValueError(f"{name} must be [lowest, highest], not {value}")
                values[name] = (value[0], value[1])
        return AugmentConfig(**values)

    def sources(self, split: str) -> list[SourceSettings]:
        """Those of "train" or "dev"; a manifest's rows are of that split where nothing else is said."""
        folder: str | None = getattr(self, f"{split}_dir")
        if folder is not None:
            return [SourceSettings(folder, split=split)]
        named: list[SourceSettings] = getattr(self, split)
        return [SourceSettings(s.source, s.weight, s.split or split) for s in named]


def parse_data(config: Any) -> DataSettings:
    """The settings in a mapping; a ValueError of one line tells the dotted path of what is wrong."""
    if isinstance(config, DataSettings):
        return config
    for split in ("train", "dev"):  # apart, since OmegaConf does not tell paths within lists
        sources = config.get(split) or []
        if isinstance(sources, str) or not all(isinstance(source, Mapping) for source in sources):
            raise ValueError(f"data.{split} must be a list of mappings with source, weight and split")
        for index, source in enumerate(sources):
            _structured(SourceSettings, source, f"data.{split}[{index}]")
    settings = _structured(DataSettings, config, "data")
    assert isinstance(settings, DataSettings)
    return settings


def _structured(settings_class: type, config: Any, path: str) -> Any:
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings_class), config))
    except OmegaConfBaseException as error:
        where = f"{path}.{error.full_key}" if error.full_key else path
        raise ValueError(f"{where}: {str(error).strip().splitlines()[0]}") from error
    except ValueError as error:
        raise ValueError(f"{path}.{str(error).splitlines()[0]}") from error


class RunSampler(Sampler[int]):
    """Item numbers of one epoch: `num_items` of them from `first_item()` on, shared out among the processes.

    The first item is asked for when an epoch begins. It follows from the steps done rather than from Lightning's count
    of epochs, which differs by one after a checkpoint is resumed.
    """

    def __init__(self, num_items: int, first_item: Callable[[], int], *, rank: int = 0, num_ranks: int = 1) -> None:
        self.num_items = num_items // num_ranks * num_ranks
        self.first_item = first_item
        self.rank = rank
        self.num_ranks = num_ranks

    def __len__(self) -> int:
        return self.num_items // self.num_ranks

    def __iter__(self) -> Iterator[int]:
        first = self.first_item()
        return iter(range(first + self.rank, first + self.num_items, self.num_ranks))


class SpeechData(pl.LightningDataModule):
    """Training crops and a fixed set of validation crops, as batches `Batch`.

    `config` is the section `data` of a run: `DataSettings`, or a mapping with its keys. The items of a step follow from
    the trainer's `global_step`. Recordings that cannot be used are warned about, and are listed in a file
    `output_dir/skipped.tsv`.

    ValueError, at the latest from `setup`, for settings that cannot be, sources without a usable recording, and
    recordings that are all shorter than a crop.
    """

    def __init__(
        self,
        config: DataSettings | Mapping[str, Any],
        *,
        sample_rate_hz: int,
        seed: int,
        num_channels: int = 1,
        output_dir: Path | None = None,
    ) -> None:
        super().__init__()
        self.settings = parse_data(config)
        self.sample_rate_hz, self.num_channels = sample_rate_hz, num_channels
        self.seed = seed
        self.output_dir = output_dir
        self._train: Crops | None = None
        self._dev: Crops | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open all sources, once. Lightning calls this in every process."""
        settings = self.settings
        if self._train is not None:
            return
        train, dev = self._pool("train"), self._pool("dev")
        skipped = [(name, s) for name, pool in (("train", train), ("dev", dev)) for s in pool.skipped]
        draw_noise = draw_room = None
        if settings.noise_source is not None:
            noise = self._open("noise_source", [SourceSettings(settings.noise_source)])
            skipped += [("noise_source", s) for s in noise.skipped]
            draw_noise = noise.draw_loop
        if settings.reverb_source is not None:
            rooms = self._open("reverb_source", [SourceSettings(settings.reverb_source)])
            skipped += [("reverb_source", s) for s in rooms.skipped]
            draw_room = rooms.draw_response
        self._report(skipped)
        augmentation = Augmentation(
            settings.augment,
            sample_rate_hz=self.sample_rate_hz,
            num_channels=self.num_channels,
            noise=draw_noise,
            room=draw_room,
        )
        level_only = Augmentation(
            AugmentConfig(loudness_lufs=settings.loudness_lufs),
            sample_rate_hz=self.sample_rate_hz,
            num_channels=self.num_channels,
        )
        self._dev = self._crops(dev, settings.dev_crop_samples, seed=0, augmentation=level_only)
        self._train = self._crops(
            train,
            settings.crop_samples,
            seed=self.seed,
            augmentation=augmentation,
            reference_samples=settings.reference_samples,
            context_samples=settings.context_samples,
        )

    def train_dataloader(self) -> DataLoader[Crop]:
        """Batches of the next epoch."""
        trainer, settings = self.trainer, self.settings
        assert trainer is not None
        items_per_step = settings.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        sampler = RunSampler(
            items_per_step * settings.steps_per_epoch,
            lambda: items_per_step * int(trainer.global_step),
            rank=trainer.global_rank,
            num_ranks=trainer.world_size,
        )
        return DataLoader(
            self.crops(),
            settings.batch_size,
            sampler=sampler,
            num_workers=settings.num_workers,
            collate_fn=collate,
            persistent_workers=settings.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Crop]:
        """The same crops in every process and every time, their level set but not augmented."""
        self.setup()
        assert self._dev is not None
        settings = self.settings
        return DataLoader(self._dev, settings.batch_size, sampler=range(settings.num_dev_items), collate_fn=collate)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lightning's hook; by itself it would try to rebuild the places."""
        others = (None if part is None else part.to(device) for part in (batch.reference, batch.surround))
        return Batch(batch.audio.to(device), batch.items.to(device), batch.places, *others)

    def crops(self) -> Crops:
        """All training items; which of them a step has is for the loader."""
        self.setup()
        assert self._train is not None
        return self._train

    def recordings(self) -> Iterator[tuple[str, Recording]]:
        """All that training can draw, each with the name of its source; validation asks no teacher."""
        return self.crops().pool.recordings()

    def _pool(self, split: str) -> Pool:
        weights = self.settings.corpus_weights if split == "train" else None
        pool = self._open(split, self.settings.sources(split), weights)
        name = "crop_samples" if split == "train" else "dev_crop_samples"
        wanted = getattr(self.settings, name)
        if pool.longest_samples < wanted:
            raise ValueError(
                f"data.{split}: all {pool.num_recordings} recordings are shorter than data.{name}={wanted}; "
                f"the longest has {pool.longest_samples} samples at {self.sample_rate_hz} Hz"
            )
        return pool

    def _open(
        self, name: str, sources: Sequence[SourceSettings], corpus_weights: Mapping[str, float] | None = None
    ) -> Pool:
        corpora: list[tuple[Corpus, float]] = []
        try:
            for source in sources:
                corpus = open_corpus(Path(source.source), split=source.split)
                if isinstance(corpus, PackedCorpus) and corpus.sample_rate_hz != self.sample_rate_hz:
                    rates = f"{corpus.sample_rate_hz} Hz, the model needs {self.sample_rate_hz} Hz"
                    raise ValueError(f"{corpus.source} is packed at {rates}")
                corpora.append((corpus, source.weight))
            return Pool(
                corpora,
                sample_rate_hz=self.sample_rate_hz,
                num_channels=self.num_channels,
                corpus_weights=corpus_weights,
            )
        except ValueError as error:
            raise ValueError(f"data.{name}: {error}") from error

    def _crops(
        self,
        pool: Pool,
        crop_samples: int,
        *,
        seed: int,
        augmentation: Augmentation,
        reference_samples: int | None = None,
        context_samples: int = 0,
    ) -> Crops:
        return Crops(
            pool,
            crop_samples=crop_samples,
            seed=seed,
            augmentation=augmentation,
            min_rms_db=self.settings.min_rms_db,
            reference_samples=reference_samples,
            context_samples=context_samples,
        )

    @rank_zero_only
    def _report(self, skipped: Sequence[tuple[str, Skipped]]) -> None:
        if not skipped:
            return
        lines = [f"{name}: {s}" for name, s in skipped[:_SHOWN]]
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            file = self.output_dir / "skipped.tsv"
            file.write_text("".join(f"{name}\t{s.row}\n" for name, s in skipped), encoding="utf-8")
            lines.append(f"all are listed in {file}")
        elif len(skipped) > _SHOWN:
            lines.append(f"and {len(skipped) - _SHOWN} more")
        message = "\n  ".join([f"{len(skipped)} recordings cannot be used and are left out:", *lines])
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def collate(crops: Sequence[Crop]) -> Batch:
    """One batch of numbered crops."""
    references = [crop.reference for crop in crops if crop.reference is not None]
    surrounds = [crop.surround for crop in crops if crop.surround is not None]
    return Batch(
        torch.stack([crop.audio for crop in crops]),
        torch.tensor([crop.item for crop in crops]),
        tuple(crop.place for crop in crops),
        torch.stack(references) if references else None,
        torch.stack(surrounds) if surrounds else None,
    )
