"""Infidelity: how far relevance is from foretelling what a change of the input does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.conventions import per_value
from tdhook.evaluation.explaining import Explaining, Part, explaining
from tdhook.evaluation.intervals import Figures
from tdhook.evaluation.runs import Method, normal
from tdhook.evaluation.sensitivity import Radius, reach_of
from tdhook.perturbing.baselines import Baseline, Replacements
from tdhook.perturbing.features import Groups
from tdhook.targets import TargetLike

__all__ = ["Infidelity", "infidelity"]


@dataclass(frozen=True, eq=False)
class Infidelity(Figures):
    """How far relevance is from foretelling drops of what is explained.

    Attributes:
        infidelity: ``[*batch]``, the mean square of what is foretold less what happens (Yeh et al. 2019,
            Definition 2.1).
        scaled: ``[*batch]``, the same where each explanation is multiplied by ``scale``.
        scale: ``[*batch]``, the factor for which the mean square is least (there, section 2.2), 0 where nothing is
            foretold.
        unexplained: ``[*batch]``, ``scaled`` as a share of the mean square of the drops, from 0 to 1, which compares
            models whose outputs are of different sizes; 0 where nothing drops.
    """

    infidelity: Tensor
    scaled: Tensor
    scale: Tensor
    unexplained: Tensor

    def figures(self) -> dict[str, Tensor]:
        """All but the factors, which have no mean that says anything."""
        return {"infidelity": self.infidelity, "scaled": self.scaled, "unexplained": self.unexplained}

    def to_dict(self) -> dict[str, float]:
        """Means over the batch."""
        return {name: values.mean().item() for name, values in self.figures().items()}


def infidelity(
    module: nn.Module,
    td: TensorDictBase,
    method: Method | None = None,
    *,
    target: TargetLike = None,
    keys: Sequence[NestedKey] | None = None,
    groups: Groups = None,
    baseline: Baseline | None = 0.0,
    noise: Radius = 0.0,
    share: float = 0.5,
    multiplied: bool = True,
    draws: int = 100,
    data: TensorDictBase | None = None,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
) -> Infidelity:
    """Change inputs, and compare how much the target drops with what relevance says (Yeh et al. 2019).

    A change takes ``I`` from the input: some features, drawn by lot, become their baseline, noise is added to them, or
    both. The drop is ``f(x) - f(x - I)``. What relevance foretells is the sum of ``R I / (x - baseline)``: all of the
    relevance of what is replaced by the baseline, and of what is moved a part of the way, that part. A map that is no
    product with the input, such as a gradient, foretells the sum of ``R I`` (``multiplied=False``).

    Args:
        module: the model, not explained.
        td: inputs, with any batch shape; and their relevance, if there is no ``method``.
        method: what explains them.
        target: what is explained; by default what ``method`` explains, or the only output there is.
        keys: inputs that are changed; by default all that have relevance.
        groups: entries that are one feature, and changed together.
        baseline: what a changed feature is replaced by (:data:`Baseline`); ``None`` keeps it, so that noise alone is
            added, of which relevance foretells its part of the way to zero.
        noise: the standard deviation of normal noise that is added to changed entries; one number, or as the radius of
            :func:`~tdhook.evaluation.sensitivity`.
        share: by what chance a feature is changed.
        multiplied: whether relevance is a product with the input (gradient x input, integrated gradients, LRP): what a
            feature contributes, and not what a unit of it does (a gradient, with its sign).
        draws: how many changes of each input.
        data: what baselines ``"mean"`` and ``"sample"`` are taken of; by default ``td``.
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained, as in
            :func:`~tdhook.evaluation.perturbation_curve`.
        chunk_size: how many inputs the model sees at once.
        seed: of all random numbers; global ones are left as they are.

    Raises:
        KeyError: a key or its relevance is missing.
        TypeError: an input is not floating-point.
        ValueError: the batch is empty, nothing is changed, or the target explains several outputs.
    """
    if draws < 1:
        raise ValueError(
            f"infidelity is estimated from changes of the input, at least one; got draws={draws}"
        )
    if not 0 < share <= 1:
        raise ValueError(
            f"share is the chance of a feature to be changed, above 0 and at most 1; got {share}"
        )
    found: dict[str, list[Tensor]] = {"infidelity": [], "scaled": [], "scale": [], "unexplained": []}
    changes: _Changes | None = None
    with explaining(
        module,
        td,
        method,
        target=target,
        keys=keys,
        groups=groups,
        attribution_key=attribution_key,
        batch_dims=batch_dims,
        chunk_size=chunk_size,
        seed=seed,
    ) as each:
        source = each.data(data)
        for part in each.parts():
            if changes is None:
                reach = reach_of(noise, part.features, part.rows)
                if baseline is None and not bool((reach > 0).any()):
                    raise ValueError("nothing is changed: there is no baseline, and no noise. Give noise=...")
                drawn = torch.Generator().manual_seed(seed + 1)
                given = Replacements(0.0 if baseline is None else baseline, part.features, source, drawn)
                changes = _Changes(each, given, baseline is None, reach, share, multiplied, draws, seed + 2)
            for some in part.split(max(1, chunk_size // draws)):
                for name, values in _figures(*changes(some)).items():
                    found[name].append(values)
    return Infidelity(**{name: each.shaped(parts) for name, parts in found.items()})


class _Changes:
    """Changes of inputs, drawn for one row after the other.

    Args:
        each: what is asked of the model.
        origins: what relevance is of a difference from.
        kept: whether changed features keep their values but for noise.
        reach: standard deviations of noise, ``[entries]``.
        share: by what chance a feature is changed.
        multiplied: whether relevance is a product with the input.
        draws: how many changes of each row.
        seed: of what is drawn.
    """

    def __init__(
        self,
        each: Explaining,
        origins: Replacements,
        kept: bool,
        reach: Tensor,
        share: float,
        multiplied: bool,
        draws: int,
        seed: int,
    ) -> None:
        self._each, self._origins, self._kept = each, origins, kept
        self._reach, self._noisy = reach, bool((reach > 0).any())
        self._share, self._multiplied, self._draws = share, multiplied, draws
        self._lots, self._steps = (torch.Generator().manual_seed(seed + place) for place in (0, 1))

    def __call__(self, some: Part) -> tuple[Tensor, Tensor]:
        """What relevance foretells for some rows, and what happens, ``[rows, draws]``."""
        features, each = some.features, self._each
        before = features.flat({key: some.rows.get(key) for key in features.keys})[:, None]
        origin = features.flat(self._origins(some.rows))[:, None]
        slope = features.flat(some.relevance).to(torch.float64)[:, None]
        whole, rows = each.values(some.rows)[:, None], len(before)
        told, dropped = [], []
        for copies in torch.arange(self._draws).split(max(1, each.chunk_size // rows)):
            after = self._after(some, before, before if self._kept else origin, len(copies))
            taken = (before - after).to(torch.float64)
            if self._multiplied:
                taken = per_value((before - origin).to(torch.float64), taken)
            told.append((taken * slope).sum(-1))
            changed = each.copies(some.rows, len(copies))
            parts = after.flatten(0, 1).split(features.sizes, 1)
            for key, x in zip(features.keys, parts, strict=True):
                like = some.rows.get(key)
                changed.set(key, x.reshape(len(x), *like.shape[1:]).to(like.dtype))
            dropped.append(whole - each.values(changed).reshape(rows, -1))
        return torch.cat(told, 1), torch.cat(dropped, 1)

    def _after(self, some: Part, before: Tensor, moved: Tensor, copies: int) -> Tensor:
        """Changed copies of some rows in one line, ``[rows, copies, entries]``."""
        rows, features = len(before), some.features
        drawn = torch.rand(rows, copies, features.count, generator=self._lots, dtype=torch.float64)
        entries = features.entries((drawn < self._share).flatten(0, 1))
        chosen = features.flat(entries).unflatten(0, (rows, copies)).to(before.device)
        if self._noisy:
            moved = moved + self._reach * normal(chosen.shape, self._steps).to(self._reach)
        return torch.where(chosen, moved, before)


def _figures(told: Tensor, drop: Tensor) -> dict[str, Tensor]:
    """What is foretold, and what happens, ``[rows, draws]``: figures of each row."""
    scale = per_value(told.square().mean(1), (told * drop).mean(1))
    scaled = (scale[:, None] * told - drop).square().mean(1)
    unexplained = per_value(drop.square().mean(1), scaled)
    return {
        "infidelity": (told - drop).square().mean(1),
        "scaled": scaled,
        "scale": scale,
        "unexplained": unexplained.clamp(max=1.0),
    }
