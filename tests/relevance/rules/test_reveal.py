"""Layers together with what is behind them: equal to the definitions, and all of the difference arrives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import LRP, Composite, Target, preset
from tdhook.rules import EpsilonRule, FlatRule, PassRule, RevealCancelRule
from tdhook.selectors import First, Name, Type
from tdhook.targets import Computed, Through

from .layers import CASES, DTYPE, Case

pytestmark = pytest.mark.usefixtures("doubles")
FLOWS = ("relevance", "gradient")
FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
}


# --- The definition, one sample at a time ---------------------------------------------------------


def slope(function: Callable[[Tensor], Tensor], begin: Tensor, end: Tensor) -> Tensor:
    """That of a secant, and where its ends meet the derivative."""
    at = begin.clone().requires_grad_()
    with torch.enable_grad():
        (derivative,) = torch.autograd.grad(function(at).sum(), at)
    step = end - begin
    return torch.where(step == 0, derivative, (function(end) - function(begin)) / step)


def reveal_cancel(contributions: Tensor, start: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What each contribution counts per unit of the function behind them.

    Args:
        contributions: ``[outputs, positions]``.
        start: the output of the layer on the reference, ``[outputs]``.
        function: what is behind.
    """
    gained, lost = contributions.clamp(min=0).sum(1), contributions.clamp(max=0).sum(1)
    end = start + gained + lost
    first, last = (start, start + gained), (start + lost, end)
    of_gained = (slope(function, *first) + slope(function, *last)) / 2
    of_lost = (slope(function, start, start + lost) + slope(function, start + gained, end)) / 2
    middle = ((of_gained + of_lost) / 2).unsqueeze(1)
    found = torch.where(contributions > 0, of_gained.unsqueeze(1), of_lost.unsqueeze(1))
    return torch.where(contributions == 0, middle, found)


def shapley(contributions: Tensor, start: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Likewise, by sums of some of them that are normal."""
    rise, size, variance = contributions.sum(1), contributions.abs().sum(1), contributions.square().sum(1)
    mean = torch.zeros_like(rise)
    for share in ((3 - 3**0.5) / 6, (3 + 3**0.5) / 6):
        deviation = (share * (1 - share) * variance).sqrt()
        for node, weight in ((3**0.5, 1 / 6), (0.0, 2 / 3), (-(3**0.5), 1 / 6)):
            # The mean of a derivative, by parts.
            mean += weight * node * function(start + share * rise + node * deviation) / deviation / 2
    derivative = slope(function, start, start)
    mean = torch.where(variance == 0, derivative, mean)
    left = function(start + rise) - function(start) - mean * rise
    half = torch.where(variance == 0, 0.0, left / size)
    return mean.unsqueeze(1) + half.unsqueeze(1) * contributions.sign()


Definition = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
DEFINITIONS: dict[str, Definition] = {"deeplift_reveal_cancel": reveal_cancel, "deeplift_shapley": shapley}
each_preset = pytest.mark.parametrize("preset_", DEFINITIONS)


def of_network(
    define: Definition, layers: Sequence[nn.Module], x: Tensor, start: Tensor, counts: Tensor
) -> Tensor:
    """Relevance per unit of one sample by a chain of linear layers, each with a function behind it or without."""
    if not layers:
        return counts
    layer, *rest = layers
    function = rest.pop(0) if rest and not isinstance(rest[0], nn.Linear) else None
    ends = [layer(value) for value in (x, start)]
    behind = [z if function is None else function(z) for z in ends]
    counts = of_network(define, rest, *behind, counts)
    weight = layer.weight * counts.unsqueeze(1)
    if function is not None:
        weight = weight * define(layer.weight * (x - start), ends[1], function)
    return weight.sum(0)


def explained(
    model: nn.Module,
    x: Tensor,
    start: object,
    composite: object = "deeplift_reveal_cancel",
    **options: object,
) -> TensorDict:
    options.setdefault("target", Target("output", 0))
    with LRP(composite, baseline=start, on_unmatched="raise", **options).prepare(model) as run:
        return run(TensorDict({"input": x}, x.shape[:1]))


def relevance(*args: object, **options: object) -> Tensor:
    return explained(*args, **options)["attr", "input"]


# --- Equal to the definition -----------------------------------------------------------------------


@each_preset
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_layer_and_the_function_behind_it(case: Case, function: str, preset_: str) -> None:
    layer, matrix, behind = case.layer, case.explicit, FUNCTIONS[function]()
    x, counts = case.draw(True, 2)
    start, _ = case.draw(False, 2)
    flat = counts.flatten(1)
    expected = []
    for end, begin, count in zip(x, start, flat, strict=True):
        step = (end - begin).flatten()[matrix.source]
        before = matrix.weight @ begin.flatten()[matrix.source] + matrix.bias
        each = DEFINITIONS[preset_](matrix.weight * step, before, behind)
        each = each * count.unsqueeze(1) * matrix.weight
        expected.append(matrix.spread(each.sum(0) * step).view(case.in_shape))
    found = relevance(
        nn.Sequential(layer, behind),
        x,
        start,
        preset_,
        target=Computed(lambda outputs, inputs: (outputs["output"].flatten(1) * flat).sum(1)),
    )
    torch.testing.assert_close(found, torch.stack(expected).to(DTYPE), rtol=1e-9, atol=1e-9)


def networks(function: str) -> nn.Sequential:
    make = FUNCTIONS[function]
    return nn.Sequential(
        nn.Linear(5, 8), make(), nn.Linear(8, 6, bias=False), make(), nn.Linear(6, 4), nn.Linear(4, 3)
    )


@each_preset
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_network(function: str, preset_: str) -> None:
    """Features that do not differ, and units behind a ReLU that do not, count the mean of both."""
    model, x, start = networks(function), torch.randn(6, 5), torch.randn(6, 5)
    start[:, 2] = x[:, 2]
    start[0] = x[0]
    counts = torch.tensor([0.0, 1.0, 0.0])
    expected = [
        of_network(DEFINITIONS[preset_], list(model), end, begin, counts) * (end - begin)
        for end, begin in zip(x, start, strict=True)
    ]
    found = relevance(model, x, start, preset_, target=Target("output", 1))
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-9, atol=1e-9)


class Least(nn.Module):
    """The lesser of two, as it is computed with one ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(2, 1, bias=False)
        self.both.weight.data = torch.tensor([[1.0, -1.0]])

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] - torch.relu(self.both(x))


