"""What changed a value since the step before, where that is known: one feature jumps, and the others drift."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target

pytest.importorskip("torchrl")

from tdhook.rl import Explain

PLANTED, FEATURES, STEPS, LENGTH = 2, 6, 60, 20


def episodes(count, generator):
    """Trajectories of several episodes each, in the middle of which the planted feature jumps.

    Returns:
        Observations ``[count, STEPS, FEATURES]``, and the steps of the jumps, ``[count, STEPS]``.
    """
    seen = torch.empty(count, STEPS, FEATURES)
    jumps = torch.zeros(count, STEPS, dtype=torch.bool)
    for first in range(0, STEPS, LENGTH):
        begin = torch.rand(count, 1, FEATURES, generator=generator)
        drift = 0.002 * torch.randn(count, LENGTH, FEATURES, generator=generator)
        part = begin + drift.cumsum(1)
        at = torch.randint(5, LENGTH - 5, (count,), generator=generator)
        since = torch.arange(LENGTH) >= at[:, None]
        part[..., PLANTED] = 0.1 * part[..., PLANTED] + since
        seen[:, first : first + LENGTH] = part
        jumps[torch.arange(count), first + at] = True
    return seen, jumps


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    seen = episodes(64, torch.Generator().manual_seed(1))[0]
    value = seen[..., PLANTED] * (1 + seen[..., 0]) + (3 * seen[..., 1]).sin() - seen[..., 3] * seen[..., 4]
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        nn.functional.mse_loss(net(seen)[..., 0], value).backward()
        optimiser.step()
    return TensorDictModule(net, ["observation"], ["state_value"])


@pytest.mark.parametrize("composite", ["deeplift", "epsilon", "epsilon_plus", "attn_lrp"])
def test_the_planted_feature_gets_the_change(critic, composite):
    seen, jumps = episodes(16, torch.Generator().manual_seed(2))
    ends = torch.zeros(16, STEPS, 1, dtype=torch.bool)
    ends[:, LENGTH - 1 :: LENGTH] = True
    batch = TensorDict({"observation": seen, "next": {"done": ends}}, [16, STEPS])
    method = LRP(composite, target=Target("state_value"), baseline="previous")
    found = Explain(method, critic, at_once=100)(batch)["attr", "observation"]
    value = critic(batch.clone())["state_value"][..., 0].detach()
    change = torch.zeros_like(value)
    change[:, 1:] = value[:, 1:] - value[:, :-1]
    change[:, ::LENGTH] = 0
    torch.testing.assert_close(found.sum(-1), change, rtol=1e-3, atol=1e-4)
    planted = found[..., PLANTED]
    assert planted[jumps].sum() > 0.95 * change[jumps].sum()
    assert (planted[jumps] > 0.9 * change[jumps]).all()
    assert (planted.abs()[jumps] > 0.95 * found.abs().sum(-1)[jumps]).float().mean() > 0.95
    # Where an episode begins, everything is another, and nothing has changed since the step before.
    assert not found[:, ::LENGTH].any()
    # As a value, the feature has no such share of that step.
    alone = Explain(LRP(composite, target=Target("state_value")), critic)(batch)["attr", "observation"]
    assert (alone[..., PLANTED].abs() / alone.abs().sum(-1))[jumps].mean() < 0.8
