"""Lent parameters: those that a layer has only while it runs, as where hooks bring them from elsewhere (offloading)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdhook.tape.internals import buffers_of, parameters_of

__all__ = ["Lent", "are_lent"]

_COMPUTING = frozenset(
    (
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
    )
)


def are_lent(module: nn.Module) -> bool:
    """Whether parameters or buffers of a module have no values now, while it does not run."""
    own = (*parameters_of(module).values(), *buffers_of(module).values())
    return any(x is not None and x.is_meta for x in own)


class Lent(TorchFunctionMode):
    """Takes down the weight and the bias with which a layer computes.

    Args:
        layer: a linear layer or convolution.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer
        self._found: list[tuple[Tensor, Tensor | None]] = []

    def taken_down(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the layer."""
        with self:
            return function(x)

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias.

        Raises:
            NotImplementedError: the layer did not compute with one weight.
        """
        if len(self._found) != 1:
            raise NotImplementedError(
                f"the weight of {type(self._layer).__name__} is offloaded, and it is not seen to compute with one that "
                "is brought back: keep this layer in memory, or explain the model there"
            )
        return self._found[0]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _COMPUTING:
            weight = args[1] if len(args) > 1 else given["weight"]
            bias = args[2] if len(args) > 2 else given.get("bias")
            self._found.append((weight.detach(), None if bias is None else bias.detach()))
        return func(*args, **given)
