"""The methods of the table. To add one is a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.faithfulness.methods import FLOOR
from benchmarks.faithfulness.subjects import Subject
from tdhook import LRP
from tdhook.attribution import Gradient, GradientTimesInput, IntegratedGradients
from tdhook.contexts.attribution import Attribution
from tdhook.evaluation import Baseline, RandomMap

__all__ = ["CHANCE", "METHODS", "Tried", "reference"]

CHANCE = "random map"
"""What every other method is compared with."""


@dataclass(frozen=True)
class Tried:
    """A method of the table.

    Attributes:
        make: given a subject, the method; none where it cannot explain such a thing.
        multiplied: whether its relevance is a product with the input, or the difference from a baseline.
    """

    make: Callable[[Subject], Attribution | None]
    multiplied: bool = True


def reference(subject: Subject) -> tuple[str, Baseline]:
    """What methods compare with and features are replaced by, and its name: one that inputs could nearly have."""
    known = subject.metrics
    name = next(each for each in ("mask", "blur", "mean", "zero") if each in known)
    return name, known[name]


def _lrp(preset: str, against: bool = False) -> Tried:
    def make(subject: Subject) -> Attribution:
        baseline = reference(subject)[1] if against else None
        return LRP(
            preset, target=subject.target, baseline=baseline, attribute=subject.keys, on_unmatched="ignore"
        )

    return Tried(make)


METHODS: Mapping[str, Tried] = {
    "gradient": Tried(lambda of: Gradient(of.target, attribute=of.keys), multiplied=False),
    FLOOR: Tried(lambda of: GradientTimesInput(of.target, attribute=of.keys)),
    "integrated gradients": Tried(
        lambda of: IntegratedGradients(of.target, baseline=reference(of)[1], steps=32, attribute=of.keys)
    ),
    "epsilon": _lrp("epsilon"),
    "epsilon_plus": _lrp("epsilon_plus"),
    "epsilon_alpha2_beta1": _lrp("epsilon_alpha2_beta1"),
    "excitation_backprop": _lrp("excitation_backprop"),
    "guided_backprop": _lrp("guided_backprop"),
    "deconvnet": _lrp("deconvnet"),
    "attn_lrp": _lrp("attn_lrp"),
    "deeplift": _lrp("deeplift", against=True),
    "deeplift_reveal_cancel": _lrp("deeplift_reveal_cancel", against=True),
    "deeplift_shapley": _lrp("deeplift_shapley", against=True),
    CHANCE: Tried(lambda of: RandomMap(of.target, attribute=of.keys)),
}
"""By name: those that the table compares, in its order."""
