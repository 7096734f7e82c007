"""Rules for a linear layer together with the activation behind it: what cancels in between is seen.

The secant of an activation knows the sum of the contributions to it alone. These rules know more of them: they look at
what a few of them would have done without the others.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.call import Run
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.handles import Behind
from tdhook.relevance.propagation.revealed import revealed
from tdhook.relevance.propagation.sharing import SECANT
from tdhook.relevance.propagation.steps import Grads, Step, unmodified
from tdhook.relevance.rules.shares import magnitude, modified_by, squared
from tdhook.relevance.secants.slopes import slope
from tdhook.tape.functions import may_look_at_once

__all__ = ["RevealCancelRule", "ShapleyRule"]


@dataclass(frozen=True)
class _Rise:
    """By how much the argument of a function differs from that on the reference.

    Attributes:
        start: the argument on the reference.
        sum: of the contributions to it.
        size: the sum of their sizes.
    """

    start: Tensor
    sum: Tensor
    size: Tensor

    @cached_property
    def end(self) -> Tensor:
        """The argument."""
        return self.start + self.sum

    @property
    def rounding(self) -> Tensor:
        """What is no amount, but what the values that were subtracted are rounded to."""
        largest = torch.maximum(self.start.abs(), self.end.abs())
        return 4 * torch.finfo(self.size.dtype).eps * (self.size + largest)


class _TogetherRule(PropagationRule):
    """A rule for linear layers together with what is behind them.

    A contribution ``c`` to an output counts ``mean + sign(c) half`` per unit of the function there.
    """

    convention: ClassVar[Convention] = "gradient"
    needs_outputs: ClassVar[bool] = True
    modifies: ClassVar[bool] = True
    reveals: ClassVar[bool] = True

    def bound(self, module: nn.Module, flow: Convention) -> Run:
        """Refuse to see values.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self!r} shares the difference from a baseline, and there is none: give LRP a baseline, or the "
            "layers another rule, EpsilonRule say"
        )

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """By the formula, with the function behind the layer."""
        super().against(module, flow)  # raises where the module is not linear
        return revealed(self, module, flow)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        return SECANT.propagate(step, relevance)

    def reveal(self, step: Step, rest: Tensor, handed: Tensor, start: Tensor, behind: Behind) -> Tensor:
        """What the input counts per unit, given what the output of the function behind the layer does.

        Args:
            step: the call of the layer, of differences.
            rest: what the output of the layer counts elsewhere.
            handed: what the output of the function counts.
            start: the output of the layer on the reference.
            behind: the function.
        """
        (x,), (z,) = step.inputs, step.outputs
        (size,), apart = step.modified((x.abs(),), _MAGNITUDE)
        own, together = z, step.vjp
        if step.differs:  # weights that are others on the reference contribute as well
            (own,), together = step.modified((x,), unmodified)
            size = size + (z - own).abs()
        mean, half = self.slopes(step, behind, _Rise(start, z, size))
        mean, half = rest + handed * mean, handed * half
        if step.report is not None and step.differs:
            step.report("constant", (z - own) * mean + (z - own).abs() * half)
        (common,), (signed,) = together(mean), apart(half)
        assert common is not None and signed is not None
        # An input that does not differ has no sign, and counts the mean of both (section 3.5.1 there).
        return common + x.sign() * signed

    @abstractmethod
    def slopes(self, step: Step, behind: Behind, rise: _Rise) -> tuple[Tensor, Tensor]:
        """``mean`` and ``half``, where ``mean * rise.sum + half * rise.size`` is by how much the function differs.

        Args:
            step: the call of the layer.
            behind: the function.
            rise: of its argument.
        """