@pytest.mark.parametrize("flow", FLOWS)
def test_what_cancels_is_seen(flow: str) -> None:
    """The example of the paper: both are as much the reason, and the secant takes one of them for it."""
    x = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    half = x.min(1, keepdim=True).values / 2
    found = relevance(Least(), x, 0.0, flow=flow)
    torch.testing.assert_close(found[:1], half[:1].expand(1, 2))
    if flow == "gradient":
        torch.testing.assert_close(found, half.expand(3, 2))
    assert relevance(Least(), x[:1], 0.0, "deeplift")[0, 0].abs() < 1e-12


def exact(contributions: Tensor, start: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Shapley values of a few contributions, over all orders."""
    orders = torch.tensor(list(permutations(range(contributions.shape[1]))))
    total = torch.zeros_like(contributions)
    for order in orders:
        on = torch.cat([start.unsqueeze(1), start.unsqueeze(1) + contributions[:, order].cumsum(1)], 1)
        total[:, order] += function(on).diff(dim=1)
    return total / len(orders)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_unit_gets_is_nearly_its_shapley_values(function: str) -> None:
    """Nearer than what two groups say, and that nearer than the secant."""
    weight, behind = torch.randn(200, 6), FUNCTIONS[function]()
    start = torch.randn(200)
    wanted = exact(weight, start, behind)
    off = []
    for define in (shapley, reveal_cancel):
        found = define(weight, start, behind) * weight
        torch.testing.assert_close(found.sum(1), wanted.sum(1))
        off.append(float((found - wanted).norm() / wanted.norm()))
    secant = slope(behind, start, start + weight.sum(1)).unsqueeze(1) * weight
    assert off[0] < off[1] < (secant - wanted).norm() / wanted.norm()


# --- All of it arrives ------------------------------------------------------------------------------


class Odd(nn.Module):
    """Outputs that go to several places, moved on their way, and layers that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.slopes = nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        h = torch.relu(z) + z.tanh() + 0.5 * z
        h = F.silu(self.second(h), inplace=True) + self.slopes(self.second(h)).view(-1, 2, 3).flatten(1)
        h = torch.sigmoid(self.second(h).view(-1, 3, 2)).flatten(1) * h
        return F.linear(torch.exp(F.linear(h, self.second.weight)), self.last.weight, self.last.bias)


def normed() -> nn.Module:
    model = nn.Sequential(
        *(nn.Unflatten(-1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
        *(nn.Conv1d(4, 3, 3, stride=2), nn.BatchNorm1d(3), nn.Dropout(), nn.PReLU(3), nn.Flatten()),
        *(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3), nn.LogSoftmax(-1)),
    )
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            for values in (norm.weight.data, norm.bias.data, norm.running_mean):
                values.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "network": lambda: networks("relu"),
    "odd": Odd,
    "normed": normed,
    "drawn": lambda: nn.Sequential(nn.Linear(5, 8), nn.RReLU(), nn.Linear(8, 3)),
}


@each_preset
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", MODELS)
def test_all_of_the_difference_arrives(name: str, flow: str, preset_: str) -> None:
    model, x, start = MODELS[name](), torch.randn(4, 5), torch.randn(4, 5)
    torch.manual_seed(0)
    end = model(x)
    torch.manual_seed(0)
    wanted = (end - model(start)).detach()[:, 0]
    for ledger in (False, True):
        torch.manual_seed(0)
        td = explained(model, x, start, preset_, flow=flow, ledger=ledger)
        torch.testing.assert_close(td["attr", "input"].sum(1), wanted, rtol=1e-9, atol=1e-9)
        if ledger:
            assert td["ledger", "gap"].abs().max() <= 1e-9


@each_preset
@pytest.mark.parametrize("name", ["network", "odd", "normed"])
def test_single_precision(name: str, preset_: str) -> None:
    model, x, start = MODELS[name](), torch.randn(4, 5), torch.randn(4, 5)
    expected = relevance(model, x, start, preset_)
    found = relevance(model.float(), x.float(), start.float(), preset_).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each_preset
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, flow: str, preset_: str) -> None:
    model, x, start = networks("tanh").to(dtype), torch.randn(4, 5).to(dtype), torch.randn(4, 5).to(dtype)
    found = relevance(model, x, start, preset_, flow=flow)
    expected = relevance(model.double(), x.double(), start.double(), preset_)
    assert found.dtype == dtype
    assert torch.cosine_similarity(found.double(), expected).min() > 0.99


