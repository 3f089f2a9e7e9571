"""The benchmark of quantizers compares like with like, counts codes that differ, and tells what is not there."""

import functools
import importlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codec.quantizers.factorized import FactorizedVQConfig
from codec.quantizers.interface import QuantizerConfig
from codec.quantizers.residual import ResidualVQConfig
from codec.quantizers.split import SplitVQConfig
from codec.testing import tiny_codec
from tools import benchmark
from tools.quantizer_speed import cases, peers
from tools.quantizer_speed.candidates import Candidate, field, flops, num_bytes
from tools.quantizer_speed.cases import Case, model_case, synthetic_case
from tools.quantizer_speed.report import lines_of, measure, take_turns

FORMS: dict[str, QuantizerConfig] = {
    "plain": ResidualVQConfig(latent_dim=12, num_stages=3, codebook_size=32),
    "grouped": ResidualVQConfig(latent_dim=12, num_stages=2, num_groups=2, codebook_size=32),
    "factorized": FactorizedVQConfig(latent_dim=12, num_stages=3, codebook_size=32, codebook_dim=4),
    "split": SplitVQConfig(latent_dim=12, num_stages=3, codebook_size=32, codebook_dim=8),
}


def tiny_case(form: str, shape: tuple[int, int] = (2, 5)) -> Case:
    return synthetic_case(form, FORMS[form], shape, seed=0, device="cpu")


@pytest.fixture(autouse=True)
def _keep_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_scales_fall_and_all_entries_may_be_chosen(form: str) -> None:
    case = tiny_case(form)
    assert {latents.shape for latents in case.latents} == {(2, 12, 5)}
    assert len(case.latents) * 10 >= 512
    latents = torch.cat(case.latents)
    left_over = [
        (latents - case.quantizer.decode(case.quantizer.encode(latents, num_quantizers=n))).square().mean()
        for n in case.quantizer.valid_num_quantizers
    ]
    assert left_over[-1] < left_over[0] < latents.square().mean()
    codes = case.quantizer.encode(latents)
    assert all(len(codes[:, row].unique()) > 16 for row in range(codes.shape[1]))


def test_the_same_seed_gives_the_same_case() -> None:
    one, same = tiny_case("split"), tiny_case("split")
    other = synthetic_case("split", FORMS["split"], (2, 5), seed=1, device="cpu")
    assert torch.equal(torch.cat(one.latents), torch.cat(same.latents))
    assert torch.equal(one.tables.entries_KCd, same.tables.entries_KCd)
    assert not torch.equal(one.tables.entries_KCd, other.tables.entries_KCd)


@pytest.mark.parametrize("form", FORMS)
def test_everything_is_measured_and_gives_our_codes(form: str) -> None:
    result = measure(tiny_case(form), "tiny", repetitions=2, kinds=("ours", "eager"))
    assert [entry.name for entry in result.encoding] == [
        "ours",
        "ours, compiled",
        "search: reference",
        "search: blocked",
        "search: numba",
        "eager loop",
        "eager loop, max",
    ]
    assert [entry.name for entry in result.decoding] == ["ours", "eager loop"]
    for timing in [*result.encoding, *result.decoding, *result.floors]:
        assert 0 < timing.p10_ms <= timing.median_ms <= timing.p90_ms
        assert timing.num_calls >= 2
    for entry in result.encoding:
        assert entry.times_floor == pytest.approx(entry.median_ms / max(result.arithmetic_ms, result.memory_ms))
        assert entry.times_ours == pytest.approx(entry.median_ms / result.encoding[0].median_ms)
        assert entry.clear_frames == 0
        assert entry.same_codes > 0.99
    # Implementations of one contract.
    assert [entry.same_codes for entry in result.encoding[:3]] == [1.0] * 3
    assert all(entry.difference < 1e-5 for entry in result.decoding)
    assert result.missing == {}
    text = "\n".join(lines_of(result))
    assert all(entry.name in text for entry in [*result.encoding, *result.decoding])


def test_other_codes_are_counted_and_clear_ones_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case("plain", (1, 512))

    def wrong(case: Case) -> peers.Coder:
        def encode(latents: Tensor) -> Tensor:
            codes = case.quantizer.encode(latents)
            codes[0, 1, :64] = (codes[0, 1, :64] + 1) % 32  # one row of three, of 64 frames in 512
            return codes

        return encode, lambda codes: 1.5 * case.quantizer.decode(codes)

    monkeypatch.setattr("tools.quantizer_speed.candidates.PEERS", (("wrong", "plain", wrong), ("none", "split", wrong)))
    result = measure(case, "tiny", repetitions=1, kinds=("peers",))
    entry = result.encoding[-1]
    assert entry.name == "wrong"
    assert entry.same_codes == pytest.approx(1 - 64 / 512 / 3)
    assert entry.other_frames == entry.clear_frames == 64
    assert result.decoding[-1].difference == pytest.approx(0.5)


def test_near_ties_are_not_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case("plain", (1, 512))
    with torch.no_grad():
        case.quantizer.get_buffer("codebooks")[2, 16:] = case.tables.entries_KCd[2, :16] * (1 + 1e-7)

    def near(case: Case) -> peers.Coder:
        def encode(latents: Tensor) -> Tensor:
            codes = case.quantizer.encode(latents)
            codes[:, 2] = (codes[:, 2] + 16) % 32
            return codes

        return encode, case.quantizer.decode

    monkeypatch.setattr("tools.quantizer_speed.candidates.PEERS", (("near", "plain", near),))
    case = replace(case)  # the old one keeps tables of what the codebooks were
    entry = measure(case, "tiny", repetitions=1, kinds=("peers",)).encoding[-1]
    assert entry.same_codes == pytest.approx(2 / 3)
    assert (entry.other_frames, entry.clear_frames) == (512, 0)


