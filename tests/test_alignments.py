"""Which pieces a frame learns from: by index, by when they are said, and by attention that learns it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from codec.config import build, from_dict
from recipes.alignments import Alignment
from recipes.distillation_losses import frame_cosines
from recipes.targets import PADDING, PIECE, SPECIAL, Pieces, Targets

FRAME_DIM, TEACHER_DIM = 6, 3
RATE_HZ = 50.0


def _alignment(kind: str, **settings: Any) -> Alignment:
    torch.manual_seed(0)
    alignment: Alignment = build(from_dict({"type": kind} | settings), FRAME_DIM, TEACHER_DIM)
    return alignment


def _pieces(kinds: list[list[int]], spans: Any = None, *, num_layers: int | None = None) -> Pieces:
    """Slots of these kinds, each with a value of its own; `spans` in frames."""
    kind_BS = torch.tensor(kinds, dtype=torch.int64).view(len(kinds), -1)
    layers = () if num_layers is None else (num_layers,)
    values = torch.randn(*kind_BS.shape, *layers, TEACHER_DIM, generator=torch.Generator().manual_seed(1))
    span_BS2 = torch.zeros(*kind_BS.shape, 2, dtype=torch.float64)
    if spans is not None:
        span_BS2 = torch.tensor(spans, dtype=torch.float64).view(*kind_BS.shape, 2) / RATE_HZ
    return Pieces(values, kind_BS, span_BS2)


def _frames(num_items: int, num_frames: int) -> Tensor:
    return torch.randn(num_items, num_frames, FRAME_DIM, generator=torch.Generator().manual_seed(2))


def _align(alignment: Alignment, pieces: Pieces, num_frames: int) -> Targets:
    targets = alignment(pieces, _frames(len(pieces.kinds), num_frames), RATE_HZ)
    assert targets.values.shape == (len(pieces.kinds), num_frames, *pieces.values.shape[2:])
    assert targets.mask.shape == (len(pieces.kinds), num_frames)
    assert targets.mask.dtype == torch.bool
    assert targets.values.dtype == torch.float32
    return targets


# By index

TEXT = [SPECIAL, PIECE, PIECE, SPECIAL, PADDING, PADDING]  # [CLS] two pieces [SEP] [PAD] [PAD]


@pytest.mark.parametrize("num_layers", [None, 2])
@pytest.mark.parametrize("num_frames", [3, 5, 6, 9])
@pytest.mark.parametrize("pad_targets", [False, True])
def test_slot_i_goes_to_frame_i_as_published(pad_targets: bool, num_frames: int, num_layers: int | None) -> None:
    pieces = _pieces([TEXT, [SPECIAL, SPECIAL] + 4 * [PADDING]], num_layers=num_layers)
    targets = _align(_alignment("index", pad_targets=pad_targets), pieces, num_frames)
    num_paired = min(num_frames, 6 if pad_targets else 4)
    assert targets.mask[0].tolist() == [frame < num_paired for frame in range(num_frames)]
    assert torch.equal(targets.values[0, :num_paired], pieces.values[0, :num_paired])  # frame 0 learns from [CLS]
    # In the second crop nothing is said: neither an empty text's ends nor its padding teach anything.
    assert not targets.mask[1].any()


def test_padding_is_a_target_only_where_it_is_asked_for() -> None:
    pieces = _pieces([TEXT])
    assert _align(_alignment("index"), pieces, 6).mask.tolist() == [4 * [True] + 2 * [False]]
    assert _align(_alignment("index", pad_targets=True), pieces, 6).mask.tolist() == [6 * [True]]


# By when they are said


@pytest.mark.parametrize("num_layers", [None, 2])
def test_frames_learn_from_what_is_said_in_them(num_layers: int | None) -> None:
    """By hand: 8 frames, spans in frames."""
    kinds = [[SPECIAL, PIECE, PIECE, PIECE, PIECE, SPECIAL, PADDING]]
    spans = [[(0, 0), (0.5, 2.25), (2.25, 3.0), (4.0, 4.4), (6.75, 9.5), (0, 0), (0, 0)]]
    pieces = _pieces(kinds, spans, num_layers=num_layers)
    targets = _align(_alignment("forced"), pieces, 8)
    one, two, _, four = pieces.values[0, 1:5]
    expected = {
        0: one,  # half of it is enough
        1: one,
        2: 0.25 * one + 0.75 * two,
        # 3: nothing; 4: two fifths of it are too little; 5: nothing; 6: a quarter
        7: four,  # which goes on beyond the crop
    }
    assert [frame for frame, there in enumerate(targets.mask[0].tolist()) if there] == list(expected)
    for frame, value in expected.items():
        torch.testing.assert_close(targets.values[0, frame], value)


def test_shares_are_of_what_is_said_and_not_of_the_frame() -> None:
    """Two pieces fill three fifths of a frame: one third and two thirds of its target."""
    pieces = _pieces([[PIECE, PIECE]], [[(0.0, 0.2), (0.5, 0.9)]])
    targets = _align(_alignment("forced"), pieces, 1)
    assert targets.mask.tolist() == [[True]]
    expected = (pieces.values[0, 0] + 2 * pieces.values[0, 1]) / 3
    torch.testing.assert_close(targets.values[0, 0], expected)


def test_words_that_begin_before_the_crop_or_end_after_it_count_as_far_as_they_lie_in_it() -> None:
    pieces = _pieces([[PIECE, PIECE]], [[(-3.0, 1.0), (2.5, 100.0)]])
    targets = _align(_alignment("forced"), pieces, 4)
    assert targets.mask.tolist() == [[True, False, True, True]]
    assert torch.equal(targets.values[0, 0], pieces.values[0, 0])
    assert torch.equal(targets.values[0, 3], pieces.values[0, 1])


def test_only_pieces_are_said_whatever_stands_in_other_spans() -> None:
    pieces = _pieces([[SPECIAL, PADDING, PIECE]], [[(0.0, 4.0), (0.0, 4.0), (1.0, 2.0)]])
    targets = _align(_alignment("forced"), pieces, 4)
    assert targets.mask.tolist() == [[False, True, False, False]]
    assert torch.equal(targets.values[0, 1], pieces.values[0, 2])


@pytest.mark.parametrize("kind", ["index", "forced", "attention"])
@pytest.mark.parametrize("kinds", [[[]], [[SPECIAL, SPECIAL]], [3 * [PADDING]]])
def test_crops_without_words_have_no_targets(kind: str, kinds: list[list[int]]) -> None:
    targets = _align(_alignment(kind), _pieces(kinds), 5)
    assert not targets.mask.any()
    assert torch.isfinite(targets.values).all()


# By attention


def test_attention_is_shared_out_among_the_pieces() -> None:
    """Values that tell their slots apart are the weights themselves."""
    kinds = [TEXT, [SPECIAL, PIECE, SPECIAL, PADDING, PADDING, PADDING]]
    alignment = build(from_dict({"type": "attention", "dim": 8}), FRAME_DIM, 6)
    with torch.no_grad():
        pieces = Pieces(torch.eye(6).expand(2, 6, 6), torch.tensor(kinds), torch.zeros(2, 6, 2, dtype=torch.float64))
        targets = alignment(pieces, _frames(2, 10), RATE_HZ)
    assert targets.mask.all()
    weights = targets.values
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 10))
    assert (weights[0, :, 1:3] > 0).all()
    assert (weights[0, :, [0, 3, 4, 5]] == 0).all()
    assert (weights[1, :, 1] == 1).all()  # the one piece that there is
    # At first, speech runs through its text at an even pace.
    assert weights[0, 0, 1] > 0.9
    assert weights[0, 9, 2] > 0.9


def test_attention_of_the_pace_alone_by_hand() -> None:
    """Two pieces stand at 1/4 and 3/4 of the crop, four frames at 1/8, 3/8, 5/8 and 7/8."""
    alignment = build(from_dict({"type": "attention", "dim": 2, "pace_width": 0.25}), FRAME_DIM, 2)
    with torch.no_grad():
        alignment.query.weight.zero_()
        alignment.query.bias.zero_()
        pieces = Pieces(torch.eye(2)[None], torch.tensor([[PIECE, PIECE]]), torch.zeros(1, 2, 2, dtype=torch.float64))
        weights = alignment(pieces, _frames(1, 4), RATE_HZ).values[0]
    # Strayed by half a width and 2.5 widths; then by half a width and 1.5.
    logits = [(-0.125, -3.125), (-0.125, -1.125), (-1.125, -0.125), (-3.125, -0.125)]
    torch.testing.assert_close(weights, torch.tensor(logits).softmax(1))


def test_attention_learns_and_what_it_looks_at_does_not() -> None:
    alignment = _alignment("attention")
    frames = _frames(2, 5).requires_grad_()
    targets = alignment(_pieces([TEXT, TEXT]), frames, RATE_HZ)
    targets.values.square().sum().backward()
    assert frames.grad is None
    for name, parameter in alignment.named_parameters():
        assert parameter.grad is not None, name
        if name != "key.bias":  # the same for all pieces, so softmax does not see it
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("kinds", [[[SPECIAL, SPECIAL]], [[]], [TEXT, [SPECIAL, SPECIAL, *4 * [PADDING]]]])
def test_crops_without_words_leave_gradients_whole(kinds: list[list[int]]) -> None:
    """Where they are alone in a batch, the gradients are zeros: other processes may have words."""
    alignment = _alignment("attention")
    targets = alignment(_pieces(kinds), _frames(len(kinds), 5), RATE_HZ)
    cosines = frame_cosines(torch.ones(len(kinds), 5, TEACHER_DIM), targets.values, targets.mask)
    cosines.sum().backward()
    for name, parameter in alignment.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert len(kinds) > 1 or (parameter.grad == 0).all(), name


@pytest.mark.parametrize("kind", ["index", "forced", "attention"])
def test_what_stands_in_slots_of_padding_does_not_matter(kind: str) -> None:
    alignment = _alignment(kind)
    pieces = _pieces([TEXT], [[(0, 0), (0, 2), (2, 4), (0, 0), (0, 0), (0, 0)]])
    with torch.no_grad():
        before = _align(alignment, pieces, 9)
        pieces.values[:, 4:] = 1e6
        after = _align(alignment, pieces, 9)
    assert torch.equal(before.mask, after.mask)
    assert torch.equal(before.values[before.mask], after.values[after.mask])


@pytest.mark.parametrize("kind", ["index", "forced", "attention"])
def test_crops_do_not_influence_one_another(kind: str) -> None:
    """Alone and with a longer text beside it, to rounding: other shapes are summed in another order."""
    alignment = _alignment(kind)
    other = [SPECIAL, *6 * [PIECE], SPECIAL]
    spans = [[(0, 0), (0, 2), (2, 4), *5 * [(0, 0)]], [(0, 0), *((i, i + 1) for i in range(6)), (0, 0)]]
    both = _pieces([[*TEXT, PADDING, PADDING], other], spans)
    alone = Pieces(both.values[:1, :6], both.kinds[:1, :6], both.spans[:1, :6])
    frames = _frames(2, 9)
    with torch.no_grad():
        one, two = alignment(alone, frames[:1], RATE_HZ), alignment(both, frames, RATE_HZ)
    assert torch.equal(one.mask[0], two.mask[0])
    torch.testing.assert_close(one.values[0][one.mask[0]], two.values[0][two.mask[0]])


def test_learned_layers_get_the_same_weights_for_all_layers() -> None:
    """Of one item [S, L, D] each layer is mixed as the other; keys see the mean of the layers."""
    alignment = _alignment("attention")
    pieces = _pieces([TEXT], num_layers=2)
    same = Pieces(pieces.values.mean(2, keepdim=True).expand(-1, -1, 2, -1), pieces.kinds, pieces.spans)
    flat = Pieces(same.values[:, :, 0], pieces.kinds, pieces.spans)
    with torch.no_grad():
        layered, plain, mixed = (_align(alignment, part, 7).values for part in (same, flat, pieces))
    torch.testing.assert_close(layered[:, :, 0], plain)
    torch.testing.assert_close(layered[:, :, 1], plain)
    torch.testing.assert_close(mixed.mean(2), plain)
    assert not torch.allclose(mixed[:, :, 0], mixed[:, :, 1])


def test_attention_learns_who_belongs_to_whom() -> None:
    """Four words a text, said in another order than they stand in: only what frames and pieces are can tell."""
    num_words, num_slots = 8, 4
    draws = torch.Generator().manual_seed(0)
    values = torch.linalg.qr(torch.randn(num_words, num_words, generator=draws)).Q  # of words, no two of them alike
    torch.manual_seed(0)
    alignment = build(from_dict({"type": "attention", "dim": 16}), num_words, num_words)
    head = torch.nn.Linear(num_words, num_words)
    optimizer = torch.optim.Adam([*alignment.parameters(), *head.parameters()], 0.03)

    def draw() -> tuple[Tensor, Tensor, Targets]:
        """Frames that tell the word that is said in them, the value of that word, and the targets."""
        texts = torch.randint(num_words, (16, num_slots), generator=draws)
        order = torch.stack([torch.randperm(num_slots, generator=draws) for _ in range(16)])
        said = texts.gather(1, order).repeat_interleave(2, dim=1)
        spans = torch.zeros(16, num_slots, 2, dtype=torch.float64)
        pieces = Pieces(values[texts], torch.full((16, num_slots), PIECE), spans)
        frames = torch.nn.functional.one_hot(said, num_words).float()
        return frames, values[said], alignment(pieces, frames, RATE_HZ)

    def agreement() -> float:
        with torch.no_grad():
            _, wanted, targets = draw()
            return float(frame_cosines(targets.values, wanted, targets.mask).mean())

    assert agreement() < 0.7
    for _ in range(150):
        frames, _, targets = draw()
        loss = (1.0 - frame_cosines(head(frames), targets.values, targets.mask)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agreement() > 0.95


@pytest.mark.parametrize("settings", [{"dim": 0}, {"pace_width": 0.0}])
def test_impossible_settings_are_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^alignment: dim and pace_width must be positive$"):
        from_dict({"type": "attention"} | settings, "alignment")
