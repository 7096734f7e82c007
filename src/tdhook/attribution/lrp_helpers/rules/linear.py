"""Rules that share relevance among the inputs by their contributions ``c_ij = x_i w_ij`` to each output.

``stab`` is the stabiliser (:mod:`tdhook.attribution.lrp_helpers.params`). A bias is an input that is always one: it
takes its share, which is thereby absorbed. ``zero_params`` names parameters to treat as zero (``"bias"``, say).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tdhook.attribution.lrp_helpers.accounting import with_constants
from tdhook.attribution.lrp_helpers.conversions import Damped, PerValue, Scaled, TimesValue, live, on_tape
from tdhook.attribution.lrp_helpers.operation import Operation
from tdhook.attribution.lrp_helpers.params import (
    Stabilizer,
    ZeroParams,
    checked,
    rounding,
    stabilize,
    zero_param_names,
)
from tdhook.attribution.lrp_helpers.propagation import PropagationRule, natively
from tdhook.attribution.lrp_helpers.rule import Convention
from tdhook.attribution.lrp_helpers.steps import Grads, Modify, Step, closed_form

__all__ = [
    "AlphaBetaRule",
    "EpsilonRule",
    "FlatRule",
    "GammaRule",
    "NormRule",
    "SoftmaxEpsilonRule",
    "UniformEpsilonRule",
    "WSquareRule",
    "ZBoxRule",
    "ZPlusRule",
]


def _modify(change: Callable[[Tensor], Tensor], zero: Sequence[str] = ()) -> Modify:
    """``change`` as a parameter modification that treats the parameters named in ``zero`` as zero."""

    def modify(name: str, param: Tensor) -> Tensor:
        param = change(param)
        return torch.zeros_like(param) if name.rpartition(".")[2] in zero else param

    return modify


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _negative(x: Tensor) -> Tensor:
    return x.clamp(max=0)


def _itself(x: Tensor) -> Tensor:
    return x


def _per_output(step: Step, relevance: Tensor, z: Tensor, epsilon: Stabilizer) -> Tensor:
    """``R_j / stab(z_j)``: relevance per unit of output."""
    if not z.is_floating_point():
        return relevance
    per_output = relevance / stabilize(z, epsilon)
    if step.report is not None:
        step.report("stabiliser", relevance - z * per_output)
    return per_output


def _report_bias(step: Step, modify: Modify, *per_output: Tensor) -> None:
    """Report what the bias takes, which is an input of one."""
    if step.report is not None:
        for s, b in zip(per_output, step.constants(modify), strict=True):
            step.report("bias", s * b)


class EpsilonRule(PropagationRule):
    """LRP-epsilon: ``R_i = x_i * sum_j w_ij R_j / stab(z_j)`` (Bach et al. 2015, eq. 58).

    For any differentiable module, through its vector-Jacobian product: ``R_x = x * J^T (R_z / stab(z))``; with several
    inputs each takes its share.

    Args:
        epsilon: the stabiliser of the denominator.
        zero_params: names of parameters to treat as zero.
    """

    needs_outputs = True
    needs_vjp = True

    def __init__(self, epsilon: Stabilizer = 1e-6, zero_params: ZeroParams = None) -> None:
        super().__init__()
        self.epsilon = checked(epsilon, "epsilon")
        self.zero_params = zero_param_names(zero_params)

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call ``module``: what has no closed form is run as it is, between the two factors of the formula."""
        if self.zero_params or closed_form(module) is not None:
            return super().run(module, original, args, kwargs)
        args, kwargs = live(TimesValue.apply, (args, kwargs))
        outputs = self._natively(module, original, args, kwargs)
        return live(lambda z: PerValue.apply(z, self.epsilon), outputs)

    def run_in(
        self,
        flow: Convention,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """In the gradient convention the plain backward pass is right, but for the stabiliser's share."""
        if flow == "relevance" or self.zero_params:
            return super().run_in(flow, module, original, args, kwargs)
        outputs = self._natively(module, original, args, kwargs)
        if self.epsilon is rounding:
            return outputs
        return live(lambda z: Damped.apply(z, self.epsilon), outputs)

    def _natively(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The formula in the gradient convention, where it is the plain backward pass."""
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and on_tape(x)]
        factor = self._share(len(inputs))
        with natively(module):
            outputs = original(*args, **kwargs)
            if factor != 1:
                outputs = live(lambda z: Scaled.apply(z, factor), outputs)
            return with_constants(module, original, args, kwargs, outputs, factors=factor)

    def _share(self, n_inputs: int) -> float:
        """What each of several inputs gets of its share."""
        return 1.0

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        outputs, vjp = step.outputs, step.vjp
        modify = _modify(_itself, self.zero_params)
        if self.zero_params:
            outputs, vjp = step.modified(step.inputs, modify)
        pairs = zip(relevance, outputs, strict=True)
        per_output = [_per_output(step, r, z, self.epsilon) for r, z in pairs]
        grads = vjp(*per_output)
        _report_bias(step, modify, *per_output)
        share = self._share(len(step.inputs))
        return tuple(None if g is None else x * g * share for x, g in zip(step.inputs, grads, strict=True))


class UniformEpsilonRule(EpsilonRule):
    """Epsilon, divided by the number of inputs: for products of activations (AttnLRP, Prop. 3.3)."""

    in_both = True

    def _share(self, n_inputs: int) -> float:
        return 1 / max(n_inputs, 1)


class NormRule(EpsilonRule):
    """Epsilon for layers without weights, such as sums and average pooling: shares by ``x_i J_ij / stab(z_j)``.

    Args:
        stabilizer: the stabiliser of the denominator.
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6) -> None:
        super().__init__(stabilizer)

    @property
    def stabilizer(self) -> Stabilizer:
        """The stabiliser of the denominator."""
        return self.epsilon


class SoftmaxEpsilonRule(EpsilonRule):
    """Softmax: ``R_i = x_i (R_i - s_i sum_j R_j)`` (AttnLRP, Achtibat et al. 2024, Prop. 3.1).

    The sum goes over the ``dim`` of an ``nn.Softmax``, over the last axis of anything else.

    Args:
        epsilon: kept for the signature; the formula has no denominator.
    """

    needs_vjp = False
    in_both = True

    def __init__(self, epsilon: Stabilizer = 1e-6) -> None:
        super().__init__(epsilon)

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call ``module`` under the formula."""
        return PropagationRule.run(self, module, original, args, kwargs)

    def run_in(
        self,
        flow: Convention,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """In the gradient convention the formula is the plain backward pass."""
        if flow == "relevance":
            return self.run(module, original, args, kwargs)
        return with_constants(module, original, args, kwargs, original(*args, **kwargs))

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (r,), (s,) = relevance, step.outputs
        x, *others = step.inputs
        # Logits that are masked by minus infinity have no relevance.
        x = torch.where(x.isinf(), 0.0, x)
        if step.report is not None:  # the zeroth term of the linearisation
            step.report("constant", r * (1 - x + (s * x).sum(_axis(step), keepdim=True)))
        return (r - s * r.sum(_axis(step), keepdim=True)) * x, *(None for _ in others)


def _axis(step: Step) -> int:
    """The axis of a softmax."""
    args, kwargs = step.arguments
    if isinstance(step.module, Operation):
        given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    else:
        given = step.module.dim if isinstance(step.module, nn.Softmax) else None
    return given if isinstance(given, int) else -1


class _Contributions:
    """The contributions of one sign to the outputs: their sum ``z``, and the shares they take.

    Positive contributions are positive inputs through positive weights and negative inputs through negative weights;
    the bias belongs to the positive ones where it is positive. Negative contributions likewise.
    """

    def __init__(self, step: Step, same: bool, zero: tuple[str, ...], signed: bool) -> None:
        x = step.inputs[0]
        agree, oppose = (_positive, _negative) if same else (_negative, _positive)
        parts = [(_positive(x) if signed else x, _modify(agree, zero))]
        if signed:
            # The bias is counted once, with the positive inputs, since it is an input of one.
            parts.append((_negative(x), _modify(oppose, (*zero, "bias"))))
        self._step = step
        self._terms = []
        totals = []
        for part, modify in parts:
            (z,), vjp = step.modified((part,), modify)
            self._terms.append((part, modify, vjp))
            totals.append(z)
        self.z = totals[0] + totals[1] if signed else totals[0]

    def shares(self, per_output: Tensor) -> Tensor:
        """``sum_j c_ij s_j`` over these contributions."""
        shares: Tensor | None = None
        for part, modify, vjp in self._terms:
            _report_bias(self._step, modify, per_output)
            (grad,) = vjp(per_output)
            assert grad is not None
            shares = part * grad if shares is None else shares + part * grad
        assert shares is not None
        return shares


def _has_negative(x: Tensor) -> bool:
    """Whether terms for negative inputs are needed at all: behind a ReLU they are not.

    A compiled graph and ``torch.vmap`` cannot branch on values: there they always are.
    """
    branches = not torch.compiler.is_compiling() and not torch._C._functorch.is_batchedtensor(x)
    return not branches or bool((x < 0).any())


class _SignedRule(PropagationRule):
    """A rule that treats contributions by their sign."""

    needs_inputs: ClassVar[bool] = True

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
        if alpha < 0 or beta < 0:
            raise ValueError("Both alpha and beta parameters must be non-negative!")
        if alpha - beta != 1.0:
            raise ValueError("The difference of parameters alpha - beta must equal 1!")
        super().__init__()
        self.alpha, self.beta, self.stabilizer = alpha, beta, checked(stabilizer)
        self.zero_params = zero_param_names(zero_params)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (r,) = relevance
        signed = _has_negative(step.inputs[0])

        def shares(same: bool, r: Tensor) -> Tensor:
            contributions = _Contributions(step, same, self.zero_params, signed)
            return contributions.shares(_per_output(step, r, contributions.z, self.stabilizer))

        if not self.beta:
            return (shares(True, r),)
        return (shares(True, self.alpha * r) + shares(False, -self.beta * r),)


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

    def __init__(
        self, gamma: float = 0.25, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None
    ) -> None:
        if gamma < 0:
            raise ValueError(f"gamma must be non-negative, got {gamma}")
        super().__init__()
        self.gamma, self.stabilizer = gamma, checked(stabilizer)
        self.zero_params = zero_param_names(zero_params)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (r,) = relevance
        x = step.inputs[0]
        signed = _has_negative(x)
        modify = _modify(_itself, self.zero_params)
        (z,), vjp = step.modified(step.inputs, modify)
        favoured = z >= 0
        positive = _Contributions(step, True, self.zero_params, signed)
        negative = _Contributions(step, False, self.zero_params, signed)
        per_output = _per_output(
            step, r, z + self.gamma * torch.where(favoured, positive.z, negative.z), self.stabilizer
        )
        (grad,) = vjp(per_output)
        assert grad is not None
        _report_bias(step, modify, per_output)
        more = self.gamma * per_output
        extra = positive.shares(torch.where(favoured, more, 0.0))
        extra = extra + negative.shares(torch.where(favoured, 0.0, more))
        return (x * grad + extra,)


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
        low: float | Sequence[Any] | Tensor,
        high: float | Sequence[Any] | Tensor,
        stabilizer: Stabilizer = 1e-6,
        zero_params: ZeroParams = None,
    ) -> None:
        super().__init__()
        # Plain data (a configuration file) brings bounds per channel as nested lists.
        self.low = torch.tensor(low) if isinstance(low, Sequence) else low
        self.high = torch.tensor(high) if isinstance(high, Sequence) else high
        if bool((torch.as_tensor(self.low) > torch.as_tensor(self.high)).any()):
            raise ValueError(f"ZBoxRule needs low <= high, got low={low} and high={high}")
        self.stabilizer = checked(stabilizer)
        self.zero_params = zero_param_names(zero_params)

    def _bound(self, bound: float | Tensor, x: Tensor, name: str) -> Tensor:
        bound = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
        try:
            return bound.expand_as(x)
        except RuntimeError:
            raise ValueError(
                f"ZBoxRule: {name} of shape {tuple(bound.shape)} does not broadcast against the input of shape "
                f"{tuple(x.shape)}"
            ) from None

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().check(module, inputs, outputs)
        for name, bound in (("low", self.low), ("high", self.high)):
            self._bound(bound, inputs[0], name)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (r,) = relevance
        x = step.inputs[0]
        zero = (*self.zero_params, "bias")
        terms = [
            (x, 1.0, _itself),
            (self._bound(self.low, x, "low"), -1.0, _positive),
            (self._bound(self.high, x, "high"), -1.0, _negative),
        ]
        z: Tensor | float = 0.0
        pulls = []
        for value, sign, change in terms:
            (part,), vjp = step.modified((value,), _modify(change, zero))
            z = z + sign * part
            pulls.append((sign * value, vjp))
        assert isinstance(z, Tensor)
        per_output = _per_output(step, r, z, self.stabilizer)
        result = torch.zeros_like(x)
        for value, vjp in pulls:
            (grad,) = vjp(per_output)
            assert grad is not None
            result = result + value * grad
        return (result,)


class WSquareRule(PropagationRule):
    """``R_i = sum_j w_ij^2 / stab(sum_i' w_i'j^2) R_j``: shares by squared weights (Montavon et al. 2017, eq. 12).

    All parameters are squared, the bias too, and inputs count as ones.

    Args:
        stabilizer: the stabiliser of the denominator.
        zero_params: names of parameters to treat as zero.
    """

    def __init__(self, stabilizer: Stabilizer = 1e-6, zero_params: ZeroParams = None) -> None:
        super().__init__()
        self.stabilizer = checked(stabilizer)
        self.zero_params = zero_param_names(zero_params)

    def _modification(self) -> Modify:
        return _modify(torch.square, self.zero_params)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        ones = [torch.ones_like(x) if x.is_floating_point() else x for x in step.inputs]
        modify = self._modification()
        outputs, vjp = step.modified(ones, modify)
        pairs = zip(relevance, outputs, strict=True)
        per_output = [_per_output(step, r, z, self.stabilizer) for r, z in pairs]
        _report_bias(step, modify, *per_output)
        return vjp(*per_output)


class FlatRule(WSquareRule):
    """Equal shares to all inputs that are connected: weights and inputs are ones, no bias (Lapuschkin et al. 2019).

    Args:
        stabilizer: the stabiliser of the denominator.
        zero_params: names of parameters to treat as zero.
    """

    def _modification(self) -> Modify:
        return _modify(torch.ones_like, (*self.zero_params, "bias"))
