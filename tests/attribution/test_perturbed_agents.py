"""Agents that were trained: what is known to matter to them is what perturbation finds."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tdhook import Key, References, Target
from tdhook.attribution import Ablation, KernelShap, Shapley, ShapleySampling
from tdhook.perturbing.features import along
from tdhook.targets import AtStep

AGENTS = Path(__file__).parents[2] / "examples" / "agents"


@pytest.fixture
def recurrent(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("torchrl")
    monkeypatch.syspath_prepend(str(AGENTS))
    return importlib.import_module("recurrent")


@pytest.mark.filterwarnings("ignore:input 'is_init' is torch.bool")
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("method", [Ablation, ShapleySampling])
def test_a_recurrent_policy_remembers_the_lit_step(recurrent, kind, method) -> None:
    """Nothing says that steps belong together: it is seen."""
    policy = recurrent.load(torch.load(AGENTS / "checkpoints" / "recurrent.pt", weights_only=True), kind)
    played = recurrent.make_game(policy, 8, 100).rollout(30, policy, break_when_any_done=False)
    steps = along((30, 2), 0)
    for target in (recurrent.LEFT_NOT_RIGHT, AtStep(recurrent.LEFT_NOT_RIGHT, Key(("next", "done")))):
        explained = method(target, attribute=["observation"], features=steps).wrap(policy)
        with recurrent.set_recurrent_mode(True):
            relevance = explained(played.clone())["attr", "observation"].sum(-1)
        whole = recurrent.episodes(played)
        found = [part.start + int(relevance[game, part].abs().argmax()) for game, part, _ in whole]
        assert found == [lit for _, _, lit in whole]


def test_the_packaged_policy_is_explained_alike_by_all() -> None:
    pytest.importorskip("gymnasium")
    from tdhook.rl import demo_policy, make_env

    policy = demo_policy()
    rollout = make_env(policy.env_id, seed=0).rollout(50, policy.actor)
    options = {"baseline": References("mean", data=rollout), "ledger": True}
    states = rollout.select("observation", "action")
    found = [
        method.wrap(policy.actor)(states.clone())
        for method in (
            Shapley(Target("action_value", "action"), **options),
            KernelShap(Target("action_value", "action"), **options),
            ShapleySampling(Target("action_value", "action"), permutations=48, stratified=True, **options),
        )
    ]
    for one in found:
        assert one["ledger", "gap"].abs().max() < 1e-3
        torch.testing.assert_close(
            one["attr", "observation"], found[0]["attr", "observation"], rtol=0.02, atol=0.3
        )
    torch.testing.assert_close(
        found[0]["attr", "observation"], found[1]["attr", "observation"], rtol=1e-3, atol=1e-3
    )
