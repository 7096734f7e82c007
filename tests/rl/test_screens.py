"""Relevance on the screen that a policy saw, where reports and videos look for it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchrl")
pytest.importorskip("ale_py")

from tdhook import LRP, Target
from tdhook.attribution import GradCAM
from tdhook.rl import demo_policy, make_env
from tdhook.rl.screens import put_on_screen


@pytest.mark.parametrize("index", ["action", "all"])
def test_relevance_of_pixels_is_put_on_the_screen(index: str) -> None:
    policy = demo_policy("freeway")
    env = make_env(policy, seed=0)
    rollout = env.rollout(4, LRP("epsilon_plus", target=Target("logits", index)).wrap(policy.actor))
    assert put_on_screen(env, rollout)
    outputs = (len(policy.actions),) if index == "all" else ()
    assert rollout["frame"].shape == (4, 210, 160, 3) and rollout["frame"].dtype is torch.uint8
    assert torch.equal(rollout["frame"][..., 1], rollout["observation"])
    assert rollout["attr", "frame"].shape == (4, *outputs, 210, 160)
    arrived = rollout["attr", "pixels"].sum((-3, -2, -1))
    torch.testing.assert_close(rollout["attr", "frame"].sum((-2, -1)), arrived, rtol=1e-4, atol=1e-4)


def test_what_was_rendered_stays() -> None:
    policy = demo_policy("freeway")
    env = make_env(policy, seed=0)
    rollout = env.rollout(2, LRP("epsilon_plus", target=Target("logits", "action")).wrap(policy.actor))
    rendered = torch.randint(256, (2, 210, 160, 3), dtype=torch.uint8)
    rollout["frame"] = rendered.clone()
    assert put_on_screen(env, rollout)
    assert torch.equal(rollout["frame"], rendered) and ("attr", "frame") in rollout.keys(True)


def test_values_inside_the_policy_are_not_on_the_screen() -> None:
    policy = demo_policy("freeway")
    env = make_env(policy, seed=0)
    method = GradCAM("module.0.module.0.5", Target("logits", "action"))
    rollout = env.rollout(3, method.wrap(policy.actor))
    assert ("attr", "module.0.module.0.5") in rollout.keys(True)
    assert put_on_screen(env, rollout)
    assert rollout["attr", "frame"].shape == (3, 210, 160) and rollout["attr", "frame"].any()


def test_a_policy_that_sees_no_screen() -> None:
    policy = demo_policy()
    env = make_env(policy.env_id, seed=0)
    rollout = env.rollout(2, LRP("epsilon_plus", target=Target("action_value", "action")).wrap(policy.actor))
    before = set(rollout.keys(True))
    assert not put_on_screen(env, rollout)
    assert set(rollout.keys(True)) == before
