"""Entries: what is in the TensorDicts, tensorclasses and lazy stacks that models are run on.

A lazy stack is made dense once, so that an entry that is read twice is one tensor. Its ragged entries, which have
another shape in each element, are no tensors, and stay out; a lazy stack below with such entries stays one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, TypeGuard

from tensordict import (
    LazyStackedTensorDict,
    NonTensorData,
    TensorDict,
    TensorDictBase,
    is_leaf_nontensor,
    is_non_tensor,
    is_tensorclass,
)
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.keys import names_of, parts_of, under

__all__ = [
    "Entry",
    "changed",
    "dense_copy",
    "entries_of",
    "frames_of",
    "is_batch",
    "is_flat",
    "is_ragged",
    "leaves_of",
    "objects_of",
    "plain",
    "require_fields",
]

Entry: TypeAlias = "object | tuple[object, ...]"
"""A tensor or another object that is no TensorDict; or those of each element of a lazy stack."""


def is_batch(value: object) -> TypeGuard[TensorDictBase]:
    """Whether a value has entries: a TensorDict, a lazy stack, a tensorclass."""
    if isinstance(value, Tensor):
        return False
    if isinstance(value, TensorDict):
        return True
    return (isinstance(value, TensorDictBase) or is_tensorclass(value)) and not is_non_tensor(value)


def _is_stack(value: object) -> TypeGuard[LazyStackedTensorDict]:
    """Whether a value is a lazy stack of TensorDicts; one of texts is another thing."""
    if type(value) is TensorDict or isinstance(value, Tensor):
        return False
    return isinstance(value, LazyStackedTensorDict) and not is_non_tensor(value)


def entries_of(td: TensorDictBase) -> Iterator[tuple[NestedKey, Entry]]:
    """The entries of a TensorDict by key, with those below it and those that are no tensors."""
    try:
        yield from list(td.items() if is_flat(td) else td.items(True, True, is_leaf=is_leaf_nontensor))
    except RuntimeError:  # a ragged entry, which cannot be stacked
        for key in list(td.keys()):
            if is_ragged(td, key):
                yield key, tuple(element.get(key) for element in _elements(td))
            elif is_batch(value := td.get(key)):
                yield from ((under(key, name), entry) for name, entry in entries_of(value))
            else:
                yield key, value


def objects_of(td: TensorDictBase) -> dict[NestedKey, Entry]:
    """The entries of a TensorDict by key, as the objects that they are: those of a lazy stack are those it stacks."""
    found: dict[NestedKey, Entry] = {}
    # A TensorDict holds the objects themselves, and what is asked of it goes a longer way.
    whole = td.items() if type(td) is TensorDict else td.items(True, True, is_leaf=_is_whole)
    for key, value in whole:
        if isinstance(value, Tensor):
            found[key] = value
        elif _is_stack(value):
            each = [objects_of(element) for element in _elements(value)]
            for name in set(each[0]).intersection(*each[1:]):
                found[under(key, name)] = tuple(one[name] for one in each)
        elif is_batch(value):
            for name, entry in objects_of(value).items():
                found[under(key, name)] = entry
        else:
            found[key] = value
    return found


def is_flat(td: TensorDictBase) -> bool:
    """Whether a TensorDict has nothing but tensors."""
    if type(td) is not TensorDict:
        return False
    for value in td.values():  # noqa: SIM110 (a generator takes longer than the rest)
        if not isinstance(value, Tensor):
            return False
    return True


def _is_whole(kind: type) -> bool:
    return is_leaf_nontensor(kind) or issubclass(kind, LazyStackedTensorDict)


def changed(before: Mapping[NestedKey, Entry], after: Mapping[NestedKey, Entry]) -> list[NestedKey]:
    """The keys of objects that are others than before."""
    return [key for key, now in after.items() if now is not (was := before.get(key)) and not _same(was, now)]


def _same(a: Entry, b: Entry) -> bool:
    if a is b or isinstance(b, Tensor):
        return a is b
    if isinstance(a, NonTensorData) and isinstance(b, NonTensorData):
        return a.data is b.data
    return isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and all(map(_same, a, b))


def plain(td: TensorDictBase) -> TensorDictBase:
    """The same entries in a TensorDict, if they are those of a tensorclass."""
    if type(td) is TensorDict or isinstance(td, TensorDictBase):
        return td
    found = TensorDict({}, td.batch_size, names=names_of(td), device=td.device)
    for key, value in td.items():
        if value is not None:
            found.set(key, value)
    return found


def require_fields(td: TensorDictBase, keys: Iterable[NestedKey]) -> None:
    """See that a tensorclass has the fields that are written to.

    Raises:
        ValueError: it lacks one.
    """
    if type(td) is TensorDict or isinstance(td, TensorDictBase):
        return
    known = set(type(td).__expected_keys__)
    for key in keys:
        name, *below = parts_of(key)
        if name not in known:
            kind = "TensorDict" if below else "Tensor"
            raise ValueError(
                f"{type(td).__name__} has no field {name!r}, where {key!r} is written; declare `{name}: {kind} | "
                "None = None`, or explain its TensorDict, to_tensordict()"
            )


def dense_copy(td: TensorDictBase) -> TensorDictBase:
    """A copy with the same tensors, in which lazy stacks are stacked."""
    if is_flat(td):
        return td.copy()
    if _is_stack(td):
        return _stacked(td)
    if not isinstance(td, TensorDictBase):
        return td.copy()
    # A file is read, since a copy of it would write to it.
    copy = td.copy() if isinstance(td, TensorDict) else td.to_tensordict()
    _stack_below(copy)
    return copy


def _stack_below(td: TensorDictBase) -> None:
    for key, value in list(td.items()):
        if isinstance(value, Tensor):
            continue
        if _is_stack(value):
            if not _is_uneven(value):
                td.set(key, _stacked(value))
        elif isinstance(value, TensorDict):
            _stack_below(value)


def _stacked(td: LazyStackedTensorDict) -> TensorDict:
    dense = TensorDict({}, td.batch_size, names=names_of(td), device=td.device)
    for key in list(td.keys()):
        if is_ragged(td, key):
            continue
        value = td.get(key)
        whole = _is_stack(value) and not _is_uneven(value)
        dense.set(key, _stacked(value) if whole else value)
    return dense


def _elements(td: TensorDictBase) -> list[TensorDictBase]:
    return td.tensordicts if isinstance(td, LazyStackedTensorDict) else []


def is_ragged(td: TensorDictBase, key: NestedKey) -> bool:
    """Whether an entry has other shapes in other elements of a lazy stack."""
    *above, last = parts_of(key)
    around = td.get(tuple(above)) if above else td
    if not _is_stack(around):
        return False
    found = [element.get(last, None) for element in _elements(around)]
    if any(map(is_batch, found)):
        return False
    return len({x.shape if isinstance(x, Tensor) else None for x in found}) > 1


def _is_uneven(td: LazyStackedTensorDict) -> bool:
    """Whether elements of a lazy stack have entries that others have not, or of another shape."""
    elements = _elements(td)
    if len({frozenset(element.keys()) for element in elements}) > 1:
        return True
    keys = list(td.keys())
    if any(is_ragged(td, key) for key in keys):
        return True
    below = map(td.get, keys)
    return any(_is_uneven(value) for value in below if _is_stack(value))


def frames_of(td: TensorDictBase, within: TensorDictBase) -> Iterator[tuple[NestedKey, TensorDict]]:
    """The TensorDicts below one that another does not have yet, and would not make: of other axes, or without entries.

    Args:
        td: whose TensorDicts are looked at.
        within: where its entries are to be written.
    """
    for key, value in td.items():
        if isinstance(value, Tensor) or not isinstance(value, TensorDictBase) or is_non_tensor(value):
            continue
        if within.get(key, None) is None and (value.batch_size != td.batch_size or value.is_empty()):
            yield key, TensorDict({}, value.batch_size, names=names_of(value), device=value.device)
        inside = within.get(key, None)
        for name, frame in frames_of(value, TensorDict() if inside is None else inside):
            yield under(key, name), frame


def leaves_of(key: NestedKey, value: object) -> Iterable[tuple[NestedKey, Tensor]]:
    """The tensors of an entry: itself, or those below it where it has entries of its own."""
    if isinstance(value, Tensor):
        return ((key, value),)
    if not is_batch(value):
        return ()
    return [(under(key, name), leaf) for name, leaf in entries_of(value) if isinstance(leaf, Tensor)]
