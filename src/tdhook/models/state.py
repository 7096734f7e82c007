"""What a model holds besides its parameters: where it is kept, and how it is put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from functools import partial
from typing import Any, TypeAlias

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdhook.models.holding import modules_of
from tdhook.models.snapshots import LEFT_ALONE, Snapshot
from tdhook.models.turns import Turn
from tdhook.tape.copies import copied
from tdhook.tape.internals import (
    FINDING_HOOKS,
    HOOKS_OF_ALL_MODULES,
    buffers_of,
    hook_tables_of,
    parameters_of,
)
from tdhook.tape.undoing import undone

__all__ = [
    "Memory",
    "Slot",
    "as_normal",
    "made_in_inference_mode",
    "restored",
    "slots_of",
    "swapped",
    "without_backward_hooks",
]

_LISTS = ("_flat_weights", "_flat_weight_refs")

LIBRARIES = (LEFT_ALONE - {"tdhook"}) | {"timm", "torchvision"}
"""Top-level packages whose modules do the same in each call, as far as what they remember is concerned."""

Slot: TypeAlias = "tuple[dict[str, Any], str]"
"""A dictionary that holds a parameter or a buffer, and its name there."""


def slots_of(modules: Iterable[nn.Module]) -> tuple[Slot, ...]:
    """Where the parameters and buffers of some modules are kept, so that they can be looked up and replaced.

    Other tensors that are attributes of modules, a hidden state say, count as buffers.
    """
    found: list[Slot] = []
    for module in modules:
        if isinstance(module, TensorDictParams):
            inside: list[Any] = [module]
            while inside:
                held = inside.pop()
                if isinstance(held, TensorDictParams):  # which may lie in another
                    inside.append(held._param_td)
                elif isinstance(held, LazyStackedTensorDict):
                    inside += held.tensordicts
                else:
                    entries = held._tensordict
                    inside += [value for value in entries.values() if isinstance(value, TensorDictBase)]
                    found += [(entries, name) for name, value in entries.items() if isinstance(value, Tensor)]
        else:
            for registry in (parameters_of(module), buffers_of(module)):
                found += [(registry, name) for name, value in registry.items() if value is not None]
            own = module.__dict__
            found += [(own, name) for name, value in list(own.items()) if isinstance(value, Tensor)]
    return tuple(found)


@contextmanager
def swapped(slots: Sequence[Slot], values: Sequence[Tensor]) -> Iterator[None]:
    """Put other values in the place of parameters and buffers."""
    kept = [registry[name] for registry, name in slots]

    def put(those: Sequence[Tensor]) -> None:
        for (registry, name), value in zip(slots, those, strict=True):
            registry[name] = value

    with undone(lambda: put(kept)):
        put(values)
        yield


@contextmanager
def as_normal(modules: Collection[nn.Module]) -> Iterator[None]:
    """Have modules hold normal tensors in the place of those that were made in inference mode, which no tape takes.

    What is written to the former is written to the latter afterwards. What modules hold anew they keep.
    """
    found = _inference_slots(modules)
    if not found:
        yield
        return
    originals: list[Tensor] = [registry[name] for registry, name in found]
    with torch.no_grad():
        stand_ins = [copied(value) for value in originals]
    # Recurrent layers hold their parameters in a list besides, which they make anew where these are others.
    lists = [(m.__dict__, name) for m in modules if isinstance(m, nn.RNNBase) for name in _LISTS]
    listed = [attributes.get(name) for attributes, name in lists]

    def put_back() -> None:
        for (registry, name), value, normal in zip(found, originals, stand_ins, strict=True):
            if registry.get(name) is normal:
                if not torch.equal(value, normal):
                    with torch.inference_mode():
                        value.copy_(normal)
                registry[name] = value
        for (attributes, name), held in zip(lists, listed, strict=True):
            attributes[name] = held

    with undone(put_back):
        for (registry, name), normal in zip(found, stand_ins, strict=True):
            registry[name] = normal
        yield


def made_in_inference_mode(modules: Iterable[nn.Module]) -> bool:
    """Whether modules hold tensors that were made in inference mode."""
    return bool(_inference_slots(modules))


def _inference_slots(modules: Iterable[nn.Module]) -> list[Slot]:
    """Where tensors are that were made in inference mode."""
    if torch.compiler.is_compiling():
        return []
    found: list[Slot] = []
    for module in modules:
        own = module.__dict__
        for registry in (parameters_of(module), buffers_of(module)):
            for name, value in registry.items():
                if value is not None and not is_lazy(value) and value.is_inference():
                    found.append((registry, name))
        for name, value in list(own.items()):
            if isinstance(value, Tensor) and value.is_inference():
                found.append((own, name))
    return found


def without_backward_hooks(modules: Collection[nn.Module]) -> AbstractContextManager[None] | None:
    """Have no backward hooks of modules called: what comes by is relevance, and no gradient that they are meant for.

    ``None`` says that there are none.
    """
    if any(HOOKS_OF_ALL_MODULES):
        return _without_backward_hooks(modules, of_all=True)
    for module in modules:
        own = module.__dict__
        if own.get("_backward_hooks") or own.get("_backward_pre_hooks"):
            return _without_backward_hooks(modules)
    return None


@contextmanager
def _without_backward_hooks(modules: Collection[nn.Module], *, of_all: bool = False) -> Iterator[None]:
    found: list[Slot] = []
    for module in modules:
        own = module.__dict__
        found += [(own, name) for name in ("_backward_hooks", "_backward_pre_hooks") if own.get(name)]
    theirs = [registry[name] for registry, name in found]
    empty: list[OrderedDict[int, object]] = [OrderedDict() for _ in found]
    every = [module.__dict__ for module in modules] if of_all else []
    deaf = [own for own in every if FINDING_HOOKS.keys().isdisjoint(own)]

    def put_back() -> None:
        for (registry, name), hooks, added in zip(found, theirs, empty, strict=True):
            hooks.update(added)
            registry[name] = hooks
        for own in deaf:
            for name in FINDING_HOOKS:
                own.pop(name, None)

    with undone(put_back):
        for (registry, name), none in zip(found, empty, strict=True):
            registry[name] = none
        for own in deaf:
            own.update({name: partial(copy, nothing) for name, nothing in FINDING_HOOKS.items()})
        yield


@contextmanager
def restored(
    root: nn.Module,
    *,
    always: bool = True,
    among: Iterable[nn.Module] | None = None,
    torch_alone: bool = False,
) -> Iterator[Snapshot]:
    """Put back afterwards what a model holds, and the random state, always or only where the block raised.

    No other thread that does so, or explains the model, gets hold of it meanwhile.

    Args:
        root: the model.
        always: whether also where the block did not raise.
        among: those of its modules that are known to change, if they are known.
        torch_alone: whether nobody but torch is known to draw random numbers.

    Yields:
        What is put back: :class:`~tdhook.models.snapshots.Snapshot`.
    """
    modules = tuple(modules_of(root).values() if among is None else among)
    with Turn(modules):
        snapshot = Snapshot(modules, alone=among is not None, torch_alone=torch_alone)
        put_back = True

        def restore() -> None:
            if put_back:
                snapshot.put_back()

        with undone(restore):
            yield snapshot
            put_back = always


class Memory:
    """Which modules of a model change what they hold when it runs, as far as was seen or can be told.

    In its first run all modules are looked at; then those that were seen to change, those of users' classes, which may
    do so only at times, and those of torch that count in training.

    Args:
        root: the model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        modules = modules_of(root).values()
        self._suspects = [module for module in modules if _is_of_users(module)]
        self._counting = [module for module in modules if buffers_of(module)]
        self._moving: dict[int, nn.Module] | None = None
        self._draws = False

    @property
    def changing(self) -> tuple[nn.Module, ...] | None:
        """The modules that may change; ``None`` where none was seen to run."""
        if self._moving is None:
            return None
        counting = [module for module in self._counting if module.training]
        found = (*self._moving.values(), *self._suspects, *counting)
        return tuple({id(module): module for module in found}.values())

    @property
    def is_empty(self) -> bool:
        """Whether no module may change, whether or not it is in training."""
        return self._moving == {} and not (self._draws or self._suspects or self._counting)

    @contextmanager
    def kept(self, *, always: bool) -> Iterator[Snapshot | None]:
        """:func:`restored` of what may change; ``None`` is yielded where nothing may.

        Args:
            always: whether to put it back also where the block did not raise.
        """
        among = self.changing
        if among == () and not self._draws:
            yield None
            return
        known = among is not None and not self._draws
        with restored(self._root, always=always, among=among, torch_alone=known) as snapshot:
            yield snapshot
            if among is None:
                self._moving = {id(module): module for module in snapshot.moved}
                self._draws = snapshot.drew

    def now(self) -> Snapshot:
        """What may change, as it is now."""
        return Snapshot(self.changing or modules_of(self._root).values(), alone=True)


def _is_of_users(module: nn.Module) -> bool:
    """Whether a module runs code that is not that of a known library."""
    hooks, _ = hook_tables_of(module)
    own: object = module.__dict__.get("module")
    return (
        type(module).__module__.partition(".")[0] not in LIBRARIES
        or any(hooks)
        or (isinstance(module, TensorDictModuleBase) and own is not None)
    )