@pytest.mark.parametrize("name", ["network", "odd", "normed"])
def test_each_operation_hands_on_what_arrives(name: str) -> None:
    model, x, start = MODELS[name](), torch.randn(4, 5), torch.randn(4, 5)
    lrp = LRP("deeplift_reveal_cancel", target=Target("output", 0), baseline=start, ledger=True)
    with lrp.prepare(model) as run:
        run(TensorDict({"input": x}, [4]))
        entries = run.ledger.entries
    assert entries and not any(entry.opens(1e-9) for entry in entries)


# --- What is together -------------------------------------------------------------------------------


@each_preset
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_batch_norm_is_a_part_of_the_layer(sign: float, flow: str, preset_: str) -> None:
    norm, layer, x, start = nn.BatchNorm1d(6), nn.Linear(5, 6), torch.randn(4, 5), torch.randn(4, 5)
    norm.weight.data = sign * (torch.rand(6) + 0.5)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = nn.Linear(5, 6)
    folded.weight.data = layer.weight * scale[:, None]
    folded.bias.data = (layer.bias - norm.running_mean) * scale + norm.bias
    rest = [nn.Tanh(), nn.Linear(6, 3)]
    expected = relevance(nn.Sequential(folded, *rest), x, start, preset_)
    model = nn.Sequential(layer, norm, *rest).eval()
    torch.testing.assert_close(relevance(model, x, start, preset_, flow=flow), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, relevance(model, x, start, "deeplift"))
    # Between two functions it belongs to none.
    between = nn.Sequential(layer, nn.Tanh(), norm, *rest).eval()
    scaled = nn.Linear(6, 6)
    scaled.weight.data, scaled.bias.data = scale.diag(), norm.bias - norm.running_mean * scale
    apart = nn.Sequential(layer, nn.Tanh(), scaled, *rest)
    composite = [(Name("2"), EpsilonRule(0.0)), *preset(preset_)]
    torch.testing.assert_close(
        relevance(between, x, start, preset_, flow=flow),
        relevance(apart, x, start, composite, flow=flow),
        rtol=1e-9,
        atol=1e-9,
    )


