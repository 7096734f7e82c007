"""Over time: what a policy looked at at each checkpoint of its training, on the same data, after the fact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.datasets.reducers import Moments, Reservoir
from tdhook.datasets.reducing import Reducer
from tdhook.datasets.result import Result
from tdhook.evaluation.similarity import drift
from tdhook.keys import under

__all__ = ["OverTime"]

_TOGETHER = 1 << 14


class OverTime:
    """What the checkpoints of a job have in common, and what not.

    Shares of relevance are those of a reducer :class:`~tdhook.datasets.reducers.Moments`. How far explanations have
    moved is told by all rows where they were kept, else by those that a
    :class:`~tdhook.datasets.reducers.Reservoir` drew, which are the same ones for each checkpoint.

    Args:
        result: of a job with ``checkpoints=``.
        key: the input; by default the only one.

    Raises:
        RuntimeError: not all is done.
        ValueError: the job has no checkpoints.
    """

    def __init__(self, result: Result, key: NestedKey | None = None) -> None:
        if result.done.dim() < 2:
            raise ValueError("this job has one set of weights: give it checkpoints={name: weights, ...}")
        if not bool(result.done.all()):
            raise RuntimeError(
                "checkpoints are compared on the same rows, and not all are explained yet: call work() until they are"
            )
        self._result, self._key = result, None if key is None else unravel_key(key)
        self.names = tuple(result.checkpoints)

    def curves(self, features: Sequence[str] | None = None) -> dict[str, list[float]]:
        """Numbers over the checkpoints, as :class:`~tdhook.rl.tracking.AttributionTracker` has them while it trains.

        Args:
            features: one name for each feature; by default their numbers.

        Returns:
            In lists, one number for each checkpoint: ``"step"``, its place; ``relevance/NAME``, the mean absolute
            relevance of a feature, and ``share/NAME``, its share; ``drift/previous`` and ``drift/first``, one minus the
            mean cosine with the explanations of the checkpoint before and of the first, where rows tell.

        Raises:
            ValueError: no moments were reduced, or there is another number of names.
        """
        found: dict[str, list[float]] = {"step": list(range(len(self.names)))}
        for checkpoint in range(len(self.names)):
            mean = self._absolute(checkpoint).flatten()
            names = [str(i) for i in range(len(mean))] if features is None else list(features)
            if len(names) != len(mean):
                raise ValueError(f"there are {len(names)} names for {len(mean)} features")
            total = mean.sum().item()
            for name, value in zip(names, mean.tolist(), strict=True):
                found.setdefault(f"relevance/{name}", []).append(value)
                found.setdefault(f"share/{name}", []).append(value / total if total else 0.0)
        if self._has_rows:
            last = range(len(self.names))
            found["drift/previous"] = [self.drift(i - 1, i) if i else math.nan for i in last]
            found["drift/first"] = [self.drift(0, i) if i else math.nan for i in last]
        return found

    def drift(self, a: int | str, b: int | str) -> float:
        """One minus the mean cosine of what explains each row at two checkpoints: 0 where it is the same.

        Args:
            a: a checkpoint, by its name or place.
            b: another.

        Raises:
            KeyError: there is no such checkpoint.
            ValueError: no rows were kept or drawn.
        """
        first, second = self._place(a), self._place(b)
        if self._drawn is not None:
            one, other = (self._result.reduced_of(i)[self._drawn] for i in (first, second))
            return _mean_drift(one["relevance"], other["relevance"])
        if not self._result.keeps_rows:
            raise ValueError(
                "no rows tell of drift: keep them (keep=), or draw some (reduce=[Reservoir(1000)])"
            )
        total, count = 0.0, self._result.done.shape[1]
        for begin in range(0, count, _TOGETHER):
            end = min(begin + _TOGETHER, count)
            total += _mean_drift(*(self._rows(i, begin, end) for i in (first, second))) * (end - begin)
        return total / count

    def drifts(self) -> Tensor:
        """Drift between any two checkpoints, ``[checkpoints, checkpoints]``."""
        count = len(self.names)
        found = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(i):
                found[i, j] = found[j, i] = self.drift(i, j)
        return found

    @property
    def _has_rows(self) -> bool:
        return self._drawn is not None or self._result.keeps_rows

    @property
    def _drawn(self) -> str | None:
        """The reducer that drew rows, where none were kept."""
        return None if self._result.keeps_rows else self._reduced_by(Reservoir)

    def _reduced_by(self, kind: type[Reducer]) -> str | None:
        """The name of the first reducer of a kind that is made of the input, if there is one.

        Raises:
            ValueError: they are made of several inputs, and none is named.
        """
        found = {name: one.key for name, one in self._result.reducers.items() if isinstance(one, kind)}
        if self._key is not None:
            found = {name: key for name, key in found.items() if key in (None, self._key)}
        keys = dict.fromkeys(key for key in found.values() if key is not None)
        if len(keys) > 1:
            raise ValueError(f"there is relevance of {', '.join(map(repr, keys))}: say with key= of which")
        return next(iter(found), None)

    def _rows(self, checkpoint: int, begin: int, end: int) -> Tensor:
        rows = self._result.read(begin, end, checkpoint)
        attribution = self._result.attribution_key
        under_it = rows.get(attribution)
        assert isinstance(under_it, TensorDict)
        keys = list(under_it.keys(True, True))
        if self._key is None and len(keys) != 1:
            raise ValueError(f"there is relevance of {', '.join(map(repr, keys))}: say with key= of which")
        found: Tensor = rows.get(under(attribution, keys[0] if self._key is None else self._key))
        return found

    def _absolute(self, checkpoint: int) -> Tensor:
        """Mean absolute relevance of each feature, whatever the group."""
        name = self._reduced_by(Moments)
        if name is None:
            raise ValueError("no moments tell of features: give the job reduce=[Moments()]")
        found = self._result.reduced_of(checkpoint)[name]
        absolute: Tensor = found["absolute"]
        weights = found["count"].double() / found["count"].sum()
        weighed: Tensor = absolute * weights.reshape(-1, *(1,) * (absolute.dim() - 1))
        return weighed.sum(0)

    def _place(self, which: int | str) -> int:
        if isinstance(which, int) and -len(self.names) <= which < len(self.names):
            return which % len(self.names)
        if which not in self.names:
            raise KeyError(f"there is no checkpoint {which!r}; there are {', '.join(self.names)}")
        return self.names.index(str(which))


def _mean_drift(a: Tensor, b: Tensor) -> float:
    return drift(a.reshape(len(a), -1), b.reshape(len(b), -1)).mean().item()
