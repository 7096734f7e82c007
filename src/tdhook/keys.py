"""Keys of TensorDicts: their parts, how they are joined, and what to say where one is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.utils import NestedKey, unravel_key
from torch import Size, Tensor

__all__ = [
    "AGAINST",
    "ASIDE",
    "ASKED",
    "GIVEN",
    "entry_at",
    "is_below",
    "known_keys",
    "named_tensors",
    "names_of",
    "next_key",
    "parts_of",
    "put",
    "under",
]


ASKED, GIVEN, AGAINST = "_asked", "_reference", "_against"
"""What a target has chosen, references, and one of several references: entries that are put aside beside a batch."""
ASIDE = frozenset((ASKED, GIVEN, AGAINST))
"""All of these: they are no business of a model."""


def parts_of(key: NestedKey | None) -> tuple[str, ...]:
    """A key as a tuple of strings; ``None`` is the empty one."""
    if key is None:
        return ()
    return (key,) if isinstance(key, str) else tuple(key)


def under(*keys: NestedKey | None) -> NestedKey:
    """Keys joined, the first outermost: ``under("attr", ("a", "b")) == ("attr", "a", "b")``."""
    return unravel_key(tuple(part for key in keys for part in parts_of(key)))


def is_below(key: NestedKey, other: NestedKey) -> bool:
    """Whether a key names an entry below another one, or that one itself."""
    return parts_of(key)[: len(parts_of(other))] == parts_of(other)


def names_of(td: TensorDictBase) -> list[str | None] | None:
    """The names of the axes of a batch, if there are any."""
    names: list[str | None] = td.names
    return names if any(name is not None for name in names) else None


def put(td: TensorDictBase, key: NestedKey, value: object, of: NestedKey | None = None) -> None:
    """Write an entry. TensorDicts on the way to it that are not there yet have the axes of those on the way to another.

    Args:
        td: of batch size ``[*batch]``.
        key: where it is written, ``("attr", "agents", "observation")`` say.
        value: a tensor ``[*batch, ...]``, or any other value.
        of: the entry that it tells of, ``("agents", "observation")``: where ``td["agents"]`` is ``[*batch, agents]``,
            so is ``td["attr", "agents"]``; and ``[*batch, outputs, agents]`` where ``value`` has one more axis than
            that entry, behind those of the batch.
    """
    parts = parts_of(key)
    above = parts_of(of)
    if type(td) is TensorDict and len(parts) == 2 and len(above) < 2 and parts[0] not in td:
        td.set(parts, value)
        return
    around, depth = td, 0
    while depth < len(parts) - 1:
        child = around.get(parts[depth], None)
        if not is_tensor_collection(child):
            break
        if isinstance(value, Tensor) and value.shape[: child.batch_dims] != child.batch_size:
            child.batch_size = around.batch_size  # an earlier value had other axes there
        around, depth = child, depth + 1
    found = value
    for level in range(len(parts) - 2, depth - 1, -1):
        size, names = _axes(td, above, len(parts) - 1 - level, value)
        found = TensorDict({parts[level + 1]: found}, size, names=names, device=td.device)
    around.set(parts[depth], found)


def _axes(
    td: TensorDictBase, of: tuple[str, ...], below: int, value: object
) -> tuple[Size, list[str | None] | None]:
    """The axes of a TensorDict so many parts above a value, which tells of an entry of ``td``."""
    like: Any = entry_at(td, of[:-below]) if len(of) > below else None
    if not isinstance(value, Tensor) or not is_tensor_collection(like):
        return td.batch_size, names_of(td)
    lead, size, names = td.batch_dims, list(like.batch_size), names_of(like)
    entry = entry_at(td, of)
    if isinstance(entry, Tensor) and value.dim() > entry.dim():  # [*batch, outputs, ...]
        size.insert(lead, value.shape[lead])
        names = names and [*names[:lead], None, *names[lead:]]
    fits = list(value.shape[: len(size)]) == size
    return (Size(size), names) if fits else (td.batch_size, names_of(td))


def entry_at(td: TensorDictBase, key: tuple[str, ...]) -> object:
    """An entry, or ``None``; also where there are tensors on the way to it."""
    found: Any = td
    for part in key:
        found = found.get(part, None) if is_tensor_collection(found) else None
    return found


def next_key(key: NestedKey) -> NestedKey:
    """Where an environment or a policy writes what ``key`` is at the next step."""
    return under("next", key)


def known_keys(*tds: TensorDictBase | Iterable[NestedKey]) -> str:
    """The keys of TensorDicts (or of lists of keys) in a line, for a message: sorted, each once."""
    found: set[NestedKey] = set()
    for td in tds:
        found |= set(td.keys(True, True) if isinstance(td, TensorDictBase) else td)
    return ", ".join(sorted(map(repr, found))) or "nothing"


def named_tensors(
    in_keys: Sequence[NestedKey], args: Sequence[object], kwargs: Mapping[str, object]
) -> TensorDict:
    """The TensorDict that a TensorDictModule is meant to run on where it is called with tensors.

    Tensors come in the order of the keys, or by name, in which the parts of a nested key are joined by an underscore.

    Raises:
        TypeError: a name is that of no key.
    """
    td = TensorDict()
    names = {key if isinstance(key, str) else "_".join(key): key for key in in_keys}
    for key, value in zip(in_keys, args, strict=False):
        td.set(key, value)
    for name, value in kwargs.items():
        if name not in names:
            raise TypeError(f"{name!r} names none of the keys that the module reads: {', '.join(names)}")
        td.set(names[name], value)
    return td
