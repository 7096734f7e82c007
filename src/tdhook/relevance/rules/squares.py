"""Rules that look at weights alone, whatever the inputs were.

``stab`` is the stabiliser (:mod:`tdhook.relevance.propagation.params`). A bias is an input that is always one: it
takes its share, which is thereby absorbed. ``zero_params`` names parameters to treat as zero (``"bias"``, say).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.params import ZeroParams, zero_param_names
from tdhook.relevance.propagation.stabilisers import Stabilizer, checked
from tdhook.relevance.propagation.steps import Grads, Modify, Step
from tdhook.relevance.rules.shares import modified_by, per_unit, report_bias

__all__ = [
    "FlatRule",
    "WSquareRule",
]


class WSquareRule(PropagationRule):
    """``R_i = sum_j w_ij^2 / stab(sum_i' w_i'j^2) R_j``: shares by squared weights (Montavon et al. 2017, eq. 12).

    All parameters are squared, the bias too, and inputs count as ones.

    Args:
        stabilizer: the stabiliser of the denominator.
        zero_params: names of parameters to treat as zero.
    """

    modifies: ClassVar[bool] = True

    def __init__(self, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None) -> None:
        super().__init__()
        self.stabilizer = checked(stabilizer)
        self.zero_params = zero_param_names(zero_params)

    def _modification(self) -> Modify:
        return modified_by(torch.square, self.zero_params)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        ones = [torch.ones_like(x) if x.is_floating_point() else x for x in step.inputs]
        modify = self._modification()
        outputs, vjp = step.modified(ones, modify)
        pairs = zip(relevance, outputs, strict=True)
        per_output = [per_unit(step, r, z, self.stabilizer, 1) for r, z in pairs]
        report_bias(step, modify, *per_output)
        return vjp(*per_output)


class FlatRule(WSquareRule):
    """Equal shares to all inputs that are connected: weights and inputs are ones, no bias (Lapuschkin et al. 2019).

    Args:
        stabilizer: the stabiliser of the denominator.
        zero_params: names of parameters to treat as zero.
    """

    def _modification(self) -> Modify:
        return modified_by(torch.ones_like, (*self.zero_params, "bias"))
