"""The report in a browser: headless Chromium, the page opened as a file, no server and no network."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
from helpers import DEMO
from PIL import Image

import sd3.sweep.command

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run")  # fmt: skip
PROMPTS = ["a red circle", "a red circle left of a blue square", "two green stars"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of 3 prompts, 2 seeds and 5 variants of the small model, scored."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--model", DEMO, "--device", "cpu", "--prompt", folder / "prompts.txt", "--seed", "0;7"]
    arguments += ["--residual_target_layers", "3,5,7;4", "--residual_weights", "each:0.1;each:1.5", "--score", "demo"]
    assert sd3.sweep.command.main(["--out", str(folder / "out"), "--batch_size", "2", *map(str, arguments)]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, swept):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.problems, page.asked = [], []
    page.on("pageerror", lambda e: page.problems.append(str(e)))
    page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: page.asked.append(r.url))
    page.goto((swept / "index.html").as_uri())
    page.wait_for_selector(".cell img")
    yield page
    assert page.problems == []
    assert all(url.startswith("file:") for url in page.asked)  # nothing from a network
    page.close()


def data_of(swept) -> dict:
    return json.loads((swept / "data.js").read_text().removeprefix("window.sweepData(").removesuffix(");\n"))


def cell(variant: int, prompt: int) -> str:
    return f".cell[data-variant='{variant}'][data-prompt='{prompt}']"


def shown(page) -> tuple[int, int]:
    """How many prompts and how many variants the grid shows."""
    script = "cells => ['prompt', 'variant'].map(n => new Set(cells.map(c => c.dataset[n])).size)"
    return tuple(page.eval_on_selector_all(".cell", script))


def image_id(swept, variant: int, prompt: int, seed: int) -> str:
    return next(p[3] for p in data_of(swept)["pictures"] if p[:3] == [variant, prompt, seed])


def test_prompts_are_rows_and_variants_columns(page, swept):
    assert shown(page) == (3, 5)
    assert page.locator("#progress").inner_text() == "30 of 30 images"
    assert page.locator(".side").all_inner_texts()[1:] == PROMPTS
    heads = page.locator(".row.head .name")
    assert [h.split("\n")[0].removesuffix("baseline") for h in heads.all_inner_texts()] == [
        "off",
        "block 0 into 3, 5 and 7, weight 0.1",
        "block 0 into 3, 5 and 7, weight 1.5",
        "block 0 into 4, weight 0.1",
        "block 0 into 4, weight 1.5",
    ]
    assert heads.nth(1).get_attribute("title") == "0:3,5,7:each:0.1"
    loaded = page.eval_on_selector(f"{cell(0, 0)} img", "i => i.decode().then(() => i.naturalWidth)")
    assert loaded == 96


def test_filters(page):
    page.click("button[data-setting='residual_target_layers'][data-value='4']")
    assert shown(page) == (3, 2)
    page.click("button[data-setting='residual_weights'][data-value='1.5']")
    assert shown(page) == (3, 1)
    page.click("button[data-setting='residual_target_layers'][data-value='4']")
    assert shown(page) == (3, 2)
    page.click("button[data-setting='residual_weights'][data-all]")
    assert page.get_attribute("button[data-setting='residual_weights'][data-all]", "aria-pressed") == "true"
    page.fill("#search", "stars")
    assert shown(page) == (1, 5)
    page.fill("#search", "")
    page.fill("#search-variants", "off")
    assert shown(page) == (3, 1)
    page.fill("#search", "nothing like it")
    assert page.get_by_text("No image fits the filters.").is_visible()


def test_flips_through_seeds(page, swept):
    source = f"{cell(2, 1)} img"
    assert page.get_attribute(source, "src") == f"pictures/{image_id(swept, 2, 1, 0)}.png"
    if page.is_hidden("#forth"):  # both seeds are shown where there is room
        page.click("#together")
    page.click("#forth")
    assert page.inner_text("#seed") == "7"
    assert page.get_attribute(source, "src") == f"pictures/{image_id(swept, 2, 1, 1)}.png"
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#seed") == "0"


def test_differences(page, swept):
    page.click("#difference")
    assert page.get_attribute(f"{cell(2, 1)} img", "src") == f"difference/{image_id(swept, 2, 1, 0)}.png"
    assert page.get_attribute(f"{cell(0, 1)} img", "src").startswith("pictures/")  # a baseline has none
    page.keyboard.press("d")
    assert page.get_attribute(f"{cell(2, 1)} img", "src").startswith("pictures/")


def test_enlarges_with_settings_score_and_command(page, swept):
    page.click(cell(2, 1))
    assert page.locator("#dialog").is_visible()
    assert page.locator("#big img").count() == 3  # itself, the baseline, the difference
    entry = next(p for p in data_of(swept)["pictures"] if p[:3] == [2, 1, 0])
    assert page.inner_text("#dialog-scores") == f"position: {int(entry[5]['position'])}"
    words = shlex.split(page.inner_text("#command"))
    assert words[:2] == ["python", "sd3_infer.py"]
    assert {f"--prompt={PROMPTS[1]}", "--seed=0", "--residual_target_layers=3,5,7"} <= set(words)
    assert "1.5,1.5,1.5" in page.inner_text("#settings")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    page.wait_for_function("document.getElementById('copy').textContent === 'copied'")
    assert page.evaluate("navigator.clipboard.readText()") == page.inner_text("#command")
    page.click("#copy-replay")
    replay = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert replay[-1] == str(swept / "pictures" / f"{entry[3]}.png")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#dialog-seed") == "seed 7"
    page.keyboard.press("Escape")
    assert not page.locator("#dialog").is_visible()


def test_scores_are_those_of_the_table(page, swept):
    assert page.locator("#kinds button").first.inner_text() == "overall"
    off = next(line for line in (swept / "scores.csv").read_text().splitlines() if ",off,overall," in line)
    mean = float(off.split(",")[4])
    row = page.locator("#table .line[data-variant='0']")
    assert row.locator(".mean").inner_text() == f"{mean:.2f}"
    assert float(row.locator(".fill").evaluate("e => parseFloat(e.style.width)")) == pytest.approx(100 * mean, abs=0.01)
    assert row.locator(".interval").first.inner_text() == "–"  # three prompts
    assert row.locator(".whisker").count() == 0
    assert "fewer than 5" in page.inner_text("#legend")
    assert page.locator("#table .best").count() == 0
    assert "here 6 have one, too few for a ★" in page.inner_text("#legend")
    marks = page.locator(".note").all_inner_texts()
    assert all("✓" in m or "✗" in m for m in marks)


def test_a_star_marks_the_best_row_of_the_kind_that_is_shown(browser, swept, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(swept, copy)
    data = data_of(swept)
    gained = lambda row: row[6] is not None  # noqa: E731
    data["rows"] = [
        [*row[:4], 0.1, 0.9, row[6], *((-0.2, 0.3, 10) if gained(row) else (None, None, 0))] for row in data["rows"]
    ]
    (copy / "data.js").write_text(
        f"window.sweepData({json.dumps(data | {'best': [[2, 'overall'], [3, 'position']]})});"
    )
    page = browser.new_page()
    page.goto((copy / "index.html").as_uri())
    page.wait_for_selector("#table .line")
    assert [e.get_attribute("data-variant") for e in page.locator("#table .best").all()] == ["2"]
    assert "★ best" in page.locator("#table .best .name").inner_text()
    assert "fewer than" not in page.inner_text("#scores")
    row = page.locator("#table .line[data-variant='0']")
    assert row.locator(".interval").first.inner_text() == "0.10 to 0.90"
    assert float(row.locator(".whisker").evaluate("e => parseFloat(e.style.left)")) == pytest.approx(10, abs=0.01)
    page.close()


def test_the_header_says_what_was_made(page):
    facts = dict(zip(*(page.locator(f"#facts {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
    assert facts["model"] == "demo.safetensors"
    assert (facts["steps"], facts["cfg"], facts["sampler"], facts["size"]) == ("24", "2.5", "euler", "96 × 96")
    assert re.search(r"\b20\d\d\b", facts["date"])


def test_seeds_stand_side_by_side_where_there_is_room(page):
    page.set_viewport_size({"width": 900, "height": 800})
    page.wait_for_function("document.querySelectorAll('.cell').length === 15")
    page.set_viewport_size({"width": 1900, "height": 800})
    page.wait_for_function("document.querySelectorAll('.cell').length === 30")
    assert page.is_hidden("#flip")
    page.fill("#search", "stars")  # one prompt: seeds are rows or columns
    assert page.locator(".cell").count() == 10
    assert page.inner_text("#prompt") == "two green stars"


@pytest.mark.parametrize("width", [1600, 900, 390])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.getElementById('main').scrollWidth") <= width
    widths = page.eval_on_selector_all(".cell img", "all => all.map(i => i.getBoundingClientRect().width)")
    assert min(widths) >= 96


def test_the_keyboard_is_enough(page, swept):
    page.focus(cell(2, 1))
    page.keyboard.press("Enter")
    assert page.locator("#dialog").is_visible()
    title = page.inner_text("#dialog-title")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#dialog-title") != title
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#dialog-title") == title
    page.keyboard.press("Escape")
    page.keyboard.press("d")
    assert page.locator("#scale").is_visible()
    assert page.locator("#scale .ticks").inner_text().split() == ["0", "28", "113", "255"]


def test_it_grows_while_the_sweep_runs(browser, swept, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(swept, copy)
    whole = data_of(swept)
    half = whole | {"running": True, "pictures": whole["pictures"][:6]}
    (copy / "data.js").write_text(f"window.sweepData({json.dumps(half)});")
    page = browser.new_page()
    page.clock.install()
    page.goto((copy / "index.html").as_uri())
    page.wait_for_selector(".cell.missing")
    assert page.inner_text("#progress") == "6 of 30 images, running"
    page.fill("#search", "red")
    shutil.copy(swept / "data.js", copy / "data.js")
    page.clock.fast_forward(11_000)
    page.wait_for_function("document.getElementById('progress').textContent === '30 of 30 images'")
    assert page.locator(".cell.missing").count() == 0
    assert shown(page)[0] == 2  # the filter stays
    page.close()


def test_prompts_are_shown_as_text(browser, tmp_path):
    """A prompt is never markup, neither in the page nor in its data."""
    odd = "</script><img src=x onerror=document.title='hit'> & \u2028 'quoted'"
    (tmp_path / "prompts.txt").write_text(odd, encoding="utf-8")
    arguments = ["--model", DEMO, "--device", "cpu", "--steps", 1, "--prompt", odd]
    assert sd3.sweep.command.main(["--out", str(tmp_path / "out"), *map(str, arguments)]) == 0
    page = browser.new_page()
    page.goto((tmp_path / "out" / "index.html").as_uri())
    page.wait_for_selector(".cell img")
    assert page.locator(".side").nth(1).text_content() == odd
    assert page.title() == "out – sweep"
    page.click(cell(0, 0))
    assert shlex.split(page.locator("#command").text_content())[-2] == f"--prompt={odd}"
    page.close()


def test_the_contact_sheet_shows_the_pictures(swept):
    with Image.open(swept / "sheet.png") as sheet:
        wide, high = sheet.size
        colours = sheet.convert("RGB").getcolors(wide * high)
    assert wide >= 5 * 96
    assert high >= 6 * 96
    assert len(colours) > 1000
