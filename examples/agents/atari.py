"""Freeway of the Atari 2600, from pixels: what makes the chicken walk, and what makes it wait?

    python examples/agents/atari.py

The policy sees four frames, cut and averaged over blocks of four by four pixels. It was trained by PPO for ten minutes
only; its first weights lean towards walking up, since a random walk hardly ever reaches the other side. The facts
printed compare it with one that always walks up: it does better where its actions are drawn, as in training, and just
as well where it takes the most probable ones, for that is always up. Relevance goes back through the transforms of the
environment to the pixels of the screen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from common import CHECKPOINTS, Shown, gap, main
from pixel_ppo import Settings, as_checkpoint, initialise
from pixel_ppo import train as ppo
from torch import Tensor
from torchrl.envs import Compose, ExplorationType, ObservationNorm, ToTensorImage, set_exploration_type
from torchrl.modules import ProbabilisticActor

from tdhook import LRP, Contrast, Target
from tdhook.plots import relevance_on_frames
from tdhook.rl import Policy, build_actor, load_policy, make_env
from tdhook.rl.frames import CropAndPool
from tdhook.rl.raw import raw_relevance

ENV = "ALE/Freeway-v5"
ACTIONS = ("stay", "up", "down")
STAY, UP = 0, 1
FRAMES = ("3 steps ago", "2 steps ago", "1 step ago", "now")
OPTIONS = {"obs_type": "grayscale"}
GREY = 142 / 255  # of the road, which becomes zero
PART = {"height": 176, "width": 152, "top": 20, "left": 8, "pool": 4}
PREPROCESSING = [
    {
        "transform": "UnsqueezeTransform",
        "dim": -1,
        "in_keys": ["observation"],
        "out_keys": ["pixels"],
    },
    {"transform": "ToTensorImage", "in_keys": ["pixels"]},
    {"transform": "CropAndPool", "in_keys": ["pixels"], **PART},
    {
        "transform": "ObservationNorm",
        "loc": GREY,
        "scale": 0.25,
        "standard_normal": True,
        "in_keys": ["pixels"],
    },
    {"transform": "CatFrames", "N": len(FRAMES), "dim": -3, "in_keys": ["pixels"]},
]
ARCHITECTURE = {
    "in_shape": [4, 44, 38],
    "channels": [16, 32, 32],
    "kernel_sizes": [4, 4, 3],
    "strides": [2, 2, 2],
    "num_cells": [128],
    "out_features": len(ACTIONS),
    "activation": "ReLU",
}
GAMES, EPISODE, STEPS = 16, 2048, 300
SETTINGS = Settings(
    steps=8 * GAMES * EPISODE, length=64, minibatch=256, epochs=3, rate=1e-3, clip=0.1, entropy=0.005
)


class Freeways:
    """Many games at once, stepped by ale-py itself, with the preprocessing of the environment that is explained."""

    def __init__(self, seed: int) -> None:
        self.games = AtariVectorEnv(
            "freeway",
            num_envs=GAMES,
            num_threads=1,
            img_height=210,
            img_width=160,
            stack_num=1,
            maxpool=False,
            noop_max=0,
            use_fire_reset=False,
            repeat_action_probability=0.25,  # as in version 5 of the environments of gymnasium
            autoreset_mode="SameStep",
        )
        self.seed = seed
        self.returns = [0.0] * GAMES
        self.seen = torch.empty(0)
        self.frame = Compose(
            ToTensorImage(in_keys=["pixels"]),
            CropAndPool(**PART),
            ObservationNorm(GREY, 0.25, standard_normal=True, in_keys=["pixels"]),
        )

    def reset(self) -> Tensor:
        screens, _ = self.games.reset(seed=self.seed)
        self.seen = self._frames(screens).repeat(1, len(FRAMES), 1, 1)
        return self.seen

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        screens, rewards, terminated, truncated, _ = self.games.step(actions.numpy())
        ended, frames = torch.from_numpy(terminated | truncated), self._frames(screens)
        self.seen = torch.cat([self.seen[:, 1:], frames], 1)
        self.seen[ended] = frames[ended].repeat(1, len(FRAMES), 1, 1)
        finished = []
        for i, reward in enumerate(rewards.tolist()):
            self.returns[i] += reward
            if ended[i]:
                finished.append(self.returns[i])
                self.returns[i] = 0.0
        return self.seen, torch.as_tensor(rewards, dtype=torch.float32), ended, finished

    def _frames(self, screens: np.ndarray[Any, Any]) -> Tensor:
        image = torch.from_numpy(screens).squeeze(1).unsqueeze(-1)
        for transform in self.frame:
            image = transform._apply_transform(image)
        return image


def train(seed: int) -> dict[str, Any]:
    """PPO; the checkpoint is one that ``tdhook.rl.load_policy`` reads."""
    torch.manual_seed(seed)
    actor = build_actor("ppo_cnn", ARCHITECTURE)
    network = actor[0].module
    initialise(network)
    with torch.no_grad():
        network[-1][-1].bias[UP] += 1.5
    network.to(memory_format=torch.channels_last)
    facts = {"seed": seed, **ppo(network, Freeways(seed), SETTINGS)}
    return checkpoint(actor, facts, seed)


def checkpoint(actor: ProbabilisticActor, facts: dict[str, Any], seed: int) -> dict[str, Any]:
    """The trained policy as plain data, with what an episode of it is worth beside one of those who see nothing."""
    facts = {
        **facts,
        "mean return": mean_return(lambda seen: drawn(actor, seen), seed + 1),
        "mean return, most probable actions": mean_return(
            lambda seen: actor[0].module(seen).argmax(-1), seed + 1
        ),
        "mean return, always up": mean_return(lambda seen: torch.full((GAMES,), UP), seed + 1),
        "mean return, at random": mean_return(lambda seen: torch.randint(len(ACTIONS), (GAMES,)), seed + 1),
    }
    metadata = {
        "kind": "ppo_cnn",
        "architecture": ARCHITECTURE,
        "options": OPTIONS,
        "preprocessing": PREPROCESSING,
        "facts": facts,
    }
    return as_checkpoint(Policy(actor, ENV, FRAMES, ACTIONS, metadata))


def drawn(actor: ProbabilisticActor, seen: Tensor) -> Tensor:
    """Actions at random, as probable as the policy makes them."""
    return actor[0].module(seen).softmax(-1).multinomial(1).squeeze(1)


@torch.no_grad()
def mean_return(act: Callable[[Tensor], Tensor], seed: int) -> float:
    """Mean return of one episode in each of the games."""
    games, finished = Freeways(seed), list[float]()
    seen = games.reset()
    while not finished:  # all episodes have the same length
        seen, _, _, finished = games.step(act(seen))
    return round(sum(finished) / len(finished), 2)


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Explain why it walks rather than waits, for a few hundred steps."""
    policy = load_policy(CHECKPOINTS / "atari.pt")
    env = make_env(policy, seed)
    walk = Contrast(Target("logits", UP), Target("logits", STAY))
    explained = LRP("epsilon_plus", target=walk, ledger=True).wrap(policy.actor)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(STEPS, explained)
    raw = raw_relevance(env, rollout)["observation"]  # of each of the four frames
    relevance, screens = raw.sum(1), rollout["observation"]
    by_frame = raw.abs().sum((0, 2, 3))
    logits = rollout["logits"]
    margin = logits[:, UP] - logits[:, STAY]
    # The clearest cases of either kind, no two of the same moment.
    order = margin.argsort()
    shown = sorted([*_apart(order.flip(0), 3), *_apart(order, 3)])
    titles = [f"step {i}: up - stay = {margin[i]:+.1f}" for i in shown]
    figure = relevance_on_frames(
        screens[shown],
        relevance[shown],
        titles,
        title="Freeway: what speaks for walking (red) or waiting (blue)",
    )
    taken = rollout["action"].float().mean(0)
    lines = [
        f"return of the first {len(rollout)} steps: {rollout['next', 'reward'].sum():g}",
        "actions: "
        + ", ".join(f"{name} {share:.0%}" for name, share in zip(ACTIONS, taken.tolist(), strict=True)),
        "absolute relevance by frame: "
        + ", ".join(
            f"{name} {share:.0%}"
            for name, share in zip(FRAMES, (by_frame / by_frame.sum()).tolist(), strict=True)
        ),
    ]
    return Shown(figure, gap(rollout), lines)


def _apart(order: Tensor, count: int, least: int = 8) -> list[int]:
    """The first few steps of an order that lie a little apart."""
    found: list[int] = []
    for step in order.tolist():
        if len(found) < count and all(abs(step - other) >= least for other in found):
            found.append(step)
    return found


if __name__ == "__main__":
    main("atari", train, explain)
