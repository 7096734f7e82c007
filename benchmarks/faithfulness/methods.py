"""The methods that are compared: presets without a reference and with, gradients, removal of features, chance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from benchmarks.faithfulness.games import (
    EXACT,
    EXACT_OF_SEVERAL,
    Game,
    all_coalitions,
    occlusions,
    permutations,
)
from benchmarks.faithfulness.subjects import Subject
from tdhook import LRP, preset
from tdhook.attribution.integrated_gradients import IntegratedGradients
from tdhook.attribution.kernel_shap import KernelShap
from tdhook.contexts.attribution import Attribution
from tdhook.evaluation import Gradient, GradientTimesInput
from tdhook.evaluation.runs import quiet
from tdhook.models.families import Convolution, Linear
from tdhook.passes.questions import asked
from tdhook.perturbing.features import Features
from tdhook.perturbing.references import References
from tdhook.relevance.composites.composite import Composite
from tdhook.rules import EpsilonRule, GammaRule

__all__ = ["FEW_COALITIONS", "FLOOR", "SAMPLES", "Maps", "Method", "composite", "methods"]

SAMPLES = 8
"""How many references are drawn where a method has drawn ones."""
_WAY = {
    1: "gradient halfway x difference",
    3: "integrated gradients, 3 steps",
    32: "integrated gradients, 32 steps",
}
"""By how many gradients it takes: those of several references share them."""
FEW = 4
"""Coalitions for each feature, where few are asked for."""
FEW_COALITIONS = f"Kernel SHAP, {FEW} coalitions a feature"
FLOOR = "gradient x input"
"""What the cost of a method is told in."""

_OF_DIFFERENCES = ("deeplift", "deeplift_reveal_cancel", "deeplift_shapley")
"""Presets that are for an explanation against a reference."""

Maps = Mapping[NestedKey, Tensor]
"""Relevance by key."""


@dataclass(frozen=True)
class Method:
    """A way to explain a subject.

    Attributes:
        name: of the method.
        baseline: the name of what it compares with, if it does.
        explain: given inputs and a seed, relevance.
        family: ``"lrp"``, ``"gradient"``, ``"removal"`` or ``"chance"``.
    """

    name: str
    baseline: str | None
    explain: Callable[[TensorDictBase, int], Maps]
    family: str

    @property
    def label(self) -> str:
        """The name, and what is compared with."""
        if self.baseline is None:
            return self.name
        many = f"{SAMPLES} samples" if self.baseline == "sample" else self.baseline
        return f"{self.name}, against {many}"


def composite(name: str) -> Composite:
    """A preset, or one of those that are tried here."""
    if name == "gamma":
        return Composite([(Linear, GammaRule(0.25))])
    if name == "gamma on convolutions":
        return Composite([(Convolution, GammaRule(0.25)), (Linear, EpsilonRule(0.0))])
    return preset(name)


def methods(subject: Subject) -> Iterator[Method]:
    """All that are tried on a subject."""
    for name in subject.presets:
        yield _attribution(
            subject,
            name,
            LRP(composite(name), target=subject.target, on_unmatched="ignore", attribute=subject.keys),
        )
    for name in (*_OF_DIFFERENCES, *(name for name in subject.presets if name != "epsilon")):
        for baseline in subject.baselines:
            yield Method(name, baseline, _against(subject, name, baseline), "lrp")
    yield _attribution(subject, "gradient", Gradient(subject.target, attribute=subject.keys), "gradient")
    yield _attribution(subject, FLOOR, GradientTimesInput(subject.target, attribute=subject.keys), "gradient")
    for steps in subject.paths:
        for baseline in subject.baselines:
            if baseline == "sample" and steps == 3:
                continue  # the same as one step for each sample
            yield Method(_WAY[steps], baseline, _integrated(subject, baseline, steps), "gradient")
    if subject.judged:
        for kind in ("occlusion", "Shapley values"):
            for baseline in subject.baselines:
                yield Method(kind, baseline, _played(subject, baseline, kind), "removal")
        for baseline in subject.baselines if subject.kind == "vector" else ():
            if baseline != "sample":
                yield _attribution(
                    subject, FEW_COALITIONS, _asked_little(subject, baseline), "removal", baseline
                )
    yield Method("random", None, lambda td, seed: _random(subject, td, seed), "chance")


def references(
    subject: Subject, baseline: str, td: TensorDictBase, seed: int
) -> list[dict[NestedKey, Tensor]]:
    """The references that a name stands for, as :class:`LRP` draws them."""
    values = {key: td.get(key) for key in subject.keys}
    drawn = _references(subject, baseline, seed).of(values, dict.fromkeys(values, td.batch_dims), td)
    return [one.replaced for one in drawn]


def _references(subject: Subject, baseline: str, seed: int) -> References:
    samples = SAMPLES if baseline == "sample" else 1
    return References(subject.baselines[baseline], samples, seed=seed)


def _attribution(
    subject: Subject, name: str, method: Attribution, family: str = "lrp", baseline: str | None = None
) -> Method:
    explained = method.wrap(subject.model)
    return Method(name, baseline, lambda td, seed: _maps(subject, explained(td.clone())), family)


def _maps(subject: Subject, explained: TensorDictBase) -> Maps:
    return {key: explained.get(("attr", *((key,) if isinstance(key, str) else key))) for key in subject.keys}


def _against(subject: Subject, name: str, baseline: str) -> Callable[[TensorDictBase, int], Maps]:
    made = {}

    def explain(td: TensorDictBase, seed: int) -> Maps:
        if seed not in made:
            made.clear()
            method = LRP(
                composite(name),
                target=subject.target,
                baseline=_references(subject, baseline, seed),
                on_unmatched="ignore",
                attribute=subject.keys,
            )
            made[seed] = method.wrap(subject.model)
        return _maps(subject, made[seed](td.clone()))

    return explain


def _integrated(subject: Subject, baseline: str, steps: int) -> Callable[[TensorDictBase, int], Maps]:
    def explain(td: TensorDictBase, seed: int) -> Maps:
        total: dict[NestedKey, Tensor] = {}
        drawn = references(subject, baseline, td, seed)
        each = max(1, steps // len(drawn))
        for one in drawn:
            start = {key: (lambda _, x=x: x) for key, x in one.items()}
            method = IntegratedGradients(subject.target, baseline=start, steps=each, attribute=subject.keys)
            found = _maps(subject, method.wrap(subject.model)(td.clone()))
            total = {key: total.get(key, 0.0) + x / len(drawn) for key, x in found.items()}
        return total

    return explain


def _played(subject: Subject, baseline: str, kind: str) -> Callable[[TensorDictBase, int], Maps]:
    def explain(td: TensorDictBase, seed: int) -> Maps:
        with quiet(subject.model, seed):
            question, rows = asked(subject.model, td, subject.target, td.batch_dims, 4096)
            features = Features.of(rows, list(subject.keys), subject.groups)
            game, count = Game(question, rows, features), features.count
            drawn = references(subject, baseline, td, seed)
            if kind == "occlusion":
                coalitions = [occlusions(count)] * len(drawn)
            elif count <= (EXACT if len(drawn) == 1 else EXACT_OF_SEVERAL):
                coalitions = [all_coalitions(count)] * len(drawn)
            else:
                chance = torch.Generator().manual_seed(seed)
                each = max(2, subject.permutations // len(drawn))
                coalitions = [permutations(count, each, chance) for _ in drawn]
            return game.as_relevance(game.shares(coalitions, drawn))

    return explain


def _asked_little(subject: Subject, baseline: str) -> KernelShap:
    count = Features.of(subject.draw(0), list(subject.keys), subject.groups).count
    return KernelShap(
        subject.target,
        coalitions=FEW * count,
        baseline=subject.baselines[baseline],
        features=subject.groups,
        attribute=subject.keys,
    )


def _random(subject: Subject, td: TensorDictBase, seed: int) -> Maps:
    chance = torch.Generator().manual_seed(seed)
    return {key: torch.rand(td.get(key).shape, generator=chance) for key in subject.keys}
