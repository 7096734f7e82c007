"""Attribution methods: what of the input made the model answer so."""

from tdhook.attribution.ablation import Ablation
from tdhook.attribution.averaged import Averaged
from tdhook.attribution.bilrp import BiLRP
from tdhook.attribution.blur import BlurIntegratedGradients
from tdhook.attribution.cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from tdhook.attribution.conductance import Conductance
from tdhook.attribution.expected_gradients import ExpectedGradients
from tdhook.attribution.gradient import Gradient, GradientTimesInput
from tdhook.attribution.guided import Deconvnet, GuidedBackprop
from tdhook.attribution.integrated_gradients import IntegratedGradients
from tdhook.attribution.interactions import PredDiff, ShapleyInteraction
from tdhook.attribution.internal_influence import InternalInfluence
from tdhook.attribution.kernel_shap import KernelShap
from tdhook.attribution.lrp import LRP
from tdhook.attribution.occlusion import Occlusion
from tdhook.attribution.patching import Patching
from tdhook.attribution.product import Product
from tdhook.attribution.rise import RISE
from tdhook.attribution.rollout import AttentionRollout
from tdhook.attribution.saliency import PerturbationSaliency
from tdhook.attribution.sarfa import SARFA
from tdhook.attribution.shapley import Shapley
from tdhook.attribution.shapley_sampling import ShapleySampling
from tdhook.contexts.attribution import Attribution
from tdhook.models.pair import Pair
from tdhook.perturbing.draws import Flips, Noise, Shifts

__all__ = [
    "LRP",
    "RISE",
    "SARFA",
    "Ablation",
    "AttentionRollout",
    "Attribution",
    "Averaged",
    "BiLRP",
    "BlurIntegratedGradients",
    "Conductance",
    "Deconvnet",
    "ExpectedGradients",
    "Flips",
    "GradCAM",
    "GradCAMPlusPlus",
    "Gradient",
    "GradientTimesInput",
    "GuidedBackprop",
    "HiResCAM",
    "IntegratedGradients",
    "InternalInfluence",
    "KernelShap",
    "LayerCAM",
    "Noise",
    "Occlusion",
    "Pair",
    "Patching",
    "PerturbationSaliency",
    "PredDiff",
    "Product",
    "Shapley",
    "ShapleyInteraction",
    "ShapleySampling",
    "Shifts",
    "XGradCAM",
]
