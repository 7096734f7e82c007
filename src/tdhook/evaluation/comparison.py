"""One table of several methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from tensordict import TensorDictBase
from torch import nn

from tdhook.evaluation.perturbation import perturbation_curve
from tdhook.evaluation.randomisation import randomisation
from tdhook.evaluation.runs import Method
from tdhook.evaluation.sensitivity import Radius, sensitivity
from tdhook.perturbing.baselines import Baseline
from tdhook.perturbing.features import Groups
from tdhook.targets import TargetLike

__all__ = ["Metric", "as_markdown", "compare"]

Metric: TypeAlias = "Callable[[Method], float]"
"""A figure for one method."""


def compare(
    methods: Mapping[str, Method],
    module: nn.Module,
    td: TensorDictBase,
    *,
    target: TargetLike = None,
    groups: Groups = None,
    baseline: Baseline = 0.0,
    radius: Radius = 0.02,
    draws: int = 10,
    models: int = 5,
    steps: int | None = None,
    batch_dims: int | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
    further: Mapping[str, Metric] | None = None,
) -> list[dict[str, object]]:
    """Measure several methods on the same inputs.

    Args:
        methods: by name. Figures say little by themselves: have :class:`~tdhook.evaluation.Gradient`,
            :class:`~tdhook.evaluation.GradientTimesInput` and :class:`~tdhook.evaluation.RandomMap` among them.
        module: the model, not explained.
        td: inputs, with any batch shape.
        target: what is explained; by default what each method explains.
        groups: features that are replaced together.
        baseline: what a feature is replaced by.
        radius: of the noise of sensitivity.
        draws: of noise, for each input.
        models: how many randomised models explanations are compared with.
        steps: of the curves.
        batch_dims: how many batch axes tell apart what is explained, as in
            :func:`~tdhook.evaluation.perturbation_curve`.
        chunk_size: how many inputs the model sees at once.
        seed: of all random numbers.
        further: more figures, by name: functions of the method.

    Returns:
        A row for each method: ``"method"``; ``"most first"``, ``"least first"`` and ``"between"``, areas of
        :func:`~tdhook.evaluation.perturbation_curve`; ``"sensitivity"``, the mean over inputs of the largest relative
        change under noise; ``"randomised"``, Spearman's rank correlation with the explanation of models all of whose
        layers are randomised; and the further ones.

    Raises:
        ValueError: there are no models to compare with, and what the measures raise.
    """
    common: dict[str, Any] = {
        "target": target,
        "batch_dims": batch_dims,
        "chunk_size": chunk_size,
        "seed": seed,
    }
    if models < 1:
        raise ValueError(
            f"explanations are compared with those of randomised models, at least one; got {models}"
        )
    rows = []
    for name, method in methods.items():
        curves = perturbation_curve(
            module, td, method, groups=groups, baseline=baseline, steps=steps, **common
        )
        noisy = sensitivity(module, td, method, radius=radius, draws=draws, **common)
        alike = [
            randomisation(module, td, method, **{**common, "seed": seed + i * 1000}).mean()[-1].item()
            for i in range(models)
        ]
        rows.append(
            {
                "method": name,
                "most first": curves.most.area,
                "least first": curves.least.area,
                "between": curves.between,
                "sensitivity": noisy.to_dict()["maximum"],
                "randomised": sum(alike) / models,
                **{label: metric(method) for label, metric in (further or {}).items()},
            }
        )
    return rows


def as_markdown(rows: Sequence[Mapping[str, object]], digits: int = 2) -> str:
    """Rows as a table in Markdown.

    Args:
        rows: all with the same columns.
        digits: after the point.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("a table has at least one row")
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = [f"{x:.{digits}f}" if isinstance(x, float) else str(x) for x in (row[c] for c in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
