"""Perturbation curves against what is known of linear models, and against curves made feature by feature."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from evaluated_models import inputs, linear, network, random_inputs
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from tolerances import assert_close
from torch import Tensor, nn

from tdhook import LRP, Contrast, Key, Target
from tdhook.evaluation import (
    GradientTimesInput,
    RandomMap,
    along,
    blurred,
    insertion_deletion,
    patches,
    perturbation_curve,
)
from tdhook.targets import AtStep, LogProb, Probability


def test_the_curve_of_a_linear_model_is_known() -> None:
    # Contributions 3, -1, 2, 0: the largest first, or the smallest first.
    model, td = linear([1.0, 1.0, 1.0, 1.0]), inputs([3.0, -1.0, 2.0, 0.0])
    curves = perturbation_curve(model, td, GradientTimesInput())
    assert curves.most.fraction.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert curves.most.value.tolist() == [[4.0, 1.0, -1.0, -1.0, 0.0]]
    assert curves.least.value.tolist() == [[4.0, 5.0, 5.0, 3.0, 0.0]]
    assert curves.most.area == pytest.approx((2.0 + 1.0 - 1.0 - 1.0 + 0.0) / 4)
    assert curves.least.area == pytest.approx((2.0 + 5.0 + 5.0 + 3.0 + 0.0) / 4)
    assert curves.between == pytest.approx(curves.least.area - curves.most.area)
    assert curves.most.aopc == pytest.approx((0 + 3 + 5 + 5 + 4) / 5)
    assert curves.to_dict()["most"]["value"] == [4.0, 1.0, -1.0, -1.0, 0.0]


class ByTheLargest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax()


class ByTheMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("first", [ByTheLargest(), ByTheMean(), nn.BatchNorm1d(4)])
def test_rows_that_depend_on_each_other_are_no_copies_of_rows(first: nn.Module, count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(first, nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).train()
    td = TensorDict({"input": torch.randn(count, 4)}, [count])
    if count == 1 and isinstance(first, nn.BatchNorm1d):
        return  # torch refuses it
    with pytest.raises(ValueError, match=r"depends on what lies beside it.*eval\(\).*batch_dims="):
        perturbation_curve(model, td, RandomMap(), target=Target("output", 0))
    if isinstance(first, nn.BatchNorm1d):
        curves = perturbation_curve(model.eval(), td, RandomMap(), target=Target("output", 0))
        assert len(curves.most.value) == 5


class TwoThatMeet(nn.Module):
    """Of several elements, two in the midst."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:2], (x[2] + x[5])[None], x[3:]]) if len(x) > 5 else x


