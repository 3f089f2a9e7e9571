"""Speech units as they are used: trained, saved, loaded, applied to audio.

A folder holds `units.json`, which says what features they are of, down to the version of the model, and how features
become units; and `units.safetensors`. Nothing is unpickled, and loading runs no code but registered constructors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from codec import config as codec_config
from codec.config import register
from codec.files import new_folder
from codec.units.assigners import Assigner, AssignerConfig, Centroids, CentroidsConfig
from codec.units.clustering import kmeans
from codec.units.sources import CodecSourceConfig, SpeechModelSourceConfig, UnitSource, UnitSourceConfig

CONFIG, WEIGHTS = "units.json", "units.safetensors"
MAX_FRAMES = 100_000  # that k-means learns from, by default


@dataclass(frozen=True, kw_only=True)
class SpeechUnitsConfig:
    """What `units.json` holds. The first two follow from the others, and are there for readers of the file."""

    num_units: int
    frame_rate_hz: float
    source: UnitSourceConfig
    assigner: AssignerConfig


@register("speech_units", SpeechUnitsConfig)
class SpeechUnits:
    """Features of a source, and an assigner that makes units of them. ValueError where these do not fit.

    >>> from codec.testing import speech_like
    >>> from codec.units.sources import log_mel_source
    >>> speech = torch.from_numpy(speech_like(16000))
    >>> units = train_units(log_mel_source(), [speech], 4)
    >>> ids, num_frames = units.encode(torch.stack([speech, -speech]), torch.tensor([16000, 8000]))
    >>> ids.shape, num_frames.tolist(), ids[1, 25:].unique().tolist()
    (torch.Size([2, 50]), [50, 25], [-1])
    """

    def __init__(self, source: UnitSource, assigner: Assigner) -> None:
        if source.feature_dim != assigner.config.feature_dim:
            raise ValueError(
                f"{source.name} has {source.feature_dim} dims, these units are of {assigner.config.feature_dim}"
            )
        self.source = source
        self.assigner = assigner.eval().requires_grad_(False)
        self.sample_rate_hz, self.stride_samples = source.sample_rate_hz, source.stride_samples
        self.num_units = assigner.num_units

    @property
    def frame_rate_hz(self) -> float:
        """Frames a second."""
        return self.source.frame_rate_hz

    def to(self, device: str | torch.device) -> SpeechUnits:
        """Itself, after source and assigner have moved there."""
        self.source.to(device)
        self.assigner.to(device)
        return self

    @torch.no_grad()
    def encode(self, audio: Tensor, num_samples: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Units int64 [B, F] of audio float [B, T] at `sample_rate_hz`, -1 past a row's end; and num_frames int64 [B].

        Each row, which has `num_samples` [B] samples or all, is heard alone, so that its units depend on nothing else.
        ValueError for audio that is not finite, and for lengths that are not there.
        """
        if audio.dim() != 2:
            raise ValueError(f"audio must be [B, T], not {list(audio.shape)}")
        lengths = [audio.shape[1]] * len(audio) if num_samples is None else num_samples.tolist()
        if len(lengths) != len(audio) or not all(0 <= length <= audio.shape[1] for length in lengths):
            raise ValueError(f"num_samples must be {len(audio)} numbers in 0..{audio.shape[1]}, not {lengths}")
        num_frames = torch.tensor([-(-length // self.stride_samples) for length in lengths], dtype=torch.int64)
        units = torch.full((len(audio), int(num_frames.max()) if lengths else 0), -1, device=audio.device)
        for row, length in enumerate(lengths):
            if not length:
                continue
            units[row, : num_frames[row]] = self.assigner.assign(self.source.features(audio[row, :length]))
        return units, num_frames.to(audio.device)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder for `load_units`, whole or not at all; one that holds units is replaced."""
        config = SpeechUnitsConfig(
            num_units=self.num_units,
            frame_rate_hz=self.frame_rate_hz,
            source=self.source.config,
            assigner=self.assigner.config,
        )
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.assigner.state_dict().items()}
        with new_folder(folder, replaceable={CONFIG, WEIGHTS}) as new:
            (new / CONFIG).write_text(json.dumps(codec_config.to_dict(config), indent=2) + "\n", encoding="utf-8")
            (new / WEIGHTS).write_bytes(serialize(tensors))


def load_units(
    folder: str | os.PathLike[str], *, model: str | None = None, device: str | torch.device = "cpu"
) -> SpeechUnits:
    """The units in a folder. `model`: where the speech model or codec is now that they were trained on, if it moved.

    ValueError where the folder holds no units, config and weights do not belong together, or the model is another one.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path} holds no {CONFIG}: it is no folder of speech units")
    try:
        data = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / CONFIG} cannot be read: {error}") from error
    config = codec_config.from_dict(data, str(path / CONFIG))
    if not isinstance(config, SpeechUnitsConfig):
        raise ValueError(f"{path / CONFIG} describes no speech units")
    source_config = config.source
    if model is not None:
        if not isinstance(source_config, SpeechModelSourceConfig | CodecSourceConfig):
            raise ValueError(f"the units of {path} are of no model, so {model} cannot stand for it")
        source_config = replace(source_config, source=model)
    assigner: Assigner = codec_config.build(config.assigner)
    try:
        tensors = load_file(path / WEIGHTS)
    except Exception as error:  # safetensors raises its own type, which is no subclass of ValueError
        raise ValueError(f"{path / WEIGHTS} cannot be read: {error}") from error
    try:
        assigner.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path / WEIGHTS} does not fit {CONFIG}: {' '.join(str(error).split())}") from error
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise ValueError(f"{path / WEIGHTS} holds NaN or infinity")
    units = SpeechUnits(codec_config.build(source_config), assigner)
    for name in ("num_units", "frame_rate_hz"):
        if getattr(units, name) != getattr(config, name):
            raise ValueError(f"{path / CONFIG}: {name} is {getattr(units, name)}, not {getattr(config, name)}")
    return units.to(device)


