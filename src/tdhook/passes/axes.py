"""Axes: the outputs of modules with the axes of the batch first, where a model puts another one there.

Recurrent networks and transformers of torch take time first by default. Which axis is the batch's is told by its size;
where several axes have that size, by what single elements of the batch depend on. Where a model makes several axes of
the batch one, as one of convolutions does, it is seen that elements lie there in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from torch import Size, Tensor

from tdhook.tape.picking import Rows

__all__ = ["Axes", "Misread", "is_folded", "out_of_order", "rows_elsewhere"]


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
        unsure: by name, outputs whose batch axis is taken to be the first one, though others have its size too; and of
            how many elements the batch is where that was so.
        out_of_order: names of outputs that may have none, and have elements in another order.
        rows: by name, what a model does with rows, by which those of an output may be those of other elements.
        elsewhere: names of values that may have elements elsewhere, and have so in this call.
    """

    def __init__(self, folds: Callable[[str], bool] = lambda name: False) -> None:
        self._folds = folds
        self._known: dict[str, int] = {}
        self._taken: dict[str, int] = {}
        self._ordered: set[tuple[str, int]] = set()
        self.out_of_order: set[str] = set()
        self.rows: dict[str, Rows] = {}
        self.elsewhere: set[str] = set()
        self.unsure: dict[str, int] = {}

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
            self.unsure[name] = size
            self._taken[name] = taken
        elif len(able) == 1:
            self._known[name] = taken
        return taken

    def folded(self, modules: Mapping[str, Tensor], batch: Size) -> dict[str, Tensor]:
        """Outputs in which several axes of the batch are one, and of which it was not seen in which order.

        Args:
            modules: by path and call, outputs with the axis of the batch first.
            batch: the batch size.
        """
        if sum(length > 1 for length in batch) < 2:
            return {}
        dims = len(batch)
        return {
            name: z
            for name, z in modules.items()
            if (name, dims) not in self._ordered and is_folded(z, batch)
        }

    def see_order(self, name: str, shape: Size, batch: Size, amounts: Mapping[int, Tensor]) -> None:
        """See that elements of the batch lie in their order, where an output has its axes as one.

        Args:
            name: path and call of the module.
            shape: that of the output.
            batch: the batch size.
            amounts: by the number of an element, how much what lies there has to do with each, ``[elements]``.

        Raises:
            ValueError: they do not: it has nothing to do with the element that would be there.
        """
        for number, amount in amounts.items():
            if not amount.any():
                return
            if amount[number] == 0:
                if not self._folds(name):
                    raise ValueError(out_of_order(name, shape, batch))
                self.out_of_order.add(name)
                break
        if amounts:
            self._ordered.add((name, len(batch)))

    def see_rows(self, name: str, value: Tensor, batch: Size, *, elsewhere: bool, asked: bool) -> None:
        """See whether the rows of a value are elements of the batch at their own places.

        Args:
            name: path and call of a module, or what an operation is called.
            value: it.
            batch: the batch size.
            elsewhere: whether they are not.
            asked: whether relevance of it is asked for, and not only whether it passes it.

        Raises:
            ValueError: they are not, and have to be.
        """
        if not elsewhere:
            self.elsewhere.discard(name)
        elif asked and not self._folds(name):
            raise ValueError(rows_elsewhere(name, value.shape, batch))
        else:
            self.elsewhere.add(name)

    def learn(
        self, pulled: Mapping[int, Mapping[str, Tensor | None]], size: int, *, moved: bool = False
    ) -> None:
        """Learn axes from what some elements of the batch depend on.

        One does not tell where elements depend on each other and read the same unit: all along that lie more values
        than are the element's own. At its own place each of them reads some.

        Args:
            pulled: by the number of an element, and by path and call, what a backward pass of that element alone
                brought to the output, of which the axis that was taken for the batch's stands first.
            size: how many elements the batch has.
            moved: whether the model gives rows other places. Then an element may be elsewhere along the first axis,
                and no other one is told by a part of what was brought.

        Raises:
            Misread: an axis is another one.
            ValueError: none can be the batch's: an element depends on values all along it.
        """
        misread = False
        for name in next(iter(pulled.values())):
            self.unsure.pop(name, None)
            taken = self._taken.pop(name, 0)
            self._known[name] = taken
            amounts = {
                number: found.detach().abs().movedim(0, taken)
                for number, each in pulled.items()
                if (found := each[name]) is not None and found.any()
            }
            if not amounts:
                continue
            shape = next(iter(amounts.values())).shape
            able = [axis for axis, length in enumerate(shape) if length == size]
            shares = [
                min(float(x.select(axis, number).sum() / x.sum()) for number, x in amounts.items())
                for axis in able
            ]
            whole = max(shares) >= 1 - _ELSEWHERE
            if moved and not taken and not whole:
                continue
            self._known[name] = able[shares.index(max(shares))]
            misread |= self._known[name] != taken
            if taken and not whole:
                if self._folds(name):
                    self._known[name], misread = 0, True
                    continue
                del self._known[name]
                raise ValueError(
                    f"module {name!r} returned a tensor of shape {list(shape)}, where axis {taken} is as long as the "
                    f"batch, {size}, and is none of its elements: what is explained of one depends on values all "
                    "along it; name a module whose output has an axis for the elements of the batch"
                )
        if misread:
            raise Misread


def is_folded(z: Tensor, batch: Size) -> bool:
    """Whether a value has the axes of a batch as one, its first."""
    return z.shape[: len(batch)] != batch and len(z) == batch.numel()


def rows_elsewhere(name: str, shape: Size, batch: Size) -> str:
    """What is said of a value whose rows are other elements of the batch than those of their places."""
    return (
        f"{name!r} gives a tensor of shape {list(shape)}, whose rows are not the elements of the batch "
        f"{list(batch)} at their own places: the model sorts or chooses them; name a module where each is at its own"
    )


def out_of_order(name: str, shape: Size, batch: Size) -> str:
    """What is said of an output in which elements of the batch lie in another order."""
    return (
        f"module {name!r} returned a tensor of shape {list(shape)}, in which the axes of the batch {list(batch)} are "
        "one, in another order: give a batch of one axis, or name a module whose output has the axes of the batch"
    )