def test_any_two_rows_that_depend_on_each_other_are_seen() -> None:
    model = nn.Sequential(TwoThatMeet(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="depends on what lies beside it"):
        perturbation_curve(
            model, TensorDict({"input": torch.randn(7, 4)}, [7]), RandomMap(), target=Target("output", 0)
        )


def test_no_order_beats_that_of_contributions_in_a_linear_model() -> None:
    model, td = linear([0.5, -2.0, 1.5, 1.0]), inputs([1.0, 0.7, -0.3, 2.0])
    best = perturbation_curve(model, td, LRP("epsilon"))
    areas = []
    for order in itertools.permutations(range(4)):
        td["attr", "input"] = -torch.tensor([order], dtype=torch.float32).argsort(-1).float()
        areas.append(perturbation_curve(model, td).most.area)
    assert best.most.area == pytest.approx(min(areas))
    assert best.least.area == pytest.approx(max(areas))


def by_hand(model: nn.Module, x: Tensor, relevance: Tensor, output: int, baseline: Tensor) -> list[float]:
    """The curve of one input, feature by feature."""
    x, values = x.clone(), []
    values.append(model(x)[output].item())
    for feature in relevance.argsort(descending=True).tolist():
        x[feature] = baseline[feature]
        values.append(model(x)[output].item())
    return values


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_curves_are_those_made_feature_by_feature(batch: tuple[int, ...]) -> None:
    model, td, base = network(), random_inputs(*batch), torch.randn(5)
    target = Target("output", "argmax")
    curves = perturbation_curve(model, td, LRP("epsilon"), target=target, baseline=base)
    assert curves.most.value.shape == (*batch, 6)
    explained = LRP("epsilon", target=target).wrap(model)(td.clone())
    x, r = explained["input"].reshape(-1, 5), explained["attr", "input"].reshape(-1, 5)
    chosen = explained["output"].reshape(-1, 3).argmax(-1)
    with torch.no_grad():
        most = [by_hand(model, *row, base) for row in zip(x, r, chosen, strict=True)]
        least = [by_hand(model, *row, base) for row in zip(x, -r, chosen, strict=True)]
    assert_close(curves.most.value.reshape(-1, 6), torch.tensor(most).double(), torch.float32)
    assert_close(curves.least.value.reshape(-1, 6), torch.tensor(least).double(), torch.float32)


def test_relevance_may_be_there_already() -> None:
    model, td = network(), random_inputs(4)
    target = Target("output", 1)
    explained = LRP("epsilon_plus", target=target).wrap(model)(td.clone())
    of_entry = perturbation_curve(model, explained, target=target)
    of_method = perturbation_curve(model, td, LRP("epsilon_plus", target=target))
    assert_close(of_entry.most.value, of_method.most.value, torch.float32)
    with pytest.raises(KeyError, match="there is no relevance under 'attr'; the TensorDict has input"):
        perturbation_curve(model, td, target=target)


def test_any_function_of_the_model_may_explain() -> None:
    def explainer_of(model: nn.Module) -> Any:
        def explain(td: Any) -> Any:
            x = td["input"].clone().requires_grad_()
            (grad,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
            return td.set(("attr", "input"), (x * grad).detach())

        return explain

    model, td = network(), random_inputs(4)
    mine = perturbation_curve(model, td, explainer_of, target=Target("output", 0))
    its = perturbation_curve(model, td, GradientTimesInput(), target=Target("output", 0))
    assert_close(mine.most.value, its.most.value, torch.float32)


def test_the_output_that_was_chosen_is_asked_about_all_along() -> None:
    # Output 0 is chosen for the input, output 1 as soon as the first feature is gone.
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    td = inputs([1.0, 1.0])
    for target in (Target("output", "argmax"), Target("output", torch.tensor([0])), Target("output", 0)):
        curves = perturbation_curve(model, td, GradientTimesInput(), target=target)
        assert curves.most.value.tolist() == [[2.0, 0.0, 0.0]]
    contrast = Contrast(Target("output", "argmax"), Target("output", 1))
    curves = perturbation_curve(model, td, GradientTimesInput(), target=contrast)
    assert curves.most.value.tolist() == [[1.0, -1.0, 0.0]]
    agreement = perturbation_curve(
        model, td, GradientTimesInput(), target=Target("output", "argmax"), measure="agreement"
    )
    assert agreement.most.value.tolist() == [[1.0, 0.0, 1.0]]  # of equal outputs, the first is the largest


def test_other_targets_are_measured_as_they_are_explained() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.net(x)
            return logits, logits.argmax(-1)

    policy = TensorDictModule(Policy(), ["input"], ["logits", "action"])
    td = random_inputs(6)
    logits = policy(td.clone())["logits"]
    taken = logits.argmax(-1, keepdim=True)
    log_prob = perturbation_curve(policy, td, LRP("epsilon", target=LogProb("logits")))
    start = logits.log_softmax(-1).gather(-1, taken)[:, 0]
    assert_close(log_prob.most.value[:, 0], start.detach().double(), torch.float32)
    end = policy(inputs([0.0] * 5))["logits"].log_softmax(-1).expand(6, 3).gather(-1, taken)[:, 0]
    assert_close(log_prob.most.value[:, -1], end.detach().double(), torch.float32)
    probability = perturbation_curve(policy, td, LRP("epsilon", target=Probability("logits")))
    assert_close(probability.most.value[:, -1], end.detach().double().exp(), torch.float32)
    same = perturbation_curve(policy, td, LRP("epsilon", target=Probability()), measure="probability")
    assert torch.equal(same.most.value, probability.most.value)

    def doubled(outputs: Any, inputs: Any) -> TensorDict:
        return TensorDict({"logits": 2 * outputs["logits"]}, batch_size=outputs.batch_size)

    function = perturbation_curve(policy, td, GradientTimesInput(doubled))
    assert_close(function.most.value[:, 0], 2 * logits.sum(-1).detach().double(), torch.float32)


def test_the_choice_may_be_an_entry() -> None:
    model, td = network(), random_inputs(2, 3)
    td["taken"] = torch.randint(3, (2, 3))
    by_entry = perturbation_curve(model, td, LRP("epsilon", target=Target("output", Key("taken"))))
    by_tensor = perturbation_curve(
        model, td, LRP("epsilon", target=Target("output", td["taken"])), chunk_size=2
    )
    assert_close(by_entry.most.value, by_tensor.most.value, torch.float32)


def test_measures() -> None:
    model, td = network(), random_inputs(7)
    target = Target("output", "argmax")
    probability = perturbation_curve(model, td, RandomMap(), target=target, measure="probability")
    softmax = model(td["input"]).softmax(-1).amax(-1).detach().double()
    assert_close(probability.most.value[:, 0], softmax, torch.float32)
    zero = model(torch.zeros(5)).softmax(-1)[model(td["input"]).argmax(-1)].detach().double()
    assert_close(probability.most.value[:, -1], zero, torch.float32)
    agreement = perturbation_curve(model, td, RandomMap(), target=target, measure="agreement")
    assert agreement.most.value[:, 0].tolist() == [1.0] * 7
    kept = model(td["input"]).argmax(-1) == model(torch.zeros(5)).argmax(-1)
    assert agreement.most.value[:, -1].tolist() == kept.double().tolist()
    norm = perturbation_curve(
        model, td, RandomMap(), target=target, measure=lambda out: out["output"].norm(dim=-1)
    )
    assert_close(norm.most.value[:, 0], model(td["input"]).norm(dim=-1).detach().double(), torch.float32)


def test_insertion_and_deletion_are_the_curves_read_from_both_ends() -> None:
    model, td = network(), random_inputs(4)
    target = Target("output", "argmax")
    curves = perturbation_curve(model, td, LRP("epsilon"), target=target, measure="probability")
    both = insertion_deletion(model, td, LRP("epsilon"), target=target)
    assert torch.equal(both.deletion.value, curves.most.value)
    assert_close(both.insertion.value, curves.least.value.flip(-1), torch.float32)
    plain = both.to_dict()
    assert plain["insertion"]["area"] == both.insertion.area
    assert plain["deletion"]["area"] == both.deletion.area


def test_baselines() -> None:
    model = linear([1.0, 1.0, 1.0])
    td = inputs([1.0, 2.0, 3.0], [3.0, 6.0, 9.0])
    td["attr", "input"] = torch.tensor([[3.0, 2.0, 1.0]]).expand(2, 3)

    def most(baseline: Any, **options: Any) -> list[list[float]]:
        return perturbation_curve(model, td, baseline=baseline, **options).most.value.tolist()

    assert most(0.5) == [[6.0, 5.5, 4.0, 1.5], [18.0, 15.5, 10.0, 1.5]]
    assert most("mean") == [[6.0, 7.0, 9.0, 12.0], [18.0, 17.0, 15.0, 12.0]]
    assert most("mean", data=inputs([0.0, 0.0, 0.0]))[0] == [6.0, 5.0, 3.0, 0.0]
    assert most(torch.tensor([10.0, 20.0, 30.0]))[0] == [6.0, 15.0, 33.0, 60.0]
    assert most({"input": lambda x: -x}) == [[6.0, 4.0, 0.0, -6.0], [18.0, 12.0, 0.0, -18.0]]
    only = most("sample", data=inputs([7.0, 8.0, 9.0]))
    assert only[0] == [6.0, 12.0, 18.0, 24.0]


def test_samples_are_values_of_the_feature_in_the_data() -> None:
    model, td = linear([100.0, 10.0, 1.0]), inputs(*[[i, i, i] for i in (1.0, 2.0, 3.0)] * 20)
    td["attr", "input"] = torch.tensor([[3.0, 2.0, 1.0]]).expand(60, 3)
    ends = perturbation_curve(model, td, baseline="sample").most.value[:, -1].round().long()
    digits = torch.stack([ends // 100, ends // 10 % 10, ends % 10])
    assert set(digits.flatten().tolist()) == {1, 2, 3}
    assert len(set(ends.tolist())) > 15  # 27 combinations: features are drawn one by one
    grouped = perturbation_curve(model, td, baseline="sample", groups=torch.tensor([0, 0, 1]))
    ends = grouped.most.value[:, -1].round().long()
    assert torch.equal(ends // 100, ends // 10 % 10)  # a group comes from one element of the data


def test_a_blur_keeps_what_is_even_and_spreads_what_is_not() -> None:
    blur = blurred(1.0)
    even = torch.full((2, 3, 8, 9), 4.0)
    torch.testing.assert_close(blur(even), even)
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1.0
    spread = blur(point)[0, 0]
    assert spread.sum().item() == pytest.approx(1.0, abs=1e-5)
    kernel = torch.exp(-0.5 * torch.arange(-3.0, 4.0) ** 2)
    kernel = kernel / kernel.sum()
    torch.testing.assert_close(spread[1:8, 1:8], kernel[:, None] * kernel[None, :])


def test_groups_of_pixels_are_replaced_together() -> None:
    shape = (2, 4, 6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 1))
    td = TensorDict({"input": torch.randn(3, *shape)}, batch_size=[3])
    numbers = patches(shape, (2, 3))
    assert numbers[0].tolist() == numbers[1].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    curves = perturbation_curve(model, td, GradientTimesInput(), groups=numbers)
    assert curves.most.value.shape == (3, 5)
    explained = GradientTimesInput().wrap(model)(td.clone())
    for i in range(3):
        x, r = td["input"][i].clone(), explained["attr", "input"][i]
        sums = [r[numbers == group].sum().item() for group in range(4)]
        for step, group in enumerate(sorted(range(4), key=lambda g: -sums[g]), start=1):
            x[numbers == group] = 0.0
            value = model(x[None])[0, 0].item()
            assert curves.most.value[i, step].item() == pytest.approx(value, abs=1e-5)


def test_frames_of_a_stack_and_masks() -> None:
    assert along((3, 2, 2), 0).tolist() == [[[i, i], [i, i]] for i in range(3)]
    assert along((3, 2, 2), -1, 1).tolist() == [[[0, 1], [2, 3]]] * 3
    with pytest.raises(IndexError, match="there is no axis 3 in a shape of 3"):
        along((3, 2, 2), 3)
    model, td = linear([1.0, 1.0, 1.0]), inputs([1.0, 2.0, 4.0])
    kept = perturbation_curve(model, td, GradientTimesInput(), groups=torch.tensor([True, False, True]))
    assert kept.most.value.tolist() == [[7.0, 3.0, 2.0]]
    named = perturbation_curve(model, td, GradientTimesInput(), groups={"input": torch.tensor([7, -1, 7])})
    assert named.most.value.tolist() == [[7.0, 2.0]]


def test_features_of_several_inputs_are_in_one_order() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.sum(-1, keepdim=True) + b.sum(-1, keepdim=True)

    model = TensorDictModule(Sum(), ["a", ("nested", "b")], ["sum"])
    td = TensorDict({"a": torch.tensor([[1.0, 4.0]]), "nested": {"b": torch.tensor([[3.0, 2.0, 5.0]])}}, [1])
    curves = perturbation_curve(model, td, GradientTimesInput())
    assert curves.most.value.tolist() == [[15.0, 10.0, 6.0, 3.0, 1.0, 0.0]]
    one = perturbation_curve(model, td, GradientTimesInput(), keys=[("nested", "b")])
    assert one.most.value.tolist() == [[15.0, 10.0, 7.0, 5.0]]
    two = perturbation_curve(model, td, GradientTimesInput(), baseline={"a": 1.0, ("nested", "b"): 0.0})
    assert two.most.value[0, -1].item() == 2.0


class Memory(nn.Module):
    """Sums what it has seen so far: ``[batch, time, 1] -> [batch, time, 1]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-2)


def test_time_may_belong_to_the_features() -> None:
    model = TensorDictModule(Memory(), ["x"], ["y"])
    td = TensorDict({"x": torch.tensor([[[1.0], [4.0], [2.0]], [[3.0], [2.0], [1.0]]])}, batch_size=[2, 3])
    last = perturbation_curve(model, td, GradientTimesInput(AtStep(Target("y"), "last")))
    assert last.most.value.tolist() == [[7.0, 3.0, 1.0, 0.0], [6.0, 3.0, 1.0, 0.0]]
    everywhere = perturbation_curve(model, td, GradientTimesInput(Target("y")), batch_dims=1)
    assert everywhere.most.value[:, 0].tolist() == [1 + 5 + 7, 3 + 5 + 6]


def test_what_is_relevant_by_size() -> None:
    model, td = linear([1.0, 1.0, 1.0]), inputs([1.0, -5.0, 2.0])
    curves = perturbation_curve(model, td, GradientTimesInput(), absolute=True)
    assert curves.most.value.tolist() == [[-2.0, 3.0, 1.0, 0.0]]
