"""Leaves: what a model is given to run on, its attributed inputs the leaves of a new graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.keys import is_below
from tdhook.models.entries import dense_copy, is_ragged, leaves_of
from tdhook.models.model import Model
from tdhook.models.reads import keys_that_nobody_tells
from tdhook.tape.casts import Casts, as_numbers
from tdhook.tape.conditions import assumed_nonnegative
from tdhook.tape.copies import copied
from tdhook.tape.dependence import leaf as leaf_of
from tdhook.tape.origins import mark_nonnegative
from tdhook.tape.sparse import SPARSE

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
        named: keys that are named to be attributed.
        alone: the inputs that are named, where nothing else is attributed.
    """

    def __init__(
        self,
        model: Model,
        in_keys: Sequence[NestedKey],
        inputs: bool | Choose,
        others: bool,
        named: Collection[NestedKey] = (),
        alone: Collection[NestedKey] | None = None,
    ) -> None:
        self.model, self.in_keys = model, list(in_keys)
        self._inputs, self._others, self._named = inputs, others, frozenset(named)
        self._alone = alone
        self.integers: set[NestedKey] = set()

    def __call__(
        self, td: TensorDictBase, replaced: Mapping[NestedKey, Tensor]
    ) -> tuple[TensorDictBase, dict[NestedKey, Tensor], dict[NestedKey, Tensor]]:
        """A shallow copy of ``td`` in which attributed inputs are leaves; these by key; and integers by key.

        Integers stay what they are, and their leaves hold their values: where the model makes numbers of them, it has
        to be given those (:class:`~tdhook.tape.casts.Casts`). Integers are ``uint8``, as images are; others if they
        are named to be attributed, or if there is nothing else.

        Args:
            td: of any batch size; left as it is.
            replaced: values of inputs that take the place of those in ``td``, of the same shapes.

        Raises:
            ValueError: there is nothing in ``td``, or no input can have relevance.
        """
        work = self.readable(td)
        inputs: dict[NestedKey, Tensor] = {}
        if self._inputs is False:
            return work, inputs, {}
        nonnegative = assumed_nonnegative()
        found = self._attributed(work, td)
        integers = {} if all(value.is_floating_point() for _, value in found) else self._numbers(found)
        for key, value in found:
            if key in integers:
                inputs[key] = leaf_of(replaced[key]) if key in replaced else as_numbers(value)
                continue
            if not value.is_floating_point() or value.layout in SPARSE:
                self._tell_once(key, value)
                continue
            leaf = leaf_of(replaced.get(key, value))
            if key in nonnegative and key not in replaced:
                mark_nonnegative(leaf)
            inputs[key] = leaf
            work.set(key, leaf)
        if not inputs:
            self._require(inputs)
        return work, inputs, integers

    def _numbers(self, found: Sequence[tuple[NestedKey, Tensor]]) -> dict[NestedKey, Tensor]:
        """Those of the inputs that are integers, and get relevance as numbers."""
        kinds = {key: value.dtype for key, value in found if not value.is_floating_point()}
        only = len(kinds) == len(found) and torch.uint8 not in kinds.values() and not self._others
        chosen = {key for key, kind in kinds.items() if only or kind is torch.uint8 or key in self._named}
        return {key: value for key, value in found if key in chosen and not value.is_complex()}

    @contextmanager
    def made(
        self, inputs: dict[NestedKey, Tensor], integers: Mapping[NestedKey, Tensor], *, exact: bool
    ) -> Iterator[None]:
        """Follow what a model makes of integers, while the block runs.

        Args:
            inputs: all inputs; those are taken out that the model made no numbers of, since they are indices.
            integers: those that are integers.
            exact: whether the inputs hold the values of the integers.

        Raises:
            ValueError: none are left; or some are, where nothing but integers is there and nobody named them.
        """
        everywhere = [key for key, x in integers.items() if x.dtype is not torch.uint8 or key in self._named]
        casts = Casts(integers, inputs, everywhere=everywhere, exact=exact)
        try:
            with casts:
                yield
        except Exception as error:
            try:
                self._drop_indices(inputs, integers, casts.reached)
            except ValueError as said:
                raise said from error
            raise
        self._drop_indices(inputs, integers, casts.reached)

    def _drop_indices(
        self,
        inputs: dict[NestedKey, Tensor],
        integers: Mapping[NestedKey, Tensor],
        reached: Collection[NestedKey],
    ) -> None:
        numbers = [key for key in integers if key in reached]
        for key in integers:
            if key not in reached:
                self._tell_once(key, integers[key])
                del inputs[key]
        unasked = not any(key in self._named or integers[key].dtype is torch.uint8 for key in numbers)
        if len(numbers) < len(integers):
            alone = unasked and len(inputs) == len(numbers)
            self._require({} if alone else inputs, numbers if alone else ())

    def _require(self, inputs: Mapping[NestedKey, Tensor], numbers: Sequence[NestedKey] = ()) -> None:
        wanted = [
            key for key in inputs if self._alone is None or any(is_below(key, one) for one in self._alone)
        ]
        if not wanted and (self._alone is not None or not self._others):
            named = self.model.attributed if self._alone is None else self._alone
            raise ValueError(
                f"none of the inputs ({', '.join(map(repr, named))}) is floating-point, so none can "
                "have relevance; name the module that embeds them in input_modules, or give the numbers that are made "
                "of them"
                + (
                    f"; name those that are numbers, and no indices or masks: attribute={list(numbers)}"
                    if numbers
                    else ""
                )
            )

    def _attributed(self, work: TensorDictBase, td: TensorDictBase) -> list[tuple[NestedKey, Tensor]]:
        if callable(self._inputs):
            chosen = self._inputs(work.select(*self.model.attributed), td)
            return [(key, value) for key, value in chosen.items(True, True) if isinstance(value, Tensor)]
        found: list[tuple[NestedKey, Tensor]] = []
        for key in self.model.attributed:
            leaves, made = leaves_of(key, work.get(key, None)), self.model.made.get(key)
            found += [leaf for leaf in leaves if leaf[0] not in made] if made else leaves
        return found

    def readable(self, td: TensorDictBase) -> TensorDictBase:
        """A shallow copy of ``td``; what the model reads of it is not empty, and off the caller's graph."""
        empty = 0 in td.batch_size
        work = td.copy() if empty else dense_copy(td)
        read, full = False, False
        for key in self.in_keys:
            for name, value in leaves_of(key, work.get(key, None)):
                read, full = True, full or value.numel() != 0
                if value.is_inference() and not torch.compiler.is_compiling():
                    work.set(name, copied(value))  # else it could not be saved for the backward pass
                elif value.requires_grad:
                    work.set(name, value.detach())
        if empty or (read and not full):  # one of several entries may well have no features
            raise ValueError(
                f"there is nothing to explain: the TensorDict is empty (batch size {list(td.batch_size)})"
            )
        return work

    def missing(self, td: TensorDictBase) -> str | None:
        """What to say of entries that are not there, if the model cannot do without; ``None`` if all are."""
        absent = [key for key in self.in_keys if key not in td.keys(True)]
        ragged = [key for key in self.in_keys if key not in absent and is_ragged(td, key)]
        if ragged:
            return (
                f"entry {ragged[0]!r} has other shapes in other elements of the lazy stack, so that it is no tensor "
                "that a model could read; explain the elements one by one, or pad them"
            )
        if not absent:
            return None
        known = ", ".join(sorted(map(str, td.keys(True, True)))) or "nothing"
        names, verb = ", ".join(map(repr, absent)), "key {} is" if len(absent) == 1 else "keys {} are"
        return (
            f"{verb.format(names)} missing from the TensorDict, which has {known}; the explained module reads "
            f"{self.in_keys}{keys_that_nobody_tells(self.model.root)}"
        )

    def _tell_once(self, key: NestedKey, value: Tensor) -> None:
        if key not in self.integers:
            self.integers.add(key)
            why = "sparse" if value.layout in SPARSE else f"{value.dtype}, which has no gradient"
            warnings.warn(f"input {key!r} is {why}: it gets no relevance entry", stacklevel=2)
