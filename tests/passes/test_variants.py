"""Variants: as many side by side as fit, and never those that have to do with each other."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import Target
from tdhook.attribution import Ablation, Conductance, IntegratedGradients, KernelShap, Occlusion
from tdhook.attribution.averaged import Averaged
from tdhook.attribution.gradient import Gradient
from tdhook.perturbing.draws import Flips, Noise
from tdhook.perturbing.quadrature import quadrature

STEPS = 8
BUDGETS = pytest.mark.parametrize("budget", [None, 0, 10_000, 10**10])


def by_hand(net: nn.Module, td: TensorDict, keys: tuple[str, ...] = ("x",)) -> Tensor:
    """Integrated gradients of the sum over the batch, one step after the other."""
    found: Tensor | float = 0.0
    for place, weight in quadrature("gauss_legendre", STEPS):
        x = (place * td["x"]).requires_grad_()
        value = net(x, *(td[key] for key in keys[1:]))[..., 1].sum()
        found = found + weight * torch.autograd.grad(value, x)[0]
    assert isinstance(found, Tensor)
    return found * td["x"]


class Recurrent(nn.Module):
    """A recurrent model over the last axis of the batch, ``[time]`` or ``[batch, time]``."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0])


class Resetting(nn.Module):
    """A recurrent model over ``[time]`` that forgets where ``first`` says so: copies leave each other alone."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        hidden, found = x.new_zeros(6), []
        for here, begins in zip(x, first, strict=True):
            hidden = self.cell(here, hidden * ~begins)
            found.append(self.out(hidden))
        return torch.stack(found)


class Centred(nn.Module):
    """Each element is compared with the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x - x.mean(0)).tanh())


class BatchNormed(nn.Sequential):
    """Batch norm in training, which changes its running statistics too."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


class Counting(nn.Module):
    """Remembers how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x).tanh() * self.calls


class FixedBatch(nn.Module):
    """Written for a batch of five."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(5, 2, 2).reshape(5, 4)).tanh()


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(2.0)).tanh_()


class ByTheLargest(nn.Module):
    """All is measured in units of the largest value of the batch, which smaller ones beside it leave as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x / (x.abs().amax() + 1e-3)).tanh()


class LouderWhereAny(nn.Module):
    """A condition on all of the batch, which has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() * (1.0 + (x.abs() > 0.5).any())


class ByHowMany(nn.Module):
    """Depends on how long the batch is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() / len(x)


CASES = {
    "by the largest": (ByTheLargest, (5,), "alone"),
    "a condition on all": (LouderWhereAny, (5,), "alone"),
    "recurrent, [time]": (Recurrent, (5,), "axis"),
    "recurrent, [batch, time]": (Recurrent, (3, 5), "rows"),
    "compared with the mean": (Centred, (5,), "alone"),
    "batch norm": (BatchNormed, (5,), "alone"),
    "counting": (Counting, (5,), "rows"),
    "fixed batch": (FixedBatch, (5,), "alone"),
}


