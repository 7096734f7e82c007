"""The methods of the table. To add one is a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.faithfulness.methods import FLOOR
from benchmarks.faithfulness.subjects import Subject
from tdhook import LRP
from tdhook.attribution import Gradient, GradientTimesInput, IntegratedGradients
from tdhook.attribution.ablation import Ablation
from tdhook.attribution.activation_maps import ActivationMap
from tdhook.attribution.averaged import Averaged
from tdhook.attribution.blur import BlurIntegratedGradients
from tdhook.attribution.cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from tdhook.attribution.expected_gradients import ExpectedGradients
from tdhook.attribution.guided import GuidedBackprop
from tdhook.attribution.kernel_shap import KernelShap
from tdhook.attribution.product import Product
from tdhook.attribution.rise import RISE
from tdhook.attribution.saliency import PerturbationSaliency
from tdhook.attribution.sarfa import SARFA
from tdhook.attribution.shapley import Shapley
from tdhook.attribution.shapley_sampling import ShapleySampling
from tdhook.contexts.attribution import Attribution
from tdhook.evaluation import Baseline, RandomMap
from tdhook.perturbing.draws import Noise
from tdhook.perturbing.features import Features
from tdhook.targets import Advantage, Target

__all__ = ["CHANCE", "METHODS", "Tried", "reference"]

CHANCE = "random map"
"""What every other method is compared with."""

_ORDERS = 8
_MOST = 12
"""Of features, of which all coalitions are asked for."""


@dataclass(frozen=True)
class Tried:
    """A method of the table.

    Attributes:
        make: given a subject, the method; none where it cannot explain such a thing.
        multiplied: whether its relevance is what an entry is worth, as a product with the input is, and not what a unit
            of it is.
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


def _played(subject: Subject) -> dict[str, Any]:
    return {
        "features": subject.groups,
        "baseline": reference(subject)[1],
        "attribute": subject.keys,
    }


def _from_a_blur(subject: Subject) -> Attribution | None:
    if subject.kind != "pixels":
        return None
    return BlurIntegratedGradients(subject.target, attribute=subject.keys)


def _count(subject: Subject) -> int:
    """How many features there are."""
    return Features.of(subject.draw(0), list(subject.keys), subject.groups).count


def _exactly(subject: Subject) -> Attribution | None:
    return Shapley(subject.target, **_played(subject)) if _count(subject) <= _MOST else None


def _by_kernel(subject: Subject) -> Attribution:
    """About as many variants as orders of features take."""
    return KernelShap(subject.target, coalitions=_ORDERS * max(2, _count(subject)), **_played(subject))


def _spotted(method: type[PerturbationSaliency | RISE]) -> Tried:
    def make(subject: Subject) -> Attribution | None:
        return method(subject.target, attribute=subject.keys) if subject.kind == "pixels" else None

    return Tried(make)


def _of_actions(subject: Subject) -> Attribution | None:
    """Of policies of pictures, where one action of several is asked about."""
    one = isinstance(subject.target, Target | Advantage) and subject.target.index is not None
    return SARFA(subject.target, attribute=subject.keys) if one and subject.kind == "pixels" else None


def _last_convolution(subject: Subject) -> str:
    """The path of the last convolution, or of the ReLU behind it."""
    paths = [name for name, each in subject.model.named_modules() if isinstance(each, nn.Conv2d | nn.ReLU)]
    last = max(i for i, path in enumerate(paths) if isinstance(subject.model.get_submodule(path), nn.Conv2d))
    behind = paths[last + 1 : last + 2]
    beside = [path for path in behind if path.rpartition(".")[0] == paths[last].rpartition(".")[0]]
    return beside[0] if beside else paths[last]


def _of_layer(method: type[ActivationMap]) -> Tried:
    """An activation map of the last convolution, after its ReLU; of pictures alone."""

    def make(subject: Subject) -> Attribution | None:
        if subject.kind != "pixels":
            return None
        return method(_last_convolution(subject), subject.target, attribute=subject.keys)

    return Tried(make)


def _guided(subject: Subject) -> Attribution | None:
    if subject.kind != "pixels":
        return None
    maps = GradCAM(_last_convolution(subject), subject.target, attribute=subject.keys)
    return Product(maps, GuidedBackprop(subject.target, attribute=subject.keys))


METHODS: Mapping[str, Tried] = {
    "gradient": Tried(lambda of: Gradient(of.target, attribute=of.keys), multiplied=False),
    FLOOR: Tried(lambda of: GradientTimesInput(of.target, attribute=of.keys)),
    "integrated gradients": Tried(
        lambda of: IntegratedGradients(of.target, baseline=reference(of)[1], steps=32, attribute=of.keys)
    ),
    "expected gradients": Tried(lambda of: ExpectedGradients(of.target, attribute=of.keys)),
    "SmoothGrad x input": Tried(
        lambda of: Averaged(GradientTimesInput(of.target, attribute=of.keys), Noise(0.1, relative=True))
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
    "blur integrated gradients": Tried(_from_a_blur),
    "Grad-CAM": _of_layer(GradCAM),
    "Grad-CAM++": _of_layer(GradCAMPlusPlus),
    "XGrad-CAM": _of_layer(XGradCAM),
    "HiResCAM": _of_layer(HiResCAM),
    "LayerCAM": _of_layer(LayerCAM),
    "guided Grad-CAM": Tried(_guided),
    "RISE": _spotted(RISE),
    "perturbation saliency": _spotted(PerturbationSaliency),
    "SARFA": Tried(_of_actions),
    "ablation": Tried(lambda of: Ablation(of.target, **_played(of))),
    "Shapley sampling": Tried(lambda of: ShapleySampling(of.target, permutations=_ORDERS, **_played(of))),
    "KernelSHAP": Tried(_by_kernel),
    "Shapley, exact": Tried(_exactly),
    CHANCE: Tried(lambda of: RandomMap(of.target, attribute=of.keys)),
}
"""By name: those that the table compares, in its order."""
