import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec import config as codec_config
from codec.layers.conv import add_weight_norm, fold_weight_norm
from codec.quantizers.factorized import FactorizedVQ, FactorizedVQConfig

BATCH, DIMS, STAGES = 3, 12, 4


def _quantizer(**changes: int) -> FactorizedVQ:
    torch.manual_seed(0)
    values = {"latent_dim": DIMS, "num_stages": STAGES, "codebook_size": 16, "codebook_dim": 3}
    quantizer: FactorizedVQ = codec_config.build(FactorizedVQConfig(**values | changes))
    return quantizer


def _latents(num_frames: int, *, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, DIMS, num_frames, generator=torch.Generator().manual_seed(seed))


def _map(layer: torch.nn.Module) -> Tensor:
    """The matrix of a 1x1 convolution."""
    weight: Tensor = layer.weight[:, :, 0]  # type: ignore[index, assignment, union-attr]
    return weight.detach()


def _by_the_book(quantizer: FactorizedVQ, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, K, F] and quantized latents, frame by frame and entry by entry, from the formulas of the paper."""
    codes = torch.zeros(BATCH, STAGES, latents.shape[2], dtype=torch.int64)
    quantized = torch.zeros_like(latents)
    for item in range(BATCH):
        for frame in range(latents.shape[2]):
            residual = latents[item, :, frame]
            for row, stage in enumerate(quantizer.stages):
                small = _map(stage.in_proj) @ residual + stage.in_proj.bias.detach()
                similarities = torch.stack([torch.cosine_similarity(small, entry, dim=0) for entry in stage.codebook])
                codes[item, row, frame] = int(similarities.argmax())
                entry = stage.codebook[codes[item, row, frame]].detach()
                decoded = _map(stage.out_proj) @ entry + stage.out_proj.bias.detach()
                quantized[item, :, frame] += decoded
                residual = residual - decoded
    return codes, quantized


def test_codes_and_latents_are_those_of_the_formulas() -> None:
    quantizer, latents = _quantizer().double(), _latents(9).double()
    codes, expected = _by_the_book(quantizer, latents)
    assert torch.equal(quantizer.encode(latents), codes)
    # The same sums in float64, in another order.
    torch.testing.assert_close(quantizer.decode(codes), expected, rtol=0, atol=1e-12)
    assert len(codes.unique()) > 8


def test_training_and_inference_agree() -> None:
    quantizer, latents = _quantizer(), _latents(50)
    quantized = quantizer(latents)
    assert torch.equal(quantized.codes, quantizer.encode(latents))
    # The same products in another order: a few roundings of values up to 5.
    assert (quantized.latents - quantizer.decode(quantized.codes)).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(latents)
        assert torch.equal(quantizer.encode(latents), quantized.codes)
    assert mixed.latents.dtype == torch.float32
    assert torch.equal(mixed.codes, quantized.codes)


@given(num_quantizers=st.integers(1, STAGES), num_frames=st.integers(0, 20), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_prefixes_are_prefixes(num_quantizers: int, num_frames: int, seed: int) -> None:
    quantizer, latents = _quantizer(), _latents(num_frames, seed=seed)
    whole = quantizer.encode(latents)
    codes = quantizer.encode(latents, num_quantizers=num_quantizers)
    assert codes.shape == (BATCH, num_quantizers, num_frames)
    assert torch.equal(codes, whole[:, :num_quantizers])
    absent = whole.clone()
    absent[:, num_quantizers:] = -1
    assert torch.equal(quantizer.decode(absent), quantizer.decode(codes))
    if num_frames:
        trained = quantizer(latents, num_quantizers=num_quantizers)
        assert torch.equal(trained.codes, absent)
        # The same products in another order: a few roundings of values up to 5.
        assert (trained.latents - quantizer.decode(codes)).abs().max() < 1e-5


def test_a_code_of_minus_one_is_an_absent_stage() -> None:
    quantizer = _quantizer()
    codes = quantizer.encode(_latents(6))
    alone = [quantizer.decode(torch.where(torch.arange(STAGES)[:, None] == row, codes, -1)) for row in range(STAGES)]
    # Four addends in another order.
    torch.testing.assert_close(sum(alone), quantizer.decode(codes), rtol=0, atol=1e-6)
    assert not quantizer.decode(torch.full_like(codes, -1)).any()


def test_ties_go_to_the_lowest_entry_and_length_does_not_matter() -> None:
    quantizer, latents = _quantizer(num_stages=1), _latents(40)
    codes = quantizer.encode(latents)
    with torch.no_grad():
        quantizer.stages[0].codebook[8:] = 2 * quantizer.stages[0].codebook[:8]  # type: ignore[index, operator]
    assert int(quantizer.encode(latents).max()) < 8
    with torch.no_grad():
        quantizer.stages[0].codebook.copy_(_quantizer(num_stages=1).stages[0].codebook)  # type: ignore[operator]
        quantizer.stages[0].codebook *= 4 ** torch.arange(-8.0, 8.0)[:, None]  # type: ignore[operator]
    assert torch.equal(quantizer.encode(latents), codes)
    assert not torch.equal(quantizer.decode(codes), _quantizer(num_stages=1).decode(codes))


def test_gradients_of_the_quantized_latents() -> None:
    """To the latents through every stage's own two projections; to those as if codes were given; none to entries."""
    quantizer = _quantizer()
    latents, weight = _latents(10).requires_grad_(), _latents(10, seed=1)
    quantized = quantizer(latents)
    (quantized.latents * weight).sum().backward()
    maps = [(_map(stage.in_proj), _map(stage.out_proj)) for stage in quantizer.stages]
    jacobian = sum(out_map @ in_map for in_map, out_map in maps)
    # Sums of 4 stages in another order.
    torch.testing.assert_close(latents.grad, torch.einsum("dD,bdf->bDf", jacobian, weight), rtol=0, atol=1e-5)
    residual = latents.detach()
    for row, stage in enumerate(quantizer.stages):
        entries = stage.codebook[quantized.codes[:, row]].detach().transpose(1, 2)
        out_map = maps[row][1]
        expected = torch.einsum("bdf,bef->de", weight, entries)
        torch.testing.assert_close(stage.out_proj.weight.grad[:, :, 0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stage.out_proj.bias.grad, weight.sum((0, 2)), rtol=1e-5, atol=1e-5)
        expected = torch.einsum("bef,bdf->ed", torch.einsum("de,bdf->bef", out_map, weight), residual)
        torch.testing.assert_close(stage.in_proj.weight.grad[:, :, 0], expected, rtol=1e-5, atol=1e-4)
        assert stage.codebook.grad is None
        residual = residual - stage.out_proj(entries).detach()


def test_every_stage_commits_the_encoder_in_full() -> None:
    """With a chained residual, what a stage tells the encoder passes through the projections of those before it."""
    quantizer, latents = _quantizer(), _latents(30)
    gradients = [torch.zeros_like(latents)]
    for num_quantizers in range(1, STAGES + 1):
        x = latents.clone().requires_grad_()
        quantizer(x, num_quantizers=num_quantizers).losses["commitment"].backward()
        assert x.grad is not None
        gradients.append(x.grad)
    codes, residual = quantizer.encode(latents), latents
    for row, stage in enumerate(quantizer.stages):
        entries = stage.codebook[codes[:, row]].detach().transpose(1, 2)
        error = stage.in_proj(residual).detach() - entries
        expected = torch.einsum("ed,bef->bdf", _map(stage.in_proj), error) * 2 / (3 * BATCH * 30)
        # A difference of two gradients, each a sum.
        torch.testing.assert_close(gradients[row + 1] - gradients[row], expected, rtol=1e-4, atol=1e-7)
        residual = residual - stage.out_proj(entries).detach()


def test_the_losses_teach_what_they_should() -> None:
    quantizer, latents = _quantizer(), _latents(30)
    quantizer(latents).losses["codebook"].backward()
    codes = quantizer.encode(latents)
    for row, stage in enumerate(quantizer.stages):
        used = codes[:, row].unique()
        taught = stage.codebook.grad.abs().sum(1).nonzero()[:, 0]
        assert torch.equal(taught, used)
        assert stage.in_proj.weight.grad is None
        assert stage.out_proj.weight.grad is None
    quantizer.zero_grad()
    quantizer(latents).losses["commitment"].backward()
    for stage in quantizer.stages:
        assert stage.codebook.grad is None
        assert stage.in_proj.weight.grad.any()
        assert stage.out_proj.weight.grad is None


def test_losses_are_as_published() -> None:
    """Mean over dims and frames, absent stages of an item as zeros, summed over stages."""
    quantizer, latents = _quantizer(), _latents(7)
    prefixes = torch.tensor([1, 3, 4])
    losses = quantizer(latents, num_quantizers=prefixes).losses
    codes, residual, expected = quantizer.encode(latents), latents, torch.zeros(())
    for row, stage in enumerate(quantizer.stages):
        entries = F.embedding(codes[:, row], stage.codebook).transpose(1, 2)
        per_item = (stage.in_proj(residual) - entries).square().mean((1, 2))
        expected = expected + (per_item * (row < prefixes)).mean()
        residual = residual - stage.out_proj(entries)
    # Sums in another order.
    torch.testing.assert_close(losses["commitment"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["codebook"], expected, rtol=1e-5, atol=0)


def test_absent_stages_and_masked_frames_teach_nothing() -> None:
    quantizer, latents = _quantizer(), _latents(30)
    prefixes = torch.tensor([1, 3, 4])
    mask = torch.ones(BATCH, 30, dtype=torch.bool)
    mask[2, 20:] = False
    quantized = quantizer(latents, mask, num_quantizers=prefixes)
    assert (quantized.codes[0, 1:] == -1).all()
    assert (quantized.codes[1, 3:] == -1).all()
    assert (quantized.codes[2, :, 20:] == -1).all()
    assert (quantized.codes[2, :, :20] >= 0).all()
    changed = latents.clone()
    changed[2, :, 20:] += 7.0
    gradients = []
    for given_latents in (latents, changed):
        quantizer.zero_grad()
        found = quantizer(given_latents, mask, num_quantizers=prefixes)
        (sum(found.losses.values()) + found.latents.square().sum()).backward()
        assert torch.equal(found.latents, quantized.latents)
        gradients.append([parameter.grad.clone() for parameter in quantizer.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    alone = quantizer(latents[:2], num_quantizers=prefixes[:2]).losses["commitment"] * 60
    last = quantizer(latents[2:, :, :20]).losses["commitment"] * 20
    # A mean over all 80 real frames; sums in another order.
    torch.testing.assert_close(quantized.losses["commitment"] * 80, alone + last, rtol=1e-5, atol=0)


def test_it_learns() -> None:
    """From random values on, without k-means: with the losses' weights as published, most of the error goes."""
    torch.manual_seed(1)
    quantizer = _quantizer(num_stages=2, codebook_size=8)
    centres = torch.randn(8, DIMS)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-2)
    errors = []
    for _ in range(300):
        latents = centres[torch.randint(8, (BATCH, 40))].transpose(1, 2)
        quantized = quantizer(latents)
        error = (quantized.latents - latents).square().mean()
        optimizer.zero_grad()
        (15 * error + 0.25 * quantized.losses["commitment"] + quantized.losses["codebook"]).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.1 * errors[0]
    quantizer.update(quantized)
    assert torch.equal(quantizer.encode(latents), quantizer(latents).codes)
    assert quantizer.training_state() == {}


def test_weight_norm_reaches_the_projections() -> None:
    quantizer, latents = _quantizer(), _latents(5)
    before = copy.deepcopy(quantizer.state_dict())
    add_weight_norm(quantizer)
    lengths = [name for name, _ in quantizer.named_parameters() if name.endswith("weight.original0")]
    assert len(lengths) == 2 * STAGES
    quantizer(latents).losses["commitment"].backward()
    fold_weight_norm(quantizer)
    for key, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=0)  # g * v / |v| rounds


def test_stats_tell_use() -> None:
    quantizer = _quantizer()
    with torch.no_grad():
        quantizer.stages[1].codebook.zero_()  # type: ignore[operator]
    quantized = quantizer(_latents(20))
    assert quantized.stats["perplexity"][1].item() == pytest.approx(1.0)
    assert quantized.stats["dead_fraction"][1].item() == pytest.approx(15 / 16)
    assert quantized.stats["perplexity"].shape == (STAGES,)
    assert quantizer.codebooks.shape == (STAGES, 16, 3)
    assert not quantizer.codebooks.requires_grad


def test_callers_mistakes_are_value_errors() -> None:
    quantizer = _quantizer()
    with pytest.raises(ValueError, match="each must be one of"):
        quantizer(_latents(3), num_quantizers=torch.tensor([1, 2, 5]))
    with pytest.raises(ValueError, match="num_quantizers=5 is not one of"):
        quantizer.encode(_latents(3), num_quantizers=5)
    with pytest.raises(ValueError, match=r"codes must lie in -1\.\.15, got 0\.\.16"):
        quantizer.decode(torch.tensor([[[0, 16]]]))
    with pytest.raises(ValueError, match="codebook_dim must be positive, got 0"):
        FactorizedVQConfig(latent_dim=8, num_stages=1, codebook_dim=0)


def test_codes_follow_every_parameter_also_with_weight_norm() -> None:
    """What encode and decode keep between calls must not outlive a change."""
    latents = _latents(30)
    for has_weight_norm in (False, True):
        quantizer = _quantizer().requires_grad_(False)
        if has_weight_norm:
            add_weight_norm(quantizer)
            quantizer.requires_grad_(False)
        for _, parameter in quantizer.named_parameters():
            codes, decoded = quantizer.encode(latents), quantizer.decode(quantizer.encode(latents))
            parameter.copy_(parameter.flip(0) + 0.3 * torch.randn_like(parameter))
            assert torch.equal(quantizer.encode(latents), copy.deepcopy(quantizer).encode(latents))
            again = quantizer.decode(quantizer.encode(latents))
            assert not (torch.equal(quantizer.encode(latents), codes) and torch.equal(again, decoded))
