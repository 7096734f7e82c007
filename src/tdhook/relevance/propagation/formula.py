"""Rules that are a formula: what the built-in ones have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.relevance.propagation.call import Run
from tdhook.relevance.propagation.differences import formula_of_function, formula_of_layer, formula_of_module
from tdhook.relevance.propagation.executed import running_module
from tdhook.relevance.propagation.executed_layers import Directly, running_layer
from tdhook.relevance.propagation.forms import closed_form, makes_weights
from tdhook.relevance.propagation.functional import is_layer, running_function
from tdhook.relevance.propagation.inherited import inherited_operation
from tdhook.relevance.propagation.operation import Operation
from tdhook.relevance.propagation.params import require_parameters
from tdhook.relevance.propagation.rule import RunningRule, converted
from tdhook.relevance.propagation.steps import Grads, Step

__all__ = ["PropagationRule"]


class PropagationRule(RunningRule):
    """A rule given by :meth:`propagate`, which sees a :class:`Step` and the relevance of its outputs.

    Class attributes say what the rule reads, so that nothing else is kept from the forward pass, or found out.

    Attributes:
        needs_inputs: whether the formula reads ``step.inputs``, ``needs_outputs``: ``step.outputs``, ``needs_vjp``:
            ``step.vjp``, and ``needs_sign``: whether ``step.nonnegative`` saves it work.
        zero_params: names of parameters that it treats as zero.
        reruns: whether it may run the step once more (``step.modified``, ``step.constants``), for which what the module
            holds is kept.
        abbreviates: the formula that :meth:`shortcut` and :meth:`directly` are short for. A class with a
            :meth:`propagate` of its own has neither unless it names one.
    """

    needs_inputs: ClassVar[bool] = True
    needs_outputs: ClassVar[bool] = False
    needs_vjp: ClassVar[bool] = False
    reruns: ClassVar[bool] = True
    abbreviates: ClassVar[Callable[..., Grads] | None] = None
    zero_params: tuple[str, ...] = ()

    def require(self, module: nn.Module) -> None:
        """Raise where the module has no parameter of a name that the rule treats as zero."""
        require_parameters(self.zero_params, [module])

    @property
    def modifies(self) -> bool:
        """Whether the formula looks at modified weights."""
        return False

    @property
    def requires_operation(self) -> bool:
        """Whether there has to be an operation inside the module, where the rule is that of one."""
        return self.modifies

    def enters(self, module: nn.Module, inherited: bool = False) -> bool:
        """A rule that modifies weights gets them where they reach a linear operation.

        One that is given to a layer of torch is that of its operation in what derives from the layer.
        """
        if self.modifies and makes_weights(module):
            return True
        own = not (self.applied or self.absorbs_all)
        return inherited and own and inherited_operation(module) is not None

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """By the formula, whose inputs and outputs are differences."""
        if self.applied:
            return super().against(module, flow)
        if self.modifies and closed_form(module) is None and not _is_weighted(module):
            raise NotImplementedError(
                f"{self!r} modifies weights, and {type(module).__name__} is no linear layer, whose difference from a "
                "baseline is made of weights alone: give it another rule, EpsilonRule say"
            )
        run = formula_of_module(self, module, self.convention, flow)
        if closed_form(module) is not None:
            run = formula_of_layer(self, module, self.convention, flow, run)
        elif is_layer(module):
            run = formula_of_function(self, module, self.convention, flow, run)
        return run

    @abstractmethod
    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        """The relevance of each input, given that of each output (same shapes); ``None`` for no relevance."""

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Raise where the rule does not fit the module that it is bound to."""

    def shortcut(self, module: nn.Module, flow: Convention) -> Run | None:
        """A cheaper way to the result of the formula that the rule ``abbreviates``, if there is one for the module."""
        return None

    def directly(self) -> Directly | None:
        """What the formula comes to on a layer in closed form, if it takes less there than by a step."""
        return None

    @property
    def _is_abbreviated(self) -> bool:
        """Whether its shorter ways are those of this very formula."""
        return type(self).propagate is type(self).abbreviates

    def running(self, module: nn.Module, flow: Convention) -> Run:
        """How calls run: by the shortcut, if there is one, or by the formula."""
        short = self.shortcut(module, flow) if self._is_abbreviated else None
        return self.by_formula(module, flow) if short is None else short

    def by_formula(self, module: nn.Module, flow: Convention) -> Run:
        """How calls run by :meth:`propagate`: in closed form where the module has one."""
        run, form = running_module(self), closed_form(module)
        if form is not None:
            directly = self.directly() if self._is_abbreviated else None
            checks = type(self).check is not PropagationRule.check
            run = running_layer(self, module, form, run, directly, checks=checks)
        elif is_layer(module):
            run = running_function(self, run, checks=type(self).check is not PropagationRule.check)
        return converted(run, self.convention, flow)


def _is_weighted(module: nn.Module) -> bool:
    return isinstance(module, Operation) and module.weighted
