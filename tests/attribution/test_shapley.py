"""Shapley values equal the enumeration, and have the properties that they are known by."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from enumerated import shapley, worth_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import References, Target
from tdhook.attribution import Ablation, KernelShap, Shapley, ShapleySampling
from tdhook.perturbing.features import along, patches
from tdhook.targets import AtStep, Computed, Contrast

EXACT = [Shapley, KernelShap]


def mlp(inputs: int = 5, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, outputs)).double()


def observations(*batch: int, shape: tuple[int, ...] = (5,)) -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(*batch, *shape).double()}, list(batch))


@pytest.mark.parametrize("method", EXACT)
def test_the_enumeration(method) -> None:
    net, td = mlp(), observations(4)
    x, baseline = td["input"], torch.linspace(-1, 1, 5).double()
    for output in range(3):
        worth = worth_of(lambda z, k=output: net(z)[:, k], x, baseline, torch.arange(5))
        found = method(Target("output", output), baseline=baseline).wrap(net)(td.clone())["attr", "input"]
        torch.testing.assert_close(found, shapley(worth, 5).T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", EXACT)
def test_groups_share_evenly_and_the_rest_is_left_alone(method) -> None:
    net, td = mlp(), observations(4)
    groups = torch.tensor([7, 3, -1, 7, 7])
    worth = worth_of(
        lambda z: net(z)[:, 1], td["input"], torch.zeros(5).double(), torch.tensor([1, 0, -1, 1, 1])
    )
    values = shapley(worth, 2).T
    found = method(Target("output", 1), features=groups).wrap(net)(td)["attr", "input"]
    expected = torch.stack(
        [values[:, 1] / 3, values[:, 0], 0 * values[:, 0], values[:, 1] / 3, values[:, 1] / 3], -1
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [*EXACT, partial(ShapleySampling, permutations=4)])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_completeness(method, data) -> None:
    """Of any batch shape, target and baseline."""
    batch = data.draw(st.lists(st.integers(1, 3), max_size=2))
    index = data.draw(st.sampled_from([0, "argmax", "all", [0, 2]]))
    baseline = data.draw(
        st.sampled_from([0.0, 0.7, torch.linspace(-1, 1, 5).double(), {"input": torch.zeros_like}])
    )
    found = method(Target("output", index), baseline=baseline, ledger=True).wrap(mlp())(observations(*batch))
    several = (3,) if index == "all" else (2,) if isinstance(index, list) else ()
    assert found["attr", "input"].shape == (*batch, *several, 5)
    assert found["ledger", "target"].shape == (*batch, *several)
    torch.testing.assert_close(
        found["attr", "input"].sum(-1), found["ledger", "target"], rtol=1e-9, atol=1e-11
    )
    assert found["ledger", "gap"].abs().max() < 1e-10


class Sum(nn.Module):
    """``scale * f + g`` of the same inputs, where inputs 0 and 1 are exchangeable and 4 counts for nothing."""

    def __init__(self, scale: float, f: bool = True, g: bool = True) -> None:
        super().__init__()
        self.scale, self.f, self.g = scale, f, g

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, _ = x.unbind(-1)
        f, g = (a * b).tanh() + c * d, (a + b).sin() * c + d**3
        return (self.scale * f * self.f + g * self.g).unsqueeze(-1)


@pytest.mark.parametrize("method", [*EXACT, partial(ShapleySampling, permutations=6)])
@given(scale=st.floats(-3, 3))
@settings(max_examples=10, deadline=None)
def test_linearity_and_dummy(method, scale) -> None:
    td = observations(3)
    both, f, g = (
        method().wrap(net)(td.clone())["attr", "input"]
        for net in (Sum(scale), Sum(1.0, g=False), Sum(1.0, f=False))
    )
    torch.testing.assert_close(both, scale * f + g, rtol=1e-9, atol=1e-10)
    assert both[..., 4].abs().max() < 1e-10


@pytest.mark.parametrize("method", EXACT)
def test_symmetry(method) -> None:
    td = observations(6)
    td["input"][:, 1] = td["input"][:, 0]
    found = method().wrap(Sum(1.0))(td)["attr", "input"]
    torch.testing.assert_close(found[:, 0], found[:, 1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [*EXACT, ShapleySampling])
def test_an_element_is_explained_as_it_is_alone(method) -> None:
    td, explained = observations(5), method(Target("output", "argmax")).wrap(mlp())
    together = explained(td.clone())["attr", "input"]
    alone = torch.cat([explained(td[i : i + 1].clone())["attr", "input"] for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_contrasts_and_computed_targets() -> None:
    net, td = mlp(), observations(4)
    each = Shapley(Target("output", "all")).wrap(net)(td.clone())["attr", "input"]
    contrast = Contrast(Target("output", 0), Target("output", 2))
    found = Shapley(contrast).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(found, each[:, 0] - each[:, 2])
    square = Computed(lambda outputs, inputs: outputs["output"].square().sum(-1, keepdim=True))
    worth = worth_of(lambda z: net(z).square().sum(-1), td["input"], torch.zeros(5).double(), torch.arange(5))
    found = Shapley(square).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(found, shapley(worth, 5).T)


def test_what_is_chosen_is_chosen_at_the_input() -> None:
    net = nn.Linear(1, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[2.0], [0.0]]))
        net.bias.copy_(torch.tensor([-1.0, 0.0]))
    td = TensorDict({"input": torch.ones(1, 1).double()}, [1])
    for method in (*EXACT, ShapleySampling):
        found = method(Target("output", "argmax")).wrap(net)(td.clone())["attr", "input"]
        torch.testing.assert_close(found, torch.full((1, 1), 2.0).double())


class TwoInputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.prod(-1) * b.sum(-1)).unsqueeze(-1)


def test_whole_keys_are_features() -> None:
    a, b = torch.randn(4, 2).double(), torch.randn(4, 3).double()
    module = TensorDictModule(TwoInputs(), ["a", "b"], ["output"])
    td = TensorDict({"a": a, "b": b}, [4])
    found = Shapley(features="whole").wrap(module)(td.clone())
    half = a.prod(-1) * b.sum(-1) / 2
    torch.testing.assert_close(found["attr", "a"].sum(-1), half)
    torch.testing.assert_close(found["attr", "b"], (half / 3).unsqueeze(-1).expand(4, 3))
    mixed = Shapley(features={"a": "whole"}).wrap(module)(td.clone())
    torch.testing.assert_close(mixed["attr", "a"].sum(-1), half)
    torch.testing.assert_close(mixed["attr", "b"], a.prod(-1, keepdim=True) * b / 2)
    one = Shapley(baseline={"a": 0.0}).wrap(module)(td.clone())
    torch.testing.assert_close(one["attr", "a"].sum(-1), 2 * half)
    torch.testing.assert_close(one["attr", "b"], torch.zeros_like(one["attr", "b"]), rtol=0, atol=1e-12)


def test_frames_patches_agents_and_functions_of_shapes() -> None:
    td = observations(2, shape=(2, 4, 6))
    net = nn.Sequential(nn.Flatten(), mlp(48, 2))
    for groups, count in ((along((2, 4, 6), 0), 2), (patches((2, 4, 6), (2, 3)), 4)):
        given = Shapley(Target("output", 0), features=groups).wrap(net)(td.clone())["attr", "input"]
        values = shapley(
            worth_of(lambda z: net(z)[:, 0], td["input"], torch.zeros(2, 4, 6).double(), groups), count
        )
        extent = groups.flatten().bincount()
        torch.testing.assert_close(given, (values.T / extent)[:, groups])
    made = Shapley(Target("output", 0), features=partial(patches, size=(2, 3))).wrap(net)(td.clone())
    torch.testing.assert_close(made["attr", "input"], given)


def test_integers_are_explained_at_their_embedding() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 2)
    ).double()
    td = TensorDict({"input": torch.randint(10, (5, 3))}, [5])
    tokens = {"0": lambda shape: along(shape, 0)}
    method = Shapley(Target("output", 0), use_inputs=False, input_modules=["0"], features=tokens)
    found = method.wrap(net)(td)["attr", "0"]
    x = net[0](td["input"])
    worth = worth_of(lambda z: net[1:](z)[:, 0], x, torch.zeros(()).double(), along((3, 4), 0))
    torch.testing.assert_close(found.sum(-1), shapley(worth, 3).T)
    torch.testing.assert_close(found[..., 0], found[..., 3])


def test_the_mean_over_drawn_references_and_its_spread() -> None:
    net, td = mlp(), observations(4)
    data = TensorDict({"input": torch.randn(9, 5).double()}, [9])
    references = References("sample", samples=3, data=data, spread=True)
    found = Shapley(Target("output", 0), baseline=references, ledger=True).wrap(net)(td.clone())
    drawn = references.of({"input": td["input"]}, {"input": 1}, td)
    each = torch.stack(
        [
            shapley(
                worth_of(lambda z: net(z)[:, 0], td["input"], one.replaced["input"], torch.arange(5)), 5
            ).T
            for one in drawn
        ]
    )
    torch.testing.assert_close(found["attr", "input"], each.mean(0))
    torch.testing.assert_close(found["spread", "input"], each.std(0))
    assert found["ledger", "gap"].abs().max() < 1e-10


class Recurrent(nn.Module):
    """Reads ``[*batch, time, features]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.GRU(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[0])


