"""What all tests share: the same random numbers in every run, one thread, and when slow tests run."""

from __future__ import annotations

import os
import random
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import register_random, settings
from torch import Tensor

CI = bool(os.environ.get("CI"))

# No deadline: how long one example takes says more about the machine than about the code. The same examples in every
# run and every clone; `nox -s explore` draws others, and more.
settings.register_profile("same", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile(
    "explore", deadline=None, derandomize=False, database=None, print_blob=True, max_examples=1000
)
settings.load_profile("same")

torch.set_num_threads(1)

# Each seed is put by for devices that might come yet, together with the stack, which costs more than many a test.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None


class _Torch:
    """The random state of torch, which is the same at the beginning of each example of hypothesis."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> Tensor:
        return torch.get_rng_state()

    def setstate(self, state: Tensor) -> None:
        torch.set_rng_state(state)


_TORCH = _Torch()  # hypothesis does not keep it alive
register_random(_TORCH)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collectstart(collector: pytest.Collector) -> None:
    # A module of tests is imported now: what it draws there is the same, whatever else is collected.
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "given" in vars(getattr(item, "module", None) or object):
            item.add_marker("hypothesis")  # its own plugin overlooks draws that are nested in a test
    if CI or config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: runs with --slow or where CI is set")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test draws without a seed of its own is the same in every run, environments' first states too."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    if find_spec("gymnasium") is None:
        return
    from gymnasium.utils import seeding

    drawn = seeding.np_random

    def np_random(seed: int | None = None) -> Any:
        return drawn(0 if seed is None else seed)

    monkeypatch.setattr(seeding, "np_random", np_random)


@pytest.fixture
def doubles():
    """Tensors are made in double precision, and drawn alike in each test."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
