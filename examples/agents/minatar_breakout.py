"""Breakout of MinAtar, where each kind of object has a plane of its own: which of them made the paddle move, and where?

python examples/agents/minatar_breakout.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import CHECKPOINTS, Shown, gap, main
from minatar import Environment
from pixel_ppo import Settings, as_checkpoint, initialise
from pixel_ppo import train as ppo
from torch import Tensor
from torchrl.modules import ProbabilisticActor

from tdhook import LRP, Contrast, Target
from tdhook.plots import relevance_on_frames
from tdhook.rl import Policy, build_actor, load_policy, make_env

ENV = "MinAtar/Breakout-v1"
PLANES = ("paddle", "ball", "trail", "brick")
COLOURS = torch.tensor([[255, 255, 255], [255, 210, 0], [120, 120, 60], [150, 150, 150]], dtype=torch.uint8)
ACTIONS = ("stay", "left", "right")
LEFT, RIGHT = 1, 2
PREPROCESSING = [
    {
        "transform": "DTypeCastTransform",
        "dtype_in": "bool",
        "dtype_out": "float32",
        "in_keys": ["observation"],
        "out_keys": ["pixels"],
    },
    {"transform": "PermuteTransform", "dims": [-1, -3, -2], "in_keys": ["pixels"]},
]
ARCHITECTURE = {
    "in_shape": [4, 10, 10],
    "channels": [16],
    "kernel_sizes": [3],
    "strides": [1],
    "num_cells": [64],
    "out_features": len(ACTIONS),
    "activation": "ReLU",
}
GAMES, STEPS = 64, 300
SETTINGS = Settings(steps=1_500_000, length=32, minibatch=256, epochs=4, rate=2e-3, clip=0.2, entropy=0.01)


class Breakouts:
    """Many games, one after another in each step: they are quick."""

    def __init__(self, seed: int) -> None:
        self.games = [Environment("breakout") for _ in range(GAMES)]
        for i, game in enumerate(self.games):
            game.seed(seed + i)
            game.reset()
        self.actions = self.games[0].minimal_action_set()
        self.returns = [0.0] * GAMES

    def reset(self) -> Tensor:
        states = np.stack([game.state() for game in self.games])
        return torch.from_numpy(states).float().permute(0, 3, 1, 2).contiguous()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        rewards, ended, finished = torch.zeros(GAMES), torch.zeros(GAMES, dtype=torch.bool), list[float]()
        for i, (game, action) in enumerate(zip(self.games, actions.tolist(), strict=True)):
            reward, done = game.act(self.actions[action])
            self.returns[i] += reward
            rewards[i], ended[i] = reward, done
            if done:
                finished.append(self.returns[i])
                self.returns[i] = 0.0
                game.reset()
        return self.reset(), rewards, ended, finished


def train(seed: int) -> dict[str, Any]:
    """PPO; the checkpoint is one that ``tdhook.rl.load_policy`` reads."""
    torch.manual_seed(seed)
    actor = build_actor("ppo_cnn", ARCHITECTURE)
    network = actor[0].module
    initialise(network)
    return checkpoint(actor, {"seed": seed, **ppo(network, Breakouts(seed), SETTINGS)}, seed)


def checkpoint(actor: ProbabilisticActor, facts: dict[str, Any], seed: int) -> dict[str, Any]:
    """The trained policy as plain data, with its mean return and that of chance."""
    facts = {
        **facts,
        "mean return": mean_return(actor, seed + GAMES),
        "mean return, at random": mean_return(None, seed + GAMES),
    }
    metadata = {
        "kind": "ppo_cnn",
        "architecture": ARCHITECTURE,
        "preprocessing": PREPROCESSING,
        "facts": facts,
    }
    return as_checkpoint(Policy(actor, ENV, PLANES, ACTIONS, metadata))


@torch.no_grad()
def mean_return(actor: ProbabilisticActor | None, seed: int) -> float:
    """Mean return of the first episode in each game, with sampled actions: the greedy policy can rally for ever."""
    games, first = Breakouts(seed), torch.full((GAMES,), torch.nan)
    seen, so_far = games.reset(), torch.zeros(GAMES)
    for _ in range(5_000):
        odds = torch.zeros(GAMES, len(ACTIONS)) if actor is None else actor[0].module(seen)
        seen, rewards, ended, _ = games.step(torch.multinomial(odds.softmax(-1), 1).squeeze(1))
        so_far += rewards
        first = torch.where(ended & first.isnan(), so_far, first)
        if not first.isnan().any():
            break
    return round(torch.where(first.isnan(), so_far, first).mean().item(), 2)


def pictures(pixels: Tensor) -> Tensor:
    """Planes ``[n, 4, 10, 10]`` as pictures, ``[n, 10, 10, 3]`` in uint8; the first plane is on top."""
    found = torch.zeros(len(pixels), 10, 10, 3, dtype=torch.uint8)
    for plane in reversed(range(len(PLANES))):
        found[pixels[:, plane] > 0] = COLOURS[plane]
    return found


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Explain why it goes left rather than right."""
    policy = load_policy(CHECKPOINTS / "minatar_breakout.pt")
    env = make_env(policy, seed)
    left = Contrast(Target("logits", LEFT), Target("logits", RIGHT))
    explained = LRP("epsilon_plus", target=left, ledger=True).wrap(policy.actor)
    rollout = env.rollout(STEPS, explained, break_when_any_done=False)
    relevance, pixels = rollout["attr", "pixels"], rollout["pixels"]
    share = relevance.abs().sum((0, 2, 3)) / relevance.abs().sum()
    on_objects = (relevance.abs() * (pixels > 0)).sum() / relevance.abs().sum()
    margin = rollout["logits"][:, LEFT] - rollout["logits"][:, RIGHT]
    order = margin.argsort()
    shown = [*order[-3:].flip(0).tolist(), *order[:3].tolist()]
    titles = [f"step {i}: left - right = {margin[i]:+.1f}" for i in shown]
    large = pictures(pixels[shown]).repeat_interleave(16, 1).repeat_interleave(16, 2)
    figure = relevance_on_frames(
        large,
        relevance[shown].sum(1),
        titles,
        title="MinAtar Breakout: what speaks for left (red) or right (blue)",
    )
    done = rollout["next", "done"].sum()
    lines = [
        f"return of {len(rollout)} steps: {rollout['next', 'reward'].sum():g} in {done} finished episodes",
        "absolute relevance by object: "
        + ", ".join(f"{name} {part:.0%}" for name, part in zip(PLANES, share.tolist(), strict=True)),
        f"of it on objects, not on empty places: {on_objects:.0%}",
    ]
    return Shown(figure, gap(rollout), lines)


if __name__ == "__main__":
    main("minatar_breakout", train, explain)
