"""Identities at which what travels backwards is converted: between the two conventions, or by a factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from tdhook.relevance.propagation.call import ALONE, Setting
from tdhook.relevance.propagation.merges import Place
from tdhook.relevance.propagation.reporting import Report
from tdhook.relevance.propagation.stabilisers import (
    Stabilizer,
    left_of,
    plain_quotient,
    quotient,
    rounding,
    saturated,
    stabilize,
)
from tdhook.tape.functions import Context, Identity, TapeFunction, alias, parts, seen_finite, whole
from tdhook.tape.internals import is_view
from tdhook.tape.masks import unmasked

__all__ = [
    "Damped",
    "Final",
    "NotOneTensor",
    "PerValue",
    "Ratio",
    "Scaled",
    "Substituted",
    "TimesValue",
    "Unchanged",
    "finite_product",
    "stabilizer_at",
]


class _OfStabilised(Protocol):
    stabilizer: Stabilizer
    setting: Setting
    place: Place


class _OfPerValue(Context, _OfStabilised, Protocol):
    n_rest: int


class _OfScaled(Context, Protocol):
    factor: float | Tensor


class _OfFunction(Context, Protocol):
    made_by: str
    report: Report | None
    n_rest: int


class TimesValue(Identity):
    """Identity at whose input relevance per unit of activation becomes relevance: ``R = x * g``."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """The value itself."""
        return alias(x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep the value."""
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> object:
        """Multiply; what is infinite (masked logits) has no relevance."""
        (x,) = ctx.saved_tensors
        return finite_product(x, grad)


def stabilizer_at(ctx: _OfStabilised) -> Stabilizer:
    """That of an identity, unless a batch norm behind it stabilises instead."""
    merges = ctx.setting.merges
    return rounding if merges is not None and merges.is_postponed(ctx.place) else ctx.stabilizer


class PerValue(Identity):
    """Identity at whose input relevance becomes relevance per unit of activation: ``g = R / stab(x)``.

    Unless told, nothing is stabilised: where the value is zero there is none. Nor is it where a batch norm behind it
    stabilises instead.
    """

    @staticmethod
    def forward(x: Tensor, stabilizer: Stabilizer = rounding, setting: Setting = ALONE) -> Tensor:
        """The value itself."""
        return alias(x)

    @staticmethod
    def setup_context(ctx: _OfPerValue, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the value."""
        ctx.save_for_backward(inputs[0])
        ctx.n_rest = len(inputs) - 1
        ctx.stabilizer = inputs[1] if ctx.n_rest else rounding
        ctx.setting = setting = inputs[2] if ctx.n_rest > 1 else ALONE
        if setting.merges is not None:
            ctx.place = Place()

    @staticmethod
    def backward(ctx: _OfPerValue, relevance: Tensor) -> object:
        """Divide."""
        (value,) = ctx.saved_tensors
        x, relevance, epsilon = parts(value), parts(relevance), stabilizer_at(ctx)
        if epsilon is rounding:
            grad = plain_quotient(relevance, x)
        else:
            grad = quotient(relevance, stabilize(x, epsilon))
        if ctx.setting.report is not None:
            ctx.setting.report("stabiliser", unmasked(relevance - finite_product(x, grad), x))
        return whole(grad, value), *(None,) * ctx.n_rest


class Damped(PerValue):
    """Identity at which relevance per unit of activation loses the stabiliser's share: ``g * z / stab(z)``."""

    @staticmethod
    def backward(ctx: _OfPerValue, grad: Tensor) -> object:
        """Multiply by a factor of at most one."""
        (value,) = ctx.saved_tensors
        z, grad = parts(value), parts(grad)
        damped = grad * left_of(z, stabilizer_at(ctx))
        if ctx.setting.report is not None:
            lost = finite_product(z, grad) - finite_product(z, damped)
            ctx.setting.report("stabiliser", unmasked(lost, z))
        return whole(damped, value), *(None,) * ctx.n_rest


class Scaled(Identity):
    """Identity at which what travels backwards is multiplied by a factor, or by one for each value."""

    @staticmethod
    def forward(x: Tensor, factor: float | Tensor) -> Tensor:
        """The value itself."""
        return alias(x)

    @staticmethod
    def setup_context(ctx: _OfScaled, inputs: tuple[Tensor, float | Tensor], output: Tensor) -> None:
        """Keep the factor."""
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: _OfScaled, grad: Tensor) -> object:
        """Multiply."""
        return grad * ctx.factor, None


