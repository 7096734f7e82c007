"""Explanations against a baseline in torchrl's loops: what is a step before, and what of a batch is seen at once."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Contrast, References, Target

pytest.importorskip("torchrl")

from explained_batches import ATTR, CHOSEN, collected, q_actor
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import Compose, InitTracker, SerialEnv, TransformedEnv
from torchrl.modules import GRUModule, set_recurrent_mode

from tdhook.perturbing.before import step_before
from tdhook.rl import Explain, StepBefore, make_env
from tdhook.targets import AtStep

WHY_LEFT = Contrast(Target("action_value", 0), Target("action_value", 1))


def against(baseline, target=CHOSEN, **options):
    return LRP("deeplift", target=target, baseline=baseline, **options)


def of_the_step_before(td):
    """The reference: what was observed a step earlier in the same episode, or else what is observed."""
    seen = td["observation"]
    before = torch.cat([seen[..., :1, :], seen[..., :-1, :]], -2)
    ends = td["next", "done"].reshape(td.batch_size)
    begins = torch.cat([torch.ones_like(ends[..., :1]), ends[..., :-1]], -1)
    return torch.where(begins[..., None], seen, before)


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def values_of(actor, seen, action):
    value = actor(TensorDict({"observation": seen}, seen.shape[:-1]))["action_value"]
    return (value * action).sum(-1).detach()


def test_the_step_before_is_that_of_the_trajectory_however_the_batch_is_cut():
    actor, batch = q_actor(), collected(60)
    assert batch["next", "done"].sum() >= 2
    explain = Explain(against("previous"), actor, at_once=7)
    relevance = explain(batch)[ATTR]
    before = of_the_step_before(batch)
    wanted = against("before").wrap(actor)(batch.clone().set("before", before))[ATTR]
    taken = batch["action"].to(torch.float32)
    rise = values_of(actor, batch["observation"], taken) - values_of(actor, before, taken)
    assert_close(relevance.sum(-1), rise)
    begins = (batch["observation"] == before).all(-1)
    assert begins.sum() >= 3
    assert not relevance[begins].any()
    assert relevance[~begins].any(-1).all()
    assert wanted.shape == relevance.shape


@pytest.mark.parametrize("baseline", ["mean", "sample", "previous", lambda rows: rows - rows.mean(0)])
def test_what_is_seen_of_a_batch_is_all_of_it(baseline):
    actor, batch = q_actor(), collected(40)
    cut, whole = (Explain(against(baseline), actor, at_once=count)(batch)[ATTR] for count in (3, 40))
    assert_close(cut, whole)
    assert cut.any()


def test_samples_write_their_spread_and_the_value_on_the_reference():
    actor, batch = q_actor(), collected(40)
    method = against(References("sample", samples=4, values=True, spread=True), WHY_LEFT)
    explain = Explain(method, actor, under="why", at_once=16)
    assert ("why", "spread", "observation") in explain.out_keys
    found = explain(batch)["why"]
    there, here = found["reference", "action_value"], actor(batch.select("observation"))["action_value"]
    rise = (here - there)[:, 0] - (here - there)[:, 1]
    assert_close(found["attr", "observation"].sum(-1), rise)
    assert (found["spread", "observation"] > 0).all()


def test_padding_is_not_drawn_and_takes_no_part_in_means():
    actor, batch = q_actor(), collected(20).reshape(2, 10)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 6:] = False
    padded = batch.clone().set(("collector", "mask"), valid)
    padded["observation"][~valid] = 1e6
    for baseline in ("mean", "sample"):
        found = Explain(against(baseline), actor)(padded)[ATTR]
        assert found.abs().max() < 1e4
        assert not found[~valid].any()
    mean = batch["observation"][valid].mean(0)
    wanted = against(mean).wrap(actor)
    assert_close(
        Explain(against("mean", WHY_LEFT), actor)(padded)[ATTR][valid],
        against(mean, WHY_LEFT).wrap(actor)(batch.select("observation").clone())[ATTR][valid],
    )
    assert wanted.in_keys == ["observation"]


def test_steps_drawn_at_random_are_no_trajectory():
    actor, batch = q_actor(), collected(200)
    shuffled = batch[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(
        ValueError, match=r"'observation' is mostly not what the step before has.*SliceSampler"
    ):
        Explain(against("previous"), actor)(shuffled)


def test_slices_of_a_buffer_are_trajectories():
    actor, batch = q_actor(), collected(200)
    sampler = SliceSampler(slice_len=5, end_key=("next", "done"), strict_length=False)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(200), sampler=sampler, batch_size=40)
    buffer.extend(batch)
    buffer.append_transform(Explain(against("previous"), actor))
    drawn = buffer.sample()
    # The buffer says where slices end when its transforms have run: they are told by what came next.
    follows = (drawn["observation"][1:] == drawn["next", "observation"][:-1]).all(-1)
    assert 20 < follows.sum() < 39
    before, taken = drawn["observation"][:-1], drawn["action"].float()
    rise = values_of(actor, drawn["observation"][1:], taken[1:]) - values_of(actor, before, taken[1:])
    assert_close(drawn[ATTR][1:].sum(-1), rise.where(follows, torch.zeros(())))


def test_a_critic_at_the_next_step_is_told_what_this_step_changed():
    torch.manual_seed(0)
    critic = TensorDictModule(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), ["observation"], ["state_value"]
    )
    batch = collected(30)
    found = Explain(against("previous", Target("state_value")), critic, at="next")(batch)
    rise = (critic(batch["next"].clone())["state_value"] - critic(batch.clone())["state_value"])[:, 0]
    assert_close(found["attr", "next", "observation"].sum(-1), rise.detach())


def test_a_policy_with_memory_is_compared_trajectory_by_trajectory():
    torch.manual_seed(0)
    gru = GRUModule(4, 8, in_keys=["observation", "h", "is_init"], out_keys=["hidden", ("next", "h")])
    policy = TensorDictSequential(gru, TensorDictModule(nn.Linear(8, 2), ["hidden"], ["action_value"]))
    begins = torch.zeros(3, 6, 1, dtype=torch.bool)
    begins[:, 0] = begins[1, 3] = True
    entries = {"observation": torch.randn(3, 6, 4), "h": torch.zeros(3, 6, 1, 8), "is_init": begins}
    batch = TensorDict(entries, [3, 6])
    method = LRP("deeplift", target=AtStep(Target("action_value", 0), 5), baseline="previous", ledger=True)
    found = Explain(method, policy, ["observation"], trajectories=True, at_once=6)(batch)
    seen = batch["observation"]
    before = torch.cat([seen[:, :1], seen[:, :-1]], 1).where(~begins, seen)
    with set_recurrent_mode("recurrent"), torch.no_grad():
        here, there = (
            policy(batch.copy().set("observation", x))["action_value"][:, 5, 0] for x in (seen, before)
        )
    assert_close(found[ATTR].sum((1, 2)), here - there)
    assert not found[ATTR][1, :4].any()
    assert found["ledger", "gap"].abs().max() < 1e-6


def remembering(count=1):
    def make():
        return TransformedEnv(make_env("CartPole-v1"), Compose(InitTracker(), StepBefore()))

    env = make() if count == 1 else SerialEnv(count, make)
    env.set_seed(0)
    return env


@pytest.mark.parametrize("count", [1, 3])
def test_a_policy_that_acts_is_told_the_step_before_by_the_environment(count):
    actor = q_actor()
    explained = against("previous", WHY_LEFT).wrap(actor)
    rollout = remembering(count).rollout(60, explained, break_when_any_done=False)
    assert rollout["next", "done"].sum() > count
    before = of_the_step_before(rollout)
    assert torch.equal(rollout["previous", "observation"], before)
    left = torch.tensor([1.0, -1.0])
    rise = values_of(actor, rollout["observation"], left) - values_of(actor, before, left)
    assert_close(rollout[ATTR].sum(-1), rise)
    # A batch of it is explained the same afterwards.
    assert_close(Explain(against("previous", WHY_LEFT), actor)(rollout.exclude("attr"))[ATTR], rollout[ATTR])


def test_a_collector_explains_the_first_step_of_a_batch_by_the_batch_before():
    actor = q_actor()
    collector = Collector(
        remembering,
        actor,
        frames_per_batch=8,
        total_frames=32,
        postproc=Explain(against("previous", WHY_LEFT), actor),
    )
    batches = [batch.clone() for batch in collector]
    collector.shutdown()
    goes_on = [not batch["is_init"][0] for batch in batches]
    assert sum(goes_on) >= 2
    assert [bool(batch[ATTR][0].any()) for batch in batches] == goes_on


def test_without_time_there_is_no_step_before():
    env, explained = SerialEnv(2, lambda: make_env("CartPole-v1")), against("previous").wrap(q_actor())
    with pytest.raises(ValueError, match=r"nothing says which axis of the batch \[2\] is time.*StepBefore"):
        env.rollout(5, explained)


def test_an_environment_without_the_entry_says_so():
    with pytest.raises(KeyError, match=r"has no 'pixels' to remember; it has .*'observation'"):
        TransformedEnv(make_env("CartPole-v1"), StepBefore(["pixels"])).rollout(2)


def test_agents_are_compared_with_their_own_step_before():
    torch.manual_seed(0)
    seen = torch.randn(2, 6, 3, 4)
    done = torch.zeros(2, 6, 3, 1, dtype=torch.bool)
    done[0, 2] = True
    batch = TensorDict({"agents": TensorDict({"observation": seen}, [2, 6, 3])}, [2, 6], names=[None, "time"])
    batch["next"] = TensorDict({"agents": TensorDict({"done": done}, [2, 6, 3])}, [2, 6])
    policy = TensorDictModule(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        [("agents", "observation")],
        [("agents", "logits")],
    )
    found = Explain(against("previous", Target(("agents", "logits"), 0)), policy, at_once=5)(batch)
    before = torch.cat([seen[:, :1], seen[:, :-1]], 1)
    before[0, 3] = seen[0, 3]
    net = policy.module
    rise = (net(seen) - net(before))[..., 0].detach()
    assert_close(found["attr", "agents", "observation"].sum(-1), rise)
    assert not found["attr", "agents", "observation"][0, 3].any()
    batch["agents", "before"] = before
    entry = against({("agents", "observation"): ("agents", "before")}, Target(("agents", "logits"), 0))
    assert_close(Explain(entry, policy)(batch)["attr"], found["attr"])


@pytest.mark.parametrize("flag", ["done", "is_init"])
def test_flags_of_a_group_are_those_of_its_agents(flag):
    """One agent of a team is done, the others and the episode go on."""
    torch.manual_seed(0)
    seen, state, done = (
        torch.randn(2, 6, 3, 4),
        torch.randn(2, 6, 5),
        torch.zeros(2, 6, 3, 1, dtype=torch.bool),
    )
    done[0, 2, 1] = True
    own = {"agents": TensorDict({"done": done}, [2, 6, 3]), "done": torch.zeros(2, 6, 1, dtype=torch.bool)}
    batch = TensorDict({"state": state, "next": own}, [2, 6], names=[None, "time"])
    batch["agents"] = TensorDict({"observation": seen}, [2, 6, 3])
    if flag == "is_init":
        del batch["next"]
        batch["agents", "is_init"] = torch.cat([torch.zeros_like(done[:, :1]), done[:, :-1]], 1)
        batch["is_init"] = torch.zeros(2, 6, 1, dtype=torch.bool)
    before = torch.cat([seen[:, :1], seen[:, :-1]], 1)
    before[0, 3, 1] = seen[0, 3, 1]
    assert torch.equal(step_before(("agents", "observation"), seen, batch), before)
    assert torch.equal(step_before("state", state, batch)[:, 1:], state[:, :-1])


def test_an_agent_that_begins_anew_leaves_the_others_their_step_before():
    torch.manual_seed(0)
    seen = torch.randn(7, 3, 4)
    after = seen[1:].clone()
    after[3, 1] = 0  # where it ended, and not where it begins anew
    batch = TensorDict({"agents": TensorDict({"observation": seen[:6]}, [6, 3])}, [6], names=["time"])
    batch["next"] = {"agents": TensorDict({"observation": after}, [6, 3])}
    before = torch.cat([seen[:1], seen[:5]])
    before[4, 1] = seen[4, 1]
    assert torch.equal(step_before(("agents", "observation"), seen[:6], batch), before)
