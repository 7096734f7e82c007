"""What a rule is, and how it binds to a module.

A rule says how the relevance of a module's outputs becomes that of its inputs. It is a ``torch.autograd.Function``, so
binding one changes what the backward pass computes and nothing else: the forward value stays the module's own.
"""

from __future__ import annotations

import inspect
import weakref
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionMeta

from tdhook.conventions import Convention
from tdhook.relevance.propagation.conversions import PerValue, TimesValue, live

__all__ = ["AbstractFunctionMeta", "RemovableRuleHandle", "Rule", "RunningRule"]


class AbstractFunctionMeta(ABCMeta, FunctionMeta):
    """Metaclass of abstract classes that are autograd functions."""


def _rebuild(cls: type[Rule], state: dict[str, Any]) -> Rule:
    rule: Rule = cls.__new__(cls)
    rule.__dict__.update(state)
    return rule


class Rule(Function, metaclass=AbstractFunctionMeta):
    """Base class of all rules.

    To write one, override the two static methods. ``forward(ctx, apply_kwargs, module, model_kwargs, *inputs)`` runs
    the module (its original forward is ``module._prev_forward``) and saves what the backward pass needs;
    ``backward(ctx, *out_relevance)`` returns three ``None`` and then the relevance of each input. ``apply_kwargs`` is
    the dictionary ``self._apply_kwargs``, filled in ``__init__``.

    Attributes:
        convention: what travels backwards through the rule, ``"relevance"`` (the relevance itself) or ``"gradient"``
            (relevance per unit of activation). A context converts where two conventions meet.
        yields: ``"relevance"``, or ``"sensitivity"`` for rules that make the result a modified gradient, which is
            explained as it is and not multiplied by the input.
        in_both: whether the rule has an exact form in the other convention, so that nothing need be converted.
        opens: whether the rule writes its call out as operations that are ruled in turn.
    """

    convention: ClassVar[Convention] = "relevance"
    yields: ClassVar[Literal["relevance", "sensitivity"]] = "relevance"
    in_both: ClassVar[bool] = False
    opens: ClassVar[bool] = False
    registry: ClassVar[weakref.WeakValueDictionary[str, type[Rule]]] = weakref.WeakValueDictionary()

    # Function.__init__ warns that instances are deprecated, and a rule is an instance: it is not called.
    def __init__(self) -> None:
        self._apply_kwargs: dict[str, Any] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the rule known by its class name, for ``rule_from_dict``, unless it is an internal one."""
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            Rule.registry[cls.__name__] = cls

    @staticmethod
    @abstractmethod
    def forward(
        ctx: Any, apply_kwargs: dict[str, Any], module: nn.Module, model_kwargs: dict[str, Any], *inputs: Any
    ) -> Any:
        """Run the module and save what :meth:`backward` needs."""

    @staticmethod
    @abstractmethod
    def backward(ctx: Any, *out_relevance: Any) -> Any:
        """Turn the relevance of the outputs into that of the inputs."""

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call ``module`` under this rule; ``original`` is its forward without the rule."""
        return self.apply(self._apply_kwargs, module, kwargs, *args)

    def run_in(
        self,
        flow: Convention,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call ``module`` under this rule where values arrive in the convention of ``flow``.

        Where that is not the rule's own they are converted: ``g = R / z`` at the outputs and ``R = x * g`` at the
        inputs, or the other way round.
        """
        if flow == self.convention:
            return self.run(module, original, args, kwargs)
        to_gradient = self.convention == "gradient"
        enter, leave = (TimesValue, PerValue) if to_gradient else (PerValue, TimesValue)
        args, kwargs = live(enter.apply, (args, kwargs))
        return live(leave.apply, self.run(module, original, args, kwargs))

    def register(self, module: nn.Module) -> RemovableRuleHandle:
        """Make ``module`` run under this rule until the returned handle is removed.

        Raises:
            RuntimeError: the module already runs under a rule.
        """
        from tdhook.relevance.propagation.binding import Binding

        current = Binding.of(module)
        if current is not None:
            raise RuntimeError(
                f"{type(module).__name__} already runs under {current.rule!r}; remove that rule's handle before "
                f"registering {self!r}"
            )
        Binding(module, self).attach()
        return RemovableRuleHandle(self, module)

    def unregister(self, module: nn.Module) -> None:
        """Give ``module`` its own forward back.

        Raises:
            RuntimeError: this rule is not registered on the module.
        """
        from tdhook.relevance.propagation.binding import Binding

        current = Binding.of(module)
        if current is None or current.rule is not self:
            raise RuntimeError(f"{self!r} is not registered on this {type(module).__name__}")
        current.detach()

    def params(self) -> dict[str, Any]:
        """The arguments this rule was made with, by name."""
        names = list(inspect.signature(type(self)).parameters)
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def to_dict(self) -> dict[str, Any]:
        """This rule as plain data, for ``rule_from_dict``. Arguments at their default are left out.

        Raises:
            TypeError: an argument is a callable, which is not data.
        """
        if self._apply_kwargs:
            raise TypeError(
                f"{type(self).__name__} keeps its arguments for itself: make them attributes to write them"
            )
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        data: dict[str, Any] = {"rule": type(self).__name__}
        for name, value in self.params().items():
            if callable(value):
                raise TypeError(
                    f"{type(self).__name__}.{name} is a callable, which cannot be written as plain data"
                )
            if isinstance(value, Tensor):
                value = value.tolist()
            elif isinstance(value, tuple):
                value = list(value)
            default = defaults[name]
            if value is not None and value != ([] if default is None else default):
                data[name] = value
        return data

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, Rule)
        pairs = ((self.params(), other.params()), (self._apply_kwargs, other._apply_kwargs))
        return all(a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a) for a, b in pairs)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        shown = []
        for name, value in self.params().items():
            if _same(value, defaults[name]) or (value == () and defaults[name] is None):
                continue
            if isinstance(value, Tensor):
                value = f"tensor of shape {tuple(value.shape)}"
            elif inspect.isfunction(value):
                value = value.__name__
            shown.append(f"{name}={value!r}" if not isinstance(value, str) else f"{name}={value}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))


class RunningRule(Rule):
    """A rule that makes its calls itself, in :meth:`run`, and is no autograd function but in name."""

    @abstractmethod
    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """For users' rules, which derive from a built-in one and are written against the contract of :class:`Rule`."""
        raise NotImplementedError("this rule runs, it is not applied")

    @staticmethod
    def backward(ctx: Any, *out_relevance: Any) -> Any:
        """Likewise."""
        raise NotImplementedError("this rule runs, it is not applied")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


class RemovableRuleHandle:
    """Takes a rule off its module again; also a context manager.

    The module is held weakly: a handle keeps no model alive, and removing it is silent once the module is gone, or once
    the rule is off.
    """

    def __init__(self, rule: Rule, module: nn.Module) -> None:
        self._rule = rule
        self._module_ref: Callable[[], nn.Module | None] = weakref.ref(module)
        self._removed = False

    def remove(self) -> None:
        """Take the rule off, if it is still on."""
        from tdhook.relevance.propagation.binding import Binding

        module = self._module_ref()
        if module is None or self._removed:
            return
        self._removed = True
        current = Binding.of(module)
        binds_itself = type(self._rule).register is not Rule.register
        if binds_itself or (current is not None and current.rule is self._rule):
            self._rule.unregister(module)

    def __enter__(self) -> RemovableRuleHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
