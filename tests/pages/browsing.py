"""A page in a real browser: what the tests of it see and do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ACTIONS = ("push left", "push right")


def rollout(steps: int, *batch: int, outputs: int = 0, side: int = 0, ends: int = 0) -> TensorDict:
    """Four features, two actions in turn; with a side, a square that moves and its relevance."""
    generator = torch.Generator().manual_seed(0)
    size = (*batch, steps)
    middle = (outputs,) if outputs else ()
    count = torch.arange(steps).expand(size)
    made = TensorDict(
        {
            "observation": torch.randn(*size, 4, generator=generator),
            "attr": {"observation": torch.randn(*size, *middle, 4, generator=generator)},
            "action": torch.nn.functional.one_hot(count % 2, 2),
            "next": {
                "reward": (count % 5).float()[..., None],
                "done": ((count + 1) % (ends or steps + 1) == 0)[..., None],
            },
        },
        size,
    )
    if side:
        frames = torch.zeros(*size, side, side, 3, dtype=torch.uint8)
        maps = torch.zeros(*size, side, side)
        for step in range(steps):
            frames[..., step, step % side, :, :] = 200
            maps[..., step, :, step % side] = 1.0 if step % 2 else -1.0
        made["frame"], made["attr", "frame"] = frames, maps
    return made


class Page:
    """A page that is open in the browser."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def show(self, path: Path, width: int = 1200, scheme: str = "light") -> Page:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        screen = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        for log in ("browser", "performance"):
            self.browser.get_log(log)  # what is kept there is of pages before
        self.browser.get(path.as_uri())
        self.until(lambda: self.drawn(0))
        return self

    def __call__(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def until(self, condition: Any) -> None:
        WebDriverWait(self.browser, 30, 0.02).until(lambda _: condition())

    def step(self) -> int:
        """The step that is shown."""
        return int(
            self.run("return document.getElementById('where').textContent.match(/step (\\d+)/)?.[1] ?? -1")
        )

    def drawn(self, step: int) -> bool:
        """Whether a step is shown, with its picture, which is there a moment later."""
        late = self("picture").is_displayed() and self("screen").get_attribute("data-step") != str(step)
        return self.step() == step and not late

    def slide(self, step: int) -> None:
        self.run(
            "const s = document.getElementById('step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
            step,
        )
        self.until(lambda: self.drawn(step))

    def press(self, *keys: str) -> None:
        self.browser.find_element(By.TAG_NAME, "body").send_keys(*keys)

    def pixels(self, selector: str = "#screen") -> str:
        return str(self.run("return document.querySelector(arguments[0]).toDataURL()", selector))

    def colour(self, across: float, down: float, selector: str = "#screen") -> list[int]:
        """Of a pixel of a canvas, given in parts of its width and height."""
        found = self.run(
            "const c = document.querySelector(arguments[0]), x = arguments[1] * c.width, y = arguments[2] * c.height;"
            "const one = new OffscreenCanvas(1, 1).getContext('2d');"
            "one.drawImage(c, -Math.floor(x), -Math.floor(y)); return [...one.getImageData(0, 0, 1, 1).data]",
            *(selector, across, down),
        )
        return list(found)[:3]

    def bars(self) -> list[tuple[str, float, float, float]]:
        """Name, observed value, width with its sign in percent of half the room, and number of each bar."""
        rows = self.run(
            "return [...document.querySelectorAll('#bars tbody tr')].map(r => { const [n, o, b, v] = r.cells,"
            " bar = b.querySelector('.bar'), w = bar.offsetWidth / bar.parentNode.offsetWidth * 200;"
            " return [n.textContent, o.textContent, bar.classList.contains('negative') ? -w : w, v.textContent] })"
        )
        return [(name, number(observed), width, number(value)) for name, observed, width, value in rows]

    def facts(self) -> dict[str, str]:
        return dict(
            self.run(
                "return [...document.querySelectorAll('#facts div')].map(d => [...d.children].map(c => c.textContent))"
            )
        )


def number(text: str) -> float:
    return float(text.replace("−", "-") or "nan")
