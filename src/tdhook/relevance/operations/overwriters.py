"""Overwriters: modules and autograd functions that run as one, and overwrite what they are given without a word.

What a rule keeps of their arguments would be what they left there, and each run that a rule or the ledger makes would
overwrite it again. So they run on copies, and what they wrote is written back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.relevance.propagation.call import Call, Run
from tdhook.tape.functions import copy_of, may_look_at
from tdhook.tape.overwriting import Guard, Mutated, version_in
from tdhook.tape.trees import tree_leaves, tree_map_tensors

__all__ = ["Overwriters"]


class Overwriters:
    """Tells which they are, and runs them.

    Args:
        guard: copies what the backward pass keeps of what is overwritten.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._known: set[int] = set()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_known": set()}

    def run(self, which: object, call: Call, run: Run) -> Any:
        """Make a call.

        Args:
            which: the module or the autograd function that is called.
            call: the call.
            run: makes it under its rule.

        Raises:
            Mutated: it has overwritten an argument, which was not known; the model is to be run again.
        """
        if id(which) in self._known:
            return self._on_copies(call, run)

        def seen() -> None:
            self._known.add(id(which))
            self._guard.active = True
            raise Mutated

        return run(_calling(_Watched(call.function, seen), call))

    @staticmethod
    def wrote_unseen(call: Call, run: Run) -> tuple[Any, bool]:
        """Make a call, and see whether it has overwritten an argument in such a way that torch does not count it."""
        given = [
            (x, x.detach().clone(), version_in(x))
            for x in _tensors(call.args, call.kwargs)
            if x.layout is torch.strided and may_look_at(x)
        ]
        result = run(call)
        unseen = any(
            version_in(x) == version and _differs(x.detach(), before) for x, before, version in given
        )
        return result, unseen

    def _on_copies(self, call: Call, run: Run) -> Any:
        function = _OnCopies(call.function)
        result = run(_calling(function, call))
        given = _tensors(call.args, call.kwargs) if function.copies else []
        for x, copy, version in zip(given, function.copies, function.versions, strict=True):
            if version_in(copy) == version:
                continue
            self._guard.before(x)
            if copy is function.returned:  # who reads the argument from now on reads the result
                result = x.copy_(result)
            else:
                x.detach().copy_(copy.detach())
        return result


class _Watched:
    """A function that is looked at, the first time that it runs, whether it overwrites what it is given."""

    def __init__(self, function: Callable[..., Any], seen: Callable[[], None]) -> None:
        self._function, self._seen = function, seen
        self._ran = False

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Call it."""
        if self._ran:
            return self._function(*args, **kwargs)
        self._ran = True
        given = _tensors(args, kwargs)
        versions = list(map(version_in, given))
        result = self._function(*args, **kwargs)
        if versions != list(map(version_in, given)):
            self._seen()
        return result


class _OnCopies:
    """A function on copies of what it is given.

    Attributes:
        copies: those of the first time that it runs, and ``versions``: theirs before.
        returned: what it returned then.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.copies: list[Tensor] = []
        self.versions: list[int] = []
        self.returned: object = None

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Call it."""
        args, kwargs = tree_map_tensors(_copied, (args, kwargs))
        copies = _tensors(args, kwargs)
        versions = list(map(version_in, copies))
        result = self._function(*args, **kwargs)
        if not self.copies:
            self.copies, self.versions, self.returned = copies, versions, result
        return result


def _differs(x: Tensor, before: Tensor) -> bool:
    """Whether values are others, where memory that nobody has written to may hold no numbers."""
    return bool(((x != before) & ((x == x) | (before == before))).any())


def _calling(function: Callable[..., Any], call: Call) -> Call:
    return Call(call.module, function, call.args, call.kwargs, call.setting)


def _tensors(args: object, kwargs: object) -> list[Tensor]:
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]


def _copied(x: Tensor) -> Tensor:
    return x if isinstance(x, nn.Parameter) else copy_of(x)
