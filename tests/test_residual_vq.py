"""Residual VQ as it is trained and used; the bugs of others and other learning are in `test_quantizer_training.py`."""

import itertools

import pytest
import torch

from codec.quantizers.interface import Quantized, draw_num_quantizers
from codec.quantizers.residual import ResidualVQ, ResidualVQConfig

_EXACT = "donot_use_mm_for_euclid_dist"


def _quantizer(**changes: object) -> ResidualVQ:
    torch.manual_seed(0)
    values: dict[str, object] = {"latent_dim": 8, "num_stages": 3, "codebook_size": 64}
    return ResidualVQ(ResidualVQConfig(**values | changes))  # type: ignore[arg-type]


def _latents(num_frames: int, *, batch_size: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, 8, num_frames, generator=torch.Generator().manual_seed(seed))


def _error(quantizer: ResidualVQ, latents: torch.Tensor) -> float:
    return float((quantizer.decode(quantizer.encode(latents)) - latents).square().mean())


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_every_prefix_decodes_and_more_stages_are_nearer(num_groups: int) -> None:
    quantizer, latents = _quantizer(num_groups=num_groups), _latents(500)
    quantizer.initialize(latents)
    codes = quantizer.encode(latents)
    assert codes.shape == (4, 3 * num_groups, 500)
    errors = []
    for num_quantizers in quantizer.valid_num_quantizers:
        decoded = quantizer.decode(codes[:, :num_quantizers])
        errors.append(float((decoded - latents).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < float(latents.square().mean())
    if num_groups > 1:
        with pytest.raises(ValueError, match="is not one of"):
            quantizer.decode(codes[:, :1])


def test_training_and_inference_choose_the_same_codes() -> None:
    quantizer, latents = _quantizer(), _latents(50)
    quantized = quantizer(latents)
    assert torch.equal(quantized.codes, quantizer.encode(latents))
    # The forward value goes through latents + (decoded - latents), which rounds.
    torch.testing.assert_close(quantized.latents, quantizer.decode(quantized.codes), rtol=0, atol=1e-6)


def test_forward_is_pure() -> None:
    quantizer, latents = _quantizer(), _latents(50)
    before = quantizer.codebooks.clone()
    first, second = quantizer(latents), quantizer(latents)
    assert torch.equal(quantizer.codebooks, before)
    assert torch.equal(first.codes, second.codes)


def test_the_gradient_passes_straight_through_once() -> None:
    quantizer = _quantizer()
    latents = _latents(10).requires_grad_()
    weight = torch.randn(4, 8, 10)
    (quantizer(latents).latents * weight).sum().backward()
    assert latents.grad is not None
    assert torch.equal(latents.grad, weight), "the Jacobian is the identity, not once per stage"


def test_every_stage_commits_the_encoder() -> None:
    """With a chained residual the commitment of the second and later stages has no gradient at all."""
    quantizer, latents = _quantizer(), _latents(200)
    quantizer.initialize(latents)
    gradients = []
    for num_quantizers in (1, 2, 3):
        x = latents.clone().requires_grad_()
        quantizer(x, num_quantizers=num_quantizers).losses["commitment"].backward()
        assert x.grad is not None
        gradients.append(x.grad.clone())
    for shorter, longer in itertools.pairwise(gradients):
        assert float((longer - shorter).norm()) > 0.05 * float(gradients[0].norm())


def test_k_means_survives_the_first_update() -> None:
    """Sums that hold means instead of mean * count pull every entry towards zero in one step."""
    quantizer, latents = _quantizer(num_stages=1), _latents(1024)
    quantizer.initialize(latents)
    before, error = quantizer.codebooks.clone(), _error(quantizer, latents)
    used = quantizer.encode(latents).unique().numel()
    for _ in range(10):
        quantizer.update(quantizer(latents))
    ratio = quantizer.codebooks.norm(dim=-1).mean() / before.norm(dim=-1).mean()
    assert 0.9 < float(ratio) < 1.1
    assert _error(quantizer, latents) <= error * 1.01
    assert quantizer.encode(latents).unique().numel() >= used


def test_a_restarted_code_stays_restarted() -> None:
    """A restart that writes only the table is overwritten from the old averages in the same step."""
    quantizer, latents = _quantizer(num_stages=1), _latents(512)
    quantizer.initialize(latents)
    far = quantizer.codebooks.clone()
    far[0, :40] = 100.0
    quantizer.codebooks.copy_(far)
    quantizer.load_training_state(
        {
            "counts": torch.where(torch.arange(64) < 40, 0.0, 32.0)[None],
            "sums": far * 32,
            "num_updates": torch.tensor(0),
        }
    )
    quantizer.update(quantizer(latents))
    assert float(quantizer.codebooks.norm(dim=-1).max()) < 10
    distances = torch.cdist(quantizer.codebooks[0, :40], latents.transpose(1, 2).reshape(-1, 8), compute_mode=_EXACT)
    assert float(distances.min(dim=1).values.max()) < 1e-4, "a restarted entry is a latent of the batch"
    for _ in range(3):
        quantizer.update(quantizer(latents))
    assert quantizer.encode(latents)[:, 0].unique().numel() > 55


@pytest.mark.parametrize("num_frames", [16, 4096])
def test_what_counts_as_dead_does_not_depend_on_the_batch_size(num_frames: int) -> None:
    """An absolute threshold restarts everything in small batches and nothing in large ones."""
    quantizer = _quantizer(num_stages=1)
    quantizer.initialize(_latents(4096))
    before = quantizer.codebooks.clone()
    quantizer.update(quantizer(_latents(num_frames, seed=5)))
    moved = (quantizer.codebooks - before).norm(dim=-1) / before.norm(dim=-1)
    assert float((moved > 0.5).float().mean()) == 0.0


def test_training_finds_the_clusters_of_the_data() -> None:
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(16, 8, generator=generator) * 3
    quantizer = _quantizer(num_stages=1)
    latents = torch.empty(0)
    for _ in range(300):
        chosen = centres[torch.randint(16, (256,), generator=generator)]
        latents = (chosen + 0.05 * torch.randn(256, 8, generator=generator)).t()[None]
        quantizer.update(quantizer(latents))
    # From random entries, without k-means; the centres themselves have a mean square of 9.
    assert _error(quantizer, latents) < 0.05


def test_absent_stages_and_masked_frames_teach_nothing() -> None:
    quantizer, latents = _quantizer(), _latents(30)
    prefixes = torch.tensor([1, 2, 3, 3])
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[3, 20:] = False
    quantized = quantizer(latents, mask, num_quantizers=prefixes)
    assert (quantized.codes[0, 1:] == -1).all()
    assert (quantized.codes[1, 2:] == -1).all()
    assert (quantized.codes[3, :, 20:] == -1).all()
    assert (quantized.codes[2] >= 0).all()
    changed = latents.clone()
    changed[3, :, 20:] += 7.0
    other = quantizer(changed, mask, num_quantizers=prefixes)
    assert torch.equal(other.losses["commitment"], quantized.losses["commitment"])
    twin = _quantizer()
    quantizer.update(quantized)
    twin.update(other)
    assert torch.equal(quantizer.codebooks, twin.codebooks)


def test_one_update_learns_from_all_forwards_since_the_last() -> None:
    whole, parts = _quantizer(dead_threshold=0.0), _quantizer(dead_threshold=0.0)
    latents = _latents(64)
    whole.update(whole(latents))
    parts.update(parts(latents[:1]), parts(latents[1:]))
    # Sums over the same vectors in another order of addition.
    torch.testing.assert_close(whole.codebooks, parts.codebooks, rtol=1e-5, atol=1e-6)


def test_training_resumes_to_the_same_codebooks() -> None:
    batches = [_latents(64, seed=seed) for seed in range(6)]
    one = _quantizer()
    for batch in batches[:3]:
        one.update(one(batch))
    two = _quantizer()
    two.load_state_dict(one.state_dict())
    two.load_training_state({key: value.clone() for key, value in one.training_state().items()})
    for quantizer in (one, two):
        for batch in batches[3:]:
            quantizer.update(quantizer(batch))
    assert torch.equal(one.codebooks, two.codebooks)


def test_stats_tell_use() -> None:
    quantizer = _quantizer(num_stages=1)
    quantizer.codebooks.zero_()
    quantized: Quantized = quantizer(_latents(20))
    assert quantized.stats["perplexity"].tolist() == pytest.approx([1.0])
    assert quantized.stats["dead_fraction"].tolist() == pytest.approx([63 / 64])


def test_offsets_follow_the_codebooks() -> None:
    quantizer, latents = _quantizer(), _latents(20)
    before = quantizer.encode(latents)
    quantizer.codebooks.mul_(0.01)
    fresh = _quantizer()
    fresh.codebooks.mul_(0.01)
    assert torch.equal(quantizer.encode(latents), fresh.encode(latents))
    assert not torch.equal(quantizer.encode(latents), before)


def test_dropout_draws_valid_prefixes_only() -> None:
    drawn = draw_num_quantizers((2, 4, 6), 4000, full_fraction=0.5, generator=torch.Generator().manual_seed(0))
    shares = [(drawn == value).float().mean().item() for value in (2, 4, 6)]
    # Half full, the rest uniform; three standard deviations of 4,000 draws are 0.024.
    assert shares == pytest.approx([1 / 6, 1 / 6, 2 / 3], abs=0.024)


def test_callers_mistakes_are_value_errors() -> None:
    quantizer = _quantizer()
    with pytest.raises(ValueError, match="too few to initialise"):
        quantizer.initialize(_latents(10))
    with pytest.raises(ValueError, match="each must be one of"):
        quantizer(_latents(3), num_quantizers=torch.tensor([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="is not a multiple of num_groups"):
        ResidualVQConfig(latent_dim=8, num_stages=1, num_groups=3)
