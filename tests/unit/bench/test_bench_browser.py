"""The report as a reader sees it: in a real browser, laid out and painted."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_browser import Browser, find_browser
from bench_records import rich_record

from bench.report.html import render
from bench.results import analyse

ROOT = Path(__file__).parents[3]
KEPT = sorted((ROOT / "docs" / "results").glob("bench-*.html"))
PROGRAM = find_browser()

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; Debian: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    assert PROGRAM is not None
    return Browser(PROGRAM, tmp_path_factory.mktemp("browser"))


def made_here() -> str:
    result = analyse(rich_record())
    return render(result.record, result.grouped, result.summary, result.verdict, result.paired)


def test_every_chart_is_laid_out_drawn_and_painted(browser: Browser) -> None:
    page = made_here()
    seen = browser.probe(page, 1280)
    assert seen["errors"] == [] and seen["requests"] == [] and seen["overflow_px"] <= 0
    titles = [chart["title"] for chart in seen["charts"]]
    for wanted in (
        "tokens/s",
        "TTFT: share",
        "TPOT: share",
        "TTFT by adapter",
        "x: failed",
        "KV cache",
        "found in the cache",
        "GPU power",
    ):
        assert any(wanted in title for title in titles), (wanted, titles)
    for chart in seen["charts"]:
        assert chart["width"] > 300 and chart["height"] > 100 and chart["marks"] > 0, chart
    picture = browser.screenshot(page, 1280, int(seen["height_px"]))
    for chart, painted in zip(seen["charts"], browser.colours(picture, seen["charts"]), strict=True):
        assert painted["colours"] > 8 and painted["coloured"] > 100, (chart, painted)


def test_a_narrow_window_needs_no_sideways_scrolling(browser: Browser) -> None:
    seen = browser.probe(made_here(), 500)
    assert seen["overflow_px"] <= 0
    assert all(chart["x"] >= 0 and chart["x"] + chart["width"] <= 500 for chart in seen["charts"])


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_the_report_kept_in_the_documentation_is_drawn(browser: Browser, path: Path) -> None:
    seen = browser.probe(path.read_text(), 1280)
    assert seen["errors"] == [] and seen["requests"] == [] and seen["overflow_px"] <= 0
    assert len(seen["charts"]) >= 4 and all(chart["marks"] > 0 for chart in seen["charts"])
