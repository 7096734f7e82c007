"""Leaves: what a model is given to run on, its attributed inputs the leaves of a new graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.models.model import Model
from tdhook.models.state import dense_copy, leaves_of
from tdhook.tape.conditions import assumed_nonnegative
from tdhook.tape.origins import mark_nonnegative

__all__ = ["Choose", "Leaves"]

Choose: TypeAlias = "Callable[[TensorDictBase, TensorDictBase], TensorDictBase]"
"""``(inputs, td) -> inputs``: those that are attributed, or others in their place."""


class Leaves:
    """Makes the leaves of each forward pass of one model.

    Args:
        model: the model.
        in_keys: what has to be there.
        inputs: whether inputs are attributed: ``True`` for those of the model, or a choice among them.
        others: whether something else than inputs is attributed.
    """

    def __init__(
        self, model: Model, in_keys: Sequence[NestedKey], inputs: bool | Choose, others: bool
    ) -> None:
        self.model, self.in_keys = model, list(in_keys)
        self._inputs, self._others = inputs, others
        self.integers: set[NestedKey] = set()

    def __call__(
        self, td: TensorDictBase, replaced: Mapping[NestedKey, Tensor]
    ) -> tuple[TensorDictBase, dict[NestedKey, Tensor]]:
        """A shallow copy of ``td`` in which attributed inputs are leaves, and these by key.

        Args:
            td: of any batch size; left as it is.
            replaced: values of inputs that take the place of those in ``td``, of the same shapes.

        Raises:
            KeyError: an entry is missing.
            ValueError: there is nothing in ``td``, or no input can have relevance.
        """
        work = self.readable(td)
        inputs: dict[NestedKey, Tensor] = {}
        if self._inputs is False:
            return work, inputs
        nonnegative = assumed_nonnegative()
        for key, value in self._attributed(work, td):
            if not value.is_floating_point():
                self._tell_once(key, value)
                continue
            leaf = replaced.get(key, value).detach().requires_grad_()
            if key in nonnegative and key not in replaced:
                mark_nonnegative(leaf)
            inputs[key] = leaf
            work.set(key, leaf)
        if not inputs and not self._others:
            raise ValueError(
                f"none of the inputs ({', '.join(map(repr, self.model.attributed))}) is floating-point, so none can "
                "have relevance; name the module that embeds them in input_modules"
            )
        return work, inputs

    def _attributed(self, work: TensorDictBase, td: TensorDictBase) -> Iterable[tuple[NestedKey, Tensor]]:
        if callable(self._inputs):
            chosen = self._inputs(work.select(*self.model.attributed), td)
            return [(key, value) for key, value in chosen.items(True, True) if isinstance(value, Tensor)]
        found: list[tuple[NestedKey, Tensor]] = []
        for key in self.model.attributed:
            value = work.get(key)
            found += [(key, value)] if isinstance(value, Tensor) else leaves_of(key, value)
        return found

    def readable(self, td: TensorDictBase) -> TensorDictBase:
        """A shallow copy of ``td``; what the model reads is there, not empty, and off the caller's graph."""
        empty = 0 in td.batch_size
        work = td.copy() if empty else dense_copy(td)
        read, full = False, False
        for key in self.in_keys:
            found: object = work.get(key, None)
            if found is None:
                known = ", ".join(sorted(map(str, td.keys(True, True)))) or "nothing"
                raise KeyError(
                    f"key {key!r} is missing from the TensorDict, which has {known}; the explained module reads "
                    f"{self.in_keys}"
                )
            for name, value in ((key, found),) if isinstance(found, Tensor) else leaves_of(key, found):
                read, full = True, full or value.numel() != 0
                if value.is_inference() and not torch.compiler.is_compiling():
                    work.set(name, value.clone())  # else it could not be saved for the backward pass
                elif value.requires_grad:
                    work.set(name, value.detach())
        if empty or (read and not full):  # one of several entries may well have no features
            raise ValueError(
                f"there is nothing to explain: the TensorDict is empty (batch size {list(td.batch_size)})"
            )
        return work

    def _tell_once(self, key: NestedKey, value: Tensor) -> None:
        if key not in self.integers:
            self.integers.add(key)
            warnings.warn(
                f"input {key!r} is {value.dtype}, which has no gradient: it gets no relevance entry",
                stacklevel=2,
            )
