"""Explain what a policy did: layer-wise relevance propagation and its relatives, native to TensorDict."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdhook.attribution.lrp import LRP
    from tdhook.composites import Composite, preset
    from tdhook.perturbing.references import References
    from tdhook.targets import Contrast, Key, Target

__version__ = "0.1.0"

__all__ = ["LRP", "Composite", "Contrast", "Key", "References", "Target", "__version__", "preset"]

_HOMES = {
    "LRP": "tdhook.attribution.lrp",
    "Composite": "tdhook.composites",
    "Contrast": "tdhook.targets",
    "Key": "tdhook.targets",
    "References": "tdhook.perturbing.references",
    "Target": "tdhook.targets",
    "preset": "tdhook.composites",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
