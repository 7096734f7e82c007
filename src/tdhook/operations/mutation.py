"""Operations that overwrite their argument: what the backward pass still needs is copied before it is overwritten."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tdhook.attribution.lrp_helpers.conversions import copying

__all__ = ["Guard", "Mutated", "storage_of", "was_overwritten"]


class Mutated(BaseException):
    """An operation is about to overwrite a tensor while nothing guards what the backward pass kept.

    The model is run again, guarded. Not an ``Exception``, so that the model's own handlers let it pass.
    """


class _Kept:
    """A tensor that the backward pass needs."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Guard:
    """Copies what the backward pass keeps of a tensor before the tensor is overwritten.

    The first operation that overwrites something raises :class:`Mutated`; from then on this guards.
    """

    def __init__(self) -> None:
        self.active = False
        self._kept: dict[int, weakref.WeakSet[_Kept]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"active": self.active, "_kept": {}}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Guard one forward pass, if one before it has shown the need."""
        if not self.active:
            yield
            return
        self._kept = {}
        with copying(), torch.autograd.graph.saved_tensors_hooks(self._keep, _give_back):
            yield
        self._kept = {}

    def before(self, target: Any) -> None:
        """Copy what is kept of ``target``, which is about to be overwritten."""
        if not self.active:
            self.active = True
            raise Mutated
        for kept in self._kept.pop(storage_of(target), ()):
            kept.tensor = kept.tensor.clone()

    def _keep(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor.detach())
        self._kept.setdefault(storage_of(tensor), weakref.WeakSet()).add(kept)
        return kept


def _give_back(kept: _Kept) -> Tensor:
    return kept.tensor


def was_overwritten(error: RuntimeError) -> bool:
    """Whether torch noticed that something the backward pass needs was overwritten, off the tape say."""
    return "modified" in str(error) and "inplace" in str(error)


def storage_of(tensor: Tensor) -> int:
    """What tells the memory of a tensor from that of others."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)
