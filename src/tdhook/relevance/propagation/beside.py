"""Identities at which what travels backwards is converted where it is that of differences from a reference.

A call takes down what it meets in the run that is explained, and again in the run on the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tdhook.conventions import Convention
from tdhook.models.snapshots import is_of_a_library
from tdhook.relevance.propagation.call import ALONE, Call, Run, Setting
from tdhook.relevance.propagation.conversions import finite_product, stabilizer_at
from tdhook.relevance.propagation.merges import Place as Merging
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.places import Place
from tdhook.relevance.propagation.reference import Reference
from tdhook.relevance.propagation.stabilisers import Stabilizer, left_of, quotient, rounding, stabilize
from tdhook.relevance.propagation.unfollowed import require_followed
from tdhook.relevance.secants.pair import difference
from tdhook.tape.functions import Identity, alias, on_tape, parts, whole
from tdhook.tape.masks import unmasked
from tdhook.tape.meeting import Meeting
from tdhook.tape.trees import tree_flatten, tree_leaves, tree_unflatten

__all__ = [
    "OfDifference",
    "between",
    "damped",
    "damped_at",
    "is_place",
    "moving",
    "noted",
    "numbered",
    "there",
]


def _reference(call: Call) -> Reference:
    assert call.setting.reference is not None, "there is no reference"
    return call.setting.reference


def _leaves(call: Call) -> Sequence[object]:
    """The leaves of the arguments, which mostly are the arguments."""
    args = call.args
    if call.kwargs or not all(isinstance(x, Tensor) for x in args):
        return tree_leaves((args, call.kwargs))
    return args


def noted(first: Callable[[Call, Place], Any], second: Run = Call.natively) -> Run:
    """How calls run: ``first`` in the run that is explained, ``second`` in that on the reference."""

    def run(call: Call) -> Any:
        reference, name = _reference(call), type(call.module).__name__
        given = _leaves(call)
        module = None if isinstance(call.module, Operation) else call.module
        if reference.running:
            return reference.follow(name, given, lambda: second(call), module)
        place = reference.place(name, given, module)
        if _reads_nothing_else(call):
            outputs = first(call, place)
        else:
            with Meeting(given) as met:
                outputs = first(call, place)
            place.met_within(met.others)
        made = (outputs,) if isinstance(outputs, Tensor) else tree_leaves(outputs)
        place.made = [z.shape for z in made if isinstance(z, Tensor)]
        return outputs

    return run


def _reads_nothing_else(call: Call) -> bool:
    """Whether what is called reads nothing but its arguments and what modules hold, as code of libraries does."""
    if torch.compiler.is_compiling():
        return True
    code = call.function if isinstance(call.module, Operation) else type(call.module)
    return is_of_a_library(str(getattr(code, "__module__", None) or "torch"))


def moving(call: Call) -> Any:
    """Make a call that moves data, and see that the reference has them moved to the same places."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and is_place(x)]
    if places:
        for i, x in zip(places, _reference(call).moved(type(call.module).__name__, leaves), strict=True):
            leaves[i] = x
        call = call.given(*tree_unflatten(leaves, spec))
    return call.execute()


def is_place(x: Tensor) -> bool:
    """Whether a tensor may say where data are moved to: whole numbers, and truth values."""
    return not x.is_floating_point() and not x.is_complex()


def there(start: Tensor | None, x: Tensor) -> Tensor:
    """A value of the run on the reference, if it is another one than ``x`` there."""
    return x if start is None else start


def between(run: Run, own: Convention, flow: Convention, epsilon: Stabilizer = rounding) -> Run:
    """``run``, whose values are in its ``own`` convention, for differences in that of ``flow``."""
    if own == flow:
        return run
    before, behind = (_Times, _Per) if flow == "relevance" else (_Per, _Times)

    def first(call: Call, place: Place) -> Any:
        setting = call.setting

        def enter(x: Tensor, at: int) -> Tensor:
            entered: Tensor = before.apply(x, place, at, epsilon, setting)
            return entered

        if len(call.args) == 1 and isinstance(call.args[0], Tensor) and not call.kwargs:
            call = call.on(enter(call.args[0], 0))
        else:
            call = call.given(*numbered(enter, (call.args, call.kwargs)))
        return _behind(run(call), behind, place, epsilon, setting)

    return noted(first, run)


def damped(run: Run, epsilon: Stabilizer) -> Run:
    """``run`` in the gradient convention, with the stabiliser's share of relevance taken off its outputs."""
    if epsilon is rounding or epsilon == 0:
        return run

    return noted(lambda call, place: damped_at(run(call), place, epsilon, call.setting), run)


def damped_at(outputs: Any, place: Place, epsilon: Stabilizer, setting: Setting) -> Any:
    """Outputs at which the stabiliser's share is taken off."""
    return _behind(outputs, _Damped, place, epsilon, setting)


def _behind(outputs: Any, identity: Any, place: Place, epsilon: Stabilizer, setting: Setting) -> Any:
    return numbered(lambda z, at: identity.apply(z, place, ~at, epsilon, setting), outputs)


def numbered(function: Callable[[Tensor, int], Tensor], tree: Any) -> Any:
    """Apply ``function`` to all tensors of a nested structure that gradients flow to, and their numbers in it."""
    if isinstance(tree, Tensor):
        return function(tree, 0) if on_tape(tree) else tree
    leaves, spec = tree_flatten(tree)
    at = -1
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            at += 1
            if on_tape(x):
                leaves[i] = function(x, at)
    return tree_unflatten(leaves, spec)


class OfDifference(Identity):
    """Identity that sees the difference of its value.

    That is the argument of a call by its number ``at``, or its output by the number ``~at``.
    """

    @staticmethod
    def forward(x: Tensor, place: Place, at: int, epsilon: Stabilizer, setting: Setting = ALONE) -> Tensor:
        return alias(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.where, ctx.at, ctx.stabilizer, ctx.setting = inputs
        if ctx.setting.merges is not None:
            ctx.place = Merging()
        ctx.save_for_backward(x)

    @staticmethod
    def difference(ctx: Any) -> tuple[Tensor, Tensor]:
        """The value, and its difference as real numbers."""
        (x,) = ctx.saved_tensors
        place: Place = ctx.where
        start = place.before[~ctx.at] if ctx.at < 0 else place.starts[ctx.at]
        return x, parts(difference(x, there(start, x)))


class _Times(OfDifference):
    """Relevance per unit of difference becomes relevance."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> object:
        x, d = OfDifference.difference(ctx)
        return whole(finite_product(d, parts(grad)), x), *_NONE


class _Per(OfDifference):
    """Relevance becomes relevance per unit of difference."""

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> object:
        (x, d), r = OfDifference.difference(ctx), parts(relevance)
        if ctx.where.infinite:
            require_followed(ctx.setting.reference, ctx.where, ~d.isfinite() & (r != 0))
        grad = quotient(r, stabilize(d, stabilizer_at(ctx)))
        if ctx.setting.report is not None:
            ctx.setting.report("stabiliser", unmasked(r - finite_product(d, grad), d))
        return whole(grad, x), *_NONE


class _Damped(OfDifference):
    """Relevance per unit of difference loses the stabiliser's share."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> object:
        (x, d), g = OfDifference.difference(ctx), parts(grad)
        less = g * left_of(d, stabilizer_at(ctx))
        if ctx.setting.report is not None:
            lost = finite_product(d, g) - finite_product(d, less)
            ctx.setting.report("stabiliser", unmasked(lost, d))
        return whole(less, x), *_NONE


_NONE = (None,) * 4
