"""The gradient balancer and the average of weights."""

import copy
import doctest
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import recipes.averaging
import recipes.balancer
from recipes.averaging import WeightAverage
from recipes.balancer import Balancer
from recipes.discriminators import Discriminators
from recipes.losses import adversarial_loss, feature_matching_loss


def test_examples_in_docstrings_run() -> None:
    for module in (recipes.balancer, recipes.averaging):
        assert doctest.testmod(module).attempted > 0
        assert doctest.testmod(module).failed == 0


# The balancer


def _losses(output: Tensor, seed: int) -> dict[str, Tensor]:
    """Losses of scales from 1e-6 to 1e6, with gradients in random directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(output.shape, generator=generator) for _ in range(3)]
    return {
        "tiny": 1e-6 * (output * directions[0]).sum(),
        "plain": (output - directions[1]).square().mean(),
        "huge": 1e6 * (output * directions[2]).abs().sum(),
    }


WEIGHTS = {"tiny": 1.0, "plain": 2.0, "huge": 5.0}


def test_gradient_norms_follow_the_weights() -> None:
    """Of each loss alone, what arrives at the output has the norm that its weight asks for."""
    output = torch.randn(4, 2, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    balancer = Balancer(WEIGHTS, total_norm=3.0)
    norms = balancer.backward(_losses(output, 0), output)
    assert output.grad is not None
    whole, parts = output.grad.clone(), torch.zeros_like(output)
    for name, weight in WEIGHTS.items():
        (gradient,) = torch.autograd.grad(_losses(output, 0)[name], output)
        norm = gradient.flatten(1).norm(dim=1).mean()
        assert norms[name] == pytest.approx(float(norm))
        part = gradient / norm * 3.0 * weight / 8.0
        assert float(part.flatten(1).norm(dim=1).mean()) == pytest.approx(3.0 * weight / 8.0)
        parts += part
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-8)


class _Published:
    """EnCodec's balancer, written down from the paper and SPECS: averages of norms without bias, then shares."""

    def __init__(self, weights: dict[str, float], decay: float) -> None:
        self.weights, self.decay, self.norms = weights, decay, {name: [] for name in weights}  # type: ignore[var-annotated]

    def gradient(self, losses: dict[str, Tensor], output: Tensor) -> Tensor:
        total = torch.zeros_like(output)
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, [output], retain_graph=True)
            self.norms[name].append(float(gradient.norm(dim=(1, 2)).mean()))
            ages = range(len(self.norms[name]) - 1, -1, -1)
            shares = [self.decay**age for age in ages]
            average = sum(w * n for w, n in zip(shares, self.norms[name], strict=True)) / sum(shares)
            total += self.weights[name] / sum(self.weights.values()) * gradient / (1e-12 + average)
        return total


def test_parity_with_the_published_rule_over_steps() -> None:
    network = nn.Linear(6, 6)
    ours, theirs = Balancer(WEIGHTS, decay=0.9), _Published(WEIGHTS, decay=0.9)
    for step in range(12):
        x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(step))
        output = network(x)
        expected = theirs.gradient(_losses(output, step), output)
        weights = torch.autograd.grad(output, list(network.parameters()), expected)
        network.zero_grad()
        output = network(x)
        ours.backward(_losses(output, step), output)
        for parameter, gradient in zip(network.parameters(), weights, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
            parameter.data -= 0.1 * gradient


def test_losses_may_share_a_graph_and_discriminators_get_no_gradient() -> None:
    judges = Discriminators([{"type": "multi_period", "periods": [2], "channels": [4, 4]}])
    network = nn.Linear(20, 20)
    x = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(0))
    output = network(x)
    real, fake = judges(x), judges(output)
    losses = {
        "adversarial": adversarial_loss(fake, "hinge"),
        "features": feature_matching_loss(real, fake, relative=False),
    }
    Balancer({"adversarial": 1.0, "features": 1.0}).backward(losses, output)
    assert network.weight.grad is not None
    assert network.weight.grad.abs().sum() > 0
    assert all(weights.grad is None for weights in judges.parameters())


