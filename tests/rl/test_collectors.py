"""An explained policy goes wherever the policy went: collectors, evaluators, buffers, exploration, losses."""

from __future__ import annotations

import copy
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn

from tdhook import LRP, Key, Target
from tdhook.relevance.composites.presets import epsilon_plus

pytest.importorskip("torchrl")

from torchrl.collectors import Collector, Evaluator, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import (
    Bounded,
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    OneHot,
    TensorDictReplayBuffer,
)
from torchrl.envs import (
    CatFrames,
    Compose,
    DoubleToFloat,
    GymEnv,
    InitTracker,
    ObservationNorm,
    ParallelEnv,
    RewardScaling,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    MLP,
    ActorValueOperator,
    AdditiveGaussianModule,
    EGreedyModule,
    OneHotCategorical,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss, DDPGLoss, DQNLoss, REDQLoss, SACLoss, SoftUpdate, TD3Loss
from torchrl.objectives.value import GAE

from tdhook.rl import build_actor, make_env

CHOSEN = Target("action_value", "action")
ATTR = ("attr", "observation")
cartpole = partial(make_env, "CartPole-v1")


# One step alone is rounded otherwise than among many. With an epsilon of 1e-6, a unit whose sum is about that small
# passes on a share that differs by a hundredth then; with this one, by a hundred-thousandth.
STABLE = epsilon_plus(epsilon=1e-3)


def q_actor(*cells: int, inputs: int = 4, seed: int = 0) -> TensorDictModule:
    torch.manual_seed(seed)
    architecture = {
        "in_features": inputs,
        "out_features": 2,
        "num_cells": [*cells] or [16],
        "activation": "ReLU",
    }
    return build_actor("dqn_mlp", architecture)


def explain(actor: nn.Module, **options: Any) -> Any:
    return LRP(STABLE, target=CHOSEN, **options).wrap(actor)


def explain_q(env: Any = None) -> Any:
    return explain(q_actor())


def recomputed(actor: nn.Module, td: TensorDictBase) -> torch.Tensor:
    """The reference: of a copy of the actor, from the stored observation, for the stored action."""
    work = td.select("observation").set("taken", td["action"])
    method = LRP(STABLE, target=Target("action_value", Key("taken")), cache_weights=False)
    return method.wrap(copy.deepcopy(actor))(work)[ATTR]


def close(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """For each step, whether two relevances of it are the same.

    But for rounding, which is another for one step than for many; of other weights they differ by far more.
    """
    return ((a - b).abs() <= 1e-5 + 1e-4 * b.abs().amax(-1, keepdim=True)).all(-1)


def collecting(frames: int = 20, total: int = 40, **options: Any) -> dict[str, Any]:
    return {
        "frames_per_batch": frames,
        "total_frames": total,
        "auto_register_policy_transforms": False,
        **options,
    }


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where something hangs."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_buffers": False},
        {"policy_device": "cpu", "storing_device": "cpu"},
        {"reset_at_each_iter": True},
        {"exploration_type": ExplorationType.DETERMINISTIC},
        {"trajs_per_batch": 2, "traj_format": "cat"},
        {"auto_register_policy_transforms": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_a_collector(options: dict[str, Any]) -> None:
    actor = q_actor()
    collector = Collector(cartpole(), explain(actor), **collecting(**options))
    for batch in collector:
        assert batch[ATTR].shape == batch["observation"].shape
        assert bool(close(batch[ATTR], recomputed(actor, batch)).all())
        if "trajs_per_batch" not in options:  # whole trajectories may have begun under older weights
            with torch.no_grad():
                for parameter in actor.parameters():
                    parameter.mul_(1.2)
            collector.update_policy_weights_()
    collector.shutdown()


def test_a_collector_that_writes_into_a_buffer() -> None:
    actor = q_actor()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=8)
    collector = Collector(cartpole(), explain(actor), replay_buffer=buffer, **collecting())
    assert all(batch is None for batch in collector)
    collector.shutdown()
    assert len(buffer) == 40
    assert bool(close(buffer[:][ATTR], recomputed(actor, buffer[:])).all())


def test_random_frames_have_no_relevance() -> None:
    collector = Collector(cartpole(), explain_q(), **collecting(init_random_frames=20))
    random, acted = collector
    collector.shutdown()
    assert not random[ATTR].any()
    assert acted[ATTR].any(-1).all()


@pytest.mark.parametrize("storage", [ListStorage, LazyTensorStorage, LazyMemmapStorage, LazyStackStorage])
def test_a_buffer_with_any_storage(storage: Any) -> None:
    actor = q_actor()
    batch = cartpole(seed=0).rollout(30, explain(actor), break_when_any_done=False)
    buffer = TensorDictReplayBuffer(storage=storage(100), batch_size=8)
    buffer.extend(batch)
    sample = buffer.sample()
    assert bool(close(sample[ATTR], recomputed(actor, sample)).all())
    again = explain(actor)(sample.clone())  # and what was sampled can be explained
    torch.testing.assert_close(again[ATTR], sample[ATTR])


VECTOR = pytest.param(partial(GymEnv, "CartPole-v1", num_envs=3), marks=pytest.mark.slow, id="vector")


@pytest.mark.parametrize("make", [pytest.param(partial(SerialEnv, 3, cartpole), id="serial"), VECTOR])
def test_several_environments(make: Callable[[], Any]) -> None:
    actor = q_actor()
    collector = Collector(make(), explain(actor), **collecting(30, 60))
    for batch in collector:
        assert batch[ATTR].shape == (3, 10, 4)
        assert bool(close(batch[ATTR], recomputed(actor, batch)).all())
    collector.shutdown()


@pytest.mark.slow
def test_parallel_environments() -> None:
    actor = q_actor()
    with within(120):
        collector = Collector(ParallelEnv(2, cartpole), explain(actor), **collecting())
        for batch in collector:
            assert batch[ATTR].shape == (2, 10, 4)
            assert bool(close(batch[ATTR], recomputed(actor, batch)).all())
        collector.shutdown()


def test_transforms_of_the_environment() -> None:
    steps = [
        ObservationNorm(loc=0.1, scale=2.0, in_keys=["observation"]),
        CatFrames(3, -1, in_keys=["observation"]),
        RewardScaling(0.0, 0.1),
        StepCounter(),
        InitTracker(),
    ]
    actor = q_actor(inputs=12)
    collector = Collector(
        TransformedEnv(GymEnv("CartPole-v1"), Compose(*steps)), explain(actor), **collecting()
    )
    for batch in collector:
        assert batch[ATTR].shape == (20, 12)
        assert bool(close(batch[ATTR], recomputed(actor, batch)).all())
    collector.shutdown()


def relevance_seen(td: TensorDictBase) -> dict[str, float]:
    return {"relevance": float(td[ATTR].abs().mean())}


EVALUATING: dict[str, Any] = {
    "max_steps": 20,
    "num_trajectories": 2,
    "metrics_fn": relevance_seen,
    "collector_kwargs": {"auto_register_policy_transforms": False, "traj_format": "cat"},
}


def test_an_evaluator() -> None:
    with within(60):
        evaluator = Evaluator(cartpole(), explain(q_actor()), **EVALUATING)
        trained = explain(q_actor(seed=7))
        for weights in (q_actor(seed=7), trained):
            result = evaluator.evaluate(weights)
            assert result["eval/relevance"] > 0
        evaluator.trigger_eval(trained, step=3)
        assert evaluator.wait()["eval/relevance"] > 0
        evaluator.shutdown()


@pytest.mark.slow
def test_an_evaluator_in_another_process() -> None:
    with within(180):
        evaluator = Evaluator(
            cartpole,
            policy_factory=explain_q,
            backend="process",
            **EVALUATING,
        )
        assert evaluator.evaluate(explain(q_actor(seed=7)))["eval/relevance"] > 0
        evaluator.shutdown()


@pytest.mark.slow
def test_as_one_graph() -> None:
    actor = q_actor()
    collector = Collector(cartpole(), explain(actor, compile={"backend": "eager"}), **collecting())
    for batch in collector:
        assert bool(close(batch[ATTR], recomputed(actor, batch)).all())
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.mul_(1.2)
    collector.shutdown()


def test_of_equal_values_the_first_is_explained() -> None:
    """There torchrl's greedy action is no longer one-hot, and an environment takes the first."""
    actor = q_actor()
    with torch.no_grad():
        for parameter in list(actor.parameters())[-2:]:
            parameter[1] = parameter[0]  # both actions are worth the same
    batch = cartpole(seed=0).rollout(5, explain(actor))
    assert bool((batch["action"] == 1).all())
    first = LRP(STABLE, target=Target("action_value", 0)).wrap(actor)(batch.select("observation"))
    torch.testing.assert_close(batch[ATTR], first[ATTR])


def test_epsilon_greedy_behind_and_inside() -> None:
    actor = q_actor()
    greedy = EGreedyModule(spec=OneHot(2), eps_init=0.9, eps_end=0.9)
    with set_exploration_type(ExplorationType.RANDOM):
        behind = cartpole(seed=0).rollout(
            40, TensorDictSequential(explain(actor), greedy), break_when_any_done=False
        )
        inside = cartpole(seed=0).rollout(
            40, explain(TensorDictSequential(actor, greedy)), break_when_any_done=False
        )
    for batch in (behind, inside):
        assert not torch.equal(batch["action"], actor(batch.clone())["action"])
    # Explained as a whole it is the action that was taken; the actor by itself, the one that it would have taken.
    torch.testing.assert_close(inside[ATTR], recomputed(actor, inside))
    torch.testing.assert_close(behind[ATTR], recomputed(actor, actor(behind.clone())))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        exploited = explain(TensorDictSequential(actor, greedy))(behind.select("observation"))
    assert torch.equal(exploited["action"], actor(behind.clone())["action"])


def pendulum() -> TransformedEnv:
    return TransformedEnv(GymEnv("Pendulum-v1"), Compose(DoubleToFloat(), InitTracker()))


def gaussian() -> ProbabilisticActor:
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
        spec=Bounded(-2, 2, (1,)),
    )


