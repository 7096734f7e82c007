"""Policies as plain data: what is saved loads again, and what is no policy says why."""

import sys
from dataclasses import replace

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


def test_the_demo_policy_of_pixels_acts_in_its_environment():
    pytest.importorskip("ale_py")
    demo = demo_policy("freeway")
    rollout = make_env(demo, seed=0).rollout(5, demo.actor)
    assert rollout["pixels"].shape == (5, *demo.metadata["architecture"]["in_shape"])
    assert demo.metadata["facts"]["mean return"] > 20 > demo.metadata["facts"]["mean return, at random"]


def test_a_demo_policy_that_is_not_there():
    with pytest.raises(
        ValueError, match="no policy 'chess' comes with tdhook: there are 'cartpole', 'freeway'"
    ):
        demo_policy("chess")


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


def test_a_file_that_was_damaged_is_told(tmp_path):
    saved, file = policy(), tmp_path / "policy.pt"
    save_policy(saved, file)
    data = file.read_bytes()
    weight = next(saved.actor.parameters()).detach()
    at = data.index(weight.numpy().tobytes())
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match=r"was changed or damaged after it was written: its part '.*data/0'"):
        load_policy(file)


def test_names_and_environment_of_a_file_are_plain_data(tmp_path):
    saved, file = policy(), tmp_path / "policy.pt"
    save_policy(saved, file)
    data = torch.load(file, weights_only=True)
    for change, text in (
        ({"format": torch.ones(2)}, "has checkpoint format"),
        ({"env": "module:CartPole-v1"}, "would import the module 'module'"),
        ({"options": {"backend": "module"}}, "its option 'backend' is 'module'"),
        ({"options": {"deep": ["a/b"]}}, "its option 'deep'"),
        ({"features": ["a", "a", "b", "c"]}, "features have the name 'a' twice"),
    ):
        torch.save({**data, **change}, file)
        with pytest.raises(ValueError, match=text):
            load_policy(file)
    torch.save({**data, "env": "module:CartPole-v1"}, file)
    assert load_policy(file, "CartPole-v1").env_id == "CartPole-v1"
    with pytest.raises(ValueError, match="nothing was saved"):
        save_policy(replace(saved, env_id="module:CartPole-v1"), tmp_path / "other.pt")
    assert not (tmp_path / "other.pt").exists()


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


CNN = {
    "in_shape": [4, 10, 8],
    "channels": [3, 5],
    "kernel_sizes": [3, 2],
    "strides": [1, 2],
    "num_cells": [6],
    "out_features": 2,
    "activation": "ReLU",
}


def pixel_policy(kind):
    metadata = {"kind": kind, "architecture": CNN}
    return Policy(build_actor(kind, CNN), "CartPole-v1", ("a", "b", "c", "d"), ("left", "right"), metadata)


@pytest.mark.parametrize("kind, key", [("dqn_cnn", "action_value"), ("ppo_cnn", "logits")])
def test_a_policy_that_sees_pixels_loads_again(tmp_path, kind, key):
    before, file = pixel_policy(kind), tmp_path / "policy.pt"
    save_policy(before, file)
    after = load_policy(file)
    td = TensorDict(pixels=torch.randn(3, 5, 4, 10, 8), batch_size=[3, 5])
    assert after.actor.in_keys == ["pixels"]
    assert after.actor(td.clone())[key].shape == (3, 5, 2)
    assert torch.equal(before.actor(td.clone())[key], after.actor(td.clone())[key])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"in_shape": [4, 3, 3]}, "leave nothing of an image"),
        ({"strides": [1]}, "each convolution has channels, a kernel size and a stride"),
        ({"depth": 2}, "the architecture of a ppo_cnn has the entries 'in_shape', 'channels'"),
    ],
)
def test_convolutions_that_do_not_fit(change, text):
    with pytest.raises(ValueError, match=text):
        build_actor("ppo_cnn", {**CNN, **change})


