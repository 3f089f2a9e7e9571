"""Teachers that are functions of the audio and of where a crop begins, for tests."""

from dataclasses import dataclass
from typing import Any

import torch

from codec.config import register
from recipes.data import Batch, SpeechData
from recipes.targets import PADDING, PIECE, SPECIAL, Pieces, Targets, TeacherConfig

FRAMES: dict[str, Any] = {"teacher": {"type": "stub_frames"}}
TEXT: dict[str, Any] = {"teacher": {"type": "stub_text"}, "alignment": {"type": "forced"}}


@dataclass(frozen=True, kw_only=True)
class StubFramesConfig(TeacherConfig):
    """`num_mixed_layers` as of a teacher; `first_frames`: only so many frames have a target."""

    num_mixed_layers: int | None = None
    first_frames: int = 10**6
    is_picky: bool = False

    def __post_init__(self) -> None:
        if self.first_frames < 0:
            raise ValueError("first_frames must not be negative")


@register("stub_frames", StubFramesConfig)
class StubFrames:
    """Energies of the quarters of each frame, a layer for each power of them."""

    feature_dim = 4

    def __init__(self, config: StubFramesConfig) -> None:
        self.config = config
        self.num_mixed_layers = config.num_mixed_layers
        self.weights = torch.nn.Linear(1, 1)  # that nobody may train or save
        self.num_calls = 0

    def check(self, data: SpeechData) -> None:
        if self.config.is_picky:
            raise ValueError("no recording has what is needed")

    def targets(self, batch: Batch, *, sample_rate_hz: int, num_frames: int, frame_rate_hz: float) -> Targets:
        self.num_calls += 1
        hop = round(sample_rate_hz / frame_rate_hz)
        audio = torch.nn.functional.pad(batch.audio[:, 0], (0, num_frames * hop - batch.audio.shape[2]))
        values = audio.view(len(audio), num_frames, self.feature_dim, -1).square().mean(3).add(1e-4).log()
        if self.num_mixed_layers is not None:
            values = torch.stack([values**power for power in range(1, 1 + self.num_mixed_layers)], dim=2)
        mask = (torch.arange(num_frames) < self.config.first_frames).expand(len(audio), -1)
        return Targets(values, mask)


@dataclass(frozen=True, kw_only=True)
class StubTextConfig(TeacherConfig):
    """`silent_items`: crops, by number, in which nothing is said."""

    silent_items: tuple[int, ...] = ()
    num_mixed_layers: int | None = None


@register("stub_text", StubTextConfig)
class StubText:
    """A word every tenth of a second, one of three that take turns."""

    feature_dim = 3

    def __init__(self, config: StubTextConfig) -> None:
        self.silent_items = config.silent_items
        self.num_mixed_layers = config.num_mixed_layers

    def check(self, data: SpeechData) -> None:
        assert data.crops().crop_samples > 0

    def pieces(self, batch: Batch, *, seconds: float) -> Pieces:
        num_slots = int(seconds / 0.1) + 3  # [CLS], words, [SEP]
        values = torch.zeros(len(batch.places), num_slots, self.feature_dim)
        kinds = torch.full(values.shape[:2], PADDING)
        spans = torch.zeros(*values.shape[:2], 2, dtype=torch.float64)
        for row, (place, item) in enumerate(zip(batch.places, batch.items.tolist(), strict=True)):
            if item in self.silent_items:
                continue
            kinds[row], kinds[row, [0, -1]] = PIECE, SPECIAL
            first = int(place.first_second / 0.1)
            for slot in range(1, num_slots - 1):
                begin = 0.1 * (first + slot - 1) - place.first_second
                spans[row, slot] = torch.tensor([begin, begin + 0.1])
                values[row, slot, (first + slot) % 3] = 1.0
        if self.num_mixed_layers is not None:
            values = torch.stack([values * layer for layer in range(1, 1 + self.num_mixed_layers)], dim=2)
        return Pieces(values, kinds, spans)
