"""Distractors planted into an environment: relevance of a good policy is on what its reward depends on.

Something moves along a line and is to stay near a goal. An observation is its place, the goal, and six numbers that
are drawn anew at each step, from the same distribution, and mean nothing. The best policy is known.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

torchrl = pytest.importorskip("torchrl")

from torchrl.data import Composite, OneHot, Unbounded  # noqa: E402
from torchrl.envs import EnvBase  # noqa: E402
from torchrl.envs.utils import check_env_specs  # noqa: E402
from torchrl.modules import MLP, QValueActor  # noqa: E402
from torchrl.objectives import DQNLoss, SoftUpdate  # noqa: E402

from tdhook import LRP, Contrast, Target  # noqa: E402
from tdhook.attribution import (  # noqa: E402
    Ablation,
    Averaged,
    ExpectedGradients,
    GradientTimesInput,
    IntegratedGradients,
    KernelShap,
    Noise,
    Shapley,
    ShapleySampling,
)

PLACE, GOAL, CAUSAL, FEATURES = 0, 1, 2, 8
STRIDE, STEPS = 0.25, 8
TARGETS = {
    "right, and not left": Contrast(Target("action_value", 2), Target("action_value", 0)),
    "the best, and not each": Contrast(Target("action_value", "argmax"), Target("action_value", "all")),
    "value of the action": Target("action_value", "action"),
}
ATTENTIVE = ("epsilon", "epsilon_plus", "epsilon_alpha2_beta1", "attn_lrp", "guided_backprop", "beta_smooth")


class Chase(EnvBase):
    """``count`` of these lines at once: an action goes left, stays, or goes right, and distance costs."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(batch_size=[count])
        self.observation_spec = Composite(observation=Unbounded((count, FEATURES)), shape=(count,))
        self.action_spec = OneHot(3, shape=(count, 3))
        self.reward_spec = Unbounded((count, 1))
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        self.random = torch.Generator().manual_seed(seed or 0)

    def _uniform(self, count: int) -> Tensor:
        return 2.0 * torch.rand(*self.batch_size, count, generator=self.random) - 1.0

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        self.place, self.goal = self._uniform(1), self._uniform(1)
        return self._seen()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        way = tensordict["action"].float() @ torch.tensor([[-STRIDE], [0.0], [STRIDE]])
        self.place = (self.place + way).clamp(-1.0, 1.0)
        return self._seen(reward=-(self.place - self.goal).abs())

    def _seen(self, **more: Tensor) -> TensorDictBase:
        observation = torch.cat([self.place, self.goal, self._uniform(FEATURES - CAUSAL)], dim=-1)
        done = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return TensorDict({"observation": observation, "done": done, **more}, self.batch_size)


def untrained() -> QValueActor:
    net = MLP(in_features=FEATURES, out_features=3, num_cells=[32, 32], activation_class=nn.ReLU)
    return QValueActor(net, in_keys=["observation"], spec=OneHot(3))


