"""Return lost to masks, in an environment whose every reward is known and in a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook import LRP, Contrast, Target
from tdhook.evaluation import (
    Gradient,
    GradientTimesInput,
    MaskedPolicy,
    RandomMap,
    ReturnLost,
    as_classifier,
    as_markdown,
    compare,
    quantus_explain_func,
    return_lost,
)

pytest.importorskip("torchrl")

from torchrl.data import Bounded, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase, SerialEnv

from tdhook.rl import demo_policy, make_env

STEPS = 6
TAKEN = Target("action_value", "action")


class Signs(EnvBase):
    """Pays one for naming the sign of the first of three numbers; the others do not matter. Episodes have six steps."""

    def __init__(self, batch: tuple[int, ...] = (), entry: str = "observation") -> None:
        super().__init__(batch_size=batch)
        self.entry, self.generator, self.seen = entry, torch.Generator(), []
        self.observation_spec = Composite(
            {entry: Bounded(-1.0, 1.0, (*batch, 3)), "step": Unbounded((*batch, 1), dtype=torch.int64)},
            shape=batch,
        )
        self.action_spec = OneHot(2, shape=(*batch, 2))
        self.reward_spec = Unbounded((*batch, 1))

    def _observation(self) -> Tensor:
        return torch.rand(*self.batch_size, 3, generator=self.generator) * 2 - 1

    def _reset(self, td: TensorDictBase | None, **_: Any) -> TensorDict:
        step = torch.zeros(*self.batch_size, 1, dtype=torch.int64)
        return TensorDict({self.entry: self._observation(), "step": step}, self.batch_size)

    def _step(self, td: TensorDictBase) -> TensorDict:
        self.seen.append(td[self.entry].clone())
        right = td["action"][..., 1:].bool() == (td[self.entry][..., :1] > 0)
        step = td["step"] + 1
        done = step >= STEPS
        out = {self.entry: self._observation(), "step": step, "reward": right.float(), "done": done}
        return TensorDict({**out, "terminated": done.clone()}, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(0 if seed is None else seed)


class Values(nn.Module):
    """Action values: the first number speaks for the second action, the second number for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[-1.0, 0.001, 0.0], [1.0, 0.001, 0.0]]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = self.net(x)
        return values, nn.functional.one_hot(values.argmax(-1), 2)


def actor(key: str = "observation") -> TensorDictModule:
    return TensorDictModule(Values(), [key], ["action_value", "action"])


@pytest.mark.parametrize("batch", [(), (3,)])
def test_an_agent_that_does_not_see_what_matters_is_right_by_chance(batch: tuple[int, ...]) -> None:
    env = Signs(batch)
    found = return_lost(env, actor(), LRP("epsilon", target=TAKEN), count=1, baseline=0.0, episodes=12)
    episodes = 12 * (3 if batch else 1)
    assert (
        found.seen.tolist() == found.least.tolist() == [STEPS] * episodes
    )  # nothing is lost without the others
    assert found.lost("least") == 0.0
    # Blind to it, the first action is taken throughout, and is right when the number is negative.
    assert 2.0 < found.most.mean().item() < 4.0
    assert found.lost("most") == pytest.approx(STEPS - found.most.mean().item())
    # Drawn by lot, it is hidden every third time.
    assert found.most.mean().item() < found.random.mean().item() < STEPS
    assert found.more_than_random > 0.5
    assert (found.count, found.features) == (1, 3)
    assert found.to_dict()["episodes"] == episodes


def test_episodes_are_the_same_for_each_mask() -> None:
    env = Signs()
    return_lost(env, actor(), LRP("epsilon", target=TAKEN), fraction=0.34, episodes=2, seed=5)
    seen = torch.stack(env.seen)
    assert len(seen) == 4 * 2 * STEPS
    runs = seen.unflatten(0, (4, -1))
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert not torch.equal(runs[0][:STEPS], runs[0][STEPS:])


