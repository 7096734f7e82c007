"""The page of units shows what they respond to, and is whole in itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import Elements
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target
from tdhook.concepts import ReferenceSamples
from tdhook.pages import UnitShown, write_concepts_report

COUNT = 60
HOSTILE = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"


def policy(side: int) -> TensorDictModule:
    torch.manual_seed(0)
    if not side:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        return TensorDictModule(net, ["observation"], ["action_value"])
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * (side - 2) ** 2, 6),
        nn.ReLU(),
        nn.Linear(6, 2),
    )
    return TensorDictModule(net, ["pixels"], ["action_value"])


def data(side: int) -> TensorDict:
    torch.manual_seed(1)
    seen = torch.rand(COUNT, 4, side, side) if side else torch.randn(COUNT, 4)
    found = TensorDict(
        {"pixels" if side else "observation": seen, "action": torch.arange(COUNT) % 2}, [COUNT]
    )
    found["step_count"] = torch.arange(COUNT)
    return found


def written(
    path: Path, side: int = 0, layer: str = "1", **options: Any
) -> tuple[str, Elements, ReferenceSamples]:
    net, rows = policy(side), data(side)
    method = LRP("epsilon", target=Target("action_value", "action"))
    samples = ReferenceSamples(method, layer, axis=1, top=3, groups="action").fold(net, rows)
    shown = {
        group: [
            UnitShown(unit, samples.frames(net, rows, unit, group=group))
            for unit in samples.found.ranked(group)[:2].tolist()
        ]
        for group in (0, 1)
    }
    page = write_concepts_report(samples.found, shown, path / "page.html", **options).read_text(
        encoding="utf-8"
    )
    return page, Elements(page), samples


def test_units_are_shown_with_their_steps(tmp_path: Path) -> None:
    names = {0: "go <west>", 1: "go east"}
    _, elements, samples = written(tmp_path, features=("w", "x", "y", "z"), groups=names, title="Units of 1")
    words, found = elements.words, samples.found
    assert "60 steps, 6 units" in words and "go <west> 30×" in words and elements.scripts == []
    for group in (0, 1):
        unit = int(found.ranked(group)[0])
        mean = f"{float(found.mean(group)[unit]):+.4g}".replace("-", "−")
        assert f"mean relevance {mean} in {names[group]}" in words
        best = found.best(unit, group)
        for row, amount in zip(best["row"].tolist(), best["amount"].tolist(), strict=True):
            assert f"row {row}; {amount:+.4g}; step count {row}".replace("-", "−") in words
        seen = data(0)["observation"][best["row"][0], 0].item()
        assert f"at {seen:.4g}".replace("-", "−") in words


def test_pictures_have_the_part_that_a_unit_sees_beneath_them(tmp_path: Path) -> None:
    page, elements, _ = written(tmp_path, side=9)
    assert page.count("<img ") == 2 * 2 * 3 * 2  # groups, units, steps, and the part of each
    assert len(re.findall(r"rows \d+ to \d+, columns \d+ to \d+", elements.words)) == 12


def test_units_that_see_all_have_no_box(tmp_path: Path) -> None:
    page, elements, _ = written(tmp_path, side=9, layer="4")
    assert page.count("<img ") == 2 * 2 * 3 and "columns" not in elements.words


def test_it_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    hostile = {"title": HOSTILE, "features": (HOSTILE, "x", "y", "z"), "facts": {HOSTILE: HOSTILE}}
    page, elements, samples = written(tmp_path, groups={0: HOSTILE}, **hostile)
    assert elements.scripts == [] and "img" not in elements.tags and HOSTILE not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "script-src" not in page and "default-src 'none'" in page
    with pytest.raises(IsADirectoryError, match="is a folder, where the page is to be a file"):
        write_concepts_report(samples.found, {}, tmp_path)


SAID = (("go", HOSTILE, "north"), ("never", "north"), ("go", "?"))


def written_of_texts(path: Path, words: tuple[tuple[str, ...], ...] = SAID) -> tuple[str, Elements]:
    """Texts of four places, whose first are padding where there are fewer words."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2))
    rows = TensorDict({"embedded": torch.randn(30, 4, 3), "action": torch.arange(30) % 2}, [30])
    policy = TensorDictModule(net, ["embedded"], ["action_value"])
    method = LRP("epsilon", target=Target("action_value", "action"))
    samples = ReferenceSamples(method, "1", axis=2, top=3, groups="action").fold(policy, rows)
    frames = samples.frames(policy, rows, 2, group=1)
    frames["place"] = torch.tensor([[3], [2], [2]])
    frames["attr", "embedded"][0] = torch.tensor([0.0, 0.1, 0.0, -1.0]).reshape(4, 1)
    shown = {1: [UnitShown(2, frames, words)]}
    page = write_concepts_report(samples.found, shown, path / "texts.html").read_text(encoding="utf-8")
    return page, Elements(page)


def test_texts_have_their_words_on_the_colour_of_their_relevance(tmp_path: Path) -> None:
    page, elements = written_of_texts(tmp_path)
    assert page.count('class="words"') == 3 and "Underlined is the word" in elements.words
    first = page.split('class="words"')[1]
    assert '<span class="negative s8 place" title="−3">north</span>' in first
    assert '<span class="positive s1" title="0.3">go</span>' in first and HOSTILE not in page
    assert '<span class="" title="0">' in first  # without relevance, without colour
    second = page.split('class="words"')[2]
    assert second.count("<span") == 2 and second.index("place") < second.index("north")
    with pytest.raises(ValueError, match="step 1 of unit 2 has 5 words, and its relevance 4 places"):
        written_of_texts(tmp_path, (("go",), ("a",) * 5, ("?",)))


@pytest.mark.skipif(
    not ((shutil.which("chromium") or shutil.which("google-chrome")) and shutil.which("chromedriver")),
    reason="there is no Chromium with its chromedriver on the PATH",
)
def test_a_browser_complains_of_nothing(tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    written(tmp_path, side=9, title=HOSTILE)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        for width in (1000, 420):
            browser.set_window_size(width, 900)
            browser.get((tmp_path / "page.html").as_uri())
            assert browser.get_log("browser") == []
            assert browser.execute_script("return window.hacked") is None
            sizes = browser.execute_script(
                "return [...document.images].map(i => [i.naturalWidth, i.clientWidth])"
            )
            assert len(sizes) == 24 and {natural for natural, _ in sizes} == {3, 9 * 15}
            assert all(wide > 50 for _, wide in sizes)
            assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        written_of_texts(tmp_path)
        browser.get((tmp_path / "texts.html").as_uri())
        assert browser.get_log("browser") == [] and browser.execute_script("return window.hacked") is None
        grounds = browser.execute_script(
            "return [...document.querySelectorAll('.words')[0].querySelectorAll('span')]"
            ".map(s => getComputedStyle(s).backgroundColor)"
        )
        assert len(set(grounds)) == 3 and grounds[1].endswith(", 0)")  # for, nothing, against
    finally:
        browser.quit()