def test_steps_that_depend_on_each_other_are_features_of_one_sequence() -> None:
    net = Recurrent().double()
    td = observations(3, 4, shape=(2,))
    worth = worth_of(
        lambda z: net(z)[..., 0].sum(-1), td["input"], torch.zeros(()).double(), along((4, 2), 0, 1)
    )
    found = Shapley(Target("output", 0)).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(found, shapley(worth, 8).T.reshape(3, 4, 2))
    said = Shapley(Target("output", 0), batch_dims=1).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(found, said)
    steps = Shapley(Target("output", 0), features=along((4, 2), 0)).wrap(net)(td.clone())["attr", "input"]
    worth = worth_of(
        lambda z: net(z)[..., 0].sum(-1), td["input"], torch.zeros(()).double(), along((4, 2), 0)
    )
    torch.testing.assert_close(steps.sum(-1), shapley(worth, 4).T)
    both = Shapley(Target("output", 0), features=torch.zeros(2, dtype=torch.int64)).wrap(net)(td.clone())
    torch.testing.assert_close(both["attr", "input"], steps)


def test_time_may_be_the_first_axis() -> None:
    net = Recurrent().double()
    td = observations(3, 4, shape=(2,))

    class TimeFirst(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x.transpose(0, 1)).transpose(0, 1)

    found = Shapley(Target("output", 0)).wrap(net)(td.clone())["attr", "input"]
    turned = TensorDict({"input": td["input"].transpose(0, 1).contiguous()}, [4, 3])
    other = Shapley(Target("output", 0)).wrap(TimeFirst())(turned)["attr", "input"]
    torch.testing.assert_close(other.transpose(0, 1), found)


