"""Screenshots of the web page for docs/app.md, made by using it in a headless Chromium.

python -m examples.app_screenshots --workdir=runs/digits --out=docs
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from benchmarks.app_load import running_app

CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 400, "height": 1400}


def choose(page: Page, field: str, option: str) -> None:
    """Choose an option of a drop-down field."""
    page.get_by_label(field, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=option, exact=True).click()


def draw(page: Page, button: str, area: str) -> None:
    """Press a button, and wait for the last map."""
    page.get_by_role("button", name=button, exact=True).click()
    page.locator(f"#{area}").get_by_text("After map 5 of 5").wait_for()


def set_number(page: Page, field: str, value: float) -> None:
    """Move a slider to a value."""
    page.get_by_role("slider", name=field).locator("visible=true").fill(str(value))
    expect(page.get_by_role("spinbutton", name=field).locator("visible=true")).to_have_value(str(value))


def paint_lower_half(page: Page) -> None:
    """Paint the lower half of the image with the mouse."""
    page.locator("#painter input").press("End")
    for _ in range(5):
        page.locator("#painter input").press("ArrowLeft")
    box = page.locator("#painter canvas").bounding_box()
    assert box is not None
    for row in (5.0, 7.0):
        page.mouse.move(box["x"] + 2, box["y"] + row * box["height"] / 8)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + row * box["height"] / 8, steps=8)
        page.mouse.up()


def take_screenshots(page: Page, out: Path) -> None:
    """Use every tab, and write a PNG of each."""
    choose(page, "Class", "8")
    set_number(page, "Number of images", 14)
    draw(page, "Generate", "generated")
    page.get_by_text("8, seed 0, image 1").wait_for()
    page.locator("#generated button").nth(9).click()
    page.get_by_text("8, seed 0, image 10").wait_for()
    page.screenshot(path=out / "app_generate.png")

    set_number(page, "Number of images", 8)
    choose(page, "Class", "3")
    page.get_by_role("tab", name="Edit").click()
    paint_lower_half(page)
    draw(page, "Draw the painted part again", "edited")
    page.screenshot(path=out / "app_edit.png", full_page=True)

    choose(page, "Class", "8")
    page.get_by_role("tab", name="Vary").click()
    draw(page, "Draw variations", "varied")
    page.screenshot(path=out / "app_vary.png")

    page.get_by_role("tab", name="Look inside").click()
    page.get_by_role("button", name="Look into the current image").click()
    page.locator("#token_maps rect").nth(20).click()
    page.locator("#attention rect.chosen").wait_for()
    page.screenshot(path=out / "app_inside.png", full_page=True)

    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Sampling options of the right side").click()
    set_number(page, "Temperature", 0.5)
    draw(page, "Compare", "right")
    page.screenshot(path=out / "app_compare.png", full_page=True)

    page.get_by_role("tab", name="Generate").click()
    page.set_viewport_size(NARROW)
    page.screenshot(path=out / "app_narrow.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="run of the digits config")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    with running_app([f"--workdir={args.workdir}"]) as (_, url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport=WIDE)
        page.set_default_timeout(120_000)
        page.goto(url)
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        take_screenshots(page, args.out)
        browser.close()


if __name__ == "__main__":
    main()
