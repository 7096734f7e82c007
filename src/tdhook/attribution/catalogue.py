"""The methods by name: what they compute, what they cost, what they need; and methods from data.

A method is data, as a composite is: ``{"method": "integrated_gradients", "tolerance": 0.001, "baseline": "mean"}``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdhook.attribution.ablation import Ablation
from tdhook.attribution.averaged import Averaged
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
from tdhook.perturbing.draws import Draws, Flips, Noise, Shifts

__all__ = ["METHODS", "REQUIRED", "Listed", "method", "method_from_dict"]


@dataclass(frozen=True)
class Listed:
    """A method as it is listed.

    Attributes:
        kind: its class.
        formula: what each entry of an input gets.
        cost: of one explanation, in gradients (a forward and a backward pass), or in forward passes.
        needs: what has to be given, or to be there.
    """

    kind: type[Attribution]
    formula: str
    cost: str
    needs: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What may be said of it, and what holds by default (:data:`REQUIRED` where nothing does)."""
        found: dict[str, Any] = {}
        for kind in self.kind.__mro__:
            if "__init__" not in vars(kind):
                continue
            parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            for one in parameters:
                if one.name not in ("self", "target", "compile") and one.kind is not one.VAR_KEYWORD:
                    found.setdefault(one.name, one.default)
            if not any(one.kind is one.VAR_KEYWORD for one in parameters):
                break
        return found


REQUIRED = inspect.Parameter.empty

METHODS: Mapping[str, Listed] = {
    "lrp": Listed(LRP, "relevance by the rules of a composite", "1", "composite"),
    "gradient": Listed(Gradient, "|df/dx|", "1"),
    "gradient_times_input": Listed(GradientTimesInput, "x df/dx", "1"),
    "integrated_gradients": Listed(
        IntegratedGradients, "(x - b) mean of df/dx on the way from b to x", "steps (32), or until tolerance"
    ),
    "expected_gradients": Listed(
        ExpectedGradients, "mean of (x - b) df/dx(b + t (x - b)) over data b and t", "samples (32)", "data"
    ),
    "blur_integrated_gradients": Listed(
        BlurIntegratedGradients, "sum of dx df/dx while x gets sharp", "steps (32)", "pictures"
    ),
    "guided_backprop": Listed(GuidedBackprop, "df/dx, positive and only through active ReLUs", "1", "ReLUs"),
    "deconvnet": Listed(Deconvnet, "df/dx, positive behind each ReLU", "1", "ReLUs"),
    "conductance": Listed(
        Conductance, "sum of dh df/dh on the way from b to x", "steps (64)", "input_modules"
    ),
    "internal_influence": Listed(
        InternalInfluence, "mean of df/dh on the way from b to x", "steps (32)", "input_modules"
    ),
    "grad_cam": Listed(GradCAM, "relu(sum over channels of mean(df/dA) A)", "1", "layer"),
    "grad_cam_plus_plus": Listed(
        GradCAMPlusPlus, "relu(sum over channels of weight A), eq. 19", "1", "layer"
    ),
    "hires_cam": Listed(HiResCAM, "relu(sum over channels of df/dA A)", "1", "layer"),
    "layer_cam": Listed(LayerCAM, "relu(sum over channels of relu(df/dA) A)", "1", "layer"),
    "xgrad_cam": Listed(XGradCAM, "relu(sum over channels of mean(A df/dA) / mean(A) A)", "1", "layer"),
    "ablation": Listed(Ablation, "f(x) - f(x without the feature)", "a forward pass for each feature"),
    "occlusion": Listed(
        Occlusion,
        "mean of f(x) - f(x without a window) over windows",
        "a forward pass for each window",
        "window",
    ),
    "shapley": Listed(
        Shapley,
        "mean of f(S with i) - f(S) over coalitions S",
        "2 ** features forward passes",
        "at most 16 features",
    ),
    "shapley_sampling": Listed(
        ShapleySampling,
        "mean of f(S with i) - f(S) over orders",
        "permutations (32) x (features - 1) forward passes, or until error",
    ),
    "kernel_shap": Listed(
        KernelShap, "weighted least squares of f(S) over coalitions S", "coalitions forward passes"
    ),
    "shapley_interaction": Listed(
        ShapleyInteraction,
        "what two features add beyond what each adds",
        "2 ** features forward passes",
        "at most 16 features",
    ),
    "pred_diff": Listed(
        PredDiff,
        "mean of f(x) - f(x with a feature of other data), and of pairs",
        "samples (16) x features * (features + 1) / 2 forward passes",
    ),
    "rise": Listed(RISE, "mean of f(x masked) over masks that show it", "masks forward passes", "pictures"),
    "perturbation_saliency": Listed(
        PerturbationSaliency,
        "1/2 |f(x) - f(x with a spot blurred)|^2",
        "a forward pass for each spot",
        "pictures",
    ),
    "sarfa": Listed(
        SARFA,
        "loss of softmax, specific to the action",
        "a forward pass for each spot",
        "pictures, an action",
    ),
    "attention_rollout": Listed(
        AttentionRollout, "product over layers of (attention + identity) / 2", "a forward pass", "attention"
    ),
    "patching": Listed(
        Patching,
        "(a_clean - a_corrupt) times the coefficient of a method, or f(a_clean) - f(a_corrupt)",
        "2 forward passes more than the method, or a forward pass for each part",
        "at, entries under clean and corrupt",
    ),
}
"""All methods by name."""

