"""Complete methods: accounts of the difference, whatever the shape of the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from tdhook import Contrast, References, Target
from tdhook.attribution import (
    Averaged,
    BlurIntegratedGradients,
    Conductance,
    ExpectedGradients,
    Gradient,
    IntegratedGradients,
    InternalInfluence,
    Noise,
)
from tdhook.targets import Entropy, LogProb

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def net(width: int = 12, outputs: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Softplus(), nn.Linear(width, outputs)
    ).double()


def batch(*shape: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*shape, 4).double()}, shape)


SHAPES = pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3)], ids=str)


@SHAPES
@pytest.mark.parametrize("index", [1, "all"])
@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-9}], ids=["steps", "tolerance"])
def test_the_ledger(shape, index, options) -> None:
    model, td = net(), batch(*shape)
    method = IntegratedGradients(Target("output", index), ledger=True, baseline=0.3, **options)
    explained = method.wrap(model)
    found = explained(td.clone())
    rise = model(td["input"]) - model(torch.full((4,), 0.3, dtype=torch.double))
    rise = rise if index == "all" else rise[..., 1]
    torch.testing.assert_close(found["ledger", "target"], rise, **EXACT)
    torch.testing.assert_close(found["ledger", "inputs"], found["attr", "input"].sum(-1), **EXACT)
    torch.testing.assert_close(found["ledger", "gap"], rise - found["attr", "input"].sum(-1), **EXACT)
    assert found["ledger", "gap"].abs().max() < 1e-9
    assert not found["ledger", "absorbed"].any()
    assert found["attr", "input"].shape == (*shape, *((3,) if index == "all" else ()), 4)
    assert set(explained.out_keys) == {key for key in found.keys(True, True) if key != "input"}


@given(st.integers(0, 1000), st.sampled_from([(), (4,), (2, 3)]))
@settings(max_examples=15)
def test_completeness(seed, shape) -> None:
    """Of smooth networks, to rounding."""
    torch.manual_seed(seed)
    model, td = net(seed=seed), batch(*shape)
    found = IntegratedGradients(Target("output", 1), steps=40, ledger=True).wrap(model)(td)
    assert found["ledger", "gap"].abs().max() < 1e-9


@given(st.integers(0, 1000), st.floats(-3, 3), st.floats(-3, 3))
@settings(max_examples=15)
def test_linearity_sensitivity_and_implementation(seed, a, b) -> None:
    torch.manual_seed(seed)
    first, second, td = net(seed=seed), net(seed=seed + 1), batch(4)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            return a * self.first(x) + b * self.second(x)

    def explain(model: nn.Module) -> Tensor:
        return IntegratedGradients(Target("output", 1)).wrap(model)(td.clone())["attr", "input"]

    torch.testing.assert_close(explain(Sum()), a * explain(first) + b * explain(second), **EXACT)

    class Otherwise(nn.Module):
        """The same function, computed in another way; the last input is not used."""

        def forward(self, x: Tensor) -> Tensor:
            x = x * torch.tensor([1, 1, 1, 0])
            z = first[0].weight @ x.mT + first[0].bias[:, None]
            z = (1 - torch.exp(-2 * z)) / (1 + torch.exp(-2 * z))
            z = torch.log1p(torch.exp(first[2].weight @ z + first[2].bias[:, None]))
            return (first[4].weight @ z).mT + first[4].bias

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return first(torch.cat([x[..., :3], 0 * x[..., 3:]], -1))

    one, other = explain(Otherwise()), explain(Masked())
    torch.testing.assert_close(one, other, **EXACT)
    assert not other[..., 3].any()


@given(st.integers(0, 100), st.sampled_from([None, 1e-2, 1e-4]))
@settings(max_examples=10)
def test_an_element_alone_is_what_it_is_in_a_batch(seed, tolerance) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    ).double()
    td = batch(2, 3)
    steps = None if tolerance is None else 2**14 + 1  # with kinks on the way the last digits take some
    method = IntegratedGradients(Target("output", "all"), tolerance=tolerance, steps=steps, ledger=True)
    explained = method.wrap(model)
    found = explained(td.clone())
    for at in ((0, 0), (1, 2)):
        alone = explained(td[at].clone())
        for key in (("attr", "input"), ("ledger", "gap")):
            torch.testing.assert_close(found[key][at], alone[key], **EXACT)
    if tolerance is not None:
        assert found["ledger", "gap"].abs().max() <= tolerance


TARGETS = {
    "contrast": (
        Contrast(Target("output", "argmax"), Target("output", 0)),
        lambda z, i: z.gather(-1, i).squeeze(-1) - z[..., 0],
    ),
    "entropy": (Entropy("output"), lambda z, i: torch.distributions.Categorical(logits=z).entropy()),
    "log probability": (
        LogProb("output", "argmax"),
        lambda z, i: z.log_softmax(-1).gather(-1, i).squeeze(-1),
    ),
}


@pytest.mark.parametrize("target, value", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("make", [IntegratedGradients, Conductance], ids=["IG", "conductance"])
def test_computed_and_chosen_targets(make, target, value) -> None:
    """What is chosen is chosen at the input."""
    model, td = net(), batch(6)
    found = make(target, steps=200, ledger=True).wrap(model)(td.clone())
    index = model(td["input"]).argmax(-1, keepdim=True)
    rise = value(model(td["input"]), index) - value(model(0 * td["input"]), index)
    torch.testing.assert_close(found["ledger", "target"], rise, **EXACT)
    torch.testing.assert_close(found["attr", "input"].sum(-1), rise, rtol=0, atol=2e-4)


def test_data_to_draw_from() -> None:
    model, td, data = net(), batch(5), batch(20)
    drawn = References("sample", 3, data, spread=True)
    found = IntegratedGradients(Target("output", 1), baseline=drawn, ledger=True).wrap(model)(td.clone())
    starts = [one.replaced["input"] for one in drawn.of({"input": td["input"]}, {"input": 1}, td)]
    each = torch.stack(
        [
            IntegratedGradients(Target("output", 1), baseline=start).wrap(model)(td.clone())["attr", "input"]
            for start in starts
        ]
    )
    torch.testing.assert_close(found["attr", "input"], each.mean(0), **EXACT)
    torch.testing.assert_close(found["spread", "input"], each.std(0), **EXACT)
    mean = torch.stack([model(start)[:, 1] for start in starts]).mean(0)
    torch.testing.assert_close(found["ledger", "target"], model(td["input"])[:, 1] - mean, **EXACT)
    plain = IntegratedGradients(Target("output", 1), baseline=data, samples=3).wrap(model)(td.clone())
    torch.testing.assert_close(plain["attr", "input"], each.mean(0), **EXACT)


def test_keys_that_are_several_nested_and_of_many() -> None:
    class Team(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mine, self.ours = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, agents: Tensor, state: Tensor) -> Tensor:
            return self.mine(agents).tanh().mean(-2) * self.ours(state).sigmoid()

    model, deep = Team().double(), ("agents", "observation")
    td = TensorDict({deep: torch.randn(5, 7, 3).double(), "state": torch.randn(5, 2).double()}, [5])
    td["agents"].batch_size = [5, 7]
    method = IntegratedGradients(Target("output", 1), ledger=True, baseline={deep: 0.1})
    found = method.wrap(model, in_keys=[deep, "state"])(td.clone())
    assert found["attr", "agents", "observation"].shape == (5, 7, 3)
    assert not found["attr", "state"].any()  # what has no baseline stays as it is
    start = model(torch.full((5, 7, 3), 0.1, dtype=torch.double), td["state"])
    rise = (model(td[deep], td["state"]) - start)[:, 1]
    torch.testing.assert_close(found["attr", "agents", "observation"].sum((1, 2)), rise, **EXACT)
    assert found["ledger", "gap"].abs().max() < 1e-9


@pytest.mark.parametrize("scaled", [lambda x: x / 255, lambda x: x.double() / 255, lambda x: x.float() / 255])
def test_pictures_of_bytes(scaled) -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(scaled(x).double().flatten(1)).tanh()

    model, x = Seen().double(), torch.randint(256, (5, 3, 4), dtype=torch.uint8)
    td = TensorDict({"input": x}, [5])
    found = IntegratedGradients(Target("output", 1), ledger=True).wrap(model)(td)
    rise = (model(x) - model(0 * x))[:, 1]
    torch.testing.assert_close(found["attr", "input"].sum((1, 2)).double(), rise, rtol=0, atol=1e-5)


METHODS = {
    "integrated": lambda **o: IntegratedGradients(Target("output", 1), **o),
    "expected": lambda **o: ExpectedGradients(Target("output", 1), **o),
    "conductance": lambda **o: Conductance(Target("output", 1), **o),
    "influence": lambda **o: InternalInfluence(Target("output", 1), **o),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_mistakes_of_all(make) -> None:
    td = batch(5)
    td["other"] = torch.randn(5, 4).double()
    with pytest.raises(
        ValueError, match="the baseline names 'other', which is not attributed, so that its part"
    ):
        make(baseline={"other": "sample"}).wrap(net())(td)
    with pytest.raises(KeyError, match="the baseline names 'missing', which is neither attributed"):
        make(baseline={"missing": "sample"}).wrap(net())(td)
    assert make(baseline="sample").against(References("mean")).references.baseline == "mean"
    assert copy.copy(make()).compares


def test_mistakes_of_steps() -> None:
    for make in (IntegratedGradients, InternalInfluence):
        with pytest.raises(ValueError, match="at least one gradient is averaged, got steps=0"):
            make(steps=0)
        with pytest.raises(
            ValueError, match="no quadrature is named 'simpson'; there are gauss_legendre, trap"
        ):
            make(rule="simpson")
        with pytest.raises(
            ValueError, match="looks at both ends, so that it has at least 2 steps, got steps=1"
        ):
            make(rule="trapezoid", steps=1)
    with pytest.raises(ValueError, match="a way has at least one step, got steps=0"):
        Conductance(steps=0)
    for tolerance in (0.0, -1.0, float("nan")):
        with pytest.raises(
            ValueError, match="a tolerance is how far a sum may be off, a positive number, got"
        ):
            IntegratedGradients(tolerance=tolerance)
    with pytest.raises(ValueError, match="no graph does: give steps"):
        IntegratedGradients(tolerance=1e-3, compile=True)
    with pytest.raises(
        ValueError, match="a tolerance takes at least 9 steps to be seen, got steps=8 at most"
    ):
        IntegratedGradients(tolerance=1e-3, steps=8)
    with pytest.raises(ValueError, match="a way has at least one step, got steps=0"):
        BlurIntegratedGradients(steps=0)
    with pytest.raises(ValueError, match="a blur has a positive width in pixels, got 0"):
        BlurIntegratedGradients(width=0)


def test_a_tolerance_that_is_not_reached_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)).double()
    method = IntegratedGradients(Target("output", 1), tolerance=1e-9, steps=40, ledger=True)
    with pytest.warns(
        UserWarning, match=r"of \d of 2 elements of the batch are .* off after 33 steps, which is"
    ):
        found = method.wrap(model)(batch(2, 3))
    assert found["ledger", "gap"].abs().max() > 1e-9


def test_more_steps_are_taken_where_they_are_needed_alone() -> None:
    """A kink at the very beginning of the way of one element; the other's is straight."""
    rows: list[int] = []

    class Kinked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows.append(len(x))
            return (x + 0.99).relu() + 0 * x if len(x) else x

    x = torch.tensor([[-1.0], [5.0]]).double()
    method = IntegratedGradients(Target("output", 0), tolerance=1e-4, ledger=True)
    found = method.wrap(Kinked())(TensorDict({"input": x}, [2]))
    assert found["ledger", "gap"].abs().max() <= 1e-4
    torch.testing.assert_close(
        found["attr", "input"][:, 0], torch.tensor([-0.99, 5.0]).double(), rtol=0, atol=1e-4
    )
    straight = 2 * (
        1 + 1 + 5 + 4 + 2
    )  # both elements: as they are, at the reference, 9 points, and where one looks
    assert rows[-1] < sum(rows[:-1]) and sum(rows) > straight


