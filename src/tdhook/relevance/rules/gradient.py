"""Rules in the gradient convention: what travels is ``g = R / x``, relevance per unit of activation.

There every linear step is right under plain autograd, so only non-linear ones need a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.call import Run
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.sharing import secant
from tdhook.relevance.propagation.stabilisers import (
    Stabilizer,
    checked,
    number,
    quotient,
    saturated,
    stabilize,
)
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.secants.slopes import slopes

__all__ = [
    "AHQKVRule",
    "GradientRule",
    "PseudoIdentityRule",
    "ReLUBetaSmoothRule",
    "ReLUDeconvNetRule",
    "ReLUGuidedBackpropRule",
]


class GradientRule(PropagationRule):
    """A gradient-convention rule for a module with one input."""

    convention: ClassVar[Convention] = "gradient"

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if len(inputs) > 1:
            raise NotImplementedError(
                f"{type(self).__name__} does not support multiple inputs: {type(module).__name__} was called with "
                f"{len(inputs)}"
            )


class PseudoIdentityRule(GradientRule):
    """The identity rule ``R_x = R_z`` for an element-wise function, written as ``g_x = g_z * z / stab(x)``.

    Args:
        stabilizer: the stabiliser of ``x``.
    """

    needs_outputs = True

    def __init__(self, stabilizer: Stabilizer = 1e-6) -> None:
        super().__init__()
        self.stabilizer = checked(stabilizer)

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """The slope of the secant, which needs no stabiliser."""
        return super().against(module, flow) if self.applied else secant(module, flow, slopes)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (x,), (z,), (g,) = step.inputs, step.outputs, relevance
        return (saturated(quotient(z, stabilize(x, self.stabilizer)) * g),)


class AHQKVRule(GradientRule):
    """A projection to packed query, key and value, of which only the value propagates (Ali et al. 2022; CP-LRP).

    The output is query, key and value side by side along its last axis, a third each.
    """

    needs_outputs = True
    needs_vjp = True

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().check(module, inputs, outputs)
        if outputs[0].shape[-1] % 3:
            raise ValueError(
                "AHQKVRule fits projections that pack query, key and value in their last axis; "
                f"{type(module).__name__} returned {outputs[0].shape[-1]} features, which is no multiple of three"
            )

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (g,) = relevance
        only_value = torch.zeros_like(g)
        third = g.shape[-1] // 3
        only_value[..., 2 * third :] = g[..., 2 * third :]
        if step.report is not None:
            (z,), (bias,) = step.outputs, step.constants(lambda name, param: param)
            step.report("stop", z * (g - only_value))
            if bias is not None:
                step.report("bias", bias * only_value)
        return step.vjp(only_value)


class _SensitivityRule(GradientRule):
    """A rule that makes the result a modified gradient."""

    yields: ClassVar[Literal["relevance", "sensitivity"]] = "sensitivity"

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """There is none.

        Raises:
            ValueError: a modified gradient is no share of anything.
        """
        raise ValueError(
            f"{self!r} makes a modified gradient, which is no share of a difference: leave baseline out, or choose a "
            "composite whose result is relevance"
        )


class ReLUDeconvNetRule(_SensitivityRule):
    """Deconvolutional network: ``g_x = max(g_z, 0)``, whatever the input was (Zeiler and Fergus 2014)."""

    needs_inputs = False

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        return (relevance[0].clamp(min=0),)


class ReLUGuidedBackpropRule(_SensitivityRule):
    """Guided backpropagation: ``g_x = max(g_z, 0) * [x > 0]`` (Springenberg et al. 2015)."""

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (x,), (g,) = step.inputs, relevance
        return (torch.where(x > 0, g.clamp(min=0), 0.0),)


class ReLUBetaSmoothRule(_SensitivityRule):
    """The gradient of softplus in place of ReLU's: ``g_x = g_z * sigmoid(beta x)`` (Dombrowski et al. 2019).

    Args:
        beta: sharpness; large values approach the ReLU. Positive.
    """

    def __init__(self, beta: float = 10.0) -> None:
        beta = number(beta, "beta")
        if beta <= 0:
            raise ValueError(f"beta must be positive, got {beta}")
        super().__init__()
        self.beta = beta

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (x,), (g,) = step.inputs, relevance
        return (g * torch.sigmoid(self.beta * x),)
