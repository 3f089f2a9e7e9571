"""Purity, mutual information, probes and ABX against values worked out by hand."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.evaluation.abx import Token, abx
from codec.evaluation.semantics import (
    Counts,
    cluster_purity,
    joined,
    most_frequent,
    over_files,
    pnmi,
    pnmi_by_chance,
    probe,
    purity,
    unseen_purity,
)

frames = st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 3)), min_size=1, max_size=40).filter(
    lambda pairs: any(label >= 0 for _, label in pairs)
)


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    codes, labels = np.array(pairs).T
    return codes, labels


def test_values_worked_out_by_hand() -> None:
    codes = np.array([0, 0, 0, 1, 1, 2, 2, 2, 9])
    labels = np.array([0, 0, 1, 1, 1, 0, 1, 2, -1])
    assert purity(codes, labels) == pytest.approx((2 + 2 + 1) / 8)
    assert cluster_purity(codes, labels) == pytest.approx((2 + 2 + 1) / 8)
    entropy = -(3 / 8 * math.log(3 / 8) + 4 / 8 * math.log(4 / 8) + 1 / 8 * math.log(1 / 8))
    # H(label | code): two thirds against one in code 0, certain in code 1, three alike in code 2.
    left = 3 / 8 * -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) + 3 / 8 * math.log(3)
    assert pnmi(codes, labels) == pytest.approx((entropy - left) / entropy)


def test_purities_look_from_opposite_sides() -> None:
    codes, labels = np.arange(6), np.array([0, 0, 0, 0, 1, 1])
    assert purity(codes, labels) == 1  # a code for every frame
    assert cluster_purity(codes, labels) == pytest.approx((1 + 1) / 6)
    assert pnmi(codes, labels) == pytest.approx(1)
    assert purity(labels, codes) == pytest.approx(2 / 6)


@given(frames)
def test_bounds_and_renaming(pairs: list[tuple[int, int]]) -> None:
    codes, labels = arrays(pairs)
    assert most_frequent(labels) - 1e-12 <= purity(codes, labels) <= 1
    value = pnmi(codes, labels)
    assert math.isnan(value) or -1e-12 <= value <= 1 + 1e-12
    renamed = np.array([7, 3, 12, 0, 5])[codes]
    assert purity(renamed, labels) == purity(codes, labels)
    assert cluster_purity(renamed, labels) == cluster_purity(codes, labels)
    assert pnmi(renamed, labels) == pytest.approx(value, nan_ok=True)


@given(frames, st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_more_rows_tell_no_less(pairs: list[tuple[int, int]], more: list[int]) -> None:
    codes, labels = arrays(pairs)
    rows = np.stack([codes, np.array(more[: len(codes)])])
    units = joined(rows)
    assert len(set(units.tolist())) == len(set(zip(*rows.tolist(), strict=True)))
    assert purity(rows, labels) == purity(units, labels) >= purity(codes, labels)
    assert not pnmi(rows, labels) < pnmi(codes, labels) - 1e-12


def test_one_label_has_no_information() -> None:
    assert math.isnan(pnmi(np.array([0, 1, 1]), np.array([2, 2, 2])))
    assert pnmi(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])) == 0


def test_frames_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="3 frames of codes do not fit 2 of labels"):
        purity(np.zeros(3, np.int64), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="no frame has a label"):
        purity(np.zeros(3, np.int64), np.full(3, -1))


def test_many_frames_take_no_time() -> None:
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 1024, 50_000), rng.integers(-1, 40, 50_000)
    seconds = []
    for _ in range(3):  # the best of them, since machines stall
        began = time.perf_counter()
        counts = Counts.of(codes, labels)
        values = counts.purity(), counts.cluster_purity(), counts.pnmi()
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5
    assert 0 < values[1] < values[0] < 0.2


def test_chance_is_what_codes_that_say_nothing_have() -> None:
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 200, 2000), np.repeat(rng.integers(-1, 10, 400), 5)
    assert pnmi(codes, labels) > 0.2
    assert pnmi_by_chance(codes, labels) == pytest.approx(pnmi(codes, labels), abs=0.03)
    assert pnmi_by_chance(np.repeat(codes[::5], 5), labels) > 0.5  # the same codes in runs, as labels are
    assert pnmi_by_chance(labels + 1, labels) < 0.1 < 0.9 < pnmi(labels + 1, labels)


def test_unseen_purity_is_what_other_recordings_know() -> None:
    # Code 0 is mostly label 0 in every recording, code 1 is label 1; code 2 + i occurs in recording i alone.
    codes = np.concatenate([[0, 0, 0, 1, 1, 2 + i] for i in range(3)])
    labels = np.tile([0, 0, 1, 1, 1, 2], 3)
    found = unseen_purity(codes, labels, np.repeat(np.arange(3), 6))
    assert found.mean == pytest.approx(4 / 6)  # a code that is new is taken for label 1, the most frequent
    assert purity(codes, labels) == pytest.approx(5 / 6)
    assert found.num_files == 3
    rng = np.random.default_rng(0)
    many = rng.integers(0, 1024, 5000), rng.integers(0, 10, 5000)
    assert purity(*many) > 0.3
    assert unseen_purity(*many, np.arange(5000) // 100).mean == pytest.approx(0.1, abs=0.02)
    with pytest.raises(ValueError, match="two recordings"):
        unseen_purity(codes, labels, np.zeros(18))


# --- intervals


def of_files(num_files: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes that tell labels now and then, more so in some recordings than in others."""
    rng = np.random.default_rng(seed)
    files = np.repeat(np.arange(num_files), 200)
    labels = rng.integers(0, 4, len(files))
    telling = rng.uniform(0.2, 0.8, num_files)[files]
    codes = np.where(rng.random(len(files)) < telling, labels, rng.integers(0, 4, len(files)))
    return codes, labels, files


