"""The page of the server in a real browser: Debian's chromium, driven by playwright."""

import base64
import contextlib
import io
import shutil
import time

import numpy as np
import PIL.Image
import pytest
from serving import served

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def cola():
    with served.serving("cola") as found:
        yield found


@pytest.fixture
def page(cola):
    with opened(cola) as found:
        yield found


@contextlib.contextmanager
def opened(serving):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.goto(serving.url)
        page.wait_for_function(f"document.getElementById('model').textContent === '{serving.name}'")
        page.problems = problems
        yield page
        browser.close()


def settled(page) -> str:
    page.wait_for_function("/tokens in/.test(document.getElementById('status').textContent)")
    return page.inner_text("#status")


def ask(page, text, seed="3", tokens="9", pace="20"):
    for name, value in (("prompt", text), ("seed", seed), ("max_tokens", tokens), ("pace", pace)):
        page.fill(f"#{name}", value)


def completion(cola, **fields):
    import httpx

    body = {"model": cola.name, "max_tokens": 9, "seed": 3} | fields
    return httpx.post(f"{cola.url}/v1/completions", json=body).json()["choices"][0]["text"]


def test_a_person_types_and_sees_blocks_settle(page, cola):
    ask(page, "mia was", tokens="20")
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
        const span = document.querySelector('.settling'); if (span) window.seen.push(span.textContent);
        }).observe(document.getElementById('text'), { childList: true }); }"""
    )
    page.click("#go")
    assert "20 tokens in" in settled(page) or "end of text" in settled(page)
    text = completion(cola, prompt="mia was", max_tokens=20)
    assert page.text_content("#text .new") == text and page.text_content("#text .given") == "mia was"
    assert len(page.evaluate("window.seen")) >= 4 and page.is_disabled("#stop") and not page.problems


def test_a_gap_is_filled_between_what_was_typed(page, cola):
    ask(page, "mia was[[5]] tom")
    page.click("#fill")
    settled(page)
    filled = completion(cola, prompt="mia was", suffix=" tom", max_tokens=5)
    assert page.text_content("#text") == f"mia was{filled} tom" and not page.problems
    ask(page, "no gap here")
    page.click("#fill")
    assert "write [[N]] where the gap" in page.inner_text("#status")


def test_stop_ends_it_and_frees_the_place(page, cola):
    lane = cola.started.batcher._lanes[0][0]
    step = lane.step
    lane.step = lambda: (time.sleep(0.3), step())[1]
    try:
        ask(page, "tom", tokens="25")
        page.click("#go")
        page.wait_for_selector("#stop:not([disabled])")
        page.click("#stop")
        page.wait_for_function("document.getElementById('status').textContent === 'stopped'")
        deadline = time.time() + 10
        while cola.started.batcher.busy and time.time() < deadline:
            time.sleep(0.02)
        assert not cola.started.batcher.busy and page.is_disabled("#stop")
    finally:
        del lane.step


def test_an_error_is_shown_in_words(page):
    ask(page, "a" * 60)
    page.click("#go")
    page.wait_for_selector("#status.bad")
    assert "prompt 0 has 60 tokens: must be at most 27" in page.inner_text("#status")


def test_what_is_typed_is_never_markup(page):
    ask(page, "<img src=x onerror=window.hit=1>")
    page.click("#go")
    page.wait_for_function("document.getElementById('status').textContent !== 'waiting'")
    assert page.evaluate("window.hit === undefined && !document.querySelector('#text img')")


def test_a_family_without_images_offers_none(page):
    assert page.is_visible("#fill") and page.is_hidden("#draw") and page.is_hidden("#image")


def test_a_person_draws_an_image_and_has_one_described(tmp_path):
    file, buffer = tmp_path / "picture.png", io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(buffer, "PNG")
    file.write_bytes(buffer.getvalue())
    with served.serving("unified") as unified, opened(unified) as page:
        ask(page, "a cat")
        page.click("#draw")
        page.wait_for_function("document.getElementById('status').textContent === 'drawn, seed 3'")
        assert page.evaluate("document.querySelector('#text img').naturalWidth") == 16
        ask(page, "tell me")
        page.set_input_files("#image", file)
        page.click("#go")
        settled(page)
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "text", "text": "tell me"}, {"type": "image_url", "image_url": {"url": url}}]
        assert page.text_content("#text") == described(unified, content) and not page.problems


def described(unified, content) -> str:
    import httpx

    body = {"model": unified.name, "max_tokens": 9, "seed": 3, "messages": [{"role": "user", "content": content}]}
    answer = httpx.post(f"{unified.url}/v1/chat/completions", json=body, timeout=60).json()
    return answer["choices"][0]["message"]["content"]
