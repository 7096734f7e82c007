"""Meters of differences: identities that tell how much relevance passes, where it is that of a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tdhook.conventions import Convention
from tdhook.relevance.propagation.beside import OfDifference, numbered
from tdhook.relevance.propagation.call import Call
from tdhook.relevance.propagation.reference import Place
from tdhook.tape.functions import parts
from tdhook.tape.masks import masks_in

__all__ = ["metered_arguments", "metered_outputs"]

Note: TypeAlias = "Callable[[str, Tensor], None]"


def metered_arguments(call: Call, place: Place, note: Note, flow: Convention) -> Call:
    """A call that tells what leaves by its arguments."""

    def leave(x: Tensor, at: int) -> Tensor:
        return _meter(x, place, at, (note, "left"), flow)

    return call.given(*numbered(leave, (call.args, call.kwargs)))


def metered_outputs(outputs: Any, place: Place, note: Note, flow: Convention) -> Any:
    """What a call returned, which tells what arrives."""
    return numbered(lambda z, at: _meter(z, place, ~at, (note, "arrived"), flow), outputs)


def _meter(x: Tensor, place: Place, at: int, tell: tuple[Note, str], flow: Convention) -> Tensor:
    metered: Tensor = _Meter.apply(x, place, at, tell, flow)
    return metered


class _Meter(OfDifference):
    """Identity that tells how much relevance passes."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.where, ctx.at, ctx.tell, ctx.flow = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> object:
        amount = parts(grad)
        x, difference = OfDifference.difference(ctx)
        if ctx.flow == "gradient":
            amount = torch.where(amount == 0, 0.0, difference * amount)
        masks = masks_in(parts(x))
        if masks is not None:
            amount = torch.where(masks, 0.0, amount)
        note, column = ctx.tell
        note(column, amount)
        return grad, None, None, None, None