@pytest.mark.parametrize("form", FORMS)
def test_packages_that_are_not_installed_are_told(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, kind, _ in peers.PEERS if kind == form]
    for module in ("encodec", "transformers", "vector_quantize_pytorch", "dac", "moshi"):
        monkeypatch.setitem(sys.modules, module, None)
        for loaded in [name for name in sys.modules if name.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, loaded)
    result = measure(tiny_case(form), "tiny", repetitions=1, kinds=("peers",))
    assert list(result.missing) == names
    assert names
    lines = list(lines_of(result))
    for name, reason in result.missing.items():
        assert "ModuleNotFoundError" in reason
        assert any(line.startswith(name) and "not available" in line for line in lines)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize(("name", "form", "peer"), peers.PEERS, ids=[f"{peer[0]}, {peer[1]}" for peer in peers.PEERS])
def test_peers_give_the_same_codes_and_latents(name: str, form: str, peer: object) -> None:
    module = {"encodec": "encodec", "dac": "dac", "moshi": "moshi"}.get(name, name.split()[0])
    try:
        importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    result = measure(tiny_case(form), "tiny", repetitions=1, kinds=("peers",))
    assert name not in result.missing
    entry = next(entry for entry in result.encoding if entry.name == name)
    assert entry.same_codes > 0.99
    assert entry.clear_frames == 0
    assert next(entry.difference for entry in result.decoding if entry.name == name) < 1e-5


def test_floors_are_those_of_the_products() -> None:
    case = tiny_case("factorized", (3, 7))
    # 12 dims are projected to 3 stages of 4, and each of these is compared with 32 entries.
    assert flops(case) == 2 * 21 * (12 * 12 + 3 * 4 * 32)
    assert num_bytes(case) == 4 * (12 * 12 + 3 * 4 * 32)
    few, many = field(tiny_case("plain", (1, 1)), ["ours"]), field(tiny_case("plain", (2, 2**14)), ["ours"])
    assert [candidate.scale for candidate in few.products] == [1 / 2**14]  # of one block, a row
    assert [candidate.scale for candidate in many.products] == [1.0, 1.0]
    assert [candidate.name for candidate in many.products] == ["2 x 16384 rows", "1 x 32768 rows"]


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    inputs = [torch.zeros(1), torch.ones(1)]

    def slow(name: str, value: Tensor) -> None:
        calls.append(f"{name}{int(value)}")
        time.sleep(0.02)  # longer than a turn: one call each

    candidates = [
        Candidate(name, functools.partial(slow, name), inputs, scale) for name, scale in (("a", 1.0), ("b", 100.0))
    ]
    timings = take_turns(candidates, 3, torch.device("cpu"))
    # One call of each before the turns.
    assert calls == ["a0", "b0", "a1", "b1", "a0", "b0", "a1", "b1"]
    assert [(timing.name, timing.num_calls) for timing in timings] == [("a", 3), ("b", 3)]
    assert 20 <= timings[0].median_ms < 1000
    assert timings[1].median_ms >= 2000


def test_a_model_brings_its_quantizer_and_latents() -> None:
    codec = tiny_codec()
    case = model_case(codec, (2, 3), folder=None, device="cpu")
    assert case.quantizer is codec.quantizer
    assert case.kind == "plain"
    assert {latents.shape for latents in case.latents} == {(2, 12, 3)}
    audio = torch.from_numpy(cases.speech_like(516 * 64))[None, None]
    with torch.no_grad():
        expected = codec.analyze(audio)[0, :, :516]
    assert torch.equal(torch.cat([item for latents in case.latents for item in latents], dim=1), expected)


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cases.FORMS, "plain", FORMS["plain"])
    file = tmp_path / "speed.json"
    arguments = "quantizer --forms plain --shapes frame,stream16 --candidates eager --repetitions 2 --json"
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split(), str(file)])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "plain, stream16: 16 x 1 frames of 12 dims, 3 x 32 entries of 12 dims" in printed
    written = json.loads(file.read_text())
    assert [result["shape"] for result in written["results"]] == ["frame", "stream16"]
    assert {"versions", "machine", "commit", "command", "threads", "load", "libraries"} <= set(written)
    assert written["command"] == f"python -m tools.benchmark {arguments} {file}"
    assert written["results"][0]["encoding"][0]["median_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--forms plain,wide", "--forms: 'wide' is not one of"),
        ("--shapes song", "--shapes: 'song' is not one of"),
        ("--candidates theirs", "--candidates: 'theirs' is not one of"),
        ("--threads 0", "must be positive"),
        ("--repetitions 0", "must be positive"),
        ("--forms plain --model speech_16k", "leave --forms out"),
        ("--data .", "needs a --model"),
        ("--model nothing", "nothing"),
    ],
)
def test_mistakes_are_one_line(arguments: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "quantizer", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert str(stopped.value.code).startswith("error: ")
    assert message in str(stopped.value.code)
    assert len(str(stopped.value.code).splitlines()) == 1
