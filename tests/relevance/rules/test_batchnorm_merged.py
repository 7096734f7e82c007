"""Batch norm behind a linear layer is merged into it for the rules, which then equal those on the merged model."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target
from tdhook.models.families import Linear
from tdhook.rules import (
    AlphaBetaRule,
    EpsilonPlus,
    EpsilonRule,
    FlatRule,
    GammaRule,
    IgnoreRule,
    PassRule,
    WSquareRule,
    ZBoxRule,
    ZPlusRule,
)


def lived(norm):
    """A batch norm with statistics and parameters of its own."""
    torch.nn.init.normal_(norm.running_mean)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    if norm.affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return norm.double().eval()


def merged(layer, norm):
    """The one layer that computes both, column by column from what it does to unit vectors' parameters."""
    layer = copy.deepcopy(layer)
    scale = 1 / torch.sqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    with torch.no_grad():
        weight = layer.weight.clone()
        for channel, factor in enumerate(scale):
            if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                per_group = layer.out_channels // layer.groups
                group, inside = divmod(channel, per_group)
                rows = layer.in_channels // layer.groups
                weight[group * rows : (group + 1) * rows, inside] *= factor
            else:
                weight[channel] *= factor
        bias = shift + (0 if layer.bias is None else layer.bias * scale)
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), lambda: nn.BatchNorm1d(4), (3,)),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), lambda: nn.BatchNorm1d(4), (3,)),
    "norm without parameters": (lambda: nn.Linear(3, 4), lambda: nn.BatchNorm1d(4, affine=False), (3,)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2), lambda: nn.BatchNorm1d(4), (2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), lambda: nn.BatchNorm2d(4), (2, 5, 4)),
    "conv2d grouped": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
        lambda: nn.BatchNorm2d(6),
        (4, 5, 4),
    ),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=2), lambda: nn.BatchNorm3d(2), (1, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), lambda: nn.BatchNorm2d(4), (3, 3, 2)),
    "transposed grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        lambda: nn.BatchNorm2d(6),
        (4, 3, 2),
    ),
    "transposed 1d grouped": (
        lambda: nn.ConvTranspose1d(6, 9, 2, groups=3),
        lambda: nn.BatchNorm1d(9),
        (6, 4),
    ),
}
every_layer = pytest.mark.parametrize("make, norm, shape", LAYERS.values(), ids=LAYERS)
RULES = [
    EpsilonRule(0.1), ZPlusRule(), AlphaBetaRule(), GammaRule(), WSquareRule(), FlatRule(), ZBoxRule(-4.0, 4.0),
    EpsilonRule(zero_params="bias"),
]  # fmt: skip


def relevance(model, x, composite, batch=None, key="input", **kwargs):
    batch = x.shape[:1] if batch is None else batch
    with LRP(composite, **kwargs).prepare(model) as explained:
        td = explained(TensorDict({key: x}, batch_size=batch))
    return td["attr", key]


@every_layer
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_in_sequence(make, norm, shape, rule):
    layer, norm = make().double(), lived(norm())
    x = torch.randn(5, *shape).double()
    composite = [(Linear, rule)]
    got = relevance(nn.Sequential(layer, norm, nn.ReLU()), x, composite)
    expected = relevance(nn.Sequential(merged(layer, norm), nn.ReLU()), x, composite)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_any_batch_shape(batch):
    conv, norm, head = nn.Conv2d(1, 2, 3).double(), lived(nn.BatchNorm2d(2)), nn.Linear(8, 3).double()
    x = torch.rand(*batch, 1, 4, 4).double()
    for composite in ("epsilon_plus", "epsilon_plus_flat", "excitation_backprop"):
        got = relevance(nn.Sequential(conv, norm, nn.ReLU(True), nn.Flatten(), head), x, composite, batch)
        plain = nn.Sequential(merged(conv, norm), nn.ReLU(), nn.Flatten(), head)
        torch.testing.assert_close(got, relevance(plain, x, composite, batch), rtol=1e-9, atol=1e-9)


class Block(nn.Module):
    def __init__(self, conv, norm):
        super().__init__()
        self.norm, self.act, self.conv = norm, nn.ReLU(), conv

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


def test_nested_and_registered_in_another_order():
    pairs = [(nn.Conv2d(c, 2, 3, padding=1).double(), lived(nn.BatchNorm2d(2))) for c in (1, 2)]
    head = nn.Sequential(nn.Flatten(-3), nn.Linear(32, 3)).double()
    model = TensorDictModule(
        nn.Sequential(nn.Sequential(*(Block(c, n) for c, n in pairs)), head), ["pixels"], ["q"]
    )
    plain = [Block(merged(c, n), nn.Identity()) for c, n in pairs]
    explicit = TensorDictModule(nn.Sequential(nn.Sequential(*plain), head), ["pixels"], ["q"])
    x = torch.rand(5, 1, 4, 4).double()
    for composite in ("epsilon_plus", "epsilon_alpha2_beta1_flat"):
        got, expected = (
            relevance(m, x, composite, key="pixels", target=Target("q", 1)) for m in (model, explicit)
        )
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


