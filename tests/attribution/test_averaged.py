"""Averaged: the mean of what the method gives for each draw, one by one."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, Contrast, References, Target
from tdhook.attribution import Ablation, Attribution, Gradient, GradientTimesInput, IntegratedGradients
from tdhook.attribution.averaged import Averaged
from tdhook.attribution.cam import GradCAM
from tdhook.attribution.expected_gradients import ExpectedGradients
from tdhook.attribution.product import Product
from tdhook.perturbing.baselines import blurred
from tdhook.perturbing.draws import Flips, Noise, Shifts
from tdhook.perturbing.features import patches
from tdhook.rl import Explain
from tdhook.targets import Entropy, Key, LogProb, Through

COUNT = 7
TARGET = Target("output", 1)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def batch(*shape: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*shape, 4).double()}, shape)


def one_by_one(method: Attribution, net: nn.Module, td: TensorDict, over, key="input") -> Tensor:
    """Relevance for each draw, ``[draws, *relevance]``."""
    found = []
    for i in range(over.samples):
        changed, numbers = td.clone(), range(i, i + 1)
        changed["input"] = over.changed("input", td["input"], td.batch_dims, numbers)[0]
        relevance = method.wrap(net)(changed)["attr", key]
        several = relevance.dim() - (td["input"].dim() if key == "input" else relevance.dim())
        relevance = relevance.movedim(td.batch_dims, 0) if several else relevance
        back = over.undone("input", relevance.unsqueeze(0), 1 + several + td.batch_dims, numbers)[0]
        found.append(back.movedim(0, td.batch_dims) if several else back)
    return torch.stack(found)


METHODS = {
    "gradient": lambda t, **o: Gradient(t, signed=True, **o),
    "sizes of gradients": Gradient,
    "gradient x input": GradientTimesInput,
    "LRP": lambda t, **o: LRP("epsilon_plus", target=t, **o),
    "DeepLIFT": lambda t, **o: LRP("deeplift", target=t, baseline=0.5, **o),
    "integrated gradients": lambda t, **o: IntegratedGradients(t, steps=5, **o),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@every_method
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("target", [TARGET, Target("output", "all")], ids=["one", "all"])
def test_the_mean_by_hand(make, shape, target) -> None:
    net, td, over = mlp(), batch(*shape), Noise(0.3, COUNT)
    method = make(target)
    found = Averaged(method, over, spread=True).wrap(net)(td.clone())
    each = one_by_one(method, net, td, over)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found["attr", "input"], each.mean(0), **close)
    torch.testing.assert_close(found["spread", "input"], each.std(0), **close)
    torch.testing.assert_close(found["standard_error", "input"], each.std(0) / COUNT**0.5, **close)
    torch.testing.assert_close(found["output"], net(td["input"]))  # that of the input as it is
    for of, expected in (("squares", each.square().mean(0)), ("variance", each.var(0))):
        other = Averaged(method, over, of=of).wrap(net)(td.clone())["attr", "input"]
        torch.testing.assert_close(other, expected, **close)


@every_method
@pytest.mark.parametrize("budget", [0, 3000, 10**10])
def test_memory_changes_nothing(make, budget) -> None:
    net, td, over = mlp(), batch(5), Noise(0.3, COUNT)
    found = Averaged(make(TARGET, memory_budget=budget), over).wrap(net)(td.clone())["attr", "input"]
    expected = Averaged(make(TARGET), over).wrap(net)(td)["attr", "input"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("baseline", ["mean", "sample", "other", torch.randn(5, 4).double()], ids=str)
@pytest.mark.parametrize("method", ["DeepLIFT", "integrated gradients"])
def test_what_is_compared_with_is_that_of_the_batch_as_it_is(method, baseline) -> None:
    net, td, over = mlp(), batch(5), Noise(0.3, COUNT)
    td["other"] = torch.randn(5, 4).double()

    def make(baseline: object, budget: int | None = None) -> Attribution:
        options = {"baseline": baseline, "memory_budget": budget}
        if method == "DeepLIFT":
            return LRP("deeplift", target=TARGET, **options)
        return IntegratedGradients(TARGET, steps=5, **options)

    if isinstance(baseline, str) and baseline == "mean":
        fixed = td["input"].mean(0)
    elif isinstance(baseline, str) and baseline == "sample":
        fixed = References("sample").of({"input": td["input"]}, {"input": 1}, td)[0].replaced["input"]
    else:
        fixed = td["other"] if isinstance(baseline, str) else baseline
    expected = one_by_one(make(fixed), net, td, over).mean(0)
    for budget in (0, None, 10**10):
        found = Averaged(make(baseline, budget), over).wrap(net)(td.clone())["attr", "input"]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_references() -> None:
    net, td, data = mlp(), batch(5), batch(20)
    over = References("sample", COUNT, data)
    ours = Averaged(LRP("deeplift", target=TARGET, baseline=0.0), over, spread=True).wrap(net)(td.clone())
    inside = References("sample", COUNT, data, spread=True)
    theirs = LRP("deeplift", target=TARGET, baseline=inside).wrap(net)(td.clone())
    for key in (("attr", "input"), ("spread", "input")):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-12)


def test_references_of_a_method_that_has_none_of_its_own() -> None:
    net, td, over = mlp(), batch(5), References("sample", 3, batch(20))
    averaged = Averaged(LRP("epsilon", target=TARGET), over)
    theirs = LRP("epsilon", target=TARGET, baseline=over).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(averaged.wrap(net)(td)["attr", "input"], theirs, rtol=1e-9, atol=1e-12)
    with pytest.raises(TypeError, match="compares with a reference"):
        Product(GradientTimesInput(TARGET), averaged)


def test_each_reference_has_a_place_of_its_own() -> None:
    net, td, data = mlp(), batch(5), batch(20)
    over = References("sample", 300, data)
    found = Averaged(ExpectedGradients(TARGET), over).wrap(net)(td.clone())["attr", "input"]
    truth = ExpectedGradients(TARGET, baseline=data, samples=4000).wrap(net)(td)["attr", "input"]
    torch.testing.assert_close(found, truth, rtol=0, atol=0.03)


TARGETS = {
    "chosen": Target("output", "argmax"),
    "contrast": Contrast(Target("output", "argmax"), Target("output", 0)),
    "computed": Entropy("output"),
    "log probability": LogProb("output", "argmax"),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_what_was_chosen_stays_chosen_under_noise(target) -> None:
    net, td, over = mlp(), batch(6), Noise(3.0, COUNT)
    found = Averaged(Gradient(target, signed=True), over).wrap(net)(td.clone())["attr", "input"]
    index, rows = net(td["input"]).argmax(-1), torch.arange(6)
    expected = []
    for i in range(COUNT):
        x = over.changed("input", td["input"], 1, range(i, i + 1))[0].requires_grad_()
        z = net(x)
        value = {
            "chosen": z[rows, index],
            "contrast": z[rows, index] - z[:, 0],
            "computed": torch.distributions.Categorical(logits=z).entropy(),
            "log probability": z.log_softmax(-1)[rows, index],
        }[next(name for name, one in TARGETS.items() if one is target)]
        expected.append(torch.autograd.grad(value.sum(), x)[0])
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-9, atol=1e-12)
    moved = net(over.changed("input", td["input"], 1, range(COUNT))).argmax(-1)
    assert (moved != index).any()  # elsewhere another is the largest


@pytest.mark.parametrize(
    "method",
    [LRP("epsilon"), LRP("deeplift_shapley", baseline=0.2), IntegratedGradients(steps=3)],
    ids=["rules", "rules on differences", "paths"],
)
def test_which_units_matter_most_is_said_by_the_method_on_the_input_as_it_is(method) -> None:
    """And not by its gradient, nor by each draw for itself."""
    net, td, over = mlp(), batch(6), Noise(0.4, 4)
    top, key = Through(Target("output", "argmax"), "2", "top:3"), ("units", "2")
    told = method.explaining(top).wrap(net)(td.clone())
    named = td.clone()
    named["index"], named[key] = net(td["input"]).argmax(-1), told[key]
    given = method.explaining(Through(Target("output", Key("index")), "2", Key(key)))
    expected = [
        given.wrap(net)(named.clone().set("input", x))["attr", "input"]
        for x in over.changed("input", td["input"], 1, range(4))
    ]
    found = Averaged(method.explaining(top), over).wrap(net)(td.clone())
    assert torch.equal(found[key], told[key])
    torch.testing.assert_close(found["attr", "input"], torch.stack(expected).mean(0), rtol=1e-9, atol=1e-12)
    by_gradient = GradientTimesInput(top).wrap(net)(td.clone())[key]
    if method.compares is False:
        assert (by_gradient != told[key]).any()
        product = Product(method.explaining(top), GradientTimesInput()).wrap(net)(td.clone())
        other = GradientTimesInput(given.target).wrap(net)(named)["attr", "input"]
        torch.testing.assert_close(product["attr", "input"], told["attr", "input"] * other)


def test_units_that_matter_most_against_several_references_are_not_mixed() -> None:
    target = Through(TARGET, "2", "top:2")
    several = LRP("deeplift", target=target, baseline="sample", samples=3)
    with pytest.raises(ValueError, match="not the same against each of several references: name the units"):
        several.wrap(mlp())(batch(5))
    found = Averaged(LRP("deeplift", target=target, baseline=0.0), References("sample", 3)).wrap(mlp())
    alone = LRP("deeplift", target=target, baseline=0.0).wrap(mlp())
    td = batch(5)
    assert torch.equal(found(td.clone())["units", "2"], alone(td.clone())["units", "2"])


@pytest.mark.parametrize("integer", [False, True], ids=["numbers", "bytes"])
@pytest.mark.parametrize("attribute", [["a"], ["a", "b"]], ids=["one of two", "both"])
def test_elements_that_go_further_than_others_go_with_their_own_noise(attribute, integer) -> None:
    """Changed inputs are those of the elements that are still asked about, whether an entry can hold them or not."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, a, b):
            return self.net(torch.cat([a.double(), b], -1))

    policy = TensorDictModule(Two(), ["a", "b"], ["output"])
    a = torch.arange(10).reshape(5, 2)
    a = a.to(torch.uint8) if integer else a.double() / 5
    td = TensorDict({"a": a, "b": torch.randn(5, 2).double()}, [5])
    over = Noise({"a": 0.3, "b": 0.2}, 3)
    method = IntegratedGradients(TARGET, tolerance=1e-2, attribute=attribute)
    found = Averaged(method, over).wrap(policy)(td.clone())
    numbers = {"a": a.float() if integer else a, "b": td["b"]}
    changed = {key: over.changed(key, x, 1, range(3)) for key, x in numbers.items()}
    each = [
        method.wrap(policy)(TensorDict({"a": a, "b": b}, [5])) for a, b in zip(*changed.values(), strict=True)
    ]
    for key in attribute:
        expected = torch.stack([one["attr", key] for one in each]).mean(0)
        torch.testing.assert_close(found["attr", key], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("over", [Flips(-1), Flips(-1, -2), Shifts(1), Shifts(1, (-1,))], ids=repr)
@pytest.mark.parametrize("target", [TARGET, Target("output", "all")], ids=["one", "all"])
def test_pictures_are_moved_back(over, target) -> None:
    net, td = cnn(), TensorDict({"input": torch.rand(3, 2, 8, 8).double()}, [3])
    for method in (LRP("epsilon_plus", target=target), GradCAM("2", target)):
        found = Averaged(method, over).wrap(net)(td.clone())
        expected = one_by_one(method, net, td, over).mean(0)
        torch.testing.assert_close(found["attr", "input"], expected, rtol=1e-9, atol=1e-12)
        assert ("attr", "2") not in found.keys(True)  # nobody knows how to move a layer back


PICTURE = torch.rand(2, 8, 8).double()
COMPARED_WITH = {
    "one for all": PICTURE,
    "a row each": torch.rand(3, 2, 8, 8).double(),
    "a function": blurred(1.0),
    "mean": References("mean", data=TensorDict({"input": torch.rand(5, 2, 8, 8).double()}, [5])),
    "sample": References("sample", 2, TensorDict({"input": torch.rand(5, 2, 8, 8).double()}, [5])),
}


@pytest.mark.parametrize("baseline", COMPARED_WITH.values(), ids=COMPARED_WITH)
@pytest.mark.parametrize("over", [Flips(-1), Shifts(1, (-1,))], ids=repr)
def test_what_is_compared_with_is_moved_as_the_picture_is(over, baseline) -> None:
    net, td = cnn(), TensorDict({"input": torch.rand(3, 2, 8, 8).double()}, [3])
    references = baseline if isinstance(baseline, References) else References(baseline)
    each = references.of({"input": td["input"]}, {"input": 1}, td)
    for make in (
        lambda b, target=TARGET: IntegratedGradients(target, steps=3, baseline=b),
        lambda b, target=TARGET: LRP("epsilon", target=target, baseline=b),
        lambda b, target=TARGET: Ablation(target, baseline=b, features=partial(patches, size=4)),
    ):
        expected = torch.zeros_like(td["input"])
        for i in range(over.samples):
            x = over.changed("input", td["input"], 1, range(i, i + 1))[0]
            for one in each:
                there = over.changed("input", one.replaced["input"], 1, range(i, i + 1))[0]
                found = make(there).wrap(net)(TensorDict({"input": x}, [3]))["attr", "input"]
                expected += over.undone("input", found.unsqueeze(0), 2, range(i, i + 1))[0]
        expected /= over.samples * len(each)
        method = Averaged(make(baseline), over)
        for around in (method, Averaged(Averaged(make(baseline), Noise(0.0, 2)), over)):
            found = around.wrap(net)(td.clone())["attr", "input"]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    several = Averaged(make(baseline, Target("output", "all")), over).wrap(net)(td.clone())
    torch.testing.assert_close(several["attr", "input"][:, 1], expected, rtol=1e-9, atol=1e-12)


def test_settled_references_are_moved_too() -> None:
    net, td = cnn(), TensorDict({"input": torch.rand(3, 2, 8, 8).double()}, [3])
    method = Averaged(IntegratedGradients(TARGET, steps=3, baseline=PICTURE), Flips(-1))
    expected = method.wrap(net)(td.clone())["attr", "input"]
    found = Explain(method, TensorDictModule(net, ["input"], ["output"]))(td.clone())["attr", "input"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_layers_are_averaged_over_noise() -> None:
    net, td, over = mlp(), batch(5), Noise(0.3, COUNT)
    for use_inputs in (True, False):
        method = LRP("epsilon", target=TARGET, input_modules=["1"], use_inputs=use_inputs)
        found = Averaged(method, over).wrap(net)(td.clone())
        expected = one_by_one(method, net, td, over, "1").mean(0)
        torch.testing.assert_close(found["attr", "1"], expected, rtol=1e-9, atol=1e-12)
        assert (("attr", "input") in found.keys(True)) is use_inputs


class Bytes(nn.Module):
    """Scales pictures of integers, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype is torch.uint8
        return self.layer(x.float() / 255).tanh()


def test_integers_stay_integers() -> None:
    net, x = Bytes(), torch.randint(256, (5, 4), dtype=torch.uint8)
    over = Noise(20.0, COUNT)
    found = Averaged(Gradient(TARGET, signed=True), over).wrap(net)(TensorDict({"input": x}, [5]))
    noisy = over.changed("input", x.float(), 1, range(COUNT)).requires_grad_()
    value = net.layer(noisy / 255).tanh()[..., 1].sum()
    expected = torch.autograd.grad(value, noisy)[0].mean(0)
    torch.testing.assert_close(found["attr", "input"], expected)


def test_several_and_nested_keys() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.a(a).tanh() * self.b(b).sigmoid()

    net, deep = Two().double(), ("agents", "b")
    td = TensorDict({"a": torch.randn(5, 7, 3).double(), deep: torch.randn(5, 7, 2).double()}, [5])
    over, method = Noise({"a": 0.2, deep: 0.4}, COUNT), Gradient(Target("output", (0, 1)), signed=True)
    found = Averaged(method, over).wrap(net, in_keys=["a", deep])(td.clone())
    a, b = (over.changed(key, td[key], 1, range(COUNT)).requires_grad_() for key in ("a", deep))
    expected = torch.autograd.grad(net(a, b)[..., 0, 1].sum(), (a, b))
    torch.testing.assert_close(found["attr", "a"], expected[0].mean(0))
    torch.testing.assert_close(found["attr", "agents", "b"], expected[1].mean(0))


def test_within_each_other_and_within_a_product() -> None:
    net, td = mlp(), batch(5)
    inner = Averaged(Gradient(TARGET, signed=True), Noise(0.2, 3))
    found = Averaged(inner, Noise(0.1, 4, seed=1)).wrap(net)(td.clone())["attr", "input"]
    expected = one_by_one(inner, net, td, Noise(0.1, 4, seed=1)).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    both = Product(GradientTimesInput(TARGET), Averaged(Gradient(signed=True), Noise(0.2, 3)))
    product = GradientTimesInput(TARGET).wrap(net)(td.clone())["attr", "input"]
    product = product * inner.wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(both.wrap(net)(td)["attr", "input"], product)


@pytest.mark.parametrize("over", [Noise(0.1, 3), References("sample", 3)], ids=["noise", "references"])
def test_copies(over) -> None:
    explained = Averaged(LRP("deeplift", target=TARGET, baseline=0.0), over, spread=True).wrap(mlp())
    td = batch(5)
    expected = explained(td.clone())
    assert {("attr", "input"), ("spread", "input"), ("standard_error", "input")} <= set(explained.out_keys)
    for other in (copy.deepcopy(explained), pickle.loads(pickle.dumps(explained))):
        assert (other(td.clone()) == expected).all()


class Doubled:
    """A transform of a user's own: all values doubled, relevance taken back by half."""

    samples = 1

    def changed(self, key, value, dims, numbers):
        return 2 * value.unsqueeze(0)

    def undone(self, key, relevance, dims, numbers):
        return relevance / 2

    stays = False


def test_a_transform_of_ones_own() -> None:
    net, td = nn.Linear(4, 3).double(), batch(5)
    found = Averaged(GradientTimesInput(TARGET), Doubled()).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(found, GradientTimesInput(TARGET).wrap(net)(td)["attr", "input"])


def test_mistakes() -> None:
    gradient = Gradient(TARGET)
    with pytest.raises(ValueError, match="of is 'mean', 'squares' or 'variance', got 'median'"):
        Averaged(gradient, Noise(0.1), of="median")
    with pytest.raises(TypeError, match="compares with no reference: average it over Noise, or give LRP"):
        Averaged(gradient, References("sample", 3))
    with pytest.raises(ValueError, match=r"writes .*'target'.* besides relevance.*leave out ledger"):
        Averaged(IntegratedGradients(TARGET, ledger=True), Noise(0.1))
    for options in ({"spread": True}, {"of": "variance"}):
        with pytest.raises(ValueError, match="one explanation has no spread: draw several, by samples"):
            Averaged(gradient, Noise(0.1, 1), **options)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    td = TensorDict({"input": torch.randint(9, (5, 3))}, [5])
    tokens = Gradient(TARGET, use_inputs=False, input_modules=["0"])
    with (
        pytest.warns(UserWarning, match="input 'input' is torch.int64"),
        pytest.raises(ValueError, match="there is no input to change: none of those that the model reads"),
    ):
        Averaged(tokens, Noise(0.1)).wrap(net)(td)
    layer = LRP("epsilon", target=TARGET, use_inputs=False, input_modules=["1"])
    with pytest.raises(
        ValueError, match="Flips moves the inputs, and what is attributed lies inside the model"
    ):
        Averaged(layer, Flips(-1)).wrap(mlp())(batch(5))
    with pytest.raises(TypeError, match="a product is of methods that explain the value"):
        Product(gradient, Averaged(IntegratedGradients(), Noise(0.1)))
