"""The web page in a browser, used as a visitor does; one server and one browser for all tests."""

import base64
import contextlib
import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.commands import python

SLOW_SEED, FAILING_SEED = 13, 14
SLOW_SECONDS = 2.0  # before each map of an image with this seed
# The command, with a seed whose images take long, with a log line for each of their maps, and one that fails.
SERVER = f"""
import runpy, time
from var_jax import api

stream = api.LoadedVAR.stream

def slow_stream(self, labels=None, seed=0, known=None, **options):
    if seed == {FAILING_SEED}:
        raise RuntimeError("the cosmic ray")
    for k, item in enumerate(stream(self, labels, seed, known, **options)):
        if seed == {SLOW_SEED}:
            print("slow map", k, flush=True)
            yield item
            time.sleep({SLOW_SECONDS})
        else:
            yield item

api.LoadedVAR.stream = slow_stream
runpy.run_module("var_jax.app", run_name="__main__", alter_sys=True)
"""
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds, for a condition on a busy machine


@pytest.fixture(scope="module")
def chromium() -> str:
    """Path of Chromium; skip without it, or fail if VAR_JAX_REQUIRE_BROWSER is set."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    if path is None or missing:
        message = f"the page needs {', '.join(missing) or 'Chromium (apt-get install chromium)'}"
        if os.environ.get("VAR_JAX_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    return path


@contextlib.contextmanager
def serving(log: Path, *flags: str):
    """Run the page while the context is open; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (*flags, f"--port={port}")
    with open(log, "w") as file:
        process = subprocess.Popen(
            **python("-c", SERVER, *flags), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    wait_for(lambda: "The page is at" in log.read_text() or process.poll() is not None, seconds=300)
    assert process.poll() is None, log.read_text()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 0, log.read_text()


@pytest.fixture(scope="module")
def server(chromium, tiny_run, tmp_path_factory):
    """Address of a running page, and its log."""
    log = tmp_path_factory.mktemp("app") / "log"
    flags = (f"--workdir={tiny_run}", f"--compare={tiny_run}", "--max_upload_mb=0.1")
    with serving(log, *flags) as url:
        yield url, log
    errors = re.findall(r"^\w+Error: .*$", log.read_text(), re.M)
    assert set(errors) <= {"RuntimeError: the cosmic ray"}, log.read_text()


@pytest.fixture(scope="module")
def browser(chromium):
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page of a new visitor; it may load nothing from elsewhere, and no script may fail."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    requests, errors = [], []
    context.on("request", lambda request: requests.append(request.url))
    page = open_page(context, server[0])
    page.on("pageerror", lambda error: errors.append(error))
    yield page
    context.close()
    assert not errors
    assert all(url.startswith((server[0], "data:", "blob:")) for url in requests), requests


def open_page(context, url: str):
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    return page


def wait_for(condition, seconds: float = 120.0) -> None:
    """Wait until a condition outside of the browser holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.05)


def sources(page, area: str, count: int, other_than: list[str] | None = None) -> list[str]:
    """Data URLs of the images of an area, once it has as many, and others than before."""
    page.wait_for_function(
        """([area, count, old]) => {
          const urls = [...document.querySelectorAll(`#${area} img`)].map((image) => image.src);
          return urls.length === count && String(urls) !== String(old);
        }""",
        arg=[area, count, other_than],
    )
    return page.locator(f"#{area} img").evaluate_all("images => images.map((image) => image.src)")


def pixels(source: str) -> np.ndarray:
    """Pixels int [H, W, 3] of a data URL."""
    data = base64.b64decode(source.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def choose(page, field: str, option: str) -> None:
    page.get_by_label(field, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=option, exact=True).click()


def slide(page, name: str, key: str) -> None:
    page.get_by_role("slider", name=name).locator("visible=true").press(key)


def generate(page) -> list[str]:
    """Draw four images; return the data URLs, once the first is the current image."""
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator("#current img").wait_for()
    return sources(page, "generated", 4)


def finish(page, area: str) -> None:
    """Wait until the images of an area are drawn."""
    page.locator(f"#{area}").get_by_text("After map 3 of 3").wait_for()


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def message(page) -> str:
    """Text of the notice that appears, which is closed."""
    notice = page.get_by_test_id("toast-body").first
    text = notice.inner_text()
    page.get_by_test_id("toast-close").first.click()
    notice.wait_for(state="detached")
    return text


def test_a_visitor_generates_images_of_a_class_and_slides_through_their_maps(page):
    choose(page, "Class", "3")
    final = generate(page)
    assert page.locator("#current span").inner_text() == "3, seed 0, image 1"
    assert sources(page, "current", 1) == final[:1]
    slide(page, "Images after map", "Home")
    coarse = sources(page, "generated", 4, final)
    assert all(a != b for a, b in zip(coarse, final, strict=True))
    slide(page, "Images after map", "End")
    assert sources(page, "generated", 4, coarse) == final
    page.locator("#generated button").nth(2).click()
    page.get_by_text("3, seed 0, image 3").wait_for()
    assert sources(page, "current", 1) == final[2:3]


def test_a_part_painted_with_the_mouse_is_drawn_again(page):
    source = generate(page)[0]
    open_tab(page, "Edit")
    box = page.locator("#painter canvas").bounding_box()
    x, y, cell = box["x"], box["y"], box["width"] / 8
    page.mouse.move(x + 0.5 * cell, y + 5.5 * cell)
    page.mouse.down()
    page.mouse.move(x + 7.5 * cell, y + 5.5 * cell, steps=3)
    page.mouse.up()
    page.get_by_label("Keep the pixels outside the mask exactly").check()
    page.get_by_role("button", name="Draw the painted part again").click()
    finish(page, "edited")
    original, *edits = (pixels(url) for url in sources(page, "edited", 5))
    np.testing.assert_array_equal(original, pixels(source))
    is_changed = np.any([(edit != original).any(axis=-1) for edit in edits], axis=0)
    assert not is_changed[:4].any() and not is_changed[7:].any() and is_changed[5].all()


def test_edits_need_a_mask_and_an_image_and_say_so(page):
    open_tab(page, "Edit")
    page.get_by_role("button", name="Draw the painted part again").click()
    assert "There is no image yet: press Generate, or upload one." in message(page)
    open_tab(page, "Generate")
    generate(page)
    open_tab(page, "Edit")
    page.get_by_role("button", name="Draw the painted part again").click()
    assert "Nothing is painted" in message(page)


def test_variations_share_their_first_maps(page):
    generate(page)
    open_tab(page, "Vary")
    page.get_by_role("button", name="Draw variations").click()
    finish(page, "varied")
    fine = sources(page, "varied", 5)
    assert len(set(fine)) > 1
    slide(page, "Images after map", "ArrowLeft")
    _, *coarse = sources(page, "varied", 5, fine)
    assert len(set(coarse)) == 1  # two of three maps are kept


def test_a_clicked_cell_shows_its_attention(page):
    generate(page)
    open_tab(page, "Look inside")
    page.get_by_role("button", name="Look into the current image").click()
    cells = page.locator("#token_maps rect")
    page.locator("#steps img").nth(2).wait_for()
    assert cells.count() == 21 and page.locator("#additions img").count() == 3
    assert re.search(r"21 tokens, \d+ of 16 codes", page.locator("#codebook_use").inner_text())
    cells.nth(3).click()  # of the second map, 2 x 2
    page.locator("#attention rect.chosen").wait_for()
    fills = page.locator("#attention rect").evaluate_all("cells => cells.map((c) => c.getAttribute('fill'))")
    assert [fill == "#e5e7eb" for fill in fills] == [False] * 5 + [True] * 16
    choose(page, "Layer", "2")
    page.wait_for_function(
        """old => [...document.querySelectorAll("#attention rect")].some(
          (cell, i) => cell.getAttribute("fill") !== old[i])""",
        arg=fills,
    )


def test_two_models_agree_with_one_seed_until_their_settings_differ(page):
    open_tab(page, "Compare")
    choose(page, "Right model", "run'")
    page.get_by_role("button", name="Compare", exact=True).click()
    finish(page, "right")
    left, right = sources(page, "left", 4), sources(page, "right", 4)
    assert left == right
    page.get_by_role("button", name="Sampling options of the right side").click()
    page.get_by_role("slider", name="Temperature").locator("visible=true").press("Home")
    page.get_by_role("button", name="Compare", exact=True).click()
    sources(page, "right", 4, right)  # others than before
    finish(page, "right")
    other = sources(page, "right", 4)
    assert sources(page, "left", 4) == left
    assert other != left


def test_uploads_are_cropped_and_a_wrong_one_changes_nothing(page, tmp_path):
    wide = np.full((20, 60, 4), (255, 0, 0, 255), np.uint8)
    wide[:, 20:40] = 0, 0, 0, 0  # the middle is transparent
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "large.png").write_bytes(os.urandom(200_000))
    upload = page.locator("input[type=file]").first
    upload.set_input_files(tmp_path / "wide.png")
    page.get_by_text("uploaded image").wait_for()
    current = sources(page, "current", 1)
    np.testing.assert_array_equal(pixels(current[0]), np.full((8, 8, 3), 255))
    upload.set_input_files(tmp_path / "text.png")
    assert "This file cannot be used: not an image of a known kind" in message(page)
    upload.set_input_files(tmp_path / "large.png")
    assert "maximum" in message(page)
    assert sources(page, "current", 1) == current


def test_an_error_of_the_program_is_said_in_a_sentence_and_logged(server, page):
    page.get_by_label("Seed", exact=True).fill(str(FAILING_SEED))
    page.get_by_role("button", name="Generate", exact=True).click()
    assert "an error in the program. The log of the server has the details." in message(page)
    assert "RuntimeError: the cosmic ray" in server[1].read_text()


def test_a_visitor_who_leaves_in_mid_stream_frees_the_device(server, browser, page):
    context = browser.new_context()
    leaving = open_page(context, server[0])
    leaving.get_by_label("Seed", exact=True).fill(str(SLOW_SEED))
    leaving.get_by_role("button", name="Generate", exact=True).click()
    leaving.locator("#generated img").first.wait_for()
    context.close()
    generate(page)  # waits until the device is free
    maps = re.findall(r"slow map (\d)", server[1].read_text())
    assert maps[0] == "0" and len(maps) < 3, maps


def test_files_of_the_server_are_not_served(server, tiny_run):
    config = tiny_run / "next_scale" / "config.json"
    assert config.exists()
    for path in (config, "/etc/passwd", "pyproject.toml"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server[0]}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_a_visitor_asks_for_a_shape_in_words(browser, tmp_path):
    with serving(tmp_path / "log", "--workdir=shapes") as url, browser.new_context() as context:
        page = open_page(context, url)
        prompt = page.get_by_label("Prompt; empty for none")
        prompt.fill("a red disc on elephants")
        page.get_by_role("button", name="Generate", exact=True).click()
        assert "has the word 'elephants'" in message(page)
        prompt.fill("a red disc on blue")
        page.get_by_role("slider", name="Number of images").press("Home")
        page.get_by_role("button", name="Generate", exact=True).click()
        page.get_by_text("a red disc on blue, seed 0").wait_for()
        (source,) = sources(page, "current", 1)
        assert np.median(pixels(source)[0], axis=0).argmax() == 2  # the border is blue
