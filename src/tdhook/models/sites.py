"""Where a module or an operation stands in a model: what selectors look at."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from tensordict.utils import NestedKey
from torch import nn

__all__ = ["Performance", "Site"]

Performance: TypeAlias = tuple[str, str, int]
"""One operation that a model performs: its name, the path of the module around it, and how many of that name were
performed there before."""


@dataclass(frozen=True)
class Site:
    """One module in a model, or one operation inside it, as selectors see it.

    Attributes:
        name: dotted path of the module, ``""`` for the model itself.
        module: the module.
        operation: name of the operation, if it is one inside the module that is meant.
        order: all sites' names in execution order; ``None`` where the model is not at hand.
        modules: name to module, of the whole model.
        keys_read: module name to the TensorDict keys that it is the first layer to read, of the whole model.
        keys_written: likewise the keys that it is the last layer to make.
        number: how many operations of that name were performed in the module before this one.
        performed: all operations in execution order; ``None`` where the model is not at hand.
    """

    name: str
    module: nn.Module
    operation: str | None = None
    order: tuple[str, ...] | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    keys_read: Mapping[str, Set[NestedKey]] = field(default_factory=dict, repr=False)
    keys_written: Mapping[str, Set[NestedKey]] = field(default_factory=dict, repr=False)
    number: int = 0
    performed: tuple[Performance, ...] | None = field(default=None, repr=False)

    def around(self) -> Site:
        """The site of the module around an operation."""
        return replace(self, operation=None)

    def elsewhere(self, name: str) -> Site:
        """The site of another module of the same model."""
        return replace(self, name=name, module=self.modules[name])

    @property
    def performance(self) -> Performance:
        """The operation."""
        assert self.operation is not None
        return self.operation, self.name, self.number

    def another(self, performance: Performance) -> Site:
        """The site of another operation of the same model."""
        operation, name, number = performance
        # Modules that are made on the way are at no path of the model.
        module = self.modules.get(name, self.module)
        return replace(self, name=name, module=module, operation=operation, number=number)
