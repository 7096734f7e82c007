"""Rules that treat contributions ``c_ij = x_i w_ij`` to each output by their sign.

``stab`` is the stabiliser (:mod:`tdhook.relevance.propagation.params`). A bias is an input that is always one: it
takes its share, which is thereby absorbed. ``zero_params`` names parameters to treat as zero (``"bias"``, say).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.params import ZeroParams, zero_param_names
from tdhook.relevance.propagation.stabilisers import Stabilizer, checked, number
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.rules.shares import (
    itself,
    modified_by,
    negative,
    per_unit,
    positive,
    report_bias,
    share_of,
)
from tdhook.tape.functions import may_look_at
from tdhook.tape.sharded import is_sharded, replicated

__all__ = [
    "AlphaBetaRule",
    "GammaRule",
    "ZBoxRule",
    "ZPlusRule",
]

Change: TypeAlias = "Callable[[Tensor], Tensor]"


class _Contributions:
    """Contributions to the outputs, modified by their sign: their sums, and the shares they take.

    Contributions are positive where an input and its weight agree in sign, the bias being an input of one.

    Args:
        step: the step.
        agree: what becomes of the weights that positive inputs meet, and ``oppose``: of those that negative ones do.
        zero: names of parameters to treat as zero.
        signed: whether any input is negative.
    """

    def __init__(
        self, step: Step, agree: Change, oppose: Change, zero: tuple[str, ...], signed: bool
    ) -> None:
        x = step.inputs[0]
        parts = [(positive(x) if signed else x, modified_by(agree, zero))]
        if signed:
            parts.append((negative(x), modified_by(oppose, (*zero, "bias"))))
        self._step = step
        self._terms = []
        totals = []
        for part, modify in parts:
            (z,), vjp = step.modified((part,), modify)
            self._terms.append((part, modify, vjp))
            totals.append(z)
        self._z = totals[0] + totals[1] if signed else totals[0]

    def denominators(self) -> Tensor:
        """The sums of the contributions, which the caller may overwrite: they are not kept."""
        z, self._z = self._z, torch.empty(0)
        return z

    def shares(self, per_output: Tensor) -> Tensor:
        """``sum_j c_ij s_j`` over these contributions."""
        shares: Tensor | None = None
        for part, modify, vjp in self._terms:
            report_bias(self._step, modify, per_output)
            (grad,) = vjp(per_output)
            assert grad is not None
            share = share_of(self._step, part, grad)
            if shares is None:
                shares = share
            else:
                shares = shares.add_(share) if self._step.writable else shares + share
        assert shares is not None
        return shares


def _has_negative(step: Step) -> bool:
    """Whether terms for negative inputs are needed at all: behind a ReLU they are not.

    A compiled graph and ``torch.vmap`` cannot branch on values, and processes that hold parts of them would go
    different ways: there they are, unless it is known what made the input.
    """
    if step.nonnegative:
        return False
    x = step.inputs[0]
    return x.numel() == 0 or is_sharded(x) or not may_look_at(x) or bool(x.amin() < 0)


class _SignedRule(PropagationRule):
    """A rule that treats contributions by their sign."""

    needs_sign: ClassVar[bool] = True
    modifies: ClassVar[bool] = True

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        if len(inputs) > 1:
            raise NotImplementedError(
                f"{type(self).__name__} does not support multiple inputs: {type(module).__name__} was called with "
                f"{len(inputs)}; use EpsilonRule there"
            )
        if len(outputs) > 1:
            raise NotImplementedError(
                f"{type(self).__name__} does not support multiple outputs: {type(module).__name__} returned "
                f"{len(outputs)}; use EpsilonRule there"
            )


class AlphaBetaRule(_SignedRule):
    """``R_i = sum_j (alpha c_ij+ / stab(z_j+) - beta c_ij- / stab(z_j-)) R_j`` (Bach et al. 2015, eq. 60).

    Args:
        alpha: weight of the positive contributions.
        beta: weight of the negative ones; ``alpha - beta = 1``, both non-negative.
        stabilizer: the stabiliser of both denominators.
        zero_params: names of parameters to treat as zero.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 1.0,
        stabilizer: Stabilizer = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        alpha, beta = number(alpha, "alpha"), number(beta, "beta")
        if alpha < 0 or beta < 0:
            raise ValueError("Both alpha and beta parameters must be non-negative!")
        if alpha - beta != 1.0:
            raise ValueError("The difference of parameters alpha - beta must equal 1!")
        super().__init__()
        self.alpha, self.beta, self.stabilizer = alpha, beta, checked(stabilizer)
        self.zero_params = zero_param_names(zero_params)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (r,) = relevance
        signed = _has_negative(step)

        gained = _Contributions(step, positive, negative, self.zero_params, signed)
        total = gained.shares(
            per_unit(
                step, r if self.alpha == 1 else self.alpha * r, gained.denominators(), self.stabilizer, 1
            )
        )
        if self.beta:
            lost = _Contributions(step, negative, positive, self.zero_params, signed)
            total = total + lost.shares(
                per_unit(step, -self.beta * r, lost.denominators(), self.stabilizer, -1)
            )
        return (total,)


