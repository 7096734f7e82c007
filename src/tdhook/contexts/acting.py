"""Acting: where an explained module is asked for no more than what its model does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Parameter, Signature, currentframe
from types import FrameType
from typing import TypeVar

__all__ = ["in_an_objective", "takes_one_argument"]

F = TypeVar("F", bound=Callable[..., object])

_OBJECTIVES = "torchrl.objectives"


def in_an_objective() -> bool:
    """Whether one of torchrl's losses or value estimators is at work.

    It runs networks in order to differentiate what they compute by parameters of its own, so that their outputs must
    stay on the tape, and it runs them many at once.
    """
    if _OBJECTIVES not in sys.modules:
        return False
    frame: FrameType | None = currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_OBJECTIVES):
            return True
        frame = frame.f_back
    return False


def takes_one_argument(function: F) -> F:
    """Give a forward pass the signature by which torchrl tells what takes a TensorDict."""
    names = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "tensordict")]
    function.__signature__ = Signature(names)  # type: ignore[attr-defined]
    return function