class Written(nn.Module):
    """The network of modules, in functions."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.parts = nn.ParameterList([p for layer in model for p in layer.parameters()])

    def forward(self, x: Tensor) -> Tensor:
        p = self.parts
        x = F.relu(F.linear(x, p[0], p[1]))
        x = F.linear(x, p[2]).relu_()
        return F.linear(F.linear(x, p[3], p[4]), p[5], p[6])


def test_functions_are_as_modules() -> None:
    model, x, start = networks("relu"), torch.randn(4, 5), torch.randn(4, 5)
    expected = relevance(model, x, start)
    torch.testing.assert_close(relevance(Written(model), x, start), expected, rtol=1e-9, atol=1e-9)


@each_preset
def test_weights_that_differ_contribute_too(preset_: str) -> None:
    """They get nothing, being no input: it is constant in the ledger."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.layer.weight * (1 + x.detach().mean())
            return self.head(torch.tanh(F.linear(x, weight, self.layer.bias)))

    model, x, start = Gated(), torch.randn(4, 5), torch.randn(4, 5)
    td = explained(model, x, start, preset_, ledger=True)
    torch.testing.assert_close(td["ledger", "target"], (model(x) - model(start)).detach()[:, 0])
    assert td["ledger", "absorbed"].abs().max() > 1e-3
    assert td["ledger", "gap"].abs().max() <= 1e-9


# --- Where the secant shares -------------------------------------------------------------------------


