"""Sensitivity-n and infidelity: exact for linear models, and equal to changing inputs one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evaluated_models import inputs, linear, network, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import Target
from tdhook.evaluation import Gradient, GradientTimesInput, RandomMap, infidelity, sensitivity_n
from tdhook.evaluation.sensitivity_n import SensitivityN

OUTPUT = Target("output", 0)
weights = st.lists(st.floats(-4, 4).filter(lambda w: abs(w) > 0.1), min_size=3, max_size=9)


SEEN: list[Tensor] = []
"""What a network was given: a global variable, since what a hook closes over is put back."""


def recorded() -> tuple[nn.Module, list[Tensor]]:
    """A network, and the inputs that it is given."""
    SEEN.clear()
    model = network()
    model[0].register_forward_pre_hook(lambda _, given: SEEN.append(given[0].detach().clone()))
    return model, SEEN


class TwoInputs(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.sum(-1) * 2 + b.flatten(-2).sum(-1)).unsqueeze(-1)


@settings(max_examples=25)
@given(weights=weights, seed=st.integers(0, 1000))
def test_gradient_times_input_of_a_linear_model_is_exact(weights: list[float], seed: int) -> None:
    model = linear(weights).double()
    td = TensorDict(
        {"input": torch.randn(4, len(weights), generator=torch.Generator().manual_seed(seed))}, [4]
    )
    td = td.double()
    found = sensitivity_n(model, td, GradientTimesInput(OUTPUT), subsets=20, seed=seed)
    torch.testing.assert_close(found.correlation, torch.ones(4, len(found.sizes)).double())
    for options in ({}, {"noise": 0.5}, {"baseline": None, "noise": 0.3, "share": 1.0}):
        exact = infidelity(model, td, GradientTimesInput(OUTPUT), draws=20, seed=seed, **options)
        for values in (exact.infidelity, exact.scaled, exact.unexplained):
            torch.testing.assert_close(values, torch.zeros(4).double(), rtol=0.0, atol=1e-18)
        slope = Gradient(OUTPUT, signed=True)
        exact = infidelity(model, td, slope, draws=20, seed=seed, multiplied=False, **options)
        torch.testing.assert_close(exact.infidelity, torch.zeros(4).double(), rtol=0.0, atol=1e-18)


@settings(max_examples=25)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_scale_of_relevance_counts_for_infidelity_alone(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, td = network().double(), random_inputs(3).double()
    td["attr", "input"] = torch.randn(3, 5).double()
    other = td.copy()
    other["attr"] = TensorDict({"input": scale * td["attr", "input"]}, [3])
    options: dict[str, Any] = {"target": OUTPUT, "seed": seed}
    one, same = (sensitivity_n(model, x, sizes=[1, 2, 3], subsets=15, **options) for x in (td, other))
    torch.testing.assert_close(one.correlation, same.correlation, rtol=1e-6, atol=1e-9)
    assert bool((one.correlation.abs() <= 1).all())
    one, same = (infidelity(model, x, draws=15, **options) for x in (td, other))
    for name in ("scaled", "unexplained"):
        torch.testing.assert_close(one.figures()[name], same.figures()[name], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(one.scale, scale * same.scale, rtol=1e-6, atol=1e-9)
    assert bool((one.scaled <= one.infidelity + 1e-12).all())
    assert bool(((one.unexplained >= 0) & (one.unexplained <= 1)).all())


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_both_are_those_of_changing_inputs_one_by_one(batch: tuple[int, ...]) -> None:
    (model, seen), td = recorded(), random_inputs(*batch)
    target = Target("output", "argmax")
    rows = td["input"].reshape(-1, 5)
    with torch.no_grad():
        chosen = model(rows).argmax(-1)
    relevance = GradientTimesInput(Target("output", chosen)).wrap(model)(
        TensorDict({"input": rows}, [len(rows)])
    )
    relevance = relevance["attr", "input"].double()

    def dropped(x: Tensor) -> Tensor:
        """``[rows, copies, 5]``: the drop of what the model held best for the inputs as they are."""
        with torch.no_grad():
            whole = model(rows).gather(-1, chosen[:, None])
            return (
                whole - model(x).gather(-1, chosen[:, None, None].expand(*x.shape[:2], 1))[..., 0]
            ).double()

    seen.clear()
    td_explained = td.clone()
    td_explained["attr", "input"] = relevance.float().reshape(td["input"].shape)
    found = sensitivity_n(model, td_explained, target=target, sizes=[2, 4], subsets=12)
    changed = [x for x in seen if len(x) == 12 * len(rows)]
    assert len(changed) == 2
    for place, (x, size) in enumerate(zip(changed, (2, 4), strict=True)):
        x = x.reshape(len(rows), 12, 5)
        removed = x == 0
        assert removed.sum(-1).unique().tolist() == [size]
        drop, summed = dropped(x), (removed * relevance[:, None]).sum(-1)
        expected = torch.stack(
            [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(summed, drop, strict=True)]
        )
        torch.testing.assert_close(
            found.correlation[..., place], expected.reshape(batch), rtol=1e-4, atol=1e-5
        )
    seen.clear()
    other = infidelity(model, td_explained, target=target, noise=0.2, share=0.7, draws=12)
    (x,) = [x for x in seen if len(x) == 12 * len(rows)]
    x = x.reshape(len(rows), 12, 5)
    assert 0.4 < (x != rows[:, None]).double().mean() < 0.95
    told = ((rows[:, None] - x) / rows[:, None] * relevance[:, None]).sum(-1)
    expected = (told - dropped(x)).square().mean(-1)
    torch.testing.assert_close(other.infidelity, expected.reshape(batch), rtol=1e-4, atol=1e-5)
    scales = torch.linspace(-3, 3, 6001).double()
    least = (scales[:, None, None] * told - dropped(x)).square().mean(-1).amin(0)
    torch.testing.assert_close(other.scaled, least.reshape(batch), rtol=1e-2, atol=1e-4)
    share = other.scaled / dropped(x).square().mean(-1).reshape(batch)
    torch.testing.assert_close(other.unexplained, share, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_chunks_change_nothing_and_seeds_decide(chunk: int) -> None:
    model, td, method = network(), random_inputs(2, 3), GradientTimesInput(Target("output", "argmax"))
    random = torch.get_rng_state()
    for measure, options in (
        (sensitivity_n, {"subsets": 9, "baseline": "sample"}),
        (infidelity, {"draws": 9, "noise": 0.1, "baseline": "sample"}),
    ):
        whole, parts, other = (
            measure(model, td, method, chunk_size=size, seed=seed, **options).figures()  # type: ignore[operator]
            for size, seed in ((1024, 0), (chunk, 0), (1024, 1))
        )
        for name, values in whole.items():
            torch.testing.assert_close(parts[name], values, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(other[name], values)
    assert torch.equal(torch.get_rng_state(), random)


def test_several_inputs_groups_and_intervals() -> None:
    model = TensorDictModule(TwoInputs(), ["a", ("n", "b")], ["output"])
    td = TensorDict({"a": torch.randn(6, 3), "n": {"b": torch.randn(6, 2, 2)}}, [6])
    groups = {"a": torch.tensor([0, 0, -1]), ("n", "b"): torch.tensor([[0, 0], [1, 2]])}
    baseline = {"a": 0.0, ("n", "b"): 0.0}
    method = GradientTimesInput(OUTPUT)
    found = sensitivity_n(model, td, method, groups=groups, baseline=baseline, subsets=30)
    assert found.sizes == (1, 2, 3)
    torch.testing.assert_close(found.correlation, torch.ones(6, 3).double(), rtol=1e-4, atol=1e-4)
    within = found.intervals(trajectories=torch.tensor([0, 0, 1, 1, 2, 2]))["correlation"]
    torch.testing.assert_close(within.mean, found.mean)
    assert found.to_dict() == {"sizes": [1, 2, 3], "correlation": found.mean.tolist()}
    exact = infidelity(model, td, method, groups=groups, noise={"a": 0.1, ("n", "b"): 0.0})
    assert exact.to_dict()["infidelity"] == pytest.approx(0.0, abs=1e-9)
    assert set(exact.intervals()) == {"infidelity", "scaled", "unexplained"}


def test_what_is_left_alone_is_not_changed() -> None:
    model, seen = recorded()
    td = inputs([1.0, 2.0, 3.0, 4.0, 5.0])
    groups = torch.tensor([0, -1, 1, -1, 2])
    infidelity(model, td, RandomMap(OUTPUT), groups=groups, noise=1.0, share=1.0, draws=8)
    (changed,) = [x for x in seen if len(x) == 8]
    assert bool((changed[:, [1, 3]] == torch.tensor([2.0, 4.0])).all())
    assert bool((changed[:, [0, 2, 4]] != torch.tensor([1.0, 3.0, 5.0])).all())


def test_what_is_the_same_for_all_subsets_is_not_correlated() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e4 + 1e-4 * x.sum(-1, keepdim=True)  # of which single precision knows nothing

    found = sensitivity_n(Constant(), random_inputs(4), RandomMap(OUTPUT), subsets=20)
    assert found.correlation.eq(0).all()
    td = random_inputs(4)
    td["attr", "input"] = torch.full((4, 5), 0.1)
    assert sensitivity_n(network(), td, target=OUTPUT, subsets=20).correlation.eq(0).all()
    empty = infidelity(Constant(), td, target=OUTPUT)
    assert empty.unexplained.tolist() == [0.0] * 4
    td["attr", "input"] = torch.zeros(4, 5)
    nothing = infidelity(network(), td, target=OUTPUT)
    assert nothing.scale.tolist() == [0.0] * 4 and nothing.unexplained.tolist() == pytest.approx([1.0] * 4)
    assert torch.equal(nothing.infidelity, nothing.scaled)


def test_sizes() -> None:
    def sizes(count: int) -> tuple[int, ...]:
        td = TensorDict({"input": torch.randn(1, count)}, [1])
        found: SensitivityN = sensitivity_n(linear([1.0] * count), td, RandomMap(OUTPUT), subsets=2)
        return found.sizes

    assert sizes(2) == (1,)
    assert sizes(10) == (1, 2, 3, 4, 5, 6, 8)
    assert sizes(1000) == (1, 2, 4, 9, 20, 41, 86, 181, 381, 800)


@pytest.mark.parametrize(
    "measure, options, message",
    [
        (sensitivity_n, {"subsets": 1}, "a correlation is over several subsets, at least two; got subsets=1"),
        (
            sensitivity_n,
            {"sizes": [1, 5]},
            "sizes of subsets of 5 features are 1 to 4, of which there are several; got 5",
        ),
        (sensitivity_n, {"sizes": []}, "got none"),
        (
            sensitivity_n,
            {"groups": torch.zeros(5, dtype=torch.int64)},
            "there is one: give groups of its entries",
        ),
        (infidelity, {"draws": 0}, "at least one; got draws=0"),
        (
            infidelity,
            {"share": 0.0},
            "share is the chance of a feature to be changed, above 0 and at most 1; got 0.0",
        ),
        (infidelity, {"baseline": None}, "nothing is changed: there is no baseline, and no noise"),
        (infidelity, {"noise": torch.ones(3)}, r"the radius of 'input' has shape \[3\]"),
        (infidelity, {"chunk_size": 0}, "chunk_size is the number of inputs in one pass"),
    ],
)
def test_errors(measure: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(network(), random_inputs(2), Gradient(OUTPUT), **options)


def test_time_may_belong_to_the_features() -> None:
    class Memory(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(-2)

    model = TensorDictModule(Memory(), ["x"], ["y"])
    td: TensorDictBase = TensorDict({"x": torch.randn(4, 3, 1)}, [4, 3])
    method = GradientTimesInput(Target("y"))
    found = sensitivity_n(model, td, method, batch_dims=1, subsets=30, sizes=[1, 2])
    assert found.correlation.shape == (4, 2)
    assert infidelity(model, td, method, batch_dims=1).infidelity.shape == (4,)
