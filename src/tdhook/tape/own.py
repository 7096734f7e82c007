"""Own tapes: what was run on a tape that is apart from the model's, to be pulled back later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tdhook.tape.internals import is_without_derivative
from tdhook.tape.layouts import lay_out
from tdhook.tape.undoing import set_to

__all__ = ["NoDerivative", "OwnTape", "derives"]


class NoDerivative(NotImplementedError):
    """Torch only pretends to differentiate an operation.

    Args:
        what: the operation, in words.
    """

    def __init__(self, what: str = "an operation") -> None:
        super().__init__(
            f"{what} has no derivative, so that no relevance comes through it; explain the model as it was before it "
            "was quantised, or register a derivative (torch.library.register_autograd)"
        )


derives: ContextVar[bool] = ContextVar("derives", default=False)
"""Whether plain derivatives are being taken: what runs now is run again by a backward pass that does so itself."""


class OwnTape:
    """Where a tape begins and ends.

    These are places on the tape, not tensors: one that shares memory with what is overwritten afterwards has another
    place from then on, and nothing that was computed before leads there.

    Args:
        inputs: what it begins at; those that require no gradient are constants.
        outputs: what was computed.

    Attributes:
        inputs: likewise; their values may be others by now.
        ends: the places of the outputs.

    Raises:
        NoDerivative: an output has none.
    """

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if any(map(is_without_derivative, outputs)):
            raise NoDerivative
        self.inputs = inputs
        self._begins = [_place(x) for x in inputs]
        self.ends = [_place(z) for z in outputs]

    @property
    def nodes(self) -> Iterator[Node]:
        """The nodes that it ends at."""
        return (end.node for end in self.ends if end is not None)

    def pull(self, grads: Sequence[Tensor], *, zeros: bool = False) -> tuple[Tensor | None, ...]:
        """The vector-Jacobian product for each input; ``None`` for constants, and for all where no output is on it.

        Args:
            grads: one for each output.
            zeros: whether an input that no output depends on has zeros, or else ``None`` too.
        """
        begins = {i: begin for i, begin in enumerate(self._begins) if begin is not None}
        live = [(end, grad) for end, grad in zip(self.ends, grads, strict=True) if end is not None]
        found: list[Tensor | None] = [None] * len(self._begins)
        if begins and live:
            lay_out(self.nodes)
            with set_to(derives, True):
                pulled: Sequence[Tensor | None] = torch.autograd.grad(
                    [end for end, _ in live],
                    list(begins.values()),
                    [grad for _, grad in live],
                    retain_graph=True,
                    allow_unused=True,
                )
            for i, grad in zip(begins, pulled, strict=True):
                found[i] = torch.zeros_like(self.inputs[i]) if grad is None and zeros else grad
        return tuple(found)


def _place(x: Tensor) -> GradientEdge | None:
    return get_gradient_edge(x) if x.requires_grad else None
