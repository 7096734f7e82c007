"""What every attribution method has: targets, shapes, keys, module paths, compilation."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import LRP, Contrast, Key, Target
from tdhook.attribution import (
    Ablation,
    Attribution,
    Gradient,
    GradientTimesInput,
    IntegratedGradients,
    ShapleySampling,
)
from tdhook.evaluation import RandomMap, sensitivity
from tdhook.targets import AtStep, Entropy

METHODS = {
    "lrp": lambda *args, **options: LRP("epsilon", target=args[0] if args else None, **options),
    "gradient": lambda *args, **options: Gradient(*args, signed=True, **options),
    "gradient_times_input": GradientTimesInput,
    "integrated_gradients": lambda *args, **options: IntegratedGradients(*args, steps=4, **options),
    "ablation": Ablation,
    "shapley_sampling": lambda *args, **options: ShapleySampling(*args, permutations=2, **options),
    "random": RandomMap,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
no_random = pytest.mark.parametrize(
    "method",
    [make for name, make in METHODS.items() if name != "random"],
    ids=[n for n in METHODS if n != "random"],
)


class TwoInputs(nn.Module):
    """Reads two inputs and writes four values, none of which is linear in them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(5, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(a)) * torch.sigmoid(self.b(b)))


def model() -> TensorDictModule:
    torch.manual_seed(1)
    return TensorDictModule(TwoInputs().double(), ["a", ("deep", "b")], [("q", "value")])


def data(*batch: int) -> TensorDict:
    entries = {"a": torch.randn(*batch, 3).double(), ("deep", "b"): torch.randn(*batch, 2).double()}
    return TensorDict(entries, batch).set("taken", torch.randint(4, batch))


TARGETS = {
    "index": Target(("q", "value"), 1),
    "argmax": Target(("q", "value"), "argmax"),
    "entry": Target(("q", "value"), Key("taken")),
    "contrast": Contrast(Target(("q", "value"), 0), Target(("q", "value"), 2)),
    "entropy": Entropy(("q", "value")),
}


@no_random
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_batch_of_any_shape_is_explained_as_each_of_its_elements(method, target, batch) -> None:
    actor, td = model(), data(*batch)
    explained = method(target).wrap(actor)
    found = explained(td.clone())
    assert found["attr", "a"].shape == td["a"].shape
    assert found["attr", "deep", "b"].shape == td["deep", "b"].shape
    torch.testing.assert_close(found["q", "value"], actor(td.clone())["q", "value"])
    for index in product(*map(range, batch)):
        one = explained(td[index].clone())
        torch.testing.assert_close(one["attr", "a"], found["attr", "a"][index])


@no_random
def test_several_outputs_are_explained_as_each_of_them(method) -> None:
    actor, td = model(), data(3)
    every = method(Target(("q", "value"), "all")).wrap(actor)(td.clone())["attr", "a"]
    assert every.shape == (3, 4, 3)
    for i in range(4):
        alone = method(Target(("q", "value"), i)).wrap(actor)(td.clone())["attr", "a"]
        torch.testing.assert_close(every[:, i], alone)


@every_method
def test_modules_inside_are_attributed_and_explained(method) -> None:
    td = data(3)
    found = method(Target(("q", "value"), 0), input_modules=["out"]).wrap(model())(td.clone())
    assert found["attr", "out"].shape == (3, 4) and found["attr", "a"].shape == (3, 3)
    inner = method(Target("b", 1), target_modules=["b"]).wrap(model(), in_keys=[("deep", "b")])(td.clone())
    assert inner["attr", "deep", "b"].shape == (3, 2)


@no_random
def test_relevance_of_a_module_inside(method) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    td = TensorDict({"input": torch.randn(5, 3).double()}, [5])
    found = method(Target("output", 0), use_inputs=False, input_modules=["1"]).wrap(net)(td.clone())
    tail = method(Target("output", 0)).wrap(net[2])(TensorDict({"input": net[:2](td["input"]).detach()}, [5]))
    torch.testing.assert_close(found["attr", "1"], tail["attr", "input"])


