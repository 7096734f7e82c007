"""`Explain` takes batches as they come: large, padded, of trajectories, of many agents."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from explained_batches import ATTR, CHOSEN, METHOD, collected, of_the_stored, q_actor
from tensordict import TensorDict, tensorclass
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdhook import LRP, Target

pytest.importorskip("torchrl")

from torchrl.collectors.utils import split_trajectories
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import SerialEnv, TransformedEnv
from torchrl.modules import LSTMModule, MultiAgentMLP, set_recurrent_mode

from tdhook.rl import Explain, build_actor, make_env


def categorical() -> TensorDictModule:
    architecture = {"in_features": 4, "out_features": 2, "num_cells": [16], "activation": "Tanh"}
    return build_actor("ppo_mlp", architecture)


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


def test_a_mask_that_is_not_where_a_collector_has_it_is_told() -> None:
    """A rollout that is split has it at its root, and padding would be explained."""
    actor, batch = q_actor(), collected(60)
    batch["traj_ids"] = torch.cat([torch.zeros(1), batch["next", "done"][:-1, 0].cumsum(0)]).long()
    split = split_trajectories(batch.exclude("collector"), trajectory_key="traj_ids")
    assert not split["mask"].all()
    method = LRP("epsilon_plus", target=Target("action_value", 0))
    with pytest.warns(UserWarning, match="'mask' of its steps.*give mask_key='mask'"):
        Explain(method, actor)(split)
    found = Explain(method, actor, mask_key="mask")(split)[ATTR]
    assert bool((found[~split["mask"]] == 0).all())
    Explain(method, actor, mask_key=None)(split)
    split["mask"] = split["mask"].unsqueeze(-1).expand(*split.shape, 2)  # of actions
    Explain(method, actor)(split)


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "trajectories"])
@pytest.mark.parametrize("action", ["one-hot", "categorical"])
@pytest.mark.parametrize("baseline", [None, "mean"])
def test_padding_alone_has_no_relevance(baseline: str | None, action: str, whole: bool) -> None:
    """However the padding is filled, and whatever is written beside relevance."""
    shape = (3, 4) if action == "categorical" else (3, 4, 2)
    entries = {
        "observation": torch.full((3, 4, 4), torch.nan),
        "action": torch.zeros(shape, dtype=torch.long),
    }
    batch = TensorDict({**entries, "collector": {"mask": torch.zeros(3, 4, dtype=torch.bool)}}, [3, 4])
    method = LRP("epsilon_plus", target=CHOSEN, baseline=baseline, ledger=True, values=True)
    transform = Explain(method, q_actor(), trajectories=whole)
    found = transform(batch)
    assert torch.equal(found[ATTR], torch.zeros(3, 4, 4))
    batch["observation"], batch["collector", "mask"] = torch.randn(3, 4, 4), torch.ones(3, 4).bool()
    if action == "one-hot":
        batch["action"][..., 1] = 1
    expected = transform(batch)
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    assert all(found[key].shape == value.shape for key, value in expected.items(True, True))


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
        found = transform(batch)["attr", "agents"]
        torch.testing.assert_close(found["observation"], expected)
        assert found.batch_size == (5, 3)


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


class Counting(TensorDictModuleBase):
    """Counts its steps in an entry of the batch, in place."""

    in_keys, out_keys = ["observation", "steps"], ["value"]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, tensordict: TensorDict) -> TensorDict:
        steps = tensordict["steps"]
        steps += 1
        return tensordict.set("value", self.layer(tensordict["observation"]) * steps)


@pytest.mark.parametrize("at_once", [None, 2])
def test_a_module_that_writes_to_what_it_reads_leaves_the_batch_alone(at_once: int | None) -> None:
    batch = TensorDict({"observation": torch.randn(5, 4), "steps": torch.zeros(5, 1)}, [5])
    kept = batch.clone()
    method, module = LRP("epsilon", target="value"), Counting()
    found = [Explain(method, module, ["observation"], at_once=at_once)(batch) for _ in range(2)]
    for one in found:
        assert (batch == kept).all() and (one["steps"] == 0).all()
        torch.testing.assert_close(
            one["attr", "observation"],
            method.wrap(module, ["observation"])(kept.clone())["attr", "observation"],
        )


def test_it_pickles(tmp_path: Path) -> None:
    actor, batch = q_actor(), collected()
    transform = Explain(METHOD, actor, every=2)
    first = transform(batch)
    again = pickle.loads(pickle.dumps(transform))
    assert again(batch)[ATTR].isnan().all()
    again.update()
    torch.testing.assert_close(again(batch)[ATTR], first[ATTR])
    torch.testing.assert_close(copy.deepcopy(transform).forward(batch).shape, first.shape)


WEIGHTS = {
    "module": lambda actor: actor,
    "state dict": lambda actor: actor.state_dict(),
    "TensorDict": lambda actor: TensorDict.from_module(actor),
    "parameters": lambda actor: TensorDict.from_module(actor, as_module=True).data,
    "wrapped": nn.DataParallel,
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_one_that_is_elsewhere_takes_weights_and_says_how_old_they_are(weights: str) -> None:
    actor, batch = q_actor(), collected()
    here = Explain(METHOD, actor)
    there = pickle.loads(pickle.dumps(here))
    old = here(batch)[ATTR]
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.5)
    with pytest.warns(UserWarning, match="pickled 0 s ago and explains with the weights of then: send it"):
        torch.testing.assert_close(there(batch)[ATTR], old)
    torch.testing.assert_close(there(batch)[ATTR], old)  # said once
    assert here.age == 0.0 < there.age
    new = here(batch)[ATTR]
    assert not torch.allclose(new, old)
    before = there.age
    there.update(WEIGHTS[weights](actor))
    assert 0 < there.age < before
    for _ in range(2):
        torch.testing.assert_close(there(batch)[ATTR], new)
    # Those that are given stay, also where the module is at hand.
    here.update(WEIGHTS[weights](actor))
    with torch.no_grad():
        next(actor.parameters()).zero_()
    torch.testing.assert_close(here(batch)[ATTR], new)
    here.update()
    torch.testing.assert_close(here(batch)[ATTR], of_the_stored(actor, batch))
    assert here.age == 0.0


def test_a_snapshot_that_is_elsewhere_was_asked_for() -> None:
    actor, batch = q_actor(), collected()
    snapshot = Explain(METHOD, actor, snapshot=True)
    first = snapshot(batch)[ATTR]
    there = pickle.loads(pickle.dumps(snapshot))
    torch.testing.assert_close(there(batch)[ATTR], first)
    assert there.age >= snapshot.age - 1 and snapshot.age > 0


def test_weights_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    actor, batch = q_actor(), collected()
    transform = Explain(METHOD, actor)
    first = transform(batch)[ATTR]
    state = {name: value + 1 for name, value in actor.state_dict().items()}
    name = list(state)[-1]
    for wrong in ({**state, name: torch.ones(7)}, {**state, "more": torch.ones(1)}):
        with pytest.raises(
            ValueError, match=r"do not fit a .*: .* (is|are) missing, too many, or of another shape"
        ):
            transform.update(wrong)
    del state[name]
    with pytest.raises(ValueError, match=f"do not fit .*{name} is missing"):
        transform.update(state)
    torch.testing.assert_close(transform(batch)[ATTR], first)


@pytest.mark.slow
def test_as_one_graph() -> None:
    actor, batch = q_actor(), collected()
    transform = Explain(LRP("epsilon_plus", target=CHOSEN, compile={"backend": "eager"}), actor)
    for _ in range(2):
        torch.testing.assert_close(transform(batch)[ATTR], of_the_stored(actor, batch))
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.mul_(1.3)


@tensorclass
class Step:
    observation: torch.Tensor
    action: torch.Tensor
    attr: TensorDict | None = None


@tensorclass
class Bare:
    observation: torch.Tensor
    action: torch.Tensor


def test_tensorclasses() -> None:
    actor, batch = q_actor(), collected(6)
    step = Step(batch["observation"], batch["action"], batch_size=[6])
    expected = of_the_stored(actor, batch)
    found = Explain(METHOD, actor)(step)
    assert isinstance(found, Step) and step.attr is None
    torch.testing.assert_close(found.attr["observation"], expected)
    buffer = ReplayBuffer(storage=LazyTensorStorage(6), sampler=SamplerWithoutReplacement(), batch_size=6)
    buffer.append_transform(Explain(METHOD, actor))
    buffer.extend(step)
    sample = buffer.sample()
    torch.testing.assert_close(sample.attr["observation"], of_the_stored(actor, sample.to_tensordict()))
    below = Explain(METHOD, actor, at="now")(TensorDict({"now": step, "action": step.action}, [6]))
    torch.testing.assert_close(below["attr", "now", "observation"], expected)
    with pytest.raises(
        ValueError, match=r"Bare has no field 'attr', where \('attr', 'observation'\) is written"
    ):
        Explain(METHOD, actor)(Bare(batch["observation"], batch["action"], batch_size=[6]))


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
    with pytest.raises(
        ValueError, match=r"there is nothing to explain: the batch is empty \(batch size \[0\]\)"
    ):
        Explain(METHOD, actor)(batch[:0])
    with pytest.raises(ValueError, match="a batch of trajectories has an axis for time"):
        Explain(METHOD, actor, trajectories=True)(batch[0])
    env = TransformedEnv(make_env("CartPole-v1"), Explain(METHOD, actor), auto_unwrap=False)
    with pytest.raises(RuntimeError, match="in an environment, let the explained policy act"):
        env.rollout(2)
