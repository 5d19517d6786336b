"""Takes a picture of a sweep's report in headless Chromium (needs playwright and Chromium).

python benchmarks/report_picture.py compared docs/sweep.png
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def picture(folder: str, out: str, width: int = 1400, height: int = 1050) -> None:
    """Writes the first screen of the report in `folder` as a PNG in 256 colours."""
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto((Path(folder).resolve() / "index.html").as_uri())
        page.wait_for_selector(".cell img")
        page.wait_for_timeout(1000)
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    shot.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    picture(*sys.argv[1:3])