def test_other_losses_go_along_in_one_pass() -> None:
    encoder, decoder = nn.Linear(4, 4), nn.Linear(4, 4)
    passes: list[int] = []
    encoder.weight.register_hook(lambda gradient: passes.append(1))
    x = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0))

    def run(balanced: bool, commitment: bool) -> Tensor:
        encoder.zero_grad()
        latents = encoder(x)
        output = decoder(latents)
        others = 0.25 * latents.square().mean() if commitment else None
        if balanced:
            Balancer({"l1": 1.0}).backward({"l1": output.abs().sum()}, output, unbalanced=others)
        elif others is not None:
            others.backward()
        assert encoder.weight.grad is not None
        return encoder.weight.grad.clone()

    together = run(True, True)
    assert len(passes) == 1
    torch.testing.assert_close(together, run(True, False) + run(False, True), rtol=1e-6, atol=1e-7)


def test_silence_and_losses_that_come_late() -> None:
    balancer = Balancer({"a": 1.0, "b": 3.0}, decay=0.5)
    output = torch.zeros(2, 1, 4, requires_grad=True)
    norms = balancer.backward({"a": output.square().sum()}, output)  # no gradient at all
    assert norms == {"a": 0.0}
    assert output.grad is not None
    assert torch.equal(output.grad, torch.zeros_like(output))
    # Alone, a loss has the whole gradient; later ones start with averages of their own, without bias.
    output.grad = None
    balancer = Balancer({"a": 1.0, "b": 3.0}, decay=0.5)
    balancer.backward({"a": 7.0 * output.sum()}, output)
    assert float(output.grad.flatten(1).norm(dim=1).mean()) == pytest.approx(1.0)  # type: ignore[attr-defined]
    output.grad = None
    balancer.backward({"a": 7.0 * output.sum(), "b": 1e-4 * output.sum()}, output)
    assert float(output.grad.flatten(1).norm(dim=1).mean()) == pytest.approx(1.0)  # type: ignore[attr-defined]


def test_state_is_tensors_and_goes_on_as_it_would_have() -> None:
    def step(balancer: Balancer, seed: int) -> Tensor:
        output = torch.zeros(2, 1, 8, requires_grad=True)
        balancer.backward(_losses(output, seed), output)
        assert output.grad is not None
        return output.grad

    whole = Balancer(WEIGHTS, decay=0.9)
    for seed in range(3):
        step(whole, seed)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = Balancer(WEIGHTS, decay=0.9)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(step(resumed, 3), step(whole, 3))
    assert not torch.equal(step(Balancer(WEIGHTS, decay=0.9), 4), step(whole, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: Balancer({}), "need positive weights"),
        (lambda x: Balancer({"a": 0.0}), "need positive weights"),
        (lambda x: Balancer({"a": 1.0}, decay=1.0), r"decay=1.0 is not in \[0, 1\)"),
        (lambda x: Balancer({"a": 1.0}, total_norm=0.0), "total_norm must be positive"),
        (lambda x: Balancer({"a": 1.0}).backward({}, x), "there is no loss to balance"),
        (lambda x: Balancer({"a": 1.0}).backward({"b": x.sum()}, x), r"the loss 'b' has no weight \(there are a\)"),
        (lambda x: Balancer({"a": 1.0}).backward({"a": torch.ones(())}, x), "'a' does not depend on the output"),
        (
            lambda x: Balancer({"a": 1.0}).backward({"a": torch.ones((), requires_grad=True)}, x),
            "'a' does not depend on the output",
        ),
    ],
)
def test_mistakes_are_named(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1, 4, requires_grad=True))


