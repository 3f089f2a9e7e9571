"""Optimal transport between latents and entries: against linear programs, and what it is for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from codec.quantizers.transport import LEAST_EPSILON, balanced_codes, plan_transport, transport_loss


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _uniform(num_entries: int) -> Tensor:
    return torch.full((num_entries,), 1 / num_entries)


def _costs(latents: Tensor, entries: Tensor) -> Tensor:
    return (latents[:, None].double() - entries.double()).square().mean(2)


def _cheapest_plan(costs: Tensor, shares: Tensor) -> tuple[float, Tensor]:
    """The least cost of transport, and the plan, by a linear program."""
    num_latents, num_entries = costs.shape
    rows = np.kron(np.eye(num_latents), np.ones(num_entries))
    columns = np.kron(np.ones(num_latents), np.eye(num_entries))
    masses = np.concatenate([np.full(num_latents, 1 / num_latents), shares.double().numpy()])
    masses[num_latents:] /= masses[num_latents:].sum()
    found = linprog(costs.numpy().ravel(), A_eq=np.vstack([rows, columns]), b_eq=masses, bounds=(0, None))
    assert found.success
    return float(found.fun), torch.from_numpy(found.x).view(num_latents, num_entries)


def test_every_latent_is_given_away_and_every_entry_gets_its_share() -> None:
    latents, entries, shares = _normal(60, 4), _normal(7, 4, seed=1), _normal(7, seed=2).softmax(0)
    plan = plan_transport(latents, entries, shares, epsilon=0.05, num_iterations=500)
    mass = plan.mass()
    # float64, and shares that were float32
    torch.testing.assert_close(mass.sum(1), torch.full((60,), 1 / 60, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(mass.sum(0), shares.double(), rtol=1e-6, atol=0)
    rough = plan_transport(latents, entries, shares, epsilon=0.05, num_iterations=1).mass()
    torch.testing.assert_close(rough.sum(1), mass.sum(1), rtol=1e-12, atol=0)
    assert not torch.allclose(rough.sum(0), shares.double(), rtol=0.01)


def test_a_plan_is_the_product_form_of_its_costs() -> None:
    """The logarithm of P plus cost / s is a sum of a row's and a column's value: that makes it the entropic optimum."""
    latents, entries = _normal(9, 4), _normal(5, 4, seed=1)
    costs = _costs(latents, entries)
    scale = 0.1 * (costs.max() - costs.min()) / 2
    mass = plan_transport(latents, entries, _uniform(5), epsilon=0.1, num_iterations=300).mass()
    rest = mass.log() + costs / scale
    doubly_centred = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert float(doubly_centred.abs().max()) < 1e-4  # costs are float32, here divided by about 0.1


@pytest.mark.parametrize("seed", [0, 1, 3])  # of which the second best division is not nearly as good
def test_codes_become_the_equal_division_of_least_cost(seed: int) -> None:
    latents, entries = _normal(24, 6, seed=seed), 0.5 * _normal(8, 6, seed=seed + 10)
    costs = _costs(latents, entries)
    chosen = linear_sum_assignment(costs.repeat_interleave(3, 1).numpy())[1] // 3
    best = float(costs[torch.arange(24), torch.from_numpy(chosen)].sum())
    nearest = float(costs.min(1).values.sum())

    def cost_of(epsilon: float, num_iterations: int) -> tuple[float, list[int]]:
        codes = balanced_codes(latents, entries, epsilon=epsilon, num_iterations=num_iterations)
        return float(costs[torch.arange(24), codes].sum()), torch.bincount(codes, minlength=8).tolist()

    cost, counts = cost_of(LEAST_EPSILON, 5000)
    assert counts == [3] * 8
    assert cost == pytest.approx(best, rel=1e-9)
    assert cost > 1.01 * nearest
    assert cost_of(10.0, 50)[1] != [3] * 8, "a soft plan does not tell an equal division"


def test_clusters_of_unequal_size_use_all_entries() -> None:
    """Most latents lie near one entry: the nearest uses few entries, a balanced choice all."""
    entries = 0.3 * _normal(32, 4, seed=1)
    latents = torch.cat([1.0 + 0.2 * _normal(900, 4), -1.0 + 0.2 * _normal(60, 4, seed=3)])

    def perplexity(codes: Tensor) -> float:
        share = torch.bincount(codes, minlength=32) / len(codes)
        return float(torch.exp(-torch.xlogy(share, share).sum()))

    assert perplexity(_costs(latents, entries).argmin(1)) < 8
    assert perplexity(balanced_codes(latents, entries, epsilon=LEAST_EPSILON, num_iterations=200)) > 30


@given(
    offset=st.floats(-1000, 1000),
    factor=st.floats(1e-3, 1e3),
    num_latents=st.integers(1, 40),
    num_entries=st.integers(1, 20),
    num_far=st.integers(0, 3),
)
@settings(max_examples=30, deadline=None)
def test_plans_stay_finite(offset: float, factor: float, num_latents: int, num_entries: int, num_far: int) -> None:
    """At the least epsilon, however uneven the latents, and far as they may lie from all entries."""
    latents = factor * _normal(num_latents, 3, seed=num_latents)
    latents[:num_far] = offset
    entries, shares = _normal(num_entries, 3, seed=1), (20 * _normal(num_entries, seed=2)).softmax(0)
    plan = plan_transport(latents, entries, shares, epsilon=LEAST_EPSILON, num_iterations=50)
    for values in (plan.mass(), plan.row_factors_N, plan.column_factors_C, plan.potentials_C, plan.value):
        assert values.isfinite().all()
    assert float(plan.mass().sum()) == pytest.approx(1.0, rel=1e-9)


def test_equal_costs_and_no_latents_at_all() -> None:
    entries = torch.ones(4, 3)
    plan = plan_transport(torch.zeros(6, 3), entries, _uniform(4), epsilon=0.01, num_iterations=3)
    torch.testing.assert_close(plan.mass(), torch.full((6, 4), 1 / 24, dtype=torch.float64))
    assert plan.codes().tolist() == [0] * 6
    assert float(plan.value) == pytest.approx(1.0)
    nothing = torch.zeros(0, 3, requires_grad=True)
    wanting = entries.clone().requires_grad_()
    loss = transport_loss(nothing, wanting, _uniform(4), epsilon=0.01, num_iterations=3)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert wanting.grad is not None
    assert not wanting.grad.any()
    assert balanced_codes(nothing, entries, epsilon=0.01, num_iterations=3).shape == (0,)


def test_the_loss_becomes_the_least_cost_and_bounds_the_entropic_one() -> None:
    latents, entries, shares = _normal(12, 4), _normal(5, 4, seed=1), _normal(5, seed=2).softmax(0)
    costs = _costs(latents, entries)
    exact, _ = _cheapest_plan(costs, shares)
    gaps = []
    for epsilon in (1.0, 0.1, 0.01, LEAST_EPSILON):
        loss = float(transport_loss(latents, entries, shares, epsilon=epsilon, num_iterations=2000))
        plan = plan_transport(latents, entries, shares, epsilon=epsilon, num_iterations=2000)
        mass = plan.mass()
        scale = epsilon * float(costs.max() - costs.min()) / 2
        entropic = (mass * costs).sum() + scale * torch.xlogy(mass, mass * 12 / shares.double()).sum()
        assert loss == pytest.approx(float(entropic), rel=1e-5)  # float32 costs
        gaps.append(loss - exact)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1 * exact
    assert 0 <= gaps[-1] < 0.01 * exact
    assert exact > 1.05 * float(costs.min(1).values.mean()), "the nearest entries do not have these shares"
    early = float(transport_loss(latents, entries, shares, epsilon=0.1, num_iterations=1))
    assert early < float(transport_loss(latents, entries, shares, epsilon=0.1, num_iterations=2000))


def test_gradients_are_those_of_the_least_cost() -> None:
    """Of a linear program with a unique solution: that of the cost under its plan, and the price of shares."""
    latents, entries, logits = (_normal(*shape, seed=s).double() for s, shape in enumerate([(12, 4), (5, 4), (5,)]))
    for values in (latents, entries, logits):
        values.requires_grad_()
    loss = transport_loss(latents, entries, logits.softmax(0), epsilon=LEAST_EPSILON, num_iterations=5000)
    loss.backward()
    costs, shares = _costs(latents, entries).detach(), logits.softmax(0).detach()
    exact, mass = _cheapest_plan(costs, shares)
    pull = 2 / 4 * mass[:, :, None] * (latents.detach()[:, None] - entries.detach())
    # The entropic plan is a little softer than the exact one; the largest gradients of entries are above 0.1.
    torch.testing.assert_close(latents.grad, pull.sum(1), rtol=0, atol=5e-3)
    torch.testing.assert_close(entries.grad, -pull.sum(0), rtol=0, atol=5e-3)
    assert float(entries.grad.abs().max()) > 0.1
    assert logits.grad is not None
    for index in range(5):
        moved = logits.detach().clone()
        moved[index] += 0.01
        difference = (_cheapest_plan(costs, moved.softmax(0))[0] - exact) / 0.01
        assert float(logits.grad[index]) == pytest.approx(difference, abs=3e-3)


def test_gradients_are_those_of_the_value() -> None:
    """Central differences of the entropic cost; nothing that is moved is at an end of the range of costs."""
    latents, entries = _normal(10, 3).double(), _normal(4, 3, seed=1).double()
    latents[0], entries[0] = 9.0, -9.0  # the dearest pair; the cheapest one:
    latents[1] = entries[0]
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def loss(z: Tensor, e: Tensor, w: Tensor) -> Tensor:
        return transport_loss(z, e, w, epsilon=0.02, num_iterations=2000)

    z, e, w = (values.clone().requires_grad_() for values in (latents, entries, shares))
    loss(z, e, w).backward()
    for place, wanted in ((0, z), (1, e), (2, w)):
        direction = _normal(*wanted.shape, seed=5).double()
        if place == 0:
            direction[:2] = 0.0
        elif place == 1:
            direction[0] = 0.0
        else:
            direction -= direction.mean()  # shares keep their sum
        values = [latents, entries, shares]
        ends = []
        for sign in (1.0, -1.0):
            moved = list(values)
            moved[place] = values[place] + sign * 1e-4 * direction
            ends.append(float(loss(*moved)))
        assert wanted.grad is not None
        slope = float((wanted.grad * direction).sum())
        assert abs(slope) > 0.01
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4)


def test_entries_that_nothing_is_near_are_drawn_to_latents() -> None:
    """The nearest entry's loss leaves them where they are."""
    latents = torch.cat([_normal(50, 2) * 0.1 + 1.0, _normal(50, 2, seed=1) * 0.1 - 1.0])
    entries = torch.tensor([[1.0, 1.0], [9.0, 9.0]], requires_grad=True)
    optimizer = torch.optim.SGD([entries], lr=1.0)
    for _ in range(40):
        optimizer.zero_grad()
        transport_loss(latents, entries, _uniform(2), epsilon=0.01, num_iterations=20).backward()
        optimizer.step()
    found = entries.detach()[entries.detach()[:, 0].argsort()]
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), rtol=0, atol=0.05)


