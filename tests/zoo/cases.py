"""What a case of the zoo is: a model as its users put it together, what it is run on, and what is explained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import Target

from .checks import check, check_difference


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        name: what it is called among the tests.
        covers: the classes and functions that it stands for, by name.
        make: gives the model, what it is run on, and the target.
        options: for :func:`zoo.checks.check`.
        within: makes a context to run in.
        needs: names of packages without which there is no such model.
        fails: why its relevance is not accounted for, if it is not.
        slow: whether it runs with ``--slow`` alone.
    """

    name: str
    covers: tuple[str, ...]
    make: Callable[[], tuple[nn.Module, TensorDict, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    needs: tuple[str, ...] = ()
    fails: str = ""
    slow: bool = False

    def check(self):
        """Explain it, and assert what has to hold."""
        with self.within():
            model, td, target = self.make()
            return check(model, td, target=target, **self.options)

    def check_difference(self, **options):
        """Explain its difference from a baseline, all of which arrives."""
        with self.within():
            model, td, target = self.make()
            own = {key: value for key, value in self.options.items() if key != "composite"}
            return check_difference(model, td, target=target, **{**own, **options})


class Collection(dict[str, Case]):
    """Cases by name; decorates the functions that make them."""

    def add(self, name: str, *covers: str, within=nullcontext, needs=(), fails="", slow=False, **options):
        def register(make):
            assert name not in self, f"two cases are called {name}"
            self[name] = Case(name, covers, make, options, within, tuple(needs), fails, slow)
            return make

        return register


def ready(module: nn.Module) -> nn.Module:
    """In double precision and evaluation mode."""
    return module.double().eval()


def settled(module: nn.Module, td: TensorDict) -> nn.Module:
    """Likewise, once a first run has given lazy layers their shapes."""
    ready(module)
    with torch.no_grad():
        module(td.copy())
    return ready(module)


def inputs(*batch: int, **entries) -> TensorDict:
    """Entries by shape (random values in double precision), or as they are."""
    made = {
        key: torch.randn(*batch, *value, dtype=torch.float64) if isinstance(value, tuple) else value
        for key, value in entries.items()
    }
    return TensorDict(made, batch_size=list(batch))


def keyed(module: nn.Module, in_keys, out_keys) -> TensorDictModule:
    """The module reading and writing keys."""
    return TensorDictModule(module, in_keys=in_keys, out_keys=out_keys)


def first(key) -> Target:
    """The first of the outputs."""
    return Target(key, 0)
