"""Meeting: what a function computes with besides what it is given, wherever it takes that from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.tape.as_one import inside_of, is_one
from tdhook.tape.internals import inside, is_wrapped
from tdhook.tape.modes import Watching, answered
from tdhook.tape.trees import tree_leaves

__all__ = ["Meeting"]

_PLAIN = (float, int, bool, str)


class Meeting(Watching):
    """Takes down constants that torch functions are called with while the block runs: those of a closure, say.

    Parameters are not among them, which modules hold.

    Args:
        given: what the function is given.

    Attributes:
        others: tensors that were neither given nor made in the block, each once, and plain numbers and texts.
    """

    def __init__(self, given: Iterable[object]) -> None:
        super().__init__()
        self.others: list[object] = []
        # Held on to, so that no other tensor has their place meanwhile.
        self._known: dict[int, object] = {id(x): x for x in given if isinstance(x, Tensor)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.compiler.is_compiling():  # as torch does of some of its operators, which it cannot with this
            return func(*args, **(kwargs or {}))
        if is_one(func):  # what it computes inside is seen, too
            with self:
                return inside_of(func)(*args, **(kwargs or {}))
        if types and (found := answered(self, func, types, args, kwargs)) is not NotImplemented:
            return found
        for x in (*args, *kwargs.values()) if kwargs else args:
            self._take_down(x)
        made = func(*args, **(kwargs or {}))
        for x in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(x, Tensor):
                self._known[id(x)] = x
        return made

    def _take_down(self, x: object) -> None:
        if isinstance(x, Tensor):
            if id(x) not in self._known:
                self._known[id(x)] = x
                while is_wrapped(x):  # inside a transform of torch.func, behind which it would be nothing
                    x = inside(x)
                if not isinstance(x, nn.Parameter):
                    self.others.append(x)
        elif type(x) in _PLAIN:
            self.others.append(x)
        elif isinstance(x, list | tuple | dict):
            for below in tree_leaves(x):
                self._take_down(below)
