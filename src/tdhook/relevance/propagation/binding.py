"""Bindings: a rule on one module, as the object that stands in for the module's ``forward`` while the rule is on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from threading import get_ident
from typing import Any, NamedTuple, Protocol, cast

import torch
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.keys import named_tensors
from tdhook.models.entries import is_batch, leaves_of
from tdhook.models.parallel import is_of_torch
from tdhook.models.turns import elsewhere
from tdhook.relevance.propagation.call import ALONE, Call, Run, Setting
from tdhook.tape.internals import children_of
from tdhook.tape.own import derives

__all__ = ["Around", "Bindable", "Binding", "Bound"]


_NOTHING: tuple[Any, Any] = (None, None)


class Bindable(Protocol):
    """What a binding asks of a rule."""

    @property
    def convention(self) -> Convention:
        """The convention of its values."""

    @property
    def opens(self) -> bool:
        """Whether it writes its call out as operations that are ruled in turn."""

    @property
    def native(self) -> bool:
        """Whether it leaves the call alone."""

    @property
    def applied(self) -> bool:
        """Whether it asks the module for ``_prev_forward``."""

    def enters(self, module: nn.Module, inherited: bool = False) -> bool:
        """Whether it is the rule of an operation inside the module."""

    def bound(self, module: nn.Module, flow: Convention) -> Run:
        """How calls of the module run."""

    def against(self, module: nn.Module, flow: Convention) -> Run:
        """How they run where differences from a reference are explained."""


class Bound(NamedTuple):
    """A rule, and how it runs the calls of one module or operation in one flow."""

    rule: Bindable
    flow: Convention
    run: Run


class Around(Protocol):
    """What wants to know of the calls that are units."""

    def unit(self, binding: Binding, call: Call) -> Any:
        """Make the call under its rule."""


def _nothing() -> None:
    """Do nothing."""


class Binding:
    """Runs one module under one rule.

    While attached it is the module's ``forward``. Attaching nests: what was there before comes back on detaching.

    Args:
        module: the module; a ``TensorDictModule`` is seen as the function from the keys it reads to those it writes.
        rule: the rule.
        flow: the convention of the values that arrive from outside; the rule's own by default. Where the two differ
            they are converted.
        around: runs the call in its surroundings, as one unit.
        setting: what the calls of one plan share.
        inherited: whether the rule is given to a class that the module derives from.

    Attributes:
        closed: whether the module is a layer of torch's own, as it is there.
        enters: whether the rule is that of an operation inside the module.
        original: the module's own forward, while attached.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: Bindable,
        flow: Convention | None = None,
        around: Around | None = None,
        setting: Setting = ALONE,
        inherited: bool = False,
    ) -> None:
        self.module, self.rule, self.setting = module, rule, setting
        self.around = None if rule.opens else around
        self.flow: Convention = flow or rule.convention
        self._on_tensordict = isinstance(module, TensorDictModuleBase)
        self.closed = is_of_torch(module) and not children_of(module)
        self.enters = rule.enters(module, inherited)
        self.original: Callable[..., Any] | None = None
        self.thread: int | None = None
        self.applied = rule.applied
        self.replaced = _NOTHING

    @cached_property
    def bound(self) -> Bound:
        """The rule on the module."""
        rule = self.rule
        made = rule.bound if self.setting.reference is None else rule.against
        return Bound(rule, self.flow, made(self.module, self.flow))

    def __getstate__(self) -> dict[str, Any]:
        # How a rule runs is decided again in a copy: functions that are made on the way cannot be written.
        return {name: value for name, value in self.__dict__.items() if name != "bound"}

    @staticmethod
    def of(module: nn.Module) -> Binding | None:
        """The binding that ``module`` runs under, if any."""
        current = module.__dict__.get("forward")
        return current if isinstance(current, Binding) else None

    def attach(self, thread: int | None = None) -> None:
        """Take the place of the module's ``forward``, in one thread alone or in all of them."""
        self.thread = thread
        attributes = self.module.__dict__
        current = attributes.get("forward")
        self.replaced = current, attributes.get("_prev_forward")
        self.original = current.original if isinstance(current, Binding) else self.module.forward
        attributes["forward"] = self
        if self.applied:
            attributes["_prev_forward"] = self.original

    def put_back(self) -> Callable[[], None]:
        """Take that place again, if what the module held before was given back to it meanwhile; returns the reverse."""
        attributes = self.module.__dict__
        if attributes.get("forward") is self:
            return _nothing
        attributes["forward"] = self

        def off() -> None:
            if attributes.get("forward") is self:
                del attributes["forward"]

        return off

    def detach(self) -> None:
        """Put back what :meth:`attach` replaced, if it did."""
        if self.original is None:
            return
        attributes = self.module.__dict__
        forward, previous = self.replaced
        if forward is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = forward
        if previous is not None:
            attributes["_prev_forward"] = previous
        elif self.applied:
            attributes.pop("_prev_forward", None)
        self.original, self.replaced = None, _NOTHING

    @staticmethod
    def attach_all(bindings: Iterable[Binding], thread: int) -> None:
        """Attach bindings, in one thread alone."""
        for binding in bindings:
            module = binding.module
            attributes = module.__dict__
            if binding.applied or "forward" in attributes:
                binding.attach(thread)
                continue
            binding.thread, binding.original = thread, module.forward
            attributes["forward"] = binding

    @staticmethod
    def detach_all(bindings: Iterable[Binding]) -> None:
        """Detach bindings, as far as they are attached."""
        for binding in bindings:
            if binding.applied or binding.replaced is not _NOTHING:
                binding.detach()
            elif binding.original is not None:
                binding.module.__dict__.pop("forward", None)
                binding.original = None

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Run the module."""
        if self.thread is not None and self.thread != get_ident() and elsewhere(self.thread):
            return (self.original or self.module.forward)(*args, **kwargs)
        if self._on_tensordict:
            return self._call_on_tensordict(cast(TensorDictModuleBase, self.module), *args, **kwargs)
        original, around = self.original, self.around
        assert original is not None
        if not torch.is_grad_enabled() or derives.get():
            return original(*args, **kwargs)
        call = Call(self.module, original, args, kwargs, self.setting)
        return self.bound.run(call) if around is None else around.unit(self, call)

    def _call(self, original: Callable[..., object], args: tuple[object, ...]) -> Any:
        if not torch.is_grad_enabled() or derives.get():
            return original(*args)
        call = Call(self.module, original, args, {}, self.setting)
        return self.bound.run(call) if self.around is None else self.around.unit(self, call)

    def _call_on_tensordict(self, module: TensorDictModuleBase, *args: Any, **kwargs: Any) -> Any:
        """Run a TensorDictModule as the function from the tensors it reads to those it writes."""
        td = args[0] if args else kwargs.pop("tensordict", None)
        if not is_batch(td):
            written = self(named_tensors(module.in_keys, args, kwargs))
            values = tuple(written.get(key) for key in module.out_keys)
            return values[0] if len(values) == 1 else values
        destination = kwargs.pop("tensordict_out", None)
        reads = [name for key in module.in_keys for name, _ in leaves_of(key, td.get(key, None))]
        original, result = self.original, td
        assert original is not None

        def on_tensors(*tensors: Tensor) -> Any:
            nonlocal result
            inner = td.copy()
            for key, value in zip(reads, tensors, strict=True):
                inner.set(key, value)
            result = original(inner, *args[1:], **kwargs)
            values = tuple(map(result.get, writes()))
            return values[0] if len(values) == 1 else values

        def writes() -> list[NestedKey]:
            return [name for key in module.out_keys for name, _ in leaves_of(key, result.get(key, None))]

        tensors = tuple(td.get(key) for key in reads)
        if self.applied:
            attributes = self.module.__dict__
            attributes["_prev_forward"] = on_tensors
            try:
                outputs = self._call(on_tensors, tensors)
            finally:
                attributes["_prev_forward"] = original
        else:
            outputs = self._call(on_tensors, tensors)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        destination = td if destination is None else destination
        written = writes()
        # What the rule made takes the place of what the module wrote, which is no part of this backward pass.
        destination.update(result.select(*(k for k in module.out_keys if k not in written), strict=False))
        for key, value in zip(written, outputs, strict=True):
            destination.set(key, value)
        return destination
