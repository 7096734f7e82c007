"""Trees: the tensors in what a module takes and returns, however they are packed.

PyTorch knows lists, tuples, dictionaries, and what was registered with it. A dataclass, a subclass of a container, and
an object with tensors among its attributes are containers as well. An object that is written to as modules run, such as
a cache of keys and values, is none: it has methods ``update``, ``update_conv_state`` or the like.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from io import IOBase
from itertools import repeat
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

__all__ = ["Shape", "hides_tensors", "tree_flatten", "tree_leaves", "tree_map_tensors", "tree_unflatten"]

_ATOMS = (type(None), bool, int, float, str)
# What has no tensors in it, and what is none of its container.
_LEAVES = (
    *(
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        torch.dtype,
        torch.device,
        torch.Size,
        torch.Generator,
    ),
    *(Tensor, nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType),
)


@dataclass(frozen=True)
class _Opened:
    """A container that PyTorch does not know: how many leaves it has, and how it is built of others."""

    count: int
    build: Callable[[list[object]], object]


@dataclass(frozen=True)
class _Packed:
    """A tree with such containers at some of its leaves."""

    spec: pytree.TreeSpec
    opened: Mapping[int, _Opened]


@dataclass(frozen=True)
class _Plain:
    """A tree of lists, tuples and dictionaries alone: the same with ``None`` at its leaves."""

    tree: Any


Shape: TypeAlias = "pytree.TreeSpec | _Packed | _Plain"


def tree_flatten(tree: object) -> tuple[list[object], Shape]:
    """The leaves of a tree, and what it is built of them with."""
    leaves: list[object] = []
    if _gather(tree, leaves):
        return leaves, _Plain(_filled(tree, repeat(None)))
    return _flatten(tree, frozenset())


def tree_unflatten(leaves: Iterable[object], shape: Shape) -> Any:
    """A tree of the same shape with other leaves. What holds tensors as attributes is a shallow copy."""
    if isinstance(shape, _Plain):
        return _filled(shape.tree, iter(leaves))
    if isinstance(shape, pytree.TreeSpec):
        return pytree.tree_unflatten(leaves, shape)
    remaining = iter(leaves)
    packed = []
    for i in range(shape.spec.num_leaves):
        opened = shape.opened.get(i)
        packed.append(
            next(remaining)
            if opened is None
            else opened.build([next(remaining) for _ in range(opened.count)])
        )
    return pytree.tree_unflatten(packed, shape.spec)


def tree_leaves(tree: object) -> list[object]:
    """The leaves of a tree."""
    leaves: list[object] = []
    return leaves if _gather(tree, leaves) else _flatten(tree, frozenset())[0]


def _gather(tree: Any, leaves: list[object]) -> bool:
    """Add the leaves of a plain tree to others, and say whether it is one.

    PyTorch's own walk leaves cycles of references behind, for which Python has to look through all objects there are.
    """
    kind = type(tree)
    if kind is tuple or kind is list:
        return all(_gather(value, leaves) for value in tree)
    if kind is dict:
        return all(_gather(value, leaves) for value in tree.values())
    leaves.append(tree)
    return kind in _ATOMS or isinstance(tree, Tensor)


def _filled(tree: Any, leaves: Iterator[object]) -> Any:
    """A plain tree with other leaves."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([_filled(value, leaves) for value in tree])
    if kind is dict:
        return {key: _filled(value, leaves) for key, value in tree.items()}
    return next(leaves)


def tree_map_tensors(function: Callable[[Tensor], object], tree: Any) -> Any:
    """The tree with ``function`` applied to all its tensors; what stays as it was, and its containers, are the same."""
    kind = type(tree)
    if kind in _ATOMS:
        return tree
    if isinstance(tree, Tensor):
        return function(tree)
    if kind is tuple or kind is list:
        made = [tree_map_tensors(function, value) for value in tree]
        same = all(before is after for before, after in zip(tree, made, strict=True))
        return tree if same else kind(made)
    if kind is dict:
        entries = {key: tree_map_tensors(function, value) for key, value in tree.items()}
        return tree if all(entries[key] is value for key, value in tree.items()) else entries
    leaves, shape = tree_flatten(tree)
    changed = [function(x) if isinstance(x, Tensor) else x for x in leaves]
    same = all(before is after for before, after in zip(leaves, changed, strict=True))
    return tree if same else tree_unflatten(changed, shape)


