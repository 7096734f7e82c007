"""Relevance through units in the loops of torchrl: policies that act, buffers, whole data sets, agents from pixels."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

pytest.importorskip("torchrl")

from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer

from tdhook import LRP, Target
from tdhook.attribution import Attribution, GradientTimesInput, IntegratedGradients
from tdhook.datasets import Job
from tdhook.rl import Explain, Policy, demo_policy, make_env
from tdhook.targets import Through

PLACE = "module.0.module.3"
METHOD = LRP("epsilon", target=Through(Target("action_value", "action"), PLACE, "top:2"))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return demo_policy()


@pytest.fixture(scope="module")
def rollout(policy: Policy) -> TensorDictBase:
    return make_env(policy.env_id, 0).rollout(20, policy.actor)


def test_a_policy_that_acts_tells_its_units(policy: Policy) -> None:
    collector = Collector(
        lambda: make_env(policy.env_id, 0),
        METHOD.wrap(policy.actor),
        frames_per_batch=8,
        total_frames=8,
        auto_register_policy_transforms=False,
    )
    (batch,) = list(collector)
    collector.shutdown()
    assert batch["units", PLACE].shape == (8, 2)
    again = METHOD.wrap(policy.actor)(batch.select("observation", "action"))
    assert torch.equal(batch["units", PLACE], again["units", PLACE])
    torch.testing.assert_close(batch["attr", "observation"], again["attr", "observation"])


def test_a_buffer_adds_them_and_leaves_them_out(policy: Policy, rollout: TensorDictBase) -> None:
    buffer = ReplayBuffer(storage=LazyTensorStorage(100), batch_size=6)
    buffer.append_transform(Explain(METHOD, policy.actor, every=2))
    buffer.extend(rollout)
    first, second = buffer.sample(), buffer.sample()
    assert first["units", PLACE].shape == (6, 2)
    assert first["attr", "observation"].shape == (6, 2, 4)
    assert (second["units", PLACE] == -1).all()
    assert second["attr", "observation"].isnan().all()


def test_a_job_writes_them(policy: Policy, rollout: TensorDictBase, tmp_path) -> None:
    job = Job(METHOD, policy.actor, rollout, tmp_path / "job", chunk=7)
    job.work()
    result = job.result().rows
    expected = METHOD.wrap(policy.actor)(rollout.select("observation", "action"))
    torch.testing.assert_close(result["attr", "observation"], expected["attr", "observation"])
    assert torch.equal(result["units", PLACE], expected["units", PLACE])


@pytest.mark.parametrize("path, axis", [("module.0.module.0.5", 1), ("module.0.module.1.1", None)])
@pytest.mark.parametrize(
    "method", [LRP("epsilon_plus"), GradientTimesInput(), IntegratedGradients(steps=3)], ids=str
)
def test_channels_of_an_agent_that_sees_frames(method: Attribution, path: str, axis: int | None) -> None:
    """Its network makes the axes of the batch one, whatever they are."""
    agent = demo_policy("freeway")
    frames = make_env(agent, 0).rollout(4, agent.actor).select("pixels")
    td: TensorDictBase = torch.stack([frames, frames.flip(0)])
    target = Target("logits", 1)
    whole = method.explaining(target).wrap(agent.actor)(td.clone())["attr", "pixels"]
    each = method.explaining(Through(target, path, axis=axis)).wrap(agent.actor)(td.clone())["attr", "pixels"]
    assert each.shape[:2] == td.batch_size
    scale = float(whole.abs().max())
    torch.testing.assert_close(each.sum(2), whole, rtol=0, atol=2e-6 * scale)
    row = TensorDict({"pixels": frames["pixels"]}, [4])
    flat = method.explaining(Through(target, path, axis=axis)).wrap(agent.actor)(row)["attr", "pixels"]
    torch.testing.assert_close(each[0], flat, rtol=0, atol=2e-6 * scale)
