"""The page of a whole data set shows what rows were reduced to, and is whole in itself."""

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
from tdhook.datasets import Histogram, Job, Moments, Reservoir, Result, TopRows, open_result
from tdhook.datasets.rows import as_rows
from tdhook.datasets.spray import Strategies
from tdhook.pages.dataset import write_dataset_report
from tdhook.pages.figures import cloud_svg, ranges_svg

COUNT = 40
FEATURES, ACTIONS = ("w", "x", "y", "z"), ("go <west>", "go east")
HOSTILE = "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>"


def source(side: int = 0) -> TensorDict:
    torch.manual_seed(1)
    seen = torch.rand(COUNT, 4, side, side) if side else torch.randn(COUNT, 4)
    return TensorDict({"pixels" if side else "observation": seen, "action": torch.arange(COUNT) % 2}, [COUNT])


def made(out: Path, side: int = 0, **options: Any) -> Result:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(-3 if side else -1), nn.Linear(4 * max(1, side) ** 2, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    policy = TensorDictModule(net, ["pixels" if side else "observation"], ["action_value"])
    reduce = [
        Moments(by="action"),
        Histogram(by="action", pooled=side > 0),
        TopRows(2, by="action"),
        Reservoir(9),
    ]
    method = LRP("epsilon", target=Target("action_value", "action"))
    Job(method, policy, source(side), out, chunk=16, **{"reduce": reduce, **options}).work()
    return open_result(out)


def strategies(result: Result) -> dict[str, dict[int, Strategies]]:
    """Two clusters, as they might be found."""
    drawn = result.reduced["reservoir"]
    label = torch.arange(9) % 3 // 2
    mean = torch.stack([drawn["relevance"][label == one].double().mean(0) for one in range(2)])
    references = tuple(drawn["row"][label == one][:2] for one in range(2))
    apart, share = torch.tensor([0.7, 0.6]), torch.tensor([6 / 9, 3 / 9])
    points = torch.arange(18.0).reshape(9, 2)
    values = torch.tensor([0.0, 0.01, 0.4])
    found = Strategies(drawn["row"], label, values, points, mean, share, apart, references)
    return {"reservoir": {0: found}}


def written(result: Result, path: Path, **options: Any) -> tuple[str, Elements]:
    options = {"features": FEATURES, "actions": ACTIONS, **options}
    page = write_dataset_report(result, path / "page.html", **options).read_text(encoding="utf-8")
    return page, Elements(page)


def test_numbers_of_rows_are_shown(tmp_path: Path) -> None:
    result = made(tmp_path / "job")
    page, elements = written(result, tmp_path, source=as_rows(source()), strategies=strategies(result))
    words = elements.words
    assert "40 rows explained" in words and "go <west> 20×" in words and elements.scripts == []
    mean = result.reduced["moments"]["mean"][1, 2].item()
    assert f"{mean:+.4g}".replace("-", "−") in words
    best = result.reduced["toprows"]
    assert f"row {best['row'][0].item()}: {best['score'][0].item():+.4g}".replace("-", "−") in words
    seen = source()["observation"][best["row"][0], 0].item()
    assert f"at {seen:.4g}".replace("-", "−") in words
    assert "all rows: 2 strategies in 9 rows" in words and "33.3% of the rows, silhouette 0.6" in words
    assert page.count("<circle") == 9
    manifest = result.stored.folder.told()
    assert str(manifest["model"]["weights"]) in words and str(manifest["source"]["digest"]) in words  # type: ignore[index, call-overload]


def test_rows_of_pictures_are_pictures(tmp_path: Path) -> None:
    result = made(tmp_path / "job", side=8)
    page, _ = written(result, tmp_path, source=as_rows(source(8)), strategies=strategies(result), features=())
    # Mean and size by action, two rows of each, and of each cluster its mean and two rows.
    assert page.count("<img ") == 4 + 4 + 6
    without, _ = written(result, tmp_path, strategies=strategies(result), features=())
    assert without.count("<img ") == 14 and without != page


def test_it_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    result = made(tmp_path / "job")
    page, elements = written(
        result, tmp_path, title=HOSTILE, features=(HOSTILE, *FEATURES[1:]), facts={HOSTILE: HOSTILE}
    )
    assert elements.scripts == [] and "img" not in elements.tags and HOSTILE not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "script-src" not in page and "default-src 'none'" in page


def test_quantiles_lie_where_they_are() -> None:
    quantiles = torch.tensor([[[-100.0, -1.0, 0.0, 1.0, 100.0]]])
    figure = ranges_svg(["w"], ["all"], quantiles)
    found = re.search(r'<line x1="([\d.]+)" x2="([\d.]+)"', figure)
    zero = re.search(r'class="zero" x1="([\d.]+)"', figure)
    assert found is not None and zero is not None
    low, high, middle = float(found[1]), float(found[2]), float(zero[1])
    assert low < middle < high and middle - low == pytest.approx(high - middle, abs=0.2)
    assert "nan" not in ranges_svg(["w"], ["all"], torch.zeros(1, 1, 5))
    assert "nan" not in cloud_svg(torch.zeros(3, 2), torch.zeros(3))


def test_mistakes_are_told(tmp_path: Path) -> None:
    result = made(tmp_path / "job")
    other = source()
    other["observation"] += 1
    with pytest.raises(ValueError, match="the source is not that of"):
        write_dataset_report(result, tmp_path / "page.html", source=as_rows(other))
    with pytest.raises(IsADirectoryError, match="is a folder, where the page is to be a file"):
        write_dataset_report(result, tmp_path)
    with pytest.raises(ValueError, match="rows were reduced to nothing"):
        write_dataset_report(made(tmp_path / "none", reduce=[]), tmp_path / "page.html")


@pytest.mark.skipif(
    not ((shutil.which("chromium") or shutil.which("google-chrome")) and shutil.which("chromedriver")),
    reason="there is no Chromium with its chromedriver on the PATH",
)
def test_a_browser_complains_of_nothing(tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    result = made(tmp_path / "job", side=8)
    written(
        result, tmp_path, source=as_rows(source(8)), strategies=strategies(result), features=(), title=HOSTILE
    )
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.set_window_size(1000, 900)
        browser.get((tmp_path / "page.html").as_uri())
        assert browser.get_log("browser") == []
        assert browser.execute_script("return window.hacked") is None
        sizes = browser.execute_script(
            "return [...document.images].map(i => [i.naturalWidth, i.clientWidth])"
        )
        assert len(sizes) == 14 and all(natural == 8 and wide > 50 for natural, wide in sizes)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        colours = browser.execute_script(
            "return [...document.querySelectorAll('.cloud circle')].map(c => getComputedStyle(c).fill)"
        )
        assert len(set(colours)) == 2
    finally:
        browser.quit()
