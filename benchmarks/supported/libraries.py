"""The libraries whose models are measured, and a model of each of their names."""

from __future__ import annotations

from typing import Any

from benchmarks.supported import measuring
from benchmarks.supported.finding import subject as of_transformers
from benchmarks.supported.making import NotBuilt, model_types
from benchmarks.supported.torchvision_models import names as torchvision_names
from benchmarks.supported.torchvision_models import subject as of_torchvision

__all__ = ["NAMES", "NotBuilt", "measured"]

NAMES = {"transformers": model_types, "torchvision": torchvision_names}


def measured(library: str, name: str, row: dict[str, Any]) -> dict[str, Any]:
    """What is measured of a model; ``row`` is told what the model is as soon as that is known.

    Raises:
        NotBuilt: there is no such small model.
    """
    found, told = (of_transformers if library == "transformers" else of_torchvision)(name)
    row.update(told)
    return measuring.measured(found)
