from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codec.tokens import (
    StreamingUndelay,
    Tokens,
    deinterleave,
    delay,
    flatten,
    interleave,
    join_rows,
    split_rows,
    undelay,
    unflatten,
)


@st.composite
def codes(draw: st.DrawFn) -> Tensor:
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(0, 1024, shape, generator=generator)


def make_tokens(
    num_frames: int = 4, *, batch_size: int = 1, num_rows: int = 2, seed: int = 0, **changes: Any
) -> Tokens:
    values = torch.randint(1, 9, (batch_size, num_rows, num_frames), generator=torch.Generator().manual_seed(seed))
    given_values: dict[str, Any] = {
        "codes": values,
        "num_samples": torch.arange(batch_size) + num_frames * 10,
        "codec_id": "a",
    }
    return Tokens(**given_values | changes)


@given(codes=codes(), data=st.data())
def test_a_prefix_is_the_first_rows(codes: Tensor, data: st.DataObject) -> None:
    tokens = Tokens(codes, torch.arange(codes.shape[0]), "a", global_codes=torch.zeros(codes.shape[0], 2).long())
    num_quantizers = data.draw(st.integers(1, codes.shape[1]))
    prefix = tokens.prefix(num_quantizers)
    assert torch.equal(prefix.codes, codes[:, :num_quantizers])
    assert prefix.num_samples is tokens.num_samples
    assert prefix.global_codes is tokens.global_codes
    assert prefix.codec_id == "a"


@pytest.mark.parametrize("num_quantizers", [-1, 0, 3])
def test_a_prefix_of_rows_that_are_not_there_is_an_error(num_quantizers: int) -> None:
    with pytest.raises(ValueError, match=rf"num_quantizers={num_quantizers} is not in 1\.\.2"):
        make_tokens().prefix(num_quantizers)


@given(batch_size=st.integers(1, 4), data=st.data())
def test_a_row_is_a_batch_of_one(batch_size: int, data: st.DataObject) -> None:
    tokens = make_tokens(
        batch_size=batch_size,
        global_codes=torch.arange(batch_size * 3).view(batch_size, 3),
        scales=torch.rand(batch_size, 2),
    )
    index = data.draw(st.integers(-batch_size, batch_size - 1))
    row = tokens.row(index)
    assert tokens.global_codes is not None
    assert tokens.scales is not None
    assert row.global_codes is not None
    assert row.scales is not None
    pairs = [
        (row.codes, tokens.codes),
        (row.num_samples, tokens.num_samples),
        (row.global_codes, tokens.global_codes),
        (row.scales, tokens.scales),
    ]
    for of_row, of_batch in pairs:
        assert torch.equal(of_row, of_batch[index][None])


@pytest.mark.parametrize("index", [-3, 2])
def test_a_row_that_is_not_there_is_an_error(index: int) -> None:
    with pytest.raises(ValueError, match=f"row {index} is not in a batch of 2"):
        make_tokens(batch_size=2).row(index)


