"""Overwritten entries: what a model reads beside its attributed inputs, and writes to in place: a counter, a state.

Every run has copies of its own, so that none sees what another has written. What the model wrote in the run that is the
call's own is handed back when the call is done, as a plain call would have left it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.models.entries import leaves_of
from tdhook.tape.copies import copied
from tdhook.tape.internals import version_of

__all__ = ["Overwritten"]


class Overwritten:
    """The copies of one call.

    Args:
        keys: entries that were seen to be overwritten, from call to call.
    """

    def __init__(self, keys: set[NestedKey]) -> None:
        self._keys = keys
        self._own: list[tuple[NestedKey, Tensor, Tensor, int]] = []

    def clear(self) -> None:
        """Forget the call: it is made again."""
        self._own.clear()

    def copy(
        self, work: TensorDictBase, reads: Iterable[NestedKey], inputs: Collection[NestedKey], *, own: bool
    ) -> None:
        """Put copies in the place of entries that a model reads and may overwrite.

        Args:
            work: what it is run on, a copy that may be written to.
            reads: the entries that it reads.
            inputs: those that are attributed, which are leaves of their own.
            own: whether the run is the call's own; elsewhere only what was overwritten there is copied.
        """
        besides = [key for key in reads if key not in inputs]
        if not besides or torch.compiler.is_compiling():
            return
        for key in besides:
            for name, value in leaves_of(key, work.get(key, None)):
                if name in inputs or not (own or name in self._keys):
                    continue
                copy = copied(value)
                work.set(name, copy)
                if own:
                    self._own.append((name, value, copy, version_of(copy)))

    def see(self) -> None:
        """See what the call's own run has overwritten."""
        self._keys.update(name for name, _, copy, made in self._own if version_of(copy) != made)

    def hand_back(self) -> None:
        """Write what was overwritten to where it came from."""
        if not self._own:
            return
        with torch.no_grad():
            for _, value, copy, made in self._own:
                if version_of(copy) != made:
                    value.copy_(copy)
        self._own.clear()
