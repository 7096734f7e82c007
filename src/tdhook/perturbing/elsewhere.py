"""Elsewhere: values of another run, which those of a run are compared with."""

from __future__ import annotations

from collections.abc import Mapping

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from tdhook.perturbing.drawn import Drawn
from tdhook.perturbing.references import References

__all__ = ["Elsewhere"]


class Elsewhere(References):
    """One reference: the values that sources have elsewhere, of their shapes.

    Args:
        values: by source.
    """

    def __init__(self, values: Mapping[NestedKey, Tensor]) -> None:
        super().__init__(0.0)
        self._elsewhere = dict(values)

    @property
    def constant(self) -> bool:
        """They are others in each call."""
        return False

    def one(
        self,
        number: int,
        values: Mapping[NestedKey, Tensor],
        batch_dims: Mapping[NestedKey, int],
        td: TensorDictBase,
    ) -> Drawn:
        """Those values."""
        return Drawn({key: self._elsewhere[key] for key in values})
