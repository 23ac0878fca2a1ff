"""Make the pictures in docs/images/ from a real run: `python docs/make_images.py RUN`, or `--site build/site`.

    site-light.png                          the first page of the site that `make site` built
    report-{wide,phone}-{light,dark}.png    report.html in headless Chromium, at 1280 and 390 columns of pixels
    browser.svg                             `mel-lite experiences browse`

Needs the packages of the `dev` extra and Chromium. Pictures of the terminal are drawn by benchmarks/run_picture.py.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mel_lite.lessons.store import FILE_NAME, ExperienceRow, ExperienceStore
from mel_lite.report.browser import Browser
from mel_lite.report.page import MOST_STRIPS, write_report
from mel_lite.types import Status

IMAGES = Path(__file__).resolve().parent / "images"
SIZES = {"wide": (1280, 860), "phone": (390, 780)}
SHADES = 256
"""Colors of a PNG."""
TERMINAL = (120, 38)
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def shown_lesson(run: Path) -> int:
    """Return the id of the kept meta-experience whose token credit is largest; of the newest one without any."""
    with ExperienceStore(run / FILE_NAME, read_only=True) as store:
        rows = store.list(status=Status.KEPT) or store.list()
        sizes = {row.id: [*_largest_shifts(store, row), 0.0, 0.0] for row in rows[-MOST_STRIPS:]}
    return max(sizes, key=lambda id_: (sizes[id_][:2], id_))


def _largest_shifts(store: ExperienceStore, row: ExperienceRow) -> list[float]:
    """Return the largest change of a token's log-prob in each rollout of a pair that was read, largest first."""
    credit = store.credit(row.step, (row.wrong_index, row.right_index))
    return sorted((max(map(abs, each.shift_nats)) for each in credit), reverse=True)


def draw_report(run: Path, lesson: int) -> None:
    """Write the pictures of the report: its top in one color scheme, and a lesson in the other."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = write_report(run, Path(folder) / "report.html")
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for name, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(page_file.as_uri())
                if (name == "wide") == (scheme == "dark"):
                    show_lesson(page, lesson)
                save(page.screenshot(), IMAGES / f"report-{name}-{scheme}.png")
                page.close()
        chromium.close()


def draw_site(site: Path) -> None:
    """Write the picture of the first page of a built site."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    width, height = SIZES["wide"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        page.goto((site / "index.html").resolve().as_uri())
        save(page.screenshot(), IMAGES / "site-light.png")
        chromium.close()


def show_lesson(page: Any, lesson: int) -> None:
    """Open a lesson of the page and scroll to it."""
    found = page.locator(".lesson", has=page.locator(".id", has_text=f"#{lesson}, "))
    found.locator("summary").first.click()
    found.evaluate("(each) => each.scrollIntoView()")


def save(png: bytes, path: Path) -> None:
    """Write a picture with `SHADES` colors."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(SHADES, dither=Image.Dither.NONE).save(path, optimize=True)


async def draw_browser(run: Path, lesson: int) -> None:
    """Write the picture of the terminal browser on a lesson."""
    browser = Browser(run)
    async with browser.run_test(size=TERMINAL) as pilot:
        await pilot.press("v")
        await pilot.press(*["down"] * browser.place_of(lesson))
        await pilot.pause()
        IMAGES.joinpath("browser.svg").write_text(FONTS.sub("", browser.export_screenshot()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run")
    parser.add_argument("--site", type=Path, help="folder of the built site")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    if arguments.site is not None:
        draw_site(arguments.site)
    if arguments.run is not None:
        draw_run(arguments.run)


def draw_run(run: Path) -> None:
    """Write the pictures of a run."""
    lesson = shown_lesson(run)
    draw_report(run, lesson)
    asyncio.run(draw_browser(run, lesson))


if __name__ == "__main__":
    main()
