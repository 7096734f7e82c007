"""What a model holds besides its parameters: all of its modules, and the state that a run changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from tensordict import LazyStackedTensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.models.snapshots import Snapshot
from tdhook.models.turns import Turn
from tdhook.tape.internals import buffers_of, children_of, parameters_of
from tdhook.tape.undoing import Change, undone

__all__ = ["Slot", "dense_copy", "frozen", "leaves_of", "modules_of", "restored", "slots_of", "swapped"]

Slot: TypeAlias = "tuple[dict[str, Any], str]"
"""A dictionary that holds a parameter or a buffer, and its name there."""


def modules_of(root: nn.Module) -> dict[str, nn.Module]:
    """All modules of a model by dotted path, those included that it holds without registering them.

    torchrl's multi-agent networks run such a module, with parameters that are kept elsewhere.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(prefix: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[prefix] = module
        # A copy: another thread may put something on the module meanwhile.
        hidden = [(name, m) for name, m in list(vars(module).items()) if isinstance(m, nn.Module)]
        for name, child in [*children_of(module).items(), *hidden]:
            if child is not None:
                visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", root)
    return found


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

    def put(those: Sequence[Tensor]) -> None:
        for (registry, name), value in zip(slots, those, strict=True):
            registry[name] = value

    with undone(lambda: put(kept)):
        put(values)
        yield


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

        def restore() -> None:
            if put_back:
                snapshot.put_back()

        with undone(restore):
            yield snapshot
            put_back = always


class frozen:
    """Takes the parameters of modules off the tape, so that only what depends on the inputs is on it."""

    __slots__ = ("_change", "_modules", "_thawed")

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = modules
        self._thawed: list[Tensor] = []

    def __enter__(self) -> None:
        self._change = Change(self._thaw)
        for module in self._modules:
            own = module._parameters
            if not own:
                continue
            values = module.parameters() if isinstance(module, TensorDictParams) else own.values()
            for parameter in values:
                if parameter is not None and parameter.requires_grad and parameter.is_leaf:
                    if parameter.is_inference():
                        continue  # inference tensors are on no tape, whatever they say
                    self._thawed.append(parameter)
                    parameter.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        self._change.undo()

    def _thaw(self) -> None:
        for parameter in self._thawed:
            parameter.requires_grad_(True)


def dense_copy(td: TensorDictBase) -> TensorDictBase:
    """A copy with the same tensors; a lazy stack is stacked once, so that reading an entry twice gives one tensor."""
    return td.contiguous() if isinstance(td, LazyStackedTensorDict) else td.copy()


def leaves_of(key: NestedKey, value: object) -> Iterable[tuple[NestedKey, Tensor]]:
    """The tensors of an entry: itself, or those below it where it is a TensorDict."""
    if isinstance(value, Tensor):
        return ((key, value),)
    if not isinstance(value, TensorDictBase):
        return ()
    prefix = (key,) if isinstance(key, str) else key
    below = value.items(True, True)
    return [
        ((*prefix, *((name,) if isinstance(name, str) else name)), leaf)
        for name, leaf in below
        if isinstance(leaf, Tensor)
    ]
