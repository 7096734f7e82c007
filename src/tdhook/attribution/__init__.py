"""Attribution methods: what of the input made the model answer so."""

from tdhook.attribution.gradient import Gradient, GradientTimesInput
from tdhook.attribution.integrated_gradients import IntegratedGradients
from tdhook.attribution.lrp import LRP
from tdhook.contexts.attribution import Attribution

__all__ = ["LRP", "Attribution", "Gradient", "GradientTimesInput", "IntegratedGradients"]
