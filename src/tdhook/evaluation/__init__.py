"""Does an explanation mean anything? Measures of explanations, and what to compare them with."""

from tdhook.attribution.gradient import Gradient, GradientTimesInput
from tdhook.evaluation.bridges import Classifier, as_classifier, quantus_explain_func
from tdhook.evaluation.comparison import Metric, as_markdown, compare
from tdhook.evaluation.controls import RandomMap
from tdhook.evaluation.curves import Curve, InsertionDeletion, PerturbationCurves
from tdhook.evaluation.measures import Measure
from tdhook.evaluation.perturbation import insertion_deletion, perturbation_curve
from tdhook.evaluation.randomisation import Randomisation, Similarity, layers_of, randomisation
from tdhook.evaluation.returns import MaskedPolicy, ReturnLost, Which, return_lost
from tdhook.evaluation.runs import Explainer, Method
from tdhook.evaluation.sensitivity import Radius, Sensitivity, sensitivity
from tdhook.evaluation.similarity import cosine, spearman, ssim
from tdhook.perturbing.baselines import Baseline, blurred
from tdhook.perturbing.features import Groups, along, patches

__all__ = [
    "Baseline",
    "Classifier",
    "Curve",
    "Explainer",
    "Gradient",
    "GradientTimesInput",
    "Groups",
    "InsertionDeletion",
    "MaskedPolicy",
    "Measure",
    "Method",
    "Metric",
    "PerturbationCurves",
    "Radius",
    "RandomMap",
    "Randomisation",
    "ReturnLost",
    "Sensitivity",
    "Similarity",
    "Which",
    "along",
    "as_classifier",
    "as_markdown",
    "blurred",
    "compare",
    "cosine",
    "insertion_deletion",
    "layers_of",
    "patches",
    "perturbation_curve",
    "quantus_explain_func",
    "randomisation",
    "return_lost",
    "sensitivity",
    "spearman",
    "ssim",
]