class Final(Identity):
    """Identity at whose input relevance arrives that cannot be differentiated once more.

    What a tape with rules on it says of a second derivative is wrong: on its way back to what the rules read, it
    would go through rules again, and not through derivatives.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """The value itself."""
        return alias(x)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Context, relevance: Tensor) -> object:
        """Hand it on, on a tape that ends here."""
        return _Undifferentiable.apply(relevance) if torch.is_grad_enabled() else relevance


class _Undifferentiable(TapeFunction):
    """Identity that raises in its backward pass."""

    @staticmethod
    def forward(relevance: Tensor) -> Tensor:
        return relevance.view_as(relevance)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> object:
        raise RuntimeError(
            "relevance cannot be differentiated: a second backward pass would go through rules where derivatives are "
            "meant. Detach the relevance, or train on gradient times input, which autograd differentiates"
        )


class NotOneTensor(Exception):
    """A function returned something else than a tensor."""


class Unchanged(TapeFunction):
    """A function of one tensor, all relevance of whose value goes to its argument.

    Raises:
        NotOneTensor: the function returns something else.
    """

    @staticmethod
    def forward(x: Tensor, function: Callable[[Tensor], object], made_by: str) -> Tensor:
        """The function's value."""
        z = function(x)
        if not isinstance(z, Tensor):
            raise NotOneTensor
        return alias(z) if z is x or is_view(z) else z

    @staticmethod
    def setup_context(
        ctx: _OfFunction, inputs: tuple[Tensor, Callable[[Tensor], object], str], output: Tensor
    ) -> None:
        """Keep the name of the function."""
        ctx.made_by = inputs[2]

    @staticmethod
    def backward(ctx: _OfFunction, grad: Tensor) -> object:
        """Hand it on."""
        return grad, None, None


class Ratio(TapeFunction):
    """The same in the gradient convention: ``g_x = g_z * z / stab(x)``."""

    @staticmethod
    def forward(
        x: Tensor, function: Callable[[Tensor], object], made_by: str, report: Report | None = None
    ) -> Tensor:
        """The function's value."""
        return Unchanged.forward(x, function, made_by)

    @staticmethod
    def setup_context(ctx: _OfFunction, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep argument and value."""
        x, _, ctx.made_by, *rest = inputs
        ctx.report = rest[0] if rest else None
        ctx.n_rest = len(inputs) - 1
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: _OfFunction, grad: Tensor) -> object:
        """Multiply by the slope of the secant through the origin."""
        x, z = ctx.saved_tensors
        pulled = saturated(grad * plain_quotient(z, x))
        if ctx.report is not None:
            pulled = torch.where(grad == 0, 0.0, pulled)
            kept = unmasked(finite_product(z, grad), z) - unmasked(finite_product(x, pulled), x)
            ctx.report("stabiliser", kept)
        return pulled, *(None,) * ctx.n_rest


class Substituted(TapeFunction):
    """A value that one computation made, on the tape of another that makes the same."""

    @staticmethod
    def forward(written: Tensor, value: Tensor) -> Tensor:
        """The value."""
        return alias(value)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> object:
        """Hand it to the computation that is written out."""
        return grad, None


def finite_product(x: Tensor, grad: Tensor) -> Tensor:
    """``x * grad``, and zero where ``x`` is infinite, as masked logits are, or ``grad`` zero, whatever ``x`` is.

    Args:
        x: ``[*shape]``.
        grad: ``[*shape]``, or with leading axes.
    """
    if x.is_complex():
        return whole(parts(x) * parts(grad), x)
    product = x * grad
    if not x.is_floating_point():
        return product
    if not product.requires_grad and seen_finite(product):
        return product
    return product.masked_fill_(x.isinf() | (grad == 0), 0.0)
