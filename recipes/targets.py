"""What a teacher gives a codec to learn from.

Letters: B batch, F frames of the codec, S slots of a text model, L layers, D dims of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

# What a slot of a text model holds.
PIECE, SPECIAL, PADDING = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Base of the configurations of teachers."""


@dataclass(frozen=True, kw_only=True)
class LayeredTeacherConfig(TeacherConfig):
    """A teacher that is one or more layers of a model, `source`.

    `layers`: "last", the number of a hidden state (0 is what enters the first layer), a list of numbers for their mean,
    or "weighted" for all of them, to be mixed by learned weights.
    """

    source: str
    layers: Any = "last"

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        numbers = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        is_numbers = numbers and all(type(number) is int and number >= 0 for number in numbers)
        if self.layers not in ("last", "weighted") and not is_numbers:
            raise ValueError(f'layers={self.layers!r} is neither "last" nor "weighted" nor one or more layer numbers')


@dataclass(frozen=True)
class Targets:
    """What a codec's frames should know.

    values: float32 [B, F, D], or [B, F, L, D] where learned weights will mix the layers.
    mask: bool [B, F], true on frames that have a target.
    """

    values: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Pieces:
    """What a text model makes of the words of a crop, slot by slot.

    values: float32 [B, S, D], or [B, S, L, D] as in `Targets`.
    kinds: int64 [B, S]: PIECE for a word piece, SPECIAL for what stands around a text ([CLS], [SEP]), PADDING.
    spans: float64 [B, S, 2]: when a piece is said, from and to, in seconds from the beginning of the crop; else 0.
    """

    values: Tensor
    kinds: Tensor
    spans: Tensor
