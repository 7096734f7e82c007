"""Terms of losses whose networks are run in ways of their own: of several agents, in torch.vmap, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn

from tdhook import LRP
from tdhook.attribution import Gradient

pytest.importorskip("torchrl")

from torchrl.modules import MLP, MultiAgentMLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, SACLoss

from tdhook.rl import LossTerm

OBSERVED = ("agents", "observation")


class Q(nn.Module):
    """A critic that overwrites what it computes, or does not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.first, self.last, self.in_place = nn.Linear(6, 5), nn.Linear(5, 1), in_place

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        h = self.first(torch.cat([observation, action], -1)).square() + 1
        return self.last(h.sqrt_() if self.in_place else h.sqrt())


def soft(*, in_place: bool) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(MLP(4, 4, num_cells=[5]), NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )
    critic = ValueOperator(Q(in_place=in_place), ["observation", "action"])
    loss = SACLoss(actor, critic, reduction="none", delay_qvalue=False, target_entropy=-2.0, fixed_alpha=True)
    loss.make_value_estimator(gamma=0.9)
    return loss.double()


def steps() -> TensorDict:
    torch.manual_seed(1)
    no = torch.zeros(5, 1, dtype=torch.bool)
    after = {"observation": torch.randn(5, 4), "reward": torch.randn(5, 1), "done": no, "terminated": no}
    entries = {"observation": torch.randn(5, 4), "action": torch.rand(5, 2) - 0.5, "next": after}
    return TensorDict(entries, [5]).apply(lambda x: x.double() if x.is_floating_point() else x)


def explained(loss: Any, method: Any, td: TensorDict) -> TensorDict:
    torch.manual_seed(2)
    return method.wrap(LossTerm(loss, "loss_actor"))(td)


@pytest.mark.filterwarnings("ignore:SACLoss with reduction='none' cannot include scalar values")
@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize("flow", ["relevance", "gradient"])
def test_against_a_baseline_all_of_what_critics_say_side_by_side_arrives(flow: Any) -> None:
    lrp = LRP("deeplift", target="loss_actor", baseline=0.3, flow=flow, ledger=True)
    found = explained(soft(in_place=False), lrp, steps())
    assert found["attr", "observation"].any()
    assert (found["ledger", "gap"].abs() < 1e-9 * found["ledger", "target"].abs().max()).all()


@pytest.mark.filterwarnings("ignore:SACLoss with reduction='none' cannot include scalar values")
@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize(
    "method", [LRP("epsilon", target="loss_actor"), Gradient("loss_actor")], ids=["LRP", "gradient"]
)
def test_critics_side_by_side_that_overwrite(method: Any) -> None:
    found, expected = (explained(soft(in_place=each), method, steps()) for each in (True, False))
    assert expected["attr", "observation"].any()
    torch.testing.assert_close(found["attr", "observation"], expected["attr", "observation"])


def test_several_agents_of_one_network() -> None:
    torch.manual_seed(0)
    of_agents = {"n_agent_inputs": 4, "n_agents": 3, "depth": 1, "num_cells": 5, "share_params": False}
    net = nn.Sequential(
        MultiAgentMLP(**of_agents, n_agent_outputs=4, centralised=False), NormalParamExtractor()
    )
    actor = ProbabilisticActor(
        TensorDictModule(net, [OBSERVED], [("agents", "loc"), ("agents", "scale")]),
        in_keys=[("agents", "loc"), ("agents", "scale")],
        out_keys=[("agents", "action")],
        distribution_class=TanhNormal,
    )
    critic = TensorDictModule(
        MultiAgentMLP(**of_agents, n_agent_outputs=1, centralised=True), [OBSERVED], [("agents", "value")]
    )
    loss = ClipPPOLoss(actor, critic, reduction="none", normalize_advantage=False)
    names = {"action": "action", "sample_log_prob": "log", "advantage": "gain", "value_target": "aim"}
    loss.set_keys(value=("agents", "value"), **{name: ("agents", key) for name, key in names.items()})
    agents = {"observation": torch.randn(5, 3, 4), "action": torch.rand(5, 3, 2) - 0.5}
    agents |= {"log": torch.randn(5, 3), "gain": torch.randn(5, 3, 1), "aim": torch.randn(5, 3, 1)}
    td = TensorDict({"agents": agents}, [5])
    found = LRP("epsilon", target="loss_critic", flow="gradient").wrap(LossTerm(loss, "loss_critic"))(td)
    # The centralised critic sees all agents.
    assert found["loss_critic"].shape == (5, 3) and found["attr", OBSERVED].abs().sum((0, 2)).all()
    torch.testing.assert_close(found["loss_critic"], loss(td)["loss_critic"].detach())
