"""Messages of `codec serve`: what is packed is what is unpacked."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.serving.protocol import MAX_REASON_BYTES, Control, Facts, Opening, SessionError, Welcome, close_reason
from codec.testing import tiny_codec

FACTS = replace(Facts.of(tiny_codec()), model="tiny@1")
SIZES = {"uint16": (32, 2**16, 7), "uint32": (32, 2**16 + 1, 7)}


def _welcome(
    code_format: str = "uint16", num_channels: int = 1, sample_format: str = "pcm16", rows: int = 3
) -> Welcome:
    facts = replace(FACTS, codebook_sizes=SIZES[code_format], num_channels=num_channels)
    opening = Opening("decode", sample_format=sample_format, num_quantizers=rows)
    welcome = Welcome.to(opening, facts, max_message_bytes=1000, idle_timeout_s=1)
    assert welcome.code_format == code_format
    return welcome


@given(code_format=st.sampled_from(list(SIZES)), rows=st.integers(1, 3), num_frames=st.integers(0, 9), data=st.data())
def test_codes_come_back(code_format: str, rows: int, num_frames: int, data: st.DataObject) -> None:
    welcome = _welcome(code_format, rows=rows)
    codes = np.array(
        [[data.draw(st.integers(0, size - 1)) for _ in range(num_frames)] for size in SIZES[code_format][:rows]]
    ).reshape(rows, num_frames)
    message = welcome.pack_codes(codes)
    assert len(message) == num_frames * welcome.bytes_per_frame
    back = welcome.unpack_codes(message)
    assert back.dtype == np.int64
    assert np.array_equal(back, codes)


def test_messages_are_little_endian_frame_by_frame() -> None:
    codes = np.array([[1, 2], [3, 4], [0x105, 6]])
    assert _welcome().pack_codes(codes) == bytes([1, 0, 3, 0, 5, 1, 2, 0, 4, 0, 6, 0])
    assert _welcome("uint32").pack_codes(codes[:, :1]) == bytes([1, 0, 0, 0, 3, 0, 0, 0, 5, 1, 0, 0])
    audio = np.array([[0.5, -1.0], [2.0, -2.0]], np.float32)
    assert _welcome(num_channels=2).pack_audio(audio) == bytes([0, 0x40, 0xFF, 0x7F, 0, 0x80, 0, 0x80])
    assert _welcome(sample_format="float32").pack_audio(np.array([[1.0]])) == bytes([0, 0, 0x80, 0x3F])


@given(num_channels=st.integers(1, 3), samples=st.lists(st.integers(-32768, 32767), max_size=9))
def test_samples_come_back(num_channels: int, samples: list[int]) -> None:
    audio = np.array(samples * num_channels, np.int16).reshape(num_channels, -1)
    pcm, floats = _welcome(num_channels=num_channels), _welcome(num_channels=num_channels, sample_format="float32")
    assert np.array_equal(pcm.unpack_audio(pcm.pack_audio(audio)), audio)
    as_floats = floats.unpack_audio(floats.pack_audio(audio))
    assert as_floats.dtype == np.float32
    assert np.array_equal(as_floats * 32768, audio)
    assert pcm.pack_audio(as_floats) == pcm.pack_audio(audio)


def test_openings_and_welcomes_come_back() -> None:
    for opening in (Opening("encode"), Opening("decode", "tiny", 2, (1, 2), "float32")):
        assert Opening.from_text(opening.to_text()) == opening
    welcome = _welcome()
    said = asdict(welcome) | {"codebook_sizes": list(welcome.codebook_sizes), "valid_num_quantizers": [1, 2, 3]}
    assert Welcome.from_object(said | {"more": 1}) == welcome
    with pytest.raises(ValueError, match="its answer lacks hop_length"):
        Welcome.from_object({name: value for name, value in said.items() if name != "hop_length"})


@given(
    text=st.text(max_size=40) | st.sampled_from(["{}", "null", "[]", '{"end": 1}', '{"end": "true"}', '{"lost": true}'])
)
def test_other_texts_steer_nothing(text: str) -> None:
    for read in (Control.from_text, Opening.from_text):
        with pytest.raises(SessionError) as refusal:
            read(text)
        assert len(str(refusal.value).splitlines()) == 1


@given(reason=st.text(min_size=1, max_size=200))
def test_reasons_fit_into_a_close_frame(reason: str) -> None:
    short = close_reason(reason)
    assert len(short.encode()) <= MAX_REASON_BYTES
    assert reason.startswith(short)
    assert short == reason or len(short.encode()) > MAX_REASON_BYTES - 4
