"""In which order a model runs its layers, and which of them read and write the keys of its TensorDict.

Found by running the model once on real input; without input, registration order stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tdhook.models.entries import is_batch
from tdhook.models.holding import modules_of
from tdhook.models.sites import Performance, Site
from tdhook.models.state import as_normal, restored
from tdhook.models.turns import here
from tdhook.tape.internals import parameters_of
from tdhook.tape.overwriting import out_of_place
from tdhook.tape.undoing import Hook, Undoing, hooked

__all__ = ["Execution", "registered", "traced"]


@dataclass
class Execution:
    """What is known of how a model runs.

    Attributes:
        modules: name to module; names are dotted paths below the model.
        order: names in order of execution, once per call.
        reads: name of a layer to the keys that it is the first to read.
        writes: name of a layer to the keys that it is the last to make.
        performed: operations in order of execution, as far as that was looked at.
    """

    modules: dict[str, nn.Module]
    order: tuple[str, ...] = ()
    reads: dict[str, set[NestedKey]] = field(default_factory=dict)
    writes: dict[str, set[NestedKey]] = field(default_factory=dict)
    performed: tuple[Performance, ...] = ()

    def site(self, name: str) -> Site:
        """A module of the model as selectors see it."""
        return self._site(name, self.modules[name])

    def operation(self, operation: str, name: str, module: nn.Module, number: int = 0) -> Site:
        """An operation inside a module of that name, as selectors see it; ``number`` of that name came before it."""
        return replace(self._site(name, module), operation=operation, number=number, performed=self.performed)

    def _site(self, name: str, module: nn.Module) -> Site:
        return Site(name, module, None, self.order, self.modules, self.reads, self.writes)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module holds a weight matrix; normalisation, which scales each value alone, holds none."""
    params: list[Tensor] = [p for p in parameters_of(module).values() if p is not None]
    return any(is_lazy(p) or p.dim() > 1 for p in params)


def _keyed(root: nn.Module, wrapper: TensorDictModuleBase) -> Iterator[tuple[str, TensorDictModuleBase]]:
    """The TensorDictModules that do the work: those that hold no other, and the wrapper of a plain module."""
    if not isinstance(root, TensorDictModuleBase):
        yield "", wrapper
    for name, module in modules_of(root).items():
        if isinstance(module, TensorDictModuleBase):
            inner = list(modules_of(module).values())[1:]
            if not any(isinstance(m, TensorDictModuleBase) for m in inner):
                yield name, module


def registered(root: nn.Module, wrapper: TensorDictModuleBase) -> Execution:
    """What registration order suggests, where the model has not run yet."""
    execution = Execution(modules_of(root))
    execution.order = tuple(execution.modules)
    for name, module in _keyed(root, wrapper):
        prefix = f"{name}." if name else ""
        layers = [n for n, m in execution.modules.items() if n.startswith(prefix) and _is_layer(m)] or [name]
        execution.reads.setdefault(layers[0], set()).update(map(unravel_key, module.in_keys))
        execution.writes.setdefault(layers[-1], set()).update(map(unravel_key, module.out_keys))
    return execution


def traced(root: nn.Module, wrapper: TensorDictModuleBase, run: Callable[[], object]) -> Execution:
    """Run the model once and watch it; its buffers and the random state are put back.

    Args:
        root: the model whose dotted paths count.
        wrapper: the TensorDictModule that is run: ``root`` itself, or what makes one of it.
        run: runs ``wrapper`` on a TensorDict.
    """
    execution = Execution(modules_of(root))
    watch = _Watch(execution)
    by_name, first = {"with_kwargs": True}, {"with_kwargs": True, "prepend": True}
    hooks: list[Hook] = []
    for name, module in execution.modules.items():
        hooks.append((module.register_forward_pre_hook, here(watch.entering(name)), by_name))
        hooks.append((module.register_forward_hook, here(watch.leaving(name)), {}))
    for name, keyed in _keyed(root, wrapper):
        hooks.append((keyed.register_forward_pre_hook, here(watch.reading(name)), first))
        hooks.append((keyed.register_forward_hook, here(watch.writing(name)), {}))
    with (
        Undoing(),
        hooked(*hooks),
        restored(root),
        as_normal(execution.modules.values()),
        out_of_place(execution.modules.values()),
        torch.no_grad(),
        watch,
    ):
        run()
    execution.order = tuple(watch.order)
    watch.finish()
    return execution


class _Watch(TorchFunctionMode):
    """Labels tensors with where they come from, and passes the labels on through every operation.

    A label is ``(reader, key)`` for a value that a TensorDictModule read, ``(None, layer)`` for one that a layer made.
    """

    def __init__(self, execution: Execution) -> None:
        super().__init__()
        self.execution = execution
        self.order: list[str] = []
        self.labels: dict[int, set[tuple[str | None, object]]] = {}
        self._alive: list[Tensor] = []  # an id is only unique among living tensors
        self._open: set[tuple[str, NestedKey]] = set()
        self._inside: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        found = self._labels_of((args, kwargs))
        if found:
            self._label(result, found)
        return result

    def _labels_of(self, tree: object) -> set[tuple[str | None, Any]]:
        leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
        return set().union(*(self.labels.get(id(leaf), ()) for leaf in leaves))

    def _label(self, tree: object, labels: set[tuple[str | None, Any]]) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self.labels[id(leaf)] = set(labels)
                self._alive.append(leaf)

    def entering(self, name: str) -> Callable[..., None]:
        layer = _is_layer(self.execution.modules[name])

        def hook(module: nn.Module, args: object, kwargs: object) -> None:
            self.order.append(name)
            if not layer:
                return
            if not self._inside:
                for reader, key in self._labels_of((args, kwargs)):
                    if reader is not None:
                        self.execution.reads.setdefault(name, set()).add(key)
                        self._open.discard((reader, key))
            self._inside.append(name)

        return hook

    def leaving(self, name: str) -> Callable[..., None]:
        layer = _is_layer(self.execution.modules[name])

        def hook(module: nn.Module, args: object, output: object) -> None:
            if layer:
                self._inside.pop()
                if not self._inside and not is_batch(output):
                    self._label(output, {(None, name)})

        return hook

    def reading(self, name: str) -> Callable[..., None]:
        def hook(module: TensorDictModuleBase, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            td = args[0] if args else kwargs.get("tensordict")
            for key in map(unravel_key, module.in_keys):
                value = td.get(key, None) if is_batch(td) else None
                if isinstance(value, Tensor):
                    self._label(value, {(name, key)})
                    self._open.add((name, key))

        return hook

    def writing(self, name: str) -> Callable[..., None]:
        prefix = f"{name}." if name else ""

        def hook(module: TensorDictModuleBase, args: object, output: object) -> None:
            for key in map(unravel_key, module.out_keys):
                value = output.get(key, None) if is_batch(output) else None
                makers = [
                    layer
                    for reader, layer in self._labels_of(value)
                    if reader is None and layer.startswith(prefix)
                ]
                for maker in makers or [name]:
                    self.execution.writes.setdefault(maker, set()).add(key)

        return hook

    def finish(self) -> None:
        """Keys that reached no layer are read by the TensorDictModule as a whole."""
        for name, key in self._open:
            self.execution.reads.setdefault(name, set()).add(key)
