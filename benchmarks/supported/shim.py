"""Lets torchvision be imported beside a torch that its compiled part does not fit, as the tests do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from torchvision_shim import import_torchvision

__all__ = ["import_torchvision"]
