"""Heads: what of a model comes behind the explained values, and need not be on the tape.

A policy ends in a module that draws actions from what its network wrote. Where the network's output is explained, no
gradient passes the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.models.entries import is_batch
from tdhook.models.turns import here
from tdhook.tape.internals import version_of, without_modes
from tdhook.tape.undoing import Hook, hooked

__all__ = ["Heads", "NotBehind", "NowKnown"]

_Seen: TypeAlias = "list[tuple[Tensor, int]]"


class NotBehind(BaseException):
    """What was left off the tape made an explained value after all: the model is run again, all of it on the tape.

    Not an ``Exception``, so that the model's own handlers let it pass.
    """


class NowKnown(BaseException):
    """The heads were found in a run that had them on the tape, and other runs are to go beside it: it is made again."""


class Heads:
    """Takes the modules of a sequence off the tape that leave the explained values as they are.

    Which these are is seen in a first run: those after the last one that puts another tensor in the place of an
    explained value. That this holds is checked in each run; where it does not, all of the model is on the tape
    from then on.

    Args:
        runner: the model.
        explains: the keys of the explained values; ``None`` if they are not known.
    """

    def __init__(self, runner: TensorDictModuleBase, explains: Sequence[NestedKey] | None) -> None:
        self._parts: list[nn.Module] = []
        if explains and isinstance(runner, TensorDictSequential) and isinstance(runner.module, nn.ModuleList):
            self._parts = list(runner.module)
        self._runner, self._keys = runner, list(explains or ())
        self._first: nn.Module | None = None
        self._known = len(self._parts) < 2 or len(set(map(id, self._parts))) < len(self._parts)

    @property
    def known(self) -> bool:
        """Whether it was seen which modules are heads, if any."""
        return self._known

    @property
    def possible(self) -> bool:
        """Whether there are heads, or may be."""
        return not self._known or self._first is not None

    @contextmanager
    def off_the_tape(self, seen: bool) -> Iterator[None]:
        """Run the model with its heads off the tape, as far as they are known.

        Args:
            seen: whether modes have to see what the heads do, which may overwrite what the backward pass needs.

        Raises:
            NotBehind: that was wrong; from now on they are on it.
        """
        if not self._known:
            with self._watched():
                yield
            return
        first = self._first
        if first is None:
            yield
            return
        before: _Seen = []
        after: _Seen = []
        unseen = ExitStack()

        def entering(module: nn.Module, args: tuple[object, ...]) -> None:
            before[:] = self._values(args)
            torch.set_grad_enabled(False)
            if not seen:
                unseen.enter_context(without_modes())

        def leaving(module: nn.Module, args: object, output: object) -> None:
            unseen.close()
            torch.set_grad_enabled(True)
            after[:] = self._values((output,))

        hooks: tuple[Hook, ...] = (
            (first.register_forward_pre_hook, here(entering), {}),
            (self._runner.register_forward_hook, here(leaving), {}),
        )
        with hooked(*hooks):
            try:
                yield
            finally:
                unseen.close()
                torch.set_grad_enabled(True)
        if not before or not _same(before, after):
            self._first = None
            raise NotBehind

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """See after which module the explained values stay."""
        last = 0
        seen: _Seen = []

        def leaving(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: object, output: object) -> None:
                nonlocal last
                found = self._values((output,))
                if not _same(seen, found):
                    last = index
                seen[:] = found

            return hook

        hooks: list[Hook] = [
            (part.register_forward_hook, here(leaving(i)), {}) for i, part in enumerate(self._parts)
        ]
        with hooked(*hooks):
            yield
        self._known = True
        if seen and last + 1 < len(self._parts):
            self._first = self._parts[last + 1]

    def _values(self, args: tuple[object, ...]) -> _Seen:
        """The explained values and their versions; none unless all are there."""
        td = args[0] if args else None
        if not is_batch(td):
            return []
        found = [td.get(key, None) for key in self._keys]
        return (
            [(x, version_of(x)) for x in found if isinstance(x, Tensor)]
            if all(isinstance(x, Tensor) for x in found)
            else []
        )


def _same(a: _Seen, b: _Seen) -> bool:
    return len(a) == len(b) and all(
        x is y and version == other for (x, version), (y, other) in zip(a, b, strict=True)
    )
