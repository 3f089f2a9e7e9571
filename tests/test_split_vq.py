import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.config import build, from_dict, to_dict
from codec.quantizers.interface import stage_gradient_norms
from codec.quantizers.residual import ResidualVQ, ResidualVQConfig
from codec.quantizers.split import SplitVQ, SplitVQConfig

BATCH, DIMS, STAGES, SIZE, SMALL = 3, 8, 4, 16, 5


def _quantizer(**changes: object) -> SplitVQ:
    torch.manual_seed(0)
    values: dict[str, object] = {
        "latent_dim": DIMS,
        "num_stages": STAGES,
        "codebook_size": SIZE,
        "codebook_dim": SMALL,
    }
    quantizer: SplitVQ = build(SplitVQConfig(**values | changes))  # type: ignore[arg-type]
    return quantizer


def _latents(num_frames: int, *, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, DIMS, num_frames, generator=torch.Generator().manual_seed(seed))


def test_two_parts_by_hand() -> None:
    """Row 0 sees the first dim, rows 1 and 2 the second; each is put back where it comes from."""
    quantizer = _quantizer(latent_dim=2, num_stages=3, codebook_size=2, codebook_dim=1)
    with torch.no_grad():
        quantizer.semantic.input_proj.weight.copy_(torch.tensor([[1.0, 0.0]]))
        quantizer.semantic.output_proj.weight.copy_(torch.tensor([[10.0], [0.0]]))
        quantizer.acoustic.input_proj.weight.copy_(torch.tensor([[0.0, 1.0]]))
        quantizer.acoustic.output_proj.weight.copy_(torch.tensor([[1.0], [1.0]]))
    quantizer.semantic.vq.codebooks.copy_(torch.tensor([[[0.0], [1.0]]]))
    quantizer.acoustic.vq.codebooks.copy_(torch.tensor([[[2.0], [4.0]], [[-0.5], [0.5]]]))
    latents = torch.tensor([[[0.9, 0.2], [4.25, 1.75]]])
    assert quantizer.encode(latents).tolist() == [[[1, 0], [1, 0], [1, 0]]]
    quantized = quantizer(latents)
    assert quantized.latents.tolist() == [[[14.5, 1.5], [4.5, 1.5]]]
    assert quantizer.decode(quantized.codes[:, :1]).tolist() == [[[10.0, 0.0], [0.0, 0.0]]]
    # Rows: (0.1^2 + 0.2^2) / 2, (0.25^2 + 0.25^2) / 2, (0.25^2 + 0.25^2) / 2.
    assert quantized.losses["commitment"].item() == pytest.approx((0.025 + 0.0625 + 0.0625) / 3)


