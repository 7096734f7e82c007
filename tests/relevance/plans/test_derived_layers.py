"""Layers that derive from torch's and compute in their own way: what is said of torch's is not said of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tdhook import LRP, Target
from tdhook.composites import Composite, relp
from tdhook.models.families import BatchNorm
from tdhook.rules import EpsilonRule, GammaRule, LayerNormRule, PassRule
from tdhook.selectors import Name, Selector, Type

pytestmark = pytest.mark.usefixtures("doubles")

WIDE = 6
LAYERS = {
    "batch norm": (nn.BatchNorm1d, (WIDE,)),
    "identity": (nn.Identity, ()),
    "dropout": (nn.Dropout, ()),
    "pool": (nn.MaxPool1d, (2,)),
    "flatten": (nn.Flatten, ()),
    "average": (nn.AvgPool1d, (2,)),
    "linear": (nn.Linear, (WIDE, WIDE)),
}
BEHIND = {"silu": F.silu, "scaled": lambda z: 1.7 * z, "softmax": lambda z: z.softmax(-1)}
PRESETS = {"attn_lrp": {}, "epsilon_plus": {}, "epsilon_alpha2_beta1": {}, "deeplift": {"baseline": 0.1}}


def derived(kind: type[nn.Module], behind: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    """A layer with something behind it, as one class, such as timm's batch norms with their activation."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return behind(kind.forward(self, x))

    return type("Derived", (kind,), {"forward": forward})


