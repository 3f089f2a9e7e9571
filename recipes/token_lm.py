"""A small decoder-only transformer over the ids of `codec.token_vocabulary`, and its folder: config and weights.

    ids [B, S, N] -> sum of their embeddings [B, N, D] -> blocks -> logits of the next ids [B, N, V]

With the delay pattern a step has an id of each row: their embeddings are summed, and one output tells all the next
ones, each among the ids of its row. Embeddings are the output's weights as well.

Letters: B batch, S streams, N steps, D width, H heads, V ids.
Source: Vaswani et al., "Attention is all you need" (2017); Su et al., "RoFormer" (2021) for rotary positions; Copet et
al., "Simple and controllable music generation" (2023), section 2.2, for several rows in one step.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from codec.config import from_values
from codec.files import AtomicFile
from codec.token_vocabulary import Vocabulary

_ROTARY_BASE = 10000.0  # Source: RoFormer, section 3.2.2
_NOTHING = -100


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The transformer. `context_steps`: how many steps it learns from at once, and looks back at most."""

    width: int
    num_layers: int
    num_heads: int
    context_steps: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "context_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width} is not a multiple of 2 * num_heads={2 * self.num_heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} is not in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TokenLMConfig:
    """What a language model is: the vocabulary, which names the codec and the pattern, and the network."""

    vocabulary: Vocabulary
    network: NetworkConfig

    def __post_init__(self) -> None:
        vocabulary = self.vocabulary
        if vocabulary.shares_ids or vocabulary.first_id:
            raise ValueError("a token language model wants ids of its own for every row, counted from 0")
        shortest = vocabulary.num_steps(2 * (vocabulary.block_frames or 1))
        if self.network.context_steps < shortest:
            raise ValueError(f"context_steps={self.network.context_steps} must be {shortest} or more for this pattern")