def test_it_follows_its_seed_and_leaves_random_numbers_alone() -> None:
    env, model = Signs(), actor()
    random = torch.get_rng_state()
    options: dict[str, Any] = {"count": 1, "baseline": "sample", "episodes": 3}
    first, again, other = (
        return_lost(env, model, RandomMap(TAKEN), seed=seed, **options) for seed in (0, 0, 1)
    )
    assert torch.equal(first.random, again.random) and torch.equal(first.most, again.most)
    assert not torch.equal(torch.cat([first.most, first.random]), torch.cat([other.most, other.random]))
    assert torch.equal(torch.get_rng_state(), random)


def test_other_keys_groups_and_the_end_of_an_episode() -> None:
    env, model = Signs(entry="numbers"), actor("numbers")
    both = return_lost(
        env,
        model,
        GradientTimesInput(TAKEN),
        fraction=0.5,
        baseline=0.0,
        episodes=2,
        groups=torch.tensor([0, 1, 1]),
    )
    assert (both.count, both.features) == (1, 2)
    assert both.least.tolist() == [STEPS, STEPS]
    short = return_lost(env, model, Gradient(TAKEN), count=3, episodes=1, max_steps=2)
    assert short.seen.tolist() == [2.0]
    assert short.most.tolist() == short.least.tolist() == short.random.tolist()  # all is hidden


