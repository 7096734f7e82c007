"""The measures of the table. To add one is a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from benchmarks.faithfulness.subjects import Subject
from benchmarks.methods.methods import reference
from tdhook.contexts.attribution import Attribution
from tdhook.evaluation import (
    complexity,
    infidelity,
    localisation,
    perturbation_curve,
    randomisation,
    road,
    sensitivity,
    sensitivity_n,
)

__all__ = ["AT_ONCE", "MEASURES", "Case", "Measured"]

AT_ONCE = 4096
"""How many inputs a model sees at once."""


@dataclass(frozen=True)
class Case:
    """A method on some inputs of a subject.

    Attributes:
        subject: what is explained.
        method: by what.
        multiplied: whether its relevance is a product with the input.
        explained: the inputs, with their relevance.
        seed: of what is drawn.
    """

    subject: Subject
    method: Attribution
    multiplied: bool
    explained: TensorDictBase
    seed: int

    @property
    def asked(self) -> dict[str, Any]:
        """What all measures are told."""
        return {
            "target": self.subject.target,
            "keys": list(self.subject.keys),
            "chunk_size": AT_ONCE,
            "seed": self.seed,
        }

    @property
    def replaced(self) -> dict[str, Any]:
        """What those are told that replace features."""
        return {**self.asked, "groups": self.subject.groups, "baseline": reference(self.subject)[1]}


@dataclass(frozen=True)
class Measured:
    """A measure of the table.

    Attributes:
        figure: of each input, ``[rows]``; none where the subject is nothing for it.
        best: whether large figures are good.
        faithful: whether it tells how right a map is; else what else there is to say of it.
        told: what it is, in words.
    """

    figure: Callable[[Case], Tensor | None]
    best: bool
    faithful: bool
    told: str


def _between(case: Case) -> Tensor:
    curves = perturbation_curve(case.subject.model, case.explained, steps=case.subject.steps, **case.replaced)
    return curves.figures()["between"]


def _between_samples(case: Case) -> Tensor | None:
    if "sample" not in case.subject.metrics:
        return None
    options = {**case.replaced, "baseline": "sample"}
    curves = perturbation_curve(case.subject.model, case.explained, steps=case.subject.steps, **options)
    return curves.figures()["between"]


def _road(case: Case) -> Tensor | None:
    if case.subject.kind != "pixels":
        return None
    options = {**case.asked, "groups": case.subject.groups}
    return road(case.subject.model, case.explained, steps=5, **options).figures()["between"]


def _sums(case: Case) -> Tensor:
    return sensitivity_n(case.subject.model, case.explained, subsets=30, **case.replaced).correlation.mean(-1)


def _unexplained(case: Case) -> Tensor:
    found = infidelity(
        case.subject.model, case.explained, multiplied=case.multiplied, draws=50, **case.replaced
    )
    return found.unexplained


def _located(case: Case) -> Tensor | None:
    truth = case.explained.get("truth", None)
    if truth is None:
        return None
    return localisation(case.explained, truth, keys=list(case.subject.keys), absolute=True).mass


def _noise(case: Case) -> Tensor:
    radius: dict[NestedKey, Tensor] = {
        key: 0.05 * case.explained.get(key).std(0) for key in case.subject.keys
    }
    td = case.explained.exclude("attr")
    return sensitivity(case.subject.model, td, case.method, radius=radius, draws=5, **case.asked).maximum


def _randomised(case: Case) -> Tensor:
    td = case.explained.exclude("attr")
    found = randomisation(case.subject.model, td, case.method, **case.asked)
    return found.similarity["spearman"][..., -1].abs()


def _sparse(case: Case) -> Tensor:
    return complexity(case.explained, keys=list(case.subject.keys), groups=case.subject.groups).sparseness


MEASURES: Mapping[str, Measured] = {
    "curves": Measured(
        _between, True, True, "the area between perturbation curves; features become the reference"
    ),
    "curves, samples": Measured(
        _between_samples, True, True, "the same, where features become those of other inputs"
    ),
    "ROAD": Measured(
        _road, True, True, "the same for pictures, where features are imputed from what is around them"
    ),
    "sums": Measured(_sums, True, True, "the correlation of sensitivity-n, mean over sizes of subsets"),
    "unexplained": Measured(
        _unexplained, False, True, "infidelity, scaled, as a share of the mean square of the drops"
    ),
    "located": Measured(
        _located,
        True,
        True,
        "the share of relevance, by size, at the steps or words that the answer is told by",
    ),
    "noise": Measured(
        _noise,
        False,
        False,
        "the largest relative change of relevance under noise of 5 % of the standard deviation",
    ),
    "randomised": Measured(
        _randomised,
        False,
        False,
        "the size of the rank correlation with the explanation of a randomised model",
    ),
    "sparse": Measured(_sparse, True, False, "the Gini index of the sizes of relevance"),
}
"""By name, in the order of the table's columns."""
