"""Labels of recordings: TextGrid and CTM files, which recording they belong to, and the label of every frame."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.evaluation import UsageError
from codec.evaluation.labels import (
    Segment,
    check_labels,
    find_labels,
    frame_labels,
    read_ctm,
    read_textgrid,
    vocabulary,
    write_textgrid,
)

PHONES = [Segment("HH", 0.1, 0.2), Segment("AY", 0.2, 0.45), Segment("sil", 0.45, 0.5)]
WORDS = [Segment('say "hi"', 0.1, 0.45)]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    pytest.importorskip("praatio")
    path = tmp_path / "a.TextGrid"
    write_textgrid(path, {"words": WORDS, "phones": PHONES}, 0.6)
    return path


def test_textgrids_come_back(grid: Path) -> None:
    assert read_textgrid(grid) == PHONES
    assert read_textgrid(grid, "words") == WORDS
    assert '"IntervalTier"' in grid.read_text()
    write_textgrid(grid, {"only": WORDS}, 0.6)  # replaces it
    assert read_textgrid(grid) == WORDS


def test_textgrids_as_others_write_them(tmp_path: Path) -> None:
    pytest.importorskip("praatio")
    intervals = '0\n0.2\n"ü"\n0.2\n0.5\n""\n'
    tier = f'"IntervalTier"\n"Laute"\n0\n0.5\n2\n{intervals}'
    short = f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n0.5\n<exists>\n1\n{tier}'
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "b.TextGrid").write_text(short, encoding=encoding)
        assert read_textgrid(tmp_path / "b.TextGrid") == [Segment("ü", 0.0, 0.2)]


def test_mistakes_with_textgrids_are_one_line(grid: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a\.TextGrid has no tier 'phone' of intervals \(it has \['words', 'phones'\]\)"
    ):
        read_textgrid(grid, "phone")
    write_textgrid(grid, {"x": WORDS, "y": WORDS}, 0.6)
    with pytest.raises(ValueError, match="which tier holds the labels"):
        read_textgrid(grid)
    for content in (b"", b"no grid", bytes(range(256)), grid.read_bytes()[:-200]):
        grid.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.TextGrid") as caught:
            read_textgrid(grid, "z")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'AY' ends at 0[.]450 s, which is after 0[.]400 s"):
        write_textgrid(grid, {"phones": PHONES[:2]}, 0.4)
    with pytest.raises(ValueError, match=r"'HH' ends at 0[.]200 s, which is after 0[.]150 s"):
        write_textgrid(grid, {"phones": [PHONES[0], Segment("X", 0.15, 0.3)]}, 0.4)


def test_ctm_files(tmp_path: Path) -> None:
    path = tmp_path / "all.ctm"
    path.write_text(";; a comment\n\na 1 0.20 0.25 AY 0.9\na 1 0.1 0.1 HH\nb/c A 0 0.5 OW\na 1 0.45 0 X\n")
    found = read_ctm(path)
    assert list(found) == ["a", "b/c"]
    assert [s.label for s in found["a"]] == ["HH", "AY"]
    assert found["a"][1].stop_seconds == pytest.approx(0.45)
    for line in ("a 1 0.1 0.2", "a 1 x 0.2 B", "a 1 -1 0.2 B", "a 1 0.1 nan B", "a"):
        path.write_text(f"a 1 0 1 B\n{line}\n")
        with pytest.raises(ValueError, match=r"all\.ctm:2: "):
            read_ctm(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="cannot be read"):
        read_ctm(path)


def test_labels_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    for name in ("x/one.ctm", "y/two.CTM", "deep/er/three.ctm", "x/twice.ctm", "y/twice.ctm"):
        path = tmp_path / "labels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{path.stem} 1 0 0.5 {path.stem}\n{path.stem} 1 0.5 0.5 SIL\n")
    names = ["x/one.wav", "two.flac", "other/three.opus", "y/twice.wav", "z/twice.wav", "four.wav"]
    found, failures = find_labels(tmp_path / "labels", names)
    assert {name: [s.label for s in segments] for name, segments in found.items()} == {
        "x/one.wav": ["one"],
        "two.flac": ["two"],
        "other/three.opus": ["three"],
        "y/twice.wav": ["twice"],
    }
    assert "could both hold its labels" in failures["z/twice.wav"]
    assert "holds no labels of it" in failures["four.wav"]
    (tmp_path / "all.ctm").write_text("x/one 1 0 1 A\nthree 1 0 1 B\nfour 1 0 1 SIL\n")
    found, failures = find_labels(tmp_path / "all.ctm", names)
    assert {name: segments[0].label for name, segments in found.items()} == {"x/one.wav": "A", "other/three.opus": "B"}
    assert "nothing but silence" in failures["four.wav"]


def test_mistakes_with_sources_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.ctm").write_text("a 1 0 1 A\nb 1 0 1 B\n")
    for source, names, told in (
        (tmp_path / "none", ["a.wav"], "neither a folder of labels nor a CTM file"),
        (Path(__file__), ["a.wav"], "neither a folder of labels nor a CTM file"),
        (tmp_path / "a.ctm", ["c.wav", "d.wav"], r"none of 2 recordings; c\.wav: .*a\.ctm holds no labels of it"),
        (tmp_path, ["a.wav"], "holds the labels of 2 recordings, not of one"),
        (tmp_path, [], "none of 0 recordings"),
    ):
        with pytest.raises(ValueError, match=told):
            find_labels(source, names)
    for source in (tmp_path / "a.ctm", tmp_path):
        with pytest.raises(ValueError, match="no tiers such as 'phones'"):
            find_labels(source, ["a.wav"], tier="phones")
    with pytest.raises(UsageError, match="no tiers such as"):
        find_labels(tmp_path / "a.ctm", ["a.wav"], tier="phones")


def test_labels_of_another_recording_end_after_it() -> None:
    check_labels(PHONES, 0.41)
    with pytest.raises(ValueError, match=r"its labels end at 0\.50 s, but the audio at 0\.39 s"):
        check_labels(PHONES, 0.39)


def test_a_frame_has_the_label_at_its_centre() -> None:
    numbers = vocabulary([PHONES, WORDS])
    assert numbers == {"AY": 0, "HH": 1, 'say "hi"': 2, "sil": 3}
    # Centres at 0.05, 0.15 ... 0.65 s.
    assert frame_labels(PHONES, 7, 10, numbers).tolist() == [-1, 1, 0, 0, 3, -1, -1]
    assert frame_labels(PHONES, 3, 12.5, numbers).tolist() == [-1, 1, 0]  # 0.04, 0.12, 0.2: a start is inside
    assert frame_labels([], 2, 10, numbers).tolist() == [-1, -1]
    assert frame_labels(PHONES, 0, 10, numbers).tolist() == []


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.integers(1, 20)), max_size=8),
    st.integers(0, 40),
    st.sampled_from([12.5, 50.0, 75.0]),
)
def test_frames_against_a_search_through_all(
    spans: list[tuple[str, int, int]], num_frames: int, rate_hz: float
) -> None:
    segments, at = [], 0.0
    for label, gap, length in spans:
        segments.append(Segment(label, at + gap / 100, at + (gap + length) / 100))
        at = segments[-1].stop_seconds
    numbers = {"a": 0, "b": 1, "c": 2}
    expected = []
    for i in range(num_frames):
        inside = [s for s in segments if s.start_seconds <= (i + 0.5) / rate_hz < s.stop_seconds]
        expected.append(numbers[inside[0].label] if inside else -1)
    found = frame_labels(segments[::-1], num_frames, rate_hz, numbers)
    assert found.tolist() == expected
    assert found.dtype == np.int64
