"""What a model holds besides its parameters: where it is kept, and how it is put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

from tdhook.models.holding import modules_of
from tdhook.models.snapshots import Snapshot
from tdhook.models.turns import Turn
from tdhook.tape.internals import buffers_of, parameters_of

__all__ = ["Slot", "restored", "slots_of", "swapped"]

Slot: TypeAlias = "tuple[dict[str, Any], str]"
"""A dictionary that holds a parameter or a buffer, and its name there."""


def slots_of(modules: Iterable[nn.Module]) -> tuple[Slot, ...]:
    """Where the parameters and buffers of some modules are kept, so that they can be looked up and replaced."""
    found: list[Slot] = []
    for module in modules:
        if isinstance(module, TensorDictParams):
            inside: list[Any] = [module._param_td]
            while inside:
                entries = inside.pop()._tensordict
                inside += [value for value in entries.values() if isinstance(value, TensorDictBase)]
                found += [(entries, name) for name, value in entries.items() if isinstance(value, Tensor)]
        else:
            for registry in (parameters_of(module), buffers_of(module)):
                found += [(registry, name) for name, value in registry.items() if value is not None]
    return tuple(found)


@contextmanager
def swapped(slots: Sequence[Slot], values: Sequence[Tensor]) -> Iterator[None]:
    """Put other values in the place of parameters and buffers."""
    kept = [registry[name] for registry, name in slots]
    try:
        for (registry, name), value in zip(slots, values, strict=True):
            registry[name] = value
        yield
    finally:
        for (registry, name), value in zip(slots, kept, strict=True):
            registry[name] = value


@contextmanager
def restored(
    root: nn.Module, *, always: bool = True, among: Iterable[nn.Module] | None = None
) -> Iterator[Snapshot]:
    """Put back afterwards what a model holds, and the random state, always or only where the block raised.

    No other thread that does so, or explains the model, gets hold of it meanwhile.

    Args:
        root: the model.
        always: whether also where the block did not raise.
        among: those of its modules that are known to change, if they are known.

    Yields:
        What is put back: :class:`~tdhook.models.snapshots.Snapshot`.
    """
    modules = tuple(modules_of(root).values() if among is None else among)
    with Turn(modules):
        snapshot = Snapshot(modules, alone=among is not None)
        put_back = True
        try:
            yield snapshot
            put_back = always
        finally:
            if put_back:
                snapshot.put_back()
