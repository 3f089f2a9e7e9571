"""A part of a recording."""

from __future__ import annotations

from dataclasses import dataclass


class StretchError(ValueError):
    """A recording has nothing of the stretch that was asked for."""


@dataclass(frozen=True)
class Stretch:
    """A part of a recording, in samples at its own rate. `num_samples` None: to the end."""

    first_sample: int = 0
    num_samples: int | None = None

    def within(self, num_samples: int) -> Stretch:
        """The part of it that a recording of so many samples has. StretchError where that is nothing."""
        if self.first_sample >= num_samples or self.num_samples == 0:
            raise StretchError(f"it has {num_samples} samples, so there is nothing of the stretch asked for")
        rest = num_samples - self.first_sample
        return Stretch(self.first_sample, rest if self.num_samples is None else min(rest, self.num_samples))
