"""Casts: integers have no gradient, and the numbers that a model makes of them have.

Beside an integer tensor its values are kept as floating-point numbers on the tape. What moves the integers moves these
too; where the model makes floating-point numbers of the integers, by a cast or by a division, it gets those on the tape
in their place. An index into a table stays an integer, and has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tdhook.tape.conditions import holds
from tdhook.tape.dependence import leaf
from tdhook.tape.internals import version_of

__all__ = ["Casts", "as_numbers"]

K = TypeVar("K", bound=Hashable)
_CONVERSIONS = ("byte", "char", "short", "int", "long", "bool", "to", "type", "type_as")
_PRODUCTS = ("mul", "multiply", "__mul__", "__rmul__", "mul_", "multiply_", "__imul__")
# What draws random numbers, or reads none of what it is given, is not run again.
_NOT_AGAIN = ("rand", "bernoulli", "dropout", "multinomial", "poisson", "empty", "new_", "_like")


def as_numbers(x: Tensor) -> Tensor:
    """The values of an integer tensor as floating-point numbers that hold them exactly, a leaf of the tape."""
    kind = torch.get_default_dtype() if torch.get_default_dtype().itemsize > 2 else torch.float32
    found = x.detach().to(kind)
    if x.dtype.itemsize > 2 and kind is torch.float32 and not torch.compiler.is_compiling():
        exact = bool((found.to(torch.float64) == x.to(torch.float64)).all())
        found = found if exact else x.detach().to(torch.float64)
    return leaf(found)


@dataclass
class _Followed(Generic[K]):
    """An integer tensor, its values on the tape, and whose they are."""

    integers: Tensor
    numbers: Tensor
    keys: frozenset[K]
    version: int


class Casts(TorchFunctionMode, Generic[K]):
    """Puts the numbers that are made of integer tensors on the tape, while the block runs.

    Args:
        integers: the tensors, by key.
        numbers: their values, leaves of the tape, by key.
        everywhere: the keys of those that count in products, too. Others that are multiplied, uncast, with a value on
            the tape are a mask of that value.
        exact: whether these are the values of the integers, and not others in their place.

    Attributes:
        reached: the keys of those of which numbers were made.
    """

    def __init__(
        self,
        integers: Mapping[K, Tensor],
        numbers: Mapping[K, Tensor],
        *,
        everywhere: Collection[K] = (),
        exact: bool = True,
    ) -> None:
        super().__init__()
        self._everywhere, self._exact = frozenset(everywhere), exact
        self._followed: dict[int, _Followed[K]] = {}
        self.reached: set[K] = set()
        for key, x in integers.items():
            self._follow(x, numbers[key], frozenset((key,)))

    def _follow(self, integers: Tensor, numbers: Tensor, keys: frozenset[K]) -> None:
        # What is kept here stays alive, so that nothing else comes to have its id.
        self._followed[id(integers)] = _Followed(integers, numbers, keys, version_of(integers))

    def _find(self, x: object) -> _Followed[K] | None:
        found = self._followed.get(id(x)) if isinstance(x, Tensor) else None
        return found if found is not None and found.version == version_of(found.integers) else None

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        found = [one for one in map(self._find, given) if one is not None]
        name = getattr(func, "__name__", "")
        if not found or (name in _PRODUCTS and self._mask(found, given)):
            return func(*args, **kwargs)
        first = args[0] if args else None
        if _overwrites(name, kwargs):
            if isinstance(first, Tensor) and first.is_floating_point() and "out" not in kwargs:
                self._reach(found)
                args, kwargs = self._with_numbers(args, kwargs, first.dtype)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        leaves, shape = tree_flatten(result)
        if not any(isinstance(x, Tensor) for x in leaves) or any(word in name for word in _NOT_AGAIN):
            return result
        kinds = [x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
        if name in _CONVERSIONS and not kinds:
            numbers: list[object] = [found[0].numbers]
        else:
            try:
                there, moved = self._with_numbers(args, kwargs, kinds[0] if kinds else None)
                numbers = tree_leaves(func(*there, **moved))
            except Exception:  # an index, or what only integers can do
                return result
        keys = frozenset().union(*(one.keys for one in found))
        return tree_unflatten(list(self._on_tape(leaves, numbers, keys)), shape)

    def _on_tape(self, leaves: list[object], numbers: list[object], keys: frozenset[K]) -> Iterator[object]:
        """What takes the place of results of a function of integers: the same values, on the tape if they can be."""
        if len(numbers) != len(leaves):
            yield from leaves
            return
        for x, number in zip(leaves, numbers, strict=True):
            if not isinstance(x, Tensor) or not isinstance(number, Tensor) or not self._is_same(x, number):
                yield x
            elif x.is_floating_point():
                self.reached |= keys
                yield number
            else:
                self._follow(x, number, keys)
                yield x

    def _mask(self, found: Sequence[_Followed[K]], factors: Sequence[object]) -> bool:
        """Whether integers mask a value on the tape, their other factor."""
        if any(not one.keys.isdisjoint(self._everywhere) for one in found):
            return False
        values = (x for x in factors if isinstance(x, Tensor) and not isinstance(x, Parameter))
        return any(x.requires_grad for x in values)

    def _with_numbers(
        self, args: tuple[object, ...], kwargs: dict[str, object], dtype: torch.dtype | None
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Arguments with numbers in the place of integers, in the precision of the result."""

        def numbers(x: object) -> object:
            found = self._find(x)
            if found is None:
                return x
            return found.numbers if dtype is None else found.numbers.to(dtype)

        return tree_map(numbers, (args, kwargs))  # type: ignore[no-any-return]

    def _reach(self, found: list[_Followed[K]]) -> None:
        for one in found:
            self.reached |= one.keys

    def _is_same(self, x: Tensor, number: Tensor) -> bool:
        """Whether numbers on the tape are the values of a result."""
        if x.shape != number.shape:
            return False
        if torch.is_grad_enabled() and not number.requires_grad:  # else there is no tape to be on
            return False
        if x.is_floating_point() and x.dtype != number.dtype:
            return False
        return not self._exact or holds(number.detach().to(x.dtype) == x)


def _overwrites(name: str, kwargs: Mapping[str, object]) -> bool:
    """Whether a function writes into what it is given."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "set_data") or name.startswith("__i") or "out" in kwargs
