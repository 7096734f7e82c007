"""What RevealCancel and Shapley share where units go on elsewhere, and how they are run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from rules.revealed import (
    FLOWS,
    MODELS,
    each_preset,
    explained,
    networks,
    relevance,
)
from tdhook import LRP, Composite, Target, preset
from tdhook.rules import EpsilonRule, FlatRule, PassRule, RevealCancelRule
from tdhook.selectors import First, Name, Type
from tdhook.targets import Through

pytestmark = pytest.mark.usefixtures("doubles")


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


WRITTEN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "product and sum": lambda x, w, b, v: F.relu(x @ w.T + b) @ v.T,
    "sum, the other way round": lambda x, w, b, v: F.relu(b + x @ w.T) @ v.T,
    "difference": lambda x, w, b, v: F.relu(x @ w.T - (-b)) @ v.T,
    "several sums": lambda x, w, b, v: F.relu(torch.add(x @ w.T + b / 2, b / 4, alpha=2)) @ v.T,
    "a number": lambda x, w, b, v: F.relu(F.linear(x, w, b - 1.0) + 1.0) @ v.T,
    "in place": lambda x, w, b, v: (x @ w.T).add_(b).relu_() @ v.T,
    "made anew": lambda x, w, b, v: F.relu(x @ w.T + 1.0 * b) @ v.T,
    "addmm": lambda x, w, b, v: F.relu(torch.addmm(b, x, w.T)) @ v.T,
    "einsum": lambda x, w, b, v: torch.einsum("oi,bi->bo", v, F.relu(torch.einsum("oi,bi->bo", w, x) + b)),
    "baddbmm": lambda x, w, b, v: torch.bmm(
        F.relu(torch.baddbmm(b[None, None], x[None], w.T[None])), v.T[None]
    )[0],
}


class InProducts(nn.Module):
    """A network of two layers, written out."""

    def __init__(
        self, layers: nn.Sequential, write: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.w, self.b, self.v = layers[0].weight, layers[0].bias, layers[2].weight
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x, self.w, self.b, self.v)


@each_preset
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", WRITTEN)
def test_products_and_constants_are_as_layers(name: str, flow: str, preset_: str) -> None:
    layers = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    x, start = torch.randn(4, 5), torch.randn(4, 5)
    expected = relevance(layers, x, start, preset_, flow=flow)
    found = relevance(InProducts(layers, WRITTEN[name]), x, start, preset_, flow=flow)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, relevance(layers, x, start, "deeplift"))


class Shifted(nn.Module):
    """A layer, and what is added to it: another amount for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(5, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.layer(x) + x.detach().sum(-1, keepdim=True)))


@each_preset
def test_a_constant_that_is_another_on_the_reference_is_no_bias(preset_: str) -> None:
    model, x, start = Shifted(), torch.randn(4, 5), torch.randn(4, 5)
    found = relevance(model, x, start, preset_)
    torch.testing.assert_close(found, relevance(model, x, start, "deeplift"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["made anew", "another one"])
def test_whether_a_constant_is_the_same_is_found_out_in_a_graph(name: str) -> None:
    layers = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    model = Shifted() if name == "another one" else InProducts(layers, WRITTEN[name])
    x, start = torch.randn(4, 5), torch.randn(4, 5)
    eager = relevance(model, x, start, "deeplift_shapley")
    graph = torch.compile(LRP("deeplift_shapley", target=Target("output", 0), baseline=start).wrap(model))
    found = graph(TensorDict({"input": x}, [4]))["attr", "input"]
    torch.testing.assert_close(found, eager, rtol=1e-9, atol=1e-9)


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
