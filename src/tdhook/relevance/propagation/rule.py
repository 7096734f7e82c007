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
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionMeta

from tdhook.conventions import Convention
from tdhook.relevance.propagation.binding import Binding
from tdhook.relevance.propagation.call import Call, Run
from tdhook.relevance.propagation.conversions import Final, PerValue, TimesValue
from tdhook.relevance.propagation.entering import OnLinearOperations
from tdhook.relevance.propagation.stabilisers import rounding
from tdhook.tape.containers import leaving_containers
from tdhook.tape.functions import live
from tdhook.tape.overwriting import version_in, was_overwritten

__all__ = ["AbstractFunctionMeta", "RemovableRuleHandle", "Rule", "RuleOf", "RunningRule", "converted"]


RuleOf: TypeAlias = "Callable[..., Rule | None]"
"""``(operation, *arguments) -> rule``."""


class AbstractFunctionMeta(ABCMeta, FunctionMeta):
    """Metaclass of abstract classes that are autograd functions."""


def _rebuild(cls: type[Rule], state: dict[str, object]) -> Rule:
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
        in_both: whether the rule is defined alike in both conventions, so that nothing need be converted.
        opens: whether the rule writes its call out as operations that are ruled in turn, and ``opens_against``: whether
            it does of differences from a reference.
        native: whether the rule leaves the call and its gradient alone.
        absorbs_all: whether no relevance goes through.
        needs_sign: whether the rule saves work where it is known that no input is negative.
        reveals: whether it wants to know what is behind a layer.
    """

    convention: ClassVar[Convention] = "relevance"
    yields: ClassVar[Literal["relevance", "sensitivity"]] = "relevance"
    in_both: ClassVar[bool] = False
    opens: ClassVar[bool] = False
    opens_against: ClassVar[bool] = False
    native: ClassVar[bool] = False
    absorbs_all: ClassVar[bool] = False
    needs_sign: ClassVar[bool] = False
    reveals: ClassVar[bool] = False
    registry: ClassVar[weakref.WeakValueDictionary[str, type[Rule]]] = weakref.WeakValueDictionary()

    # Function.__init__ warns that instances are deprecated, and a rule is an instance: it is not called.
    def __init__(self) -> None:
        self._apply_kwargs: dict[str, object] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Make the rule known by its class name, for ``rule_from_dict``, unless it is an internal one."""
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            Rule.registry[cls.__name__] = cls

    @staticmethod
    @abstractmethod
    def forward(
        ctx: Any, apply_kwargs: dict[str, Any], module: nn.Module, model_kwargs: dict[str, Any], *inputs: Any
    ) -> object:
        """Run the module and save what :meth:`backward` needs."""

    @staticmethod
    @abstractmethod
    def backward(ctx: Any, *out_relevance: object) -> object:
        """Turn the relevance of the outputs into that of the inputs."""

    @property
    def conventions(self) -> tuple[Convention, ...]:
        """The conventions in which the rule runs without being converted."""
        return ("relevance", "gradient") if self.in_both else (self.convention,)

    @property
    def applied(self) -> bool:
        """Whether calls run by the static methods, for which the module has its own forward as ``_prev_forward``."""
        return True

    @property
    def binds_itself(self) -> bool:
        """Whether the rule has its own way onto a module."""
        return type(self).register is not Rule.register

    def enters(self, module: nn.Module, inherited: bool = False) -> bool:
        """Whether the rule is that of an operation inside ``module``, and not of ``module`` as a whole.

        Args:
            module: the module.
            inherited: whether the rule is given to a class that ``module`` derives from.
        """
        return False

    def bound(self, module: nn.Module, flow: Convention) -> Run:
        """How calls of ``module`` run under this rule, decided once.

        Args:
            module: the module, or the operation.
            flow: the convention in which values arrive; where it is not the rule's own they are converted.
        """
        return converted(self._apply, self.convention, flow)

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """How calls of ``module`` run where what is explained is the difference from a reference, decided once.

        Args:
            module: the module, or the operation.
            flow: the convention in which values arrive.

        Raises:
            NotImplementedError: the rule says nothing of differences.
        """
        raise NotImplementedError(
            f"{self!r} says what becomes of values, and nothing of their difference from a baseline: leave baseline "
            "out, or override Rule.against"
        )

    def at_once(self, call: Call, flow: Convention, rule_of: RuleOf) -> Run | None:
        """How a call that the rule writes out is made without writing it out, to the same effect, if it can be.

        It is asked where nobody wants to know of the operations inside.

        Args:
            call: the call.
            flow: the convention in which values arrive.
            rule_of: which rule an operation inside would have.
        """
        return None

    def _apply(self, call: Call) -> object:
        return self.apply(self._apply_kwargs, call.module, call.kwargs, *call.args)

    def require(self, module: nn.Module) -> None:
        """Raise where the rule makes no sense on ``module``, whatever it will be called with."""

    def register(self, module: nn.Module) -> RemovableRuleHandle:
        """Make ``module`` run under this rule until the returned handle is removed.

        Raises:
            RuntimeError: the module already runs under a rule.
            ValueError: the rule makes no sense on the module.
        """
        current = Binding.of(module)
        if current is not None:
            raise RuntimeError(
                f"{type(module).__name__} already runs under {current.rule!r}; remove that rule's handle before "
                f"registering {self!r}"
            )
        self.require(module)
        binding = Binding(module, self)
        if not self.native:
            binding.around = _Alone()
        binding.attach()
        return RemovableRuleHandle(self, module)

    def unregister(self, module: nn.Module) -> None:
        """Give ``module`` its own forward back.

        Raises:
            RuntimeError: this rule is not registered on the module.
        """
        current = Binding.of(module)
        if current is None or current.rule is not self:
            raise RuntimeError(f"{self!r} is not registered on this {type(module).__name__}")
        current.detach()

    def params(self) -> dict[str, Any]:
        """The arguments this rule was made with, by name."""
        names = list(inspect.signature(type(self)).parameters)
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    @property
    def looks_across(self) -> bool:
        """Whether it may compute with several elements of a batch together, as functions of its user's may."""
        ours = type(self).__module__.partition(".")[0] == __name__.partition(".")[0]
        return not ours or any(callable(one) and one is not rounding for one in self.params().values())

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
        data: dict[str, object] = {"rule": type(self).__name__}
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

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), dict(self.__dict__))


