"""A memory task whose truth is known: the action was told at one earlier step, and nothing else tells it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchrl")
pytest.importorskip("matplotlib")

from torchrl.modules import set_recurrent_mode

from tdhook import LRP, Key
from tdhook.rl.history import memory_keys
from tdhook.targets import AtStep

AGENTS = Path(__file__).parents[2] / "examples" / "agents"


@pytest.fixture
def recurrent(monkeypatch):
    """The script that trained the policies."""
    monkeypatch.syspath_prepend(str(AGENTS))
    return importlib.import_module("recurrent")


@pytest.fixture
def checkpoint():
    return torch.load(AGENTS / "checkpoints" / "recurrent.pt", weights_only=True)


def share_on_the_lit_step(recurrent, episodes, relevance):
    hits = [part.start + int(relevance[game, part].abs().argmax()) == lit for game, part, lit in episodes]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_that_step_has_the_largest_relevance(recurrent, checkpoint, kind):
    policy = recurrent.load(checkpoint, kind)
    played = recurrent.make_game(policy, 64, seed=1).rollout(40, policy, break_when_any_done=False)
    ends = played["next", "done"].squeeze(-1)
    assert played["next", "reward"][ends].mean() > 0.99
    episodes = recurrent.episodes(played)
    assert len(episodes) > 200
    assert len({lit - part.start for _, part, lit in episodes}) > 8  # it varies
    explained = recurrent.explain_episodes(policy, played, ledger=False)
    relevance = explained["attr", "observation"].sum(-1)
    assert share_on_the_lit_step(recurrent, episodes, relevance) > 0.95
    # It speaks for the side that it showed.
    for game, part, lit in episodes:
        left = explained["observation"][game, lit, 0] > 0
        assert (relevance[game, lit] > 0) == left, (game, part, lit)


@pytest.mark.parametrize("composite", ["deeplift", "lstm_lrp"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_against_a_baseline_it_has_it_too(recurrent, checkpoint, kind, composite):
    """Against no arrow and no light, in all episodes, and for the side that it showed."""
    policy = recurrent.load(checkpoint, kind)
    played = recurrent.make_game(policy, 64, seed=1).rollout(40, policy, break_when_any_done=False)
    target = AtStep(recurrent.LEFT_NOT_RIGHT, Key(("next", "done")))
    lrp = LRP(composite, target=target, baseline={"observation": 0.0})
    reads = ["observation", *memory_keys(policy)]
    with set_recurrent_mode("recurrent"), lrp.prepare(policy, in_keys=reads) as explained:
        relevance = explained(played.copy())["attr", "observation"].sum(-1)
    episodes = recurrent.episodes(played)
    assert share_on_the_lit_step(recurrent, episodes, relevance) > 0.99
    for game, part, lit in episodes:
        left = played["observation"][game, lit, 0] > 0
        assert (relevance[game, lit] > 0) == left, (game, part, lit)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_also_where_it_lies_in_an_earlier_batch_of_the_collector(recurrent, checkpoint, kind):
    policy = recurrent.load(checkpoint, kind)
    batches = recurrent.collect(policy, games=64, steps=6, count=3, seed=2)
    assert all(batch.batch_size == (64, 6) for batch in batches)
    played = torch.cat(batches, 1)
    earlier = [(game, part, lit) for game, part, lit in recurrent.episodes(played) if lit < 12 < part.stop]
    assert len(earlier) > 20
    explained = recurrent.explain_batches(policy, batches, ledger=False)
    assert share_on_the_lit_step(recurrent, earlier, explained["attr", "observation"].sum(-1)) > 0.95


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_was_before_the_episode_has_no_relevance(recurrent, checkpoint, kind):
    """In the same windows, where each holds several episodes."""
    policy = recurrent.load(checkpoint, kind)
    batches = recurrent.collect(policy, games=32, steps=10, count=2, seed=3)
    relevance = recurrent.explain_batches(policy, batches, ledger=False)["attr", "observation"].abs().sum(-1)
    played = torch.cat(batches, 1)
    explained = torch.zeros_like(relevance, dtype=torch.bool)
    for game, part, _ in recurrent.episodes(played):
        explained[game, part] = part.stop > 10
    assert explained.any()
    known = played["is_init"].squeeze(-1).cumsum(-1) > 0
    assert not relevance[known & ~explained].any()
