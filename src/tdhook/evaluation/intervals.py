"""Confidence intervals: how far the mean of a figure reaches, given how many elements it was measured of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from tdhook.perturbing.quadrature import gauss_legendre

__all__ = ["Figures", "How", "Interval", "interval"]

How: TypeAlias = Literal["bootstrap", "t"]
"""How an interval is found: elements are drawn again, or Student's t distribution."""

_AT_ONCE = 2_000_000


@dataclass(frozen=True, eq=False)
class Interval:
    """A mean and how far it reaches.

    Attributes:
        mean: ``[*rest]``, over the batch.
        low: ``[*rest]``, the lower end.
        high: ``[*rest]``, the upper end.
        level: how often such an interval holds the mean of what the batch was drawn from.
        count: how many elements, or trajectories, were taken for independent.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    level: float
    count: int

    def to_dict(self) -> dict[str, object]:
        """All of it as plain data."""
        ends = {name: getattr(self, name).tolist() for name in ("mean", "low", "high")}
        return {**ends, "level": self.level, "count": self.count}

    def __str__(self) -> str:
        if self.mean.dim():
            return f"intervals of shape {list(self.mean.shape)}"
        return f"{self.mean.item():.3g} [{self.low.item():.3g}, {self.high.item():.3g}]"


class Figures(ABC):
    """What a measure found for each element of the batch.

    Attributes:
        trailing: how many axes of each figure are none of the batch.
    """

    trailing: ClassVar[int] = 0

    @abstractmethod
    def figures(self) -> dict[str, Tensor]:
        """By name, ``[*batch, *rest]``."""

    def intervals(
        self,
        level: float = 0.95,
        *,
        how: How = "bootstrap",
        trajectories: Tensor | None = None,
        draws: int = 2000,
        seed: int = 0,
    ) -> dict[str, Interval]:
        """The mean of each figure over the batch, with a confidence interval (:func:`interval`).

        Args:
            level: how often such intervals hold the mean of what the batch was drawn from.
            how: ``"bootstrap"`` or ``"t"``.
            trajectories: ``[*batch]``, the number of the trajectory that each element is from.
            draws: of the bootstrap.
            seed: of the bootstrap.

        Raises:
            ValueError: what :func:`interval` raises.
        """
        return {
            name: interval(
                values,
                level,
                trailing=self.trailing,
                how=how,
                trajectories=trajectories,
                draws=draws,
                seed=seed,
            )
            for name, values in self.figures().items()
        }


def interval(
    values: Tensor,
    level: float = 0.95,
    *,
    trailing: int = 0,
    how: How = "bootstrap",
    trajectories: Tensor | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean over a batch with a confidence interval.

    The bootstrap draws as many elements as there are, with replacement, and takes the mean; its interval lies between
    percentiles of such means (Efron 1979), ``(1 - level) / 2`` at either end. It never leaves the range of the values,
    which a rank or a share must not, and with fewer than about twenty elements it is too narrow. Student's t
    distribution (Student 1908) is right for few values that are distributed about normally.

    Steps of one trajectory resemble each other, and an interval that takes them for independent is far too narrow. With
    ``trajectories``, whole trajectories are drawn; or the variance is that of what trajectories add to the mean (Liang
    and Zeger 1986), with one degree of freedom less than there are trajectories. The mean is over elements in any case.

    Args:
        values: ``[*batch, *rest]``.
        level: how often such an interval holds the mean of what the batch was drawn from.
        trailing: how many axes ``rest`` has; the mean is not over these.
        how: ``"bootstrap"`` or ``"t"``.
        trajectories: ``[*batch]``, the number of the trajectory that each element is from, such as
            ``rollout["collector", "traj_ids"]``; by default each element counts as one.
        draws: of the bootstrap.
        seed: of the bootstrap; global random numbers are left as they are.

    Raises:
        ValueError: there are no two elements or trajectories, values are not finite, or an argument is out of range.
    """
    if not 0 < level <= 1 - 1e-6:
        raise ValueError(f"level is a share of intervals, above 0 and below 1 as 0.95 is; got {level}")
    if how not in ("bootstrap", "t"):
        raise ValueError(f"how={how!r} is neither 'bootstrap' nor 't'")
    if draws < 1:
        raise ValueError(f"a bootstrap draws at least once, got draws={draws}")
    batch, rest = values.shape[: values.dim() - trailing], values.shape[values.dim() - trailing :]
    rows = values.detach().to("cpu", torch.float64).reshape(batch.numel(), rest.numel())
    if not bool(rows.isfinite().all()):
        raise ValueError("there are NaN or infinite values, whose mean says nothing")
    totals, sizes = _together(rows, batch, trajectories)
    if len(sizes) < 2:
        what = "element" if trajectories is None else "trajectory"
        raise ValueError(
            f"an interval needs at least two elements or trajectories; there is {len(sizes)} {what}"
        )
    mean = totals.sum(0) / sizes.sum()
    if how == "t":
        spread = (totals - sizes[:, None] * mean).square().sum(0) * len(sizes) / (len(sizes) - 1)
        reach = student(level, len(sizes) - 1) * spread.sqrt() / sizes.sum()
        low, high = mean - reach, mean + reach
    else:
        means = _drawn_means(totals, sizes, draws, torch.Generator().manual_seed(seed))
        ordered = means.sort(0).values
        low, high = (_percentile(ordered, share) for share in ((1 - level) / 2, (1 + level) / 2))
        low, high = (end.clamp(rows.amin(0), rows.amax(0)) for end in (low, high))  # but for rounding
    return Interval(mean.reshape(rest), low.reshape(rest), high.reshape(rest), level, len(sizes))


