"""Epsilon and its kin: shares by contributions ``c_ij = x_i w_ij`` to each output, or by their linearisation.

``stab`` is the stabiliser (:mod:`tdhook.relevance.propagation.params`). A bias is an input that is always one: it
takes its share, which is thereby absorbed. ``zero_params`` names parameters to treat as zero (``"bias"``, say).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.models.parallel import is_of_torch
from tdhook.relevance.propagation.beside import between, damped
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.constants import with_constants
from tdhook.relevance.propagation.conversions import Damped, PerValue, Scaled, TimesValue
from tdhook.relevance.propagation.executed_layers import Directly
from tdhook.relevance.propagation.forms import ClosedForm, closed_form
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.params import ZeroParams, zero_param_names
from tdhook.relevance.propagation.sharing import secant
from tdhook.relevance.propagation.stabilisers import Stabilizer, checked, kept_number, rounding
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.rules.shares import itself, modified_by, per_unit, report_bias, share_of
from tdhook.relevance.secants.shares import softmax_axis, softmax_axis_of
from tdhook.tape.conditions import holds
from tdhook.tape.functions import live
from tdhook.tape.masks import unmasked

__all__ = [
    "EpsilonRule",
    "NormRule",
    "SoftmaxEpsilonRule",
    "UniformEpsilonRule",
]


class EpsilonRule(PropagationRule):
    """LRP-epsilon: ``R_i = x_i * sum_j w_ij R_j / stab(z_j)`` (Bach et al. 2015, eq. 58).

    For any differentiable module, through its vector-Jacobian product: ``R_x = x * J^T (R_z / stab(z))``; with several
    inputs each takes its share.

    Args:
        epsilon: the stabiliser of the denominator.
        zero_params: names of parameters to treat as zero.

    Attributes:
        splits: whether each of several inputs gets an equal part of its share.
    """

    needs_outputs = True
    needs_vjp = True
    splits: ClassVar[bool] = False

    def __init__(self, epsilon: Stabilizer = 1e-6, zero_params: ZeroParams = None) -> None:
        super().__init__()
        self.epsilon = checked(epsilon, "epsilon")
        self.zero_params = zero_param_names(zero_params)

    @property
    def conventions(self) -> tuple[Convention, ...]:
        """Both, as the stabiliser's share is a factor in the gradient convention."""
        return (self.convention,) if self.zero_params else ("relevance", "gradient")

    @property
    def modifies(self) -> bool:
        """Where it treats parameters as zero."""
        return bool(self.zero_params)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        outputs, vjp = step.outputs, step.vjp
        modify = modified_by(itself, self.zero_params)
        if self.zero_params:
            outputs, vjp = step.modified(step.inputs, modify)
        per_output = [per_unit(step, r, z, self.epsilon) for r, z in zip(relevance, outputs, strict=True)]
        grads = vjp(*per_output)
        report_bias(step, modify, *per_output)
        share = 1 / max(len(step.inputs), 1) if self.splits else 1
        shares = (
            None if g is None else share_of(step, x, g) for x, g in zip(step.inputs, grads, strict=True)
        )
        return tuple(shares) if share == 1 else tuple(r if r is None else r * share for r in shares)

    def shortcut(self, module: nn.Module, flow: Convention) -> Run | None:
        """What has no closed form runs as it is between the two factors of the formula.

        In the gradient convention everything does: the plain backward pass is right, but for the stabiliser's share.
        """
        if self.zero_params or (flow == "relevance" and closed_form(module) is not None):
            return None
        return self._between_factors if flow == "relevance" else self._damped

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """Shares of the difference, which the secant tells of anything that is not linear."""
        if self.applied or self.zero_params:
            return super().against(module, flow)
        if flow == "gradient":
            return damped(self._by_secant(module, flow), self.epsilon)
        if closed_form(module) is not None:
            return super().against(module, flow)
        return between(self._by_secant(module, "gradient"), "gradient", flow, self.epsilon)

    def _by_secant(self, module: nn.Module, flow: Convention) -> Run:
        return secant(module, flow)

    def directly(self) -> Directly | None:
        """Relevance per unit of output, pulled back through the layer, times the input."""
        return self._at_layer

    def _at_layer(
        self, form: ClosedForm, r: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor
    ) -> Tensor | None:
        epsilon = self.epsilon
        if callable(epsilon) or epsilon == 0 or self.zero_params:
            return None
        stabilised = torch.copysign(kept_number(epsilon, z.dtype, z.device), z).add_(z)
        return form.adjoint(r / stabilised, x, weight).mul_(x)

    def _between_factors(self, call: Call) -> object:
        setting = call.setting
        outputs = self._natively(call.live(TimesValue.apply))
        return live(lambda z: PerValue.apply(z, self.epsilon, setting), outputs)

    def _damped(self, call: Call) -> object:
        outputs = self._natively(call)
        if self.epsilon is rounding:
            return outputs
        setting = call.setting
        return live(lambda z: Damped.apply(z, self.epsilon, setting), outputs)

    def _natively(self, call: Call) -> object:
        """The formula in the gradient convention, where it is the plain backward pass."""
        outputs, factor = call.natively(), 1.0
        if self.splits:
            factor = 1 / max(len(call.tensors()), 1)
            if factor != 1:
                outputs = live(lambda z: Scaled.apply(z, factor), outputs)
        return outputs if call.setting.report is None else with_constants(call, outputs, factors=factor)

    abbreviates = propagate


