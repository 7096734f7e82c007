"""Does an explanation mean anything? Measures of explanations, and what to compare them with."""

from tdhook.attribution.gradient import Gradient, GradientTimesInput
from tdhook.evaluation.agreement import Agreement, agreement
from tdhook.evaluation.bridges import Classifier, as_classifier, quantus_explain_func
from tdhook.evaluation.comparison import Metric, as_markdown, compare
from tdhook.evaluation.complexity import Complexity, complexity
from tdhook.evaluation.controls import RandomMap
from tdhook.evaluation.curves import Curve, InsertionDeletion, PerturbationCurves
from tdhook.evaluation.effects import ApproximatedEffects, EffectsAgreement, compare_effects
from tdhook.evaluation.explaining import explained_by
from tdhook.evaluation.imputation import imputed
from tdhook.evaluation.infidelity import Infidelity, infidelity
from tdhook.evaluation.intervals import Figures, How, Interval, interval
from tdhook.evaluation.localisation import Localisation, Masks, localisation
from tdhook.evaluation.measures import Measure
from tdhook.evaluation.perturbation import insertion_deletion, perturbation_curve
from tdhook.evaluation.randomisation import Randomisation, Similarity, layers_of, randomisation
from tdhook.evaluation.returns import MaskedPolicy, ReturnLost, Which, return_lost
from tdhook.evaluation.road import road
from tdhook.evaluation.runs import Explainer, Method
from tdhook.evaluation.sensitivity import Radius, Sensitivity, sensitivity
from tdhook.evaluation.sensitivity_n import SensitivityN, sensitivity_n
from tdhook.evaluation.similarity import cosine, kendall, sign_agreement, spearman, ssim, top_overlap
from tdhook.perturbing.baselines import Baseline, blurred
from tdhook.perturbing.features import Groups, along, patches

__all__ = [
    "Agreement",
    "ApproximatedEffects",
    "Baseline",
    "Classifier",
    "Complexity",
    "Curve",
    "EffectsAgreement",
    "Explainer",
    "Figures",
    "Gradient",
    "GradientTimesInput",
    "Groups",
    "How",
    "Infidelity",
    "InsertionDeletion",
    "Interval",
    "Localisation",
    "MaskedPolicy",
    "Masks",
    "Measure",
    "Method",
    "Metric",
    "PerturbationCurves",
    "Radius",
    "RandomMap",
    "Randomisation",
    "ReturnLost",
    "Sensitivity",
    "SensitivityN",
    "Similarity",
    "Which",
    "agreement",
    "along",
    "as_classifier",
    "as_markdown",
    "blurred",
    "compare",
    "compare_effects",
    "complexity",
    "cosine",
    "explained_by",
    "imputed",
    "infidelity",
    "insertion_deletion",
    "interval",
    "kendall",
    "layers_of",
    "localisation",
    "patches",
    "perturbation_curve",
    "quantus_explain_func",
    "randomisation",
    "return_lost",
    "road",
    "sensitivity",
    "sensitivity_n",
    "sign_agreement",
    "spearman",
    "ssim",
    "top_overlap",
]
