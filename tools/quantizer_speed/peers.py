"""Quantizers of other packages, with our codebooks in them.

Each function takes a case and gives two calls, as `Quantizer.encode` and `decode` are. What brings results into our
order are views, which take a microsecond. Where a package has no call that gives codes alone (DAC and
vector-quantize-pytorch), it is the one that also sums the latents up. Weight norm is folded.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from codec.quantizers.factorized import FactorizedVQ
from codec.quantizers.split import SplitVQ
from tools.quantizer_speed.cases import Case

Coder = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def encodec(case: Case) -> Coder:
    """EnCodec's own package. Its codes are [K, B, F]."""
    theirs = _module("encodec.quantization.vq").ResidualVectorQuantizer(
        dimension=case.latent_dim, n_q=case.tables.num_rows, bins=case.tables.codebook_size, kmeans_init=False
    )
    for layer, entries_Cd in zip(theirs.eval().vq.layers, case.tables.entries_KCd, strict=True):
        layer._codebook.embed = entries_Cd
    theirs.to(case.device)
    # Without a bandwidth, the frame rate does not matter.
    return lambda latents: theirs.encode(latents, 75).transpose(0, 1), lambda codes: theirs.decode(
        codes.transpose(0, 1)
    )


def transformers_encodec(case: Case) -> Coder:
    """EnCodec of `transformers`. Its codes are [K, B, F]."""
    parts = _module("transformers.models.encodec.modeling_encodec")
    config = parts.EncodecConfig(codebook_size=case.tables.codebook_size, codebook_dim=case.latent_dim)
    theirs = parts.EncodecResidualVectorQuantizer(config).eval()
    del theirs.layers[case.tables.num_rows :]  # their number follows from bandwidths
    for layer, entries_Cd in zip(theirs.layers, case.tables.entries_KCd, strict=True):
        layer.codebook.embed = entries_Cd
    theirs.num_quantizers = case.tables.num_rows
    theirs.to(case.device)
    return lambda latents: theirs.encode(latents).transpose(0, 1), lambda codes: theirs.decode(codes.transpose(0, 1))


