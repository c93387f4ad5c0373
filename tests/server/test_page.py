"""The page, in a real browser: Debian's Chromium, driven through chromedriver."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import Live, until

from quasar.server.app import PAGE
from quasar.server.service import ServerOptions

needs_browser = pytest.mark.skipif(
    shutil.which("chromedriver") is None or shutil.which("chromium") is None,
    reason="no chromium and chromedriver here (apt-get install chromium chromium-driver)",
)


class Browser:
    """WebDriver in a few lines."""

    def __init__(self, port: int, width: int = 900, height: int = 700) -> None:
        self._at = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"]
        wish = {"alwaysMatch": {"goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")}}}
        self._at += "/" + self._call("POST", "", {"capabilities": wish})["sessionId"]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._at + path, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def reload(self) -> None:
        self._call("POST", "/refresh")

    def run(self, script: str) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def type(self, selector: str, text: str) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{next(iter(found.values()))}/value", {"text": text})

    def text(self, selector: str) -> str:
        return self.run(f"return [...document.querySelectorAll({selector!r})].map(e => e.textContent).join('|')")

    def picture(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))

    def log(self) -> list[Any]:
        return self._call("POST", "/se/log", {"type": "browser"})

    def close(self) -> None:
        self._call("DELETE", "")


@pytest.fixture(scope="module")
def driver() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
        except OSError:
            return False

    until(answers, 30)
    yield port
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def browser(driver: int) -> Iterator[Browser]:
    browser = Browser(driver)
    yield browser
    browser.close()


def answered(browser: Browser, count: int) -> None:
    until(lambda: browser.run("return document.body.dataset.answers") == str(count), 60)


@needs_browser
def test_streaming_colours_stop_reload_and_errors(
    browser: Browser, script: Callable[..., Live], tmp_path: Path
) -> None:
    said = "Because of Rayleigh scattering. " * 4
    server = script(f"<think>\nLight. Air.\n</think>\n\n{said}", batch=4, pause=0.02)
    browser.open(server.url)
    browser.run("localStorage.clear(); sessionStorage.clear()")
    browser.reload()
    until(lambda: "tiny-qwen3" in browser.text("#model"))
    browser.type("#prompt", "Why is the sky blue?\ue007")
    until(lambda: "Rayleigh" in browser.text(".assistant"))
    partly = browser.text(".assistant")
    answered(browser, 1)
    assert len(partly) < len(browser.text(".assistant")), "it came in pieces"
    assert browser.text(".user") == "Why is the sky blue?"
    assert said.strip() in browser.text(".assistant > div:not(.thinking)")
    assert browser.text(".thinking div") == "Light. Air."
    assert browser.run("return document.querySelector('.thinking').open") is False
    assert float(browser.text("#length")) > 1.5
    assert float(browser.text("#speed")) > 0
    # What a person sees: two colours of tokens, other than the page's own.
    colours = browser.run(
        "return ['.assistant .drafted', '.assistant .own', '.assistant'].map("
        "s => getComputedStyle(document.querySelector(s)).backgroundColor)"
    )
    assert len(set(colours)) == 3
    picture = browser.picture()
    (tmp_path / "page.png").write_bytes(picture)
    assert shares_of(picture, colours[:2]) > 0.005
    # A reload keeps the chat.
    browser.reload()
    until(lambda: said.strip() in browser.text(".assistant"))
    # Stop frees the sequence.
    server.engine.hold = 12
    browser.type("#prompt", "Again?\ue007")
    until(lambda: len(server.engine.handles) == 2 and server.engine.handles[1].passes_done > 1)
    assert browser.run("return document.querySelector('#send').hidden") is True
    browser.type("#prompt", "\ue00c")  # Escape
    until(lambda: server.engine.handles[1].over)
    assert server.engine.handles[1].cancelled
    until(lambda: "stopped" in browser.text(".note"))
    # The stopped turn is part of the next prompt.
    prompt = server.engine.handles[1].prompt
    assert "Rayleigh" in server.model.tokenizer.decode(prompt)
    # An error is said.
    browser.run("document.querySelector('#temperature').value = 7")
    browser.type("#prompt", "Wrong\ue007")
    until(lambda: "temperature" in browser.text("[role=alert]"))
    assert [entry["message"] for entry in browser.log() if "400" not in entry["message"]] == []


@needs_browser
def test_a_key_is_asked_for_and_a_phone_is_wide_enough(driver: int, script: Callable[..., Live]) -> None:
    server = script("Yes. " * 60, ServerOptions(api_key="secret"), batch=5)
    phone = Browser(driver, 500, 800)
    try:
        phone.open(server.url)
        until(lambda: "key" in phone.text("#model"))
        phone.type("#prompt", "Hi\ue007")
        until(lambda: "API key" in phone.text("[role=alert]"))
        phone.type("#key", "secret\ue004")
        until(lambda: "tiny-qwen3" in phone.text("#model"))
        phone.run("document.querySelector('#settings').open = false")
        phone.type("#prompt", "Hi\ue007")
        answered(phone, 2)
        assert "Yes." in phone.text(".assistant")
        assert phone.run("return document.documentElement.scrollWidth <= window.innerWidth") is True
    finally:
        phone.close()


@needs_browser
def test_the_real_engine_behind_the_page(browser: Browser, live: Live) -> None:
    browser.open(live.url)
    browser.run("sessionStorage.clear(); document.querySelector('#max_tokens').value = 24")
    browser.type("#prompt", "def read(path):\ue007")
    answered(browser, 1)
    assert "24 tokens in" in browser.text(".note")
    assert float(browser.text("#bytes")) > 0


def test_the_policy_allows_only_the_pages_own_script(live: Live) -> None:
    status, headers, body = live.request("GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert body == PAGE.read_bytes()
    text = body.decode()
    assert not re.search(r"https?://|innerHTML|\bon\w+=\"|style=\"", text)


def shares_of(png: bytes, colours: list[str]) -> float:
    """The smaller share of the picture's pixels that have one of two colours."""
    pixels, total = pixels_of(png)
    shares = []
    for colour in colours:
        red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
        shares.append(pixels.get((red, green, blue), 0) / total)
    return min(shares)


