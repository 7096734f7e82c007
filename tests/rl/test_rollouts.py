"""Explained rollouts in a real environment, and their sums on made-up ones."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from tensordict import MemoryMappedTensor, TensorDict
from tensordict.nn import TensorDictModule
from tolerances import TOLERANCE
from torch import Tensor, nn

from tdhook import LRP, Composite, Contrast, Target, preset
from tdhook.rl.rollouts import (
    Episode,
    conservation,
    explained_rollout,
    require_replaceable,
    save,
    summarise,
    taken_actions,
)
from tdhook.rules import IgnoreRule
from tdhook.selectors import Op

rl = pytest.importorskip("tdhook.rl.policies")
pytest.importorskip("torchrl")

CHOSEN = Target("action_value", "action")
ARCHITECTURE = {"in_features": 4, "out_features": 2, "num_cells": [16, 16], "activation": "ReLU"}
SINGLE = TOLERANCE[torch.float32]
FEATURES, ACTIONS = ("a", "b", "c", "d"), ("left", "right")


def actor() -> TensorDictModule:
    return rl.build_actor("dqn_mlp", ARCHITECTURE)


def rollout_of(
    steps: int, composite: str = "epsilon_plus", policy: TensorDictModule | None = None
) -> TensorDict:
    explained = LRP(composite, target=CHOSEN).wrap(policy or actor())
    return explained_rollout(rl.make_env("CartPole-v1", seed=0), explained, steps)


def test_an_explained_rollout_is_a_rollout_with_relevance() -> None:
    policy = actor()
    plain = rl.make_env("CartPole-v1", seed=0).rollout(6, policy)
    explained = rollout_of(6, policy=policy)
    assert explained["attr", "observation"].shape == (6, 4)
    assert not explained["attr", "observation"].requires_grad
    assert bool((explained.exclude("attr") == plain).all())


def test_a_rollout_goes_on_after_the_end_of_an_episode_and_tells_its_progress() -> None:
    told: list[int] = []
    explained = LRP("epsilon_plus", target=CHOSEN).wrap(actor())
    rollout = explained_rollout(rl.make_env("CartPole-v1", seed=0), explained, 150, told.append)
    assert told == list(range(1, 151))
    assert rollout.batch_size == (150,)
    episodes = summarise(rollout, FEATURES, ACTIONS).episodes
    assert len(episodes) > 1  # nobody balances without training
    assert sum(episode.steps for episode in episodes) == 150
    assert all(episode.total == episode.steps for episode in episodes)  # one point per step
    assert all(episode.finished for episode in episodes[:-1])


def test_no_steps_make_no_rollout() -> None:
    explained = LRP("epsilon_plus", target=CHOSEN).wrap(actor())
    with pytest.raises(ValueError, match="a rollout has at least one step, got steps=0"):
        explained_rollout(rl.make_env("CartPole-v1", seed=0), explained, 0)


def made_up(action: Tensor, done: list[bool], reward: list[float], relevance: Tensor) -> TensorDict:
    time = len(done)
    next_ = TensorDict({"done": torch.tensor(done)[:, None], "reward": torch.tensor(reward)[:, None]}, [time])
    return TensorDict({"action": action, "attr": {"observation": relevance}, "next": next_}, [time])


RELEVANCE = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 0.0], [-1.0, -1.0]])
INDICES = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    "action",
    [INDICES, INDICES[:, None], nn.functional.one_hot(INDICES), nn.functional.one_hot(INDICES).bool()],
)
def test_relevance_is_averaged_by_action(action: Tensor) -> None:
    rollout = made_up(action, [False, True, False, False], [1.0, 2.0, 3.0, 4.5], RELEVANCE)
    summary = summarise(rollout, ["x", "y"], ["left", "right"])
    assert summary.steps == 4
    assert summary.episodes == (Episode(3.0, 2, True), Episode(7.5, 2, False))
    assert summary.counts == (2, 2)
    assert summary.by_action.tolist() == [[0.0, -1.5], [4.0, 2.0]]
    assert summary.mean.tolist() == [2.0, 0.25]
    assert summary.magnitude.tolist() == [2.5, 1.75]


def test_an_action_that_was_never_taken_has_no_mean() -> None:
    summary = summarise(
        made_up(INDICES, [False] * 4, [1.0] * 4, RELEVANCE), ["x", "y"], ["left", "right", "up"]
    )
    assert summary.counts == (2, 2, 0)
    assert bool(summary.by_action[2].isnan().all())
    data = summary.to_dict()
    assert data["mean_relevance_by_action"] == {"left": {"x": 0.0, "y": -1.5}, "right": {"x": 4.0, "y": 2.0}}
    assert json.loads(json.dumps(data, allow_nan=False)) == data


@pytest.mark.parametrize(
    "action", [torch.rand(4, 1), torch.rand(4, 2), torch.ones(4, 2), torch.tensor([0, 1, 2, 5])]
)
def test_actions_that_are_not_one_of_several_are_not_told_apart(action: Tensor) -> None:
    rollout = made_up(action, [False] * 4, [1.0] * 4, RELEVANCE)
    assert taken_actions(rollout, 2) is None
    summary = summarise(rollout, ["x", "y"], ["left", "right"])
    assert (summary.actions, summary.counts, summary.by_action.shape) == ((), (), (0, 2))
    assert summary.to_dict()["mean_relevance_by_action"] == {}


def test_several_environments_at_once() -> None:
    one = made_up(INDICES, [False, True, False, False], [1.0, 2.0, 3.0, 4.5], RELEVANCE)
    two = made_up(INDICES, [False, False, False, True], [1.0, 1.0, 1.0, 1.0], -RELEVANCE)
    summary = summarise(torch.stack([one, two]), ["x", "y"], ["left", "right"])
    assert summary.steps == 8
    assert summary.episodes == (Episode(3.0, 2, True), Episode(7.5, 2, False), Episode(4.0, 4, True))
    assert summary.counts == (4, 4)
    assert summary.mean.tolist() == [0.0, 0.0]


def test_a_summary_asks_for_what_it_lacks() -> None:
    rollout = made_up(INDICES, [False] * 4, [1.0] * 4, RELEVANCE)
    with pytest.raises(KeyError, match=r"the rollout has no relevance \('attr', 'pixels'\); it has "):
        summarise(rollout, ["x", "y"], [], ("attr", "pixels"))
    with pytest.raises(ValueError, match=r"\('attr', 'observation'\) has 2 features, and 3 names were given"):
        summarise(rollout, ["x", "y", "z"], [])
    with pytest.raises(ValueError, match=r"its batch size is \[\*batch, time\], got \[\]"):
        summarise(rollout[0], ["x", "y"], [])
    with pytest.raises(ValueError, match=r"its batch size is \[\*batch, time\], got \[0\]"):
        summarise(rollout[:0], ["x", "y"], [])


@pytest.mark.parametrize("name", ["epsilon_plus", "excitation_backprop", "epsilon_plus_flat"])
def test_relevance_put_in_is_what_arrived_and_what_was_absorbed(name: str) -> None:
    policy = actor()
    rollout = rollout_of(8, name, policy)
    account = conservation(rollout, policy, preset(name), CHOSEN)
    assert account is not None
    assert account.target == pytest.approx(rollout["chosen_action_value"].mean().item(), rel=SINGLE)
    assert account.arrived == pytest.approx(rollout["attr", "observation"].sum(-1).mean().item(), rel=SINGLE)
    assert account.target == pytest.approx(account.arrived + account.absorbed, rel=SINGLE)
    assert account.size == pytest.approx(rollout["chosen_action_value"].abs().mean().item(), rel=SINGLE)
    assert account.error < 1e-5


def test_what_is_absorbed_is_the_share_of_the_bias() -> None:
    network = nn.Linear(4, 2)
    policy = TensorDictModule(network, ["observation"], ["action_value"])
    target = Target("action_value", 0)
    steps = TensorDict({"observation": torch.randn(5, 4)}, [5])
    account = conservation(steps, policy, preset("epsilon_plus"), target)
    assert account is not None
    assert account.absorbed == pytest.approx(network.bias[0].item(), rel=1e-4)
    assert account.error < 1e-5


class Adds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.tanh()


def test_relevance_that_is_doubled_shows_as_an_error() -> None:
    policy = TensorDictModule(nn.Sequential(nn.Linear(4, 4), Adds()), ["observation"], ["action_value"])
    steps = TensorDict({"observation": torch.randn(5, 4)}, [5])
    doubling = Composite([(Op("add"), IgnoreRule())]) + preset("epsilon_plus")
    account = conservation(steps, policy, doubling, Target("action_value", 0))
    assert account is not None and account.error > 0.5


@pytest.mark.parametrize(
    "target", [Target("action_value", "all"), Contrast(Target("action_value", 0), CHOSEN)]
)
def test_every_kind_of_target_is_accounted_for(target: Target | Contrast) -> None:
    policy = actor()
    rollout = explained_rollout(
        rl.make_env("CartPole-v1", seed=0), LRP("epsilon_plus", target=target).wrap(policy), 4
    )
    account = conservation(rollout, policy, preset("epsilon_plus"), target)
    assert account is not None and account.error < 1e-5


def test_a_modified_gradient_is_not_conserved() -> None:
    policy = actor()
    assert (
        conservation(rollout_of(2, "guided_backprop", policy), policy, preset("guided_backprop"), CHOSEN)
        is None
    )


def test_a_rollout_is_saved_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "rollout"
    rollout = rollout_of(3)
    rollout["extra", "entry"] = torch.zeros(3)
    save(rollout, folder)
    loaded = TensorDict.load_memmap(folder)
    assert isinstance(loaded["attr", "observation"], MemoryMappedTensor)
    assert bool((loaded == rollout).all())
    save(rollout[:2].exclude("extra"), folder)
    again = TensorDict.load_memmap(folder)
    assert again.batch_size == (2,)
    assert "extra" not in again


def test_nothing_but_a_rollout_is_replaced(tmp_path: Path) -> None:
    rollout = rollout_of(2)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(
        FileExistsError, match="holds something else than a saved TensorDict: choose another folder"
    ):
        save(rollout, tmp_path)
    (tmp_path / "meta.json").write_text('{"title": "thesis"}')
    with pytest.raises(FileExistsError, match="holds something else"):
        save(rollout, tmp_path)
    with pytest.raises(FileExistsError, match=r"thesis\.txt is a file, where a folder is to be written"):
        save(rollout, tmp_path / "thesis.txt" / "rollout")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "explain_rollout.py"))
    assert capsys.readouterr().out.startswith("episode return 500")
    assert TensorDict.load_memmap("rollout")["attr", "observation"].shape == (500, 4)
    assert Path("relevance.png").exists()


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    require_replaceable(tmp_path)
    require_replaceable(tmp_path / "not" / "there")