def test_channels_are_named(tmp_path):
    wrong = pixel_policy("ppo_cnn")
    wrong = Policy(wrong.actor, wrong.env_id, ("one",), wrong.actions, wrong.metadata)
    with pytest.raises(ValueError, match=r"it names 1 features, and its architecture has in_shape\[0\]=4"):
        save_policy(wrong, tmp_path / "policy.pt")


NORMALISED = [
    {
        "transform": "ObservationNorm",
        "loc": 1.0,
        "scale": 2.0,
        "standard_normal": True,
        "in_keys": ["observation"],
    },
    {"transform": "CatFrames", "N": 2, "dim": -1, "in_keys": ["observation"], "out_keys": ["seen"]},
]


def test_an_environment_is_made_as_its_policy_says():
    plain = make_env("CartPole-v1", seed=3).reset()["observation"]
    there = Policy(policy().actor, "CartPole-v1", (), (), {"preprocessing": NORMALISED, "options": {}})
    observed = make_env(there, seed=3).reset()
    torch.testing.assert_close(observed["observation"], (plain - 1) / 2)
    assert observed["seen"].shape == (8,)
    given = make_env("CartPole-v1", seed=3, preprocessing=NORMALISED[:1]).reset()
    torch.testing.assert_close(given["observation"], (plain - 1) / 2)


def test_options_reach_the_environment():
    short = make_env("CartPole-v1", seed=0, options={"max_episode_steps": 3})
    assert len(short.rollout(10)) == 3


@pytest.mark.parametrize(
    "step, text",
    [
        ({"transform": "Compose"}, "a step of preprocessing names one of 'CatFrames'"),
        ({"transform": "CatFrames", "N": 2, "sides": 3}, "does not work"),
        (
            {"transform": "DTypeCastTransform", "dtype_in": "bool", "dtype_out": "load"},
            "'load' is no dtype of torch",
        ),
    ],
)
def test_preprocessing_that_is_not_known(step, text):
    with pytest.raises(ValueError, match=text):
        make_env("CartPole-v1", preprocessing=[step])


def test_a_package_of_games_that_is_not_there(monkeypatch):
    gymnasium = pytest.importorskip("gymnasium")
    monkeypatch.delitem(gymnasium.registry, "ALE/Pong-v5", raising=False)
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ImportError, match="environment 'ALE/Pong-v5' needs ale-py, which is not installed"):
        make_env("ALE/Pong-v5")


def test_a_game_seen_in_blocks():
    pytest.importorskip("ale_py")
    preprocessing = [
        {"transform": "UnsqueezeTransform", "dim": -1, "in_keys": ["observation"], "out_keys": ["pixels"]},
        {"transform": "ToTensorImage", "in_keys": ["pixels"]},
        {
            "transform": "CropAndPool",
            "height": 160,
            "width": 160,
            "top": 34,
            "pool": 4,
            "in_keys": ["pixels"],
        },
    ]
    env = make_env("ALE/Pong-v5", seed=0, options={"obs_type": "grayscale"}, preprocessing=preprocessing)
    rollout = env.rollout(3)
    blocks = (
        rollout["observation"][:, 34:194].float().unflatten(-2, (40, 4)).unflatten(-1, (40, 4)).mean((2, 4))
    )
    torch.testing.assert_close(rollout["pixels"], blocks.unsqueeze(1) / 255)
    assert env.observation_spec["pixels"].is_in(rollout["pixels"][0])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"height": 5, "width": 4, "pool": 2}, "blocks of 2 x 2 do not fill 5 x 4"),
        ({"height": 4, "width": 4, "top": -1}, "begins at 0 or later"),
    ],
)
def test_a_part_that_is_none(options, text):
    from tdhook.rl.frames import CropAndPool

    with pytest.raises(ValueError, match=text):
        CropAndPool(**options)


def test_a_part_outside_the_image():
    from tdhook.rl.frames import CropAndPool

    with pytest.raises(ValueError, match="do not lie in an image of 3 x 8"):
        CropAndPool(4, 4)(TensorDict(pixels=torch.rand(2, 3, 8)))