def test_a_masked_policy_leaves_the_observation_as_it_is() -> None:
    model = actor()
    td = TensorDict({"observation": torch.tensor([[0.5, -1.0, 2.0], [-0.5, 1.0, -2.0]])}, batch_size=[2])
    before = td["observation"].clone()
    policy = MaskedPolicy(model, LRP("epsilon", target=TAKEN), 1)
    out = policy(td)
    assert torch.equal(out["observation"], before) and "attr" not in out
    assert policy.hidden(td).tolist() == [[True, False, False]] * 2
    values = model(TensorDict({"observation": before * torch.tensor([0.0, 1.0, 1.0])}, [2]))["action_value"]
    assert torch.equal(out["action_value"], values)
    signed = TensorDict({"observation": torch.tensor([[0.1, -300.0, 0.0]])}, batch_size=[1])
    assert MaskedPolicy(model, LRP("epsilon", target=TAKEN), 1).hidden(signed).tolist() == [
        [False, True, False]
    ]
    by_sign = MaskedPolicy(model, LRP("epsilon", target=TAKEN), 1, absolute=False)
    assert by_sign.hidden(signed).tolist() == [[True, False, False]]
    least = MaskedPolicy(model, LRP("epsilon", target=TAKEN), 2, "least")
    assert least.hidden(td).tolist() == [[False, True, True]] * 2
    assert torch.equal(
        MaskedPolicy(model, Gradient(), 0)(td.clone())["action_value"], model(td.clone())["action_value"]
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give count, the number of features that are hidden, or fraction"),
        ({"count": 1, "fraction": 0.5}, "give count, the number of features that are hidden, or fraction"),
        ({"fraction": 1.5}, "above 0 and at most 1; got 1.5"),
        ({"count": 4}, "4 features are to be hidden, and there are 3"),
        ({"count": 1, "episodes": 0}, "there is nothing to play: episodes=0"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        return_lost(Signs(), actor(), LRP("epsilon", target=TAKEN), **{"episodes": 1, **options})


def test_a_mask_is_of_one_of_three_kinds() -> None:
    with pytest.raises(ValueError, match="which='some' is none of 'most', 'least', 'random'"):
        MaskedPolicy(actor(), Gradient(), 1, "some")  # type: ignore[arg-type]


def test_a_pole_falls_without_what_made_the_policy_choose() -> None:
    policy = demo_policy()
    env = SerialEnv(4, lambda: make_env(policy.env_id))
    why = LRP("epsilon", target=Contrast(TAKEN, Target("action_value", 0)))
    found = return_lost(env, policy.actor, why, count=1, episodes=1, max_steps=60)
    env.close()
    assert isinstance(found, ReturnLost)
    assert found.seen.tolist() == [60.0] * 4
    assert found.lost("most") > found.lost("least")


def test_a_table_of_methods() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    td = TensorDict({"input": torch.randn(6, 4)}, batch_size=[6])
    methods = {"epsilon": LRP("epsilon"), "random map": RandomMap()}
    rows = compare(methods, model, td, target=Target("output", "argmax"), further={"one": lambda method: 1.0})
    assert [row["method"] for row in rows] == ["epsilon", "random map"]
    assert list(rows[0])[1:] == ["most first", "least first", "between", "sensitivity", "randomised", "one"]
    assert rows[1]["randomised"] == pytest.approx(1.0)
    assert rows[0]["between"] == pytest.approx(rows[0]["least first"] - rows[0]["most first"])
    lines = as_markdown(rows, digits=1).splitlines()
    assert lines[0] == "| method | most first | least first | between | sensitivity | randomised | one |"
    assert lines[-1].startswith("| random map | ") and lines[-1].endswith(" | 1.0 | 1.0 |")
    with pytest.raises(ValueError, match="at least one; got 0"):
        compare(methods, model, td, target=Target("output", 0), models=0)
    with pytest.raises(ValueError, match="a table has at least one row"):
        as_markdown([])


def test_a_classifier_is_a_plain_view_of_the_model() -> None:
    model = actor()
    view = as_classifier(model, out_key="action_value")
    x = torch.randn(5, 3)
    assert torch.equal(view(x), model(TensorDict({"observation": x}, [5]))["action_value"])
    assert next(view.parameters()) is next(model.parameters())
    assert view.eval() is view and not model.training
    with pytest.raises(
        ValueError, match="the model writes 'action_value', 'action': say which with out_key="
    ):
        as_classifier(model)
    with pytest.raises(
        ValueError, match="in_key='pixels' is none of the keys that the model reads: 'observation'"
    ):
        as_classifier(model, "pixels", "action")

    class Goal(nn.Module):
        def forward(self, x: Tensor, goal: Tensor) -> Tensor:
            return x * goal

    goal = TensorDict({"goal": torch.tensor([2.0, 0.0, 1.0])}, batch_size=[])
    view = as_classifier(TensorDictModule(Goal(), ["x", "goal"], ["y"]), "x", others=goal)
    assert torch.equal(view(x), x * goal["goal"])


def test_the_bridge_explains_the_output_that_is_asked_for() -> None:
    np = pytest.importorskip("numpy")
    model = actor()
    view = as_classifier(model, out_key="action_value")
    x, targets = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), np.array([0, 1, 1, 0, 1])
    found = quantus_explain_func(GradientTimesInput())(view, x, targets, device="cpu")
    weights = model.module.net.weight.detach().numpy()
    np.testing.assert_allclose(found, x * weights[targets], rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_quantus_measures_what_we_explain() -> None:
    np = pytest.importorskip("numpy")
    quantus = pytest.importorskip("quantus")
    policy = demo_policy()
    rollout = make_env(policy.env_id, seed=0).rollout(20, policy.actor)
    x, y = rollout["observation"].numpy(), rollout["action"].numpy().argmax(-1)
    view = as_classifier(policy.actor, out_key="action_value").eval()
    given = {"model": view, "x_batch": x, "y_batch": y, "softmax": False, "device": "cpu"}
    asked = quantus_explain_func(LRP("epsilon"))
    flipping = quantus.PixelFlipping(
        features_in_step=1, perturb_baseline="black", abs=False, normalise=False, disable_warnings=True
    )
    theirs = np.array(flipping(**given, explain_func=asked))
    # They begin after the first feature; their "black" is the least value of the input.
    from tdhook.evaluation import perturbation_curve

    least = rollout["observation"].amin(-1, keepdim=True)
    ours = perturbation_curve(
        policy.actor, rollout, LRP("epsilon"), target=TAKEN, baseline=lambda _: least.expand(20, 4)
    )
    np.testing.assert_allclose(theirs, ours.most.value[:, 1:].numpy(), rtol=1e-4)
    layers = quantus.MPRT(disable_warnings=True, normalise=False)(**given, explain_func=asked)
    assert len(layers) > 0
