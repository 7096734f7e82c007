"""RevealCancel: what adds to the output of a layer and what takes from it go through the activation apart."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.call import Run
from tdhook.relevance.propagation.differences import SECANT
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.revealed import Ways, revealed
from tdhook.relevance.propagation.steps import Grads, Step, unmodified
from tdhook.relevance.rules.shares import magnitude, modified_by, negative, positive

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

    def reveal(self, step: Step, grad: Tensor, handed: Tensor, ways: Ways) -> Tensor:
        """What the input counts per unit, given what the output of the function behind the layer does.

        Args:
            step: the call of the layer, of differences.
            grad: what the output of the layer counts, with what came by the secant of the function.
            handed: what the output of the function counts.
            ways: the function.
        """
        (x,), (z,) = step.inputs, step.outputs
        (size,), apart = step.modified((x.abs(),), _MAGNITUDE)
        own, together = z, step.vjp
        if step.differs:  # weights that are others on the reference contribute as well
            (own,), together = step.modified((x,), unmodified)
        rest = z - own
        gained, lost = (own + size) / 2 + positive(rest), (own - size) / 2 + negative(rest)
        nothing = torch.zeros_like(z)
        ways_apart = ((nothing, gained), (lost, z), (nothing, lost), (gained, z))
        secant, *slopes = ways.slopes(ways_apart)
        of_gained, of_lost = (slopes[0] + slopes[1]) / 2, (slopes[2] + slopes[3]) / 2
        mean, half = grad + handed * ((of_gained + of_lost) / 2 - secant), handed * (of_gained - of_lost) / 2
        if step.report is not None and step.differs:
            step.report("constant", rest * mean + rest.abs() * half)
        (common,), (signed,) = together(mean), apart(half)
        assert common is not None and signed is not None
        # An input that does not differ has no sign, and counts the mean of both (section 3.5.1 there).
        return common + x.sign() * signed


_MAGNITUDE = modified_by(magnitude)
