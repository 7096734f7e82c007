"""What the tests of pages are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reports import Written


@pytest.fixture
def written(tmp_path: Path) -> Any:
    return lambda made, **options: Written(made, tmp_path, **options)