@given(nums_frames=st.lists(st.integers(0, 6), min_size=1, max_size=4), batch_size=st.integers(1, 2))
def test_stack_pads_to_the_longest_and_row_finds_each_again(nums_frames: list[int], batch_size: int) -> None:
    parts = [make_tokens(n, batch_size=batch_size, seed=i) for i, n in enumerate(nums_frames)]
    stacked = Tokens.stack(parts)
    assert stacked.codes.shape == (len(parts) * batch_size, 2, max(nums_frames))
    assert stacked.codec_id == "a"
    for at in range(len(parts) * batch_size):
        part, row = parts[at // batch_size].row(at % batch_size), stacked.row(at)
        num_frames = part.codes.shape[2]
        assert torch.equal(row.codes[:, :, :num_frames], part.codes)
        assert not row.codes[:, :, num_frames:].any()
        assert torch.equal(row.num_samples, part.num_samples)


def test_with_voice_gives_every_row_the_global_codes() -> None:
    tokens = Tokens.stack([make_tokens(global_codes=torch.tensor([[n, n]])) for n in range(2)])
    for voice in (torch.tensor([7, 8, 9]), torch.tensor([[7, 8, 9]])):
        other = tokens.with_voice(voice)
        assert other.global_codes is not None
        assert other.global_codes.tolist() == [[7, 8, 9], [7, 8, 9]]
        assert other.codes is tokens.codes
    two = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(tokens.with_voice(two).global_codes, two)  # type: ignore[arg-type]
    for wrong in (torch.zeros(3, 2), torch.zeros(1, 1, 2), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"global_codes must be \[2, L\], \[1, L\] or \[L\]"):
            tokens.with_voice(wrong)


def test_stack_joins_global_codes_and_scales() -> None:
    parts = [
        make_tokens(4, global_codes=torch.tensor([[1, 2]]), scales=torch.tensor([[0.5]])),
        make_tokens(2, global_codes=torch.tensor([[3, 4]]), scales=torch.tensor([[0.25]])),
    ]
    stacked = Tokens.stack(parts)
    assert stacked.global_codes is not None
    assert stacked.scales is not None
    assert stacked.global_codes.tolist() == [[1, 2], [3, 4]]
    assert stacked.scales.tolist() == [[0.5], [0.25]]


def test_stack_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="nothing to stack"):
        Tokens.stack([])
    with pytest.raises(ValueError, match=r"codecs \['a', 'b'\]"):
        Tokens.stack([make_tokens(), make_tokens(codec_id="b")])
    with pytest.raises(ValueError, match=r"\[1, 2\] rows"):
        Tokens.stack([make_tokens(), make_tokens(num_rows=1)])
    with pytest.raises(ValueError, match="only some of the tokens have scales"):
        Tokens.stack([make_tokens(), make_tokens(scales=torch.ones(1, 1))])
    with pytest.raises(ValueError, match=r"global_codes of \[1, 2\] per recording"):
        Tokens.stack([make_tokens(global_codes=torch.ones(1, n, dtype=torch.int64)) for n in (1, 2)])


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": torch.zeros(1, 2, 4)},
        {"codes": torch.zeros(1, 2, 4, dtype=torch.int32)},
        {"codes": torch.zeros(2, 4, dtype=torch.int64)},
        {"num_samples": torch.tensor([1.0])},
        {"num_samples": torch.tensor([1, 2])},
        {"num_samples": torch.tensor(1)},
    ],
)
def test_wrong_shapes_and_types_are_errors(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} must be int64"):
        make_tokens(**changes)


def test_to_moves_every_tensor() -> None:
    tokens = make_tokens(global_codes=torch.ones(1, 1, dtype=torch.int64), scales=torch.ones(1, 1)).to("meta")
    for tensor in (tokens.codes, tokens.num_samples, tokens.global_codes, tokens.scales):
        assert tensor is not None
        assert tensor.device.type == "meta"
    assert make_tokens().to(torch.device("meta")).scales is None


def test_the_order_of_flattened_codes() -> None:
    assert flatten(torch.tensor([[[1, 2, 3], [4, 5, 6]]])).tolist() == [[1, 4, 2, 5, 3, 6]]


@given(codes=codes())
def test_unflatten_undoes_flatten(codes: Tensor) -> None:
    sequence = flatten(codes)
    assert sequence.shape == (codes.shape[0], codes.shape[2] * codes.shape[1])
    assert torch.equal(unflatten(sequence, codes.shape[1]), codes)


@pytest.mark.parametrize("num_quantizers", [-1, 0, 4])
def test_unflatten_wants_whole_frames(num_quantizers: int) -> None:
    with pytest.raises(ValueError, match=f"6 codes are not whole frames of {num_quantizers}"):
        unflatten(torch.zeros(1, 6, dtype=torch.int64), num_quantizers)


def test_the_order_of_delayed_codes() -> None:
    assert delay(torch.tensor([[[1, 2], [3, 4], [5, 6]]]), fill=-1).tolist() == [
        [[1, 2, -1, -1], [-1, 3, 4, -1], [-1, -1, 5, 6]]
    ]


