"""References: how baselines are given, what is written of them, and how they are settled for a batch that is cut."""

from __future__ import annotations

import random

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, References, Target
from tdhook.attribution import (
    Ablation,
    Conductance,
    ExpectedGradients,
    IntegratedGradients,
    InternalInfluence,
    Shapley,
)
from tdhook.rl import Explain


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batch(*size):
    return TensorDict({"input": torch.randn(*size, 3, dtype=torch.float64)}, size)


def method(baseline, **options):
    return LRP("deeplift", target=Target("output", 0), baseline=baseline, **options)


def test_the_value_on_the_reference_is_written():
    net, td = model(), batch(4)
    explained = method(References(1.0, values=True)).wrap(net)
    assert ("reference", "output") in explained.out_keys
    td = explained(td)
    there = net(torch.ones(3, dtype=torch.float64)).expand(4, 2)
    torch.testing.assert_close(td["reference", "output"], there.detach())
    rise = td["output"] - td["reference", "output"]
    torch.testing.assert_close(td["attr", "input"].sum(-1), rise[:, 0])


def test_the_value_of_an_output_that_no_target_named_is_known_after_a_call():
    explained = LRP("deeplift", baseline=References(0.0, values=True)).wrap(nn.Linear(3, 1).double())
    assert ("reference", "output") not in explained.out_keys
    explained(batch(2))
    assert ("reference", "output") in explained.out_keys


class Quotient(nn.Module):
    """At zero nothing is divided by nothing."""

    def forward(self, x):
        return x[..., :2] / x[..., 2:]


@pytest.mark.parametrize("flow", ["gradient", "relevance"])
@pytest.mark.parametrize("preset", ["deeplift", "epsilon_plus"])
def test_what_is_explained_is_finite_on_the_reference(preset, flow):
    explained = LRP(preset, target=Target("output", 0), baseline=0.0, flow=flow).wrap(Quotient())
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"on the baseline, .* the value of the target 'output' is NaN or inf"
        ):
            explained(batch(4))
    for bad in (float("nan"), torch.tensor([0.0, torch.inf, 0.0]).double()):
        with pytest.raises(ValueError, match=r"the baseline of 'input' has (4|12) NaN or infinite values"):
            LRP(preset, target=Target("output", 0), baseline=bad, flow=flow).wrap(model())(batch(4))


class Infinite(nn.Module):
    """What is computed of ``log(0)`` is a number all the same, and may be masked out."""

    def __init__(self, of, masked=False):
        super().__init__()
        self.of, self.masked, self.last = of, masked, nn.Linear(3, 2).double()

    def forward(self, x):
        made = self.of(x.log())
        return self.last(torch.where(torch.tensor([False, True, True]), made, x) if self.masked else made)


AT_ZERO = torch.tensor([0.0, 0.5, 0.25], dtype=torch.float64)
OF_INFINITY = {
    "tanh": lambda x: torch.tanh(x * 0.5),
    "exp": lambda x: torch.exp(x * 0.5),
    "softmax": lambda x: x.softmax(-1),
    "nan_to_num": lambda x: (x * 0.5).nan_to_num(0.0, neginf=-9.0),
}


@pytest.mark.parametrize("flow", ["gradient", "relevance"])
@pytest.mark.parametrize("outputs", [0, "all"])
@pytest.mark.parametrize("of", OF_INFINITY)
def test_what_is_infinite_on_the_way_on_the_reference_is_told(of, outputs, flow):
    target, td = Target("output", outputs), TensorDict({"input": torch.rand(4, 3).double() + 0.2}, [4])
    explained = LRP("deeplift", target=target, baseline=AT_ZERO, flow=flow).wrap(Infinite(OF_INFINITY[of]))
    for _ in range(2):  # the second time what was kept of the reference
        with pytest.raises(
            ValueError, match=r"on the baseline of 'input', \w+ meets NaN or infinite .* baseline"
        ):
            explained(td.clone())


@pytest.mark.parametrize("flow", ["gradient", "relevance"])
@pytest.mark.parametrize("outputs", [0, "all"])
@pytest.mark.parametrize("of", ["tanh", "exp", "nan_to_num"])
def test_what_is_infinite_on_the_reference_and_masked_out_has_no_part(of, outputs, flow):
    target, td = Target("output", outputs), TensorDict({"input": torch.rand(4, 3).double() + 0.2}, [4])
    net = Infinite(OF_INFINITY[of], masked=True)
    found = LRP("deeplift", target=target, baseline=AT_ZERO, flow=flow).wrap(net)(td.clone())
    rise = (net(td["input"]) - net(AT_ZERO))[:, 0 if outputs == 0 else slice(None)]
    torch.testing.assert_close(found["attr", "input"].sum(-1), rise.detach())


