"""Makes torchvision importable beside a torch whose build torchvision's compiled part does not fit.

torchvision is wanted for its model classes only, by zennit too. Its Python part loads without its compiled part, save
for two operators that it looks up by name while it is imported. Declaring them is enough: nobody calls them.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

__all__ = ["import_torchvision"]

OPERATORS = ("nms", "qnms")


def import_torchvision() -> None:
    """Import torchvision, if it is installed."""
    if importlib.util.find_spec("torchvision") is None:
        return  # then zennit is not installed either, and the tests say that they are skipped
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # an operator does not exist: the compiled part did not load
        for name in OPERATORS:
            torch.library.define(
                f"torchvision::{name}", "(Tensor boxes, Tensor scores, float overlap) -> Tensor"
            )
        importlib.import_module("torchvision")