class RevealCancelRule(_TogetherRule):
    """RevealCancel, for linear layers, given a baseline (Shrikumar et al. 2017, section 3.5.3).

    Contributions ``c_ij = w_ij (x_i - x0_i)`` to the difference of an output ``z_j`` are summed by their sign, to
    ``p_j`` and ``n_j``. Through the element-wise function ``f`` right behind the layer these go one after the other, in
    both orders, whose mean counts: ``(f(z0 + p) - f(z0) + f(z) - f(z0 + n)) / 2`` is due to ``p``, and the other way
    round to ``n``. So what cancels in the sum is seen, as it is not by the secant. Each is divided in proportion.

    What goes from the layer anywhere else, or to a second function, is shared by the secant, as under
    ``EpsilonRule(0)``. All arrives. A batch norm that is merged is a part of the layer.

    Raises:
        ValueError: there is no baseline.
    """

    def slopes(self, step: Step, behind: Behind, rise: _Rise) -> tuple[Tensor, Tensor]:
        function, start, end = behind.function, rise.start, rise.end
        gained, lost = (rise.sum + rise.size) / 2, (rise.sum - rise.size) / 2
        at_start, at_end = function(start), function(end)
        crossed = function(start + gained) - function(start + lost)
        difference, rounding = at_end - at_start, rise.rounding
        found = []
        for amount, share in ((gained, difference + crossed), (lost, difference - crossed)):
            nothing = amount.abs() <= rounding
            per_unit = share / 2 / torch.where(nothing, 1.0, amount)
            found.append(_least_where(nothing, per_unit, behind, (start, at_start), (end, at_end)))
        of_gained, of_lost = found
        return (of_gained + of_lost) / 2, (of_gained - of_lost) / 2


class ShapleyRule(_TogetherRule):
    """Shapley values of the contributions to each output, about, for linear layers, given a baseline.

    A contribution ``c_ij = w_ij (x_i - x0_i)`` is worth what it changes at the element-wise function ``f`` right behind
    the layer, on the mean over all others that may be there before it. The sum of these, a share ``q`` of all, is taken
    to be normal, with mean ``q sum_i c_ij`` and variance ``q (1 - q) sum_i c_ij^2``. The slope of ``f`` over it, on the
    mean over ``q``, counts alike of all; what is left is divided by the sizes ``|c_ij|``. Normal sums of coalitions are
    an idea of Ancona et al. (2019).

    Else it is as :class:`RevealCancelRule`, which knows of two groups. Where many contribute this one is nearer to the
    Shapley values.

    Raises:
        ValueError: there is no baseline.
    """

    def slopes(self, step: Step, behind: Behind, rise: _Rise) -> tuple[Tensor, Tensor]:
        function, start, end = behind.function, rise.start, rise.end
        (variance,), _ = step.modified((step.inputs[0].square(),), _SQUARED)
        at_start, at_end = function(start), function(end)
        nothing = rise.size <= rise.rounding
        # The two nodes of Gauss and Legendre, at which the variance is the same, and those of Gauss and Hermite.
        spread = (variance / 2).sqrt()

        first, last = (start + place * rise.sum for place in _NODES)
        crossed = function(first + spread) - function(first - spread)
        crossed = crossed + (function(last + spread) - function(last - spread))
        per_unit = crossed / 4 / torch.where(nothing, 1.0, spread)
        mean = _least_where(nothing, per_unit, behind, (start, at_start), (end, at_end))
        left = at_end - at_start - mean * rise.sum
        return mean, torch.where(nothing, 0.0, left / torch.where(nothing, 1.0, rise.size))


def _least_where(nothing: Tensor, slopes: Tensor, behind: Behind, *ends: tuple[Tensor, Tensor]) -> Tensor:
    """Where nothing contributes, what the least amount would count: the mean of the derivatives at both ends.

    Args:
        nothing: where that is.
        slopes: what counts elsewhere.
        behind: the function.
        ends: its arguments and values.
    """
    looks = may_look_at_once(nothing)
    if looks and not bool(nothing.any()):
        return slopes
    assert behind.name is not None
    parts = looks and behind.uniform
    if parts:
        ends = tuple((x.expand_as(slopes)[nothing], z.expand_as(slopes)[nothing]) for x, z in ends)
    first, last = (slope(behind.name, behind.function, x, x, z, z) for x, z in ends)
    least = (first + last) / 2
    return slopes.masked_scatter(nothing, least) if parts else torch.where(nothing, least, slopes)


_NODES = (0.5 - 12**-0.5, 0.5 + 12**-0.5)
_MAGNITUDE, _SQUARED = modified_by(magnitude), modified_by(squared)
