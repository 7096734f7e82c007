"""What all tests share: reproducible randomness, one thread, and when slow tests run."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

CI = bool(os.environ.get("CI"))

# No deadline: how long one example takes says more about the machine than about the code.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if CI else "local")

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CI or config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: runs with --slow or where CI is set")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