def test_one_step_of_a_sequence() -> None:
    net = Recurrent().double()
    td = observations(3, 4, shape=(2,))
    found = Shapley(AtStep(Target("output", 1), 2)).wrap(net)(td.clone())["attr", "input"]
    worth = worth_of(lambda z: net(z)[:, 2, 1], td["input"], torch.zeros(()).double(), along((4, 2), 0, 1))
    torch.testing.assert_close(found, shapley(worth, 8).T.reshape(3, 4, 2))
    assert found[:, 3].abs().max() < 1e-12


def test_a_model_that_mixes_the_batch_has_one_element() -> None:
    """Batch norm in training: each number depends on all, and the target is the sum."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    td = observations(3, shape=(2,))
    with torch.no_grad():
        whole = worth_of(
            lambda z: net(z).tanh().sum(), td["input"], torch.zeros(()).double(), along((3, 2), 0, 1)
        )
        expected = shapley(whole, 6).reshape(3, 2)
    net.append(nn.Tanh())
    found = Shapley(Target("output", 0)).wrap(net)(td.clone())["attr", "input"]
    torch.testing.assert_close(found, expected)


class Shifted(nn.Module):
    """Each element looks at the one before, whatever lies there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        own = self.layer(x.reshape(-1, 4)).tanh()
        return (own + 0.5 * own.roll(1, 0)).reshape(*x.shape[:-1], 3)


