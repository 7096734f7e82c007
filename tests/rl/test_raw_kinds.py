"""Raw relevance past keys that were renamed, entries that transforms make of their own, and constants of any value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from raw_environments import SHAPE, Frames, rolled, with_relevance
from torch import Tensor

pytest.importorskip("torchrl")

from torchrl.data import Unbounded
from torchrl.envs import (
    CatFrames,
    CatTensors,
    Compose,
    DTypeCastTransform,
    GrayScale,
    ObservationNorm,
    RenameTransform,
    RewardSum,
    StepCounter,
    TargetReturn,
    TensorDictPrimer,
    ToTensorImage,
    TransformedEnv,
    UnaryTransform,
)

from tdhook.rl import raw_relevance

V = ["vector"]


@pytest.mark.parametrize("loc", [0.0, 1.0, 1.001, 2.0, [1.0, 0.0, -1.0, 0.5, 3.0]])
@pytest.mark.parametrize("scale", [1.0, 2.0, -1.0, [1.0, 0.0, 1e-3, -2.0, 5.0]])
@pytest.mark.parametrize("standard_normal", [True, False])
def test_a_normalisation_passes_relevance_whatever_its_statistics(
    loc: Any, scale: Any, standard_normal: bool
) -> None:
    if standard_normal and isinstance(scale, list):
        scale = [1.0, 0.5, 1e-3, -2.0, 5.0]  # nothing is divided by zero
    env, td = rolled(
        ObservationNorm(_tensor(loc), _tensor(scale), in_keys=V, standard_normal=standard_normal)
    )
    with_relevance(td, "vector")
    assert torch.equal(raw_relevance(env, td)["vector"], td["attr", "vector"])
    assert torch.equal(raw_relevance(env, td, by_weight=True)["vector"], td["attr", "vector"])


def _tensor(value: Any) -> Tensor:
    return torch.tensor(value) if isinstance(value, list) else value * torch.ones(5)


MADE = {
    "target_return": [TargetReturn(10.0)],
    "constant": [TargetReturn(10.0, mode="constant", out_keys=["constant"])],
    "episode_reward": [RewardSum()],
    "step_count": [StepCounter()],
    "memory": [TensorDictPrimer({"memory": Unbounded(3)}, default_value=0.5)],
    "sum": [RewardSum(), RenameTransform(["episode_reward"], ["sum"])],
}


@pytest.mark.parametrize("key", MADE)
def test_what_a_transform_makes_keeps_its_relevance(key: str) -> None:
    env, td = rolled(*[step.clone() for step in MADE[key]])
    with_relevance(td, "vector", key)
    raw = raw_relevance(env, td)
    made = "episode_reward" if key == "sum" else key  # under the name that its transform gave it
    assert torch.equal(raw["vector"], td["attr", "vector"])
    assert torch.equal(raw[made], td["attr", key])


def test_it_is_taken_out_of_what_was_joined() -> None:
    env, td = rolled(RewardSum(), CatTensors(["episode_reward", "vector"], "joined", del_keys=False))
    with_relevance(td, "joined", "vector")
    raw = raw_relevance(env, td)
    assert torch.equal(raw["episode_reward"], td["attr", "joined"][..., :1])
    assert torch.equal(raw["vector"], td["attr", "joined"][..., 1:] + td["attr", "vector"])


def _times_two(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize(
    "steps",
    [
        lambda: [RenameTransform(V, ["x"])],
        lambda: [RenameTransform(V, [("a", "x")])],
        lambda: [RenameTransform(["vector", "reward"], ["x", "r"])],
        lambda: [RenameTransform(V, ["w"]), UnaryTransform(["w"], ["x"], fn=_times_two)],
        lambda: [ObservationNorm(1.0, 2.0, in_keys=V, standard_normal=True), RenameTransform(V, ["x"])],
        lambda: [
            RenameTransform(V, ["w"]),
            UnaryTransform(["w"], V, fn=_times_two),
            RenameTransform(V, ["x"]),
        ],
    ],
)
def test_past_renamed_keys(steps: Any) -> None:
    env, td = rolled(*steps())
    key = "x" if "x" in td.keys() else ("a", "x")
    with_relevance(td, key)
    assert torch.equal(raw_relevance(env, td)["vector"], td["attr"].get(key))


def _frames(*steps: Any) -> tuple[TransformedEnv, Any, Tensor]:
    """Grey frames whose raw ones are in the batch under some key, and those."""
    env = TransformedEnv(Frames(), Compose(*steps))
    td = env.rollout(5, break_when_any_done=False)
    torch.manual_seed(0)
    frames = Frames().rollout(5, break_when_any_done=False)["pixels"]
    return env, td, frames


P = ["pixels"]
RENAMED = {
    "before": lambda: [
        RenameTransform(P, ["raw"]),
        ToTensorImage(in_keys=["raw"], out_keys=P),
        GrayScale(in_keys=P),
    ],
    "copied": lambda: [
        RenameTransform(P, ["raw"], create_copy=True),
        ToTensorImage(in_keys=P),
        GrayScale(in_keys=P),
    ],
    "after": lambda: [
        ToTensorImage(in_keys=P, out_keys=["grey"]),
        GrayScale(in_keys=["grey"]),
        RenameTransform(P, ["raw"]),
        RenameTransform(["grey"], P),
    ],
}


@pytest.mark.parametrize("where", RENAMED)
def test_shares_of_mixed_values_where_the_frames_were_renamed(where: str) -> None:
    env, td, _ = _frames(*RENAMED[where]())
    frames = td["raw"].float()
    assert frames.shape[1:] == SHAPE
    with_relevance(td, "pixels")
    weights = torch.tensor([0.2989, 0.587, 0.114])
    x = frames + 1e-6 * frames.amax()
    shares = x * weights / (x * weights).sum(-1, keepdim=True)
    expected = shares * td["attr", "pixels"].movedim(-3, -1)
    torch.testing.assert_close(raw_relevance(env, td)["pixels"], expected, rtol=1e-3, atol=1e-3)


def test_stacked_frames_that_were_renamed() -> None:
    steps = [
        *RENAMED["before"](),
        CatFrames(2, dim=-3, in_keys=P),
        DTypeCastTransform(torch.float32, torch.float64, in_keys=P),
    ]
    env, td, _ = _frames(*steps)
    with_relevance(td, "pixels")
    raw = raw_relevance(env, td)["pixels"]
    assert raw.shape == (5, 2, *SHAPE)
    torch.testing.assert_close(raw.sum(-1), td["attr", "pixels"], rtol=1e-3, atol=1e-3)


def test_frames_that_are_gone_are_asked_for() -> None:
    env, td, _ = _frames(ToTensorImage(in_keys=P), GrayScale(in_keys=P))
    with_relevance(td, "pixels")
    with pytest.raises(KeyError, match="GrayScale mixes values.*'pixels' as the environment gave it"):
        raw_relevance(env, td)
    assert raw_relevance(env, td, by_weight=True)["pixels"].shape == (5, *SHAPE)