def test_the_value_is_that_of_all_frames_and_the_interval_is_about_it() -> None:
    codes, labels, files = of_files(12, 0)
    for measure in (Counts.purity, Counts.pnmi):
        found = over_files(measure, codes, labels, files)
        assert found.mean == measure(Counts.of(codes, labels))
        assert found.low < found.mean < found.high
        assert found.num_files == 12
    assert over_files(Counts.purity, codes, labels, files) == over_files(Counts.purity, codes, labels, files * 3 + 7)
    alone = over_files(Counts.purity, codes, labels, np.zeros_like(files))
    assert alone.num_files == 1
    assert math.isnan(alone.low)
    assert over_files(Counts.purity, codes, np.full_like(labels, -1), files).num_files == 0


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth = over_files(Counts.purity, *of_files(3000, 99)).mean
    found = [over_files(Counts.purity, *of_files(15, seed)) for seed in range(60)]
    assert 50 <= sum(summary.low <= truth <= summary.high for summary in found) <= 60


# --- probe


def blobs(num_files: int, seed: int = 0, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents around one centre for each of three labels; every sixth frame has none."""
    rng = np.random.default_rng(seed)
    files = np.repeat(np.arange(num_files), 30)
    labels = np.where(np.arange(len(files)) % 6 == 5, -1, rng.integers(0, 3, len(files)))
    centres = 4.0 * np.eye(3, 5)
    latents = centres[labels] + spread * rng.standard_normal((len(files), 5))
    return latents.astype(np.float32), labels, files


def test_a_probe_tells_labels_that_lie_apart() -> None:
    latents, labels, files = blobs(6)
    found = probe(latents, labels, files)
    assert found.mean > 0.97
    assert found.num_files == 6
    assert found == probe(latents, labels, files)
    rng = np.random.default_rng(1)
    guessed = probe(rng.standard_normal(latents.shape), labels, files).mean
    assert guessed < 0.55 < found.mean
    assert probe(latents * [1e6, 1, 1e-6, 1, 0], labels, files).mean > 0.97  # scales do not matter


def test_a_probe_is_tested_on_recordings_it_has_not_seen() -> None:
    """Frames of a recording all have one place of their own: to know it helps with the same recording alone."""
    rng = np.random.default_rng(0)
    files = np.repeat(np.arange(40), 25)
    labels = rng.integers(0, 2, 40)[files]
    latents = (np.eye(40)[files] + 0.01 * rng.standard_normal((1000, 40))).astype(np.float32)
    assert probe(latents, labels, files).mean < 0.75
    seen = probe(latents, labels, np.arange(1000) % 5)
    assert seen.mean > 0.95


def test_groups_are_never_divided() -> None:
    """Each speaker has signs of his own: what holds for one is the opposite for the other."""
    latents, labels, files = blobs(8, spread=0.1)
    speakers = files % 2
    turned = np.where(speakers[:, None] == 0, latents, latents[:, [1, 2, 0, 3, 4]])
    assert probe(turned, labels, files, groups=speakers).mean < 0.2
    with pytest.raises(ValueError, match="needs two groups"):
        probe(latents, labels, files, groups=np.zeros_like(files))


# --- ABX


def token(
    label: str, angle: float, speaker: str = "s", context: tuple[str, str] = ("", ""), num_frames: int = 1
) -> Token:
    """A phone whose frames all point one way."""
    return Token(label, np.tile([math.cos(angle), math.sin(angle)], (num_frames, 1)), speaker, context)


def test_phones_that_lie_apart_are_told_apart() -> None:
    tokens = [token("a", 0.01 * i, num_frames=1 + i) for i in range(3)]
    tokens += [token("b", 1 + 0.01 * i, num_frames=4 - i) for i in range(3)]
    assert abx(tokens) == 0
    assert abx([token(t.label, 0.0) for t in tokens]) == 0.5  # all alike: ties


def test_an_error_worked_out_by_hand() -> None:
    # X in {0, 2} of a at 0 and 2; b at 1.5 and 9/4. Distances of a to a are 2; of X=0 to b 1.5, 2.25; of X=2 .5, .25.
    tokens = [token("a", 0.0), token("a", 2.0), token("b", 1.5), token("b", 2.25)]
    a_x_b = (1 + 0 + 1 + 1) / 4
    # X in b: b to b is .75; of X=1.5 to a 1.5, .5; of X=2.25 to a 2.25, .25.
    b_x_a = (0 + 1 + 0 + 1) / 4
    assert abx(tokens) == pytest.approx((a_x_b + b_x_a) / 2)


def test_x_of_another_speaker() -> None:
    tokens = [token("a", 0.0, "s"), token("b", 1.0, "s"), token("a", 0.4, "t"), token("b", 0.3, "t")]
    assert math.isnan(abx(tokens))  # one of a kind is not enough
    # A and B of s: X at .4 is nearer to a, right; X at .3, which is b, is nearer to a, wrong. Of t: both are wrong.
    assert abx(tokens, across=True) == pytest.approx(((0 + 1) / 2 + (1 + 1) / 2) / 2)


def test_neighbours_have_to_be_the_same_where_asked() -> None:
    tokens = [
        token("a", 0.0, context=("k", "t")),
        token("a", 0.1, context=("k", "t")),
        token("b", 1.0, context=("p", "t")),
    ]
    assert math.isnan(abx(tokens))
    assert abx(tokens, by_context=False) == 0
    # A third context, where all is wrong, has its say, though it has as few tokens.
    wrong = [
        token("a", 0.0, context=("s", "s")),
        token("a", 1.0, context=("s", "s")),
        token("b", 0.01, context=("s", "s")),
    ]
    right = [token("b", 2.0, context=("k", "t"))]
    assert abx([*tokens, *right, *wrong]) == pytest.approx((0 + 1) / 2)


def test_speed_does_not_matter_and_order_does() -> None:
    rise, fall = np.array([[1, 0], [1, 1], [0, 1]]), np.array([[0, 1], [1, 1], [1, 0]])
    tokens = [
        Token("a", rise),
        Token("a", np.repeat(rise, 3, axis=0)),
        Token("b", fall),
        Token("b", fall[[0, 0, 1, 2]]),
    ]
    assert abx(tokens) == 0
    mean_of_frames = [Token(t.label, np.unique(t.latents, axis=0).mean(0, keepdims=True)) for t in tokens]
    assert abx(mean_of_frames) == 0.5


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 3), st.sampled_from("st")), max_size=14))
def test_abx_against_all_triples(given_tokens: list[tuple[str, float, str]]) -> None:
    tokens = [token(label, round(angle, 2), speaker) for label, angle, speaker in given_tokens]
    for across in (False, True):
        errors: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
        for a, b, x in itertools.product(tokens, repeat=3):
            fits = a.speaker == b.speaker and a.label == x.label != b.label and a is not x
            if fits and (x.speaker != a.speaker) == across:
                gap = _angle(a, x) - _angle(b, x)
                place = errors.setdefault((a.label, b.label), {}).setdefault((a.speaker, x.speaker), [])
                place.append(0.5 if abs(gap) <= 1e-9 else float(gap > 0))
        means = [np.mean([np.mean(found) for found in places.values()]) for places in errors.values()]
        assert abx(tokens, across=across) == pytest.approx(np.mean(means) if means else math.nan, nan_ok=True)


def _angle(first: Token, second: Token) -> float:
    return float(np.arccos(np.clip(first.latents[0] @ second.latents[0], -1, 1))) / math.pi
