"""What may come next in a sequence of codes: the orders of `codec.tokens` as they look to whoever writes step by step.

A step has one kind per stream: the number of a row of codes, or `END`, or `PAD`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

END, PAD = -1, -2


class Order(Protocol):
    """Where a recording is. `is_ended`: only padding may follow."""

    is_ended: bool

    def expected(self, stream: int) -> tuple[int, ...]:
        """The kinds that may come next in a stream."""
        ...

    def take(self, kinds: Sequence[int]) -> None:
        """Go on by a step of expected kinds, one of each stream."""
        ...


class OneStream:
    """`codec.tokens.interleave` with an end; with `num_coarse` all rows, and blocks of one frame, `flatten`.

    The fine part of a block begins where its coarse part is full. It may begin before, between frames: the block is
    shorter then, and the recording ends with it.
    """

    def __init__(self, num_quantizers: int, num_coarse: int, block_frames: int) -> None:
        self.is_ended = False
        self._num_coarse, self._num_fine, self._block_frames = num_coarse, num_quantizers - num_coarse, block_frames
        self._is_fine = self._is_last = False
        self._num_taken = 0  # codes of this part of the block
        self._num_frames = 0  # of the block, known in its fine part

    def expected(self, stream: int) -> tuple[int, ...]:
        if self.is_ended:
            return (PAD,)
        if self._is_last:
            return (END,)
        if self._is_fine:
            return (self._num_coarse + self._num_taken % self._num_fine,)
        num_frames, row = divmod(self._num_taken, self._num_coarse)
        if row:
            return (row,)
        if num_frames == 0:
            return 0, END
        return (self._num_coarse,) if num_frames == self._block_frames else (0, self._num_coarse)

    def take(self, kinds: Sequence[int]) -> None:
        kind = kinds[0]
        self.is_ended |= kind == END
        if kind in (END, PAD):
            return
        if not self._is_fine and kind == self._num_coarse:
            self._num_frames = self._num_taken // self._num_coarse
            self._is_fine, self._num_taken = True, 0
        self._num_taken += 1
        num_in_block = self._num_frames * self._num_fine if self._is_fine else self._num_coarse
        if self._num_taken == num_in_block and (self._is_fine or not self._num_fine):
            self._is_last = self._is_fine and self._num_frames < self._block_frames
            self._is_fine, self._num_taken = False, 0


class Delayed:
    """`codec.tokens.delay` of the frames and an end that is delayed with them, a stream per row."""

    def __init__(self) -> None:
        self.is_ended = False
        self._num_steps = 0
        self._num_frames: int | None = None  # of the recording, once row 0 has said so

    def expected(self, stream: int) -> tuple[int, ...]:
        frame = self._num_steps - stream
        if frame < 0 or (self._num_frames is not None and frame > self._num_frames):
            return (PAD,)
        if frame == self._num_frames:
            return (END,)
        return (0, END) if stream == 0 else (stream,)

    def take(self, kinds: Sequence[int]) -> None:
        if kinds[0] == END:
            self._num_frames = self._num_steps
        self.is_ended |= kinds[-1] == END
        self._num_steps += 1
