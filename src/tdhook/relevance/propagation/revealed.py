"""Linear layers whose difference is shared together with that of the element-wise function behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.beside import between, noted
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.differences import (
    DifferencedLayer,
    DifferencedModule,
    of_one_tensor,
    secant,
)
from tdhook.relevance.propagation.executed import Formula, Ruled, RuledLayer
from tdhook.relevance.propagation.forms import closed_form
from tdhook.relevance.propagation.handles import Behind, Handle
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.reference import Place
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.secants.slopes import slope
from tdhook.relevance.secants.table import secant_of
from tdhook.tape.functions import on_tape
from tdhook.tape.trees import tree_leaves

__all__ = ["Revealing", "Ways", "revealed"]


class Ways:
    """How the function behind a layer goes from the reference to the input, by parts of what the layer adds to it.

    Args:
        behind: the function.
        start: its argument on the reference.
        step: by how much that differs.
        still: whether the slope where nothing differs got lost on its way back to the layer.
    """

    def __init__(self, behind: Behind, start: Tensor, step: Tensor, still: bool) -> None:
        self._behind, self._start, self._step, self._still = behind, start, step, still

    def slopes(self, ways: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """Slopes of secants, that of the whole way first.

        Args:
            ways: where each begins and ends, as differences from the reference; the end may be the step itself.

        Returns:
            ``[*shape]`` each; the first is what arrived at the output of the layer, per unit of what was handed over.
        """
        behind, start, step = self._behind, self._start, self._step
        assert behind.name is not None
        nowhere = torch.zeros_like(step)
        begins, ends = zip((nowhere, step), *ways, strict=True)
        # One call for all: functions are element-wise, and a few small operations take as long as a large one.
        origin = torch.cat([start.expand_as(step)] * len(begins))
        first, last = origin + torch.cat(begins), origin + torch.cat(ends)
        function = behind.function
        found = slope(behind.name, function, last, first, function(last), function(first))
        whole, *rest = found.tensor_split(len(begins))
        return (torch.where(step == 0, 0.0, whole) if self._still else whole, *rest)


class Revealing(Formula, Protocol):
    """A rule that shares the difference of a layer together with that of the function behind it."""

    def reveal(self, step: Step, grad: Tensor, handed: Tensor, ways: Ways) -> Tensor:
        """What the input counts per unit, where there is.

        Args:
            step: the call of the layer.
            grad: what its output counts, with what went back through the function behind it by the secant.
            handed: what the output of that function counts.
            ways: the function.
        """


class _Together:
    """The formula of one call.

    Args:
        rule: the rule.
        place: what the call met.
        flow: the convention of what arrives.
    """

    needs_inputs: ClassVar[bool] = True
    needs_outputs: ClassVar[bool] = True
    needs_vjp: ClassVar[bool] = False
    needs_sign: ClassVar[bool] = False
    reruns: ClassVar[bool] = True

    def __init__(self, rule: Revealing, place: Place, flow: Convention) -> None:
        self.rule, self.place, self.flow, self.behind = rule, place, flow, Behind()

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """As the rule does."""
        self.rule.check(module, inputs, outputs)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        rise = step.outputs[0]
        # What the step computes in is more exact than half precision.
        grad, handed = (value.to(rise.dtype) for value in relevance)
        if self.behind.name is None:
            return self.rule.propagate(step, (grad,))
        ways = Ways(self.behind, self.place.before[0].to(rise.dtype), rise, self.flow == "relevance")
        return (self.rule.reveal(step, grad, handed, ways),)


def _beside(z: Tensor) -> Tensor:
    """A handle, which takes no memory."""
    return z.new_zeros(()).expand(z.shape)


class _RevealedLayer(RuledLayer):
    """A linear layer or convolution with a handle."""

    @staticmethod
    def forward(executed: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        z = RuledLayer.forward(executed, x, weight, bias)
        return z, _beside(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        RuledLayer.setup_context(ctx, inputs, output[0])


class _RevealedModule(DifferencedModule):
    """Any call that is linear in its one argument, with a handle."""

    def execute(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (z,) = super().execute(inputs)
        return z, _beside(z)

    def run(self) -> tuple[Tensor, Tensor]:
        """What the call returns, and the handle."""
        (at,) = self.at
        z, handle = Ruled.apply(self, self.leaves[at])
        self.leaves[at] = None
        return z, handle

    def step(self, saved: Sequence[Tensor]) -> Step:
        return super().step(saved[:-1])


def revealed(rule: Revealing, module: nn.Module, flow: Convention) -> Run:
    """How linear calls run under a rule that looks at what is behind them; others go by the secant.

    Args:
        rule: the rule, in the gradient convention.
        module: what is called.
        flow: the convention in which values arrive.
    """
    pull = secant_of(type(module).__name__, is_module=not isinstance(module, Operation))
    has_form = closed_form(module) is not None

    def first(call: Call, place: Place) -> Any:
        together = _Together(rule, place, flow)
        setting = call.setting
        if setting.merges is not None:
            # What is behind a batch norm is told to the layer with it.
            call = call.within(replace(setting, merges=None))
        if has_form:
            z, handle = DifferencedLayer(together, call, place).run(call.args[0], _RevealedLayer)
        else:
            z, handle = _RevealedModule(together, pull, call, place).run()
        assert setting.reference is not None
        setting.reference.handles.put(z, Handle(handle, together.behind))
        return z

    run, plain = between(noted(first), "gradient", flow), secant(module, flow)

    def one(call: Call) -> Any:
        if has_form:
            alone = of_one_tensor(call)
            return plain(call) if alone is None else run(alone)
        tensors = [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
        return run(call) if sum(map(on_tape, tensors)) == 1 else plain(call)

    return one
