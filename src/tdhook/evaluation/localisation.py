"""Localisation: whether relevance lies where what matters is known to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from tdhook.evaluation.explaining import given_relevance
from tdhook.evaluation.intervals import Figures
from tdhook.evaluation.similarity import leading
from tdhook.passes.rows import rows_of, shaped_like

__all__ = ["Localisation", "Masks", "localisation"]

Masks: TypeAlias = "Tensor | Mapping[NestedKey, Tensor] | TensorDictBase"
"""Truth values that are true where relevance belongs.

One for all elements, of the shape of one (by key, where there are several inputs); or a TensorDict ``[*batch]`` with
one for each element, under the keys of the inputs. An axis that a mask lacks, or in which it has size one, such as that
of the channels of a picture, is one whose relevance is added up.
"""


@dataclass(frozen=True, eq=False)
class Localisation(Figures):
    """How much of the relevance lies in the masks.

    Attributes:
        pointing: ``[*batch]``, 1 where the most relevant place is in the mask, else 0 (Zhang et al. 2018).
        mass: ``[*batch]``, the share of the relevance that is in the mask (Arras et al. 2022, relevance mass accuracy).
        rank: ``[*batch]``, the share of the mask that is among the most relevant places, of which as many are taken as
            the mask has (Arras et al. 2022, relevance rank accuracy).
        share: ``[*batch]``, the share of the places that are in the mask: what a map that knows nothing has.
    """

    pointing: Tensor
    mass: Tensor
    rank: Tensor
    share: Tensor

    def figures(self) -> dict[str, Tensor]:
        """The four, by name."""
        return {"pointing": self.pointing, "mass": self.mass, "rank": self.rank, "share": self.share}

    def to_dict(self) -> dict[str, float]:
        """Means over the batch."""
        return {name: values.mean().item() for name, values in self.figures().items()}


def localisation(
    explained: TensorDictBase,
    masks: Masks,
    *,
    keys: Sequence[NestedKey] | None = None,
    absolute: bool = False,
    tolerance: float = 0.0,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
) -> Localisation:
    """Compare relevance with masks of what matters: the ball and the paddle of a game, an object in a picture.

    What speaks against an output has no share of the mass: it counts positive relevance, after channels are added up.
    Where several places are equally relevant, figures are what lots among these would give on average, so that a map
    that is the same everywhere has the score of one that knows nothing. One that has no positive relevance has no mass
    in the mask.

    Args:
        explained: with relevance, of any batch shape.
        masks: where relevance belongs (:data:`Masks`).
        keys: inputs whose relevance is looked at; by default all that have some.
        absolute: whether the size of relevance counts, whatever its sign.
        tolerance: how far from the mask the most relevant place may be, in pixels; 15 in the paper of the pointing
            game, whose pictures have a few hundred in each direction. What is no picture has none.
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained; by default all.

    Raises:
        KeyError: a key or its relevance is missing.
        TypeError: a mask has no truth values.
        ValueError: the batch is empty, masks do not fit, or one of them has nothing in it.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance is a distance in pixels, 0 or more; got {tolerance}")
    part, axes = given_relevance(
        explained, keys=keys, groups=None, attribution_key=attribution_key, batch_dims=batch_dims
    )
    given = _by_key(masks, part.features.keys, explained, axes)
    values, inside, near = [], [], []
    for key in part.features.keys:
        relevance = part.rows.get(key).to(torch.float64)
        mask = _fitting(given[key], key, relevance)
        added = relevance.sum_to_size(len(relevance), *mask.shape[1:])
        values.append(added.reshape(len(added), -1))
        inside.append(mask.expand(added.shape).reshape(len(added), -1))
        near.append(_grown(mask, tolerance, key).expand(added.shape).reshape(len(added), -1))
    value, within, close = (torch.cat(parts, 1) for parts in (values, inside, near))
    size = within.sum(1)
    if not bool((size > 0).all()):
        raise ValueError(
            f"the masks of {int((size == 0).sum())} of {len(size)} elements have nothing in them, where nothing can be "
            "found: leave these elements out"
        )
    value = value.abs() if absolute else value
    found = Localisation(
        pointing=(leading(value, torch.ones_like(size)) * close).sum(1),
        mass=_mass(value.clamp(min=0), within),
        rank=(leading(value, size) * within).sum(1) / size,
        share=within.to(torch.float64).mean(1),
    )
    return Localisation(
        **{name: shaped_like(each.cpu(), explained, axes) for name, each in found.figures().items()}
    )


