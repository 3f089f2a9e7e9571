"""What is measured: the forms of quantizers, with the latents and codebooks that all candidates share.

Shapes: B batch, D dims of the latents, F frames, N = B * F rows, K code rows, C entries, d dims of a codebook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.audio import find_audio, read_audio, resample
from codec.config import build
from codec.kernels.residual_search import SearchTables
from codec.models.interface import Codec
from codec.quantizers.factorized import FactorizedVQ, FactorizedVQConfig
from codec.quantizers.interface import Quantizer, QuantizerConfig
from codec.quantizers.residual import ResidualVQ, ResidualVQConfig
from codec.quantizers.split import SplitVQ, SplitVQConfig
from codec.testing import speech_like

# Batch and frames.
SHAPES = {"bulk": (16, 750), "frame": (1, 1), "stream16": (16, 1), "million": (1000, 1000)}

_FEWEST_FRAMES = 512
_SHRUNK = 0.5  # of entries beside what they are chosen for, as in trained codebooks (0.47 to 0.65 in speech_16k)

# The sizes of EnCodec at 6 and 24 kbps, HiFi-Codec, DAC at 44.1 kHz, and Mimi as Moshi uses it.
FORMS: dict[str, QuantizerConfig] = {
    "plain": ResidualVQConfig(latent_dim=128, num_stages=8, codebook_size=1024),
    "plain32": ResidualVQConfig(latent_dim=128, num_stages=32, codebook_size=1024),
    "grouped": ResidualVQConfig(latent_dim=512, num_stages=2, num_groups=2, codebook_size=1024),
    "factorized": FactorizedVQConfig(latent_dim=1024, num_stages=9, codebook_size=1024, codebook_dim=8),
    "split": SplitVQConfig(latent_dim=512, num_stages=8, codebook_size=2048, codebook_dim=256),
}


@dataclass(frozen=True)
class Case:
    """One quantizer of ours, and latents to encode with it, each [B, D, F]: several where that is few frames.

    So what takes longer now and then, such as a near tie, takes part as often as in use.
    """

    name: str
    quantizer: Quantizer
    latents: tuple[Tensor, ...]

    @property
    def latent_dim(self) -> int:
        """D."""
        return self.latents[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.latents[0].device

    @property
    def num_rows(self) -> int:
        """N of one call."""
        return self.latents[0].shape[0] * self.latents[0].shape[2]

    @property
    def kind(self) -> str:
        """What others may have, too: "plain", "grouped", "factorized" or "split"."""
        if isinstance(self.quantizer, ResidualVQ):
            return "plain" if self.quantizer.config.num_groups == 1 else "grouped"
        return "factorized" if isinstance(self.quantizer, FactorizedVQ) else "split"

    @cached_property
    def tables(self) -> SearchTables:
        """What the search reads."""
        quantizer = self.quantizer
        if isinstance(quantizer, FactorizedVQ):
            return quantizer._small().tables
        if isinstance(quantizer, SplitVQ):
            codebooks = torch.cat([quantizer.semantic.vq.codebooks, quantizer.acoustic.vq.codebooks])
            return SearchTables(codebooks, chains=[0] + [1] * (len(codebooks) - 1))
        assert isinstance(quantizer, ResidualVQ)
        return SearchTables(quantizer.codebooks, num_groups=quantizer.config.num_groups)

    @cached_property
    def stages(self) -> list[tuple[slice, Tensor, Tensor, int, Tensor]]:
        """For each code row: its dims, offsets [C], entries [d, C], and what it takes away: first dim, table [C, w]."""
        tables = self.tables
        return [
            (tables.slice_of(row), tables.exact_offsets_KC[row].float(), tables.entries_KCd[row].T, first, table_Cw)
            for row, (first, table_Cw) in enumerate(tables.takes)
        ]

    @cached_property
    def projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """The weights [out, D], with biases, whose outputs side by side are what the search works on; else none."""
        if isinstance(self.quantizer, FactorizedVQ):
            small = self.quantizer._small()
            return [(small.projection, small.bias)]
        if isinstance(self.quantizer, SplitVQ):
            return [
                (part.input_proj.weight.detach(), None) for part in (self.quantizer.semantic, self.quantizer.acoustic)
            ]
        return []

    def rows(self, latents: Tensor) -> Tensor:
        """Latents [B, D, F] as the search takes them, float32 [N, its dims]."""
        return projected(latents, self.projections)

    def eager_decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, F] -> latents [B, D, F], one operation after the other, as loops have it that know no tables."""
        quantizer = self.quantizer
        if isinstance(quantizer, FactorizedVQ):
            stages = zip(_stages(quantizer), codes.unbind(1), strict=True)
            return cast("Tensor", sum(stage.out_proj(stage.entries(codes_BF)) for stage, codes_BF in stages))
        if isinstance(quantizer, SplitVQ):
            semantic, acoustic = quantizer.semantic, quantizer.acoustic
            semantic_BFD = semantic.output_proj(_summed(semantic.vq.codebooks, codes[:, :1]))
            acoustic_BFD = acoustic.output_proj(_summed(acoustic.vq.codebooks, codes[:, 1:]))
            return cast("Tensor", semantic_BFD + acoustic_BFD).mT
        assert isinstance(quantizer, ResidualVQ)
        groups = quantizer.config.num_groups
        parts = [_summed(quantizer.codebooks[group::groups], codes[:, group::groups]) for group in range(groups)]
        return torch.cat(parts, dim=2).mT


