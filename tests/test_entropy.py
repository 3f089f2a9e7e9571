"""Entropy coding of codes, and tables fitted to them."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from containers import likely_codes, some_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.entropy import MAX_CLASSES, EntropyError, EntropyTables, Parent, RowModel
from tools.fit_entropy import fit, report

# Row 0 depends on itself a frame before: what comes twice comes thrice. Row 1 on both.
FIXED = EntropyTables(
    (
        RowModel(
            (Parent(0, 1), Parent(0, 1)),
            (np.array([0, 1, 2, 3], np.uint8), np.array([0, 0, 0, 0], np.uint8)),
            np.array([[0], [1], [2], [3]], np.uint8),
            np.array([[9, 1, 1], [1, 9, 1], [1, 1, 9], [1, 1, 1]], np.uint16),
        ),
        RowModel(
            (Parent(0, 0), Parent(1, 1)),
            (np.array([0, 1, 1, 0], np.uint8), np.array([0, 0, 1, 1, 1, 0], np.uint8)),
            np.array([[0, 1], [2, 0]], np.uint8),
            np.array([[100, 50, 25, 12, 6], [1, 1, 1, 1, 65535], [5, 4, 3, 2, 1]], np.uint16),
        ),
    )
)
CODES = np.array(
    [[[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 4, 4, 0, 3, 2, 1]], [[2, 2, 1, 1, 1, 1, 0, 0], [4, 3, 2, 1, 0, 0, 1, 2]]]
)


def test_golden_bytes() -> None:
    """They change where `constriction` computes other bits: then old files cannot be read, so this must not pass."""
    assert FIXED.id == "229fb2f5"
    assert FIXED.encode(CODES).hex() == "0055d92b3163eaec"
    np.testing.assert_array_equal(FIXED.decode(bytes.fromhex("0055d92b3163eaec"), 2, 2, 8), CODES)
    tables = some_tables((1024, 1024, 300, 2), 7)
    codes = likely_codes(tables, 2, 400, seed=7)
    data = tables.encode(codes)
    assert (tables.id, len(data)) == ("2c0ce21b", 2284)
    assert hashlib.sha256(data).hexdigest() == "6d525fb6511c9503be6b5e8838ac8a69a3750d33a8948fc0eb196deefb8f8320"
    np.testing.assert_array_equal(tables.decode(data, 2, 4, 400), codes)


tables_and_codes = st.tuples(
    st.lists(st.sampled_from([2, 3, 5, 31, 32, 33, 100]) | st.integers(2, 300), min_size=1, max_size=5).map(tuple),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 2.0, 8.0, 30.0, 1000.0]),
)


@given(tables_and_codes, st.integers(1, 3), st.integers(0, 40), st.data())
@settings(max_examples=80)
def test_codes_are_decoded_as_they_were(
    drawn: tuple[tuple[int, ...], int, float], num_channels: int, num_frames: int, data: st.DataObject
) -> None:
    sizes, seed, power = drawn
    tables = some_tables(sizes, seed, power=power)
    num_rows = data.draw(st.integers(1, len(sizes)))
    uniform = np.random.default_rng(seed).integers(0, np.array(sizes)[:, None], (num_channels, len(sizes), num_frames))
    for codes in (uniform, likely_codes(tables, num_channels, num_frames, seed)):
        fewer = codes[:, :num_rows]
        coded = tables.encode(fewer)
        assert not coded.endswith(b"\0")
        decoded = tables.decode(coded, num_channels, num_rows, num_frames)
        assert decoded.dtype == np.int64
        np.testing.assert_array_equal(decoded, fewer)
        if num_frames:
            num_bits = sum(tables.bits(channel).sum() * num_frames for channel in fewer)
            # The coder quantises shares to 2^-24; a table of 300 rare codes loses a little by that.
            assert -8 <= 8 * len(coded) - num_bits <= 8 * 5 + 0.001 * num_bits


def test_codes_that_are_nearly_certain_take_nearly_no_bytes() -> None:
    counts = np.array([[65535, 1], [65535, 1]], np.uint16)
    certain = EntropyTables((_row(counts),))
    zeros, ones = np.zeros((1, 1, 1000), np.int64), np.ones((1, 1, 1000), np.int64)
    assert certain.encode(zeros[:, :, :0]) == b""
    np.testing.assert_array_equal(certain.decode(b"", 1, 1, 0), zeros[:, :, :0])
    assert len(certain.encode(zeros)) <= 1
    np.testing.assert_array_equal(certain.decode(certain.encode(zeros), 1, 1, 1000), zeros)
    assert len(certain.encode(ones)) == pytest.approx(2000, abs=4)
    np.testing.assert_array_equal(certain.decode(certain.encode(ones), 1, 1, 1000), ones)
    for at in range(0, 1000, 37):
        once = zeros.copy()
        once[0, 0, at] = 1
        data = certain.encode(once)
        assert len(data) <= 4
        np.testing.assert_array_equal(certain.decode(data, 1, 1, 1000), once)


def test_every_channel_is_coded_alone_and_every_call_begins_anew() -> None:
    np.testing.assert_array_equal(FIXED.bits(CODES[0]), FIXED.bits(CODES[0].copy()))
    swapped = FIXED.decode(FIXED.encode(CODES[::-1]), 2, 2, 8)
    np.testing.assert_array_equal(swapped, CODES[::-1])
    assert FIXED.encode(CODES) == FIXED.encode(CODES)
    # Class 3 of row 0 is for the first frame: three codes are alike, 1 in 11 is not.
    first, rest = np.log2(3), -np.log2(9 / 11)
    np.testing.assert_allclose(FIXED.bits(np.zeros((1, 1), np.int64)), [first], rtol=1e-12)
    np.testing.assert_allclose(FIXED.bits(np.zeros((1, 4), np.int64)), [(first + 3 * rest) / 4], rtol=1e-12)
    np.testing.assert_array_equal(FIXED.bits(np.zeros((2, 0), np.int64)), [0, 0])


@given(st.binary(max_size=40), st.integers(1, 2), st.integers(1, 2), st.integers(0, 12))
@settings(max_examples=300)
def test_other_bytes_are_an_error_or_what_their_codes_are_coded_as(
    data: bytes, num_channels: int, num_rows: int, num_frames: int
) -> None:
    try:
        codes = FIXED.decode(data, num_channels, num_rows, num_frames)
    except EntropyError as error:
        message = str(error)
    else:
        message = "coded bytes are"
        assert FIXED.encode(codes) == data
    assert message.startswith("coded bytes are")
    assert "\n" not in message


def test_damaged_bytes_never_pass_as_the_same_codes() -> None:
    data = FIXED.encode(CODES)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            codes = FIXED.decode(bytes(damaged), 2, 2, 8)
        except EntropyError:
            continue
        assert not np.array_equal(codes, CODES)
        assert FIXED.encode(codes) == bytes(damaged)
    for wrong in (data + b"\0", data + b"\0" * 4, data + b"\1", data[:-1], b"\0", b"\0" * 8):
        with pytest.raises(EntropyError):
            FIXED.decode(wrong, 2, 2, 8)
    with pytest.raises(EntropyError, match="there are tables for 2 rows of codes, not 3"):
        FIXED.decode(data, 2, 3, 8)


def _row(counts: np.ndarray, parent: Parent = Parent(0, 1)) -> RowModel:  # noqa: B008
    """A row alone, whose classes follow the code before."""
    groups = (np.arange(counts.shape[1] + 1) % len(counts)).astype(np.uint8)
    classes = np.arange(len(counts), dtype=np.uint8)[:, None]
    return RowModel((parent, parent), (groups, np.zeros(counts.shape[1] + 1, np.uint8)), classes, counts)


def test_the_id_changes_with_every_entry() -> None:
    tensors = FIXED.to_tensors()
    ids = {FIXED.id}
    num_entries = 0
    for name, tensor in tensors.items():
        for at in np.ndindex(tensor.shape):
            for change in (1, -1, 2):
                other = tensor.copy()
                other[at] = (int(tensor[at]) + change) % (np.iinfo(tensor.dtype).max + 1)
                try:
                    ids.add(EntropyTables.from_tensors(tensors | {name: other}).id)
                    num_entries += 1
                except EntropyError:  # what does not fit has no id
                    continue
    assert num_entries > 90
    assert len(ids) == 1 + num_entries


def test_the_id_does_not_depend_on_how_arrays_lie_in_memory() -> None:
    tensors = FIXED.to_tensors()

    def spread(tensor: np.ndarray) -> np.ndarray:
        wide = np.zeros(tuple(2 * n for n in tensor.shape), tensor.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
        view[...] = tensor
        return view

    changes: list[Callable[[np.ndarray], np.ndarray]] = [np.asfortranarray, spread, np.copy]
    for change in changes:
        other = EntropyTables.from_tensors({name: change(tensor) for name, tensor in tensors.items()})
        assert other.id == FIXED.id
        assert other.encode(CODES) == FIXED.encode(CODES)
    with pytest.raises(EntropyError, match="counts must be uint16"):
        EntropyTables.from_tensors(tensors | {"row0.counts": tensors["row0.counts"].astype(">u2")})


def test_tables_survive_being_tensors() -> None:
    tables = some_tables((5, 8, 300), 3)
    tensors = tables.to_tensors()
    assert set(tensors) == {"parents"} | {
        f"row{k}.{t}" for k in range(3) for t in ("groups0", "groups1", "classes", "counts")
    }
    again = EntropyTables.from_tensors(tensors)
    assert (again.id, again.codebook_sizes) == (tables.id, (5, 8, 300))
    assert [row.parents for row in again.rows] == [row.parents for row in tables.rows]
    for name in tensors:
        if name != "parents":
            with pytest.raises(EntropyError, match=f"the entropy tables are incomplete: '{name}'"):
                EntropyTables.from_tensors({key: value for key, value in tensors.items() if key != name})
    for parents in (tensors["parents"][:, :1], tensors["parents"][:, :, :1], tensors["parents"][0, 0], np.array(3)):
        with pytest.raises(EntropyError, match="incomplete"):
            EntropyTables.from_tensors(tensors | {"parents": parents})
    with pytest.raises(EntropyError, match="there are no entropy tables"):
        EntropyTables.from_tensors({"parents": np.zeros((0, 2, 2), np.uint8)})


ROWS = FIXED.rows
U8, U16 = np.uint8, np.uint16


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (0, {"parents": (Parent(0, 0), Parent(0, 1))}, "row 0 cannot depend on row 0 0 frames before"),
        (0, {"parents": (Parent(0, 1), Parent(1, 1))}, "row 0 cannot depend on row 1 1 frames before"),
        (1, {"parents": (Parent(1, 0), Parent(1, 1))}, "row 1 cannot depend on row 1 0 frames before"),
        (1, {"parents": (Parent(0, 2), Parent(1, 1))}, "row 1 cannot depend on row 0 2 frames before"),
        (1, {"parents": (Parent(-1, 0), Parent(1, 1))}, "row 1 cannot depend on row -1 0 frames before"),
        (1, {"groups": (np.zeros(3, U8), ROWS[1].groups[1])}, r"row 1: groups must be uint8 \[4\], got uint8 \(3,\)"),
        (1, {"groups": (ROWS[1].groups[0].astype(int), ROWS[1].groups[1])}, r"groups must be uint8 \[4\], got int64"),
        (1, {"groups": (np.zeros((4, 1), U8), ROWS[1].groups[1])}, r"groups must be uint8 \[4\], got uint8 \(4, 1\)"),
        (
            1,
            {"groups": (np.full(4, 2, U8), ROWS[1].groups[1])},
            r"row 1: classes must be uint8 \(3, 2\), got uint8 \(2, 2\)",
        ),
        (1, {"classes": ROWS[1].classes.astype(int)}, r"classes must be uint8 \(2, 2\), got int64"),
        (1, {"classes": ROWS[1].classes[0]}, r"classes must be uint8 \(2, 2\), got uint8 \(2,\)"),
        (1, {"classes": ROWS[1].classes + U8(1)}, "for each of at most 32 classes"),
        (1, {"counts": ROWS[1].counts * U16(0)}, "counts of at least 1"),
        (1, {"counts": np.ones((MAX_CLASSES + 1, 5), U16)}, "at most 32 classes"),
        (1, {"counts": np.ones((0, 5), U16)}, "at most 32 classes"),
        (1, {"counts": ROWS[1].counts.astype(int)}, "row 1: counts must be uint16 of at most 65536 bytes"),
        (1, {"counts": np.ones(5, U16)}, r"counts must be uint16 of at most 65536 bytes, got \(5,\)"),
        (0, {"counts": np.array(5, U16)}, r"counts must be uint16 of at most 65536 bytes, got \(\)"),
        (1, {"counts": np.ones((3, 1), U16)}, r"counts must be uint16 .* got \(3, 1\)"),
        (1, {"counts": np.ones((32, 1025), U16)}, r"counts must be uint16 .* got \(32, 1025\)"),
    ],
)
def test_tables_that_do_not_fit_are_refused(row: int, changes: dict[str, Any], message: str) -> None:
    rows = list(ROWS)
    rows[row] = replace(rows[row], **changes)
    with pytest.raises(EntropyError, match=message):
        EntropyTables(tuple(rows))
    assert issubclass(EntropyError, ValueError)


# Fitting


def dependent_codes(num_frames: int, seed: int) -> np.ndarray:
    """Row 0 repeats itself 7 times in 8, row 1 is row 0 of its own frame 3 times in 4, row 2 is anything."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (3, num_frames))
    for f in range(1, num_frames):
        if rng.random() < 7 / 8:
            codes[0, f] = codes[0, f - 1]
    return np.stack([codes[0], np.where(rng.random(num_frames) < 3 / 4, codes[0], codes[1]), codes[2]])


