"""Captured values: outputs of modules, and keys that are written on the way through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.models.entries import is_batch
from tdhook.models.turns import here
from tdhook.tape.cutting import Graph
from tdhook.tape.dependence import leaf
from tdhook.tape.functions import another, apart, turned
from tdhook.tape.undoing import Hook, hooked

__all__ = ["INPUT", "Captured", "call_name", "calls_of", "module_path"]

INPUT = ":input"
"""What stands behind the path of a module where the first tensor that it was given is meant, and not its output."""


def module_path(name: str) -> str:
    """The path of the module that a name is of: ``"layers.0"`` of ``"layers.0:input"``."""
    return name.removesuffix(INPUT)


def calls_of(path: str, modules: Mapping[str, Tensor]) -> list[str]:
    """The names of the calls of a module whose outputs were collected, in their order."""
    found: list[str] = []
    while (name := call_name(path, len(found))) in modules:
        found.append(name)
    return found


def call_name(path: str, call: int) -> str:
    """How the output of one call of a module is named: ``path`` the first, ``path:1`` the second, and so on.

    What the module was given is ``path:input``, ``path:input:1``, ...
    """
    return f"{path}:{call}" if call else path


@dataclass
class Captured:
    """What is collected in one forward pass.

    Args:
        replaced: values that take the place of those that are collected, by the same names, as leaves.
        graph: told of these, and of other leaves that are made.
        axis: ``(name, output, module) -> axis`` that is to be the first one of what is collected.
        overwrites: whether the model may overwrite what it goes on with, which then is a copy of what is collected.

    Attributes:
        modules: outputs of modules, by path and call (:func:`call_name`).
        keys: values of keys; of one that is written several times, the last.
    """

    replaced: Mapping[NestedKey, Tensor] = field(default_factory=dict)
    graph: Graph = field(default_factory=Graph)
    axis: Callable[[str, Tensor, nn.Module], int] = lambda name, output, module: 0
    overwrites: bool = False
    modules: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[NestedKey, Tensor] = field(default_factory=dict)
    _copies: dict[NestedKey, Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget what was collected: the model runs once more."""
        self.modules.clear()
        self.keys.clear()
        self._copies.clear()

    @contextmanager
    def within(
        self,
        paths: Mapping[str, nn.Module],
        runner: nn.Module,
        attribute: tuple[NestedKey, ...] | str | None,
    ) -> Iterator[None]:
        """Collect while the block runs.

        Args:
            paths: modules by path, or by path and :data:`INPUT`.
            runner: the model, whose inner TensorDictModules are watched for keys.
            attribute: which keys; ``"all"`` of them, or ``None``.
        """
        hooks: list[Hook] = [
            (m.register_forward_pre_hook, here(self._input_of(path)), {"with_kwargs": True})
            if path.endswith(INPUT)
            else (m.register_forward_hook, here(self._output_of(path)), {})
            for path, m in paths.items()
        ]
        if attribute:
            for module in runner.modules():
                if isinstance(module, TensorDictModuleBase):
                    hooks.append((module.register_forward_hook, here(self._keys_of(attribute)), {}))
        with hooked(*hooks):
            yield

    def _output_of(self, path: str) -> Callable[..., object]:
        def hook(module: nn.Module, args: object, output: object) -> object:
            place, value = _only_tensor(output)
            if value is None:
                raise TypeError(
                    f"module {path!r} ({type(module).__name__}) returned {type(output).__name__}; only modules that "
                    "return one tensor, alone or in a tuple with None, can be attributed or explained by path"
                )
            read = self._read(path, module, value)
            if place is None:
                return read
            assert isinstance(output, tuple)
            return (*output[:place], read, *output[place + 1 :])

        return hook

    def _input_of(self, path: str) -> Callable[..., tuple[tuple[object, ...], dict[str, object]]]:
        def hook(
            module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
        ) -> tuple[tuple[object, ...], dict[str, object]]:
            for i, value in enumerate(args):
                if isinstance(value, Tensor) and value.is_floating_point():
                    # What others read of it is another value on the tape.
                    return (*args[:i], self._read(path, module, another(value)), *args[i + 1 :]), kwargs
            for name, value in kwargs.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    return args, {**kwargs, name: self._read(path, module, another(value))}
            raise TypeError(
                f"module {module_path(path)!r} ({type(module).__name__}) was given no floating-point tensor, so that "
                f"{path!r} means nothing"
            )

        return hook

    def _read(self, path: str, module: nn.Module, value: Tensor) -> Tensor:
        """Take a value down; what the model goes on with, which it may overwrite."""
        name = call_name(path, len(calls_of(path, self.modules)))
        axis = self.axis(name, value, module)
        if axis == 0:
            self.modules[name] = kept = self._on_tape(value, (name,))
            return self._apart(kept)
        self.modules[name] = kept = self._on_tape(turned(value, axis, 0), (name,))
        return self._apart(turned(kept, 0, axis))

    def _apart(self, value: Tensor) -> Tensor:
        """What the model goes on with, so that a value that was taken down stays what it is."""
        return apart(value, always=self.overwrites)

    def _on_tape(self, value: Tensor, key: NestedKey) -> Tensor:
        """The value, or what takes its place; off the tape the graph begins here."""
        other = self.replaced.get(key)
        if other is None and (value.requires_grad or not value.is_floating_point()):
            return value
        begun = leaf(value if other is None else other)
        self.graph.grows_from([begun])
        return begun

    def _keys_of(self, attribute: tuple[NestedKey, ...] | str) -> Callable[..., None]:
        def hook(module: Any, args: object, output: Any) -> None:
            if not is_batch(output):
                return
            for key in map(unravel_key, module.out_keys):
                value = output.get(key, None)
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    continue
                if value is self._copies.get(key) or value is self.keys.get(key):
                    continue  # handed on by what is around the module that wrote it
                if attribute == "all" or key in attribute:
                    self.keys[key] = kept = self._on_tape(value, key)
                    read = self._apart(kept)
                    if read is not kept:
                        self._copies[key] = read
                    if read is not value:
                        output.set(key, read)

        return hook


def _only_tensor(output: object) -> tuple[int | None, Tensor | None]:
    """The tensor that a module returned, and where in a tuple it lies in which nothing else is one."""
    if isinstance(output, Tensor):
        return None, output
    if type(output) is not tuple or not output:
        return None, None
    tensors = [i for i, value in enumerate(output) if isinstance(value, Tensor)]
    others = any(not isinstance(value, Tensor) and value is not None for value in output)
    if len(tensors) != 1 or others:
        return None, None
    return tensors[0], output[tensors[0]]