def _together(rows: Tensor, batch: torch.Size, trajectories: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of the elements that belong together, ``[units, rest]``, and how many these are, ``[units]``."""
    if trajectories is None:
        return rows, torch.ones(len(rows), dtype=torch.float64)
    if trajectories.numel() != batch.numel():
        raise ValueError(
            f"trajectories of shape {list(trajectories.shape)} for figures of batch size {list(batch)}: give the "
            "number of a trajectory for each element of the batch"
        )
    found, unit = trajectories.detach().cpu().flatten().unique(return_inverse=True)
    sizes = unit.bincount(minlength=len(found)).to(torch.float64)
    return rows.new_zeros(len(found), rows.shape[1]).index_add_(0, unit, rows), sizes


def _drawn_means(totals: Tensor, sizes: Tensor, draws: int, chance: torch.Generator) -> Tensor:
    """Means of units that are drawn with replacement, ``[draws, rest]``."""
    units, means = len(sizes), []
    for some in torch.arange(draws).split(max(1, _AT_ONCE // units)):
        drawn = (torch.rand(len(some), units, generator=chance, dtype=torch.float64) * units).long()
        often = torch.zeros(len(some), units, dtype=torch.float64)
        often.scatter_add_(1, drawn, torch.ones_like(often))
        means.append(often @ totals / (often @ sizes)[:, None])
    return torch.cat(means)


def _percentile(ordered: Tensor, share: float) -> Tensor:
    """The value of ``ordered [draws, rest]`` that a share of them lies below, between two of them by the line."""
    place = share * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 1)
    return ordered[below].lerp(ordered[min(below + 1, len(ordered) - 1)], place - below)


def student(level: float, freedom: int) -> float:
    """How far Student's t distribution reaches: ``P(|T| <= t) = level``.

    With ``t = sqrt(freedom) tan(angle)``, its density is a power of a cosine, which is integrated up to an angle that
    is found by halving.
    """
    whole = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)) * math.sqrt(math.pi) / 2
    places = gauss_legendre(64)

    def within(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        share = sum(weight * math.cos(angle * place) ** (freedom - 1) for place, weight in places)
        return angle * share / whole

    low = NormalDist().inv_cdf((1 + level) / 2)
    high = 2 * low
    while within(high) < level:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return high
