"""Training audio: one flat int16 file on disk, random crops out of it.

Decoding thousands of small compressed files in every epoch costs more CPU than the model does, so
`pack_audio` decodes and resamples everything once into `audio.i16` with an `index.json` beside it.
Crops are drawn by (seed, item), so a run that is resumed sees the data it would have seen.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import soundfile
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from codec.audio import find_audio, resample


@dataclass(frozen=True)
class Clip:
    """One recording inside a packed file: where it lies and where it came from."""

    path: str
    corpus: str
    speaker: str
    text: str
    first_sample: int
    num_samples: int


@dataclass(frozen=True)
class _Source:
    file: Path
    path: str
    corpus: str = "audio"
    speaker: str = ""
    text: str = ""


def _sources(source: Path, split: str) -> list[_Source]:
    """Recordings named by a manifest (7 tab-separated columns, see `pack_audio`) or found under a folder."""
    if source.is_dir():
        return [_Source(f, str(f.relative_to(source)), speaker=f.parent.name) for f in find_audio(source)]
    if not source.is_file():
        raise ValueError(f"{source} is neither a folder of audio nor a manifest")
    with source.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if any(len(row) != 7 for row in rows):
        raise ValueError(f"{source}: every line must have 7 tab-separated columns")
    found = [_Source(source.parent / r[0], r[0], r[2], r[3], r[6]) for r in rows if r[1] == split]
    if not found:
        raise ValueError(f"{source} has no rows of split {split!r} (it has {sorted({r[1] for r in rows})})")
    return found


def _decode(source: _Source, sample_rate_hz: int) -> np.ndarray:
    audio, rate_hz = soundfile.read(source.file, dtype="float32", always_2d=True)
    mono = resample(audio.mean(axis=1)[None], rate_hz, sample_rate_hz)[0]
    samples: np.ndarray = np.clip(np.round(mono * 32767.0), -32768, 32767).astype(np.int16)
    return samples


def pack_audio(source: Path, out: Path, *, sample_rate_hz: int, split: str = "train", num_workers: int = 1) -> int:
    """Decode, mix down and resample recordings into `out/audio.i16` and `out/index.json`; return the sample count.

    `source` is a folder of audio files or a manifest without header whose tab-separated columns are path (relative to
    the manifest), split, corpus, speaker, rate, seconds, text. Raises ValueError where it is neither.
    """
    sources = _sources(source, split)
    out.mkdir(parents=True, exist_ok=True)
    clips: list[Clip] = []
    total = 0
    partial_file = out / "audio.i16.partial"
    with partial_file.open("wb") as packed, ProcessPoolExecutor(num_workers) as pool:
        decoded: Iterator[np.ndarray] = pool.map(partial(_decode, sample_rate_hz=sample_rate_hz), sources, chunksize=8)
        for item, audio in zip(sources, decoded, strict=True):
            packed.write(audio.tobytes())
            clips.append(Clip(item.path, item.corpus, item.speaker, item.text, total, len(audio)))
            total += len(audio)
    partial_file.replace(out / "audio.i16")
    index = {"sample_rate_hz": sample_rate_hz, "num_samples": total, "clips": [asdict(c) for c in clips]}
    (out / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


class PackedSpeech(Dataset[Tensor]):
    """Random crops of a packed set: item i is a float32 tensor [1, crop_samples] in -1..1, drawn by (seed, i).

    There is no end to the items; `RunSampler` says which ones an epoch has. `corpus_weights` scales how often a
    corpus is drawn relative to its size in samples (1.0 where unnamed; 0 leaves it out). A crop whose RMS is below
    `min_rms_db` is drawn again, up to three times, so that long silences are seen but do not fill the batches. Gain is
    drawn uniformly in decibels from `gain_db`, and held back where it would clip.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sample_rate_hz: int,
        crop_samples: int,
        seed: int,
        corpus_weights: Mapping[str, float] | None = None,
        min_rms_db: float = -45.0,
        gain_db: Sequence[float] = (0.0, 0.0),
    ) -> None:
        if not (folder / "index.json").is_file():
            raise ValueError(
                f"{folder} holds no packed audio; make it with: python -m tools.prepare_data SOURCE {folder}"
            )
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["sample_rate_hz"] != sample_rate_hz:
            raise ValueError(f"{folder} is packed at {index['sample_rate_hz']} Hz, the model needs {sample_rate_hz} Hz")
        self.clips = [Clip(**c) for c in index["clips"]]
        weights = dict(corpus_weights or {})
        unknown = set(weights) - {c.corpus for c in self.clips}
        if unknown:
            raise ValueError(f"corpus_weights names {sorted(unknown)}, which {folder} does not hold")
        mass = np.array([c.num_samples * weights.get(c.corpus, 1.0) for c in self.clips])
        if mass.sum() <= 0:
            raise ValueError(f"{folder}: corpus_weights leave nothing to draw")
        self._cumulative = np.cumsum(mass) / mass.sum()
        self._audio = np.memmap(folder / "audio.i16", dtype=np.int16, mode="r", shape=(index["num_samples"],))
        self.crop_samples = crop_samples
        self.seed = seed
        self.min_rms = 10.0 ** (min_rms_db / 20.0)
        self.gain_db = (float(gain_db[0]), float(gain_db[1]))

    def __getitem__(self, item: int) -> Tensor:
        rng = np.random.default_rng((self.seed, item))
        crop = self._crop(rng)
        for _ in range(3):
            if np.sqrt(np.mean(np.square(crop))) >= self.min_rms:
                break
            crop = self._crop(rng)
        gain = 10.0 ** (rng.uniform(*self.gain_db) / 20.0)
        peak = float(np.abs(crop).max())
        return torch.from_numpy(crop * np.float32(min(gain, 1.0 / max(peak, 1e-6))))[None]

    def _crop(self, rng: np.random.Generator) -> np.ndarray:
        clip = self.clips[min(int(np.searchsorted(self._cumulative, rng.random(), side="right")), len(self.clips) - 1)]
        slack = clip.num_samples - self.crop_samples
        start = clip.first_sample + (int(rng.integers(slack + 1)) if slack > 0 else 0)
        crop = self._audio[start : start + min(self.crop_samples, clip.num_samples)].astype(np.float32) / 32768.0
        if slack < 0:
            crop = np.pad(crop, (0, -slack))
        return crop


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
    """Training crops from `train_dir` and a fixed set of validation crops from `dev_dir`, both packed."""

    def __init__(self, config: DictConfig, *, sample_rate_hz: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.sample_rate_hz = sample_rate_hz
        self.seed = seed

    def train_dataloader(self) -> DataLoader[Tensor]:
        trainer, config = self.trainer, self.config
        assert trainer is not None
        items_per_step = config.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        dataset = PackedSpeech(
            Path(config.train_dir),
            sample_rate_hz=self.sample_rate_hz,
            crop_samples=config.crop_samples,
            seed=self.seed,
            corpus_weights=config.corpus_weights,
            min_rms_db=config.min_rms_db,
            gain_db=config.gain_db,
        )
        sampler = RunSampler(
            items_per_step * config.steps_per_epoch,
            lambda: items_per_step * int(trainer.global_step),
            rank=trainer.global_rank,
            num_ranks=trainer.world_size,
        )
        return DataLoader(dataset, config.batch_size, sampler=sampler, num_workers=config.num_workers)

    def val_dataloader(self) -> DataLoader[Tensor]:
        config = self.config
        dataset = PackedSpeech(
            Path(config.dev_dir), sample_rate_hz=self.sample_rate_hz, crop_samples=config.dev_crop_samples, seed=0
        )
        return DataLoader(dataset, config.batch_size, sampler=range(config.num_dev_items))