def train_units(
    source: UnitSource,
    recordings: Iterable[Tensor],
    num_units: int,
    *,
    seed: int = 0,
    max_frames: int = MAX_FRAMES,
    num_iterations: int = 50,
    standardize: bool = True,
) -> SpeechUnits:
    """Units by k-means over the features of recordings, each audio [T] at the source's rate.

    It learns from `max_frames` frames, drawn evenly from all. `standardize`: whether all dims count alike, or as much
    as they vary. The same recordings in the same order give the same units. ValueError for too few frames.

    Source: Hsu et al., "HuBERT" (2021), section II-A; Lakhotia et al., "On generative spoken language modeling from raw
    audio" (2021), section 3.
    """
    features = _drawn_evenly((source.features(audio) for audio in recordings), max_frames, seed)
    if len(features) < num_units:
        raise ValueError(f"{len(features)} frames are too few for {num_units} units")
    config = CentroidsConfig(feature_dim=source.feature_dim, is_standardized=standardize, num_units=num_units)
    assigner = Centroids(config)
    assigner.set_statistics(features)
    assigner.centroids.copy_(
        kmeans(assigner.standardized(features), num_units, seed=seed, num_iterations=num_iterations)
    )
    return SpeechUnits(source, assigner)


def _drawn_evenly(parts: Iterable[Tensor], max_frames: int, seed: int) -> Tensor:
    """At most so many of all frames of parts [F, D], in their order; each frame has the same chance."""
    if max_frames < 1:
        raise ValueError(f"max_frames must be positive, not {max_frames}")
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    marks: list[Tensor] = []  # those with the smallest ones stay

    def thin() -> None:
        all_marks = torch.cat(marks)
        stay = all_marks.sort(stable=True).indices[:max_frames].sort().values
        kept[:], marks[:] = [torch.cat(kept)[stay]], [all_marks[stay]]

    for part in parts:
        kept.append(part.cpu())
        marks.append(torch.rand(len(part), generator=generator, dtype=torch.float64))
        if sum(map(len, kept)) > 2 * max_frames:
            thin()
    if not kept:
        raise ValueError("there are no recordings to learn from")
    thin()
    return kept[0]
