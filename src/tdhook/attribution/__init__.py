"""Attribution methods: what of the input made the model answer so."""

from tdhook.attribution.ablation import Ablation
from tdhook.attribution.gradient import Gradient, GradientTimesInput
from tdhook.attribution.integrated_gradients import IntegratedGradients
from tdhook.attribution.interactions import ShapleyInteraction
from tdhook.attribution.kernel_shap import KernelShap
from tdhook.attribution.lrp import LRP
from tdhook.attribution.occlusion import Occlusion
from tdhook.attribution.rise import RISE
from tdhook.attribution.saliency import PerturbationSaliency
from tdhook.attribution.sarfa import SARFA
from tdhook.attribution.shapley import Shapley
from tdhook.attribution.shapley_sampling import ShapleySampling
from tdhook.contexts.attribution import Attribution

__all__ = [
    "LRP",
    "RISE",
    "SARFA",
    "Ablation",
    "Attribution",
    "Gradient",
    "GradientTimesInput",
    "IntegratedGradients",
    "KernelShap",
    "Occlusion",
    "PerturbationSaliency",
    "Shapley",
    "ShapleyInteraction",
    "ShapleySampling",
]
