"""Residual VQ as it is trained and used; the bugs of others and other learning are in `test_quantizer_training.py`."""

import itertools
from pathlib import Path

import pytest
import torch

from codec.config import from_dict, to_dict
from codec.quantizers.interface import Quantized
from codec.quantizers.residual import ResidualVQ, ResidualVQConfig
from codec.quantizers.transport import balanced_codes, transport_loss

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


def test_callers_mistakes_are_value_errors() -> None:
    quantizer = _quantizer()
    with pytest.raises(ValueError, match="too few to initialise"):
        quantizer.initialize(_latents(10))
    with pytest.raises(ValueError, match="each must be one of"):
        quantizer(_latents(3), num_quantizers=torch.tensor([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="is not a multiple of num_groups"):
        ResidualVQConfig(latent_dim=8, num_stages=1, num_groups=3)


# Balanced assignment, and transport to the codebook. `test_transport.py` tests the plans themselves.


def _clusters(seed: int) -> torch.Tensor:
    """Latents around 64 places, most of them to one side of where entries begin."""
    generator = torch.Generator().manual_seed(seed)
    places = 1.0 + torch.randn(64, 8, generator=torch.Generator().manual_seed(9))
    chosen = places[torch.randint(64, (1024,), generator=generator)]
    return (chosen + 0.1 * torch.randn(1024, 8, generator=generator)).t()[None]


def _train(quantizer: ResidualVQ, num_steps: int, weights: dict[str, float]) -> Quantized:
    parameters = list(quantizer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.05) if parameters else None
    for step in range(num_steps):
        quantized = quantizer(_clusters(step))
        if optimizer is not None:
            optimizer.zero_grad()
            torch.stack([weights[name] * loss for name, loss in quantized.losses.items()]).sum().backward()
            optimizer.step()
        quantizer.update(quantized)
    return quantizer(_clusters(1000))


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_balanced_assignment_uses_all_entries(learning: str, num_groups: int) -> None:
    """Where latents lie to one side of entries, few are ever nearest. Moving averages have no restarts here."""
    changes: dict[str, object] = {"learning": learning, "num_groups": num_groups, "num_stages": 2}
    if learning == "ema":
        changes["dead_threshold"] = 0.0
    weights = {"commitment": 0.25, "codebook": 1.0}
    errors, perplexities = [], []
    for assignment in ("nearest", "balanced"):
        quantizer = _quantizer(**changes, assignment=assignment)
        quantized = _train(quantizer, 60, weights)
        perplexities.append(float(quantized.stats["perplexity"][0]))
        errors.append(_error(quantizer, _clusters(1000)))
    assert perplexities[0] < 30
    assert perplexities[1] > 50, "of 64"
    assert errors[1] < 0.7 * errors[0]


def test_balanced_codes_are_chosen_stage_after_stage_and_only_in_training() -> None:
    quantizer, latents = _quantizer(assignment="balanced", num_groups=2, num_stages=2), _clusters(0)
    quantizer.initialize(latents)
    quantized = quantizer(latents)
    rows = latents.transpose(1, 2).reshape(-1, 2, 4)
    for row in range(4):
        plan = {"epsilon": 0.01, "num_iterations": 10}
        expected = balanced_codes(rows[:, row % 2], quantizer.codebooks[row], **plan)
        assert torch.equal(quantized.codes[:, row].flatten(), expected)
        rows[:, row % 2] -= quantizer.codebooks[row, expected]
    # The forward value goes through latents + (decoded - latents), which rounds.
    torch.testing.assert_close(quantized.latents, quantizer.decode(quantized.codes), rtol=0, atol=1e-6)
    nearest = _quantizer(num_groups=2, num_stages=2)
    nearest.load_state_dict(quantizer.state_dict())
    assert torch.equal(quantizer.encode(latents), nearest.encode(latents))
    assert not torch.equal(quantizer.encode(latents), quantized.codes)


_PLANNING: list[dict[str, object]] = [
    {"assignment": "balanced"},
    {"learning": "gradient", "transport": "uniform"},
    {"learning": "gradient", "transport": "learned", "assignment": "balanced", "num_groups": 2},
]


@pytest.mark.parametrize("changes", _PLANNING)
def test_plans_leave_out_masked_frames_and_absent_stages(changes: dict[str, object]) -> None:
    quantizer, latents = _quantizer(**changes), _latents(30)
    groups = quantizer.config.num_groups
    prefixes = groups * torch.tensor([1, 2, 3, 3])
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[3, 20:] = False
    quantized = quantizer(latents, mask, num_quantizers=prefixes)
    assert (quantized.codes[0, groups:] == -1).all()
    assert (quantized.codes[3, :, 20:] == -1).all()
    assert (quantized.codes[2] >= 0).all()
    changed = latents.clone()
    changed[3, :, 20:] += 7.0
    other = quantizer(changed, mask, num_quantizers=prefixes)
    assert torch.equal(other.codes, quantized.codes)
    assert all(torch.equal(other.losses[name], loss) for name, loss in quantized.losses.items())
    # What an item that lacks the second stage holds is nothing to that stage's plan.
    changed[0] += 100.0
    other = quantizer(changed, mask, num_quantizers=prefixes)
    assert not torch.equal(other.codes[:, :groups], quantized.codes[:, :groups]) or changes["assignment"] != "balanced"
    nobody = quantizer(latents, torch.zeros_like(mask))
    assert (nobody.codes == -1).all()
    assert all(loss.isfinite() for loss in nobody.losses.values())


@pytest.mark.parametrize("num_groups", [1, 2])
def test_the_transport_loss_is_the_mean_over_rows_of_what_each_sees(num_groups: int) -> None:
    changes: dict[str, object] = {"num_groups": num_groups, "num_stages": 2, "learning": "gradient"}
    quantizer, latents = _quantizer(**changes, transport="uniform"), _latents(40)
    with torch.no_grad():
        quantizer.codebooks.normal_()
    found = quantizer(latents).losses
    assert set(found) == {"commitment", "codebook", "transport"}
    plain = _quantizer(**changes)
    plain.load_state_dict(quantizer.state_dict())
    assert set(plain(latents).losses) == {"commitment", "codebook"}
    for name in ("commitment", "codebook"):
        assert torch.equal(plain(latents).losses[name], found[name])
    codes, costs = quantizer.encode(latents), []
    for row in range(2 * num_groups):
        stage, group = divmod(row, num_groups)
        left = latents if stage == 0 else latents - quantizer.decode(codes[:, :num_groups])
        points = left.transpose(1, 2).reshape(160, num_groups, -1)[:, group]
        shares = torch.full((64,), 1 / 64)
        costs.append(transport_loss(points, quantizer.codebooks[row], shares, epsilon=0.01, num_iterations=10))
    # float32; residuals by another order of additions.
    torch.testing.assert_close(found["transport"], torch.stack(costs).mean(), rtol=1e-5, atol=0)


def test_transport_reaches_entries_that_nothing_is_nearest_to() -> None:
    quantizer, latents = _quantizer(learning="gradient", transport="uniform"), _latents(40).requires_grad_()
    quantized = quantizer(latents)
    quantized.losses["codebook"].backward(retain_graph=True)
    assert quantizer.codebooks.grad is not None
    assert not quantizer.codebooks.grad.any(2).all()
    assert latents.grad is None
    quantizer.codebooks.grad = None
    quantized.losses["transport"].backward()
    assert quantizer.codebooks.grad.any(2).all()
    assert latents.grad is not None
    assert latents.grad.any()


@pytest.mark.parametrize("transport", ["uniform", "learned"])
def test_transport_keeps_codebooks_in_use(transport: str) -> None:
    weights = {"commitment": 0.25, "codebook": 1.0, "transport": 1.0, "share_divergence": 1.0}
    plain = _quantizer(learning="gradient", num_stages=2)
    alone = _train(plain, 60, weights)
    quantizer = _quantizer(learning="gradient", num_stages=2, transport=transport)
    helped = _train(quantizer, 60, weights)
    latents = _clusters(1000)
    assert float(alone.stats["perplexity"][0]) < 20
    assert float(helped.stats["perplexity"][0]) > 50, "of 64"
    assert _error(quantizer, latents) < 0.6 * _error(plain, latents)


def test_learned_shares_follow_the_latents_as_far_as_they_may() -> None:
    """Four entries on places that hold 4 to 64 of 100 latents: their shares become those, or stay equal."""
    amounts = torch.tensor([64, 20, 12, 4])
    places = 4 * torch.eye(8)[:4]
    latents = places.repeat_interleave(amounts, 0).t()[None]
    found = []
    for divergence_weight in (0.0, 100.0):
        quantizer = _quantizer(
            num_stages=1, codebook_size=4, learning="gradient", transport="learned", num_sinkhorn_iterations=100
        )
        assert {*quantizer.state_dict()} == {"codebooks", "share_logits"}
        with torch.no_grad():
            quantizer.codebooks.copy_(places)
        optimizer = torch.optim.Adam([quantizer.share_logits], lr=0.05)
        losses = {}
        for _ in range(150):
            losses = quantizer(latents).losses
            optimizer.zero_grad()
            (losses["transport"] + divergence_weight * losses["share_divergence"]).backward()
            optimizer.step()
        shares = quantizer.share_logits.detach()[0].softmax(0)
        expected = float((shares * (4 * shares).log()).sum())
        assert float(losses["share_divergence"].detach()) == pytest.approx(expected, abs=0.01)
        found.append(shares)
    torch.testing.assert_close(found[0], amounts / 100, rtol=0, atol=0.02)
    torch.testing.assert_close(found[1], torch.full((4,), 0.25), rtol=0, atol=0.02)


def _quantized_on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    torch.save([_learned(changes, rows) for changes in _PLANNING], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def _learned(changes: dict[str, object], rows: slice) -> dict[str, torch.Tensor]:
    """After a forward, in which only the first items have all stages, its gradients and an update."""
    quantizer = _quantizer(**changes, dead_threshold=0.0) if "learning" not in changes else _quantizer(**changes)
    prefixes = quantizer.config.num_groups * torch.tensor([3, 2, 1, 1])
    quantized = quantizer(_latents(40)[rows], num_quantizers=prefixes[rows])
    found = {"codes": quantized.codes}
    for name in ("transport", "share_divergence"):
        if name in quantized.losses:
            found[name] = quantized.losses[name].detach()
    if "transport" in found:
        (quantized.losses["transport"] + quantized.losses.get("share_divergence", 0.0)).backward()
        found |= {name: parameter.grad for name, parameter in quantizer.named_parameters()}
    quantizer.update(quantized)
    return found | {"updated": quantizer.codebooks.detach()}


def test_two_processes_plan_as_one_with_both_batches(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_quantized_on_rank, (tmp_path,), nprocs=2)
    by_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for changes, first, second in zip(_PLANNING, *by_rank, strict=True):
        whole = _learned(changes, slice(None))
        assert torch.equal(torch.cat([first.pop("codes"), second.pop("codes")]), whole.pop("codes"))
        for name, value in whole.items():
            # float32; sums in another order.
            torch.testing.assert_close((first[name] + second[name]) / 2, value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("changes", _PLANNING)
def test_plans_are_part_of_the_configuration(changes: dict[str, object]) -> None:
    config = _quantizer(**changes).config
    assert from_dict(to_dict(config)) == config
    assert to_dict(config)["num_sinkhorn_iterations"] == 10


def test_impossible_plans_are_refused() -> None:
    for changes, message in (
        ({"assignment": "fair"}, r"assignment='fair' is not one of \('nearest', 'balanced'\)"),
        ({"transport": "some", "learning": "gradient"}, "transport='some' is not one of"),
        ({"transport": "uniform"}, "transport='uniform' needs learning='gradient'"),
        ({"assignment": "balanced", "sinkhorn_epsilon": 0.001}, r"sinkhorn_epsilon must be at least 0\.003"),
        ({"assignment": "balanced", "num_sinkhorn_iterations": 0}, "num_sinkhorn_iterations positive"),
        ({"sinkhorn_epsilon": 0.1}, "need assignment='balanced' or a transport"),
    ):
        with pytest.raises(ValueError, match=message):
            _quantizer(**changes)


def test_the_rotation_trick_changes_the_gradient_and_no_value() -> None:
    latents = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(5))
    gradients = {}
    for gradient in ("straight_through", "rotation"):
        torch.manual_seed(0)
        quantizer = ResidualVQ(ResidualVQConfig(latent_dim=8, num_stages=2, codebook_size=16, gradient=gradient))
        leaf = latents.clone().requires_grad_()
        quantized = quantizer(leaf)
        assert torch.equal(quantized.latents, quantizer.decode(quantized.codes))
        quantized.latents[0, 0].sum().backward()
        gradients[gradient] = leaf.grad
    assert torch.equal(gradients["straight_through"][0, 0], torch.ones(20))
    assert not gradients["straight_through"][0, 1:].any()
    turned = gradients["rotation"][0].norm(dim=0)
    ratio = quantized.latents[0].norm(dim=0) / latents[0].norm(dim=0)
    torch.testing.assert_close(turned, ratio.detach(), rtol=1e-5, atol=0)  # a rotation keeps lengths
    assert gradients["rotation"][0, 1:].abs().max() > 0.1


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_what_stands_in_masked_frames_does_not_spread(learning: str) -> None:
    quantizer = ResidualVQ(ResidualVQConfig(latent_dim=4, num_stages=2, codebook_size=8, learning=learning))
    latents = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    results = []
    for stranger in (0.0, float("nan")):
        given = torch.where(mask[:, None], latents, stranger).requires_grad_()
        quantized = quantizer(given, mask)
        sum(quantized.losses.values()).backward()
        assert torch.isfinite(quantized.latents).all()
        assert given.grad is not None
        results.append(
            [*quantized.losses.values(), *quantized.stats.values(), torch.where(mask[:, None], given.grad, 0)]
        )
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