ALONE: dict[str, Callable[[Tensor, nn.Linear], Tensor]] = {
    "nothing behind it": lambda x, layer: layer(x),
    "a sum": lambda x, layer: layer(x) + x,
    "a softmax": lambda x, layer: layer(x).softmax(-1),
    "a maximum": lambda x, layer: layer(x).amax(-1, keepdim=True) + x,
    "moved": lambda x, layer: torch.relu(layer(x).flip(-1)),
    "scaled": lambda x, layer: torch.relu(2 * layer(x)),
    "after a sum": lambda x, layer: torch.relu(layer(x) + x),
}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", ALONE)
def test_what_is_not_right_behind_a_layer_has_the_secant(name: str, flow: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return ALONE[name](x, self.layer)

    model, x, start = Model(), torch.randn(4, 5), torch.randn(4, 5)
    assert torch.equal(
        relevance(model, x, start, flow=flow), relevance(model, x, start, preset("deeplift"), flow=flow)
    )


def test_what_goes_elsewhere_too_is_shared_in_parts() -> None:
    """The function takes its part, and what goes around it another one."""

    class Model(nn.Module):
        def __init__(self, a: float, b: float) -> None:
            super().__init__()
            self.a, self.b, self.layer = a, b, layer

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return self.a * torch.tanh(z) + self.b * z

    layer, x, start = nn.Linear(5, 5), torch.randn(4, 5), torch.randn(4, 5)
    both, function, around = (relevance(Model(*of), x, start) for of in ((2, 3), (1, 0), (0, 1)))
    torch.testing.assert_close(both, 2 * function + 3 * around, rtol=1e-9, atol=1e-9)


def test_a_second_function_has_the_secant() -> None:
    class Model(nn.Module):
        def __init__(self, first: float, second: float) -> None:
            super().__init__()
            self.factors, self.layer = (first, second), layer

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return self.factors[0] * torch.tanh(z) + self.factors[1] * torch.sigmoid(z)

    layer, x, start = nn.Linear(5, 5), torch.randn(4, 5), torch.randn(4, 5)
    found = relevance(Model(1, 1), x, start)
    expected = relevance(Model(1, 0), x, start) + relevance(Model(0, 1), x, start, "deeplift")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_entries_on_the_way_have_what_is_theirs() -> None:
    """Between a layer and the function behind it relevance is what the secant says: the sum of both parts."""
    parts = [TensorDictModule(nn.Linear(5, 6), ["input"], ["z"]), TensorDictModule(nn.ReLU(), ["z"], ["a"])]
    model = TensorDictSequential(*parts, TensorDictModule(nn.Linear(6, 3), ["a"], ["output"]))
    x, start = torch.randn(4, 5), torch.randn(4, 5)
    method = LRP("deeplift_reveal_cancel", target=Target("output", "all"), baseline=start, attribute="all")
    td = method.wrap(model)(TensorDict({"input": x}, [4]))
    wanted = (td["output"] - model(TensorDict({"input": start}, [4]))["output"]).detach()
    for key in ("input", "z", "a"):
        torch.testing.assert_close(td["attr", key].sum(-1), wanted)
    torch.testing.assert_close(td["attr", "z"], td["attr", "a"])


@each_preset
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("place", ["0", "1:input", "1"])
def test_what_passes_one_unit_is_as_if_no_other_went_on(
    place: str, inplace: bool, flow: str, preset_: str
) -> None:
    """On either side of the function behind the layer, which is seen with the layer all the same."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 2))
    x, start, outputs = torch.randn(4, 5), torch.randn(4, 5), Target("output", "all")
    found = explained(model, x, start, preset_, flow=flow, target=Through(outputs, place), ledger=True)
    assert found["ledger", "gap"].abs().max() < 1e-12
    each = found["attr", "input"].unflatten(1, (2, 6))
    torch.testing.assert_close(
        each.sum(2), relevance(model, x, start, preset_, flow=flow, target=outputs), rtol=1e-9, atol=1e-12
    )
    for unit in range(6):
        only = copy.deepcopy(model)
        only[2].weight.data[:, torch.arange(6) != unit] = 0
        expected = relevance(only, x, start, preset_, flow=flow, target=outputs)
        torch.testing.assert_close(each[:, :, unit], expected, rtol=1e-9, atol=1e-12)
    # Of the first output what passes the second unit and the first of "2", then likewise of the second output.
    chain = Through(Through(outputs, "2", [1, 0]), place, (1, 4), beside="counted")
    found = relevance(model, x, start, preset_, flow=flow, target=chain)
    of_both = each[:, :, [1, 4]].sum(2)
    expected = torch.stack([0 * of_both[:, 0], of_both[:, 0], of_both[:, 1], 0 * of_both[:, 0]], 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_to_be_asked_of_what_a_function_is_given_changes_nothing() -> None:
    model, x, start = MODELS["network"](), torch.randn(4, 5), torch.randn(4, 5)
    plain = relevance(model, x, start, "deeplift_shapley")
    for place in ("1", "1:input"):
        asked = relevance(model, x, start, "deeplift_shapley", input_modules=[place])
        torch.testing.assert_close(asked, plain, rtol=1e-12, atol=1e-12)


class _OfSteps(nn.Module):
    """Runs on ``[steps, batch, features]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.function(self.first(x.transpose(0, 1)))).mean(0)
        return found


@pytest.mark.parametrize("steps", [3, 6], ids=["", "as many as elements"])
def test_of_models_that_have_the_batch_elsewhere_too(steps: int) -> None:
    model, x, start = _OfSteps(), torch.randn(6, steps, 4), torch.randn(6, steps, 4)
    outputs = Target("output", "all")
    plain = relevance(model, x, start, "deeplift_shapley", target=outputs)
    for place in ("first", "function:input", "function"):
        asked = relevance(model, x, start, "deeplift_shapley", target=outputs, input_modules=[place])
        torch.testing.assert_close(asked, plain, rtol=1e-9, atol=1e-12)
        through = Through(outputs, place, axis=-1)
        each = relevance(model, x, start, "deeplift_shapley", target=through).unflatten(1, (2, 5))
        torch.testing.assert_close(each.sum(2), plain, rtol=1e-9, atol=1e-12)
        only = copy.deepcopy(model)
        only.last.weight.data[:, torch.arange(5) != 3] = 0
        expected = relevance(only, x, start, "deeplift_shapley", target=outputs)
        torch.testing.assert_close(each[:, :, 3], expected, rtol=1e-9, atol=1e-12)