def deterministic() -> TensorDictModule:
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1), nn.Tanh())
    return TensorDictModule(net, ["observation"], ["action"])


@pytest.mark.parametrize("noise", [OrnsteinUhlenbeckProcessModule, AdditiveGaussianModule])
@pytest.mark.parametrize("kind", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_noise_behind_and_inside(noise: Any, kind: ExplorationType) -> None:
    actor, method = deterministic(), LRP("epsilon_plus", target="action")
    strength = (
        {"sigma": 0.1} if noise is OrnsteinUhlenbeckProcessModule else {"sigma_init": 0.1, "sigma_end": 0.1}
    )
    added = noise(spec=Bounded(-2, 2, (1,)), **strength)
    with set_exploration_type(kind):
        behind = TensorDictSequential(method.wrap(actor), added)
        for policy in (behind, method.wrap(TensorDictSequential(actor, added))):
            batch = pendulum().rollout(8, policy)
            own = method.wrap(actor)(batch.select("observation"))
            assert torch.allclose(batch["action"], own["action"]) == (kind is ExplorationType.DETERMINISTIC)
            assert batch[ATTR].shape == (8, 3)
            # What noise adds is absorbed.
            torch.testing.assert_close(batch[ATTR], own[ATTR], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_a_policy_that_samples_acts_as_it_would(kind: ExplorationType) -> None:
    actor, env = gaussian(), pendulum()
    with set_exploration_type(kind):
        rollouts = []
        for policy in (actor, LRP("epsilon_plus", target="loc").wrap(actor)):
            env.set_seed(0)
            torch.manual_seed(0)
            rollouts.append(env.rollout(8, policy))
    plain, explained = rollouts
    assert bool((explained.exclude("attr") == plain).all())


def test_a_shared_trunk() -> None:
    trunk = TensorDictModule(nn.Sequential(nn.Linear(4, 16), nn.ReLU()), ["observation"], ["hidden"])
    head = ProbabilisticActor(
        TensorDictModule(nn.Linear(16, 2), ["hidden"], ["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
    )
    both = ActorValueOperator(trunk, head, ValueOperator(nn.Linear(16, 1), in_keys=["hidden"]))
    acting = LRP("epsilon_plus", target=Target("logits", "action"), ledger=True)
    valuing = LRP("epsilon_plus", target="state_value", attribution_key="worth")
    batch = cartpole(seed=0).rollout(6, acting.wrap(both.get_policy_operator()))
    assert float(batch["ledger", "gap"].abs().max()) < 1e-4
    valuing.wrap(both.get_value_operator())(batch)
    assert batch[ATTR].shape == batch["worth", "observation"].shape == (6, 4)
    # Behind the trunk, as a head alone.
    head_alone = LRP("epsilon_plus", target="state_value").wrap(both.get_value_head())
    assert head_alone(batch.select("hidden"))["attr", "hidden"].shape == (6, 16)
    whole = LRP("epsilon_plus", target="state_value").wrap(both)
    torch.testing.assert_close(whole(batch.select("observation"))[ATTR], batch["worth", "observation"])


def q_value() -> ValueOperator:
    return ValueOperator(
        MLP(in_features=4, out_features=1, num_cells=[16]), in_keys=["observation", "action"]
    )


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "sac": lambda actor, critic: SACLoss(actor, critic),
    "redq": lambda actor, critic: REDQLoss(actor, critic),
    "ddpg": lambda actor, critic: DDPGLoss(actor, critic),
    "td3": lambda actor, critic: TD3Loss(actor, critic, action_spec=Bounded(-2, 2, (1,))),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_next_to_a_loss_whose_parameters_are_functional(name: str) -> None:
    of_gaussian = name in ("sac", "redq")
    actor, critic = (gaussian() if of_gaussian else deterministic()), q_value()
    method = LRP("epsilon_plus", target="loc" if of_gaussian else "action")
    explained, valued = method.wrap(actor), LRP("epsilon_plus", target="state_action_value").wrap(critic)
    loss = LOSSES[name](actor, critic)
    SoftUpdate(loss, tau=0.1)
    optimiser = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        batch = pendulum().rollout(8, explained)
        torch.testing.assert_close(
            batch[ATTR], method.wrap(copy.deepcopy(actor))(batch.select("observation"))[ATTR]
        )
        before = copy.deepcopy(actor.state_dict())
        out = loss(batch.select("observation", "action", "next", "done", "terminated"))
        sum(value for key, value in out.items() if key.startswith("loss_")).backward()
        optimiser.step()
        optimiser.zero_grad()
        assert any(not torch.equal(value, before[key]) for key, value in actor.state_dict().items())
    # One of the critics whose parameters the loss keeps stacked.
    params = (loss.value_network_params if name == "ddpg" else loss.qvalue_network_params).data
    with (params[0] if params.batch_dims else params).to_module(critic):
        assert valued(batch.clone())["attr", "action"].shape == (8, 1)


def test_next_to_the_losses_of_a_q_network_and_of_an_actor_critic() -> None:
    actor = q_actor()
    loss = DQNLoss(actor, action_space="one-hot", delay_value=True)
    SoftUpdate(loss, tau=0.1)
    batch = cartpole(seed=0).rollout(10, explain(actor))
    loss(batch)["loss"].backward()
    assert all(p.grad is not None for p in loss.value_network_params.flatten_keys().values())
    plain = copy.deepcopy(actor)
    again = DQNLoss(plain, action_space="one-hot", delay_value=True)
    SoftUpdate(again, tau=0.1)
    torch.testing.assert_close(loss(batch)["loss"], again(batch.exclude("attr"))["loss"])

    actor, value = (
        gaussian(),
        ValueOperator(MLP(in_features=3, out_features=1, num_cells=[16]), ["observation"]),
    )
    ppo = ClipPPOLoss(actor, value)
    with set_exploration_type(ExplorationType.RANDOM):
        batch = pendulum().rollout(10, LRP("epsilon_plus", target="loc").wrap(actor))
    GAE(gamma=0.9, lmbda=0.9, value_network=value)(batch)
    out = ppo(batch)
    (out["loss_objective"] + out["loss_critic"]).backward()
    assert all(p.grad is not None for p in value.parameters())


def trained_a_bit(actor: nn.Module, batch: TensorDictBase, optimiser: torch.optim.Optimizer) -> None:
    for _ in range(3):
        found = actor(batch.select("observation").reshape(-1))["action_value"]
        ((found * batch["action"].reshape(-1, 2)).sum(-1) - 5.0).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.slow
def test_two_workers_explain_with_the_weights_of_the_moment() -> None:
    actor = q_actor(300, 300)  # large enough for modified weights to be kept from call to call
    optimiser = torch.optim.Adam(actor.parameters(), lr=1e-3)
    frames = updates = 0
    with within(600):
        collector = MultiSyncCollector(
            [cartpole, cartpole], explain(actor), **collecting(1_000, 10_000, cat_results="stack")
        )
        try:
            for batch in collector:
                frames += batch.numel()
                assert batch.shape == (2, 500)
                assert bool(close(batch[ATTR], recomputed(actor, batch)).all())
                trained_a_bit(actor, batch, optimiser)
                assert not close(
                    batch[ATTR], recomputed(actor, batch)
                ).all()  # older weights would be noticed
                collector.update_policy_weights_()
                updates += 1
        finally:
            collector.shutdown()
    assert (frames, updates) == (10_000, 10)


@pytest.mark.slow
def test_two_workers_that_do_not_wait_for_each_other() -> None:
    actor = q_actor(300, 300)
    optimiser = torch.optim.Adam(actor.parameters(), lr=1e-3)
    versions, found = [copy.deepcopy(actor)], []
    with within(300):
        collector = MultiAsyncCollector([cartpole, cartpole], explain(actor), **collecting(200, 1_600))
        try:
            for batch in collector:
                known = torch.stack([close(batch[ATTR], recomputed(version, batch)) for version in versions])
                found += known.any(0).tolist()
                trained_a_bit(actor, batch, optimiser)
                versions.append(copy.deepcopy(actor))
                collector.update_policy_weights_()
        finally:
            collector.shutdown()
    assert bool(known[1:].any())  # those that were trained did arrive
    # One after another, while the workers go on acting: some steps see old ones and new ones.
    assert sum(found) > len(found) / 2


def killed(policy: Any) -> tuple[Exception, list[int]]:
    """What is raised where a worker is killed on the way, and the processes that are left."""
    collector = MultiSyncCollector([cartpole, cartpole], policy, **collecting(40, 4_000, cat_results="stack"))
    workers = [process.pid for process in collector.procs]
    raised: Exception | None = None
    try:
        for i, _ in enumerate(collector):
            if i == 1:
                os.kill(workers[0], signal.SIGKILL)
    except Exception as error:  # whichever it is
        raised = error
    collector.shutdown(raise_on_error=False)
    until = time.monotonic() + 60
    while (left := [pid for pid in workers if runs(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert raised is not None
    return raised, left


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_a_worker_that_is_killed_gives_torchrls_own_error_and_leaves_nothing_behind() -> None:
    with within(300):
        error, left = killed(explain(q_actor()))
    assert not left
    # Of a machine that is busy torchrl makes the second: it closes the other worker before that has ended.
    assert "At least one process failed: worker 0" in str(error) or "Cannot close a process" in str(error)
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    assert any("torchrl" in name for name in frames)
    assert not any("tdhook/src" in name or "/src/tdhook/" in name for name in frames)


def test_losses_are_for_the_actor() -> None:
    explained = explain(q_actor())
    batch = cartpole(seed=0).rollout(4, explained)
    assert not any(value.requires_grad for value in batch.values(True, True))
    with pytest.raises(TypeError, match="in_keys or out_keys"):
        DQNLoss(explained, action_space="one-hot")
