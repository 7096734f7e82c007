"""What a replaced feature is replaced by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.perturbing.features import Features

__all__ = ["Baseline", "OneBaseline", "as_values", "blurred", "fitting"]

OneBaseline: TypeAlias = "float | str | tuple[str, ...] | Tensor | Callable[[Tensor], Tensor]"
Baseline: TypeAlias = "OneBaseline | Mapping[NestedKey, OneBaseline]"
"""A number; a tensor of the shape of one input; ``"mean"``, the mean over the data; ``"sample"``, the value that the
feature has in an element drawn from the data, for each feature anew; a function of the inputs ``[n, *shape]``; or
these by key."""


def blurred(width: float) -> Callable[[Tensor], Tensor]:
    """A baseline for pictures: a Gaussian blur over the last two axes, edges repeated.

    Args:
        width: standard deviation in pixels; the kernel is cut at three of them.

    Raises:
        ValueError: the width is not positive, or what it is given are no pictures.
    """
    if not width > 0:
        raise ValueError(f"a blur has a positive width in pixels, got {width}")

    return partial(_blur, width)  # which can be pickled


def _blur(width: float, pictures: Tensor) -> Tensor:
    if pictures.dim() < 3:
        raise ValueError(
            f"a blur is of pictures [rows, height, width], and got {list(pictures.shape)}, in which it would mix "
            "the rows: give what is no picture another baseline"
        )
    reach = max(1, round(3 * width))
    offsets = torch.arange(-reach, reach + 1, device=pictures.device, dtype=pictures.dtype)
    kernel = torch.exp(-0.5 * (offsets / width) ** 2)
    kernel = kernel / kernel.sum()
    flat = pictures.reshape(-1, 1, *pictures.shape[-2:])
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="replicate"), kernel.reshape(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="replicate"), kernel.reshape(1, 1, -1, 1))
    return flat.reshape(pictures.shape)


class Replacements:
    """Baselines for one chunk of rows after the other.

    Args:
        baseline: what the caller asked for.
        features: what is replaced.
        data: rows that means and samples are taken of.
        generator: of the samples.
    """

    def __init__(
        self, baseline: Baseline, features: Features, data: TensorDictBase, generator: torch.Generator
    ) -> None:
        named = _by_key(baseline, features.keys)
        self._features, self._data, self._generator = features, data, generator
        self._given: dict[NestedKey, OneBaseline] = {}
        for key in features.keys:
            given = named[key]
            if isinstance(given, str):
                _check_name(given)
                if key not in data.keys(True):
                    raise KeyError(f"the data for baseline {given!r} has no {key!r}")
                if given == "mean":
                    given = data.get(key).mean(0)
            self._given[key] = given

    def __call__(self, rows: TensorDictBase) -> dict[NestedKey, Tensor]:
        """What the features of ``rows [n, *rest]`` are replaced by, ``[n, *shape]`` by key."""
        drawn = None
        if "sample" in [given for given in self._given.values() if isinstance(given, str)]:
            share = torch.rand(
                len(rows), self._features.count, generator=self._generator, dtype=torch.float64
            )
            index = (share * len(self._data)).long().clamp(max=len(self._data) - 1)
            padded = F.pad(index, (0, 1))[:, self._features.groups]
            drawn = dict(zip(self._features.keys, padded.split(self._features.sizes, 1), strict=True))
        found = {}
        for key, given in self._given.items():
            value = rows.get(key)
            if isinstance(given, str):
                assert drawn is not None
                source = self._data.get(key)
                source = source.reshape(len(source), -1)
                made = source.gather(0, drawn[key].to(source.device)).reshape(value.shape)
            elif callable(given):
                made = given(value)
            else:
                made = as_values(cast("float | Tensor", given))
            found[key] = fitting(made, key, value)
        return found


def _check_name(given: str) -> None:
    if given not in ("mean", "sample"):
        raise ValueError(
            f"baseline {given!r} is neither 'mean' nor 'sample', a number, a tensor or a function"
        )


def as_values(given: float | Tensor) -> Tensor:
    """A number, or a tensor, as a tensor that has not lost digits of it."""
    return given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=torch.float64)


def fitting(made: Tensor, key: NestedKey, value: Tensor) -> Tensor:
    """A baseline in the shape, precision and place of the values that it is for."""
    try:
        return made.to(value).expand(value.shape)
    except RuntimeError:
        raise ValueError(
            f"the baseline of {key!r} has shape {list(made.shape)}, which does not fit inputs of shape "
            f"{list(value.shape)}"
        ) from None


def _by_key(baseline: Baseline, keys: tuple[NestedKey, ...]) -> dict[NestedKey, OneBaseline]:
    if not isinstance(baseline, Mapping):
        return dict.fromkeys(keys, baseline)
    named = {unravel_key(key): value for key, value in baseline.items()}
    missing = [key for key in keys if key not in named]
    if missing:
        raise ValueError(f"baselines are given by key, and {', '.join(map(repr, missing))} has none")
    return named