@pytest.fixture(scope="module")
def actor() -> QValueActor:
    """Q-learning from random actions; weight decay removes what the weights of distractors were at the beginning."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        env, actor = Chase(128, seed=0), untrained()
        loss_module = DQNLoss(actor, loss_function="l2", action_space="one-hot", delay_value=True)
        loss_module.make_value_estimator(gamma=0.5)
        target = SoftUpdate(loss_module, tau=0.05)
        optimizer = torch.optim.AdamW(loss_module.parameters(), lr=1e-2, weight_decay=0.5)
        rounds = 110
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=rounds)
        for _ in range(rounds):
            steps = env.rollout(STEPS).reshape(-1)
            for part in steps[torch.randperm(len(steps))].split(256):
                optimizer.zero_grad()
                loss_module(part)["loss"].backward()
                optimizer.step()
                target.step()
            schedule.step()
    return actor.requires_grad_(False)


@pytest.fixture(scope="module")
def rollout(actor: QValueActor) -> TensorDictBase:
    return Chase(256, seed=99).rollout(STEPS, actor)


def mean_return(policy: Any) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return float(Chase(256, seed=99).rollout(STEPS, policy)["next", "reward"].sum(1).mean())


def best(observation: Tensor) -> Tensor:
    way = observation[..., GOAL] - observation[..., PLACE]
    return nn.functional.one_hot((way > STRIDE / 2).long() - (way < -STRIDE / 2).long() + 1, 3)


def causal_share(
    composite: str, target: Any, actor: QValueActor, rollout: TensorDictBase, baseline: Any = None
) -> float:
    lrp = LRP(composite, target=target, baseline=baseline)
    explained = lrp.wrap(actor)(rollout.select("observation", "action"))
    size = explained["attr", "observation"].abs().reshape(-1, FEATURES).sum(0)
    return float(size[:CAUSAL].sum() / size.sum())


def test_the_environment_is_one() -> None:
    check_env_specs(Chase(4, seed=0))


def test_the_policy_is_near_the_best_there_is(actor: QValueActor) -> None:
    most = mean_return(TensorDictModule(best, ["observation"], ["action"]))
    least = mean_return(None)
    assert (mean_return(actor) - least) / (most - least) > 0.98


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("composite", ATTENTIVE)
def test_relevance_is_on_what_matters(
    composite: str, target: Any, actor: QValueActor, rollout: TensorDictBase
) -> None:
    assert causal_share(composite, target, actor, rollout) > 0.95


@pytest.mark.parametrize("baseline", [0.0, "mean"], ids=["zero", "mean"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_against_a_baseline_less_is_on_what_does_not_matter(
    target: Any, baseline: Any, actor: QValueActor, rollout: TensorDictBase
) -> None:
    """What is the same for all actions still has a little of the value of one; 99 % where actions are compared."""
    against = causal_share("deeplift", target, actor, rollout, baseline)
    assert against > causal_share("epsilon", target, actor, rollout) - 1e-3
    assert against > (0.99 if isinstance(target, Contrast) else 0.98)


@pytest.mark.parametrize("baseline", [0.0, "mean"], ids=["zero", "mean"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_what_is_left_on_them_is_there(
    target: Any, baseline: Any, actor: QValueActor, rollout: TensorDictBase
) -> None:
    """Exact Shapley values have no more on what matters: so much of what is explained rests on the rest."""
    steps = rollout.select("observation", "action").reshape(-1)[:512]
    found = Shapley(target=target, baseline=baseline).wrap(actor)(steps.copy())
    size = found["attr", "observation"].abs().reshape(-1, FEATURES).sum(0)
    exact = float(size[:CAUSAL].sum() / size.sum())
    assert exact - 1e-3 < causal_share("deeplift", target, actor, steps, baseline) < exact + 5e-3


METHODS = {
    "integrated gradients": IntegratedGradients(baseline="mean"),
    "integrated gradients until close": IntegratedGradients(baseline="mean", tolerance=1e-2),
    "expected gradients": ExpectedGradients(samples=64),
    "Shapley values": Shapley(baseline="mean"),
    "Shapley values by sampling": ShapleySampling(baseline="mean"),
    "Shapley values by least squares": KernelShap(baseline="mean", coalitions=128),
    "ablation": Ablation(baseline="mean"),
    "SmoothGrad times input": Averaged(GradientTimesInput(), Noise(0.1)),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_other_methods_find_it_too(
    method: Any, target: Any, actor: QValueActor, rollout: TensorDictBase
) -> None:
    steps = rollout.select("observation", "action").reshape(-1)[:512]
    size = method.explaining(target).wrap(actor)(steps)["attr", "observation"].abs().reshape(-1, FEATURES)
    assert size[:, :CAUSAL].sum() / size.sum() > (0.98 if isinstance(target, Contrast) else 0.97)


def test_each_distractor_has_next_to_none(actor: QValueActor, rollout: TensorDictBase) -> None:
    why_right = LRP("epsilon", target=TARGETS["right, and not left"]).wrap(actor)
    size = why_right(rollout.select("observation"))["attr", "observation"].abs().reshape(-1, FEATURES).mean(0)
    assert (size[CAUSAL:] < 0.01 * size.sum()).all()


def test_relevance_in_the_loop_is_on_what_matters(actor: QValueActor) -> None:
    explained = LRP("epsilon", target=TARGETS["right, and not left"]).wrap(actor)
    size = Chase(64, seed=7).rollout(STEPS, explained)["attr", "observation"].abs().sum((0, 1))
    assert size[:CAUSAL].sum() / size.sum() > 0.95


def test_a_goal_on_the_right_speaks_for_going_there(actor: QValueActor, rollout: TensorDictBase) -> None:
    """The difference of the values of right and left grows with ``goal - place``, and so do their shares in it."""
    why_right = LRP("epsilon", target=TARGETS["right, and not left"]).wrap(actor)
    explained = why_right(rollout.select("observation"))
    seen, relevance = (
        explained[key].reshape(-1, FEATURES).T for key in ("observation", ("attr", "observation"))
    )
    correlation = [torch.corrcoef(torch.stack([seen[i], relevance[i]]))[0, 1] for i in (GOAL, PLACE)]
    assert correlation[0] > 0.7 and correlation[1] < -0.7


@pytest.mark.parametrize("composite", ["epsilon", "guided_backprop"])
def test_an_untrained_policy_sees_no_difference(composite: str, rollout: TensorDictBase) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        share = causal_share(composite, TARGETS["right, and not left"], untrained(), rollout)
    assert share < 0.5


@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon_alpha2_beta1_flat"])
def test_a_flat_first_layer_tells_no_features_apart(
    composite: str, actor: QValueActor, rollout: TensorDictBase
) -> None:
    """By its definition, whatever was learned: it is for images, where it marks a region."""
    share = causal_share(composite, TARGETS["right, and not left"], actor, rollout)
    assert share == pytest.approx(CAUSAL / FEATURES, abs=1e-3)


def test_without_cancellation_more_is_left_on_distractors(
    actor: QValueActor, rollout: TensorDictBase
) -> None:
    """Excitation backpropagation passes positive contributions alone: small weights do not cancel each other."""
    target = TARGETS["right, and not left"]
    excitation, epsilon = (
        causal_share(name, target, actor, rollout) for name in ("excitation_backprop", "epsilon")
    )
    assert 0.8 < excitation < epsilon