def test_keys_inside_the_model() -> None:
    """Each key on the way is complete by itself."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 8).double(), nn.Sequential(nn.Tanh(), nn.Linear(8, 3)).double()
    model = TensorDictSequential(
        TensorDictModule(first, ["obs"], ["hidden"]), TensorDictModule(second, ["hidden"], ["value"])
    )
    td = TensorDict({"obs": torch.randn(5, 4).double()}, [5])
    value = second(first(td["obs"]))[:, 1]
    starts = {"obs": second(first(0 * td["obs"]))[:, 1], "hidden": second(torch.zeros(8).double())[1]}
    for attribute in ("all", ["obs", "hidden"], ["hidden"]):
        for options in ({}, {"memory_budget": 0}, {"tolerance": 1e-9}):
            method = IntegratedGradients(Target("value", 1), attribute=attribute, **options)
            found = method.wrap(model)(td.clone())
            for key in starts.keys() & set(found["attr"].keys()):
                torch.testing.assert_close(found["attr", key].sum(-1), value - starts[key], **EXACT)


@pytest.mark.parametrize("of", ["mean", "squares"])
def test_inputs_that_a_function_puts_in_their_place(of) -> None:
    """They are what noise is added to, and are not made once more."""
    model, td = net(), batch(5)
    twice = TensorDict({"input": 2 * td["input"]}, [5])
    method = Averaged(
        Gradient(Target("output", 1), attribute=lambda inputs, _: inputs.apply(lambda x: 2 * x)),
        Noise(0.1, 4),
        of=of,
    )
    plain = Averaged(Gradient(Target("output", 1)), Noise(0.1, 4), of=of)
    found, expected = method.wrap(model)(td), plain.wrap(model)(twice)
    torch.testing.assert_close(found["attr", "input"], expected["attr", "input"], **EXACT)
