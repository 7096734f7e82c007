"""Meters of differences: identities that tell how much relevance passes, where it is that of a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tdhook.conventions import Convention
from tdhook.relevance.propagation.beside import OfDifference
from tdhook.relevance.propagation.call import Call
from tdhook.relevance.propagation.reference import Place
from tdhook.tape.functions import on_tape, parts
from tdhook.tape.masks import masks_in
from tdhook.tape.trees import tree_flatten, tree_unflatten

__all__ = ["metered_arguments", "metered_outputs"]

Note: TypeAlias = "Callable[[str, Tensor], None]"


def metered_arguments(call: Call, place: Place, note: Note, flow: Convention) -> Call:
    """A call that tells what leaves by its arguments."""
    args, kwargs = _metered((call.args, call.kwargs), place, note, flow, "left")
    return call._replace(args=args, kwargs=kwargs)


def metered_outputs(outputs: Any, place: Place, note: Note, flow: Convention) -> Any:
    """What a call returned, which tells what arrives."""
    return _metered(outputs, place, note, flow, "arrived")


def _metered(tree: Any, place: Place, note: Note, flow: Convention, column: str) -> Any:
    leaves, spec = tree_flatten(tree)
    at = -1
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            at += 1
            if on_tape(x):
                leaves[i] = _Meter.apply(x, place, at if column == "left" else ~at, (note, column), flow)
    return tree_unflatten(leaves, spec)


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
