import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.config import build, from_dict, to_dict
from codec.quantizers.interface import stage_gradient_norms
from codec.quantizers.residual import ResidualVQ, ResidualVQConfig
from codec.quantizers.simvq import SimVQ, SimVQConfig

BATCH, DIMS, STAGES = 3, 6, 3


def _quantizer(**changes: object) -> SimVQ:
    torch.manual_seed(0)
    values: dict[str, object] = {"latent_dim": DIMS, "num_stages": STAGES, "codebook_size": 16}
    quantizer: SimVQ = build(SimVQConfig(**values | changes))  # type: ignore[arg-type]
    return quantizer


def _latents(num_frames: int, *, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, DIMS, num_frames, generator=torch.Generator().manual_seed(seed))


def test_a_codebook_behind_a_map_by_hand() -> None:
    quantizer = _quantizer(latent_dim=2, num_stages=1, codebook_size=2)
    with torch.no_grad():
        quantizer.codebooks.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        quantizer.weight.copy_(torch.tensor([[[0.0, 2.0], [3.0, 0.0]]]))
        quantizer.bias.copy_(torch.tensor([[10.0, 0.0]]))
    assert quantizer.tables().tolist() == [[[10.0, 3.0], [12.0, 0.0]]]
    latents = torch.tensor([[[10.0, 11.0], [2.0, 0.0]]])
    assert quantizer.encode(latents).tolist() == [[[0, 1]]]
    assert quantizer.decode(torch.tensor([[[0, 1, -1]]])).tolist() == [[[10.0, 12.0, 0.0], [3.0, 0.0, 0.0]]]
    losses = quantizer(latents).losses
    assert losses["commitment"].item() == losses["codebook"].item() == (1 + 1) / 4


def test_codes_are_those_of_the_formulas() -> None:
    quantizer, latents = _quantizer().double(), _latents(20).double()
    residual = latents.transpose(1, 2)
    codes, total = [], torch.zeros_like(residual)
    for book, weight, bias in zip(quantizer.codebooks, quantizer.weight, quantizer.bias, strict=True):
        entries = torch.stack([weight.detach() @ entry + bias.detach() for entry in book])
        codes.append(torch.stack([(residual - entry).norm(dim=-1) for entry in entries]).argmin(0))
        total += entries[codes[-1]]
        residual = residual - entries[codes[-1]]
    assert torch.equal(quantizer.encode(latents), torch.stack(codes, dim=1))
    # The same sums in float64, in another order.
    torch.testing.assert_close(quantizer.decode(torch.stack(codes, dim=1)).mT, total, rtol=0, atol=1e-12)
    losses = quantizer(latents[:, :, :1]).losses
    assert losses["commitment"].dtype == torch.float64


def test_its_tables_are_a_residual_quantizers_codebooks() -> None:
    quantizer, latents = _quantizer(), _latents(50)
    plain = ResidualVQ(ResidualVQConfig(latent_dim=DIMS, num_stages=STAGES, codebook_size=16))
    plain.codebooks.copy_(quantizer.tables())
    codes = quantizer.encode(latents)
    assert torch.equal(codes, plain.encode(latents))
    assert torch.equal(quantizer.decode(codes), plain.decode(codes))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_training_and_inference_agree(gradient: str) -> None:
    quantizer, latents = _quantizer(gradient=gradient), _latents(50)
    quantized = quantizer(latents)
    assert torch.equal(quantized.codes, quantizer.encode(latents))
    assert torch.equal(quantized.latents, quantizer.decode(quantized.codes))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(latents)
        assert torch.equal(quantizer.encode(latents), quantized.codes)
    assert mixed.latents.dtype == torch.float32
    assert torch.equal(mixed.latents, quantized.latents)