def test_autocast_outside_changes_nothing() -> None:
    latents, entries = _normal(30, 4), _normal(5, 4, seed=1)
    plain = transport_loss(latents, entries, _uniform(5), epsilon=0.01, num_iterations=5)
    with torch.autocast("cpu", torch.bfloat16):
        cast = transport_loss(latents, entries, _uniform(5), epsilon=0.01, num_iterations=5)
    assert torch.equal(plain, cast)


def test_impossible_plans_are_value_errors() -> None:
    for epsilon, num_iterations in ((0.001, 5), (0.01, 0)):
        with pytest.raises(ValueError, match=r"epsilon must be at least 0\.003 and num_iterations positive"):
            plan_transport(_normal(3, 2), _normal(2, 2), _uniform(2), epsilon=epsilon, num_iterations=num_iterations)


# Several processes plan for the frames of all.


def _planned(latents: Tensor) -> dict[str, Tensor]:
    latents, entries = latents.clone().requires_grad_(), _normal(6, 4, seed=1).requires_grad_()
    shares = _normal(6, seed=2).softmax(0).requires_grad_()
    loss = transport_loss(latents, entries, shares, epsilon=0.02, num_iterations=30)
    loss.backward()
    assert latents.grad is not None
    assert entries.grad is not None
    assert shares.grad is not None
    codes = balanced_codes(latents.detach(), entries.detach(), epsilon=0.02, num_iterations=30)
    found = {"loss": loss.detach(), "latents": latents.grad, "entries": entries.grad, "shares": shares.grad}
    return found | {"codes": codes}


_PARTS = (slice(0, 0), slice(0, 50))  # the first process has nothing; and in another case
_OTHERS = (slice(0, 13), slice(13, 50))


def _plan_on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save([_planned(_normal(50, 4)[parts[rank]]) for parts in (_PARTS, _OTHERS)], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_plan_as_one_with_all_latents(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_plan_on_rank, (tmp_path,), nprocs=2)
    by_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = _planned(_normal(50, 4))
    for first, second in zip(*by_rank, strict=True):
        assert torch.equal(torch.cat([first["codes"], second["codes"]]), whole["codes"])
        found = {
            # Every process has the loss; gradients of parameters are averaged; each latent's is divided by two then.
            "loss": first["loss"],
            "entries": (first["entries"] + second["entries"]) / 2,
            "shares": (first["shares"] + second["shares"]) / 2,
            "latents": torch.cat([first["latents"], second["latents"]]) / 2,
        }
        assert torch.equal(first["loss"], second["loss"])
        for name, value in found.items():
            # float32; sums in another order.
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-6, msg=name)
