"""The three product quantizers: of k-means, of Gumbel draws, and of many codebooks."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.config import build, from_dict, to_dict
from codec.quantizers.interface import Quantizer
from codec.quantizers.product import (
    GumbelVQ,
    GumbelVQConfig,
    KMeansVQ,
    KMeansVQConfig,
    MultiCodebookVQ,
    MultiCodebookVQConfig,
)

BATCH, DIMS, GROUPS, SIZE = 3, 8, 2, 12


def _built(config_class: Callable[..., Any], **changes: object) -> Any:
    torch.manual_seed(0)
    values = {"latent_dim": DIMS, "num_groups": GROUPS, "codebook_size": SIZE}
    return build(config_class(**values | changes))


def _kmeans(**changes: object) -> KMeansVQ:
    quantizer: KMeansVQ = _built(KMeansVQConfig, **changes)
    with torch.no_grad():
        quantizer.codebooks *= 100.0  # as long as normalised points
    return quantizer


def _many(**changes: object) -> MultiCodebookVQ:
    quantizer: MultiCodebookVQ = _built(MultiCodebookVQConfig, **changes)
    return quantizer


def _gumbel(**changes: object) -> GumbelVQ:
    quantizer: GumbelVQ = _built(GumbelVQConfig, **changes)
    return quantizer


ALL = [_kmeans, _many, _gumbel]


def _latents(num_frames: int, *, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, DIMS, num_frames, generator=torch.Generator().manual_seed(seed))


# What holds for all three.


@pytest.mark.parametrize("make", ALL)
def test_groups_stand_side_by_side(make: Callable[..., Quantizer]) -> None:
    quantizer, latents = make(), _latents(9)
    assert quantizer.valid_num_quantizers == (GROUPS,)
    assert quantizer.codebook_sizes == (SIZE,) * GROUPS
    codes = quantizer.encode(latents)
    assert codes.shape == (BATCH, GROUPS, 9)
    decoded = quantizer.decode(codes)
    tables = quantizer.tables()  # type: ignore[operator]
    for item, frame, group in itertools.product(range(BATCH), range(9), range(GROUPS)):
        expected = tables[group, codes[item, group, frame]]
        assert torch.equal(decoded[item, 4 * group : 4 * group + 4, frame], expected)
    absent = codes.clone()
    absent[:, 0] = -1
    assert not quantizer.decode(absent)[:, :4].any()
    assert torch.equal(quantizer.decode(absent)[:, 4:], decoded[:, 4:])


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("num_frames", [0, 1, 30])
def test_forward_gives_what_decode_gives_in_float32(make: Callable[..., Quantizer], num_frames: int) -> None:
    quantizer, latents = make(), _latents(num_frames)
    quantized = quantizer(latents)
    assert quantized.codes.dtype == torch.int64
    assert torch.equal(quantized.latents, quantizer.decode(quantized.codes))
    assert quantizer.encode(latents).shape == quantized.codes.shape == (BATCH, GROUPS, num_frames)
    if not isinstance(quantizer, GumbelVQ):
        assert torch.equal(quantizer.encode(latents), quantized.codes)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(latents)
        assert torch.equal(quantizer.encode(latents), make().encode(latents))
    assert mixed.latents.dtype == torch.float32
    assert torch.equal(mixed.latents, quantized.latents)
    for loss in quantized.losses.values():
        assert loss.isfinite()


@pytest.mark.parametrize("make", ALL)
def test_a_frame_does_not_depend_on_those_beside_it(make: Callable[..., Quantizer]) -> None:
    quantizer, latents = make(), _latents(40)
    codes = quantizer.encode(latents)
    for frame in (0, 17):
        assert torch.equal(quantizer.encode(latents[1:2, :, frame : frame + 1]), codes[1:2, :, frame : frame + 1])


@pytest.mark.parametrize("make", [*ALL, lambda: _kmeans(norm="utterance"), lambda: _many(gradient="rotation")])
def test_masked_frames_teach_and_tell_nothing(make: Callable[..., Quantizer]) -> None:
    quantizer, latents = make(), _latents(30)
    mask = torch.ones(BATCH, 30, dtype=torch.bool)
    mask[2, 20:] = False
    quantized = quantizer(latents, mask, num_quantizers=torch.full((BATCH,), GROUPS))
    assert (quantized.codes[2, :, 20:] == -1).all()
    assert (quantized.codes[2, :, :20] >= 0).all()
    assert (quantized.codes[:2] >= 0).all()
    assert not quantized.latents[2, :, 20:].any()
    results = []
    for filling in (0.0, 1e9, float("nan")):
        changed = latents.clone()
        changed[2, :, 20:] = filling
        changed.requires_grad_()
        quantizer.zero_grad()
        found = quantizer(changed, mask)
        weights = torch.arange(1.0, 1.0 + found.latents.numel()).view_as(found.latents)
        (sum(found.losses.values()) + (found.latents * weights.sin()).sum()).backward()
        assert torch.equal(found.latents, quantized.latents)
        assert not changed.grad[2, :, 20:].any()
        gradients = [parameter.grad.clone() for parameter in quantizer.parameters()]
        results.append([changed.grad, *gradients, *found.losses.values(), *found.stats.values()])
    for one, *others in zip(*results, strict=True):
        assert one.isfinite().all()
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("make", [_kmeans, _many])
def test_losses_are_means_over_real_frames(make: Callable[..., Quantizer]) -> None:
    quantizer, latents = make(), _latents(30)
    mask = torch.ones(BATCH, 30, dtype=torch.bool)
    mask[2, 20:] = False
    whole = quantizer(latents, mask).losses
    first, last = quantizer(latents[:2]).losses, quantizer(latents[2:, :, :20]).losses
    for name in ("commitment", "codebook"):
        # Sums in another order.
        torch.testing.assert_close(80 * whole[name], 60 * first[name] + 20 * last[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [*ALL, lambda: _gumbel(shared_codebook=False, hidden_factor=0)])
def test_they_are_built_from_plain_values_and_their_state_is_a_file(make: Callable[..., Any]) -> None:
    quantizer = make()
    other = build(from_dict(to_dict(quantizer.config)))
    assert type(other) is type(quantizer)
    other.load_state_dict(quantizer.state_dict())
    other.load_training_state(quantizer.training_state())
    latents = _latents(20)
    assert torch.equal(other.encode(latents), quantizer.encode(latents))
    assert torch.equal(other(latents).codes, quantizer(latents).codes)


def test_names_and_published_sizes() -> None:
    assert from_dict({"type": "kmeans_vq", "latent_dim": 512}).codebook_size == 320
    assert from_dict({"type": "gumbel_vq", "latent_dim": 512}).num_groups == 2
    published = from_dict({"type": "multi_codebook_vq"})
    assert (published.latent_dim, published.num_groups, published.codebook_size) == (64, 8, 4096)
    gumbel = build(GumbelVQConfig(latent_dim=512))
    assert gumbel.hidden.weight.shape == (1024, 512)
    assert gumbel.scores.weight.shape == (640, 1024)
    assert gumbel.codebooks.shape == (1, 320, 256)
    assert gumbel.temperature == 2.0


@pytest.mark.parametrize("make", ALL)
def test_callers_mistakes_are_value_errors(make: Callable[..., Quantizer]) -> None:
    quantizer = make()
    with pytest.raises(ValueError, match="num_quantizers=1 is not one of"):
        quantizer.encode(_latents(3), num_quantizers=1)
    with pytest.raises(ValueError, match="each must be one of"):
        quantizer(_latents(3), num_quantizers=torch.tensor([2, 2, 1]))
    with pytest.raises(ValueError, match="num_quantizers=1 is not one of"):
        quantizer.decode(torch.zeros(1, 1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes must lie in -1\.\.11, got 0\.\.12"):
        quantizer.decode(torch.tensor([[[0], [12]]]))
    with pytest.raises(ValueError, match="latent_dim=8 is not a multiple of num_groups=3"):
        make(num_groups=3)
    with pytest.raises(ValueError, match="must be positive"):
        make(codebook_size=0)


# k-means


def test_k_means_by_hand() -> None:
    """(3, 1) and (0, 4) are normalised to (1, -1) and (-1, 1)."""
    quantizer = _kmeans(latent_dim=4, codebook_size=2)
    with torch.no_grad():
        quantizer.projection.copy_(torch.eye(2).expand(2, 2, 2))
        quantizer.codebooks.copy_(torch.tensor([[[1.0, -1.5], [-1.0, 0.0]]]))
    latents = torch.tensor([3.0, 1.0, 0.0, 4.0])[None, :, None]
    quantized = quantizer(latents)
    assert quantized.codes.tolist() == [[[0], [1]]]
    assert quantized.latents[0, :, 0].tolist() == [1.0, -1.5, -1.0, 0.0]
    # The norm divides by sqrt(1 + 1e-5) and sqrt(4 + 1e-5).
    assert quantized.losses["commitment"].item() == pytest.approx((0.25 + 1.0) / 4, abs=1e-4)
    assert quantized.losses["codebook"].item() == pytest.approx((0.25 + 1.0) / 4, abs=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_k_means_is_as_published(shared: bool) -> None:
    """A grouped convolution without bias, group norm, and the nearest entry of a codebook."""
    quantizer, latents = _kmeans(norm="utterance", shared_codebook=shared), _latents(20)
    with torch.no_grad():
        quantizer.norm_weight.normal_()
        quantizer.norm_bias.normal_()
    assert quantizer.codebooks.shape[0] == (1 if shared else GROUPS)
    projected = F.conv1d(latents, quantizer.projection.flatten(0, 1)[:, :, None], groups=GROUPS)
    points = F.group_norm(projected, GROUPS, quantizer.norm_weight.flatten(), quantizer.norm_bias.flatten())
    parts = points.unflatten(1, (GROUPS, -1)).permute(1, 0, 3, 2)
    distances = (parts[:, :, :, None] - quantizer.tables()[:, None, None]).norm(dim=-1)
    codes = distances.argmin(-1).transpose(0, 1)
    assert torch.equal(quantizer.encode(latents), codes)
    decoded = quantizer.decode(codes)
    losses = quantizer(latents).losses
    for name in ("commitment", "codebook"):
        torch.testing.assert_close(losses[name], F.mse_loss(points, decoded), rtol=1e-5, atol=0)  # other orders


def test_the_norm_of_an_utterance_hears_all_of_it_but_no_padding() -> None:
    latents = _latents(40)
    latents[:, :, 20:] *= 5.0
    alone = latents[:, :, :20]
    mask = (torch.arange(40) < 20).expand(BATCH, 40)
    heard = _kmeans(norm="utterance")
    assert not torch.equal(heard.encode(latents)[:, :, :20], heard.encode(alone))
    assert torch.equal(heard(latents, mask).codes[:, :, :20], heard(alone).codes)
    single = _kmeans(norm="frame")
    assert torch.equal(single.encode(latents)[:, :, :20], single.encode(alone))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_gradients_of_k_means(gradient: str) -> None:
    """That of the quantized latents reaches the projection as it would the points; entries learn from their loss."""
    quantizer, weight = _kmeans(gradient=gradient), _latents(10, seed=1)
    latents = _latents(10).requires_grad_()
    quantized = quantizer(latents)
    (quantized.latents * weight).sum().backward(retain_graph=True)
    assert quantizer.codebooks.grad is None
    assert quantizer.projection.grad.any()
    if gradient == "straight_through":
        points = F.layer_norm(
            torch.einsum("gde,bgef->bfgd", quantizer.projection, latents.unflatten(1, (GROUPS, -1))), (DIMS // GROUPS,)
        )
        expected = torch.autograd.grad((points.flatten(2).mT * weight).sum(), latents)[0]
        torch.testing.assert_close(latents.grad, expected, rtol=1e-4, atol=1e-5)  # sums in another order
    before = quantizer.projection.grad.clone()
    quantized.losses["codebook"].backward(retain_graph=True)
    assert torch.equal(quantizer.projection.grad, before)
    used = torch.unique(quantized.codes)
    assert torch.equal(quantizer.codebooks.grad[0].abs().sum(1).nonzero()[:, 0], used)
    quantizer.zero_grad()
    quantized.losses["commitment"].backward()
    assert quantizer.codebooks.grad is None
    assert quantizer.projection.grad.any()


def test_rotation_turns_each_group_by_itself() -> None:
    quantizer, weight = _many(gradient="rotation"), _latents(10, seed=1)
    latents = _latents(10).requires_grad_()
    quantized = quantizer(latents)
    points = F.normalize(latents.detach().unflatten(1, (GROUPS, -1)), dim=2).requires_grad_()
    entries = quantized.latents.detach().unflatten(1, (GROUPS, -1))
    (quantized.latents * weight).sum().backward()
    # Unit vectors: a rotation in the plane of both, by its textbook form with sine and cosine.
    cosine = (points * entries).sum(2, keepdim=True)
    off = entries - cosine * points
    sine = off.norm(dim=2, keepdim=True)
    off = off / sine
    given_weight = weight.unflatten(1, (GROUPS, -1))
    on_point, on_off = (points * given_weight).sum(2, keepdim=True), (off * given_weight).sum(2, keepdim=True)
    turned = given_weight - points * on_point - off * on_off
    turned = turned + points * (cosine * on_point + sine * on_off) + off * (cosine * on_off - sine * on_point)
    normalised = F.normalize(latents.unflatten(1, (GROUPS, -1)), dim=2)
    expected = torch.autograd.grad((normalised * turned.detach()).sum(), latents)[0]
    torch.testing.assert_close(latents.grad, expected, rtol=1e-3, atol=1e-4)  # float32; nearly equal vectors divide


# many codebooks


def test_many_codebooks_by_hand() -> None:
    """Directions alone count, and unit vectors come out."""
    quantizer = _many(latent_dim=4, codebook_size=2)
    with torch.no_grad():
        quantizer.codebooks.copy_(torch.tensor([[[5.0, 0.0], [0.0, 0.1]], [[0.0, -2.0], [3.0, 4.0]]]))
    latents = torch.tensor([1.0, 7.0, 30.0, 40.0])[None, :, None]
    quantized = quantizer(latents)
    assert quantized.codes.tolist() == [[[1], [1]]]
    torch.testing.assert_close(quantized.latents[0, :, 0], torch.tensor([0.0, 1.0, 0.6, 0.8]))
    x, y = 1 / 50**0.5, 7 / 50**0.5
    assert quantized.losses["commitment"].item() == pytest.approx((x**2 + (1 - y) ** 2) / 4, rel=1e-5)
    assert quantized.losses["codebook"].item() == pytest.approx((x**2 + (1 - y) ** 2) / 4, rel=1e-5)
    assert torch.equal(quantizer.encode(100 * latents), quantized.codes)


@given(codes=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_what_is_decoded_is_encoded_as_it_was(codes: list[tuple[int, int]]) -> None:
    quantizer, given_codes = _many(), torch.tensor(codes).t()[None]
    assert torch.equal(quantizer.encode(quantizer.decode(given_codes)), given_codes)


def test_many_codebooks_never_change_a_length() -> None:
    quantizer, latents = _many(), _latents(10).requires_grad_()
    quantized = quantizer(latents)
    ((quantized.latents * _latents(10, seed=1)).sum() + quantized.losses["commitment"]).backward()
    along = (latents.grad * latents).unflatten(1, (GROUPS, -1)).sum(2)
    assert latents.grad.unflatten(1, (GROUPS, -1)).norm(dim=2).min() > 1e-3
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-4)
    assert quantizer.codebooks.grad is None
    quantizer(latents).losses["codebook"].backward()
    for group in range(GROUPS):
        used = quantized.codes[:, group].unique()
        assert torch.equal(quantizer.codebooks.grad[group].abs().sum(1).nonzero()[:, 0], used)


# Gumbel


def test_gumbel_by_hand() -> None:
    """Scores that leave no doubt: the entry is drawn that has the highest one."""
    quantizer = _gumbel(latent_dim=2, codebook_size=2, hidden_factor=0, shared_codebook=False)
    with torch.no_grad():
        quantizer.scores.weight.copy_(torch.tensor([[100.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 100.0]]))
        quantizer.codebooks.copy_(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
    latents = torch.tensor([[[1.0, -1.0, 1.0], [1.0, -1.0, -1.0]]])
    assert quantizer.encode(latents).tolist() == [[[0, 1, 0], [1, 0, 0]]]
    quantized = quantizer(latents)
    assert quantized.latents.tolist() == [[[1.0, 2.0, 1.0], [4.0, 3.0, 3.0]]]
    # Mean probabilities (2/3, 1/3) and (2/3, 1/3), perplexity 3 / 4 ** (1/3) of 2.
    expected = 3 / 4 ** (1 / 3)
    assert quantized.stats["prob_perplexity"].tolist() == pytest.approx([expected] * 2)
    assert quantized.stats["perplexity"].tolist() == pytest.approx([expected] * 2)
    assert quantized.losses["diversity"].item() == pytest.approx(1 - expected / 2)


def test_entries_are_drawn_by_their_probability() -> None:
    quantizer = _gumbel(num_groups=1, codebook_size=3, hidden_factor=0)
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    with torch.no_grad():
        quantizer.scores.weight.zero_()
        quantizer.scores.bias.copy_(probabilities.log())
    codes = quantizer(_latents(3000)).codes
    shares = torch.bincount(codes.flatten()).float() / codes.numel()
    # Five standard deviations of 9,000 draws.
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=5 * (0.25 / 9000) ** 0.5)
    assert (quantizer.encode(_latents(5)) == 0).all()


def test_the_gradient_is_that_of_the_soft_mixture_and_the_chosen_entries_learn() -> None:
    quantizer, latents, weight = _gumbel(), _latents(6), _latents(6, seed=1)
    quantized = quantizer(latents)
    (quantized.latents * weight).sum().backward()
    expected = torch.zeros_like(quantizer.codebooks)
    for item, frame, group in itertools.product(range(BATCH), range(6), range(GROUPS)):
        expected[0, quantized.codes[item, group, frame]] += weight[item, 4 * group : 4 * group + 4, frame]
    torch.testing.assert_close(quantizer.codebooks.grad, expected, rtol=1e-5, atol=1e-5)  # sums in another order
    # The noise that the softmax saw, from the generator that the documentation tells of.
    rows = latents.transpose(1, 2).flatten(0, 1)
    logits = quantizer.scores(F.gelu(quantizer.hidden(rows))).unflatten(1, (GROUPS, SIZE)).detach().requires_grad_()
    noise = -torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(0)).log()
    soft = ((logits + noise) / 2.0).softmax(-1)
    assert torch.equal(soft.argmax(-1).view(BATCH, 6, GROUPS).transpose(1, 2), quantized.codes)
    (soft @ quantizer.codebooks[0].detach()).flatten(1).backward(weight.transpose(1, 2).flatten(0, 1))
    bias_gradient = logits.grad.sum(0).flatten()
    torch.testing.assert_close(quantizer.scores.bias.grad, bias_gradient, rtol=1e-4, atol=1e-5)  # another order
    assert quantizer.hidden.weight.grad.any()


def test_forward_is_pure_and_a_step_changes_the_noise() -> None:
    quantizer, latents = _gumbel(), _latents(50)
    state = torch.get_rng_state()
    first, second = quantizer(latents), quantizer(latents)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(torch.get_rng_state(), state), "draws of the rest of a program stay what they are"
    quantizer.update(first, second)
    third = quantizer(latents).codes
    assert (third != first.codes).float().mean() > 0.1
    resumed = _gumbel()
    resumed.load_training_state(quantizer.training_state())
    assert torch.equal(resumed(latents).codes, third)
    assert torch.equal(resumed.encode(latents), _gumbel().encode(latents))


def test_the_temperature_is_a_function_of_the_updates() -> None:
    quantizer = _gumbel(temperature_start=2.0, temperature_end=0.5, temperature_decay=0.5)
    found = []
    for _ in range(4):
        found.append((quantizer.temperature, quantizer(_latents(2)).stats["temperature"].tolist()))
        quantizer.update()
    assert found == [(value, [value] * GROUPS) for value in (2.0, 1.0, 0.5, 0.5)]
    assert quantizer.training_state()["num_updates"].item() == 4


def test_diversity_asks_for_all_entries() -> None:
    quantizer, latents = _gumbel(hidden_factor=0), _latents(50)
    with torch.no_grad():
        quantizer.scores.weight.zero_()
    assert quantizer(latents).losses["diversity"].item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        quantizer.scores.bias[::SIZE] = 50.0
    assert quantizer(latents).losses["diversity"].item() == pytest.approx(1 - 1 / SIZE)
    assert quantizer(latents).stats["dead_fraction"].tolist() == pytest.approx([1 - 1 / SIZE] * GROUPS)
    with torch.no_grad():
        quantizer.scores.bias[::SIZE] = 2.0
    quantizer(latents).losses["diversity"].backward()
    gradient = quantizer.scores.bias.grad.view(GROUPS, SIZE)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1:] < 0).all()


# Learning.


@pytest.mark.parametrize("make", [*ALL, lambda **v: _kmeans(**v, gradient="rotation")])
def test_it_learns(make: Callable[..., Any]) -> None:
    """Latents around 12 places, an autoencoder around the quantizer, published weights: it finds most of the places."""
    changes = {"temperature_decay": 0.97} if make is _gumbel else {}
    quantizer = make(**changes)
    torch.manual_seed(1)
    encoder, decoder = torch.nn.Linear(DIMS, DIMS), torch.nn.Linear(DIMS, DIMS)
    places = 2 * torch.randn(12, DIMS)
    parameters = [*quantizer.parameters(), *encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    weights = {"codebook": 1.0, "commitment": 0.25, "diversity": 0.1}
    history = []
    for _ in range(250):
        data = places[torch.randint(12, (BATCH, 40))] + 0.1 * torch.randn(BATCH, 40, DIMS)
        quantized = quantizer(encoder(data).mT)
        error = (decoder(quantized.latents.mT) - data).square().mean()
        optimizer.zero_grad()
        (error + sum(weights[name] * loss for name, loss in quantized.losses.items())).backward()
        optimizer.step()
        quantizer.update(quantized)
        history.append((error.item(), quantized.stats["perplexity"].mean().item()))
    assert history[-1][0] < 0.35 * history[0][0]
    assert history[-1][1] > max(4.0, min(8.0, 1.2 * history[0][1]))
    copied = copy.deepcopy(quantizer)
    assert torch.equal(copied.encode(_latents(9)), quantizer.encode(_latents(9)))
