"""Rules that are a formula: what the built-in ones have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tdhook.relevance.propagation.call import LayerCall, ModuleCall
from tdhook.relevance.propagation.forms import closed_form
from tdhook.relevance.propagation.rule import Rule, RunningRule
from tdhook.relevance.propagation.steps import Grads, Step

__all__ = ["PropagationRule"]


class PropagationRule(RunningRule):
    """A rule given by :meth:`propagate`, which sees a :class:`Step` and the relevance of its outputs.

    Class attributes say what the rule reads, so that nothing else is kept from the forward pass, or found out.
    """

    needs_inputs: ClassVar[bool] = True
    needs_outputs: ClassVar[bool] = False
    needs_vjp: ClassVar[bool] = False
    needs_sign: ClassVar[bool] = False

    @abstractmethod
    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        """The relevance of each input, given that of each output (same shapes); ``None`` for no relevance."""

    def check(self, module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Raise where the rule does not fit the module that it is bound to."""

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call ``module`` under this rule; ``original`` is its forward without the rule."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            form = closed_form(module)
            if form is not None:
                return LayerCall(self, module, original, form).run(args[0])
        return ModuleCall(self, module, original, args, kwargs).run()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "propagate" in cls.__dict__ and "run" not in cls.__dict__:
            # A formula of its own: shortcuts for that of a built-in rule do not hold for it.
            cls.run = PropagationRule.run  # type: ignore[method-assign]
            if "run_in" not in cls.__dict__:
                cls.run_in = Rule.run_in  # type: ignore[method-assign]
        if "forward" in cls.__dict__:
            # A user's rule that derives from a built-in one and is written against the contract of Rule.
            cls.run = Rule.run  # type: ignore[method-assign]
