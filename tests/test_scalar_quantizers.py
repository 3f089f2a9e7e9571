"""The grids of FSQ and of latent quantization; what all quantizers of single dims share is in another file."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec import config as codec_config
from codec.quantizers.scalar import FSQ, FSQConfig, LatentScalars, LatentScalarsConfig


def _fsq(*levels: int, num_stages: int = 1, latent_dim: int | None = None) -> FSQ:
    torch.manual_seed(0)
    return FSQ(FSQConfig(latent_dim=latent_dim or len(levels), levels=levels, num_stages=num_stages))


def _scalars(**changes: int) -> LatentScalars:
    torch.manual_seed(0)
    values = {"latent_dim": 4, "num_scalars": 4, "num_values": 5}
    return LatentScalars(LatentScalarsConfig(**values | changes))


def _latents(num_dims: int, num_frames: int, *, seed: int = 0) -> Tensor:
    return torch.randn(2, num_dims, num_frames, generator=torch.Generator().manual_seed(seed))


def _constants(levels: int) -> tuple[float, float, float]:
    half_range = (levels - 1) * 1.001 / 2
    offset = 0.0 if levels % 2 else 0.5
    return half_range, offset, math.atanh(offset / half_range)


def _by_the_book(levels: tuple[int, ...], num_stages: int, dims: list[float]) -> tuple[list[int], list[float]]:
    """Codes and values of one frame, number by number, from the formulas of the paper."""
    codes, sums, left = [], [0.0] * len(levels), list(dims)
    for stage in range(num_stages):
        code, place = 0, 1
        for dim, size in enumerate(levels):
            half_range, offset, shift = _constants(size)
            scale = float(size - 1) ** -stage
            whole = round(math.tanh(left[dim] / scale + shift) * half_range - offset)
            code += (whole + size // 2) * place
            place *= size
            value = whole / (size // 2) * scale
            sums[dim] += value
            left[dim] -= value
        codes.append(code)
    return codes, sums


@pytest.mark.parametrize(("levels", "num_stages"), [((8, 6, 5), 1), ((3, 4, 5, 7), 3), ((4, 4, 4, 4, 4, 4), 2)])
def test_codes_and_values_are_those_of_the_formulas(levels: tuple[int, ...], num_stages: int) -> None:
    quantizer, latents = _fsq(*levels, num_stages=num_stages), 0.8 * _latents(len(levels), 200)
    codes = quantizer.encode(latents)
    decoded = quantizer.decode(codes)
    for item in range(2):
        for frame in range(200):
            expected, values = _by_the_book(levels, num_stages, latents[item, :, frame].tolist())
            assert codes[item, :, frame].tolist() == expected
            assert decoded[item, :, frame].tolist() == pytest.approx(values, abs=1e-6)
    assert len(codes[:, 0].unique()) > 50


def test_grids_are_as_published() -> None:
    """An even number of levels has one value more below zero, which stays in its place."""
    latents = torch.tensor([-9.0, -1.0, -0.3, 0.0, 0.3, 1.0, 9.0])[None, None]
    for levels, values in (
        (3, [-1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0]),
        (4, [-1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 0.5]),
        (5, [-1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.0]),
    ):
        quantizer = _fsq(levels)
        assert quantizer.decode(quantizer.encode(latents))[0, 0].tolist() == values
        every = quantizer.decode(torch.arange(levels)[None, None])[0, 0]
        assert every.tolist() == [(digit - levels // 2) / (levels // 2) for digit in range(levels)]


def test_codes_stay_within_the_levels() -> None:
    """The range is a thousandth wider than the levels, to reach the last one; of many levels that is a whole one."""
    for levels in (3, 1000, 1001, 1004, 4001):
        quantizer = _fsq(levels)
        assert quantizer.encode(torch.tensor([[[-99.0, 99.0]]])).tolist() == [[[0, levels - 1]]]


def test_the_first_dim_is_the_least_significant() -> None:
    quantizer = _fsq(5, 4, 3)
    assert quantizer.codebook_sizes == (60,)
    assert quantizer.encode(torch.tensor([9.0, 0.0, 0.0])[None, :, None]).item() == 4 + 2 * 5 + 1 * 20
    assert quantizer.decode(torch.tensor([[[1]]]))[0, :, 0].tolist() == [-0.5, -1.0, -1.0]
    assert quantizer.decode(torch.tensor([[[20]]]))[0, :, 0].tolist() == [-1.0, -1.0, 0.0]


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (7, 5, 5, 5, 5), (4,) * 8, (1000, 3), (1001, 3)])
def test_every_code_comes_back(levels: tuple[int, ...]) -> None:
    """From the middle of each cell; a cast without rounding makes some codes smaller."""
    quantizer = _fsq(*levels)
    codes = torch.arange(quantizer.codebook_sizes[0])[None, None]
    values = quantizer.decode(codes).double()
    for dim, size in enumerate(levels):
        half_range, offset, shift = _constants(size)
        values[:, dim] = ((values[:, dim] * (size // 2) + offset) / half_range).clamp(
            -0.9999999, 0.9999999
        ).atanh() - shift
    assert torch.equal(quantizer.encode(values.float()), codes)


@given(latent_dim=st.integers(1, 6), seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 100.0]))
@settings(max_examples=25, deadline=None)
def test_each_stage_is_nearer(latent_dim: int, seed: int, scale: float) -> None:
    """While dims are within reach: each stage divides what is left into as many steps as it has levels."""
    quantizer, latents = _fsq(*([5] * latent_dim), num_stages=3), _latents(latent_dim, 300, seed=seed).tanh() * 0.8
    codes = quantizer.encode(latents)
    errors = [float((quantizer.decode(codes[:, :n]) - latents).square().mean()) for n in (1, 2, 3)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]
    far = quantizer.decode(quantizer.encode(latents * scale))
    assert float(far.abs().max()) <= 1 + 1 / 4 + 1 / 16


def test_the_gradient_passes_the_rounding_and_not_tanh() -> None:
    quantizer = _fsq(5, 4, num_stages=1)
    latents, weight = _latents(2, 40).requires_grad_(), _latents(2, 40, seed=1)
    (quantizer(latents).latents * weight).sum().backward()
    for dim, size in enumerate((5, 4)):
        half_range, _, shift = _constants(size)
        slope = (1 - (latents[:, dim] + shift).tanh().square()) * half_range / (size // 2)
        torch.testing.assert_close(latents.grad[:, dim], weight[:, dim] * slope, rtol=1e-5, atol=1e-6)  # type: ignore[index]


def test_every_stage_has_a_gradient_of_its_own() -> None:
    """What a stage takes away is a constant for the next one, so their derivatives add up."""
    quantizer = _fsq(5, num_stages=3)
    latents = _latents(1, 40)
    codes, slopes = quantizer.encode(latents), []
    for num_quantizers in (1, 2, 3):
        x = latents.clone().requires_grad_()
        quantizer(x, num_quantizers=num_quantizers).latents.sum().backward()
        slopes.append(x.grad)
    for stage in (1, 2):
        before = quantizer.decode(codes[:, :stage])
        expected = (1 - ((latents - before) * 4**stage).tanh().square()) * 2.002 / 2
        torch.testing.assert_close(slopes[stage] - slopes[stage - 1], expected, rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_fsq_learns_without_losses() -> None:
    torch.manual_seed(1)
    quantizer = _fsq(5, 5, 5, num_stages=2, latent_dim=6)
    assert quantizer(_latents(6, 3)).losses == {}
    mix = 0.5 * torch.randn(6, 6)
    errors, perplexities = _train(quantizer, mix, {})
    assert errors[-1] < 0.4 * errors[0]
    assert (perplexities[-1] > 1.3 * perplexities[0])[0]


def _train(quantizer: FSQ | LatentScalars, mix: Tensor, weights: dict[str, float]) -> tuple[list[float], list[Tensor]]:
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
    errors, perplexities = [], []
    for _ in range(200):
        latents = torch.einsum("de,bef->bdf", mix, torch.randn(2, 6, 100))
        quantized = quantizer(latents)
        error = (quantized.latents - latents).square().mean()
        loss = error + sum(weights[name] * value for name, value in quantized.losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(error.item())
        perplexities.append(quantized.stats["perplexity"])
    return errors, perplexities


def test_each_scalar_goes_to_the_nearest_of_its_own_values() -> None:
    quantizer = _scalars()
    with torch.no_grad():
        quantizer.scalars.copy_(torch.randn(4, 5))
    latents = _latents(4, 50)
    codes = quantizer.encode(latents)
    assert quantizer.codebook_sizes == (5, 5, 5, 5)
    for dim in range(4):
        values = quantizer.scalars[dim].tolist()
        for number, code in zip(latents[:, dim].flatten().tolist(), codes[:, dim].flatten().tolist(), strict=True):
            distances = [abs(number - value) for value in values]
            assert code == distances.index(min(distances))
        assert torch.equal(quantizer.decode(codes)[:, dim], quantizer.scalars[dim][codes[:, dim]])


def test_values_begin_evenly_spread_and_ties_go_to_the_lower_one() -> None:
    quantizer = _scalars()
    assert quantizer.scalars.tolist() == [[-0.5, -0.25, 0.0, 0.25, 0.5]] * 4
    assert quantizer.encode(torch.tensor([-0.375, 0.125, 7.0, -7.0])[None, :, None]).flatten().tolist() == [0, 2, 4, 0]


def test_rows_of_scalars_are_the_same_digits() -> None:
    """The first dim of a row is its least significant digit, and the dims' order is that of rows."""
    single, grouped, whole = _scalars(), _scalars(num_groups=2), _scalars(num_groups=1)
    latents = _latents(4, 100)
    digits = single.encode(latents)
    codes = grouped.encode(latents)
    assert grouped.codebook_sizes == (25, 25)
    assert torch.equal(codes[:, 0], digits[:, 0] + 5 * digits[:, 1])
    assert torch.equal(codes[:, 1], digits[:, 2] + 5 * digits[:, 3])
    assert torch.equal(whole.encode(latents)[:, 0], codes[:, 0] + 25 * codes[:, 1])
    every = torch.arange(625)[None, None]
    assert torch.equal(whole.encode(whole.decode(every)), every)
    assert torch.equal(grouped.decode(codes), single.decode(digits))


