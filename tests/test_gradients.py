import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codec.quantizers.gradients import GRADIENTS, rotate, straight_through


def _pair(num_dims: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, quantized = torch.randn(2, 7, num_dims, generator=generator, dtype=torch.float64)
    return inputs.requires_grad_(), quantized.requires_grad_()


def _jacobian(inputs: Tensor, quantized: Tensor) -> Tensor:
    """Of one rotated vector [d] with respect to its input, [d, d]."""
    jacobian: Tensor = torch.autograd.functional.jacobian(lambda x: rotate(x, quantized), inputs)
    return jacobian


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_value_is_what_was_quantized_and_that_gets_no_gradient(gradient: str) -> None:
    inputs, quantized = _pair(5)
    passed = GRADIENTS[gradient](inputs, quantized)
    assert torch.equal(passed, quantized)
    passed.square().sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.any(1).all()
    assert quantized.grad is None


def test_straight_through_hands_the_gradient_on() -> None:
    inputs, quantized = _pair(5)
    weight = torch.randn(7, 5, dtype=torch.float64)
    (straight_through(inputs, quantized) * weight).sum().backward()
    assert torch.equal(inputs.grad, weight)


def test_a_quarter_turn() -> None:
    """From (2, 0) to (0, 3): turned left by 90 degrees and made 1.5 times longer."""
    jacobian = _jacobian(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(jacobian, torch.tensor([[0.0, -1.5], [1.5, 0.0]]), rtol=0, atol=1e-6)  # a few roundings


def test_equal_vectors_are_not_turned_and_longer_entries_scale() -> None:
    x = torch.tensor([1.0, -2.0, 2.0])
    torch.testing.assert_close(_jacobian(x, x), torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(_jacobian(x, 4 * x), 4 * torch.eye(3), rtol=0, atol=1e-5)


@given(num_dims=st.integers(2, 9), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_it_is_the_rotation_in_the_plane_of_both_times_the_ratio_of_lengths(num_dims: int, seed: int) -> None:
    inputs, quantized = (x.detach()[0] for x in _pair(num_dims, seed=seed))
    jacobian = _jacobian(inputs, quantized)
    rotation = jacobian * inputs.norm() / quantized.norm()
    identity = torch.eye(num_dims, dtype=torch.float64)
    # float64 with a few roundings, worse where the vectors are nearly opposite.
    torch.testing.assert_close(rotation @ rotation.T, identity, rtol=0, atol=1e-9)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(jacobian @ inputs, quantized, rtol=0, atol=1e-9)
    # What is orthogonal to both stays where it is.
    plane = torch.linalg.qr(torch.stack([inputs, quantized], dim=1)).Q
    others = identity - plane @ plane.T
    torch.testing.assert_close(rotation @ others, others, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("inputs", "quantized"),
    [
        ([0.0, 0.0], [1.0, 2.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1e-30, 0.0], [1e-30, 1e-30]),
        ([1.0, 2.0], [-1.0, -2.0]),
        ([1.0, 0.0], [-1.0, 1e-4]),
        ([1e-4, 0.0], [0.0, 1.0]),
        ([1.0, 0.0], [0.0, 1e-4]),
    ],
)
def test_without_an_angle_the_gradient_passes_straight_through(inputs: list[float], quantized: list[float]) -> None:
    jacobian = _jacobian(torch.tensor(inputs), torch.tensor(quantized))
    assert torch.equal(jacobian, torch.eye(2))
    assert torch.equal(rotate(torch.tensor(inputs), torch.tensor(quantized)), torch.tensor(quantized))


def test_each_vector_is_turned_by_itself() -> None:
    inputs, quantized = _pair(4)
    weight = torch.randn(7, 4, dtype=torch.float64)
    (rotate(inputs, quantized) * weight).sum().backward()
    for row in range(7):
        expected = _jacobian(inputs[row].detach(), quantized[row].detach()).T @ weight[row]
        torch.testing.assert_close(inputs.grad[row], expected, rtol=0, atol=1e-12)  # the same sums in batches