class Shared(nn.Module):
    """Calls one layer three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


@every_method
def test_the_calls_of_a_module_are_told_apart(method) -> None:
    net, td = Shared().double(), TensorDict({"input": torch.randn(5, 3).double()}, [5])
    explained = method(Target("output", 0), input_modules=["layer"], values=True).wrap(net)
    found = explained(td)
    first = net.layer(td["input"])
    second = net.layer(torch.tanh(first))
    torch.testing.assert_close(found["value", "layer"], first)
    torch.testing.assert_close(found["value", "layer:1"], second)
    assert set(found["attr"].keys()) == {"input", "layer", "layer:1", "layer:2"}
    assert ("attr", "layer:2") in explained.out_keys
    assert found["attr", "layer"].any() and not torch.equal(found["attr", "layer"], found["attr", "layer:1"])


@no_random
def test_a_later_call_of_a_module_is_a_target(method) -> None:
    net, td = Shared().double(), TensorDict({"input": torch.randn(5, 3).double()}, [5])
    last = method(Target("layer:2", 0), target_modules=["layer"]).wrap(net)(td.clone())["attr", "input"]
    whole = method(Target("output", 0)).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(last, whole)


def test_values_of_keys_and_modules_that_are_not_attributed() -> None:
    torch.manual_seed(0)
    body = TensorDictModule(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), ["input"], ["hidden"])
    net = TensorDictSequential(body, TensorDictModule(nn.Linear(4, 2), ["hidden"], ["output"]))
    td = TensorDict({"input": torch.randn(2, 5, 3)}, [2, 5])
    values = ["input", "hidden", "0.module.0"]
    found = LRP("epsilon", target=Target("output", 0), values=values).wrap(net)(td.clone())
    torch.testing.assert_close(found["value", "input"], td["input"])
    torch.testing.assert_close(found["value", "hidden"], found["hidden"])
    torch.testing.assert_close(found["value", "0.module.0"], body.module[0](td["input"]))
    assert list(found["attr"].keys()) == ["input"]
    with pytest.raises(ValueError, match="the model has no module 'nothing'"):
        LRP("epsilon", values=["nothing"]).wrap(net)


@every_method
def test_a_first_layer_in_place(method) -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    td = TensorDict({"input": torch.randn(4, 3)}, [4])
    before = td["input"].clone()
    found = method(Target("output", 0)).wrap(net)(td)
    torch.testing.assert_close(found["input"], before)
    assert found["attr", "input"].shape == (4, 3)


class Halved(Attribution):
    """A method as a user would write one: half the gradient."""

    def explain(self, runner, td):
        with runner.forward(td) as run:
            pulled = run.pull(run.seeds(self.seeder), run.sources())
        return {key: grad / 2 for key, grad in pulled.items()}


def test_a_method_of_ones_own() -> None:
    td = data(3)
    for target in (Entropy(("q", "value")), Target(("q", "value"), "all")):
        half = Halved(target).wrap(model())(td.clone())["attr", "a"]
        whole = Gradient(target, signed=True).wrap(model())(td.clone())["attr", "a"]
        torch.testing.assert_close(2 * half, whole)
    found = sensitivity(model(), data(8), Halved(Target(("q", "value"), 0)), draws=2)
    assert found.maximum.shape == (8,)
    assert repr(Halved(None)) == "Halved(target=None)"
    assert Halved(None).explaining(Target("q")).target == Target("q")


class Astray(Attribution):
    def explain(self, runner, td):
        return {"nowhere": td["input"]}


class Blind(Attribution):
    """Does not run the model."""

    def explain(self, runner, td):
        return {"input": torch.zeros_like(td["input"])}


def test_what_a_method_may_return() -> None:
    net, td = nn.Linear(3, 2), TensorDict({"input": torch.randn(4, 3)}, [4])
    with pytest.raises(
        KeyError, match=r"Astray.explain gave relevance of 'nowhere', which is none of .*'input'"
    ):
        Astray().wrap(net)(td.clone())
    found = Blind().wrap(net)(td.clone())
    torch.testing.assert_close(found["output"], net(td["input"]))
    with pytest.raises(RuntimeError, match="Blind keeps no accounts to report"):
        Blind().wrap(net).report()


class OfAllSteps(nn.Module):
    """A recurrent network's outputs at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@no_random
def test_steps_of_a_sequence(method) -> None:
    net = TensorDictModule(OfAllSteps().double(), ["input"], ["output"])
    td = TensorDict({"input": torch.randn(4, 6, 3).double()}, [4, 6])
    found = method(AtStep(Target("output", 0), 2)).wrap(net)(td)["attr", "input"]
    assert found[:, :3].any() and not found[:, 3:].any()


def test_inputs_are_chosen_by_a_function() -> None:
    td = data(3)
    chosen = GradientTimesInput(
        Target(("q", "value"), 0), attribute=lambda inputs, td: inputs.select("a")
    ).wrap(model())(td.clone())
    whole = GradientTimesInput(Target(("q", "value"), 0)).wrap(model())(td.clone())
    assert list(chosen["attr"].keys(True, True)) == ["a"]
    torch.testing.assert_close(chosen["attr", "a"], whole["attr", "a"])


@every_method
def test_a_copied_module_explains_the_same(method) -> None:
    td = data(3)
    explained = method(Target(("q", "value"), 0)).wrap(model())
    again = copy.deepcopy(explained)
    torch.testing.assert_close(explained(td.clone())["attr", "a"], again(td.clone())["attr", "a"])


@pytest.mark.slow
@no_random
@pytest.mark.parametrize(
    "target, backend", [(TARGETS["argmax"], "inductor"), (Target(("q", "value"), "all"), "aot_eager")]
)
def test_compiled_equals_eager(method, target, backend) -> None:
    td, actor = data(5), model()
    eager = method(target).wrap(actor)(td.clone())
    graph = method(target, compile={"backend": backend}).wrap(actor)(td.clone())
    for key in (("attr", "a"), ("attr", "deep", "b")):
        torch.testing.assert_close(graph[key], eager[key], rtol=1e-12, atol=1e-12)
