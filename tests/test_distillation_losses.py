"""What a codec is taught by: each loss by hand, its axis, and that what the mask leaves out has no part in it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codec.config import build, from_dict
from recipes.distillation_losses import DistillationLoss, frame_cosines

ALL: list[dict[str, Any]] = [
    {"type": "cosine_over_time"},
    {"type": "cosine_per_frame"},
    {"type": "l1_and_cosine", "cosine_weight": 0.5},
    {"type": "contrastive", "temperature": 0.5},
]
every_loss = pytest.mark.parametrize("settings", ALL, ids=[str(settings["type"]) for settings in ALL])


def _loss(kind: str, **settings: Any) -> DistillationLoss:
    loss: DistillationLoss = build(from_dict({"type": kind} | settings))
    return loss


def _draw(num_items: int = 2, num_frames: int = 5, dim: int = 3, *, seed: int = 0, dtype: Any = None) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(num_items, num_frames, dim, generator=draws, dtype=dtype)


def _everywhere(values: Tensor) -> Tensor:
    return torch.ones(values.shape[:2], dtype=torch.bool)


# The same arithmetic in plain Python


def _cosine(one: Any, two: Any) -> float:
    dot = sum(float(a) * float(b) for a, b in zip(one, two, strict=True))
    return dot / math.sqrt(sum(float(a) ** 2 for a in one) * sum(float(b) ** 2 for b in two))


def _bound(cosine: float) -> float:
    """-log(sigmoid(cosine)), which keeps between 0.3133 and 1.3133."""
    return math.log(1.0 + math.exp(-cosine))


def _over_time(estimate: Any, targets: Any, mask: Any) -> float:
    items = []
    for ours, wanted, there in zip(estimate, targets, mask, strict=True):
        if there.any():
            ours, wanted = ours[there], wanted[there]
            items.append(np.mean([_bound(_cosine(ours[:, d], wanted[:, d])) for d in range(ours.shape[1])]))
    return float(np.mean(items))


def _per_frame(estimate: Any, targets: Any, mask: Any) -> float:
    pairs = zip(estimate[mask], targets[mask], strict=True)
    return float(np.mean([1.0 - _cosine(ours, wanted) for ours, wanted in pairs]))


def _l1_and_cosine(estimate: Any, targets: Any, mask: Any) -> float:
    pairs = list(zip(estimate[mask], targets[mask], strict=True))
    error = np.mean([np.mean([abs(a - b) for a, b in zip(*pair, strict=True)]) for pair in pairs])
    return float(error + 0.5 * np.mean([_bound(_cosine(*pair)) for pair in pairs]))


def _contrastive(estimate: Any, targets: Any, mask: Any) -> float:
    ours, wanted = estimate[mask], targets[mask]
    losses = []
    for i, frame in enumerate(ours):
        scores = [math.exp(_cosine(frame, target) / 0.5) for target in wanted]
        losses.append(-math.log(scores[i] / sum(scores)))
    return float(np.mean(losses))


BY_HAND: list[Callable[..., float]] = [_over_time, _per_frame, _l1_and_cosine, _contrastive]


@pytest.mark.parametrize(("settings", "by_hand"), list(zip(ALL, BY_HAND, strict=True)))
def test_losses_are_those_of_the_papers(settings: dict[str, Any], by_hand: Callable[..., float]) -> None:
    estimate, targets = _draw(3, 6, 4), _draw(3, 6, 4, seed=1)
    for mask in (torch.ones(3, 6) > 0, torch.tensor([[1, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0], [0] * 6]) > 0):
        expected = by_hand(estimate.numpy(), targets.numpy(), mask.numpy())
        # Sums of some dozen float32 products of about 1.
        assert float(_loss(**_named(settings))(estimate, targets, mask)) == pytest.approx(expected, abs=2e-6)


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    return {"kind" if key == "type" else key: value for key, value in settings.items()}


def test_numbers_that_can_be_checked_in_ones_head() -> None:
    """Two frames, two dims: the first dim has the same course, the second the opposite one."""
    estimate, targets = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]]), torch.tensor([[[2.0, -3.0], [4.0, 0.0]]])
    mask = _everywhere(targets)
    expected = (_bound(1.0) + _bound(-1.0)) / 2
    assert float(_loss("cosine_over_time")(estimate, targets, mask)) == pytest.approx(expected)
    # Frames: (1, 1) and (2, -3) have the cosine -1 / sqrt(2 * 13); (2, 0) and (4, 0) have 1.
    cosine = -1.0 / math.sqrt(26.0)
    assert frame_cosines(estimate, targets, mask)[0].tolist() == pytest.approx([cosine, 1.0])
    assert float(_loss("cosine_per_frame")(estimate, targets, mask)) == pytest.approx((1.0 - cosine) / 2)
    # Absolute errors: (1, 4) and (2, 0).
    expected = (2.5 + 1.0) / 2 + 2.0 * (_bound(cosine) + _bound(1.0)) / 2
    assert float(_loss("l1_and_cosine", cosine_weight=2.0)(estimate, targets, mask)) == pytest.approx(expected)
    assert float(_loss("l1_and_cosine", cosine_weight=0.0)(estimate, targets, mask)) == pytest.approx(1.75)
    # Logits over a temperature of 0.5: each estimate's cosine with both targets.
    other = 1.0 / math.sqrt(2.0), 2.0 / math.sqrt(13.0)  # (1, 1) with (4, 0), and (2, 0) with (2, -3)
    rows = [(cosine, other[0]), (1.0, other[1])]
    expected = sum(math.log(1.0 + math.exp((wrong - right) / 0.5)) for right, wrong in rows) / 2
    assert float(_loss("contrastive", temperature=0.5)(estimate, targets, mask)) == pytest.approx(expected)


# Axes and scales


@given(st.permutations(range(6)))
def test_the_d_axis_compares_courses_over_time(order: list[int]) -> None:
    loss = _loss("cosine_over_time")
    estimate, targets = _draw(2, 6, 4), _draw(2, 6, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 0, 1, 1, 0, 1]]) > 0
    before = float(loss(estimate, targets, mask))
    # When things happen does not matter, only that they happen together.
    together = loss(estimate[:, order], targets[:, order], mask[:, order])
    assert float(together) == pytest.approx(before, abs=1e-6)
    if order != sorted(order):
        everywhere = _everywhere(targets)
        apart = float(loss(estimate[:, order], targets, everywhere))
        assert apart != pytest.approx(float(loss(estimate, targets, everywhere)), abs=1e-6)


def test_a_dim_is_compared_with_its_own_whatever_its_scale() -> None:
    estimate, targets = _draw(2, 6, 4), _draw(2, 6, 4, seed=1)
    mask = _everywhere(targets)
    over_time, per_frame = _loss("cosine_over_time"), _loss("cosine_per_frame")
    of_dims, of_frames = torch.tensor([0.1, 1.0, 3.0, 20.0]), torch.arange(1.0, 7.0)[:, None]
    ours = [float(loss(estimate, targets, mask)) for loss in (over_time, per_frame)]
    # Each dim has a scale of its own over time; each frame has one of its own per frame; neither the other way round.
    assert float(over_time(estimate * of_dims, targets, mask)) == pytest.approx(ours[0])
    assert float(over_time(estimate, targets * of_dims, mask)) == pytest.approx(ours[0])
    assert float(per_frame(estimate * of_frames, targets, mask)) == pytest.approx(ours[1])
    assert float(over_time(estimate, targets * of_frames, mask)) != pytest.approx(ours[0], abs=1e-3)
    assert float(per_frame(estimate, targets * of_dims, mask)) != pytest.approx(ours[1], abs=1e-3)
    # Dims in another order on one side are other dims.
    assert float(over_time(estimate[:, :, [1, 0, 2, 3]], targets, mask)) != pytest.approx(ours[0], abs=1e-3)


def test_items_count_alike_over_time_and_frames_count_alike_per_frame() -> None:
    """The first item has one frame and is right, the second has three and is wrong."""
    targets = _draw(2, 3, 4)
    estimate = torch.stack([targets[0], -targets[1]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]) > 0
    over_time = float(_loss("cosine_over_time")(estimate, targets, mask))
    assert over_time == pytest.approx((_bound(1.0) + _bound(-1.0)) / 2)
    assert float(_loss("cosine_per_frame")(estimate, targets, mask)) == pytest.approx((0.0 + 3 * 2.0) / 4)


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_losses_keep_to_their_bounds(seed: int, scale: float) -> None:
    estimate, targets = scale * _draw(seed=seed), _draw(seed=seed + 1)
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed)) < 0.7
    if not mask.any():
        return
    assert 0.3132 < float(_loss("cosine_over_time")(estimate, targets, mask)) < 1.3134
    assert -1e-6 < float(_loss("cosine_per_frame")(estimate, targets, mask)) < 2.0 + 1e-6
    assert float(_loss("contrastive")(estimate, targets, mask)) >= 0.0


@pytest.mark.parametrize(("sign", "over_time", "per_frame"), [(1.0, 0.31326, 0.0), (-1.0, 1.31326, 2.0)])
def test_bounds_are_reached(sign: float, over_time: float, per_frame: float) -> None:
    targets = _draw()
    mask = _everywhere(targets)
    assert float(_loss("cosine_over_time")(sign * targets, targets, mask)) == pytest.approx(over_time, abs=1e-5)
    assert float(_loss("cosine_per_frame")(sign * targets, targets, mask)) == pytest.approx(per_frame, abs=1e-6)


# Masks


@every_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_the_mask_leaves_out_has_no_part(settings: dict[str, Any], poison: float) -> None:
    loss = _loss(**_named(settings))
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]) > 0
    found = []
    for outside in (0.0, poison):
        estimate, targets = _draw(), _draw(seed=1)
        estimate[~mask], targets[~mask] = outside, outside
        estimate.requires_grad_()
        value = loss(estimate, targets, mask)
        value.backward()
        assert estimate.grad is not None
        assert torch.isfinite(estimate.grad).all()
        assert (estimate.grad[~mask] == 0).all()
        assert (estimate.grad[mask] != 0).any()
        found.append((value.detach(), estimate.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@every_loss
def test_padding_changes_nothing(settings: dict[str, Any]) -> None:
    """Frames beyond the end and items without a target."""
    loss = _loss(**_named(settings))
    estimate, targets = _draw(), _draw(seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]]) > 0
    before = float(loss(estimate, targets, mask))
    longer = [torch.nn.functional.pad(part, (0, 0, 0, 7, 0, 2), value=3.0) for part in (estimate, targets)]
    after = float(loss(*longer, torch.nn.functional.pad(mask, (0, 7, 0, 2))))
    assert after == pytest.approx(before, rel=1e-6)


@every_loss
def test_no_frames_are_no_loss_and_no_gradient(settings: dict[str, Any]) -> None:
    """Zeros, and not no gradient at all: processes average what they have, and must have the same."""
    estimate, targets = _draw().requires_grad_(), _draw(seed=1).requires_grad_()
    with torch.no_grad():
        estimate[0, 0], targets[1, 1] = math.nan, math.inf
    loss = _loss(**_named(settings))(estimate, targets, torch.zeros(2, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    for values in (estimate, targets):  # targets learn where learned weights mix them
        assert values.grad is not None
        assert (values.grad == 0).all()


@every_loss
def test_gradients_are_those_of_the_values(settings: dict[str, Any]) -> None:
    loss = _loss(**_named(settings))
    mask = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]]) > 0
    inputs = (_draw(dtype=torch.float64).requires_grad_(), _draw(seed=1, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(lambda estimate, targets: loss(estimate, targets, mask), inputs)


@every_loss
def test_losses_fall_when_they_are_followed(settings: dict[str, Any]) -> None:
    targets, estimate = _draw(), _draw(seed=1).requires_grad_()
    optimizer, loss = torch.optim.Adam([estimate], 0.05), _loss(**_named(settings))
    mask = _everywhere(targets)
    before = frame_cosines(estimate.detach(), targets, mask).mean()
    for _ in range(100):
        optimizer.zero_grad()
        loss(estimate, targets, mask).backward()
        optimizer.step()
    assert frame_cosines(estimate.detach(), targets, mask).mean() > 0.8 > before + 0.3


# Contrastive


def test_frames_that_share_a_target_are_no_negatives() -> None:
    loss = _loss("contrastive", temperature=1.0)
    targets = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])  # the first two point the same way
    estimate = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 3.0]]])
    half = 1.0 / math.sqrt(2.0)
    # Of each: its own cosine against the one other target.
    pairs = [(half, [half]), (1.0, [0.0]), (1.0, [0.0, 0.0])]
    expected = np.mean([-right + math.log(math.exp(right) + sum(map(math.exp, wrong))) for right, wrong in pairs])
    assert float(loss(estimate, targets, _everywhere(targets))) == pytest.approx(expected)


def test_one_target_for_all_teaches_nothing() -> None:
    estimate, targets = _draw().requires_grad_(), torch.ones(2, 5, 3)
    loss = _loss("contrastive")(estimate, targets, _everywhere(targets))
    loss.backward()
    assert loss.item() == 0.0
    assert estimate.grad is not None
    assert (estimate.grad == 0).all()


def test_a_frame_alone_has_nobody_to_differ_from() -> None:
    estimate, targets = _draw().requires_grad_(), _draw(seed=1)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 2] = True
    loss = _loss("contrastive")(estimate, targets, mask)
    loss.backward()
    assert loss.item() == 0.0
    assert estimate.grad is not None
    assert (estimate.grad == 0).all()


def test_many_frames_take_part_evenly_spaced() -> None:
    """Four of ten: the first, the last, and two between; the loss is theirs alone."""
    estimate, targets = _draw(2, 6).requires_grad_(), _draw(2, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]) > 0
    loss = _loss("contrastive", max_frames=4)(estimate, targets, mask)
    loss.backward()
    assert estimate.grad is not None
    took_part = (estimate.grad[mask] != 0).any(1).nonzero()[:, 0].tolist()
    assert took_part == [0, 3, 6, 9]
    few = [part.detach()[mask][took_part][None] for part in (estimate, targets)]
    assert loss.item() == pytest.approx(float(_loss("contrastive")(*few, torch.ones(1, 4) > 0)), rel=1e-6)
    all_of_them = _loss("contrastive", max_frames=10)(estimate, targets, mask)
    assert torch.equal(all_of_them, _loss("contrastive")(estimate, targets, mask))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "l1_and_cosine", "cosine_weight": -1.0}, "loss: cosine_weight must not be negative, got -1.0"),
        ({"type": "contrastive", "temperature": 0.0}, "loss: temperature must be positive and max_frames at least 2"),
        ({"type": "contrastive", "max_frames": 1}, "loss: temperature must be positive and max_frames at least 2"),
        ({"type": "cosine_over_time", "axis": 1}, "loss.axis: cosine_over_time has no such setting"),
    ],
)
def test_impossible_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as told:
        from_dict(settings, "loss")
    assert str(told.value).startswith(message)
