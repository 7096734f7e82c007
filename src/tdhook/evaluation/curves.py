"""Curves: how a target fares while more and more features are replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tdhook.evaluation.intervals import Figures

__all__ = ["Curve", "InsertionDeletion", "PerturbationCurves"]


@dataclass(frozen=True, eq=False)
class Curve(Figures):
    """What is measured, while more and more of the entries of the inputs are replaced.

    Where features have different numbers of entries, each element of the batch reaches other shares at its steps; its
    values are interpolated between them, so that all are told at the same shares.

    Attributes:
        fraction: ``[points]``, share of the entries that are replaced (that are there, for insertion), from 0 to 1, of
            those that belong to a feature.
        value: ``[*batch, points]``.
    """

    fraction: Tensor
    value: Tensor
    trailing: ClassVar[int] = 1

    @property
    def mean(self) -> Tensor:
        """The curve of the whole batch, ``[points]``."""
        return self.value.flatten(0, -2).mean(0) if self.value.dim() > 1 else self.value

    @property
    def areas(self) -> Tensor:
        """The area under the curve of each element, ``[*batch]``, by the trapezoid rule."""
        return torch.trapezoid(self.value, self.fraction)

    @property
    def area(self) -> float:
        """The area under :attr:`mean`."""
        return self.areas.mean().item()

    @property
    def aopc(self) -> float:
        """How far the value lies below that of the whole input, mean over points and batch (Samek 2017, eq. 12)."""
        return (self.value[..., :1] - self.value).mean().item()

    def figures(self) -> dict[str, Tensor]:
        """The curves, of which there are intervals at each point."""
        return {"value": self.value}

    def to_dict(self) -> dict[str, object]:
        """The mean curve and its area as plain data."""
        return {"fraction": self.fraction.tolist(), "value": self.mean.tolist(), "area": self.area}


@dataclass(frozen=True, eq=False)
class PerturbationCurves(Figures):
    """The curves of one explanation.

    Attributes:
        most: the most relevant features are replaced first (MoRF): falls early, if the explanation is right.
        least: the least relevant features are replaced first (LeRF): falls late.
    """

    most: Curve
    least: Curve

    @property
    def between(self) -> float:
        """The area between the curves, ``least`` minus ``most``: the larger the better, about 0 for a random order."""
        return self.least.area - self.most.area

    def figures(self) -> dict[str, Tensor]:
        """The areas under both curves and between them."""
        most, least = self.most.areas, self.least.areas
        return {"most": most, "least": least, "between": least - most}

    def to_dict(self) -> dict[str, object]:
        """Both curves and the area between them as plain data."""
        return {"most": self.most.to_dict(), "least": self.least.to_dict(), "between": self.between}


@dataclass(frozen=True, eq=False)
class InsertionDeletion(Figures):
    """The two curves of Petsiuk, Das and Saenko (2018).

    Attributes:
        insertion: the most relevant features are put back first into an input that is all baseline; a large area is
            good.
        deletion: the most relevant features are taken out first; a small area is good.
    """

    insertion: Curve
    deletion: Curve

    def figures(self) -> dict[str, Tensor]:
        """The areas under both curves."""
        return {"insertion": self.insertion.areas, "deletion": self.deletion.areas}

    def to_dict(self) -> dict[str, object]:
        """Both curves as plain data."""
        return {"insertion": self.insertion.to_dict(), "deletion": self.deletion.to_dict()}