class Apart(nn.Module):
    """Something lies between the layer and its batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = lived(nn.BatchNorm1d(4))
        self.first, self.second = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()

    def forward(self, x):
        return self.norm(torch.cat([self.first(x), self.second(x)], -1)).relu()


def test_the_named_form():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.out = (
                nn.Linear(3, 4).double(),
                lived(nn.BatchNorm1d(4)),
                nn.Linear(4, 2).double(),
            )

        def forward(self, x):
            return self.out(self.norm(self.fc(x).unsqueeze(-1).squeeze(-1) + 0.0))

    torch.manual_seed(0)
    model = Reshaped()
    x = torch.randn(5, 3).double()
    composite = [(Linear, EpsilonRule(0.1))]
    plain = nn.Sequential(merged(model.fc, model.norm), model.out)
    got = relevance(model, x, composite, merge_batch_norm=[("fc", "norm")])
    torch.testing.assert_close(got, relevance(plain, x, composite), rtol=1e-9, atol=1e-9)
    several = relevance(model, x, composite, merge_batch_norm=[(["fc"], "norm")])
    assert torch.equal(several, got)
    for flow in (
        "relevance",
        "gradient",
    ):  # in the one the layer has a formula, in the other it runs as it is
        got = relevance(model, x, "epsilon", merge_batch_norm=[("fc", "norm")], flow=flow)
        torch.testing.assert_close(got, relevance(plain, x, "epsilon"), rtol=1e-3, atol=1e-4)


def test_layers_that_are_named_and_not_before_it() -> None:
    model, x = (
        nn.Sequential(nn.Linear(3, 4).double(), nn.Tanh(), lived(nn.BatchNorm1d(4))),
        torch.randn(5, 3).double(),
    )
    with pytest.raises(ValueError, match="none of them is seen before it"):
        relevance(model, x, "epsilon_plus", merge_batch_norm=[("0", "2")])


def test_the_named_form_says_what_is_wrong():
    x = torch.randn(5, 3).double()
    for pair, text in (
        (("fc", "norm"), "merge_batch_norm names 'fc', which is no module of this model"),
        (("first", "second"), "merge_batch_norm: 'second' is a Linear, not a batch norm"),
    ):
        with pytest.raises(ValueError, match=text):
            relevance(Apart(), x, "epsilon_plus", merge_batch_norm=[pair])


def test_not_merged_where_told_or_in_training():
    layer, norm = nn.Linear(3, 4).double(), lived(nn.BatchNorm1d(4))
    model, x = nn.Sequential(layer, norm), torch.randn(5, 3).double()
    composite = [(Linear, EpsilonRule(0.1))]
    z = layer(x)
    passed = norm(z)  # the relevance of the output, which the pass rule brings to the layer
    expected = (x * (passed / (z + 0.1 * z.sign()) @ layer.weight)).detach()
    torch.testing.assert_close(relevance(model, x, composite, merge_batch_norm=False), expected)
    norm.train()
    norm.momentum = 0.0
    passed = model(x)
    expected = (x * (passed / (z + 0.1 * z.sign()) @ layer.weight)).detach()
    torch.testing.assert_close(relevance(model, x, composite), expected)


def test_a_rule_for_the_batch_norm_itself_is_respected():
    layer, norm = nn.Linear(3, 4).double(), lived(nn.BatchNorm1d(4))
    model, x = nn.Sequential(layer, norm), torch.randn(5, 3).double()
    z = layer(x)
    out = norm(z)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    r = z * scale * out / (out + 0.1 * out.sign())
    expected = (x * (r / (z + 0.1 * z.sign()) @ layer.weight)).detach()
    composite = [(Linear, EpsilonRule(0.1)), (nn.BatchNorm1d, EpsilonRule(0.1))]
    torch.testing.assert_close(relevance(model, x, composite), expected)


def test_a_batch_norm_over_another_axis_is_not_merged():
    """Behind a linear layer on [N, C, L] it scales the rows of what the layer made, not its features."""
    x = torch.randn(5, 4, 3).double()
    for features in (4, 6):
        layer, norm = nn.Linear(3, features).double(), lived(nn.BatchNorm1d(4))
        composite = [(Linear, EpsilonRule(0.1)), (nn.BatchNorm1d, PassRule())]
        got = relevance(nn.Sequential(layer, norm), x, composite)
        apart = relevance(nn.Sequential(layer, norm), x, composite, merge_batch_norm=False)
        torch.testing.assert_close(got, apart)


class Moved(nn.Module):
    """A batch norm behind a layer whose values are moved in between."""

    def __init__(self, layer, norm, moves, back):
        super().__init__()
        self.layer, self.norm, self.moves, self.back = layer, norm, moves, back
        self.flat = nn.Flatten()

    def forward(self, x):
        return self.flat(self.back(self.norm(self.moves(self.layer(x)))).relu())


MOVES = {
    "tokens as rows": (nn.Linear(3, 4), (6, 3), lambda z: z.flatten(0, 1), lambda z: z.view(-1, 6, 4)),
    "channels first": (nn.Linear(3, 4), (6, 3), lambda z: z.transpose(1, 2), lambda z: z.mT),
    "channels first, copied": (
        nn.Linear(3, 4),
        (2, 3, 3),
        lambda z: z.permute(0, 3, 1, 2).reshape(-1, 4, 6),
        lambda z: z.view(-1, 4, 2, 3).permute(0, 2, 3, 1),
    ),
    "places as one axis": (nn.Conv2d(2, 4, 2), (2, 3, 4), lambda z: z.flatten(2), lambda z: z),
}


@pytest.mark.parametrize("layer, shape, moves, back", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("rule", [ZPlusRule(), EpsilonRule(0.1), None], ids=repr)
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_through_what_moves_values(layer, shape, moves, back, rule, flow):
    torch.manual_seed(0)
    layer, norm = copy.deepcopy(layer).double(), lived(nn.BatchNorm1d(4))
    x = torch.randn(5, *shape).double()
    composite = [(nn.Flatten if rule is None else Linear, rule or IgnoreRule())]
    got = relevance(Moved(layer, norm, moves, back), x, composite, flow=flow)
    plain = Moved(merged(layer, norm), nn.Identity(), moves, back)
    torch.testing.assert_close(got, relevance(plain, x, composite, flow=flow), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", [EpsilonRule(0.1), None], ids=repr)
def test_not_through_what_mixes_the_axis_with_others(rule):
    """Of four features two and two: none of the axes is what the layer made."""
    layer, norm = nn.Linear(3, 4).double(), lived(nn.BatchNorm1d(2))
    model = Moved(layer, norm, lambda z: z.view(-1, 2, 2).transpose(1, 2), lambda z: z)
    x, composite = (
        torch.randn(5, 3).double(),
        [(nn.Flatten if rule is None else Linear, rule or IgnoreRule())],
    )
    apart = relevance(model, x, composite, merge_batch_norm=False)
    torch.testing.assert_close(relevance(model, x, composite), apart)


def test_a_batch_norm_that_follows_no_linear_layer_passes():
    norm, layer = lived(nn.BatchNorm1d(3)), nn.Linear(3, 2).double()
    for between in ([], [nn.ReLU()]):
        model = nn.Sequential(*between, norm, layer)
        x = torch.randn(5, 3).double()
        inner = norm(between[0](x) if between else x).detach()
        expected = relevance(layer, inner, [(Linear, EpsilonRule(0.1))])
        torch.testing.assert_close(relevance(model, x, [(Linear, EpsilonRule(0.1))]), expected)


def test_the_model_is_not_touched():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    lived(model[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [list(vars(m)) for m in model.modules()]
    x = torch.randn(5, 3).double()
    for _ in range(2):
        relevance(model, x, "epsilon_plus_flat")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [list(vars(m)) for m in model.modules()] == attributes
    assert all(p.grad is None for p in model.parameters())


def test_the_seeds_mapper_merges_too():
    layer, norm = nn.Linear(3, 4).double(), lived(nn.BatchNorm1d(4))
    x = torch.randn(5, 3).double()
    method = {"composite": None, "rule_mapper": EpsilonPlus(), "skip_modules": LRP.default_skip}
    got = relevance(nn.Sequential(layer, norm, nn.ReLU()), x, **method)
    expected = relevance(nn.Sequential(merged(layer, norm), nn.ReLU()), x, **method)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


class OfSteps(nn.Module):
    """A layer on steps that were transposed before, whose bias torch adds apart, or one that is written so."""

    def __init__(self, layer, norm, write):
        super().__init__()
        self.layer, self.norm, self.head, self.write = layer, norm, nn.Linear(4, 2).double(), write

    def forward(self, x):
        h = self.write(self.layer, x.transpose(1, 2))
        return self.head(self.norm(h.transpose(1, 2)).relu().sum(-1))


@pytest.mark.parametrize("baseline", [None, 0.2])
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
@pytest.mark.parametrize(
    "write",
    [
        lambda layer, x: layer(x),
        lambda layer, x: nn.functional.linear(x, layer.weight, layer.bias),
        lambda layer, x: x @ layer.weight.T + layer.bias,
    ],
    ids=["module", "function", "product and sum"],
)
def test_layers_whose_bias_is_added_apart(write, flow, baseline):
    layer, norm = nn.Linear(3, 4).double(), lived(nn.BatchNorm1d(4))
    td = TensorDict({"input": torch.rand(2, 3, 5).double()}, [2])

    def explained(layer, norm):
        torch.manual_seed(0)
        lrp = LRP("epsilon", target=Target("output", 0), flow=flow, baseline=baseline)
        return lrp.wrap(OfSteps(layer, norm, write))(td.copy())["attr", "input"]

    torch.testing.assert_close(
        explained(layer, norm), explained(merged(layer, norm), nn.Identity()), rtol=1e-5, atol=1e-7
    )
