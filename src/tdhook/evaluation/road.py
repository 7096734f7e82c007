"""ROAD: curves whose replaced pixels do not give away which ones were replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from tdhook.evaluation.curves import PerturbationCurves
from tdhook.evaluation.imputation import imputed
from tdhook.evaluation.measures import Measure
from tdhook.evaluation.perturbation import Change, Plan, Replacing, least_first, most_first
from tdhook.evaluation.runs import Method, normal
from tdhook.perturbing.features import Features, Groups, along
from tdhook.targets import TargetLike

__all__ = ["road"]


def road(
    module: nn.Module,
    td: TensorDictBase,
    method: Method | None = None,
    *,
    target: TargetLike = None,
    keys: Sequence[NestedKey] | None = None,
    groups: Groups = None,
    noise: float = 0.01,
    measure: Measure = "target",
    steps: int | None = 10,
    absolute: bool = False,
    attribution_key: NestedKey = "attr",
    batch_dims: int | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
) -> PerturbationCurves:
    """Remove and debias (Rong et al. 2022): perturbation curves for pictures, by noisy linear imputation.

    A pixel that is set to zero says by its colour that it was removed, and the shape of what was removed tells the
    model of the class. Here it becomes the weighted mean of its neighbours (:func:`~tdhook.evaluation.imputed`) and a
    little noise. The paper's figure is the accuracy along both curves: ``measure="agreement"``.

    Args:
        module: the model, not explained.
        td: inputs, with any batch shape; and their relevance, if there is no ``method``.
        method: what explains them.
        target: what is explained; by default what ``method`` explains, or the only output there is.
        keys: pictures ``[..., height, width]`` whose pixels are removed; by default all that have relevance.
        groups: entries that are removed together, by default a pixel in all channels, ordered by the mean of their
            relevance.
        noise: the standard deviation of what is added to imputed pixels, in units of the pictures.
        measure: what is measured, as in :func:`~tdhook.evaluation.perturbation_curve`.
        steps: how many.
        absolute: whether features are ordered by the size of their relevance, whatever its sign.
        attribution_key: where relevance is.
        batch_dims: how many batch axes tell apart what is explained, as in
            :func:`~tdhook.evaluation.perturbation_curve`.
        chunk_size: how many inputs the model sees at once.
        seed: of all random numbers; global ones are left as they are.

    Returns:
        ``most`` and ``least``: the most, or the least relevant pixels are removed first. At their end nothing is left,
        and a picture is grey.

    Raises:
        KeyError: a key or its relevance is missing.
        TypeError: an input is not floating-point.
        ValueError: an input is no picture, the batch is empty, or the target explains several outputs.
    """
    if not noise >= 0:
        raise ValueError(f"noise is a standard deviation, 0 or more; got {noise}")
    plan = Plan(
        module,
        td,
        method,
        target,
        keys,
        _pixels if groups is None else groups,
        measure,
        steps,
        absolute,
        attribution_key,
        batch_dims,
        chunk_size,
    )
    wanted = [(most_first, _imputing(noise)), (least_first, _imputing(noise))]
    return PerturbationCurves(*plan.curves(wanted, None, seed))


def _pixels(shapes: Mapping[NestedKey, torch.Size]) -> dict[NestedKey, Tensor]:
    """A feature for each pixel, with all of its channels."""
    for key, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(
                f"pixels are imputed from their neighbours, and {key!r} is no picture [..., height, width]: one "
                f"element of it has shape {list(shape)}. Name the pictures, keys=..., or use perturbation_curve"
            )
    return {key: along(shape, len(shape) - 2, len(shape) - 1) for key, shape in shapes.items()}


def _imputing(noise: float) -> Replacing:
    def prepare(features: Features, source: TensorDictBase, seed: int) -> Callable[[TensorDictBase], Change]:
        chance = torch.Generator().manual_seed(seed)

        def of(rows: TensorDictBase) -> Change:
            # One draw for each pixel, whichever other ones are removed with it.
            added = {key: noise * normal(rows.get(key).shape, chance) for key in features.keys}

            def change(inputs: TensorDictBase, chosen: Tensor) -> TensorDictBase:
                changed = inputs.copy()
                for key, where in features.entries(chosen).items():
                    x = inputs.get(key)
                    removed = where.reshape(x.shape)
                    filled = imputed(x.flatten(0, -3), removed.flatten(0, -3)).reshape(x.shape)
                    copies = len(inputs) // len(rows)
                    filled = filled + added[key].to(x.device).repeat(copies, *(1,) * (x.dim() - 1))
                    changed.set(key, torch.where(removed, filled.to(x.dtype), x))
                return changed

            return change

        return of

    return prepare
