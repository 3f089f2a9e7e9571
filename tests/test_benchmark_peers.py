"""The comparison with the `encodec` package runs, and compares like with like."""

import sys
from collections.abc import Iterator

import pytest
import torch

from tools import benchmark_peers

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def _keep_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_prints_both_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("encodec")
    benchmark_peers.main(["--batch-size", "1", "--num-samples", "2400", "--repetitions", "1"])
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split()[:3] for line in lines] == [
        [measurement, precision, "1"] for measurement in ("network", "step") for precision in ("fp32", "bf16")
    ]
    for line in lines:
        ours, theirs, ratio = map(float, line.split()[3:6])
        assert ours > 0
        # Milliseconds are printed whole, the ratio to a hundredth.
        assert ratio == pytest.approx(ours / theirs, abs=0.1)


def test_a_step_trains_all_of_either_side() -> None:
    """What is timed must not leave parts of the work out."""
    pytest.importorskip("encodec")
    audio = 0.1 * torch.randn(1, 1, 2400)
    for side in (benchmark_peers.Ours(), benchmark_peers.Theirs()):
        model = side.model.train()
        loss, finish = side.step(audio)
        loss.backward()
        finish()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "encodec", None)
    with pytest.raises(ValueError, match="comes with the extra `peers`"):
        benchmark_peers.Theirs()
