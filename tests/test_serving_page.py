"""The page of `codec serve` in a real browser, which hears a microphone of its own that beeps."""

import re
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright
from servers import serving

from codec.serving.server import CodecServer
from codec.testing import speech_like, tiny_codec

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
# Frames of 20 ms and few weights: hundreds of times faster than real time, also beside a browser.
CODEC = tiny_codec(patch_samples=40, strides=(2, 4))
CODEC.name = "tiny@1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page on which nothing fails unseen."""
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(20_000)
    mistakes: list[str] = []
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    page.on("console", lambda message: mistakes.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: mistakes.append(request.url) if "127.0.0.1" not in request.url else None)
    yield page
    context.close()
    assert not [mistake for mistake in mistakes if mistake != "data:," and "ERR_CONNECTION_REFUSED" not in mistake]


@pytest.fixture(scope="module")
def server() -> Iterator[CodecServer]:
    with serving(CODEC, max_sessions=2) as running:
        yield running


def opened(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("#status")).to_have_text("Ready.")


def status(page: Page, text: str) -> None:
    expect(page.locator("#status")).to_contain_text(text, timeout=20_000)


def number(page: Page, name: str) -> float:
    found = re.search(r"[\d.]+", page.inner_text(f"#{name}"))
    assert found, name
    return float(found[0])


def saved(page: Page, folder: Path) -> np.ndarray:
    """What was decoded, as the visitor would save it."""
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(folder / "decoded.wav")
    with wave.open(str(folder / "decoded.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (CODEC.sample_rate_hz, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def is_drawn(page: Page, canvas: str) -> bool:
    """Whether a picture shows more than one colour."""
    return bool(
        page.evaluate(
            """name => {
              const canvas = document.getElementById(name);
              const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
              return new Set(new Uint32Array(data.buffer)).size > 4;
            }""",
            canvas,
        )
    )


def test_who_speaks_hears_the_decoded_voice(page: Page, server: CodecServer, tmp_path: Path) -> None:
    opened(page, server.address)
    assert "tiny@1" in page.inner_text("#model")
    page.click("#speak")
    status(page, "Speak")
    level = page.locator("#level")
    for _ in range(100):  # the beep comes once a second
        if float(level.evaluate("meter => meter.value")) > 0.005 and number(page, "heard") > 1:
            break
        page.wait_for_timeout(50)
    else:
        pytest.fail("nothing but silence was played")
    assert 5 < number(page, "latency") < 2000
    assert number(page, "bitrate") == pytest.approx(CODEC.bitrate_bps() / 1000, abs=0.01)
    for canvas in ("original", "codes", "decoded"):
        assert is_drawn(page, canvas), canvas
    page.click("#speak")
    status(page, "Done")
    heard = saved(page, tmp_path)
    assert len(heard) > CODEC.sample_rate_hz
    assert np.abs(heard).max() > 100
    assert not server.service.sessions


def test_a_recording_is_heard_as_the_codec_decodes_it(page: Page, server: CodecServer, tmp_path: Path) -> None:
    samples = np.round(speech_like(2 * CODEC.sample_rate_hz) * 32767).astype("<i2")
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setparams((1, 2, CODEC.sample_rate_hz, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    opened(page, server.address)
    page.locator("#rows").fill("1")
    assert page.inner_text("#chosen").startswith("2 of 3")
    page.set_input_files("#file", tmp_path / "speech.wav")
    status(page, "Playing speech.wav")
    status(page, "Done")
    assert number(page, "heard") == pytest.approx(2, abs=0.1)
    assert number(page, "bitrate") == pytest.approx(CODEC.bitrate_bps(2) / 1000, abs=0.01)
    tokens = CODEC.encode(torch.from_numpy(samples / np.float32(32768))[None, None], num_quantizers=2)
    expected = np.round(CODEC.decode(tokens)[0, 0].numpy() * 32768)
    heard = saved(page, tmp_path)
    assert len(heard) == len(expected) == len(samples)
    assert np.abs(heard - expected).max() <= 1  # the browser reads and writes WAV by way of floats
    page.click("#play-decoded")
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no sound"})
    status(page, "no audio that the browser knows")


def test_refusals_and_lost_connections_are_told(browser: Browser, page: Page) -> None:
    with serving(CODEC, max_sessions=1) as server:
        opened(page, server.address)
        page.click("#speak")
        status(page, "Speak")
        other = browser.new_context().new_page()
        opened(other, server.address)
        other.click("#speak")
        status(other, "The server is full: all 1 sessions are taken")
        assert other.inner_text("#speak") == "Speak"
        other.close()
        status(page, "Speak")
    status(page, "The server shuts down")
    page.click("#speak")
    status(page, "The connection was lost")


def test_a_token_is_asked_for_and_used(page: Page) -> None:
    with serving(CODEC, token="open sesame") as server:
        opened(page, server.address)
        assert page.locator("#token-form").is_hidden()
        page.click("#speak")
        status(page, "wants a token")
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        page.click("#speak")
        status(page, "The token is wrong")
        page.fill("#token", "open sesame")
        page.press("#token", "Enter")
        page.click("#speak")
        status(page, "Speak:")
        assert page.locator("#token-form").is_hidden()
        page.click("#speak")
        status(page, "Done")
        page.goto("about:blank")
        opened(page, server.address + "/#token=open+sesame")
        page.click("#speak")
        status(page, "Speak:")