_DRAWS: Mapping[str, Callable[..., Draws]] = {"noise": Noise, "flips": Flips, "shifts": Shifts}


def method(name: str, **options: Any) -> Attribution:
    """The method of a name.

    Raises:
        ValueError: there is none, or it has no such option, or lacks one.
    """
    if name not in METHODS:
        raise ValueError(f"no method is named {name!r}; methods are {', '.join(METHODS)}")
    known = METHODS[name].options
    for option in options:
        if option not in known and option != "target":
            raise ValueError(f"the method {name!r} has no option {option!r}; it has {', '.join(known)}")
    missing = [option for option, default in known.items() if default is REQUIRED and option not in options]
    if missing:
        raise ValueError(f"the method {name!r} needs {', '.join(missing)}: say {missing[0]}=...")
    try:
        return METHODS[name].kind(**options)
    except TypeError as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ValueError(f"the method {name!r} cannot be made with {given}: {error}") from error


def method_from_dict(data: Mapping[str, object]) -> Attribution:
    """The method that plain data describe.

    Args:
        data: ``"method"`` is its name, the other entries are its options. ``"averaged"`` is a table that says over
            what: ``{"noise": 0.1, "samples": 20}``, ``{"flips": [-1]}`` or ``{"shifts": 2}``, with ``"of"`` and
            ``"spread"``. ``"times"`` names a method that it is multiplied with, or is the data of one,
            as ``"by"`` is of patching.

    Raises:
        ValueError: they describe none.
    """
    options: dict[str, Any] = dict(data)
    name, averaged, times = (
        options.pop("method", None),
        options.pop("averaged", None),
        options.pop("times", None),
    )
    if isinstance(options.get("by"), Mapping):
        options["by"] = method_from_dict(options["by"])
    if not isinstance(name, str):
        raise ValueError(f"'method' is the name of a method, one of {', '.join(METHODS)}; got {name!r}")
    found = method(name, **options)
    if times is not None:
        other = method_from_dict(times if isinstance(times, Mapping) else {"method": times})
        found = Product(found, other)
    return found if averaged is None else _averaged(found, averaged)


def _averaged(found: Attribution, data: object) -> Averaged:
    if not isinstance(data, Mapping):
        raise ValueError(
            f"'averaged' is a table that says over what, like {{noise = 0.1, samples = 20}}; got {data!r}"
        )
    options: dict[str, Any] = dict(data)
    named = [name for name in options if name in _DRAWS]
    if len(named) != 1:
        raise ValueError(
            f"'averaged' names one of {', '.join(_DRAWS)}, got {', '.join(options) or 'nothing'}"
        )
    given = options.pop(named[0])
    around: dict[str, Any] = {name: options.pop(name) for name in ("of", "spread") if name in options}
    arguments: Sequence[Any] = given if named[0] == "flips" and isinstance(given, list) else [given]
    try:
        return Averaged(found, _DRAWS[named[0]](*arguments, **options), **around)
    except TypeError as error:
        raise ValueError(f"'averaged' takes other values: {error}") from error