@given(num_quantizers=st.integers(1, STAGES), num_frames=st.integers(0, 20), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_prefixes_are_prefixes(num_quantizers: int, num_frames: int, seed: int) -> None:
    quantizer, latents = _quantizer(), _latents(num_frames, seed=seed)
    whole = quantizer.encode(latents)
    codes = quantizer.encode(latents, num_quantizers=num_quantizers)
    assert torch.equal(codes, whole[:, :num_quantizers])
    absent = whole.clone()
    absent[:, num_quantizers:] = -1
    assert torch.equal(quantizer.decode(absent), quantizer.decode(codes))
    trained = quantizer(latents, num_quantizers=num_quantizers)
    assert torch.equal(trained.codes, absent)
    assert torch.equal(trained.latents, quantizer.decode(codes))


@given(codes=st.lists(st.integers(0, 15), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_what_is_decoded_is_encoded_as_it_was(codes: list[int]) -> None:
    """One stage: an entry is nearest to itself, also when it is decoded through the map."""
    quantizer, given_codes = _quantizer(num_stages=1), torch.tensor([[codes]])
    assert torch.equal(quantizer.encode(quantizer.decode(given_codes)), given_codes)


def test_all_entries_move_with_the_map_and_the_codebook_stays() -> None:
    quantizer, latents = _quantizer(), _latents(5)
    frozen, before = quantizer.codebooks.clone(), quantizer.tables()
    assert {name for name, _ in quantizer.named_parameters()} == {"weight", "bias"}
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    quantizer(latents).losses["codebook"].backward()
    optimizer.step()
    assert torch.equal(quantizer.codebooks, frozen)
    assert ((quantizer.tables() - before).norm(dim=-1) > 1e-4).all(), "those of 48 entries that no frame chose, too"


def test_the_losses_teach_what_they_should() -> None:
    quantizer = _quantizer()
    latents = _latents(30).requires_grad_()
    quantized = quantizer(latents)
    (on_latents,) = torch.autograd.grad(quantized.losses["commitment"], latents, retain_graph=True)
    assert on_latents.any()
    quantized.losses["commitment"].backward(inputs=[latents, quantizer.weight], retain_graph=True)
    assert quantizer.weight.grad is None
    latents.grad = None
    quantized.losses["codebook"].backward(retain_graph=True)
    assert latents.grad is None
    # By hand: the gradient of the mean square through a table that is mapped as a whole.
    residual, expected = latents.detach().mT.reshape(-1, DIMS), []
    for stage in range(STAGES):
        weight = quantizer.weight[stage].detach().requires_grad_()
        entries = (quantizer.codebooks[stage] @ weight.T + quantizer.bias[stage].detach())[
            quantized.codes[:, stage].flatten()
        ]
        expected.append(torch.autograd.grad((entries - residual).square().mean() / STAGES, weight)[0])
        residual = residual - entries.detach()
    torch.testing.assert_close(quantizer.weight.grad, torch.stack(expected), rtol=1e-4, atol=1e-6)  # other orders
    quantizer.zero_grad()
    quantized.latents.sum().backward()
    assert quantizer.weight.grad is None


def test_the_gradient_passes_once_and_every_stage_commits_the_encoder() -> None:
    quantizer, weight = _quantizer(), _latents(10, seed=1)
    latents = _latents(10).requires_grad_()
    (quantizer(latents).latents * weight).sum().backward()
    assert torch.equal(latents.grad, weight), "the Jacobian is the identity, not once per stage"
    assert (stage_gradient_norms(quantizer, _latents(50)) > 1e-3).all(), "a chained residual gives zeros"
    turned = _latents(10).requires_grad_()
    (_quantizer(gradient="rotation")(turned).latents * weight).sum().backward()
    quantized = quantizer(latents).latents.detach()
    # A rotation keeps what the gradient says along the quantized vector, as seen along the input, scaled.
    ratio = quantized.norm(dim=1) / latents.detach().norm(dim=1)
    along = (turned.grad * latents.detach()).sum(1)
    torch.testing.assert_close(along, (weight * quantized).sum(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(turned.grad.norm(dim=1), weight.norm(dim=1) * ratio, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_absent_stages_and_masked_frames_teach_nothing(gradient: str) -> None:
    quantizer, latents = _quantizer(gradient=gradient), _latents(30)
    prefixes = torch.tensor([1, 2, 3])
    mask = torch.ones(BATCH, 30, dtype=torch.bool)
    mask[2, 20:] = False
    quantized = quantizer(latents, mask, num_quantizers=prefixes)
    assert (quantized.codes[0, 1:] == -1).all()
    assert (quantized.codes[2, :, 20:] == -1).all()
    assert (quantized.codes[2, :, :20] >= 0).all()
    assert not quantized.latents[2, :, 20:].any()
    results = []
    for filling in (0.0, 1e9, float("nan")):
        changed = latents.clone()
        changed[2, :, 20:] = filling
        changed.requires_grad_()
        quantizer.zero_grad()
        found = quantizer(changed, mask, num_quantizers=prefixes)
        (sum(found.losses.values()) + found.latents.square().sum()).backward()
        assert torch.equal(found.latents, quantized.latents)
        assert not changed.grad[2, :, 20:].any()
        results.append(
            [changed.grad, quantizer.weight.grad.clone(), quantizer.bias.grad.clone(), *found.stats.values()]
        )
    for one, *others in zip(*results, strict=True):
        assert one.isfinite().all()
        assert all(torch.equal(one, other) for other in others)
    # Row 0: a mean over all 80 real frames; row 2 over the 20 of the last item.
    residual = latents - quantizer.decode(quantizer.encode(latents, num_quantizers=1))
    first = residual.square().mean(1)[mask].mean()
    residual = latents - quantizer.decode(quantizer.encode(latents, num_quantizers=2))
    second = residual[1:].square().mean(1)[mask[1:]].mean()
    third = (latents - quantizer.decode(quantizer.encode(latents)))[2, :, :20].square().mean()
    expected = (first + second + third) / 3
    torch.testing.assert_close(quantized.losses["commitment"], expected, rtol=1e-5, atol=0)  # sums in another order


def test_it_learns() -> None:
    """Far from where it starts: as the map learns, the error falls and no entry is left unused."""
    quantizer = _quantizer(num_stages=1, codebook_size=32)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.1)
    history = []
    for step in range(100):
        quantized = quantizer(3 + 4 * _latents(200, seed=step))
        optimizer.zero_grad()
        (quantized.losses["codebook"] + 0.25 * quantized.losses["commitment"]).backward()
        optimizer.step()
        history.append((quantized.losses["codebook"].item(), *(float(stat) for stat in quantized.stats.values())))
    quantizer.update(quantized)
    assert quantizer.training_state() == {}
    (error, perplexity, dead_fraction), (last_error, last_perplexity, last_dead_fraction) = history[0], history[-1]
    assert last_error < 0.5 * error
    assert last_perplexity > 3 * perplexity
    assert dead_fraction > 0.3
    assert last_dead_fraction == 0.0


def test_tables_are_kept_until_something_changes() -> None:
    quantizer, latents = _quantizer().requires_grad_(False), _latents(9)
    codes, made = quantizer.encode(latents), []
    original = quantizer.tables

    def counted() -> Tensor:
        made.append(1)
        return original()

    quantizer.tables = counted  # type: ignore[method-assign]
    before = quantizer.decode(codes)
    with torch.inference_mode():
        assert torch.equal(quantizer.encode(latents), codes)
    assert not made
    quantizer.bias += 1.0
    assert torch.equal(quantizer.decode(codes), _shifted(quantizer, codes))
    assert len(made) == 1
    del quantizer.tables
    copied = copy.deepcopy(quantizer)
    copied.weight.zero_()
    assert not torch.equal(copied.decode(codes), quantizer.decode(codes))
    # Fused optimizers write without a trace, so nothing is kept while there is something to learn.
    quantizer.requires_grad_()
    quantizer.decode(codes)
    quantizer.bias.data -= 1.0
    torch.testing.assert_close(quantizer.decode(codes), before, rtol=0, atol=1e-5)
    assert quantizer.double().decode(codes).dtype == torch.float64


def _shifted(quantizer: SimVQ, codes: Tensor) -> Tensor:
    fresh = SimVQ(quantizer.config)
    fresh.load_state_dict(quantizer.state_dict())
    return fresh.decode(codes)


def test_it_is_built_from_plain_values_and_its_state_is_a_file() -> None:
    quantizer = _quantizer(gradient="rotation")
    data = to_dict(quantizer.config)
    assert data["type"] == "simvq"
    other = build(from_dict(data))
    other.load_state_dict(quantizer.state_dict())
    assert set(quantizer.state_dict()) == {"codebooks", "weight", "bias"}
    assert other.config == quantizer.config
    assert torch.equal(other.encode(_latents(20)), quantizer.encode(_latents(20)))
    assert from_dict({"type": "simvq", "latent_dim": 8}) == SimVQConfig(latent_dim=8)


def test_stats_tell_use() -> None:
    quantizer = _quantizer(num_stages=2)
    with torch.no_grad():
        quantizer.weight[1] = 0.0
    stats = quantizer(_latents(20)).stats
    assert stats["perplexity"][1].item() == pytest.approx(1.0)
    assert stats["dead_fraction"][1].item() == pytest.approx(15 / 16)
    assert stats["perplexity"].shape == (2,)


def test_callers_mistakes_are_value_errors() -> None:
    quantizer = _quantizer()
    with pytest.raises(ValueError, match="each must be one of"):
        quantizer(_latents(3), num_quantizers=torch.tensor([1, 2, 4]))
    with pytest.raises(ValueError, match="num_quantizers=4 is not one of"):
        quantizer.encode(_latents(3), num_quantizers=4)
    with pytest.raises(ValueError, match=r"codes must lie in -1\.\.15, got 0\.\.16"):
        quantizer.decode(torch.tensor([[[0, 16]]]))
    with pytest.raises(ValueError, match="gradient='straight' is not one of straight_through, rotation"):
        dataclasses.replace(quantizer.config, gradient="straight")
    with pytest.raises(ValueError, match="must be positive"):
        SimVQConfig(latent_dim=0)