def test_what_teaches_scalars() -> None:
    quantizer, latents = _scalars(), _latents(4, 30).requires_grad_()
    weight = _latents(4, 30, seed=1)
    quantized = quantizer(latents)
    values = quantizer.decode(quantized.codes).detach()
    (quantized.latents * weight).sum().backward()
    assert torch.equal(latents.grad, weight), "straight through"  # type: ignore[arg-type]
    assert quantizer.scalars.grad is None, "by the losses alone"

    latents.grad = None
    losses = quantizer(latents).losses
    error = latents.detach() - values
    assert losses["commitment"].item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert losses["codebook"].item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    losses["commitment"].backward()
    torch.testing.assert_close(latents.grad, 2 * error / error.numel(), rtol=1e-5, atol=0)
    assert quantizer.scalars.grad is None
    latents.grad = None
    losses["codebook"].backward()
    assert latents.grad is None
    expected = torch.zeros(4, 5)
    for dim in range(4):
        expected[dim].index_add_(0, quantized.codes[:, dim].flatten(), -2 * error[:, dim].flatten() / error.numel())
    torch.testing.assert_close(quantizer.scalars.grad, expected, rtol=1e-5, atol=1e-7)  # sums in another order


def test_scalars_learn() -> None:
    torch.manual_seed(1)
    quantizer = LatentScalars(LatentScalarsConfig(latent_dim=6, num_scalars=4, num_values=6))
    errors, perplexities = _train(quantizer, 0.5 * torch.randn(6, 6), {"commitment": 0.25, "codebook": 1.0})
    assert errors[-1] < 0.4 * errors[0]
    assert float(perplexities[0].min()) < 5.0 < float(perplexities[-1].min())