def network(layer: nn.Module, *behind: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, WIDE), layer, *behind, nn.LazyLinear(3)).eval()
    net(torch.randn(3, 4))
    with torch.no_grad():
        for param in net.parameters():
            param += 0.3 * torch.randn_like(param)
    if isinstance(layer, nn.BatchNorm1d):
        layer.running_mean.uniform_(-0.5, 0.5)
        layer.running_var.uniform_(0.5, 2.0)
    return net


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("layer", LAYERS)
def test_all_relevance_is_accounted_for(layer: str, behind: str, preset: str) -> None:
    kind, arguments = LAYERS[layer]
    net = network(derived(kind, BEHIND[behind])(*arguments))
    td, found = TensorDict(input=torch.randn(5, 4), batch_size=[5]), {}
    for flow in ("relevance", "gradient"):
        method = LRP(preset, target=Target("output", 1), flow=flow, ledger=True, **PRESETS[preset])
        done = method.wrap(net)(td.clone())
        size = torch.stack([done["ledger", name].abs() for name in ("target", "inputs", "absorbed")]).amax(0)
        assert float((done["ledger", "gap"].abs() / size).max()) < 1e-9
        found[flow] = done["attr", "input"]
    torch.testing.assert_close(found["relevance"], found["gradient"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("preset", ["attn_lrp", "epsilon", "deeplift"])
def test_a_batch_norm_with_its_activation_is_one_after_the_other(preset: str) -> None:
    class Behind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x)

    as_one, apart = network(derived(nn.BatchNorm1d, F.silu)(WIDE)), network(nn.BatchNorm1d(WIDE), Behind())
    apart[1].load_state_dict(as_one[1].state_dict())
    td = TensorDict(input=torch.randn(5, 4), batch_size=[5])
    method = LRP(preset, target=Target("output", 1), **PRESETS.get(preset, {}))
    one, other = (method.wrap(net)(td.clone())["attr", "input"] for net in (as_one, apart))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_computes_as_torchs_does_is_a_batch_norm() -> None:
    class Named(nn.BatchNorm2d):
        pass

    assert isinstance(Named(3), BatchNorm) and isinstance(nn.BatchNorm1d(3), BatchNorm)
    assert not isinstance(derived(nn.BatchNorm2d, F.relu)(3), BatchNorm)
    assert BatchNorm.inside(nn.BatchNorm2d(3)) is None and BatchNorm.inside(nn.Linear(3, 3)) is None


class Activated(nn.BatchNorm2d):
    """A batch norm with its activation, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        given = self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        return self.act(F.batch_norm(x, *given))


def images(*, apart: bool) -> nn.Module:
    """A network that has its activations in its batch norms, or behind them."""
    torch.manual_seed(0)
    first, second = ([nn.BatchNorm2d(width), nn.ReLU()] if apart else [Activated(width)] for width in (4, 3))
    layers = nn.Conv2d(2, 4, 3, bias=False), *first, nn.Conv2d(4, 3, 3), *second, nn.Flatten(-3)
    net = nn.Sequential(*layers, nn.Linear(12, 2)).eval()
    for norm in net:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(norm.weight)
    return net


def of_images(method: LRP, net: nn.Module) -> Tensor:
    torch.manual_seed(1)
    td = TensorDict(input=torch.randn(3, 2, 6, 6), batch_size=[3])
    return method.wrap(net)(td)["attr", "input"]


ASKED = {
    "attn_lrp": {},
    "epsilon_plus": {},
    "epsilon_alpha2_beta1": {"flow": "gradient", "ledger": True},
    "excitation_backprop": {"merge_batch_norm": False},
    "epsilon_plus_flat": {"merge_batch_norm": [("0", "1")]},
    "epsilon": {"baseline": 0.1},
    "deeplift_shapley": {"baseline": 0.1},
    Composite([(Type(BatchNorm), EpsilonRule()), (nn.Conv2d, GammaRule(0.5))]): {},
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("composite", ASKED, ids=str)
def test_the_batch_norm_inside_is_one_like_any_other(composite: str | Composite, training: bool) -> None:
    method = LRP(composite, target=Target("output", 1), **ASKED[composite])
    one, other = (images(apart=apart).train(training) for apart in (False, True))
    torch.testing.assert_close(of_images(method, one), of_images(method, other))
    torch.testing.assert_close(one[1].running_mean, other[1].running_mean)


def test_the_batch_norm_inside_is_one_where_it_is_checkpointed() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    method = LRP("epsilon_plus", target=Target("output", 1))
    one, other = (of_images(method, Checkpointed(images(apart=apart))) for apart in (False, True))
    torch.testing.assert_close(one, other)


def test_the_batch_norm_inside_is_what_it_now_is() -> None:
    method = LRP("epsilon_plus", target=Target("output", 1))
    net, apart = images(apart=False), images(apart=True)
    td = TensorDict(input=torch.randn(3, 2, 6, 6), batch_size=[3])
    with method.prepare(net) as explained:
        explained(td.clone())
        for each in (net, apart):
            each[1].weight.data *= -1
            each[1].load_state_dict({**each[1].state_dict(), "running_mean": torch.arange(4.0)}, assign=True)
        found = explained(td.clone())["attr", "input"]
    torch.testing.assert_close(found, method.wrap(apart)(td.clone())["attr", "input"])
    rows = [(row.path, type(row.module), repr(row.rule)) for row in method.plan(net, td)]
    assert rows[1:3] == [("1", nn.BatchNorm2d, "PassRule()"), ("1.act", nn.ReLU, "PassRule()")]


class Apart(nn.Module):
    """A layer, and what is behind or beside it."""

    def __init__(self, layer: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


def alike(net: nn.Module, other: nn.Module) -> nn.Module:
    """A network with the parameters of another one."""
    with torch.no_grad():
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    return net


OWN_WAYS: dict[str, tuple[type[nn.Module], tuple[object, ...], Callable[..., Tensor]]] = {
    "activated": (nn.Linear, (WIDE, WIDE), lambda layer, x: F.softplus(layer(x))),
    "convolved": (nn.Conv1d, (WIDE, WIDE, 1), lambda layer, x: layer(x[..., None])[..., 0].tanh() * x),
    "gated": (nn.GELU, (), lambda layer, x: layer(x) * x.mean(-1, keepdim=True)),
    "mixed": (nn.SiLU, (), lambda layer, x: layer(x).softmax(-1)),
    "another": (nn.ReLU, (), lambda layer, x: x.softmax(-1) + x),
    "averaged": (nn.AdaptiveAvgPool1d, (3,), lambda layer, x: layer(x).tanh()),
    "normalised": (nn.LayerNorm, (WIDE,), lambda layer, x: layer(x).relu() + x),
}


@pytest.mark.parametrize("preset", ["epsilon", "epsilon_plus", "attn_lrp", "deeplift"])
@pytest.mark.parametrize("way", OWN_WAYS)
def test_a_layer_with_something_in_it_is_the_two_apart(way: str, preset: str) -> None:
    kind, arguments, function = OWN_WAYS[way]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return function(lambda x: kind.forward(self, x), x)

    one = network(type("Derived", (kind,), {"forward": forward})(*arguments))
    other = alike(network(Apart(kind(*arguments), function)), one)
    td = TensorDict(input=torch.randn(5, 4), batch_size=[5])
    method = LRP(preset, target=Target("output", 1), **PRESETS.get(preset, {}))
    found, expected = (method.wrap(net)(td.clone()) for net in (one, other))
    torch.testing.assert_close(found["output"], expected["output"])
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"], rtol=1e-5, atol=1e-9)


WITH_A_RULE: dict[str, tuple[type[nn.Module], tuple[object, ...], Callable[..., Tensor]]] = {
    "cell": (nn.GRUCell, (WIDE, WIDE), lambda layer, x: layer(x, torch.zeros_like(x)).tanh() * x),
    "normalised": (nn.InstanceNorm1d, (2,), lambda layer, x: F.silu(layer(x.view(-1, 2, 3))).flatten(1)),
    "product": (nn.Bilinear, (WIDE, WIDE, WIDE), lambda layer, x: layer(x, x.flip(-1)).tanh()),
    "recurrent": (nn.RNN, (3, 2), lambda layer, x: F.silu(layer(x.view(-1, 2, 3))[0]).flatten(1)),
    "attention": (
        nn.MultiheadAttention,
        (2, 1),
        lambda layer, x: layer(*[x.view(-1, 3, 2)] * 3)[0].tanh().flatten(1),
    ),
    "enlarged": (
        nn.UpsamplingNearest2d,
        (None, 2),
        lambda layer, x: layer(x.view(-1, 1, 2, 3)).tanh().flatten(1),
    ),
    "cosine": (nn.CosineSimilarity, (-1,), lambda layer, x: layer(x, x.flip(-1)).tanh()[:, None] * x),
    "gated": (nn.GLU, (), lambda layer, x: layer(x).exp()),
    "padded": (nn.ReflectionPad1d, (2,), lambda layer, x: layer(x).tanh()),
}


@pytest.mark.parametrize("against", [{}, {"baseline": 0.1}], ids=["value", "difference"])
@pytest.mark.parametrize("way", WITH_A_RULE)
def test_what_is_said_of_a_class_is_said_of_its_operation(way: str, against: dict[str, float]) -> None:
    kind, arguments, function = WITH_A_RULE[way]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return function(lambda *given: kind.forward(self, *given), x)

    one = network(type("Derived", (kind,), {"forward": forward})(*arguments))
    other = alike(network(Apart(kind(*arguments), function)), one)
    td = TensorDict(input=torch.randn(5, 4), batch_size=[5])
    method = LRP([(kind, EpsilonRule())], target=Target("output", 1), **against)
    found, expected = (method.wrap(net)(td.clone())["attr", "input"] for net in (one, other))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


class Gated(nn.GELU):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate(x)


@pytest.mark.parametrize("selector", [Type(Gated), Type("*Gated"), Name("1")], ids=repr)
def test_by_its_class_or_name_a_layer_is_one_unit(selector: Selector) -> None:
    td, net = TensorDict(input=torch.randn(5, 4), batch_size=[5]), network(Gated())
    method = LRP([(selector, PassRule()), (nn.Linear, EpsilonRule())], target=Target("output", 1))
    assert [row.path for row in method.plan(net, td)] == ["0", "1", "2"]
    derived = LRP([(nn.GELU, PassRule()), (nn.Linear, EpsilonRule())]).plan(net, td)
    names = [(row.path, row.module.name if row.operation else type(row.module).__name__) for row in derived]
    assert names == [("0", "Linear"), ("1", "gelu"), ("1.gate", "Linear"), ("1", "mul"), ("2", "Linear")]


def test_a_forward_that_was_put_on_a_layer_is_looked_at() -> None:
    net = network(nn.Linear(WIDE, WIDE))
    layer = net[1]
    layer.forward = lambda x: F.softplus(F.linear(x, layer.weight, layer.bias))
    td = TensorDict(input=torch.randn(5, 4), batch_size=[5])
    apart = alike(network(Apart(nn.Linear(WIDE, WIDE), lambda layer, x: F.softplus(layer(x)))), net)
    method = LRP("epsilon", target=Target("output", 1))
    one, other = (method.wrap(net)(td.clone())["attr", "input"] for net in (net, apart))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


class Channels(nn.LayerNorm):
    """A normalisation of channels, as ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ByHand(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias


def test_a_rule_of_torchs_normalisation_is_that_of_the_one_inside() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), Channels(4), nn.Flatten(-3), nn.Linear(16, 2))
    rows = nn.Sequential(
        nn.Flatten(-2), Moved(), nn.Linear(2, 4), nn.LayerNorm(4), Moved(), nn.Flatten(-2), nn.Linear(16, 2)
    )
    with torch.no_grad():
        rows[2].weight.copy_(net[0].weight[..., 0, 0])
        for mine, other in ((rows[2], net[0]), (rows[6], net[3])):
            mine.bias.copy_(other.bias)
        rows[6].weight.copy_(net[3].weight)
    td = TensorDict(input=torch.randn(3, 2, 2, 2), batch_size=[3])
    method = LRP("relp", target=Target("output", 1))
    one, other = (method.wrap(each)(td.clone())["attr", "input"] for each in (net, rows))
    torch.testing.assert_close(one, other)


class Moved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def test_a_rule_that_finds_no_operation_says_how_to_go_on() -> None:
    td, net = TensorDict(input=torch.randn(5, 4), batch_size=[5]), network(ByHand(WIDE))
    with pytest.raises(
        NotImplementedError, match=r"without `layer_norm`: name its class, \(Type\(ByHand\), Lay"
    ):
        LRP("relp", target=Target("output", 1)).wrap(net)(td)
    named = Composite([(Type(ByHand), LayerNormRule(0.4))]) + relp()
    plain = network(nn.LayerNorm(WIDE))
    one = LRP(named, target=Target("output", 1)).wrap(net)(td.clone())["attr", "input"]
    other = LRP("relp", target=Target("output", 1)).wrap(plain)(td.clone())["attr", "input"]
    torch.testing.assert_close(one, other)
