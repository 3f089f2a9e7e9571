import copy
import io

import pytest
import torch
from torch import Tensor

from codec.kernels.kept import Kept
from codec.testing import tiny_codec


class _Counted:
    """Doubles the sources, and counts how often."""

    def __init__(self, *sources: Tensor) -> None:
        self.sources, self.kept, self.num_made = list(sources), Kept[list[Tensor]](), 0

    def _make(self) -> list[Tensor]:
        self.num_made += 1
        return [2 * source.detach() for source in self.sources]

    def check(self, num_made: int) -> None:
        """The value is right, and was made so many times up to now."""
        for _ in range(2):
            value = self.kept.get(self.sources, self._make)
            assert all(torch.equal(a, 2 * b) for a, b in zip(value, self.sources, strict=True))
        assert self.num_made == num_made


def test_a_value_is_made_again_when_a_source_is_written_to() -> None:
    counted = _Counted(torch.ones(3), torch.zeros(2, 2))
    counted.check(1)
    counted.sources[1][0, 1] = 7.0  # a view of it
    counted.check(2)
    counted.sources[0].copy_(torch.arange(3.0))
    counted.check(3)
    counted.sources[0].detach().mul_(3)  # an alias of it
    counted.check(4)


def test_a_value_is_made_again_for_other_sources() -> None:
    counted = _Counted(torch.ones(3))
    counted.check(1)
    counted.sources[0] = torch.full((3,), 5.0)
    counted.check(2)
    for number in range(5):  # memory is not handed out again while it is looked at
        counted.sources[0] = torch.full((3,), float(number))
        counted.check(3 + number)


def test_nothing_is_kept_while_an_optimizer_may_write() -> None:
    table = torch.nn.Parameter(torch.ones(3))
    counted = _Counted(table)
    counted.check(2)
    table.requires_grad_(False)
    counted.check(3)
    table.requires_grad_()
    counted.check(5)
    table.requires_grad_(False)  # what was kept before is not taken up again
    counted.check(6)


def test_sources_of_inference_mode() -> None:
    with torch.inference_mode():
        counted = _Counted(torch.ones(3))
        counted.check(1)
        counted.sources[0] = torch.zeros(3)
        counted.check(2)


@pytest.mark.parametrize("copied", ["copy", "deepcopy", "pickle"])
def test_copies_are_empty(copied: str) -> None:
    counted = _Counted(torch.ones(3))
    counted.check(1)
    if copied == "pickle":
        file = io.BytesIO()
        torch.save(counted.kept, file)
        counted.kept = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        counted.kept = getattr(copy, copied)(counted.kept)
    counted.check(2)


def test_a_model_whose_weights_change_finds_codes_by_the_new_ones() -> None:
    codec, other = tiny_codec(), tiny_codec(seed=1)
    audio = torch.rand(1, 1, 640, generator=torch.Generator().manual_seed(0)) - 0.5
    codes, expected = codec.encode(audio).codes, other.encode(audio).codes
    assert not torch.equal(codes, expected)
    codec.load_state_dict(other.state_dict())
    assert torch.equal(codec.encode(audio).codes, expected)
    copied = copy.deepcopy(codec)
    copied.load_state_dict(tiny_codec().state_dict())
    assert torch.equal(copied.encode(audio).codes, codes)
    assert torch.equal(codec.encode(audio).codes, expected)