def _balance_as_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 1, 5, generator=generator)
    mine = (rows[:1] if rank == 0 else rows[1:]).requires_grad_()  # batches of one and of three
    balancer = Balancer({"a": 1.0, "b": 2.0}, decay=0.9)
    norms = balancer.backward({"a": 3 * mine.square().sum(), "b": (mine**3).sum()}, mine)
    torch.save({"norms": norms, "gradient": mine.grad, **balancer.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without distributed")
def test_processes_agree_on_averages_weighted_by_their_batches(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_balance_as_one_of_two, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["norms"] == other["norms"]
    assert one["sums"] == other["sums"]
    # As one process with all four items would have it (sums, not means: items do not know of each other).
    rows = torch.randn(4, 1, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norms = Balancer({"a": 1.0, "b": 2.0}).backward({"a": 3 * rows.square().sum(), "b": (rows**3).sum()}, rows)
    assert one["norms"] == pytest.approx(norms)
    torch.testing.assert_close(torch.cat([one["gradient"], other["gradient"]]), rows.grad, rtol=1e-5, atol=1e-7)


# The average of weights


class _Counter(nn.Module):
    num_seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("window", torch.ones(2), persistent=False)

    def go_to(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.level.fill_(-value)  # type: ignore[operator]
            self.num_seen += 1


def test_the_average_is_the_weighted_mean_of_all_states() -> None:
    module, average, decay = _Counter(), WeightAverage(decay=0.8), 0.8
    values = [5.0, -1.0, 2.0, 7.0, 7.0]
    for value in values:
        module.go_to(value)
        average.update(module)
    shares = [decay ** (len(values) - 1 - index) for index in range(len(values))]
    expected = math.fsum(w * v for w, v in zip(shares, values, strict=True)) / sum(shares)
    with average.swapped_into(module):
        torch.testing.assert_close(module.weight.detach(), torch.full((3,), expected), rtol=1e-6, atol=0)
        assert float(module.level) == pytest.approx(-expected)  # type: ignore[arg-type]
        assert int(module.num_seen) == 5  # counted, not averaged
    assert torch.equal(module.weight, torch.full((3,), 7.0))


def test_swapping_is_exact_and_survives_errors() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight  # shared: swapped once, not twice
    average = WeightAverage(decay=0.9)
    for _ in range(3):
        average.update(module)
        with torch.no_grad():
            module[0].weight.add_(torch.randn(3, 3))
    before, storage = copy.deepcopy(module.state_dict()), module[0].weight.data_ptr()
    state = copy.deepcopy(average.state_dict())
    with average.swapped_into(module):
        assert not torch.equal(module[0].weight, before["0.weight"])
        assert torch.equal(module[0].weight, state["values"]["0.weight"])
        assert module[0].weight.data_ptr() == storage  # what an optimizer holds stays the same
    with pytest.raises(TypeError), average.swapped_into(module):
        module(None)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(torch.equal(value, state["values"][key]) for key, value in average.state_dict()["values"].items())


def test_the_average_resumes() -> None:
    def run(module: _Counter, average: WeightAverage, values: list[float]) -> None:
        for value in values:
            module.go_to(value)
            average.update(module)

    whole, module = WeightAverage(decay=0.7), _Counter()
    run(module, whole, [1.0, 2.0])
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = WeightAverage(decay=0.7)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(copy.deepcopy(module), resumed, [4.0, 9.0])
    run(module, whole, [4.0, 9.0])
    for key, value in whole.state_dict()["values"].items():
        assert torch.equal(value, resumed.state_dict()["values"][key]), key


def test_averages_of_nothing_or_of_something_else_are_refused() -> None:
    average = WeightAverage(decay=0.5)
    with pytest.raises(ValueError, match="nothing was averaged yet"), average.swapped_into(_Counter()):
        pass
    average.update(_Counter())
    with pytest.raises(ValueError, match="not made of this module"), average.swapped_into(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"decay=1.0 is not in \[0, 1\)"):
        WeightAverage(decay=1.0)
