"""Policies as plain data: what is saved loads again, and what is no policy says why."""

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("torchrl")
pytest.importorskip("gymnasium")

from tdhook.rl import Policy, build_actor, demo_policy, load_policy, make_env, save_policy

ARCHITECTURE = {"in_features": 4, "out_features": 2, "num_cells": [8], "activation": "Tanh"}


def policy(kind="dqn_mlp"):
    actor = build_actor(kind, ARCHITECTURE)
    features, actions = ("a", "b", "c", "d"), ("left", "right")
    return Policy(actor, "CartPole-v1", features, actions, {"kind": kind, "architecture": ARCHITECTURE})


@pytest.mark.parametrize("kind, key", [("dqn_mlp", "action_value"), ("ppo_mlp", "logits")])
def test_what_is_saved_loads_again(tmp_path, kind, key):
    before, file = policy(kind), tmp_path / "deep" / "policy.pt"
    save_policy(before, file)
    after = load_policy(file)
    td = TensorDict(observation=torch.randn(5, 4), batch_size=[5])
    assert torch.equal(before.actor(td.clone())[key], after.actor(td.clone())[key])
    assert (after.features, after.actions, after.env_id) == (before.features, before.actions, "CartPole-v1")
    assert torch.load(file, weights_only=True)["format"] == 1


def test_the_demo_policy_balances_the_pole():
    demo = demo_policy()
    assert demo.metadata["evaluation"] == {"episodes": 100, "mean_return": 500.0}
    rollout = make_env(demo.env_id, seed=5).rollout(500, demo.actor)
    assert rollout["next", "reward"].sum() == 500


def test_a_file_that_is_missing():
    with pytest.raises(
        FileNotFoundError, match=r"no policy checkpoint at nowhere.pt: give the path of a file that"
    ):
        load_policy("nowhere.pt")


def broken(checkpoint, **changes):
    return {key: value for key, value in {**checkpoint, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda c: [1, 2], "is not a policy checkpoint of tdhook: it has no 'format' entry"),
        (lambda c: broken(c, format=None), "is not a policy checkpoint of tdhook: it has no 'format' entry"),
        (lambda c: broken(c, format=7), "has checkpoint format 7, and this version of tdhook reads format 1"),
        (lambda c: broken(c, kind=None), "is an incomplete policy checkpoint, without"),
        (lambda c: broken(c, kind="transformer"), "unknown kind of policy 'transformer'"),
        (lambda c: broken(c, state_dict={}), "does not make a policy"),
        (lambda c: broken(c, features=["only one"]), "does not make a policy: it names 1"),
        (
            lambda c: broken(c, architecture={"in_features": 4}),
            "the architecture of a dqn_mlp has the entries",
        ),
    ],
    ids=[
        "a list",
        "no format",
        "another format",
        "no kind",
        "another kind",
        "no weights",
        "features",
        "architecture",
    ],
)
def test_a_file_that_is_no_policy(tmp_path, change, text):
    file = tmp_path / "policy.pt"
    save_policy(policy(), file)
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.raises(ValueError, match=text):
        load_policy(file)


def test_a_file_that_would_run_code(tmp_path):
    file = tmp_path / "policy.pt"
    torch.save({"format": 1, "actor": policy().actor}, file)
    with pytest.raises(ValueError, match="does not load as plain data"):
        load_policy(file)


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    other = build_actor("dqn_mlp", {**ARCHITECTURE, "activation": "ReLU"})
    wrong = Policy(other, "CartPole-v1", ("a", "b", "c", "d"), ("left", "right"), policy().metadata)
    with pytest.raises(ValueError, match="nothing was saved to"):
        save_policy(wrong, tmp_path / "policy.pt")
    assert not list(tmp_path.iterdir())


def test_an_environment_that_is_not_there():
    with pytest.raises(ValueError, match=r"cannot make environment 'Nowhere-v0'.*pprint_registry"):
        make_env("Nowhere-v0")
