"""Actions as they come: of any integer type, one-hot or not, several at once, of agents."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import distributions, nn
from torchrl.modules import ProbabilisticActor

from tdhook import LRP, Target
from tdhook.targets import AtStep, Computed, LogProb


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("form", ["index", "column", "one-hot"])
def test_actions_of_any_integers(kind, form):
    taken = torch.tensor([0, 1, 1])
    forms = {"index": taken, "column": taken.unsqueeze(-1), "one-hot": nn.functional.one_hot(taken, 2)}
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    lrp = LRP("epsilon", target=Target("output", "action"))
    x = torch.arange(12.0).reshape(3, 4)
    expected = lrp.wrap(layer)(TensorDict({"input": x, "action": taken}, [3]))["attr", "input"]
    td = lrp.wrap(layer)(TensorDict({"input": x, "action": forms[form].to(kind)}, [3]))
    assert torch.equal(td["attr", "input"], expected)
    steps = LRP("epsilon", target=AtStep(Target("output", 0), torch.tensor(2, dtype=torch.uint8)))
    assert steps.wrap(layer)(TensorDict({"input": x}, [3]))["attr", "input"][:2].abs().sum() == 0


def test_an_unsigned_action_out_of_range():
    td = TensorDict({"input": torch.ones(3, 4), "action": torch.tensor([0, 2, 1], dtype=torch.uint8)}, [3])
    with pytest.raises(IndexError, match="target index 2 from entry 'action' is out of range"):
        LRP("epsilon", target=Target("output", "action")).wrap(nn.Linear(4, 2))(td)


@pytest.mark.parametrize(
    "action", [torch.tensor([[1, 0, 0, 1, 0]] * 3), torch.tensor([[0, 1]] * 3)], ids=["one-hot", "indices"]
)
def test_several_actions_at_once(action):
    """Of several choices side by side, in one value: what to do instead, which is then right."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 5)
    td = TensorDict({"input": torch.ones(3, 4), "action": action}, [3])
    with pytest.raises(ValueError, match=r"explain (their sum|the sum of what they are worth) with Computed"):
        LRP("epsilon", target=Target("output", "action")).wrap(layer)(td.copy())
    if action.shape[-1] == 5:
        total = Computed(lambda outputs, inputs: (outputs["output"] * inputs["action"]).sum(-1))
        written = LRP("epsilon", target=total, ledger=True).wrap(layer)(td.copy())
        both = LRP("epsilon", target=Target("output", [0, 3])).wrap(layer)(td.copy())
        torch.testing.assert_close(written["attr", "input"], both["attr", "input"].sum(1))


def test_an_action_that_is_a_text():
    td = TensorDict({"input": torch.ones(3, 4), "action": "left"}, [3])
    with pytest.raises(TypeError, match="entry 'action' is no tensor but"):
        LRP("epsilon", target=Target("output", "action")).wrap(nn.Linear(4, 2))(td)


def test_the_action_of_agents():
    torch.manual_seed(0)
    policy = ProbabilisticActor(
        TensorDictModule(nn.Linear(5, 4), [("agents", "observation")], [("agents", "logits")]),
        in_keys=[("agents", "logits")],
        out_keys=[("agents", "action")],
        distribution_class=distributions.Categorical,
    )
    td = TensorDict({"agents": TensorDict({"observation": torch.ones(2, 3, 5)}, [2, 3])}, [2])
    LRP("epsilon", target=LogProb.of(policy)).wrap(policy)(td)
    assert td["log_prob"].shape == (2, 3, 4) and td["attr", "agents"].batch_size == (2, 3)