def pixels_of(png: bytes) -> tuple[dict[tuple[int, int, int], int], int]:
    """How often each colour occurs: 8 bits a channel, not interlaced, as Chromium writes."""
    import struct
    import zlib
    from collections import Counter

    at, data, width, height, channels = 8, b"", 0, 0, 0
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        chunk = png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", chunk[:10])
            assert depth == 8
            channels = {2: 3, 6: 4}[colour]
        if kind == b"IDAT":
            data += chunk
        at += 12 + length
    raw, step = zlib.decompress(data), width * channels
    counts: Counter[tuple[int, int, int]] = Counter()
    above = bytearray(step)
    for row in range(height):
        kind, line = raw[row * (step + 1)], bytearray(raw[row * (step + 1) + 1 : (row + 1) * (step + 1)])
        for i in range(step):
            left = line[i - channels] if i >= channels else 0
            up, corner = above[i], above[i - channels] if i >= channels else 0
            if kind == 1:
                line[i] = (line[i] + left) & 255
            elif kind == 2:
                line[i] = (line[i] + up) & 255
            elif kind == 3:
                line[i] = (line[i] + (left + up) // 2) & 255
            elif kind == 4:
                guess = left + up - corner
                near = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))
                line[i] = (line[i] + near[2]) & 255
        above = line
        counts.update(zip(line[0::channels], line[1::channels], line[2::channels], strict=True))
    return dict(counts), width * height


def test_pictures_are_read_right() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"\x00" + bytes([9, 8, 7] * 2) + b"\x02" + bytes([0, 0, 0, 1, 1, 1])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert pixels_of(png) == ({(9, 8, 7): 3, (10, 9, 8): 1}, 4)
