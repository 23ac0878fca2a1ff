"""The report in a real browser: layout on a phone and on a desk, search, colors, no console error, hostile text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from browser import chromium
from mel_lite.report.page import write_report
from run_folders import HOSTILE, make_run

pytestmark = pytest.mark.slow

WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with 40 lessons, the first of them hostile, on the page of a finished run."""
    folder = tmp_path_factory.mktemp("report") / "run"
    make_run(folder, steps=60, lessons=40, hostile=True, before=[0, 1, 2, 3] * 5, after=[1, 2, 3, 4] * 5,
             credit=True)  # fmt: skip
    return write_report(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@contextmanager
def opened(browser: Any, file: Path, width: int = 1280, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """The page, and everything that it writes to the console or requests."""
    context = browser.new_context(viewport={"width": width, "height": 850}, **options)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    try:
        yield page, said
    finally:
        context.close()


def box(page: Any, selector: str, nth: int = 0) -> dict[str, float]:
    found: dict[str, float] = page.locator(selector).nth(nth).bounding_box()
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_the_screen_and_loads_nothing(browser: Any, page_file: Path, width: int) -> None:
    with opened(browser, page_file, width) as (page, said):
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") == width, "no sideways scrolling"
        too_wide = page.evaluate(
            """(width) => [...document.querySelectorAll('main *')]
            .filter((each) => !each.closest('svg, .scroll') && each.getBoundingClientRect().right > width + 1)
            .map((each) => each.outerHTML.slice(0, 80))""",
            width,
        )
        assert too_wide == []
        charts = [box(page, "figure", i) for i in range(3)]
        assert all(chart["width"] > 300 and chart["height"] > 150 for chart in charts)
        side_by_side = charts[0]["y"] == charts[1]["y"] == charts[2]["y"]
        assert side_by_side == (width == 1280)
        smallest = page.evaluate(
            """Math.min(...[...document.querySelectorAll('figure svg text')]
            .map((each) => each.getBoundingClientRect().height))"""
        )
        assert smallest > 9, "chart labels can be read"
        wrong, right = box(page, ".lesson .pair section", 0), box(page, ".lesson .pair section", 1)
        if width == 1280:
            assert wrong["y"] == right["y"] and wrong["x"] + wrong["width"] <= right["x"]
        else:
            assert wrong["x"] == right["x"] and wrong["y"] + wrong["height"] <= right["y"] + 1
        assert said == []


def test_search_and_filters_show_what_they_say(browser: Any, page_file: Path) -> None:
    with opened(browser, page_file) as (page, said):
        shown = lambda: page.locator(".lesson:visible").count()  # noqa: E731
        assert shown() == 40 and page.locator("#count").inner_text() == "40 of 40 shown"
        page.fill("#search", "DOWN rule-8:")
        assert shown() == 1 and page.locator("#count").inner_text() == "1 of 40 shown"
        assert "#9, step 9" in page.locator(".lesson:visible").inner_text()
        page.fill("#search", "nothing has these words")
        assert shown() == 0
        page.fill("#search", "")
        page.uncheck("input[value=kept]")
        assert shown() == 30
        page.uncheck("input[value=replay_failed]")
        page.fill("#search", "analysis as sampled")
        assert shown() == 10, "the unparsed ones"
        assert said == []


def test_what_a_model_wrote_is_shown_and_not_run(browser: Any, page_file: Path) -> None:
    with opened(browser, page_file) as (page, said):
        lesson = page.locator(".lesson").last
        lesson.locator("summary").first.click()
        assert "<script>document.title='owned'</script>" in lesson.inner_text()
        assert "{{ 7*7 }} javascript:alert(1)" in lesson.inner_text()
        assert page.locator("img").count() == 0 and page.locator("body script").count() == 1
        assert page.title() == "MEL-Lite: run" and said == []
        assert HOSTILE.count("owned") == 2


def test_the_fork_and_the_quote_are_marked(browser: Any, page_file: Path) -> None:
    with opened(browser, page_file) as (page, _):
        lesson = page.locator(".lesson[data-status=kept]").first
        lesson.locator("summary").first.click()
        assert lesson.locator(".pair .fork").all_inner_texts() == ["Then, 11 - 2 = 8", ".", "Then, 11 - 2 = 9."]
        assert lesson.locator(".pair .quoted").all_inner_texts() == ["Then, 11 - 2 = 8"]
        assert lesson.locator(".part").count() == 2
        colors = [
            lesson.locator(each).first.evaluate("(e) => getComputedStyle(e).backgroundColor")
            for each in (".pair .fork", ".pair .same")
        ]
        assert colors[0] != colors[1]


def contrast(page: Any, selector: str) -> float:
    """WCAG contrast of an element's text with the backgrounds behind it, painted over each other."""
    return float(
        page.locator(selector).first.evaluate(
            """(element) => {
            const light = (c) => [...c].slice(0, 3).map((v) => v / 255)
              .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
              .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const over = (color) => {
              paint.fillStyle = color;
              paint.fillRect(0, 0, 1, 1);
              return light(paint.getImageData(0, 0, 1, 1).data);
            };
            const layers = [];
            for (let each = element; each; each = each.parentElement)
              layers.unshift(getComputedStyle(each).backgroundColor);
            const behind = layers.map(over).at(-1);
            const style = getComputedStyle(element);
            const front = over(element.namespaceURI.includes('svg') ? style.fill : style.color);
            return (Math.max(front, behind) + 0.05) / (Math.min(front, behind) + 0.05);
            }"""
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_in_light_and_dark(browser: Any, page_file: Path, scheme: str) -> None:
    with opened(browser, page_file, color_scheme=scheme) as (page, said):
        page.locator(".lesson[data-status=kept] summary").first.click()
        body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, body[4:-1].split(","))) < 200) == (scheme == "dark")
        for selector in ("h1", ".small", ".meaning", "figure svg text", "td", ".tag.kept", ".lesson pre", ".same"):
            assert contrast(page, selector) >= 4.5, selector
        assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_token_credit_is_a_heat_strip_with_numbers(browser: Any, page_file: Path, scheme: str) -> None:
    with opened(browser, page_file, color_scheme=scheme) as (page, said):
        lesson = page.locator(".lesson[data-status=kept]").first
        lesson.locator("summary").first.click()
        assert lesson.locator(".strip").count() == 2
        tokens = lesson.locator(".strip").first.locator(".heat")
        assert [token.split("<")[0] for token in tokens.all_text_contents()] == [
            "First", ",", " 3", " +", " 8", " =", " 11", ".", "\n", "",
        ]  # fmt: skip
        assert "<script>document.title='owned'</script>" in tokens.last.inner_text()
        assert tokens.nth(5).get_attribute("title") == "+4.00 nats, advantage \u00d7 2.00"
        marks = [f"{sign}{level}" for sign in ("up", "down") for level in (1, 2, 3, 4)]
        looks = [
            lesson.locator(f".strip .{mark}").first.evaluate(
                "(e) => [getComputedStyle(e).backgroundColor, getComputedStyle(e).borderBottomStyle].join()"
            )
            for mark in marks
        ]
        assert len(set(looks)) == 8 and [look.split(",")[-1] for look in looks] == ["solid"] * 4 + ["dotted"] * 4
        for mark in marks:
            assert contrast(page, f".lesson[open] .strip .{mark}") >= 4.5, mark
        numbers = lesson.locator(".numbers").first
        assert not numbers.locator("table").is_visible()
        numbers.locator("summary").click()
        cells = [row.locator("th, td").all_inner_texts() for row in numbers.locator("tbody tr").all()]
        assert cells[0] == ["=", "6", "+4.00 nats", "advantage \u00d7 2.00"] and len(cells) == 10
        assert page.title() == "MEL-Lite: run" and said == []


def test_without_javascript_everything_is_there(browser: Any, page_file: Path) -> None:
    with opened(browser, page_file, java_script_enabled=False) as (page, said):
        assert page.locator(".lesson").count() == 40 and page.locator("svg").count() > 10
        assert not page.locator("#search").is_visible()
        assert "need JavaScript" in page.locator("noscript").inner_text()
        page.locator(".lesson summary").first.click()
        assert page.locator(".lesson .pair").first.is_visible() and said == []
