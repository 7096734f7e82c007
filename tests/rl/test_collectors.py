"""An explained policy collects as the policy did: collectors, buffers, environments, evaluators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from collected import ATTR, cartpole, close, collecting, explain, q_actor, recomputed, within
from tensordict import TensorDictBase

pytest.importorskip("torchrl")

from torchrl.collectors import Collector, Evaluator
from torchrl.data import (
    LazyMemmapStorage,
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
)
from torchrl.envs import (
    CatFrames,
    Compose,
    GymEnv,
    InitTracker,
    ObservationNorm,
    ParallelEnv,
    RewardScaling,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import ExplorationType


def explain_q(env: Any = None) -> Any:
    return explain(q_actor())


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
