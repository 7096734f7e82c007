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
from tdhook.relevance.propagation.differences import DifferencedLayer, DifferencedModule, of_one_tensor
from tdhook.relevance.propagation.executed import Formula, Ruled
from tdhook.relevance.propagation.executed_layers import RuledLayer
from tdhook.relevance.propagation.forms import closed_form
from tdhook.relevance.propagation.handles import Behind, Handle
from tdhook.relevance.propagation.operation import Operation, known_as
from tdhook.relevance.propagation.places import Place
from tdhook.relevance.propagation.sharing import secant
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.relevance.secants.table import secant_of
from tdhook.tape.functions import on_tape
from tdhook.tape.trees import tree_leaves

__all__ = ["Revealing", "revealed"]


class Revealing(Formula, Protocol):
    """A rule that shares the difference of a layer together with that of the function behind it."""

    def reveal(self, step: Step, rest: Tensor, handed: Tensor, start: Tensor, behind: Behind) -> Tensor:
        """What the input counts per unit, where there is.

        Args:
            step: the call of the layer.
            rest: what its output counts elsewhere.
            handed: what the output of the function behind it counts.
            start: the output of the layer on the reference.
            behind: the function.
        """


class _Together:
    """The formula of one call.

    Args:
        rule: the rule.
        place: what the call met.
    """

    needs_inputs: ClassVar[bool] = True
    needs_outputs: ClassVar[bool] = True
    needs_vjp: ClassVar[bool] = False
    needs_sign: ClassVar[bool] = False
    reruns: ClassVar[bool] = True

    def __init__(self, rule: Revealing, place: Place) -> None:
        self.rule, self.place, self.behind = rule, place, Behind()

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """As the rule does."""
        self.rule.check(module, inputs, outputs)

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        rise = step.outputs[0]
        # What the step computes in is more exact than half precision.
        grad, handed, by = (value.to(rise.dtype) for value in relevance)
        behind = self.behind
        known = behind.is_known()
        if known is False:
            return self.rule.propagate(step, (grad,))
        rest = grad - (by if behind.scale is None else by * behind.scale.to(rise.dtype))
        found = self.rule.reveal(step, rest, handed, self.place.before[0].to(rise.dtype), behind)
        if isinstance(known, Tensor):
            (plain,) = self.rule.propagate(step, (grad,))
            found = found if plain is None else torch.where(known, found, plain)
        return (found,)


def _beside(z: Tensor) -> tuple[Tensor, Tensor]:
    """What is handed over at, which takes no memory."""
    return z.new_zeros(()).expand(z.shape), z.new_zeros(()).expand(z.shape)


class _RevealedLayer(RuledLayer):
    """A linear layer or convolution with a handle."""

    @staticmethod
    def forward(executed: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        z = RuledLayer.forward(executed, x, weight, bias)
        return z, *_beside(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        RuledLayer.setup_context(ctx, inputs, output[0])


class _RevealedModule(DifferencedModule):
    """Any call that is linear in its one argument, with a handle."""

    def execute(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (z,) = super().execute(inputs)
        return z, *_beside(z)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the call returns, and where is handed over."""
        (index,) = self.at
        z, at, by = Ruled.apply(self, self.leaves[index])
        self.leaves[index] = None
        return z, at, by

    def step(self, saved: Sequence[Tensor]) -> Step:
        return super().step(saved[:-2])


def revealed(rule: Revealing, module: nn.Module, flow: Convention) -> Run:
    """How linear calls run under a rule that looks at what is behind them; others go by the secant.

    Args:
        rule: the rule, in the gradient convention.
        module: what is called.
        flow: the convention in which values arrive.
    """
    pull = secant_of(known_as(module), is_module=not isinstance(module, Operation))
    has_form = closed_form(module) is not None

    def first(call: Call, place: Place) -> Any:
        together = _Together(rule, place)
        setting = call.setting
        if setting.merges is not None:
            # What is behind a batch norm is told to the layer with it.
            call = call.within(replace(setting, offered=None))
        if has_form:
            z, at, by = DifferencedLayer(together, call, place).run(call.args[0], _RevealedLayer)
        else:
            z, at, by = _RevealedModule(together, pull, call, place).run()
        assert setting.reference is not None
        setting.reference.handles.put(z, Handle(at, by, together.behind))
        return z

    run, plain = between(noted(first), "gradient", flow), secant(module, flow)

    def one(call: Call) -> Any:
        if has_form:
            alone = of_one_tensor(call)
            return plain(call) if alone is None else run(alone)
        tensors = [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
        return run(call) if sum(map(on_tape, tensors)) == 1 else plain(call)

    return one
