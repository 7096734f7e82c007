"""A rule on one module: the object that stands in for the module's ``forward`` while the rule is on."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.conventions import Convention
from tdhook.keys import named_tensors
from tdhook.models.turns import elsewhere
from tdhook.relevance.propagation.rule import Rule

__all__ = ["Around", "Binding"]

_ABSENT: Any = object()


class Around(Protocol):
    """What wants to know of the calls that are units."""

    def unit(self, binding: Binding, original: Any, args: Any, kwargs: Any) -> Any:
        """Make the call under its rule."""


class Binding:
    """Runs one module under one rule.

    While attached it is the module's ``forward``. Attaching nests: what was there before comes back on detaching.

    Args:
        module: the module; a ``TensorDictModule`` is seen as the function from the keys it reads to those it writes.
        rule: the rule.
        flow: the convention of the values that arrive from outside; the rule's own by default. Where the two differ
            they are converted.
        around: runs the call in its surroundings, as one unit.

    Attributes:
        closed: whether the module is a layer of torch's own.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: Rule,
        flow: Convention | None = None,
        around: Around | None = None,
    ) -> None:
        self.module = module
        self.around = None if rule.opens else around
        self.rule = rule
        self.flow = flow or rule.convention
        self._on_tensordict = isinstance(module, TensorDictModuleBase)
        self.closed = type(module).__module__.startswith("torch.nn.modules.") and not module._modules
        self.original: Any = None
        self.thread: int | None = None
        self._replaced: tuple[Any, ...] = ()

    @staticmethod
    def of(module: nn.Module) -> Binding | None:
        """The binding that ``module`` runs under, if any."""
        current = module.__dict__.get("forward")
        return current if isinstance(current, Binding) else None

    def attach(self, thread: int | None = None) -> None:
        """Take the place of the module's ``forward``, in one thread alone or in all of them."""
        self.thread = thread
        attributes = self.module.__dict__
        current = attributes.get("forward", _ABSENT)
        self.original = current.original if isinstance(current, Binding) else self.module.forward
        self._replaced = current, attributes.get("_prev_forward", _ABSENT)
        attributes["_prev_forward"] = self.original
        attributes["forward"] = self

    def detach(self) -> None:
        """Put back what :meth:`attach` replaced, if it did."""
        attributes = self.module.__dict__
        for name, value in zip(("forward", "_prev_forward"), self._replaced, strict=False):
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value
        self._replaced = ()
        self.original = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if elsewhere(self.thread):
            return (self.original or self.module.forward)(*args, **kwargs)
        if self._on_tensordict:
            return self._call_on_tensordict(cast(TensorDictModuleBase, self.module), *args, **kwargs)
        return self._call(self.original, args, kwargs)

    def _call(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        if self.around is not None:
            return self.around.unit(self, original, args, kwargs)
        return self.rule.run_in(self.flow, self.module, original, args, kwargs)

    def _call_on_tensordict(self, module: TensorDictModuleBase, *args: Any, **kwargs: Any) -> Any:
        """Run a TensorDictModule as the function from the tensors it reads to those it writes."""
        td = args[0] if args else kwargs.pop("tensordict", None)
        if not isinstance(td, TensorDictBase):
            written = self(named_tensors(module.in_keys, args, kwargs))
            values = tuple(written.get(key) for key in module.out_keys)
            return values[0] if len(values) == 1 else values
        destination = kwargs.pop("tensordict_out", None)
        reads = [key for key in module.in_keys if isinstance(td.get(key, None), Tensor)]
        original, result = self.original, td

        def on_tensors(*tensors: Tensor) -> Any:
            nonlocal result
            inner = td.copy()
            for key, value in zip(reads, tensors, strict=True):
                inner.set(key, value)
            result = original(inner, *args[1:], **kwargs)
            values = tuple(map(result.get, writes()))
            return values[0] if len(values) == 1 else values

        def writes() -> list[NestedKey]:
            return [key for key in module.out_keys if isinstance(result.get(key, None), Tensor)]

        attributes = self.module.__dict__
        attributes["_prev_forward"] = on_tensors
        try:
            outputs = self._call(on_tensors, tuple(td.get(key) for key in reads), {})
        finally:
            attributes["_prev_forward"] = original
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        destination = td if destination is None else destination
        written = writes()
        # What the rule made takes the place of what the module wrote, which is no part of this backward pass.
        destination.update(result.select(*(k for k in module.out_keys if k not in written), strict=False))
        for key, value in zip(written, outputs, strict=True):
            destination.set(key, value)
        return destination
