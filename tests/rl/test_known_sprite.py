"""A pixel task whose truth is known: one sprite tells the right action, and the others lie about."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict

pytest.importorskip("torchrl")

from torchrl.data import Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

from tdhook import LRP, Contrast, Target, preset
from tdhook.rl import build_actor

SIDE, SPRITE = 16, 3
RED, GREEN, BLUE, GREY = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.6, 0.6]])
ARCHITECTURE = {
    "in_shape": [3, SIDE, SIDE],
    "channels": [8, 16],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_cells": [32],
    "out_features": 2,
    "activation": "ReLU",
}


def scenes(count, generator):
    """Images ``[count, 3, SIDE, SIDE]``, the right actions ``[count]``, and where the sprite lies that tells them.

    It is red for action 0 and blue for action 1. Two green ones and a grey one, which is as red as it is blue, are
    there whatever the action is. None lies on another.
    """
    tells = torch.randint(2, (count,), generator=generator)
    colours = torch.stack([RED, BLUE])[tells]
    pixels, where = torch.zeros(count, 3, SIDE, SIDE), torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    # Cells of four by four pixels, of which each sprite has one, and lies somewhere in it.
    cells = torch.rand(count, 16, generator=generator).argsort(-1)[:, :4]
    offset = torch.randint(2, (count, 4, 2), generator=generator)
    for i in range(count):
        for n, colour in enumerate((colours[i], GREEN, GREEN, GREY)):
            cell, (down, right) = int(cells[i, n]), offset[i, n].tolist()
            top, left = 4 * (cell // 4) + down, 4 * (cell % 4) + right
            part = (slice(top, top + SPRITE), slice(left, left + SPRITE))
            pixels[i, :, part[0], part[1]] = colour[:, None, None]
            where[i][part] = n == 0
    return pixels, tells, where


class Scenes(EnvBase):
    """One scene after another, whatever the agent does; the reward is 1 for the right action."""

    def __init__(self, count, seed):
        super().__init__(batch_size=[count])
        self.observation_spec = Composite(
            pixels=Unbounded((count, 3, SIDE, SIDE)),
            where=Unbounded((count, SIDE, SIDE), dtype=torch.bool),
            tells=Unbounded((count,), dtype=torch.int64),
            shape=[count],
        )
        self.action_spec = OneHot(2, shape=(count, 2))
        self.reward_spec = Unbounded((count, 1))
        self._set_seed(seed)

    def _set_seed(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def _scene(self):
        pixels, tells, where = scenes(self.batch_size[0], self.generator)
        return {"pixels": pixels, "tells": tells, "where": where}

    def _reset(self, td=None):
        return TensorDict(
            {**self._scene(), "done": torch.zeros(*self.batch_size, 1, dtype=torch.bool)}, self.batch_size
        )

    def _step(self, td):
        right = td["action"].argmax(-1) == td["tells"]
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return TensorDict({**self._scene(), "reward": right[:, None].float(), "done": done}, self.batch_size)


@pytest.fixture(scope="module")
def rollout_of():
    """A function: what a policy did in 400 scenes, explained by a composite for a target. The policy is right."""
    torch.manual_seed(0)
    actor = build_actor("ppo_cnn", ARCHITECTURE)
    network = actor[0].module
    pixels, tells, _ = scenes(2000, torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(8):
        for chosen in torch.randperm(len(pixels)).split(100):
            loss = F.cross_entropy(network(pixels[chosen]), tells[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def rollout(composite, target=None, baseline=None):
        target = target or Target("logits", "action")
        explained = LRP(composite, target=target, baseline=baseline, ledger=True).wrap(actor.eval())
        found = Scenes(100, seed=2).rollout(4, explained)
        assert found["next", "reward"].mean() > 0.99
        return found

    return rollout


def hits(rollout):
    """In how many scenes the most relevant pixel lies on the sprite that tells the action (Zhang et al. 2016)."""
    relevance = rollout["attr", "pixels"].sum(-3).flatten(-2)
    return rollout["where"].flatten(-2).gather(-1, relevance.argmax(-1, keepdim=True)).float().mean().item()


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus", "epsilon_alpha2_beta1"])
def test_the_most_relevant_pixel_lies_on_the_sprite_that_tells_the_action(rollout_of, composite):
    rollout = rollout_of(composite)
    assert rollout["attr", "pixels"].shape == (100, 4, 3, SIDE, SIDE)
    assert hits(rollout) > 0.95
    assert rollout["ledger", "gap"].abs().max() < 1e-4 * rollout["ledger", "target"].abs().mean()


@pytest.mark.parametrize("baseline", [0.0, "mean"], ids=["zero", "mean"])
@pytest.mark.parametrize("composite", ["deeplift", "epsilon_plus", "epsilon_alpha2_beta1"])
def test_so_it_does_against_a_baseline_in_all_scenes(rollout_of, composite, baseline):
    rollout = rollout_of(composite, baseline=baseline)
    assert hits(rollout) > 0.99
    assert rollout["ledger", "gap"].abs().max() < 1e-4 * rollout["ledger", "target"].abs().mean()


def test_so_it_does_for_a_contrast_and_a_box_rule(rollout_of):
    this_not_that = Contrast(Target("logits", "action"), Target("logits", "all"))
    rollout = rollout_of(preset("epsilon_gamma_box", low=0.0, high=1.0), this_not_that)
    rollout["attr", "pixels"] = rollout["attr", "pixels"].sum(2)  # over the actions that it is compared with
    assert hits(rollout) > 0.95


def test_a_random_map_does_not_point_at_it(rollout_of):
    rollout = rollout_of("epsilon")
    rollout["attr", "pixels"] = torch.rand(100, 4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    assert hits(rollout) < 0.15
