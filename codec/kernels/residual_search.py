"""Residual search: which codebook entries, stage by stage, approximate each latent best.

Shapes: N rows, D latent dimensions, S stages, G groups, C codebook entries, K = S * G rows of codes, d = D / G.

The contract every implementation obeys:

1. Stage s of group g picks the entry nearest (squared Euclidean distance) to what is left of the latent after the
   entries that the same group picked before. Code row k = s * G + g.
2. Ties go to the lowest index. A row whose latents hold a NaN gets code 0 from the stage that sees it on.
3. Codes are judged by regret: along an implementation's own earlier choices, the float64 distance of the entry it
   chose may exceed the best by at most 1e-5 relative, and where the runner-up is further than that, codes are equal.
4. Two runs are bit-equal, and a row's codes do not depend on how many rows came with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codec.kernels.row_linear import pad_rows, row_linear


def score_offsets(codebooks_KCd: Tensor) -> Tensor:
    """-|e|^2 / 2 of every entry, [K, C]. For one frame they cost more than the search, so callers may keep them."""
    return codebooks_KCd.square().sum(-1) / -2


def rvq_reference(latents_ND: Tensor, codebooks_KCd: Tensor, offsets_KC: Tensor, *, num_groups: int = 1) -> Tensor:
    """The specification: int64 codes [N, K] by the rules above, in the dtype of the latents.

    The nearest entry e of a residual r maximises r . e - |e|^2 / 2; |r|^2 is the same for all entries.
    """
    num_given, num_dims = latents_ND.shape
    num_codebooks = codebooks_KCd.shape[0]
    padded_ND = pad_rows(latents_ND, codebooks_KCd[0])
    num_rows = padded_ND.shape[0]
    residual_NGd = padded_ND.reshape(num_rows, num_groups, num_dims // num_groups).clone()
    codes_NK = torch.zeros(num_rows, num_codebooks, dtype=torch.int64, device=latents_ND.device)
    for row in range(num_codebooks):
        group = row % num_groups
        # `max` returns the first of equal maxima and lets a NaN win: rule 2.
        scores_NC = row_linear(residual_NGd[:, group], codebooks_KCd[row], offsets_KC[row])
        codes_N = scores_NC.max(dim=-1).indices
        codes_NK[:, row] = codes_N
        residual_NGd[:, group] -= codebooks_KCd[row, codes_N]
    return codes_NK[:num_given]


_IMPLEMENTATIONS = {"reference": rvq_reference}


@torch.no_grad()
def rvq_search(
    latents_ND: Tensor,
    codebooks_KCd: Tensor,
    offsets_KC: Tensor | None = None,
    *,
    num_groups: int = 1,
    impl: str = "auto",
) -> Tensor:
    """Codes int64 [N, K] of latents [N, D] in codebooks [K, C, D / num_groups]; no gradient, float32 inside.

    `offsets_KC` is `score_offsets(codebooks_KCd)` where the caller has it. `impl` names an implementation, or "auto"
    for the best one for these inputs. Raises ValueError for shapes that do not fit or an `impl` that is not there.
    """
    if latents_ND.dim() != 2 or codebooks_KCd.dim() != 3:
        raise ValueError(
            f"expected latents [N, D] and codebooks [K, C, d], "
            f"got {tuple(latents_ND.shape)} and {tuple(codebooks_KCd.shape)}"
        )
    num_codebooks, _, codebook_dim = codebooks_KCd.shape
    if codebook_dim * num_groups != latents_ND.shape[1] or num_codebooks % num_groups:
        raise ValueError(
            f"latents of {latents_ND.shape[1]} dims do not fit "
            f"{num_codebooks} codebooks of {codebook_dim} dims in {num_groups} groups"
        )
    name = resolve_impl(impl)
    with torch.autocast(latents_ND.device.type, enabled=False):
        dtype = torch.float64 if latents_ND.dtype == torch.float64 else torch.float32
        latents_ND, codebooks_KCd = latents_ND.to(dtype), codebooks_KCd.to(dtype)
        if offsets_KC is None:
            offsets_KC = score_offsets(codebooks_KCd)
        return _IMPLEMENTATIONS[name](latents_ND, codebooks_KCd, offsets_KC.to(dtype), num_groups=num_groups)


def resolve_impl(impl: str) -> str:
    """The implementation that `impl` stands for on this machine."""
    if impl == "auto":
        return "reference"
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"residual search {impl!r} is not available (there is: auto, {', '.join(_IMPLEMENTATIONS)})")
    return impl


def rvq_decode(codes_NK: Tensor, codebooks_KCd: Tensor, *, num_groups: int = 1) -> Tensor:
    """Latents [N, D]: per group, the sum of the chosen entries. A code of -1 adds nothing (the stage is absent).

    The first K' <= K rows of codes may be given alone, in whole stages.
    """
    num_rows, num_given = codes_NK.shape
    latents_NGd = codebooks_KCd.new_zeros(num_rows, num_groups, codebooks_KCd.shape[2])
    for row in range(num_given):
        codes_N = codes_NK[:, row]
        entries_Nd = codebooks_KCd[row, codes_N.clamp_min(0)]
        latents_NGd[:, row % num_groups] += torch.where((codes_N >= 0)[:, None], entries_Nd, 0.0)
    return latents_NGd.flatten(1)
