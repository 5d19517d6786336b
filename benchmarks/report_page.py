"""Times a sweep's report with 2,000 small images in headless Chromium: the first paint, flipping and filtering.

python benchmarks/report_page.py
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))

import sd3.png
from sd3.sweep.folder import SweepFolder
from sd3.sweep.grid import Grid
from sd3.sweep.plan import make_plan
from sd3.sweep.report import Report

ROOT = Path(__file__).parent.parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def write(folder: Path, prompts: int, seeds: int) -> int:
    """Writes a report of 96 x 96 noise images, like that of a sweep of the small model. Returns their number."""
    raw = {
        "model": str(ROOT / "models" / "demo" / "demo.safetensors"),
        "device": "cpu",
        "seed": f"0-{seeds - 1}",
        "residual_target_layers": "3,5;4;2-7",
        "residual_weights": "each:0.1;each:0.2;each:0.3",
    }
    plan, _ = make_plan(
        Grid.read(raw, prompts=[f"a red circle left of blue square number {i}" for i in range(prompts)])
    )
    sweep = SweepFolder(folder)
    sweep.open()
    report, rng = Report(sweep, plan, "demo"), random.Random(1)
    for p in plan.pictures:
        noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((96, 96))
        sd3.png.save_picture(sweep.picture(p.id), image, p.settings, {"model_sha256": ""})
        sweep.save_difference(plan, p)
        report.scores["demo", p.id] = {"position": float(rng.random() < 0.5)}
        report.add(p)
    report.write(running=False, whole=True)
    sweep.close()
    return len(plan.pictures)


def measure(folder: Path, count: int) -> None:
    """Prints the page's times."""
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for attempt in ("first", "second"):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto((folder / "index.html").as_uri())
            page.wait_for_selector(".cell img[src]")
            page.wait_for_function(FIRST_PAINT + " > 0")
            paint = page.evaluate(FIRST_PAINT)
            grid = page.evaluate("performance.now()")
            cells = page.locator(".cell").count()
            script = (
                "() => { const t = performance.now(); %s; document.body.offsetHeight; return performance.now() - t }"
            )
            flip = page.evaluate(script % "turn(1)")
            only = page.evaluate(script % "document.getElementById('search').value = '7'; drawGrid()")
            print(
                f"{attempt} opening, {count} images, {cells} shown at once: first paint after {paint:.0f} ms, "
                f"grid filled before {grid:.0f} ms; next seed in {flip:.0f} ms, filter in {only:.0f} ms"
            )
            page.close()
        browser.close()


def main() -> None:
    """Writes the report twice (many seeds, one seed) and measures it."""
    for prompts, seeds in ((50, 4), (200, 1)):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            count = write(Path(folder) / "sweep", prompts, seeds)
            print(f"{prompts} prompts, {seeds} seeds: written in {time.perf_counter() - start:.1f} s")
            measure(Path(folder) / "sweep", count)


if __name__ == "__main__":
    main()
