"""Each known training bug of published quantizers: what ours does right, shown to be wrong with the bug switched on.

The bugs are those of `recipes/published_bugs.py`. Codebooks that learn by gradient are tested here, too, and so are the
published schemes of quantizer dropout.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import compose
from torch import Tensor

import codec
from codec.config import build, from_dict, to_dict
from codec.quantizers.interface import stage_gradient_norms
from codec.quantizers.residual import ResidualVQ, ResidualVQConfig
from recipes.published_bugs import BUGS, BuggyResidualVQ, ResidualVQAsPublishedConfig
from recipes.quantization import QuantizerTraining
from recipes.settings import DROPOUTS, QuantizationSettings, parse

_CONFIG = ResidualVQConfig(latent_dim=8, num_stages=3, codebook_size=64)
_GRADIENT = replace(_CONFIG, learning="gradient")


def _quantizer(config: ResidualVQConfig = _CONFIG) -> ResidualVQ:
    torch.manual_seed(0)
    return ResidualVQ(config)


def _with_bugs(*bugs: str, config: ResidualVQConfig = _CONFIG) -> ResidualVQ:
    torch.manual_seed(0)
    return BuggyResidualVQ(ResidualVQAsPublishedConfig(**vars(config), bugs=bugs))


def _latents(num_frames: int, *, batch_size: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch_size, 8, num_frames, generator=torch.Generator().manual_seed(seed))


# The bugs, one by one: each check holds for ours and fails for the same quantizer with that bug alone.


def _k_means_survives_the_first_update(quantizer: ResidualVQ) -> None:
    latents = _latents(1024)
    quantizer.initialize(latents)
    before, used = quantizer.codebooks.clone(), quantizer.encode(latents)[:, 0].unique().numel()
    quantizer.update(quantizer(latents))
    ratio = quantizer.codebooks.norm(dim=-1).mean(1) / before.norm(dim=-1).mean(1)
    assert ((ratio > 0.9) & (ratio < 1.1)).all()
    assert quantizer.encode(latents)[:, 0].unique().numel() == used
    norm_ratio = quantizer(latents).stats["norm_ratio"]
    assert float(norm_ratio[0]) > 0.5, "and the monitor shows it"


def _a_restarted_entry_stays_restarted(quantizer: ResidualVQ) -> None:
    latents = _latents(512)
    quantizer.initialize(latents)
    state = quantizer.training_state()
    for tensor in (quantizer.codebooks, state["sums"]):
        tensor[0, :40] = 100.0
    state["counts"][0, :40] = 0.0
    quantizer.load_training_state(state)
    for _ in range(3):
        quantizer.update(quantizer(latents))
        assert float(quantizer.codebooks[0].norm(dim=-1).max()) < 10.0


def _small_batches_restart_nothing(quantizer: ResidualVQ) -> None:
    quantizer.initialize(_latents(4096))
    before, ones = quantizer.codebooks.clone(), torch.ones(3, 64)
    # As after many updates of a frame per entry.
    quantizer.load_training_state({"counts": ones, "sums": before.clone(), "num_updates": torch.tensor(0)})
    quantizer.update(quantizer(_latents(16)))
    moved = (quantizer.codebooks - before).norm(dim=-1) / before.norm(dim=-1)
    assert float((moved > 0.5).float().mean()) == 0.0


def _every_stage_commits_the_encoder(quantizer: ResidualVQ) -> None:
    latents = _latents(200)
    with torch.no_grad():  # by gradient, entries begin so small that they leave the residual as it is
        quantizer.codebooks.copy_(torch.randn_like(quantizer.codebooks) * 0.5)
    norms = stage_gradient_norms(quantizer, latents)
    assert norms.shape == (3,)
    assert (norms > 0.05 * norms[0]).all()


def _what_a_forward_sees_changes_nothing(quantizer: ResidualVQ) -> None:
    """A trainer that runs the generator twice per step must not learn twice."""
    latents = _latents(64)
    before = quantizer.codebooks.clone()
    quantizer.train()(latents)
    quantized = quantizer(latents)
    assert torch.equal(quantizer.codebooks, before)
    quantizer.update(quantized)
    assert not torch.equal(quantizer.codebooks, before)


_CHECKS: dict[str, Callable[[ResidualVQ], None]] = {
    "k_means_without_counts": _k_means_survives_the_first_update,
    "restart_overwritten": _a_restarted_entry_stays_restarted,
    "absolute_dead_threshold": _small_batches_restart_nothing,
    "chained_residual": _every_stage_commits_the_encoder,
    "update_in_forward": _what_a_forward_sees_changes_nothing,
}


@pytest.mark.parametrize("bug", _CHECKS)
def test_a_published_bug_is_not_ours(bug: str) -> None:
    check = _CHECKS[bug]
    check(_quantizer())
    check(_with_bugs())
    with pytest.raises(AssertionError):
        check(_with_bugs(bug))


def test_every_bug_is_tested() -> None:
    assert set(_CHECKS) | {"local_statistics"} == set(BUGS)


def test_the_chained_residual_of_codebooks_learned_by_gradient() -> None:
    """HiFi-Codec's: the second layer's commitment has exactly no gradient."""
    _every_stage_commits_the_encoder(_quantizer(_GRADIENT))
    buggy = _with_bugs("chained_residual", config=_GRADIENT)
    with pytest.raises(AssertionError):
        _every_stage_commits_the_encoder(buggy)
    assert stage_gradient_norms(buggy, _latents(50))[1:].tolist() == [0.0, 0.0]
    assert buggy(_latents(50)).stats["gradient_norm"][1:].tolist() == [0.0, 0.0]


def test_bugs_change_no_value_of_a_first_forward() -> None:
    """They lie in what is learned, which is why nobody saw them."""
    latents = _latents(50)
    ours, theirs = _quantizer()(latents), _with_bugs(*BUGS)(latents)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.latents, theirs.latents)
    # The same squares, added in another order.
    torch.testing.assert_close(ours.losses["commitment"], theirs.losses["commitment"], rtol=1e-5, atol=0)


def test_all_bugs_together_cost_quality() -> None:
    """What SPECS measured: k-means undone at once, most codes unused for long."""
    latents = _latents(1024)
    errors, used = [], []
    for quantizer in (_quantizer(), _with_bugs(*BUGS)):
        quantizer.initialize(latents)
        for _ in range(10):
            quantizer.update(quantizer(latents))
        errors.append(float((quantizer.decode(quantizer.encode(latents)) - latents).square().mean()))
        used.append(quantizer.encode(latents)[:, 0].unique().numel())
    assert errors[1] > 2 * errors[0]
    assert used[1] < used[0] / 2


def test_inference_follows_every_update() -> None:
    quantizer, latents = _quantizer(), _latents(256)
    for seed in range(3):
        quantizer.encode(latents)  # keeps what it computed of the codebooks
        quantizer.update(quantizer(_latents(256, seed=seed)))
        fresh = _quantizer()
        fresh.load_state_dict(quantizer.state_dict())
        assert torch.equal(quantizer.encode(latents), fresh.encode(latents))


def test_bugs_are_named() -> None:
    with pytest.raises(ValueError, match=r"bugs: 'other' is not one of \('k_means_without_counts', "):
        ResidualVQAsPublishedConfig(**vars(_CONFIG), bugs=("other",))
    with pytest.raises(ValueError, match=r"'local_statistics' is not one of \('chained_residual',\)"):
        ResidualVQAsPublishedConfig(**vars(_GRADIENT), bugs=("local_statistics",))
    config = ResidualVQAsPublishedConfig(**vars(_CONFIG), bugs=("chained_residual",))
    assert from_dict(to_dict(config)) == config
    buggy = build(config)
    assert isinstance(buggy, BuggyResidualVQ)
    _quantizer().load_state_dict(buggy.state_dict())


# The health of a codebook.


@pytest.mark.parametrize("config", [_CONFIG, replace(_CONFIG, num_groups=2), _GRADIENT])
def test_the_gradient_norm_in_the_stats_is_the_one_that_is_measured(config: ResidualVQConfig) -> None:
    quantizer, latents = _quantizer(config), _latents(40)
    with torch.no_grad():
        quantizer.codebooks.copy_(torch.randn_like(quantizer.codebooks))
    told = quantizer(latents).stats["gradient_norm"].view(config.num_stages, config.num_groups)
    measured = stage_gradient_norms(quantizer, latents)
    # float32; the measured ones are differences of gradients.
    torch.testing.assert_close(told.square().sum(1).sqrt(), measured, rtol=1e-4, atol=0)


def test_stats_tell_each_code_row_by_itself() -> None:
    """A group that collapsed, or entries that have lost the scale of the latents, show in their row alone."""
    quantizer, latents = _quantizer(replace(_CONFIG, num_groups=2, num_stages=1)), _latents(256)
    quantizer.initialize(latents)
    healthy = quantizer(latents).stats
    assert set(healthy) == {"perplexity", "dead_fraction", "commitment", "gradient_norm", "norm_ratio"}
    quantizer.codebooks[1] = 1e-3
    stats = quantizer(latents).stats
    for name, values in stats.items():
        assert values.shape == (2,), name
        assert not values.requires_grad, name
        assert values[0] == healthy[name][0], name
    assert float(stats["perplexity"][1]) == pytest.approx(1.0)
    assert float(stats["norm_ratio"][1]) < 0.01
    assert float(healthy["norm_ratio"].min()) > 0.8
    assert float(stats["commitment"][1]) == pytest.approx(float(latents[:, 4:].square().mean()), rel=0.01)


def test_a_stage_without_frames_is_finite() -> None:
    for config in (_CONFIG, _GRADIENT):
        quantizer = _quantizer(config)
        quantized = quantizer(_latents(5), num_quantizers=1)
        assert all(torch.isfinite(value).all() for value in (quantized.stats | quantized.losses).values())
        assert quantized.stats["gradient_norm"][1:].tolist() == [0.0, 0.0]
        before = quantizer.codebooks.clone()
        if state := quantizer.training_state():
            for tensor in (state["counts"], state["sums"]):
                tensor[:, :9] *= 2.0**-7  # dead, if there were frames
            quantizer.load_training_state(state)
        quantizer.update(quantized)
        assert torch.equal(quantizer.codebooks[1:], before[1:])


# Codebooks that learn by gradient.


def test_the_codebook_loss_reaches_the_chosen_entries_and_nothing_else() -> None:
    quantizer, latents = _quantizer(_GRADIENT), _latents(6).requires_grad_()
    prefixes = torch.tensor([1, 2, 3, 3])
    quantized = quantizer(latents, num_quantizers=prefixes)
    quantized.losses["codebook"].backward()
    assert latents.grad is None
    gradient = quantizer.codebooks.grad
    assert gradient is not None
    for row in range(3):
        chosen = quantized.codes[:, row].unique()
        moved = gradient[row].abs().sum(1).nonzero()[:, 0]
        assert moved.tolist() == chosen[chosen >= 0].tolist()
    quantizer.codebooks.grad = None
    quantized = quantizer(latents, num_quantizers=prefixes)
    quantized.losses["commitment"].backward()
    assert quantizer.codebooks.grad is None
    assert latents.grad is not None
    (quantizer(latents).latents * torch.randn(4, 8, 6)).sum().backward()
    assert quantizer.codebooks.grad is None, "the straight-through estimator teaches the encoder alone"


@pytest.mark.parametrize("num_groups", [1, 2])
def test_losses_are_those_of_the_paper(num_groups: int) -> None:
    """Per stage the mean square over the joint vector of all groups, then the mean over stages."""
    quantizer, latents = _quantizer(replace(_GRADIENT, num_groups=num_groups, num_stages=2)), _latents(30)
    codes = quantizer.encode(latents)
    first = quantizer.decode(codes[:, :num_groups])
    both = quantizer.decode(codes)
    expected = ((latents - first).square().mean() + (latents - both).square().mean()) / 2
    losses = quantizer(latents).losses
    for name in ("commitment", "codebook"):
        torch.testing.assert_close(losses[name], expected, rtol=1e-6, atol=0)
    assert set(_quantizer()(latents).losses) == {"commitment"}


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimizer_finds_the_clusters_of_the_data(options: dict[str, bool]) -> None:
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(16, 8, generator=generator)
    quantizer = _quantizer(replace(_GRADIENT, num_stages=2))
    assert float(quantizer.codebooks.detach().abs().max()) <= 1 / 64
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02, **options)
    latents = centres[torch.randint(16, (256,), generator=generator)].t()[None]
    errors = []
    for _ in range(200):
        with torch.no_grad():
            errors.append(float((quantizer.decode(quantizer.encode(latents)) - latents).square().mean()))
        quantized = quantizer(latents)
        assert torch.equal(quantizer.encode(latents), quantized.codes), "inference follows every step"
        optimizer.zero_grad()
        quantized.losses["codebook"].backward()
        optimizer.step()
        before = quantizer.codebooks.detach().clone()
        quantizer.update(quantized)
        assert torch.equal(quantizer.codebooks, before), "`update` has nothing to do"
    assert errors[-1] < 0.2 * errors[0]


def test_nothing_but_the_optimizer_learns_by_gradient() -> None:
    quantizer = _quantizer(_GRADIENT)
    before = quantizer.codebooks.detach().clone()
    assert quantizer.num_frames_to_initialize == 0
    quantizer.initialize(_latents(500))
    assert torch.equal(quantizer.codebooks, before)
    assert quantizer.training_state() == {}
    quantizer.load_training_state({})
    with pytest.raises(ValueError, match="keeps no training state"):
        quantizer.load_training_state(_quantizer().training_state())
    assert [name for name, _ in quantizer.named_parameters()] == ["codebooks"]
    assert not list(_quantizer().parameters())


def test_how_it_was_learned_does_not_change_the_file() -> None:
    by_average, by_gradient = _quantizer(), _quantizer(_GRADIENT)
    assert {key: value.shape for key, value in by_gradient.state_dict().items()} == {"codebooks": (3, 64, 8)}
    by_gradient.load_state_dict(by_average.state_dict())
    latents = _latents(30)
    assert torch.equal(by_gradient.encode(latents), by_average.encode(latents))
    by_average.load_state_dict(_quantizer(_GRADIENT).state_dict())


def test_configs_from_before_still_load_and_keep_their_id() -> None:
    data = to_dict(_CONFIG)
    assert data.pop("learning") == "ema"
    assert from_dict(data) == _CONFIG
    assert codec.load("speech_16k").codec_id == "74b1c2773e6dcfb7"
    folder = Path(__file__).resolve().parent.parent / "pretrained" / "speech_16k"
    assert "learning" not in json.loads((folder / "config.json").read_text())["quantizer"]


def test_impossible_learning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learning='other' is not one of \('ema', 'gradient'\)"):
        replace(_CONFIG, learning="other")
    for change in ({"ema_decay": 0.9}, {"dead_threshold": 0.2}):
        with pytest.raises(ValueError, match="have no meaning with learning='gradient'"):
            replace(_GRADIENT, **change)


def test_lower_precision_outside_does_not_reach_inside() -> None:
    for config in (_CONFIG, _GRADIENT):
        quantizer, latents = _quantizer(config), _latents(50)
        plain = quantizer(latents)
        with torch.autocast("cpu", torch.bfloat16):
            cast = quantizer(latents)
        assert torch.equal(cast.codes, plain.codes)
        assert torch.equal(cast.latents, plain.latents)
        for name, loss in plain.losses.items():
            assert torch.equal(cast.losses[name], loss)


# Two processes learn what one learns from both their batches.

_DISTRIBUTED = replace(_CONFIG, dead_threshold=0.5, codebook_size=32)
_PREFIXES = torch.tensor([1, 3, 1, 1])  # the second process has nothing for the later stages


def _learn(quantizer: ResidualVQ, rows: slice) -> list[Tensor]:
    """The codebooks after k-means and after each of four updates."""
    quantizer.initialize(_latents(64)[rows])
    history = [quantizer.codebooks.clone()]
    for seed in range(4):
        batch, prefixes = _latents(24, seed=seed)[rows], _PREFIXES[rows]
        quantizer.update(quantizer(batch, num_quantizers=prefixes if seed == 2 else None))
        history.append(quantizer.codebooks.clone())
    return history


def _learn_on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    fixed = _learn(_quantizer(_DISTRIBUTED), rows)
    buggy = _learn(_with_bugs("local_statistics", config=_DISTRIBUTED), rows)
    torch.save({"fixed": fixed, "buggy": buggy}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_learn_what_one_learns_from_both_batches(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_learn_on_rank, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    whole = _quantizer(_DISTRIBUTED)
    alone = _learn(whole, slice(None))
    for ours, theirs, expected in zip(first["fixed"], second["fixed"], alone, strict=True):
        assert torch.equal(ours, theirs)
        # Sums over the same vectors in another order of addition; k-means adds ten times.
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    restarted = [(b - a).norm(dim=-1) > 0.5 for a, b in itertools.pairwise(alone)]
    assert sum(int(changed.sum()) for changed in restarted) > 10, "restarts are among what is compared"
    for ours, theirs in zip(first["buggy"], second["buggy"], strict=True):
        assert not torch.equal(ours, theirs)


# Quantizer dropout.

_STEPS, _ITEMS = 400, 24


def _prefixes(num_stages: int = 6, *, num_items: int = _ITEMS, steps: int = _STEPS, **settings: Any) -> Tensor:
    """How many code rows each item keeps in each of many steps [steps, items], every step with a seed of its own."""
    quantizer = ResidualVQ(ResidualVQConfig(latent_dim=4, num_stages=num_stages, codebook_size=2))
    part = QuantizerTraining(quantizer, QuantizationSettings(**settings), seed=0, is_trained=True)
    return torch.stack([part.draw_prefixes(num_items, torch.Generator().manual_seed(step)) for step in range(steps)])


def _shares(drawn: Tensor) -> dict[int, float]:
    values, counts = drawn.unique(return_counts=True)
    return {int(value): float(count / drawn.numel()) for value, count in zip(values, counts, strict=True)}


_SIXTH, _LIST = 1 / 6, (1, 2, 5)
_ALL = dict.fromkeys(range(1, 7), _SIXTH)
_HALF = dict.fromkeys(range(1, 6), 0.5 * _SIXTH) | {6: 3.5 * _SIXTH}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dropout": "item", "dropout_share": 1.0}, _ALL),
        ({"dropout": "item", "dropout_share": 0.5}, _HALF),
        ({"dropout": "item", "dropout_share": 0.6, "prefixes": _LIST}, dict.fromkeys(_LIST, 0.2) | {6: 0.4}),
        ({"dropout": "first_items", "dropout_share": 0.5}, _HALF),
        ({"dropout": "batch", "dropout_share": 1.0}, _ALL),
        ({"dropout": "batch", "dropout_share": 1.0, "prefixes": _LIST}, dict.fromkeys(_LIST, 1 / 3)),
        ({"dropout": "batch", "dropout_share": 0.4, "prefixes": (2,)}, {2: 0.4, 6: 0.6}),
        ({"dropout": "nested", "dropout_share": 1.0}, _ALL),
        ({"dropout": "nested", "dropout_share": 0.5, "prefixes": (1, 6)}, {1: 0.25, 6: 0.75}),
        ({"dropout": "powers_of_two", "dropout_share": 1.0}, dict.fromkeys((1, 2, 4, 6), 0.25)),
        ({"dropout": "rounded_up", "dropout_share": 1.0}, {1: _SIXTH, 2: _SIXTH, 4: 2 * _SIXTH, 6: 2 * _SIXTH}),
        (
            {"dropout": "rounded_up", "dropout_share": 1.0, "prefixes": (6, 4, 3, 2, 1)},
            {1: 0.2, 2: 0.2, 4: 0.4, 6: 0.2},
        ),
        ({"dropout": "item", "dropout_share": 0.0}, {6: 1.0}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if "dropout" in value else "",
)
def test_dropout_draws_as_it_says(settings: dict[str, Any], expected: dict[int, float]) -> None:
    shares = _shares(_prefixes(**settings))
    # Four standard deviations of 400 draws of whole batches, or of 9600 of items.
    tolerance = 0.1 if settings["dropout"] == "batch" else 0.021
    assert shares == pytest.approx(expected, abs=tolerance)


def test_each_scheme_of_dropout_has_its_place_in_a_batch() -> None:
    items = _prefixes(dropout="item", dropout_share=1.0)
    # Of 24 independent draws from six lengths, few batches have each length four times.
    alike = [(items == number).sum(1) for number in range(1, 7)]
    assert not all((count == 4).all() for count in alike)
    for share in (0.5, 1.0):
        batches = _prefixes(dropout="batch", dropout_share=share)
        assert (batches == batches[:, :1]).all()
    firsts = _prefixes(dropout="first_items", dropout_share=0.55)
    assert (firsts[:, 13:] == 6).all()
    assert _shares(firsts[:, :13]) == pytest.approx(_ALL, abs=0.03)
    nested = _prefixes(dropout="nested", dropout_share=1.0)
    assert all(((nested == number).sum(1) == 4).all() for number in range(1, 7))
    # Where items do not fill whole turns, every length comes first as often.
    uneven = _prefixes(dropout="nested", dropout_share=1.0, num_items=4)
    assert all(len(set(row)) == 4 for row in uneven.tolist())
    assert _shares(uneven[:, 0]) == pytest.approx(_ALL, abs=0.08)


@pytest.mark.parametrize(
    ("num_stages", "lengths"),
    [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (4, {1, 2, 4}), (5, {1, 2, 4, 5}), (8, {1, 2, 4, 8}), (9, {1, 2, 4, 8, 9})],
)
@pytest.mark.parametrize("dropout", ["powers_of_two", "rounded_up"])
def test_powers_of_two_are_those_there_are_and_all_rows(num_stages: int, lengths: set[int], dropout: str) -> None:
    drawn = _prefixes(num_stages, steps=20, dropout=dropout, dropout_share=1.0)
    assert set(drawn.flatten().tolist()) == lengths
    if dropout == "rounded_up":
        uniform = _prefixes(num_stages, steps=20, dropout="item", dropout_share=1.0)
        ups = torch.tensor([min(length for length in lengths if length >= value) for value in uniform.flatten()])
        assert torch.equal(drawn.flatten(), ups)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_draws_depend_on_the_generator_alone(dropout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"dropout": dropout, "dropout_share": 0.7}
    whole = _prefixes(steps=50, **settings)
    assert torch.equal(_prefixes(steps=50, **settings), whole)
    assert len(whole.unique(dim=0)) > 1, "and steps differ"
    for rank in range(2):  # two processes have between them what one has
        for module in ("recipes.quantization", "recipes.distributed"):
            monkeypatch.setattr(f"{module}.rank_and_size", lambda rank=rank: (rank, 2))
        assert torch.equal(_prefixes(steps=50, num_items=_ITEMS // 2, **settings), whole[:, rank::2])


def test_turns_give_the_mean_over_all_prefixes() -> None:
    """What Matryoshka sums, over one decoding per item: exactly, where the items are alike."""
    quantizer = _quantizer()
    quantizer.initialize(_latents(256))
    item = _latents(20)[:1]
    settings = QuantizationSettings(dropout="nested", dropout_share=1.0)
    part = QuantizerTraining(quantizer, settings, seed=0, is_trained=True)
    mixed, quantized = part(item.expand(6, -1, -1), 0, torch.Generator().manual_seed(0))
    assert quantized is not None
    loss = (mixed - item).square().mean()
    fixed = [quantizer(item, num_quantizers=number) for number in quantizer.valid_num_quantizers]
    mean = torch.stack([(one.latents - item).square().mean() for one in fixed]).mean()
    torch.testing.assert_close(loss, mean, rtol=1e-6, atol=0)  # another order of addition


@pytest.mark.parametrize(
    ("experiment", "rows", "share_of_all"),
    [
        ("encodec_24k", {2, 4, 8, 16, 32}, 0.2),
        ("encodec_48k", {2, 4, 8, 16}, 0.25),
        ("soundstream_16k", set(range(1, 13)), 1 / 12),
        ("dac_44k", set(range(1, 10)), 0.5 + 0.5 / 9),
        ("hificodec_16k_320d", {4}, 1.0),
    ],
)
def test_published_experiments_drop_as_published(experiment: str, rows: set[int], share_of_all: float) -> None:
    settings = parse(compose(f"experiment={experiment}", "output_dir=x", "data.train_dir=x", "data.dev_dir=x"))
    quantizer = ResidualVQ(ResidualVQConfig(latent_dim=4, num_stages=max(rows), codebook_size=2))
    part = QuantizerTraining(quantizer, settings.quantization, seed=0, is_trained=True)
    drawn = torch.stack([part.draw_prefixes(16, torch.Generator().manual_seed(step)) for step in range(400)])
    assert set(drawn.flatten().tolist()) == rows
    assert _shares(drawn)[max(rows)] == pytest.approx(share_of_all, abs=0.08)
    one_per_batch = bool((drawn == drawn[:, :1]).all())
    assert one_per_batch == (experiment.startswith(("encodec", "hificodec")))
    if experiment.startswith("dac"):
        assert (drawn[:, 8:] == 9).all()
