"""Performed operations: outputs of the torch functions that a model calls, where some of them are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tdhook.models.paths import Paths
from tdhook.models.sites import Performance, Site
from tdhook.passes.within import Within
from tdhook.selectors.names import name_of, queries
from tdhook.tape.cutting import Graph
from tdhook.tape.dependence import Dependence, leaf
from tdhook.tape.entering import entered
from tdhook.tape.functions import apart
from tdhook.tape.internals import function_modes, push_mode, set_function_modes
from tdhook.tape.modes import Watching, answered
from tdhook.targets.through import OfOperations

__all__ = ["Performed"]

_MADE_OF_OTHERS = frozenset([F.multi_head_attention_forward])


@dataclass(frozen=True)
class Output:
    """What an operation gave.

    Attributes:
        site: where it stands in the model.
        value: its output.
        performance: which operation it is, whether or not those before it depend on what is attributed.
    """

    site: Site
    value: Tensor
    performance: Performance


@dataclass
class Performed:
    """The operations of one forward pass that selectors mean.

    Args:
        selectors: what is asked for.
        modules: the model's modules by path.
        how: the model is run.
        meant: which operation a selector means, as far as another run has told.
        replaced: what takes the place of the outputs of these, which are leaves.
        graph: told of these, and of other leaves that are made.

    Attributes:
        found: by selector, in the order in which they were performed; of one that asks when, all that it may mean.
    """

    selectors: Iterable[OfOperations]
    modules: Mapping[str, nn.Module]
    how: Within
    meant: Mapping[Performance, OfOperations] = field(default_factory=dict)
    replaced: Mapping[OfOperations, Tensor] = field(default_factory=dict)
    graph: Graph = field(default_factory=Graph)
    found: dict[OfOperations, list[Output]] = field(default_factory=dict)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _dependence: Dependence = field(default_factory=Dependence.looking_back)

    def clear(self) -> None:
        """Forget them: the model runs once more."""
        self.found.clear()
        self._counts.clear()
        self._dependence = Dependence.looking_back()

    def within(self) -> AbstractContextManager[object]:
        """Look at the operations while the block runs."""
        self.clear()
        return _Looking(self)

    def add(self, func: Callable[..., object], path: str, module: nn.Module, value: Tensor) -> Tensor:
        """Take down an output, if it is meant.

        Returns:
            What the model goes on with, which it may overwrite.
        """
        operation = name_of(func)
        performance = operation, path, self._counts[operation, path]
        self._counts[operation, path] += 1
        site = Site(path, module, operation, modules=self.modules)
        place = self.meant.get(performance)
        if place is not None:
            value = self._on_tape(value, self.replaced.get(place))
            self.found[place] = [Output(site, value, performance)]
        known = self.meant.values()
        others = [one for one in self.selectors if one not in known] if value.requires_grad else []
        wanted = [selector for selector in others if selector.anywhen.matches(site)]
        if wanted and not self._dependence.has(value):  # what weights alone go into is none
            wanted = []
        for selector in wanted:
            found = self.found.setdefault(selector, [])
            number = sum((one.site.operation, one.site.name) == (operation, path) for one in found)
            found.append(Output(replace(site, number=number), value, performance))
        if not wanted and place is None:
            return value
        return apart(value, always=self.how.overwrites)

    def _on_tape(self, value: Tensor, other: Tensor | None) -> Tensor:
        """The value, or what takes its place; off the tape the graph begins here."""
        if other is None and value.requires_grad:
            return value
        begun = leaf(value if other is None else other)
        self.graph.grows_from([begun])
        return begun

    def chosen(self) -> dict[OfOperations, list[Output]]:
        """Those that are meant, where all have been performed."""
        chosen = {}
        for selector, found in self.found.items():
            if selector in self.meant.values():
                chosen[selector] = found
                continue
            performed = tuple(one.site.performance for one in found)
            sites = [(replace(one.site, performed=performed), one) for one in found]
            chosen[selector] = [one for site, one in sites if selector.matches(site)]
        return chosen


class _Looking(Watching):
    """Sees each torch function that the model calls, before what gives it a rule does."""

    def __init__(self, performed: Performed) -> None:
        super().__init__()
        self._performed = performed
        self._paths = Paths(performed.modules)
        self._following: AbstractContextManager[None] | None = None

    def __enter__(self) -> _Looking:
        self._following = self._paths.followed()
        self._following.__enter__()
        self._outer = function_modes()
        push_mode(self)
        return self

    def __exit__(self, *exception: object) -> None:
        set_function_modes(self._outer)
        assert self._following is not None
        self._following.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._performed.how.aside:
            return func(*args, **kwargs)
        if func in _MADE_OF_OTHERS:
            inside = entered(func)
            assert inside is not None
            push_mode(self)
            try:
                return inside(*args, **kwargs)
            finally:
                set_function_modes(function_modes()[:-1])
        if types and (found := answered(self, func, types, args, kwargs)) is not NotImplemented:
            return found
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and made.is_floating_point() and not queries(func):
            return self._performed.add(func, *self._paths.innermost, made)
        return made
