"""Acting: where an explained module is asked for no more than what its model does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature, currentframe
from types import FrameType
from typing import TypeVar

__all__ = ["in_an_objective", "require_none_besides", "takes_one_argument"]

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


def require_none_besides(args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Raise where an explained module is called with something else than a TensorDict."""
    others = [*map(repr, args[1:]), *(name for name in kwargs if name != "tensordict")]
    if others:
        raise TypeError(
            f"an explained module takes a TensorDict and tensordict_out=, and also got {', '.join(others)}; put what "
            "the model reads into the TensorDict"
        )