class KeyValues:
    """The keys and values of the steps so far, of every layer: what `TokenLM.step` needs of the past; it adds to it."""

    def __init__(self, config: NetworkConfig, batch_size: int, like: Tensor) -> None:
        head_dim = config.width // config.num_heads
        shape = (config.num_layers, 2, batch_size, config.num_heads, config.context_steps, head_dim)
        self.num_steps = 0
        self._buffer = like.new_zeros(shape)

    def extended(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer [B, H, n, d] behind the earlier ones: all [B, H, N, d]."""
        end = self.num_steps + keys.shape[2]
        self._buffer[layer, 0, :, :, self.num_steps : end] = keys
        self._buffer[layer, 1, :, :, self.num_steps : end] = values
        return self._buffer[layer, 0, :, :, :end], self._buffer[layer, 1, :, :, :end]


class TokenLM(nn.Module):
    """See the top of this file."""

    _places: Tensor  # int64 [S, V]: where an id is among the candidates of a stream
    _rows: Tensor  # int64 [V]: the row whose code an id is, -1 of all others

    def __init__(self, config: TokenLMConfig) -> None:
        super().__init__()
        self.config = config
        network = config.network
        # No nn.Embedding: optimizers take matrices called "weight" for maps.
        self.table = nn.Parameter(0.02 * torch.randn(config.vocabulary.num_ids, network.width))
        self.dropout = nn.Dropout(network.dropout)
        self.blocks = nn.ModuleList(_Block(network, layer) for layer in range(network.num_layers))
        self.norm = nn.RMSNorm(network.width)
        vocabulary = config.vocabulary
        self._candidates = _candidates(vocabulary)
        places = torch.full((vocabulary.num_streams, vocabulary.num_ids), _NOTHING)
        for stream, candidates in enumerate(self._candidates):
            places[stream, candidates] = torch.arange(len(candidates))
        rows = torch.full((vocabulary.num_ids,), -1)
        for row, ids in enumerate(vocabulary.row_ids):
            rows[ids.start : ids.stop] = row
        self.register_buffer("_places", places, persistent=False)
        self.register_buffer("_rows", rows, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids int64 [B, S, N] -> logits [B, N, V] of what comes after each step."""
        return self._hidden(ids, None) @ self.table.T

    def start(self, batch_size: int = 1) -> KeyValues:
        """What `step` knows before the first step."""
        return KeyValues(self.config.network, batch_size, self.table)

    def step(self, ids: Tensor, past: KeyValues) -> Tensor:
        """The next ids int64 [B, S, n] -> logits [B, n, V] of what comes after each; `past` grows by them.

        Equal to `forward` of all ids up to rounding. ValueError where more than `context_steps` come together.
        """
        context_steps = self.config.network.context_steps
        if past.num_steps + ids.shape[2] > context_steps:
            raise ValueError(f"{past.num_steps + ids.shape[2]} steps are more than the {context_steps} of the context")
        logits = self._hidden(ids, past) @ self.table.T
        past.num_steps += ids.shape[2]
        return logits

    def losses(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What ids [B, S, N] the model does not foresee: [B, S, N - 1] minus log probability of each but the first.

        In nats; and bool [B, S, N - 1], whether there was anything to foresee: not padding, nor, in delayed rows, the
        end, which row 0 tells. Elsewhere the loss is 0.
        """
        hidden, targets = self._hidden(ids[:, :, :-1], None), ids[:, :, 1:]
        places = torch.stack([self._places[stream][targets[:, stream]] for stream in range(len(self._candidates))], 1)
        found = []
        for stream, candidates in enumerate(self._candidates):
            logits = (hidden @ self.table[candidates].T).float().transpose(1, 2)
            found.append(F.cross_entropy(logits, places[:, stream], ignore_index=_NOTHING, reduction="none"))
        return torch.stack(found, dim=1), places != _NOTHING

    def rows_of(self, ids: Tensor) -> Tensor:
        """The row of codes that each id is of, -1 of special ids and global codes; the shape stays."""
        return self._rows[ids]

    def _hidden(self, ids: Tensor, past: KeyValues | None) -> Tensor:
        x = self.dropout(F.embedding(ids, self.table).sum(dim=1))
        first = 0 if past is None else past.num_steps
        half = self.config.network.width // self.config.network.num_heads // 2
        rates = _ROTARY_BASE ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(first, first + x.shape[1], device=x.device)[:, None] * rates
        turns = torch.polar(torch.ones_like(angles), angles)
        for block in self.blocks:
            x = block(x, turns, past)
        hidden: Tensor = self.norm(x)
        return hidden


class _Block(nn.Module):
    def __init__(self, config: NetworkConfig, layer: int) -> None:
        super().__init__()
        self._layer, self._num_heads = layer, config.num_heads
        self._dropout = config.dropout
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention_in = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)
        for layer_out in (self.attention_out, self.mlp_out):  # at first a block changes nothing
            nn.init.zeros_(layer_out.weight)

    def forward(self, x: Tensor, turns: Tensor, past: KeyValues | None) -> Tensor:
        x = x + F.dropout(self._attention(self.attention_norm(x), turns, past), self._dropout, self.training)
        mlp = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + F.dropout(mlp, self._dropout, self.training)

    def _attention(self, x: Tensor, turns: Tensor, past: KeyValues | None) -> Tensor:
        first, num_steps = 0 if past is None else past.num_steps, x.shape[1]
        queries, keys, values = (
            part.unflatten(2, (self._num_heads, -1)).transpose(1, 2) for part in self.attention_in(x).chunk(3, dim=2)
        )
        queries, keys = _turned(queries, turns), _turned(keys, turns)
        if past is not None:
            keys, values = past.extended(self._layer, keys, values)
        mask = None
        if first and num_steps > 1:  # a single step sees all that is there
            mask = torch.ones(num_steps, first + num_steps, dtype=torch.bool, device=x.device).tril(first)
        heard = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=first == 0)
        out: Tensor = self.attention_out(heard.transpose(1, 2).flatten(2))
        return out


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys [B, H, N, d], each pair of dims turned as complex numbers [N, d / 2] say."""
    pairs = torch.view_as_complex(x.float().unflatten(3, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(3).to(x.dtype)


def _candidates(vocabulary: Vocabulary) -> list[list[int]]:
    """The ids that each stream is to tell: not what follows by itself."""
    special = [vocabulary.begin_id, vocabulary.end_id, *vocabulary.global_ids]
    if vocabulary.num_streams == 1:
        return [[*special, *(id for ids in vocabulary.row_ids for id in ids)]]
    return [[*special, *vocabulary.row_ids[0]], *(list(ids) for ids in vocabulary.row_ids[1:])]


def save_lm(lm: TokenLM, folder: str | os.PathLike[str]) -> None:
    """Write `config.json` and `model.safetensors` (float32)."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in lm.state_dict().items()}
    config = json.dumps(asdict(lm.config), indent=2) + "\n"
    for name, data in (("config.json", config.encode()), ("model.safetensors", serialize(weights))):
        with AtomicFile(path / name) as new:
            new.file.write(data)
            new.commit()


def load_lm(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> TokenLM:
    """A language model that `save_lm` wrote, in evaluation mode. ValueError where there is none."""
    path = Path(folder)
    try:
        data = json.loads((path / "config.json").read_text(encoding="utf-8"))
        weights = load_file(path / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} holds no language model: {error}") from error
    lm = TokenLM(from_values(TokenLMConfig, data, str(path / "config.json")))
    try:
        lm.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path / 'model.safetensors'} does not fit its config.json") from error
    return lm.to(device).eval().requires_grad_(False)
