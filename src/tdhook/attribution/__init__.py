"""Attribution methods: what of the input made the model answer so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdhook.attribution.lrp import LRP

__all__ = ["LRP"]


def __getattr__(name: str) -> Any:
    # The rules live below this package and are usable without a method, so methods are imported on demand.
    if name == "LRP":
        from tdhook.attribution.lrp import LRP

        return LRP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