def _mass(value: Tensor, within: Tensor) -> Tensor:
    # Scaled first: sums of very small or large relevance leave the range.
    value = value / value.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    total = value.sum(1)
    return torch.where(total == 0, 0.0, (value * within).sum(1) / total)


def _by_key(
    masks: Masks, keys: Sequence[NestedKey], td: TensorDictBase, axes: int
) -> dict[NestedKey, Tensor]:
    """Masks by key, ``[rows or 1, *shape]``."""
    if isinstance(masks, TensorDictBase):
        if masks.batch_size != td.batch_size:
            raise ValueError(
                f"masks of each element have the batch size of what is explained, {list(td.batch_size)}, and not "
                f"{list(masks.batch_size)}; one for all is given as a tensor, or as a dict of these by key"
            )
        rows = rows_of(masks, axes)
        named = {unravel_key(key): rows.get(key) for key in masks.keys(True, True)}
    elif isinstance(masks, Mapping):
        named = {unravel_key(key): mask.unsqueeze(0) for key, mask in masks.items()}
    else:
        if len(keys) != 1:
            raise ValueError(
                f"a mask is given for one input, and there are {', '.join(map(repr, keys))}: give masks by key"
            )
        named = {keys[0]: masks.unsqueeze(0)}
    missing = [key for key in keys if key not in named]
    if missing:
        raise ValueError(
            f"{', '.join(map(repr, missing))} has relevance and no mask: give one that is all false where no relevance "
            "belongs, or leave the input out, keys=..."
        )
    return named


def _fitting(mask: Tensor, key: NestedKey, relevance: Tensor) -> Tensor:
    """``[rows or 1, *shape]`` with as many axes as relevance has, of size one where relevance is added up."""
    if mask.dtype is not torch.bool:
        raise TypeError(f"the mask of {key!r} has {mask.dtype}: give truth values, as in mask > 0")
    mask = mask.to(relevance.device)
    lacking = relevance.dim() - mask.dim()
    if lacking > 0:
        mask = mask.reshape(len(mask), *(1,) * lacking, *mask.shape[1:])
    fits = lacking >= 0 and all(a in (1, b) for a, b in zip(mask.shape[1:], relevance.shape[1:], strict=True))
    if not fits:
        raise ValueError(
            f"the mask of {key!r} has shape {list(mask.shape[1:])}; one element of the batch has "
            f"{list(relevance.shape[1:])}"
        )
    return mask


def _grown(mask: Tensor, tolerance: float, key: NestedKey) -> Tensor:
    """The mask, and all pixels that are at most so far from one of it."""
    if tolerance < 1:
        return mask
    if mask.dim() < 3:
        raise ValueError(
            f"tolerance is in pixels, and {key!r} is no picture [..., height, width]: one element of its mask has "
            f"shape {list(mask.shape[1:])}"
        )
    reach = int(tolerance)
    offsets = torch.arange(-reach, reach + 1, device=mask.device, dtype=torch.float32)
    disc = (offsets[:, None] ** 2 + offsets**2 <= tolerance**2).to(torch.float32)
    pictures = mask.reshape(-1, 1, *mask.shape[-2:]).to(torch.float32)
    return (F.conv2d(pictures, disc[None, None], padding=reach) > 0.5).reshape(mask.shape)
