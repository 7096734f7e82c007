"""What rules share that divide relevance by contributions: modified parameters, relevance per unit of output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdhook.relevance.propagation.conversions import finite_product
from tdhook.relevance.propagation.stabilisers import Stabilizer, moved_away, quotient, stabilize
from tdhook.relevance.propagation.steps import Modify, Step, unmodified
from tdhook.tape.masks import unmasked

__all__ = [
    "itself",
    "magnitude",
    "modified_by",
    "negative",
    "per_unit",
    "positive",
    "report_bias",
    "share_of",
    "squared",
]


@dataclass(frozen=True)
class _Modified:
    """``change`` as a parameter modification that treats the parameters named in ``zero`` as zero."""

    change: Callable[[Tensor], Tensor]
    zero: tuple[str, ...]

    def __call__(self, name: str, param: Tensor) -> Tensor:
        if name.rpartition(".")[2] in self.zero:
            return torch.zeros_like(param)
        return self.change(param)


def modified_by(change: Callable[[Tensor], Tensor], zero: Sequence[str] = ()) -> Modify:
    """``change`` as a parameter modification that treats the parameters named in ``zero`` as zero."""
    return unmodified if change is itself and not zero else _Modified(change, tuple(zero))


def positive(x: Tensor) -> Tensor:
    """What of ``x`` is positive, and zero elsewhere."""
    return x.clamp(min=0)


def negative(x: Tensor) -> Tensor:
    """What of ``x`` is negative, and zero elsewhere."""
    return x.clamp(max=0)


def magnitude(x: Tensor) -> Tensor:
    """The size of ``x``, without its sign."""
    return x.abs()


def squared(x: Tensor) -> Tensor:
    """The square of ``x``."""
    return x.square()


def itself(x: Tensor) -> Tensor:
    """``x``, unchanged."""
    return x


def per_unit(step: Step, relevance: Tensor, z: Tensor, epsilon: Stabilizer, sign: int = 0) -> Tensor:
    """``R_j / stab(z_j)``: relevance per unit of output.

    Args:
        step: the step.
        relevance: that of the outputs.
        z: the denominators.
        epsilon: their stabiliser.
        sign: that of all denominators, where they have the same (a zero has no contributions, so that its sign is of no
            account); they are then overwritten, if the step allows it.
    """
    if not z.is_floating_point():
        return relevance
    if step.report is not None or callable(epsilon) or epsilon == 0:
        per_output = quotient(relevance, stabilize(z, epsilon))
        if step.report is not None:
            step.report("stabiliser", unmasked(relevance - finite_product(z, per_output), z))
        return per_output
    if sign:
        return quotient(relevance, z.add_(sign * epsilon) if step.writable else z + sign * epsilon)
    if step.writable:
        # As it is linear, a negative zero has no contributions either.
        return quotient(relevance, moved_away(z, epsilon))
    return quotient(relevance, stabilize(z, epsilon))


def share_of(step: Step, x: Tensor, grad: Tensor) -> Tensor:
    """``x * grad``, in the memory of ``grad`` if the step allows it."""
    return grad.mul_(x) if step.writable else x * grad


def report_bias(step: Step, modify: Modify, *per_output: Tensor) -> None:
    """Report what the bias takes, which is an input of one."""
    if step.report is not None:
        for s, b in zip(per_output, step.constants(modify), strict=True):
            if b is not None:
                step.report("bias", s * b)