class ZPlusRule(AlphaBetaRule):
    """z-plus, the alpha-beta rule with ``alpha = 1, beta = 0``: positive contributions alone (Montavon et al. 2017).

    Args:
        stabilizer: the stabiliser of the denominator.
        zero_params: names of parameters to treat as zero.
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None) -> None:
        super().__init__(1.0, 0.0, stabilizer, zero_params)


class GammaRule(_SignedRule):
    """LRP-gamma (Montavon et al. 2019), for inputs of either sign (Andeol et al. 2021).

    Contributions with the sign of the output ``z_j`` count ``1 + gamma`` times, the others once; shares as in epsilon:
    ``R_i = sum_j (c_ij + gamma c_ij [sign(c_ij) = sign(z_j)]) R_j / stab(z'_j)``, where ``z'_j`` sums those
    contributions, the bias included, and an output of zero counts as positive.

    Args:
        gamma: by how much contributions with the sign of the output count more; non-negative.
        stabilizer: the stabiliser of the denominator.
        zero_params: names of parameters to treat as zero.
    """

    needs_outputs: ClassVar[bool] = True

    def __init__(
        self, gamma: float = 0.25, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None
    ) -> None:
        gamma = number(gamma, "gamma")
        if gamma < 0:
            raise ValueError(f"gamma must be non-negative, got {gamma}")
        super().__init__()
        self.gamma, self.stabilizer = gamma, checked(stabilizer)
        self.zero_params = zero_param_names(zero_params)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (r,), (z,) = relevance, step.outputs
        if self.zero_params:
            (z,), _ = step.modified(step.inputs, modified_by(itself, self.zero_params))
        signed = _has_negative(step)
        gained, lost = _Favouring(self.gamma, positive), _Favouring(self.gamma, negative)
        upwards = _Contributions(step, gained, lost, self.zero_params, signed)
        downwards = _Contributions(step, lost, gained, self.zero_params, signed)
        rises = z >= 0
        per_output = per_unit(
            step, r, torch.where(rises, upwards.denominators(), downwards.denominators()), self.stabilizer
        )
        return (
            upwards.shares(torch.where(rises, per_output, 0.0))
            + downwards.shares(torch.where(rises, 0.0, per_output)),
        )


@dataclass(frozen=True)
class _Favouring:
    """Weights of one sign count ``1 + gamma`` times."""

    gamma: float
    sign: Change

    def __call__(self, weight: Tensor) -> Tensor:
        return weight + self.gamma * self.sign(weight)


def _bound_of(bound: object, name: str) -> float | Tensor:
    """A bound of a box, if it is one: a number or a tensor.

    Plain data (a configuration file) brings bounds per channel as nested lists.
    """
    if isinstance(bound, int | float):
        return number(bound, name)
    try:
        values = bound if isinstance(bound, Tensor) else torch.tensor(bound)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0, dtype=torch.bool)
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} is a number, a tensor or nested lists of numbers, got {bound!r}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} is finite, got {bound!r}")
    return values


class ZBoxRule(_SignedRule):
    """z-box, for inputs within ``[low, high]`` (Montavon et al. 2017, eq. 14).

    Shares by ``x_i w_ij - low_i w_ij+ - high_i w_ij-``, in the numerator and, summed over ``i``, in the denominator.
    A bias is an input whose box is the point one, so it takes no share.

    Args:
        low: the least value an input can have, a float or a tensor that broadcasts against the input.
        high: the largest one, likewise.
        stabilizer: the stabiliser of the denominator.
        zero_params: names of parameters to treat as zero.
    """

    def __init__(
        self,
        low: float | Sequence[object] | Tensor,
        high: float | Sequence[object] | Tensor,
        stabilizer: Stabilizer = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        super().__init__()
        self.low, self.high = _bound_of(low, "low"), _bound_of(high, "high")
        try:
            crossed = bool((torch.as_tensor(self.low) > torch.as_tensor(self.high)).any())
        except RuntimeError:
            raise ValueError(
                f"ZBoxRule needs low and high of shapes that broadcast, got low={low} and high={high}"
            ) from None
        if crossed:
            raise ValueError(f"ZBoxRule needs low <= high, got low={low} and high={high}")
        self.stabilizer = checked(stabilizer)
        self.zero_params = zero_param_names(zero_params)

    def _bound(self, bound: float | Tensor, x: Tensor, name: str) -> Tensor:
        bound = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
        try:
            return replicated(bound.expand(x.shape), x)
        except RuntimeError:
            raise ValueError(
                f"ZBoxRule: {name} of shape {tuple(bound.shape)} does not broadcast against the input of shape "
                f"{tuple(x.shape)}"
            ) from None

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().check(module, inputs, outputs)
        for name, bound in (("low", self.low), ("high", self.high)):
            self._bound(bound, inputs[0], name)

    def _within(self, step: Step, bound: float | Tensor, name: str) -> Tensor:
        """The least or largest value that an input can have, or the difference that it can make."""
        found = self._bound(bound, step.inputs[0], name)
        return found if step.origin is None else found - step.origin

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (r,) = relevance
        x = step.inputs[0]
        zero = (*self.zero_params, "bias")
        terms = [
            (x, 1.0, itself),
            (self._within(step, self.low, "low"), -1.0, positive),
            (self._within(step, self.high, "high"), -1.0, negative),
        ]
        z: Tensor | float = 0.0
        pulls = []
        for value, sign, change in terms:
            (part,), vjp = step.modified((value,), modified_by(change, zero))
            z = z + sign * part
            pulls.append((sign * value, vjp))
        assert isinstance(z, Tensor)
        per_output = per_unit(step, r, z, self.stabilizer)
        result = torch.zeros_like(x)
        for value, vjp in pulls:
            (grad,) = vjp(per_output)
            assert grad is not None
            result = result + value * grad
        return (result,)
