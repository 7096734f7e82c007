"""Modules inside another one that has a rule have no relevance of their own, and are not given any."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Target
from tdhook.attribution import Attribution
from tdhook.rules import EpsilonRule, GammaRule, IgnoreRule, PassRule, Rule
from tdhook.selectors import First, Name
from tdhook.targets import Through

LINEAR = [(nn.Linear, EpsilonRule())]


def nested() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    return nn.Sequential(nn.Linear(4, 5), inner, nn.Linear(5, 2)).double()


def data() -> TensorDict:
    torch.manual_seed(1)
    return TensorDict({"input": torch.randn(3, 4).double()}, [3])


TARGET = Target("output", 0)
ASKED: dict[str, Attribution] = {
    "a layer": LRP(LINEAR, target=TARGET, input_modules=["1.0"]),
    "what a layer is given": LRP(LINEAR, target=TARGET, input_modules=["1.1:input"]),
    "a target": LRP(LINEAR, target=Target(("1.1",), 0), target_modules=["1.1"]),
    "units": LRP(LINEAR, target=Through(TARGET, "1.0")),
    "against a baseline": LRP(LINEAR, target=TARGET, input_modules=["1.0"], baseline=0.0),
}


@pytest.mark.parametrize("rule", [PassRule(), EpsilonRule(), GammaRule()], ids=str)
@pytest.mark.parametrize("method", ASKED.values(), ids=list(ASKED))
def test_it_is_refused_by_name(method: LRP, rule: Rule) -> None:
    composite = [(Name("1"), rule), *LINEAR]
    said = r"'1\.[01](:input)?' is inside '1' \(Sequential\), which runs as one under .*: name '1', or give"
    with pytest.raises(ValueError, match=said):
        LRP(composite, **{**method.shared, "baseline": method.references}).wrap(nested())(data())


def test_also_where_the_order_has_to_be_known_first() -> None:
    composite = [(First(Name("1")), PassRule()), *LINEAR]
    with pytest.raises(ValueError, match=r"'1\.0' is inside '1'"):
        LRP(composite, target=TARGET, input_modules=["1.0"]).wrap(nested())(data())


@pytest.mark.parametrize("composite", [[(Name("1"), IgnoreRule()), *LINEAR], LINEAR, "epsilon_plus"], ids=str)
def test_what_is_entered_has_relevance(composite: object) -> None:
    found = LRP(composite, target=TARGET, input_modules=["1.0", "1"]).wrap(nested())(data())
    assert (found["attr", "1.0"] != 0).any()
    assert (found["attr", "1"] != 0).any()


@pytest.mark.parametrize("attribute", [["hidden"], "all"], ids=str)
def test_a_key_that_is_written_inside_is_refused(attribute: object) -> None:
    inner = TensorDictSequential(
        TensorDictModule(nn.Linear(4, 5), ["obs"], ["hidden"]), TensorDictModule(nn.Tanh(), ["hidden"], ["h"])
    )
    policy = TensorDictSequential(inner, TensorDictModule(nn.Linear(5, 2), ["h"], ["output"])).double()
    td = TensorDict({"obs": torch.randn(3, 4).double()}, [3])
    with pytest.raises(ValueError, match=r"'hidden' is inside 'module.0' \(TensorDictSequential\)"):
        LRP([(Name("module.0"), EpsilonRule()), *LINEAR], target=TARGET, attribute=attribute).wrap(policy)(
            td.clone()
        )
    found = LRP([(Name("module.0"), EpsilonRule()), *LINEAR], target=TARGET, attribute=["h"]).wrap(policy)(
        td.clone()
    )
    torch.testing.assert_close(
        found["attr", "h"].sum(-1), found["output"][:, 0] - policy[1].module.bias[0], rtol=1e-5, atol=1e-5
    )
