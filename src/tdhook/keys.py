"""Keys of TensorDicts: their parts, how they are joined, and what to say where one is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key

__all__ = ["known_keys", "named_tensors", "next_key", "parts_of", "under"]


def parts_of(key: NestedKey | None) -> tuple[str, ...]:
    """A key as a tuple of strings; ``None`` is the empty one."""
    if key is None:
        return ()
    return (key,) if isinstance(key, str) else tuple(key)


def under(*keys: NestedKey | None) -> NestedKey:
    """Keys joined, the first outermost: ``under("attr", ("a", "b")) == ("attr", "a", "b")``."""
    return unravel_key(tuple(part for key in keys for part in parts_of(key)))


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
