"""An explained policy explores as the policy did: chance and noise, behind it and inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collected import ATTR, STABLE, cartpole, deterministic, explain, gaussian, pendulum, q_actor, recomputed
from tensordict.nn import TensorDictSequential

from tdhook import LRP, Target

pytest.importorskip("torchrl")

from torchrl.data import (
    Bounded,
    OneHot,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import (
    AdditiveGaussianModule,
    EGreedyModule,
    OrnsteinUhlenbeckProcessModule,
)


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
            # Steps one by one and all at once: other kernels of float32, other last digits.
            same = torch.allclose(batch["action"], own["action"], atol=1e-5)
            assert same == (kind is ExplorationType.DETERMINISTIC)
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
