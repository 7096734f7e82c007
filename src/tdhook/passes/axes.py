"""Axes: the outputs of modules with the axes of the batch first, where a model puts another one there.

Recurrent networks and transformers of torch take time first by default. Which axis is the batch's is told by its size;
where several axes have that size, by what the first element of the batch alone depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from torch import Tensor

__all__ = ["Axes", "Misread"]


# What is explained of one element may depend on others by rounding.
_ELSEWHERE = 1e-3


class Misread(BaseException):
    """The batch axis of a module's output is not the one it was taken for. The model is run again.

    Not an ``Exception``, so that the model's own handlers let it pass.
    """


class Axes:
    """The batch axes of the outputs of a model's modules, kept from call to call.

    Args:
        folds: ``name ->`` whether an output may have none, and is then left as it is.

    Attributes:
        unsure: names of outputs whose batch axis is taken to be the first one, though others have its size too.
    """

    def __init__(self, folds: Callable[[str], bool] = lambda name: False) -> None:
        self._folds = folds
        self._known: dict[str, int] = {}
        self._taken: dict[str, int] = {}
        self.unsure: set[str] = set()

    def of(self, name: str, kind: str, shape: tuple[int, ...], batch: tuple[int, ...]) -> int:
        """The axis that is to be the first one.

        Args:
            name: path and call of a module.
            kind: its class, for the message.
            shape: that of its output.
            batch: batch size of the TensorDict that the model runs on.

        Raises:
            ValueError: no axis can be the batch's.
        """
        if not batch or (len(batch) > 1 and shape[: len(batch)] == batch):
            return 0
        size = prod(batch)  # a model of fixed rank runs on a flat batch
        able = [axis for axis, length in enumerate(shape) if length == size]
        known = self._known.get(name)
        if self._folds(name) and (not able or known == 0):
            return 0
        if not able:
            raise ValueError(
                f"module {name!r} ({kind}) returned a tensor of shape {list(shape)}, none of whose axes is that of the "
                f"batch {list(batch)}; name a module whose output has an axis for the elements of the batch"
            )
        if known in able:
            return known
        taken = 0 if 0 in able else able[0]
        if size > 1 and (len(able) > 1 or taken):
            self.unsure.add(name)
            self._taken[name] = taken
        else:
            self._known[name] = taken
        return taken

    def learn(self, pulled: Mapping[str, Tensor | None], size: int) -> None:
        """Learn axes from what the first element of the batch depends on.

        Args:
            pulled: by path and call, what a backward pass of that element alone brought to the output, of which the
                axis that was taken for the batch's stands first.
            size: how many elements the batch has.

        Raises:
            Misread: an axis is another one.
            ValueError: none can be the batch's: the first element depends on values all along it.
        """
        misread = False
        for name, found in pulled.items():
            self.unsure.discard(name)
            taken = self._taken.pop(name, 0)
            self._known[name] = taken
            if found is None or not found.any():
                continue
            amount = found.detach().abs().movedim(0, taken)
            able = [axis for axis, length in enumerate(amount.shape) if length == size]
            shares = [float(amount.select(axis, 0).sum()) for axis in able]
            self._known[name] = able[shares.index(max(shares))]
            misread |= self._known[name] != taken
            if taken and max(shares) < (1 - _ELSEWHERE) * float(amount.sum()):
                if self._folds(name):
                    self._known[name], misread = 0, True
                    continue
                del self._known[name]
                raise ValueError(
                    f"module {name!r} returned a tensor of shape {list(amount.shape)}, where axis {taken} is as long "
                    f"as the batch, {size}, and is none of its elements: what is explained of the first depends on "
                    "values all along it; name a module whose output has an axis for the elements of the batch"
                )
        if misread:
            raise Misread