# --- In use ------------------------------------------------------------------------------------------


@each_preset
@pytest.mark.parametrize("name", ["network", "odd", "normed"])
def test_compiled(name: str, preset_: str) -> None:
    model, x, start = MODELS[name](), torch.randn(4, 5), torch.randn(4, 5)
    eager = relevance(model, x, start, preset_)
    found = relevance(model, x, start, preset_, compile={"backend": "aot_eager"})
    torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flow", FLOWS)
def test_networks_that_run_as_one(flow: str) -> None:
    """Of agents with weights of their own, batched by torch.vmap: each as it is alone, with a ledger too."""
    alone = [nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(3)]
    weights, _ = torch.func.stack_module_state(alone)

    class Agents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            def one(p: dict[str, Tensor], x: Tensor) -> Tensor:
                return torch.func.functional_call(self.network, p, (x,))

            held = {name: p.detach() for name, p in weights.items()}
            return torch.vmap(one, in_dims=(0, 1), out_dims=1)(held, x)

    x, start = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    expected = relevance(alone[1], x[:, 1], start[:, 1])
    for ledger in (False, True):
        target = Target("output", (1, 0))
        found = relevance(Agents(), x, start, target=target, flow=flow, ledger=ledger)
        torch.testing.assert_close(found[:, 1], expected, rtol=1e-9, atol=1e-9)
        assert (found[:, [0, 2]] == 0).all()


def test_call_after_call_and_in_another_process() -> None:
    model, x = networks("silu"), torch.randn(4, 5)
    run = LRP("deeplift_reveal_cancel", target=Target("output", 0), baseline=0.2).wrap(model)
    first, second, third = (run(TensorDict({"input": x * s}, [4]))["attr", "input"] for s in (1, 2, 1))
    assert torch.equal(first, third) and not torch.equal(first, second)
    torch.testing.assert_close(second, relevance(model, 2 * x, 0.2))
    again = pickle.loads(pickle.dumps(run))(TensorDict({"input": x}, [4]))["attr", "input"]
    torch.testing.assert_close(again, first)
    (alone,) = run(TensorDict({"input": x[0]}, []))["attr", "input"].unsqueeze(0)
    torch.testing.assert_close(alone, first[0])


def test_beside_other_rules() -> None:
    """One that has relevance alone takes it on from there."""
    model, x, start = networks("tanh"), torch.randn(4, 5), torch.randn(4, 5)
    composite = Composite([(First(Type(nn.Linear)), FlatRule())]) + preset("deeplift_reveal_cancel")
    td = explained(model, x, start, composite, ledger=True)
    assert td["ledger", "gap"].abs().max() <= 1e-9
    assert (td["attr", "input"] - td["attr", "input"][:, :1]).abs().max() <= 1e-12
    pairs = [
        (Name("0"), RevealCancelRule()),
        (Type(nn.Linear), EpsilonRule(0.0)),
        (Type(nn.Tanh), PassRule()),
    ]
    mixed = relevance(model, x, start, pairs)
    torch.testing.assert_close(mixed.sum(1), (model(x) - model(start)).detach()[:, 0])
    assert not torch.allclose(mixed, relevance(model, x, start))


def test_it_is_plain_data() -> None:
    composite = preset("deeplift_reveal_cancel")
    assert Composite.from_dict(composite.to_dict()) == composite
    assert composite.to_dict()["pairs"][0]["rule"] == "RevealCancelRule"
    assert repr(RevealCancelRule()) == "RevealCancelRule()"


def test_it_needs_a_baseline_and_a_linear_layer() -> None:
    model, x = networks("relu"), torch.randn(4, 5)
    with pytest.raises(
        ValueError, match=r"RevealCancelRule\(\) shares the difference from a baseline, and there is none"
    ):
        relevance(model, x, None)
    with pytest.raises(ValueError, match="give LRP a baseline"), RevealCancelRule().register(model[0]):
        model[0](x.requires_grad_())
    with pytest.raises(NotImplementedError, match="LayerNorm is no linear layer"):
        relevance(nn.LayerNorm(5), x, 0.0, [(Type(nn.LayerNorm), RevealCancelRule())])
