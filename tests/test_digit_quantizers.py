"""What holds for every quantizer of single dimensions, whatever its grid; the grids have tests of their own."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec import config as codec_config
from codec.quantizers.binary import BinarySphericalConfig, LookupFreeConfig
from codec.quantizers.digits import DigitQuantizer, usage_of_codes
from codec.quantizers.interface import usage
from codec.quantizers.scalar import FSQConfig, LatentScalarsConfig

BATCH, DIMS = 3, 6
CONFIGS = {
    "fsq": FSQConfig(latent_dim=DIMS, levels=(5, 4, 3), num_stages=1),
    "residual fsq": FSQConfig(latent_dim=DIMS, levels=(5, 4, 3), num_stages=3),
    "residual fsq, bare": FSQConfig(latent_dim=DIMS, levels=(5, 4, 3, 5, 4, 3), num_stages=2),
    "a row per scalar": LatentScalarsConfig(latent_dim=DIMS, num_scalars=4, num_values=5),
    "grouped scalars, bare": LatentScalarsConfig(latent_dim=DIMS, num_scalars=6, num_values=5, num_groups=3),
    "lookup-free": LookupFreeConfig(latent_dim=DIMS, num_bits=9, num_groups=3, entropy_bits=2),
    "lookup-free, bare": LookupFreeConfig(latent_dim=DIMS, num_bits=6, num_groups=2),
    "spherical": BinarySphericalConfig(latent_dim=DIMS, num_bits=8, num_groups=2),
    "spherical, bare": BinarySphericalConfig(latent_dim=DIMS, num_bits=6),
}
ALL = pytest.mark.parametrize("name", CONFIGS)
SEVERAL = pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("fsq", "spherical, bare")])


def _quantizer(name: str) -> DigitQuantizer:
    torch.manual_seed(0)
    quantizer: DigitQuantizer = codec_config.build(CONFIGS[name])
    for parameter in quantizer.parameters():  # biases are zero in the beginning, and all scalars have the same values
        parameter.data += 0.1 * torch.randn_like(parameter)
    return quantizer


def _latents(num_frames: int, *, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, DIMS, num_frames, generator=torch.Generator().manual_seed(seed))


def _gradients(quantizer: DigitQuantizer, latents: Tensor, *given: Any, **more: Any) -> list[Tensor]:
    """The gradients of everything that `forward` returns, to the latents and to all parameters."""
    latents = latents.clone().requires_grad_()
    quantizer.zero_grad()
    quantized = quantizer(latents, *given, **more)
    (quantized.latents.square().sum() + sum(quantized.losses.values())).backward()
    return [leaf.grad.clone() for leaf in (latents, *quantizer.parameters()) if leaf.grad is not None]


@ALL
def test_training_and_inference_agree(name: str) -> None:
    quantizer, latents = _quantizer(name), _latents(50).requires_grad_()
    quantized = quantizer(latents)
    num_rows = len(quantizer.codebook_sizes)
    assert quantized.codes.dtype == torch.int64
    assert quantized.codes.shape == (BATCH, num_rows, 50)
    assert (quantized.codes >= 0).all()
    assert (quantized.codes < torch.tensor(quantizer.codebook_sizes)[:, None]).all()
    assert torch.equal(quantized.codes, quantizer.encode(latents))
    assert torch.equal(quantized.latents, quantizer.decode(quantized.codes))
    assert torch.equal(quantized.inputs, latents)
    assert not quantized.inputs.requires_grad
    for loss in quantized.losses.values():
        assert loss.shape == ()
    for stat in quantized.stats.values():
        assert stat.shape == (num_rows,)
        assert not stat.requires_grad
    for key, value in usage(quantized.codes.transpose(1, 2).flatten(0, 1), quantizer.codebook_sizes[0]).items():
        torch.testing.assert_close(quantized.stats[key], value, rtol=1e-5, atol=1e-6)  # sums in another order


@ALL
def test_autocast_changes_nothing(name: str) -> None:
    quantizer, latents = _quantizer(name), _latents(20)
    plain = quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(latents)
        assert torch.equal(quantizer.encode(latents), plain.codes)
        assert torch.equal(quantizer.decode(plain.codes), plain.latents)
    assert mixed.latents.dtype == torch.float32
    assert torch.equal(mixed.latents, plain.latents)
    assert mixed.losses == plain.losses
    assert quantizer(latents.bfloat16()).latents.dtype == torch.float32


@ALL
@given(data=st.data(), num_frames=st.integers(0, 20), seed=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_prefixes_are_prefixes(name: str, data: st.DataObject, num_frames: int, seed: int) -> None:
    quantizer, latents = _quantizer(name), _latents(num_frames, seed=seed)
    num_quantizers = data.draw(st.sampled_from(quantizer.valid_num_quantizers))
    whole = quantizer.encode(latents)
    codes = quantizer.encode(latents, num_quantizers=num_quantizers)
    assert torch.equal(codes, whole[:, :num_quantizers])
    absent = whole.clone()
    absent[:, num_quantizers:] = -1
    assert torch.equal(quantizer.decode(absent), quantizer.decode(codes))
    trained = quantizer(latents, num_quantizers=num_quantizers)
    assert torch.equal(trained.codes, absent)
    assert torch.equal(trained.latents, quantizer.decode(codes))
    per_item = quantizer(latents, num_quantizers=torch.full((BATCH,), num_quantizers))
    assert torch.equal(per_item.latents, trained.latents)
    assert per_item.losses == trained.losses


@ALL
def test_an_absent_row_adds_nothing(name: str) -> None:
    quantizer = _quantizer(name)
    codes = quantizer.encode(_latents(30))
    bias = 0.0
    if isinstance(quantizer.out_proj, torch.nn.Identity):
        assert quantizer.in_proj.state_dict() == {}
    else:
        bias = quantizer.out_proj.bias.detach()[:, None]
    rows = torch.arange(codes.shape[1])[:, None]
    alone = [quantizer.decode(torch.where(rows == row, codes, -1)) - bias for row in range(len(rows))]
    # Some addends in another order.
    torch.testing.assert_close(sum(alone) + bias, quantizer.decode(codes), rtol=0, atol=1e-5)
    assert not quantizer.decode(torch.full_like(codes, -1)).any(), "nor does the bias of the projection"


@ALL
def test_a_frame_does_not_depend_on_those_beside_it(name: str) -> None:
    quantizer, latents = _quantizer(name), _latents(70)
    with torch.no_grad():
        codes = quantizer.encode(latents)
        audible = quantizer.decode(codes)
        for first, last in ((0, 1), (3, 20), (33, 34), (50, 70)):
            part = latents[1:2, :, first:last]
            assert torch.equal(quantizer.encode(part), codes[1:2, :, first:last])
            assert torch.equal(quantizer.decode(codes[1:2, :, first:last]), audible[1:2, :, first:last])


@ALL
def test_masked_frames_teach_nothing(name: str) -> None:
    quantizer, latents = _quantizer(name), _latents(30)
    mask = torch.ones(BATCH, 30, dtype=torch.bool)
    mask[2, 20:] = False
    quantized = quantizer(latents, mask)
    assert torch.equal(quantized.codes[2, :, :20], quantizer.encode(latents)[2, :, :20])
    assert (quantized.codes[2, :, 20:] == -1).all()
    assert not quantized.latents[2, :, 20:].any()
    broken = latents.clone()
    broken[2, :, 20:] = torch.nan
    found = quantizer(broken, mask)
    assert found.losses == quantized.losses
    for key, stat in found.stats.items():
        assert torch.equal(stat, quantized.stats[key])
    before, after = _gradients(quantizer, latents, mask), _gradients(quantizer, broken, mask)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert not before[0][2, :, 20:].any()
    assert before[0][2, :, :20].any()
    nothing = quantizer(broken, torch.zeros_like(mask))
    assert all(float(loss.detach()) == 0.0 for loss in nothing.losses.values())
    assert nothing.stats["dead_fraction"].tolist() == [1.0] * len(quantizer.codebook_sizes)


@SEVERAL
def test_losses_are_means_over_real_frames(name: str) -> None:
    """A batch in which one item is short and another has fewer rows is worth what its parts are worth."""
    quantizer, latents = _quantizer(name), _latents(30)
    mask = torch.ones(BATCH, 30, dtype=torch.bool)
    mask[2, 20:] = False
    every = len(quantizer.codebook_sizes)
    losses = quantizer(latents, mask, num_quantizers=torch.tensor([every, 1, every])).losses
    parts = [
        quantizer(latents[:1]).losses,
        quantizer(latents[1:2], num_quantizers=1).losses,
        quantizer(latents[2:, :, :20]).losses,
    ]
    for key in losses.keys() - {"diversity"}:  # which is of the batch as a whole
        expected = sum(part[key] * weight for part, weight in zip(parts, (30, 30, 20), strict=True)) / 80
        torch.testing.assert_close(losses[key], expected, rtol=1e-5, atol=0)  # sums in another order


@SEVERAL
def test_absent_rows_teach_nothing(name: str) -> None:
    """Dims of absent rows have no gradient; those of the first row have what they have alone."""
    quantizer, latents = _quantizer(name), _latents(30)
    every = len(quantizer.codebook_sizes)
    whole = _gradients(quantizer, latents)[0]
    mixed = _gradients(quantizer, latents, num_quantizers=torch.tensor([1, every, every]))[0]
    short = _gradients(quantizer, latents, num_quantizers=torch.tensor([1, 1, 1]))[0]
    assert not torch.equal(mixed[0], whole[0])
    assert torch.isfinite(mixed).all()
    if isinstance(quantizer.in_proj, torch.nn.Identity) and name != "residual fsq, bare":
        first_dims = DIMS // every
        assert short[:, :first_dims].any()
        assert not short[:, first_dims:].any()


@ALL
def test_what_is_no_number_has_a_code_all_the_same(name: str) -> None:
    """So that a mistake upstream is told by whoever looks for it, and not by an index out of range."""
    quantizer, latents = _quantizer(name), _latents(3)
    latents[0, 0, 0], latents[1, :, 1], latents[2, :, 2] = torch.nan, torch.inf, -torch.inf
    codes = quantizer.encode(latents)
    assert (codes >= 0).all()
    assert (codes < torch.tensor(quantizer.codebook_sizes)[:, None]).all()


@ALL
def test_it_survives_its_configuration(name: str) -> None:
    quantizer, latents = _quantizer(name), _latents(9)
    written = json.loads(json.dumps(codec_config.to_dict(CONFIGS[name])))
    other = codec_config.build(codec_config.from_dict(written))
    assert type(other) is type(quantizer)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.encode(latents), quantizer.encode(latents))
    assert torch.equal(other.decode(other.encode(latents)), quantizer.decode(quantizer.encode(latents)))
    assert not {"radices", "place_values"} & quantizer.state_dict().keys()
    quantizer.update(quantizer(latents))
    quantizer.initialize(latents)
    assert quantizer.training_state() == {}
    assert quantizer.num_frames_to_initialize == 0
    assert quantizer.device == torch.device("cpu")


@given(st.lists(st.tuples(st.integers(-1, 6), st.integers(-1, 6)), max_size=30))
@settings(max_examples=50, deadline=None)
def test_usage_is_that_of_stored_codebooks(rows: list[tuple[int, int]]) -> None:
    codes = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
    for key, value in usage(codes, 7).items():
        torch.testing.assert_close(usage_of_codes(codes, 7)[key], value, rtol=1e-5, atol=1e-6)  # other sums


@ALL
def test_callers_mistakes_are_value_errors(name: str) -> None:
    quantizer = _quantizer(name)
    size, num_rows = quantizer.codebook_sizes[0], len(quantizer.codebook_sizes)
    with pytest.raises(ValueError, match="each must be one of"):
        quantizer(_latents(3), num_quantizers=torch.tensor([1, 1, num_rows + 1]))
    with pytest.raises(ValueError, match=f"num_quantizers={num_rows + 1} is not one of"):
        quantizer.encode(_latents(3), num_quantizers=num_rows + 1)
    with pytest.raises(ValueError, match=rf"codes must lie in -1\.\.{size - 1}, got 0\.\.{size}"):
        quantizer.decode(torch.tensor([[[0, size]]]))
