"""What the scripts about vectors share: environments of gymnasium, names for what they observe, how to sum up."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, GymWrapper
from torchrl.envs.utils import ExplorationType, set_exploration_type

CART_POLE = ("cart position", "cart velocity", "pole angle", "pole angular velocity")
ACROBOT = (
    "cos of upper angle",
    "sin of upper angle",
    "cos of lower angle",
    "sin of lower angle",
    "upper velocity",
    "lower velocity",
)
LANDER = ("x", "y", "velocity in x", "velocity in y", "angle", "angular velocity", "left leg", "right leg")
PENDULUM = ("cos of angle (height)", "sin of angle", "angular velocity")


def several(env_id: str, count: int, seed: int) -> EnvBase:
    """Copies of an environment as one of batch size ``[count]``; an episode that ends gives way to a new one.

    Args:
        env_id: gymnasium id.
        count: how many.
        seed: of the environments' own random numbers.
    """
    same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    together = gymnasium.make_vec(env_id, num_envs=count, vectorization_mode="sync", vector_kwargs=same_step)
    env = GymWrapper(together)
    env.set_seed(seed)
    return env


@torch.no_grad()
def mean_return(env_id: str, actor: TensorDictModuleBase, episodes: int, steps: int, seed: int) -> float:
    """Mean return of whole episodes in which the actor does what it holds best.

    Args:
        env_id: gymnasium id.
        actor: the policy.
        episodes: how many, one in each of as many environments.
        steps: how long an episode may be.
        seed: of the environments' own random numbers.
    """
    env = several(env_id, episodes, seed)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        rollout = env.rollout(steps, actor, break_when_any_done=False)
    env.close()
    done = rollout["next", "done"]
    first = done.cumsum(1) - done.long() == 0  # of each environment, the episode that began at the reset
    return (rollout["next", "reward"] * first).sum(1).mean().item()


def shares(relevance: Tensor, features: Sequence[str]) -> str:
    """How much of all relevance, for and against, is on each feature: the largest first.

    Args:
        relevance: ``[steps, features]``.
        features: one name per feature.
    """
    size = relevance.abs().mean(0)
    share = (size / size.sum()).tolist()
    ordered = sorted(zip(share, features, strict=True), reverse=True)
    return ", ".join(f"{name} {part:.0%}" for part, name in ordered)


def signs(relevance: Tensor, features: Sequence[str]) -> str:
    """Mean relevance of each feature, with its sign.

    Args:
        relevance: ``[steps, features]``.
        features: one name per feature.
    """
    means = relevance.mean(0).tolist()
    return ", ".join(f"{name} {mean:+.2g}" for name, mean in zip(features, means, strict=True))