@pytest.mark.parametrize("ledger", [False, True])
@pytest.mark.parametrize("made", [IntegratedGradients, ExpectedGradients, Conductance])
def test_the_target_is_a_number_where_ways_begin(made, ledger):
    """Gradients are taken on the way alone, and grow without bounds towards its beginning."""
    net = nn.Sequential(Infinite(lambda x: x)).double()
    options = {"input_modules": ["0.last"]} if made is Conductance else {}
    if made is ExpectedGradients:
        options["baseline"] = TensorDict({"input": torch.zeros(2, 3).double()}, [2])
    explained = made(Target("output", 0), ledger=ledger, **options).wrap(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the target 'output' is NaN or infinite .*operation `log`"):
            explained(TensorDict({"input": torch.rand(4, 3).double() + 0.2}, [4]))


def test_the_target_is_a_number_where_the_ways_of_a_layer_begin():
    net = nn.Sequential(Infinite(lambda x: x)).double()
    explained = InternalInfluence(Target("output", 0), input_modules=["0.last"]).wrap(net)
    with pytest.raises(ValueError, match=r"on the baseline, .* the target 'output' is NaN or infinite"):
        explained(TensorDict({"input": torch.rand(4, 3).double() + 0.2}, [4]))


@pytest.mark.parametrize("made", [IntegratedGradients, Conductance, InternalInfluence, Shapley, Ablation])
def test_what_is_explained_is_written_as_it_is_on_the_reference_by_lrp_alone(made):
    with pytest.raises(ValueError, match=r"by LRP alone.*\('ledger', 'target'\)"):
        made(Target("output", 0), baseline=References(0.0, values=True))


def chosen(seed, number, among, count):
    """The rows that are drawn: a random polynomial, modulo a prime."""
    chance = random.Random(f"{seed} {number}")
    a, b, c = (chance.randrange(1, 2**31 - 1) for _ in range(3))
    return torch.tensor([(a * i * i + b * i + c) % (2**31 - 1) % among for i in range(count)])


def test_rows_are_drawn_evenly():
    found = torch.stack([chosen(seed, number, 10, 50) for seed in range(20) for number in range(10)])
    counts = torch.bincount(found.flatten(), minlength=10)
    assert (counts - 1000).abs().max() < 120  # four standard deviations
    assert (found[1:] == found[:-1]).float().mean() < 0.12


@pytest.mark.parametrize("target", [Target("output", 0), Target("output", "all")])
def test_the_spread_is_that_of_single_references(target):
    net, td, rows = model(), batch(2, 3), batch(50)
    drawn = References("sample", samples=6, data=rows, spread=True)
    explained = LRP("deeplift", target=target, baseline=drawn).wrap(net)
    assert ("spread", "input") in explained.out_keys
    found = explained(td.clone())
    single = []
    for number in range(6):
        index = chosen(0, number, 50, 6)
        one = LRP("deeplift", target=target, baseline=rows["input"][index].reshape(2, 3, 3)).wrap(net)
        single.append(one(td.clone())["attr", "input"])
    torch.testing.assert_close(found["attr", "input"], torch.stack(single).mean(0))
    torch.testing.assert_close(found["spread", "input"], torch.stack(single).std(0))


@pytest.mark.parametrize("target", [Target("output", 0), Target("output", "all")])
def test_the_report_of_several_references_is_on_their_mean(target):
    def entries(baseline):
        explained = LRP("epsilon_plus", target=target, baseline=baseline, ledger=True).wrap(net)
        explained(td.clone())
        report = explained.report()
        return explained._state.ledger.summary(), report.title

    net, td, rows = model(), batch(6), batch(50)
    mean, title = entries(References("sample", samples=4, data=rows))
    assert title == "Where relevance went, on the mean over 4 references"
    single = []
    for number in range(4):
        one, title = entries(rows["input"][chosen(0, number, 50, 6)])
        assert title == "Where relevance went"
        single.append(one)
    for i, entry in enumerate(mean):
        for column in ("arrived", "left", "stabiliser", "gap"):
            each = [one[i].gap if column == "gap" else one[i].of(column) for one in single]
            found = entry.gap if column == "gap" else entry.of(column)
            torch.testing.assert_close(found, torch.stack(each).mean(0))


def test_the_ledger_of_several_references_is_their_mean():
    drawn = References("sample", samples=5, values=True)
    td = method(drawn, ledger=True).wrap(model())(batch(7))
    rise = (td["output"] - td["reference", "output"])[:, 0]
    torch.testing.assert_close(td["ledger", "target"], rise)
    torch.testing.assert_close(td["ledger", "inputs"], td["attr", "input"].sum(-1))


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"baseline": 0.0, "spread": True}, "one reference has no spread: draw several, by samples"),
        ({"baseline": "mean", "samples": 2}, 'samples=2 are drawn of data: give baseline="sample"'),
        ({"samples": 0}, "samples is how many references are drawn, at least one, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        References(**arguments)


def test_keys_are_drawn_from_the_same_row():
    data = TensorDict({"a": torch.arange(20.0)[:, None], "b": torch.arange(20.0)[:, None]}, [20])
    values = {"a": torch.zeros(6, 1), "b": torch.zeros(6, 1)}
    for one in References("sample", samples=3, data=data).of(values, dict.fromkeys(values, 1), data[:6]):
        assert torch.equal(one.replaced["a"], one.replaced["b"])


@pytest.mark.parametrize(
    "baseline",
    [0.5, torch.ones(3), "mean", "sample", "there", {"input": "mean"}, lambda rows: rows.flip(0)],
)
def test_what_is_settled_for_the_whole_is_that_of_its_parts(baseline):
    net, td = model(), batch(9)
    td["there", "input"] = torch.randn(9, 3, dtype=torch.float64)
    drawn = isinstance(baseline, str) and baseline == "sample"
    given = method(References(baseline, 4 if drawn else 1, spread=drawn))
    whole = given.wrap(net)(td.clone())
    for_parts, cut, fill = given.settled(["input"], td)
    explained = for_parts.wrap(net)
    parts = torch.cat([explained(fill(part))["attr", "input"] for part in cut.split(2)])
    torch.testing.assert_close(parts, whole["attr", "input"])
    assert sorted(td.keys()) == ["input", "there"]


def test_one_of_several_is_the_same_in_parts():
    net, td = model(), batch(9)
    for number in range(3):
        given = method(References("sample", 3).only(number))
        for_parts, cut, fill = given.settled(["input"], td)
        explained = for_parts.wrap(net)
        parts = torch.cat([explained(fill(part))["attr", "input"] for part in cut.split(2)])
        torch.testing.assert_close(parts, given.wrap(net)(td.clone())["attr", "input"])


def test_a_value_inside_the_model_has_no_mean_of_a_part():
    lrp = LRP("deeplift", target=Target("output", 0), baseline="mean", use_inputs=False, input_modules=["0"])
    for_parts, cut, fill = lrp.settled([], batch(6))
    with pytest.raises(ValueError, match="would depend on how the batch is cut"):
        for_parts.wrap(model())(fill(cut[:2]))
    assert lrp.wrap(model())(batch(6))["attr", "0"].any()


@pytest.mark.parametrize("baseline", [0.0, "mean", "sample"])
def test_a_compiled_explanation_reads_what_it_is_settled_to(baseline):
    net, td = model(), batch(8)
    eager, cut, fill = method(baseline).settled(["input"], td)
    compiled = method(baseline, compile={"backend": "eager"}).settled(["input"], td)[0].wrap(net)
    explained = eager.wrap(net)
    for part in cut.split(4):
        found, wanted = (module(fill(part).copy())["attr", "input"] for module in (compiled, explained))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("baseline", ["mean", "sample"])
def test_one_element_has_nothing_to_be_compared_with(baseline):
    with pytest.raises(ValueError, match="'input' itself where the batch has one element"):
        method(baseline).wrap(model())(batch(1))
    data = References(baseline, data=batch(5))
    assert method(data).wrap(model())(batch(1))["attr", "input"].any()


def test_measures_compare_with_all_that_they_explain():
    from tdhook.evaluation import perturbation_curve

    net, td = model(), batch(10)
    curves = [
        perturbation_curve(net, td, method("mean"), baseline=0.0, chunk_size=count).most.value
        for count in (3, 10)
    ]
    torch.testing.assert_close(*curves)


class Told(nn.Module):
    """A number for each of some words, and a vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, ids, x):
        return self.last(torch.tanh(self.words(ids) * x))


@pytest.mark.filterwarnings("ignore:input .ids. is")
@pytest.mark.parametrize("given", ["data", "entry"])
def test_an_index_that_no_baseline_is_given_for_is_held_fixed_in_parts_too(given):
    policy = TensorDictModule(Told().double(), ["ids", "x"], ["output"])
    td = TensorDict({"ids": torch.randint(5, (6,)), "x": torch.randn(6, 3).double()}, [6])
    td["baseline", "x"] = torch.randn(6, 3).double()
    data = TensorDict({"x": torch.randn(1, 3).double()}, [1])
    asked = method("baseline" if given == "entry" else data)
    whole = asked.wrap(policy)(td.clone())
    parts = Explain(asked, policy, under="parts", at_once=2)(td.clone())
    torch.testing.assert_close(parts["parts", "attr", "x"], whole["attr", "x"])
    with pytest.raises(KeyError, match="baseline 'other' is neither"):
        Explain(method({"ids": "other"}), policy)(td.clone())
