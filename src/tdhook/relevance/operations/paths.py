"""Inside which module of the model the forward pass is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["Paths"]


class Paths:
    """Follows a forward pass through the modules of a model.

    Args:
        modules: the modules by dotted path.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._names: dict[int, str] = {}
        self._open: list[tuple[str, nn.Module]] = []

    @property
    def following(self) -> bool:
        """Whether a forward pass is being followed."""
        return bool(self._names)

    @property
    def current(self) -> str:
        """Path of the innermost module that is running; ``""`` for the model itself."""
        return self._open[-1][0] if self._open else ""

    @property
    def innermost(self) -> tuple[str, nn.Module]:
        """Path and module of the innermost one that is running."""
        return self._open[-1] if self._open else ("", self._modules[""])

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow one forward pass."""
        self._names = {id(module): path for path, module in self._modules.items()}
        handles = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            yield
        finally:
            self._names.clear()
            self._open.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self._names.get(id(module))
        if path is None:  # made on the way: it belongs to the module that made it
            path = f"{self.current}.({type(module).__name__})".lstrip(".")
        self._open.append((path, module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # A module that raised and was caught leaves those above it on the stack.
        while self._open and self._open.pop()[1] is not module:
            pass
