"""Reports as readers see them, in headless Chromium: no errors, nothing from the network, no fault that axe-core calls
serious, in both themes, on a screen and on a phone; tables sort, curves answer the pointer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import main
import main_pruned

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="make test-report installs it")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
PRUNED = "--audit --audit_groups 6 --methods cascade random --edges --pruning_algorithm cascade --train_ratio 0.8"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("there is no Chromium (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """A report of each kind."""
    from valuation.__main__ import main as valuation

    results = tmp_path_factory.mktemp("results")
    words = ["--epochs", "3", "--num_workers", "4", "--max_train", "400", "--val_fraction", "0.2", "--quiet",
             "--results_dir", str(results), "--model", "mlp"]  # fmt: skip
    assert main_pruned.main([*words, "--run_name", "pruned", "--flip_labels", "0.1", *PRUNED.split()]) == 0
    assert main.main([*words, "--run_name", "seeds", "--seeds", "2"]) == 0
    assert valuation([*words, "--run_name", "valued", "--truth", "--valuations", "ddval", "equal"]) == 0
    return {path.parent.name: path for path in results.glob("*/report.html")} | {
        "valuation": results / "valued" / "valuation" / "report.html"
    }


def opened(browser, path: Path, scheme: str = "light", width: int = 1200):
    """The page of a report, and what it complained about or asked the network for."""
    page, said = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    return page, said


@pytest.mark.parametrize("width", [1200, 380])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["pruned", "seeds", "valuation"])
def test_it_opens_without_errors_and_for_everybody(browser, reports, kind, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    page, said = opened(browser, reports[kind], scheme, width)
    assert not said
    faults = [(one["id"], one["nodes"][0]["html"][:200]) for one in Axe().run(page).response["violations"]
              if one["impact"] in ("serious", "critical")]  # fmt: skip
    assert not faults
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off on a phone
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    page.close()


def test_tables_sort_by_what_is_clicked(browser, reports):
    page, said = opened(browser, reports["pruned"])
    table = page.locator("table", has_text="Who holds what")
    column = "[...document.querySelectorAll('table')].find((t) => t.caption.textContent.startsWith('Who holds'))"
    read = f"() => [...{column}.tBodies[0].rows].map((row) => Number(row.cells[1].dataset.v))"
    before = page.evaluate(read)
    table.get_by_role("button", name="training samples").click()
    up = page.evaluate(read)
    table.get_by_role("button", name="training samples").click()
    assert up == sorted(before) and page.evaluate(read) == up[::-1] and len(set(up)) > 1
    assert table.locator("th[aria-sort=descending]").count() == 1 and not said
    page.close()


def test_curves_say_whose_they_are(browser, reports):
    page, said = opened(browser, reports["pruned"])
    curves = page.locator(".curves").first
    curves.scroll_into_view_if_needed()
    path = curves.locator("path.worker").first
    x, y = (float(number) for number in path.get_attribute("d").split("L")[-1].split())
    box = curves.locator("svg").bounding_box()
    page.mouse.move(box["x"] + x * box["width"] / 560, box["y"] + y * box["height"] / 300)
    text, value = curves.locator("output").text_content(), float(path.get_attribute("data-values").split()[-1])
    rounds = page.evaluate("JSON.parse(document.getElementById('data').textContent).summary.rounds")
    assert text.endswith(f"round {rounds}") and f"{100 * value:.2f}%" in text and not said
    page.mouse.move(1, 1)
    assert curves.locator("output").text_content() == ""
    page.close()