def vector_quantize_pytorch(case: Case) -> Coder:
    """vector-quantize-pytorch, plain or grouped. Latents are [B, F, D] and codes [B, F, K], or [G, B, F, stages]."""
    groups = max(case.tables.chains) + 1
    package = _module("vector_quantize_pytorch")
    sizes = {"num_quantizers": case.tables.num_rows // groups, "codebook_size": case.tables.codebook_size}
    if groups == 1:
        theirs = package.ResidualVQ(dim=case.latent_dim, **sizes)
        chains = [theirs]
    else:
        theirs = package.GroupedResidualVQ(dim=case.latent_dim, groups=groups, **sizes)
        chains = list(theirs.rvqs)
    for chain, residual_vq in enumerate(chains):
        for layer, entries_Cd in zip(residual_vq.layers, case.tables.entries_KCd[chain::groups], strict=True):
            layer._codebook.embed = entries_Cd[None]
    theirs.eval().to(case.device)

    def encode(latents: Tensor) -> Tensor:
        codes: Tensor = theirs(latents.mT)[1]
        return codes.mT if groups == 1 else codes.permute(1, 3, 0, 2).flatten(1, 2)

    def decode(codes: Tensor) -> Tensor:
        given = codes.mT if groups == 1 else codes.unflatten(1, (-1, groups)).permute(2, 0, 3, 1)
        latents: Tensor = theirs.get_output_from_indices(given).mT
        return latents

    return encode, decode


def dac(case: Case) -> Coder:
    """DAC's own package."""
    quantizer = cast("FactorizedVQ", case.quantizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the package's way of weight norm
        theirs = _module("dac.nn.quantize").ResidualVectorQuantize(
            input_dim=case.latent_dim,
            n_codebooks=case.tables.num_rows,
            codebook_size=case.tables.codebook_size,
            codebook_dim=quantizer.config.codebook_dim,
        )
        for stage in theirs.quantizers:
            nn.utils.remove_weight_norm(stage.in_proj)
            nn.utils.remove_weight_norm(stage.out_proj)
    _copy_stages(quantizer, theirs.quantizers)
    theirs.to(case.device).eval()
    return lambda latents: theirs(latents)[1], lambda codes: theirs.from_codes(codes)[0]


def transformers_dac(case: Case) -> Coder:
    """DAC of `transformers`."""
    quantizer = cast("FactorizedVQ", case.quantizer)
    parts = _module("transformers.models.dac.modeling_dac")
    config = parts.DacConfig(
        n_codebooks=case.tables.num_rows,
        codebook_size=case.tables.codebook_size,
        codebook_dim=quantizer.config.codebook_dim,
    )
    config.hidden_size = case.latent_dim
    theirs = parts.DacResidualVectorQuantizer(config)
    _copy_stages(quantizer, theirs.quantizers)
    theirs.to(case.device).eval()
    return lambda latents: theirs(latents)[1], lambda codes: theirs.from_codes(codes)[0]


def transformers_mimi(case: Case) -> Coder:
    """Mimi of `transformers`. It gives codes [K, B, F], and takes [B, K, F]."""
    quantizer = cast("SplitVQ", case.quantizer)
    parts = _module("transformers.models.mimi.modeling_mimi")
    config = parts.MimiConfig(
        hidden_size=case.latent_dim,
        codebook_size=case.tables.codebook_size,
        codebook_dim=quantizer.config.codebook_dim,
        vector_quantization_hidden_dimension=quantizer.config.codebook_dim,
        num_quantizers=case.tables.num_rows,
        num_semantic_quantizers=1,
    )
    theirs = parts.MimiSplitResidualVectorQuantizer(config)
    halves = [theirs.semantic_residual_vector_quantizer, theirs.acoustic_residual_vector_quantizer]
    _copy_halves(quantizer, halves, lambda half: [layer.codebook.embed_sum for layer in half.layers])
    theirs.to(case.device).eval()
    return lambda latents: theirs.encode(latents).transpose(0, 1), theirs.decode


def moshi(case: Case) -> Coder:
    """Mimi of its own package."""
    quantizer = cast("SplitVQ", case.quantizer)
    theirs = _module("moshi.quantization").SplitResidualVectorQuantizer(
        n_q=case.tables.num_rows,
        n_q_semantic=1,
        dimension=quantizer.config.codebook_dim,
        input_dimension=case.latent_dim,
        output_dimension=case.latent_dim,
        bins=case.tables.codebook_size,
    )
    halves = [theirs.rvq_first, theirs.rvq_rest]
    _copy_halves(quantizer, halves, lambda half: [layer._codebook.embedding_sum for layer in half.vq.layers])
    theirs.to(case.device).eval()
    return theirs.encode, theirs.decode


# Name, kind of quantizer, function.
PEERS: tuple[tuple[str, str, Callable[[Case], Coder]], ...] = (
    ("encodec", "plain", encodec),
    ("transformers EnCodec", "plain", transformers_encodec),
    ("vector_quantize_pytorch", "plain", vector_quantize_pytorch),
    ("vector_quantize_pytorch", "grouped", vector_quantize_pytorch),
    ("dac", "factorized", dac),
    ("transformers DAC", "factorized", transformers_dac),
    ("moshi", "split", moshi),
    ("transformers Mimi", "split", transformers_mimi),
)


def _module(name: str) -> Any:
    return importlib.import_module(name)


@torch.no_grad()
def _copy_stages(quantizer: FactorizedVQ, theirs: Any) -> None:
    for ours, other in zip(quantizer.stages, theirs, strict=True):
        assert isinstance(ours.codebook, nn.Parameter)
        other.codebook.weight.copy_(ours.codebook)
        for name in ("in_proj", "out_proj"):
            other.get_submodule(name).weight.copy_(ours.get_submodule(name).weight)
            other.get_submodule(name).bias.copy_(ours.get_submodule(name).bias)


@torch.no_grad()
def _copy_halves(quantizer: SplitVQ, halves: list[Any], sums_of: Callable[[Any], list[Tensor]]) -> None:
    """Their codebooks are sums over counts, and the counts of a new one are 1."""
    for part, half in zip((quantizer.semantic, quantizer.acoustic), halves, strict=True):
        half.input_proj.weight.copy_(part.input_proj.weight[:, :, None])
        half.output_proj.weight.copy_(part.output_proj.weight[:, :, None])
        for sums_Cd, entries_Cd in zip(sums_of(half), part.vq.codebooks, strict=True):
            sums_Cd.copy_(entries_Cd)
