"""Functions with a backward pass of their own, of which nothing else is known: that pass says how relevance goes."""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

import torch
from torch import Tensor

from tdhook.relevance.propagation.stabilisers import rounding
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.rules.epsilon import EpsilonRule
from tdhook.tape.cotangents import cotangent, equal_but_for_rounding, rounding_of
from tdhook.tape.functions import may_look_at, parts, whole
from tdhook.tape.trees import tree_leaves

__all__ = ["own_backward"]

Shapes: TypeAlias = "tuple[tuple[torch.Size, torch.dtype], ...]"
Beside: TypeAlias = "tuple[object, ...] | None"
Key: TypeAlias = "tuple[Shapes, tuple[bool, ...], Beside]"

# Of how many different calls of one function it is kept what it is.
_MOST = 256
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _Kind(Enum):
    """What a function is, as its derivative tells."""

    ELEMENTWISE = "each entry of its value is a function of one entry of its argument"
    MULTILINEAR = "it is linear in each of several arguments"
    OTHER = "neither"


class _OwnBackward(EpsilonRule):
    """Relevance through one function that is known by its vector-Jacobian product alone.

    An element-wise function passes relevance on, as activations do. Another one shares it by the generic epsilon rule,
    ``R_i = x_i (J^T (R / stab(z)))_i``, and a product of several arguments gives each an equal part of that. Which it
    is, pull-backs of two cotangents tell. An answer is kept for arguments of those shapes and with those numbers and
    words beside, but that it is element-wise is looked at each time: that may hold for some values alone.
    """

    def __init__(self) -> None:
        super().__init__(rounding)
        self._kinds: dict[Key, _Kind] = {}

    def __repr__(self) -> str:
        return "by its own backward pass"

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        per_output = tuple(map(_per_unit, relevance, step.outputs))
        grads = step.vjp(*per_output)
        kind = self._kind_of(step, tuple(g is not None for g in grads))
        if kind is _Kind.ELEMENTWISE:
            return relevance
        share = 1 / len(step.inputs) if kind is _Kind.MULTILINEAR else 1.0
        shares = tuple(
            None if g is None else whole(share * parts(x) * parts(g), x)
            for x, g in zip(step.inputs, grads, strict=True)
        )
        if step.report is not None:
            for r, z, s in zip(relevance, step.outputs, per_output, strict=True):
                if not (z.is_floating_point() or z.is_complex()):
                    continue
                step.report("stabiliser", parts(r) - parts(z) * parts(s))
                step.report("constant", parts(z) * parts(s))
            for given in shares:
                if given is not None:
                    step.report("constant", -parts(given))
        return shares

    def _kind_of(self, step: Step, live: tuple[bool, ...]) -> _Kind:
        shapes = tuple((x.shape, x.dtype) for x in step.inputs)
        beside = _beside(step)
        key = shapes, live, beside
        known = self._kinds.get(key)
        if known not in (None, _Kind.ELEMENTWISE):
            return known
        if not all(map(may_look_at, step.inputs)):
            return next(
                (
                    kind
                    for (other, *rest), kind in self._kinds.items()
                    if _ranks(other) == _ranks(shapes) and rest == [live, beside]
                ),
                _Kind.OTHER,
            )
        found = _kind(step)
        if found is None:
            return _Kind.OTHER
        if beside is not None:
            if len(self._kinds) >= _MOST:  # seeds, say, which are others each time
                self._kinds.clear()
            self._kinds[key] = found
        return found


def own_backward() -> EpsilonRule:
    """The rule of one function that nothing is known of but its backward pass."""
    return _OwnBackward()


def _beside(step: Step) -> Beside:
    """What a function is called with besides tensors; ``None`` if that is something else than numbers and words."""
    plain = tuple(x for x in tree_leaves(step.arguments) if not isinstance(x, Tensor))
    return tuple(map(repr, plain)) if all(type(x) in _PLAIN for x in plain) else None


def _ranks(key: Shapes) -> list[tuple[int, torch.dtype]]:
    return [(len(shape), dtype) for shape, dtype in key]


def _per_unit(relevance: Tensor, z: Tensor) -> Tensor:
    if not (z.is_floating_point() or z.is_complex()):
        return relevance
    return whole(parts(relevance) / rounding(parts(z)), z)


def _kind(step: Step) -> _Kind | None:
    """What the function of a step is, unless the derivative is zero, which tells nothing."""
    inputs, outputs = step.inputs, step.outputs
    cotangents = [[cotangent(z, seed) for z in outputs] for seed in (1, 2)]
    pulled = [step.vjp(*those) for those in cotangents]
    if not any(g is not None and bool(g.any()) for g in pulled[0]):
        return None
    if len(outputs) > 1 or any(g is None for grads in pulled for g in grads):
        return _Kind.OTHER
    (z,) = outputs
    if len(inputs) > 1:
        terms = [
            (parts(z) * parts(v), parts(x) * parts(g))
            for (v,), grads in zip(cotangents, pulled, strict=True)
            for x, g in zip(inputs, grads, strict=True)
            if g is not None
        ]
        return _Kind.MULTILINEAR if all(_same_sum(a, b) for a, b in terms) else _Kind.OTHER
    (((v,), (w,)), ((g,), (h,)), (x,)) = cotangents, pulled, inputs
    if x.shape != z.shape or x.is_complex() or z.is_complex() or g is None or h is None:
        return _Kind.OTHER
    return _Kind.ELEMENTWISE if equal_but_for_rounding(g * w, h * v) else _Kind.OTHER


def _same_sum(a: Tensor, b: Tensor) -> bool:
    scale = a.abs().sum() + b.abs().sum()
    return bool((a.sum() - b.sum()).abs() <= rounding_of(a) * scale)
