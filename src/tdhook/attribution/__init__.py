"""Attribution methods: what of the input made the model answer so."""

from tdhook.attribution.averaged import Averaged
from tdhook.attribution.blur import BlurIntegratedGradients
from tdhook.attribution.cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from tdhook.attribution.conductance import Conductance, InternalInfluence
from tdhook.attribution.expected_gradients import ExpectedGradients
from tdhook.attribution.gradient import Gradient, GradientTimesInput
from tdhook.attribution.guided import Deconvnet, GuidedBackprop
from tdhook.attribution.integrated_gradients import IntegratedGradients
from tdhook.attribution.lrp import LRP
from tdhook.attribution.product import Product
from tdhook.contexts.attribution import Attribution
from tdhook.perturbing.draws import Flips, Noise, Shifts

__all__ = [
    "LRP",
    "Attribution",
    "Averaged",
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
    "LayerCAM",
    "Noise",
    "Product",
    "Shifts",
    "XGradCAM",
]
