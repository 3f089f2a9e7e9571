"""Ids for language models: whole and in pieces they come back as the same tokens, and wrong ones are told."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codec.token_vocabulary import Vocabulary, VocabularyDecoder
from codec.tokens import Tokens

HOP = 10


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    sizes = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    values: dict[str, Any] = {"pattern": draw(st.sampled_from(["flatten", "delay"]))}
    if len(sizes) > 1 and draw(st.booleans()):
        values = {
            "pattern": "interleave",
            "num_coarse": draw(st.integers(1, len(sizes) - 1)),
            "block_frames": draw(st.integers(1, 4)),
        }
    if draw(st.booleans()):
        values |= {"num_global_codes": draw(st.integers(1, 3)), "global_codebook_size": draw(st.integers(1, 9))}
    if values.get("block_frames", 1) == 1:
        values["shares_ids"] = draw(st.booleans())
    return Vocabulary(
        codec_id="a", hop_length=HOP, codebook_sizes=sizes, first_id=draw(st.sampled_from([0, 1, 500])), **values
    )


@st.composite
def tokens_of(draw: st.DrawFn, vocabulary: Vocabulary, batch_size: int | None = None, num_frames: int = 9) -> Tokens:
    """Whole frames, 0 past the end of a recording: what comes back from ids."""
    nums = draw(st.lists(st.integers(0, num_frames), max_size=3))
    if batch_size is not None:
        nums = [draw(st.integers(0, num_frames))] * batch_size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    sizes = torch.tensor(vocabulary.codebook_sizes)[:, None]
    codes = torch.rand(len(nums), len(sizes), max(nums, default=0), generator=generator).mul(sizes).long()
    lengths = torch.tensor(nums, dtype=torch.int64)
    codes[(torch.arange(codes.shape[2]) >= lengths[:, None])[:, None].expand_as(codes)] = 0
    global_codes = torch.rand(len(nums), vocabulary.num_global_codes, generator=generator)
    global_codes = global_codes.mul(vocabulary.global_codebook_size).long()
    return Tokens(codes, lengths * HOP, "a", global_codes=global_codes if vocabulary.num_global_codes else None)


def small(**changes: Any) -> Vocabulary:
    values: dict[str, Any] = {"codec_id": "a", "hop_length": HOP, "codebook_sizes": (4, 6)}
    return Vocabulary(**values | changes)


def small_tokens(**changes: Any) -> Tokens:
    values: dict[str, Any] = {
        "codes": torch.tensor([[[1, 2, 3], [4, 5, 0]]]),
        "num_samples": torch.tensor([30]),
        "codec_id": "a",
    }
    return Tokens(**values | changes)


VOICED = {"num_global_codes": 2, "global_codebook_size": 9}


def _assert_same(one: Tokens, two: Tokens) -> None:
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.num_samples, two.num_samples)
    assert (one.codec_id, one.global_codes is None) == (two.codec_id, two.global_codes is None)
    if one.global_codes is not None and two.global_codes is not None:
        assert torch.equal(one.global_codes, two.global_codes)


# How ids stand


def test_ids_of_flattened_rows() -> None:
    assert small().encode(small_tokens()).tolist() == [[[1, 4, 11, 5, 12, 6, 7, 2]]]
    assert small(shares_ids=True).encode(small_tokens()).tolist() == [[[1, 4, 7, 5, 8, 6, 3, 2]]]
    assert small(first_id=100).encode(small_tokens()).tolist() == [[[101, 104, 111, 105, 112, 106, 107, 102]]]
    assert (small().num_ids, small(shares_ids=True).num_ids, small(first_id=100).num_ids) == (13, 9, 113)


def test_ids_of_interleaved_blocks() -> None:
    vocabulary = small(pattern="interleave", num_coarse=1, block_frames=2)
    assert vocabulary.encode(small_tokens()).tolist() == [[[1, 4, 5, 11, 12, 6, 7, 2]]]


def test_ids_of_delayed_rows() -> None:
    vocabulary = small(pattern="delay")
    assert vocabulary.num_streams == 2
    assert vocabulary.encode(small_tokens()).tolist() == [[[1, 4, 5, 6, 2, 0], [1, 0, 11, 12, 7, 2]]]


def test_ids_of_global_codes_come_first() -> None:
    tokens = small_tokens(global_codes=torch.tensor([[7, 8]]))
    assert small(**VOICED).encode(tokens).tolist() == [[[3, 21, 22, 1, 5, 12, 6, 13, 7, 8, 2]]]
    delayed = small(pattern="delay", **VOICED).encode(tokens).tolist()
    assert delayed == [[[3, 21, 22, 1, 5, 6, 7, 2, 0], [3, 0, 0, 1, 0, 12, 13, 8, 2]]]
    assert small(**VOICED).num_ids == 23


def test_shorter_recordings_are_filled_up_and_what_is_past_their_end_is_left_out() -> None:
    codes = torch.tensor([[[1, 2], [3, 3]], [[1, 2], [3, 3]]])
    tokens = Tokens(codes, torch.tensor([20, 1]), "a")
    assert small().encode(tokens).tolist() == [[[1, 4, 10, 5, 10, 2]], [[1, 4, 10, 2, 0, 0]]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [[1, 4, 11, 5, 12, 6, 7]]),
        ({"pattern": "interleave", "num_coarse": 1, "block_frames": 2}, [[1, 4, 5, 11, 12]]),
        ({"pattern": "delay"}, [[1, 4, 5, 6], [1, 0, 11, 12]]),
    ],
)
def test_a_prompt_is_a_beginning_without_an_end(changes: dict[str, Any], expected: list[list[int]]) -> None:
    assert small(**changes).prompt(small_tokens()).tolist() == [expected]
    uneven = Tokens(torch.zeros(2, 2, 2, dtype=torch.int64), torch.tensor([20, 1]), "a")
    with pytest.raises(ValueError, match="equally many frames"):
        small(**changes).prompt(uneven)


# There and back


@given(data=st.data(), vocabulary=vocabularies())
def test_decode_undoes_encode(data: st.DataObject, vocabulary: Vocabulary) -> None:
    tokens = data.draw(tokens_of(vocabulary))
    ids = vocabulary.encode(tokens)
    assert ids.dtype == torch.int64
    longest = int(tokens.num_samples.max()) // HOP if len(tokens.num_samples) else None
    num_steps = 0 if longest is None else vocabulary.num_steps(longest)
    assert ids.shape == (len(tokens.codes), vocabulary.num_streams, num_steps)
    assert not ids.numel() or vocabulary.first_id <= int(ids.min()) <= int(ids.max()) < vocabulary.num_ids
    _assert_same(vocabulary.decode(ids), tokens)
    _assert_same(vocabulary.decode(torch.nn.functional.pad(ids, (0, 3), value=vocabulary.pad_id)), tokens)


@given(data=st.data(), vocabulary=vocabularies())
def test_pieces_of_any_size_give_what_the_whole_gives(data: st.DataObject, vocabulary: Vocabulary) -> None:
    tokens = data.draw(tokens_of(vocabulary, batch_size=1))
    ids, decoder, parts = vocabulary.encode(tokens)[0], VocabularyDecoder(vocabulary), []
    places = sorted(data.draw(st.lists(st.integers(0, ids.shape[1]), max_size=6)))
    for start, stop in zip([0, *places], [*places, ids.shape[1]], strict=True):
        assert decoder.is_ended == (start == ids.shape[1])
        parts.append(decoder.push(ids[:, start:stop]))
    assert torch.equal(torch.cat(parts, dim=1), tokens.codes[0])
    assert decoder.is_ended
    if tokens.global_codes is not None:
        assert decoder.global_codes is not None
        assert torch.equal(decoder.global_codes, tokens.global_codes[0])


@given(data=st.data(), vocabulary=vocabularies())
def test_frames_come_as_soon_as_their_last_code_is_there(data: st.DataObject, vocabulary: Vocabulary) -> None:
    tokens = data.draw(tokens_of(vocabulary, batch_size=1))
    ids, decoder = vocabulary.encode(tokens)[0], VocabularyDecoder(vocabulary)
    last_row = vocabulary.row_ids[-1]
    num_last = num_given = 0
    for step in range(ids.shape[1]):
        num_given += decoder.push(ids[:, step : step + 1]).shape[1]
        if not vocabulary.shares_ids and step >= vocabulary.num_steps_before:
            num_last += int(ids[-1, step]) in last_row
            assert num_given == num_last
    assert num_given == tokens.codes.shape[2]


@given(data=st.data(), vocabulary=vocabularies())
def test_what_is_held_to_the_valid_ids_decodes(data: st.DataObject, vocabulary: Vocabulary) -> None:
    """Random ids; those that are not valid are refused. What came out encodes to the ids that went in."""
    decoder = VocabularyDecoder(vocabulary)
    steps: list[Tensor] = []
    parts: list[Tensor] = []
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    for _ in range(40):
        mask = decoder.valid_ids()
        assert mask.any(dim=1).all()
        step = torch.multinomial(mask.double(), 1, generator=generator)
        stream = int(torch.randint(len(mask), (), generator=generator))
        wrong = step.clone()
        wrong[stream] = torch.multinomial((~mask[stream]).double(), 1, generator=generator)
        with pytest.raises(ValueError, match=rf"^id {int(wrong[stream])} at position {len(steps)}\b"):
            copy.deepcopy(decoder).push(wrong)
        parts.append(decoder.push(step))
        steps.append(step)
        if decoder.is_ended:
            break
    else:
        return
    ids = torch.cat(steps, dim=1)[None]
    tokens = vocabulary.decode(ids)
    assert torch.equal(tokens.codes[0], torch.cat(parts, dim=1))
    assert torch.equal(vocabulary.encode(tokens), ids)
    assert decoder.valid_ids().nonzero().tolist() == [[s, vocabulary.pad_id] for s in range(vocabulary.num_streams)]


@given(vocabulary=vocabularies(), seed=st.integers(0, 2**32))
def test_a_recording_that_may_not_end_goes_on(vocabulary: Vocabulary, seed: int) -> None:
    decoder, generator = VocabularyDecoder(vocabulary), torch.Generator().manual_seed(seed)
    num_frames = 0
    for _ in range(vocabulary.num_steps_before + 3 * vocabulary.steps_per_block):
        mask = decoder.valid_ids(may_end=False)
        assert not (mask & ~decoder.valid_ids()).any()
        num_frames += decoder.push(torch.multinomial(mask.double(), 1, generator=generator)).shape[1]
    delay = vocabulary.num_quantizers - 1 if vocabulary.pattern == "delay" else 0
    assert num_frames == max(0, 3 * (vocabulary.block_frames or 1) - delay)
    assert not decoder.is_ended


@given(data=st.data(), vocabulary=vocabularies())
def test_a_prompt_is_where_the_whole_begins(data: st.DataObject, vocabulary: Vocabulary) -> None:
    tokens = data.draw(tokens_of(vocabulary, batch_size=2))
    block = vocabulary.block_frames or 1
    prompt, whole = vocabulary.prompt(tokens), vocabulary.encode(tokens)
    num_frames = tokens.codes.shape[2] // block * block
    num_codes = num_frames * (1 if vocabulary.pattern == "delay" else vocabulary.num_quantizers)
    assert prompt.shape[2] == vocabulary.num_steps_before + num_codes
    assert torch.equal(prompt, whole[:, :, : prompt.shape[2]])
    decoder = VocabularyDecoder(vocabulary)
    late = vocabulary.num_quantizers - 1 if vocabulary.pattern == "delay" else 0
    assert decoder.push(prompt[0]).shape[1] == max(0, num_frames - late)
    assert not decoder.is_ended


@given(vocabulary=vocabularies(), num_steps=st.integers(0, 60))
def test_the_frames_that_fit(vocabulary: Vocabulary, num_steps: int) -> None:
    num_frames = vocabulary.max_frames(num_steps)
    assert vocabulary.num_steps(num_frames) <= num_steps < vocabulary.num_steps(num_frames + 1)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "ids", "message"),
    [
        ({}, [[2]], "id 2 at position 0 is not begin (1)"),
        ({}, [[1, 7]], "id 7 at position 1 is not a code of row 0 (3..6) or the end (2)"),
        ({}, [[1, 3, 3]], "id 3 at position 2 is not a code of row 1 (7..12)"),
        ({}, [[1, 3, 2]], "id 2 at position 2 is not a code of row 1 (7..12)"),
        ({}, [[1, 2, 3]], "id 3 at position 2 is not padding (0)"),
        ({}, [[1, 3, 7]], "it has no end after 3 steps"),
        ({}, [[1, -1]], "id -1 at position 1 is not"),
        ({"shares_ids": True}, [[1, 7]], "id 7 at position 1 is not a code of row 0 (3..6) or the end (2)"),
        ({"pattern": "delay"}, [[1, 3], [1, 7]], "id 7 at position 1 of stream 1 is not padding (0)"),
        ({"pattern": "delay"}, [[1, 2, 3], [1, 0, 2]], "id 3 at position 2 of stream 0 is not padding (0)"),
        ({"pattern": "delay"}, [[1, 2, 0], [1, 0, 7]], "id 7 at position 2 of stream 1 is not the end (2)"),
        ({"pattern": "delay"}, [[1, 2], [1, 0]], "it has no end after 2 steps"),
        (VOICED, [[1]], "id 1 at position 0 is not begin of global codes (3)"),
        (VOICED, [[3, 4]], "id 4 at position 1 is not a global code (14..22)"),
        (VOICED, [[3, 14, 14, 14]], "id 14 at position 3 is not begin (1)"),
    ],
)
def test_ids_that_cannot_stand_where_they_stand_are_told(
    changes: dict[str, Any], ids: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError) as told:  # noqa: PT011
        small(**changes).decode(torch.tensor([ids]))
    assert str(told.value).startswith(f"row 0: {message}")


def test_the_row_of_a_batch_in_which_an_id_is_wrong_is_told() -> None:
    with pytest.raises(ValueError, match=r"^row 1: id 7 at position 1 is not"):
        small().decode(torch.tensor([[[1, 3, 7, 2]], [[1, 7, 3, 2]]]))


def test_a_shorter_block_is_the_last() -> None:
    vocabulary = small(pattern="interleave", num_coarse=1, block_frames=3)
    whole = vocabulary.decode(torch.tensor([[[1, 3, 4, 7, 8, 2]]]))
    assert whole.codes.tolist() == [[[0, 1], [0, 1]]]
    with pytest.raises(ValueError, match=r"id 3 at position 5 is not the end \(2\)"):
        vocabulary.decode(torch.tensor([[[1, 3, 4, 7, 8, 3]]]))
    with pytest.raises(ValueError, match=r"id 3 at position 4 is not a code of row 1 \(7..12\)"):
        vocabulary.decode(torch.tensor([[[1, 3, 3, 7, 3]]]))
    with pytest.raises(ValueError, match=r"id 3 at position 4 is not a code of row 1 \(7..12\)"):
        vocabulary.decode(torch.tensor([[[1, 3, 3, 3, 3]]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec_id": "b"}, "made by codec 'b', this vocabulary is of 'a'"),
        ({"codes": torch.zeros(1, 3, 3).long()}, "has 2 rows of codes, the tokens 3"),
        ({"codes": torch.full((1, 2, 3), 4)}, r"a code is outside its codebook of \(4, 6\)"),
        ({"codes": torch.full((1, 2, 3), -1)}, r"a code is outside its codebook of \(4, 6\)"),
        ({"num_samples": torch.tensor([31])}, "4 frames are told by num_samples, 3 are there"),
        ({"global_codes": torch.zeros(1, 2).long()}, "has 0 global codes, the tokens 2"),
    ],
)
def test_tokens_of_another_vocabulary_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().encode(small_tokens(**changes))


def test_global_codes_of_another_codebook_are_errors() -> None:
    with pytest.raises(ValueError, match="has 2 global codes, the tokens 0"):
        small(**VOICED).encode(small_tokens())
    with pytest.raises(ValueError, match="a global code is outside its codebook of 9"):
        small(**VOICED).encode(small_tokens(global_codes=torch.tensor([[0, 9]])))
    with pytest.raises(ValueError, match="this vocabulary has no global codes"):
        _ = small().begin_global_id


@pytest.mark.parametrize(
    "ids", [torch.zeros(1, 2).long(), torch.zeros(1, 2, 3).long(), torch.zeros(1, 1, 3), torch.zeros(3).long()]
)
def test_ids_of_other_shapes_and_types_are_errors(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="ids must be int64"):
        small().decode(ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_sizes": ()}, "codebook_sizes="),
        ({"codebook_sizes": (4, 0)}, "codebook_sizes="),
        ({"hop_length": 0}, "hop_length=0"),
        ({"pattern": "random"}, "pattern='random' is not one of"),
        ({"num_coarse": 1}, "num_coarse and block_frames go with pattern='interleave'"),
        ({"block_frames": 1}, "num_coarse and block_frames go with pattern='interleave'"),
        ({"pattern": "interleave", "num_coarse": 1}, "which needs both"),
        ({"pattern": "interleave", "num_coarse": 2, "block_frames": 1}, "num_coarse=2 must leave both parts some of 2"),
        ({"pattern": "interleave", "num_coarse": 0, "block_frames": 1}, "num_coarse=0 must leave"),
        ({"pattern": "interleave", "num_coarse": 1, "block_frames": 0}, "block_frames=0 be positive"),
        ({"pattern": "interleave", "num_coarse": 1, "block_frames": 2, "shares_ids": True}, "shares_ids=True"),
        ({"num_global_codes": 1}, "need each other"),
        ({"global_codebook_size": 1}, "need each other"),
        ({"num_global_codes": -1, "global_codebook_size": 1}, "must not be negative"),
        ({"first_id": -1}, "first_id=-1 must not be negative"),
    ],
)
def test_vocabularies_that_cannot_be_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
