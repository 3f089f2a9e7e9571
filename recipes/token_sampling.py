"""Going on with a prompt: frames of codes, one after the other, as soon as a language model has written them.

    from codec import StreamingDecoder, load
    from recipes.token_lm import load_lm
    from recipes.token_sampling import Sampling, continued

    lm, model = load_lm("lm"), load("speech_16k")
    prompt = model.encode(audio, num_quantizers=lm.config.vocabulary.num_quantizers)
    decoder = StreamingDecoder(model, global_codes=prompt.global_codes)
    for codes in continued(lm, prompt, Sampling(top_k=100, seed=1)):  # int64 [K, F]; the prompt's own come first
        play(decoder.push(codes))

Sampling is held to the ids that may stand next, so whatever the model writes decodes.

Letters: S streams, N steps, K rows of codes, F frames, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.token_vocabulary import VocabularyDecoder
from codec.tokens import Tokens
from recipes.token_lm import TokenLM


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ids are drawn: of the `top_k` likeliest (None: of all), by probabilities to the power of 1 / `temperature`.

    `may_end`: whether the model may end the recording; else it goes on for as long as it is asked to.
    """

    temperature: float = 1.0
    top_k: int | None = None
    seed: int = 0
    may_end: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ValueError(f"temperature={self.temperature} must be positive")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be positive")


def continued(lm: TokenLM, prompt: Tokens, sampling: Sampling) -> Iterator[Tensor]:
    """Codes int64 [K, F], F >= 1, of the frames of the prompt, and of those that go on with it, as they are complete.

    `prompt` is a batch of one, of the model's codec and with its number of rows; its global codes stay. It comes back
    as `Vocabulary.prompt` keeps it: delayed rows of its last frames are written anew.

    Ends where the model ends the recording, else never. ValueError for a prompt that does not fit, at the first frame.
    What lies further back than the context is forgotten, but for the global codes.
    """
    if len(prompt.codes) != 1:
        raise ValueError(f"a prompt is a batch of one recording, not of {len(prompt.codes)}")
    decoder = VocabularyDecoder(lm.config.vocabulary)
    draws = torch.Generator().manual_seed(sampling.seed)
    ids = lm.config.vocabulary.prompt(prompt)[0].to(lm.table.device)  # all so far, [S, N]
    new = ids
    past = lm.start()
    while True:
        codes = decoder.push(new)
        if codes.shape[1]:
            yield codes
        if decoder.is_ended:
            return
        with torch.inference_mode():
            if past.num_steps + new.shape[1] > lm.config.network.context_steps:
                past, new = lm.start(), _recent(lm, ids)
            logits = lm.step(new[None], past)[0, -1].double().cpu()
        mask = decoder.valid_ids(may_end=sampling.may_end)
        new = torch.stack([_draw(logits.where(row, -math.inf), sampling, draws) for row in mask])[:, None].to(
            ids.device
        )
        ids = torch.cat([ids, new], dim=1)


def _draw(logits: Tensor, sampling: Sampling, draws: torch.Generator) -> Tensor:
    """One id by its logit [V], which is -infinity for those that cannot be; one draw, whatever the logits."""
    if sampling.top_k is not None and sampling.top_k < len(logits):
        logits = logits.where(logits >= logits.topk(sampling.top_k).values[-1], -math.inf)
    shares = (logits / sampling.temperature).softmax(dim=0).cumsum(dim=0)
    place = torch.rand((), generator=draws, dtype=torch.float64) * shares[-1]
    return torch.searchsorted(shares, place, right=True).clamp_max(len(logits) - 1)


def _recent(lm: TokenLM, ids: Tensor) -> Tensor:
    """Where the context is full: its beginning, and as much of the end as fills half of it, from a block's start on."""
    vocabulary = lm.config.vocabulary
    before, block = vocabulary.num_steps_before, vocabulary.steps_per_block
    num_kept = max(block, lm.config.network.context_steps // 2 - before)
    num_dropped = -(-(ids.shape[1] - before - num_kept) // block) * block
    return torch.cat([ids[:, :before], ids[:, before + num_dropped :]], dim=1)
