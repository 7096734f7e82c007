"""Relevance of frames: by time, and over the decisions that saw them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from raw_environments import Frames, rolled, with_relevance
from tensordict.nn import TensorDictModule
from torch import nn

from tdhook import LRP, Target

pytest.importorskip("torchrl")

from torchrl.collectors import Collector
from torchrl.envs import (
    CatFrames,
    Compose,
    GymEnv,
    InitTracker,
    ToTensorImage,
    TransformedEnv,
)

from tdhook.rl import frame_times, raw_relevance, relevance_of_frames


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("padding", ["same", "constant"])
@pytest.mark.parametrize("tracked", [False, True])
def test_frames_are_told_by_time(batch: tuple[int, ...], padding: str, tracked: bool) -> None:
    extra = [InitTracker()] if tracked else []
    stack = CatFrames(4, dim=-1, in_keys=["vector"], out_keys=["history"], padding=padding)
    env, td = rolled(stack, *extra, env=Frames(batch=batch), steps=30)
    assert td["next", "done"].any()
    times = frame_times(env, td)
    assert times.shape == (*batch, 30, 4)
    frames = td["history"].unflatten(-1, (4, 5)).reshape(-1, 30, 4, 5)
    for row, seen, vectors in zip(
        times.reshape(-1, 30, 4), frames, td["vector"].reshape(-1, 30, 5), strict=True
    ):
        for t in range(30):
            for i in range(4):
                expected = vectors[row[t, i]] if row[t, i] >= 0 else torch.zeros(5)
                assert torch.equal(seen[t, i], expected)
        assert bool((row[:, -1] == torch.arange(30)).all())
    assert bool((times < 0).any()) == (padding == "constant")


def test_frames_of_a_collectors_batch() -> None:
    def make(*extra: Any) -> TransformedEnv:
        stack = CatFrames(4, dim=-1, in_keys=["vector"], out_keys=["history"])
        return TransformedEnv(Frames(ends=0.1), Compose(stack, *extra))

    options = {"frames_per_batch": 10, "total_frames": 40, "auto_register_policy_transforms": False}
    collector = Collector(make(InitTracker()), None, **options)
    strangers = 0
    for td in collector:
        times = frame_times(make(InitTracker()), td)
        frames, there = td["history"].unflatten(-1, (4, 5)), times >= 0
        assert torch.equal(frames[there], td["vector"][times[there]])
        strangers += int((~there).sum())
        assert td["is_init"][0] or not there[0, :3].any()
    collector.shutdown()
    assert strangers  # of the batch before
    collector = Collector(make(), None, **options)
    with pytest.raises(KeyError, match=r"a collector's batch may begin in the middle .* InitTracker"):
        frame_times(make(), next(iter(collector)))
    collector.shutdown()


def test_relevance_of_a_frame_over_the_decisions_that_saw_it() -> None:
    stack = CatFrames(3, dim=-1, in_keys=["vector"])
    env, td = rolled(stack, env=Frames(batch=(2,)), steps=20)
    with_relevance(td, "vector")
    times, raw = frame_times(env, td), raw_relevance(env, td)["vector"]
    found = relevance_of_frames(raw, times)
    expected = torch.zeros(2, 20, 5)
    for b in range(2):
        for t in range(20):
            for i in range(3):
                expected[b, times[b, t, i]] += raw[b, t, i]
    torch.testing.assert_close(found, expected)
    assert found.sum() == td["attr", "vector"].sum()
    times[0, 5] = -1
    assert relevance_of_frames(raw, times).sum() == raw.sum() - raw[0, 5].sum()
    with pytest.raises(
        ValueError, match=r"relevance of stacked frames is \[\*batch, time, frames, \*shape\]"
    ):
        relevance_of_frames(raw[:, :, :2], times)


def test_an_atari_game() -> None:
    gymnasium, ale_py = pytest.importorskip("gymnasium"), pytest.importorskip("ale_py")
    gymnasium.register_envs(ale_py)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(12, 4, 8, stride=8),
        nn.ReLU(),
        nn.Conv2d(4, 4, 4, stride=4),
        nn.ReLU(),
        nn.Flatten(-3),
        nn.LazyLinear(6),
    )
    stack = [ToTensorImage(in_keys=["pixels"]), CatFrames(4, dim=-3, in_keys=["pixels"]), InitTracker()]
    env = TransformedEnv(GymEnv("ALE/Pong-v5"), Compose(*stack))
    policy = TensorDictModule(net, ["pixels"], ["action_value"])
    td = policy(env.rollout(6))
    LRP("epsilon_plus", target=Target("action_value", "action"), ledger=True).wrap(policy)(td)
    raw, times = raw_relevance(env, td)["pixels"], frame_times(env, td)
    assert raw.shape == (6, 4, 210, 160, 3)
    torch.testing.assert_close(
        raw.flatten(1).double().sum(1), td["ledger", "inputs"].double(), rtol=1e-3, atol=1e-4
    )
    assert times.tolist()[:3] == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2]]
    frames = relevance_of_frames(raw, times)
    assert frames.shape == (6, 210, 160, 3)
    torch.testing.assert_close(frames.double().sum(), raw.double().sum(), rtol=1e-3, atol=1e-3)
