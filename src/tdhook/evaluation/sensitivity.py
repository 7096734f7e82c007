"""Sensitivity: how much an explanation changes when its input hardly does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

from tdhook.evaluation.explaining import explaining
from tdhook.evaluation.intervals import Figures
from tdhook.evaluation.runs import Method, relevance_of
from tdhook.perturbing.baselines import as_values
from tdhook.perturbing.features import Features
from tdhook.targets import TargetLike

__all__ = ["Radius", "Sensitivity", "sensitivity"]

Radius: TypeAlias = "float | Tensor | Mapping[NestedKey, float | Tensor]"
"""How far each entry of an input is moved at most; a tensor has the shape of one element of the batch."""


@dataclass(frozen=True, eq=False)
class Sensitivity(Figures):
    """How much explanations change under noise.

    Attributes:
        maximum: ``[*batch]``, the largest change among the draws (Yeh et al. 2019, Definition 2).
        average: ``[*batch]``, the mean change over the draws.
        lipschitz: ``[*batch]``, the largest ratio of the change of the explanation to that of the input (Alvarez-Melis
            and Jaakkola 2018, eq. 2).
    """

    maximum: Tensor
    average: Tensor
    lipschitz: Tensor

    def figures(self) -> dict[str, Tensor]:
        """The three, by name."""
        return {"maximum": self.maximum, "average": self.average, "lipschitz": self.lipschitz}

    def to_dict(self) -> dict[str, float]:
        """Means over the batch."""
        return {name: values.mean().item() for name, values in self.figures().items()}


def sensitivity(
    module: nn.Module,
    td: TensorDictBase,
    method: Method,
    *,
    target: TargetLike = None,
    keys: Sequence[NestedKey] | None = None,
    radius: Radius = 0.02,
    draws: int = 10,
    relative: bool = True,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
) -> Sensitivity:
    """Explain inputs with a little noise, and compare the explanations with that of the inputs as they are.

    Noise is uniform in ``[-radius, radius]`` for each entry. What is explained is chosen once, on the inputs as they
    are: where noise changes the action, the explanation is still that of the action before. Changes are Euclidean, over
    all explained inputs together.

    Args:
        module: the model, not explained.
        td: inputs, with any batch shape.
        method: what explains them.
        target: what is explained; by default what ``method`` explains, or the only output there is.
        keys: inputs that get noise and whose relevance is compared; by default all that have relevance.
        radius: how far entries are moved; the features of an observation often have scales of their own, so that a
            tensor does them more justice: ``0.02 * td["observation"].std(0)``.
        draws: how many noisy inputs for each; the maximum grows with them.
        relative: whether changes of the explanation are divided by its norm, so that methods can be compared;
            in the definition they are not. The change of an explanation that is all zero is divided by one.
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained, as in
            :func:`~tdhook.evaluation.perturbation_curve`.
        chunk_size: how many inputs the model sees at once.
        seed: of all random numbers; global ones are left as they are.

    Raises:
        KeyError: a key or its relevance is missing.
        TypeError: an input is not floating-point.
        ValueError: the batch is empty, the radius does not fit, or there is no draw.
    """
    if draws < 1:
        raise ValueError(f"sensitivity is estimated from draws of noise, at least one; got draws={draws}")
    noise = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {"maximum": [], "average": [], "lipschitz": []}
    with explaining(
        module,
        td,
        method,
        target=target,
        keys=keys,
        groups=None,
        attribution_key=attribution_key,
        batch_dims=batch_dims,
        chunk_size=chunk_size,
        seed=seed,
    ) as each:
        assert each.explain is not None
        for part in each.parts():
            rows, features = part.rows, part.features
            before = features.flat(part.relevance).to(torch.float64)
            inputs = features.flat({key: rows.get(key) for key in features.keys})
            reach = reach_of(radius, features, rows)
            units = torch.rand(len(rows), draws, inputs.shape[1], generator=noise, dtype=torch.float64)
            changes, ratios = [], []
            for unit in units.unbind(1):
                moved = inputs + ((2 * unit - 1).to(reach) * reach)
                noisy = rows.copy()
                for key, value in zip(features.keys, moved.split(features.sizes, 1), strict=True):
                    noisy.set(key, value.reshape(rows.get(key).shape).to(rows.get(key).dtype))
                after = features.flat(relevance_of(each.explain(noisy), attribution_key)).to(torch.float64)
                size = before.norm(dim=1) if relative else torch.ones(len(before))
                change = (after - before).norm(dim=1) / torch.where(size == 0, 1.0, size).to(before)
                distance = (moved - inputs).to(torch.float64).norm(dim=1)
                changes.append(change)
                ratios.append(torch.where(distance == 0, 0.0, change / distance))
            together = torch.stack(changes)
            found["maximum"].append(together.amax(0))
            found["average"].append(together.mean(0))
            found["lipschitz"].append(torch.stack(ratios).amax(0))
    return Sensitivity(**{name: each.shaped(parts) for name, parts in found.items()})


def reach_of(radius: Radius, features: Features, rows: TensorDictBase) -> Tensor:
    """How far each entry is moved, ``[entries]``.

    Raises:
        ValueError: a radius is missing or negative, or does not fit.
    """
    if isinstance(radius, Mapping):
        named = {unravel_key(key): value for key, value in radius.items()}
        missing = [key for key in features.keys if key not in named]
        if missing:
            raise ValueError(f"radii are given by key, and {', '.join(map(repr, missing))} has none")
    else:
        named = dict.fromkeys(features.keys, radius)
    parts = []
    for key in features.keys:
        value = rows.get(key)
        one = as_values(named[key]).to(value)
        try:
            parts.append(one.expand(value.shape[1:]).flatten())
        except RuntimeError:
            raise ValueError(
                f"the radius of {key!r} has shape {list(one.shape)}; one element of the batch has "
                f"{list(value.shape[1:])}"
            ) from None
    reach = torch.cat(parts)
    if not bool((reach >= 0).all()):
        raise ValueError("a radius is not negative, and a number")
    return reach
