"""Which word pieces a frame of audio is to learn from: the alignment of a text model's slots with a codec's frames.

- `index`: slot i belongs to frame i, as DM-Codec was published. The slots of a clip of three seconds are a dozen word
  pieces and then padding, so nearly all frames learn from slots of words said elsewhere, or of none. It is here to
  measure against. With `pad_targets` (and the teacher's `num_slots`), [PAD] slots are targets as well, as published;
  without it, frames past the last slot have no target.
- `forced`: a frame belongs to the pieces that are said in it, by forced alignment; frames between words have no target.
- `attention`: nothing is known of time. A small cross-attention from the codec's frames to the pieces learns along with
  the codec who belongs to whom; what it begins with is that speech runs through its text at an even pace.

Shapes: B batch, F frames, S slots, D dims of the teacher, E dims of the codec's latents.

Source: DM-Codec as published, https://github.com/mubtasimahasan/DM-Codec (extract_rep.py, codec/trainer/dataset.py);
Tachibana et al., "Efficiently trainable text-to-speech system based on deep convolutional networks with guided
attention" (2018), section 4, for the even pace.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codec.config import register
from recipes.targets import PADDING, PIECE, Pieces, Targets

_LEAST_SHARE = 0.5  # of a frame, that pieces must fill for it to have a target


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Base of the configurations of alignments."""


class Alignment(nn.Module):
    """`forward(pieces, frames [B, F, E], frame_rate_hz)` gives Targets. `frames` are the codec's, without a gradient.

    Built with the dims of the frames and of the teacher.
    """

    def forward(self, pieces: Pieces, frames: Tensor, frame_rate_hz: float) -> Targets:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class IndexAlignmentConfig(AlignmentConfig):
    """`pad_targets`: whether frames learn from [PAD] slots, too."""

    pad_targets: bool = False


@register("index", IndexAlignmentConfig)
class IndexAlignment(Alignment):
    """Slot i to frame i."""

    def __init__(self, config: IndexAlignmentConfig, frame_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.pad_targets = config.pad_targets

    def forward(self, pieces: Pieces, frames: Tensor, frame_rate_hz: float) -> Targets:
        num_frames, num_paired = frames.shape[1], min(frames.shape[1], pieces.kinds.shape[1])
        values = pieces.values.new_zeros(len(frames), num_frames, *pieces.values.shape[2:])
        values[:, :num_paired] = pieces.values[:, :num_paired]
        mask = torch.zeros(len(frames), num_frames, dtype=torch.bool, device=frames.device)
        mask[:, :num_paired] = (pieces.kinds != PADDING)[:, :num_paired]
        if self.pad_targets:
            mask[:, :num_paired] = True
        # A crop in which nothing is said teaches nothing, whatever the model makes of an empty text.
        return Targets(values, mask & (pieces.kinds == PIECE).any(1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class ForcedAlignmentConfig(AlignmentConfig):
    """No settings; the teacher's `words` say when words are said."""


@register("forced", ForcedAlignmentConfig)
class ForcedAlignment(Alignment):
    """The mean of the pieces that are said in a frame, by their share of it; none where they fill less than half."""

    def __init__(self, config: ForcedAlignmentConfig, frame_dim: int, teacher_dim: int) -> None:
        super().__init__()

    def forward(self, pieces: Pieces, frames: Tensor, frame_rate_hz: float) -> Targets:
        first_F = torch.arange(frames.shape[1], device=frames.device, dtype=torch.float64) / frame_rate_hz
        begin_BS, end_BS = pieces.spans.unbind(2)
        last_B1F = (first_F + 1.0 / frame_rate_hz)[None, None]
        overlap_BSF = torch.minimum(end_BS[:, :, None], last_B1F) - torch.maximum(begin_BS[:, :, None], first_F)
        share_BFS = (overlap_BSF.clamp_min(0.0) * frame_rate_hz).transpose(1, 2)
        share_BFS = share_BFS * (pieces.kinds == PIECE)[:, None]
        total_BF = share_BFS.sum(2)
        share_BFS = share_BFS / total_BF.clamp_min(1e-9)[:, :, None]
        values = torch.einsum("bfs,bs...->bf...", share_BFS.to(pieces.values.dtype), pieces.values)
        return Targets(values, total_BF >= _LEAST_SHARE - 1e-9)


@dataclass(frozen=True, kw_only=True)
class AttentionAlignmentConfig(AlignmentConfig):
    """`dim` of queries and keys. `pace_width`: how far from an even pace attention may stray at first, of the crop."""

    dim: int = 64
    pace_width: float = 0.15

    def __post_init__(self) -> None:
        if self.dim < 1 or self.pace_width <= 0.0:
            raise ValueError("dim and pace_width must be positive")


@register("attention", AttentionAlignmentConfig)
class AttentionAlignment(Alignment):
    """A mix of the pieces of the crop for every frame: softmax of queries and keys, and of how far apart both stand.

    The weights learn from the loss; the frames that ask and the vectors that are mixed do not. How strongly the even
    pace binds is learned, too. All frames of a crop with words have a target.
    """

    def __init__(self, config: AttentionAlignmentConfig, frame_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.pace_width = config.pace_width
        self.query = nn.Linear(frame_dim, config.dim)
        self.key = nn.Linear(teacher_dim, config.dim)
        self.pace_logit = nn.Parameter(torch.zeros(()))

    def forward(self, pieces: Pieces, frames: Tensor, frame_rate_hz: float) -> Targets:
        is_piece_BS = pieces.kinds == PIECE
        mixed = pieces.values if pieces.values.dim() == 3 else pieces.values.mean(2)
        queries, keys = self.query(frames.detach()), self.key(mixed)
        place_F = (torch.arange(frames.shape[1], device=frames.device) + 0.5) / frames.shape[1]
        place_BS = (is_piece_BS.cumsum(1) - 0.5) / is_piece_BS.sum(1, keepdim=True).clamp_min(1)
        strayed_BFS = (place_F[None, :, None] - place_BS[:, None]) / self.pace_width
        pace = torch.nn.functional.softplus(self.pace_logit) / 0.6931471805599453  # 1 at first
        logits_BFS = queries @ keys.transpose(1, 2) / keys.shape[2] ** 0.5 - 0.5 * pace * strayed_BFS.square()
        has_piece_B = is_piece_BS.any(1)
        # A row without pieces would be a softmax of nothing: NaN, also in its gradient.
        left_out_BFS = (~is_piece_BS & has_piece_B[:, None])[:, None]
        weights_BFS = logits_BFS.masked_fill(left_out_BFS, -torch.inf).softmax(2)
        values = torch.einsum("bfs,bs...->bf...", weights_BFS, pieces.values)
        return Targets(values, has_piece_B[:, None].expand(-1, frames.shape[1]))