@given(codes=codes(), fill=st.integers(-1, 2000))
def test_undelay_undoes_delay(codes: Tensor, fill: int) -> None:
    delayed = delay(codes, fill=fill)
    batch_size, num_rows, num_frames = codes.shape
    assert delayed.shape == (batch_size, num_rows, num_frames + num_rows - 1)
    assert delayed.dtype == torch.int64
    num_filled = batch_size * num_rows * (num_rows - 1)
    assert int((delayed == fill).sum()) == num_filled + int((codes == fill).sum())
    assert torch.equal(undelay(delayed), codes)


def test_undelay_wants_enough_columns() -> None:
    with pytest.raises(ValueError, match="1 columns are too few for 3 delayed rows"):
        undelay(torch.zeros(1, 3, 1, dtype=torch.int64))


def test_the_order_of_interleaved_codes() -> None:
    """Blocks of two frames, then one of one; in each the coarse row, then the fine ones frame after frame."""
    codes = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    assert interleave(codes, 1, 2).tolist() == [[1, 2, 4, 7, 5, 8, 3, 6, 9]]
    assert interleave(codes, 2, 2).tolist() == [[1, 4, 2, 5, 7, 8, 3, 6, 9]]


@given(codes=codes(), data=st.data())
def test_deinterleave_undoes_interleave(codes: Tensor, data: st.DataObject) -> None:
    num_coarse, block_frames = data.draw(st.integers(0, codes.shape[1])), data.draw(st.integers(1, 9))
    sequence = interleave(codes, num_coarse, block_frames)
    assert sequence.shape == (codes.shape[0], codes.shape[2] * codes.shape[1])
    assert torch.equal(deinterleave(sequence, codes.shape[1], num_coarse, block_frames), codes)
    assert torch.equal(interleave(codes, num_coarse, 1), flatten(codes))
    coarse_first = torch.cat([flatten(rows) for rows in split_rows(codes, num_coarse)], dim=1)
    assert torch.equal(interleave(codes, num_coarse, codes.shape[2] + 1), coarse_first)


@given(codes=codes(), data=st.data())
def test_join_rows_undoes_split_rows(codes: Tensor, data: st.DataObject) -> None:
    num_coarse = data.draw(st.integers(0, codes.shape[1]))
    coarse, fine = split_rows(codes, num_coarse)
    assert (coarse.shape[1], fine.shape[1]) == (num_coarse, codes.shape[1] - num_coarse)
    assert torch.equal(join_rows(coarse, fine), codes)


def test_orders_that_cannot_be_are_errors() -> None:
    codes = torch.zeros(1, 2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"num_coarse=3 is not in 0\.\.2"):
        split_rows(codes, 3)
    with pytest.raises(ValueError, match="are not of the same frames"):
        join_rows(codes, codes[:, :, :2])
    with pytest.raises(ValueError, match="block_frames=0 must be positive"):
        interleave(codes, 1, 0)
    with pytest.raises(ValueError, match="block_frames=0 must be positive"):
        deinterleave(flatten(codes), 2, 1, 0)
    with pytest.raises(ValueError, match=r"num_coarse=3 is not in 0\.\.2"):
        deinterleave(flatten(codes), 2, 3, 1)
    with pytest.raises(ValueError, match="6 codes are not whole frames of 4"):
        deinterleave(flatten(codes), 4, 1, 1)
    with pytest.raises(ValueError, match="num_quantizers=0 must be positive"):
        StreamingUndelay(0)
    with pytest.raises(ValueError, match=r"columns must be \[B, 2, n\]"):
        StreamingUndelay(2).push(codes[:, :1])


@given(codes=codes(), data=st.data())
def test_undelay_of_a_stream_gives_frames_as_soon_as_they_are_whole(codes: Tensor, data: st.DataObject) -> None:
    num_rows, delayed = codes.shape[1], delay(codes, fill=-1)
    stream, parts = StreamingUndelay(num_rows), []
    places = sorted(data.draw(st.lists(st.integers(0, delayed.shape[2]), max_size=6)))
    for start, stop in zip([0, *places], [*places, delayed.shape[2]], strict=True):
        chunk = delayed[:, :, start:stop].clone()
        parts.append(stream.push(chunk))
        chunk.fill_(-7)  # a caller may reuse its buffer
        assert sum(part.shape[2] for part in parts) == max(0, stop - num_rows + 1)
    assert torch.equal(torch.cat([codes[:, :, :0], *parts], dim=2), codes)