def test_both_parts_see_the_same_latents_and_their_outputs_are_added() -> None:
    quantizer, latents = _quantizer(), _latents(20)
    plain = ResidualVQ(ResidualVQConfig(latent_dim=SMALL, num_stages=STAGES - 1, codebook_size=SIZE))
    plain.codebooks.copy_(quantizer.acoustic.vq.codebooks)
    weights = {name: value for name, value in quantizer.state_dict().items() if name.endswith("weight")}
    small = torch.einsum("dD,bDf->bdf", weights["acoustic.input_proj.weight"], latents)
    codes = quantizer.encode(latents)
    assert torch.equal(codes[:, 1:], plain.encode(small))
    semantic = torch.einsum("dD,bDf->bfd", weights["semantic.input_proj.weight"], latents)
    distances = (semantic[:, :, None] - quantizer.semantic.vq.codebooks[0]).norm(dim=-1)
    assert torch.equal(codes[:, 0], distances.argmin(-1))
    entries = quantizer.semantic.vq.codebooks[0][codes[:, 0]]
    expected = torch.einsum("Dd,bfd->bDf", weights["semantic.output_proj.weight"], entries)
    expected += torch.einsum("Dd,bdf->bDf", weights["acoustic.output_proj.weight"], plain.decode(codes[:, 1:]))
    torch.testing.assert_close(quantizer.decode(codes), expected, rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_training_and_inference_agree(gradient: str) -> None:
    quantizer, latents = _quantizer(gradient=gradient), _latents(50)
    quantized = quantizer(latents)
    assert torch.equal(quantized.codes, quantizer.encode(latents))
    # In training projections are not computed row by row.
    torch.testing.assert_close(quantized.latents, quantizer.decode(quantized.codes), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(latents)
        assert torch.equal(quantizer.encode(latents), quantized.codes)
    assert mixed.latents.dtype == torch.float32
    assert torch.equal(mixed.latents, quantized.latents)


def test_a_frame_does_not_depend_on_those_beside_it() -> None:
    quantizer, latents = _quantizer(), _latents(40)
    codes = quantizer.encode(latents)
    decoded = quantizer.decode(codes)
    for frames in (slice(0, 1), slice(17, 20)):
        assert torch.equal(quantizer.encode(latents[1:2, :, frames]), codes[1:2, :, frames])
        assert torch.equal(quantizer.decode(codes[1:2, :, frames]), decoded[1:2, :, frames])


@given(num_quantizers=st.integers(1, STAGES), num_frames=st.integers(0, 20), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_prefixes_are_prefixes(num_quantizers: int, num_frames: int, seed: int) -> None:
    quantizer, latents = _quantizer(), _latents(num_frames, seed=seed)
    assert quantizer.valid_num_quantizers == (1, 2, 3, 4)
    whole = quantizer.encode(latents)
    codes = quantizer.encode(latents, num_quantizers=num_quantizers)
    assert torch.equal(codes, whole[:, :num_quantizers])
    absent = whole.clone()
    absent[:, num_quantizers:] = -1
    assert torch.equal(quantizer.decode(absent), quantizer.decode(codes))
    trained = quantizer(latents, num_quantizers=num_quantizers)
    assert torch.equal(trained.codes, absent)
    torch.testing.assert_close(trained.latents, quantizer.decode(codes), rtol=1e-5, atol=1e-5)  # not row by row


def test_absent_rows_and_masked_frames_teach_nothing() -> None:
    latents, prefixes = _latents(30), torch.tensor([1, 2, 4])
    mask = torch.ones(BATCH, 30, dtype=torch.bool)
    mask[2, 20:] = False
    results = []
    for filling in (0.0, 1e9, float("nan")):
        quantizer = _quantizer()
        changed = latents.clone()
        changed[2, :, 20:] = filling
        changed.requires_grad_()
        found = quantizer(changed, mask, num_quantizers=prefixes)
        (sum(found.losses.values()) + found.latents.square().sum()).backward()
        assert (found.codes[0, 1:] == -1).all()
        assert (found.codes[1, 2:] == -1).all()
        assert (found.codes[2, :, 20:] == -1).all()
        assert (found.codes[2, :, :20] >= 0).all()
        assert not found.latents[2, :, 20:].any()
        assert not changed.grad[2, :, 20:].any()
        quantizer.update(found)
        gradients = [parameter.grad for parameter in quantizer.parameters()]
        buffers = [buffer.clone() for buffer in quantizer.buffers()]
        results.append([changed.grad, found.latents, *gradients, *buffers, *found.stats.values()])
    for one, *others in zip(*results, strict=True):
        assert one.isfinite().all()
        assert all(torch.equal(one, other) for other in others)
    # An item with row 0 alone teaches the acoustic projections nothing.
    quantizer = _quantizer()
    quantized = quantizer(latents, num_quantizers=1)
    (sum(quantized.losses.values()) + quantized.latents.square().sum()).backward()
    assert not any(parameter.grad.any() for parameter in quantizer.acoustic.parameters())
    assert all(parameter.grad.any() for parameter in quantizer.semantic.parameters())
    assert quantized.losses["commitment"].item() == pytest.approx(
        quantizer(latents).stats["commitment"][0].item() / STAGES
    )


def test_gradients_of_the_quantized_latents() -> None:
    """Straight through the choice of entries, on through the projections of both parts, and not to the entries."""
    quantizer, weight = _quantizer(), _latents(10, seed=1)
    latents = _latents(10).requires_grad_()
    quantized = quantizer(latents)
    (quantized.latents * weight).sum().backward()
    parts = (quantizer.semantic, quantizer.acoustic)
    jacobian = sum(part.output_proj.weight.detach() @ part.input_proj.weight.detach() for part in parts)
    # Sums in another order.
    torch.testing.assert_close(latents.grad, torch.einsum("dD,bdf->bDf", jacobian, weight), rtol=0, atol=1e-5)
    for part, codes in zip(parts, (quantized.codes[:, :1], quantized.codes[:, 1:]), strict=True):
        expected = torch.einsum("bDf,bdf->Dd", weight, part.vq.decode(codes))
        torch.testing.assert_close(part.output_proj.weight.grad, expected, rtol=1e-4, atol=1e-4)
    assert (stage_gradient_norms(quantizer, _latents(50)) > 1e-3).all(), "every row commits the encoder"
    turned = _latents(10).requires_grad_()
    (_quantizer(gradient="rotation")(turned).latents * weight).sum().backward()
    assert not torch.allclose(turned.grad, latents.grad)


def test_k_means_sets_and_updates_move_both_parts() -> None:
    """They learn what residual quantizers learn from the projected latents, and from codes as they were chosen."""
    quantizer, latents = _quantizer(), _latents(100)
    assert quantizer.num_frames_to_initialize == 16 * SIZE
    with pytest.raises(ValueError, match="15 frames are too few to initialise 16 entries"):
        quantizer.initialize(_latents(5))
    plain = ResidualVQ(ResidualVQConfig(latent_dim=SMALL, num_stages=STAGES - 1, codebook_size=SIZE))
    with torch.no_grad():
        small = quantizer.acoustic.project(latents)
    quantizer.initialize(latents, seed=3)
    plain.initialize(small, seed=3)
    assert torch.equal(quantizer.acoustic.vq.codebooks, plain.codebooks)
    quantized, expected = quantizer(latents), plain(small)
    with torch.no_grad():  # as an optimizer's step before the update does
        quantizer.acoustic.input_proj.weight.mul_(2.0)
    before = quantizer.semantic.vq.codebooks.clone()
    quantizer.update(quantized)
    plain.update(expected)
    torch.testing.assert_close(quantizer.acoustic.vq.codebooks, plain.codebooks, rtol=1e-5, atol=1e-6)
    assert not torch.equal(quantizer.semantic.vq.codebooks, before)
    assert quantized.inputs.shape == (BATCH, 2 * SMALL, 100)


def test_it_learns() -> None:
    quantizer = _quantizer()
    torch.manual_seed(1)
    quantizer.initialize(2 * _latents(100))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
    history = []
    for step in range(150):
        latents = 2 * _latents(40, seed=step)
        quantized = quantizer(latents)
        error = (quantized.latents - latents).square().mean()
        optimizer.zero_grad()
        (error + 0.25 * quantized.losses["commitment"]).backward()
        optimizer.step()
        quantizer.update(quantized)
        history.append(error.item())
    assert sum(history[-10:]) < 0.5 * sum(history[:10])
    assert (quantized.stats["dead_fraction"] < 0.1).all()


def test_training_goes_on_where_it_was_left() -> None:
    first, latents = _quantizer(), _latents(50)
    first.initialize(latents)
    for seed in range(3):
        first.update(first(_latents(50, seed=seed)))
    second = build(from_dict(to_dict(first.config)))
    second.load_state_dict(first.state_dict())
    second.load_training_state(copy.deepcopy(first.training_state()))
    for quantizer in (first, second):
        quantizer.update(quantizer(latents))
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_its_state_dict_has_the_parts_of_a_published_file() -> None:
    """An importer fills these from the weights of 1x1 convolutions, and entries from sums over counts."""
    config = from_dict({"type": "split_vq", "latent_dim": 512})
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in SplitVQ(config).state_dict().items()}
    assert shapes == {
        "semantic.input_proj.weight": (256, 512),
        "semantic.output_proj.weight": (512, 256),
        "semantic.vq.codebooks": (1, 2048, 256),
        "acoustic.input_proj.weight": (256, 512),
        "acoustic.output_proj.weight": (512, 256),
        "acoustic.vq.codebooks": (31, 2048, 256),
    }


def test_stats_are_per_row() -> None:
    quantizer = _quantizer()
    quantizer.semantic.vq.codebooks.zero_()
    stats = quantizer(_latents(20)).stats
    assert {stat.shape for stat in stats.values()} == {(STAGES,)}
    assert stats["perplexity"][0].item() == pytest.approx(1.0)
    assert stats["dead_fraction"][0].item() == pytest.approx(15 / 16)
    assert (stats["dead_fraction"][1:] < 15 / 16).all()


def test_callers_mistakes_are_value_errors() -> None:
    quantizer = _quantizer()
    with pytest.raises(ValueError, match="each must be one of"):
        quantizer(_latents(3), num_quantizers=torch.tensor([1, 2, 5]))
    with pytest.raises(ValueError, match="num_quantizers=0 is not one of"):
        quantizer.encode(_latents(3), num_quantizers=0)
    with pytest.raises(ValueError, match=r"codes must lie in -1\.\.15, got 0\.\.16"):
        quantizer.decode(torch.tensor([[[0, 16]]]))
    with pytest.raises(ValueError, match="num_stages at least 2"):
        _quantizer(num_stages=1)
    with pytest.raises(ValueError, match="ema_decay"):
        _quantizer(ema_decay=1.0)
    with pytest.raises(ValueError, match="gradient='none' is not one of"):
        _quantizer(gradient="none")


@pytest.mark.parametrize("num_rows", [1, 2, STAGES])
def test_what_is_taught_to_a_stage_passes_the_projections_of_its_part(num_rows: int) -> None:
    quantizer, latents = _quantizer(), _latents(20).requires_grad_()
    codes = quantizer(latents).codes
    stages = [quantizer.through_stage(latents, codes, stage) for stage in range(num_rows)]
    torch.testing.assert_close(torch.stack(stages).sum(0), quantizer.decode(codes[:, :num_rows]), rtol=0, atol=1e-5)
    wanted = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    part, other = quantizer.semantic, quantizer.acoustic
    if num_rows > 1:
        part, other = other, part
    (stages[-1] * wanted).sum().backward()
    expected = part.input_proj.weight.mT @ part.output_proj.weight.mT @ wanted
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad, expected, rtol=0, atol=1e-5)
    assert all(projection.weight.grad is not None for projection in (part.input_proj, part.output_proj))
    assert all(projection.weight.grad is None for projection in (other.input_proj, other.output_proj))
