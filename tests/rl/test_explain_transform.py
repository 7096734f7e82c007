"""Explaining afterwards: on sampling from replay buffers, and of what collectors bring."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Contrast, Key, Target

pytest.importorskip("torchrl")

from torchrl.collectors import Collector
from torchrl.collectors.utils import split_trajectories
from torchrl.data import (
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.envs import SerialEnv, TransformedEnv
from torchrl.modules import MLP, LSTMModule, MultiAgentMLP, ValueOperator, set_recurrent_mode

from tdhook.rl import Explain, build_actor, make_env

CHOSEN = Target("action_value", "action")
METHOD = LRP("epsilon_plus", target=CHOSEN)
ATTR = ("attr", "observation")


def q_actor(seed: int = 0, cells: int = 16) -> TensorDictModule:
    torch.manual_seed(seed)
    architecture = {"in_features": 4, "out_features": 2, "num_cells": [cells], "activation": "ReLU"}
    return build_actor("dqn_mlp", architecture)


def categorical() -> TensorDictModule:
    architecture = {"in_features": 4, "out_features": 2, "num_cells": [16], "activation": "Tanh"}
    return build_actor("ppo_mlp", architecture)


def collected(steps: int = 24) -> TensorDict:
    """Steps of a random policy, so that the stored actions are not those of any other."""
    return make_env("CartPole-v1", seed=0).rollout(steps, break_when_any_done=False)


def of_the_stored(actor: nn.Module, td: TensorDictBase, target: Any = None) -> torch.Tensor:
    """The reference: the target points at a copy of the stored action, which nothing overwrites."""
    work = td.select("observation").set("taken", td["action"])
    target = target or Target("action_value", Key("taken"))
    return LRP("epsilon_plus", target=target).wrap(copy.deepcopy(actor))(work)[ATTR]


def equal(a: TensorDictBase, b: TensorDictBase) -> bool:
    return set(a.keys(True, True)) == set(b.keys(True, True)) and bool((a == b).all())


def test_the_stored_action_is_explained_and_kept() -> None:
    actor, batch = q_actor(), collected()
    before = batch.clone()
    assert not torch.equal(actor(batch.clone())["action"], batch["action"])  # it would have acted otherwise
    explained = Explain(METHOD, actor)(batch)
    torch.testing.assert_close(explained[ATTR], of_the_stored(actor, batch))
    assert equal(batch, before)
    assert equal(explained.exclude("attr"), before)
    assert set(explained.keys(True, True)) == {*before.keys(True, True), ATTR}
    chosen = LRP("epsilon_plus", target=CHOSEN).wrap(actor)(batch.clone())[ATTR]
    assert not torch.allclose(explained[ATTR], chosen)


def test_a_contrast_and_several_outputs_of_the_stored_action() -> None:
    actor, batch = q_actor(), collected()
    contrast = Contrast(Target("action_value", "action"), Target("action_value", "all"))
    found = Explain(LRP("epsilon_plus", target=contrast), actor)(batch)[ATTR]
    assert found.shape == (24, 2, 4)
    stored = Contrast(Target("action_value", Key("taken")), Target("action_value", "all"))
    torch.testing.assert_close(found, of_the_stored(actor, batch, stored))


@pytest.mark.parametrize("storage", [ListStorage, LazyTensorStorage, LazyMemmapStorage, LazyStackStorage])
@pytest.mark.parametrize("prioritised", [False, True])
def test_on_sampling_from_any_buffer(storage: Any, prioritised: bool) -> None:
    actor, batch = q_actor(), collected()
    kind = TensorDictReplayBuffer
    options = {}
    if prioritised:
        kind, options = (
            TensorDictPrioritizedReplayBuffer,
            {"alpha": 0.7, "beta": 0.5, "priority_key": "td_error"},
        )
    try:
        buffer = kind(storage=storage(100), batch_size=8, **options)
    except RuntimeError as error:
        if "SegmentTree" not in str(error):
            raise
        pytest.skip("torchrl's extension for prioritised sampling was not built for this torch")
    buffer.append_transform(Explain(METHOD, actor))
    buffer.extend(batch)
    sample = buffer.sample()
    torch.testing.assert_close(sample[ATTR], of_the_stored(actor, sample))
    assert len(buffer[:][ATTR]) == 24
    if prioritised:
        sample["td_error"] = torch.rand(8)
        buffer.update_tensordict_priority(sample)
        assert buffer.sample()[ATTR].shape == (8, 4)


def test_on_writing_into_a_buffer() -> None:
    actor, batch = q_actor(), collected()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=8)
    buffer.append_transform(Explain(METHOD, actor), invert=True)
    buffer.extend(batch)
    sample = buffer.sample()
    torch.testing.assert_close(sample[ATTR], of_the_stored(actor, sample))


def test_prefetching_does_not_meddle_with_training() -> None:
    actor = q_actor()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=64, prefetch=3)
    buffer.append_transform(Explain(METHOD, actor))
    buffer.extend(collected())
    for _ in range(15):
        sample = buffer.sample()
        assert all(p.requires_grad for p in actor.parameters())
        actor.zero_grad()
        actor(sample.select("observation"))["action_value"].sum().backward()
        gradients = [p.grad.clone() for p in actor.parameters()]
        alone = copy.deepcopy(actor)
        alone.zero_grad()
        alone(sample.select("observation"))["action_value"].sum().backward()
        for found, expected in zip(gradients, alone.parameters(), strict=True):
            assert expected.grad is not None
            torch.testing.assert_close(found, expected.grad)


def test_after_collecting() -> None:
    actor = q_actor()
    options = {"frames_per_batch": 20, "total_frames": 60, "auto_register_policy_transforms": False}
    collector = Collector(make_env("CartPole-v1"), None, postproc=Explain(METHOD, actor), **options)
    for batch in collector:
        torch.testing.assert_close(batch[ATTR], of_the_stored(actor, batch))
    collector.shutdown()


def test_every_nth_batch_and_the_others_can_be_stacked_with_them() -> None:
    transform = Explain(LRP("epsilon_plus", target=CHOSEN, ledger=True), q_actor(), every=3)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=16)
    found = []
    for size in (4, 6, 4, 4, 5):
        found.append(transform(collected(size)))
        buffer.extend(found[-1])
    explained = [not batch[ATTR].isnan().any() for batch in found]
    assert explained == [True, False, False, True, False]
    assert all(batch[ATTR].isnan().all() for batch, there in zip(found, explained, strict=True) if not there)
    assert [batch[ATTR].shape for batch in found] == [(4, 4), (6, 4), (4, 4), (4, 4), (5, 4)]
    assert len({frozenset(batch.keys(True, True)) for batch in found}) == 1
    assert found[1]["ledger", "gap"].shape == (6,)
    assert int(buffer[:]["attr", "observation"].isnan().any(-1).sum()) == 15


def test_the_weights_of_the_moment_or_those_of_a_snapshot() -> None:
    actor, batch = (
        q_actor(cells=300),
        collected(),
    )  # large enough for the weights to be kept from call to call
    live, frozen = Explain(METHOD, actor), Explain(METHOD, actor, snapshot=True)
    first = live(batch)[ATTR]
    torch.testing.assert_close(frozen(batch)[ATTR], first)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.5)
    second = live(batch)[ATTR]
    torch.testing.assert_close(second, of_the_stored(actor, batch))
    assert not torch.allclose(second, first)
    torch.testing.assert_close(frozen(batch)[ATTR], first)
    frozen.update()
    torch.testing.assert_close(frozen(batch)[ATTR], second)
    with pytest.raises(RuntimeError, match="without snapshot=True the weights are those of the moment"):
        live.update()


def test_a_module_that_changes_otherwise_is_followed_too() -> None:
    actor, batch = q_actor(), collected()
    transform = Explain(METHOD, actor)
    transform(batch)
    actor.double()
    with pytest.raises(RuntimeError):  # the batch is in single precision, and now the policy is not
        transform(batch)
    wide = batch.clone()
    wide["observation"] = wide["observation"].double()
    assert transform(wide)[ATTR].dtype is torch.float64
    actor.float()
    actor[0].module[0] = nn.Linear(4, 16)
    torch.testing.assert_close(transform(batch)[ATTR], of_the_stored(actor, batch))


def test_batch_norm_follows_the_mode_and_keeps_its_statistics() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    critic = ValueOperator(net, in_keys=["observation"]).eval()
    batch, transform = collected(), Explain(LRP("epsilon_plus", target="state_value"), critic)
    evaluating = transform(batch)[ATTR]
    critic.train()
    statistics = copy.deepcopy(dict(net.named_buffers()))
    assert not torch.allclose(transform(batch)[ATTR], evaluating)
    for name, value in net.named_buffers():
        assert torch.equal(value, statistics[name])
    critic.eval()
    torch.testing.assert_close(transform(batch)[ATTR], evaluating)


def test_a_critic_of_what_came_next() -> None:
    critic, batch = (
        ValueOperator(MLP(in_features=4, out_features=1, num_cells=[16]), ["observation"]),
        collected(),
    )
    value = LRP("epsilon_plus", target="state_value", ledger=True)
    found = Explain(value, critic, at="next")(batch)
    expected = value.wrap(critic)(batch["next"].select("observation"))
    torch.testing.assert_close(found["attr", "next", "observation"], expected[ATTR])
    torch.testing.assert_close(found["ledger", "next", "gap"], expected["ledger", "gap"])
    assert equal(found.exclude("attr", "ledger"), batch)


def test_several_of_them_side_by_side() -> None:
    critic = ValueOperator(MLP(in_features=4, out_features=1, num_cells=[16]), ["observation"])
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=8)
    buffer.append_transform(Explain(METHOD, q_actor()))
    buffer.append_transform(Explain(LRP("epsilon_plus", target="state_value"), critic, under="critic"))
    buffer.extend(collected())
    sample = buffer.sample()
    assert sample[ATTR].shape == sample["critic", "attr", "observation"].shape == (8, 4)


def test_what_is_there_is_not_overwritten() -> None:
    actor = q_actor()
    batch = make_env("CartPole-v1", seed=0).rollout(5, METHOD.wrap(actor))
    with pytest.raises(
        KeyError, match=r"already has \('attr', 'observation'\), .* attribution_key, or .* under="
    ):
        Explain(METHOD, actor)(batch)
    found = Explain(METHOD, q_actor(1), under="other")(batch)
    assert torch.equal(found[ATTR], batch[ATTR])
    assert not torch.allclose(found["other", "attr", "observation"], batch[ATTR])
    explaining = LRP("epsilon_plus", target=CHOSEN, attribution_key=("why", "not"))
    assert Explain(explaining, METHOD.wrap(actor))(batch)["why", "not", "observation"].shape == (5, 4)


@pytest.mark.parametrize("at_once", [1, 7, 256])
def test_memory_does_not_grow_with_the_batch_and_shapes_are_any(at_once: int) -> None:
    actor, seen = q_actor(), []
    actor[0].module.register_forward_hook(lambda module, args, result: seen.append(len(args[0])))
    env = SerialEnv(3, lambda: make_env("CartPole-v1"))
    batch = env.rollout(10, break_when_any_done=False)
    env.close()
    transform = Explain(METHOD, actor, at_once=at_once)
    found = transform(batch)
    assert max(seen) <= at_once
    assert found[ATTR].shape == (3, 10, 4)
    torch.testing.assert_close(found[ATTR], of_the_stored(actor, batch))
    one = transform(batch[0, 3])
    assert one.batch_size == ()
    torch.testing.assert_close(one[ATTR], found[ATTR][0, 3])
    lazy = transform(TensorDict.lazy_stack(list(batch.unbind(0))))
    torch.testing.assert_close(lazy[ATTR], found[ATTR])
    assert transform(batch.lock_())[ATTR].shape == (3, 10, 4)


def test_padding_is_not_explained() -> None:
    actor, batch = q_actor(), collected(60)
    batch["collector", "traj_ids"] = torch.cat(
        [torch.zeros(1), batch["next", "done"][:-1, 0].cumsum(0)]
    ).long()
    split = split_trajectories(batch, prefix="collector")
    mask = split["collector", "mask"]
    assert not mask.all()
    assert bool((split["action"][~mask] == 0).all())  # no action at all
    found = Explain(METHOD, actor, at_once=7)(split)[ATTR]
    assert bool((found[~mask] == 0).all())
    torch.testing.assert_close(found[mask], of_the_stored(actor, split[mask]))


def recurrent() -> TensorDictModule:
    torch.manual_seed(3)
    lstm = LSTMModule(
        input_size=4,
        hidden_size=8,
        in_keys=["observation", "h", "c"],
        out_keys=["hidden", ("next", "h"), ("next", "c")],
    )
    return TensorDictSequential(lstm, TensorDictModule(nn.Linear(8, 2), ["hidden"], ["action_value"]))


def trajectories(*shape: int) -> TensorDict:
    action = nn.functional.one_hot(torch.randint(2, shape), 2)
    state = torch.zeros(*shape, 1, 8)
    entries = {"observation": torch.randn(*shape, 4), "h": state, "c": state.clone(), "action": action}
    entries["is_init"] = torch.zeros(*shape, 1, dtype=torch.bool)
    return TensorDict(entries, shape)


def test_whole_trajectories_and_their_padding() -> None:
    policy, batch = recurrent(), trajectories(3, 6)
    method = LRP("epsilon_plus", target=CHOSEN)
    transform = Explain(method, policy, ["observation"], trajectories=True, at_once=6)
    found = transform(batch)[ATTR]
    with set_recurrent_mode("recurrent"):
        expected = method.wrap(policy, ["observation"])(batch.clone())[ATTR]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(transform(batch[0])[ATTR], expected[0])
    # Whatever is behind the end of a trajectory, its relevance is that of the shorter one.
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    padded = batch.clone()
    padded["collector", "mask"] = mask
    padded["action"] = padded["action"] * mask[..., None]
    masked = transform(padded)[ATTR]
    assert bool((masked[~mask] == 0).all())
    torch.testing.assert_close(masked[1, :4], transform(batch[1, :4])[ATTR])
    assert not torch.allclose(masked[1, :4], found[1, :4])


def test_many_agents() -> None:
    net = MultiAgentMLP(
        n_agent_inputs=4,
        n_agent_outputs=2,
        n_agents=3,
        centralised=False,
        share_params=False,
        num_cells=[8],
        depth=1,
    )
    policy = TensorDictModule(net, [("agents", "observation")], [("agents", "action_value")])
    entries = {
        "observation": torch.randn(5, 3, 4),
        "action": nn.functional.one_hot(torch.randint(2, (5, 3)), 2),
    }
    batch = TensorDict({"agents": TensorDict(entries, [5, 3])}, [5])
    method = LRP("epsilon_plus", target=Target(("agents", "action_value"), ("agents", "action")))
    transform = Explain(method, policy)
    for _ in range(2):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.3)
        expected = method.wrap(policy)(batch.clone())["attr", "agents", "observation"]
        torch.testing.assert_close(transform(batch)["attr", "agents", "observation"], expected)


def test_what_belongs_to_the_caller_is_left_alone() -> None:
    actor, batch = categorical(), collected()
    state = copy.deepcopy(actor.state_dict())
    transform = Explain(LRP("epsilon_plus", target=Target("logits", "action")), actor)
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    with set_exploration_type(ExplorationType.RANDOM):
        random = torch.get_rng_state()
        transform(batch)
        assert torch.equal(torch.get_rng_state(), random)
    assert not list(transform.parameters()) and not transform.state_dict()
    transform.to(torch.float64)
    assert all(torch.equal(value, state[name]) for name, value in actor.state_dict().items())
    assert all(p.requires_grad for p in actor.parameters())
    assert all("forward" not in vars(module) for module in actor.modules())
    with torch.no_grad():
        transform(batch)
    with torch.inference_mode():
        transform(batch)


def test_it_pickles(tmp_path: Path) -> None:
    actor, batch = q_actor(), collected()
    transform = Explain(METHOD, actor, every=2)
    first = transform(batch)
    again = pickle.loads(pickle.dumps(transform))
    assert again(batch)[ATTR].isnan().all()
    torch.testing.assert_close(again(batch)[ATTR], first[ATTR])
    torch.testing.assert_close(copy.deepcopy(transform).forward(batch).shape, first.shape)


@pytest.mark.slow
def test_as_one_graph() -> None:
    actor, batch = q_actor(), collected()
    transform = Explain(LRP("epsilon_plus", target=CHOSEN, compile={"backend": "eager"}), actor)
    for _ in range(2):
        torch.testing.assert_close(transform(batch)[ATTR], of_the_stored(actor, batch))
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.mul_(1.3)


def test_keys_are_told() -> None:
    transform = Explain(LRP("epsilon_plus", target=CHOSEN, ledger=True), q_actor(), at="next", under="x")
    assert transform.in_keys == [("next", "observation")]
    assert ("x", "attr", "next", "observation") in transform.out_keys
    assert ("x", "ledger", "next", "gap") in transform.out_keys
    assert len(transform.out_keys) == 5


def test_errors_say_what_to_do() -> None:
    actor, batch = q_actor(), collected(4)
    with pytest.raises(ValueError, match="every is at least 1, got every=0"):
        Explain(METHOD, actor, every=0)
    with pytest.raises(ValueError, match="at_once is at least 1, got at_once=-2"):
        Explain(METHOD, actor, at_once=-2)
    with pytest.raises(KeyError, match="the batch has no 'observation', which the explained module reads"):
        Explain(METHOD, actor)(batch.exclude("observation"))
    with pytest.raises(KeyError, match="the batch has no 'after' to read from"):
        Explain(METHOD, actor, at="after")(batch)
    with pytest.raises(ValueError, match="a batch of trajectories has an axis for time"):
        Explain(METHOD, actor, trajectories=True)(batch[0])
    env = TransformedEnv(make_env("CartPole-v1"), Explain(METHOD, actor), auto_unwrap=False)
    with pytest.raises(RuntimeError, match="in an environment, let the explained policy act"):
        env.rollout(2)