class RunningRule(Rule):
    """A rule that makes its calls itself, as :meth:`running` says, and is no autograd function but in name.

    A user's rule that derives from such a one and overrides the static methods is run by these.
    """

    @property
    def applied(self) -> bool:
        """Whether a subclass is written against the contract of :class:`Rule`."""
        return type(self).forward is not RunningRule.forward

    def bound(self, module: nn.Module, flow: Convention) -> Run:
        """How calls of ``module`` run under this rule, decided once."""
        return super().bound(module, flow) if self.applied else self.running(module, flow)

    @abstractmethod
    def running(self, module: nn.Module, flow: Convention) -> Run:
        """How calls of ``module`` run where values arrive in the convention of ``flow``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> object:
        """For users' rules, which derive from a built-in one and are written against the contract of :class:`Rule`."""
        raise NotImplementedError("this rule runs, it is not applied")

    @staticmethod
    def backward(ctx: Any, *out_relevance: object) -> object:
        """Likewise."""
        raise NotImplementedError("this rule runs, it is not applied")


class _Alone:
    """Around the calls of a module whose rule is on without a plan: relevance is not differentiated."""

    def unit(self, binding: Binding, call: Call) -> Any:
        """Make the call under its rule."""
        if binding.closed:
            return self._made(binding, call)
        name, given = type(call.module).__name__, call.tensors()
        versions = list(map(version_in, given))
        error: RuntimeError | None = None
        try:
            outputs = self._made(binding, call._replace(function=leaving_containers(call.function, name)))
        except RuntimeError as raised:
            if "custom Function" not in str(raised) or not was_overwritten(raised):
                raise
            outputs, error = None, raised
        reads = getattr(binding.rule, "needs_inputs", True)
        if error is not None or (reads and versions != list(map(version_in, given))):
            raise NotImplementedError(_OVERWRITES.format(name, binding.rule)) from error
        return outputs

    @staticmethod
    def _made(binding: Binding, call: Call) -> Any:
        if not binding.enters:
            return binding.bound.run(call.live(Final.apply))
        inside = OnLinearOperations(lambda operation: binding.rule.bound(operation, binding.flow))
        return inside.run(call.live(Final.apply))


_OVERWRITES = (
    "{} overwrites what it is given, where {!r} is registered on it alone and has to read it: have it write to a new "
    "tensor, or explain the whole model by LRP, which sees that"
)


def converted(run: Run, own: Convention, flow: Convention) -> Run:
    """``run``, whose values are in its ``own`` convention, for values in that of ``flow``.

    Where these differ, ``g = R / z`` at the outputs and ``R = x * g`` at the inputs, or the other way round.
    """
    if own == flow:
        return run

    def to_relevance(call: Call) -> Any:
        setting = call.setting
        outputs = run(call.live(lambda x: PerValue.apply(x, rounding, setting)))
        return live(TimesValue.apply, outputs)

    def to_gradient(call: Call) -> Any:
        setting = call.setting
        outputs = run(call.live(TimesValue.apply))
        return live(lambda z: PerValue.apply(z, rounding, setting), outputs)

    return to_gradient if own == "gradient" else to_relevance


def _same(a: object, b: object) -> bool:
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
        module = self._module_ref()
        if module is None or self._removed:
            return
        self._removed = True
        current = Binding.of(module)
        if self._rule.binds_itself or (current is not None and current.rule is self._rule):
            self._rule.unregister(module)

    def __enter__(self) -> RemovableRuleHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
