"""Pages of `sparsevlm explain`, opened in a real headless browser at a laptop's and at a phone's width."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsevlm_jax.explain import summary
from sparsevlm_jax.explain.page import render
from sparsevlm_jax.explain.trace_run import Explanation
from tests.explanations import QUESTION, explained
from tests.test_explain_video import explained as explained_video

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
LAPTOP, PHONE = (1280, 800), (390, 844)  # CSS pixels
# Three images, and three ways to answer about them.
PAGES = {"recycling": ("v1.5", 0), "dropping": ("fastv", 1), "dense": ("dense", 2)}

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium with chromedriver here (Debian: apt-get install chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=PAGES)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Explanation, Path]:
    method, seed = PAGES[request.param]
    explanation = explained(method, seed=seed)
    file = tmp_path_factory.mktemp("pages") / f"{request.param}.html"
    file.write_text(render(explanation), encoding="utf-8")
    return explanation, file


def open_page(browser: Any, file: Path, size: tuple[int, int] = LAPTOP) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(file.as_uri())


def test_every_image_is_loaded_and_described(browser: Any, page: tuple[Explanation, Path]) -> None:
    explanation, file = page
    open_page(browser, file)
    script = "return [...document.images].map(i => [i.complete && i.naturalWidth, i.alt])"
    images = browser.execute_script(script)
    prunings = sum(stage.pruning is not None for stage in explanation.stages)
    assert len(images) == 1 + len(explanation.stages) + prunings
    assert all(width >= 400 for width, _ in images)
    assert len({alt for _, alt in images} - {""}) == len(images)


def test_words_counts_and_answers_are_there(browser: Any, page: tuple[Explanation, Path]) -> None:
    explanation, file = page
    open_page(browser, file)
    shown = browser.execute_script("return document.body.innerText")
    assert QUESTION in shown
    words = browser.execute_script("return [...document.querySelectorAll('.word b')].map(e => e.innerText.trim())")
    assert words == [word.text for word in explanation.words.after]
    marked = browser.execute_script("return document.querySelectorAll('.word.rates').length")
    assert marked == sum(word.rates for word in explanation.words.after) > 0
    for stage in explanation.stages:
        assert summary.stage_name(stage) in shown
        assert summary.entering(stage) in shown
        assert stage.pruning is None or summary.outcome(stage.pruning) in shown
    for saving in [*summary.savings(explanation), summary.program_saving(explanation)]:
        assert saving.pruned in shown and saving.dense in shown
    boxes = browser.execute_script("return [...document.querySelectorAll('.answer')].map(e => e.textContent)")
    is_dense = explanation.pruned.plan.sparsity.method == "dense"
    said = [answer.same + answer.differs + answer.rest for answer in summary.answers(explanation)]
    assert boxes == (said[:1] if is_dense else said)
    assert (summary.verdict(explanation) in shown) == (not is_dense)


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_nothing_is_wider_than_the_screen(browser: Any, page: tuple[Explanation, Path], size: tuple[int, int]) -> None:
    open_page(browser, page[1], size)
    room, needed = browser.execute_script(
        "return [document.documentElement.clientWidth, document.documentElement.scrollWidth]"
    )
    assert needed <= room <= size[0]


def test_nothing_is_fetched_from_a_network(browser: Any, page: tuple[Explanation, Path]) -> None:
    browser.get_log("performance")  # what was logged before
    browser.get_log("browser")
    open_page(browser, page[1])
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert page[1].as_uri() in asked
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_a_strip_of_frames_is_no_wider_than_the_screen(browser: Any, tmp_path: Path, size: tuple[int, int]) -> None:
    """Beside each other on a laptop, all of them loaded."""
    file = tmp_path / "video.html"
    file.write_text(render(explained_video()), encoding="utf-8")
    open_page(browser, file, size)
    needed, tops, loaded = browser.execute_script(
        "return [document.documentElement.scrollWidth,"
        " [...document.querySelector('.frames').children].map(e => e.getBoundingClientRect().top),"
        " [...document.images].every(i => i.complete && i.naturalWidth)]"
    )
    assert needed <= size[0] and loaded
    assert len(tops) == 3 and (len(set(tops)) == 1 or size == PHONE)