def test_impossible_configurations_are_value_errors() -> None:
    with pytest.raises(ValueError, match="latent_dim and num_stages must be positive"):
        FSQConfig(latent_dim=3, levels=(5, 5, 5), num_stages=0)
    with pytest.raises(ValueError, match=r"levels=\(5, 2\): each must be 3 or more"):
        FSQConfig(latent_dim=3, levels=(5, 2))
    with pytest.raises(ValueError, match=r"levels=\(\): each must be 3 or more"):
        FSQConfig(latent_dim=3, levels=())
    with pytest.raises(ValueError, match="a row would have 78125 codes, at most 65536 are possible"):
        FSQConfig(latent_dim=3, levels=(5,) * 7)
    with pytest.raises(ValueError, match="must be positive, and num_values 2 or more"):
        LatentScalarsConfig(latent_dim=3, num_scalars=3, num_values=1)
    with pytest.raises(ValueError, match="must be positive"):
        LatentScalarsConfig(latent_dim=3, num_scalars=3, num_groups=0)
    with pytest.raises(ValueError, match="num_scalars=8 is not a multiple of num_groups=3"):
        LatentScalarsConfig(latent_dim=3, num_scalars=8, num_groups=3)
    with pytest.raises(ValueError, match="a row would have 100000 codes, at most 65536 are possible: more groups"):
        LatentScalarsConfig(latent_dim=3, num_scalars=10, num_groups=2)
    with pytest.raises(ValueError, match=r"quantizer: levels=\(2,\): each must be 3 or more"):
        codec_config.from_dict({"type": "fsq", "latent_dim": 3, "levels": [2]}, "quantizer")
