"""Policies and environments to explain (extra ``rl``: torchrl and gymnasium, imported at the first use)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tdhook.rl.policies import Policy, build_actor, demo_policy, load_policy, make_env, save_policy

if TYPE_CHECKING:
    from tdhook.rl.before import StepBefore
    from tdhook.rl.explain import Explain
    from tdhook.rl.history import explain_windows
    from tdhook.rl.losses import LossTerm, TDError
    from tdhook.rl.raw import frame_times, raw_relevance, relevance_of_frames
    from tdhook.rl.tracking import AttributionTracker

__all__ = [
    "AttributionTracker",
    "Explain",
    "LossTerm",
    "Policy",
    "StepBefore",
    "TDError",
    "build_actor",
    "demo_policy",
    "explain_windows",
    "frame_times",
    "load_policy",
    "make_env",
    "raw_relevance",
    "relevance_of_frames",
    "save_policy",
]

# Imported when they are asked for: they need torchrl as soon as that.
_HOMES = {
    "AttributionTracker": "tdhook.rl.tracking",
    "Explain": "tdhook.rl.explain",
    "LossTerm": "tdhook.rl.losses",
    "StepBefore": "tdhook.rl.before",
    "TDError": "tdhook.rl.losses",
    "explain_windows": "tdhook.rl.history",
    "frame_times": "tdhook.rl.raw",
    "raw_relevance": "tdhook.rl.raw",
    "relevance_of_frames": "tdhook.rl.raw",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
