"""Proximal policy optimisation (Schulman et al. 2017) for policies that see images; the agents of pixels share it."""

import copy
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchrl.objectives.value.functional import generalized_advantage_estimate

from tdhook.rl import Policy, save_policy

DISCOUNT, TRACE = 0.99, 0.95
CRITIC_WEIGHT, LARGEST_GRADIENT = 0.5, 0.5
ROUNDS_PER_CHECK, EPISODES_PER_CHECK = 20, 20


class Games(Protocol):
    """Several environments that step at once, and start again by themselves."""

    def reset(self) -> Tensor:
        """Observations, ``[n, channels, height, width]``."""
        ...

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        """Observations, rewards ``[n]``, where a return ends ``[n]``, and the returns of episodes that finished."""
        ...


@dataclass(frozen=True)
class Settings:
    """What to try, and how long.

    Attributes:
        steps: actions in all environments together.
        length: steps in each environment between updates.
        minibatch: of how many steps.
        epochs: passes over what was collected.
        rate: of learning at the start; it falls to zero.
        clip: how far the probability of an action may move, as a ratio.
        entropy: weight of the entropy bonus.
    """

    steps: int
    length: int
    minibatch: int
    epochs: int
    rate: float
    clip: float
    entropy: float


def as_checkpoint(policy: Policy) -> dict[str, Any]:
    """What :func:`tdhook.rl.save_policy` would write, and the weights where all scripts of this folder have them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.pt"
        save_policy(policy, path)
        found: dict[str, Any] = torch.load(path, weights_only=True)
    return {**found, "weights": found["state_dict"]}  # kept once: the tensors are the same


def initialise(network: nn.Module) -> None:
    """Orthogonal weights, and nearly even odds of all actions, so that nothing is ruled out before it was tried."""
    last = network[-1][-1]
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.orthogonal_(layer.weight, 0.01 if layer is last else 2**0.5)
            nn.init.zeros_(layer.bias)


def train(network: nn.Module, games: Games, settings: Settings) -> dict[str, Any]:
    """Train a network of logits in place; it is left with the weights whose recent episodes went best.

    Args:
        network: what :func:`tdhook.rl.build_actor` makes: convolutions, then a multi-layer perceptron.
        games: where it acts.
        settings: of the algorithm.

    Returns:
        The steps taken until those weights, and all steps.
    """
    convolutions, head = network
    last = head[-1]
    value = nn.Linear(last.in_features, 1)
    body = nn.Sequential(convolutions, *list(head)[:-1])
    parameters = [*network.parameters(), *value.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.rate, eps=1e-5)

    observation, taken, rounds, start = games.reset(), 0, 0, time.process_time()
    recent: deque[float] = deque(maxlen=EPISODES_PER_CHECK)
    best, best_return, best_taken = copy.deepcopy(network.state_dict()), float("-inf"), 0
    while taken < settings.steps:
        optimizer.param_groups[0]["lr"] = settings.rate * max(1 - taken / settings.steps, 0.02)
        batch, observation = _collect(body, last, value, games, observation, settings.length, recent)
        for _ in range(settings.epochs):
            for chosen in torch.randperm(len(batch["action"])).split(settings.minibatch):
                loss = _loss(
                    body, last, value, {key: entry[chosen] for key, entry in batch.items()}, settings
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
                optimizer.step()
        taken, rounds = taken + len(batch["action"]), rounds + 1
        if rounds % ROUNDS_PER_CHECK == 0 and len(recent) >= EPISODES_PER_CHECK // 2:
            mean = sum(recent) / len(recent)
            if mean >= best_return:
                best, best_return, best_taken = copy.deepcopy(network.state_dict()), mean, taken
            print(
                f"steps {taken}  mean return {mean:.2f}  CPU {time.process_time() - start:.0f} s", flush=True
            )
    network.load_state_dict(best)
    return {"steps": best_taken, "steps in all": taken}


@torch.no_grad()
def _collect(
    body: nn.Module,
    last: nn.Module,
    value: nn.Module,
    games: Games,
    observation: Tensor,
    length: int,
    recent: deque[float],
) -> tuple[dict[str, Tensor], Tensor]:
    steps = []
    for _ in range(length):
        hidden = body(observation)
        odds = last(hidden).log_softmax(-1)
        action = torch.multinomial(odds.exp(), 1)
        seen = {"observation": observation, "action": action, "log_prob": odds.gather(1, action)}
        observation, reward, ended, returns = games.step(action.squeeze(1))
        recent.extend(returns)
        steps.append(
            {**seen, "value": value(hidden), "reward": reward.unsqueeze(1), "ended": ended.unsqueeze(1)}
        )
    # [n, length, ...], the order of torchrl's batches.
    batch = {key: torch.stack([step[key] for step in steps], 1) for key in steps[0]}
    after = torch.cat([batch["value"][:, 1:], value(body(observation)).unsqueeze(1)], 1)
    reward, ended = batch.pop("reward"), batch.pop("ended")
    advantage, goal = generalized_advantage_estimate(
        DISCOUNT, TRACE, batch.pop("value"), after, reward, ended, ended
    )
    batch |= {"advantage": advantage, "goal": goal}
    return {key: entry.flatten(0, 1) for key, entry in batch.items()}, observation


def _loss(
    body: nn.Module, last: nn.Module, value: nn.Module, batch: dict[str, Tensor], settings: Settings
) -> Tensor:
    hidden = body(batch["observation"])
    odds = last(hidden).log_softmax(-1)
    ratio = (odds.gather(1, batch["action"]) - batch["log_prob"]).exp()
    advantage = batch["advantage"]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
    entropy = -(odds.exp() * odds).sum(-1).mean()
    error = 0.5 * (value(hidden) - batch["goal"]).square().mean()
    return CRITIC_WEIGHT * error - gain - settings.entropy * entropy