@pytest.mark.parametrize("options", [{}, {"batch_dims": 0}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_variants_do_not_look_at_each_other(seed, options) -> None:
    torch.manual_seed(seed)
    net, x = Shifted().double(), torch.randn(3, 4).double()
    with torch.no_grad():
        whole = net(x)[:, 0].sum()
        expected = torch.zeros(3, 4).double()
        for place in itertools.product(range(3), range(4)):
            changed = x.clone()
            changed[place] = 0.2
            expected[place] = whole - net(changed)[:, 0].sum()
    found = Ablation(Target("output", 0), baseline=0.2, **options).wrap(net)(TensorDict({"input": x}, [3]))
    torch.testing.assert_close(found["attr", "input"], expected)


def test_too_many_features() -> None:
    with pytest.raises(
        ValueError,
        match=r"17 features have 2 \*\* 17 coalitions, too many to ask for each \(16 features at most\): group them",
    ):
        Shapley(Target("output", 0)).wrap(mlp(17))(observations(2, shape=(17,)))


CALLS = itertools.count(1)


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * next(CALLS)


def test_a_model_that_counts_has_no_answer() -> None:
    with pytest.raises(
        ValueError, match=r"does not answer the same to the same input, .* or counts its calls"
    ):
        Shapley(Target("output", 0)).wrap(nn.Sequential(mlp(), Counting()))(observations(8))


def test_features_that_do_not_fit() -> None:
    module, td = TensorDictModule(TwoInputs(), ["a", "b"], ["output"]), TensorDict({}, [4])
    td["a"], td["b"] = torch.randn(4, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"features are given for one value, and there are 'a', 'b'"):
        Shapley(features=torch.arange(2)).wrap(module)(td.clone())
    with pytest.raises(KeyError, match=r"features are given for 'c', which is none of 'a', 'b'"):
        Shapley(features={"c": torch.arange(2)}).wrap(module)(td.clone())
    with pytest.raises(
        ValueError, match=r"the features of 'a' have shape \[3\]; one element of the batch has \[2\]"
    ):
        Shapley(features={"a": torch.arange(3)}).wrap(module)(td.clone())
    with pytest.raises(ValueError, match=r"leave nothing to replace"):
        Shapley(features=torch.full((2,), -1))
    with pytest.raises(
        TypeError, match=r"features are numbers or truth values for each entry, got torch.float32"
    ):
        Shapley(features=torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"features='each' is neither 'whole', numbers by entry nor a function"
    ):
        Shapley(features="each")
    with pytest.raises(ValueError, match=r"gave the shape \[1\] for values of shape \[2\]"):
        Shapley(features=lambda shape: torch.zeros(1, dtype=torch.int64)).wrap(module)(td.clone())
    with pytest.raises(ValueError, match=r"batch_dims=2 of a TensorDict of batch size \[4\]: give 0 to 1"):
        Shapley(batch_dims=2).wrap(module)(td.clone())


def test_nothing_to_replace() -> None:
    method = Shapley(Target("output", 0), input_modules=["0"], baseline={"input": 0.0})
    with pytest.raises(
        ValueError, match="the baseline names none of '0', so that nothing there would be replaced"
    ):
        method.wrap(mlp())(observations(2))


def test_progress() -> None:
    told: list[tuple[int, int]] = []
    Shapley(Target("output", 0), progress=lambda done, total: told.append((done, total))).wrap(mlp())(
        observations(2)
    )
    assert told[-1] == (32, 32)
    with pytest.raises(ValueError, match="a graph tells nobody how far it is"):
        Shapley(progress=True, compile=True)


def test_a_bar() -> None:
    pytest.importorskip("rich")
    Shapley(Target("output", 0), progress=True).wrap(mlp())(observations(2))


@pytest.mark.parametrize("method", [*EXACT, partial(ShapleySampling, permutations=4, errors=True)])
def test_one_graph(method) -> None:
    net, td = mlp(), observations(3)
    options = {"features": torch.tensor([0, 0, 1, 2, -1]), "ledger": True}
    eager = method(Target("output", "all"), **options).wrap(net)(td.clone())
    graph = method(Target("output", "all"), compile={"backend": "aot_eager"}, **options).wrap(net)
    for _ in range(2):
        torch.testing.assert_close(graph(td.clone()), eager, rtol=1e-10, atol=1e-12)


def test_frames_of_whole_numbers_and_nested_keys() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.float() / 255).flatten(1).square().sum(-1, keepdim=True).sin()

    x = torch.randint(0, 255, (3, 2, 6, 6), dtype=torch.uint8)
    found = Shapley(features=partial(patches, size=3)).wrap(Scaled())(TensorDict({"input": x}, [3]))
    worth = worth_of(
        lambda z: Scaled()(z)[:, 0], x, torch.zeros((), dtype=torch.uint8), patches((2, 6, 6), 3)
    )
    expected = shapley(worth, 4).T[:, patches((2, 6, 6), 3)] / 18
    torch.testing.assert_close(found["attr", "input"], expected, rtol=1e-4, atol=1e-6)

    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(-2).prod(-1, keepdim=True)

    agents = TensorDict({"observation": torch.rand(4, 3, 2)}, [4, 3])
    module = TensorDictModule(Product(), [("agents", "observation")], ["output"])
    each = {("agents", "observation"): lambda shape: along(shape, 0)}
    td = Shapley(features=each).wrap(module)(TensorDict({"agents": agents}, [4]))
    assert td["attr", "agents"].batch_size == (4, 3)
    share = (td["output"] / 6).unsqueeze(-1).expand(4, 3, 2)
    torch.testing.assert_close(td["attr", "agents", "observation"], share)


def test_batch_norm_in_training_as_one_graph() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 1)).double()

    td = observations(3, shape=(2,))
    eager = Shapley().wrap(net())(td.clone())
    graph = Shapley(compile={"backend": "aot_eager"}).wrap(net())
    for _ in range(2):
        torch.testing.assert_close(graph(td.clone())["attr", "input"], eager["attr", "input"])


@pytest.mark.parametrize("lag", range(1, 12))
@pytest.mark.parametrize("count", [12, 13, 40])
def test_elements_are_told_apart_by_any_lag(lag, count) -> None:
    """Whatever elements depend on each other, it is seen: a value depends on that some steps before alone."""

    class Lagged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.cat([torch.ones_like(x[:, :lag]), x[:, :-lag]], 1)

    td = observations(1, count, shape=(1,))
    found = Ablation(Target("output", 0)).wrap(Lagged())(td.clone())["attr", "input"]
    x = td["input"][0, :, 0]
    lost = Lagged()(td["input"])[0, :, 0]
    after = torch.cat([lost[lag:], torch.zeros(lag).double()])
    assert torch.allclose(found[0, :, 0], lost + after), x
