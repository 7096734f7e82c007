"""What the tests of pages share: rollouts, and a page that is taken apart again."""

from __future__ import annotations

import base64
import json
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from tdhook.pages.writing import write_report

FEATURES, ACTIONS = ("angle", "speed", "height"), ("left", "right")


def rollout(*size: int, outputs: int = 0) -> TensorDict:
    middle = (outputs,) if outputs else ()
    taken = torch.arange(torch.Size(size).numel()).reshape(size) % 2
    return TensorDict(
        {
            "observation": torch.randn(*size, 3),
            "attr": {"observation": torch.randn(*size, *middle, 3)},
            "action": torch.nn.functional.one_hot(taken, 2),
            "next": {"reward": torch.randn(*size, 1), "done": torch.rand(*size, 1) < 0.2},
        },
        size,
    )


def with_frames(made: TensorDict, height: int = 12, width: int = 10) -> TensorDict:
    made["frame"] = torch.randint(0, 256, (*made.batch_size, height, width, 3), dtype=torch.uint8)
    made["attr", "frame"] = torch.randn(*made.batch_size, height, width)
    return made


class Elements(HTMLParser):
    """What a browser makes of the page: the text of each script, and of everything else together."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside = tag
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


class Written:
    """A page that was written, taken apart again."""

    def __init__(self, made: TensorDict, path: Path, **options: Any) -> None:
        self.path = write_report(
            made, path / "page.html", **{"features": FEATURES, "actions": ACTIONS, **options}
        )
        self.page = self.path.read_text(encoding="utf-8")
        self.elements = Elements(self.page)
        self.words = self.elements.words
        self.data = json.loads(self.elements.scripts[0])
        self.size = (self.data["environments"], self.data["time"])
        self.pictures = self.data["pictures"]

    def numbers(self, packed: dict[str, str] | None) -> Tensor:
        assert packed is not None
        array = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), packed["kind"])
        return torch.from_numpy(array.copy()).reshape(*self.size, -1)

    def view(self, place: int = 0, name: str = "relevance") -> Tensor:
        return self.numbers(self.data["views"][place][name])

    def rows(self, place: int = 0) -> list[str]:
        return list(self.data["views"][place]["rows"])

    def map(self, environment: int, place: int, view: int = 0) -> Tensor:
        packed = zlib.decompress(base64.b64decode(self.pictures["maps"][view][environment][place]))
        values = torch.from_numpy(np.frombuffer(packed, np.int8).copy()).reshape(self.pictures["shape"])
        return values * (self.pictures["tops"][view] / 127)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b.float(), rtol=1e-4, atol=1e-6)
