"""Rules for products of activations: in which one factor takes all (gates, denominators), and of many factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tdhook.conventions import Convention
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.constants import Reported, with_constants
from tdhook.relevance.propagation.conversions import Scaled
from tdhook.relevance.propagation.rule import RunningRule, converted
from tdhook.relevance.propagation.sharing import secant
from tdhook.relevance.secants.averages import average
from tdhook.relevance.secants.pair import Grads, Pair
from tdhook.tape.functions import live, on_tape
from tdhook.tape.origins import made_by

__all__ = ["ConstantRule", "FactorsRule", "SignalTakeAllRule"]

_GATES = frozenset(("sigmoid", "hardsigmoid"))


class SignalTakeAllRule(RunningRule):
    """One factor of a product, the signal, takes all relevance; the others, the gates, are held constant.

    For the gated products of recurrent cells (Arras et al. 2017, 2019), and for quotients, whose denominator is the
    gate (AttnLRP, Achtibat et al. 2024, Prop. 3.4).

    Args:
        signal: which of the arguments is the signal. By default the first of a quotient; of a product the one that is
            no gate, where the other one is: what a sigmoid made, or one minus that. A product without gate, and one
            of gates alone, is shared equally.
    """

    convention: ClassVar[Convention] = "gradient"

    def __init__(self, signal: int | None = None) -> None:
        super().__init__()
        if signal is not None and type(signal) is not int:
            raise TypeError(f"signal is the index of an argument, or None, got {signal!r}")
        self.signal = signal

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """With the gates taken off the tape."""
        return converted(self._ungated, self.convention, flow)

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """The gates are held at the mean of what they are on the input and on the reference."""

        def run(call: Call) -> object:
            signal = self._chosen(call.module, *_factors(call))

            def pull(pair: Pair, grads: Sequence[Tensor]) -> Grads:
                found = average(pair, grads)
                if signal is None:
                    return found
                return tuple(g if i == signal else None for i, g in zip(pair.live, found, strict=True))

            return secant(module, flow, pull, keeps=True)(call)

        return run

    def _chosen(self, module: nn.Module, arguments: list[Any], factors: list[int]) -> int | None:
        """Which of the arguments is the signal."""
        if self.signal is None and len(factors) > 1:
            return self._signal(module, arguments, factors)
        return self.signal

    def _ungated(self, call: Call) -> object:
        arguments, factors = _factors(call)
        signal = self._chosen(call.module, arguments, factors)
        equal = 1 / max(len(factors), 1) if signal is None else 1.0
        for i in factors:
            if signal is not None and i != signal:
                arguments[i] = arguments[i].detach()
        n_args = len(call.args)
        kwargs = dict(zip(call.kwargs, arguments[n_args:], strict=True))
        call = call.given(tuple(arguments[:n_args]), kwargs)
        outputs = call.execute()
        if equal != 1:
            outputs = live(lambda z: Scaled.apply(z, equal), outputs)
        return with_constants(call, outputs, factors=equal)

    @staticmethod
    def _signal(module: nn.Module, arguments: list[Any], factors: list[int]) -> int | None:
        if type(module).__name__ not in ("mul", "matmul"):
            return factors[0]
        signals = [i for i in factors if not made_by(arguments[i], _GATES)]
        return signals[0] if len(signals) == 1 else None


def _factors(call: Call) -> tuple[list[Any], list[int]]:
    """The arguments of a call, and which of them are on the tape."""
    arguments: list[Any] = [*call.args, *call.kwargs.values()]
    return arguments, [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and on_tape(x)]


class ConstantRule(RunningRule):
    """Hold the result constant: it takes no share where it meets others (Ali et al. 2022, of attention weights)."""

    convention: ClassVar[Convention] = "gradient"

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """Off the tape."""
        return converted(_held, self.convention, flow)

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """Off the tape; what is computed with it books its share."""
        return _held


def _held(call: Call) -> object:
    with torch.no_grad():
        return call.execute()


class FactorsRule(RunningRule):
    """Equal parts to all factors of each output that are activations (AttnLRP, Achtibat et al. 2024, Prop. 3.3).

    For products along an axis, and for those of what is scattered to one place: ``prod``, ``cumprod``,
    ``scatter_reduce(..., "prod")``. Constant factors take no part.
    """

    convention: ClassVar[Convention] = "gradient"

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """As it is, with the gradient of each output divided by the number of its factors."""
        return converted(self._shared, self.convention, flow)

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """Each factor by the others, on the mean of the way."""
        return secant(module, flow)

    @staticmethod
    def _shared(call: Call) -> object:
        outputs = call.natively()
        count = _n_factors(call)
        report = call.setting.report
        if report is not None:
            untouched = torch.where(count == 0, outputs.detach(), 0.0)
            outputs = Reported.apply(outputs, untouched, "constant", report)
        return Scaled.apply(outputs, (1 / count.clamp(min=1)).to(outputs.dtype))


def _n_factors(call: Call) -> Tensor:
    """How many factors of each output are activations: the exponent of what comes out if each of them is one number."""
    total = sum(x.numel() for x in call.tensors())
    base = math.exp(50 / max(total, 1))  # far from overflow, in single precision too

    def counted(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return torch.full_like(x, base if on_tape(x) else 1.0, dtype=torch.float64)

    args, kwargs = tree_map_only(Tensor, counted, (call.args, call.kwargs))
    args = [1.0 if isinstance(x, float) else x for x in args]
    kwargs = {key: 1.0 if isinstance(x, float) else x for key, x in kwargs.items() if key != "dtype"}
    with torch.no_grad():
        product: Tensor = call.function(*args, **kwargs)
    return (product.log() / math.log(base)).round()