def entropy_bits(share: float, size: int) -> float:
    """Of a code that is a certain one with this share, and any one else."""
    certain, other = share + (1 - share) / size, (1 - share) / size
    return float(-certain * np.log2(certain) - (size - 1) * other * np.log2(other))


def test_fitted_tables_save_what_there_is_to_save() -> None:
    train = [dependent_codes(4000, seed) for seed in range(4)]
    unseen = dependent_codes(4000, 99)
    tables = fit(train, (16, 16, 16))
    assert [row.parents for row in tables.rows[:1]] == [(Parent(0, 1), Parent(0, 1))]
    assert Parent(0, 0) in tables.rows[1].parents
    expected = [entropy_bits(7 / 8, 16), entropy_bits(3 / 4, 16), 4.0]
    np.testing.assert_allclose(tables.bits(unseen), expected, atol=0.12)
    coded = tables.encode(unseen[None])
    assert len(coded) == pytest.approx(tables.bits(unseen).sum() * 4000 / 8, abs=5)
    assert len(coded) == pytest.approx(sum(expected) * 4000 / 8, rel=0.05)
    np.testing.assert_array_equal(tables.decode(coded, 1, 3, 4000), unseen[None])
    assert fit(train, (16, 16, 16)).id == tables.id

    lines = report(tables, train, [unseen]).splitlines()
    assert lines[0].split() == ["row", "packed", "one", "table", "with", "context", "depends", "on"]
    assert len(lines) == 7
    assert lines[1].split()[:2] == ["0", "4"]
    assert float(lines[1].split()[3]) == pytest.approx(expected[0], abs=0.12)
    assert lines[6].startswith(" 0-2")
    assert lines[6].endswith(f"{1 - tables.bits(unseen).sum() / 12:.1%} saved")


@pytest.mark.parametrize("sizes", [(2,), (2, 2), (5, 2, 1024)])
@pytest.mark.parametrize("num_frames", [1, 2, 50])
def test_tables_can_be_fitted_to_little(sizes: tuple[int, ...], num_frames: int) -> None:
    rng = np.random.default_rng(0)
    recordings = [rng.integers(0, np.array(sizes)[:, None], (len(sizes), n)) for n in (num_frames, 1)]
    tables = fit(recordings, sizes)
    assert tables.codebook_sizes == sizes
    unseen = rng.integers(0, np.array(sizes)[:, None], (len(sizes), 30))
    np.testing.assert_array_equal(tables.decode(tables.encode(unseen[None]), 1, len(sizes), 30), unseen[None])
    assert len(report(tables, recordings, [unseen, unseen[:, :1]]).splitlines()) == 1 + 2 * len(sizes)


def test_a_codebook_too_large_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="a codebook of 32769 is too large for a table"):
        fit([np.zeros((1, 3), np.int64)], (32769,))
