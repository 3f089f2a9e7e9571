"""What a token language model learns from: folders of `.codec` files, in an order that follows from (seed, step) alone.

    python -m recipes.train_lm data.train_dir=codes/train ...    # codes/train: as `codec encode` leaves it

A window is a recording, or as much of it as the model's context holds. Windows of about equal length come in one batch,
so that little of it is padding. No model of audio is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from codec.bitstream import BitstreamError, Reader
from codec.token_format import TokenFormat
from codec.token_vocabulary import Vocabulary
from codec.tokens import Tokens
from recipes.data import RunSampler

_BATCHES_PER_POOL = 8  # windows are drawn for so many batches together, and sorted by length among these


@dataclass(frozen=True, kw_only=True)
class TokenDataSettings:
    """The section `data` of a run; see `configs/lm.yaml`."""

    train_dir: str
    dev_dir: str
    batch_size: int = 16
    steps_per_epoch: int = 250
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps_per_epoch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, not {self.num_workers}")


@dataclass(frozen=True)
class CodeRecording:
    """One channel of one segment of a file."""

    file: Path
    channel: int
    first_frame: int
    num_frames: int
    global_codes: tuple[int, ...] = ()


class CodeCorpus:
    """All recordings under a folder, of files with suffix `.codec`.

    `num_quantizers` rows of codes are taken, of files with as many or more. ValueError, which names the file, for a
    file that is broken or of another codec, and where there is nothing.
    """

    def __init__(self, folder: Path, token_format: TokenFormat, num_quantizers: int) -> None:
        self.folder, self.num_quantizers = folder, num_quantizers
        self._tables = token_format.tables
        self._hop_length, self._codec_id = token_format.hop_length, token_format.codec_id
        self.recordings: list[CodeRecording] = []
        for file in sorted(folder.rglob("*.codec")):
            with self._open(file) as reader:
                header = reader.header
                if header.codec_id != token_format.codec_id:
                    raise BitstreamError(f"it was made by {header.model}, not by {token_format.model}")
                if len(header.codebook_sizes) < num_quantizers:
                    raise BitstreamError(f"it has {len(header.codebook_sizes)} rows of codes, not {num_quantizers}")
                for segment in reader.segments:
                    codes = segment.start.global_codes
                    voices = [()] * header.num_channels if codes is None else [tuple(row) for row in codes.tolist()]
                    if len(voices[0]) != token_format.num_global_codes:
                        raise BitstreamError(
                            f"it has {len(voices[0])} global codes, not {token_format.num_global_codes}"
                        )
                    self.recordings += [
                        CodeRecording(file, channel, segment.first_frame, segment.num_frames, voice)
                        for channel, voice in enumerate(voices)
                        if segment.num_frames
                    ]
        if not self.recordings:
            raise ValueError(f"there are no .codec files with any frames under {folder}")

    @cached_property
    def last_frames(self) -> np.ndarray:
        """The numbers of frames, added up from recording to recording."""
        return np.cumsum([recording.num_frames for recording in self.recordings])

    def read(self, number: int, first_frame: int, num_frames: int) -> Tokens:
        """A stretch of a recording, as a batch of one."""
        recording = self.recordings[number]
        with self._open(recording.file) as reader:
            codes = reader.read(recording.first_frame + first_frame, num_frames)
        return Tokens(
            torch.from_numpy(codes[recording.channel, : self.num_quantizers])[None],
            torch.tensor([num_frames * self._hop_length]),
            self._codec_id,
            global_codes=torch.tensor([recording.global_codes]) if recording.global_codes else None,
        )

    @contextlib.contextmanager
    def _open(self, file: Path) -> Iterator[Reader]:
        try:
            with Reader(file, tables=self._tables) as reader:
                yield reader
        except (BitstreamError, OSError) as error:
            raise ValueError(f"{file}: {error}") from error


class TokenBatches(Dataset[Tensor]):
    """Batches of ids int64 [B, S, N] by number; which recordings a batch has follows from (seed, number) alone."""

    def __init__(
        self, corpus: CodeCorpus, vocabulary: Vocabulary, *, batch_size: int, context_steps: int, seed: int
    ) -> None:
        self._corpus, self._vocabulary, self._batch_size, self._seed = corpus, vocabulary, batch_size, seed
        self._window_frames = window_frames(vocabulary, context_steps)

    def __getitem__(self, number: int) -> Tensor:
        pool, place = divmod(number, _BATCHES_PER_POOL)
        draws = np.random.default_rng([self._seed, pool])
        windows = sorted((self._draw(draws) for _ in range(_BATCHES_PER_POOL * self._batch_size)), key=lambda w: w[2])
        chosen = draws.permutation(_BATCHES_PER_POOL)[place] * self._batch_size
        return ids_of(self._corpus, self._vocabulary, windows[chosen : chosen + self._batch_size])

    def _draw(self, draws: np.random.Generator) -> tuple[int, int, int]:
        """Recording, first frame and number of frames; each frame of the corpus is about equally likely."""
        last_frames = self._corpus.last_frames
        number = int(np.searchsorted(last_frames, draws.integers(last_frames[-1]), side="right"))
        num_frames = min(self._window_frames, self._corpus.recordings[number].num_frames)
        first = int(draws.integers(self._corpus.recordings[number].num_frames - num_frames + 1))
        return number, first, num_frames


def window_frames(vocabulary: Vocabulary, context_steps: int) -> int:
    """The most frames, in whole blocks, whose ids a context holds: all but the last of these are read."""
    block_frames = vocabulary.block_frames or 1
    return vocabulary.max_frames(context_steps + 1) // block_frames * block_frames


def all_windows(corpus: CodeCorpus, vocabulary: Vocabulary, context_steps: int) -> list[tuple[int, int, int]]:
    """Every frame of a corpus once, in windows sorted by length: recording, first frame, number of frames."""
    longest = window_frames(vocabulary, context_steps)
    return sorted(
        (
            (number, first, min(longest, recording.num_frames - first))
            for number, recording in enumerate(corpus.recordings)
            for first in range(0, recording.num_frames, longest)
        ),
        key=lambda window: window[2],
    )


def ids_of(corpus: CodeCorpus, vocabulary: Vocabulary, windows: list[tuple[int, int, int]]) -> Tensor:
    """Windows -> ids int64 [B, S, N], filled up with padding. Only those that reach the end of a recording have one."""
    rows = []
    for number, first, num_frames in windows:
        tokens = corpus.read(number, first, num_frames)
        is_end = first + num_frames == corpus.recordings[number].num_frames
        rows.append((vocabulary.encode(tokens) if is_end else vocabulary.prompt(tokens))[0])
    longest = max(row.shape[1] for row in rows)
    pad = torch.nn.functional.pad
    return torch.stack([pad(row, (0, longest - row.shape[1]), value=vocabulary.pad_id) for row in rows])


class TokenData(pl.LightningDataModule):
    """Batches of ids: training ones drawn, validation ones all frames of `dev_dir`, each once.

    The batches of a step follow from the trainer's `global_step`.
    """

    def __init__(
        self,
        settings: TokenDataSettings,
        train: CodeCorpus,
        dev: CodeCorpus,
        vocabulary: Vocabulary,
        *,
        context_steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings, self.vocabulary = settings, vocabulary
        self._train, self._dev, self._context_steps, self._seed = train, dev, context_steps, seed

    def train_dataloader(self) -> DataLoader[Tensor]:
        """The batches of the next epoch; process r of n has every n-th."""
        trainer, settings = self.trainer, self.settings
        assert trainer is not None
        batches = TokenBatches(
            self._train,
            self.vocabulary,
            batch_size=settings.batch_size,
            context_steps=self._context_steps,
            seed=self._seed,
        )
        first: Callable[[], int] = lambda: trainer.world_size * int(trainer.global_step)  # noqa: E731
        sampler = RunSampler(
            trainer.world_size * settings.steps_per_epoch, first, rank=trainer.global_rank, num_ranks=trainer.world_size
        )
        return DataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=settings.num_workers,
            persistent_workers=settings.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[list[tuple[int, int, int]]]:
        """The same windows in every process."""
        windows = all_windows(self._dev, self.vocabulary, self._context_steps)
        return DataLoader(
            windows,  # type: ignore[arg-type]
            self.settings.batch_size,
            collate_fn=lambda chosen: ids_of(self._dev, self.vocabulary, chosen),
        )