def projected(latents: Tensor, projections: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Latents [B, D, F] through all projections, or through none, [N, dims side by side]."""
    rows_ND = latents.transpose(1, 2).flatten(0, 1)
    if not projections:
        return rows_ND.contiguous()
    return torch.cat([F.linear(rows_ND, weight, bias) for weight, bias in projections], dim=1)


def synthetic_case(name: str, config: QuantizerConfig, shape: tuple[int, int], *, seed: int, device: str) -> Case:
    """Latents whose scale falls from dim to dim as rank**-0.75, turned at random, and codebooks that suit them.

    Each codebook holds what the stages before it leave of other latents, shrunk. So scales fall from stage to stage,
    and best entries lead by as little as with trained codebooks: near ties are about as frequent.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        quantizer: Quantizer = build(config)
        rotation_DD: Tensor = torch.linalg.qr(torch.randn(config.latent_dim, config.latent_dim)).Q
        scales_D = torch.arange(1, config.latent_dim + 1) ** -0.75

        def draw(num_frames: int) -> Tensor:
            return ((torch.randn(num_frames, config.latent_dim) * scales_D) @ rotation_DD).t()[None]

        _fill(quantizer, draw)
        latents = draw(_num_frames(shape))
    return _case(name, quantizer, latents, shape, device)


def model_case(codec: Codec, shape: tuple[int, int], *, folder: Path | None, device: str) -> Case:
    """The quantizer of a model, and its latents of recordings in a folder, or of a signal that is made.

    Too few recordings are taken again. ValueError for a quantizer without a residual search.
    """
    if not isinstance(codec.quantizer, ResidualVQ | FactorizedVQ | SplitVQ):
        raise ValueError(f"a {type(codec.quantizer).__name__} is not measured here: it has no residual search")
    num_frames, parts, taken = _num_frames(shape), [], 0
    with torch.no_grad():
        for audio in _signals(codec, folder, num_frames):
            parts.append(codec.analyze(audio.expand(codec.num_channels, -1)[None]).float())
            taken += parts[-1].shape[2]
            if taken >= num_frames:
                break
    latents = torch.cat(parts, dim=2).repeat(1, 1, -(-num_frames // taken))
    return _case(codec.name or "model", codec.quantizer, latents, shape, device)


def _num_frames(shape: tuple[int, int]) -> int:
    """In all the latents of a case: at least so many that near ties are among them."""
    batch_size, num_frames = shape
    return batch_size * num_frames * -(-_FEWEST_FRAMES // (batch_size * num_frames))


def _case(name: str, quantizer: Quantizer, latents: Tensor, shape: tuple[int, int], device: str) -> Case:
    """A case of latents [1, D, at least as many frames as are needed]."""
    frames_DN = latents[0, :, : _num_frames(shape)].to(device)
    items_VBDF = frames_DN.reshape(len(frames_DN), -1, *shape).permute(1, 2, 0, 3).contiguous()
    return Case(name, quantizer.requires_grad_(False).eval().to(device), items_VBDF.unbind(0))


def _signals(codec: Codec, folder: Path | None, num_frames: int) -> Iterator[Tensor]:
    """Signals [1, T]."""
    if folder is None:
        samples = speech_like(num_frames * codec.hop_length, rate_hz=codec.sample_rate_hz)
        yield torch.from_numpy(samples)[None]
        return
    for file in find_audio(folder):
        audio, rate_hz = read_audio(file)
        yield torch.from_numpy(resample(audio.mean(0, keepdims=True), rate_hz, codec.sample_rate_hz)).float()


def _fill(quantizer: Quantizer, draw: Callable[[int], Tensor]) -> None:
    """Set codebooks, and projections to random directions. `draw` gives so many frames of latents [1, D, n]."""
    if isinstance(quantizer, SplitVQ):
        for part in (quantizer.semantic, quantizer.acoustic):
            nn.init.orthogonal_(part.input_proj.weight)
            part.output_proj.weight.copy_(part.input_proj.weight.T)
            _fill(part.vq, functools.partial(_project, part, draw))
        return
    before = 0
    for num_rows in quantizer.valid_num_quantizers:
        left_over = draw(quantizer.codebook_sizes[0])
        if before:
            codes = quantizer.encode(left_over, num_quantizers=before)
            left_over = left_over - quantizer.decode(codes)
        if isinstance(quantizer, ResidualVQ):
            chains_Cd = left_over[0].T.chunk(num_rows - before, dim=1)
            quantizer.codebooks[before:num_rows] = torch.stack([_shrunk(chain_Cd) for chain_Cd in chains_Cd])
        else:
            stage: Any = cast("FactorizedVQ", quantizer).stages[before]
            nn.init.orthogonal_(stage.in_proj.weight[:, :, 0])
            stage.out_proj.weight.copy_(stage.in_proj.weight.transpose(0, 1))
            for projection in (stage.in_proj, stage.out_proj):
                nn.init.zeros_(projection.bias)  # at random they would outweigh the latents
            stage.codebook.copy_(_shrunk(stage.in_proj(left_over)[0].T))
        before = num_rows


def _shrunk(left_over_Cd: Tensor) -> Tensor:
    """In the same directions, but of nearly one length, as centroids are."""
    lengths_C1 = left_over_Cd.norm(dim=1, keepdim=True)
    shorter_Cd: Tensor = left_over_Cd * (_SHRUNK * (0.9 * lengths_C1.mean() / lengths_C1 + 0.1))
    return shorter_Cd


def _project(part: Any, draw: Callable[[int], Tensor], num_frames: int) -> Tensor:
    projected: Tensor = part.project(draw(num_frames))
    return projected


def _stages(quantizer: FactorizedVQ) -> Iterator[Any]:
    return iter(quantizer.stages)


def _summed(codebooks_KCd: Tensor, codes: Tensor) -> Tensor:
    """Codes [B, K, F] -> the sums of their entries [B, F, d]."""
    rows = zip(codes.unbind(1), codebooks_KCd.unbind(0), strict=True)
    return cast("Tensor", sum(F.embedding(codes_BF, entries_Cd) for codes_BF, entries_Cd in rows))
