"""Tiny language models of tokens, and tokens for them, for tests."""

from typing import Any

import torch

from codec.token_vocabulary import Vocabulary
from codec.tokens import Tokens
from recipes.token_lm import NetworkConfig, TokenLM, TokenLMConfig

HOP = 64  # of the tiny codec
PATTERNS: dict[str, dict[str, Any]] = {
    "flatten": {},
    "interleave": {"pattern": "interleave", "num_coarse": 1, "block_frames": 2},
    "delay": {"pattern": "delay"},
    "voiced": {"num_global_codes": 2, "global_codebook_size": 5},
    "voiced_delay": {"pattern": "delay", "num_global_codes": 2, "global_codebook_size": 5},
}


def tiny_lm(pattern: str = "flatten", *, context_steps: int = 64, dropout: float = 0.0, **changes: Any) -> TokenLM:
    """Random weights that are large enough for every id to have a say."""
    values: dict[str, Any] = {"codec_id": f"{0:016x}", "hop_length": HOP, "codebook_sizes": (8, 6)}
    vocabulary = Vocabulary(**values | PATTERNS[pattern] | changes)
    network = NetworkConfig(width=16, num_layers=2, num_heads=2, context_steps=context_steps, dropout=dropout)
    torch.manual_seed(0)
    lm = TokenLM(TokenLMConfig(vocabulary=vocabulary, network=network)).eval()
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return lm


def tokens_for(lm: TokenLM, num_frames: int = 9, *, batch_size: int = 1, seed: int = 0) -> Tokens:
    vocabulary, generator = lm.config.vocabulary, torch.Generator().manual_seed(seed)
    sizes = torch.tensor(vocabulary.codebook_sizes)[:, None]
    codes = torch.rand(batch_size, len(sizes), num_frames, generator=generator).mul(sizes).long()
    voices = torch.randint(0, 5, (batch_size, 2), generator=generator) if vocabulary.num_global_codes else None
    lengths = torch.full((batch_size,), num_frames * HOP)
    return Tokens(codes, lengths, vocabulary.codec_id, global_codes=voices)
