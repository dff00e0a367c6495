"""A page in a real browser: what it laid out, what went wrong, and what its pixels show."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# only what the tests ask is appended; the page itself is as the bench wrote it
_PROBE = """<script>
const seen = {errors: [], requests: performance.getEntriesByType("resource").map(e => e.name)};
addEventListener("error", e => seen.errors.push(String(e.message)));
addEventListener("load", () => {
  const root = document.documentElement;
  seen.overflow_px = root.scrollWidth - root.clientWidth;
  seen.height_px = root.scrollHeight;
  seen.charts = [...document.querySelectorAll("svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const marks = [...svg.querySelectorAll("path[class^=s], circle, path.bad")].filter(mark => {
      const drawn = mark.getBBox();
      return drawn.width + drawn.height > 0;
    });
    return {title: svg.getAttribute("aria-label"), x: box.x, y: box.y, width: box.width, height: box.height,
            marks: marks.length};
  });
  seen.font_px = parseFloat(getComputedStyle(document.body).fontSize);
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
</script>"""
_COLOURS = """<!doctype html><body><script>
const boxes = %s, image = new Image();
image.onload = () => {
  const canvas = document.createElement("canvas");
  canvas.width = image.width; canvas.height = image.height;
  const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
  const counts = boxes.map(box => {
    const {data} = context.getImageData(box.x, box.y, box.width, box.height), colours = {};
    let coloured = 0;
    for (let i = 0; i < data.length; i += 4) {
      colours[(data[i] << 16) | (data[i + 1] << 8) | data[i + 2]] = 1;
      if (Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]) > 60) coloured++;
    }
    return {colours: Object.keys(colours).length, coloured};
  });
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(counts);
  document.body.append(out);
};
image.src = "data:image/png;base64,%s";
</script>"""


def find_browser() -> str | None:
    """A Chromium on this machine."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Browser:
    """A headless Chromium with a profile of its own."""

    def __init__(self, program: str, folder: Path) -> None:
        self._folder = folder
        self._command = [
            *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
            *("--disable-extensions", "--disable-background-networking", "--force-color-profile=srgb"),
            *("--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}"),
        ]

    def probe(self, html: str, width_px: int) -> dict[str, Any]:
        """What the page came to at a window's width."""
        page = self._folder / "probed.html"
        page.write_text(html.replace("</body>", f"{_PROBE}</body>"))
        return dict(self._answer(page, f"--window-size={width_px},900"))

    def screenshot(self, html: str, width_px: int, height_px: int) -> Path:
        """A picture of the page."""
        page, picture = self._folder / "page.html", self._folder / f"page-{width_px}.png"
        page.write_text(html)
        self._run(f"--window-size={width_px},{height_px}", f"--screenshot={picture}", page.as_uri())
        return picture

    def colours(self, picture: Path, boxes: list[dict[str, float]]) -> list[dict[str, int]]:
        """For each box of a picture, how many colours it has and how many pixels that are not grey."""
        page = self._folder / "colours.html"
        whole = [{name: int(box[name]) for name in ("x", "y", "width", "height")} for box in boxes]
        page.write_text(_COLOURS % (json.dumps(whole), base64.b64encode(picture.read_bytes()).decode()))
        return list(self._answer(page))

    def _answer(self, page: Path, *flags: str) -> Any:
        shown = self._run(*flags, "--dump-dom", page.as_uri())
        found = re.search(r'<pre id="probe">(.*?)</pre>', shown, re.DOTALL)
        assert found is not None, shown[-2000:]
        return json.loads(unescape(found[1]))

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout
