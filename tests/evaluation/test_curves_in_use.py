"""What holds of all perturbation curves, what callers may rely on, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawing import drawing
from evaluated_models import inputs, linear, network, random_inputs
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from tolerances import assert_close
from torch import nn

from tdhook import LRP, Target
from tdhook.evaluation import Gradient, RandomMap, blurred, patches, perturbation_curve


def test_a_curve_has_as_many_steps_as_are_asked_for() -> None:
    model = nn.Linear(100, 1)
    td = random_inputs(2, features=100)
    assert perturbation_curve(model, td, RandomMap()).most.value.shape == (2, 51)
    coarse = perturbation_curve(model, td, RandomMap(), steps=8)
    assert (coarse.most.fraction * 100).round().tolist() == [0, 12, 25, 38, 50, 62, 75, 88, 100]
    assert perturbation_curve(
        linear([1.0, 2.0]), inputs([1.0, 1.0]), RandomMap(), steps=9
    ).most.value.shape == (1, 3)


def test_equals_are_ordered_by_lot_and_the_lots_follow_the_seed() -> None:
    model, td = linear([1.0, 10.0, 100.0]), inputs(*[[1.0, 1.0, 1.0]] * 200)
    td["attr", "input"] = torch.ones(200, 3)
    first = 111.0 - perturbation_curve(model, td).most.value[:, 1]
    counts = {weight: int((first.round() == weight).sum()) for weight in (1.0, 10.0, 100.0)}
    assert sum(counts.values()) == 200 and min(counts.values()) > 40
    again, other = perturbation_curve(model, td), perturbation_curve(model, td, seed=1)
    assert torch.equal(111.0 - again.most.value[:, 1], first)
    assert not torch.equal(111.0 - other.most.value[:, 1], first)


@drawing(15)
@given(
    chunk=st.integers(1, 12),
    baseline=st.sampled_from([0.0, "mean", "sample"]),
    method=st.sampled_from([LRP("epsilon"), Gradient(), RandomMap()]),
    seed=st.integers(0, 3),
)
def test_chunks_change_nothing(chunk: int, baseline: Any, method: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model, td = network(), random_inputs(3, 3)
    options: dict[str, Any] = {"target": Target("output", "argmax"), "baseline": baseline, "seed": seed}
    whole = perturbation_curve(model, td, method, **options)
    parts = perturbation_curve(model, td, method, chunk_size=chunk, **options)
    assert_close(parts.most.value, whole.most.value, torch.float32)
    assert_close(parts.least.value, whole.least.value, torch.float32)


@drawing(15)
@given(seed=st.integers(0, 1000), features=st.integers(1, 6))
def test_curves_begin_and_end_alike_whatever_the_order(seed: int, features: int) -> None:
    torch.manual_seed(seed)
    model, td = (
        nn.Sequential(nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, 1)),
        random_inputs(3, features=features),
    )
    curves = perturbation_curve(model, td, RandomMap(seed=seed))
    assert_close(curves.most.value[:, 0], model(td["input"])[:, 0].detach().double(), torch.float32)
    assert_close(curves.most.value[:, [0, -1]], curves.least.value[:, [0, -1]], torch.float32)
    reversed_ = perturbation_curve(model, td.set(("attr", "input"), torch.rand(3, features)))
    td["attr", "input"] = -td["attr", "input"]
    again = perturbation_curve(model, td)
    assert_close(again.most.value, reversed_.least.value, torch.float32)


def test_nothing_of_the_callers_is_changed() -> None:
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    ).train()
    td = random_inputs(6)
    before, state = td.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    options: dict[str, Any] = {"target": Target("output", 0), "baseline": "sample"}
    first = perturbation_curve(model, td, RandomMap(), **options)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() and model.training
    assert set(td.keys(True, True)) == {"input"} and bool((td == before).all())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    torch.rand(3)
    again = perturbation_curve(model, td, RandomMap(), **options)
    assert torch.equal(first.most.value, again.most.value)


def test_it_may_be_called_where_there_are_no_gradients() -> None:
    model, td = network(), random_inputs(4)
    plain = perturbation_curve(model, td, LRP("epsilon", target=Target("output", 0)))
    with torch.inference_mode():
        within = perturbation_curve(model, td, LRP("epsilon", target=Target("output", 0)))
    assert torch.equal(plain.most.value, within.most.value)


def test_stochastic_policies_act_as_they_would_by_default() -> None:
    modules = pytest.importorskip("torchrl.modules")
    actor = modules.ProbabilisticActor(
        TensorDictModule(network(), ["input"], ["logits"]),
        in_keys=["logits"],
        distribution_class=modules.OneHotCategorical,
    )
    explore = TensorDictSequential(actor)
    curves = perturbation_curve(
        explore, random_inputs(20), Gradient(Target("logits", "action")), measure="agreement"
    )
    assert curves.most.value[:, 0].tolist() == [1.0] * 20


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"target": Target("output", "all")}, ValueError, "one output is evaluated at a time"),
        ({"target": Target("nothing")}, KeyError, "the target names 'nothing'"),
        ({"keys": ["other"]}, KeyError, "key 'other' has relevance and is missing"),
        ({"baseline": "median"}, ValueError, "baseline 'median' is neither 'mean' nor 'sample'"),
        ({"baseline": torch.zeros(4)}, ValueError, r"the baseline of 'input' has shape \[4\]"),
        ({"baseline": {"other": 0.0}}, ValueError, "baselines are given by key, and 'input' has none"),
        ({"measure": "accuracy"}, ValueError, "measure='accuracy' is none of"),
        ({"measure": "probability", "target": "output"}, ValueError, "'probability' is that of one output"),
        ({"measure": lambda out: out["output"].sum()}, ValueError, "a measure gives one value per row"),
        ({"steps": 0}, ValueError, "at least one step, got steps=0"),
        ({"chunk_size": 0}, ValueError, "at least 1; got 0"),
        ({"batch_dims": 2}, ValueError, r"batch_dims=2 of a TensorDict of batch size \[3\]: give 0 to 1"),
        ({"groups": torch.zeros(4)}, ValueError, r"the groups of 'input' have shape \[4\]"),
        ({"groups": torch.zeros(5)}, TypeError, "are numbers or truth values, got torch.float32"),
        ({"groups": torch.full((5,), -1)}, ValueError, "the groups leave no feature of 'input' to replace"),
        ({"groups": {"x": torch.zeros(5)}}, ValueError, "groups are given for 'x', which is none of 'input'"),
        (
            {"data": TensorDict({}, [2]), "baseline": "mean"},
            KeyError,
            "the data for baseline 'mean' has no 'input'",
        ),
    ],
)
def test_errors_say_what_was_wrong(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        perturbation_curve(
            network(), random_inputs(3), RandomMap(), **{"target": Target("output", 0), **options}
        )


def test_data_of_any_batch_shape() -> None:
    data = inputs([1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0])
    flat = perturbation_curve(linear([1.0, 1.0]), inputs([0.0, 0.0]), RandomMap(), baseline="mean", data=data)
    shaped = perturbation_curve(
        linear([1.0, 1.0]), inputs([0.0, 0.0]), RandomMap(), baseline="mean", data=data.reshape(2, 2)
    )
    assert flat.most.value[0, -1].item() == shaped.most.value[0, -1].item() == 9.0


def test_more_errors() -> None:
    with pytest.raises(ValueError, match="there is nothing to evaluate: the TensorDict is empty"):
        perturbation_curve(network(), random_inputs(0), RandomMap(Target("output", 0)))
    two = (
        TensorDictModule(nn.Linear(5, 1), ["input"], ["a"]),
        TensorDictModule(nn.Linear(5, 1), ["input"], ["b"]),
    )
    with pytest.raises(ValueError, match=r"which output is to be evaluated.*'a', 'b'"):
        perturbation_curve(TensorDictSequential(*two), random_inputs(3), RandomMap())
    td = random_inputs(3)
    td["attr", "input"] = torch.full((3, 5), torch.nan)
    with pytest.raises(ValueError, match="relevance has NaN or infinite values, which have no order"):
        perturbation_curve(nn.Linear(5, 1), td)
    td["attr", "input"] = torch.zeros(3, 2, 5)
    with pytest.raises(ValueError, match="explain one output at a time"):
        perturbation_curve(nn.Linear(5, 1), td)
    with pytest.raises(ValueError, match="patches of size 0 of a picture"):
        patches((4, 4), 0)
    with pytest.raises(ValueError, match="a blur has a positive width"):
        blurred(0.0)
    continuous = TensorDictModule(nn.Linear(5, 2), ["input"], ["action"])
    with pytest.raises(ValueError, match="compares discrete actions, and these are continuous"):
        perturbation_curve(continuous, random_inputs(3), RandomMap(), measure="agreement")
    with pytest.raises(ValueError, match="compares actions; the model writes none"):
        perturbation_curve(nn.Linear(5, 1), random_inputs(3), RandomMap(), measure="agreement")
