"""Lookup-free and binary spherical quantization; what all quantizers of single dims share is in another file."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.quantizers.binary import BinarySpherical, BinarySphericalConfig, LookupFree, LookupFreeConfig


def _lfq(num_bits: int, *, latent_dim: int | None = None, **changes: float) -> LookupFree:
    torch.manual_seed(0)
    return LookupFree(LookupFreeConfig(latent_dim=latent_dim or num_bits, num_bits=num_bits, **changes))  # type: ignore[arg-type]


def _bsq(num_bits: int, *, latent_dim: int | None = None, **changes: float) -> BinarySpherical:
    torch.manual_seed(0)
    config = BinarySphericalConfig(latent_dim=latent_dim or num_bits, num_bits=num_bits, **changes)  # type: ignore[arg-type]
    return BinarySpherical(config)


def _latents(num_dims: int, num_frames: int, *, seed: int = 0, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, num_dims, num_frames, generator=torch.Generator().manual_seed(seed))


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(-1)


def _soft_codes(dims_ND: Tensor, bit_value: float, inverse_temperature: float) -> Tensor:
    """The published softmax over the whole codebook [N, 2^D], code by code."""
    corners = torch.tensor(list(itertools.product([-bit_value, bit_value], repeat=dims_ND.shape[1])))
    return (2 * inverse_temperature * dims_ND @ corners.T).softmax(dim=1)


def test_bits_are_signs_and_the_first_counts_most() -> None:
    quantizer = _lfq(4)
    frames = torch.tensor([[0.1, -3.0, 2.0, -0.1], [0.0, -0.0, 0.0, 1e-30], [5.0, 5.0, 5.0, 5.0]])
    codes = quantizer.encode(frames.t()[None])
    assert codes.tolist() == [[[0b1010, 0b0001, 0b1111]]], "zero is not above zero"
    assert quantizer.decode(codes)[0].t().tolist() == [[1, -1, 1, -1], [-1, -1, -1, 1], [1, 1, 1, 1]]


def test_focalcodec_has_the_same_codes_and_values() -> None:
    """13 bits of plus and minus 1 / sqrt(13), the bit 1 above zero, the most significant first."""
    quantizer, latents = _bsq(13), _latents(13, 60)
    codes = quantizer.encode(latents)
    expected = [sum(2 ** (12 - i) for i in range(13) if frame[i] > 0) for frame in latents[0].t().tolist()]
    assert codes[0, 0].tolist() == expected
    signs = torch.where(latents > 0, 1.0, -1.0)
    torch.testing.assert_close(quantizer.decode(codes), signs / math.sqrt(13), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [_lfq, _bsq])
@pytest.mark.parametrize(("num_bits", "num_groups"), [(1, 1), (10, 1), (12, 4), (16, 1)])
def test_every_code_comes_back(make: Callable[..., LookupFree], num_bits: int, num_groups: int) -> None:
    quantizer = make(num_bits, num_groups=num_groups)
    size = 2 ** (num_bits // num_groups)
    assert quantizer.codebook_sizes == (size,) * num_groups
    codes = torch.stack([(torch.arange(size) * (2 * row + 1) + row) % size for row in range(num_groups)])[None]
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


@given(latents=st.lists(st.floats(-9, 9, width=32), min_size=18, max_size=18))
@settings(max_examples=50, deadline=None)
def test_rows_in_a_line_are_one_number(latents: list[float]) -> None:
    frame = torch.tensor(latents)[None, :, None]
    whole = sum(2 ** (17 - i) for i, number in enumerate(latents) if number > 0)
    for quantizer in (_lfq(18, num_groups=2), _lfq(18, num_groups=3), _bsq(18, num_groups=2)):
        bits = 18 // len(quantizer.codebook_sizes)
        codes = quantizer.encode(frame)[0, :, 0].tolist()
        assert sum(code << (bits * place) for place, code in enumerate(reversed(codes))) == whole
    assert _lfq(18, num_groups=2).decode(quantizer.encode(frame)).tolist() == torch.where(frame > 0, 1.0, -1.0).tolist()


def test_gradients_pass_straight_through() -> None:
    quantizer, weight = _lfq(6), _latents(6, 20, seed=1)
    latents = _latents(6, 20).requires_grad_()
    (quantizer(latents).latents * weight).sum().backward()
    assert torch.equal(latents.grad, weight)  # type: ignore[arg-type]


def test_gradients_only_turn_what_lies_on_a_sphere() -> None:
    quantizer, weight = _bsq(6), _latents(6, 20, seed=1)
    latents = _latents(6, 20).requires_grad_()
    quantized = quantizer(latents)
    (quantized.latents * weight).sum().backward()
    length = latents.detach().norm(dim=1, keepdim=True)
    unit = latents.detach() / length
    expected = (weight - unit * (unit * weight).sum(1, keepdim=True)) / length
    torch.testing.assert_close(latents.grad, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantized.latents.norm(dim=1), torch.ones(2, 20), rtol=1e-6, atol=0)
    silent = torch.zeros(1, 6, 3).requires_grad_()
    quantizer(silent).latents.sum().backward()
    assert float(silent.grad.abs().max()) <= 1000, "1e12 with what `normalize` has for that"  # type: ignore[union-attr]


@pytest.mark.parametrize("inverse_temperature", [0.3, 1.0, 100.0])
def test_entropies_are_those_of_the_whole_codebook(inverse_temperature: float) -> None:
    latents = 0.3 * _latents(6, 50)
    rows = latents.transpose(1, 2).flatten(0, 1)
    units = torch.nn.functional.normalize(rows, dim=1)
    for quantizer, dims in (
        (_lfq(6, inverse_temperature=inverse_temperature), rows),
        (_bsq(6, inverse_temperature=inverse_temperature), units),
    ):
        losses = quantizer(latents).losses
        soft = _soft_codes(dims, quantizer.bit_value, inverse_temperature)
        # Sums over 64 codes against sums over 6 bits.
        torch.testing.assert_close(losses["sample_entropy"], _entropy(soft).mean(), rtol=1e-4, atol=1e-5)
        expected = math.log(64) - _entropy(soft.mean(0))
        torch.testing.assert_close(losses["diversity"], expected, rtol=1e-4, atol=1e-5)


def test_bits_of_the_spherical_entropy_are_as_published() -> None:
    """sigmoid(4 t z / sqrt(d)) for a single bit, and the entropy of the batch over single bits."""
    quantizer, latents = _bsq(6, entropy_bits=1, inverse_temperature=2.0), _latents(6, 50)
    units = torch.nn.functional.normalize(latents, dim=1).transpose(1, 2).flatten(0, 1)
    ones = torch.sigmoid(4 * 2.0 * units / math.sqrt(6))
    soft = torch.stack([ones, 1 - ones], dim=2)
    losses = quantizer(latents).losses
    torch.testing.assert_close(losses["sample_entropy"], _entropy(soft).sum(1).mean(), rtol=1e-5, atol=0)
    expected = 6 * math.log(2) - _entropy(soft.mean(0)).sum()
    torch.testing.assert_close(losses["diversity"], expected, rtol=1e-3, atol=1e-6)  # a small difference of sums


def test_factors_are_neighbouring_bits_of_a_row() -> None:
    """10 bits in 2 rows with factors of 3 bits: 3 and 2 in each row, and never bits of two rows."""
    quantizer, latents = _lfq(10, num_groups=2, entropy_bits=3, inverse_temperature=1.0), _latents(10, 40)
    rows = latents.transpose(1, 2).flatten(0, 1)
    expected = 10 * math.log(2)
    for first, last in ((0, 3), (3, 5), (5, 8), (8, 10)):
        expected -= float(_entropy(_soft_codes(rows[:, first:last], 1.0, 1.0).mean(0)))
    assert quantizer(latents).losses["diversity"].item() == pytest.approx(expected, abs=1e-4)
    whole = _lfq(10, entropy_bits=10, inverse_temperature=1.0)(latents).losses["diversity"]
    assert float(whole) > expected + 1e-3, "factors see less than the whole does"


def test_absent_rows_are_in_no_entropy() -> None:
    quantizer, latents = _lfq(6, num_groups=2, inverse_temperature=1.0), _latents(6, 40, batch_size=3)
    mixed = quantizer(latents, num_quantizers=torch.tensor([2, 1, 1])).losses["diversity"]
    first = _lfq(3, inverse_temperature=1.0)(latents[:, :3]).losses["diversity"]
    second = _lfq(3, inverse_temperature=1.0)(latents[:1, 3:]).losses["diversity"]
    torch.testing.assert_close(mixed, first + second, rtol=1e-4, atol=1e-6)
    alone = quantizer(latents, num_quantizers=1).losses["diversity"]
    torch.testing.assert_close(alone, first, rtol=1e-4, atol=1e-6)


def test_commitments_are_as_published() -> None:
    latents = _latents(6, 40)
    found = _lfq(6)(latents).losses["commitment"]
    torch.testing.assert_close(found, (latents - latents.sign()).square().mean(), rtol=1e-5, atol=0)
    units = torch.nn.functional.normalize(latents, dim=1)
    errors = (units - latents.sign() / math.sqrt(6)).square().sum(1)
    torch.testing.assert_close(_bsq(6)(latents).losses["commitment"], errors.mean(), rtol=1e-5, atol=0)
    assert float(errors.max()) < 2 - 2 / math.sqrt(6)


def test_diversity_tells_use() -> None:
    every = _lfq(8).decode(torch.arange(256)[None, None])
    assert _lfq(8)(every).losses["diversity"].item() == pytest.approx(0.0, abs=1e-5)
    one = torch.ones(1, 8, 256)
    assert _lfq(8)(one).losses["diversity"].item() == pytest.approx(8 * math.log(2), abs=1e-5)
    stats = _lfq(8)(every).stats
    assert stats["perplexity"].tolist() == pytest.approx([256], rel=1e-4)
    assert stats["dead_fraction"].tolist() == [0.0]
    assert stats["bit_entropy"].tolist() == [1.0]
    half = _lfq(8, num_groups=2)(torch.cat([one[:, :6], every[:, 6:]], dim=1)).stats
    assert half["bit_entropy"].tolist() == [0.0, 0.5]
    few = _lfq(16)(_latents(16, 10, batch_size=1)).stats
    assert few["dead_fraction"].item() == pytest.approx(1 - 10 / 2**16)
    assert few["bit_entropy"].item() > 0.7


def test_hard_bits_have_finite_gradients() -> None:
    """Probabilities of 0 and 1 in float32, whose logarithm is infinite."""
    latents = (100 * _latents(6, 5)).requires_grad_()
    sum(_lfq(6)(latents).losses.values()).backward()  # type: ignore[union-attr]
    assert torch.isfinite(latents.grad).all()  # type: ignore[arg-type]


def test_batches_of_several_processes_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with unequal batches, one after the other, and what they would tell each other."""
    quantizer, latents = _lfq(6, latent_dim=5, inverse_temperature=1.0), _latents(5, 40, batch_size=5)
    whole = quantizer(latents).losses["diversity"]
    (expected,) = torch.autograd.grad(whole, quantizer.in_proj.weight)
    told: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: told.append(values.clone()))
    parts = [latents[:2], latents[2:]]
    for part in parts:
        quantizer(part)
    gradients = []
    for part, other in zip(parts, reversed(told), strict=True):
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda values, other=other: values.add_(other))
        loss = quantizer(part).losses["diversity"]
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)  # sums in another order
        gradients += torch.autograd.grad(loss, quantizer.in_proj.weight)
    torch.testing.assert_close((gradients[0] + gradients[1]) / 2, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", [_lfq, _bsq])
def test_it_learns(make: Callable[..., LookupFree]) -> None:
    """From latents that a fresh projection puts on few codes."""
    quantizer = make(6, latent_dim=6)
    torch.manual_seed(1)
    encoder, decoder, mix = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6), 0.5 * torch.randn(6, 6)
    with torch.no_grad():
        encoder.bias.fill_(2.0)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    weights = {"sample_entropy": 0.1, "diversity": 0.1, "commitment": 0.25}
    errors, perplexities = [], []
    for _ in range(200):
        frames = torch.randn(2, 100, 6) @ mix
        quantized = quantizer(encoder(frames).transpose(1, 2))
        error = (decoder(quantized.latents.transpose(1, 2)) - frames).square().mean()
        optimizer.zero_grad()
        (error + sum(weights[name] * value for name, value in quantized.losses.items())).backward()
        optimizer.step()
        errors.append(error.item())
        perplexities.append(quantized.stats["perplexity"].item())
    assert errors[-1] < 0.5 * errors[0]
    assert perplexities[-1] > 3 * perplexities[0]


def test_impossible_configurations_are_value_errors() -> None:
    with pytest.raises(ValueError, match="num_bits=13 is not a multiple of num_groups=2"):
        _lfq(13, num_groups=2)
    with pytest.raises(ValueError, match="a row would have 262144 codes, at most 65536 are possible: more groups"):
        _bsq(18)
    with pytest.raises(ValueError, match="inverse_temperature must be positive"):
        _lfq(8, inverse_temperature=0.0)
    with pytest.raises(ValueError, match="entropy_bits and inverse_temperature must be positive"):
        _bsq(8, entropy_bits=0)
