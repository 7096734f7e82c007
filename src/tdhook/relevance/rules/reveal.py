"""RevealCancel: what adds to the output of a layer and what takes from it go through the activation apart."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.call import Run
from tdhook.relevance.propagation.differences import SECANT
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.handles import Behind
from tdhook.relevance.propagation.revealed import revealed
from tdhook.relevance.propagation.steps import Grads, Step, unmodified
from tdhook.relevance.rules.shares import magnitude, modified_by, negative, positive
from tdhook.relevance.secants.slopes import slope
from tdhook.tape.functions import may_look_at

__all__ = ["RevealCancelRule"]


class RevealCancelRule(PropagationRule):
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

    convention: ClassVar[Convention] = "gradient"
    needs_outputs: ClassVar[bool] = True
    modifies: ClassVar[bool] = True
    reveals: ClassVar[bool] = True

    def bound(self, module: nn.Module, flow: Convention) -> Run:
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
        gained, lost = (own + size) / 2, (own - size) / 2
        if step.differs:
            gained, lost = gained + positive(z - own), lost + negative(z - own)
        of_gained, of_lost = _slopes(behind, start, gained, lost)
        mean, half = rest + handed * ((of_gained + of_lost) / 2), handed * ((of_gained - of_lost) / 2)
        if step.report is not None and step.differs:
            step.report("constant", (z - own) * mean + (z - own).abs() * half)
        (common,), (signed,) = together(mean), apart(half)
        assert common is not None and signed is not None
        # An input that does not differ has no sign, and counts the mean of both (section 3.5.1 there).
        return common + x.sign() * signed


def _slopes(behind: Behind, start: Tensor, gained: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    """What of the function is due to what adds to its argument, per unit, and to what takes from it."""
    function = behind.function
    end = start + (gained + lost)
    at_start, at_end = function(start), function(end)
    crossed = function(start + gained) - function(start + lost)
    rise = at_end - at_start
    found = []
    # What the values that were subtracted are rounded to is no amount.
    sizes = gained - lost + torch.maximum(start.abs(), end.abs())
    rounding = 4 * torch.finfo(gained.dtype).eps * sizes
    for amount, share in ((gained, rise + crossed), (lost, rise - crossed)):
        nothing = amount.abs() <= rounding
        slope_ = share / 2 / torch.where(nothing, 1.0, amount)
        found.append(_where_nothing(behind, nothing, slope_, (start, at_start), (end, at_end)))
    return found[0], found[1]


def _where_nothing(behind: Behind, nothing: Tensor, slopes: Tensor, *ends: tuple[Tensor, Tensor]) -> Tensor:
    """Where nothing adds, or takes, what the least amount would count: the mean of both derivatives."""
    looks = nothing.is_cpu and may_look_at(nothing)
    if looks and not bool(nothing.any()):
        return slopes
    assert behind.name is not None
    if looks and behind.uniform:
        ends = tuple((x.expand_as(slopes)[nothing], z.expand_as(slopes)[nothing]) for x, z in ends)
    (first, last) = (slope(behind.name, behind.function, x, x, z, z) for x, z in ends)
    least = (first + last) / 2
    if looks and behind.uniform:
        return slopes.masked_scatter(nothing, least)
    return torch.where(nothing, least, slopes)


_MAGNITUDE = modified_by(magnitude)
