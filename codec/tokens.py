"""Tokens: what a codec makes of audio, and the orders in which language models like to read it.

Letters: B batch, K rows of codes, F frames, L global tokens, S segments. `codec.token_vocabulary` makes ids of codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Codes of a batch of recordings.

    codes: int64 [B, K, F]; row 0 is the coarsest; frames past a recording's end hold 0.
    num_samples: int64 [B]; audio length at the codec's rate.
    codec_id: which model made them; decoding with another one is an error.
    global_codes: int64 [B, L], tokens of the whole recording, where a model has them.
    scales: float32 [B, S], loudness per segment, where a model has it.

    >>> tokens = Tokens(torch.zeros(1, 8, 50, dtype=torch.int64), torch.tensor([16000]), "example")
    >>> tokens.prefix(4).codes.shape
    torch.Size([1, 4, 50])
    """

    codes: Tensor
    num_samples: Tensor
    codec_id: str
    global_codes: Tensor | None = None
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dim() != 3 or self.codes.dtype != torch.int64:
            raise ValueError(f"codes must be int64 [B, K, F], got {self.codes.dtype} {tuple(self.codes.shape)}")
        if self.num_samples.shape != self.codes.shape[:1] or self.num_samples.dtype != torch.int64:
            raise ValueError(
                f"num_samples must be int64 [{self.codes.shape[0]}], "
                f"got {self.num_samples.dtype} {tuple(self.num_samples.shape)}"
            )

    def prefix(self, num_quantizers: int) -> Tokens:
        """The first rows of codes: the same recording at a lower rate. Which prefixes decode, the codec says."""
        if not 1 <= num_quantizers <= self.codes.shape[1]:
            raise ValueError(f"num_quantizers={num_quantizers} is not in 1..{self.codes.shape[1]}")
        return replace(self, codes=self.codes[:, :num_quantizers])

    def row(self, index: int) -> Tokens:
        """One recording of the batch, as a batch of one. Its frames keep the batch's padding."""
        if not -self.codes.shape[0] <= index < self.codes.shape[0]:
            raise ValueError(f"row {index} is not in a batch of {self.codes.shape[0]}")
        at = slice(index, index + 1 or None)
        return replace(
            self,
            codes=self.codes[at],
            num_samples=self.num_samples[at],
            global_codes=None if self.global_codes is None else self.global_codes[at],
            scales=None if self.scales is None else self.scales[at],
        )

    def with_voice(self, global_codes: Tensor) -> Tokens:
        """The same recordings with other global codes: [B, L], or [L] or [1, L] for all of them."""
        batch_size = self.codes.shape[0]
        rows = global_codes[None] if global_codes.dim() == 1 else global_codes
        if rows.dim() != 2 or rows.shape[0] not in (1, batch_size):
            raise ValueError(f"global_codes must be [{batch_size}, L], [1, L] or [L], got {tuple(global_codes.shape)}")
        return replace(self, global_codes=rows.expand(batch_size, -1))

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on another device."""
        return replace(
            self,
            codes=self.codes.to(device),
            num_samples=self.num_samples.to(device),
            global_codes=None if self.global_codes is None else self.global_codes.to(device),
            scales=None if self.scales is None else self.scales.to(device),
        )

    @staticmethod
    def stack(tokens: Sequence[Tokens]) -> Tokens:
        """One batch of several, padded with code 0 to the longest. All must come from one codec, with equal K."""
        if not tokens:
            raise ValueError("there is nothing to stack")
        ids, num_rows = {t.codec_id for t in tokens}, {t.codes.shape[1] for t in tokens}
        if len(ids) > 1 or len(num_rows) > 1:
            raise ValueError(f"cannot stack tokens of codecs {sorted(ids)} with {sorted(num_rows)} rows of codes")
        num_frames = max(t.codes.shape[2] for t in tokens)

        def joined(parts: list[Tensor | None], name: str) -> Tensor | None:
            given = [p for p in parts if p is not None]
            if given and len(given) < len(parts):
                raise ValueError(f"only some of the tokens have {name}")
            if len({p.shape[1:] for p in given}) > 1:
                raise ValueError(f"cannot stack {name} of {sorted(p.shape[1] for p in given)} per recording")
            return torch.cat(given) if given else None

        return Tokens(
            codes=torch.cat([F.pad(t.codes, (0, num_frames - t.codes.shape[2])) for t in tokens]),
            num_samples=torch.cat([t.num_samples for t in tokens]),
            codec_id=tokens[0].codec_id,
            global_codes=joined([t.global_codes for t in tokens], "global_codes"),
            scales=joined([t.scales for t in tokens], "scales"),
        )


def flatten(codes: Tensor) -> Tensor:
    """Codes [B, K, F] -> [B, F * K], frame after frame, coarsest first: one sequence for a plain language model."""
    return codes.transpose(1, 2).flatten(1)


def unflatten(sequence: Tensor, num_quantizers: int) -> Tensor:
    """Undo `flatten`. The sequence must hold whole frames."""
    if num_quantizers < 1 or sequence.shape[1] % num_quantizers:
        raise ValueError(f"{sequence.shape[1]} codes are not whole frames of {num_quantizers}")
    frames: Tensor = sequence.unflatten(1, (-1, num_quantizers))
    return frames.transpose(1, 2)


def split_rows(codes: Tensor, num_coarse: int) -> tuple[Tensor, Tensor]:
    """Codes [B, K, F] -> the first `num_coarse` rows, and the rows after them. Either may be none."""
    if not 0 <= num_coarse <= codes.shape[1]:
        raise ValueError(f"num_coarse={num_coarse} is not in 0..{codes.shape[1]}")
    return codes[:, :num_coarse], codes[:, num_coarse:]


def join_rows(coarse: Tensor, fine: Tensor) -> Tensor:
    """Undo `split_rows`. Both must have the same recordings and frames."""
    if coarse.shape[0] != fine.shape[0] or coarse.shape[2] != fine.shape[2]:
        raise ValueError(f"rows of {tuple(coarse.shape)} and {tuple(fine.shape)} are not of the same frames")
    return torch.cat([coarse, fine], dim=1)


def interleave(codes: Tensor, num_coarse: int, block_frames: int) -> Tensor:
    """Codes [B, K, F] -> [B, F * K]: in each block of frames first the coarse rows, then the fine ones.

    Both parts are flattened frame after frame; the last block may be shorter. Blocks of one frame are `flatten`, one
    block of all frames is coarse first, as in AudioLM. With `num_coarse` semantic rows, what is said comes before how
    it sounds. Source: AudioLM (Borsos et al. 2022), section III-C, semantic before acoustic and coarse before fine.
    """
    _check_block(block_frames)
    coarse, fine = split_rows(codes, num_coarse)
    parts = zip(coarse.split(block_frames, dim=2), fine.split(block_frames, dim=2), strict=True)
    return torch.cat([flatten(part) for block in parts for part in block], dim=1)


def deinterleave(sequence: Tensor, num_quantizers: int, num_coarse: int, block_frames: int) -> Tensor:
    """Undo `interleave`: [B, F * K] -> [B, K, F]. The sequence must hold whole frames."""
    _check_block(block_frames)
    if not 0 <= num_coarse <= num_quantizers:
        raise ValueError(f"num_coarse={num_coarse} is not in 0..{num_quantizers}")
    if num_quantizers < 1 or sequence.shape[1] % num_quantizers:
        raise ValueError(f"{sequence.shape[1]} codes are not whole frames of {num_quantizers}")
    blocks = []
    for block in sequence.split(block_frames * num_quantizers, dim=1):
        num_frames = block.shape[1] // num_quantizers
        num_rows = (num_coarse, num_quantizers - num_coarse)
        parts = block.split([num_frames * n for n in num_rows], dim=1)
        rows = [part.unflatten(1, (num_frames, n)).transpose(1, 2) for part, n in zip(parts, num_rows, strict=True)]
        blocks.append(join_rows(*rows))
    return torch.cat(blocks, dim=2)


def _check_block(block_frames: int) -> None:
    if block_frames < 1:
        raise ValueError(f"block_frames={block_frames} must be positive")


def delay(codes: Tensor, *, fill: int) -> Tensor:
    """Shift row k by k frames: [B, K, F] -> [B, K, F + K - 1], with `fill` where there is no code.

    Source: MusicGen (Copet et al. 2023), section 2.2, the delay pattern: a step predicts all rows at once, and every
    row still sees the coarser rows of its own frame.
    """
    num_rows = codes.shape[1]
    rows = [F.pad(codes[:, k], (k, num_rows - 1 - k), value=fill) for k in range(num_rows)]
    return torch.stack(rows, dim=1)


def undelay(delayed: Tensor) -> Tensor:
    """Undo `delay`: [B, K, F + K - 1] -> [B, K, F]."""
    num_rows = delayed.shape[1]
    num_frames = delayed.shape[2] - num_rows + 1
    if num_frames < 0:
        raise ValueError(f"{delayed.shape[2]} columns are too few for {num_rows} delayed rows")
    return torch.stack([delayed[:, k, k : k + num_frames] for k in range(num_rows)], dim=1)


class StreamingUndelay:
    """`undelay` of columns in pieces of any size: frames come out as soon as their last row is there.

    >>> undelay_stream = StreamingUndelay(2)
    >>> [undelay_stream.push(column).shape[2] for column in delay(torch.ones(1, 2, 3).long(), fill=0).split(1, dim=2)]
    [0, 1, 1, 1]
    """

    def __init__(self, num_quantizers: int) -> None:
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers={num_quantizers} must be positive")
        self._num_rows = num_quantizers
        self._pending: Tensor | None = None  # the columns whose frames are not complete

    def push(self, delayed: Tensor) -> Tensor:
        """Columns [B, K, n], n >= 0 -> codes [B, K, F] of the frames that they complete; F may be 0."""
        if delayed.dim() != 3 or delayed.shape[1] != self._num_rows:
            raise ValueError(f"columns must be [B, {self._num_rows}, n], got {tuple(delayed.shape)}")
        columns = delayed.clone() if self._pending is None else torch.cat([self._pending, delayed], dim=2)
        num_frames = max(0, columns.shape[2] - self._num_rows + 1)
        self._pending = columns[:, :, num_frames:]
        return undelay(columns) if num_frames else columns[:, :, :0]