class UniformEpsilonRule(EpsilonRule):
    """Epsilon, divided by the number of inputs: for products of activations (AttnLRP, Prop. 3.3)."""

    in_both = True
    splits = True


class NormRule(EpsilonRule):
    """Epsilon for layers without weights, such as sums and average pooling: shares by ``x_i J_ij / stab(z_j)``.

    Args:
        stabilizer: the stabiliser of the denominator.
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6) -> None:
        super().__init__(checked(stabilizer))

    @property
    def stabilizer(self) -> Stabilizer:
        """The stabiliser of the denominator."""
        return self.epsilon


class SoftmaxEpsilonRule(EpsilonRule):
    """Softmax: ``R_i = x_i (R_i - s_i sum_j R_j)`` (AttnLRP, Achtibat et al. 2024, Prop. 3.1).

    The sum goes over the axis of a softmax of torch, over the last one of anything else.

    Args:
        epsilon: kept for the signature; the formula has no denominator.
    """

    needs_vjp = False
    in_both = True

    def __init__(self, epsilon: Stabilizer = 1e-6) -> None:
        super().__init__(epsilon)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (r,), (s,) = relevance, step.outputs
        x, *others = step.inputs
        # Logits that are masked by minus infinity have no relevance.
        x = torch.where(x.isinf(), 0.0, x)
        if step.report is not None:  # the zeroth term of the linearisation
            counted = unmasked(x, x)
            amount = r * (1 - counted + (s * counted).sum(_axis(step), keepdim=True))
            step.report("constant", torch.where(r == 0, 0.0, amount))
        return (r - s * r.sum(_axis(step), keepdim=True)) * x, *(None for _ in others)

    def directly(self) -> None:
        """On a layer it is as on any module."""
        return

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Raise where a module of one's own does not normalise along its last axis."""
        super().check(module, inputs, outputs)
        if isinstance(module, Operation) or is_of_torch(module):
            return
        total = outputs[0].detach().sum(-1)
        if not holds(((total - 1).abs() < _FAR) | (total == 0) | total.isnan()):
            raise ValueError(
                f"SoftmaxEpsilonRule goes along the last axis, where what {type(module).__name__} returns does not sum "
                "to one: leave the module to its operations, which have rules of their own"
            )

    def shortcut(self, module: nn.Module, flow: Convention) -> Run | None:
        """In the gradient convention the formula is the plain backward pass."""
        if flow == "relevance":
            return None
        return lambda call: with_constants(call, call.execute())

    abbreviates = propagate


_FAR = 0.05
"""Farther off than rounding to bfloat16 makes a sum of weights."""


def _axis(step: Step) -> int:
    """The axis of a softmax."""
    module, (args, kwargs) = step.module, step.arguments
    if isinstance(module, Operation):
        return softmax_axis(kwargs.get("dim", args[1] if len(args) > 1 else None), step.outputs[0].dim())
    return softmax_axis_of(module, step.outputs[0].dim())
