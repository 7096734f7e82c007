"""Meters of differences: identities that tell how much relevance passes, where it is that of a difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tdhook.conventions import Convention, relevance_of
from tdhook.relevance.propagation.beside import OfDifference, is_place, numbered
from tdhook.relevance.propagation.call import Call
from tdhook.relevance.propagation.places import Place
from tdhook.relevance.secants.pair import difference
from tdhook.selectors.kinds import INDEXED
from tdhook.tape.functions import Identity, alias, on_tape, parts
from tdhook.tape.masks import masks_in
from tdhook.tape.trees import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["metered_arguments", "metered_outputs", "moved_beside"]

Note: TypeAlias = "Callable[[str, Tensor], None]"


def metered_arguments(call: Call, place: Place, note: Note, flow: Convention) -> Call:
    """A call that tells what leaves by its arguments."""

    def leave(x: Tensor, at: int) -> Tensor:
        return _meter(x, place, at, (note, "left"), flow)

    return call.given(*numbered(leave, (call.args, call.kwargs)))


def metered_outputs(outputs: Any, place: Place, note: Note, flow: Convention) -> Any:
    """What a call returned, which tells what arrives."""
    return numbered(lambda z, at: _meter(z, place, ~at, (note, "arrived"), flow), outputs)


def moved_beside(call: Call, outputs: Any, place: Place, note: Note) -> Any:
    """What a call returned that moves data, which tells what goes to those off the tape that differ on the reference.

    These are numbers that were made of a mask, or detached copies: nothing leads from them to the inputs.
    """
    leaves, spec = tree_flatten((call.args, call.kwargs))
    tensors = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
    # What the model overwrites afterwards is kept.
    fixed = {i: x.detach().clone() for i, x in tensors.items() if not on_tape(x)}
    if not fixed:
        return outputs
    indexed = type(call.module).__name__ in INDEXED

    def differs() -> list[Tensor]:
        """What is returned of the differences."""
        starts = dict(zip(tensors, place.starts, strict=True))
        # Data are moved to the same places.
        before = {
            i: x if (start := starts[i]) is None or (indexed and is_place(x)) else start.expand_as(x)
            for i, x in fixed.items()
        }
        made = []
        for values in (fixed, before):
            # It is linear in all that it moves.
            given = [
                values[i] if i in values else torch.zeros_like(x) if isinstance(x, Tensor) else x
                for i, x in enumerate(leaves)
            ]
            args, kwargs = tree_unflatten(given, spec)
            returned = Call(call.module, call.function, args, kwargs).natively()
            made.append([z for z in tree_leaves(returned) if isinstance(z, Tensor)])
        return [difference(z, z0) for z, z0 in zip(*made, strict=True)]

    return numbered(lambda z, at: _Beside.apply(z, differs, at, note), outputs)


class _Beside(Identity):
    """Identity that tells what is shared out to what differs beside the values on the tape."""

    @staticmethod
    def forward(z: Tensor, differs: Callable[[], list[Tensor]], at: int, note: Note) -> Tensor:
        return alias(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.differs, ctx.at, ctx.note = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> object:
        rest, g = parts(ctx.differs()[ctx.at].to(grad.dtype)), parts(grad)
        ctx.note("constant", relevance_of(rest, g, "gradient"))
        return grad, None, None, None


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
        x, difference = OfDifference.difference(ctx)
        amount = relevance_of(difference, parts(grad), ctx.flow)
        masks = masks_in(parts(x))
        if masks is not None:
            amount = torch.where(masks, 0.0, amount)
        note, column = ctx.tell
        note(column, amount)
        return grad, None, None, None, None
