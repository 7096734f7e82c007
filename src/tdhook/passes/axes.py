"""Axes: the outputs of modules with the axes of the batch first, where a model puts another one there.

Recurrent networks and transformers of torch take time first by default. Which axis is the batch's is told by its size;
where several axes have that size, by what the first element of the batch alone depends on.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

__all__ = ["Axes", "Misread"]


class Misread(BaseException):
    """The batch axis of a module's output is not the one it was taken for. The model is run again.

    Not an ``Exception``, so that the model's own handlers let it pass.
    """


class Axes:
    """The batch axes of the outputs of a model's modules, kept from call to call.

    Attributes:
        unsure: names of outputs whose batch axis is taken to be the first one, though others have its size too.
    """

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
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
        if not able:
            raise ValueError(
                f"module {name!r} ({kind}) returned a tensor of shape {list(shape)}, none of whose axes is that of the "
                f"batch {list(batch)}; name a module whose output has an axis for the elements of the batch"
            )
        known = self._known.get(name)
        if known in able:
            return known
        if len(able) > 1 and size > 1:
            self.unsure.add(name)
            return 0 if 0 in able else able[0]
        self._known[name] = able[0]
        return able[0]

    def learn(self, pulled: Mapping[str, Tensor | None], size: int) -> None:
        """Learn axes from what the first element of the batch depends on.

        Args:
            pulled: by path and call, what a backward pass of that element alone brought to the output, of which the
                axis that was taken for the batch's stands first.
            size: how many elements the batch has.

        Raises:
            Misread: an axis is another one.
        """
        misread = False
        for name, found in pulled.items():
            self.unsure.discard(name)
            self._known[name] = 0
            if found is None or not found.any():
                continue
            amount = found.detach().abs()
            able = [axis for axis, length in enumerate(amount.shape) if length == size]
            shares = [float(amount.select(axis, 0).sum()) for axis in able]
            self._known[name] = able[shares.index(max(shares))]
            misread |= self._known[name] != 0
        if misread:
            raise Misread
