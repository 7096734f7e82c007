"""Random numbers that a graph cannot draw a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["none_drawn"]


class _Refusing(TorchDispatchMode):
    """Raises where random numbers are drawn for what is on the tape."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and torch.is_grad_enabled():
            raise NotImplementedError(
                f"the model draws random numbers ({func.overloadpacket.__name__}), which one graph does not draw once "
                "more for the reference (baseline); leave out compile, or explain the model in eval mode"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def none_drawn() -> Iterator[None]:
    """See to it that what is traced draws no random numbers; where nothing is traced it may.

    Raises:
        NotImplementedError: it does.
    """
    if not torch.compiler.is_compiling():
        yield
        return
    with _Refusing():
        yield
