"""captum's LRP and DeepLift (Kokhlikyan et al. 2020).

LRP modifies weights in a second forward pass, module by module; DeepLift runs inputs and baselines as one batch.
"""

from __future__ import annotations

from tensordict import TensorDict
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers import rules_for
from benchmarks.timing import Contender


class Flattened(nn.Module):
    """A sequential network that flattens by a function, since captum knows no module for it."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        at = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Flatten))
        self.before, self.after = layers[:at], layers[at + 1 :]

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.after(self.before(x).flatten(1))
        return z


def contender(case: Case, device: str) -> Contender:
    if case.baseline is not None:
        return _of_differences(case, device)
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule

    convolution = rules_for(case, {"epsilon_plus": Alpha1_Beta0_Rule})
    module = case.model(device, frozen=True).module
    if isinstance(module, nn.Sequential) and any(isinstance(layer, nn.Flatten) for layer in module):
        module = Flattened(module)
    rules = {nn.Conv2d: convolution, nn.Linear: lambda: EpsilonRule(1e-6)}
    layers = [(m, rules[type(m)]) for m in module.modules() if type(m) in rules]
    lrp = LRP(module)

    def explain(td: TensorDict) -> Tensor:
        x = td["observation"].requires_grad_()  # captum would do it, and warn
        for layer, rule in layers:  # captum takes them off again after each call
            layer.rule = rule()
        relevance: Tensor = lrp.attribute(x, target=module(x).argmax(-1))
        return relevance

    return Contender(explain)


def _of_differences(case: Case, device: str) -> Contender:
    from captum.attr import DeepLift

    rules_for(case, {"deeplift": None})
    module = case.model(device, frozen=True).module
    deep_lift = DeepLift(module)

    def explain(td: TensorDict) -> Tensor:
        x = td["observation"].requires_grad_()
        relevance: Tensor = deep_lift.attribute(x, case.baseline, target=module(x).argmax(-1))
        return relevance

    return Contender(explain)
