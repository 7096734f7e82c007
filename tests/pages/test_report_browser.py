"""The page of an explained rollout in a real browser: what is drawn, what moves, and that nothing is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import ACTIONS, Page, number, rollout
from tensordict import TensorDict
from torch import Tensor

from tdhook.pages import pictures
from tdhook.pages.writing import write_report

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="there is no Chromium with its chromedriver on the PATH"
)
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1000",
)
HOSTILE = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    started.get("about:blank")  # and not the browser's own start page, which asks for much
    yield started
    started.quit()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """The page; whatever a test does with it, it complains of nothing and asks for nothing."""
    page = Page(browser)
    yield page
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(sent) >= 1
    assert [url for url in sent if not url.startswith("data:")][1:] == []  # the first is the page itself


FEATURES = ("cart position", "cart velocity", "pole angle", "pole angular velocity")


def written(made: TensorDict, path: Path, **options: Any) -> Path:
    return write_report(made, path / "report.html", **{"features": FEATURES, "actions": ACTIONS, **options})


def close(shown: list[float], expected: Tensor) -> bool:
    return shown == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)


def test_the_slider_moves_everything(page: Page, tmp_path: Path) -> None:
    made = rollout(50, side=16, ends=20)
    page.show(written(made, tmp_path))
    assert page.step() == 0
    seen = set()
    for step in (0, 1, 27, 44):
        page.slide(step)
        names, observed, widths, values = zip(*page.bars(), strict=True)
        assert names == FEATURES
        assert close(observed, made["observation"][step])
        relevance = made["attr", "observation"][step]
        assert close(values, relevance)
        top = made["attr", "observation"].abs().flatten().quantile(0.995, interpolation="higher")
        assert list(widths) == pytest.approx((relevance / top).clamp(-1, 1).mul(100).tolist(), abs=4)
        assert page.facts()["action"] == ACTIONS[step % 2]
        assert page.facts()["reward"] == str(step % 5)
        assert number(page.facts()["sum of relevance"]) == pytest.approx(float(relevance.sum()), rel=1e-3)
        seen.add(page.pixels())
    assert len(seen) == 4
    page.slide(27)
    assert page.facts()["return so far"] == str(sum(i % 5 for i in range(20, 28)))
    assert "step 27 of 50 · episode 2 of 3" in page("where").text
    assert page("step").get_attribute("aria-valuetext") == "step 27, episode 2 of 3, push right"


def test_relevance_lies_over_the_frame_in_its_colours(page: Page, tmp_path: Path) -> None:
    page.show(written(rollout(6, side=16), tmp_path))
    page.slide(3)
    column, row = (3.5 / 16, 10.5 / 16), (10.5 / 16, 3.5 / 16)
    red, _, blue = page.colour(*column)
    assert red > 150 > 80 > blue  # for, on a black pixel
    assert page.colour(*row) == [200, 200, 200]  # the frame, where there is no relevance
    assert page.colour(12.5 / 16, 12.5 / 16) == [0, 0, 0]
    page.slide(4)
    red, _, blue = page.colour(4.5 / 16, 10.5 / 16)
    assert blue > 150 > 80 > red  # against
    strong = page.pixels()
    page.run(
        "const o = document.getElementById('opacity'); o.value = 20; o.dispatchEvent(new Event('input'))"
    )
    page.until(lambda: page.pixels() != strong)
    assert 30 < page.colour(4.5 / 16, 10.5 / 16)[2] < 70
    page("overlay").click()
    page.until(lambda: page.colour(4.5 / 16, 10.5 / 16) == [0, 0, 0])


def test_a_frame_can_be_made_grey(page: Page, tmp_path: Path) -> None:
    made = rollout(2, side=16)
    made["frame"][...] = torch.tensor([250, 20, 20], dtype=torch.uint8)
    page.show(written(made, tmp_path))
    assert page.colour(0.9, 0.9) == [250, 20, 20]
    page("grey").click()
    page.until(lambda: len(set(page.colour(0.9, 0.9))) == 1)


def test_it_plays_and_pauses_and_ends(page: Page, tmp_path: Path) -> None:
    page.show(written(rollout(40, side=16), tmp_path))
    Select(page("speed")).select_by_value("25")
    page("play").click()
    assert page("play").get_attribute("aria-pressed") == "true"
    page.until(lambda: page.step() >= 3)
    page("play").click()
    assert page("play").text == "play"
    stopped = page.step()
    page.run("return new Promise(done => setTimeout(done, 200))")
    assert page.step() == stopped < 39
    Select(page("speed")).select_by_value("50")
    page("play").click()
    page.until(lambda: page.step() == 39)
    page.until(lambda: page("play").text == "play")
    page("play").click()  # again from the start
    page.until(lambda: 0 <= page.step() < 39)


def test_keys_move_through_time(page: Page, tmp_path: Path) -> None:
    page.show(written(rollout(100, ends=30), tmp_path))
    shift = (Keys.SHIFT, Keys.ARROW_RIGHT)
    for keys, step in (
        ((Keys.ARROW_RIGHT,), 1),
        ((Keys.ARROW_LEFT,), 0),
        ((Keys.ARROW_LEFT,), 0),
        (shift, 10),
        (("]",), 30),
        (("]",), 60),
        ((Keys.ARROW_RIGHT,), 61),
        (("[",), 60),
        (("[",), 30),
        ((Keys.END,), 99),
        (("]",), 99),
        ((Keys.ARROW_RIGHT,), 99),
        ((Keys.HOME,), 0),
    ):
        page.press(*keys)
        assert page.step() == step, keys
    page("step").send_keys(Keys.ARROW_RIGHT)  # once, where the slider has a key of that name itself
    assert page.step() == 1
    page.press(" ")
    page.until(lambda: page.step() > 1)
    page.press(" ")
    assert page("play").text == "play"


def test_a_key_of_a_control_is_left_to_it(page: Page, tmp_path: Path) -> None:
    page.show(written(rollout(5, outputs=2, side=16), tmp_path))
    page("opacity").send_keys(Keys.ARROW_LEFT)
    assert page("opacity").get_attribute("value") == "84"
    page("forward").send_keys(Keys.ARROW_RIGHT)
    page("forward").click()
    assert page.step() == 2
    page("overlay").send_keys(" ")
    assert not page("overlay").is_selected() and page("play").text == "play"


def test_a_click_on_the_strip_goes_there(page: Page, tmp_path: Path) -> None:
    page.show(written(rollout(400), tmp_path))
    box = page.run(
        "const b = document.querySelector('#overview canvas').getBoundingClientRect(); return [b.x, b.y, b.width]"
    )
    chain = webdriver.ActionChains(page.browser)
    chain.w3c_actions.pointer_action.move_to_location(int(box[0] + 0.75 * box[2]), int(box[1] + 40))
    chain.w3c_actions.pointer_action.click()
    chain.perform()
    assert page.step() == pytest.approx(300, abs=2)
    assert page("around-title").text == f"Around it: steps {page.step() - 80} to {page.step() + 79}"
    left = page.run("return parseFloat(document.querySelector('#overview .cursor').style.left)")
    assert left == pytest.approx(75, abs=1)


def test_the_strip_has_the_colours_of_relevance(page: Page, tmp_path: Path) -> None:
    made = rollout(2, ends=1)
    made["attr", "observation"] = torch.tensor([[1.0, -1.0, 0.0, 0.5], [-1.0, 1.0, 0.0, 0.5]])
    del made["observation"]  # whose lines would lie over it
    page.show(written(made, tmp_path))
    height = page.run("return document.querySelector('#overview canvas').clientHeight")
    for row, signs in enumerate([(1, -1), (-1, 1), (0, 0), (1, 1)]):
        for step, sign in enumerate(signs):
            red, _, blue = page.colour(0.25 + 0.5 * step, (28 + 26 * row + 13) / height, "#overview canvas")
            assert (red > blue) - (red < blue) == sign, (row, step)


def test_each_output_can_be_chosen(page: Page, tmp_path: Path) -> None:
    made = rollout(10, outputs=2)
    page.show(written(made, tmp_path))
    page.slide(4)
    for output in (1, 0):
        Select(page("view")).select_by_visible_text(ACTIONS[output])
        page.until(
            lambda chosen=made["attr", "observation"][4, output]: close([b[3] for b in page.bars()], chosen)
        )
        tables = page.browser.find_elements(By.CSS_SELECTOR, "#summaries table")
        assert [table.is_displayed() for table in tables] == [i == output for i in range(2)]
    assert not page("choose-environment").is_displayed()


def test_each_environment_can_be_chosen(page: Page, tmp_path: Path) -> None:
    made = rollout(10, 3, side=16)
    made["frame"][2] = 77
    page.show(written(made, tmp_path))
    page.slide(7)
    Select(page("environment")).select_by_visible_text("2")
    page.until(lambda: close([b[3] for b in page.bars()], made["attr", "observation"][2, 7]))
    page.until(lambda: page.colour(0.95, 0.95) == [77, 77, 77])
    assert not page("choose-view").is_displayed()


def test_one_step_is_enough(page: Page, tmp_path: Path) -> None:
    page.show(written(rollout(1, side=16), tmp_path))
    assert page.step() == 0
    for name in ("back", "forward", "previous-episode", "next-episode"):
        assert page(name).get_attribute("aria-disabled") == "true"
    page("play").click()
    page.until(lambda: page("play").text == "play")
    page.press(Keys.END)
    assert page.step() == 0


def test_ten_thousand_steps_load_and_respond(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_PIXELS", 90_000)  # some 500 pictures, which take a second
    made = rollout(10_000, side=12, ends=200)
    page.show(written(made, tmp_path))
    for step in (9_999, 5_432, 0):
        page.slide(step)
        assert close([b[3] for b in page.bars()], made["attr", "observation"][step])
    page.press("]")
    assert page.step() == 200
    assert page("where").text == "step 200 of 10000 · episode 2 of 50"
    assert page("detail").is_displayed()


def test_it_is_dark_where_the_system_is(page: Page, tmp_path: Path) -> None:
    path = written(rollout(30), tmp_path)
    lightness = {}
    for scheme in ("light", "dark"):
        page.show(path, scheme=scheme)
        background = page.run(
            "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        ink = page.run("return getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
        lightness[scheme] = (sum(background) / 3, sum(ink) / 3)
    assert lightness["light"][0] > 240 and lightness["light"][1] < 60
    assert lightness["dark"][0] < 40 and lightness["dark"][1] > 200
    dark = page.pixels("#overview canvas")
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    page.until(lambda: page.pixels("#overview canvas") != dark)  # while it is open, too


def test_names_are_text_whatever_they_are(page: Page, tmp_path: Path) -> None:
    made = rollout(3)
    page.show(
        written(
            made,
            tmp_path,
            features=(HOSTILE, "b & c", "{{data}}", '"quoted"'),
            actions=(HOSTILE, "right"),
            title=HOSTILE,
            metadata={HOSTILE: HOSTILE},
        )
    )
    assert page.run("return window.hacked ?? null") is None
    assert [bar[0] for bar in page.bars()] == [HOSTILE, "b & c", "{{data}}", '"quoted"']
    assert page.facts()["action"] == HOSTILE
    assert page.browser.title == page.browser.find_element(By.TAG_NAME, "h1").text == HOSTILE
    heads = page.browser.find_elements(By.CSS_SELECTOR, "#summaries tbody th")
    assert heads[0].text == HOSTILE


@pytest.mark.parametrize("width", [360, 800])
def test_it_fits_on_a_narrow_screen(page: Page, tmp_path: Path, width: int) -> None:
    page.show(written(rollout(400, outputs=2, side=16), tmp_path), width=width)
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page("step").size["width"] > 100


def test_everything_that_is_used_has_a_name(page: Page, tmp_path: Path) -> None:
    page.show(written(rollout(400, 2, outputs=2, side=16), tmp_path))
    used = page.browser.find_elements(By.CSS_SELECTOR, "input, select, button, canvas, section")
    assert len(used) > 15
    for element in used:
        assert element.accessible_name, element.get_attribute("outerHTML")[:200]
