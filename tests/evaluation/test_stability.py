"""Sensitivity, randomisation and similarity against brute force, and against what is known of simple models."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from tolerances import assert_close
from torch import Tensor, nn

from tdhook import LRP, Target
from tdhook.evaluation import (
    Gradient,
    GradientTimesInput,
    RandomMap,
    cosine,
    layers_of,
    randomisation,
    sensitivity,
    spearman,
    ssim,
)

OUTPUT = Target("output", 0)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def random_inputs(*batch: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*batch, 5)}, batch_size=list(batch))


def test_the_gradient_of_a_linear_model_does_not_change() -> None:
    found = sensitivity(nn.Linear(5, 3), random_inputs(4), Gradient(OUTPUT))
    assert found.maximum.tolist() == found.average.tolist() == found.lipschitz.tolist() == [0.0] * 4


def test_gradient_times_input_of_a_linear_model_changes_as_much_as_its_input_is_moved() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(-3.0)
    td = TensorDict({"input": torch.tensor([[2.0], [5.0]])}, batch_size=[2])
    found = sensitivity(model, td, GradientTimesInput(), radius=0.1, draws=400, relative=False)
    torch.testing.assert_close(found.lipschitz, torch.full((2,), 3.0).double(), rtol=1e-2, atol=0.0)
    assert bool((found.maximum <= 0.3 + 1e-6).all()) and bool((found.maximum > 0.29).all())
    torch.testing.assert_close(found.average, torch.full((2,), 0.15).double(), rtol=0.15, atol=0.0)
    relative = sensitivity(model, td, GradientTimesInput(), radius=0.1, draws=400)
    assert_close(relative.maximum, found.maximum / torch.tensor([6.0, 15.0]).double(), torch.float32)
    assert relative.to_dict()["maximum"] == pytest.approx(relative.maximum.mean().item())


def test_a_radius_is_as_exact_as_the_inputs() -> None:
    model = nn.Linear(2, 1).double()
    td = TensorDict({"input": torch.rand(4, 2).double()}, batch_size=[4])
    one, each = (
        sensitivity(model, td, GradientTimesInput(), radius=radius, relative=False).average
        for radius in (0.3, torch.full((2,), 0.3, dtype=torch.float64))
    )
    torch.testing.assert_close(one, each, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_sensitivity_is_that_of_explaining_each_noisy_input(batch: tuple[int, ...]) -> None:
    """The noise is seen by an explainer that notes what it is given."""
    model, td = network(), random_inputs(*batch)
    method = LRP("epsilon", target=Target("output", "argmax"))
    seen: list[Tensor] = []
    chosen = model(td["input"].reshape(-1, 5)).argmax(-1)

    def noting(module: nn.Module) -> Any:
        explained = LRP("epsilon", target=Target("output", chosen)).wrap(module)

        def explain(rows: Any) -> Any:
            seen.append(rows["input"].clone())
            return explained(rows)

        return explain

    radius = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    options: dict[str, Any] = {"radius": radius, "draws": 3, "target": Target("output", "argmax")}
    found = sensitivity(model, td, noting, **options)
    first, *noisy = seen
    assert len(noisy) == 3 and torch.equal(first, td["input"].reshape(-1, 5))
    steps = torch.stack(noisy) - first
    assert bool((steps > 0).any()) and bool((steps < 0).any())
    explained = LRP("epsilon", target=Target("output", chosen)).wrap(model)
    changes, ratios = [], []
    for moved in noisy:
        assert bool(((moved - first).abs() <= radius + 1e-6).all()) and not torch.equal(moved, first)
        pair = [explained(TensorDict({"input": x}, [len(x)]))["attr", "input"] for x in (first, moved)]
        changes.append((pair[1] - pair[0]).norm(dim=-1) / pair[0].norm(dim=-1))
        ratios.append(changes[-1] / (moved - first).norm(dim=-1))
    expected = torch.stack(changes).double()
    torch.testing.assert_close(found.maximum, expected.amax(0).reshape(batch), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.average, expected.mean(0).reshape(batch), rtol=1e-4, atol=1e-6)
    lipschitz = torch.stack(ratios).amax(0).double().reshape(batch)
    torch.testing.assert_close(found.lipschitz, lipschitz, rtol=1e-4, atol=1e-6)
    again = sensitivity(model, td, method, **options)
    torch.testing.assert_close(again.maximum, found.maximum, rtol=1e-4, atol=1e-6)


def test_what_a_method_compares_with_stays_beside_noisy_inputs() -> None:
    model, td = nn.Linear(5, 3), random_inputs(4)
    td["baseline", "input"] = td["input"] + torch.randn(4, 5)
    found, plain = (
        sensitivity(model, td, LRP("deeplift", target=OUTPUT, baseline=baseline), relative=False)
        for baseline in ("baseline", 0.0)
    )
    torch.testing.assert_close(found.maximum, plain.maximum, rtol=1e-4, atol=1e-6)


def test_noise_does_not_change_what_is_asked() -> None:
    # Noise turns the order of the outputs over, whose gradients differ.
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    td = TensorDict({"input": torch.tensor([[1.0, 0.99]])}, batch_size=[1])
    found = sensitivity(model, td, Gradient(Target("output", "argmax")), radius=0.5, draws=20)
    assert found.maximum.item() == 0.0


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_change_nothing(chunk: int) -> None:
    model, td, method = network(), random_inputs(2, 3), LRP("epsilon", target=Target("output", "argmax"))
    whole, parts = (sensitivity(model, td, method, draws=2, chunk_size=size) for size in (1024, chunk))
    torch.testing.assert_close(parts.maximum, whole.maximum, rtol=1e-4, atol=1e-6)
    one, other = (randomisation(model, td, method, chunk_size=size) for size in (1024, chunk))
    torch.testing.assert_close(other.similarity["cosine"], one.similarity["cosine"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"draws": 0}, "at least one; got draws=0"),
        ({"radius": torch.zeros(3)}, r"the radius of 'input' has shape \[3\]"),
        ({"radius": {"x": 0.1}}, "radii are given by key, and 'input' has none"),
        ({"radius": -1.0}, "a radius is not negative"),
        ({"radius": math.nan}, "a radius is not negative, and a number"),
    ],
)
def test_errors_of_sensitivity(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sensitivity(network(), random_inputs(2), Gradient(OUTPUT), **options)


def test_ranks_and_angles() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    b = torch.tensor([[10.0, 20.0, 30.0, 1e6], [3.0, 2.0, 1.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    assert spearman(a, b)[0].item() == pytest.approx(1.0)
    # Ranks 1.5, 1.5, 3, 4 against 4, 3, 2, 1: covariance -4.5, variances 4.5 and 5.
    assert spearman(a, b)[1].item() == pytest.approx(-4.5 / math.sqrt(4.5 * 5.0))
    assert spearman(a, b)[2].item() == 0.0
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])).item() == pytest.approx(24 / 25)
    assert cosine(torch.tensor([1e-30, 0.0]), torch.tensor([1e-30, 1e-30])).item() == pytest.approx(
        math.sqrt(0.5)
    )
    assert cosine(torch.zeros(3), torch.ones(3)).item() == 0.0


@given(values=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_rank_correlation_is_that_of_ranks_counted_one_by_one(values: list[tuple[int, int]]) -> None:
    def ranks(x: list[int]) -> list[float]:
        return [sum(other < one for other in x) + (sum(other == one for other in x) + 1) / 2 for one in x]

    a, b = map(list, zip(*values, strict=True))
    x, y = torch.tensor(ranks(a)), torch.tensor(ranks(b))
    if float(x.std()) == 0 or float(y.std()) == 0:
        expected = 0.0
    else:
        expected = torch.corrcoef(torch.stack([x, y]).double())[0, 1].item()
    found = spearman(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_structural_similarity_is_the_mean_over_all_squares() -> None:
    a, b = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    for i in range(2):
        x, y = (m[i].double() / m[i].abs().max() for m in (a, b))
        c1, c2, found = 0.02**2, 0.06**2, []
        for row in range(9 - 6):
            for column in range(8 - 6):
                u, v = (m[row : row + 7, column : column + 7].flatten() for m in (x, y))
                covariance = torch.cov(torch.stack([u, v]))
                top = (2 * u.mean() * v.mean() + c1) * (2 * covariance[0, 1] + c2)
                below = (u.mean() ** 2 + v.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)
                found.append((top / below).item())
        assert ssim(a, b)[i].item() == pytest.approx(sum(found) / len(found), abs=1e-9)
    assert_close(ssim(a, 3 * a), torch.ones(2).double(), torch.float32)
    assert ssim(torch.randn(3, 4), torch.randn(3, 4)).shape == ()
    assert ssim(torch.zeros(5, 5), torch.zeros(5, 5)).item() == 1.0


def test_layers_come_in_the_order_in_which_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.scale = nn.Linear(4, 2), nn.Linear(5, 4), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu()) * self.scale

    module = Backwards()
    assert layers_of(module) == ["", "last", "first"]
    assert layers_of(module, random_inputs(2)) == ["first", "last", ""]
    found = randomisation(module, random_inputs(4), Gradient(OUTPUT))
    assert found.layers == ("", "last", "first")


def test_layers_of_agents_with_weights_of_their_own() -> None:
    multiagent = pytest.importorskip("torchrl.modules").MultiAgentMLP
    net = multiagent(
        n_agent_inputs=5, n_agent_outputs=2, n_agents=3, centralized=False, share_params=False, depth=1
    )
    model = TensorDictModule(net, ["input"], ["output"])
    td = TensorDict({"input": torch.randn(4, 3, 5)}, batch_size=[4])
    assert all("params" in name for name in layers_of(model))
    found = randomisation(model, td, GradientTimesInput(Target("output", (0, 0))))
    assert found.similarity["cosine"].shape == (4, len(found.layers))
    assert bool((found.similarity["cosine"] < 0.999).any())


@pytest.mark.parametrize("cascading", [True, False])
@pytest.mark.parametrize("how", ["reset", "shuffle"])
def test_randomised_models_are_explained(cascading: bool, how: Any) -> None:
    model, td = network(), random_inputs(4)
    original = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    seen: list[list[bool]] = []
    values: list[Tensor] = []

    def explainer(module: nn.Module) -> Any:
        state = module.state_dict()
        seen.append([not torch.equal(state[f"{i}.weight"], original[f"{i}.weight"]) for i in (0, 2, 4)])
        values.append(state["4.weight"].flatten().sort().values)
        return LRP("epsilon", target=OUTPUT).wrap(module)

    found = randomisation(model, td, explainer, target=OUTPUT, cascading=cascading, how=how)
    assert found.layers == ("4", "2", "0") and found.cascading is cascading
    last, middle, first = ([True, True, True], [False, True, True], [False, False, True])
    expected = (
        [first, middle, last]
        if cascading
        else [[False, False, True], [False, True, False], [True, False, False]]
    )
    assert seen == [[False, False, False], *expected]
    assert torch.equal(values[0], values[1]) is (how == "shuffle")  # shuffled weights are the same numbers
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert found.similarity["spearman"].shape == (4, 3)
    again = randomisation(model, td, LRP("epsilon", target=OUTPUT), cascading=cascading, how=how)
    torch.testing.assert_close(again.similarity["cosine"], found.similarity["cosine"])
    other = randomisation(model, td, LRP("epsilon", target=OUTPUT), cascading=cascading, how=how, seed=1)
    assert not torch.equal(again.similarity["cosine"], other.similarity["cosine"])


def test_similarity_is_that_of_the_explanations_before_and_after() -> None:
    model, td = network(), random_inputs(4)
    models: list[nn.Module] = []

    def explainer(module: nn.Module) -> Any:
        models.append(copy.deepcopy(module))
        return GradientTimesInput(OUTPUT).wrap(module)

    found = randomisation(model, td, explainer, target=OUTPUT)
    maps = [GradientTimesInput(OUTPUT).wrap(one)(td.clone())["attr", "input"] for one in models]
    for place, after in enumerate(maps[1:]):
        torch.testing.assert_close(found.similarity["cosine"][:, place], cosine(maps[0], after))
        torch.testing.assert_close(found.similarity["spearman"][:, place], spearman(maps[0], after))
        sizes = spearman(maps[0].abs(), after.abs())
        torch.testing.assert_close(found.similarity["spearman of sizes"][:, place], sizes)
    assert found.to_dict()["cosine"]["2"] == pytest.approx(cosine(maps[0], maps[2]).mean().item())


def test_a_map_that_knows_nothing_of_the_model_stays_the_same() -> None:
    def norm(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).norm(dim=-1)

    found = randomisation(network(), random_inputs(2, 3), RandomMap(OUTPUT), measures={"difference": norm})
    assert found.similarity["difference"].shape == (2, 3, 3)
    assert bool((found.similarity["difference"] == 0).all())


def test_a_chosen_layer_alone_and_errors() -> None:
    model, td = network(), random_inputs(2)
    assert randomisation(model, td, Gradient(OUTPUT), layers=["2"]).layers == ("2",)
    with pytest.raises(ValueError, match="the model has no module 'x'; it has 0, 1, 2, 3, 4"):
        randomisation(model, td, Gradient(OUTPUT), layers=["x"])
    with pytest.raises(ValueError, match="how='noise' is neither 'reset' nor 'shuffle'"):
        randomisation(model, td, Gradient(OUTPUT), how="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has no parameters to randomise"):
        randomisation(nn.Tanh(), td, Gradient(OUTPUT))


def test_controls_are_methods_like_any_other() -> None:
    first = TensorDictModule(nn.Linear(5, 4), ["input"], ["hidden"])
    model = TensorDictSequential(first, TensorDictModule(nn.Linear(4, 3), ["hidden"], ["output"]))
    td = random_inputs(2, 3)
    x = td["input"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(TensorDict({"input": x}, [2, 3]))["output"][..., 1].sum(), x)
    target = Target("output", 1)
    for method, expected in (
        (Gradient(target), grad.abs()),
        (Gradient(target, signed=True), grad),
        (GradientTimesInput(target), grad * td["input"]),
    ):
        torch.testing.assert_close(method.wrap(model)(td.clone())["attr", "input"], expected)
    with Gradient(target, attribute=["hidden"], attribution_key="why").prepare(model) as explained:
        torch.testing.assert_close(
            explained(td.clone())["why", "hidden"], model[1].module.weight[1].abs().expand(2, 3, 4).detach()
        )
    each = GradientTimesInput(Target("output", "all")).wrap(model)(td.clone())
    torch.testing.assert_close(each["attr", "input"][:, :, 1], (grad * td["input"]))
    assert repr(Gradient("output")) == "Gradient(target='output')"


def test_a_random_map_follows_its_seed_and_leaves_other_random_numbers_alone() -> None:
    model, td, random = network(), random_inputs(3), torch.get_rng_state()
    one, same, other = (RandomMap(OUTPUT, seed=seed).wrap(model) for seed in (0, 0, 1))
    first = one(td.clone())["attr", "input"]
    assert torch.equal(first, same(td.clone())["attr", "input"])
    assert not torch.equal(first, other(td.clone())["attr", "input"])
    assert not torch.equal(first, one(td.clone())["attr", "input"])
    assert torch.equal(torch.get_rng_state(), random)
    assert bool(((first >= 0) & (first < 1)).all())
    assert copy.deepcopy(one)(td.clone())["attr", "input"].shape == first.shape


def test_models_that_overwrite_their_input_are_explained_by_the_controls() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 3))
    td = random_inputs(4)
    before = td["input"].clone()
    found = GradientTimesInput(OUTPUT).wrap(model)(td)["attr", "input"]
    assert torch.equal(td["input"], before)
    torch.testing.assert_close(found, before.relu() * model[1].weight[0].detach())