@BUDGETS
@pytest.mark.parametrize("make, shape, layout", CASES.values(), ids=CASES)
def test_any_layout_gives_what_one_by_one_gives(make, shape, layout, budget) -> None:
    net, td = make().double(), TensorDict({"x": torch.randn(*shape, 4).double()}, shape)
    expected = by_hand(net.train() if make is not Counting else nn.Sequential(net.layer, nn.Tanh()), td)
    method = IntegratedGradients(Target("output", 1), steps=STEPS, memory_budget=budget)
    explained = method.wrap(make().double() if make is Counting else net, in_keys=["x"])
    if make is Counting:
        explained.model.root.layer.load_state_dict(net.layer.state_dict())
    found = explained(td.clone())["attr", "x"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if budget is None:
        assert explained._setup.layout == layout
    if make is Counting:
        assert explained.model.root.calls == 1  # as after a single call of the model


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("make", [ByTheLargest, LouderWhereAny, ByHowMany])
@pytest.mark.parametrize("baseline", [0.0, 0.1])
def test_coupling_that_leaves_the_batch_as_it_is_alone_is_seen(make, count, baseline) -> None:
    torch.manual_seed(count)
    net, td = make().double(), TensorDict({"x": torch.randn(count, 4).double()}, [count])
    target = Target("output", 1)
    methods = {
        "conductance": lambda **options: Conductance(target, baseline=baseline, steps=4, **options),
        "ablation": lambda **options: Ablation(target, baseline=baseline, **options),
        "occlusion": lambda **options: Occlusion(target, baseline=baseline, window=2, **options),
        "by features": lambda **options: KernelShap(
            target, baseline=baseline, features=along_last, **options
        ),
    }
    for name, method in methods.items():
        found, alone = (
            method(**options).wrap(net, in_keys=["x"])(td.clone())["attr", "x"]
            for options in ({}, {"memory_budget": 0})
        )
        torch.testing.assert_close(
            found, alone, rtol=1e-9, atol=1e-12, msg=lambda text, of=name: f"{of}: {text}"
        )


def along_last(shape: torch.Size) -> Tensor:
    return torch.arange(shape[-1]).expand(shape) // 2


@pytest.mark.parametrize("count", [1, 8])
def test_ablation_of_a_model_whose_size_depends_on_how_many_there_are(count) -> None:
    # Copies beside a batch may be as many as it has elements, by chance.
    net, x = ByHowMany().double(), torch.randn(count, 4).double()
    found = Ablation(Target("output", 1)).wrap(net, in_keys=["x"])(TensorDict({"x": x}, [count]))["attr", "x"]
    for feature in range(4):
        without = x.clone()
        without[:, feature] = 0
        torch.testing.assert_close(found[:, feature], (net(x) - net(without))[:, 1].detach())


def test_large_inputs_are_looked_at_too() -> None:
    net = nn.Sequential(ByTheLargestOfPictures(), nn.Flatten(), nn.Linear(3 * 64 * 64, 2))
    x = torch.rand(1, 3, 64, 64)
    x[0, 2, 60, 60] = 5.0  # in the last of the windows
    found, alone = (
        Occlusion(Target("output", 1), window=8, **options).wrap(net)(TensorDict({"input": x.clone()}, [1]))
        for options in ({}, {"memory_budget": 0})
    )
    torch.testing.assert_close(found["attr", "input"], alone["attr", "input"])


def test_of_large_inputs_variants_further_on_are_looked_at_too() -> None:
    """The first ones, which are looked at one by one, do not differ in what is read of the variant before."""
    net, x = Before().double(), torch.randn(1, 600).double()
    found = Ablation(Target("output", 0)).wrap(net, in_keys=["x"])(TensorDict({"x": x}, [1]))["attr", "x"]
    torch.testing.assert_close(found, x * (1 + 3 * (torch.arange(600) == 550)))


class Before(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.sum(-1) + 3 * x.roll(1, 0)[:, 550]).unsqueeze(-1)


class ByTheLargestOfPictures(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.amax() + 1e-3)


def test_what_a_model_overwrites_is_made_anew() -> None:
    net, td = Overwriting().double(), TensorDict({"x": torch.randn(5, 4).double()}, [5])
    found = IntegratedGradients(Target("output", 1), steps=STEPS).wrap(net, in_keys=["x"])(td.clone())
    plain = nn.Sequential(net.layer, nn.Tanh())
    twice = IntegratedGradients(Target("output", 1), steps=STEPS).wrap(plain)(
        TensorDict({"input": 2 * td["x"]}, [5])
    )
    torch.testing.assert_close(found["attr", "x"], twice["attr", "input"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tolerance", [None, 1e-2, 1e-6])
def test_a_sequence_is_never_cut(tolerance) -> None:
    """Copies leave each other alone, and the steps of one do not: a tolerance may not go on with some of them."""
    net, first = Resetting().double(), torch.zeros(9, 1, dtype=torch.bool)
    first[0] = first[5] = True
    td = TensorDict({"x": torch.randn(9, 4).double(), "first": first}, [9])
    options = {"steps": STEPS} if tolerance is None else {"tolerance": tolerance}
    method = IntegratedGradients(Target("output", 1), ledger=True, **options)
    explained = method.wrap(net, in_keys=["x", "first"])
    with pytest.warns(UserWarning, match="'first' is torch.bool, which has no gradient"):
        found = explained(td.clone())
    assert explained._setup.layout == "rows"
    atol = 1e-6 if tolerance is None else tolerance
    torch.testing.assert_close(found["attr", "x"], by_hand(net, td, ("x", "first")), rtol=0, atol=atol)
    assert found["ledger", "gap"].sum().abs() <= atol  # complete together, and not one by one
    gap = found["ledger", "gap"]
    torch.testing.assert_close(gap, gap.mean().expand_as(gap))  # of which each has its share


@pytest.mark.filterwarnings("ignore:input 'is_init' is torch.bool")
def test_a_recurrent_policy_of_torchrl() -> None:
    modules = pytest.importorskip("torchrl.modules")
    lstm = modules.LSTMModule(input_size=4, hidden_size=5, in_key="obs", out_key="feature")
    head = TensorDictModule(nn.Linear(5, 3), ["feature"], ["action_value"])
    net = nn.ModuleList([lstm, head]).double()
    for shape in ([6], [3, 6]):
        td = TensorDict({"obs": torch.randn(*shape, 4).double()}, shape)
        td["is_init"] = torch.zeros(*shape, 1, dtype=torch.bool)
        td["is_init"][..., 0, :] = True
        for key in ("recurrent_state_h", "recurrent_state_c"):
            td[key] = torch.zeros(*shape, 1, 5).double()
        policy = TensorDictSequential(*net)
        found = []
        with modules.set_recurrent_mode(True):
            for options in ({"memory_budget": 0}, {}, {"tolerance": 1e-7}):
                method = IntegratedGradients(Target("action_value", 1), attribute=["obs"], **options)
                found.append(method.wrap(policy)(td.clone())["attr", "obs"])
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("of", ["mean", "squares", "variance"])
def test_mirrors_of_a_batch_have_its_statistics(of) -> None:
    """Batch norm answers the same beside mirrored copies, and its gradient is another one."""
    net = nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    ).double()
    td, over = TensorDict({"input": torch.randn(4, 2, 8, 8).double()}, [4]), Flips(-1, -2)
    method = Gradient(Target("output", 1))
    found = Averaged(method, over, of=of).wrap(net)(td.clone())["attr", "input"]
    each = []
    for i in range(4):
        one = TensorDict({"input": over.changed("input", td["input"], 1, range(i, i + 1))[0]}, [4])
        relevance = method.wrap(net)(one)["attr", "input"].unsqueeze(0)
        each.append(over.undone("input", relevance, 2, range(i, i + 1))[0])
    stack = torch.stack(each)
    expected = {"mean": stack.mean(0), "squares": stack.square().mean(0), "variance": stack.var(0)}[of]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_dropout_drops_the_same_all_the_way() -> None:
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 1)).double().train()
    td = TensorDict({"input": torch.randn(6, 4).double()}, [6])
    found = IntegratedGradients(Target("output", 0), ledger=True).wrap(net)(td)
    assert found["ledger", "gap"].abs().max() < 1e-12


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def test_where_memory_is_short_there_are_fewer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, td = mlp(), TensorDict({"input": torch.randn(5, 4)}, [5])
    method = IntegratedGradients(Target("output", 1), steps=12)
    expected, sizes = method.wrap(net)(td.clone())["attr", "input"], []
    linear = nn.Linear.forward

    def short(self: nn.Linear, x: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 20:
            raise torch.OutOfMemoryError("too large")
        return linear(self, x)

    monkeypatch.setattr(nn.Linear, "forward", short)
    torch.testing.assert_close(method.wrap(net)(td.clone())["attr", "input"], expected)
    assert max(sizes) > 20  # it was tried

    def none(self: nn.Linear, x: Tensor) -> Tensor:
        if len(sizes) > 2:
            raise torch.OutOfMemoryError("too large")
        return short(self, x)

    sizes.clear()
    monkeypatch.setattr(nn.Linear, "forward", none)
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        method.wrap(net)(td.clone())


@BUDGETS
def test_half_precision_and_autocast(budget) -> None:
    td = TensorDict({"input": torch.randn(5, 4)}, [5])
    method = IntegratedGradients(Target("output", 1), memory_budget=budget)
    expected = method.wrap(mlp())(td.clone())["attr", "input"]
    half = method.wrap(mlp().bfloat16())(td.bfloat16())["attr", "input"]
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        cast = method.wrap(mlp())(td.clone())["attr", "input"]
    torch.testing.assert_close(cast, expected, rtol=0.05, atol=0.03)


def test_without_grad_and_in_inference_mode() -> None:
    td, method = TensorDict({"input": torch.randn(5, 4)}, [5]), IntegratedGradients(Target("output", 1))
    expected = method.wrap(mlp())(td.clone())["attr", "input"]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = Averaged(method, Noise(0.0, 3)).wrap(mlp())(td.clone())["attr", "input"]
        torch.testing.assert_close(found.clone(), expected)


def test_an_error_of_the_model_is_raised_as_it_is_and_leaves_nothing_behind() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if (x == 0).all(-1).any():
                raise ArithmeticError("no zeros")
            return self.layer(x)

    net, td = Failing(), TensorDict({"input": torch.rand(5, 4) + 1}, [5])
    before, method = td.clone(), IntegratedGradients(Target("output", 1), rule="left")
    with pytest.raises(ArithmeticError, match="no zeros"):
        method.wrap(net)(td)
    assert (td == before).all() and set(td.keys()) == {"input"}
    assert not any(module._forward_hooks for module in net.modules())


def test_several_outputs_lie_side_by_side_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    td = TensorDict({"input": torch.randn(5, 2, 4).double()}, [5, 2])
    each, one = (IntegratedGradients(Target("output", index), steps=STEPS).wrap(net) for index in ("all", 1))
    together, alone = (explained(td.clone())["attr", "input"] for explained in (each, one))
    assert each._setup.layout == one._setup.layout == "rows"
    torch.testing.assert_close(together[:, :, 1], alone)
