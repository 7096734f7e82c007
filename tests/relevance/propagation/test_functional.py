"""Linear layers and convolutions as functions are those of layers: by rules, with batch norms, against a baseline."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from tdhook import LRP, Target
from tdhook.relevance.propagation.formula import PropagationRule
from tdhook.relevance.propagation.steps import Grads, Step
from tdhook.rules import AlphaBetaRule, EpsilonRule, GammaRule, Rule, ZPlusRule
from tdhook.selectors import Type

pytestmark = pytest.mark.usefixtures("doubles")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (3, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (3, 2), padding=(1, 0), groups=2), (3, 2, 5, 4)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 4, 3, dilation=2, bias=False), (3, 2, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (3, 2, 3, 3, 3)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(2, 4, 3, 2, output_padding=1, groups=2),
        (3, 2, 3, 3),
    ),
}
RULES = (ZPlusRule(), AlphaBetaRule(2.0, 1.0), GammaRule(0.25))
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def as_function(layer: nn.Module) -> nn.Module:
    """The layer, as one that derives from its class and calls the function itself."""
    kind = type(layer)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if isinstance(self, nn.Linear):
            return F.linear(weight=self.weight, input=x, bias=self.bias)
        name = f"conv{'_transpose' if self.transposed else ''}{len(self.kernel_size)}d"
        settings = {key: getattr(self, key) for key in ("stride", "padding", "dilation", "groups")}
        if self.transposed:
            settings["output_padding"] = self.output_padding
        return getattr(F, name)(x, self.weight, self.bias, **settings)

    own = copy.deepcopy(layer)
    own.__class__ = type("Own", (kind,), {"forward": forward})
    return own


def network(layer: nn.Module, dims: int) -> nn.Module:
    torch.manual_seed(1)
    norm = NORMS[dims](4)
    norm.weight.data.copy_(torch.tensor([1.0, -1.0, 2.0, -0.5]))
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()


def both(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    layers, functions = (network(one, len(shape)) for one in (layer, as_function(layer)))
    layers(x), functions(x)
    functions.load_state_dict(layers.state_dict())
    return layers, functions, x


def relevance(model: nn.Module, x: Tensor, rule: Rule, **options: object) -> Tensor:
    td = LRP([(Type(nn.Linear, _ConvNd), rule)], target=Target("output", 0), **options).wrap(model)(
        TensorDict({"input": x}, [len(x)])
    )
    return td["attr", "input"]


@pytest.mark.parametrize("baseline", [None, 0.3])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_norm_is_merged_into_them(name: str, flow: str, baseline: float | None) -> None:
    layers, functions, x = both(name)
    for rule in RULES:
        expected = relevance(layers, x, rule, flow=flow, baseline=baseline)
        found = relevance(functions, x, rule, flow=flow, baseline=baseline)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class OfSecant(PropagationRule):
    """Epsilon by its formula, which asks for the secant."""

    needs_outputs = needs_vjp = True

    def propagate(self, step: Step, relevance: tuple[Tensor, ...]) -> Grads:
        (grad,) = step.vjp(relevance[0] / step.outputs[0])
        return (step.inputs[0] * grad,)


@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize(
    "rule", [OfSecant(), EpsilonRule(1e-9), ZPlusRule()], ids=["own", "epsilon", "z-plus"]
)
def test_weights_that_are_others_on_the_reference_count(rule: Rule, flow: str) -> None:
    class AsFunction(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * x.detach().mean())

    class AsProduct(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, (self.weight * x.detach().mean()).mT)

    found = []
    for kind in (AsFunction, AsProduct):
        torch.manual_seed(4)
        model, x = nn.Sequential(kind(4, 3), nn.Softplus(), nn.Linear(3, 2)), torch.rand(1, 4)
        found.append(relevance(model, x, rule, flow=flow, baseline=0.1))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


class WithFunctions(nn.Module):
    """Convolutions, and batch norms that are layers or called as functions, checkpointed and with a shortcut or not."""

    def __init__(self, kind: str, *, functions: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.kind, self.functions = kind, functions
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(64, 2)
        self.scales = nn.ParameterList(torch.randn(4) for _ in range(2))
        self.shifts = nn.ParameterList(torch.randn(4) for _ in range(2))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)
        norms = [] if functions else [nn.BatchNorm2d(4) for _ in range(2)]
        for norm, scale, shift in zip(norms, self.scales, self.shifts, strict=False):
            norm.weight, norm.bias, norm.running_mean, norm.running_var = scale, shift, self.mean, self.var
        self.norms = nn.ModuleList(norms)

    def norm(self, index: int, x: Tensor) -> Tensor:
        if not self.functions:
            return self.norms[index](x)
        scale, shift = self.scales[index], self.shifts[index]
        return F.batch_norm(x, self.mean, self.var, bias=shift, weight=scale, training=self.training)

    def body(self, x: Tensor) -> Tensor:
        h = self.first(x)
        z = self.norm(1, self.last(F.relu(self.norm(0, h))))
        return z + h if self.kind == "shortcut" else z

    def forward(self, x: Tensor) -> Tensor:
        z = checkpoint(self.body, x, use_reentrant=False) if self.kind == "checkpoint" else self.body(x)
        return self.head(F.relu(z).flatten(1))


@pytest.mark.parametrize("options", [{}, {"flow": "gradient", "ledger": True}, {"baseline": 0.3}], ids=str)
@pytest.mark.parametrize("rule", ["epsilon_plus", "epsilon_alpha2_beta1", "attn_lrp"])
@pytest.mark.parametrize("kind", ["plain", "shortcut", "checkpoint"])
def test_a_batch_norm_that_is_called_as_a_function_is_merged(
    kind: str, rule: str, options: dict[str, object]
) -> None:
    torch.manual_seed(0)
    td, found = TensorDict({"input": torch.randn(3, 2, 4, 4)}, [3]), []
    for functions in (False, True):
        net = WithFunctions(kind, functions=functions).eval()
        method = LRP(rule, target=Target("output", 0), **options)
        found.append(method.wrap(net)(td.copy())["attr", "input"])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_batch_norm_of_passing_tensors_is_a_weighted_sum() -> None:
    class Computed(WithFunctions):
        def norm(self, index: int, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean * 1, self.var * 1, self.scales[index] + 1, self.shifts[index])

    class WrittenOut(WithFunctions):
        def norm(self, index: int, x: Tensor) -> Tensor:
            scale = (self.scales[index] + 1) / (self.var + 1e-5).sqrt()
            along = (-1, 1, 1)
            return x * scale.view(along) + (self.shifts[index] - self.mean * scale).view(along)

    td, found = TensorDict({"input": torch.randn(3, 2, 4, 4)}, [3]), []
    for kind in (Computed, WrittenOut):
        method = LRP("epsilon_plus", target=Target("output", 0))
        found.append(method.wrap(kind("shortcut", functions=True).eval())(td.copy())["attr", "input"])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