def _flatten(tree: object, around: frozenset[int]) -> tuple[list[object], Shape]:
    leaves, spec = pytree.tree_flatten(tree)
    opened: dict[int, _Opened] = {}
    found: list[object] = []
    for i, leaf in enumerate(leaves):
        below = None if isinstance(leaf, _LEAVES) else _open(leaf, around)
        if below is None:
            found.append(leaf)
        else:
            inner, opened[i] = below
            found += inner
    return found, _Packed(spec, opened) if opened else spec


def _open(value: object, around: frozenset[int]) -> tuple[list[object], _Opened] | None:
    """The leaves of a container that PyTorch does not know, if there are tensors among them."""
    if id(value) in around:
        return None
    names, contents, build = _contents(value)
    if not names or _is_state(value):
        return None
    leaves, shape = _flatten(contents, around | {id(value)})
    if not any(isinstance(x, Tensor) for x in leaves):
        return None

    def rebuilt(new: list[object]) -> object:
        if all(before is after for before, after in zip(leaves, new, strict=True)):
            return value
        return build(tree_unflatten(new, shape))

    return leaves, _Opened(len(leaves), rebuilt)


def hides_tensors(value: object) -> bool:
    """Whether a leaf gives out tensors later, that nobody sees here: an iterator, a function, a mapping of its own."""
    if isinstance(value, Tensor | IOBase):
        return False
    if hasattr(type(value), "__next__"):
        return True
    inside: list[object] = []
    if isinstance(value, Mapping):
        inside = list(value.values())
    elif isinstance(value, partial):
        inside = [value.args, value.keywords]
    elif isinstance(value, FunctionType):
        inside = [getattr(cell, "cell_contents", None) for cell in value.__closure__ or ()]
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(inside))


def _is_state(value: object) -> bool:
    if isinstance(value, dict | list | tuple | Mapping) or is_dataclass(value):
        return False
    return any(name.startswith("update") for name in dir(type(value)))


def _contents(value: object) -> tuple[Sequence[object], list[object], Callable[[list[object]], object]]:
    """Keys or names, what lies there, and how the container is built of other contents."""
    if isinstance(value, dict):
        keys, old = list(value), list(value.values())
        return keys, old, lambda new: _dictionary(value, dict(zip(keys, new, strict=True)), old, new)
    if isinstance(value, list):
        return range(len(value)), list(value), lambda new: _list(value, new)
    if isinstance(value, tuple):
        held = [*tuple.__iter__(value)]
        return range(len(held)), held, lambda new: tuple.__new__(type(value), new)
    names = list(_attributes(value))
    return names, [getattr(value, name) for name in names], lambda new: _object(value, names, new)


def _dictionary(
    value: dict[object, object],
    entries: Mapping[object, object],
    old: Sequence[object],
    new: Sequence[object],
) -> object:
    """A copy of a dictionary with other values, also where these are attributes as well."""
    made = copy.copy(value)
    for key, content in entries.items():
        dict.__setitem__(made, key, content)
    for name, held in getattr(value, "__dict__", {}).items():
        for before, after in zip(old, new, strict=True):
            if held is before:
                object.__setattr__(made, name, after)
    return made


def _list(value: list[object], contents: list[object]) -> object:
    made = copy.copy(value)
    made[:] = contents
    return made


def _object(value: object, names: Sequence[str], contents: Sequence[object]) -> object:
    made = copy.copy(value)
    for name, content in zip(names, contents, strict=True):
        object.__setattr__(made, name, content)
    return made


def _attributes(value: object) -> Iterator[str]:
    """The names of the attributes that an object holds itself."""
    if is_dataclass(value):
        yield from (field.name for field in fields(value) if hasattr(value, field.name))
        return
    yield from getattr(value, "__dict__", ())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name
