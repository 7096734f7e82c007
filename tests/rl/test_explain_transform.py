"""Explaining afterwards: on sampling from replay buffers, and of what collectors bring."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from explained_batches import ATTR, CHOSEN, METHOD, collected, of_the_stored, q_actor
from tensordict import TensorDictBase
from torch import nn

from tdhook import LRP, Contrast, Key, Target

pytest.importorskip("torchrl")

from torchrl.collectors import Collector
from torchrl.data import (
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.modules import MLP, ValueOperator

from tdhook.rl import Explain, make_env


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


def test_what_is_no_tensor_is_followed_too() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.1), nn.Linear(8, 1))
    critic, batch = ValueOperator(net, in_keys=["observation"]), collected()
    method = LRP("epsilon", target="state_value")
    transform = Explain(method, critic)
    again = pickle.loads(pickle.dumps(transform))
    first = transform(batch)[ATTR]
    net[1].negative_slope = 0.9
    second = transform(batch)[ATTR]
    net[1] = nn.Tanh()
    third = transform(batch)[ATTR]
    torch.testing.assert_close(third, method.wrap(critic)(batch.select("observation"))[ATTR])
    net[1] = nn.LeakyReLU(0.9)
    torch.testing.assert_close(second, method.wrap(critic)(batch.select("observation"))[ATTR])
    assert not torch.allclose(first, second) and not torch.allclose(second, third)
    with pytest.warns(UserWarning, match="explains with the weights of then"):
        torch.testing.assert_close(again(batch)[ATTR], first)


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
